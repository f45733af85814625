"""What fits into so many bytes, and the line of code that gives it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from . import names
from .estimate import IN_BACKWARD, activations, count, holdings, modes
from .sources import Source

__all__ = ["BITS", "CANDIDATES", "Choice", "choices", "line_of", "parse_size"]

#: Bits per element of the moments, most first.
BITS = (32, 16, 8, 4)
#: Optimizers that are tried; the others on the command line are these with other options.
CANDIDATES = ("adamw", "galore", "dct-adamw", "fira", "apollo", "frugal", "gradnormlorp", "muon",
              "polargrad", "trion", "lora", "switchlora")
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
#: The constructor's parameters, where they are not param_groups(model, rank=...).
_PARAMS = {
    "adamw": "model.named_parameters()", "muon": "param_groups(model)",
    "polargrad": "param_groups(model)",
    "lora": "[p for p in lora(model, rank={rank}, init='lora').parameters() if p.requires_grad]",
    "switchlora": "adapter_groups(lora(model, rank={rank}))",
}
_CALLS = {"project": "; project_in_backward(optimizer)",
          "update": "; update_in_backward(optimizer)"}


def parse_size(text: str) -> int:
    """Bytes of ``"24GiB"``, ``"24 GB"``, ``"800mb"``: with a unit, since 24 bytes are never meant.

    Raises:
        ValueError: it is none of these, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS or not float(found[1]):
        raise ValueError(f"{text!r} must be a size > 0 with its unit, such as 24GiB or 24GB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


class Choice(NamedTuple):
    """One way to train within the budget, or the least of an optimizer that does not fit.

    Args:
        optimizer: name on the command line.
        in_backward: what happens to gradients, as in :data:`lissom.bench.estimate.IN_BACKWARD`.
        rank: of projections, or None.
        bits: of the moments.
        total: bytes of everything, the reserve included.
        figures: of :func:`lissom.bench.estimate.count`.
        fits: whether that is within the budget.
        line: of code.
    """

    optimizer: str
    in_backward: str
    rank: int | None
    bits: int
    total: int
    figures: Mapping[str, Any]
    fits: bool
    line: str


def line_of(name: str, in_backward: str, rank: int | None, options: Mapping[str, Any]) -> str:
    """The line of code for an optimizer with these options; ``model`` and ``lr`` are the user's."""
    cls = names.OPTIMIZERS[name].make
    known = "".join(f", {k}={v!r}" for k, v in options.items()
                    if k in cls.table() and v != cls.table()[k].default)
    params = _PARAMS.get(name, "param_groups(model, rank={rank})").format(rank=rank)
    return f"optimizer = {cls.__name__}({params}, lr=lr{known}){_CALLS.get(in_backward, '')}"


def _ranked(name: str) -> bool:
    return name not in ("adamw", "muon", "polargrad")


def choices(source: Source, budget: int, *, dtype: torch.dtype, reserve: int, batch: int,
            length: int, ranks: int = 1, rank: int | None = None, in_backward: str | None = None,
            optimizers: tuple[str, ...] = CANDIDATES, **options: Any) -> list[Choice]:
    """For each optimizer the highest rank, and at that the most bits, that fit.

    Gradients that wait for the step come first, then projected ones, then updates in the backward
    pass; a later one is listed only where it allows a higher rank or more bits.

    Args:
        source: the model.
        budget: bytes of one device.
        dtype: of the weights.
        reserve: bytes for what is not estimated: the device's context, temporaries of a step,
            fragmentation.
        batch: sequences of a micro-batch, for the activations; a model that takes no tokens has
            none counted.
        length: tokens of a sequence.
        ranks: over which FSDP2 shards.
        rank: None tries the source's, a half, a quarter, an eighth and a sixteenth of it.
        in_backward: None tries all that the optimizer accepts.
        optimizers: names of :data:`CANDIDATES`.
        options: of the optimizers' classes; ``state_bits`` fixes the bits.

    Returns:
        What fits, then for each optimizer that does not its smallest form.
    """
    bits_given = options.pop("state_bits", None)
    halves = [source.rank >> i for i in range(5)]
    tried_ranks = [rank] if rank else [x for x in halves if x]
    tried_bits = [bits_given] if bits_given else list(BITS)
    fitting: list[Choice] = []
    least: list[Choice] = []
    for name in optimizers:
        best: dict[str, Choice] = {}
        smallest: Choice | None = None
        accepted: tuple[str, ...] = ()
        ranks_: list[int | None] = [*tried_ranks] if _ranked(name) else [None]
        for r in ranks_:
            active: int | None = None
            for bits in tried_bits:
                own = _with_bits(name, bits, options)
                model = _empty(source, dtype)
                try:
                    held = holdings(name, model, r, **own)
                except ValueError:  # a rank that the method refuses for this model
                    break
                if active is None:
                    try:
                        active = activations(model, batch, length)
                    except ValueError:
                        active = 0
                accepted = accepted or modes(name, _empty(source, dtype), r, **own)
                for mode in accepted:
                    if in_backward not in (None, mode) or mode in best:
                        continue
                    figures = count(held, mode, ranks)
                    total = reserve + active + sum(figures[k] for k in (
                        "weights", "gradients", "optimizer_state", "gathered")) - figures["host"]
                    choice = Choice(name, mode, r, bits, total, {**figures, "activations": active},
                                    total <= budget, line_of(name, mode, r, own))
                    if choice.fits:
                        best[mode] = choice
                    if smallest is None or total < smallest.total:
                        smallest = choice
            if "none" in best:
                break
        listed: list[Choice] = []
        for mode in IN_BACKWARD:
            if mode in best and all((best[mode].rank or 0, best[mode].bits)
                                    > (x.rank or 0, x.bits) for x in listed):
                listed.append(best[mode])
        fitting += listed
        if not listed and smallest is not None:
            least.append(smallest)
    return fitting + sorted(least, key=lambda x: x.total)


def _empty(source: Source, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return source.make().to(dtype)


def _with_bits(name: str, bits: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with so many bits of moments; bases follow, and pools of candidates stay away."""
    table = names.OPTIMIZERS[name].make.table()
    own = {**options, "state_bits": bits}
    if bits < 16 and "basis_bits" in table and name not in ("dct-adamw", "apollo"):
        own.setdefault("basis_bits", bits)
    if "candidate_device" in table:
        own.setdefault("candidate_device", "cpu")
    return own
