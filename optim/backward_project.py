"""project_in_backward: gradients are projected in the backward pass; steps use the projections."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import codec, sharding
from .apply import Update, negated
from .backward import NORM, InBackward, clip, forget_scaler
from .backward_buffers import Buffers
from .base import MatrixOptimizer, checked_optimizer
from .batches import Work, operands
from .checks import check_gradient
from .codec import Slot, State
from .lowrank import LowRankOptimizer
from .options import boolean, integer, optional
from .project import Bases
from .replicas import Replicas, Sent, replicas_of
from .sharding import Rows
from .subspace import BASES, COLUMNS, Projected

__all__ = ["ProjectInBackward", "project_in_backward"]


def _is_basis(key: str) -> bool:
    """Whether a tensor of the state is (the codes or scales of) a basis, or the columns of one."""
    return key.split(".")[0] in (*BASES, *COLUMNS)


@dataclass
class _Waiting:
    """What is known of a parameter's gradient beside the buffers in its state.

    Args:
        pending: a refresh that was computed in a hook; the step writes it.
        kept: micro-batches whose full gradient is kept, because the step will refresh the basis.
        dense: with replicas, micro-batches of a parameter that gets AdamW.
        norm: with ``exact``, that of the full gradient.
        averaged: the gradient is a mean over ranks, or will be when what was sent has arrived.
        rows: on which rows of a sharded parameter ``pending`` was computed; None for all.
    """

    pending: Projected | None = None
    kept: int = 0
    dense: int = 0
    norm: Tensor | None = None
    averaged: bool = False
    rows: Rows | None = None


_NOTHING = _Waiting()


class ProjectInBackward(InBackward):
    """Handle of :func:`project_in_backward`: projects gradients as they are ready, until removed.

    R = P^T G Q is summed in a buffer of the state and the gradient is freed. Of a sharded gradient
    (FSDP2) it is taken as a step would take it: from this rank's rows, or from the whole matrix.
    """

    name = "project_in_backward"
    optimizer: LowRankOptimizer

    def __init__(self, optimizer: LowRankOptimizer, accumulation: int, limit: float | None,
                 exact: bool, scaler: Any, replicas: Replicas | None) -> None:
        super().__init__(optimizer, replicas)
        self.accumulation, self.limit, self.exact, self.scaler = accumulation, limit, exact, scaler
        # Of each parameter, from its first micro-batch to the step.
        self._now: defaultdict[Tensor, _Waiting] = defaultdict(_Waiting)
        self._sent: list[Sent] = []
        self._buffers = Buffers()
        self._unscaled = False
        # GradScaler keeps its records by optimizer: this stands for one that has the buffers.
        self._stand_in = _StandIn()

    def check(self, name: str, p: Tensor, o: Mapping[str, Any]) -> None:
        optimizer, where = self.optimizer, f"{self.name}: {name!r}"
        if not optimizer.own_rule(p, o):
            return
        if optimizer.residual(o).needs_gradient:
            option = ("error_feedback_bits" if o.get("error_feedback_bits") else
                      "residual" if "residual" in o else "algorithm")
            value, rest = o[option], 'residual="none"'
            if option == "error_feedback_bits":
                rest = "error_feedback_bits=None"
            elif option == "algorithm":
                rest = "lissom.optim.GaLoreAdamW"
            raise ValueError(
                f"{where} has {option}={value!r}, which needs the full gradient at the step; use "
                f"update_in_backward(optimizer) with one micro-batch a step, or {rest}")
        if self.accumulation == 1:
            return
        gap = o["update_proj_gap"]
        if gap <= self.accumulation:
            raise ValueError(
                f"{where} has update_proj_gap={gap}, but it must be above "
                f"accumulation={self.accumulation}: a matrix that is refreshed keeps its full "
                "gradient for that step, so a short gap saves little; give a longer "
                "update_proj_gap (200, say), or accumulation=1")
        if o["refresh"] != "staggered":
            raise ValueError(
                f"{where} has refresh={o['refresh']!r}, but it must be 'staggered' with "
                f"accumulation={self.accumulation}: all matrices would keep their full gradients "
                "at once")

    def slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        sums = self.accumulation > 1 or self.replicas is not None
        return self.optimizer.buffers(p, o, sums) if self.optimizer.own_rule(p, o) else {}

    def ready(self, p: Tensor) -> None:
        optimizer, g = self.optimizer, p.grad
        name, o = self.place(p)
        dense = not optimizer.own_rule(p, o)
        if g is None:
            return
        if sharding.is_sharded(p):  # placed as p is, so that norms and factors are of all of it
            p.grad = g = check_gradient(p, g, name)
        if dense and self.replicas is None:
            self._buffers.stays(p)
            return
        check_gradient(p, g, name)
        stored, now = optimizer.state[p], self._now[p]
        count = 0 if dense else int(stored["projected_count"])
        number = 1 + count + now.kept + now.dense
        self._check_number(now, name, number)
        if dense:
            now.dense = number
            if number == self.accumulation:
                self._send(p)
            return
        t = int(stored["step"]) + 1
        due = optimizer.due(stored, o, t)
        if self.accumulation > 1 and due:
            if count:
                raise RuntimeError(
                    f"{self.name}: {name!r} would get a new basis in the middle of an "
                    "accumulation, as update_proj_gap or refresh has changed; change them after "
                    "step()")
            now.kept = number
            self._buffers.stays(p)
            if number == self.accumulation:
                self._send(p)
            return
        if due and self.replicas is not None:  # the mean, so that all ranks find the same basis
            g = self.replicas.send(p, g).arrive()
            now.averaged = True
            self.finish_later()
        if self.exact:
            now.norm = sharding.norm_of([codec.wide(g)])
        rows = optimizer._rows(p, o)
        space = self._projected(name, p, g, o, t, rows)
        for slot, x in {"projected": space.low, **space.more}.items():
            here = rows is not None and optimizer._layouts[p][slot].rows
            x = x if here else sharding.part_of(stored[slot], x)
            target = sharding.local(stored[slot])
            target.add_(x) if count else target.copy_(x)
        stored["projected_count"] += 1
        self._buffers.goes(p)
        p.grad = None
        if number == self.accumulation:
            self._send(p)

    def _projected(self, name: str, p: Tensor, g: Tensor, o: dict[str, Any], t: int,
                   rows: Rows | None) -> Projected:
        """R and what else a step needs of a gradient; of a refresh it is kept until then.

        Args:
            name: of the parameter.
            p: the parameter.
            g: its gradient.
            o: its options.
            t: 1-based count of the coming update.
            rows: the rows of a sharded p that this works on; None for all.
        """
        optimizer, stored, sharded = self.optimizer, self.optimizer.state[p], sharding.is_sharded(p)
        # Not the moments: they need not be gathered.
        read = {k: x for k, x in stored.items() if not sharding.is_sharded(x) or _is_basis(k)}
        spread = optimizer._layouts.spread(p)
        weight = not sharded or optimizer.projects_weight(o)  # else it is not gathered either
        x = p if weight else g
        x, g, kept = operands([Work(name, x, g, o)], [read], spread, rows)
        shape = optimizer.matrix_shape(p, o)
        shape = shape if rows is None else (len(x), *shape[1:])
        s = codec.Decoded(kept, optimizer._layouts[p], p, rows)
        if weight:
            s["weight"] = x.reshape(shape)
        space = optimizer.project_gradient(negated(g.reshape(shape), o), s, o, t)[1]
        if space.writes:
            now = self._now[p]
            now.pending, now.rows = self._early(space, s), rows
            for k in kept if sharded else ():
                if _is_basis(k) and (rows is None or k in spread):
                    sharding.keep(stored[k], kept[k])
        return space

    def _check_number(self, now: _Waiting, name: str, number: int) -> None:
        """Refuse a gradient that comes after the last one of its step; raises RuntimeError."""
        if self._unscaled:
            raise RuntimeError(f"{self.name}: {name!r} got a gradient after unscale_(); take the "
                               "step with grad_scaler.step(optimizer) before")
        if number > self.accumulation:
            raise RuntimeError(
                f"{self.name}: {name!r} got a gradient from micro-batch {self.accumulation + 1}, "
                f"but accumulation={self.accumulation}; call step() or zero_grad() of the "
                "optimizer before, or give a larger accumulation (where one backward pass gives a "
                "shared weight several, as reentrant checkpointing does, use_reentrant=False)")
        if now.averaged:
            raise RuntimeError(f"{self.name}: {name!r} got a gradient after the mean over ranks "
                               "had been taken; call step() or zero_grad() of the optimizer before")

    @staticmethod
    def _early(space: Projected, s: State) -> Projected:
        """What must be kept of a refresh until :meth:`step`.

        A first basis is written now: while ``basis_step`` is 0 nobody reads it, and waiting copies
        of all first bases would take as much as the buffers.
        """
        # R itself is in the buffer.
        space = space._replace(low=space.low.new_empty(0), more={})
        if int(s["basis_step"]):
            return space
        for name, x in space.writes.items():
            if _is_basis(name):
                codec.write(s, name, x)
        writes = {k: x for k, x in space.writes.items() if not _is_basis(k)}
        return space._replace(bases=Bases(None, None), turns=None, writes=writes)

    def gradient(self, p: Tensor) -> Tensor | None:
        waiting = self._waiting(p)
        if not waiting:
            return p.grad
        if p.grad is not None:
            raise RuntimeError(f"{self.name}: {self.place(p)[0]!r} has a gradient beside what is "
                               "in its buffer; set p.grad only before backward")
        buffer: Tensor = self.optimizer._held[p]["projected"]
        return buffer

    def _waiting(self, p: Tensor) -> list[Tensor]:
        """The buffers in which p's gradient waits, if it does."""
        stored = self.optimizer._held.get(p, {})
        if "projected_count" not in stored or not int(stored["projected_count"]):
            return []
        return [x for k, x in stored.items()
                if k.startswith("projected") and k != "projected_count"]

    def _all_waiting(self) -> list[Tensor]:
        """All buffers in which gradients wait, and the exact norms kept beside them."""
        found: list[Tensor] = []
        for p in self.optimizer._held:
            if waiting := self._waiting(p):
                norm = self._now.get(p, _NOTHING).norm
                found += waiting if norm is None else [*waiting, norm]
        return found

    def rows(self, p: Tensor, rows: Rows | None) -> Rows | None:
        now = self._now.get(p, _NOTHING)
        return rows if now.pending is None else now.rows  # as the bases that wait

    def lifted(self, p: Tensor, s: State, o: Mapping[str, Any], t: int) -> Update | None:
        if "projected_count" not in s or not int(s["projected_count"]):
            return None
        w = s["weight"]
        dtype = torch.float32 if w.dtype == torch.float16 else w.dtype
        # Shape, dtype and device of the gradient, without its bytes.
        g = w.new_empty((), dtype=dtype).expand(w.shape)
        space = self._now.get(p, _NOTHING).pending
        if space is None:
            space = Projected(Bases(None, None), s["projected"])
        if space.bases == Bases(None, None):
            born = t if "basis_step" in space.writes else int(s["basis_step"])
            space = space._replace(bases=self.optimizer.bases(g, s, o, born))
        more = {k: s[k] for k in self.optimizer.buffers(p, o)
                if k not in ("projected", "projected_count")}
        return self.optimizer.lift(g, space._replace(low=s["projected"], more=more), s, o, t)

    # ---------------------------------------------------------------- means over ranks

    def _send(self, p: Tensor, later: bool = True) -> bool:
        """Begin to average p's gradient over ranks, if there is one, once per step.

        Args:
            p: the parameter.
            later: the backward pass is running: wait for the mean at its end.

        Returns:
            Whether something was sent.
        """
        waiting = self._waiting(p)
        if self.replicas is None or not (waiting or p.grad is not None) or (
                self._now.get(p, _NOTHING).averaged):
            return False
        self._now[p].averaged = True
        self._sent += [self.replicas.send(p, x, in_place=True) for x in waiting]
        if p.grad is not None and not waiting:
            self._sent.append(self.replicas.send(p, p.grad))
            p.grad = self._sent[-1].mean
        if later:
            self.finish_later()
        return True

    def finish(self) -> None:
        self._arrive()
        if self.replicas is not None:
            self.replicas.compare(self.optimizer)

    def _arrive(self) -> None:
        for sent in self._sent:
            sent.arrive()
        self._sent.clear()

    def _average(self) -> bool:
        """Average what is still local when a step comes early; whether there was anything."""
        if self.replicas is None:
            return False
        late = [self._send(p, later=False) for _, p, _ in self.optimizer._named()]
        self.finish()
        return any(late)

    # ---------------------------------------------------------------- clipping and scaling

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their joint norm is at most ``max_norm``.

        In place of ``torch.nn.utils.clip_grad_norm_``, which sees only what is in ``p.grad``. A
        projected gradient counts with the norm of R, or of the full gradient with
        ``exact_norm=True``; what is in ``p.grad`` counts in full, also that of matrices that keep
        theirs for a refresh.

        Args:
            max_norm: > 0.

        Returns:
            The norm before the scaling, a 0-d tensor.
        """
        limit = NORM.check("max_norm", max_norm, "clip_grad_norm_")
        if self.scaler is not None and self.scaler.is_enabled() and not self._unscaled:
            raise RuntimeError("clip_grad_norm_: gradients are still scaled; call unscale_() of "
                               "this handle before")
        return self._clip(limit)

    @torch.no_grad()
    def _clip(self, limit: float) -> Tensor:
        self._average()
        parts: list[Tensor] = []
        buffers = self._all_waiting()
        dense: list[Tensor] = []
        for name, p, _ in self.optimizer._named():
            g, norm = self.gradient(p), self._now.get(p, _NOTHING).norm
            if g is not None and g is p.grad:
                dense.append(g)
            elif g is not None and self.exact and norm is None:
                raise RuntimeError(f"{self.name}: exact_norm=True, but the gradient of {name!r} "
                                   "comes from a saved state, which has no such norm")
            if g is not None:
                parts.append(g if norm is None else norm)
        total = sharding.norm_of(parts)
        clip([*buffers, *dense], total, limit)
        return total

    @torch.no_grad()
    def unscale_(self) -> None:
        """Divide all gradients by the scale; in place of ``grad_scaler.unscale_(optimizer)``."""
        if self.scaler is None:
            raise RuntimeError("unscale_: project_in_backward(...) was not given grad_scaler=")
        if self.scaler.is_enabled():
            self._average()
            self.scaler.unscale_(self.optimizer)
            self._unscale_buffers()

    def _unscale_buffers(self) -> None:
        self._stand_in.give(self._all_waiting())
        self.scaler.unscale_(self._stand_in)
        # Of shards each rank has seen its own.
        params = [p for _, p, _ in self.optimizer._named()]
        for found in self.scaler._found_inf_per_device(self._stand_in).values():
            found.copy_(sharding.agreed(found, params))
        self._unscaled = True

    def begin(self, closure: Any) -> bool:
        super().begin(closure)
        optimizer, scaler = self.optimizer, self.scaler
        called = "found_inf" in optimizer.__dict__
        if not called and scaler is not None and scaler.is_enabled():
            raise RuntimeError(f"{self.name}: with grad_scaler= the step is taken by "
                               "grad_scaler.step(optimizer)")
        if called and scaler is None:
            forget_scaler(optimizer)
            raise RuntimeError(f"{self.name}: a GradScaler takes this step, but it cannot reach "
                               "the buffers; give project_in_backward(..., grad_scaler=scaler)")
        late = self._average()
        if not called:
            return True
        if late and not self._unscaled and optimizer.__dict__["grad_scale"] is None:
            forget_scaler(optimizer)
            raise RuntimeError(f"{self.name}: gradients were unscaled before their mean over ranks "
                               "was taken, as this step comes early, so that what the scaler found "
                               "is this rank's alone; call unscale_() of this handle instead of "
                               "the scaler's")
        if optimizer.__dict__["grad_scale"] is not None:  # unscale_() was not called
            scaler.unscale_(optimizer)
        if not self._unscaled:
            self._unscale_buffers()
        found = self._all_waiting()
        if late:  # what the scaler has seen is this rank's alone
            found += [p.grad for _, p, _ in optimizer._named() if p.grad is not None]
        bad = bool(optimizer.__dict__["found_inf"]) or not _finite(found)
        # Of shards each rank has seen its own.
        flag = torch.tensor(int(bad), device="cpu")
        if not sharding.agreed(flag, [p for _, p, _ in optimizer._named()]):
            return True
        self.clear()
        return False

    def before(self, work: Sequence[Work]) -> None:
        if not work:
            self.clear()
        elif self.limit is not None:
            self._clip(self.limit)

    def consumed(self, p: Tensor) -> None:
        stored = self.optimizer._held[p]
        if "projected_count" in stored:
            stored["projected_count"].zero_()
        if self._now.pop(p, _NOTHING).kept:
            p.grad = None

    def end(self) -> None:
        self._unscaled = False
        self._buffers.clear()
        for p in [p for p in self._now if not self.knows(p)]:  # others are in their place
            del self._now[p]

    def clear(self) -> None:
        self._queued = False
        self._arrive()
        for p in list(self.optimizer._held):
            self.consumed(p)
        self._buffers.clear()
        self._now.clear()  # of parameters that have been replaced, too
        self._unscaled = False

    def check_saved(self) -> None:
        super().check_saved()
        pending = [self.place(p)[0] for p, now in self._now.items()
                   if now.pending is not None and self.knows(p)]
        if pending:
            raise RuntimeError(
                f"{self.name}: {pending[0]!r} has a new basis, which "
                "is written by step(), so the state cannot be saved between backward and step(); "
                "save it after step(), or after zero_grad() of the optimizer")
        waits = any(now.averaged or now.kept or now.dense for now in self._now.values())
        if self.replicas is not None and (waits or self._all_waiting()):
            raise RuntimeError(
                f"{self.name}: gradients wait, of which each rank may have its own part, so the "
                "state cannot be saved between backward and step() with a process_group; save it "
                "after step(), or after zero_grad() of the optimizer")

    def loaded(self) -> None:
        super().loaded()
        self._arrive()
        self._now.clear()
        self._unscaled = False


class _StandIn:
    """An optimizer as GradScaler sees one: its parameters' gradients are the given tensors."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []

    def give(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor the gradient of a parameter without storage of its own."""
        tensors = [*map(sharding.local, tensors)]
        params = [x.new_empty(()).expand(x.shape) for x in tensors]
        for p, x in zip(params, tensors, strict=True):
            p.grad = x
        self.param_groups = [{"params": params}]


def _finite(tensors: Sequence[Tensor]) -> bool:
    tensors = [*map(sharding.local, tensors)]
    if not tensors:
        return True
    found = [x.isfinite().all().to(tensors[0].device) for x in tensors]
    return bool(torch.stack(found).all())


def project_in_backward(
    optimizer: MatrixOptimizer, accumulation: int = 1, *, max_grad_norm: float | None = None,
    exact_norm: bool = False, grad_scaler: Any = None, process_group: Any = None,
) -> ProjectInBackward:
    """Project each gradient of a low-rank matrix as soon as it is ready, and free it.

    ``backward()`` adds R = P^T G Q to a buffer of the state (r x n or m x r, fp32, or for one
    micro-batch in bf16 as R itself; it counts in ``plan()`` and is saved) and sets ``p.grad`` to
    None; ``step()`` works from the buffers, with the result of the ordinary path. Parameters that
    get AdamW keep their ``p.grad``.

    With one micro-batch a step a new basis is computed in the hook, and no full gradient is left
    after it, at the first step either. With more, a matrix whose basis the coming step refreshes
    keeps its full gradient in ``p.grad`` until then: all of them at the first step, and after it
    at most ceil(matrices / update_proj_gap) at once (those with equal gaps; a matrix that has had
    no gradient but zeros still waits for its first basis, and keeps its gradient too).

    Under FSDP2 the hook sees this rank's rows of the reduced gradient. Those of R = G Q stay on
    their ranks; R = P^T G is summed over ranks at each micro-batch, and each keeps some rows of it.
    For a new basis the matrix is gathered, one at a time. Micro-batches before which
    ``set_requires_gradient_sync(False)`` was called are summed by FSDP2, unsharded and in full, and
    count with the next that is reduced, as one. With HSDP torch itself keeps reduced gradients
    until the backward pass ends.

    Args:
        optimizer: one of the low-rank classes, without a residual.
        accumulation: micro-batches whose gradients are summed before a step, >= 1. Default 1.
            A step may come earlier, not later.
        max_grad_norm: clip to this joint norm in each step, > 0; see
            :meth:`ProjectInBackward.clip_grad_norm_`, which scales in place what is left in
            ``p.grad``, as torch's function does. Default None: not clipped.
        exact_norm: clip by the norm of the full gradients, which is kept as the hooks see them;
            for one micro-batch. Default False: by the norm of what is left of them.
        grad_scaler: the ``torch.amp.GradScaler`` that takes the steps; with it, call
            ``handle.unscale_()`` where you would call ``grad_scaler.unscale_(optimizer)``.
        process_group: ranks that each have the whole model, not wrapped in anything, and their own
            part of the batch: the step is that of the mean of their gradients, as under DDP, and
            the same on all. Of a matrix the mean of R is taken, of one that is refreshed, and of
            what gets AdamW, that of G: with the last micro-batch, while the backward pass goes on,
            which ends when all is there. Each rank must run the same graph (if its gradients are of
            other parameters, an error says so), and parameters that are added later must be the
            same on all. Default None: one process.

    Returns:
        A handle with ``remove()``, ``clip_grad_norm_(max_norm)``, ``unscale_()`` and
        ``bytes_sent``; as a context manager it removes itself.

    Raises:
        TypeError, ValueError: an argument, or a parameter with whose options this cannot work:
            ``residual``, ``error_feedback_bits``, rules of whole matrices; with accumulation
            ``update_proj_gap`` not above it and ``refresh="synchronous"``; parameters that are not
            sharded where there are several processes, as under DDP, without ``process_group``; with
            it sharded ones, weights that differ between ranks, and ``exact_norm``.
        RuntimeError: the optimizer has such a handle already. Later: more micro-batches than
            ``accumulation``, a gap that is changed between two of one step so that this one
            refreshes the basis, a closure, a GradScaler that was not given here, a state that is
            saved between the backward pass and the step of a refresh, or with ``process_group`` of
            any.

    A step uses the buffers up, taken or skipped; ``zero_grad()`` of the optimizer empties them,
    that of a module does not know of them. A saved state has the buffers but not ``p.grad``: in
    the middle of an accumulation save the gradients that are there beside it.
    """
    where = "project_in_backward"
    optimizer = checked_optimizer(optimizer, where)
    accumulation = integer(1, 1).check("accumulation", accumulation, where)
    limit = optional(NORM).check("max_grad_norm", max_grad_norm, where)
    exact_norm = boolean(False).check("exact_norm", exact_norm, where)
    if exact_norm and accumulation > 1:
        raise ValueError(f"{where}: exact_norm=True, but it must be False with "
                         f"accumulation={accumulation}: the norm of a sum of gradients does not "
                         "follow from theirs, and the sum is kept in its projection alone")
    replicas = replicas_of(process_group, optimizer, where)
    if exact_norm and replicas is not None:
        raise ValueError(f"{where}: exact_norm=True, but it must be False with a process_group: "
                         "the norm of a mean of gradients does not follow from theirs")
    if not callable(getattr(grad_scaler, "unscale_", None)) and grad_scaler is not None:
        raise TypeError(f"{where}: grad_scaler is a {type(grad_scaler).__name__}, but it must be a "
                        "torch.amp.GradScaler")
    own = [(name, p, o) for name, p, o in optimizer._named() if optimizer.own_rule(p, o)]
    # A rule with an update of its own does not go by project_gradient() and lift().
    if own and type(optimizer).update is not LowRankOptimizer.update:
        raise ValueError(
            f"{where}: {own[0][0]!r} has algorithm={own[0][2]['algorithm']!r}, whose update needs "
            "the full gradient at the step; use update_in_backward(optimizer) with one micro-batch "
            "a step, or a low-rank class such as GaLoreAdamW")
    if not own or not isinstance(optimizer, LowRankOptimizer):
        raise ValueError(f"{where}: {type(optimizer).__name__} has no low-rank matrix here, so "
                         "there is nothing to project; give rank= to a low-rank class, or use "
                         "update_in_backward(optimizer)")
    return ProjectInBackward(optimizer, accumulation, limit, exact_norm, grad_scaler,
                             replicas).attach()
