"""How results are written to weights: rounded once, the bits that are cut off kept if wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.apart import Apart, Matrices
from ..kernels.philox import WEIGHT_STREAM, stochastic_round
from ..kernels.split import join, split
from .codec import Slot, wide
from .keys import key_of

__all__ = ["MASTERS", "master_slots", "masters", "random_rounding", "read_weight", "write_weight"]

#: The lower 16 bits of an fp32 weight, beside its bf16 (:mod:`lissom.kernels.split`). Two
#: tensors, as gloo and NCCL do not send 16-bit integers, and sharded state must be gathered.
MASTERS = {"master": torch.int8, "master_low": torch.uint8}


def master_slots(p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
    """Slots for 8 or 16 more bits of each element of a bf16 weight, as ``master_bits`` says."""
    if o["master_bits"] is None or p.dtype != torch.bfloat16:
        return {}
    return {name: Slot(tuple(p.shape), kind, p.device, rows=p.ndim > 0, optional=True)
            for name, kind in [*MASTERS.items()][:o["master_bits"] // 8]}


def masters(p: Matrices, kept: Mapping[str, Tensor]) -> dict[str, Any]:
    """The bits of a weight that the state keeps (``master_bits``), in the shape of p."""
    found = {name: kept[name] for name in MASTERS if name in kept}
    return found if isinstance(p, Apart) else {k: x.view(p.shape) for k, x in found.items()}


def read_weight(p: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
    """The weight in the precision of the arithmetic, with the bits that the state keeps of it."""
    if "master" not in kept:
        return wide(p)
    return join(p.contiguous(), *(x.contiguous() for x in masters(p, kept).values()))


def _split_weight(p: Tensor, x: Tensor, kept: Mapping[str, Tensor], key: tuple[int, int] | None,
                  step: int | Tensor, start: int) -> None:
    """Write the nearest bf16 number to p and the rest to the masters."""
    parts = [p, *masters(p, kept).values()]
    # rows of each matrix of a stack do not lie together
    whole = [y.contiguous() for y in parts]
    split(x.contiguous(), *whole, key=key, t=step, start=start)
    for part, new in zip(parts, whole, strict=True):
        if new is not part:
            part.copy_(new)


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
        key = key_of(kept, o) if random_rounding(p, o) else None
        _split_weight(p, x, kept, key, step, start)
        return
    if random_rounding(p, o):
        x = stochastic_round(x, p.dtype, start, key_of(kept, o), (step, WEIGHT_STREAM))
    p.copy_(x)
