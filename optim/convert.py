"""States that were saved under other options, by another rule or by another package.

:func:`convert_state` turns such a state into one that ``load_state_dict`` takes. What is kept of a
parameter's state, and what begins anew:

=============================================  ===================================================
change                                         what happens
=============================================  ===================================================
``state_bits``, ``basis_bits``, bits of error  decoded and encoded again
feedback
rate, decay, betas, gap, scale, ``moments``,   the optimizer's; state is kept
``refresh``, ``seed`` and other plain options
``projection`` among svd, subspace,            kept
randomized; ``proj_type`` with the same side
smaller ``rank`` of these projections          leading columns of the basis and of the moments
``residual``, ``limiter``, GaLore, Fira and    kept; limiter and error feedback begin at zero
DCT-AdamW with one projection, ``amsgrad``     where they are new, the maximum at V
``master_bits``                                kept; of the weight's bits those that both have
larger ``rank``, another side, from or to dct  state begins anew, ``step`` included
and random, another ``dct_basis``, random
bases of another class or seed, ``inner``,
``polar_first``, ``axis``, dense to low-rank
and back, another rule
=============================================  ===================================================

Sources of other packages' states: torch.optim.AdamW and Muon; bitsandbytes 0.50 (``AdamW``,
``AdamW8bit``: blocks of 256 of the flattened tensor); galore-torch 1.0 and fira 1.0.2, whose
projector objects are read by their attributes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import codec, sharding
from .base import MatrixOptimizer, checked_optimizer
from .codec import Slot
from .door import plain_value
from .foreign import NUMBERS, Saved, check_numbers, decoded_state
from .keys import plain_name
from .layouts import slots_of
from .loading import saved_groups
from .plan import aligned
from .project import side_of
from .subspace import BASES, COLUMNS

__all__ = ["Converted", "convert_state"]

_LOG = logging.getLogger(__name__)
_ORDERED = ("svd", "subspace", "randomized")


class Converted(dict[str, Any]):
    """A state dict for ``load_state_dict``, with what became of each parameter.

    ``rows`` has (name, ``"kept"`` or ``"restarted"``, why); it prints as a table.
    """

    rows: tuple[tuple[str, str, str], ...] = ()

    def __reduce__(self) -> Any:
        """Saved as a plain dictionary, which ``torch.load(weights_only=True)`` reads."""
        return OrderedDict, (list(self.items()),)

    def __str__(self) -> str:
        return "\n".join(aligned([("parameter", "state", "why"), *self.rows]))


def convert_state(state_dict: Mapping[str, Any], optimizer: MatrixOptimizer,
                  names: Sequence[str] | None = None) -> Converted:
    """Continue from a state saved with other options, another method or another package.

    Returns what ``load_state_dict`` of this optimizer takes; its own options stay as they are.
    ``optimizer.load_state_dict(convert_state(torch.load(file), optimizer))``. The module's text
    says what is kept; ``print`` the result to see it by parameter. Nothing is written to either
    argument.

    Args:
        state_dict: of any class of this package, torch.optim.AdamW or Muon, bitsandbytes' AdamW and
            AdamW8bit, galore-torch or fira.
        optimizer: as it is to go on; not sharded (convert before sharding).
        names: of the saved parameters, in the order in which the saved optimizer had them, where
            it kept none: ``[name for name, _ in model.named_parameters()]`` for
            ``AdamW(model.parameters())``. Without names on both sides parameters are matched by
            their order, which is refused where the optimizer has names.

    Returns:
        A state dict in this optimizer's slots; its ``rows`` say what became of each parameter.

    Raises:
        TypeError, ValueError: what does not fit, by name.
    """
    where = "convert_state"
    optimizer = checked_optimizer(optimizer, where)
    saved = saved_groups(state_dict, where)
    found = _matched(saved, optimizer, names, where)
    present = optimizer.state  # which makes it, so that the state dict has it
    result = optimizer.state_dict()
    keys = [key for group in result["param_groups"] for key in group["params"]]
    states: dict[Any, dict[str, Tensor]] = {}
    rows = []
    for (name, p, o), key, source in zip(optimizer._named(), keys, found, strict=True):
        entry = None if source is None else saved["state"].get(source[0])
        own = present.get(p)
        if not own:
            if entry:
                rows.append((name, "restarted", "frozen, so without state until it is trained"))
            continue
        if sharding.is_sharded(p):
            raise ValueError(f"{where}: {name!r} is sharded, but it must be a plain tensor: "
                             "convert before sharding, and load the result after it")
        at = f"{where}, {name!r}"
        kept, why = None, "not in the saved state"
        if entry is not None and not isinstance(entry, Mapping):
            raise ValueError(f"{at}: saved state is a {type(entry).__name__}, but it must be a "
                             "dictionary")
        if source is not None and entry:
            check_numbers(entry, at)
            old = decoded_state(entry, source[1], optimizer, p, o, at)
            kept, why = _fitted(old, optimizer, p, o)
        states[key] = kept or {k: torch.zeros_like(x) for k, x in own.items()}
        for number in ("index", "key"):  # the saved ones, if this package saved them
            mark = entry.get(number) if kept and entry else None
            states[key][number] = own[number].clone().copy_(
                own[number] if mark is None else torch.as_tensor(plain_value(mark)))
        rows.append((name, "kept" if kept else "restarted", why))
    _distinct(states, result, keys)
    converted = Converted({**result, "state": states})
    converted.rows = tuple(rows)
    _LOG.info("%s", converted)
    return converted


def _matched(saved: Mapping[str, Any], optimizer: MatrixOptimizer, names: Sequence[str] | None,
             where: str) -> list[tuple[Any, Mapping[str, Any]] | None]:
    """For each parameter, key and group of the saved one that it continues, or None.

    By their names, else by their order; see :func:`convert_state`, whose errors these are.
    """
    entries: list[tuple[Any, Mapping[str, Any]]] = [
        (key, group) for group in saved["param_groups"] for key in group["params"]]
    known = [plain_name(name) for group in saved["param_groups"]
             for name in group.get("param_names") or ()]
    if names is not None:
        names = [*names]
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise TypeError(f"{where}: names has {type(wrong[0]).__name__} {str(wrong[0])[:40]!r}, "
                            "but it must be a list of strings")
        known = [plain_name(name) for name in names]
        if len(known) != len(entries):
            raise ValueError(f"{where}: names has {len(known)} entries, but {len(entries)} "
                             "parameters are saved")
    mine = [name for name, _, _ in optimizer._named()]
    named = all("param_names" in group for group in optimizer.param_groups)
    if len(known) == len(entries) and named:
        place = dict(zip(known, entries, strict=True))
        if len(place) != len(known):
            raise ValueError(f"{where}: names are not unique")
        found = [place.get(plain_name(name)) for name in mine]
        if mine and known and not any(found):
            raise ValueError(f"{where}: no name of the saved state is one of this optimizer's: "
                             f"{known[0]!r} is saved, {mine[0]!r} is here")
        return found
    if named:
        raise ValueError(f"{where}: the saved state has no names, so names= must give those of its "
                         "parameters, in its order")
    if len(entries) != len(mine):
        raise ValueError(f"{where}: {len(entries)} parameters saved, but this optimizer has "
                         f"{len(mine)}; with names on both sides they need not be the same")
    return list(entries)


def _distinct(states: dict[Any, dict[str, Tensor]], result: Mapping[str, Any],
              keys: Sequence[Any]) -> None:
    """Take this optimizer's own ``index`` or ``key`` everywhere if saved ones occur twice."""
    for number in ("index", "key"):
        held = [int(s[number]) for s in states.values()]
        if len(set(held)) != len(held):
            for key in keys:
                if key in states:
                    states[key][number] = result["state"][key][number].clone()


# -------------------------------------------------------------------- what becomes of it


def _fitted(old: Saved, optimizer: MatrixOptimizer, p: Tensor, o: Mapping[str, Any]
            ) -> tuple[dict[str, Tensor] | None, str]:
    """The state in this optimizer's slots and how, or None and why it begins anew."""
    slots = slots_of(optimizer, p, o)
    values = dict(old.values)
    low = "basis_step" in slots
    rule = optimizer.algorithm if optimizer.own_rule(p, o) else "adamw"
    if low != ("basis_step" in values) or (not low and old.rule != rule):
        return None, f"saved by {old.rule or 'another rule'}, goes on as {rule}"
    for name in optimizer.meaning if rule != "adamw" else ():
        if name in old.options and name in o and old.options[name] != o[name]:
            return None, f"{name} was {old.options[name]!r}, is {o[name]!r}"
    changes: list[str] = []
    cut = 0
    if low:
        reason, cut = _subspaces(old, slots, p, o, optimizer)
        if reason:
            return None, reason
        if cut:
            moments = {k: slot.shape for k, slot in slots.items() if slot.stream is not None}
            values = {k: x[..., :cut].contiguous() if k in BASES else
                      _leading(x, moments[k]) if k in moments else x for k, x in values.items()}
            changes.append(f"leading {cut} columns")
    if "max_exp_avg_sq" in slots and "exp_avg_sq" in values and "max_exp_avg_sq" not in values:
        values["max_exp_avg_sq"] = values["exp_avg_sq"]
    state = {name: torch.zeros(x.shape, dtype=x.dtype, device=x.device)
             for name, x in optimizer.stored_slots(p, o).items()}
    for name, slot in slots.items():
        value = values.get(name)
        if value is None:
            if not slot.optional and name not in NUMBERS:
                return None, f"no {name} was saved"
            if slot.optional:
                changes.append(f"{name} begins at zero")
            continue
        if value.shape != tuple(slot.shape):
            return None, f"{name} saved as {tuple(value.shape)}, expected {tuple(slot.shape)}"
        parts = codec.stored(name, slot)
        alike = not cut and all(k in old.stored and (old.stored[k].shape, old.stored[k].dtype)
                                == (state[k].shape, state[k].dtype) for k in parts)
        with torch.no_grad():
            if alike:
                for k in parts:
                    state[k].copy_(old.stored[k])
            else:
                codec.fill(state, name, value.to(slot.device), slot)
    dropped = sorted(set(values) - set(slots))
    if dropped:
        changes.append(f"without {', '.join(dropped)}")
    return state, "; ".join(changes) or "as it was, stored as the options say"


def _subspaces(old: Saved, slots: Mapping[str, Slot], p: Tensor, o: Mapping[str, Any],
               optimizer: MatrixOptimizer) -> tuple[str, int]:
    """Why a saved subspace cannot be kept, or "", and the number of columns if it gets smaller."""
    before, now = old.options["projection"], o["projection"]
    if before != now and not {before, now} <= set(_ORDERED):
        return f"bases by {before!r}, now by {now!r}", 0
    if old.options["inner"] != o["inner"]:
        return f"inner rule {old.options['inner']!r}, now {o['inner']!r}", 0
    if now == "random" and (old.rule, old.options["seed"]) != (optimizer.algorithm, o["seed"]):
        return "random bases of another class or seed", 0
    if now == "dct" and old.options["dct_basis"] != o["dct_basis"]:
        return f"dct_basis {old.options['dct_basis']}, now {o['dct_basis']}", 0

    def sides(names: Any) -> set[str]:
        return {k for k in names if k in (*BASES, *COLUMNS)}

    m, n = optimizer.matrix_shape(p, o)[-2:]
    if sides(old.values) != sides(slots) or (
            "proj_type" in old.options and side_of(m, n, old.options["proj_type"])
            != side_of(m, n, o["proj_type"])):
        return "another side is projected", 0
    rank = min(int(o["rank"]), m, n)
    bases = [x for k, x in old.values.items() if k in sides(old.values)]
    saved = bases[0].shape[-1] if bases else min(int(old.options["rank"]), m, n)
    if rank == saved:
        return "", 0
    if rank > saved or now not in _ORDERED:
        return f"rank {saved}, now {rank}", 0
    return "", rank


def _leading(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first entries along every dimension that has become shorter."""
    if x.ndim != len(shape):
        return x
    return x[tuple(slice(0, n) for n in shape)].contiguous()
