"""Norms of the rows of a matrix of any strides, in one pass.

Squares of 1e30 overflow in fp32 and those of 1e-30 vanish: rows whose sum is not well inside its
range are read again, and a running peak scales them, as in BLAS's nrm2. The result is float64,
without a copy of the matrix in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import FLOATS, cdiv, define, jit, launch, tl, use_triton
from .apart import Apart, Matrices, address, alignment, item_ptr, kind
from .tiles import stacked

__all__ = ["row_norms", "row_norms_ref", "row_squares"]

# Rows of one program and columns at once: of a matrix whose rows are contiguous, and of one whose
# columns are.
_ALONG, _ACROSS = (4, 512), (64, 16)
# Programs that occupy a GPU.
_BUSY = 1056


def row_norms_ref(x: Tensor) -> Tensor:
    """Define :func:`row_norms`."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return norm


@jit
def _scaled(x: tl.tensor, peak: tl.tensor, square: tl.tensor) -> tl.tensor:
    """Add rows of x [R, C] to sums peak^2 * square of their squares, peak [R] the largest yet."""
    x = tl.abs(x.to(tl.float32))
    top = tl.maximum(peak, tl.max(x, 1))
    some = tl.where(top > 0, top, 1.0)
    # An infinity over itself is 1, so that the sum is infinite and no NaN.
    x = tl.where(x == some[:, None], 1.0, x / some[:, None])
    ratio = tl.where(peak == some, 1.0, peak / some)
    return top, square * ratio * ratio + tl.sum(x * x, 1)


@jit
def row_squares(x_ptr: tl.tensor, row: tl.tensor, m: tl.tensor, x_row: tl.tensor,
                x_column: tl.tensor, begin: tl.tensor, end: tl.tensor, R: tl.constexpr,
                C: tl.constexpr) -> tl.tensor:
    """Sums of squares of rows [R] of an m-row matrix between two columns, in float64."""
    column = tl.arange(0, C).to(tl.int64)  # [C]
    x_ptr += row[:, None] * x_row + column[None, :] * x_column  # [R, C]
    squares = tl.zeros([R, C], dtype=tl.float32)
    for start in range(begin, end, C):
        mask = (row < m)[:, None] & (column < end - start)[None, :]
        x = tl.load(x_ptr + tl.cast(start, tl.int64) * x_column, mask=mask, other=0.0)
        x = x.to(tl.float32)
        squares += x * x
    square = tl.sum(squares, 1)
    total = square.to(tl.float64)
    # NaN fails both. A million squares below 2^-149, which are lost, are a 2^-29th of 2^-100.
    safe = (square > 2.0**-100) & (square < 2.0**120) | (row >= m)
    if tl.min(safe.to(tl.int32), 0) == 0:
        peak = tl.zeros([R], dtype=tl.float32)
        square = tl.zeros([R], dtype=tl.float32)
        for start in range(begin, end, C):
            mask = (row < m)[:, None] & (column < end - start)[None, :]
            x = tl.load(x_ptr + tl.cast(start, tl.int64) * x_column, mask=mask, other=0.0)
            peak, square = _scaled(x, peak, square)
        wide = peak.to(tl.float64)
        total = wide * wide * square
    return total


@jit
def _row_norms_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, m: tl.tensor, n: tl.tensor,
                      x_batch: tl.tensor, x_row: tl.tensor, x_column: tl.tensor,
                      tiles: tl.tensor, share: tl.tensor, R: tl.constexpr, C: tl.constexpr,
                      ROOT: tl.constexpr, KIND: tl.constexpr = None, ALIGN: tl.constexpr = 1
                      ) -> None:
    # One program takes R rows of a part of the columns.
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * R + tl.arange(0, R)  # [R]
    begin = tl.program_id(1) * share
    total = row_squares(item_ptr(x_ptr, batch, x_batch, KIND, ALIGN), row, m, x_row, x_column,
                        begin, tl.minimum(n, begin + share), R, C)
    if ROOT:
        total = tl.sqrt(total)
    tl.store(out_ptr + (batch * tl.num_programs(1) + tl.program_id(1)) * m + row, total,
             mask=row < m)


def _split(x: Matrices) -> tuple[int, int, int, int]:
    """Rows of a program, columns at once, columns of a program, and in how many parts they are."""
    m, n = x.shape[1:]
    rows, columns = _ACROSS if x.stride()[1] == 1 and m > 1 else _ALONG
    # Of a batch as of each matrix alone, so that sums have one order.
    parts = min(cdiv(_BUSY, cdiv(m, rows)), cdiv(n, 4 * columns))
    share = cdiv(cdiv(n, parts), columns) * columns
    return rows, columns, share, cdiv(n, share)


def _row_norms(x: Matrices, out: Tensor) -> None:
    batch, m, n = x.shape
    rows, columns, share, parts = _split(x)
    tiles = cdiv(m, rows)
    launch(_row_norms_kernel, (batch * tiles, parts), x.device, address(x), out, m, n,
           *x.stride(), tiles, share, R=rows, C=columns, ROOT=parts == 1, KIND=kind(x),
           ALIGN=alignment(x))


_norms_op = define("row_norms(Tensor x, Tensor(a!) out) -> ()", _row_norms)


def row_norms(x: Matrices, *, backend: str | None = None) -> Tensor:
    """Euclidean norms of the rows of a matrix, or of a batch of them.

    Args:
        x: (..., m, n), fp32, bf16 or fp16 (float64 in torch), any strides; several matrices may
            lie :class:`lissom.kernels.apart.Apart`.
        backend: "torch", "triton", or None for Triton on CUDA and torch elsewhere.

    Returns:
        (..., m), float64.

    Raises:
        ValueError: x has fewer than two dimensions, or there is no such backend.
        TypeError: x has another dtype.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    if x.ndim < 2:
        raise ValueError(f"x: expected (..., m, n), got shape {tuple(x.shape)}")
    triton = use_triton(backend, x.device)
    if not triton or (x.dtype == torch.float64 and backend is None):
        return torch.stack([*map(row_norms_ref, x)]) if isinstance(x, Apart) else row_norms_ref(x)
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected {' or '.join(map(str, FLOATS))}, got {x.dtype}")
    lead = x.shape[:-1]
    if not x.numel():
        return torch.zeros(lead, dtype=torch.float64, device=x.device)
    stack = x if isinstance(x, Apart) else stacked(x)
    parts = _split(stack)[-1]
    out = torch.empty(len(stack), parts, stack.shape[1], dtype=torch.float64, device=x.device)
    (_row_norms if isinstance(x, Apart) else _norms_op)(stack, out)
    return (out if parts == 1 else out.sum(1).sqrt_()).view(lead)
