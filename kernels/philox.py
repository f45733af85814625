"""Counter-based random bits (Philox 4x32-10), and the stochastic rounding that uses them.

The bits of an element depend on its position and on the key alone: not on the device, the
grouping or any global generator. Source: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._triton import INTERPRETED, cdiv, check, define, jit, launch, signed32, tl, use_triton
from .fakes import is_fake

__all__ = ["WEIGHT_STREAM", "nearest", "random16", "random16_rows", "random16_tile",
           "random_bits16_ref", "random_place", "round_bf16", "round_fp16", "stochastic_bf16_ref",
           "stochastic_fp16_ref", "stochastic_round", "within"]

#: Stream of the random bits that round a weight; its moments have streams of lower numbers.
WEIGHT_STREAM = 64

_MASK = 0xFFFFFFFF
# Multipliers and Weyl constants of Philox 4x32 (Salmon et al., 2011).
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
# torch shares an operation among threads from this many elements on.
_GRAIN = 1 << 15
# Blocks that an operation works on at once elsewhere than on a CPU: 64 MiB of temporaries.
_LAUNCH = 1 << 20
# Elements of one program.
_TILE = 1024
_LARGEST = {kind: torch.finfo(kind).max for kind in (torch.bfloat16, torch.float16)}


def _random_pieces(start: int, count: int, key: tuple[int, int], stream: tuple[int | Tensor, int],
                   device: torch.device | str) -> Iterator[tuple[int, Tensor]]:
    """Random bits piece by piece: (offset from ``start``, uint16 in a buffer that is reused).

    Words of 32 bits are held in int64, whose products wrap modulo 2**64 to the bits of the
    unsigned product.
    """
    # As many blocks as stay in the cores' caches. A hundred operations on each piece are a hundred
    # barriers, which few threads do not pay for: they get pieces that are not shared.
    threads = torch.get_num_threads()
    piece = _GRAIN // 2 if threads < 4 else _GRAIN * threads
    if torch.device(device).type != "cpu":  # each operation is a launch
        piece = _LAUNCH
    first, last = start // 8, (start + count + 7) // 8
    size = min(piece, last - first)
    words = torch.empty((6, size), dtype=torch.int64, device=device)
    # Little-endian halves of words 0 .. 3 are elements 0 .. 7 of a block.
    block = torch.empty((size, 4), dtype=torch.int32, device=device)
    for at in range(first, last, piece):
        n = min(piece, last - at)
        c0, c1, c2, c3, p0, p1 = words[:, :n]
        torch.arange(at, at + n, out=c1, device=c1.device)
        torch.bitwise_and(c1, _MASK, out=c0)
        c1.bitwise_right_shift_(32)
        c2.fill_(stream[0] & _MASK)
        c3.fill_(stream[1] & _MASK)
        k0, k1 = key[0] & _MASK, key[1] & _MASK
        for _ in range(10):
            torch.mul(c0, _M0, out=p0)
            torch.mul(c2, _M1, out=p1)
            torch.bitwise_right_shift(p1, 32, out=c0)
            c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
            torch.bitwise_right_shift(p0, 32, out=c2)
            c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
            # Only the low halves of c1 and c3 are used.
            c1, p1, c3, p0 = p1, c1, p0, c3
            k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
        for i, word in enumerate((c0, c1, c2, c3)):
            block[:n, i] = word
        begin, end = max(start, 8 * at), min(start + count, 8 * (at + n))
        halves = block[:n].view(torch.uint16).view(-1)[begin - 8 * at : end - 8 * at]
        for part in halves.split(2 * piece):
            yield begin - start, part
            begin += len(part)


def random_bits16_ref(
    start: int, count: int, key: tuple[int, int], stream: tuple[int | Tensor, int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sixteen random bits for each of the elements ``start .. start + count - 1``.

    One Philox block serves eight neighbouring elements: block = index // 8.

    Args:
        start: global index of the first element.
        count: number of elements.
        key: two words, such as (seed, parameter).
        stream: two more words of the counter, such as (step, slot); the first may be a 0-d int64
            tensor on the device, for a CUDA graph that reads it when it is replayed.
        device: where the bits are made; the values are the same everywhere.

    Returns:
        int32 tensor of shape (count,), values 0 .. 65535.
    """
    out = torch.empty(count, dtype=torch.int32, device=device)
    for at, random in _random_pieces(start, count, key, stream, device):
        out[at : at + len(random)] = random
    return out


def _bounded(x: Tensor, largest: float) -> bool:
    """Whether x is known to be finite and within +-largest, where that can be had cheaply."""
    if (x.device.type != "cpu" or not x.numel() or torch.compiler.is_compiling()
            or is_fake(x)):
        return False
    low, high = torch.aminmax(x)
    # False for NaN too.
    return low.item() >= -largest and high.item() <= largest


def within(x: Tensor, largest: float) -> Tensor:
    """x, its finite entries brought to within +-largest; infinities and NaN stay what they are.

    It is x itself where that is known to change nothing.
    """
    if x.device.type == "meta" or not x.numel() or _bounded(x, largest):
        return x
    return torch.where(x.isinf(), x, x.clamp(-largest, largest))


def _bf16_ref(x: Tensor, random: Tensor) -> Tensor:
    """((bits(x) + random) >> 16) << 16, as fp32; random (int32) is overwritten."""
    largest = _LARGEST[torch.bfloat16]
    if _bounded(x, largest):
        return random.add_(x.view(torch.int32)).bitwise_and_(-65536).view(torch.float32)
    # Rounded up, a number above the largest of bf16 would be infinite.
    bits = x.clamp(-largest, largest).view(torch.int32)
    rounded = random.add_(bits).bitwise_and_(-65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def _fp16_ref(x: Tensor, random: Tensor) -> Tensor:
    """floor(x / step + random / 2^16) * step, as fp32."""
    # x = m 2^e with m in [1, 2) and e + 127 in the exponent's bits: ten bits below the leading
    # one, none below 2^-24. Steps are put together as the bits of powers of two.
    step = (x.view(torch.int32) >> 23).bitwise_and_(255).clamp_min_(113).sub_(10)
    inverse = torch.sub(254, step).bitwise_left_shift_(23).view(torch.float32)
    part = random.float().mul_(2.0**-16)
    scaled = inverse.mul_(x)
    # torch.floor would share even small pieces among threads.
    floor = random.copy_(scaled)
    floor.add_(scaled < floor, alpha=-1)
    # Of the sum of all three, fp32 would keep 13 bits behind the point, and round up.
    floor.add_(part.add_(scaled.sub_(floor)) >= 1)
    rounded = floor * step.bitwise_left_shift_(23).view(torch.float32)
    largest = _LARGEST[torch.float16]
    if _bounded(x, largest):
        return rounded.clamp_(-largest, largest)
    return torch.where(x.abs() <= largest, rounded.clamp_(-largest, largest), x)


def _round_ref(x: Tensor, start: int, key: tuple[int, int], stream: tuple[int | Tensor, int],
               out: Tensor) -> Tensor:
    """Round x into out, piece by piece; both in row-major order."""
    rounding = _bf16_ref if out.dtype == torch.bfloat16 else _fp16_ref
    flat, target = x.contiguous().view(-1), out.view(-1)
    for at, random in _random_pieces(start, x.numel(), key, stream, x.device):
        piece = slice(at, at + len(random))
        target[piece] = rounding(flat[piece], random.to(torch.int32))
    return out


def stochastic_bf16_ref(
    x: Tensor, start: int, key: tuple[int, int], stream: tuple[int | Tensor, int]
) -> Tensor:
    """fp32 to bf16, up or down with probabilities that make the mean exact.

    Sixteen random bits are added below the last kept bit, then the low half is cut:
    bf16 = (bits(x) + random) >> 16. Non-finite values are passed on as they are.

    Args:
        x: fp32, any shape; element i of its row-major order has global index ``start + i``.
        start: global index of the first element.
        key: two words, such as (seed, parameter).
        stream: two more words of the counter, such as (step, slot).
    """
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    return _round_ref(x, start, key, stream, out)


def stochastic_fp16_ref(
    x: Tensor, start: int, key: tuple[int, int], stream: tuple[int | Tensor, int]
) -> Tensor:
    """fp32 to fp16, up or down with probabilities that make the mean exact (to 2^-16 of a step).

    floor(x / step + random / 2^16) * step, where step is what the last bit of fp16 is worth at x.
    What rounds beyond the largest fp16 number stays there, unless x itself is beyond it.

    Args:
        x: fp32, any shape; element i of its row-major order has global index ``start + i``.
        start: global index of the first element.
        key: two words, such as (seed, parameter).
        stream: two more words of the counter, such as (step, slot).
    """
    out = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    return _round_ref(x, start, key, stream, out)


@jit
def _words(block: tl.tensor, seed: tl.tensor, parameter: tl.tensor, step: tl.tensor,
           stream: tl.tensor) -> tl.tensor:
    """The four words of each Philox block; key and stream are int32."""
    key0 = seed.to(tl.uint32, bitcast=True)
    key1 = parameter.to(tl.uint32, bitcast=True)
    word0 = block.to(tl.uint32)
    word1 = (block >> 32).to(tl.uint32)
    word2 = tl.zeros_like(word0) + step
    word3 = tl.zeros_like(word0) + stream
    for _ in tl.static_range(10):
        # Both halves of a product come from one instruction; tl.philox takes two.
        product0 = word0.to(tl.uint64) * 0xD2511F53
        product1 = word2.to(tl.uint64) * 0xCD9E8D57
        word0 = (product1 >> 32).to(tl.uint32) ^ word1 ^ key0
        word2 = (product0 >> 32).to(tl.uint32) ^ word3 ^ key1
        word1 = product1.to(tl.uint32)
        word3 = product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
        tl.static_assert((word0.dtype == tl.uint32) & (word2.dtype == tl.uint32))
    return word0, word1, word2, word3


@jit
def random16(index: tl.tensor, seed: tl.tensor, parameter: tl.tensor, step: tl.tensor,
             stream: tl.tensor) -> tl.tensor:
    """Sixteen random bits (int32) for each global index (int64), in any order."""
    w0, w1, w2, w3 = _words(index >> 3, seed, parameter, step, stream)
    place = (index & 7).to(tl.uint32)
    word = tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3))
    return ((word >> ((place & 1) * 16)) & 0xFFFF).to(tl.int32)


@jit
def random16_rows(block: tl.tensor, seed: tl.tensor, parameter: tl.tensor, step: tl.tensor,
                  stream: tl.tensor) -> tl.tensor:
    """The bits of whole Philox blocks: int64 (..., n) to int32 (..., 8 n), an eighth the work."""
    w0, w1, w2, w3 = _words(block, seed, parameter, step, stream)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # Of 16 bits as long as they are moved.
    return tl.interleave(words.to(tl.uint16), (words >> 16).to(tl.uint16)).to(tl.int32)


@jit
def random16_tile(index: tl.tensor, seed: tl.tensor, parameter: tl.tensor, step: tl.tensor,
                  stream: tl.tensor, ALIGNED: tl.constexpr, W: tl.constexpr) -> tl.tensor:
    """Random bits of W elements from each index on: int64 [R] to int32 [R, W]."""
    if ALIGNED:
        block = (index >> 3)[:, None] + tl.arange(0, W // 8)[None, :]
        return random16_rows(block, seed, parameter, step, stream)
    else:
        return random16(index[:, None] + tl.arange(0, W)[None, :], seed, parameter, step, stream)


@jit
def round_bf16(x: tl.tensor, random: tl.tensor) -> tl.tensor:
    """fp32 to bf16 by :func:`stochastic_bf16_ref`; x is a result, whose NaN are quiet."""
    # Nothing is added beyond the largest bf16 number: what is finite is cut to it, infinities and
    # NaN stay.
    random = tl.where(tl.abs(x) <= 3.3895313892515355e38, random, 0)
    return ((x.to(tl.int32, bitcast=True) + random) >> 16).to(tl.int16).to(tl.bfloat16,
                                                                           bitcast=True)


def _nearest_bf16(x: tl.tensor) -> tl.tensor:
    """fp32 to the nearest bf16, of two the even."""
    return x.to(tl.bfloat16)


def _nearest_bf16_interpreted(x: tl.tensor) -> tl.tensor:
    """The same, which the interpreter's conversion is not."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


_bf16 = jit(_nearest_bf16_interpreted if INTERPRETED else _nearest_bf16)


@jit
def nearest(x: tl.tensor, ptr: tl.tensor) -> tl.tensor:
    """fp32 to nearest, in the type that ptr points to."""
    if ptr.dtype.element_ty == tl.bfloat16:
        return _bf16(x)
    else:
        return x.to(ptr.dtype.element_ty)


@jit
def round_fp16(x: tl.tensor, random: tl.tensor) -> tl.tensor:
    """fp32 to fp16 by :func:`stochastic_fp16_ref`."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
    step = tl.where(exponent < 113, 113, exponent) - 10
    inverse = ((254 - step) << 23).to(tl.float32, bitcast=True)
    # All products are exact, so that a fused multiply-add changes nothing.
    scaled = x * inverse
    rounded = tl.floor(scaled)
    up = (scaled - rounded) + random.to(tl.float32) * 1.52587890625e-05 >= 1.0
    rounded = (rounded + tl.where(up, 1.0, 0.0)) * (step << 23).to(tl.float32, bitcast=True)
    rounded = tl.where(rounded > 65504.0, 65504.0, tl.where(rounded < -65504.0, -65504.0, rounded))
    return tl.where(tl.abs(x) <= 65504.0, rounded, x).to(tl.float16)


@jit
def random_place(start: tl.tensor, count: tl.tensor, ALIGNED: tl.constexpr, TILE: tl.constexpr
                 ) -> tl.tensor:
    """A program's [TILE] of ``count`` elements, of which the first has global index ``start``:
    where they are, which of them exist, and their [TILE / 8] Philox blocks.

    Tiles begin where a Philox block does; if aligned, ``start`` is a multiple of 8.
    """
    first = tl.program_id(0).to(tl.int64) * (TILE // 8)
    i = first * 8 + tl.arange(0, TILE)
    if ALIGNED:
        mask = i < count
    else:
        i -= start % 8
        mask = (i >= 0) & (i < count)
    return i, mask, first + start // 8 + tl.arange(0, TILE // 8)


@jit
def _stochastic_round_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, count: tl.tensor,
                             start: tl.tensor, seed: tl.tensor, parameter: tl.tensor,
                             step: tl.tensor, stream: tl.tensor, HELD: tl.constexpr,
                             ALIGNED: tl.constexpr, TILE: tl.constexpr) -> None:
    if HELD:
        step = tl.load(step).to(tl.int32)
    i, mask, block = random_place(start, count, ALIGNED, TILE)
    random = random16_rows(block, seed, parameter, step, stream)
    x = tl.load(x_ptr + i, mask=mask, other=0.0)
    x = tl.where(x == x, x, float("nan"))
    if out_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(out_ptr + i, round_bf16(x, random), mask=mask)
    else:
        tl.store(out_ptr + i, round_fp16(x, random), mask=mask)


def _stochastic_round(x: Tensor, out: Tensor, start: int, key: list[int], stream: list[int],
                      triton: bool, count: Tensor | None = None) -> None:
    """``count``, where it is given, is the first word of the stream."""
    if not triton:
        _round_ref(x, start, (key[0], key[1]), (stream[0] if count is None else count, stream[1]),
                   out)
    elif x.numel():
        tiles = cdiv(start % 8 + x.numel(), _TILE)
        step = signed32(stream[0]) if count is None else count
        launch(_stochastic_round_kernel, tiles, x.device, x, out, x.numel(), start,
               *map(signed32, key), step, signed32(stream[1]), HELD=count is not None,
               ALIGNED=start % 8 == 0, TILE=_TILE)


_op = define("stochastic_round(Tensor x, Tensor(a!) out, SymInt start, int[] key, SymInt[] stream, "
             "bool triton, Tensor? count=None) -> ()", _stochastic_round)


def stochastic_round(x: Tensor, dtype: torch.dtype, start: int, key: tuple[int, int],
                     stream: tuple[int | Tensor, int], *, out: Tensor | None = None,
                     backend: str | None = None) -> Tensor:
    """fp32 to bf16 or fp16, up or down with probabilities that make the mean exact.

    Defined by :func:`stochastic_bf16_ref` and :func:`stochastic_fp16_ref`, whose bits it gives on
    every device.

    Args:
        x: fp32, any shape; element i of its row-major order has global index ``start + i``.
        dtype: torch.bfloat16 or torch.float16.
        start: global index of the first element.
        key: two words, such as (seed, parameter).
        stream: two more words of the counter, such as (step, slot); as for
            :func:`random_bits16_ref`.
        out: where the result goes, contiguous, of x's shape and the dtype; None for a new tensor.
        backend: "torch", "triton", or None for Triton on CUDA and torch elsewhere.

    Raises:
        TypeError: a dtype is another one.
        ValueError: out does not fit x.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    if dtype not in _LARGEST:
        raise TypeError(f"dtype: expected torch.bfloat16 or torch.float16, got {dtype}")
    x = x.contiguous()
    check("x", x, shape=tuple(x.shape), dtypes=(torch.float32,), device=x.device)
    if out is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    check("out", out, shape=tuple(x.shape), dtypes=(dtype,), device=x.device)
    step, slot = stream
    count, step = (step, 0) if isinstance(step, Tensor) else (None, step)
    _op(x, out, start, key, (step, slot), use_triton(backend, x.device), count)
    return out
