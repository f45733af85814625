"""Bases: how near the best they are, how moments turn with them, and how a GPU finds them."""

from __future__ import annotations

import pytest
import torch
from lissom.kernels import _triton, narrow
from lissom.optim import GaLoreAdamW, project
from lissom.optim.coordinates import shift

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
                   shift(old.int(), new.int(), left)):
        for power, x, y in ((1, m, expected), (2, m.square(), expected.square())):
            moved = turned(x.mT if left else x, power)
            assert torch.equal(moved.mT if left else moved, y)
    batch = shift(torch.stack([old, new]).int(), torch.stack([new, old]).int(), left)
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


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shapes", [((70, 30), (30, 4)), ((4, 30), (30, 70)), ((2, 9, 5), (5, 3)),
                                    ((2, 3, 5), (2, 5, 40)), ((0, 5), (5, 3)), ((3, 0), (0, 5))])
def test_products_on_cpus_without_16_bits(shapes, kind, monkeypatch):
    """In float64, a block at a time, rounded once: the same bits whatever rows there are."""
    monkeypatch.setattr(narrow, "_BLOCK", 60)
    a, b = (x.to(kind) for x in tensors(shapes, 3))
    exact = a.double() @ b.double()
    for fast in ([kind], []):
        monkeypatch.setattr(narrow, "_FAST", fast)
        assert narrow.slow(a) != bool(fast)
        assert not narrow.slow(a.float())
        for x, y in ((a, b), (a.mT.contiguous().mT, b.mT.contiguous().mT)):
            c = narrow.matmul(x, y)
            assert c.dtype == kind
            if fast:  # torch's own
                torch.testing.assert_close(c, x @ y, rtol=0, atol=0)
            else:
                half = torch.finfo(kind).eps / 2
                assert ((c.double() - exact).abs() <= half * exact.abs() + 1e-7).all()
        if not fast and a.shape[-2]:
            one = torch.cat([narrow.matmul(x, b) for x in a.split(1, -2)], -2)
            assert torch.equal(one, c)
            torch.testing.assert_close(narrow.exact(a, b), exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(narrow.matmul(a.double(), b.double()), exact)


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
