"""DCT-AdamW, Fira, APOLLO, Trion: official trajectories, limits, and the traps of each."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lissom.kernels import _triton
from lissom.optim import (
    APOLLO,
    FRUGAL,
    AdamW,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GradNormLoRPAdamW,
    LowRankOptimizer,
    Trion,
    codec,
    dct,
    project,
)
from lissom.optim.inner import RULES
from lissom.optim.norms import sizes
from lissom.optim.project import Bases
from lissom.optim.residual import RESIDUALS, Fira, gains, larger
from lissom.optim.sharding import Rows

from .golden import follow, load, needs_golden, worst
from .helpers import assert_same, feed, parameters, run, snapshot, tensors, through_disk


def cosines(x):
    """All of X Q."""
    return dct.project(x, x.shape[-1], kind=2, dim=-1, norm=1, similarity="auto")[1]


# ---- official trajectories


@needs_golden
@pytest.mark.parametrize("name", [
    "16x24_gap1_rot_l1_matmul_noef", "20x20_gap1_rot_l1_matmul_ef",
    "24x16_gap1_rot_l1_makhoul_noef", "24x16_gap1_rot_l1_matmul_noef",
    "24x16_gap4_rot_l2_matmul_ef"])
@pytest.mark.parametrize("similarity", ["matmul", "fft"])
def test_official_dctadamw(name, similarity):
    """The authors' in-place rotation returns zero on the CPU: in effect their moments reset.

    (``torch.matmul(w, R, out=w)`` clears its output before it reads it, methods.md 3.7.) Their
    count of steps does not.
    """

    class Released(DCTAdamW):
        def age(self, space, s, o, t):
            return t

    case, start, gradients, weights = load(f"dctadamw_{name}")
    p = torch.nn.Parameter(start.clone())
    optimizer = Released(
        [p], lr=case["lr"], betas=tuple(case["betas"]), eps=case["eps"],
        weight_decay=case["weight_decay"], rank=case["rank"], column_norm=case["ell_norm"],
        update_proj_gap=case["update_proj_gap"], moments="reset", similarity=similarity,
        dct_basis=3 if case["similarity"] == "matmul" else 2,
        error_feedback_bits=32 if case["error_feedback"] else None)
    assert worst(follow(optimizer, p, gradients), weights, start) < 2e-5


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


@needs_golden
@pytest.mark.parametrize("shape", ["16x24", "24x16"])
def test_official_trion(shape):
    case, start, gradients, weights = load(f"trion_{shape}_kj")
    p = torch.nn.Parameter(start.clone())
    optimizer = Trion([p], lr=case["lr"], rank=case["rank"], weight_decay=case["weight_decay"],
                      momentum=case["momentum"], ns_steps=case["ns_steps"],
                      dct_basis=3 if start.shape[0] >= start.shape[1] else 2)
    assert worst(follow(optimizer, p, gradients), weights, start) < 2e-2


# ---- the free product


@given(m=st.integers(1, 9), n=st.integers(1, 9), rank=st.integers(1, 10), data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_combination_trains_and_resumes(m, n, rank, data):
    """projection x inner x residual x moments x side x storage: finite, resumed bit for bit."""
    pick = {k: data.draw(st.sampled_from(v), label=k) for k, v in {
        "projection": ["svd", "subspace", "randomized", "dct", "random"],
        "inner": list(RULES), "residual": list(RESIDUALS), "moments": ["keep", "rotate", "reset"],
        "proj_type": ["std", "reverse_std", "left", "right", "full"],
        "basis_bits": [None, 16, 8, 4], "keep_energy": [None, 0.5], "state_bits": [32, 16],
        "residual_scale": ["paper", "released"], "similarity": ["auto", "fft"],
        "dct_basis": [2, 3]}.items()}
    if pick["residual"] == "error_feedback":
        pick["error_feedback_bits"] = data.draw(st.sampled_from([None, 32, 8, 4]))
    (p,) = parameters([(m, n)])
    optimizer = GaLoreAdamW([p], lr=1e-2, rank=rank, update_proj_gap=2, **pick)
    run(optimizer, [p], range(3))
    q = torch.nn.Parameter(p.detach().clone())
    twin = GaLoreAdamW([q], lr=1e-2, rank=rank, update_proj_gap=2, **pick)
    twin.load_state_dict(through_disk(optimizer.state_dict()))
    run(optimizer, [p], range(3, 6))
    run(twin, [q], range(3, 6))
    assert_same(snapshot(optimizer), snapshot(twin))
    assert p.isfinite().all()
    held = sum(v.nbytes for v in optimizer.state[p].values())
    assert optimizer.plan().state_bytes == held


@pytest.mark.parametrize("options", [
    {"projection": "dct"}, {"residual": "fira"}, {"residual": "error_feedback"},
    {"projection": "dct", "residual": "fira", "proj_type": "full", "moments": "rotate"},
    {"residual": "sign", "inner": "factored"}], ids=str)
@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 4, 6)])
def test_a_batch_equals_its_matrices(options, shape):
    (stack,) = parameters([shape])
    single = [torch.nn.Parameter(x.clone()) for x in stack.detach()]
    given = {"lr": 1e-2, "rank": 2, "projection": "svd", "update_proj_gap": 3,
             "refresh": "synchronous", **options}
    a = GaLoreAdamW([{"params": [stack], "matricize": "batch"}], **given)
    b = GaLoreAdamW(single, **given)
    for i in range(7):
        feed([stack], i)
        for p, g in zip(single, stack.grad, strict=True):
            p.grad = g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]),
                               rtol=0, atol=1e-5)


def test_combinations_that_cannot_be_are_refused():
    (p,) = parameters([(6, 4)])
    with pytest.raises(ValueError, match=r"amsgrad=True.*inner='lion'"):
        GaLoreAdamW([p], rank=2, inner="lion", amsgrad=True)
    with pytest.raises(ValueError, match=r"error_feedback_bits=8.*residual='fira'"):
        FiraAdamW([p], rank=2, error_feedback_bits=8)


# ---- DCT-AdamW


def test_dct_state_is_indices_only():
    ps = parameters([(8, 6), (6, 8)])
    optimizer = DCTAdamW(ps, rank=3)
    for p in ps:
        state = optimizer.state[p]
        assert not [k for k in state if k.startswith("basis_") and k != "basis_step"]
        (index,) = (v for k, v in state.items() if k.startswith("columns_"))
        assert index.dtype == torch.int32
        assert index.shape == (3,)


@pytest.mark.parametrize("similarity", ["matmul", "fft"])
def test_columns_of_squares_out_of_range_are_chosen_alike(similarity):
    chosen = []
    for scale in (1.0, 1e25, 1e-25, -1e25):  # of entries of one sign
        (p,) = parameters([(16, 12)])
        optimizer = DCTAdamW([p], rank=4, column_norm=2, similarity=similarity)
        p.grad = tensors([(16, 12)], 1)[0].abs() * scale
        optimizer.step()
        chosen.append(optimizer.state[p]["columns_right"].tolist())
    assert all(x == chosen[0] for x in chosen)


def test_dct_of_full_rank_is_a_rotated_adam():
    """With all columns, W Q follows Adam on G Q."""
    (p,) = parameters([(6, 5)])
    q = torch.nn.Parameter(cosines(p.detach()))
    a, b = DCTAdamW([p], lr=1e-2, rank=5), AdamW([q], lr=1e-2)
    for i in range(5):
        g = tensors([(6, 5)], i)[0]
        p.grad, q.grad = g, cosines(g)
        a.step()
        b.step()
    torch.testing.assert_close(cosines(p.detach()), q.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 32, 8, 4])
def test_error_feedback_recovers_what_was_dropped(bits):
    """A constant gradient of equal columns: rank 1 with feedback reaches all of them."""
    (p,) = parameters([(16, 4)])
    start = p.detach().clone()
    optimizer = DCTAdamW([p], lr=1e-2, rank=1, inner="momentum", betas=(0.0, 0.0), scale=1.0,
                         weight_decay=0.0, error_feedback_bits=bits)
    g = torch.ones(16, 4) * torch.tensor([1.0, 0.9, 1.1, 0.8])
    for _ in range(64):
        p.grad = g.clone()
        optimizer.step()
    moved = (start - p.detach()) / (64 * 1e-2)
    error = ((moved - g).norm() / g.norm()).item()
    assert error < {None: 1, 32: 0.05, 8: 0.05, 4: 0.15}[bits]
    assert bits or error > 0.05


def test_old_basis_is_kept_for_gradients_without_news():
    for value in (0.0, float("nan")):
        (p,) = parameters([(6, 4)])
        optimizer = DCTAdamW([p], rank=2)
        feed([p], 1)
        optimizer.step()
        before = optimizer.state[p]["columns_right"].clone()
        p.grad = torch.full((6, 4), value)
        optimizer.step()
        assert torch.equal(optimizer.state[p]["columns_right"], before)


@pytest.mark.parametrize("similarity", ["matmul", "fft"])
@pytest.mark.parametrize("norm", [1, 2])
def test_one_entry_that_is_no_number_chooses_no_columns(similarity, norm):
    for value in (math.inf, -math.inf, math.nan):
        x = tensors([(6, 4)], 1)[0]
        x[2, 1] = value
        for old in ([0, 1], [2, 3]):
            index, _ = dct.project(x, 2, kind=2, dim=-1, norm=norm, similarity=similarity,
                                   old=torch.tensor(old, dtype=torch.int32))
            assert index.tolist() == old


# ---- lazy refresh, stored bases


def test_lazy_refresh_keeps_what_still_captures():
    (p,) = parameters([(12, 8)])
    gradient = tensors([(12, 2)], 1)[0] @ tensors([(2, 8)], 2)[0]
    other = tensors([(12, 2)], 3)[0] @ tensors([(2, 8)], 4)[0]
    optimizer = GaLoreAdamW([p], rank=2, update_proj_gap=2, keep_energy=0.8, projection="svd",
                            refresh="synchronous")
    born = []
    for g in [gradient] * 4 + [other] * 4:
        p.grad = g.clone()
        optimizer.step()
        born.append(int(optimizer.state[p]["basis_step"]))
    assert born == [1, 1, 1, 1, 5, 5, 5, 5]
    # of what it captured when it was new, which of a gradient of full rank is not all
    optimizer = GaLoreAdamW([p], rank=2, update_proj_gap=2, keep_energy=0.8, projection="svd",
                            refresh="synchronous")
    for _ in range(4):
        p.grad = tensors([(12, 8)], 5)[0]
        optimizer.step()
        assert int(optimizer.state[p]["basis_step"]) == 1
    assert 0.3 < float(optimizer.state[p]["basis_energy"]) < 0.8
    # of a stack it is the matrix that captures least
    (p,) = parameters([(2, 12, 8)])
    optimizer = GaLoreAdamW([p], rank=2, update_proj_gap=2, keep_energy=0.8, projection="svd",
                            refresh="synchronous", matricize="batch")
    born = []
    for second in [gradient] * 2 + [other] * 2:
        p.grad = torch.stack([gradient, second])
        optimizer.step()
        born.append(int(optimizer.state[p]["basis_step"]))
    assert born == [1, 1, 3, 3]


@pytest.mark.parametrize(("bits", "error"), [(16, 4e-3), (8, 4e-3), (4, 0.08)])
def test_stored_bases_are_near_the_exact(bits, error):
    (p,), (q,) = parameters([(40, 30)]), parameters([(40, 30)])
    a = GaLoreAdamW([p], rank=4, basis_bits=bits, projection="svd")
    b = GaLoreAdamW([q], rank=4, projection="svd")
    run(a, [p], range(1))
    run(b, [q], range(1))
    basis = codec.Decoded(a.state[p], a._layouts[p], p)["basis_right"].float()
    exact = b.state[q]["basis_right"]
    assert 0 < (basis - exact).abs().max() < error
    # what was projected was so onto what is stored
    torch.testing.assert_close(a.state[p]["exp_avg"], 0.1 * p.grad @ basis, rtol=1e-5, atol=1e-6)
    sizes = {16: 30 * 4 * 2, 8: 30 * 4 + 30 * 4, 4: 30 * 2 + 30 * 4}
    stored = [v.nbytes for k, v in a.state[p].items() if k.startswith("basis_right")]
    assert sum(stored) == sizes[bits]


# ---- Fira


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


# ---- APOLLO


@pytest.mark.parametrize("options", [{}, {"rank": 1, "scale_type": "tensor", "scale": 128**0.5}])
def test_apollo_moves_along_the_gradient(options):
    """Each channel is a multiple of the gradient's; its state has no basis."""
    for shape in ((9, 6), (6, 9)):
        (p,) = parameters([shape])
        optimizer = APOLLO([p], **{"lr": 1e-2, "rank": 2, "weight_decay": 0.0, **options})
        assert not any(k.startswith("basis_") and k != "basis_step" for k in optimizer.state[p])
        for i in range(3):
            start = p.detach().clone()
            feed([p], i)
            g = p.grad.clone()
            optimizer.step()
            ratio = (start - p.detach()) / g
            across = 0 if shape[0] < shape[1] else 1
            if options:
                ratio = ratio.flatten()
                across = 0
            assert (ratio > 0).all()
            spread = ratio.std(across) / ratio.mean(across)
            assert spread.max() < 1e-3


def test_apollo_scales_like_its_equation():
    """s_j = |N_j| / |R_j| with the P that the seed gives."""
    (p,) = parameters([(5, 8)])
    start = p.detach().clone()
    optimizer = APOLLO([p], lr=1.0, rank=2, weight_decay=0.0, seed=11)
    feed([p], 3)
    optimizer.step()
    basis = project.gaussian_basis(5, 2, (), (11, 0), 2, p.grad)
    low = basis.mT @ p.grad
    # At the first step N is the sign of R.
    s = math.sqrt(2) / low.norm(dim=0)
    torch.testing.assert_close(p.detach(), start - p.grad * s, rtol=1e-5, atol=1e-6)
    norms = torch.stack([project.gaussian_basis(400, 5, (), (i, 0), 2, p.grad).square().sum(1)
                         for i in range(20)])
    assert abs(norms.mean() - 1) < 0.03


# ---- Trion


@pytest.mark.parametrize("dct_basis", [2, 3])
def test_trion_transposes_with_its_matrix(dct_basis):
    """The released code projects wide matrices on another basis than tall ones."""
    tall = torch.nn.Parameter(tensors([(9, 5)])[0])
    wide = torch.nn.Parameter(tall.detach().mT.clone())
    options = {"rank": 3, "dct_basis": dct_basis, "adjust_lr_fn": "unscaled",
               "polar_dtype": "float32"}
    a, b = Trion([tall], **options), Trion([wide], **options)
    for i in range(4):
        g = tensors([(9, 5)], i)[0]
        tall.grad, wide.grad = g, g.mT.clone()
        a.step()
        b.step()
        torch.testing.assert_close(tall.detach(), wide.detach().mT, rtol=0, atol=1e-5)


def test_trion_momentum_keeps_what_was_not_taken():
    (p,) = parameters([(9, 5)])
    optimizer = Trion([p], rank=2, momentum=0.9)
    feed([p], 1)
    g = p.grad.clone()
    optimizer.step()
    b, m = cosines(g), cosines(optimizer.state[p]["momentum_buffer"])
    ratio = (m / b).mean(0)
    taken = b.abs().sum(0).topk(2).indices
    expected = torch.ones(5)
    expected[taken] = 0.9
    torch.testing.assert_close(ratio, expected, rtol=1e-4, atol=1e-4)


def test_trion_dense_part_has_its_own_rate():
    ps = parameters([(6, 4), (4,)])
    optimizer = Trion(ps, rank=2)
    assert {g["lr"] for g in optimizer.param_groups} == {0.02, 3e-4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.plan()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shape", [(40, 8), (3, 40, 8), (12, 9)])
def test_bases_by_cholesky_are_orthonormal_and_span_the_same(shape, exact):
    y = tensors([shape], 5)[0] * torch.logspace(0, -20, shape[-1])
    q = project._by_cholesky(y, exact)
    torch.testing.assert_close(q.mT @ q, torch.eye(shape[-1]).expand_as(q.mT @ q),
                               atol=1e-6 if exact else 1e-3, rtol=0)
    # Householder's columns, up to their signs
    other = torch.linalg.qr(y.double()).Q
    other = other * (other * q).sum(-2, keepdim=True).sign()
    torch.testing.assert_close(q.double(), other, atol=1e-6 if exact else 1e-3, rtol=0)


@pytest.mark.parametrize(("near", "arithmetic"), [
    (1.0, [torch.float32, torch.float64]),
    (1e-3, [torch.float32, torch.float64, torch.float64]),
])
def test_only_dependent_columns_are_divided_in_float64_twice(monkeypatch, near, arithmetic):
    y = tensors([(40, 8)], 5)[0]
    y[:, 5] = y[:, 0] + near * y[:, 5]
    seen, divided = [], project._divided
    monkeypatch.setattr(project, "_divided",
                        lambda q, least: (seen.append(q.dtype), divided(q, least))[1])
    q = project._by_cholesky(y)
    assert seen == arithmetic
    torch.testing.assert_close(q.mT @ q, torch.eye(8), atol=1e-6, rtol=0)
    del seen[:]
    assert project._by_cholesky(y.double()).dtype == torch.float64
    assert seen == [torch.float64] * 2


def test_bases_of_dependent_columns_are_not_by_cholesky():
    y = tensors([(40, 8)], 5)[0]
    nan = torch.full((40,), torch.nan)
    for column in (torch.zeros(40), y[:, 0], y[:, 0] + 1e-7 * y[:, 1], nan):
        z = y.clone()
        z[:, 5] = column
        for exact in (True, False):
            assert project._by_cholesky(z, exact) is None
            assert project._by_cholesky(torch.stack([y, z]), exact) is None
    # No pivot tells how dependent these are, but what the first pass leaves of them does.
    q = torch.linalg.qr(tensors([(200, 80)], 5)[0].double()).Q
    assert project._by_cholesky(q @ (torch.eye(80) - torch.ones(80, 80).triu(1)).double()) is None


@pytest.mark.parametrize("shape", [(70, 130), (130, 70), (2, 40, 33), (1, 5)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_products_of_16_bits_are_those_of_fp32(shape, backend, monkeypatch):
    """Three bf16 numbers hold all 24 bits of an fp32 one."""
    if backend == "triton" and not _triton.INTERPRETED:
        pytest.skip("on the CPU kernels run under TRITON_INTERPRET=1")
    monkeypatch.setattr(project, "use_triton", lambda *_: True)
    monkeypatch.setattr("lissom.kernels.project.use_triton", lambda *_: backend == "triton")
    for size in (1.0, 1e-9, 1e20):  # the last one is scaled first
        g = (tensors([shape], 3)[0] * size).bfloat16()
        largest = g.float().abs().amax((-2, -1), keepdim=True)
        seen = project.Gradient(g, largest)
        assert seen.narrow == (size < 1e12)
        assert (seen.g is g) == seen.narrow
        exact = g.double() / largest.double()
        x, y = tensors([(*shape[:-2], shape[-1], 7), (*shape[:-2], shape[-2], 7)], 4)
        bound = {"atol": 2e-7 * sum(shape), "rtol": 0, "check_dtype": False}
        torch.testing.assert_close(seen.times(x), exact @ x.double(), **bound)
        torch.testing.assert_close(seen.transposed_times(y), exact.mT @ y.double(), **bound)
        torch.testing.assert_close(seen.energy(), exact.square().sum((-2, -1), keepdim=True),
                                   atol=0, rtol=1e-5, check_dtype=False)
        torch.testing.assert_close(seen.whole(), exact.float())
        assert seen.times(x).dtype == torch.float32


@pytest.mark.parametrize("projection", ["svd", "randomized", "subspace"])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (2, 30, 50)])
def test_bases_of_16_bits_on_a_gpu_are_those_of_fp32(shape, projection, monkeypatch):
    """At once with Cholesky; a zero matrix of a batch keeps the basis it has."""
    g = (tensors([shape], 6)[0] @ torch.logspace(0, -2, shape[-1]).diag() * 1e-5).bfloat16()
    if len(shape) > 2:
        g[0] = 0
    side = "right" if shape[-2] >= shape[-1] else "left"
    old = project.find(g, 8, side, projection, None, (1, 2), 3)
    expected = project.find(g, 8, side, projection, old, (1, 2), 4)
    monkeypatch.setattr(project, "use_triton", lambda *_: True)
    householder = project._orthonormal
    monkeypatch.setattr(project, "_orthonormal", lambda y, exact=True: (
        householder(y) if (q := project._by_cholesky(y, exact)) is None else q))
    q = project.find(g, 8, side, projection, old, (1, 2), 4)
    torch.testing.assert_close(q, expected, atol=1e-4, rtol=0)


def test_a_gpu_finds_the_bases_of_a_cpu(monkeypatch):
    g = tensors([(60, 40)], 6)[0]
    found = [project.find(g, 8, "right", "subspace", None, (1, 2), 3)]
    old = found[0]
    found.append(project.find(g, 8, "right", "subspace", old, (1, 2), 3))
    monkeypatch.setattr(project, "_orthonormal", project._by_cholesky)
    for start, expected in zip((None, old), found, strict=True):
        q = project.find(g, 8, "right", "subspace", start, (1, 2), 3)
        q = q * (q * expected).sum(-2, keepdim=True).sign()
        torch.testing.assert_close(q, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("residual", ["sign", "error_feedback", "fira", "none"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_residuals_of_any_side_and_dtype_follow_fp32(residual, proj_type, dtype):
    results = []
    for kind in (torch.float32, dtype):
        ps = [torch.nn.Parameter(torch.zeros(shape, dtype=kind)) for shape in ((8, 6), (6, 8))]
        optimizer = GaLoreAdamW(ps, lr=1e-2, rank=2, proj_type=proj_type, residual=residual,
                                rounding="nearest", scale=1.0, inner="momentum")
        feed(ps, 0)
        for p in ps:
            p.grad = p.grad.to(dtype).to(kind)
        optimizer.step()
        results.append([p.detach().float() for p in ps])
    for one, other in zip(*results, strict=True):  # but for a few signs of next to nothing
        assert float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)) > 0.95
        assert float(one.norm() / other.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("projection", ["dct", "subspace", "svd", "randomized"])
@pytest.mark.parametrize("first", [0.0, torch.nan])
def test_a_gradient_of_nothing_chooses_no_basis(projection, first):
    """A layer above one that begins at zero has none at first: the next one is looked at."""
    p, q = parameters([(12, 9)], 1)[0], parameters([(12, 9)], 1)[0]
    make = {"lr": 1e-2, "rank": 3, "projection": projection, "update_proj_gap": 200,
            "weight_decay": 0.0}
    ours, fresh = GaLoreAdamW([p], **make), GaLoreAdamW([q], **make)
    p.grad = torch.full_like(p, first)
    ours.step()
    assert int(ours.state[p]["basis_step"]) == 0
    if first != 0:
        return
    assert torch.equal(p, q)
    for x in (p, q):
        feed([x], 3)
    ours.step()
    fresh.step()
    assert int(ours.state[p]["basis_step"]) == 2
    if projection in ("dct", "svd"):  # the others begin with random numbers of the step
        name = next(k for k in ours.state[p] if k.startswith(("basis_r", "columns_")))
        torch.testing.assert_close(ours.state[p][name], fresh.state[q][name], atol=1e-5, rtol=0)


def test_random_bases_of_a_gpu_are_orthonormal_and_uniform():
    """Without a look at what comes out; up to a square, whose columns are the most dependent."""
    for shape in ((60, 8), (60, 30), (60, 60), (3, 200, 200), (1, 1)):
        y = tensors([shape], 7)[0]
        q = project._independent(y)
        torch.testing.assert_close(q.mT @ q, torch.eye(shape[-1]).expand(*shape[:-2], -1, -1),
                                   atol=3e-6, rtol=0)
        triangle = q.mT @ y
        assert bool((triangle.diagonal(dim1=-2, dim2=-1) > 0).all())
        torch.testing.assert_close(triangle.tril(-1), torch.zeros_like(triangle), atol=1e-4,
                                   rtol=0)


RANKED = [APOLLO, DCTAdamW, FRUGAL, FiraAdamW, GaLoreAdamW, GaLoreAdamW8bit, GradNormLoRPAdamW,
          Trion]


@pytest.mark.parametrize("cls", RANKED, ids=lambda x: x.__name__)
def test_a_rank_that_no_group_takes_is_pointed_out(cls):
    (p,) = parameters([(12, 9)])
    with pytest.warns(UserWarning, match=r"rank=8 has no effect: .* own rank \(4\)") as told:
        cls([{"params": [p], "rank": 4}], rank=8)
    assert [x.filename for x in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls([{"params": [p], "rank": 4}])
        cls([{"params": [p]}], rank=8)


@pytest.mark.parametrize("cls", RANKED, ids=lambda x: x.__name__)
def test_a_class_without_a_matrix_says_so_where_it_was_made(cls):
    with pytest.warns(UserWarning, match="has no matrix of its own, so it is AdamW") as told:
        cls(parameters([(12, 9)]))
    assert [x.filename for x in told] == [__file__]


def test_the_base_is_no_optimizer_of_its_own():
    """It would be AdamW, without a word."""
    class Nameless(LowRankOptimizer):
        pass

    class Named(LowRankOptimizer):
        algorithm = "theirs"

    (p,) = parameters([(12, 9)])
    for cls in (LowRankOptimizer, Nameless):
        with pytest.raises(TypeError, match=f"{cls.__name__}: has no rule .*GaLoreAdamW"):
            cls([p], rank=2)
    assert Named([p], rank=2).plan().matrices == 1


def test_classes_without_methods_of_their_own_stay_in_batches():
    class Options(GaLoreAdamW):
        algorithm = "theirs"

        def __init__(self, params, **options):
            super().__init__(params, rank=2, **options)

    class Draws(Options):
        draw = staticmethod(project.gaussian_basis)

    class Mixin:
        @property
        def residual(self):
            return lambda o: RESIDUALS["none"]

    class Mixed(Mixin, GaLoreAdamW):
        pass

    class Looks(Fira):
        def combine(self, *given):
            return super().combine(*given)

    class Promised(Looks):
        apart = True

    assert [x.apart for x in (GaLoreAdamW8bit, Options, type("More", (Options,), {}), Promised,
                              type("Same", (Promised,), {}))] == [True] * 5
    assert [x.apart for x in (FRUGAL, LowRankOptimizer, Draws, type("More", (Draws,), {}), Mixed,
                              Looks)] == [False] * 6


def test_which_updates_take_the_projected_gradient_alone():
    """What DDP may send in place of the gradient; a method of others may want all of it."""
    class Updates(GaLoreAdamW):
        def update(self, g, s, o, t):
            return super().update(g, s, o, t)

    class Projects(GaLoreAdamW):
        def project_gradient(self, g, s, o, t):
            return super().project_gradient(g, s, o, t)

    def asked(cls, **options):
        optimizer = cls(parameters([(12, 9)]), rank=2, **options)
        return optimizer.by_projection(optimizer.param_groups[0])

    assert asked(GaLoreAdamW)
    assert asked(DCTAdamW)
    assert not asked(DCTAdamW, error_feedback_bits=8)
    for cls in (FiraAdamW, APOLLO, FRUGAL, GradNormLoRPAdamW, Updates, Projects):
        assert not asked(cls)
    pair = [{"params": parameters([(3, 9), (12, 3)]), "roles": ("A", "B")}]
    factors = GradNormLoRPAdamW(pair, rank=2)
    assert factors.by_projection(factors.param_groups[0])


@pytest.mark.parametrize(("cls", "options"), [
    (GaLoreAdamW, {"projection": "random"}), (GaLoreAdamW, {"projection": "random",
                                                            "moments": "reset"}),
    (APOLLO, {}), (FRUGAL, {})])
def test_a_basis_is_drawn_once_a_step(cls, options, monkeypatch):
    """The last one is needed at a refresh where moments turn with it, or its energy is asked."""
    drawn, draw = [], cls.draw

    def counted(*given):
        drawn.append(given)
        return draw(*given)

    monkeypatch.setattr(cls, "draw", staticmethod(counted))

    def counts(**more):
        (p,) = parameters([(12, 9)])
        optimizer = cls([p], rank=2, update_proj_gap=3, **options | more)
        found = []
        for step in range(7):
            drawn.clear()
            run(optimizer, [p], range(step, step + 1))
            found.append(len(drawn))
        return found

    assert counts() == [1] * 7
    assert counts(moments="rotate") == [1, 1, 1, 2, 1, 1, 2]
    assert counts(keep_energy=1e-3) == [1] * 7
