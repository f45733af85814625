"""Norms of gradients of any size: neither 1e30 nor 1e-30 leaves the range of the sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels._triton import use_triton
from ..kernels.apart import Apart, Matrices
from ..kernels.fakes import is_fake
from ..kernels.norms import row_norms
from . import codec
from .apply import block_rows

if TYPE_CHECKING:
    from .sharding import Rows

__all__ = ["ALONG", "norms", "sizes"]

#: Dimensions of (..., m, n) along which norms are taken, by the side that is projected.
ALONG = {"left": (-2,), "right": (-1,), "full": (-2, -1)}


def sizes(x: Matrices, side: str, rows: Rows | None) -> Tensor:
    """:func:`norms` of a whole matrix, where x may have only this rank's rows; then collective."""
    found = norms(x, side)
    if rows is None or side == "right":
        return found
    return rows.sum(found.square()).sqrt()


def norms(x: Matrices, side: str) -> Tensor:
    """Euclidean norms along the dimensions of a side, kept as 1, in float64.

    Squares of entries near 1e30 overflow in fp32, and the differences of squares that callers take
    cancel. On the CPU, where a sum in float64 takes several times as long, fp32 sums are taken
    where they are in range.
    """
    dim = ALONG[side]
    norm: Tensor
    if x.numel() and x.dtype != torch.float64 and use_triton(None, x.device):
        norm = row_norms(x.mT if side == "left" else x)
        if side == "full":
            norm = torch.linalg.vector_norm(norm, dim=-1)
            return norm[..., None, None]
        return norm.unsqueeze(dim[0])
    assert not isinstance(x, Apart), "several matrices are there where kernels work on them"
    if (x.device.type != "cpu" or x.dtype == torch.float64 or not x.numel()
            or torch.compiler.is_compiling() or is_fake(x)):
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float64)
        return norm
    if side == "left":
        square = sum(codec.wide(part).square().sum(-2, keepdim=True, dtype=torch.float32)
                     for part in torch.split(x, block_rows(x), -2))
        assert isinstance(square, Tensor)
        norm = square.double().sqrt()
    else:
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32).double()
    low, high = torch.aminmax(norm)
    if low.item() < 1e-15 or not high.item() < 1e18:
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float64)
    return norm
