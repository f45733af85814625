"""FRUGAL beyond the contract: whose columns follow AdamW, and which."""

from __future__ import annotations

import pytest
import torch
from lissom.optim import FRUGAL, GaLoreAdamW
from lissom.optim.coordinates import Coordinates, put

from .helpers import feed, parameters, run, tensors


def signs(p, gradient, lr, decay):
    with torch.no_grad():
        p.mul_(1 - lr * decay).sub_(gradient.sign(), alpha=lr)


@pytest.mark.parametrize(("shape", "along"), [((10, 6), 0), ((6, 10), 1)])
@pytest.mark.parametrize("free", [1.0, 0.5])
def test_some_columns_are_adamws_and_the_others_signsgds(shape, along, free):
    (p,), (a,), (b,) = (parameters([shape], 1) for _ in range(3))
    optimizer = FRUGAL([p], rank=2, lr=1e-2, weight_decay=0.1, free_scale=free)
    adamw = torch.optim.AdamW([a], lr=1e-2, weight_decay=0.1)
    for step in range(5):
        feed([p], step)
        feed([a], step)
        optimizer.step()
        adamw.step()
        with torch.no_grad():
            b.mul_(1 - 1e-3).sub_(p.grad.sign(), alpha=1e-2 * free)
    like_a = ((p - a).abs() < 1e-6).all(along)
    like_b = ((p - b).abs() < 1e-6).all(along)
    assert like_a.sum() == 2
    assert like_b.sum() == 4
    assert not (like_a & like_b).any()
    assert set(optimizer.state[p]) == {"step", "index", "key", "basis_step",
                                       "exp_avg", "exp_avg_sq"}


def test_full_rank_is_adamw():
    (p,), (q,) = parameters([(6, 8)]), parameters([(6, 8)])
    ours = FRUGAL([p], rank=6, lr=1e-2)
    torchs = torch.optim.AdamW([q], lr=1e-2)
    run(ours, [p], range(5))
    run(torchs, [q], range(5))
    assert torch.allclose(p, q, atol=1e-7)


def test_coordinates_change_and_moments_start_anew():
    (p,) = parameters([(40, 30)])
    optimizer = FRUGAL([p], rank=5, update_proj_gap=2, refresh="synchronous", betas=(0.9, 0.9))
    chosen = []
    for step in range(4):
        feed([p], step)
        optimizer.step()
        s, o = optimizer.state[p], optimizer.param_groups[0]
        basis = optimizer.bases(p.grad, s, o, int(s["basis_step"])).right.matrix(p)
        assert torch.equal(basis.sum(0), torch.ones(5))  # columns of the identity
        assert basis.sum() == basis.count_nonzero() == 5
        chosen.append(basis.sum(1).nonzero().flatten().tolist())
        if step % 2 == 0:
            assert torch.allclose(s["exp_avg"], 0.1 * p.grad[:, chosen[-1]])
    assert chosen[0] == chosen[1] != chosen[2] == chosen[3]


def test_bias_correction_starts_anew_with_the_moments():
    """Under a constant gradient each entry of Adam's moves by the rate, after a refresh too."""
    (p,) = parameters([(8, 6)])
    optimizer = FRUGAL([p], rank=3, lr=1e-2, weight_decay=0.0, free_scale=0.0, update_proj_gap=4,
                       refresh="synchronous")
    for _ in range(10):
        before = p.detach().clone()
        p.grad = torch.full_like(p, 0.3)
        optimizer.step()
        moved = (before - p.detach()).sort().values
        torch.testing.assert_close(moved[:, 3:], torch.full((8, 3), 1e-2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("projection", ["svd", "subspace", "dct"])
def test_the_sign_of_rounding_moves_nothing(projection):
    """At full rank nothing is outside the subspace but rounding errors."""
    (p,), (q,) = parameters([(6, 8)]), parameters([(6, 8)])
    both = [GaLoreAdamW([x], rank=6, lr=1e-2, projection=projection, residual=residual)
            for x, residual in ((p, "sign"), (q, "none"))]
    run(both[0], [p], range(5))
    run(both[1], [q], range(5))
    assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (768, 512)])
@pytest.mark.parametrize(("make", "signs", "none"), [
    (FRUGAL, {}, {"free_scale": 0.0}),
    (GaLoreAdamW, {"residual": "sign"}, {}),
    (GaLoreAdamW, {"residual": "sign", "basis_bits": 16}, {"basis_bits": 16}),
    (GaLoreAdamW, {"residual": "sign", "basis_bits": 8}, {"basis_bits": 8})],
    ids=["frugal", "galore", "galore-16", "galore-8"])
def test_nor_does_it_where_the_gradient_has_a_lower_rank(make, signs, none, shape, dtype):
    """As that of few tokens has: all of it is in the subspace. Then one row or column has more."""
    along, odd = min(shape), 5
    u, v = (x.to(dtype) for x in tensors([(shape[0], 2), (2, shape[1])]))
    ps = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for _ in range(2)]
    both = [make([p], lr=1.0, rank=8, projection="svd", update_proj_gap=100,
                 refresh="synchronous", **more) for p, more in zip(ps, (signs, none), strict=True)]
    for more in (False, True):
        for p, optimizer in zip(ps, both, strict=True):
            p.grad = u @ v
            if more:
                line = p.grad[odd] if shape[0] > along else p.grad[:, odd]
                line += 0.1 * tensors([(along,)], 7)[0].to(dtype)
            optimizer.step()
        apart = (ps[0] - ps[1]).abs().amax(-1 if shape[0] > along else -2)
        assert apart.bool().tolist() == [more and i == odd for i in range(len(apart))]


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coordinates_are_columns_of_the_identity(batch, dtype):
    drawn = tensors([(*batch, 9), (*batch, 7)], 2)
    left, right = (Coordinates(x.topk(r).indices.sort().values, x.shape[-1])
                   for x, r in zip(drawn, (4, 3), strict=True))
    g = tensors([(*batch, 9, 7)], 1)[0].to(dtype)
    p, q = left.matrix(g), right.matrix(g)
    assert p.shape == left.shape
    assert q.shape == right.shape
    assert torch.equal(p.mT @ p, torch.eye(4, dtype=dtype).expand(*batch, 4, 4))
    assert torch.equal(left.down(g, -2), p.mT @ g)
    assert torch.equal(right.down(g, -1), g @ q)
    for rows, columns in ((left, None), (None, right), (left, right)):
        n = left.down(g, -2) if rows else g
        n = 5 + (right.down(n, -1) if columns else n)
        d = g.clone()
        put(d, n, rows, columns)
        # The identity stands in for a basis that is not there.
        a, b = (x.matrix(g) if x else torch.eye(size, dtype=dtype)
                for x, size in ((rows, 9), (columns, 7)))
        assert torch.equal(d, g - a @ (a.mT @ g @ b) @ b.mT + a @ n @ b.mT)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("ranks", [[9], [4, 5], [0, 6, 3, 0], [1] * 9])
def test_coordinates_on_some_rows(ranks, both):
    """What ranks find is summed, and each puts what falls on its rows."""
    left = Coordinates(torch.tensor([0, 3, 5, 8]), 9)
    right = Coordinates(torch.tensor([1, 2, 6]), 7) if both else None
    (g,) = tensors([(9, 7)], 1)
    n = left.down(g, -2) if right is None else right.down(left.down(g, -2), -1)
    d, start, found = g.clone(), 0, torch.zeros(4, 7)
    put(d, n + 5, left, right)
    for count in ranks:
        part, g_ = left[start:start + count], g[start:start + count]
        assert torch.equal(part.matrix(g), left.matrix(g)[start:start + count])
        found += part.down(g_, -2)
        d_ = torch.cat([g_, torch.full((1, 7), torch.nan)])  # for what is on other rows
        put(d_, n + 5, part, right)
        assert torch.equal(d_[:count], d[start:start + count])
        start += count
    assert torch.equal(found, left.down(g, -2))


@pytest.mark.parametrize(("scale", "free"), [(1.0, 1.0), (1.0, 0.3), (0.7, 0.0), (0.0, 1.0)])
def test_two_scales_in_16_bits(scale, free):
    """The rates of both parts are exact, though a scale of 0.3 is no bf16 number."""
    p = torch.nn.Parameter(torch.zeros(64, 32, dtype=torch.bfloat16))
    optimizer = FRUGAL([p], rank=8, lr=1.0, weight_decay=0.0, rounding="nearest", scale=scale,
                       free_scale=free)
    feed([p], 0)
    optimizer.step()
    basis = optimizer.bases(p.grad, optimizer.state[p], optimizer.param_groups[0]).right
    of_adam = torch.zeros(32, dtype=torch.bool).index_fill(0, basis.index, True)
    sizes = torch.where(of_adam, scale, free).bfloat16()  # Adam's first step is a sign, too
    torch.testing.assert_close(p.detach(), -sizes * p.grad.sign(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("free", [1.0, 0.5])
def test_what_is_not_finite_shows(value, dtype, free):
    """On any coordinate, as with AdamW: the sign of NaN would be 0, and that of infinity a step."""
    p = torch.nn.Parameter(torch.ones(6, 4, dtype=dtype))
    optimizer = FRUGAL([p], rank=1, lr=0.1, free_scale=free)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad[2] = value
    p.grad[5, 0] = value
    optimizer.step()
    assert torch.equal(p.isnan(), ~p.grad.isfinite())


@pytest.mark.parametrize("residual", ["none", "sign", "fira", "error_feedback"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_coordinates_with_other_residuals(residual, proj_type):
    """As with the matrix that they stand for."""
    class Picks(GaLoreAdamW):
        draw = staticmethod(FRUGAL.draw)

    class Multiplies(GaLoreAdamW):
        @staticmethod
        def draw(n, r, batch, key, stream, like):
            return FRUGAL.draw(n, r, batch, key, stream, like).matrix(like)

    results = []
    for cls in (Picks, Multiplies):
        ps = parameters([(10, 6), (6, 10), (2, 3, 5)])
        optimizer = cls(ps, rank=2, projection="random", residual=residual, proj_type=proj_type,
                        moments="rotate", update_proj_gap=2, matricize="batch", lr=1e-2)
        run(optimizer, ps, range(5))
        results.append([p.detach() for p in ps])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
