"""Decoding of saved states: of this package under other options, and of other packages.

:mod:`lissom.optim.convert` fits them into an optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.dynamic import codebook
from . import codec
from .base import MatrixOptimizer
from .common import COMMON
from .door import checked_group, plain_value
from .layouts import slots_of
from .lowrank import LowRankOptimizer
from .weights import MASTERS

__all__ = ["NUMBERS", "Saved", "check_numbers", "decoded_state"]

#: Slots that every rule has.
NUMBERS = ("step", "index", "key")


class Saved(NamedTuple):
    """A parameter's state as it was saved, decoded.

    Args:
        values: by slot, in the arithmetic's precision, ``step`` included.
        rule: the rule that saved it: ``"adamw"``, another name, or None if unknown.
        options: of its group, if this package saved it; else none.
        stored: the tensors as saved, in this package's slots. Slots that are stored alike are
            copied from here, as decoding and encoding would round once more.
    """

    values: dict[str, Tensor]
    rule: str | None
    options: Mapping[str, Any] = {}
    stored: Mapping[str, Tensor] = {}


def check_numbers(entry: Mapping[str, Any], at: str) -> None:
    """Refuse a saved state whose counts are no integers >= 0: ValueError."""
    for name in NUMBERS:
        value = entry.get(name, 0)
        if not isinstance(value, Tensor) or not value.is_meta:
            value = plain_value(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
                0 <= value < 2**63 and value == int(value)):
            raise ValueError(f"{at}: {name}={value!r}, but it must be an integer >= 0")


def decoded_state(entry: Mapping[str, Any], group: Mapping[str, Any], optimizer: MatrixOptimizer,
             p: Tensor, o: Mapping[str, Any], at: str) -> Saved:
    """A saved state in the precision of the arithmetic, whoever saved it.

    Args:
        entry: the state.
        group: in which it was saved.
        optimizer: the one to continue with.
        p: its parameter.
        o: options of that one's group.
        at: beginning of a message.
    """
    nested = entry.get("__bnb_optimizer_quant_state__")
    if isinstance(nested, Mapping):  # where bitsandbytes puts what FSDP must not shard
        entry = {**entry, **nested}
    if "projector" in entry:
        return _projected(entry, group, at)
    if "state1" in entry:
        moments = _bitsandbytes(entry, tuple(p.shape), at)
        return Saved(moments, "adamw", stored=_same_codes(entry, p))
    values = {k: x for k, x in entry.items() if isinstance(x, Tensor)}
    if "step" in entry and not isinstance(entry["step"], Tensor):
        values["step"] = _count(entry["step"])
    if "index" not in entry:  # torch
        if "exp_avg_sq" in values:
            return Saved(values, "adamw")
        # SGD, whose groups have "dampening", keeps a sum; Muon an average.
        if set(values) == {"momentum_buffer"} and "dampening" not in group:
            return Saved({**values, "step": _count(1)}, "muon")
        raise ValueError(f"{at}: saved state has {sorted(map(str, entry))}, which is of no "
                         "optimizer that is known here")
    table = optimizer.table()
    rule = str(group.get("algorithm", ""))
    own = optimizer.algorithm
    options: dict[str, Any] = {"algorithm": rule} if rule in (own, "adamw") else {}
    slots_ = {k.removesuffix(".scale") for k in values} - {*NUMBERS, "max_exp_avg_sq", *MASTERS}
    if slots_ == {"exp_avg", "exp_avg_sq"}:
        # AdamW's, e.g. of a vector in a group of another rule, whose options may mean other things
        table, options["algorithm"] = COMMON, "adamw"
    elif isinstance(optimizer, LowRankOptimizer) and "basis_step" in values:
        options["algorithm"] = own  # a related class, with the same slots
    elif rule not in (own, "adamw") or (
            tuple(group.get("roles") or ()) != tuple(o.get("roles") or ())):
        return Saved({k: values[k] for k in NUMBERS if k in values}, None)
    options |= {k: v for k, v in group.items() if k in table and k != "algorithm"}
    # How a step runs is not what was saved.
    full = checked_group(optimizer, {**options, "capturable": False, "params": []}, at,
                         entering=False)
    full["params"] = o["params"]  # with roles, slots depend on a parameter's position among them
    dense = not optimizer.own_rule(p, full)
    rule = "adamw" if dense else rule
    slots = {k: slot for k, slot in slots_of(optimizer, p, full).items() if k in values}
    for name, slot in slots.items():
        if slot.bits and any(k not in values or values[k].shape != part.shape
                             for k, part in codec.stored(name, slot).items()):
            return Saved({k: values[k] for k in NUMBERS if k in values}, f"{rule} of another shape")
    decoded = codec.Decoded(values, slots, p)
    return Saved({name: decoded[name] for name in slots}, rule, full, values)


def _count(steps: float) -> Tensor:
    """A count as states keep it, independent of torch's default dtype and device."""
    return torch.tensor(float(steps), dtype=torch.float32, device="cpu")


def _bitsandbytes(entry: Mapping[str, Any], shape: tuple[int, ...], at: str
                  ) -> dict[str, Tensor]:
    """Both moments; 8-bit codes index a map, with a scale per 256 elements of the flat tensor."""
    values = {"step": _count(entry["step"])}
    for name, i in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        x = entry.get(f"state{i}")
        if not isinstance(x, Tensor) or x.numel() != torch.Size(shape).numel():
            raise ValueError(f"{at}: state{i} saved as "
                             f"{tuple(x.shape) if isinstance(x, Tensor) else x}, expected {shape}")
        if x.dtype == torch.uint8:
            scale = entry.get(f"absmax{i}")
            if scale is None or scale.numel() != -(-x.numel() // 256):
                raise ValueError(f"{at}: absmax{i} must have a number for each 256 of "
                                 f"{x.numel()} codes: only blockwise states are read")
            each = scale.flatten().repeat_interleave(256)[: x.numel()]
            x = entry[f"qmap{i}"][_least(x, i).flatten().long()] * each
        values[name] = x.float().view(shape)
    return values


def _least(codes: Tensor, i: str) -> Tensor:
    """bitsandbytes' codes, with the code of zero in second moments raised to the next one: a zero V
    beside a nonzero M would move a weight by M / eps. In a block of zeros all codes mean zero.
    """
    return codes if i == "1" else codes.clamp_min(1)


def _same_codes(entry: Mapping[str, Any], p: Tensor) -> dict[str, Tensor]:
    """Codes that can be taken over as they are: the same map, and no block crosses rows."""
    stored: dict[str, Tensor] = {}
    for name, i in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        codes, scale, book = entry[f"state{i}"], entry.get(f"absmax{i}"), entry.get(f"qmap{i}")
        if codes.dtype != torch.uint8 or p.ndim < 1 or p.shape[-1] % 256 or (
                scale is None or book is None):
            continue
        if torch.equal(book.cpu(), codebook(8, i == "1", torch.device("cpu"))):
            stored[name] = _least(codes, i).view(p.shape)
            stored[f"{name}.scale"] = scale.float().view(*p.shape[:-1], p.shape[-1] // 256)
    return stored


def _projected(entry: Mapping[str, Any], group: Mapping[str, Any], at: str) -> Saved:
    """The state of galore-torch or fira: a projector object holds basis and options."""
    projector = entry["projector"]
    basis = getattr(projector, "ortho_matrix", None)
    if not isinstance(basis, Tensor):
        raise ValueError(f"{at}: the projector has {type(basis).__name__}, but it must have a "
                         "matrix: two-sided projections of galore-torch are not read")
    if "state1" in entry:  # galore-torch's 8 bits
        entry = {**entry, **_bitsandbytes(entry, tuple(entry["state1"].shape), at)}
    low, step = entry["exp_avg"], int(entry["step"])
    gap = int(getattr(projector, "update_proj_gap", group.get("update_proj_gap", 200)))
    side = "right" if low.ndim == 2 and basis.shape[0] == low.shape[1] and (
        basis.shape[0] <= basis.shape[1]) else "left"
    values = {"step": _count(step), "exp_avg": low, "exp_avg_sq": entry["exp_avg_sq"],
              f"basis_{side}": basis.mT.contiguous() if side == "right" else basis,
              "basis_step": _count(1 + (step - 1) // gap * gap)}
    last = entry.get("scaling_grad")
    if isinstance(last, Tensor) and last.numel() == 1:
        values["limiter"] = last.float().view(1, 1)
    return Saved(values, "lowrank", {"projection": "svd", "inner": "adamw"})
