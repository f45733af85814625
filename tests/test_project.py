"""Bases: how near the best they are, how moments turn with them, and how a GPU finds them."""

from __future__ import annotations

import pytest
import torch
from lissom.optim import GaLoreAdamW, project

from .helpers import parameters, tensors


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("projection", ["svd", "randomized", "subspace"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_bases_are_orthonormal_and_near_the_best(side, projection, scale):
    # 200 x 500, singular values from 1 to 1e-3, as in methods of Halko et al.
    u, v = (torch.linalg.qr(x).Q for x in tensors([(200, 200), (500, 200)]))
    s = torch.logspace(0, -3, 200)
    g = (u * s) @ v.mT * scale
    q = project.find(g, 16, side, projection, None, (0, 0), 1)
    if projection == "subspace":
        old = q
        q = project.find(g, 16, side, projection, old, (0, 0), 2)
        assert ((q * old).sum(0) > 0).all()
    torch.testing.assert_close(q.mT @ q, torch.eye(16), rtol=0, atol=1e-5)
    unit = g / scale
    rest = unit - (q @ (q.mT @ unit) if side == "left" else (unit @ q) @ q.mT)
    assert rest.norm() < 1.05 * s[16:].norm()


@pytest.mark.parametrize("left", [False, True])
def test_rotation_is_exact_where_columns_are_shared(left):
    """The permutation of indices and the general product agree; V stays positive."""
    (m,) = tensors([(5, 3)])
    basis = torch.eye(6)
    old, new = torch.tensor([0, 2, 4]), torch.tensor([1, 2, 4])
    zero = torch.zeros(5)
    expected = torch.stack([zero, m[:, 1], m[:, 2]], -1)
    for turned in (project.turn(basis[:, old], basis[:, new], left),
                   project.shift(old.int(), new.int(), left)):
        for power, x, y in ((1, m, expected), (2, m.square(), expected.square())):
            moved = turned(x.mT if left else x, power)
            assert torch.equal(moved.mT if left else moved, y)
    batch = project.shift(torch.stack([old, new]).int(), torch.stack([new, old]).int(), left)
    moved = batch(torch.stack([m.mT, m.mT] if left else [m, m]), 1)
    back = torch.stack([zero, m[:, 1], m[:, 2]], -1)
    for x, y in zip(moved, (expected, back), strict=True):
        assert torch.equal(x.mT if left else x, y)


def test_random_bases_come_from_the_seed_alone():
    torch.manual_seed(1)
    a = project.random_basis(9, 4, (2,), (5, 6), 7, torch.empty(0))
    torch.manual_seed(2)
    assert torch.equal(a, project.random_basis(9, 4, (2,), (5, 6), 7, torch.empty(0)))
    assert not torch.equal(a, project.random_basis(9, 4, (2,), (5, 6), 8, torch.empty(0)))
    ps = parameters([(8, 6), (8, 6)])
    optimizer = GaLoreAdamW(ps, rank=2, projection="random")
    assert not any("basis_" in k and k != "basis_step" for k in optimizer.state[ps[0]])
    for p in ps:
        p.grad = tensors([(8, 6)])[0]
    optimizer.step()
    start = parameters([(8, 6), (8, 6)])
    assert not torch.allclose(ps[0] - start[0], ps[1] - start[1])


@pytest.mark.parametrize("projection", ["svd", "randomized", "subspace"])
@pytest.mark.parametrize("warm", [False, True])
def test_bases_do_not_follow_rounding_errors(projection, warm):
    """Singular values down to 1e-3 of the largest: their vectors are there to 1e-3.

    A gradient that was summed in another order (threads, ranks) then has the same basis; squares
    in fp32 turned its last columns by 0.3.
    """
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, 48, generator=generator)).Q for n in (96, 64))
    g = u * torch.logspace(0, -4, 48) @ v.mT
    start = torch.linalg.qr(v[:, :32] + 0.01 * torch.randn(64, 32, generator=generator)).Q
    old = start if warm else None
    one = project.find(g, 32, "right", projection, old, (0, 0), 1)
    noisy = g * (1 + 1e-7 * torch.randn(g.shape, generator=generator))
    other = project.find(noisy, 32, "right", projection, old, (0, 0), 1)
    assert (one * other).sum(0).abs().min() > 1 - 1e-6
    assert (one - other * (one * other).sum(0).sign()).norm(dim=0).max() < 1e-3
