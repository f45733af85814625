"""Projections: how a basis is found, and how a gradient goes down to it.

G is (..., m, n). A right basis Q is (..., n, r) and the projected gradient R = G Q is (..., m, r);
a left basis P is (..., m, r) and R = P^T G is (..., r, n). Bases have orthonormal columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..kernels._triton import by_kernel, use_triton
from ..kernels.fakes import truth
from ..kernels.narrow import exact, matmul
from ..kernels.project import project as product
from ..kernels.tiles import in_tf32
from . import codec
from .coordinates import Coordinates, chosen, shift

if TYPE_CHECKING:
    from .sharding import Rows

__all__ = ["FINDERS", "Bases", "Gradient", "Turn", "find", "gaussian", "gaussian_basis",
           "generator", "learnt", "random_basis", "side_of", "sides", "turn",
           "wide_product"]

# torch.linalg.LinAlgError, which torch's annotations do not export.
_NOT_CONVERGED: type[RuntimeError] = getattr(torch.linalg, "LinAlgError")  # noqa: B009
#: Extra columns in the range finder (methods of Halko et al. use 5 to 10).
OVERSAMPLING = 8
#: Power iterations of a warm start, from the last basis.
WARM_ITERATIONS = 2
# A basis that captures less than this share of the gradient's energy is no start for the next.
_LOST = 1e-2
# Columns of which one is this much smaller off the others' span are too dependent for Cholesky.
_DEPENDENT = {torch.float32: 3e-2, torch.float64: 1e-6}
# Gradients whose largest entry is this far from 1 are scaled before their products.
_IN_RANGE = 1e12


class Bases(NamedTuple):
    """The basis P of the left side and Q of the right; a side without one is not projected.

    Those of several matrices are stacked, or one :class:`lissom.kernels.apart.Apart`. Columns of
    the identity are :class:`lissom.optim.coordinates.Coordinates` in a tensor's place. Under row
    sharding, G and P hold only this rank's ``rows``. R = G Q then has the same rows; R = P^T G is
    summed over ranks and is whole on each.
    """

    left: Tensor | None
    right: Tensor | None
    rows: Rows | None = None

    # A method, because dynamo does not trace a property of a tuple in torch 2.9.
    def side(self) -> str:
        """``"left"``, ``"right"`` or ``"full"``; at least one basis must be there."""
        if self.left is None:
            return "right"
        return "left" if self.right is None else "full"

    def low_rows(self) -> Rows | None:
        """Rows of R that this rank has; None where R is whole."""
        return self.rows if self.left is None else None

    def height(self, g: Tensor) -> int:
        """Rows of the whole gradient."""
        return g.shape[-2] if self.rows is None else self.rows.total

    def span(self, g: Tensor) -> bool:
        """Whether the bases have full rank, so that nothing of G is outside the subspace."""
        return all(x is None or x.shape[-1] == length
                   for x, length in ((self.left, self.height(g)), (self.right, g.shape[-1])))

    def down(self, g: Tensor) -> Tensor:
        """R = P^T G Q; a collective operation where P is sharded by rows."""
        rows, columns = self.coordinates()
        if rows is not None:
            g = rows.down(g, -2)
            if self.rows is not None:  # one entry and zeros of other ranks
                g = self.rows.sum(codec.wide(g)).to(g.dtype)
        elif self.left is not None and self.rows is not None:
            g = self.rows.sum(wide_product(self.left, g)).to(g.dtype)
        elif self.left is not None:
            g = matmul(self.left.mT, g)
        if columns is not None:
            return columns.down(g, -1)
        return g if self.right is None else matmul(g, self.right)

    def factors(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Two factors whose product is P N Q^T, in the dtype of the bases."""
        left, right = (x if among is None else among.matrix(n)
                       for x, among in zip(self[:2], self.coordinates(), strict=True))
        if left is None:
            assert right is not None
            return n.to(right.dtype), right.mT
        n = n.to(left.dtype)
        return left, n if right is None else matmul(n, right.mT)

    def coordinates(self) -> tuple[Coordinates | None, Coordinates | None]:
        """Which rows and which columns, if the bases are coordinates."""
        return chosen(self.left), chosen(self.right)


def side_of(m: int, n: int, proj_type: str) -> str:
    """``"left"``, ``"right"`` or ``"full"`` (both), from the full shape alone.

    ``"std"`` projects the shorter side, square matrices on the right as in GaLore's code;
    ``"reverse_std"`` the other one.
    """
    if proj_type == "std":
        return "right" if m >= n else "left"
    if proj_type == "reverse_std":
        return "left" if m >= n else "right"
    return proj_type


def sides(m: int, n: int, proj_type: str) -> list[tuple[int, str, int]]:
    """The sides that are projected: number (0 left, 1 right), name, length of a basis's columns."""
    side = side_of(m, n, proj_type)
    both = [(0, "left", m), (1, "right", n)]
    return [x for x in both if side in (x[1], "full")]


def wide_product(left: Tensor, g: Tensor) -> Tensor:
    """P^T G over this rank's rows, kept in more than 16 bits for the sum over ranks."""
    if by_kernel(g) and g.numel() and g.element_size() == 2:
        return product(left.mT, g)[0]
    if g.device.type == "cpu" and g.element_size() == 2 and not by_kernel(g):
        return exact(left.mT, g)
    return codec.wide(left).mT @ codec.wide(g)


@functools.lru_cache(maxsize=16)
def _generator(device: torch.device) -> torch.Generator:
    """A GPU's generator, cached: it is seeded at each use instead of created at each."""
    return torch.Generator(device=device)


def generator(key: tuple[int, int], stream: int, device: torch.device | str = "cpu"
              ) -> torch.Generator:
    """Random numbers of a device that depend on (seed, parameter) and a stream alone.

    On a GPU good until the next call, of any thread.
    """
    # Weyl steps with odd 64-bit constants spread neighbouring keys over the seed space.
    mixed = key[0] * 0x9E3779B97F4A7C15 + key[1] * 0xC2B2AE3D27D4EB4F + stream * 0x165667B19E3779F9
    device = torch.empty(0, device=device).device  # with its index
    made = _generator(device) if device.type == "cuda" else torch.Generator(device)
    return made.manual_seed(mixed % 2**63)


def gaussian(shape: tuple[int, ...], key: tuple[int, int], stream: int, like: Tensor) -> Tensor:
    """Standard normal numbers in fp32, from (seed, parameter) and a stream alone.

    They are drawn where ``like`` is, if that is CUDA, so that nothing is copied nor waited for;
    other kinds of devices, and GPUs of another model, draw others.
    """
    place = like.device if like.device.type == "cuda" else torch.device("cpu")
    return torch.randn(shape, generator=generator(key, stream, place), device=place,
                       dtype=torch.float32)


def _orthonormal(y: Tensor, exact: bool = True) -> Tensor:
    """An orthonormal basis of y's columns; with ``exact=False`` orthonormal only roughly."""
    # With Householder QR a refresh of a LLaMA-7B matrix took 52 ms on an H100, ten times what its
    # products take.
    q = _by_cholesky(y, exact) if y.device.type == "cuda" else None
    return torch.linalg.qr(y).Q if q is None else q


def _by_cholesky(y: Tensor, exact: bool = True) -> Tensor | None:
    """Q = Y R^-1 with R^T R = Y^T Y, twice; None where Y's columns are too dependent.

    With columns of length 1 the first Q is orthonormal to cond(Y)^2 times the rounding of its
    arithmetic, fp32 if the columns are independent enough for that: a consumer's GPU does 64 of
    its operations in the time of one in float64. The second Q is orthonormal to float64's
    rounding, whatever torch takes for a product in fp32; without ``exact`` there is none.
    Source: Yamamoto et al., "Roundoff error analysis of the CholeskyQR2 algorithm", 2015.
    """
    for dtype, least in _DEPENDENT.items():
        if dtype == torch.float32 and y.dtype == torch.float64:
            continue
        q = y.to(dtype, copy=True)
        q /= torch.linalg.vector_norm(q, dim=-2, keepdim=True)  # the span does not depend on it
        basis = _divided(q, least)
        if basis is not None and exact:
            basis = _divided(basis.double(), 0.9)  # of an orthonormal first Q all are 1
        if basis is not None:
            return basis.to(y.dtype)
    return None


def _divided(q: Tensor, least: float) -> Tensor | None:
    """Q R^-1 with R^T R = Q^T Q, if R's diagonal is above that share of its largest entry."""
    factor, failed = torch.linalg.cholesky_ex(q.mT @ q, upper=True)
    sizes = factor.diagonal(dim1=-2, dim2=-1)
    # NaN compares false. One synchronization for all tests.
    independent = (failed == 0) & (sizes.amin(-1) > least * sizes.amax(-1))
    return _over(q, factor) if truth(independent.all(), True) else None


def _over(q: Tensor, factor: Tensor) -> Tensor:
    """Q R^-1."""
    divided: Tensor = torch.linalg.solve_triangular(factor, q, upper=True, left=False)
    return divided


def _exact(y: Tensor) -> Tensor:
    """y, in float64 where torch may take its products in TF32."""
    return y.double() if in_tf32(y) else y


def _independent(y: Tensor) -> Tensor:
    """Q of independent normal entries, by Cholesky QR twice, without a check (no synchronization).

    The singular values of n x r of them are within sqrt(n) +- sqrt(r) (Davidson and Szarek, 2001,
    Theorem II.13), so that fp32 is enough up to r = n / 2. Those of a square lie as near to zero as
    1 / sqrt(n), which float64 leaves eight digits.
    """
    m, r = y.shape[-2:]
    q = y.double() if 2 * r > m else _exact(y)
    for first in (True, False):
        gram = q.mT @ q
        if first and q.dtype == torch.float64:  # which one in thirty thousand squares needs
            gram.diagonal(dim1=-2, dim2=-1).add_(1e-13 * m)
        q = _over(q, torch.linalg.cholesky_ex(gram, upper=True)[0])
    return q.to(y.dtype)


class Gradient:
    """G scaled to a largest entry of 1, as the finders see it: products with G and G^T.

    A bf16 G on a GPU is not copied to fp32. Its product with an fp32 X is taken as three bf16
    products, X being split into a sum of three bf16 matrices, with sums in fp32.

    Args:
        g: (..., m, n).
        largest: (..., 1, 1), the largest magnitude of each matrix, finite.
    """

    def __init__(self, g: Tensor, largest: Tensor) -> None:
        self.shape = g.shape
        self.divisor = torch.where(largest > 0, largest, 1.0)
        self.narrow = g.dtype == torch.bfloat16 and use_triton(None, g.device)
        if self.narrow:  # only if sums of squares stay in fp32's range without the scaling
            inside = (self.divisor > 1 / _IN_RANGE) & (self.divisor < _IN_RANGE)
            self.narrow = truth(inside.all(), True)
        # 16 bits become fp32, as the divisor is.
        self.g = g if self.narrow else g / self.divisor

    def times(self, x: Tensor) -> Tensor:
        """G X."""
        return self._product(self.g, x)

    def transposed_times(self, x: Tensor) -> Tensor:
        """G^T X."""
        return self._product(self.g.mT, x)

    def _product(self, g: Tensor, x: Tensor) -> Tensor:
        if not self.narrow:
            return g @ x
        total, rest = None, x
        for _ in range(3):
            part = rest.bfloat16()
            rest = rest - part
            low = product(g, part)[0]
            total = low if total is None else total + low
        assert total is not None
        return total / self.divisor

    def energy(self) -> Tensor:
        """|G|^2, (..., 1, 1)."""
        norm = torch.linalg.vector_norm(self.g, dim=(-2, -1), keepdim=True,
                                        dtype=torch.promote_types(self.g.dtype, torch.float32))
        if self.narrow:
            norm = norm / self.divisor
        energy: Tensor = norm.square()
        return energy

    def whole(self) -> Tensor:
        """The scaled G as a matrix, in fp32 or float64."""
        return self.g / self.divisor if self.narrow else self.g


def _iterated(g: Gradient, q: Tensor, exact: bool) -> Tensor:
    """An orthonormal basis of the columns of G^T G Q.

    G Q is orthonormalized too: otherwise the squares of the smallest singular values drown in the
    rounding errors of the largest, and the last columns depend up to a thousand times more on the
    order of summation.
    """
    return _orthonormal(g.transposed_times(_orthonormal(g.times(q), exact=False)), exact)


def _svd(g: Gradient, r: int, old: Tensor | None, noise: Callable[..., Tensor]) -> Tensor:
    """The r leading right singular vectors of g, exactly."""
    vh: Tensor = torch.linalg.svd(g.whole(), full_matrices=False).Vh
    return vh[..., :r, :].mT


def _randomized(g: Gradient, r: int, old: Tensor | None, noise: Callable[..., Tensor]) -> Tensor:
    """The r leading right singular vectors of g, by a randomized range finder.

    Y = (G^T G)^q G^T Omega, orthonormalized at each product; then the leading eigenvectors of
    the small (GY)^T (GY). Source: Halko, Martinsson, Tropp, arXiv 0909.4061; GaLore 2, 2504.20437.
    """
    m, n = g.shape[-2:]
    y = _orthonormal(g.transposed_times(noise(m, min(r + OVERSAMPLING, m, n))), exact=False)
    y = _iterated(g, y, exact=True)
    # In float64: a singular value of 1e-3 of the largest is 1e-6 of it in the square, where fp32
    # would leave a tenth of rounding noise in its vector.
    b = g.times(y).double()
    vectors: Tensor = torch.linalg.eigh(b.mT @ b).eigenvectors  # in ascending order
    y_ = _exact(y)
    return (y_ @ vectors.flip(-1)[..., :r].to(y_.dtype)).to(y.dtype)


def _subspace(g: Gradient, r: int, old: Tensor | None, noise: Callable[..., Tensor]) -> Tensor:
    """Block power iterations Q <- orth(G^T orth(G Q)), started from the last basis.

    The new basis stays aligned with the old one column by column, so moments that are kept
    lose little. Without a last basis, or where that has nothing to do with the gradient any more,
    the start is :func:`_randomized`.
    """
    if old is None:
        return _randomized(g, r, old, noise)
    lost = g.times(old).square().sum((-2, -1), keepdim=True) < _LOST * g.energy()
    if truth(lost.any(), False):
        old = torch.where(lost, _randomized(g, r, old, noise), old)
    q = old
    for number in range(WARM_ITERATIONS):
        q = _iterated(g, q, number == WARM_ITERATIONS - 1)
    return q


#: How a right basis is found: (g, r, old, noise) -> (..., n, r), all fp32.
FINDERS: dict[str, Callable[[Gradient, int, Tensor | None, Callable[..., Tensor]], Tensor]] = {
    "svd": _svd,
    "randomized": _randomized,
    "subspace": _subspace,
}


def find(
    g: Tensor, r: int, side: str, projection: str, old: Tensor | None, key: tuple[int, int],
    stream: int, stack: Rows | None = None,
) -> Tensor | None:
    """A basis for one side of the gradient, in its arithmetic; None where the gradient has none.

    Args:
        g: gradient (..., m, n), any floating dtype. It is scaled to a largest entry of 1, so
            that 1e-30 and 1e30 neither vanish nor overflow in the products.
        r: number of columns.
        side: ``"left"`` or ``"right"``.
        projection: a key of :data:`FINDERS`.
        old: the last basis, or None at the first refresh.
        key: seed and parameter, from which a random start is drawn.
        stream: a number that differs between steps and sides, for the same purpose.
        stack: which matrices of a stack g has, if not all; then a collective operation.

    Returns:
        (..., n, r) on the right, (..., m, r) on the left; None when every matrix of g is zero or
        one entry is not finite, or when the decomposition does not converge: the caller keeps
        the basis it has. In a batch, zero matrices keep theirs.
    """
    if g.numel() == 0 and stack is None:
        return None
    g = g.detach()
    high, low = g.amax((-2, -1), keepdim=True), g.amin((-2, -1), keepdim=True)
    largest = codec.wide(torch.maximum(high, -low))
    if not learnt(largest, stack):
        return None
    seen = Gradient(g if side == "right" else g.mT, largest)

    def noise(rows: int, columns: int) -> Tensor:
        batch = seen.shape[:-2] if stack is None else (stack.total,)
        drawn = gaussian((*batch, rows, columns), key, stream, g).to(seen.divisor)
        return drawn if stack is None else stack.own(drawn)

    old = None if old is None else codec.wide(old)
    found: Tensor | None = largest.new_empty((0, seen.shape[-1], r))
    try:
        if g.numel():
            found = FINDERS[projection](seen, r, old, noise)
    except _NOT_CONVERGED:
        found = None
    if stack is not None and truth(stack.max(largest.new_full((), found is None)).any(), False):
        found = None  # all find new bases, or none does
    if old is None or found is None:
        return found
    # Every decomposition leaves the signs of its columns open, and moments that are kept are
    # carried column by column: take the signs that agree with the last basis.
    agree = torch.where((found * old).sum(-2, keepdim=True) < 0, -1.0, 1.0)
    return torch.where(largest > 0, found * agree, old)


def learnt(sizes: Tensor, stack: Rows | None = None) -> bool:
    """Whether gradients of these sizes, all >= 0, say something: all finite, and not all zero.

    Args:
        sizes: of each matrix.
        stack: which matrices of a stack they are, if not all; then a collective operation.
    """
    there, spoilt = sizes.any(), ~sizes.isfinite().all()
    if stack is not None:
        there, spoilt = stack.max(torch.stack([there, spoilt]).float()).bool().unbind()
    return not truth(spoilt, False) and truth(there, True)


def random_basis(
    n: int, r: int, batch: tuple[int, ...], key: tuple[int, int], stream: int, like: Tensor
) -> Tensor:
    """A uniformly distributed orthonormal (..., n, r), the same at every call with the same key."""
    y = gaussian((*batch, n, r), key, stream, like)
    # Drawn at every step, so the GPU path must not synchronize.
    q = _independent(y) if y.device.type == "cuda" else torch.linalg.qr(y).Q
    return q.to(device=like.device, dtype=like.dtype)


def gaussian_basis(
    n: int, r: int, batch: tuple[int, ...], key: tuple[int, int], stream: int, like: Tensor
) -> Tensor:
    """Independent normal entries of variance 1/r, (..., n, r): E[P P^T] = I."""
    q: Tensor = gaussian((*batch, n, r), key, stream, like) * r**-0.5
    return q.to(device=like.device, dtype=like.dtype)


#: What a change of basis does to a moment along the projected side: (moment, power) to moment,
#: with power 1 for Rot and 2 for Rot o Rot.
Turn = Callable[[Tensor, int], Tensor]


def turn(old: Tensor, new: Tensor, left: bool) -> Turn:
    """M <- Rot M, V <- (Rot o Rot) V, with Rot = new^T old: V stays positive."""
    before, now = chosen(old), chosen(new)
    if before is not None and now is not None:
        return shift(before.index, now.index, left)
    rot = codec.wide(new).mT @ codec.wide(old)

    def turned(x: Tensor, power: int) -> Tensor:
        by = rot if power == 1 else rot.square()
        return by @ x if left else x @ by.mT

    return turned
