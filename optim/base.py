"""MatrixOptimizer: the one loop that every class of this package runs through.

Names, here and in every method file (shapes of one matrix, in PyTorch's layout):

====  =====================================================================================
p     parameter; as a matrix m x n: m = output features (rows), n = input features
g     its gradient, of p's shape; read, never written
s     its state: a flat dict of tensors
o     its options: the parameter group
t     1-based count of this parameter's updates
r     rank; R = P^T G Q is the projected gradient
u     the update before learning rate: p <- (1 - lr * weight_decay) p - lr * u
====  =====================================================================================

A method says which parameters it takes (:meth:`MatrixOptimizer.declines`), what it keeps for one
(:meth:`MatrixOptimizer.slots`) and what its update is (:meth:`MatrixOptimizer.update`). All else
is here: options, state, checks, saving and loading; decay and update reach the weight in
:mod:`lissom.optim.apply`. Parameters that a method declines, or whose group says
``algorithm="adamw"``, get AdamW in the same loop.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor

from ..kernels.apart import Apart
from . import codec, keys, metrics, sharding, weights
from .apply import Update, apply, negated, step_adamw
from .batches import Work, windows
from .checks import (
    TORCH_ONLY,
    check_capturable,
    check_capture,
    check_gradient,
    check_parameter,
    refuse_torch_only,
)
from .codec import Slot, State
from .common import ADAMW_PART, BOOKKEEPING, COMMON, FOREIGN, LAYOUT
from .inner import adam_slots
from .loading import FORMAT, REMEDY, agreed_load, checked_state, overruled
from .options import Option, checked, choice, nearest
from .plan import Plan, Row
from .sharding import Rows
from .whole import Waiting, answered, requested

if TYPE_CHECKING:
    from .hooks import InBackward

__all__ = ["MatrixOptimizer", "PartialStepError", "Work", "numbers", "spoilt"]

# Values of ``index`` from here on are of parameters that get AdamW.
_DENSE = 1 << 31


class PartialStepError(RuntimeError):
    """A step failed after some parameters had moved; the message names them."""


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of all classes. A subclass gives ``algorithm``, ``options`` and three methods."""

    #: Name of the class's own rule, the default of the ``algorithm`` option.
    algorithm: ClassVar[str] = "adamw"
    #: Its options beside :data:`COMMON`.
    options: ClassVar[Mapping[str, Option]] = {}
    #: Other spellings of options, as other packages have them: {theirs: ours}.
    spellings: ClassVar[Mapping[str, str]] = {}
    #: Whether :meth:`update` yields, so that several parameters are worth running together.
    waits: ClassVar[bool] = False
    #: Why a CUDA graph cannot hold a step, for a message; None if it can: the rule then takes a
    #: tensor for t, and its update has no product.
    uncapturable: ClassVar[str | None] = None
    #: What to do where no parameter gets the class's own rule, for a warning.
    remedy: ClassVar[str] = "Give it parameters of 2 or more dimensions."
    #: Who works in the backward pass for it: :mod:`lissom.optim.hooks`.
    _backward: InBackward | None = None
    _rates: Mapping[str, Tensor] = {}

    def __init__(self, params: Any, given: Mapping[str, Any]) -> None:
        """Check every option that was given, then add the groups.

        Args:
            params: as torch.optim.AdamW takes them.
            given: options of :meth:`table`, of AdamW's part (``lr_adamw`` and so on) and of
                torch about how a step runs.
        """
        table, where = self.table(), f"{type(self).__name__}()"
        refuse_torch_only(given, where)
        apart = {k: v for k, v in given.items() if k in ADAMW_PART}
        known = {k: v for k, v in given.items() if k not in TORCH_ONLY and k not in apart}
        for name in known:
            if name not in table or name in BOOKKEEPING:
                options = sorted({*table, *ADAMW_PART} - BOOKKEEPING.keys())
                raise TypeError(f"{where}: unexpected option {name!r}={known[name]!r}"
                                f"{nearest(name, options)}; known are {', '.join(options)}")
        values = checked(known, table, where)
        # Rates that were given as tensors, which CUDA graphs read: of the groups, of AdamW's part.
        self._rates = {k: v for k, v in given.items() if k in ("lr", "lr_adamw")
                       and isinstance(v, Tensor)}
        self._adamw = {ADAMW_PART[k]: table[ADAMW_PART[k]].check(k, v, where)
                       for k, v in apart.items() if v is not None}
        defaults = {name: option.default for name, option in table.items()}
        # What each parameter and its options looked like when its state was last checked.
        self._forms: dict[Tensor, tuple[Any, ...]] = {}
        # The slots of each parameter, quantized moments as one.
        self._layouts: dict[Tensor, dict[str, Slot]] = {}
        # Numbers of the last step by ``index``, of groups that ask for them.
        self._measured: dict[int, dict[str, Tensor]] = {}
        # Next value of ``index``, of the own rule and of AdamW; None is to be counted.
        self._next_index: list[int] | None = None
        # Options of each group, by its id, when they were last checked.
        self._seen: dict[int, dict[str, Any]] = {}
        # Every ``key`` in the state, counted with it.
        self._keys: set[int] = set()
        super().__init__(params, defaults | values)
        if self.algorithm != "adamw" and not self.plan().matrices:
            warnings.warn(f"{type(self).__name__} has no matrix of its own, so it is AdamW. "
                          f"{self.remedy} plan() tells why.", stacklevel=3)

    # ---------------------------------------------------------------- what a method says

    def declines(self, p: Tensor, o: Mapping[str, Any]) -> str | None:
        """Why this parameter gets AdamW, or None if the class's own rule takes it."""
        if self.algorithm == "adamw":
            return "AdamW is this class's rule"
        if p.ndim < 2:
            return f"{p.ndim}-d, not a matrix"
        return None if p.numel() else "empty"

    def slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        """State of the class's own rule for p, without ``step``."""
        raise AssertionError("a class that declines nothing must say what it keeps")

    def update(self, g: Tensor, s: State, o: Mapping[str, Any], t: int
               ) -> Update | Waiting[Update]:
        """The class's own rule: gradient as a matrix (m, n), or a batch (b, m, n), to update.

        Everything that can fail comes before the first write to s. A rule that needs a function of
        the whole matrix yields it (:mod:`lissom.optim.whole`) before its first write.
        ``s["weight"]`` is p as the rule sees it, to be read.
        """
        raise AssertionError("a class that declines nothing must have an update")

    def check_state(self, p: Tensor, state: Mapping[str, Tensor], o: Mapping[str, Any], at: str
                    ) -> None:
        """Rules of a method about what its slots hold when they are loaded; raises ValueError."""

    def by_rows(self, p: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> bool:
        """Whether update t of some rows of p needs no others, but for sums over all of them.

        Then a sharded p is updated where its rows are: the rule takes sums over rows by
        :func:`lissom.optim.codec.row_sum`, the height of the matrix from
        :func:`lissom.optim.codec.whole_shape`, and what it yields is gathered on one rank. Else
        every rank works on the whole matrix.

        Args:
            p: the parameter, a DTensor cut by rows.
            s: its state as it is kept.
            o: options of its group.
            t: 1-based count of the update.
        """
        return False

    def together(self, p: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int,
                 rows: Rows | None) -> tuple[int, bool]:
        """What update t of p holds beside those of matrices that are like it, on a GPU.

        Where it holds something it may be one update with theirs: then g, ``s["weight"]`` and the
        slots of s are :class:`lissom.kernels.apart.Apart`. A class says so for itself, as one that
        is derived from it may look at what it gets.

        Args:
            p: the parameter, of the own rule.
            s: its state as it is kept.
            o: options of its group.
            t: 1-based count of the update.
            rows: which of its rows the update works on, if not all.

        Returns:
            Elements, 0 if it goes alone; and what updates of one batch have in common beside shape,
            options and count.
        """
        return 0, False

    def before_updates(self, work: list[Work]) -> list[str]:
        """What a step does to parameters that act together, after all checks of the step.

        Args:
            work: every parameter that is about to be updated; empty for a skipped step.

        Returns:
            Names of the parameters that it has moved.
        """
        return []

    def matrix_shape(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of p as the rule sees it: (m, n), or (b, m, n) for a batch of matrices.

        Convolutions are out x rest; with ``matricize="batch"`` the last two dimensions count.
        """
        if p.ndim == 2:
            return tuple(p.shape)
        if o.get("matricize") == "batch":
            return (math.prod(p.shape[:-2]), *p.shape[-2:])
        return (p.shape[0], math.prod(p.shape[1:]))

    def describe(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int | None, str, str]:
        """Rank, side and reason of a parameter of the own rule, for :meth:`plan`."""
        *batch, m, n = self.matrix_shape(p, o)
        size = f"{math.prod(batch)} x {m} x {n}" if batch else f"{m} x {n}"
        return None, "", f"{p.ndim}-d seen as {size}" if p.ndim > 2 else "matrix"

    def check_combination(self, o: Mapping[str, Any], params: list[Tensor], explicit: set[str],
                          where: str) -> None:
        """Rules about several options or the parameters of a group; raises ValueError.

        Args:
            o: all options of the group, and ``param_names`` where there are any.
            params: its parameters.
            explicit: options that the group itself states; none where it comes from a saved state.
            where: beginning of a message.
        """

    # ---------------------------------------------------------------- options: one door

    @classmethod
    def table(cls) -> dict[str, Option]:
        """Every option of a group, by name."""
        names = ("adamw",) if cls.algorithm == "adamw" else (cls.algorithm, "adamw")
        own = {"algorithm": choice(cls.algorithm, *names)}
        return COMMON | own | dict(cls.options) | BOOKKEEPING

    def checked_group(self, group: Mapping[str, Any], where: str, *, entering: bool = True,
                       foreign: Iterable[str] = ()) -> dict[str, Any]:
        """A copy of a group with every option present and checked.

        Args:
            group: options, ``params`` and what others keep in it.
            where: beginning of a message.
            entering: the group is new, not saved.
            foreign: keys beside the known foreign ones that are passed on as they are.
        """
        apart = {"params", *FOREIGN, *foreign} - self.table().keys()
        given: dict[str, Any] = {}
        if entering:
            refuse_torch_only(group, where)
        for name, value in group.items():
            if name in apart or name in TORCH_ONLY:
                continue
            if name == "rank" and "rank" not in self.table():
                continue  # from param_groups(): this rule has whole matrices
            name = self.spellings.get(name, name)
            if name == "use_muon" and isinstance(value, bool):  # Keller Jordan's group key
                name, value = "algorithm", self.algorithm if value else "adamw"
            if name in given:
                raise ValueError(f"{where}: {name!r} is given twice, under two spellings")
            given[name] = value
        own = checked(given, self.table(), where)
        if own.get("format", FORMAT) != FORMAT:
            raise ValueError(f"{where}: format={own['format']}, but this version of lissom reads "
                             f"format {FORMAT}")
        # torch adds names of its own to the defaults
        known = {k: x.default for k, x in self.table().items()}
        full = known | {k: v for k, v in self.defaults.items() if k in known} | own
        plain = [p for p in group.get("params", []) if isinstance(p, Tensor)]
        if full["master_bits"] is not None and any(p.dtype == torch.float16 for p in plain):
            raise ValueError(f"{where}: master_bits={full['master_bits']}, but it must be None for "
                             "fp16 weights: what they lack of fp32 has no fixed number of bits "
                             "(use bf16 weights)")
        if full["capturable"]:
            rate = group.get("lr", self._rates.get("lr") if entering else None)
            if isinstance(rate, Tensor):  # schedulers and graphs want one of its own in each group
                full["lr"] = rate.detach().clone() if entering else rate
            check_capturable({**full, "param_names": group.get("param_names")}, plain,
                             self.uncapturable, where)
        self.check_combination({**full, "param_names": group.get("param_names")}, plain,
                               set(own) if entering else set(), where)
        return {**{k: v for k, v in group.items() if k in apart}, **full}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, checked as in the constructor, with their state.

        Args:
            param_group: ``params`` (a tensor, an iterable of tensors or of (name, tensor)) and
                any option of the class; what it leaves out has the constructor's value.

        Raises:
            TypeError, ValueError: names parameter or option, value and rule; nothing is added.
        """
        where = f"{type(self).__name__} group {len(self.param_groups)}"
        if not isinstance(param_group, dict):
            raise TypeError(f"{where}: must be a dict, but got {type(param_group).__name__}")
        if "params" not in param_group:
            raise ValueError(f"{where}: has no 'params'{nearest('params', param_group)}")
        group = dict(param_group)
        params = group["params"]
        if isinstance(params, set):
            raise TypeError(f"{where}: params is a set, whose order changes between runs; "
                            "use a list")
        params = [params] if isinstance(params, Tensor) else list(params)
        named = [q if isinstance(q, tuple) else (None, q) for q in params]
        for i, (name, p) in enumerate(named):
            check_parameter(p, name or f"parameter {i}", where)
            sharding.check_placements(p, name or f"parameter {i}", where)
        group["params"] = [p for _, p in named]
        explicit = {self.spellings.get(k, k) for k in group}
        names = [name for name, _ in named]
        # for messages: torch writes the names into the group itself
        group = self.checked_group({**group, "param_names": names} if all(names) else group, where)
        group.pop("param_names", None)
        group["params"] = params
        count = len(self.param_groups)
        try:
            for part in self._split(group, explicit):
                super().add_param_group(part)
            self._sync_state()
        except BaseException:
            old = {p for g in self.param_groups[:count] for p in g["params"]}
            for p in chain(*(g["params"] for g in self.param_groups[count:])):
                if p not in old:
                    self.state.pop(p, None)
            del self.param_groups[count:]
            self._next_index = None
            raise

    def _split(self, group: dict[str, Any], explicit: set[str]) -> Iterator[dict[str, Any]]:
        """The group, or its two halves where AdamW's part has options that it does not state."""
        apart = {k: v for k, v in self._adamw.items() if k not in explicit}
        if not apart or not group["params"]:
            yield group
            return
        halves: tuple[list[Any], list[Any]] = [], []
        for entry in group["params"]:
            p = entry[1] if isinstance(entry, tuple) else entry
            halves[self._reason(p, group) is not None].append(entry)
        if halves[0]:
            yield {**group, "params": halves[0]}
        if halves[1]:
            rate = group["lr"] if "lr" not in apart else self._rates.get("lr_adamw")
            if group["capturable"] and isinstance(rate, Tensor):
                apart["lr"] = rate.detach().clone()
            yield {**group, **apart, "params": halves[1]}

    # ---------------------------------------------------------------- state

    def _reason(self, p: Tensor, o: Mapping[str, Any]) -> str | None:
        """Why p gets AdamW, or None."""
        if self.algorithm != "adamw" and o["algorithm"] == "adamw":
            return "algorithm='adamw' in its group"
        return self.declines(p, o)

    def stored_slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        """Every state tensor that p has under options o."""
        kept: dict[str, Slot] = {}
        for name, slot in self._logical(p, o).items():
            kept |= codec.stored(name, slot)
        return kept

    def _logical(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        """The same with a quantized moment as one slot."""
        slots = {"step": codec.counter(device=p.device if o["capturable"] else None),
                 "index": codec.counter(torch.int64),
                 "key": codec.counter(torch.int64), **weights.master_slots(p, o)}
        if self._reason(p, o) is None:
            slots |= self.slots(p, o)
        else:
            slots |= adam_slots(tuple(p.shape), p, o)
        return slots if self._backward is None else slots | self._backward.slots(p, o)

    def _create_state(self, p: Tensor, o: Mapping[str, Any], name: str) -> None:
        """Zeros for every slot, but for two numbers.

        ``index`` counts the parameters of the same rule before p: phases of refreshes follow it.
        ``key`` is for p's random numbers: from its name, or ``index`` where groups have no names.
        A key that another parameter has (which names give once in 2^63) is counted up.
        """
        state = {name: sharding.new(slot, p) for name, slot in self.stored_slots(p, o).items()}
        if self._next_index is None:
            self._keys = {int(s["key"]) for s in self.state.values()}
            used = [int(s["index"]) for s in self.state.values()]
            self._next_index = [1 + max((i for i in used if i < _DENSE), default=-1),
                                1 + max((i for i in used if i >= _DENSE), default=_DENSE - 1)]
        dense = self._reason(p, o) is not None
        state["index"].fill_(self._next_index[dense])
        self._next_index[dense] += 1
        key = keys.name_key(name) if "param_names" in o else int(state["index"])
        while key in self._keys:
            key += 1
        state["key"].fill_(key)
        self._keys.add(key)
        self.state[p] = state

    def _sync_state(self) -> None:
        """State for trainable parameters that have none, and none for those that are gone.

        Accelerate and FSDP2 put other parameters into the groups after construction, and
        ``model.to`` changes them in place: their state follows.
        """
        present = {p for g in self.param_groups for p in g["params"]}
        for p in [p for p in self.state if p not in present]:
            del self.state[p]
            self._next_index = None
        if len(self._forms) != len(self.state):
            self._forms = {p: form for p, form in self._forms.items() if p in self.state}
            self._layouts = {p: slots for p, slots in self._layouts.items() if p in self.state}
        structures = {id(group): self._structure(group) for group in self.param_groups}
        for name, p, group in self._named():
            form, last = self._form(p, structures[id(group)]), self._forms.get(p)
            if p not in self.state:
                if not p.requires_grad and p.grad is None:
                    continue
                self._create_state(p, group, name)
            elif last != form:
                shape = p.shape if last is None else last[0]
                if shape != p.shape and _count(self.state[p]):
                    raise ValueError(f"{name!r} has changed its shape from {tuple(shape)} to "
                                     f"{tuple(p.shape)} since its state was made")
                self.state[p] = self._followed(p, self.state[p], group, name)
            if last != form:
                self._layouts[p] = self._logical(p, group)
                self._forms[p] = form
        if self._backward is not None:
            self._backward.follow()

    @classmethod
    @functools.cache
    def _kinds(cls) -> list[tuple[str, bool]]:
        """Options, and whether only their presence can matter to the slots: that of numbers."""
        return [(k, x.kind in (float, tuple)) for k, x in cls.table().items()
                if k not in BOOKKEEPING]

    def structural(self) -> list[str]:
        """Options that say what the state is or how it is found, not how fast weights move."""
        return [k for k, x in self.table().items() if x.kind not in (float, tuple)
                and k not in BOOKKEEPING and (k not in COMMON or k in LAYOUT)]

    def _structure(self, o: Mapping[str, Any]) -> tuple[Any, ...]:
        """All of a group's options that slots depend on."""
        return tuple([o[k] is None if number else o[k] for k, number in self._kinds()])

    @staticmethod
    def _form(p: Tensor, structure: tuple[Any, ...]) -> tuple[Any, ...]:
        """All that the slots of a parameter depend on, with :meth:`_structure` of its group."""
        return (p.shape, p.dtype, p.device, structure)

    def _followed(self, p: Tensor, state: dict[str, Tensor], o: Mapping[str, Any], name: str
                  ) -> dict[str, Tensor]:
        """The state of a parameter that may have changed under it."""
        slots = self.stored_slots(p, o)
        if "master" in state and p.dtype != torch.bfloat16:  # nothing is lacking any more
            state = {k: x for k, x in state.items() if k != "master"}
        if state.keys() == slots.keys() and all(
                (*state[k].shape, state[k].dtype, state[k].device) == (*x.shape, x.dtype, x.device)
                for k, x in slots.items()):
            return state
        if not _count(state):
            fresh = {k: sharding.new(x, p) for k, x in slots.items()}
            for number in ("index", "key"):
                fresh[number].copy_(state[number])
            return fresh
        return checked_state(self, p, state, o, f"{name!r} or its options have changed, its "
                                               "state has not")

    def state_dict(self) -> dict[str, Any]:
        """State by parameter number, and groups, as torch has them; plain tensors and values."""
        self._sync_state()
        if self._backward is not None:
            self._backward.check_saved()
        return super().state_dict()

    def _named(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """(name, parameter, group) of everything; a name is made up where none was given."""
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for j, p in enumerate(group["params"]):
                yield (names[j] if names else f"group {i} parameter {j}"), p, group

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
            PartialStepError: a failure after some parameters had moved.
        """
        check_capture(self.param_groups, f"{type(self).__name__}.step()")
        if self._backward is not None and not self._backward.begin(closure):
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = self._checked_work()
        if self._backward is not None:
            self._backward.before(work)
        before = self.before_updates(work)
        moved: list[str] = []
        for window in [*windows(self, work)]:
            self._run(window, moved, before)
        if self._backward is not None:
            self._backward.end()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients as in torch, those in buffers of :mod:`lissom.optim.backward` too."""
        super().zero_grad(set_to_none)
        if self._backward is not None:
            self._backward.clear()

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
        measured = metrics.before(self, window)
        updates = [self._step_batch(batch) for batch in batches]
        done: set[int] = set()  # names need not differ
        try:
            for i in answered(updates):
                done.update(map(id, batches[i]))
        except Exception as error:
            moved += [w.name for w in window if id(w) in done]
            rest = [w.name for w in window if id(w) not in done]
            partly = [w.name for w, old, xs in zip(window, versions, touched, strict=True)
                      if id(w) not in done and old != [x._version for x in xs]]
            if not moved and not partly and not before:
                raise
            earlier = f"; before all updates {', '.join(before)} had been moved" if before else ""
            at = partly or rest
            raise PartialStepError(
                f"{type(self).__name__}.step() failed at {', '.join(map(repr, at))} ({error}), "
                f"which is {'partly' if partly else 'not'} updated; {len(moved)} parameters "
                f"had been updated: {', '.join(moved)}{earlier}") from error
        moved += [w.name for w in window]
        metrics.after(self, window, measured)

    def _touched(self, p: Tensor) -> list[Tensor]:
        """What an update of p writes to: p and its state, of which this rank holds."""
        tensors = [p, *self.state[p].values()]
        return [*map(sharding.local, tensors)] if sharding.is_sharded(p) else tensors

    def _checked_work(self) -> list[Work]:
        """All checks of a step, before its first write. Empty if the step is to be skipped."""
        gradient = _given if self._backward is None else self._backward.gradient
        plain = {id(group): numbers(group) for group in self.param_groups}
        for group in self.param_groups:
            self._check_changed(group)
        work = [Work(name, p, g, plain[id(o)]) for name, p, o in self._named()
                if (g := gradient(p)) is not None]
        for name, p, g, _ in work:
            if g is p.grad:
                check_gradient(p, g, name)
        self._sync_state()
        if spoilt(work):
            for group in self.param_groups:
                group["skipped_steps"] += 1
            return []
        return work

    def _check_changed(self, group: Mapping[str, Any]) -> None:
        """Check options that were changed in a group since the last step.

        Not the rate, which schedulers change at every step and torch takes as it is.
        """
        table, last = self.table(), self._seen.setdefault(id(group), {})
        changed = {k: v for k, v in group.items() if v is not last.get(k) and k in table
                   and k != "lr" and not isinstance(v, Tensor)}
        if changed:
            number = next(i for i, x in enumerate(self.param_groups) if x is group)
            checked({k: v.item() if hasattr(v, "item") else v for k, v in changed.items()}, table,
                    f"{type(self).__name__} group {number}")
            last.update(changed)

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because of a NaN or Inf gradient (``nonfinite="skip"``)."""
        return max(int(group["skipped_steps"]) for group in self.param_groups)

    def _rows(self, p: Tensor, o: Mapping[str, Any]) -> Rows | None:
        """The rows of a sharded parameter on which its next update works; None for all of it."""
        rows = sharding.rows_of(p)
        if rows is None or o["shards"] == "whole":
            return None
        if self._reason(p, o) is None:
            apart = self.by_rows(p, self.state[p], o, int(self.state[p]["step"]) + 1)
        else:  # the blocks of a quantized vector go over the cuts
            apart = p.ndim > 1 or not any(slot.bits for slot in self._layouts[p].values())
        return rows if apart else None

    def _step_batch(self, batch: Sequence[Work]) -> Waiting[None]:
        """From gradient to parameter, for one parameter or several that are alike.

        It waits where the update does. Several are one matrix with a leading dimension.
        """
        p, o = batch[0].p, batch[0].o
        state, slots, rows = self.state[p], self._layouts[p], self._rows(p, o)
        # On the host, or where it is captured a tensor.
        t: Any = state["step"].long() + 1 if o["capturable"] else int(state["step"]) + 1
        x: Any = p
        g: Any = batch[0].g
        stored: Mapping[str, Tensor] = state
        sharded, several = sharding.is_sharded(p), len(batch) > 1
        if several:
            x = Apart([sharding.local(w.p) for w in batch])
            g = Apart([sharding.local(w.g) for w in batch])
            stored = codec.Together([self.state[w.p] for w in batch])
        elif sharded:
            gather = sharding.whole if rows is None else sharding.local
            x, g, *rest = map(gather, (p, g, *state.values()))
            stored = dict(zip(state, rest, strict=True))
        if self._reason(p, o) is not None:
            step_adamw(x, g, stored, slots, o, t, rows)
        else:
            shape = self.matrix_shape(p, o)
            shape = x.shape if several else shape if rows is None else (len(x), *shape[1:])
            # a copy where the memory format allows no view
            matrix = x if x.shape == shape else x.reshape(shape)
            s = codec.Decoded(stored, slots, p, rows)
            s["weight"] = matrix
            lifted = None if self._backward is None else self._backward.lifted(p, s, o, t)
            if lifted is None:
                g = g if g.shape == shape else g.reshape(shape)
                u = self.update(negated(g, o), s, o, t)
            else:
                u = lifted
            if isinstance(u, Generator):
                u = yield from requested(u, rows)
            apply(matrix, u, stored, o, t, 0 if rows is None else rows.start * shape[-1])
            if matrix is not x and matrix.data_ptr() != x.data_ptr():
                x.copy_(matrix.view(x.shape))
            codec.encode(s, stored, slots, o, t)
        if sharded and rows is None:
            for name, kept in stored.items():
                sharding.keep(state[name], kept)
            sharding.keep(p, x)
        if several:
            torch._foreach_add_([self.state[w.p]["step"] for w in batch], 1)
        else:
            state["step"].fill_(t)
        if self._backward is not None:
            self._backward.consumed(p)

    # ---------------------------------------------------------------- saving and loading

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from pickle or deepcopy, through the same check as the constructor."""
        self.__dict__.setdefault("_adamw", {})
        if "defaults" in state:
            self.defaults = state["defaults"]
        groups = [self.checked_group(g, f"{type(self).__name__} group {i}", entering=False,
                                      foreign=g)
                  for i, g in enumerate(state["param_groups"])]
        super().__setstate__({**state, "param_groups": groups})
        self._forms = {}
        self._layouts = {}
        self._measured = {}
        self._seen = {}
        self._next_index = None

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep."""
        self._sync_state()
        if self._backward is not None:
            self._backward.check_saved()
        return {**super().__getstate__(), "_adamw": self._adamw}

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
        self._sync_state()
        groups, states = agreed_load(self, state_dict)
        if replaced := overruled(self, groups):
            warnings.warn(f"{type(self).__name__}.load_state_dict: the saved options go on: "
                          f"{replaced}. {REMEDY}.", stacklevel=2)
        for mine, group in zip(self.param_groups, groups, strict=True):
            if isinstance(mine["lr"], Tensor):  # which stays the tensor that others hold
                group["lr"] = mine["lr"].copy_(group["lr"])
        self.__setstate__({"state": self.state, "param_groups": groups})
        self.state.clear()
        self.state.update(states)
        if self._backward is not None:
            self._backward.loaded()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def full_precision(self, p: Tensor) -> Tensor:
        """The fp32 value of a weight, with the bits that the state keeps of it (``master_bits``).

        Args:
            p: a parameter of this optimizer.

        Returns:
            A new tensor of p's shape; p's own values where nothing more is kept.
        """
        kept = {k: sharding.local(x) for k, x in self.state.get(p, {}).items()}
        with torch.no_grad():
            x = weights.read_weight(sharding.local(p), kept).clone()
        return sharding.like(p, x)

    # ---------------------------------------------------------------- report

    def plan(self) -> Plan:
        """What happens to each parameter, and the bytes of its state.

        Returns:
            Rows of name, shape, rule, rank, side, state bytes and reason; it prints as a table,
            and its totals are the bytes held.
        """
        self._sync_state()
        rows = []
        for name, p, o in self._named():
            reason = self._reason(p, o)
            rule, rank, side = "adamw", None, ""
            if reason is None:
                rule = self.algorithm
                rank, side, reason = self.describe(p, o)
            held = p in self.state
            if not held:
                reason = f"{reason}; frozen: no state until it has a gradient"
            size = sum(slot.nbytes for slot in self.stored_slots(p, o).values()) if held else 0
            rows.append(Row(name, tuple(p.shape), rule, rank, side, size, reason))
        return Plan(tuple(rows))


    def metrics(self) -> list[dict[str, Tensor]]:
        """Numbers of the last step, for a log: one dict for each group, in order.

        Those of a step are there for groups with ``metrics=True``, an option that may change at
        any time: ``group["metrics"] = step % 100 == 0``. Measuring takes a copy of one parameter at
        a time (of a few, where matrices are worked on in batches) and two passes over it. All are
        tensors on the device of their parameters; nothing waits for it until one is read, with
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


# -------------------------------------------------------------------- helpers of the loop


def numbers(o: dict[str, Any]) -> dict[str, Any]:
    """The group, with Python's numbers where schedulers have put tensors or numpy's.

    A rate that is captured stays.
    """
    held = {k: v.item() for k, v in o.items() if hasattr(v, "item")
            and (not isinstance(v, Tensor) or v.numel() == 1)
            and not (o["capturable"] and k == "lr" and isinstance(v, Tensor))}
    return {**o, **held} if held else o


def _count(state: Mapping[str, Tensor]) -> int:
    """Updates so far; none where nothing has a value yet."""
    return 0 if state["step"].is_meta else int(state["step"])


def _given(p: Tensor) -> Tensor | None:
    return p.grad


def spoilt(work: Sequence[Work]) -> bool:
    """Whether a gradient is a reason to skip the step; raises FloatingPointError if so asked."""
    work = [w for w in work if w.o["nonfinite"] != "propagate"]
    if not work:
        return False
    bad = torch.tensor([_nonfinite(sharding.local(w.g)) for w in work], dtype=torch.int64,
                       device="cpu")
    bad = sharding.agreed(bad, [w.p for w in work])
    for w, flag in zip(work, bad.tolist(), strict=True):
        if flag and w.o["nonfinite"] == "raise":
            raise FloatingPointError(f"the gradient of {w.name!r} has a NaN or Inf "
                                     "(nonfinite='raise'); nothing was written")
    return bool(bad.any())


def _nonfinite(g: Tensor) -> bool:
    return bool(g.numel()) and not all(bool(x.isfinite()) for x in torch.aminmax(g))
