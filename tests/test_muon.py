"""Muon: official trajectories, torch's own, its factors and options."""

from __future__ import annotations

import pytest
import torch
from lissom.optim import AdamW, Muon, PolarGrad, Trion, param_groups
from lissom.optim.polar import polar

from .golden import follow, load, needs_golden, worst
from .helpers import assert_same, parameters, run, tensors


@needs_golden
@pytest.mark.parametrize("shape", ["16x24", "24x16"])
@pytest.mark.parametrize("source", ["kellermuon", "torchmuon_original",
                                    "torchmuon_match_rms_adamw"])
def test_official_muon(source, shape):
    case, start, gradients, weights = load(f"{source}_{shape}")
    p = torch.nn.Parameter(start.clone())
    optimizer = Muon([p], lr=case["lr"], weight_decay=case["weight_decay"],
                     momentum=case["momentum"], nesterov=case["nesterov"],
                     ns_steps=case["ns_steps"], adjust_lr_fn=case.get("adjust_lr_fn"))
    # torch's is met bit for bit where bf16 products are summed alike; the other rounds every
    # product and sum to bf16, which we do not.
    limit = 1e-2 if source.startswith("torch") else 4e-2
    assert worst(follow(optimizer, p, gradients), weights, start) < limit


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch >= 2.9")
def test_muon_is_torchs(recwarn):
    """In torch's conventions and dtypes, decay and scale included."""
    named = ["spectral_unclamped"] if torch.__version__ >= "2.14" else []
    for fn in (None, "original", "match_rms_adamw", *named):
        for nesterov in (True, False):
            ps, qs = parameters([(24, 16), (16, 24)]), parameters([(24, 16), (16, 24)])
            ours = Muon(ps, lr=0.02, adjust_lr_fn=fn, nesterov=nesterov)
            theirs = torch.optim.Muon(qs, lr=0.02, adjust_lr_fn=fn, nesterov=nesterov)
            start = [p.detach().clone() for p in ps]
            run(ours, ps, range(5))
            run(theirs, qs, range(5))
            for p, q, w in zip(ps, qs, start, strict=True):
                assert (p - q).norm() < 2e-2 * (q - w).norm()


@pytest.mark.parametrize(("name", "tall", "wide"), [
    (None, 1.5**0.5, 1.0), ("original", 1.5**0.5, 1.0), ("spectral", 1.5**0.5, 1.5**-0.5),
    ("spectral_unclamped", 1.5**0.5, 1.5**-0.5),
    ("match_rms_adamw", 0.2 * 24**0.5, 0.2 * 24**0.5)])
def test_factors_of_the_update(name, tall, wide):
    for make in (lambda ps, fn: Muon(ps, lr=1.0, weight_decay=0.0, adjust_lr_fn=fn),
                 lambda ps, fn: Trion(ps, lr=1.0, weight_decay=0.0, rank=3, adjust_lr_fn=fn)):
        moved = []
        for fn in (name, "unscaled"):
            ps = parameters([(24, 16), (16, 24)])
            start = [p.detach().clone() for p in ps]
            run(make(ps, fn), ps, range(1))
            moved.append([w - p.detach() for p, w in zip(ps, start, strict=True)])
        for x, y, factor in zip(*moved, (tall, wide), strict=True):
            torch.testing.assert_close(x, factor * y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["newton-schulz", "polar-express"])
def test_steps_of_the_oracle_are_before_those_of_newton_schulz(method):
    """And in fp32 the factor is that of the fp32 momentum."""
    g = tensors([(24, 16)], 1)[0]
    moved = {}
    for name, options in {"ns": {"ns_steps": 3}, "polar": {"polar_steps": 3},
                          "both": {"ns_steps": 7, "polar_steps": 3}, "more": {}}.items():
        (p,) = parameters([(24, 16)])
        start = p.detach().clone()
        optimizer = Muon([p], lr=1.0, weight_decay=0.0, polar=method, polar_dtype="float32",
                         adjust_lr_fn="unscaled", **options)
        p.grad = g.clone()
        optimizer.step()
        moved[name] = start - p.detach()
    assert_same(moved["ns"], moved["polar"])
    assert_same(moved["ns"], moved["both"])
    assert not torch.allclose(moved["ns"], moved["more"], atol=1e-2)
    exact = polar(g.double(), method, 3)
    torch.testing.assert_close(moved["ns"].double(), exact, rtol=0, atol=1e-5)


def test_muon_does_not_touch_its_momentum_in_half_precision():
    """torch.optim.Muon 2.13 divides the buffer in place there (nesterov=False, bf16)."""
    (p,) = parameters([(24, 16)], dtype=torch.bfloat16)
    optimizer = Muon([p], nesterov=False)
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], torch.full((24, 16), 0.05))


def test_fused_matrices_are_their_parts():
    for fn in ("original", "spectral", "match_rms_adamw"):
        q, k, v = tensors([(8, 6), (4, 6), (4, 6)])
        fused = torch.nn.Parameter(torch.cat([q, k, v]))
        parts = [torch.nn.Parameter(x.clone()) for x in (q, k, v)]
        options = {"adjust_lr_fn": fn, "polar_dtype": "float32", "lr": 0.1}
        one = Muon([{"params": [fused], "split_sizes": (8, 4, 4)}], **options)
        many = Muon(parts, **options)
        for i in range(4):
            gradients = tensors([(8, 6), (4, 6), (4, 6)], i)
            fused.grad = torch.cat(gradients)
            for p, g in zip(parts, gradients, strict=True):
                p.grad = g
            one.step()
            many.step()
        torch.testing.assert_close(fused.detach(), torch.cat(parts).detach(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"split_sizes=\(8, 4\).*one has 16"):
        Muon([{"params": [fused], "split_sizes": (8, 4)}])
    # what gets AdamW is not split
    Muon([{"params": [fused]}, {"params": parameters([(9, 4)]), "algorithm": "adamw"}],
         split_sizes=(8, 8))


def test_group_keys_of_other_packages():
    ps = parameters([(6, 4), (5, 4)])
    optimizer = Muon([{"params": ps[:1], "use_muon": True},
                      {"params": ps[1:], "use_muon": False, "lr": 3e-4}])
    assert [row.rule for row in optimizer.plan()] == ["muon", "adamw"]
    with pytest.raises(TypeError, match="group 0: use_muon='yes', but it must be True or False"):
        Muon([{"params": ps[:1], "use_muon": "yes"}])
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 6),
                                torch.nn.LayerNorm(6), torch.nn.Linear(6, 9))
    for make in (Muon, PolarGrad):
        rules = {row.name: row.rule for row in make(param_groups(model)).plan()}
        own = make.algorithm
        assert rules == {"0.weight": "adamw", "1.weight": own, "1.bias": "adamw",
                         "2.weight": "adamw", "2.bias": "adamw", "3.weight": "adamw",
                         "3.bias": "adamw"}
    with pytest.warns(UserWarning, match="Muon has no matrix"):
        Muon(parameters([(4,)]))


def test_adamw_part_is_adamw():
    ps, qs = parameters([(4,), (3, 4)]), parameters([(4,), (3, 4)])
    groups = [{"params": ps[:1]}, {"params": ps[1:], "algorithm": "adamw"}]
    run(Muon([*groups, {"params": parameters([(2, 2)])}], lr_adamw=1e-2, weight_decay=0.1),
        ps, range(5))
    run(AdamW(qs, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1), qs, range(5))
    assert_same([p.detach() for p in ps], [q.detach() for q in qs])


def test_muon_on_orthogonal_gradients_is_a_scaled_step():
    q = torch.linalg.qr(tensors([(8, 8)])[0]).Q
    (p,) = parameters([(8, 8)])
    start = p.detach().clone()
    p.grad = 3 * q
    Muon([p], lr=0.1, weight_decay=0.0, polar="qdwh").step()
    torch.testing.assert_close(p.detach(), start - 0.1 * q, rtol=0, atol=1e-6)


def test_stacks_that_are_no_views():
    """A stack of experts stored transposed is stepped like one that is not."""
    for turn in (lambda x: x.transpose(1, 2), lambda x: x.transpose(0, 1)):
        w, g = (turn(x) for x in tensors([(4, 6, 8), (4, 6, 8)]))
        for make in (Muon, PolarGrad):
            ps = [torch.nn.Parameter(w.clone(memory_format=f))
                  for f in (torch.preserve_format, torch.contiguous_format)]
            for p in ps:
                p.grad = torch.empty_like(p).copy_(g)
                make([p], matricize="batch", lr=0.1, polar="qdwh").step()
            assert ps[0].stride() != ps[1].stride()
            torch.testing.assert_close(*ps, rtol=0, atol=1e-6)
