"""Shared parts of the matrix product kernels: inner loop, order of tiles, tile sizes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import INTERPRETED, capability, cdiv, jit, tensor_cores, tl
from .apart import Matrices

__all__ = ["LARGE", "MEDIUM", "SMALL", "WIDE", "Tiles", "by_registers", "dot_tile", "fits",
           "place_tile", "precision", "stacked", "strides", "suited", "tiles_for", "widened"]


class Tiles(NamedTuple):
    """A product is cut into tiles of ``rows`` x ``columns``, with ``depth`` terms at once.

    Within ``group`` rows of tiles, tiles run column by column, so that their input stays in the
    cache.
    """

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int


# With fewer tiles than this an H100's 132 multiprocessors would be idle: the next smaller ones are
# taken. All are the fastest of several on an H100 (other GPUs: `suited`).
_ENOUGH = 120
LARGE = Tiles(128, 256, 64, 8, 8, 3)
MEDIUM = Tiles(128, 128, 64, 8, 4, 3)
SMALL = Tiles(64, 64, 64, 8, 4, 3)
WIDE = Tiles(64, 64, 32, 8, 4, 2)  # fp32: twice the bytes
# Without tensor cores each factor is in registers as often as it is used: more would spill.
_OLD = Tiles(64, 64, 16, 8, 4, 2)


@functools.lru_cache(maxsize=64)
def fits(device: torch.device, size: int) -> bool:
    """Whether a program can have this many bytes of shared memory: up to 227 KiB on an H100, 99 on
    a consumer GPU.
    """
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    return size <= int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))


def by_registers(device: torch.device) -> bool:
    """Whether factors pass through registers on their way to tensor cores, as on an A100 and on
    consumer GPUs; those of an H100 and a B200 read shared memory.
    """
    return device.type == "cuda" and not INTERPRETED and capability(device)[0] not in (9, 10)


def suited(tiles: Tiles, device: torch.device) -> Tiles:
    """Tiles of an H100 as another GPU has them: where factors take registers, half as many terms at
    once, and a stage more. Fewer registers spill, and a consumer GPU's 100 KiB hold two programs of
    a lift (bench.machine). Without tensor cores all are the same small ones.
    """
    if tiles is WIDE or not by_registers(device):
        return tiles
    if not tensor_cores(device):
        return _OLD
    return tiles._replace(depth=tiles.depth // 2, stages=tiles.stages + 1)


def tiles_for(x: Matrices, batch: int, m: int, n: int,
              sizes: tuple[Tiles, ...] = (LARGE, MEDIUM)) -> Tiles:
    """Tiles of a product of 16-bit panels, or of fp32 ones.

    Args:
        x: a factor; only its dtype and device are used.
        batch: number of products.
        m: rows of a product.
        n: its columns.
        sizes: candidates; the first that fits the device and gives enough tiles is taken, else
            small tiles. They are returned as they are :func:`suited`.
    """
    if x.dtype == torch.float32:
        return WIDE
    for t in (suited(t, x.device) for t in sizes):
        if batch * cdiv(m, t.rows) * cdiv(n, t.columns) >= _ENOUGH and fits(
                x.device, 2 * t.stages * t.depth * (t.rows + t.columns)):
            return t
    return suited(SMALL, x.device)


def precision() -> str:
    """Precision of fp32 products: that of torch's own on CUDA (TF32 or not)."""
    # torch 2.9 added this setting; once it is set, reading the older one raises.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:
        setting = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if setting == "tf32" else "ieee"


def in_tf32(x: Tensor) -> bool:
    """Whether torch may take products of x in TF32, which has three digits."""
    return x.is_cuda and x.dtype == torch.float32 and precision() == "tf32"


def widened(x: Matrices) -> bool:
    """Whether a kernel must multiply in fp32: the interpreter treats bf16 as integers."""
    return INTERPRETED and x.dtype == torch.bfloat16


def stacked(x: Tensor) -> Tensor:
    """(..., m, n) as (batch, m, n)."""
    return x.flatten(0, -3) if x.ndim > 2 else x.unsqueeze(0)


def strides(*given: Matrices | None) -> list[int]:
    """Three strides of each: from matrix to matrix (0 for a single one), row to row, column to
    column; zeros for None.
    """
    return [s for x in given for s in ((0, 0, 0) if x is None else x.stride() if x.ndim == 3 else
                                       (0, *x.stride()))]


@jit
def place_tile(place: tl.tensor, rows: tl.tensor, columns: tl.tensor, GROUP: tl.constexpr
               ) -> tl.tensor:
    """Row and column of the tile that a program has, of rows x columns tiles."""
    group = place // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    inside = place % (GROUP * columns)
    return group * GROUP + inside % height, inside // height


@jit
def dot_tile(left_ptr: tl.tensor, right_ptr: tl.tensor, row: tl.tensor, column: tl.tensor,
             m: tl.tensor, n: tl.tensor, k: tl.tensor, left_row: tl.tensor, left_column: tl.tensor,
             right_row: tl.tensor, right_column: tl.tensor, BM: tl.constexpr, BN: tl.constexpr,
             BK: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr) -> tl.tensor:
    """A tile of the product of an m x k and a k x n matrix, in fp32; zero beyond its ends.

    row is int64 [BM], column int64 [BN]; the result is [BM, BN].
    """
    term = tl.arange(0, BK).to(tl.int64)  # [BK]
    left = left_ptr + row[:, None] * left_row + term[None, :] * left_column  # [BM, BK]
    right = right_ptr + term[:, None] * right_row + column[None, :] * right_column  # [BK, BN]
    total = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, k, BK):
        inside = term < k - start
        x = tl.load(left, mask=(row < m)[:, None] & inside[None, :], other=0.0)
        y = tl.load(right, mask=inside[:, None] & (column < n)[None, :], other=0.0)
        if WIDEN:
            x, y = x.to(tl.float32), y.to(tl.float32)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        left += BK * tl.cast(left_column, tl.int64)
        right += BK * tl.cast(right_row, tl.int64)
    return total
