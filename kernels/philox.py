"""Counter-based random bits (Philox 4x32-10), and the stochastic rounding that uses them.

The bits of an element depend on its position and on the key alone: not on the device, the
grouping or any global generator. Source: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["random_bits16_ref", "stochastic_bf16_ref", "stochastic_fp16_ref"]

_MASK = 0xFFFFFFFF
# Multipliers and Weyl constants of Philox 4x32 (Salmon et al., 2011).
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for a and b below 2**32.

    int64 products wrap modulo 2**64, so their 64 bits are those of the unsigned product.
    """
    product = b * (a - (1 << 64) if a >= 1 << 63 else a)
    return (product >> 32).bitwise_and_(_MASK), product.bitwise_and_(_MASK)


def _philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds on four words of 32 bits, held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(10):
        h0, l0 = _multiply(_M0, c0)
        h1, l1 = _multiply(_M1, c2)
        c0, c1 = h1.bitwise_xor_(c1).bitwise_xor_(k0), l1
        c2, c3 = h0.bitwise_xor_(c3).bitwise_xor_(k1), l0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return [c0, c1, c2, c3]


def random_bits16_ref(
    start: int, count: int, key: tuple[int, int], stream: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Sixteen random bits for each of the elements ``start .. start + count - 1``.

    One Philox block serves eight neighbouring elements: block = index // 8.

    Args:
        start: global index of the first element.
        count: number of elements.
        key: two words, such as (seed, parameter).
        stream: two more words of the counter, such as (step, slot).
        device: where the bits are made; the values are the same everywhere.

    Returns:
        int32 tensor of shape (count,), values 0 .. 65535.
    """
    first, last = start // 8, (start + count + 7) // 8
    block = torch.arange(first, last, device=device, dtype=torch.int64)
    words = _philox(
        [block & _MASK, block >> 32, torch.full_like(block, stream[0] & _MASK),
         torch.full_like(block, stream[1] & _MASK)],
        key,
    )
    halves = torch.empty((len(block), 8), device=device, dtype=torch.int32)
    for i, word in enumerate(words):
        halves[:, 2 * i] = word & 0xFFFF
        halves[:, 2 * i + 1] = word >> 16
    offset = start - 8 * first
    return halves.view(-1)[offset : offset + count]


def stochastic_bf16_ref(
    x: Tensor, start: int, key: tuple[int, int], stream: tuple[int, int]
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
    random = random_bits16_ref(start, x.numel(), key, stream, x.device).view(x.shape)
    # Rounded up, a number above the largest of bf16 would be infinite.
    largest = torch.finfo(torch.bfloat16).max
    bits = x.clamp(-largest, largest).contiguous().view(torch.int32)
    rounded = ((bits + random) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def stochastic_fp16_ref(
    x: Tensor, start: int, key: tuple[int, int], stream: tuple[int, int]
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
    random = random_bits16_ref(start, x.numel(), key, stream, x.device).view(x.shape)
    # x = m 2^e with m in [1/2, 1): ten bits below the leading one, none below 2^-24.
    exponent = torch.frexp(x).exponent.clamp_min(-13) - 11
    steps = torch.floor(torch.ldexp(x, -exponent) + random * 2.0**-16)
    rounded = torch.ldexp(steps, exponent)
    largest = torch.finfo(torch.float16).max
    rounded = torch.where(x.abs() <= largest, rounded.clamp(-largest, largest), x)
    return torch.where(x.isfinite(), rounded, x).to(torch.float16)
