"""Linear block quantization to 8 or 4 bits, for values without long tails: bases, error feedback.

Blocks of 256 run along the last dimension and restart at each row, so that a shard of rows never
cuts a block. A block is stored as round(x (1 / scale)) with scale = absmax / 127 (or / 7), two
4-bit codes to a byte, low half first. The largest error is scale / 2, but for roundings. Zero is
exact.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._triton import FLOATS, check, define, jit, launch, tl, use_triton
from .apart import Apart, Matrices, address, alignment, item_ptr, kind
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
    unpack4,
)
from .philox import nearest

__all__ = ["dequantize_linear", "dequantize_linear_ref", "quantize_linear", "quantize_linear_ref"]

_LEVELS = {8: 127, 4: 7}
_KINDS = {8: torch.int8, 4: torch.uint8}


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
    # A step is absmax / levels; a denormal step would lose the largest entry.
    # CUDA multiplies by the inverse of a number, and divides by a tensor.
    scale = blocks.abs().amax(-1)
    scale = scale / torch.full_like(scale, levels)
    step = scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    codes = (blocks * step.reciprocal()).round().nan_to_num(0.0).clamp(-levels, levels)
    codes = codes.flatten(-2)[..., :columns].to(torch.int8)
    if bits == 8:
        return codes, scale
    return pack4(codes + 8), scale


def dequantize_linear_ref(codes: Tensor, scale: Tensor, columns: int, bits: int) -> Tensor:
    """The fp32 tensor (..., columns) that the codes stand for."""
    if bits == 4:
        codes = unpack4(codes, columns).to(torch.int8) - 8
    blocks = math.ceil(columns / BLOCK)
    if blocks == 1:
        return codes.float() * scale
    return codes.float() * scale.repeat_interleave(BLOCK, -1)[..., :columns]


@jit
def _quantize_linear_kernel(x_ptr: tl.tensor, codes_ptr: tl.tensor, scale_ptr: tl.tensor,
                            rows: tl.tensor, columns: tl.tensor, per_row: tl.tensor,
                            width: tl.tensor, LEVELS: tl.constexpr, BITS: tl.constexpr,
                            R: tl.constexpr, W: tl.constexpr) -> None:
    row, first, block, inside = block_place(rows, per_row, R, W)
    column = first[:, None] + tl.arange(0, W)[None, :]
    mask = inside[:, None] & (column < columns)
    x = tl.load(x_ptr + row[:, None] * columns + column, mask=mask, other=0.0).to(tl.float32)
    # As integers magnitudes are ordered too, and NaN is above all.
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top = tl.max(magnitude, 1).to(tl.float32, bitcast=True)  # [R]
    scale = tl.div_rn(top, tl.zeros_like(top) + LEVELS)
    # Unlike a maximum this keeps NaN.
    step = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    unit = x * tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)[:, None]
    # Adding 1.5 * 2^23 leaves no bit for a fraction: ties go to the even number.
    unit = (unit + 12582912.0) - 12582912.0
    unit = tl.where(unit == unit, tl.where(unit > LEVELS, LEVELS,
                                           tl.where(unit < -LEVELS, -LEVELS, unit)), 0.0)
    codes = unit.to(tl.int32)
    if BITS == 8:
        tl.store(codes_ptr + row[:, None] * columns + column, codes.to(tl.int8), mask=mask)
    else:
        # The half byte that pads a row of odd length is stored as 0.
        store_codes(codes_ptr, codes + 8, row, first, inside, columns, width, BITS, R, W)
    tl.store(scale_ptr + block, scale, mask=inside)


@jit
def _dequantize_linear_kernel(codes_ptr: tl.tensor, scale_ptr: tl.tensor, out_ptr: tl.tensor,
                              rows: tl.tensor, columns: tl.tensor, per_row: tl.tensor,
                              width: tl.tensor, BITS: tl.constexpr, R: tl.constexpr,
                              W: tl.constexpr, CODES: tl.constexpr = None,
                              ALIGN: tl.constexpr = 1) -> None:
    if CODES is not None:  # several tensors; each program works on a part of one
        item = tl.program_id(1).to(tl.int64)
        codes_ptr = item_ptr(codes_ptr, item, 0, CODES, ALIGN)
        scale_ptr = item_ptr(scale_ptr, item, 0, tl.float32, ALIGN)
        out_ptr += item * (tl.cast(rows, tl.int64) * columns)
    row, first, block, inside = block_place(rows, per_row, R, W)
    codes = load_codes(codes_ptr, row, first, inside, width, BITS, W)
    if BITS == 4:
        codes -= 8
    x = codes.to(tl.float32) * tl.load(scale_ptr + block, mask=inside, other=0.0)[:, None]
    column = first[:, None] + tl.arange(0, W)[None, :]
    tl.store(out_ptr + row[:, None] * columns + column, nearest(x, out_ptr),
             mask=inside[:, None] & (column < columns))


def _quantize(x: Tensor, codes: Tensor, scale: Tensor, bits: int, triton: bool) -> None:
    if not triton:
        fresh, step = quantize_linear_ref(x, bits)
        codes.copy_(fresh)
        scale.copy_(step)
    elif x.numel():
        columns = x.shape[-1]
        at = cut(x.numel() // columns, columns)
        launch(_quantize_linear_kernel, at.programs, x.device, x, codes, scale, at.rows, at.columns,
               at.per_row, code_bytes(at.columns, bits), LEVELS=_LEVELS[bits], BITS=bits,
               R=at.height, W=at.width, num_warps=WARPS)
        torch.autograd.graph.increment_version([codes, scale])


def _dequantize(codes: Matrices, scale: Matrices, out: Tensor, bits: int, triton: bool) -> None:
    """Codes and scales of several tensors are ``Apart``; their values are stacked in ``out``."""
    columns = out.shape[-1]
    if not triton:
        each: Any = zip(codes, scale, out, strict=True) if isinstance(codes, Apart) else [
            (codes, scale, out)]
        for codes_, scale_, out_ in each:
            out_.copy_(dequantize_linear_ref(codes_, scale_, columns, bits))
    elif out.numel():
        count = len(codes) if isinstance(codes, Apart) else 1
        at = cut(out.numel() // columns // count, columns)
        launch(_dequantize_linear_kernel, (at.programs, count), out.device, address(codes),
               address(scale), out, at.rows, at.columns, at.per_row, code_bytes(at.columns, bits),
               BITS=bits, R=at.height, W=at.width, CODES=kind(codes), ALIGN=alignment(codes, scale),
               num_warps=WARPS)


_quantize_op = define("quantize_linear(Tensor x, Tensor(a!) codes, Tensor(b!) scale, int bits, "
                      "bool triton) -> ()", _quantize)
_dequantize_op = define("dequantize_linear(Tensor codes, Tensor scale, Tensor(a!) out, int bits, "
                        "bool triton) -> ()", _dequantize)


def quantize_linear(x: Tensor, bits: int, *, out: tuple[Tensor, Tensor] | None = None,
                    backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of x, those of :func:`quantize_linear_ref`.

    Args:
        x: (..., columns), fp32, bf16 or fp16, contiguous.
        bits: 8 or 4.
        out: where codes and scales go, contiguous; None for new tensors.
        backend: "torch", "triton", or None for Triton on CUDA and torch elsewhere.

    Returns:
        int8 codes of x's shape, or uint8 (..., ceil(columns / 2)) at 4 bits, and fp32 scales
        (..., ceil(columns / 256)).

    Raises:
        TypeError: a dtype is another one.
        ValueError: a shape, layout or option is wrong.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    shape = tuple(x.shape)
    check("x", x, shape=shape, dtypes=FLOATS, device=x.device)
    shapes = store_shapes(shape, bits)
    if out is None:
        out = (torch.empty(shapes[0], dtype=_KINDS[bits], device=x.device),
               torch.empty(shapes[1], dtype=torch.float32, device=x.device))
    codes, scale = out
    check_store("codes", codes, scale, shapes, x.device, _KINDS[bits])
    _quantize_op(x, codes, scale, bits, use_triton(backend, x.device))
    return codes, scale


def dequantize_linear(codes: Matrices, scale: Matrices, columns: int, bits: int, *,
                      dtype: torch.dtype = torch.float32, out: Tensor | None = None,
                      backend: str | None = None) -> Tensor:
    """The tensor (..., columns) that the codes stand for: :func:`dequantize_linear_ref`, rounded.

    Args:
        codes: as from :func:`quantize_linear`, contiguous; those of several tensors may lie
            :class:`lissom.kernels.apart.Apart`, and what they stand for is stacked.
        scale: the scales beside them.
        columns: length of the last dimension, which packed codes do not tell.
        bits: 8 or 4.
        dtype: of a new tensor: fp32, bf16 or fp16.
        out: where the result goes, contiguous, of one of these dtypes; None for a new tensor.
        backend: "torch", "triton", or None for Triton on CUDA and torch elsewhere.

    Raises:
        TypeError: a dtype is another one.
        ValueError: a shape, layout or option is wrong.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    shape, device = (*codes.shape[:-1], columns), codes.device
    check_store("codes", codes, scale, store_shapes(shape, bits), device, _KINDS[bits])
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=device)
    check("out", out, shape=shape, dtypes=FLOATS, device=device)
    run = _dequantize if isinstance(codes, Apart) else _dequantize_op
    run(codes, scale, out, bits, use_triton(backend, device))
    return out
