"""Blockwise dynamic quantization of moments to 8 or 4 bits.

Blocks of 256 run along the last dimension and restart at each row, so that a shard of rows never
cuts a block. A block is stored as its largest magnitude and, for each element, the index of the
nearest value of a codebook in [-1, 1] (first moments) or [0, 1] (second moments), two 4-bit
codes to a byte, low half first.

The codebooks spend their entries on a dynamic exponent and what bits are left on a fraction:
Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561; Dettmers et
al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861. At 8 bits they are those of
bitsandbytes. The unsigned one of 4 bits has no zero, which would make a second moment vanish
beside a first one that does not: Li et al., "Memory Efficient Optimizers with 4-bit States",
arXiv 2309.01507.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .linear import BLOCK, pack4, unpack4

__all__ = ["codebook", "dequantize_dynamic_ref", "quantize_dynamic_ref"]


@functools.lru_cache(maxsize=32)
def codebook(bits: int, signed: bool, device: torch.device) -> Tensor:
    """The values that codes stand for, ascending, fp32. Cached; not to be written to.

    Args:
        bits: 8 or 4.
        signed: for first moments; else for second ones.
        device: where it is used.
    """
    if bits == 4 and not signed:
        return torch.linspace(0, 1, 17, dtype=torch.float32)[1:].to(device)
    exponents = bits - 1
    values = [0.0, 1.0]
    for i in range(exponents):
        # The fractions between two powers of ten, as centres of equal intervals.
        ends = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        fractions = (10 ** (i - exponents + 1) * (ends[:-1] + ends[1:]) / 2).tolist()
        values += fractions
        if signed:
            values += [-x for x in fractions]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=32)
def _search(bits: int, signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """A table over the upper half of a float's bits, and the upper ends of the codes' cells.

    The table gives the code of the smallest number with that upper half. No two cell ends share
    an upper half, so one comparison settles the code.
    """
    book = codebook(bits, signed, torch.device("cpu")).double()
    ends = torch.cat([(book[:-1] + book[1:]) / 2, torch.tensor([torch.inf]).double()]).float()
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    # Of a negative number the smallest has all lower bits set.
    lowest = torch.where(upper < 0, (upper << 16) | 0xFFFF, upper << 16).view(torch.float32)
    table = torch.bucketize(lowest.nan_to_num(0.0), ends[:-1])
    return table.to(device=device, dtype=torch.int32), ends.to(device)


def quantize_dynamic_ref(x: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of x.

    Args:
        x: (..., columns), fp32. A NaN or Inf spoils its block.
        bits: 8 or 4.
        signed: which codebook.

    Returns:
        uint8 codes (..., columns), or (..., ceil(columns / 2)) at 4 bits, and fp32 scales
        (..., ceil(columns / 256)).
    """
    columns = x.shape[-1]
    scales, parts = [], []
    table, ends = _search(bits, signed, x.device)
    for part in _blocks(x):
        scale = part.abs().amax(-1) if part.numel() else part.new_zeros(part.shape[:-1])
        unit = part / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        upper = (unit.view(torch.int32) >> 16).add_(1 << 15)
        code = table.index_select(0, upper.view(-1))
        code += unit.view(-1) > ends.index_select(0, code)
        parts.append(code.view(part.shape).flatten(-2))
        scales.append(scale)
    codes = (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(torch.uint8)
    scale = scales[0] if len(scales) == 1 else torch.cat(scales, -1)
    return (codes if bits == 8 else pack4(codes)), scale.view(*x.shape[:-1], -(-columns // BLOCK))


def _blocks(x: Tensor) -> list[Tensor]:
    """Whole blocks (..., k, 256), and the rest of each row (..., 1, columns % 256)."""
    columns = x.shape[-1]
    whole = columns - columns % BLOCK
    parts = []
    if whole or not columns:
        parts.append(x[..., :whole].contiguous().unflatten(-1, (whole // BLOCK, BLOCK)))
    if columns > whole:
        parts.append(x[..., whole:].contiguous().unsqueeze(-2))
    return parts


def dequantize_dynamic_ref(codes: Tensor, scale: Tensor, columns: int, bits: int, signed: bool
                           ) -> Tensor:
    """The fp32 tensor (..., columns) that the codes stand for."""
    if bits == 4:
        codes = unpack4(codes, columns)
    book = codebook(bits, signed, codes.device)
    x = book.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    whole = columns - columns % BLOCK
    if whole:
        x[..., :whole].unflatten(-1, (-1, BLOCK)).mul_(scale[..., : whole // BLOCK, None])
    if columns > whole:
        x[..., whole:].mul_(scale[..., -1:])
    return x
