"""Polar factors by polynomials: Newton-Schulz and Polar Express, in products of any precision."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.fakes import real
from ..kernels.symmul import newton_schulz_step, symm_muladd, syrk
from . import codec
from .norms import norms

if TYPE_CHECKING:
    from .polar import Oracle

__all__ = ["QUINTIC", "Triple", "newton_schulz", "polar_express", "polar_express_schedule"]

#: (a, b, c) of x <- a x + b x^3 + c x^5.
Triple = tuple[float, float, float]

#: Muon's coefficients (Jordan et al., 2024), steep at zero: singular values end between about
#: 0.7 and 1.2, and no number of steps brings them to 1.
QUINTIC: Triple = (3.4445, -4.7750, 2.0315)
# x (15 - 10 x^2 + 3 x^4) / 8, whose first two derivatives vanish at 1: it converges cubically.
# QUINTIC brings s/|A| > 1e-3 to 0.68 .. 1.13 in eight steps, and four of this to rounding.
_POLISH: Triple = (1.875, -1.25, 0.375)
# Polar Express (Amsel et al., arXiv 2505.16932): the smallest s/|A| that is assumed; the cushion
# (an interval [low, high] is taken to begin at cushion * high at least); slack for 16-bit rounding.
_LOWER, _CUSHION, _SLACK = 1e-3, 0.02407327424182761, 1.01
# The Gram matrix is recomputed from X after this many steps: X^T X squares the condition number, so
# rounding may make small eigenvalues negative, which later steps would blow up.
_RESTART = 2
# For numbers on the host, independent of torch's default dtype and device.
_HOST: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def newton_schulz(x: Tensor, oracle: Oracle) -> Tensor:
    """Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024."""
    own = oracle.coefficients or QUINTIC
    schedule = (own,) * (oracle.steps or 8) + (() if oracle.steps else (_POLISH,) * 4)
    return _quintics(x, 1.0, schedule, oracle)


def polar_express(x: Tensor, oracle: Oracle) -> Tensor:
    """Amsel et al., "The Polar Express", arXiv 2505.16932."""
    low = oracle.lower_bound
    low = torch.finfo(x.dtype).eps if low == "eps" else low or _LOWER
    return _quintics(x, _SLACK, _shortened(oracle.steps, float(low)), oracle)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _schedule(steps: int | None, low: float) -> tuple[Triple, ...]:
    """The coefficients; constants for torch.compile."""
    with real():
        return polar_express_schedule(steps, low)


@functools.lru_cache(maxsize=64)
def _shortened(steps: int | None, low: float) -> tuple[Triple, ...]:
    """The schedule for rounded products: every polynomial but the limit is of x / slack.

    To convergence, the limit polynomial is added twice, as the slack leaves values below 1.
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
    if dtype == torch.bfloat16:  # bf16 has fp32's range: round before the scaling, half the work
        x = x.to(dtype)
    norm = norms(x, "full") * slack
    norm = torch.where(norm > 0, norm, 1.0).to(
        dtype if dtype == torch.bfloat16 else codec.wide(x).dtype)
    x = (x / norm).to(dtype)
    # Products of 2 n^3 operations: each step takes 2 m/n + 1; through the Gram matrix a step
    # takes 4, less 2 at each start and 2 before it, and X is touched twice at each restart.
    steps, starts = len(schedule), -(-len(schedule) // _RESTART)
    direct, gram = (2 * m / n + 1) * steps, 4 * (steps - starts) + 2 * starts * m / n
    # bf16 has too few digits for the squared condition number of X^T X, fp16 has enough; on a CPU
    # fp16 products are slow.
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
    """Coefficients (a, b, c) of x <- a x + b x^3 + c x^5, each best for the interval it is given.

    Args:
        steps: how many; None is until they have arrived at their limit, (15, -10, 3) / 8.
        lower: smallest singular value at the start; the largest is 1.
        safety: all but the last polynomial are of x / (1 + safety), and the next one is made for
            what that leaves.
        cushion: an interval [low, high] is taken to begin at cushion * high at least.

    Source: Amsel et al., arXiv 2505.16932, section 4; the default cushion is the paper's,
    safety 0.01 and cushion 0.02 are the authors' repository's.
    """
    low, high = lower, 1.0
    schedule: list[Triple] = []
    while len(schedule) < (steps or 100):
        start = max(low, cushion * high)
        a, b, c = _best_quintic(start, high)
        if start != low:
            # The polynomial is not optimal on [low, start]: scale so that its values centre on 1.
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
