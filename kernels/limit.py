"""The factors of a norm-scaled residual, one for each column, and the limiter of its growth.

With the norms n_i, r_i, g_i of the columns of N, R and G, and c_i of what the factors are for,
g_i or sqrt(max(g_i^2 - r_i^2, 0) + leak^2 r_i^2):

    phi_i = min(n_i / (r_i + eps), 10 sqrt(more) rms(n) / c_i), 0 where c_i = 0;
    |S| = sqrt(sum (phi_i c_i)^2);  phi <- phi / max(1, |S| / (last + eps) / limiter)

A last |S| below a thousandth of |N| limits nothing, and is not stored: growing from there by 1 % a
step would take thousands of steps. All is float64, whose squares of 1e30 and 1e-30 are in range.

Source: Chen et al., arXiv 2410.01623; the cap is this package's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._triton import check, define, jit, launch, tl, use_triton
from .apart import Apart, Matrices, address, alignment, item_ptr, kind, writable

__all__ = ["limited_gains", "limited_gains_ref"]

# A gain is capped where it would make a column this many times as large as expected of it.
_CAP = 10.0
# A limiter compares with the last norm only if that was not below this share of |N|.
_FLOOR = 1e-3
# Columns that a program has at once, and its warps: few rounds of latency.
_BLOCK, _WARPS = 4096, 16


def limited_gains_ref(size_n: Tensor, size_r: Tensor, size_g: Tensor, last: Tensor | None, *,
                      more: float, eps: float, leak: float | None = None, limiter: float = 1.0,
                      count: int | None = None, total: Callable[[Tensor], Tensor] | None = None
                      ) -> Tensor:
    """Define :func:`limited_gains`."""
    def square(x: Tensor) -> Tensor:
        part = x.square().sum(-1, keepdim=True)
        return part if total is None else total(part)

    rest = size_g if leak is None else ((size_g.square() - size_r.square()).clamp_min(0)
                                        + (leak * size_r).square()).sqrt()
    whole = square(size_n)
    cap = _CAP * math.sqrt(more) * (whole / (count or size_n.shape[-1])).sqrt() / rest
    gain = torch.where(size_n > 0, size_n / (size_r + eps), size_n)
    # Where there is nothing to multiply, nothing is lost; a NaN of the gradient stays one.
    gain = torch.where(rest == 0, 0.0, torch.minimum(gain, cap))
    if last is None:
        return gain
    size, floor, before = square(gain * rest).sqrt(), _FLOOR * whole.sqrt(), last.double()[:, None]
    growth = torch.where(before > floor, size / (before + eps) / limiter, 1.0).clamp_min(1.0)
    size = size / growth
    last.copy_(torch.where(size > floor, size, before).squeeze(-1))
    return gain / growth


@jit
def _gain(n: tl.tensor, r: tl.tensor, g: tl.tensor, cap: tl.tensor, eps: tl.tensor,
          leak: tl.tensor, LEAK: tl.constexpr) -> tl.tensor:
    """Factors before the limiter, and the norms of what they are for."""
    rest = g
    if LEAK:
        apart = g * g - r * r
        apart = tl.where(apart < 0, 0.0, apart)
        rest = tl.sqrt(apart + leak * r * (leak * r))
    gain = tl.where(n > 0, n / (r + eps), n)
    most = cap / tl.where(rest == 0, 1.0, rest)
    # A comparison with NaN is false: either's is kept.
    gain = tl.where(gain != gain, gain, tl.where(gain < most, gain, most))
    return tl.where(rest == 0, 0.0, gain), rest


@jit
def _limit_kernel(n_ptr: tl.tensor, r_ptr: tl.tensor, g_ptr: tl.tensor, last_ptr: tl.tensor,
                  out_ptr: tl.tensor, columns: tl.tensor, count: tl.tensor, factor: tl.tensor,
                  eps: tl.tensor, leak: tl.tensor, limiter: tl.tensor, LEAK: tl.constexpr,
                  LIMIT: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr = None,
                  ALIGN: tl.constexpr = 1) -> None:
    # One program has a row: sums over it twice, then the factors. n, r and g are norms.
    if LIMIT:
        # Read by all threads before the first sum, where they wait for each other: one writes it.
        last_ptr = item_ptr(last_ptr, tl.program_id(0), 1, LAST, ALIGN)
        last = tl.load(last_ptr).to(tl.float64)
    row = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    whole = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, columns, BLOCK):
        n = tl.load(n_ptr + row + start + column, mask=column < columns - start, other=0.0)
        whole += n * n
    square = tl.sum(whole, 0)
    cap = factor * tl.sqrt(square / count)
    growth = tl.full([], 1.0, dtype=tl.float64)
    if LIMIT:
        sums = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(0, columns, BLOCK):
            mask = column < columns - start
            at = row + start + column
            gain, rest = _gain(tl.load(n_ptr + at, mask=mask, other=0.0),
                               tl.load(r_ptr + at, mask=mask, other=1.0),
                               tl.load(g_ptr + at, mask=mask, other=0.0), cap, eps, leak, LEAK)
            part = gain * rest
            sums += tl.where(mask, part * part, 0.0)
        size = tl.sqrt(tl.sum(sums, 0))
        floor = 0.001 * tl.sqrt(square)  # _FLOOR
        times = size / (last + eps) / limiter
        growth = tl.where((last > floor) & ((times > 1) | (times != times)), times, 1.0)
        size = size / growth
        tl.store(last_ptr, tl.where(size > floor, size, last).to(tl.float32))
    for start in range(0, columns, BLOCK):
        mask = column < columns - start
        at = row + start + column
        gain, rest = _gain(tl.load(n_ptr + at, mask=mask, other=0.0),
                           tl.load(r_ptr + at, mask=mask, other=1.0),
                           tl.load(g_ptr + at, mask=mask, other=0.0), cap, eps, leak, LEAK)
        tl.store(out_ptr + at, gain / growth, mask=mask)


def _limit(size_n: Tensor, size_r: Tensor, size_g: Tensor, last: Matrices | None, out: Tensor,
           factor: float, count: int, eps: float, leak: float | None, limiter: float) -> None:
    if not out.numel():
        return
    batch, columns = out.shape
    launch(_limit_kernel, batch, out.device, size_n, size_r, size_g, address(last), out, columns,
           count, factor, eps, leak or 0.0, limiter, LEAK=leak is not None, LIMIT=last is not None,
           BLOCK=_BLOCK, LAST=kind(last), ALIGN=alignment(last), num_warps=_WARPS)
    if last is not None:
        torch.autograd.graph.increment_version(writable(last))


_op = define("limited_gains(Tensor size_n, Tensor size_r, Tensor size_g, Tensor(a!)? last, "
             "Tensor(b!) out, float factor, int count, float eps, float? leak, float limiter) "
             "-> ()", _limit)


def limited_gains(size_n: Tensor, size_r: Tensor, size_g: Tensor, last: Matrices | None, *,
                  more: float, eps: float, leak: float | None = None, limiter: float = 1.0,
                  count: int | None = None, total: Callable[[Tensor], Tensor] | None = None,
                  backend: str | None = None) -> Tensor:
    """Factors phi of the columns of one matrix in each row, as the module says.

    Args:
        size_n: norms of the columns of N, (b, columns), float64.
        size_r: of R.
        size_g: of G.
        last: |S| of the last step, (b,), fp32, which becomes this one's; None is no limiter.
            Those of several matrices may lie :class:`lissom.kernels.apart.Apart`, each all of one.
        more: how many times more entries than N's the columns have that the factors are for.
        eps: keeps quotients finite.
        leak: c_i is that of G - R + leak R, where R is orthogonal to what it leaves; None for G.
        limiter: the largest growth of |S| in a step.
        count: columns of the matrices, where these are a part of them; None for all.
        total: the sum over all parts of a number of each part, (b, 1); None where this is all.
        backend: "torch", "triton", or None for Triton on CUDA and torch elsewhere.

    Returns:
        (b, columns), float64.

    Raises:
        TypeError, ValueError: a tensor does not fit, by name.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    sizes, shape, device = (size_n, size_r, size_g), tuple(size_n.shape), size_n.device
    for name, x in zip(("size_n", "size_r", "size_g"), sizes, strict=True):
        check(name, x, shape=shape, dtypes=(torch.float64,), device=device)
    several = isinstance(last, Apart)
    if last is not None:
        check("last", last, shape=(shape[0], *[1] * (last.ndim - 1 if several else 0)),
              dtypes=(torch.float32,), device=device)
    triton = use_triton(backend, device)
    if isinstance(last, Apart) and not triton:
        each = zip(*(x.split(1) for x in sizes), last, strict=True)
        return torch.cat([limited_gains(n, r, g, last_.view(-1), more=more, eps=eps, leak=leak,
                                        limiter=limiter, count=count, backend=backend)
                          for n, r, g, last_ in each])
    if not isinstance(last, Apart) and (total is not None or not triton):
        return limited_gains_ref(*sizes, last, more=more, eps=eps, leak=leak, limiter=limiter,
                                 count=count, total=total)
    out = torch.empty_like(size_n)
    (_limit if several else _op)(*sizes, last, out, _CAP * math.sqrt(more), count or shape[-1], eps,
                                 leak, limiter)
    return out
