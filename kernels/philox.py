"""Counter-based random bits (Philox 4x32-10), and the stochastic rounding that uses them.

The bits of an element depend on its position and on the key alone: not on the device, the
grouping or any global generator. Source: Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["random_bits16_ref", "stochastic_bf16_ref"]

_MASK = 0xFFFFFFFF
# Multipliers and Weyl constants of Philox 4x32 (Salmon et al., 2011).
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for a and b below 2**32, without overflow of int64."""
    low = a * (b & 0xFFFF)  # < 2**48
    high = a * (b >> 16)  # < 2**48
    carry = high + (low >> 16)  # < 2**49
    return carry >> 16, ((carry << 16) | (low & 0xFFFF)) & _MASK


def _philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Ten rounds on four words of 32 bits, held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(10):
        h0, l0 = _multiply(_M0, c0)
        h1, l1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
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
    halves = torch.stack([h for w in words for h in (w & 0xFFFF, w >> 16)], dim=-1)
    offset = start - 8 * first
    return halves.view(-1)[offset : offset + count].to(torch.int32)


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
