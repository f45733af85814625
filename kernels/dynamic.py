"""Blockwise dynamic quantization of moments to 8 or 4 bits.

Blocks of 256 run along the last dimension and restart at each row, so that a shard of rows never
cuts a block. A block is stored as its largest magnitude and, for each element, the index of the
nearest value of a codebook in [-1, 1] (first moments) or [0, 1] (second moments), two 4-bit
codes to a byte, low half first.

The codebooks spend their entries on a dynamic exponent and what bits are left on a fraction:
Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561; Dettmers et
al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861. At 8 bits they are those of
bitsandbytes. A second moment rounded to zero beside a first moment that is not zero would move the
weight by M / eps, thousands of times the learning rate. So the unsigned codebook of 4 bits has no
zero (Li et al., "Memory Efficient Optimizers with 4-bit States", arXiv 2309.01507), and in that of
8 bits only zero gets the code of zero; numbers nearest to zero get the smallest positive code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._triton import INTERPRETED, check, define, jit, launch, tl, use_triton
from .blocks import (
    BLOCK,
    WARPS,
    block_place,
    check_store,
    code_bytes,
    cut,
    load_codes,
    pack4,
    store_codes,
    store_shapes,
)
from .fakes import table

__all__ = ["block_codes", "block_values", "codebook", "dequantize_dynamic",
           "dequantize_dynamic_ref", "lines", "quantize_dynamic", "quantize_dynamic_ref"]

# What the largest number of a block becomes before its code is looked for. Cells of a codebook have
# one width between two powers of ten, and half of it at the top. With a number from 1.2545 to
# 1.2585 (others from 1 to 2 were tried) no line below has to count cells of two widths.
_TOP = 1.256
# Lines are for numbers from 2^-31 on, and for 32 powers of two.
_LOWEST, _OCTAVES = -31, 32
# 1.5 * 2^23: a sum with it is rounded to an integer, ties to even, which its lowest bits are.
_ROUND = 12582912.0


@table
def codebook(bits: int, signed: bool, device: torch.device) -> Tensor:
    """The values that codes stand for, ascending, fp32. Cached; not to be written to.

    Args:
        bits: 8 or 4.
        signed: for first moments; else for second ones.
        device: where it is used.
    """
    if bits == 4 and not signed:
        return torch.linspace(0, 1, 17, dtype=torch.float32, device="cpu")[1:].to(device)
    exponents = bits - 1
    values = [0.0, 1.0]
    for i in range(exponents):
        # The fractions between two powers of ten, as centres of equal intervals.
        ends = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32,
                              device="cpu")
        fractions = (10 ** (i - exponents + 1) * (ends[:-1] + ends[1:]) / 2).tolist()
        values += fractions
        if signed:
            values += [-x for x in fractions]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _per_octave(signed: bool) -> int:
    """Lines for each power of two."""
    return 8 if signed else 16


def _zero_apart(bits: int, signed: bool) -> bool:
    """Whether only zero has the code of zero: in the second moments' codebook of 8 bits."""
    return bits == 8 and not signed


@table
def lines(bits: int, signed: bool, device: torch.device) -> Tensor:
    """Straight lines that count the positive cell ends below a number.

    Each power of two from 2^-31 to 1 has 8 of them (signed) or 16; smaller numbers count as 2^-31.
    Rounded to the nearest integer, slope x + level is the count. It changes in the middle between
    two values of the codebook times 1.256, to within 2^-20 of that: :func:`_ends` says where.

    Returns:
        Slopes and levels, a pair of fp32 in each int64 of (256,), or (512,) if not signed.
    """
    ends = _middles(bits, signed)
    positive = ends[ends > 0].tolist()
    both = []
    each = _per_octave(signed)
    for octave in range(_LOWEST, _LOWEST + _OCTAVES):
        for i in range(each):
            low, high = (2.0**octave * (1 + x / each) for x in (i, i + 1))
            inside = [x for x in positive if low <= x < high]
            both.append(_line(sum(x < low for x in positive), inside, low, high))
    made = torch.tensor(both, dtype=torch.float32, device="cpu").view(torch.int64).view(-1)
    return made.to(device)


def _middles(bits: int, signed: bool) -> Tensor:
    """The middles between the values of a codebook times 1.256, fp64, on the CPU."""
    book = _TOP * codebook(bits, signed, torch.device("cpu")).double()
    middles = (book[:-1] + book[1:]) / 2
    if _zero_apart(bits, signed):
        middles[0] = 2.0 ** (_LOWEST - 1)  # below all lines: each counts it
    return middles


def _line(before: int, ends: list[float], low: float, high: float) -> tuple[float, float]:
    """Slope and level of a line from low to high that is half an integer above ``before`` at the
    first of these ends, and one more at each that follows.
    """
    if not ends:
        return 0.0, float(before)
    if len(ends) == 1:  # neither a half less than before, nor one and a half more
        slope = 0.9 / max(ends[0] - low, high - ends[0])
    else:
        slope = (len(ends) - 1) / (ends[-1] - ends[0])
    return slope, before + 0.5 - slope * ends[0]


def _codes(unit: Tensor, bits: int, signed: bool) -> Tensor:
    """Codes (int32) of fp32 numbers in [-1.256, 1.256], those of :func:`block_codes`."""
    table = lines(bits, signed, unit.device).view(torch.float32).view(-1, 2)
    each = _per_octave(signed)
    size = (unit.abs() if signed else unit).clamp_min(2.0**_LOWEST)
    place = size.view(torch.int32) // ((1 << 23) // each) - (127 + _LOWEST) * each
    slope, level = table[place].unbind(-1)
    count = (size.double() * slope + level).float().double()  # rounded once, as all that follows
    if signed:
        count = count.copysign(unit) + (2 ** (bits - 1) - 1)
    elif _zero_apart(bits, signed):
        count = count.where(unit > 0, 0.0)
    return count.round().int().clamp_min(0)


def _ends(bits: int, signed: bool) -> Tensor:
    """The largest number of each code but the last, fp32, on the CPU."""
    middles = _middles(bits, signed).float()
    # The 16 numbers before a middle, itself, and the 16 that follow, in order.
    steps = torch.arange(-16, 17, dtype=torch.int32, device="cpu")
    bits_of = middles.view(torch.int32).unsqueeze(-1)
    near = torch.where(bits_of < 0, bits_of - steps, bits_of + steps).view(torch.float32)
    code = torch.arange(len(middles), device="cpu").unsqueeze(-1)
    below = (_codes(near, bits, signed) <= code).sum(-1, keepdim=True)
    inside = (below > 0) & (below < len(steps))
    apart = _zero_apart(bits, signed)
    if not bool(inside[apart:].all()):
        raise AssertionError(f"bits={bits}, signed={signed}: lines that miss ends of cells")
    ends = near.gather(-1, below.clamp_min(1) - 1).squeeze(-1)
    if apart:
        ends[0] = 0.0
    return ends


@table
def _carries(bits: int, signed: bool, device: torch.device) -> Tensor:
    """Table of a search as one sum of integers: code = (table[upper] + ordered) >> 16.

    Finds the nearest code without comparisons: the upper 16 bits of a number pick the code of its
    cell, and adding the lower 16 bits carries into the code exactly where the number is beyond the
    cell's end. ``upper`` are the upper 16 bits; no two cell ends share them. ``ordered`` are all
    bits, inverted for negative numbers of the signed codebook, so that they rise with the number.
    The entry is code << 16, with the code of the smallest number that has these upper bits, less
    the upper half of ``ordered``, plus 0xFFFF less the lower half of the cell's end, if that end
    has these upper bits.
    """
    ends = functional.pad(_ends(bits, signed), (0, 1), value=torch.inf)
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int64, device="cpu")
    # Of a negative number the smallest has all lower bits set.
    lowest = torch.where(upper < 0, (upper << 16) | 0xFFFF, upper << 16).int().view(torch.float32)
    code = torch.bucketize(lowest.nan_to_num(0.0), ends[:-1])
    end = ends[code].view(torch.int32).long()
    inverted = (upper < 0) & signed
    upper_ordered, end_ordered = (torch.where(inverted, ~x, x) for x in (upper, end))
    carry = (end >> 16 == upper) & ends[code].isfinite()
    entry = (code << 16) - (upper_ordered << 16)
    return (entry + torch.where(carry, 0xFFFF - (end_ordered & 0xFFFF), 0)).int().to(device)


@table
def _twos(bits: int, signed: bool, device: torch.device) -> Tensor:
    """The values of each pair of codes, two fp32 in one int64, at index low + high * 2^bits."""
    # On the host: work on a GPU would be ordered only on the first caller's stream.
    book = codebook(bits, signed, torch.device("cpu"))
    low, high = book.repeat(len(book)), book.repeat_interleave(len(book))
    return torch.stack([low, high], -1).view(torch.int64).view(-1).to(device)


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
    table = _carries(bits, signed, x.device)
    for part in _blocks(x):
        unit = part.abs()
        scale = unit.amax(-1) if part.numel() else part.new_zeros(part.shape[:-1])
        inverse = torch.full_like(scale, _TOP).div_(scale.clamp_min(torch.finfo(scale.dtype).tiny))
        torch.mul(part, inverse.unsqueeze(-1), out=unit)
        ordered = unit.view(torch.int32)
        upper = (ordered >> 16).add_(1 << 15)
        code = table.index_select(0, upper.view(-1)).view(part.shape)
        if signed:
            ordered ^= torch.bitwise_right_shift(ordered, 31, out=upper)
        parts.append(code.add_(ordered).bitwise_right_shift_(16).flatten(-2))
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
    *rows, width = codes.shape
    # Two codes are looked up at once: those of a byte, or bytes two by two.
    if bits == 4:
        twos = _twos(bits, signed, codes.device).index_select(0, codes.reshape(-1).int())
        x = twos.view(torch.float32).view(*rows, 2 * width)[..., :columns].contiguous()
    elif codes.is_contiguous() and not codes.numel() % 2 and not codes.storage_offset() % 2:
        two = codes.view(-1).view(torch.uint16).to(torch.int32)
        x = _twos(bits, signed, codes.device).index_select(0, two).view(torch.float32)
        x = x.view(codes.shape)
    else:
        book = codebook(bits, signed, codes.device)
        x = book.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    whole = columns - columns % BLOCK
    if whole:
        x[..., :whole].unflatten(-1, (-1, BLOCK)).mul_(scale[..., : whole // BLOCK, None])
    if columns > whole:
        x[..., whole:].mul_(scale[..., -1:])
    return x


@jit
def _look_up(table_ptr: tl.tensor, index: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Entries of a table of SIZE, by a gather from shared memory.

    Loads by pointer would have a layout of their own, one element per thread, and index and result
    would have to be converted to it and back.
    """
    table = tl.load(table_ptr + tl.arange(0, SIZE))
    flat = tl.reshape(index, [index.numel])
    return tl.reshape(tl.gather(table, flat, 0), index.shape)


def _fma(x: tl.tensor, y: tl.tensor, z: tl.tensor) -> tl.tensor:
    """x y + z, rounded once."""
    return tl.fma(x, y, z)


def _fma_interpreted(x: tl.tensor, y: tl.tensor, z: tl.tensor) -> tl.tensor:
    """The same, which some versions of the interpreter round twice."""
    return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)


_fused = jit(_fma_interpreted if INTERPRETED else _fma)


@jit
def block_codes(x: tl.tensor, lines_ptr: tl.tensor, BITS: tl.constexpr, SIGNED: tl.constexpr,
                TOP: tl.constexpr = _TOP, LOWEST: tl.constexpr = _LOWEST,
                OCTAVES: tl.constexpr = _OCTAVES, ROUND: tl.constexpr = _ROUND) -> tl.tensor:
    """Codes (int32) and scales of blocks [R, W], zero where there is nothing."""
    # As integers magnitudes are ordered too, and NaN is above all.
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.max(magnitude, 1).to(tl.float32, bitcast=True)  # [R]
    # Unlike a maximum this keeps NaN.
    divisor = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    unit = x * tl.div_rn(tl.full(scale.shape, TOP, tl.float32), divisor)[:, None]
    size = tl.abs(unit) if SIGNED else unit
    size = tl.where(size > 2.0**LOWEST, size, 2.0**LOWEST)  # of NaN too
    LOG: tl.constexpr = 3 if SIGNED else 4  # of the lines for each power of two
    place = (size.to(tl.int32, bitcast=True) >> (23 - LOG)) - ((127 + LOWEST) << LOG)
    line = _look_up(lines_ptr, place, OCTAVES << LOG)
    slope = line.to(tl.int32).to(tl.float32, bitcast=True)
    level = (line >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    count = _fused(size, slope, level)  # of positive ends below, once it is rounded
    if SIGNED:  # the code of 0 is in the middle, and negative numbers count down from it
        sign = unit.to(tl.int32, bitcast=True) & -2147483648
        count = (count.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
        codes = tl.maximum(count + (ROUND + (2**BITS // 2 - 1)), ROUND)
    elif BITS == 8:  # where only zero gets the code of zero
        codes = tl.where(unit > 0, count + ROUND, ROUND)
    else:
        codes = count + ROUND
    return codes.to(tl.int32, bitcast=True) & (2**BITS - 1), scale


@jit
def block_values(codes: tl.tensor, scale: tl.tensor, book_ptr: tl.tensor, BITS: tl.constexpr
                 ) -> tl.tensor:
    """What codes [R, W] and scales [R, 1] or [R, W] stand for."""
    return _look_up(book_ptr, codes, 2**BITS) * scale


@jit
def _quantize_kernel(x_ptr: tl.tensor, codes_ptr: tl.tensor, scale_ptr: tl.tensor,
                     lines_ptr: tl.tensor, rows: tl.tensor, columns: tl.tensor,
                     per_row: tl.tensor, width: tl.tensor, BITS: tl.constexpr,
                     SIGNED: tl.constexpr, R: tl.constexpr, W: tl.constexpr) -> None:
    row, first, block, inside = block_place(rows, per_row, R, W)
    column = first[:, None] + tl.arange(0, W)[None, :]
    mask = inside[:, None] & (column < columns)
    x = tl.load(x_ptr + row[:, None] * columns + column, mask=mask, other=0.0)
    codes, scale = block_codes(x, lines_ptr, BITS, SIGNED)
    store_codes(codes_ptr, codes, row, first, inside, columns, width, BITS, R, W)
    tl.store(scale_ptr + block, scale, mask=inside)


@jit
def _dequantize_kernel(codes_ptr: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor,
                       book_ptr: tl.tensor, rows: tl.tensor, columns: tl.tensor,
                       per_row: tl.tensor, width: tl.tensor, BITS: tl.constexpr, R: tl.constexpr,
                       W: tl.constexpr) -> None:
    row, first, block, inside = block_place(rows, per_row, R, W)
    codes = load_codes(codes_ptr, row, first, inside, width, BITS, W)
    scale = tl.load(scale_ptr + block, mask=inside, other=0.0)
    column = first[:, None] + tl.arange(0, W)[None, :]
    values = block_values(codes, scale[:, None], book_ptr, BITS)
    tl.store(out_ptr + row[:, None] * columns + column, values,
             mask=inside[:, None] & (column < columns))


def _quantize(x: Tensor, codes: Tensor, scale: Tensor, bits: int, signed: bool, triton: bool
              ) -> None:
    if not triton:
        fresh, step = quantize_dynamic_ref(x, bits, signed)
        codes.copy_(fresh)
        scale.copy_(step)
    elif x.numel():
        columns = x.shape[-1]
        at = cut(x.numel() // columns, columns)
        launch(_quantize_kernel, at.programs, x.device, x, codes, scale,
               lines(bits, signed, x.device), at.rows, at.columns, at.per_row,
               code_bytes(at.columns, bits), BITS=bits, SIGNED=signed, R=at.height, W=at.width,
               num_warps=WARPS)
        torch.autograd.graph.increment_version([codes, scale])


def _dequantize(codes: Tensor, scale: Tensor, out: Tensor, bits: int, signed: bool, triton: bool
                ) -> None:
    columns = out.shape[-1]
    if not triton:
        out.copy_(dequantize_dynamic_ref(codes, scale, columns, bits, signed))
    elif out.numel():
        at = cut(out.numel() // columns, columns)
        launch(_dequantize_kernel, at.programs, out.device, codes, scale, out,
               codebook(bits, signed, out.device), at.rows, at.columns, at.per_row,
               code_bytes(at.columns, bits), BITS=bits, R=at.height, W=at.width, num_warps=WARPS)


_quantize_op = define("quantize_dynamic(Tensor x, Tensor(a!) codes, Tensor(b!) scale, int bits, "
                      "bool signed, bool triton) -> ()", _quantize)
_dequantize_op = define("dequantize_dynamic(Tensor codes, Tensor scale, Tensor(a!) out, int bits, "
                        "bool signed, bool triton) -> ()", _dequantize)


def quantize_dynamic(x: Tensor, bits: int, signed: bool, *,
                     out: tuple[Tensor, Tensor] | None = None, backend: str | None = None
                     ) -> tuple[Tensor, Tensor]:
    """Codes and scales of x, those of :func:`quantize_dynamic_ref`.

    Args:
        x: (..., columns), fp32, contiguous. A NaN or Inf spoils its block.
        bits: 8 or 4.
        signed: which codebook.
        out: where codes and scales go, contiguous; None for new tensors.
        backend: "torch", "triton", or None for Triton on CUDA and torch elsewhere.

    Returns:
        uint8 codes (..., columns), or (..., ceil(columns / 2)) at 4 bits, and fp32 scales
        (..., ceil(columns / 256)).

    Raises:
        TypeError: a dtype is another one.
        ValueError: a shape, layout or option is wrong.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    shape = tuple(x.shape)
    check("x", x, shape=shape, dtypes=(torch.float32,), device=x.device)
    shapes = store_shapes(shape, bits)
    if out is None:
        out = (torch.empty(shapes[0], dtype=torch.uint8, device=x.device),
               torch.empty(shapes[1], dtype=torch.float32, device=x.device))
    codes, scale = out
    check_store("codes", codes, scale, shapes, x.device)
    _quantize_op(x, codes, scale, bits, signed, use_triton(backend, x.device))
    return codes, scale


def dequantize_dynamic(codes: Tensor, scale: Tensor, columns: int, bits: int, signed: bool, *,
                       out: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The fp32 tensor (..., columns) that the codes stand for: :func:`dequantize_dynamic_ref`.

    Args:
        codes: as from :func:`quantize_dynamic`, contiguous.
        scale: the scales beside them.
        columns: length of the last dimension, which packed codes do not tell.
        bits: 8 or 4.
        signed: which codebook.
        out: where the result goes, contiguous; None for a new tensor.
        backend: "torch", "triton", or None for Triton on CUDA and torch elsewhere.

    Raises:
        TypeError: a dtype is another one.
        ValueError: a shape, layout or option is wrong.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    shape = (*codes.shape[:-1], columns)
    check_store("codes", codes, scale, store_shapes(shape, bits), codes.device)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=codes.device)
    check("out", out, shape=shape, dtypes=(torch.float32,), device=codes.device)
    _dequantize_op(codes, scale, out, bits, signed, use_triton(backend, codes.device))
    return out
