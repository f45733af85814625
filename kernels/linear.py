"""Linear block quantization to 8 or 4 bits, for values without long tails: bases and residues.

Blocks of 256 run along the last dimension and restart at each row, so that a shard of rows never
cuts a block. A block is stored as round(x / scale) with scale = absmax / 127 (or / 7), two 4-bit
codes to a byte, low half first. The largest error is scale / 2. Zero is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["BLOCK", "dequantize_linear_ref", "linear_shapes", "pack4",
           "quantize_linear_ref", "unpack4"]

#: Elements that share a scale.
BLOCK = 256
_LEVELS = {8: 127, 4: 7}


def linear_shapes(shape: tuple[int, ...], bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scales for a tensor of this shape (of one dimension or more)."""
    *rows, columns = shape
    return (*rows, columns if bits == 8 else -(-columns // 2)), (*rows, -(-columns // BLOCK))


def quantize_linear_ref(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of x.

    Args:
        x: (..., columns), any floating dtype, finite. A NaN or Inf spoils its block.
        bits: 8 or 4.

    Returns:
        int8 codes of x's shape (8 bits) or uint8 (..., ceil(columns / 2)) (4 bits), and fp32
        scales (..., ceil(columns / 256)).
    """
    columns = x.shape[-1]
    levels = _LEVELS[bits]
    blocks = functional.pad(x.float(), (0, -columns % BLOCK)).unflatten(-1, (-1, BLOCK))
    # absmax / levels is what one step is worth; a denormal step would lose the largest entry.
    scale = blocks.abs().amax(-1) / levels
    step = scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    codes = (blocks / step).round().nan_to_num(0.0).clamp(-levels, levels)
    codes = codes.flatten(-2)[..., :columns].to(torch.int8)
    if bits == 8:
        return codes, scale
    return pack4(codes + 8), scale


def pack4(codes: Tensor) -> Tensor:
    """Codes of 0 to 15, two to a byte along the last dimension, low half first."""
    pairs = functional.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2)).to(torch.uint8)
    packed: Tensor = pairs[..., 0] | (pairs[..., 1] << 4)
    return packed


def unpack4(packed: Tensor, columns: int) -> Tensor:
    """The codes that :func:`pack4` packed."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :columns]


def dequantize_linear_ref(codes: Tensor, scale: Tensor, columns: int, bits: int) -> Tensor:
    """The fp32 tensor (..., columns) that the codes stand for."""
    if bits == 4:
        codes = unpack4(codes, columns).to(torch.int8) - 8
    blocks = math.ceil(columns / BLOCK)
    if blocks == 1:
        return codes.float() * scale
    return codes.float() * scale.repeat_interleave(BLOCK, -1)[..., :columns]
