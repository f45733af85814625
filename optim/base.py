"""MatrixOptimizer: the one loop that every class of this package runs through.

From gradient to weight a step is here: checks of all, then batch by batch a method's update
(:mod:`lissom.optim.method`, which has the names too), decay and write
(:mod:`lissom.optim.apply`), and what is kept of it (:mod:`lissom.optim.codec`). Options come in by
:mod:`lissom.optim.door`, slots are in :mod:`lissom.optim.layouts`, what is loaded is checked in
:mod:`lissom.optim.loading`.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor

from ..kernels.apart import Apart
from . import codec, metrics, sharding, weights
from .apply import apply, negated
from .batches import Work, operands, windows
from .checks import (
    capturing,
    check_capture,
    check_gradient,
    check_parameter,
    listed,
    spoilt,
    without_autocast,
)
from .codec import Slot
from .common import FORMAT
from .dense import step_adamw
from .door import changed_options, checked_group, constructor_options, numbers, plain_options
from .gradients import Gradients
from .keys import names_of
from .layouts import Layouts, stored_slots
from .loading import REMEDY, agreed_load, overruled
from .method import Method
from .options import nearest
from .plan import Plan, plan_of
from .sharding import Rows
from .whole import Waiting, answered, requested

__all__ = ["MatrixOptimizer", "PartialStepError", "checked_optimizer"]


class PartialStepError(RuntimeError):
    """A step failed after some parameters had moved; the message names them."""


class MatrixOptimizer(Method, torch.optim.Optimizer):
    """Base of all classes: options, state, steps, saving and loading, the same for every method."""

    def __init__(self, params: Any, given: Mapping[str, Any]) -> None:
        """Check every option that was given, then add the groups.

        Args:
            params: as torch.optim.AdamW takes them.
            given: options of :meth:`table`, of AdamW's part (``lr_adamw`` and so on) and of
                torch about how a step runs.
        """
        defaults, dense = constructor_options(type(self), given)
        # Rates that were given as tensors, which CUDA graphs read: the groups' and AdamW's part's.
        rates = {k: v for k, v in given.items() if k in ("lr", "lr_adamw")
                 and isinstance(v, Tensor)}
        self._prepare(dense, rates)
        super().__init__(params, defaults)
        self._before_capture()
        for text in self.advice(given):
            warnings.warn(text, stacklevel=3)

    def _prepare(self, dense: dict[str, Any], rates: Mapping[str, Tensor]) -> None:
        """Set up what is not saved: caches, and who works in the backward pass.

        Only the two arguments go into a pickle.
        """
        self._adamw, self._rates = dense, rates
        # By group and place, whether a parameter needed a gradient when it was added: it gets state
        # even if it is frozen before that is made. No weak references, with which torch cannot move
        # the weights of FSDP2.
        self._first: list[list[bool]] = []
        # p.grad, or a handle that works in the backward pass: :mod:`lissom.optim.backward`.
        self._gradients = Gradients()
        self._layouts = Layouts(self.table())
        # Options of each group, by its id, when they were last checked.
        self._seen: dict[int, dict[str, Any]] = {}
        # By ``index``, what was measured of a parameter when that was last asked for.
        self._measured: dict[int, dict[str, Tensor]] = {}

    @property
    def state(self) -> defaultdict[Any, Any]:
        """State by parameter, flat tensors; it is made when it is first asked for."""
        if not self._layouts.made:
            self._sync_state()
        return self._held

    @state.setter
    def state(self, value: defaultdict[Any, Any]) -> None:
        # Stored under another name: Lightning's wrappers derive their class from this one, so the
        # property runs on the wrapper. Their __getattr__ finds "_held" in the optimizer; an entry
        # "state" of __dict__ would be missing in theirs.
        self._held = value

    def advice(self, given: Mapping[str, Any]) -> Iterator[str]:
        """Warnings of the constructor, given once all groups are added.

        Args:
            given: options of the constructor.
        """
        if self.algorithm != "adamw" and not self._layouts.matrices:
            yield (f"{type(self).__name__} has no matrix of its own, so it is AdamW. "
                   f"{self.remedy} plan() tells why.")

    # ---------------------------------------------------------------- parameters

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, checked as in the constructor, with their state if there is any.

        Args:
            param_group: ``params`` (a tensor, an iterable of tensors or of (name, tensor)) and
                any option of the class; what it leaves out has the constructor's value.
                ``param_names``, one for each, as groups that torch has made hold them, name its
                tensors.

        Raises:
            TypeError, ValueError: names parameter or option, value and rule; nothing is added.
        """
        where = f"{type(self).__name__} group {len(self.param_groups)}"
        if not isinstance(param_group, dict):
            raise TypeError(f"{where}: must be a dict, but got {type(param_group).__name__}")
        if "params" not in param_group:
            raise ValueError(f"{where}: has no 'params'{nearest('params', param_group)}")
        group = dict(param_group)
        params = listed(group["params"], where, group.pop("param_names", None))
        named = [q if isinstance(q, tuple) else (None, q) for q in params]
        for i, (name, p) in enumerate(named):
            check_parameter(p, name or f"parameter {i}", where)
            sharding.check_placements(p, name or f"parameter {i}", where)
        group["params"] = [p for _, p in named]
        explicit = {self.spellings.get(k, k) for k in group}
        names = [name for name, _ in named]
        # Names are for messages only here: torch adds them to the group itself.
        group = checked_group(self, {**group, "param_names": names} if all(names) else group, where)
        group.pop("param_names", None)
        group["params"] = params
        present = {id(p): i for i, g in enumerate(self.param_groups) for p in g["params"]}
        for i, (name, p) in enumerate(named):
            if id(p) in present:
                raise ValueError(f"{where}: {name or f'parameter {i}'} is in more than one group, "
                                 f"in {present[id(p)]} too, but it must be in one")
        if self._layouts.made:  # those that were unfrozen are numbered before new ones
            self._sync_state()
        count = len(self.param_groups)
        try:
            for part in self._split(group, explicit):
                super().add_param_group(part)
            self._first += [[p.requires_grad for p in g["params"]]
                            for g in self.param_groups[count:]]
            if self._layouts.made:
                self._sync_state()
        except BaseException:
            old = {p for g in self.param_groups[:count] for p in g["params"]}
            for p in chain(*(g["params"] for g in self.param_groups[count:])):
                if p not in old:
                    self._held.pop(p, None)
            del self.param_groups[count:], self._first[count:]
            self._layouts.recount()
            raise
        self._remember(self.param_groups[count:])
        self._count(self.param_groups[count:])

    def _count(self, groups: Sequence[dict[str, Any]]) -> None:
        """Count the parameters of new groups, before wrappers such as FSDP2 replace them."""
        own = [self.own_rule(p, o) for o in groups for p in o["params"]]
        self._layouts.size += len(own)
        self._layouts.matrices |= self.algorithm != "adamw" and any(own)

    def _remember(self, groups: Sequence[dict[str, Any]]) -> None:
        """Keep a copy of the groups' options; not of ``params``, which would stay in memory."""
        self._seen.update((id(g), {k: v for k, v in g.items() if k != "params"}) for g in groups)

    def _split(self, group: dict[str, Any], explicit: set[str]) -> Iterator[dict[str, Any]]:
        """The group, or its two halves where AdamW's part has options that it does not state."""
        dense = {k: v for k, v in self._adamw.items() if k not in explicit}
        if not dense or not group["params"]:
            yield group
            return
        halves: tuple[list[Any], list[Any]] = [], []
        for entry in group["params"]:
            p = entry[1] if isinstance(entry, tuple) else entry
            halves[not self.own_rule(p, group)].append(entry)
        if halves[0]:
            yield {**group, "params": halves[0]}
        if halves[1]:
            rate = group["lr"] if "lr" not in dense else self._rates.get("lr_adamw")
            if group["capturable"] and isinstance(rate, Tensor):
                dense["lr"] = rate.detach().clone()
            yield {**group, **dense, "params": halves[1]}

    def _named(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """(name, parameter, group) of everything; a name is made up where none was given."""
        for i, group in enumerate(self.param_groups):
            names = names_of(group)
            for j, p in enumerate(group["params"]):
                yield (names[j] if names else f"group {i} parameter {j}"), p, group

    def why_adamw(self, p: Tensor, o: Mapping[str, Any]) -> str | None:
        """Why p gets AdamW, or None where the class's own rule has it."""
        if self.algorithm != "adamw" and o["algorithm"] == "adamw":
            return "algorithm='adamw' in its group"
        return self.declines(p, o)

    def own_rule(self, p: Tensor, o: Mapping[str, Any]) -> bool:
        """Whether the class's own rule has p; AdamW has all others."""
        return self.why_adamw(p, o) is None

    def stored_slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        """Every state tensor that p has under options o."""
        return stored_slots(self, p, o)

    def _sync_state(self) -> None:
        """State for trainable parameters that have none, and none for those that are gone.

        Raises:
            ValueError: the class's own rule has nothing left to work on; nothing was changed.
        """
        self._layouts.sync(self)
        self._gradients.follow()

    def _before_capture(self) -> None:
        """Make the state of capturable groups now: a graph would own what it allocates."""
        if any(group["capturable"] for group in self.param_groups):
            self._sync_state()

    # ---------------------------------------------------------------- the step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError, ValueError: a gradient that cannot be used, by parameter; nothing was
                written. ``FloatingPointError``: a NaN or Inf with ``nonfinite="raise"``.
            RuntimeError: in a CUDA graph without ``capturable``, or what
                :func:`lissom.optim.project_in_backward` and
                :func:`lissom.optim.update_in_backward` refuse; nothing was written.
            PartialStepError: a failure after some parameters had moved.
        """
        check_capture(self.param_groups, f"{type(self).__name__}.step()")
        if not self._gradients.begin(closure):
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with without_autocast():
            work = self._checked_work()
            self._gradients.before(work)
            before = self.before_updates(work)
            moved: list[str] = []
            # A list: a method's `together` may raise, which must come before the first write.
            for window in [*windows(self, work)]:
                self._run(window, moved, before)
            self._gradients.end()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients as in torch, those that wait for the step in buffers too."""
        self._gradients.clear()
        super().zero_grad(set_to_none)

    def _run(self, batches: Sequence[Sequence[Work]], moved: list[str],
             before: Sequence[str] = ()) -> None:
        """Update parameters together.

        Args:
            batches: them; those of one batch have one update.
            moved: names of those that were updated before, to which theirs are added.
            before: names of those that :meth:`before_updates` has moved.
        """
        window = [w for batch in batches for w in batch]
        touched = [self._touched(w.p) for w in window]
        versions = [[x._version for x in xs] for xs in touched]
        done: set[int] = set()  # names need not differ
        try:
            old = metrics.before(self, window)
            for i in answered([self._step_batch(batch) for batch in batches]):
                done.update(map(id, batches[i]))
            metrics.after(self, window, old)
        except Exception as error:
            moved += [w.name for w in window if id(w) in done]
            rest = [w.name for w in window if id(w) not in done]
            partly = [w.name for w, old_, xs in zip(window, versions, touched, strict=True)
                      if id(w) not in done and old_ != [x._version for x in xs]]
            if not moved and not partly and not before:
                raise
            earlier = f"; before all updates {', '.join(before)} had been moved" if before else ""
            at = partly or rest or [w.name for w in window]
            how = "partly" if partly else "not" if rest else "wholly"
            raise PartialStepError(
                f"{type(self).__name__}.step() failed at {', '.join(map(repr, at))} ({error}), "
                f"which is {how} updated; {len(moved)} parameters had been updated: "
                f"{', '.join(moved)}{earlier}") from error
        moved += [w.name for w in window]

    def _touched(self, p: Tensor) -> list[Tensor]:
        """What an update of p writes to: this rank's parts of p and its state."""
        tensors = [p, *(x for x in self.state[p].values() if isinstance(x, Tensor))]
        return [*map(sharding.local, tensors)] if sharding.is_sharded(p) else tensors

    def _checked_work(self) -> list[Work]:
        """All checks of a step, before its first write. Empty if the step is to be skipped."""
        for group in self.param_groups:
            self._check_changed(group)
        table = self.table()
        plain = {id(group): numbers(group, table) for group in self.param_groups}
        work = []
        for name, p, o in self._named():
            if (g := self._gradients.gradient(p)) is not None:
                g = check_gradient(p, g, name) if g is p.grad else g
                work.append(Work(name, p, g, plain[id(o)]))
        self._sync_state()
        for w in work if capturing() else ():
            if self.own_rule(w.p, w.o) and (reason := self.unready(self.state[w.p])):
                raise RuntimeError(f"{type(self).__name__}.step(): {w.name!r} {reason} in a CUDA "
                                   "graph")
        if spoilt(work):
            for group in self.param_groups:
                group["skipped_steps"] += 1
            return []
        return work

    def _check_changed(self, group: dict[str, Any]) -> None:
        """Check options that were changed in a group since the last step."""
        changed_options(self, group, self._seen.setdefault(id(group), {}))

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because of a NaN or Inf gradient (``nonfinite="skip"``)."""
        return max(int(group["skipped_steps"]) for group in self.param_groups)

    def _rows(self, p: Tensor, o: Mapping[str, Any]) -> Rows | None:
        """The rows of a sharded parameter on which its next update works; None for all of it."""
        rows = sharding.rows_of(p)
        if rows is None:
            return None
        if o["shards"] == "whole":
            able = False
        elif self.own_rule(p, o):
            rows = rows._replace(stack=self.stacked(p, o))
            able = rows.stack or self.by_rows(p, self.state[p], o, int(self.state[p]["step"]) + 1)
        else:  # the quantization blocks of a vector cross the cuts between ranks
            able = p.ndim > 1 or not any(slot.bits for slot in self._layouts[p].values())
        return self._gradients.rows(p, rows if able else None)

    def _step_batch(self, batch: Sequence[Work]) -> Waiting[None]:
        """From gradient to parameter, for one parameter or several that are alike.

        A generator that yields the update's requests. Several parameters are treated as one stack.
        """
        p, o = batch[0].p, batch[0].o
        state, rows = self.state[p], self._rows(p, o)
        # An int, or a tensor on the device where a CUDA graph is to read it.
        t: Any = state["step"].long() + 1 if o["capturable"] else int(state["step"]) + 1
        spread = self._layouts.spread(p)
        x, g, stored = operands(batch, [self.state[w.p] for w in batch], spread, rows)
        if not self.own_rule(p, o):
            step_adamw(x, g, stored, self._layouts[p], o, t, rows)
        else:
            yield from self._step_matrix(p, x, g, stored, o, t, rows)
        if sharding.is_sharded(p):
            for name in stored if rows is None else spread:
                sharding.keep(state[name], stored[name])
            if rows is None:
                sharding.keep(p, x)
            else:
                sharding.put_rows(p, x)
        if len(batch) > 1:
            torch._foreach_add_([self.state[w.p]["step"] for w in batch], 1)
        else:
            state["step"].fill_(t)
        self._gradients.consumed(p)

    def _step_matrix(self, p: Tensor, x: Any, g: Any, stored: Mapping[str, Tensor],
                     o: dict[str, Any], t: Any, rows: Rows | None) -> Waiting[None]:
        """The class's own rule.

        Args:
            p: the parameter, or the first of a batch.
            x: what it works on: p, some rows of it, or the batch.
            g: its gradient.
            stored: its state.
            o: its options.
            t: 1-based count of the update.
            rows: those of x, if they are not all.
        """
        shape = self.matrix_shape(p, o)
        if isinstance(x, Apart):
            shape = x.shape
        elif rows is not None:
            shape = (len(x), *shape[1:])
        # a copy where the memory format allows no view
        matrix = x if x.shape == shape else x.reshape(shape)
        slots = self._layouts[p]
        s = codec.Decoded(stored, slots, p, rows)
        s["weight"] = matrix
        u: Any = self._gradients.lifted(p, s, o, t)
        if u is None:
            g = g if g.shape == shape else g.reshape(shape)
            u = self.update(negated(g, o), s, o, t)
        if isinstance(u, Generator):
            u = yield from requested(u, codec.rows_of(s))
        apply(matrix, u, stored, o, t, 0 if rows is None else rows.start * math.prod(p.shape[1:]))
        if matrix is not x and matrix.untyped_storage()._cdata != x.untyped_storage()._cdata:
            x.copy_(matrix.view(x.shape))
        codec.encode(s, stored, slots, o, t)

    # ---------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """State by parameter number, and groups, as torch has them; plain tensors and values.

        Before the state is first used the dict holds none, as in torch, unless parameters are
        sharded; its groups then have ``format=0``.
        """
        layouts = self._layouts
        if layouts.made or any(sharding.is_sharded(p) for _, p, _ in self._named()):
            self._sync_state()
        self._gradients.check_saved()
        begun = layouts.made
        layouts.made = True  # torch's method reads the state, and packs what the groups say
        # torch's method fails on state of a parameter in no group, which DeepSpeed has between
        # steps.
        present = {p for g in self.param_groups for p in g["params"]}
        away = {p: self._held.pop(p) for p in [*self._held] if p not in present}
        strange = [(g, g.pop("param_names")) for g in self.param_groups
                   if "param_names" in g and names_of(g) is None]
        for group in self.param_groups:
            group.update(plain_options(group, self.table()))
        try:
            for group in self.param_groups if not begun else ():
                group["format"] = 0
            return super().state_dict()
        finally:
            layouts.made = begun
            self._held.update(away)
            for group, names in strange:
                group["param_names"] = names
            for group in self.param_groups:
                group["format"] = FORMAT

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from pickle or deepcopy, through the same check as the constructor."""
        held = self.__dict__ | state
        self._prepare(held.get("_adamw", {}), held.get("_rates", {}))
        self._layouts.made = bool(state["state"])
        self.defaults = held["defaults"]
        groups = [checked_group(self, g, f"{type(self).__name__} group {i}", entering=False,
                                foreign=g)
                  for i, g in enumerate(state["param_groups"])]
        super().__setstate__({**state, "param_groups": groups})
        self._held = self.__dict__.pop("state")
        self._first += self.__dict__.pop("first", ())
        self._count(self.param_groups)
        self._remember(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep."""
        if self._layouts.made:
            self._sync_state()
        self._gradients.check_saved()
        return {"defaults": self.defaults, "state": self._held, "param_groups": self.param_groups,
                "_adamw": self._adamw, "_rates": self._rates, "first": self._first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, bit for bit; moments stay in the dtypes they were saved in.

        Saved options replace those of this optimizer, as in torch, with a warning where they are
        more than numbers; :func:`lissom.optim.convert_state` goes on with this optimizer's. A state
        dict of ``torch.optim.AdamW`` is read too, for parameters that get AdamW here.

        Raises:
            TypeError, ValueError: what is wrong and where; nothing was changed.
        """
        if isinstance(state_dict, dict):
            state_dict = dict(state_dict)  # hooks may change it, and it is the caller's
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        if self._layouts.made:
            self._sync_state()
        groups, states = agreed_load(self, state_dict)
        if replaced := overruled(self, groups):
            warnings.warn(f"{type(self).__name__}.load_state_dict: the saved options go on: "
                          f"{replaced}. {REMEDY}.", stacklevel=2)
        for mine, group in zip(self.param_groups, groups, strict=True):
            if isinstance(mine["lr"], Tensor):  # keep the tensor: others hold a reference to it
                group["lr"] = mine["lr"].copy_(group["lr"])
        super().__setstate__({"param_groups": groups})
        self._held.clear()
        self._held.update(states)
        self._layouts.restart(made=bool(states))
        self._measured.clear()
        self._seen.clear()
        self._remember(groups)
        self._before_capture()
        self._gradients.loaded()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def full_precision(self, p: Tensor) -> Tensor:
        """The fp32 value of a weight, with the bits that the state keeps of it (``master_bits``).

        A collective operation where a DTensor's columns are cut.

        Args:
            p: a parameter of this optimizer.

        Returns:
            A new tensor of p's shape; p's own values where nothing more is kept.
        """
        kept = {k: sharding.local(x) for k, x in self.state.get(p, {}).items()}
        with torch.no_grad():
            rows = weights.read_weight(sharding.in_rows(p), kept).clone()
            return sharding.like(p, rows)

    # ---------------------------------------------------------------- report

    def plan(self) -> Plan:
        """What happens to each parameter, and the bytes of its state.

        Returns:
            Rows of name, shape, rule, rank, side, state bytes and reason; it prints as a table,
            and its totals are the bytes of all of it.
        """
        if self._layouts.made:
            self._sync_state()
        return plan_of(self)

    def metrics(self) -> list[dict[str, Tensor]]:
        """What the last steps did, for a log: one dict for each group, in order.

        Groups with ``metrics=True`` are measured in each step; the option may change at any time:
        ``group["metrics"] = step % 100 == 0``. A parameter that a step did not move, or whose
        group did not ask, keeps the numbers of the last one that did. Measuring takes a copy of
        one parameter at a time (of a few, where matrices are worked on in batches) and two passes
        over it. All are tensors on the device of the group's parameters, of the first where they
        are on several; nothing waits for it until one is read, with
        ``float(m["energy"].nanmean())``, say.

        Returns:
            By name, a vector with an entry for each parameter of the group, NaN where it has
            none, and left out where no parameter has one:

            - ``update_ratio``: |p_t - p_{t-1}| / |p_{t-1}|, decay and rounding included;
            - ``energy``: |R|^2 / |G|^2, the share of the (last micro-batch's) gradient that the
              subspace captures; above 1 it can be where the basis is not orthonormal (APOLLO);
            - ``limiter``: |S_t| / (limiter |S_{t-1}|) of Fira's norm-growth limiter: 1 where it
              held the step back, less where it did not, infinite in the first step;
            - ``last_refresh``: 1-based update in which the basis was found, 0 before the first;
              there without ``metrics=True`` too, on the host.

            And ``skipped_steps``, a 0-d tensor: steps that ``nonfinite="skip"`` has skipped.
        """
        return metrics.metrics_of(self)


def checked_optimizer(optimizer: Any, where: str) -> MatrixOptimizer:
    """One of this package, also out of Lightning's wrapper, or a TypeError."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(optimizer, MatrixOptimizer) and isinstance(inner, MatrixOptimizer):
        # A wrapper passes isinstance, but attributes set on it do not reach the optimizer.
        optimizer = inner
    if not isinstance(optimizer, MatrixOptimizer):
        raise TypeError(f"{where}: optimizer is a {type(optimizer).__name__}, but it must be one "
                        "of lissom.optim")
    return optimizer
