"""Pairs beside frozen weights, SwitchLoRA on them, GradNormLoRP: figures, promises, bad input."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from lissom.optim import (
    AdamW,
    GradNormLoRPAdamW,
    PartialStepError,
    SwitchLoRAAdamW,
    adapter_groups,
    base_weights,
    lora,
    merge,
    switchlora,
)
from lissom.optim.adapters import adapters
from lissom.optim.layers import LoRALinear, NormalizedLinear
from torch import nn
from torch.nn import functional

from . import oracle
from .helpers import TOKENS, assert_same, feed, snapshot, tensors, through_disk, tiny_llama, tune

QUICK = {"interval": 8, "freeze_steps": 2, "decay_steps": 1000}


class Net(nn.Module):
    """Tall, wide and square weights, a bias, a norm, an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.down = nn.Linear(20, 12, bias=False)
        self.square = nn.Linear(12, 12)
        self.lm_head = nn.Linear(12, 11, bias=False)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.down(functional.silu(self.norm(self.up(x))))
        return self.lm_head(x + torch.tanh(self.square(x)))


def net(rank=4, dtype=torch.float32, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().to(dtype)
    return lora(model, rank, **options) if rank else model


def batch(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randint(0, 11, (2, 6, 9), generator=generator)


def train(model, optimizer, steps, watch=None):
    for i in steps:
        x, y = batch(i)
        optimizer.zero_grad()
        functional.cross_entropy(model(x).float().flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        if watch:
            watch(i)
    return model(batch(0)[0]).detach()


def pair(shape=(9, 7), r=3, seed=0, dtype=torch.float32, **more):
    """One pair as parameters, and its group."""
    m, n = shape
    w, a, b = (torch.nn.Parameter(x.to(dtype)) for x in
               tensors([(m, n), (r, n), (m, r)], seed))
    w.requires_grad_(False)
    params = [("l.A", a), ("l.B", b), ("l.weight", w)]
    return w, a, b, {"params": params, "roles": ("A", "B", "base"), "scaling": 0.5, **more}


# ---- the modules


def test_lora_keeps_the_function_and_merges_back():
    x = batch(0)[0]
    plain = net(rank=None)
    expected = plain(x)
    for options in ({}, {"init": "lora"}, {"normalize": "input"}, {"normalize": "output"},
                    {"alpha": 3.0, "dtype": torch.float32}):
        model = net(**options)
        assert torch.allclose(model(x), expected, rtol=0, atol=2e-6)
        kind = NormalizedLinear if "normalize" in options else LoRALinear
        assert all(type(getattr(model, k)) is kind for k in ("up", "down", "square"))
        assert type(model.lm_head) is nn.Linear
        for v in model.state_dict().values():
            assert type(v) is torch.Tensor
        assert set(plain.state_dict()) <= set(model.state_dict())
        twin = net(**{**options, "seed": 5})
        twin.load_state_dict(through_disk(model.state_dict()))
        assert_same(model(x), twin(x))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05)
        moved = model(x)
        merged = merge(model)
        assert all(type(getattr(merged, k)) is nn.Linear for k in ("up", "down", "square"))
        assert merged.state_dict().keys() == plain.state_dict().keys()
        assert torch.allclose(merged(x), moved, rtol=0, atol=1e-5)


def test_lora_in_autocast_keeps_the_function():
    x, plain = batch(0)[0], net(rank=None)
    with torch.autocast("cpu", torch.bfloat16):
        model = net()
    assert torch.allclose(model(x), plain(x), rtol=0, atol=2e-6)


def test_lora_draws_within_the_papers_bounds():
    model = nn.Sequential(nn.Linear(80, 60), nn.Linear(60, 60))
    before = torch.get_rng_state()
    lora(model, 16)
    assert torch.equal(before, torch.get_rng_state())
    layer = model[0]
    m, n, r = 60, 80, 16
    g = (1 / 3) ** 0.5
    sigma_a = (m**0.5 * r / n**1.5) ** 0.25 * g**0.5
    sigma_b = (r / (m * n) ** 0.5) ** 0.25 * g**0.5
    for factor, sigma in ((layer.lora_A, sigma_a), (layer.lora_B, sigma_b)):
        assert 0.97 < factor.abs().max() / (3**0.5 * sigma) <= 1
        assert abs(factor.std() / sigma - 1) < 0.05
    assert layer.scaling == 1 / 16
    raw = lora(nn.Sequential(nn.Linear(80, 60), nn.Linear(60, 60)), 16, preserve=False)
    delta = layer.scaling * layer.lora_B @ layer.lora_A
    assert abs(delta.std() * 80**0.5 / g - 1) < 0.1
    assert not torch.equal(raw[0].effective(), raw[0].weight)


@pytest.mark.parametrize("axis", ["input", "output"])
def test_normalized_gradients_are_exact(axis):
    """N3 to N5 against autograd through the module, and autograd in float64."""
    m, n, r = 9, 7, 3
    layer = NormalizedLinear(nn.Linear(n, m), r, 0.5, axis=axis)
    with torch.no_grad():
        for p, x in zip((layer.lora_A, layer.lora_B, layer.magnitude),
                        tensors([(r, n), (m, r), layer.magnitude.shape], 1), strict=True):
            p.copy_(x)
    x, target = tensors([(20, n), (20, m)], 2)
    y = layer(x)
    (y * target).sum().backward()
    dim = 0 if axis == "input" else 1
    w, a, b, mu = (p.detach().double() for p in
                   (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude))
    mu = mu.unsqueeze(dim)
    v = w + 0.5 * b @ a
    c = v.norm(dim=dim, keepdim=True)
    unit = v / c
    g = target.double().mT @ x.double()
    slope = (g * unit).sum(dim, keepdim=True)
    d = (g - unit * slope) * mu / c
    out = x.double() @ (unit * mu).mT + layer.bias.double()
    for got, want in ((layer.magnitude.grad, slope.squeeze(dim)), (y, out),
                      (layer.lora_B.grad, 0.5 * d @ a.mT), (layer.lora_A.grad, 0.5 * b.mT @ d)):
        assert (got.double() - want).norm() < 1e-6 * want.norm()


@pytest.mark.parametrize("axis", ["input", "output"])
def test_a_normalized_layer_keeps_nothing_of_its_weights_size(axis):
    """From the forward to the backward pass: of LLaMA-7B it would be 49 GB."""
    layer = NormalizedLinear(nn.Linear(64, 96), 4, 0.5, axis=axis)
    kept, own = [], {p.data_ptr() for p in layer.parameters()}
    (x,) = tensors([(5, 64)], 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x.requires_grad_())
    fresh = [t for t in kept if t.data_ptr() not in own]
    assert fresh
    assert all(t.numel() <= x.numel() for t in fresh)
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        y.sum().backward()
        assert torch.equal(before, torch.get_rng_state())
    assert layer.lora_A.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y.detach(), atol=0, rtol=0)
    torch.testing.assert_close(x.grad, layer.effective().sum(0).expand_as(x).detach())


@pytest.mark.parametrize("axis", ["input", "output"])
def test_a_normalized_layer_is_a_function_of_its_tensors(axis):
    """Gradients of gradients, of other tensors in its place, and under torch.func and autocast."""
    layer = NormalizedLinear(nn.Linear(5, 4), 2, 0.5, axis=axis).double()
    names = ("lora_A", "lora_B", "magnitude", "bias")
    shapes = [dict(layer.named_parameters())[k].shape for k in names]
    given = [t.double().requires_grad_() for t in tensors([*shapes, (3, 5)], 7)]

    def call(*tensors_):
        *rest, x = tensors_
        return torch.func.functional_call(layer, dict(zip(names, rest, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)
    expected = torch.autograd.grad(call(*given).square().sum(), given)
    for got, want in zip(torch.func.grad(lambda *t: call(*t).square().sum(), tuple(range(5)))(
            *given), expected, strict=True):
        torch.testing.assert_close(got, want)
    rows = torch.func.vmap(lambda x: call(*given[:-1], x))(given[-1])
    torch.testing.assert_close(rows, call(*given))
    torch.testing.assert_close(layer(given[-1][0]), layer(given[-1])[0])
    y = layer(given[-1])
    with torch.no_grad():
        layer.lora_A.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    layer = layer.float()
    with torch.no_grad():
        layer.lora_A.copy_(given[0])
        layer.lora_B.copy_(given[1])
    results = []
    for enabled in (False, True):
        x = given[-1].detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        results.append(torch.autograd.grad(y.float().square().sum(), [x, layer.lora_B]))
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() < 0.05 * one.norm()


def test_a_column_of_zeros_is_no_trap():
    linear = nn.Linear(6, 8)
    linear.weight.data[:, 2] = 0
    model = lora(nn.Sequential(linear, nn.Linear(8, 8)), 3, init="lora", normalize="input")
    optimizer = GradNormLoRPAdamW(adapter_groups(model, rank=2), lr=0.1)
    x = tensors([(5, 6)])[0]
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    w = nn.Parameter(torch.randn(8, 6))
    w.data[:, 2] = 0
    optimizer = GradNormLoRPAdamW([w], rank=2, lr=0.1)
    for i in range(3):
        w.grad = tensors([(8, 6)], i)[0]
        optimizer.step()
        if i == 0:  # the low-rank update as it is
            s = optimizer.state[w]
            u = 0.25 * s["exp_avg"].sign() @ s["basis_right"].mT
            torch.testing.assert_close(w.detach()[:, 2], -0.1 * u[:, 2], rtol=1e-5, atol=0)
    assert w.isfinite().all()
    assert w[:, 2].any()


# ---- SwitchLoRA: figures


@pytest.mark.parametrize(("dtype", "factors", "bound"), [
    (torch.float32, None, 1e-6), (torch.bfloat16, None, 1e-2),
    (torch.bfloat16, torch.float32, 1e-2)])
@pytest.mark.parametrize("where", ["same", "cpu"])
def test_a_switch_keeps_the_function(dtype, factors, bound, where):
    model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 48)).to(dtype)
    lora(model, 8, dtype=factors)
    optimizer = SwitchLoRAAdamW(adapter_groups(model), lr=0.0, candidate_device=where, interval=8,
                                freeze_steps=1, seed=1)
    x = tensors([(50, 40)])[0].to(dtype)
    switched = 0
    for _ in range(12):
        before, pairs = model(x).detach(), model[0].lora_A.detach().clone()
        model(x).sum().backward()
        optimizer.step()
        after = model(x).detach()
        switched += int((pairs != model[0].lora_A).any(1).sum())
        assert (after - before).double().norm() <= bound * before.double().norm()
    assert switched >= 8


def change_ranks(cls, **options):
    """Numerical rank of the change of each weight after training."""
    model = net(rank=None)
    start = [getattr(model, k).weight.detach().clone() for k in ("up", "down", "square")]
    lora(model, 4, init="switchlora" if cls is SwitchLoRAAdamW else "lora")
    params = adapter_groups(model) if cls is SwitchLoRAAdamW else model.parameters()
    train(model, cls(params, lr=2e-2, **options), range(60))
    merge(model)
    ranks = []
    for k, w in zip(("up", "down", "square"), start, strict=True):
        values = torch.linalg.svdvals((getattr(model, k).weight.detach() - w).double())
        ranks.append(int((values > 1e-2 * values[0]).sum()))
    return ranks


def test_the_change_has_full_rank_and_loras_has_not():
    assert change_ranks(AdamW) == [4, 4, 4]
    assert min(change_ranks(SwitchLoRAAdamW, **QUICK)) >= 10


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (8, 8)])
def test_equals_its_oracle(shape):
    options = {"lr": 1e-2, "weight_decay": 0.1, "interval": 6, "freeze_steps": 3, "seed": 4}
    w, a, b, group = pair(shape)
    start = [x.detach().clone() for x in (w, a, b)]
    quiet = SwitchLoRAAdamW([pair(shape)[3]], **{**options, "interval": 1e9, "lr": 0.0})
    for p in quiet.param_groups[0]["params"][:2]:
        p.grad = torch.zeros_like(p)
    quiet.step()
    pools = [quiet.state[p]["candidates"] for p in quiet.param_groups[0]["params"][:2]]
    first = [int(quiet.state[p]["pointer"]) for p in quiet.param_groups[0]["params"][:2]]
    assert first == [0, 1]  # of three vectors: half a round apart
    optimizer = SwitchLoRAAdamW([group], **options)
    gradients, switches, got = [], [], []
    for i in range(40):
        g = tensors([shape], 10 + i)[0]
        a.grad, b.grad = 0.5 * b.detach().mT @ g, 0.5 * g @ a.detach().mT
        # a candidate's number can come back at once: the pointer tells how many went
        old = [int(optimizer.state[p]["pointer"]) for p in (a, b)] if i else first
        optimizer.step()
        step = []
        for p, begin in zip((a, b), old, strict=True):
            s = optimizer.state[p]
            order = [(begin + j) % 3 for j in range((int(s["pointer"]) - begin) % 3)]
            step += [order, [int(s["active"][j]) for j in order]]
        gradients.append(g)
        switches.append(step)
        got.append([x.detach().clone() for x in (w, a, b)])
    assert sum(len(s[0]) for s in switches) > 5
    assert sum(len(s[2]) for s in switches) > 5
    expected = oracle.switchlora(*start, *pools, gradients, switches, scaling=0.5, **options)
    for mine, theirs in zip(got, expected, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert (x.double() - y).norm() < 2e-5 * y.norm()


def test_without_switches_it_is_adamw():
    w, a, b, group = pair()
    qs = [nn.Parameter(x.detach().clone()) for x in (a, b)]
    ours = SwitchLoRAAdamW([group], lr=1e-2, weight_decay=0.1, interval=1e9)
    theirs = torch.optim.AdamW(qs, lr=1e-2, weight_decay=0.1)
    before = w.clone()
    for i in range(10):
        for p, q, g in zip((a, b), qs, tensors([a.shape, b.shape], i), strict=True):
            p.grad, q.grad = g, g.clone()
        ours.step()
        theirs.step()
    for p, q in zip((a, b), qs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(before, w)


def test_frozen_vectors_are_left_out_and_counted():
    _w, a, b, group = pair((30, 40), 8, weight_decay=0.5)
    optimizer = SwitchLoRAAdamW([group], lr=0.1, interval=12, freeze_steps=3, decay_steps=10**6)
    vectors = {a: a, b: b.mT}
    for i in range(60):
        for p, g in zip((a, b), tensors([a.shape, b.shape], i), strict=True):
            p.grad = g
        before = {p: x.detach().clone() for p, x in vectors.items()}
        rest = {p: optimizer.state[p]["frozen"].clone() for p in vectors}
        optimizer.step()
        for p, x in vectors.items():
            s = optimizer.state[p]
            still = rest[p] > 0
            assert torch.equal(before[p][still], x.detach()[still])
            moments = [s[k] if p is a else s[k].mT for k in ("exp_avg", "exp_avg_sq")]
            assert all(not z[still].any() for z in moments)
            assert not s["updates"][still].any()
            # only one of a pair rests at a time, and nobody longer than asked
            assert s["frozen"].max() < 3
        assert not ((optimizer.state[a]["frozen"] > 0) & (optimizer.state[b]["frozen"] > 0)).any()
        assert len(set(optimizer.state[a]["active"].tolist())) == 8


def test_frequency_follows_the_schedule():
    _w, a, b, group = pair((64, 64), 32)
    optimizer = SwitchLoRAAdamW([group], lr=0.0, interval=16, decay_steps=200, freeze_steps=1)
    counts = []
    for _ in range(400):
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        begin = int(optimizer.state[a]["pointer"])
        optimizer.step()
        counts.append((int(optimizer.state[a]["pointer"]) - begin) % 32)
    for part in (range(100), range(300, 400)):
        expected = sum(32 / 16 * 0.3 ** ((k + 1) / 200) for k in part)
        assert abs(sum(counts[k] for k in part) - expected) < 4 * (len(part) / 4) ** 0.5


def test_the_first_interval_is_that_of_the_first_step():
    """r decay^((k + 1) / decay_steps) / interval, k from 0; whole ones are not drawn."""
    _w, a, b, group = pair((16, 16), 8)
    optimizer = SwitchLoRAAdamW([group], interval=2, interval_decay=0.5, decay_steps=1,
                                freeze_steps=1)
    moved = []
    for _ in range(2):
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        optimizer.step()
        moved.append([int(optimizer.state[p]["pointer"]) for p in (a, b)])
    assert moved == [[2, 6], [3, 7]]


def test_the_base_weight_is_rounded_by_bits_of_its_own(monkeypatch):
    """At each step others, and none that round a factor."""
    w, a, b, group = pair((30, 40), 8, dtype=torch.bfloat16)
    optimizer = SwitchLoRAAdamW([group], lr=0.0, interval=2, freeze_steps=1, candidates=12)
    write, seen = switchlora.write_weight, []

    def watched(p, x, kept, o, step, start):
        seen.append((int(kept["key"]), step))
        write(p, x, kept, o, step, start)

    monkeypatch.setattr(switchlora, "write_weight", watched)
    for i in range(4):
        feed([a, b], i)
        optimizer.step()
    assert [step for _, step in seen] == [1, 2, 3, 4]
    assert len({key for key, _ in seen}) == 1
    assert not {key for key, _ in seen} & {int(s["key"]) for s in optimizer.state.values()}
    assert w.isfinite().all()


def test_vectors_go_back_to_the_pool_as_they_are():
    """What was learnt is a candidate again, and may be drawn at once: no more are needed."""
    _w, a, b, group = pair((30, 40), 8)
    optimizer = SwitchLoRAAdamW([group], lr=1e-2, interval=2, freeze_steps=1, candidates=9)
    returned = 0
    for i in range(12):
        feed([a, b], i)
        before = {p: (x.detach().clone(), optimizer.state[p]["active"].clone().long())
                  for p, x in ((a, a), (b, b.mT))}
        fresh = i == 0  # the pools are drawn in the first step
        optimizer.step()
        for p, (vectors, places) in before.items():
            now, pool = optimizer.state[p]["active"].long(), optimizer.state[p]["candidates"]
            for old, place in zip(vectors, places, strict=True):
                if place not in now and not fresh:
                    assert torch.equal(pool[place], old)
                    returned += 1
    assert returned > 5


# ---- SwitchLoRA: promises


VARIANTS = [{}, {"state_bits": 16}, {"state_bits": 8}, {"state_bits": 4, "candidate_device": "cpu"},
            {"amsgrad": True, "candidates": 9, "lr_adamw": 1e-3}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_resume_is_bitwise(options, dtype, monkeypatch):
    monkeypatch.setattr("lissom.optim.codec.SMALL", 1)
    options = {**QUICK, **options}
    for cut in (1, 5, 17):
        model = net(dtype=dtype)
        optimizer = SwitchLoRAAdamW(adapter_groups(model), lr=1e-2, **options)
        torch.manual_seed(cut)
        generator = torch.get_rng_state()
        train(model, optimizer, range(cut))
        saved = through_disk({"o": optimizer.state_dict(), "m": model.state_dict()})
        train(model, optimizer, range(cut, 24))
        assert torch.equal(generator, torch.get_rng_state())
        twin = net(dtype=dtype, seed=9)
        twin.load_state_dict(saved["m"])
        other = SwitchLoRAAdamW(adapter_groups(twin), lr=0.5, **options)
        other.load_state_dict(saved["o"])
        train(twin, other, range(cut, 24))
        assert_same(snapshot(optimizer), snapshot(other))
        assert_same(model.state_dict(), twin.state_dict())
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_state_is_flat_and_planned(options, monkeypatch):
    monkeypatch.setattr("lissom.optim.codec.SMALL", 1)
    model = net()
    optimizer = SwitchLoRAAdamW(adapter_groups(model), **options)
    keys = {p: set(s) for p, s in optimizer.state.items()}
    train(model, optimizer, range(3))
    assert keys == {p: set(s) for p, s in optimizer.state.items()}
    held = 0
    for s in optimizer.state.values():
        assert all(type(v) is torch.Tensor for v in s.values())
        held += sum(v.nbytes for v in s.values())
    assert optimizer.plan().state_bytes == held
    for group in optimizer.state_dict()["param_groups"]:
        assert all(isinstance(v, (str, int, float, bool, tuple, type(None)))
                   for k, v in group.items() if k not in ("params", "param_names"))
    assert model.up.weight not in optimizer.state
    assert optimizer.plan()["up.lora_A"].rank == 4
    assert "switches alone" in optimizer.plan()["up.weight"].reason
    assert optimizer.plan()["embed.weight"].rule == "adamw"


def test_deepcopy_and_swapped_parameters():
    model = net()
    optimizer = SwitchLoRAAdamW(adapter_groups(model), lr=1e-2, **QUICK)
    train(model, optimizer, range(5))
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(5, 15))
    train(twin_model, twin, range(5, 15))
    assert_same(snapshot(optimizer), snapshot(twin))


def test_distributed_checkpoint_functions():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    results = []
    for again in (False, True):
        model = net()
        optimizer = SwitchLoRAAdamW(adapter_groups(model), lr=1e-2, **QUICK)
        train(model, optimizer, range(9))
        if again:
            saved = through_disk(get_optimizer_state_dict(model, optimizer))
            optimizer = SwitchLoRAAdamW(adapter_groups(model), lr=1.0, **QUICK)
            set_optimizer_state_dict(model, optimizer, saved)
        train(model, optimizer, range(9, 16))
        results.append(snapshot(optimizer))
    for part in ("state", "weights"):
        assert_same(results[0][part], results[1][part])


@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_a_refused_step_switches_nothing(mode):
    w, a, b, group = pair()
    optimizer = SwitchLoRAAdamW([group], interval=2, freeze_steps=1, nonfinite=mode)
    for i in range(5):
        for p, g in zip((a, b), tensors([a.shape, b.shape], i), strict=True):
            p.grad = g
        before = snapshot(optimizer)
        if i % 2:
            b.grad[0, 0] = float("nan")
            if mode == "raise":
                with pytest.raises(FloatingPointError, match=r"l\.B"):
                    optimizer.step()
            else:
                optimizer.step()
            after = snapshot(optimizer)
            for part in ("state", "weights"):
                assert_same(before[part], after[part])
        else:
            grads = [p.grad.clone() for p in (a, b)]
            optimizer.step()
            assert_same(grads, [p.grad for p in (a, b)])
            assert not torch.equal(before["weights"][0], a)
    w.grad = torch.ones_like(w)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"base weight of 'l\.A' has a gradient"):
        optimizer.step()
    assert_same(before["weights"], snapshot(optimizer)["weights"])


def test_a_pair_that_is_not_used_rests():
    _w, a, b, group = pair()
    optimizer = SwitchLoRAAdamW([group], interval=2, freeze_steps=1)
    before = snapshot(optimizer)
    a.grad = torch.zeros_like(a)
    a.grad[0, 0] = 1
    optimizer.step()
    assert_same(before["weights"][1:], snapshot(optimizer)["weights"][1:])
    assert int(optimizer.state[a]["pool_step"]) == 0
    for i in range(4):
        a.grad, b.grad = tensors([a.shape, b.shape], i)
        optimizer.step()
    assert int(optimizer.state[a]["pool_step"]) == 2
    assert int(optimizer.state[b]["pool_step"]) == 1


def test_damaged_states_change_nothing():
    _w, a, b, group = pair()
    optimizer = SwitchLoRAAdamW([group], interval=4, freeze_steps=1)
    for i in range(4):
        a.grad, b.grad = tensors([a.shape, b.shape], i)
        optimizer.step()
    before = snapshot(optimizer)
    good = optimizer.state_dict()
    for key, value in (("active", torch.full((3,), 7, dtype=torch.int32)),
                       ("active", torch.full((3,), -1, dtype=torch.int32)),
                       ("pointer", torch.tensor(3)), ("frozen", -torch.ones(3, dtype=torch.int32)),
                       ("updates", torch.zeros(4, dtype=torch.int32)),
                       ("candidates", torch.zeros(3, 3)), ("pool_step", torch.tensor(99.0))):
        bad = copy.deepcopy(good)
        bad["state"][0][key] = value
        with pytest.raises(ValueError, match=key):
            optimizer.load_state_dict(bad)
        assert_same(before, snapshot(optimizer))


# ---- bad input


def refused(words, group=None, error=ValueError, **options):
    group = group or pair()[3]
    with pytest.raises(error, match=words):
        SwitchLoRAAdamW([group], **options)


def test_bad_pairs_are_refused_by_name():
    good = pair()[3]["params"]
    base = {"roles": ("A", "B", "base"), "scaling": 1.0}
    for params in (good[:2], good[:1], [*good, good[0]]):
        refused(r"triples.*partner", {**base, "params": params})
    refused(r"l\.A: A, B and base have shapes \[\(9, 3\), \(3, 7\), \(9, 7\)\]",
            {**base, "params": [("l.A", good[1][1]), ("l.B", good[0][1]), good[2]]})
    refused(r"rank=7, but it must be below the smaller side", pair(r=7)[3])
    refused(r"candidates=3, but it must be > rank 3", candidates=3)
    refused(r"candidates=8, but it must be > rank 3 and <= the smaller side 7", candidates=8)
    refused(r"interval=9\.0.*at least twice freeze_steps=5", interval=9)
    trainable = pair()
    trainable[0].requires_grad_(True)
    refused(r"l\.A.*requires_grad=True.*frozen", trainable[3])
    refused(r"l\.A: A, B and base are on cpu, cpu, meta, but they must be on one device",
            {**base, "params": [*good[:2], ("l.weight", nn.Parameter(
                torch.empty(9, 7, device="meta"), requires_grad=False))]})
    with pytest.raises(TypeError, match=r"l\.A.*dtype torch.uint8.*quantized"):
        SwitchLoRAAdamW([{**base, "params": [*good[:2], (
            "l.weight", nn.Parameter(torch.zeros(9, 7, dtype=torch.uint8), requires_grad=False))]}])
    refused(r"l\.A.*float8_e4m3fn.*quantized", {**base, "params": [*good[:2], (
        "l.weight", nn.Parameter(torch.zeros(9, 7).to(torch.float8_e4m3fn), requires_grad=False))]},
        TypeError)
    refused(r"one dtype", {**base, "params": [good[0], ("l.B", nn.Parameter(
        torch.zeros(9, 3, dtype=torch.bfloat16))), good[2]]})
    with pytest.raises(ValueError, match=r"l\.A: its base weight is given 2 times"):
        SwitchLoRAAdamW([{**base, "params": good}, {**base, "params": good}])
    with pytest.raises(ValueError, match=r"roles=\('A', 'B', 'base'\), but it must be"):
        GradNormLoRPAdamW([{"params": good, "roles": base["roles"]}])
    with pytest.warns(UserWarning, match="no pair to switch"):
        SwitchLoRAAdamW([good[0]])
    optimizer = SwitchLoRAAdamW([pair()[3]])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="triples"):
        optimizer.add_param_group({**pair(seed=3)[3], "params": pair(seed=3)[3]["params"][:2]})
    assert_same(before, snapshot(optimizer))


def test_a_base_weight_that_is_given_twice_is_refused():
    (w, _, _, group), (_, a, b, _) = pair(), pair(seed=3)
    alias = nn.Parameter(w.data, requires_grad=False)
    for base in (w, alias):
        other = [("k.A", a), ("k.B", b), ("k.weight", base)]
        words = r"l\.A: its base weight is given 2 times, but it must belong to one layer"
        refused(words, {**group, "params": [*group["params"], *other]})
        optimizer = SwitchLoRAAdamW([group])
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=words.replace("l", "k", 1)):
            optimizer.add_param_group({**group, "params": other})
        assert_same(before, snapshot(optimizer))
    # as the weight of an embedding that is trained
    with pytest.raises(ValueError, match=words):
        SwitchLoRAAdamW([{"params": [("embed.weight", nn.Parameter(w.data))]}, group])


def test_factors_without_a_partner_are_refused():
    _, a, b, _ = pair()
    for params, words in (([("l.A", a)], r"1 parameters with roles=\('A', 'B'\).*partner"),
                          ([("l.B", b), ("l.A", a)], r"l\.B: A and B have shapes \[\(9, 3\)"),
                          ([("l.A", a), ("l.B", nn.Parameter(b.data.double()))],
                           r"l\.A: A is torch.float32 and B torch.float64")):
        with pytest.raises(ValueError, match=words):
            GradNormLoRPAdamW([{"params": params, "roles": ("A", "B")}], rank=2)


def test_a_failure_says_what_was_switched(monkeypatch):
    *_, group = pair()
    optimizer = SwitchLoRAAdamW([group], interval=2, freeze_steps=1)
    for p, g in zip(group["params"][:2], tensors([(3, 7), (9, 3)]), strict=True):
        p[1].grad = g

    def fails(*args):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(SwitchLoRAAdamW, "update", fails)
        with pytest.raises(PartialStepError, match=r"'l\.A'.*no memory.*not updated; 0 parameters"
                           r".*before all updates l\.A, l\.B, l\.weight had been moved"):
            optimizer.step()
    monkeypatch.setattr("lissom.optim.switchlora._add", fails)
    with pytest.raises(PartialStepError, match=r"while it switched vectors of l\.A, l\.B, "
                       r"l\.weight \(no memory\).*partly switched; before these none"):
        optimizer.step()


class Shared(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        if kind == "weight":
            self.two.weight = self.one.weight
        elif kind == "module":
            self.two = self.one
        elif kind == "storage":  # another parameter on the same memory
            self.two.weight = nn.Parameter(self.one.weight.data)
        else:
            self.table = nn.Embedding(8, 8)
            self.table.weight = self.two.weight


@pytest.mark.parametrize("kind", ["weight", "module", "embedding", "storage"])
def test_shared_weights_are_refused(kind):
    model = Shared(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"(one|two): its weight is shared .*\.weight.*\.weight"):
        lora(model, 2, target=["one", "two"])
    assert type(model.one) is type(model.two) is nn.Linear
    assert_same(before, model.state_dict())


def test_pairs_and_magnitudes_do_not_decay():
    for model, zero in ((net(), ("up.lora_A", "up.lora_B", "up.weight", "norm.weight")),
                        (net(normalize="input"), ("up.magnitude", "norm.weight"))):
        groups = adapter_groups(model, weight_decay=0.3)
        decay = {name: g.get("weight_decay") for g in groups for name, _ in g["params"]}
        assert [decay[name] for name in zero] == [0.0] * len(zero)
        assert decay["embed.weight"] == decay["lm_head.weight"] == 0.3


def test_pairs_of_several_scalings_are_groups_of_their_own():
    model = net(rank=None)
    for name, alpha in (("up", 2.0), ("down", 8.0), ("square", 2.0)):
        lora(model, 4, target=name, alpha=alpha)
    found = {g["scaling"]: [name for name, _ in g["params"]] for g in adapter_groups(model)
             if "scaling" in g}
    names = ("lora_A", "lora_B", "weight")
    assert found == {0.5: [f"{x}.{k}" for x in ("up", "square") for k in names],
                     2.0: [f"down.{k}" for k in names]}


def test_layers_keep_the_mode_of_those_they_replace():
    model = net(rank=None).eval()
    lora(model, 4)
    assert not any(m.training for m in model.modules())
    merge(model.train())
    assert all(m.training for m in model.modules())
    merge(lora(model.eval(), 4, normalize="output"))
    assert not any(m.training for m in model.modules())


def test_magnitudes_are_set_to_the_norms_of_what_is_there():
    layer = net(normalize="input").up
    with torch.no_grad():
        layer.lora_B.mul_(3.0)
    layer.renorm()
    v = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.magnitude.detach(), v.detach().norm(dim=0))
    torch.testing.assert_close(layer.effective(), v)


def test_bad_arguments_of_lora():
    def refuse(words, rank=2, error=ValueError, model=None, **options):
        model = model or net(rank=None)
        before = [(k, type(m)) for k, m in model.named_modules()]
        with pytest.raises(error, match=words):
            lora(model, rank, **options)
        assert before == [(k, type(m)) for k, m in model.named_modules()]

    for rank in (0, -1):
        refuse(f"lora: rank={rank!r}, but it must be an int >= 1", rank)
    for rank in (2.0, True, "3"):
        refuse(f"lora: rank={rank!r}, but it must be an int >= 1", rank, TypeError)
    for name, value, rule in (("init", 1, "one of 'switchlora', 'lora'"),
                              ("alpha", "1", "None or a finite number > 0"),
                              ("alpha", True, "None or a finite number > 0"),
                              ("normalize", 0, "None or one of 'input', 'output'"),
                              ("preserve", 1, "True or False"), ("seed", "x", "an int"),
                              ("dtype", torch.int8, "None or one of"),
                              ("target", 5, "None, a glob"), ("target", [], "None, a glob")):
        refuse(rf"lora: {name}={re.escape(repr(value))}, but it must be {rule}", error=TypeError,
               **{name: value})
    for function in (lora, merge, adapter_groups, base_weights):
        with pytest.raises(TypeError, match=f"{function.__name__}: model is a list, but it must"):
            function([nn.Linear(4, 4)], **({"rank": 2} if function is lora else {}))
    refuse("alpha=inf", alpha=float("inf"))
    refuse(r"up: rank=12.*smaller side of \(20, 12\)", 12)
    refuse("init='zeros'", init="zeros")
    refuse("alpha=-1", alpha=-1)
    refuse("normalize='column'", normalize="column")
    refuse(r"'upp', which matches nothing \(did you mean 'up'\?\)", target="upp")
    refuse("'embed', a Embedding", target="embed")
    refuse("no nn.Linear inside", model=nn.Linear(4, 4))
    refuse("nn.Linear inside the model", model=nn.Linear(4, 4), target="*")
    quantized = net(rank=None)
    quantized.down.weight = nn.Parameter(torch.zeros(12, 20, dtype=torch.int8), requires_grad=False)
    refuse(r"down: its base weight has dtype torch.int8.*quantized", error=TypeError,
           model=quantized)
    with pytest.raises(ValueError, match="no LoRA layer"):
        adapter_groups(net(rank=None))
    with pytest.raises(ValueError, match="axis='rows'"):
        NormalizedLinear(nn.Linear(4, 4), 2, 1.0, axis="rows")
    with pytest.raises(TypeError, match="NormalizedLinear: axis=0, but it must be one of 'input'"):
        NormalizedLinear(nn.Linear(4, 4), 2, 1.0, axis=0)
    model = net()
    model.square = model.down
    with pytest.raises(ValueError, match="down: its weight is shared"):
        adapter_groups(model)


# ---- GradNormLoRP on weights


def test_a_step_to_zero_has_a_direction_of_rounding_and_a_finite_length():
    """A weight put where the step of the momentum ends at zero, as far as fp32 can tell."""
    p = nn.Parameter(tensors([(4, 60)])[0])
    optimizer = GradNormLoRPAdamW([p], rank=4, lr=0.1, scale=0.25, weight_decay=0.0,
                                  projection="svd")
    p.grad = tensors([(4, 60)], 1)[0]
    optimizer.step()
    s = optimizer.state[p]
    n = 0.09 / 0.19 / (0.000999 / 0.001999) ** 0.5  # of an entry's second step without a gradient
    with torch.no_grad():
        p.copy_(0.1 * 0.25 * n * s["basis_left"] @ s["exp_avg"].sign())
    before = p.detach().norm(dim=0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert p.isfinite().all()
    assert (p.detach().norm(dim=0) < before + 0.2).all()


# ---- GradNormLoRP on pairs


@pytest.mark.parametrize("axis", ["input", "output"])
def test_gradnormlorp_trains_factors_and_magnitudes(axis, monkeypatch):
    monkeypatch.setattr("lissom.optim.codec.SMALL", 1)
    model = net(init="lora", normalize=axis)
    model.requires_grad_(False)
    for layer in (model.up, model.down, model.square):
        for p in (layer.lora_A, layer.lora_B, layer.magnitude):
            p.requires_grad_(True)
    groups = adapter_groups(model, rank=2, proj_type="full")
    optimizer = GradNormLoRPAdamW(groups, lr=1e-2, state_bits=8, scale=1.0)
    plan = optimizer.plan()
    assert plan["up.lora_A"].rank == 2
    assert plan["up.lora_A"].side == "full"
    assert plan["up.magnitude"].rule == "adamw"
    losses = []
    x, y = batch(0)
    for _ in range(40):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    out = model(x).detach()
    assert torch.allclose(merge(model)(x), out, atol=1e-5)


def test_factors_are_projected_as_galore_projects():
    """Reading B is GaLore on each factor."""
    model = net(init="lora", normalize="input")
    ours = GradNormLoRPAdamW(adapter_groups(model, rank=2, projection="svd"), lr=1e-2)
    group = next(g for g in ours.param_groups if g["roles"] == ("A", "B"))
    start = [p.detach().clone() for p in group["params"]]
    gradients = [tensors([p.shape for p in group["params"]], i) for i in range(5)]
    for row in gradients:
        for p, g in zip(group["params"], row, strict=True):
            p.grad = g
        ours.step()
    for i, (p, w) in enumerate(zip(group["params"], start, strict=True)):
        want = oracle.lowrank(w, [row[i] for row in gradients], rank=2, update_proj_gap=200,
                              lr=1e-2)[-1]
        assert (p.detach().double() - want).norm() < 2e-4 * (want - w.double()).norm()


# ---- peft


def peft_model(dora=False, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}, use_dora=dora,
                             target_modules=["q_proj", "v_proj", "down_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_models_train_save_and_merge(dora, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft_model(dora)
    rank = {"rank": 2} if dora else {}
    groups = adapter_groups(model, **rank)
    if dora:
        optimizer = GradNormLoRPAdamW(groups, lr=2e-2)
    else:
        optimizer = SwitchLoRAAdamW(groups, lr=2e-2, **QUICK)
        assert groups[0]["scaling"] == 2.0
    assert sum(row.rule != "adamw" for row in optimizer.plan()) == 6 * (2 if dora else 3)
    model.eval()
    start = {k: v.clone() for k, v in base_weights(model).items()}
    logits = tune(model, optimizer)
    bases = base_weights(model)
    assert set(bases) <= set(tiny_llama().state_dict())
    assert all(torch.equal(v, start[k]) == dora for k, v in bases.items())
    model.save_pretrained(tmp_path)
    again = tiny_llama()
    assert not again.load_state_dict(bases, strict=False).unexpected_keys
    loaded = peft.PeftModel.from_pretrained(again, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=TOKENS).logits, logits, rtol=0, atol=1e-6)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, logits, rtol=0, atol=2e-5)


def test_peft_models_that_cannot_be_read_are_refused():
    model = peft_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    name = r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj"
    partner = layer.lora_B.pop("default")
    with pytest.raises(ValueError, match=rf"{name}: lora_A has adapter 'default', lora_B has not"):
        adapter_groups(model)
    layer.lora_B["default"] = partner
    layer.base_layer.weight.data = layer.base_layer.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=rf"{name}.*float8"):
        adapter_groups(model)
    layer.base_layer.weight.data = layer.base_layer.weight.data.float()
    layer.merge()
    with pytest.raises(ValueError, match=rf"{name}: its adapter is merged"):
        adapter_groups(model)
    layer.unmerge()
    layer.fan_in_fan_out = True
    with pytest.raises(ValueError, match=rf"{name}: fan_in_fan_out=True, but it must be False"):
        adapter_groups(model)
    layer.fan_in_fan_out = False
    layer.lora_variant["default"] = object()
    with pytest.raises(ValueError, match=rf"{name}: its adapter is a object, but it must be plain"):
        adapter_groups(model)
    del layer.lora_variant["default"]
    kept, layer.base_layer = layer.base_layer, nn.Identity()  # as GPTQ layers have no weight
    with pytest.raises(TypeError, match=rf"{name}: its base layer is a Identity without a weight"):
        adapter_groups(model)
    layer.base_layer = kept
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="exactly one"):
        adapter_groups(model)
    with pytest.raises(ValueError, match=rf"{name}: rank=32, but it must be below the smaller"):
        adapter_groups(peft_model(r=32))


@pytest.mark.parametrize("dora", [False, True])
def test_other_adapters_keep_the_weight_that_they_were_trained_on(dora):
    """Plain pairs write to it; normalized ones leave it, so that others may be there."""
    pytest.importorskip("peft")
    model = peft_model(dora)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter("other")
    if not dora:
        with pytest.raises(ValueError, match=r"has adapters \['default'\] beside 'other'"):
            adapter_groups(model)
        model.delete_adapter("default")
    assert any("other" in name for g in adapter_groups(model) for name, _ in g["params"])


def test_normalized_pairs_need_nothing_of_their_base():
    """It may be quantized, or shared."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], use_dora=True)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    model = peft.get_peft_model(model, config)
    first, second = (model.base_model.model[i] for i in (0, 1))
    optimizer = GradNormLoRPAdamW(adapter_groups(model, rank=1), lr=1e-2)
    model(torch.ones(3, 6)).square().sum().backward()
    optimizer.step()
    first.base_layer.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)
    second.base_layer.weight = first.base_layer.weight
    names = [name for g in adapter_groups(model) for name, _ in g["params"]]
    assert not any("base_layer.weight" in name for name in names)


def test_pairs_of_the_other_kind_are_refused_by_their_kind():
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"roles=\('A', 'B', 'base'\).*normalized pairs"):
        GradNormLoRPAdamW(adapter_groups(peft_model(False)))
    with pytest.raises(ValueError, match=r"roles=\('A', 'B'\).*plain pairs"):
        SwitchLoRAAdamW(adapter_groups(peft_model(True), rank=2))
    with pytest.raises(ValueError, match=r"unknown option 'scaling'=2.0 \(did you mean 'scale'"):
        GradNormLoRPAdamW([{"params": [torch.zeros(4, 4)], "scaling": 2.0}])


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantized_bases_are_refused(kind):
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    more = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    model = nn.Sequential(getattr(bnb.nn, kind)(16, 16, **more), nn.Linear(16, 16))
    with pytest.raises(ValueError, match=f"'0', a {kind}, but it must match an nn.Linear"):
        lora(model, 2, target="0")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(TypeError, match=r"base_model\.model\.0: its base weight has .*quantized"):
        adapter_groups(model)


def test_declared_roles_come_from_modules_not_from_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A = nn.Linear(8, 8)  # a name, and no more
            self.inner = nn.Linear(8, 8)

    model = lora(Named(), 2, target="inner")
    assert [x.layer for x in adapters(model)] == ["inner"]
    roles = {name: g.get("roles")
             for g in adapter_groups(model) for name, _ in g["params"]}
    assert roles["lora_A.weight"] is None
    assert roles["inner.lora_A"] == ("A", "B", "base")


def test_state_of_pairs_stays_small():
    """Per-vector numbers are r, not the size of a moment; pools can be left out of the device."""
    _w, a, b, group = pair((64, 48), 8)
    optimizer = SwitchLoRAAdamW([group], candidates=9)
    for p in (a, b):
        s = optimizer.state[p]
        extra = sum(v.nbytes for k, v in s.items()
                    if k not in ("exp_avg", "exp_avg_sq", "candidates"))
        assert extra == 3 * 4 * 8 + 4 + 8 + 8 + 8 + 4
