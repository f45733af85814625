"""DCT-AdamW: official trajectories, columns, error feedback."""

from __future__ import annotations

import pytest
import torch
from lissom.optim import AdamW, DCTAdamW

from .golden import follow, load, needs_golden, worst
from .helpers import cosines, feed, parameters, tensors


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
