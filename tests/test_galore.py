"""GaLore: its limits, its recorded trajectories, its refreshes."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lissom.optim import AdamW, GaLoreAdamW

from . import oracle
from .golden import follow, load, needs_golden, worst
from .helpers import assert_same, feed, parameters, run, tensors

# Weights after each step of test_recorded_case, as galore-torch 1.0 on torch 2.13 left them.
RECORDED_1 = [[0.9782472, -1.9876838], [0.5217252, 0.2376994], [-0.9782462, 2.9876833]]
RECORDED_2 = [[0.9837222, -1.9907837], [0.5070384, 0.2460149], [-0.9712206, 2.9837055]]


def replay(start, gradients, case):
    """Our weights over an official run. Its epsilon stands before the bias correction, so that
    ours has to be eps / sqrt(1 - b2^t); its decay comes after the update (order lr^2 wd)."""
    p = torch.nn.Parameter(start.clone())
    optimizer = GaLoreAdamW([p], lr=case["lr"], betas=tuple(case["betas"]), rank=case["rank"],
                            weight_decay=case["weight_decay"], scale=case["scale"],
                            proj_type=case["proj_type"], projection="svd",
                            update_proj_gap=case["update_proj_gap"])

    def epsilon(t):
        optimizer.param_groups[0]["eps"] = case["eps"] / (1 - case["betas"][1] ** t) ** 0.5

    return follow(optimizer, p, gradients, epsilon)


@needs_golden
@pytest.mark.parametrize("name", [
    "full_20x20_wd0.0", "reverse_std_16x24_wd0.0", "reverse_std_24x16_wd0.0", "std_16x24_wd0.0",
    "std_24x16_wd0.0", "std_24x16_wd0.1"])
def test_official_trajectories(name):
    case, start, gradients, weights = load(f"galore_{name}")
    # P^T G Q is diagonal at the refresh: beside it Adam sees rounding, held down by eps only.
    tolerance = 5e-3 if case["proj_type"] == "full" else 2e-3
    assert worst(replay(start, gradients, case), weights, start) < tolerance


def test_recorded_case():
    """galore-torch 1.0, rank 1, two steps on a 3 x 2 matrix of small numbers (recorded here)."""
    case = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "rank": 1,
            "scale": 0.25, "proj_type": "std", "update_proj_gap": 200}
    start = torch.tensor([[1.0, -2.0], [0.5, 0.25], [-1.0, 3.0]])
    gradients = [torch.tensor([[0.3, -0.1], [0.2, 0.4], [-0.5, 0.3]]),
                 torch.tensor([[-0.2, 0.6], [0.1, -0.3], [0.4, 0.2]])]
    recorded = [RECORDED_1, RECORDED_2]
    for ours, theirs in zip(replay(start, gradients, case), recorded, strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=0, atol=2e-6)


@pytest.mark.skipif(importlib.util.find_spec("galore_torch") is None,
                    reason="galore-torch is not installed")
def test_parity_with_the_package():
    from galore_torch import GaLoreAdamW as Peer

    shapes = [(12, 8), (8, 12), (10, 10), (8,)]
    ours, theirs = parameters(shapes), parameters(shapes)
    keys = {"rank": 4, "update_proj_gap": 50, "scale": 0.25, "proj_type": "std"}
    a = GaLoreAdamW([{"params": ours[:3], **keys}, {"params": ours[3:]}], lr=1e-2, eps=1e-12,
                    weight_decay=0, projection="svd", refresh="synchronous")
    b = Peer([{"params": theirs[:3], **keys}, {"params": theirs[3:]}], lr=1e-2, eps=1e-12,
             no_deprecation_warning=True)
    run(a, ours, range(20))
    run(b, theirs, range(20))
    for p, q, start in zip(ours, theirs, parameters(shapes), strict=True):
        assert (p - q).norm() < 1e-3 * (q - start).norm()


def test_full_rank_identity_basis_is_adamw():
    """With diagonal gradients of falling size the singular vectors are the axes."""
    g = torch.diag(torch.arange(6, 0, -1).float())
    p, q = parameters([(6, 6)]), parameters([(6, 6)])
    a = GaLoreAdamW(p, lr=1e-2, rank=6, scale=1.0, projection="svd")
    b = AdamW(q, lr=1e-2)
    for _ in range(5):
        p[0].grad, q[0].grad = g.clone(), g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(p[0], q[0], rtol=0, atol=1e-6)


@given(m=st.integers(1, 12), n=st.integers(1, 12), rank=st.integers(1, 14),
       proj_type=st.sampled_from(["std", "reverse_std", "left", "right", "full"]),
       projection=st.sampled_from(["svd", "subspace", "randomized", "random"]),
       moments=st.sampled_from(["keep", "rotate", "reset"]), gap=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_first_step_is_within_the_bound(m, n, rank, proj_type, projection, moments, gap):
    """|u| <= scale |N|, and Adam's first entries are at most 1 in size: bases are orthonormal."""
    (p,) = parameters([(m, n)])
    optimizer = GaLoreAdamW([p], lr=0.1, rank=rank, proj_type=proj_type, projection=projection,
                            moments=moments, update_proj_gap=gap, weight_decay=0.0, scale=0.5)
    row = optimizer.plan().rows[0]
    assert row.rank == min(rank, m, n)
    assert ("clamped" in row.reason) == (rank > min(m, n))
    start = p.detach().clone()
    feed([p], 1)
    optimizer.step()
    r = min(rank, m, n)
    low = {"left": r * n, "right": m * r, "full": r * r}[row.side]
    moved = (p.detach() - start).norm().item()
    assert 0 < moved <= 0.05 * low**0.5 * 1.001
    run(optimizer, [p], range(2, 6))
    assert p.isfinite().all()


def test_refresh_phases_are_spread():
    shapes = [(4, 3)] * 23
    for gap in (1, 5, 10, 200):
        ps = parameters(shapes)
        optimizer = GaLoreAdamW(ps, rank=2, update_proj_gap=gap)
        due = []
        for k in range(2 * gap + 1):
            run(optimizer, ps, range(k, k + 1))
            due.append(sum(int(optimizer.state[p]["basis_step"]) == k + 1 for p in ps))
        assert due[0] == 23
        assert max(due[1:]) <= -(-23 // gap)
        assert sum(due[1 : gap + 1]) == sum(due[gap + 1 :]) == 23
    ps = parameters(shapes)
    optimizer = GaLoreAdamW(ps, rank=2, update_proj_gap=5, refresh="synchronous")
    run(optimizer, ps, range(6))
    assert {int(optimizer.state[p]["basis_step"]) for p in ps} == {6}


@pytest.mark.parametrize("gap", [50, 200])
def test_refreshes_of_a_few_matrices_are_far_apart(gap):
    ps = parameters([(6, 4)] * 4)
    optimizer = GaLoreAdamW(ps, rank=2, update_proj_gap=gap)
    phases = sorted(optimizer._phase(optimizer.state[p], optimizer.param_groups[0]) for p in ps)
    assert min(b - a for a, b in zip(phases, [*phases[1:], phases[0] + gap],
                                     strict=True)) >= gap // 12


def test_experts_are_matrices_of_their_own():
    """A stack in batch form equals its matrices one by one; so does a convolution flattened."""
    (stack,) = parameters([(3, 6, 4)])
    single = [torch.nn.Parameter(x.clone()) for x in stack.detach()]
    options = {"lr": 1e-2, "rank": 2, "projection": "svd", "update_proj_gap": 3,
               "refresh": "synchronous"}
    a = GaLoreAdamW([{"params": [stack], "matricize": "batch"}], **options)
    b = GaLoreAdamW(single, **options)
    for i in range(7):
        feed([stack], i)
        for p, g in zip(single, stack.grad, strict=True):
            p.grad = g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]))

    (conv,) = parameters([(8, 3, 3, 3)])
    flat = torch.nn.Parameter(conv.detach().flatten(1).clone())
    for p in (conv, flat):
        optimizer = GaLoreAdamW([p], **options)
        for i in range(5):
            p.grad = tensors([(8, 27)], i)[0].view(p.shape)
            optimizer.step()
    assert torch.equal(conv.detach().flatten(1), flat.detach())


@pytest.mark.parametrize("master_bits", [None, 8])
def test_equal_experts_are_rounded_by_different_bits(master_bits):
    p = torch.nn.Parameter(tensors([(1, 40, 30)])[0].expand(2, 40, 30).bfloat16())
    optimizer = GaLoreAdamW([p], rank=3, lr=1e-4, matricize="batch", projection="svd",
                            master_bits=master_bits)
    p.grad = tensors([(1, 40, 30)], 1)[0].expand(2, 40, 30).bfloat16()
    optimizer.step()
    one, other = optimizer.full_precision(p)
    share = (one != other).float().mean()
    assert share > (0.1 if master_bits else 1e-3)
    torch.testing.assert_close(one, other, rtol=0.008, atol=1e-6)


def test_an_idle_expert_keeps_its_basis():
    (stack,) = parameters([(2, 6, 4)])
    optimizer = GaLoreAdamW([stack], rank=2, matricize="batch", update_proj_gap=1)
    feed([stack], 0)
    optimizer.step()
    before = optimizer.state[stack]["basis_right"].clone()
    feed([stack], 1)
    stack.grad[1] = 0
    optimizer.step()
    after = optimizer.state[stack]["basis_right"]
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("nothing", [0.0, float("nan")])
def test_a_first_gradient_of_nothing_does_not_freeze_the_basis(nothing):
    (p,) = parameters([(6, 4)])
    optimizer = GaLoreAdamW([p], rank=2, lr=1e-2)
    p.grad = torch.full_like(p, nothing)
    optimizer.step()
    assert int(optimizer.state[p]["basis_step"]) == 0
    p.data = tensors([(6, 4)])[0]
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[p][name].zero_()
    before = p.detach().clone()
    feed([p], 1)
    optimizer.step()
    assert int(optimizer.state[p]["basis_step"]) == 2
    assert not torch.equal(before, p)


@pytest.mark.parametrize("projection", ["svd", "subspace", "randomized"])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_a_refresh_without_a_gradient_keeps_the_basis(projection, proj_type):
    """Nothing raises, and what a NaN has spoilt is the matrix alone, not its basis."""
    (p,) = parameters([(8, 6)])
    optimizer = GaLoreAdamW([p], rank=3, update_proj_gap=2, refresh="synchronous",
                            projection=projection, proj_type=proj_type)
    run(optimizer, [p], range(2))
    before = {k: x.clone() for k, x in optimizer.state[p].items() if k.startswith("basis_")}
    assert len(before) == 2 + (proj_type == "full")
    p.grad = torch.full((8, 6), float("nan"))
    optimizer.step()
    assert p.isnan().all()
    assert_same(before, {k: optimizer.state[p][k] for k in before})


def test_warns_once_without_a_matrix():
    for params, options in ((parameters([(6, 4)]), {}), (parameters([(4,)]), {"rank": 2})):
        with pytest.warns(UserWarning, match=r"param_groups\(model") as caught:
            GaLoreAdamW(params, **options)
        assert len(caught) == 1
        assert caught[0].filename == __file__


def test_flattened_parameters_are_refused():
    flat = parameters([(4096,)])
    with pytest.raises(ValueError, match=r"rank=4.*\(4096,\).*FSDP2"):
        GaLoreAdamW([{"params": flat, "rank": 4}])
    marked = parameters([(64,)])
    marked[0].ds_id = 3
    with pytest.raises(ValueError, match="FSDP2"):
        GaLoreAdamW(marked, rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = GaLoreAdamW([{"params": [*parameters([(6, 4)]), *flat], "rank": 2}]).plan()
    assert [row.rule for row in plan] == ["galore", "adamw"]


def test_adamw_part_with_options_of_its_own():
    ps = parameters([(6, 4), (4,), (5, 6)])
    optimizer = GaLoreAdamW(ps, lr=1e-2, rank=2, lr_adamw=1e-3, betas_adamw=(0.8, 0.9),
                            weight_decay_adamw=0.0)
    rates = {id(p): (g["lr"], g["betas"], g["weight_decay"])
             for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(ps[1])] == (1e-3, (0.8, 0.9), 0.0)
    assert rates[id(ps[0])] == rates[id(ps[2])] == (1e-2, (0.9, 0.999), 0.01)
    with pytest.raises(ValueError, match=r"lr_adamw=-1.*must be"):
        GaLoreAdamW(ps, rank=2, lr_adamw=-1)


def test_dense_groups_are_adamw_exactly():
    ours, theirs = parameters([(6, 4), (4,)]), parameters([(6, 4), (4,)])
    a = GaLoreAdamW([{"params": ours, "rank": 2, "algorithm": "adamw"},
                     {"params": parameters([(3, 3)]), "rank": 2}], lr=1e-2)
    b = torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    run(a, ours, range(5))
    run(b, theirs, range(5))
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_oracle_of_the_oracle():
    """At full rank with an orthonormal basis of axes the oracle is the dense one."""
    g = [torch.diag(torch.tensor([3.0, 2.0, 1.0])) * (i + 1) for i in range(3)]
    start = torch.zeros(3, 3)
    a = oracle.lowrank(start, g, rank=3, update_proj_gap=200, scale=1.0, lr=0.1)
    b = oracle.adamw(start, g, lr=0.1)
    torch.testing.assert_close(a[-1], b[-1])


def test_subspace_finds_a_gradient_that_has_left_its_basis():
    """Rows orthogonal to the old basis: power iterations on zero would never see them."""
    p = torch.nn.Parameter(torch.zeros(16, 16))
    optimizer = GaLoreAdamW([p], rank=2, update_proj_gap=1, lr=1.0, weight_decay=0.0,
                            betas=(0.0, 0.9))
    g = torch.zeros(16, 16)
    g[:, :2] = tensors([(16, 2)])[0]
    p.grad = g
    optimizer.step()
    assert torch.equal(p[:, 10:12], torch.zeros(16, 2))
    g = torch.zeros(16, 16)
    g[:, 10:12] = tensors([(16, 2)], 1)[0]
    p.grad = g
    optimizer.step()
    assert p[:, 10:12].abs().min() > 0


def test_fp16_products_do_not_overflow():
    p = torch.nn.Parameter(torch.zeros(64, 256, dtype=torch.float16))
    optimizer = GaLoreAdamW([p], rank=2)
    p.grad = torch.full_like(p, 2e4)
    optimizer.step()
    assert p.isfinite().all()
    assert p.abs().min() > 0


def test_a_group_keeps_what_it_states():
    ps = parameters([(8, 6), (8,)])
    optimizer = GaLoreAdamW([{"params": ps[:1], "rank": 2}, {"params": ps[1:], "lr": 5e-4}],
                            lr_adamw=1e-3)
    assert optimizer.param_groups[1]["lr"] == 5e-4


def test_an_option_under_two_spellings_is_refused():
    ps = parameters([(8, 6)])
    with pytest.raises(ValueError, match="'scale' is given twice, under two spellings"):
        GaLoreAdamW([{"params": ps, "rank": 2, "alpha": 0.5, "scale": 0.25}])


def test_a_strided_batch_is_updated_in_place():
    a = torch.nn.Parameter(tensors([(3, 2, 6, 4)])[0].transpose(0, 1))
    b = torch.nn.Parameter(a.detach().clone().contiguous())
    for p in (a, b):
        optimizer = GaLoreAdamW([p], rank=2, matricize="batch", lr=1e-2)
        for i in range(3):
            p.grad = tensors([(2, 3, 6, 4)], i)[0]
            optimizer.step()
    assert not torch.equal(a.detach(), tensors([(3, 2, 6, 4)])[0].transpose(0, 1))
    torch.testing.assert_close(a, b)
