"""Codes of 8 or 4 bits with a scale for each block of 256: what all quantizations share.

Blocks run along the last dimension and restart at each row, so that a shard of rows never cuts one.
Two 4-bit codes are packed to a byte, low half first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ._triton import INTERPRETED, cdiv, check, jit, tl
from .apart import Matrices

__all__ = ["BLOCK", "WARPS", "Cut", "block_place", "check_store", "code_bytes", "code_shapes",
           "cut", "load_codes", "pack4", "store_codes", "store_shapes", "tile", "unpack4"]

#: Elements that share a scale.
BLOCK = 256
# Elements of one program, eight for each thread: the fastest of several on an H100.
_TILE = 512
WARPS = 2


def code_shapes(shape: tuple[int, ...], bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scales for a tensor of this shape (of one dimension or more)."""
    *rows, columns = shape
    return (*rows, code_bytes(columns, bits)), (*rows, -(-columns // BLOCK))


def pack4(codes: Tensor) -> Tensor:
    """Codes of 0 to 15, two to a byte along the last dimension, low half first."""
    pairs = functional.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2)).to(torch.uint8)
    packed: Tensor = pairs[..., 0] | (pairs[..., 1] << 4)
    return packed


def unpack4(packed: Tensor, columns: int) -> Tensor:
    """The codes that :func:`pack4` packed."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :columns]


def check_store(name: str, codes: Matrices, scale: Matrices | None,
                shapes: tuple[tuple[int, ...], tuple[int, ...]], device: torch.device,
                dtype: torch.dtype = torch.uint8) -> None:
    """Raise if codes and scales are not contiguous ones of :func:`store_shapes`.

    Raises:
        TypeError, ValueError: the message gives expected and received.
    """
    check(name, codes, shape=shapes[0], dtypes=(dtype,), device=device)
    if scale is not None:
        check(f"{name}'s scale", scale, shape=shapes[1], dtypes=(torch.float32,), device=device)


def code_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of codes."""
    return columns if bits >= 8 else (columns + 1) // 2


def store_shapes(shape: tuple[int, ...], bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scales, after a check of both arguments."""
    if bits not in (8, 4):
        raise ValueError(f"bits: expected 8 or 4, got {bits}")
    if not shape:
        raise ValueError("expected a tensor of one dimension or more, got shape ()")
    return code_shapes(shape, bits)


def tile(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of one program's tile; the columns are within one quantization block.

    Raises:
        ValueError: too many columns or tiles for int32.
    """
    if columns >= 2**31:
        raise ValueError(f"expected rows of fewer than 2**31 elements, got {columns}")
    width = 8
    while width < min(columns, BLOCK):
        width *= 2
    if rows * cdiv(columns, width) >= 2**31:
        raise ValueError(f"expected fewer than 2**31 blocks of {width} columns, got {rows} rows of "
                         f"{columns} elements")
    return _TILE // width, width


class Cut(NamedTuple):
    """How a matrix is cut into blocks, and these are shared among programs.

    Args:
        rows: of the matrix, or of its whole blocks, one to a row.
        columns: likewise.
        per_row: blocks of a row.
        height: rows of a program's tile.
        width: columns of a program's tile.
    """

    rows: int
    columns: int
    per_row: int
    height: int
    width: int

    @property
    def programs(self) -> int:
        """How many there are."""
        return cdiv(self.rows * self.per_row, self.height)


def cut(rows: int, columns: int, *, whole: bool = False) -> Cut:
    """The blocks of a matrix; where no row ends within one they are rows themselves, so that a
    program need not divide to find them.

    Args:
        rows: of the matrix.
        columns: likewise.
        whole: rows stay what they are.

    Raises:
        ValueError: too many columns or tiles for int32.
    """
    height, width = tile(rows, columns)
    if columns % BLOCK == 0 and not whole:
        rows, columns = rows * columns // BLOCK, BLOCK
    return Cut(rows, columns, cdiv(columns, width), height, width)


@jit
def block_place(rows: tl.tensor, per_row: tl.tensor, R: tl.constexpr, W: tl.constexpr) -> tl.tensor:
    """The R blocks of a program: their rows, first columns, numbers, and which of them exist."""
    # In int32, where a division takes a tenth of the instructions of int64; none is left of one by
    # 1, on which kernels are specialized.
    block = tl.program_id(0) * R + tl.arange(0, R)  # [R]
    row = block // per_row
    return row.to(tl.int64), (block - row * per_row) * W, block, row < rows


def _bytes(x: tl.tensor) -> tl.tensor:
    """uint8 to int32, by one instruction each."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $4, 0, 0x4440; prmt.b32 $1, $4, 0, 0x4441; prmt.b32 $2, $4, 0, 0x4442; "
        "prmt.b32 $3, $4, 0, 0x4443;", "=r,=r,=r,=r,r", [x], dtype=tl.int32, is_pure=True, pack=4)


def _bytes_interpreted(x: tl.tensor) -> tl.tensor:
    return x.to(tl.int32)


_from_bytes = jit(_bytes_interpreted if INTERPRETED else _bytes)


@jit
def load_codes(ptr: tl.tensor, row: tl.tensor, first: tl.tensor, inside: tl.tensor,
               width: tl.tensor, BITS: tl.constexpr, W: tl.constexpr, EMPTY: tl.constexpr = 0
               ) -> tl.tensor:
    """Codes of [R] blocks: int32 [R, W]; a row of them is ``width`` bytes. Beyond it are zeros, at
    8 bits ``EMPTY``.
    """
    if BITS == 8:
        column = first[:, None] + tl.arange(0, W)[None, :]
        mask = inside[:, None] & (column < width)
        codes = tl.load(ptr + row[:, None] * width + column, mask=mask, other=EMPTY)
        return _from_bytes(codes) if ptr.dtype.element_ty == tl.uint8 else codes.to(tl.int32)
    else:
        byte = first[:, None] // 2 + tl.arange(0, W // 2)[None, :]
        mask = inside[:, None] & (byte < width)
        packed = tl.load(ptr + row[:, None] * width + byte, mask=mask, other=0).to(tl.int32)
        return tl.interleave(packed & 15, packed >> 4)


@jit
def store_codes(ptr: tl.tensor, codes: tl.tensor, row: tl.tensor, first: tl.tensor,
                inside: tl.tensor, columns: tl.tensor, width: tl.tensor, BITS: tl.constexpr,
                R: tl.constexpr, W: tl.constexpr) -> None:
    """Store int32 codes [R, W] of [R] blocks; a row of ``columns`` is ``width`` bytes."""
    column = first[:, None] + tl.arange(0, W)[None, :]
    mask = inside[:, None] & (column < columns)
    if BITS == 8:
        tl.store(ptr + row[:, None] * columns + column, codes.to(tl.uint8), mask=mask)
    else:
        # The half byte after an odd row is zero.
        low, high = tl.split(tl.reshape(tl.where(mask, codes, 0), [R, W // 2, 2]))
        byte = first[:, None] // 2 + tl.arange(0, W // 2)[None, :]
        tl.store(ptr + row[:, None] * width + byte, (low | (high << 4)).to(tl.uint8),
                 mask=inside[:, None] & (byte < width))
