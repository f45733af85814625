"""The last pass of a step: lift, decay, what the residual adds and rounding, applied to the weight.

    P <- keep o P + alpha A B + beta gain o D, rounded once

with A (..., m, k) to the left of B (..., k, n), and D (..., m, n). Each term but the first may be
missing; keep and gain are numbers or broadcast to P. Sums are in fp32. No temporary has P's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._triton import FLOATS, cdiv, check, define, jit, launch, signed32, tl, use_triton
from .apart import (
    Apart,
    Keys,
    Matrices,
    address,
    alignment,
    item_ptr,
    key_words,
    kind,
    parts_of,
    writable,
)
from .philox import WEIGHT_STREAM, stochastic_round
from .split import check_below, join_ref, load_weight, pair, random_split_ref, store_weight
from .tiles import Tiles, dot_tile, place_tile, precision, stacked, strides, tiles_for, widened

__all__ = ["lift", "lift_ref"]

# After the product, the rest is done on a slice of columns at a time: this leaves registers for two
# programs per multiprocessor, so that one multiplies while the other rounds. Chosen by the register
# counts of bench.machine; not yet timed against others (bench.tiles).
_SHARED = Tiles(128, 128, 64, 8, 8, 3)
_SLICES = 4
# Without a product: long rows, so that loads are wide.
_FLAT = Tiles(16, 256, 16, 8, 4, 1)


def lift_ref(p: Tensor, left: Tensor | None = None, right: Tensor | None = None, *,
             alpha: float | Tensor = 1.0, keep: Tensor | float = 1.0, dense: Tensor | None = None,
             gain: Tensor | float = 1.0, beta: float = 1.0, key: tuple[int, int] | None = None,
             t: int | Tensor = 1, start: int = 0, below: Sequence[Tensor] = ()) -> None:
    """Define :func:`lift`."""
    x = (join_ref(p, *below) if below else p.float()) * keep
    if left is not None and right is not None:
        x += alpha * (left.float() @ right.float())
    if dense is not None:
        x += beta * (gain * dense.float())
    if below:
        random_split_ref(x, p, *pair(below), key, t, start)
        return
    if key is not None and p.dtype != torch.float32:
        x = stochastic_round(x, p.dtype, start, key, (t, WEIGHT_STREAM), backend="torch")
    p.copy_(x)


@jit
def _half(x: tl.tensor, RIGHT: tl.constexpr) -> tl.tensor:
    """The left or the right half of x's columns."""
    rows: tl.constexpr = x.shape[0]
    columns: tl.constexpr = x.shape[1]
    left, right = tl.split(tl.permute(tl.reshape(x, [rows, 2, columns // 2]), [0, 2, 1]))
    if RIGHT:
        return right
    else:
        return left


@jit
def _factors(ptr: tl.tensor, row: tl.tensor, column: tl.tensor, m: tl.tensor, n: tl.tensor,
             x_row: tl.tensor, x_column: tl.tensor, VARY: tl.constexpr) -> tl.tensor:
    """The factors of a tile: one for each row (VARY 1), column (2) or element (3)."""
    if VARY == 1:
        return tl.load(ptr + row * x_row, mask=row < m, other=0.0)[:, None]
    elif VARY == 2:
        return tl.load(ptr + column * x_column, mask=column < n, other=0.0)[None, :]
    else:
        return tl.load(ptr + row[:, None] * x_row + column[None, :] * x_column,
                       mask=(row < m)[:, None] & (column < n)[None, :], other=0.0)


@jit
def _lift_kernel(p_ptr: tl.tensor, left_ptr: tl.tensor, right_ptr: tl.tensor, dense_ptr: tl.tensor,
                 high_ptr: tl.tensor, low_ptr: tl.tensor, gain_ptr: tl.tensor, keep_ptr: tl.tensor,
                 m: tl.tensor, n: tl.tensor, k: tl.tensor, left_batch: tl.tensor,
                 left_row: tl.tensor, left_column: tl.tensor, right_batch: tl.tensor,
                 right_row: tl.tensor, right_column: tl.tensor, dense_batch: tl.tensor,
                 dense_row: tl.tensor, dense_column: tl.tensor, gain_batch: tl.tensor,
                 gain_row: tl.tensor, gain_column: tl.tensor, keep_batch: tl.tensor,
                 keep_row: tl.tensor, keep_column: tl.tensor, alpha: tl.tensor, beta: tl.tensor,
                 keep: tl.tensor, start: tl.tensor, seed: tl.tensor, parameter: tl.tensor,
                 step: tl.tensor, tiles_m: tl.tensor, tiles_n: tl.tensor, PRODUCT: tl.constexpr,
                 DENSE: tl.constexpr, GAIN: tl.constexpr, KEEP: tl.constexpr,
                 STOCHASTIC: tl.constexpr, HELD: tl.constexpr, ALIGNED: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                 PRECISION: tl.constexpr, WIDEN: tl.constexpr, SLICES: tl.constexpr,
                 WEIGHT: tl.constexpr = None, LEFT: tl.constexpr = None, RIGHT: tl.constexpr = None,
                 REST: tl.constexpr = None, ALIGN: tl.constexpr = 1, KEYED: tl.constexpr = False,
                 BELOW: tl.constexpr = 0, RATED: tl.constexpr = False) -> None:
    if HELD:
        step = tl.load(step).to(tl.int32)
    if RATED:
        alpha = tl.load(alpha)
    batch = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = place_tile(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    row = tile_m.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    first = tile_n.to(tl.int64) * BN
    # Index of the matrix's first element: in a batch it counts on, for several weights it is 0.
    begin = batch * m * n
    if WEIGHT is not None:
        begin = 0
        p_ptr = item_ptr(p_ptr, batch, 0, WEIGHT, ALIGN)
        if BELOW > 0:
            high_ptr = item_ptr(high_ptr, batch, 0, tl.int8, ALIGN)
        if BELOW == 16:
            low_ptr = item_ptr(low_ptr, batch, 0, tl.uint8, ALIGN)
    if KEYED:
        parameter = tl.load(seed + 2 * batch + 1).to(tl.int32)
        seed = tl.load(seed + 2 * batch).to(tl.int32)
    if PRODUCT:
        total = dot_tile(item_ptr(left_ptr, batch, left_batch, LEFT, ALIGN),
                         item_ptr(right_ptr, batch, right_batch, RIGHT, ALIGN), row,
                         first + tl.arange(0, BN), m, n, k, left_row, left_column, right_row,
                         right_column, BM, BN, BK, PRECISION, WIDEN)
    else:
        total = tl.zeros([BM, BN], dtype=tl.float32)
    WIDTH: tl.constexpr = BN // SLICES
    for i in tl.static_range(SLICES):
        x = total  # [BM, WIDTH] of it, as all that follows
        if SLICES > 1:
            x = _half(x, 2 * i >= SLICES)
        if SLICES > 2:
            x = _half(x, 4 * i % (2 * SLICES) >= SLICES)
        start_column = first + i * WIDTH
        column = start_column + tl.arange(0, WIDTH)  # [WIDTH]
        mask = (row < m)[:, None] & (column < n)[None, :]
        offset = begin + row[:, None] * n + column[None, :]
        p = load_weight(p_ptr, high_ptr, low_ptr, offset, mask, BELOW)
        if KEEP:
            p *= _factors(keep_ptr + batch * keep_batch, row, column, m, n, keep_row, keep_column,
                          KEEP)
        else:
            p *= keep
        x = alpha * x + p
        if DENSE:
            dense = tl.load(item_ptr(dense_ptr, batch, dense_batch, REST, ALIGN)
                            + row[:, None] * dense_row + column[None, :] * dense_column,
                            mask=mask, other=0.0).to(tl.float32)
            if GAIN:
                dense *= _factors(gain_ptr + batch * gain_batch, row, column, m, n, gain_row,
                                  gain_column, GAIN)
            x += beta * dense
        index = begin + row * n + start_column + start
        store_weight(x, p_ptr, high_ptr, low_ptr, offset, mask, index, seed, parameter, step, BELOW,
                     STOCHASTIC, ALIGNED, WIDTH)


def _after(tiles: Tiles) -> tuple[int, int | None]:
    """Slices of what follows the product, and registers of a thread: with large tiles as many as
    leave room for two programs of 8 warps on a multiprocessor, where half of them hold the thread's
    part of the product. None for as many as the compiler takes.
    """
    if (tiles.rows, tiles.columns) != (_SHARED.rows, _SHARED.columns):
        return 1, None
    return _SLICES, 128 if tiles.rows * tiles.columns <= 64 * 32 * tiles.warps else None


def _vary(x: Tensor | None) -> int:
    """0 for None, 1 if all columns of x are the same (expanded), 2 if all rows are, else 3."""
    if x is None:
        return 0
    return 1 if x.stride(-1) == 0 else 2 if x.stride(-2) == 0 else 3


def _lift(p: Matrices, left: Matrices | None, right: Matrices | None, dense: Matrices | None,
          gains: Tensor | None, keeps: Tensor | None, alpha: float, beta: float, keep: float,
          key: Keys, stochastic: bool, t: int, start: int, held_t: Tensor | None = None,
          high: Matrices | None = None, low: Matrices | None = None,
          held_alpha: Tensor | None = None) -> None:
    """All tensors are (m, n) or batches (b, m, n), with any strides except for p.

    ``held_t`` and ``held_alpha`` are t and alpha in tensors. Where p is an ``Apart`` there is a key
    for each matrix.
    """
    batch, (m, n) = len(p) if p.ndim == 3 else 1, p.shape[-2:]
    if not p.numel():
        return
    k = 0 if left is None else left.shape[-1]
    # The tiles of a single weight for several too, so that the order of sums is the same.
    tiles = _FLAT if left is None else tiles_for(
        left, 1 if isinstance(p, Apart) else batch, m, n, (_SHARED,))
    tiles_m, tiles_n = cdiv(m, tiles.rows), cdiv(n, tiles.columns)
    slices, registers = _after(tiles)
    words, tensors = key_words(key, p), (p, left, right, dense, high, low)
    launch(_lift_kernel, batch * tiles_m * tiles_n, p.device, *map(address, tensors), gains, keeps,
           m, n, k, *strides(left, right, dense, gains, keeps),
           alpha if held_alpha is None else held_alpha, beta, keep, start, *words,
           signed32(t) if held_t is None else held_t, tiles_m, tiles_n,
           PRODUCT=left is not None, DENSE=dense is not None, GAIN=_vary(gains), KEEP=_vary(keeps),
           STOCHASTIC=stochastic, HELD=held_t is not None,
           ALIGNED=start % 8 == 0 and n % 8 == 0, BM=tiles.rows, BN=tiles.columns, BK=tiles.depth,
           GROUP=tiles.group, PRECISION=precision(),
           WIDEN=left is not None and widened(left), SLICES=slices,
           WEIGHT=kind(p), LEFT=kind(left), RIGHT=kind(right), REST=kind(dense),
           ALIGN=alignment(*tensors), KEYED=isinstance(words[0], Tensor),
           BELOW=0 if high is None else 8 if low is None else 16, RATED=held_alpha is not None,
           num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=registers)
    torch.autograd.graph.increment_version(writable(p, high, low))


_op = define("lift(Tensor(a!) p, Tensor? left, Tensor? right, Tensor? dense, Tensor? gains, "
             "Tensor? keeps, float alpha, float beta, float keep, int[] key, bool stochastic, "
             "int t, int start, Tensor? held_t=None, Tensor(b!)? high=None, Tensor(c!)? low=None, "
             "Tensor? held_alpha=None) -> ()", _lift)


def lift(p: Matrices, left: Matrices | None = None, right: Matrices | None = None, *,
         alpha: float | Tensor = 1.0, keep: Tensor | float = 1.0, dense: Matrices | None = None,
         gain: Tensor | float = 1.0, beta: float = 1.0, key: Keys | None = None,
         t: int | Tensor = 1, start: int = 0, below: Sequence[Matrices] = (),
         backend: str | None = None) -> None:
    """P <- keep o P + alpha A B + beta gain o D in place, rounded once.

    p may be several weights (:class:`lissom.kernels.apart.Apart`) with a key for each; the other
    tensors then are stacked or ``Apart`` too.

    Args:
        p: weight (..., m, n), contiguous, fp32, bf16 or fp16.
        left: A, (..., m, k), any strides, or None with ``right`` for no product.
        right: B, (..., k, n) of left's dtype. A and B have p's leading dimensions, or none.
        alpha: multiplies the product: a number, or a 0-d fp32 tensor on the device.
        keep: multiplies P: a number, or an fp32 tensor that broadcasts to it.
        dense: D, of p's shape, any strides; None for no such term.
        gain: multiplies D: a number, or an fp32 tensor that broadcasts to it.
        beta: multiplies the third term.
        key: (seed, parameter) of the random bits that round a bf16 or fp16 weight; None rounds to
            nearest.
        t: the random stream's step: a number, or a 0-d int64 tensor on the device, which a CUDA
            graph reads when it is replayed (as it does ``alpha``, ``gain`` and ``keep``).
        start: index in the whole parameter of p's first element.
        below: what is kept below a bf16 weight and changes with it: its ``high``, or ``high`` and
            ``low``, of p's shape (:mod:`lissom.kernels.split`), ``Apart`` if p is and never
            stacked then. With ``high`` alone ``key`` rounds to 8 bits more than bf16, with both all
            is rounded to nearest.
        backend: "torch", "triton", or None for Triton on CUDA and torch elsewhere.

    Raises:
        TypeError: a dtype is another one.
        ValueError: shapes do not fit.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    if p.ndim < 2:
        raise ValueError(f"p: expected (..., m, n), got shape {tuple(p.shape)}")
    check("p", p, shape=tuple(p.shape), dtypes=FLOATS, device=p.device)
    check_below(p, below)
    if isinstance(alpha, Tensor):
        check("alpha", alpha, shape=(), dtypes=(torch.float32,), device=p.device)
    if (left is None) != (right is None):
        raise ValueError("left, right: expected two tensors or None and None, got one of them")
    if left is not None and right is not None:
        if left.dtype not in FLOATS or right.dtype != left.dtype:
            raise TypeError(f"left, right: expected one dtype of {' or '.join(map(str, FLOATS))}, "
                            f"got {left.dtype} and {right.dtype}")
        if (left.shape[-2] != p.shape[-2] or right.shape[-1] != p.shape[-1]
                or left.shape[-1] != right.shape[-2]):
            raise ValueError(f"left, right: expected (..., m, k) and (..., k, n) for p of "
                             f"{tuple(p.shape)}, got {tuple(left.shape)} and {tuple(right.shape)}")
    if dense is not None and dense.shape != p.shape:
        raise ValueError(f"dense: expected shape {tuple(p.shape)}, got {tuple(dense.shape)}")
    several = isinstance(p, Apart)
    given: tuple[tuple[str, Any], ...] = (("left", left), ("right", right), ("key", key))
    for name, x in given:
        if several and x is not None and len(x) != len(p):
            raise ValueError(f"{name}: expected {len(p)} for as many weights, got {len(x)}")
    if not use_triton(backend, p.device):
        count = len(p) if several else 1

        def each(*given: Any) -> Any:
            return [parts_of(x, count) if several else [x] for x in given]

        keys: Any = key if several and key else [key] * count
        for p_, left_, right_, keep_, dense_, gain_, key_, *below_ in zip(
                *each(p, left, right, keep, dense, gain), keys, *each(*below), strict=True):
            lift_ref(p_, left_, right_, alpha=alpha, keep=keep_, dense=dense_, gain=gain_,
                     beta=beta, key=key_, t=t, start=start, below=below_)
        return

    def batched(x: Any) -> Any:
        """A view (b, ...) of x, expanded to p's leading dimensions; a matrix stays as it is."""
        if x is None or isinstance(x, Apart) or p.ndim == x.ndim == 2:
            return x
        return stacked(x.expand(*p.shape[:-2], *x.shape[-2:]))

    gains = gain.expand(p.shape) if isinstance(gain, Tensor) and dense is not None else None
    keeps = keep.expand(p.shape) if isinstance(keep, Tensor) else None
    high, low = map(batched, pair(below))
    run = _lift if several else _op
    run(batched(p), batched(left), batched(right), batched(dense), batched(gains), batched(keeps),
        1.0 if isinstance(alpha, Tensor) else alpha,
        beta if isinstance(gain, Tensor) else beta * gain,
        1.0 if isinstance(keep, Tensor) else keep,
        key or (0, 0), key is not None and p.dtype != torch.float32 and len(below) < 2,
        1 if isinstance(t, Tensor) else t, start, t if isinstance(t, Tensor) else None,
        high, low, alpha if isinstance(alpha, Tensor) else None)
