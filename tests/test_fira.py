"""Fira: official trajectories, its limiter and gains, full rank, norms over ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from lissom.optim import FiraAdamW, GaLoreAdamW
from lissom.optim.norms import sizes
from lissom.optim.project import Bases
from lissom.optim.residual import gains, larger
from lissom.optim.sharding import Rows

from .golden import follow, load, needs_golden, worst
from .helpers import assert_same, parameters, run, tensors


@needs_golden
@pytest.mark.parametrize("name", ["16x24_spike6", "24x16_spike6", "24x16_spikeNone"])
def test_official_fira(name):
    case, start, gradients, weights = load(f"fira_std_{name}")
    p = torch.nn.Parameter(start.clone())
    optimizer = FiraAdamW(
        [{"params": [p], "alpha": case["alpha"]}], lr=case["lr"], betas=tuple(case["betas"]),
        weight_decay=case["weight_decay"], rank=case["rank"], limiter=case["gamma"],
        update_proj_gap=case["update_proj_gap"], projection="svd", residual_scale="released")

    def epsilon(t):  # the authors' stands before the bias correction
        optimizer.param_groups[0]["eps"] = case["eps"] / (1 - case["betas"][1] ** t) ** 0.5

    assert worst(follow(optimizer, p, gradients, epsilon), weights, start) < 1e-4


def test_fira_after_a_first_gradient_of_nothing_is_not_stuck():
    """The released limiter stores 0 and then lets the residual grow by 1 % a step."""
    for first in (0.0, 1e-12, 1e-30):
        moved = []
        for begin in (first, 1.0):
            (p,) = parameters([(20, 12)])
            optimizer = FiraAdamW([p], lr=1e-2, rank=3, weight_decay=0.0, projection="svd",
                                  update_proj_gap=1, betas=(0.0, 0.0))
            p.grad = tensors([(20, 12)], 1)[0] * begin
            optimizer.step()
            start = p.detach().clone()
            p.grad = tensors([(20, 12)], 2)[0]
            optimizer.step()
            moved.append((p.detach() - start).norm().item())
        assert 0.8 < moved[0] / moved[1] < 1.25, first


def test_fira_zero_gradient_does_not_empty_the_limiter():
    (p,) = parameters([(20, 12)])
    optimizer = FiraAdamW([p], rank=3)
    run(optimizer, [p], range(2))
    last = optimizer.state[p]["limiter"].clone()
    p.grad = torch.zeros(20, 12)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["limiter"], last)


def test_fira_exploding_column_is_capped():
    """R of one row vanishes, N does not: its factor must not shrink the rest of the matrix."""
    (p,) = parameters([(20, 12)])
    optimizer = FiraAdamW([p], lr=1.0, rank=3, weight_decay=0.0, projection="svd", eps=1e-8)
    g = tensors([(20, 12)], 1)[0]
    p.grad = g.clone()
    optimizer.step()
    start = p.detach().clone()
    basis = optimizer.state[p]["basis_right"]
    g[4] -= basis @ (basis.mT @ g[4])
    p.grad = g.clone()
    optimizer.step()
    moved = (p.detach() - start).norm(dim=1)
    others = moved[torch.arange(20) != 4]
    assert moved[4] < 15 * others.median()
    first = (start - parameters([(20, 12)])[0].detach()).norm(dim=1)
    assert others.median() > 0.2 * first.median()


def test_fira_limiter_allows_one_percent():
    (p,) = parameters([(20, 12)])
    optimizer = FiraAdamW([p], rank=3, projection="svd", betas=(0.0, 0.0))
    sizes = []
    for i in range(6):
        p.grad = tensors([(20, 12)], 1)[0] + (tensors([(20, 12)], 9)[0] * 50 if i == 3 else 0)
        optimizer.step()
        sizes.append(optimizer.state[p]["limiter"].item())
    growth = [b / a for a, b in itertools.pairwise(sizes)]
    assert max(growth) <= 1.01 * (1 + 1e-5)
    assert growth[2] == pytest.approx(1.01, rel=1e-4)


def test_fira_of_full_rank_is_galore():
    ours, theirs = parameters([(6, 4), (4, 6)]), parameters([(6, 4), (4, 6)])
    a, b = FiraAdamW(ours, rank=4), GaLoreAdamW(theirs, rank=4)
    run(a, ours, range(5))
    run(b, theirs, range(5))
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_fira_released_of_full_rank_keeps_what_its_scale_leaves():
    """u = scale P N + (1 - scale) G diag(phi): the released code's P R is scaled, its G is not."""
    (p,), (q,) = parameters([(4, 6)]), parameters([(4, 6)])
    given = {"rank": 4, "lr": 1e-2, "weight_decay": 0.0, "projection": "svd", "scale": 0.25}
    moved = []
    for x, optimizer in ((p, FiraAdamW([p], residual_scale="released", limiter=None, **given)),
                         (q, GaLoreAdamW([q], **given))):
        start = x.detach().clone()
        run(optimizer, [x], range(1))
        moved.append(start - x.detach())
    fira, galore = moved
    phi = galore.norm(dim=0) / (1e-2 * 0.25) / p.grad.norm(dim=0)
    torch.testing.assert_close(fira, galore + 1e-2 * 0.75 * p.grad * phi, rtol=1e-4, atol=1e-7)


def test_fira_caps_at_ten_times_what_is_expected_of_a_column():
    """As long as ten times the mean column of N with as many entries as a column of G."""
    g, moved = tensors([(20, 12)], 1)[0], []
    for cls, options in ((FiraAdamW, {"limiter": None}), (GaLoreAdamW, {})):
        (p,) = parameters([(20, 12)])
        optimizer = cls([p], lr=1.0, rank=3, weight_decay=0.0, projection="svd", **options)
        p.grad = g.clone()
        optimizer.step()
        basis, start = optimizer.state[p]["basis_right"], p.detach().clone()
        p.grad = g.clone()
        p.grad[4] -= basis @ (basis.mT @ g[4])
        optimizer.step()
        moved.append((start - p.detach()).norm(dim=1))
    fira, n = moved
    expected = (n[4].square() + 100 * (12 / 3) * n.square().mean()).sqrt()
    assert fira[4].item() == pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize("limiter", [None, 1.01])
def test_gains_of_a_shard_are_those_of_the_whole(limiter, monkeypatch):
    """Two ranks with the same rows: what is summed over both is twice what one has."""
    n, r, g = (x.double().abs() for x in tensors([(3, 1)] * 3))
    r[1] = 1e-12  # which is capped
    o = {"eps": 1e-8, "limiter": limiter}
    last = [{} if limiter is None else {"limiter": torch.full((1, 1), 0.5)} for _ in range(2)]
    whole = gains(*(torch.cat([x, x]) for x in (n, r, g)), 4.0, None, last[0], o)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, *args, **given: x.mul_(2))
    rows = Rows(0, 6, (3, 3), 0, None)  # type: ignore[arg-type]
    torch.testing.assert_close(gains(n, r, g, 4.0, rows, last[1], o), whole[:3])
    assert_same(*last)


@pytest.mark.parametrize("inner", ["momentum", "lion", "factored"])
def test_fira_released_corrects_no_bias_but_adams(inner):
    """At scale 1 nothing else tells it from the paper's."""
    results = []
    for residual_scale in ("paper", "released"):
        (p,) = parameters([(20, 12)])
        optimizer = FiraAdamW([p], lr=1e-2, rank=3, projection="svd", scale=1.0, inner=inner,
                              residual_scale=residual_scale)
        run(optimizer, [p], range(3))
        results.append([p.detach(), optimizer.state[p]["limiter"]])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_fira_of_float64_is_its_equation_in_float64():
    (p,) = parameters([(20, 12)], dtype=torch.float64)
    start = p.detach().clone()
    optimizer = FiraAdamW([p], lr=1e-2, rank=3, weight_decay=0.0, projection="svd", scale=0.5)
    p.grad = tensors([(20, 12)], 1)[0].double()
    optimizer.step()
    q, eps = optimizer.state[p]["basis_right"], optimizer.param_groups[0]["eps"]
    r = p.grad @ q
    n = r / (r.abs() + eps)
    phi = n.norm(dim=1, keepdim=True) / (r.norm(dim=1, keepdim=True) + eps)
    expected = start - 5e-3 * (n @ q.mT + (p.grad - r @ q.mT) * phi)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_norms_of_a_shard_are_those_of_the_whole(side, monkeypatch):
    """Two ranks with the same rows."""
    x, rows = tensors([(3, 5)])[0], Rows(0, 6, (3, 3), 0, None)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, *args, **given: x.mul_(2))
    whole = sizes(torch.cat([x, x]), side, None)
    torch.testing.assert_close(sizes(x, side, rows), whole[:3] if side == "right" else whole)


def test_columns_of_a_shard_are_as_long_as_those_of_the_whole():
    """What a gain is capped by; R of a left side is of all rows."""
    rows = Rows(0, 20, (7, 7, 6), 0, None)  # type: ignore[arg-type]
    bases = Bases(torch.zeros(7, 3), None, rows)
    assert larger(torch.zeros(7, 12), torch.zeros(3, 12), bases) == pytest.approx(20 / 3)


def test_sums_over_ranks_leave_their_terms_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, *args, **given: x.mul_(2))
    x, rows = torch.ones(3), Rows(0, 6, (3, 3), 0, None)  # type: ignore[arg-type]
    assert rows.sum(x).tolist() == rows.max(x).tolist() == [2.0] * 3
    assert x.tolist() == [1.0] * 3
