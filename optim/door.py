"""Checks of all options on their way in: from a constructor, a new, a saved or an edited group.

Everything is checked before anything changes. A message gives the place, the option, the value
received and the rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .common import ADAMW_PART, BOOKKEEPING, FOREIGN, FORMAT, OF_SOME
from .options import Option, boolean, checked, unknown
from .sharding import is_sharded

if TYPE_CHECKING:
    from .base import MatrixOptimizer
    from .method import Method

__all__ = ["TORCH_ONLY", "changed_options", "check_masters", "checked_group",
           "constructor_options", "numbers", "plain_options", "plain_value"]

#: Options of torch.optim.AdamW about how it runs, which change no result.
TORCH_ONLY = {"foreach", "fused", "differentiable", "decoupled_weight_decay"}

_USE_MUON = boolean(True)


def constructor_options(cls: type[Method], given: Mapping[str, Any]
                        ) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check the options that a constructor was given.

    Args:
        cls: of the optimizer.
        given: options of its table, of AdamW's part (``lr_adamw`` and so on) and of torch about how
            a step runs.

    Returns:
        The defaults of all groups, and the options that AdamW's part has instead.
    """
    table, where = cls.table(), f"{cls.__name__}()"
    _refuse_torch_only(given, where)
    dense = {k: v for k, v in given.items() if k in ADAMW_PART and v is not None}
    if dense and cls.algorithm == "adamw":
        name, value = next(iter(dense.items()))
        raise TypeError(f"{where}: {name}={value!r}, but {cls.__name__} has no such option: all "
                        f"parameters get {ADAMW_PART[name]}, or that of their own group")
    known = {k: v for k, v in given.items() if k not in {*TORCH_ONLY, *ADAMW_PART}}
    for name in known:
        if name not in table or name in BOOKKEEPING:
            # a TypeError, as Python's for an argument that there is not
            parts = ADAMW_PART if cls.algorithm != "adamw" else ()
            raise TypeError(unknown(name, known[name], {*table, *parts} - BOOKKEEPING.keys(),
                                    where))
    defaults = {name: option.default for name, option in table.items()}
    return defaults | checked(known, table, where), {
        ADAMW_PART[k]: table[ADAMW_PART[k]].check(k, v, where) for k, v in dense.items()}


def checked_group(optimizer: MatrixOptimizer, group: Mapping[str, Any], where: str, *,
                  entering: bool = True, foreign: Iterable[str] = ()) -> dict[str, Any]:
    """A copy of a group with every option present and checked.

    Args:
        optimizer: the group's, or to be.
        group: options, ``params`` and foreign keys.
        where: beginning of a message.
        entering: the group is new, not saved.
        foreign: keys beside the known foreign ones that are passed on as they are.
    """
    table = optimizer.table()
    others = {"params", *FOREIGN, *foreign} - table.keys()
    given: dict[str, Any] = {}
    if entering:
        _refuse_torch_only(group, where)
    for name, value in group.items():
        if name in others or name in TORCH_ONLY:
            continue
        if name not in table and (name in OF_SOME or (name == "scaling" and "roles" in group)):
            continue  # written by param_groups or adapter_groups for other classes
        name = optimizer.spellings.get(name, name)
        if name == "use_muon":  # Keller Jordan's group key
            value = optimizer.algorithm if _USE_MUON.check(name, value, where) else "adamw"
            name = "algorithm"
        if name in given:
            raise ValueError(f"{where}: {name!r} is given twice, under two spellings")
        given[name] = value
    own = checked(given, table, where)
    if own.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{where}: format={own['format']}, but this version of lissom reads "
                         f"format {FORMAT}")
    # torch adds names of its own to the defaults
    known = {k: x.default for k, x in table.items()}
    full = known | {k: v for k, v in optimizer.defaults.items() if k in known} | own
    rate = group.get("lr", optimizer._rates.get("lr") if entering else None)
    if full["capturable"] and isinstance(rate, Tensor):
        # each new group gets a tensor of its own, as schedulers and graphs change it in place
        full["lr"] = rate.detach().clone() if entering else rate
    _check_together(optimizer, full, group, set(own) if entering else set(), where)
    return {**{k: v for k, v in group.items() if k in others}, **full}


def _check_together(optimizer: MatrixOptimizer, full: Mapping[str, Any], group: Mapping[str, Any],
                    explicit: set[str], where: str) -> None:
    """Rules about several options and the parameters of a group; raises ValueError."""
    plain = [p for p in group.get("params", []) if isinstance(p, Tensor)]
    check_masters(full, plain, where)
    o = {**full, "param_names": group.get("param_names")}
    if full["capturable"]:
        _check_capturable(o, plain, optimizer.uncapturable(o), where)
    optimizer.check_combination(o, plain, explicit, where)


def check_masters(o: Mapping[str, Any], params: Iterable[Tensor], where: str) -> None:
    """Refuse ``master_bits`` for parameters in fp16: ValueError."""
    if o["master_bits"] is not None and any(p.dtype == torch.float16 for p in params):
        raise ValueError(f"{where}: master_bits={o['master_bits']}, but it must be None for "
                         "fp16 weights: what they lack of fp32 has no fixed number of bits "
                         "(use bf16 weights)")


def changed_options(optimizer: MatrixOptimizer, group: dict[str, Any], last: dict[str, Any]
                    ) -> None:
    """Check the options of a group that were changed in place, and store them as plain values.

    The rate, which schedulers change at every step, may be any number, as in torch. A numeric
    option in a tensor stays in it, as its owner may change it.

    Args:
        optimizer: whose group it is.
        group: the group.
        last: its options when they were last checked; updated here.
    """
    table, rate = optimizer.table(), group.get("lr", 0.0)
    names = [k for k, v in group.items() if k in table and k != "lr" and v is not last.get(k)]
    numeric = type(rate) is float or _is_number(rate)
    if not names and numeric:
        return
    number = next(i for i, x in enumerate(optimizer.param_groups) if x is group)
    where = f"{type(optimizer).__name__} group {number}"
    if not numeric:
        raise TypeError(f"{where}: lr={rate!r}, but it must be {table['lr'].rule}")
    full = {k: plain_value(group[k]) if k in group and k != "lr" else group.get(k, x.default)
            for k, x in table.items()}
    full |= (new := checked({k: full[k] for k in names}, table, where))
    _check_together(optimizer, full, group, set(), where)
    group.update({k: v for k, v in new.items()
                  if not (table[k].number and isinstance(group[k], Tensor))})
    last.update({k: group[k] for k in names})


def _is_number(value: Any) -> bool:
    """Whether it is a real number or holds one; no tensor is read."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(plain_value(value), Real)


def plain_options(group: Mapping[str, Any], table: Mapping[str, Option]) -> dict[str, Any]:
    """The options to save: numpy's numbers, which schedules leave, become plain ones, because
    ``torch.load(weights_only=True)`` refuses them. Tensors stay in numeric options only.
    """
    return {k: plain_value(v) for k, v in group.items() if k != "params" and not (
        isinstance(v, Tensor) and (k not in table or table[k].number))}


def plain_value(value: Any) -> Any:
    """The number that a tensor or numpy's scalar holds; those of a tuple or list, too."""
    if type(value) in (tuple, list):
        return type(value)(map(plain_value, value))
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    return value.item() if hasattr(value, "item") and getattr(value, "size", 0) == 1 else value


def numbers(group: dict[str, Any], table: Mapping[str, Option]) -> dict[str, Any]:
    """The group, with tensors and numpy's numbers in options replaced by Python's numbers.

    A rate that a CUDA graph reads stays a tensor.
    """
    held = {k: plain_value(group[k]) for k in table if hasattr(group.get(k), "item")
            and not (k == "lr" and group["capturable"] and isinstance(group[k], Tensor))}
    return {**group, **held} if held else group


def _refuse_torch_only(given: Mapping[str, Any], where: str) -> None:
    """Refuse values of torch's switches that ask for what this package does not do."""
    if given.get("differentiable"):
        raise ValueError(f"{where}: differentiable={given['differentiable']!r}, but it must be "
                         "False: this step is not differentiated through")
    if not given.get("decoupled_weight_decay", True):
        raise ValueError(f"{where}: decoupled_weight_decay=False, but it must be True: "
                         "decay is decoupled")
    for name in ("foreach", "fused"):
        if not isinstance(given.get(name), (bool, type(None))):
            raise TypeError(f"{where}: {name}={given[name]!r}, but it must be None, True or False")


def _check_capturable(o: Mapping[str, Any], params: list[Tensor], reason: str | None, where: str
                      ) -> None:
    """Refuse what a CUDA graph would freeze: whatever is decided or counted on the host.

    Args:
        o: all options of a group with ``capturable=True``, and its ``param_names`` or None.
        params: its parameters.
        reason: why the class cannot, or None.
        where: beginning of a message.

    Raises:
        ValueError: what the group has that a graph would freeze.
    """
    names = o["param_names"] or [f"parameter {i}" for i in range(len(params))]
    sharded = [name for name, p in zip(names, params, strict=False) if is_sharded(p)]
    if reason is None and o["nonfinite"] != "propagate":
        reason = f"nonfinite={o['nonfinite']!r} looks at the gradients on the host"
    if reason is None and sharded:
        reason = f"{sharded[0]} is sharded, and what its ranks exchange is decided on the host"
    if reason is not None:
        raise ValueError(f"{where}: capturable=True, but it must be False: {reason}; capture "
                         "forward and backward, and call step() outside the graph")
    lr = o["lr"]
    if not isinstance(lr, Tensor):
        return
    elsewhere = [f"{name} on {p.device}" for name, p in zip(names, params, strict=False)
                 if p.device != lr.device]
    if lr.shape != () or lr.dtype not in (torch.float32, torch.float64) or elsewhere:
        beside = f", beside {elsewhere[0]}" if elsewhere else ""
        raise ValueError(f"{where}: lr is a tensor of shape {tuple(lr.shape)}, {lr.dtype}, on "
                         f"{lr.device}{beside}, but it must be 0-d, fp32 or float64 and on the "
                         "device of the parameters")
