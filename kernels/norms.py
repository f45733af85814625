"""Norms of the rows of a matrix of any strides, in one pass.

Squares of 1e30 overflow in fp32 and those of 1e-30 vanish: a running peak scales them, as in BLAS's
nrm2. The result is float64, without a copy of the matrix in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import cdiv, define, jit, launch, tl, use_triton
from .tiles import stacked

__all__ = ["row_norms", "row_norms_ref", "scaled_squares"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Rows of one program, so that 4096 of them occupy a GPU, and columns at once.
_ROWS, _COLUMNS = 16, 128


def row_norms_ref(x: Tensor) -> Tensor:
    """Define :func:`row_norms`."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return norm


@jit
def scaled_squares(x: tl.tensor, peak: tl.tensor, square: tl.tensor) -> tl.tensor:
    """Add rows of x [R, C] to sums peak^2 * square of their squares, peak [R] the largest yet."""
    x = tl.abs(x.to(tl.float32))
    top = tl.maximum(peak, tl.max(x, 1))
    some = tl.where(top > 0, top, 1.0)
    # An infinity over itself is 1, so that the sum is infinite and no NaN.
    x = tl.where(x == some[:, None], 1.0, x / some[:, None])
    ratio = tl.where(peak == some, 1.0, peak / some)
    return top, square * ratio * ratio + tl.sum(x * x, 1)


@jit
def _row_norms_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, m: tl.tensor, n: tl.tensor,
                      x_batch: tl.tensor, x_row: tl.tensor, x_column: tl.tensor,
                      tiles: tl.tensor, R: tl.constexpr, C: tl.constexpr) -> None:
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * R + tl.arange(0, R)  # [R]
    column = tl.arange(0, C).to(tl.int64)  # [C]
    peak = tl.zeros([R], dtype=tl.float32)
    square = tl.zeros([R], dtype=tl.float32)
    x = x_ptr + batch * x_batch + row[:, None] * x_row + column[None, :] * x_column
    for start in range(0, n, C):
        mask = (row < m)[:, None] & (column < n - start)[None, :]
        peak, square = scaled_squares(tl.load(x, mask=mask, other=0.0), peak, square)
        x += C * tl.cast(x_column, tl.int64)
    tl.store(out_ptr + batch * m + row, peak.to(tl.float64) * tl.sqrt(square.to(tl.float64)),
             mask=row < m)


def _row_norms(x: Tensor, out: Tensor) -> None:
    batch, m, n = x.shape
    tiles = cdiv(m, _ROWS)
    launch(_row_norms_kernel, batch * tiles, x.device, x, out, m, n, *x.stride(), tiles, R=_ROWS,
           C=_COLUMNS)


_norms_op = define("row_norms(Tensor x, Tensor(a!) out) -> ()", _row_norms)


def row_norms(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Euclidean norms of the rows of a matrix, or of a batch of them.

    Args:
        x: (..., m, n), fp32, bf16 or fp16 (float64 in torch), any strides.
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
        return row_norms_ref(x)
    if x.dtype not in _FLOATS:
        raise TypeError(f"x: expected {' or '.join(map(str, _FLOATS))}, got {x.dtype}")
    out = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
    if x.numel():
        stack = stacked(x)
        _norms_op(stack, out.view(stack.shape[:-1]))
    return out
