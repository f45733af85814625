"""An fp32 weight in two parts: the nearest bf16, and 8 or 16 of the bits below it.

    bits(fp32) = bits(bf16) 2^16 + high 2^8 + low

with high a signed byte, and low the byte below it, which is 0 where it is not kept. Nearest is away
from zero where two are as near. Source: the split of master weights as in FlashOptim
(databricks/flashoptim).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._triton import cdiv, check, define, jit, launch, signed32, tl, use_triton
from .apart import Apart, Matrices
from .philox import (
    WEIGHT_STREAM,
    nearest,
    random16_rows,
    random16_tile,
    random_bits16_ref,
    random_place,
    round_bf16,
    round_fp16,
)

__all__ = ["check_below", "join", "join_ref", "load_weight", "pair", "random_split_ref", "split",
           "split_ref", "store_weight"]

# What is kept below a bf16 weight.
_BELOW = (("high", torch.int8), ("low", torch.uint8))
# Elements of one program.
_TILE = 1024
# Bits of the largest number to be split: above it the nearest bf16, or what 8 more bits are rounded
# to, would be infinite.
_TOP = 0x7F7F7E00


def pair(below: Sequence[Any]) -> tuple[Any, Any]:
    """``high`` and ``low`` of what is kept below a weight, None for what is not."""
    high, low, *_ = *below, None, None
    return high, low


def join_ref(p: Tensor, high: Tensor, low: Tensor | None = None) -> Tensor:
    """Define :func:`join`."""
    bits = (p.contiguous().view(torch.int16).int() << 16) + (high.int() << 8)
    if low is not None:
        bits += low
    return bits.view(torch.float32)


def split_ref(x: Tensor, p: Tensor, high: Tensor, low: Tensor | None = None,
              random: Tensor | None = None) -> None:
    """Define :func:`split`, with its random bits."""
    top = torch.full((), _TOP, dtype=torch.int32, device=x.device).view(torch.float32)
    bits = torch.where(x.isfinite(), torch.minimum(torch.maximum(x, -top), top), x
                       ).contiguous().view(torch.int32)
    if low is None:  # 24 bits of fp32 stay
        bits = (bits + (128 if random is None else random >> 8)) & -256
    upper = (bits + 0x8000) >> 16
    rest = bits - (upper << 16)
    finite = x.isfinite()
    p.copy_(torch.where(finite, upper.to(torch.int16).view(torch.bfloat16), x.bfloat16()))
    rest = torch.where(finite, rest, 0)
    high.copy_(rest >> 8)
    if low is not None:
        low.copy_(rest & 255)


def random_split_ref(x: Tensor, p: Tensor, high: Tensor, low: Tensor | None,
                     key: tuple[int, int] | None, t: int | Tensor, start: int) -> None:
    """:func:`split_ref` with the random bits of a weight; with none for ``key`` None or ``low``."""
    bits = None
    if key is not None and low is None:
        bits = random_bits16_ref(start, x.numel(), key, (t, WEIGHT_STREAM), x.device).view(x.shape)
    split_ref(x, p, high, low, bits)


@jit
def _joined(p: tl.tensor, high: tl.tensor) -> tl.tensor:
    """The bits of an fp32 weight, those of ``low`` missing."""
    return (p.to(tl.int16, bitcast=True).to(tl.int32) << 16) + (high.to(tl.int32) << 8)


@jit
def _parts(x: tl.tensor, random: tl.tensor, BELOW: tl.constexpr, TOP: tl.constexpr = _TOP
           ) -> tl.tensor:
    """The bf16 part, and the bits below it; with 8 of them 16 random ones round."""
    all_bits = x.to(tl.int32, bitcast=True)
    size = all_bits & 2147483647
    bits = (all_bits & -2147483648) | tl.where(size > TOP, TOP, size)
    if BELOW == 8:
        bits = (bits + (random >> 8)) & -256
    # Infinities and NaN have nothing below them.
    bits = tl.where(size < 0x7F800000, bits, all_bits & -65536)
    upper = (bits + 0x8000) >> 16
    return upper.to(tl.int16).to(tl.bfloat16, bitcast=True), bits - (upper << 16)


@jit
def load_weight(ptr: tl.tensor, high_ptr: tl.tensor, low_ptr: tl.tensor, offset: tl.tensor,
                mask: tl.tensor, BELOW: tl.constexpr) -> tl.tensor:
    """A weight in fp32, with the 0, 8 or 16 bits that are kept below it."""
    p = tl.load(ptr + offset, mask=mask, other=0.0)
    if BELOW == 0:
        return p.to(tl.float32)
    else:
        bits = _joined(p, tl.load(high_ptr + offset, mask=mask, other=0))
        if BELOW == 16:
            bits += tl.load(low_ptr + offset, mask=mask, other=0).to(tl.int32)
        return bits.to(tl.float32, bitcast=True)


@jit
def store_weight(x: tl.tensor, ptr: tl.tensor, high_ptr: tl.tensor, low_ptr: tl.tensor,
                 offset: tl.tensor, mask: tl.tensor, index: tl.tensor, seed: tl.tensor,
                 parameter: tl.tensor, step: tl.tensor, BELOW: tl.constexpr,
                 STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr,
                 STREAM: tl.constexpr = WEIGHT_STREAM) -> None:
    """Rows [R, W] of a weight, from each index [R] on, and the bits that are kept below it.

    Rounded at random, by the stream of weights, or to nearest; x is a result, whose NaN are quiet.
    """
    if STOCHASTIC:
        random = random16_tile(index, seed, parameter, step, STREAM, ALIGNED, W)
    else:
        random = 128 << 8  # a half of what is rounded away below 8 bits
    if BELOW > 0:
        x, rest = _parts(x, random, BELOW)
        tl.store(high_ptr + offset, (rest >> 8).to(tl.int8), mask=mask)
        if BELOW == 16:
            tl.store(low_ptr + offset, (rest & 255).to(tl.uint8), mask=mask)
    elif not STOCHASTIC:
        x = nearest(x, ptr)
    elif ptr.dtype.element_ty == tl.bfloat16:
        x = round_bf16(x, random)
    else:
        x = round_fp16(x, random)
    tl.store(ptr + offset, x, mask=mask)


@jit
def _join_kernel(p_ptr: tl.tensor, high_ptr: tl.tensor, low_ptr: tl.tensor, out_ptr: tl.tensor,
                 count: tl.tensor, BELOW: tl.constexpr, TILE: tl.constexpr) -> None:
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = i < count
    tl.store(out_ptr + i, load_weight(p_ptr, high_ptr, low_ptr, i, mask, BELOW), mask=mask)


@jit
def _split_kernel(x_ptr: tl.tensor, p_ptr: tl.tensor, high_ptr: tl.tensor, low_ptr: tl.tensor,
                  count: tl.tensor, start: tl.tensor, seed: tl.tensor, parameter: tl.tensor,
                  step: tl.tensor, BELOW: tl.constexpr, STOCHASTIC: tl.constexpr,
                  HELD: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
                  STREAM: tl.constexpr = WEIGHT_STREAM) -> None:
    i, mask, block = random_place(start, count, ALIGNED, TILE)
    x = tl.load(x_ptr + i, mask=mask, other=0.0)
    x = tl.where(x == x, x, float("nan"))
    if STOCHASTIC:
        if HELD:
            step = tl.load(step).to(tl.int32)
        random = random16_rows(block, seed, parameter, step, STREAM)
    else:
        random = 128 << 8
    p, rest = _parts(x, random, BELOW)
    tl.store(p_ptr + i, p, mask=mask)
    tl.store(high_ptr + i, (rest >> 8).to(tl.int8), mask=mask)
    if BELOW == 16:
        tl.store(low_ptr + i, (rest & 255).to(tl.uint8), mask=mask)


def _join(p: Tensor, high: Tensor, low: Tensor | None, out: Tensor, triton: bool) -> None:
    if not triton:
        out.copy_(join_ref(p, high, low))
    elif p.numel():
        launch(_join_kernel, cdiv(p.numel(), _TILE), p.device, p, high, low, out, p.numel(),
               BELOW=8 if low is None else 16, TILE=_TILE)


def _split(x: Tensor, p: Tensor, high: Tensor, low: Tensor | None, key: list[int], random: bool,
           t: int, start: int, triton: bool, held_t: Tensor | None = None) -> None:
    """``held_t`` is t in a tensor."""
    if not triton:
        random_split_ref(x, p, high, low, (key[0], key[1]) if random else None,
                         t if held_t is None else held_t, start)
    elif x.numel():
        tiles = cdiv(start % 8 + x.numel(), _TILE)
        launch(_split_kernel, tiles, x.device, x, p, high, low, x.numel(), start,
               *map(signed32, key), signed32(t) if held_t is None else held_t,
               BELOW=8 if low is None else 16, STOCHASTIC=random, HELD=held_t is not None,
               ALIGNED=start % 8 == 0, TILE=_TILE)
        torch.autograd.graph.increment_version([y for y in (p, high, low) if y is not None])


_join_op = define("join(Tensor p, Tensor high, Tensor? low, Tensor(a!) out, bool triton) -> ()",
                  _join)
_split_op = define("split(Tensor x, Tensor(a!) p, Tensor(b!) high, Tensor(c!)? low, int[] key, "
                   "bool random, SymInt t, SymInt start, bool triton, Tensor? held_t=None) -> ()",
                   _split)


def check_below(p: Matrices, below: Sequence[Matrices]) -> None:
    """Raise if these are not what is kept below a weight: nothing, its ``high``, or ``low`` too.

    Raises:
        TypeError, ValueError: the message gives expected and received.
    """
    if len(below) > len(_BELOW):
        raise ValueError(f"below: expected up to {len(_BELOW)} tensors, got {len(below)}")
    for x in below:
        if isinstance(x, Apart) != isinstance(p, Apart):
            raise TypeError(f"below: expected {type(p).__name__} as for p, got {type(x).__name__}")
    if below:
        check("p", p, shape=tuple(p.shape), dtypes=(torch.bfloat16,), device=p.device)
    for (name, dtype), x in zip(_BELOW, below, strict=False):
        check(name, x, shape=tuple(p.shape), dtypes=(dtype,), device=p.device)


def join(p: Tensor, high: Tensor, low: Tensor | None = None, *, backend: str | None = None
         ) -> Tensor:
    """The fp32 weight.

    Args:
        p: its bf16 part, contiguous, any shape.
        high: int8 of p's shape.
        low: uint8 of p's shape, or None where 8 bits are kept.
        backend: "torch", "triton", or None for Triton on CUDA and torch elsewhere.

    Raises:
        TypeError: a dtype is another one.
        ValueError: shapes differ, or a tensor is not contiguous.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    check_below(p, (high,) if low is None else (high, low))
    out = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    _join_op(p, high, low, out, use_triton(backend, p.device))
    return out


def split(x: Tensor, p: Tensor, high: Tensor, low: Tensor | None = None, *,
          key: tuple[int, int] | None = None, t: int | Tensor = 1, start: int = 0,
          backend: str | None = None) -> None:
    """Write an fp32 weight to its parts; infinities and NaN go to p alone.

    Args:
        x: fp32, contiguous; finite numbers beyond 3.393e38 become that.
        p: where its nearest bf16 goes.
        high: as for :func:`join`.
        low: likewise.
        key: (seed, parameter) of the random bits that round to 8 bits more than bf16; None rounds
            them to nearest. With ``low`` all bits are kept.
        t: the random stream's step: a number, or a 0-d int64 tensor on the device.
        start: index in the whole parameter of x's first element.
        backend: as for :func:`join`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`join`.
    """
    check_below(p, (high,) if low is None else (high, low))
    check("x", x, shape=tuple(p.shape), dtypes=(torch.float32,), device=p.device)
    count, held = (1, t) if isinstance(t, Tensor) else (t, None)
    _split_op(x, p, high, low, key or (0, 0), key is not None and low is None, count, start,
              use_triton(backend, p.device), held)
