"""Polar oracles: the factor U of A = U H, with orthonormal columns (rows, where A is wide).

U = A (A^T A)^(-1/2) for m >= n, and H = (A^T A)^(1/2) is positive semidefinite; for m < n it is
A = H U. Iterations differ in what they cost and in what they make of small singular values s:

==================  ======================================================================
``newton-schulz``   odd quintics; Muon's brings 1e-3 < s/|A| < 1 to 0.5 .. 1.2 in 5 steps
``polar-express``   quintics each of which is the best for the interval that is left
``qdwh``            rational, by QR and Cholesky; to rounding whatever the condition number
``zolo-pd``         rational of high degree, two steps in float64
``svd``             the definition: singular values below rounding become 0, others 1
==================  ======================================================================

The polynomial ones leave tiny singular values tiny, the rational ones bring even rounding noise
to 1, the SVD cuts it off: on matrices without full rank they differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, qr, solve_triangular

from ..kernels.symmul import newton_schulz_step, symm_muladd, syrk
from . import codec
from .checks import without_autocast
from .norms import norms
from .options import Option, choice, either, integer, optional, real, several
from .whole import Whole

__all__ = ["check_options", "COEFFICIENTS", "METHODS", "OPTIONS", "QUINTIC", "Oracle",
           "input_dtype", "polar", "polar_express_schedule", "request"]

Triple = tuple[float, float, float]

#: Muon's coefficients (Jordan et al., 2024), steep at zero: singular values end between about
#: 0.7 and 1.2, and no number of steps brings them to 1.
QUINTIC: Triple = (3.4445, -4.7750, 2.0315)
# x (15 - 10 x^2 + 3 x^4) / 8, whose first two derivatives vanish at 1: it converges cubically.
# QUINTIC brings s/|A| > 1e-3 to 0.68 .. 1.13 in eight steps, and four of this to rounding.
_POLISH: Triple = (1.875, -1.25, 0.375)
# Of Polar Express (Amsel et al., arXiv 2505.16932): assumed s/|A|; the share of its end where an
# interval is taken to begin at least; slack for rounding in 16 bits.
_LOWER, _CUSHION, _SLACK = 1e-3, 0.02407327424182761, 1.01
# A Gram iteration is formed anew from X after this many steps: rounding in X X^T, the square of
# the information, may turn small eigenvalues negative, which later steps would blow up.
_RESTART = 2
# Above this condition number of I + c X^T X its Cholesky factor loses too much: QR is taken.
_WELL_CONDITIONED = 100.0
_MAX_STEPS = 12
_FLOATS = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16",
           torch.float16: "float16"}


# Of numbers of the host, whatever torch's defaults are.
_HOST: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


@dataclass(frozen=True)
class Oracle:
    """Which polar factor: hashable, so that equal requests are answered together.

    Args:
        method: a key of :data:`METHODS`.
        steps: of the iteration; None is to convergence.
        dtype: of the products of the polynomial methods, by name; None is the input's precision,
            at least fp32.
        coefficients: of ``"newton-schulz"``.
        lower_bound: smallest singular value over the norm; None is the method's own.
    """

    method: str = "qdwh"
    steps: int | None = None
    dtype: str | None = None
    coefficients: Triple | None = None
    lower_bound: float | str | None = None

    def __call__(self, a: Tensor) -> Tensor:
        """The factor of (..., m, n), in the precision it was computed in."""
        if a.numel() == 0:
            return a.clone()
        if a.ndim > 3:
            return self(a.flatten(0, -3)).view(a.shape)
        if a.shape[-2] < a.shape[-1]:
            return self(a.mT).mT
        if self.method in _POLYNOMIAL:  # zero stays zero and NaN spreads
            return METHODS[self.method](a, self)
        x = codec.wide(a)
        largest = torch.linalg.vector_norm(x, math.inf, dim=(-2, -1), keepdim=True)
        usable = largest.isfinite()
        x = x / torch.where(usable & (largest > 0), largest, 1.0)
        x = torch.where(usable, x, 0.0)  # LAPACK may hang on a NaN
        u = METHODS[self.method](x, self)
        out: Tensor = torch.where(usable & (largest > 0), u,
                                  torch.where(usable, 0.0, torch.nan).to(u))
        return out


@overload
def polar(
    a: Tensor, method: str = ..., steps: int | None = ..., *, dtype: torch.dtype | None = ...,
    coefficients: Triple | None = ..., lower_bound: float | str | None = ...,
    hermitian: Literal[False] = ...,
) -> Tensor: ...


@overload
def polar(
    a: Tensor, method: str = ..., steps: int | None = ..., *, dtype: torch.dtype | None = ...,
    coefficients: Triple | None = ..., lower_bound: float | str | None = ...,
    hermitian: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def polar(
    a: Tensor, method: str = "qdwh", steps: int | None = None, *, dtype: torch.dtype | None = None,
    coefficients: Triple | None = None, lower_bound: float | str | None = None,
    hermitian: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The polar factor U of each matrix, and on request the Hermitian factor H.

    Zero gives zero. A matrix with a NaN or Inf gives NaN. Neither scale nor sign matters, as long
    as the norm is a finite number and no denormal: polar(c A) = sign(c) polar(A). In a batch the
    rational methods take the same steps for all matrices, which changes rounding alone.

    Args:
        a: (..., m, n), any floating dtype and device.
        method: ``"newton-schulz"``, ``"polar-express"``, ``"qdwh"`` (default), ``"zolo-pd"``,
            ``"svd"``; see the module's text.
        steps: of the iteration, an int >= 1; ``"svd"`` has none. None (default) is to convergence;
            the polynomial methods assume singular values above 1e-3 of the norm (``lower_bound``).
        dtype: of the products of ``"newton-schulz"`` and ``"polar-express"``. Default: a's own,
            at least fp32. In bf16 and fp16 singular values stay within about 1 % of the schedule's.
        coefficients: (a, b, c) of ``"newton-schulz"``: X <- a X + (b S + c S^2) X, S = X X^T.
            Default: Muon's, followed by convergent ones where ``steps`` is None.
        lower_bound: for ``"polar-express"`` and ``"qdwh"`` alone: the smallest singular value over
            the largest, in (0, 1]. ``"qdwh"`` estimates it (default None), or assumes the dtype's
            ``"eps"``; of a number that is too large it converges too, in more steps.
        hermitian: return (U, H).

    Returns:
        U in a's shape and dtype; H is (..., k, k) with k = min(m, n).

    Raises:
        TypeError, ValueError: an argument that breaks its rule, by name and value.
    """
    if not isinstance(a, Tensor) or not a.is_floating_point():
        raise TypeError(f"polar: a is {getattr(a, 'dtype', type(a).__name__)}, but it must be a "
                        "real floating tensor")
    if a.ndim < 2:
        raise ValueError(f"polar: a has shape {tuple(a.shape)}, but it must have 2 or more "
                         "dimensions")
    if dtype is not None and dtype not in _FLOATS:
        raise ValueError(f"polar: dtype={dtype}, but it must be one of "
                         f"{', '.join(map(str, _FLOATS))}")
    if coefficients is not None:
        coefficients = COEFFICIENTS.check("coefficients", coefficients, "polar")
        if method != "newton-schulz":
            raise ValueError(f"polar: coefficients={coefficients}, but it must be None with "
                             f"method={method!r}: only 'newton-schulz' has them")
    checked = {name: OPTIONS[name].check(name, value, "polar") for name, value in
               (("polar", method), ("polar_steps", steps), ("lower_bound", lower_bound))}
    _check_used(checked, "polar")
    oracle = Oracle(checked["polar"], checked["polar_steps"], None if dtype is None else
                    _FLOATS[dtype], coefficients, checked["lower_bound"])
    with without_autocast():
        u = oracle(a)
        if not hermitian:
            return u.to(a.dtype)
        u, wide = u.to(codec.wide(a).dtype), codec.wide(a)
        h = wide @ u.mT if a.shape[-2] < a.shape[-1] else u.mT @ wide
    return u.to(a.dtype), ((h + h.mT) / 2).to(a.dtype)


#: (a, b, c) of ``newton-schulz``, as an option.
COEFFICIENTS = several(QUINTIC, real(None, -math.inf), 3)
#: Options of the classes that ask an oracle.
OPTIONS: dict[str, Option] = {
    "polar": choice("qdwh", "newton-schulz", "polar-express", "qdwh", "zolo-pd", "svd"),
    "polar_steps": optional(integer(None, 1, 100)),
    "polar_dtype": choice("bfloat16", "bfloat16", "float16", "float32"),
    "lower_bound": optional(either(real(None, 0.0, 1.0, above=True), choice("eps", "eps"))),
}


def check_options(o: Mapping[str, Any], where: str) -> None:
    """Refuse options that the oracle of a group has no use for, and one that cannot be captured.

    Args:
        o: all options of the group.
        where: beginning of a message.
    """
    if o["algorithm"] == "adamw":
        return
    _check_used(o, where)
    if o["capturable"] and o["polar"] not in _POLYNOMIAL:
        raise ValueError(f"{where}: polar={o['polar']!r}, but it must be one of "
                         f"{', '.join(map(repr, sorted(_POLYNOMIAL)))} with capturable=True: the "
                         "others look at their numbers on the host")


def _check_used(o: Mapping[str, Any], where: str) -> None:
    if o["lower_bound"] is not None and o["polar"] not in _BOUNDED:
        raise ValueError(f"{where}: lower_bound={o['lower_bound']!r}, but it must be None with "
                         f"{o['polar']!r}: only {' and '.join(map(repr, _BOUNDED))} have it")


def request(o: Mapping[str, Any], *matrices: Tensor, steps: int | None = None,
            coefficients: Triple | None = None) -> Whole:
    """Ask for the polar factors of matrices, as the options of a group say.

    Args:
        o: ``polar``, ``polar_steps``, ``polar_dtype``, ``lower_bound``.
        matrices: (..., m, n) each.
        steps: of the polynomial methods where ``polar_steps`` is None.
        coefficients: of ``"newton-schulz"``.
    """
    method = o["polar"]
    polynomial = method in _POLYNOMIAL
    return Whole(matrices, Oracle(
        method, o["polar_steps"] or (steps if polynomial else None),
        o["polar_dtype"] if polynomial else None,
        coefficients if method == "newton-schulz" else None, o["lower_bound"]))


def input_dtype(o: Mapping[str, Any], g: Tensor) -> torch.dtype:
    """In which dtype an oracle loses nothing of its input: of its products or the arithmetic."""
    if o["polar"] in _POLYNOMIAL and o["polar_dtype"] == "bfloat16":
        return torch.bfloat16
    return codec.wide(g[:0]).dtype


# -------------------------------------------------------------------- polynomial iterations


def _newton_schulz(x: Tensor, oracle: Oracle) -> Tensor:
    """Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024."""
    own = oracle.coefficients or QUINTIC
    schedule = (own,) * (oracle.steps or 8) + (() if oracle.steps else (_POLISH,) * 4)
    return _quintics(x, 1.0, schedule, oracle)


def _polar_express(x: Tensor, oracle: Oracle) -> Tensor:
    """Amsel et al., "The Polar Express", arXiv 2505.16932."""
    low = oracle.lower_bound
    low = torch.finfo(x.dtype).eps if low == "eps" else low or _LOWER
    return _quintics(x, _SLACK, _shortened(oracle.steps, float(low)), oracle)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _schedule(steps: int | None, low: float) -> tuple[Triple, ...]:
    """The coefficients, which a graph takes as they are."""
    return polar_express_schedule(steps, low)


@functools.lru_cache(maxsize=64)
def _shortened(steps: int | None, low: float) -> tuple[Triple, ...]:
    """The schedule for rounded products: x / slack in every polynomial but the limit's.

    To convergence the limit comes twice more, for what the slack has left.
    """
    schedule = _schedule(steps, low)
    short = [(a / _SLACK, b / _SLACK**3, c / _SLACK**5) if (a, b, c) != _POLISH else (a, b, c)
             for a, b, c in schedule]
    return (*short, *(() if steps else (_POLISH,) * 2))


def _quintics(x: Tensor, slack: float, schedule: tuple[Triple, ...], oracle: Oracle
              ) -> Tensor:
    """X <- a X + (b S + c S^2) X for each (a, b, c), S = X X^T, on X^T / (slack |X|) for tall X."""
    m, n = x.shape[-2:]
    dtype = getattr(torch, oracle.dtype) if oracle.dtype else codec.wide(x).dtype
    if dtype == torch.bfloat16:  # with fp32's range it is rounded first: all else is half the work
        x = x.to(dtype)
    norm = norms(x, "full") * slack
    norm = torch.where(norm > 0, norm, 1.0).to(
        dtype if dtype == torch.bfloat16 else codec.wide(x).dtype)
    x = (x / norm).to(dtype)
    # Products of 2 n^3 operations: each step takes 2 m/n + 1; through the Gram matrix a step
    # takes 4, less 2 at each start and 2 before it, and X is touched twice at each restart.
    steps, starts = len(schedule), -(-len(schedule) // _RESTART)
    direct, gram = (2 * m / n + 1) * steps, 4 * (steps - starts) + 2 * starts * m / n
    # bf16 has too few digits for the square of the information, fp16 has enough; on a CPU fp16
    # products are slow.
    if gram < direct and (dtype != torch.bfloat16 or x.device.type != "cpu"):
        return _gram(x.half() if dtype == torch.bfloat16 else x, schedule).to(dtype)
    x = x.mT if m > n else x  # products of wide matrices are the faster ones
    for a, b, c in schedule:
        x = newton_schulz_step(x, a, b, c)
    return x.mT if m > n else x


def _gram(x: Tensor, schedule: tuple[Triple, ...]) -> Tensor:
    """The same on the n x n Gram matrix R = X^T X: X <- X Q, with Q the product of the steps.

    Z = b R + c R^2;  Q <- a Q + Q Z;  R <- (a I + Z) R (a I + Z), all symmetric and commuting.
    Source: Gram Newton-Schulz, Dao-AILab/gram-newton-schulz.
    """
    for start in range(0, len(schedule), _RESTART):
        part = schedule[start:start + _RESTART]
        r, q = syrk(x.mT), None
        for i, (a, b, c) in enumerate(part):
            z = symm_muladd(r, b, c)
            if q is None:
                q = z.clone()
                q.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                q = _muladd(q, q, z, a)
            if i + 1 < len(part):
                r = _muladd(r, r, z, a)
                r = _muladd(r, z, r, a)
        assert q is not None
        x = x @ q
    return x


def _muladd(c: Tensor, a: Tensor, b: Tensor, beta: float) -> Tensor:
    """Beta C + A B."""
    return (torch.addmm if c.ndim == 2 else torch.baddbmm)(c, a, b, beta=beta)


def polar_express_schedule(steps: int | None, lower: float = _LOWER, safety: float = 0.0,
                           cushion: float = _CUSHION) -> tuple[Triple, ...]:
    """Coefficients (a, b, c) of x <- a x + b x^3 + c x^5, each the best for what the last left.

    Args:
        steps: how many; None is until they have arrived at their limit, (15, -10, 3) / 8.
        lower: smallest singular value at the start; the largest is 1.
        safety: all but the last polynomial are of x / (1 + safety), and the next one is made for
            what that leaves.
        cushion: an interval is taken to begin at this share of its end at least.

    Source: Amsel et al., arXiv 2505.16932, section 4; the default cushion is the paper's,
    safety 0.01 and cushion 0.02 are the authors' repository's.
    """
    low, high = lower, 1.0
    schedule: list[Triple] = []
    while len(schedule) < (steps or 100):
        start = max(low, cushion * high)
        a, b, c = _best_quintic(start, high)
        if start != low:
            # The polynomial was not made for [low, start]: recentre what it does there around 1.
            middle = 2 / (_odd(low, a, b, c) + _odd(high, a, b, c))
            a, b, c = a * middle, b * middle, c * middle
        if len(schedule) + 1 != steps:
            by = 1 + safety
            a, b, c = a / by, b / by**3, c / by**5
        schedule.append((a, b, c))
        low = _odd(low, a, b, c)
        high = 2 - low
        if steps is None and (a, b, c) == _POLISH:
            break
    return tuple(schedule)


def _odd(x: float, a: float, b: float, c: float) -> float:
    return x * (a + x * x * (b + x * x * c))


def _best_quintic(low: float, high: float) -> Triple:
    """The odd quintic nearest to 1 on [low, high], by Remez exchange on four points."""
    if low / high >= 1 - 5e-6:
        return _POLISH if high < 1 + 1e-6 else (1.875 / high, -1.25 / high**3, 0.375 / high**5)
    inner, outer = (3 * low + high) / 4, (low + 3 * high) / 4
    error = math.inf
    while True:
        points = torch.tensor([low, inner, outer, high], **_HOST)
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], **_HOST)
        rows = torch.stack([points, points**3, points**5, signs], -1)
        a, b, c, new = torch.linalg.solve(rows, torch.ones_like(points)).tolist()
        # where the derivative a + 3 b x^2 + 5 c x^4 vanishes
        square = 9 * b * b - 20 * a * c
        if square < 0:  # so narrow an interval that the system is rounding
            return 1.875 / high, -1.25 / high**3, 0.375 / high**5
        root = math.sqrt(square)
        inner = math.sqrt((-3 * b - root) / (10 * c))
        outer = math.sqrt((-3 * b + root) / (10 * c))
        if abs(error - new) < 1e-15:
            return a, b, c
        error = new


# -------------------------------------------------------------------- rational iterations


def _qdwh(x: Tensor, oracle: Oracle) -> Tensor:
    """X <- X (a I + b X^T X) (I + c X^T X)^-1, dynamically weighted Halley steps; X tall.

    Source: Nakatsukasa, Bai, Gygi, "Optimizing Halley's iteration for computing the matrix polar
    decomposition", SIAM J. Matrix Anal. Appl. 31, 2010.
    """
    eps = torch.finfo(x.dtype).eps
    x, basis, low = _reduced(x / _norm_bound(x), oracle.lower_bound, eps)
    out = _weighted(x, low, oracle.steps, eps)
    if oracle.steps is None and isinstance(oracle.lower_bound, float):
        # A bound that was given may be too large: what it has left below 1 is looked for.
        apart = torch.linalg.matrix_norm(out.mT @ out - _eye(out))
        if bool((apart > eps**0.5).any()):
            out = _weighted(out, _reduced(out, None, eps)[2], None, eps)
    return basis(_newton(out))


def _weighted(x: Tensor, low: Tensor, steps: int | None, eps: float) -> Tensor:
    """Halley steps with the best weights for singular values in [low, 1]; None: to convergence."""
    for _ in range(steps or _MAX_STEPS):
        if steps is None and bool((low >= 1 - 5 * eps).all()):
            break
        # weights of the best rational function of this kind on [low, 1]
        d = (4 * (1 / low**2 - 1) / low**2) ** (1 / 3)
        h = (1 + d).sqrt()
        a = h + (2 - d + 2 * (2 - low**2) / (low**2 * h)).sqrt()
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        x = _halley(x, a.to(x), b.to(x), c.to(x))
        low = (low * (a + b * low**2) / (1 + c * low**2)).clamp(max=1.0)
    return x


def _halley(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """X (a I + b X^T X) (I + c X^T X)^-1 = (b/c) X + (a - b/c) X (I + c X^T X)^-1."""
    rest = a - b / c
    if bool((c > _WELL_CONDITIONED).any()):
        root = c.sqrt()
        q = qr(torch.cat([root * x, _eye(x)], -2)).Q
        above_, below = q.split([x.shape[-2], x.shape[-1]], -2)
        return torch.baddbmm(b / c * x, rest / root * above_, below.mT)
    return b / c * x + rest * _divided(x, c * (x.mT @ x) + _eye(x))


def _zolo(x: Tensor, oracle: Oracle) -> Tensor:
    """X <- X prod_j (X^T X + c_2j I) (X^T X + c_2j-1 I)^-1, Zolotarev's rational functions.

    Always in float64. Source: Nakatsukasa, Freund, "Computing fundamental matrix decompositions
    accurately via the matrix sign function in two iterations", SIAM Review 58, 2016.
    """
    x = x.double()
    eps = torch.finfo(torch.float64).eps
    x, basis, low = _reduced(x / _norm_bound(x), None, eps)
    # singular values in [1, largest]; one degree serves a whole batch
    x, largest = x / low, float(1 / low.min())
    for _ in range(oracle.steps or 4):
        poles, zeros = _zolotarev(largest)
        total = x
        for i, pole in enumerate(poles):
            weight = math.prod(pole - z for z in zeros) / math.prod(
                pole - q for j, q in enumerate(poles) if j != i)
            total = total - weight * _resolvent(x, pole, largest)

        def ratio(s: float, poles: list[float] = poles, zeros: list[float] = zeros) -> float:
            return s * math.prod((s * s + z) / (s * s + q) for z, q in zip(zeros, poles,
                                                                          strict=True))

        x = total / ratio(1.0)
        largest = max(ratio(largest) / ratio(1.0), 1.0)
        if oracle.steps is None and largest < 1 + 4 * eps:
            break
    return basis(_newton(x))


def _resolvent(x: Tensor, c: float, largest: float) -> Tensor:
    """X (X^T X + c I)^-1, singular values of X in [1, largest]."""
    if (largest**2 + c) / (1 + c) > _WELL_CONDITIONED:
        q = qr(torch.cat([x, math.sqrt(c) * _eye(x)], -2)).Q
        upper, lower = q.split([x.shape[-2], x.shape[-1]], -2)
        out: Tensor = upper @ lower.mT / math.sqrt(c)
        return out
    return _divided(x, x.mT @ x + c * _eye(x))


def _zolotarev(largest: float) -> tuple[list[float], list[float]]:
    """Poles c_1, c_3, ... and zeros c_2, c_4, ... of the best function on [1, largest].

    c_i = (sn / cn)^2 (i K / (2 r + 1)) with modulus sqrt(1 - 1/largest^2).
    """
    degree = next((d for limit, d in (
        (1.001, 2), (1.01, 3), (1.1, 4), (1.2, 5), (1.5, 6), (2.0, 8), (6.5, 2), (180.0, 3),
        (1.5e4, 4), (2e6, 5), (1e9, 6), (3e12, 7)) if largest <= limit), 8)
    c = [_tangent_squared(i / (2 * degree + 1), largest) for i in range(1, 2 * degree + 1)]
    return c[::2], c[1::2]


def _tangent_squared(fraction: float, largest: float) -> float:
    """(sn / cn)^2 at a fraction of the quarter period K, complementary modulus 1 / largest.

    By Jacobi's imaginary transformation sn/cn(u, k) = sn(i u, k') / i, and descending Landen steps,
    which lose no digits where k' is tiny: there the function is nearly sinh.
    """
    if fraction > 0.5:  # sn/cn(K - u) = 1 / (k' sn/cn(u))
        return largest**2 / _tangent_squared(1 - fraction, largest)
    small = 1 / largest
    a, b, c = [1.0], [math.sqrt((1 - small) * (1 + small))], [small]
    while c[-1] / a[-1] > 1e-17 and len(a) < 40:
        a_, b_ = a[-1], b[-1]
        a.append((a_ + b_) / 2)
        b.append(math.sqrt(a_ * b_))
        c.append(c[-1] ** 2 / (4 * a[-1]))  # (a - b) / 2 without its cancellation
    # K(k) from the mean of 1 and k'
    p, q = 1.0, small
    while abs(p - q) > 1e-15 * p:
        p, q = (p + q) / 2, math.sqrt(p * q)
    u = fraction * math.pi / (p + q)
    angle = 2 ** (len(a) - 1) * a[-1] * u
    for a_, c_ in zip(a[:0:-1], c[:0:-1], strict=True):
        angle = (angle + math.asinh(c_ / a_ * math.sinh(angle))) / 2
    return math.sinh(angle) ** 2


def _reduced(x: Tensor, lower: float | str | None, eps: float
             ) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
    """X as a batch (b, ., n) of square factors, the way back, and lower bounds (b, 1, 1).

    A bound is given, as a share of the spectral norm, or 1 / |R^-1|, which is never above the
    smallest singular value.
    """
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    m, n = shape[-2:]
    q: Tensor | None = None
    if m > n or lower is None:
        q, r = qr(x)
    if lower is None:
        inverse = solve_triangular(r, _eye(x), upper=True)
        low = 1 / torch.linalg.vector_norm(inverse.double(), dim=(-2, -1), keepdim=True)
    elif lower == "eps":
        low = torch.full((len(x), 1, 1), eps, dtype=torch.float64, device=x.device)
    else:
        # Relative to |X|_2, of which the largest row or column is a bound from below.
        size = torch.maximum(*(torch.linalg.vector_norm(x, dim=dim, keepdim=True).amax(
            (-2, -1), keepdim=True) for dim in (-2, -1)))
        low = float(lower) * size.double()
    low = low.nan_to_num(eps).clamp(eps, 1.0)
    if m == n:
        return x, lambda u: u.view(shape), low
    return r, lambda u: (q @ u).view(shape), low


def _newton(x: Tensor) -> Tensor:
    """1.5 X - 0.5 X X^T X: takes away what rounding has left."""
    out: Tensor = torch.baddbmm(x, x, x.mT @ x, beta=1.5, alpha=-0.5)
    return out


def _norm_bound(x: Tensor) -> Tensor:
    """sqrt(|X|_1 |X|_inf) >= |X|_2; 1 for a zero matrix."""
    size = x.abs()
    bound = (size.sum(-2, keepdim=True).amax(-1, keepdim=True)
             * size.sum(-1, keepdim=True).amax(-2, keepdim=True)).sqrt()
    return torch.where(bound > 0, bound, 1.0)


def _divided(x: Tensor, z: Tensor) -> Tensor:
    """X Z^-1 for positive definite Z = L L^T."""
    lower = cholesky_ex(z).L
    y = solve_triangular(lower.mT, x, upper=True, left=False)  # X L^-T
    out: Tensor = solve_triangular(lower, y, upper=False, left=False)
    return out


def _eye(x: Tensor) -> Tensor:
    """Identities of the size of the columns, one per matrix of the batch."""
    n = x.shape[-1]
    return torch.eye(n, dtype=x.dtype, device=x.device).expand(*x.shape[:-2], n, n)


def _svd(x: Tensor, oracle: Oracle) -> Tensor:
    """U V^T over the singular values that are not rounding."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    floor = s[..., :1] * torch.finfo(x.dtype).eps * max(x.shape[-2:])
    out: Tensor = (u * (s > floor).unsqueeze(-2)) @ vh
    return out


# These get what they are given; the others what has a largest entry of 1.
_POLYNOMIAL = ("newton-schulz", "polar-express")
# These take a lower bound of the singular values.
_BOUNDED = ("polar-express", "qdwh")
#: Factor of a tall matrix, by name.
METHODS: dict[str, Callable[[Tensor, Oracle], Tensor]] = {
    "newton-schulz": _newton_schulz, "polar-express": _polar_express, "qdwh": _qdwh,
    "zolo-pd": _zolo, "svd": _svd,
}
