"""Which slots each parameter of an optimizer has, and its state kept in step with them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import codec, keys, sharding, weights
from .checks import check_parameter
from .codec import Slot
from .common import BOOKKEEPING
from .dense import adam_slots
from .door import check_masters
from .loading import checked_state
from .options import Option

if TYPE_CHECKING:
    from .base import MatrixOptimizer

__all__ = ["Layouts", "slots_of", "stored_slots"]

# Parameters that get AdamW have an ``index`` from here on.
_DENSE = 1 << 31


def slots_of(optimizer: MatrixOptimizer, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
    """The slots that p has under options o, a quantized moment as one."""
    slots = {"step": codec.counter(device=p.device if o["capturable"] else None),
             "index": codec.counter(torch.int64),
             "key": codec.counter(torch.int64), **weights.master_slots(p, o)}
    own = optimizer.own_rule(p, o)
    slots |= optimizer.slots(p, o) if own else adam_slots(tuple(p.shape), p, o)
    slots |= optimizer._gradients.slots(p, o)
    if own and optimizer.stacked(p, o):  # what belongs to a matrix is where that is
        slots = {k: x._replace(rows=True, spread=False) if x.shape[:1] == p.shape[:1] else x
                 for k, x in slots.items()}
    return slots


def stored_slots(optimizer: MatrixOptimizer, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
    """The same as the state has them: a quantized moment as codes and scales."""
    kept: dict[str, Slot] = {}
    for name, slot in slots_of(optimizer, p, o).items():
        kept |= codec.stored(name, slot)
    return kept


class Layouts:
    """The slots of each parameter of one optimizer, by parameter.

    Holds no reference to the optimizer, so there is no cycle and its memory is freed as soon as it
    is dropped.
    """

    def __init__(self, table: Mapping[str, Option]) -> None:
        """Nothing yet.

        Args:
            table: every option of the optimizer's groups.
        """
        # (option, is a number): for numbers only None or not None can change the slots.
        self._kinds = [(k, x.number) for k, x in table.items() if k not in BOOKKEEPING]
        self._slots: dict[Tensor, dict[str, Slot]] = {}
        # What each parameter and its options looked like when its state was last checked.
        self._forms: dict[Tensor, tuple[Any, ...]] = {}
        # Next ``index`` for the own rule and for AdamW; None: count again when needed.
        self._next_index: list[int] | None = None
        # Every ``key`` in the state, counted with it.
        self._keys: set[int] = set()
        # Whether state has been made. It is made at its first use: made earlier, it would keep
        # whole parameters in memory that Accelerate replaces by shards.
        self.made = False
        # How many parameters the groups have had, and whether one had the class's own rule.
        self.size, self.matrices = 0, False

    def __getitem__(self, p: Tensor) -> dict[str, Slot]:
        """The slots of a parameter, a quantized moment as one."""
        return self._slots[p]

    def spread(self, p: Tensor) -> list[str]:
        """State names of a sharded p's spread slots (:attr:`Slot.spread`)."""
        if not sharding.is_sharded(p):
            return []
        return [name for key, slot in self._slots[p].items() if slot.spread
                for name in codec.stored(key, slot)]

    def _structure(self, o: Mapping[str, Any]) -> tuple[Any, ...]:
        """All of a group's options that slots depend on."""
        return tuple([o[k] is None if number else o[k] for k, number in self._kinds])

    def kept(self, optimizer: MatrixOptimizer) -> set[Tensor]:
        """The parameters that have state, or will have once that is made."""
        if self.made:
            return {p for p, state in optimizer._held.items() if state}
        return _first(optimizer) | {p for _, p, _ in optimizer._named() if _trained(p)}

    def stale(self, optimizer: MatrixOptimizer, p: Tensor, o: Mapping[str, Any]) -> bool:
        """Whether p, its options or the place of its state have changed since :meth:`sync`."""
        return (self._forms.get(p) != _form(p, self._structure(o))
                or _carried_off(optimizer._held.get(p, {})))

    def forget(self) -> None:
        """Let :meth:`sync` look at every parameter again."""
        self._forms.clear()

    def restart(self, made: bool) -> None:
        """All state has been replaced; ``made`` says whether there is any."""
        self.made = made
        self._slots.clear()
        self._forms.clear()
        self.recount()

    def recount(self) -> None:
        """Count the next free ``index`` and ``key`` again, from what is in the state."""
        self._next_index = None

    def sync(self, optimizer: MatrixOptimizer) -> None:
        """Make state for trainable parameters that have none, drop that of those that are gone.

        Accelerate and FSDP2 put other parameters into the groups after construction, and
        ``model.to`` changes them in place: their state follows. Lightning moves all state to the
        GPU but ``step``: what is read on the host comes back. DeepSpeed's ZeRO, stage 3, has one
        parameter at a time in the groups, so nothing is gone while they hold fewer than they had.

        Raises:
            ValueError: what cannot be; no state that there was has changed.
        """
        states = optimizer._held
        structures = {id(group): self._structure(group) for group in optimizer.param_groups}
        missing, count, present = [], 0, set()
        early = set() if self.made else _first(optimizer)  # which may be frozen by now
        for name, p, group in optimizer._named():
            count += 1
            present.add(p)
            form, last = _form(p, structures[id(group)]), self._forms.get(p)
            if not states.get(p):  # reading state[p] of a defaultdict leaves an empty entry
                if _trained(p) or p in early:
                    missing.append((name, p, group, form))
            elif last != form or _carried_off(states[p]):
                shape = p.shape if last is None else last[0]
                if shape != p.shape and _count(states[p]):
                    raise ValueError(f"{name!r} has changed its shape from {tuple(shape)} to "
                                     f"{tuple(p.shape)} since its state was made")
                others = self._others(p, states[p])
                own = {k: x for k, x in states[p].items() if k not in others}
                states[p] = _followed(optimizer, p, own, group, name) | others
                self._note(optimizer, p, group, form)
        if missing:
            _check_replaced(optimizer)
        if count >= self.size:
            self._drop([p for p in states if p not in present], states, optimizer)
        # Parameters that were trained from the start are numbered first, whenever state is made.
        if missing:
            first = _first(optimizer)
            missing.sort(key=lambda entry: entry[1] not in first)
        for name, p, group, form in missing:
            if not states.get(p):
                states[p] = self._created(optimizer, p, group, name)
                self._note(optimizer, p, group, form)
        if len(self._forms) > len(states):  # a user has taken some away
            self._forms = {p: form for p, form in self._forms.items() if p in states}
            self._slots = {p: slots for p, slots in self._slots.items() if p in states}
        self.made = True

    def _others(self, p: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
        """What others have put into the state of p."""
        if p not in self._slots:
            return {}
        own = {name for key, slot in self._slots[p].items() for name in codec.stored(key, slot)}
        return {k: x for k, x in state.items() if k not in own}

    def _note(self, optimizer: MatrixOptimizer, p: Tensor, o: Mapping[str, Any],
              form: tuple[Any, ...]) -> None:
        """The state of p fits the slots that it has now."""
        self._slots[p], self._forms[p] = slots_of(optimizer, p, o), form

    def _drop(self, gone: list[Tensor], states: dict[Tensor, dict[str, Tensor]],
              optimizer: MatrixOptimizer) -> None:
        """Let go of the state of parameters that others have replaced."""
        begun = sum(bool(states[p]) and _count(states[p]) > 0 for p in gone)
        if begun:
            warnings.warn(f"{type(optimizer).__name__}: {begun} parameters with state have been "
                          "replaced by others, whose state begins anew; to go on, save it before "
                          "and load it after they are replaced", stacklevel=4)
        for p in gone:
            del states[p]
            self.recount()

    def _created(self, optimizer: MatrixOptimizer, p: Tensor, o: Mapping[str, Any], name: str
                 ) -> dict[str, Tensor]:
        """Zeros for every slot, but for two numbers.

        ``index`` counts the parameters of the same rule before p: phases of refreshes follow it.
        ``key`` is for p's random numbers: from its name, or ``index`` where groups have no names.
        A key that another parameter has (which names give once in 2^63) is counted up.
        """
        check_parameter(p, repr(name), type(optimizer).__name__)  # it may have been frozen before
        check_masters(o, [p], repr(name))
        state = {k: sharding.new(slot, p) for k, slot in stored_slots(optimizer, p, o).items()}
        if self._next_index is None:
            states = [s for s in optimizer._held.values() if s]
            self._keys = {int(s["key"]) for s in states}
            used = [int(s["index"]) for s in states]
            self._next_index = [1 + max((i for i in used if i < _DENSE), default=-1),
                                1 + max((i for i in used if i >= _DENSE), default=_DENSE - 1)]
        dense = not optimizer.own_rule(p, o)
        state["index"].fill_(self._next_index[dense])
        self._next_index[dense] += 1
        key = keys.name_key(name) if "param_names" in o else int(state["index"])
        while key in self._keys:
            key += 1
        state["key"].fill_(key)
        self._keys.add(key)
        return state


def _check_replaced(optimizer: MatrixOptimizer) -> None:
    """Refuse parameters that others have put into the groups if no matrix is left."""
    present = [(p, o) for _, p, o in optimizer._named()]
    if not optimizer._layouts.matrices or any(
            p.ndim > 1 and optimizer.own_rule(p, o) for p, o in present):
        return
    shapes = ", ".join(str(tuple(p.shape)) for p, _ in present[:3])
    raise ValueError(
        f"{type(optimizer).__name__}: its matrices have been replaced by parameters of which none "
        f"is one (shapes {shapes}): what FSDP1 and stages 1 to 3 of DeepSpeed's ZeRO flatten "
        "has lost its matrix shape; use FSDP2 (torch.distributed.fsdp.fully_shard), which "
        "keeps it, DDP or stage 0, or AdamW, for which vectors will do")


def _first(optimizer: MatrixOptimizer) -> set[Tensor]:
    """What is now where a parameter was added that needed a gradient."""
    if len(optimizer._first) != len(optimizer.param_groups):  # a group was taken away
        return set()
    return {p for flags, group in zip(optimizer._first, optimizer.param_groups, strict=True)
            if len(flags) == len(group["params"])
            for p, flag in zip(group["params"], flags, strict=True) if flag}


def _trained(p: Tensor) -> bool:
    """Whether p may be updated: its gradient is there or will be."""
    return p.requires_grad or p.grad is not None


def _form(p: Tensor, structure: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that the slots of a parameter depend on, its options among it."""
    return (p.shape, p.dtype, p.device, structure)


def _carried_off(state: Mapping[str, Tensor]) -> bool:
    """Whether others have moved to a device what is read on the host."""
    return "index" in state and state["index"].device.type != "cpu"


def _count(state: Mapping[str, Tensor], name: str = "step") -> int:
    """A number of the state, by default the updates so far; 0 where it has no value (meta)."""
    return int(state[name]) if name in state and not state[name].is_meta else 0


def _followed(optimizer: MatrixOptimizer, p: Tensor, state: dict[str, Tensor],
              o: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The state of a parameter that may have changed under it."""
    check_masters(o, [p], repr(name))
    slots = stored_slots(optimizer, p, o)
    if "master" in state and p.dtype != torch.bfloat16:
        warnings.warn(f"{type(optimizer).__name__}: {name!r} is in {p.dtype} now, but more bits of "
                      "its bf16 values were in the state (master_bits), and are dropped; before "
                      "such a change, full_precision(p) gives all of them", stacklevel=4)
        state = {k: x for k, x in state.items() if k not in weights.MASTERS}
    if state.keys() == slots.keys() and all(
            (*state[k].shape, state[k].dtype, state[k].device) == (*x.shape, x.dtype, x.device)
            for k, x in slots.items()):
        return state
    # A gradient in the buffers of project_in_backward counts as state, even before the first step.
    if not _count(state) and not _count(state, "projected_count"):
        fresh = {k: sharding.new(x, p) for k, x in slots.items()}
        for number in ("index", "key"):
            fresh[number].copy_(state[number])
        return fresh
    return checked_state(optimizer, p, state, o, f"{name!r} or its options have changed, its "
                                                 "state has not")
