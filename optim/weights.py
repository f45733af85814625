"""How results are written to weights: rounded once, the bits that are cut off kept if wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.apart import Matrices
from ..kernels.philox import WEIGHT_STREAM, random_bits16_ref, stochastic_round
from .codec import Slot, wide
from .keys import key_of

__all__ = ["MASTERS", "master_slots", "random_rounding", "read_weight", "write_weight"]

#: The lower 16 bits of an fp32 weight, beside its bf16: a signed byte and the byte below it. Two
#: tensors, as gloo and NCCL do not send 16-bit integers, and sharded state must be gathered.
MASTERS = {"master": torch.int8, "master_low": torch.uint8}


def master_slots(p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
    """Slots for 8 or 16 more bits of each element of a bf16 weight, as ``master_bits`` says."""
    if o["master_bits"] is None or p.dtype != torch.bfloat16:
        return {}
    return {name: Slot(tuple(p.shape), kind, p.device, rows=p.ndim > 0, optional=True)
            for name, kind in [*MASTERS.items()][:o["master_bits"] // 8]}


def read_weight(p: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
    """The weight in the precision of the arithmetic, with the bits that the state keeps of it.

    bits(fp32) = bits(bf16) 2^16 + master 2^8 + master_low.
    """
    if "master" not in kept:
        return wide(p)
    bits = (p.contiguous().view(torch.int16).int() << 16) + (kept["master"].int() << 8)
    if "master_low" in kept:
        bits += kept["master_low"]
    return bits.view(torch.float32)


def _split_weight(p: Tensor, x: Tensor, kept: Mapping[str, Tensor], random: Tensor | None) -> None:
    """Write the nearest bf16 number to p and the rest to the masters; ties away from zero.

    Source: the split of master weights as in FlashOptim (databricks/flashoptim).
    """
    # above it the nearest bf16 number, or the rounding to 8 more bits, would be infinite
    top = torch.full((), 0x7F7F7E00, dtype=torch.int32, device=x.device).view(torch.float32)
    bits = torch.where(x.isfinite(), torch.minimum(torch.maximum(x, -top), top), x
                       ).contiguous().view(torch.int32)
    if "master_low" not in kept:  # 24 bits of fp32 stay
        bits = (bits + (128 if random is None else random >> 8)) & -256
    upper = (bits + 0x8000) >> 16
    low = bits - (upper << 16)
    finite = x.isfinite()
    p.copy_(torch.where(finite, upper.to(torch.int16).view(torch.bfloat16), x.bfloat16()))
    low = torch.where(finite, low, 0)
    kept["master"].copy_(low >> 8)
    if "master_low" in kept:
        kept["master_low"].copy_(low & 255)


def random_rounding(p: Matrices, o: Mapping[str, Any]) -> bool:
    """Whether results are rounded into this weight at random: by default where it is 16-bit."""
    return (o["rounding"] != "nearest" and p.dtype in (torch.bfloat16, torch.float16)
            and not (o["master_bits"] == 16 and p.dtype == torch.bfloat16))


def write_weight(p: Tensor, x: Tensor, kept: Mapping[str, Tensor], o: Mapping[str, Any],
                 step: int | Tensor, start: int = 0) -> None:
    """Round fp32 results into a weight, once.

    Bits that are cut off go to the state, if it keeps them (:func:`master_slots`). Random bits
    depend on (seed, key of the parameter; step, element): they are the same on resume, on any
    number of ranks and on every device, and with names in any order and grouping of parameters.

    Args:
        p: a weight or a block of its rows.
        x: its new value; if x is p itself, it is written already.
        kept: state of the parameter.
        o: options of the group.
        step: 1-based count of this update.
        start: index in the whole parameter of the first element of p.
    """
    if x is p:
        return
    if "master" in kept:
        random = None
        if random_rounding(p, o):
            random = random_bits16_ref(start, x.numel(), key_of(kept, o), (step, WEIGHT_STREAM),
                                       x.device).view(x.shape)
        _split_weight(p, x, kept, random)
        return
    if random_rounding(p, o):
        x = stochastic_round(x, p.dtype, start, key_of(kept, o), (step, WEIGHT_STREAM))
    p.copy_(x)
