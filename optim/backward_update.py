"""Updates that are applied as soon as a gradient is ready, which then is freed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import sharding
from .backward import NORM, InBackward, clip, forget_scaler
from .base import MatrixOptimizer, checked_optimizer
from .batches import Work
from .checks import check_gradient, spoilt, without_autocast
from .door import numbers
from .options import optional
from .replicas import Replicas, Sent, replicas_of

__all__ = ["UpdateInBackward", "update_in_backward"]


class UpdateInBackward(InBackward):
    """Handle of :func:`update_in_backward`: applies each update in the backward pass until removed.

    The gradient is freed after its update.
    """

    name = "update_in_backward"

    def __init__(self, optimizer: MatrixOptimizer, limit: float | None, replicas: Replicas | None
                 ) -> None:
        super().__init__(optimizer, replicas)
        self.limit = limit
        self._done: set[Tensor] = set()
        # With replicas, by device, whose hooks have a thread of their own: the parameter whose
        # gradient is being averaged while the next is computed.
        self._sent: dict[torch.device, tuple[Tensor, Sent]] = {}
        self._warned = False

    def check(self, name: str, p: Tensor, o: Mapping[str, Any]) -> None:
        if o["nonfinite"] == "skip":
            raise ValueError(
                f"{self.name}: {name!r} has nonfinite='skip', but it must be 'propagate' or "
                "'raise': parameters before it have moved when a NaN is seen, so no whole step "
                "can be skipped; 'raise' stops before that parameter is written")

    def ready(self, p: Tensor) -> None:
        g = p.grad
        name, _ = self.place(p)
        if g is None:
            return
        waiting = self._sent.get(p.device)
        if p in self._done or (waiting is not None and p is waiting[0]):
            how = ("call model.set_requires_gradient_sync(False) before all micro-batches but the "
                   "last, and (True) before that" if sharding.is_sharded(p) else
                   "use project_in_backward(optimizer, accumulation), or ordinary steps where it "
                   "is refused")
            raise RuntimeError(
                f"{self.name}: {name!r} got a second gradient before step(), but it was updated "
                "with the first: call step() after each backward pass; to accumulate gradients "
                f"{how}; where one pass gives a shared weight several, as reentrant checkpointing "
                "does, use use_reentrant=False")
        g = check_gradient(p, g, name)
        if self.replicas is None:
            self._update(p, g)
            return
        self.finish_later()
        self._sent[p.device] = (p, self.replicas.send(p, g))
        p.grad = None  # the mean takes its place
        if waiting is not None:
            self._update(waiting[0], waiting[1].arrive())

    def finish(self) -> None:
        assert self.replicas is not None
        self.replicas.compare(self.optimizer)
        last, self._sent = self._sent, {}
        for p, sent in last.values():
            self._update(p, sent.arrive())

    def _update(self, p: Tensor, g: Tensor) -> None:
        if not self.knows(p):
            return
        optimizer, (name, o) = self.optimizer, self.place(p)
        if self.limit is not None:
            # A copy: p.grad may share memory with a gradient that is still propagated.
            g = g.clone()
            clip([g], sharding.norm_of([g]), self.limit)
        work = Work(name, p, g, numbers(o, optimizer.table()))
        spoilt([work])
        moved: list[str] = []
        try:
            optimizer._run([[work]], moved)
        finally:
            if moved:  # p has been updated, although something after it (metrics) failed
                self._done.add(p)
                p.grad = None

    def begin(self, closure: Any) -> bool:
        super().begin(closure)
        if "found_inf" in self.optimizer.__dict__:
            forget_scaler(self.optimizer)
            raise RuntimeError(
                f"{self.name}: a GradScaler takes this step, but the parameters have moved already,"
                " by scaled gradients; use bf16, which needs no scaler, or "
                "project_in_backward(optimizer, grad_scaler=scaler)")
        if self.replicas is not None:
            with without_autocast():
                self.finish()  # the last gradient of a backward pass that failed
            self._average()
        return True

    def _average(self) -> None:
        """Average gradients that no hook has seen, e.g. of a parameter that was frozen."""
        assert self.replicas is not None
        late = [(name, p) for name, p, _ in self.optimizer._named() if p.grad is not None]
        for name, p in late:
            if p in self._done:
                raise RuntimeError(
                    f"{self.name}: {name!r} has a gradient beside the one that was applied; with a "
                    "process_group the model must not be wrapped in DistributedDataParallel, which "
                    "averages too")
        for _, p in late:
            assert p.grad is not None
            p.grad = self.replicas.send(p, p.grad).arrive()
        self.replicas.compare(self.optimizer)

    def before(self, work: Sequence[Work]) -> None:
        if work and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.name}: step() found gradients that no hook has seen, of "
                f"{', '.join(repr(w.name) for w in work[:3])}; it applies them as always",
                stacklevel=5)

    def end(self) -> None:
        self._done.clear()

    def clear(self) -> None:
        self._queued = False
        for _, sent in self._sent.values():  # where the backward pass failed
            sent.arrive()
        self._sent.clear()

    def loaded(self) -> None:
        super().loaded()
        self.clear()
        self._done.clear()


def update_in_backward(optimizer: MatrixOptimizer, *, max_grad_norm: float | None = None,
                       process_group: Any = None) -> UpdateInBackward:
    """Update each parameter during ``backward()``, and free its gradient at once.

    So one gradient exists at a time. ``step()`` must follow each backward pass: it counts the step
    for schedulers, and does nothing else. Options are read when the hook runs, so schedules hold;
    state is the ordinary one, and a run may go on with or without this. Under FSDP2 micro-batches
    before which ``set_requires_gradient_sync(False)`` was called are summed by FSDP2, unsharded,
    and the hook runs once, with their sum.

    Args:
        optimizer: any class of this package but those that move parameters together
            (SwitchLoRA).
        max_grad_norm: clip each parameter's gradient to this norm, > 0. There is no joint norm:
            the first parameters have moved before the last gradients are known. Default None.
        process_group: ranks that each have the whole model, not wrapped in anything, and their own
            part of the batch: the update is that of the mean of their gradients, as under DDP. Two
            gradients exist at a time, one of which is being reduced while the next is computed.
            Each rank must run the same graph (if its gradients are of other parameters, an error
            says so), and parameters that are added later must be the same on all. Default None: one
            process.

    Returns:
        A handle with ``remove()`` and ``bytes_sent``; as a context manager it removes itself.

    Raises:
        TypeError, ValueError: an argument; ``nonfinite="skip"``; parameters that act together;
            parameters that are not sharded where there are several processes, as under DDP,
            without ``process_group``; with it weights that differ between ranks.
        RuntimeError: the optimizer has such a handle already. Later: a second gradient before
            ``step()``, a closure, a GradScaler. ``FloatingPointError`` from ``backward()``: a
            NaN or Inf with ``nonfinite="raise"``; that parameter is not written, those whose
            gradients came before it are.
    """
    where = "update_in_backward"
    optimizer = checked_optimizer(optimizer, where)
    limit = optional(NORM).check("max_grad_norm", max_grad_norm, where)
    if type(optimizer).before_updates is not MatrixOptimizer.before_updates:
        raise ValueError(f"{where}: {type(optimizer).__name__} exchanges vectors between "
                         "parameters, which needs the gradients of all of them at once; call "
                         "step() after backward as usual (its factors' gradients are small)")
    replicas = replicas_of(process_group, optimizer, where)
    return UpdateInBackward(optimizer, limit, replicas).attach()
