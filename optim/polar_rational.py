"""Polar factors to rounding: by rational functions (QDWH, ZOLO-PD), or by the SVD."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.linalg import cholesky_ex, qr, solve_triangular

from ..kernels.fakes import scalar, truth
from ..kernels.tiles import in_tf32

if TYPE_CHECKING:
    from .polar import Oracle

__all__ = ["qdwh", "svd", "zolo"]

# Above this condition number of I + c X^T X its Cholesky factor loses too much: QR is taken.
_WELL_CONDITIONED = 100.0
_MAX_STEPS = 12


def qdwh(x: Tensor, oracle: Oracle) -> Tensor:
    """X <- X (a I + b X^T X) (I + c X^T X)^-1, dynamically weighted Halley steps; X tall.

    Source: Nakatsukasa, Bai, Gygi, "Optimizing Halley's iteration for computing the matrix polar
    decomposition", SIAM J. Matrix Anal. Appl. 31, 2010.
    """
    eps = torch.finfo(x.dtype).eps
    x, basis, low = _reduced(x / _norm_bound(x), oracle.lower_bound, eps)
    out = _weighted(x, low, oracle.steps, eps)
    if oracle.steps is None and isinstance(oracle.lower_bound, float):
        # A given bound may be too large, which leaves singular values below 1: check for them.
        apart = torch.linalg.matrix_norm(out.mT @ out - _eye(out))
        # TF32 leaves 2^-11 sqrt(n) of U^T U - I: 0.03 of 4096 columns.
        if truth((apart > (0.1 if in_tf32(x) else eps**0.5)).any(), False):
            out = _weighted(out, _reduced(out, None, eps)[2], None, eps)
    return basis(_newton(out))


def _weighted(x: Tensor, low: Tensor, steps: int | None, eps: float) -> Tensor:
    """Halley steps with the best weights for singular values in [low, 1]; None: to convergence."""
    for _ in range(steps or _MAX_STEPS):
        if steps is None and truth((low >= 1 - 5 * eps).all(), False):
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
    if truth((c > _WELL_CONDITIONED).any(), True):
        root = c.sqrt()
        q = qr(torch.cat([root * x, _eye(x)], -2)).Q
        above_, below = q.split([x.shape[-2], x.shape[-1]], -2)
        return torch.baddbmm(b / c * x, rest / root * above_, below.mT)
    return b / c * x + rest * _divided(x, c * (x.mT @ x) + _eye(x))


def zolo(x: Tensor, oracle: Oracle) -> Tensor:
    """X <- X prod_j (X^T X + c_2j I) (X^T X + c_2j-1 I)^-1, Zolotarev's rational functions.

    Always in float64. Source: Nakatsukasa, Freund, "Computing fundamental matrix decompositions
    accurately via the matrix sign function in two iterations", SIAM Review 58, 2016.
    """
    x = x.double()
    eps = torch.finfo(torch.float64).eps
    x, basis, low = _reduced(x / _norm_bound(x), None, eps)
    # Singular values in [1, largest]; one degree for the whole batch.
    x, largest = x / low, scalar(1 / low.min(), 1 / eps)
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
    """X as a batch (b, ., n), reduced by QR, the way back, and lower bounds (b, 1, 1).

    The bound of the smallest singular value is the given share of the spectral norm, or 1 / |R^-1|,
    which is never above it.
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
    """1.5 X - 0.5 X X^T X: a last step that removes rounding errors."""
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


def svd(x: Tensor, oracle: Oracle) -> Tensor:
    """U V^T over the singular values that are not rounding."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    floor = s[..., :1] * torch.finfo(x.dtype).eps * max(x.shape[-2:])
    out: Tensor = (u * (s > floor).unsqueeze(-2)) @ vh
    return out
