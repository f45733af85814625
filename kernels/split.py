"""An fp32 weight in two parts: the nearest bf16, and 8 or 16 of the bits below it.

    bits(fp32) = bits(bf16) 2^16 + high 2^8 + low

with high a signed byte, and low the byte below it, which is 0 where it is not kept. Nearest is away
from zero where two are as near. Source: the split of master weights as in FlashOptim
(databricks/flashoptim).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import cdiv, check, define, jit, launch, signed32, tl, use_triton
from .philox import WEIGHT_STREAM, nearest, random16_rows, random_bits16_ref

__all__ = ["join", "join_ref", "split", "split_ref"]

# Elements of one program.
_TILE = 1024
# Bits of the largest number to be split: above it the nearest bf16, or what 8 more bits are rounded
# to, would be infinite.
_TOP = 0x7F7F7E00


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


@jit
def _join_kernel(p_ptr: tl.tensor, high_ptr: tl.tensor, low_ptr: tl.tensor, out_ptr: tl.tensor,
                 count: tl.tensor, LOW: tl.constexpr, TILE: tl.constexpr) -> None:
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = i < count
    upper = tl.load(p_ptr + i, mask=mask, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)
    bits = (upper << 16) + (tl.load(high_ptr + i, mask=mask, other=0).to(tl.int32) << 8)
    if LOW:
        bits += tl.load(low_ptr + i, mask=mask, other=0).to(tl.int32)
    tl.store(out_ptr + i, bits.to(tl.float32, bitcast=True), mask=mask)


@jit
def _split_kernel(x_ptr: tl.tensor, p_ptr: tl.tensor, high_ptr: tl.tensor, low_ptr: tl.tensor,
                  count: tl.tensor, start: tl.tensor, seed: tl.tensor, parameter: tl.tensor,
                  step: tl.tensor, LOW: tl.constexpr, STOCHASTIC: tl.constexpr,
                  HELD: tl.constexpr, STREAM: tl.constexpr, TOP: tl.constexpr,
                  TILE: tl.constexpr) -> None:
    # Tiles begin where a Philox block does: [TILE] elements are [TILE / 8] blocks.
    first = tl.program_id(0).to(tl.int64) * (TILE // 8) + start // 8
    i = first * 8 + tl.arange(0, TILE) - start
    mask = (i >= 0) & (i < count)
    x = tl.load(x_ptr + i, mask=mask, other=0.0)
    bits = x.to(tl.int32, bitcast=True)
    sign = bits & -2147483648
    size = bits & 2147483647
    finite = size < 0x7F800000
    size = tl.where(size > TOP, TOP, size)
    bits = sign | size
    if not LOW:
        if STOCHASTIC:
            if HELD:
                step = tl.load(step).to(tl.int32)
            random = random16_rows(first + tl.arange(0, TILE // 8), seed, parameter, step, STREAM)
            bits = (bits + (random >> 8)) & -256
        else:
            bits = (bits + 128) & -256
    upper = (bits + 0x8000) >> 16
    rest = tl.where(finite, bits - (upper << 16), 0)
    bf16 = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    x = tl.where(x == x, x, float("nan"))
    tl.store(p_ptr + i, tl.where(finite, bf16, nearest(x, p_ptr)), mask=mask)
    tl.store(high_ptr + i, (rest >> 8).to(tl.int8), mask=mask)
    if LOW:
        tl.store(low_ptr + i, (rest & 255).to(tl.uint8), mask=mask)


def _join(p: Tensor, high: Tensor, low: Tensor | None, out: Tensor, triton: bool) -> None:
    if not triton:
        out.copy_(join_ref(p, high, low))
    elif p.numel():
        launch(_join_kernel, cdiv(p.numel(), _TILE), p.device, p, high, low, out, p.numel(),
               LOW=low is not None, TILE=_TILE)


def _split(x: Tensor, p: Tensor, high: Tensor, low: Tensor | None, key: list[int], random: bool,
           t: int, start: int, triton: bool, held_t: Tensor | None = None) -> None:
    """``held_t`` is t in a tensor."""
    if not triton:
        bits = None
        if random:
            bits = random_bits16_ref(start, x.numel(), (key[0], key[1]),
                                     (t if held_t is None else held_t, WEIGHT_STREAM),
                                     x.device).view(x.shape)
        split_ref(x, p, high, low, bits)
    elif x.numel():
        tiles = cdiv(start % 8 + x.numel(), _TILE)
        launch(_split_kernel, tiles, x.device, x, p, high, low, x.numel(), start,
               *map(signed32, key), signed32(t) if held_t is None else held_t,
               LOW=low is not None, STOCHASTIC=random, HELD=held_t is not None,
               STREAM=WEIGHT_STREAM, TOP=_TOP, TILE=_TILE)
        torch.autograd.graph.increment_version([y for y in (p, high, low) if y is not None])


_join_op = define("join(Tensor p, Tensor high, Tensor? low, Tensor(a!) out, bool triton) -> ()",
                  _join)
_split_op = define("split(Tensor x, Tensor(a!) p, Tensor(b!) high, Tensor(c!)? low, int[] key, "
                   "bool random, SymInt t, SymInt start, bool triton, Tensor? held_t=None) -> ()",
                   _split)


def _check(p: Tensor, high: Tensor, low: Tensor | None) -> None:
    check("p", p, shape=tuple(p.shape), dtypes=(torch.bfloat16,), device=p.device)
    check("high", high, shape=tuple(p.shape), dtypes=(torch.int8,), device=p.device)
    if low is not None:
        check("low", low, shape=tuple(p.shape), dtypes=(torch.uint8,), device=p.device)


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
    _check(p, high, low)
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
    _check(p, high, low)
    check("x", x, shape=tuple(p.shape), dtypes=(torch.float32,), device=p.device)
    count, held = (1, t) if isinstance(t, Tensor) else (t, None)
    _split_op(x, p, high, low, key or (0, 0), key is not None and low is None, count, start,
              use_triton(backend, p.device), held)
