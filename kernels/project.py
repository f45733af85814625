"""Projection of a gradient, and the norms of the result's columns in the same pass.

C = A B, with A (..., m, k) and B (..., k, n) of any strides: R = G Q is ``(G, Q)``, the transpose
of R = P^T G is ``(G^T, P)``. The norms of C's columns choose columns of a cosine basis. Sums are in
fp32 and in an order that does not change from run to run; C is rounded once.

Norms of A's rows, which Fira needs of G, are not computed here: on an H100 such a product was
slower than cuBLAS's followed by :mod:`.norms`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._triton import FLOATS, cdiv, check, define, jit, launch, tl, use_triton
from .apart import Apart, Matrices, address, alignment, item_ptr, kind, stack
from .philox import nearest
from .tiles import Tiles, dot_tile, place_tile, precision, stacked, strides, tiles_for, widened

__all__ = ["project", "project_ref"]


def project_ref(a: Tensor, b: Tensor, *, dtype: torch.dtype = torch.float32,
                scores: int | None = None, largest: Tensor | None = None
                ) -> tuple[Tensor, Tensor | None]:
    """Define :func:`project`."""
    c = a.float() @ b.float()
    columns = None
    if scores == 1:
        columns = c.abs().sum(-2)
    elif scores == 2:
        columns = (c if largest is None else c / largest).square().sum(-2)
    return c.to(dtype), columns


@jit
def _project_kernel(a_ptr: tl.tensor, b_ptr: tl.tensor, c_ptr: tl.tensor, scores_ptr: tl.tensor,
                    largest_ptr: tl.tensor, m: tl.tensor, n: tl.tensor,
                    k: tl.tensor, a_batch: tl.tensor, a_row: tl.tensor, a_column: tl.tensor,
                    b_batch: tl.tensor, b_row: tl.tensor, b_column: tl.tensor, c_batch: tl.tensor,
                    c_row: tl.tensor, c_column: tl.tensor, tiles_m: tl.tensor, tiles_n: tl.tensor,
                    SCORES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                    GROUP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
                    KIND: tl.constexpr = None, ALIGN: tl.constexpr = 1) -> None:
    batch = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = place_tile(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    row = tile_m.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    column = tile_n.to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    a_ptr = item_ptr(a_ptr, batch, a_batch, KIND, ALIGN)
    total = dot_tile(a_ptr, b_ptr + batch * b_batch, row, column, m, n, k, a_row, a_column, b_row,
                     b_column, BM, BN, BK, PRECISION, WIDEN)
    mask = (row < m)[:, None] & (column < n)[None, :]
    c = c_ptr + batch * c_batch + row[:, None] * c_row + column[None, :] * c_column
    tl.store(c, nearest(total, c_ptr), mask=mask)
    if SCORES > 0:
        # Partial sums of this row of tiles; rows beyond the end are zero.
        if SCORES == 1:
            part = tl.sum(tl.abs(total), 0)
        else:
            scaled = total * tl.load(largest_ptr + batch)
            part = tl.sum(scaled * scaled, 0)
        tl.store(scores_ptr + (batch * tiles_m + tile_m) * n + column, part, mask=column < n)


def _tiles(a: Any, m: int, n: int) -> Tiles:
    """Tiles for a matrix or a batch; for several matrices those of one, for one order of sums."""
    return tiles_for(a, len(a) if a.ndim == 3 and not isinstance(a, Apart) else 1, m, n)


def _project(a: Any, b: Tensor, c: Tensor, scores: Tensor | None, largest: Tensor | None,
             order: int) -> None:
    """Fill c, and scores (batch, row tiles of c, n) with partial sums."""
    batch, (m, k) = len(a) if a.ndim == 3 else 1, a.shape[-2:]
    n = b.shape[-1]
    t = _tiles(a, m, n)
    tiles_m, tiles_n = cdiv(m, t.rows), cdiv(n, t.columns)
    launch(_project_kernel, batch * tiles_m * tiles_n, a.device, address(a), b, c, scores,
           largest, m, n, k, *strides(a, b, c), tiles_m, tiles_n,
           SCORES=order if scores is not None else 0, BM=t.rows, BN=t.columns, BK=t.depth,
           GROUP=t.group, PRECISION=precision(), WIDEN=widened(a), KIND=kind(a),
           ALIGN=alignment(a), num_warps=t.warps, num_stages=t.stages)


_op = define("project(Tensor a, Tensor b, Tensor(a!) c, Tensor(b!)? scores, Tensor? largest, "
             "int order) -> ()", _project)


def project(a: Matrices, b: Tensor, *, dtype: torch.dtype = torch.float32,
            scores: int | None = None, largest: Tensor | None = None, transposed: bool = False,
            backend: str | None = None) -> tuple[Tensor, Tensor | None]:
    """C = A B, and the norms of C's columns.

    Args:
        a: (..., m, k), fp32, bf16 or fp16, any strides; several may lie
            :class:`lissom.kernels.apart.Apart`.
        b: (..., k, n) of a's dtype, any strides, with a's leading dimensions or none.
        dtype: of C.
        scores: 1 for the sums of absolute values of C's columns, 2 for the sums of their squares
            divided by ``largest`` squared, None for neither.
        largest: a positive fp32 number for each matrix, (..., 1, 1) on the device; keeps the
            squares in range.
        transposed: lay C out so that its transpose is contiguous.
        backend: "torch", "triton", or None for Triton on CUDA and torch elsewhere.

    Returns:
        C (..., m, n), and scores (..., n) in fp32 or None.

    Raises:
        TypeError: a dtype is another one.
        ValueError: shapes do not fit, or ``scores`` is none of the above.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    if a.ndim < 2 or b.ndim not in (2, a.ndim) or a.shape[-1] != b.shape[-2] or (
            b.ndim > 2 and b.shape[:-2] != a.shape[:-2]):
        raise ValueError(f"a, b: expected (..., m, k) and (..., k, n), got {tuple(a.shape)} and "
                         f"{tuple(b.shape)}")
    if a.dtype not in FLOATS or b.dtype != a.dtype:
        raise TypeError(f"a, b: expected one dtype of {' or '.join(map(str, FLOATS))}, got "
                        f"{a.dtype} and {b.dtype}")
    if scores not in (None, 1, 2):
        raise ValueError(f"scores: expected None, 1 or 2, got {scores!r}")
    if largest is not None:
        check("largest", largest, shape=(*a.shape[:-2], 1, 1), dtypes=(torch.float32,),
              device=a.device)
    if not use_triton(backend, a.device) or not a.numel() or not b.numel():
        c, columns = project_ref(stack(a), b, dtype=dtype, scores=scores, largest=largest)
        return c.mT.contiguous().mT if transposed else c, columns
    lead, m, n = a.shape[:-2], a.shape[-2], b.shape[-1]
    c = torch.empty((*lead, n, m) if transposed else (*lead, m, n), dtype=dtype, device=a.device)
    c = c.mT if transposed else c
    given: tuple[Any, ...] = (a, b, c)
    a_, b_, c_ = (x if x.ndim == 2 or isinstance(x, Apart) else stacked(x) for x in given)
    t = _tiles(a_, m, n)
    sums = None
    if scores:
        sums = torch.empty((*lead, cdiv(m, t.rows), n), dtype=torch.float32, device=a.device)
    inverse = largest if largest is None else 1 / largest.contiguous()
    if scores == 2 and inverse is None:
        inverse = torch.ones((*lead, 1, 1), device=a.device)
    (_project if isinstance(a, Apart) else _op)(a_, b_, c_, sums, inverse, scores or 0)
    return c, None if sums is None else sums.sum(-2)
