"""Checks of what is loaded, all of them before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sharding
from .common import BOOKKEEPING, FOREIGN, OF_SOME
from .door import checked_group
from .keys import names_of, plain_name
from .method import Method
from .weights import MASTERS

if TYPE_CHECKING:
    from .base import MatrixOptimizer

__all__ = ["UPGRADES", "REMEDY", "agreed_load", "checked_load", "checked_state",
           "overruled", "saved_groups"]

# Keys of every group of torch's Adam and AdamW, not all of which others' groups have.
_TORCH_ADAMW = {"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach",
                "capturable", "differentiable", "fused"}

#: How a state dict of an older format becomes one of the next: {format: function}, new dicts each.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
#: For messages about a state that is whole but of something else.
REMEDY = "lissom.optim.convert_state converts a saved state to other options, groups and rules"


def checked_load(optimizer: MatrixOptimizer, state_dict: Mapping[str, Any]
                 ) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Tensor]]]:
    """Groups and states for an optimizer's parameters, all new, or an error.

    Args:
        optimizer: which is to be loaded; nothing of it changes.
        state_dict: what was saved.

    Raises:
        TypeError, ValueError: what is wrong and where.
    """
    where = f"{type(optimizer).__name__}.load_state_dict"
    saved = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if isinstance(saved, list) and len(saved) != len(optimizer.param_groups):
        raise ValueError(f"{where}: {len(saved)} groups saved, but this optimizer has "
                         f"{len(optimizer.param_groups)} ({REMEDY})")
    state_dict = saved_groups(state_dict, where)
    saved = state_dict["param_groups"]
    for i, (mine, group) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        if len(group["params"]) != len(mine["params"]):
            raise ValueError(f"{where}, group {i}: {len(group['params'])} parameters saved, "
                             f"but this optimizer has {len(mine['params'])} ({REMEDY})")
    _check_order(optimizer, saved, where)
    begun = bool(state_dict["state"]) or any(group.get("format") for group in saved)
    groups: list[dict[str, Any]] = []
    states: dict[Tensor, dict[str, Tensor]] = {}
    for i, (mine, group) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        at = f"{where}, group {i}"
        merged = _merged(optimizer, mine, group, at)
        groups.append(merged)
        names = names_of(merged) or [f"parameter {j}" for j in range(len(mine["params"]))]
        owners: dict[Any, Tensor] = {}
        for name, p, key in zip(names, mine["params"], group["params"], strict=True):
            # torch allows a parameter twice in a group; both entries have one key.
            if owners.setdefault(key, p) is not p:
                raise ValueError(f"{at}, {name!r}: parameter {key!r} is saved twice")
            entry = state_dict["state"].get(key)
            if isinstance(entry, Mapping) and entry:
                entry = _numbered(entry, optimizer, p, "format" in group)
                states[p] = checked_state(optimizer, p, entry, merged, f"{at}, {name!r}")
            elif entry is not None and not isinstance(entry, Mapping):
                raise ValueError(f"{at}, {name!r}: its state is a {type(entry).__name__}")
            # Under FSDP1 a rank saves no state of a parameter of which it has no elements.
            elif "format" in group and begun and p.requires_grad and p.numel():
                hint = "" if state_dict["state"] else (
                    ", as that of all is: torch.distributed.checkpoint reads what state_dict() "
                    "has before, so read optimizer.state first, which makes it")
                raise ValueError(f"{at}, {name!r}: its state is missing{hint} ({REMEDY}; a "
                                 "parameter that was frozen then is to be unfrozen after loading)")
    return groups, states


def _check_order(optimizer: MatrixOptimizer, saved: list[Any], where: str) -> None:
    """Refuse a state with this optimizer's names in another order, as it is read by position.

    torch.distributed.checkpoint uses names as keys and puts them into this optimizer's order, but
    leaves ``param_names`` as saved: so keys that are names are compared, else ``param_names``.
    """
    field = "params" if any(isinstance(key, str) for group in saved for key in group["params"]
                            ) else "param_names"
    theirs, mine = ([plain_name(str(name)) for group in groups for name in group.get(key) or ()]
                    for groups, key in ((saved, field), (optimizer.param_groups, "param_names")))
    if theirs == mine or sorted(theirs) != sorted(mine):
        return
    there, here = next((a, b) for a, b in zip(theirs, mine, strict=True) if a != b)
    raise ValueError(f"{where}: saved with {there!r} where this optimizer has {here!r}, but the "
                     f"parameters must be in the same order ({REMEDY})")


def _merged(optimizer: MatrixOptimizer, mine: Mapping[str, Any], saved: Mapping[str, Any], at: str
            ) -> dict[str, Any]:
    """A group of this optimizer with the options of a saved one, checked."""
    # This optimizer's own names win, where it has them.
    options = {k: v for k, v in saved.items()
               if k != "params" and not (k == "param_names" and k in mine)}
    ours = "format" in options
    if options.get("format") == 0:  # of a state that has not begun
        del options["format"]
    # `capturable` is how a step runs, so this optimizer's value stays, and so does the form of its
    # rate, a tensor or a number.
    optimizer.table()["capturable"].check("capturable", options.pop("capturable", False), at)
    if isinstance(mine["lr"], Tensor) and isinstance(options.get("lr"), (int, float, Tensor)):
        options["lr"] = torch.full_like(mine["lr"], float(options["lr"]))
    elif isinstance(options.get("lr"), Tensor) and options["lr"].numel() == 1:
        options["lr"] = options["lr"].item()
    rule = options.get("algorithm")
    if ours and isinstance(rule, str) and rule not in ("adamw", optimizer.algorithm):
        raise ValueError(f"{at}: saved with algorithm={rule!r}, but {type(optimizer).__name__} "
                         f"has {optimizer.algorithm!r} ({REMEDY})")
    if not ours and options.get("decoupled_weight_decay") is False and options.get("weight_decay"):
        raise ValueError(f"{at}: saved with decoupled_weight_decay=False and weight_decay="
                         f"{options['weight_decay']}, but it must be True, or no decay: decay is "
                         f"decoupled here ({REMEDY})")
    if not ours and "nonfinite" in options:
        raise ValueError(f"{at}: has options of lissom's but no format")
    # Keys of users' own go on, but not the options of another class, which are all there.
    known = {*optimizer.table(), *OF_SOME}
    strange = (options.keys() - known - mine.keys() - FOREIGN
               if ours or saved.keys() >= _TORCH_ADAMW else set())
    for others in (cls.table().keys() - known for cls in _classes(Method)):
        if others and others <= strange:
            name = min(others)
            raise ValueError(f"{at}: saved with {name}={options[name]!r}, which is no option of "
                             f"{type(optimizer).__name__}, but of another class ({REMEDY})")
    return checked_group(optimizer, {**mine, **options, "params": mine["params"]}, at,
                         entering=False, foreign={*mine, *strange})


def _classes(cls: type[Method]) -> list[type[Method]]:
    """The class and all that are derived from it."""
    return [cls, *(x for child in cls.__subclasses__() for x in _classes(child))]


def _numbered(entry: Mapping[str, Any], optimizer: MatrixOptimizer, p: Tensor, ours: bool
              ) -> Mapping[str, Any]:
    """A saved state with ``index`` and ``key``, which torch's states do not have."""
    if not ours and (mine := optimizer.state.get(p)):
        return {**{k: mine[k] for k in ("index", "key")}, **entry}
    if "index" in entry:  # the first states of this format drew by index
        return {"key": entry["index"], **entry}
    return entry


def agreed_load(optimizer: MatrixOptimizer, state_dict: Mapping[str, Any]
                ) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Tensor]]]:
    """:func:`checked_load`; an error on one rank is raised on all that share a parameter."""
    failure, loaded = None, None
    try:
        loaded = checked_load(optimizer, state_dict)
    except Exception as error:  # raised below: the other ranks wait in a reduction
        failure = error
    begun = loaded is not None and bool(loaded[1])
    said = torch.tensor([failure is not None, begun, not begun], dtype=torch.int64, device="cpu")
    said = sharding.agreed(said, [p for g in optimizer.param_groups for p in g["params"]])
    refused, some, others = map(bool, said.tolist())
    if failure is not None:
        raise failure
    if loaded is None or refused:
        raise ValueError(f"{type(optimizer).__name__}.load_state_dict: another rank refuses its "
                         "part of the state, and says why; nothing was loaded on any")
    if some and others:
        raise ValueError(f"{type(optimizer).__name__}.load_state_dict: some ranks have got a state "
                         "that has not begun, others one that has; nothing was loaded on any")
    groups, states = loaded
    # Exchanges come last: all ranks take part in them.
    return groups, {p: {k: sharding.settled(x, p) for k, x in state.items()}
                    for p, state in states.items()}


def saved_groups(state_dict: Any, where: str) -> dict[str, Any]:
    """A state dict whose groups and keys fit together, in this version's format.

    Args:
        state_dict: what was saved, by whatever optimizer.
        where: beginning of a message.

    Raises:
        ValueError: what is wrong.
    """
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get(key), kind):
            raise ValueError(f"{where}: no {key!r} in this {type(state_dict).__name__}, so it is "
                             "no optimizer's state")
    known: set[Any] = set()
    for i, group in enumerate(state_dict["param_groups"]):
        at = f"{where}, group {i}"
        keys = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(keys, (list, tuple)) or not all(
                isinstance(k, (int, str)) for k in keys):
            raise ValueError(f"{at}: has no list of 'params'")
        names = group.get("param_names")
        if names is not None and (not isinstance(names, (list, tuple))
                                  or len(names) != len(keys)):
            raise ValueError(f"{at}: param_names={names!r}, but it must be {len(keys)} names")
        if twice := known.intersection(keys):
            raise ValueError(f"{at}: parameters {sorted(twice, key=str)!r} are saved twice")
        known.update(keys)
    stray = [k for k in state_dict["state"] if k not in known]
    if stray:
        raise ValueError(f"{where}: state of {stray[:5]!r}, which no saved group contains")
    old = dict(state_dict)
    while (upgrade := UPGRADES.get(_format(old))) is not None:
        old = upgrade(old)
    return old


def _format(state_dict: Mapping[str, Any]) -> int:
    """The format that all groups have; 0 for another optimizer's state and for a mixture."""
    formats = [group.get("format") for group in state_dict["param_groups"]]
    first = formats[0] if formats else 0
    return first if isinstance(first, int) and all(x == first for x in formats) else 0


def overruled(optimizer: MatrixOptimizer, groups: list[dict[str, Any]]) -> str:
    """Which options saved groups replace by other values, in words; rates aside.

    Args:
        optimizer: before it is loaded.
        groups: what :func:`checked_load` returned.

    Returns:
        ``"rank=4 (group 0: 8)"`` and so on, the saved values first; empty where there are none.
    """
    # Not what is switched on and off in a run.
    compared = {k: x for k, x in optimizer.table().items()
                if k not in {*BOOKKEEPING, "metrics", "capturable"}}
    found: dict[str, None] = {}
    for i, (mine, group) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        for name, option in compared.items():
            a, b = mine[name], group[name]
            # Schedules change one number to another.
            if a != b and not (option.number and a is not None and b is not None):
                found[f"{name}={group[name]!r} (group {i}: {mine[name]!r})"] = None
    return ", ".join(found)


def checked_state(optimizer: MatrixOptimizer, p: Tensor, entry: Mapping[str, Any],
                  o: Mapping[str, Any], at: str) -> dict[str, Tensor]:
    """A copy of one parameter's saved state in the slots that its options ask for.

    Args:
        optimizer: whose parameter it is.
        p: the parameter.
        entry: its saved state.
        o: options of its group.
        at: beginning of a message.

    Raises:
        ValueError: what is wrong.
    """
    slots = optimizer.stored_slots(p, o)
    if "master" in slots and "master" not in entry:  # a bf16 weight that was trained without it
        entry = {**entry, **{k: sharding.new(slots[k], p) for k in MASTERS if k in slots}}
    count = entry.get("projected_count", 0)
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    if isinstance(count, (int, float)) and count == 0:
        # Empty buffers of project_in_backward come and go with it.
        entry = {k: x for k, x in entry.items() if not k.startswith("projected") or k in slots}
        entry = {k: sharding.new(x, p) for k, x in slots.items() if k.startswith("projected")
                 } | entry
    elif "projected_count" not in slots:
        raise ValueError(f"{at}: projected_count={count}: saved in the middle of an accumulation, "
                         "so call project_in_backward(optimizer, ...) before loading it")
    if set(entry) != set(slots):
        raise ValueError(f"{at}: saved state has {sorted(entry, key=str)}, but "
                         f"{type(optimizer).__name__} with these options keeps {sorted(slots)} "
                         f"({REMEDY})")
    state: dict[str, Tensor] = {}
    for name, slot in slots.items():
        value = entry[name]
        if slot.shape == () and isinstance(value, (int, float)):
            if not slot.dtype.is_floating_point and not (
                    isinstance(value, int) and 0 <= value < 2**63):
                raise ValueError(f"{at}: {name}={value!r}, but it must be an integer >= 0 and "
                                 "below 2**63")
            value = torch.tensor(value, dtype=slot.dtype, device="cpu")
        if not isinstance(value, Tensor) or tuple(value.shape) != tuple(slot.shape):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{at}: {name} saved as {got}, expected {tuple(slot.shape)} "
                             f"({REMEDY})")
        if value.is_floating_point() != slot.dtype.is_floating_point or value.is_complex() or (
                not slot.dtype.is_floating_point and value.dtype != slot.dtype):
            raise ValueError(f"{at}: {name} saved as {value.dtype}, expected {slot.dtype}")
        if value.layout != torch.strided or value.is_meta != (slot.device.type == "meta"):
            raise ValueError(f"{at}: {name} saved as a {value.layout} tensor on "
                             f"{value.device}, expected a dense one "
                             f"{'on meta' if slot.device.type == 'meta' else 'with values'}")
        if sharding.as_parameter(value, p):
            state[name] = value.detach().to(slot.dtype, copy=True)
            continue
        state[name] = sharding.new(slot, p)
        try:
            sharding.put(state[name], value.detach())
        except ValueError as error:
            raise ValueError(f"{at}: {name} {error}") from None
    for name, value in state.items():
        value = sharding.local(value)
        if name.endswith("step") and not (0 <= value.item() < 2**53
                                          and value.item() <= state["step"].item()
                                          and value.item() == int(value)):
            raise ValueError(f"{at}: {name}={value.item()}, but it must be an integer >= 0 "
                             "and not above step")
        if name in ("index", "key", "projected_count") and not value.item() >= 0:
            raise ValueError(f"{at}: {name}={value.item()}, but it must be >= 0")
        unsigned = slots[name].code == "unsigned" or name.endswith(".scale")
        if unsigned and not value.is_meta and bool(
                (value < 0).any()):
            raise ValueError(f"{at}: {name} has a negative entry, but it must be >= 0")
    optimizer.check_state(p, state, o, at)
    return state
