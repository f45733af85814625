"""Work in the backward pass of an optimizer: one hook on each parameter, and a handle.

Autograd calls the hook when the gradient is complete: once for a shared weight.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from . import sharding
from .base import MatrixOptimizer
from .checks import check_capture, without_autocast
from .gradients import Gradients
from .options import real
from .replicas import Replicas

__all__ = ["NORM", "InBackward", "clip", "forget_scaler"]

#: A norm to clip to.
NORM = real(None, above=True)

Self = TypeVar("Self", bound="InBackward")


class InBackward(Gradients):
    """Handle of the work in one optimizer's backward pass; also a context manager."""

    in_backward: ClassVar[bool] = True

    def __init__(self, optimizer: MatrixOptimizer, replicas: Replicas | None = None) -> None:
        self.optimizer, self.replicas = optimizer, replicas
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._places: dict[Tensor, tuple[str, dict[str, Any]]] = {}
        # The list of groups that _places was made from, and its length; loading replaces the list.
        self._groups: tuple[Any, int] = (None, 0)
        # Whether autograd will call finish() at the end of the backward pass that runs.
        self._queued = False

    def attach(self: Self) -> Self:
        """Check all parameters, then register the hooks."""
        optimizer = self.optimizer
        if optimizer._gradients.in_backward:
            raise RuntimeError(f"{self.name}: this optimizer already has "
                               f"{optimizer._gradients.name}; call .remove() of that handle first")
        failure: Exception | None = None
        try:
            for name, p, o in optimizer._named():
                self._check_setting(name, p, o)
                self.check(name, p, o)
        except (TypeError, ValueError) as error:
            failure = error
        if self.replicas is not None:  # the other ranks wait in a reduction
            self.replicas.agree(failure)
            self.replicas.check(optimizer)
        elif failure is not None:
            raise failure
        optimizer._gradients = self
        try:
            self._changed()
        except BaseException:
            self.remove()
            raise
        # GradScaler then calls step() in any case, and tells it.
        setattr(optimizer, "_step_supports_amp_scaling", True)  # noqa: B010
        return self

    @property
    def bytes_sent(self) -> int:
        """Bytes of gradients that this rank has put into reductions of ``process_group``."""
        return 0 if self.replicas is None else self.replicas.bytes_sent

    def remove(self) -> None:
        """Restore the ordinary behaviour; gradients that wait in buffers are dropped."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        if self.optimizer._gradients is self:
            self.clear()
            self.optimizer._gradients = Gradients()
            self.optimizer.__dict__.pop("_step_supports_amp_scaling", None)
            self._changed()
            if self.replicas is not None:
                self.replicas.settle()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self.remove()
        except RuntimeError:
            if error is None:  # else that one is the cause
                raise

    def _changed(self) -> None:
        """The slots of every parameter may have changed."""
        self.optimizer._layouts.forget()
        self.optimizer._sync_state()

    # ---------------------------------------------------------------- hooks

    def follow(self) -> None:
        """Register hooks on new parameters, and remove those of parameters that are gone."""
        present = {p for _, p, _ in self.optimizer._named()}
        for p in self._hooks.keys() - present:
            self._hooks.pop(p).remove()
        self._groups = (None, 0)
        for name, p, o in self.optimizer._named():
            self._check_setting(name, p, o)
            self.check(name, p, o)
            if p.requires_grad and p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(
                    functools.partial(_fire, weakref.ref(self)))

    def knows(self, p: Tensor) -> bool:
        """Whether p is a parameter of the optimizer now: others may have been put in its place."""
        groups = self.optimizer.param_groups
        if self._groups[0] is not groups or self._groups[1] != len(groups) or (
                p not in self._places):
            self._places = {p: (name, o) for name, p, o in self.optimizer._named()}
            self._groups = (groups, len(groups))
        return p in self._places

    def place(self, p: Tensor) -> tuple[str, dict[str, Any]]:
        """Name and options of a parameter, after its state has been brought up to date."""
        assert self.knows(p)
        name, o = self._places[p]
        optimizer = self.optimizer
        optimizer._check_changed(o)
        if optimizer._layouts.stale(optimizer, p, o):
            optimizer._sync_state()
        return name, o

    def _check_setting(self, name: str, p: Tensor, o: Mapping[str, Any]) -> None:
        """Refuse CUDA graphs, and gradients that are averaged over ranks too late or not at all."""
        if o["capturable"]:
            raise ValueError(f"{self.name}: {name!r} has capturable=True, but it must be False: "
                             "hooks count micro-batches on the host")
        dist, sharded = torch.distributed, sharding.is_sharded(p)
        if self.replicas is not None and sharded:
            raise ValueError(
                f"{self.name}: {name!r} is sharded (DTensor), but with a process_group each rank "
                "must have all of it; FSDP2 averages gradients by itself: leave process_group out")
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if several and not sharded and self.replicas is None:
            raise ValueError(
                f"{self.name}: {name!r} is no DTensor, but there are {dist.get_world_size()} "
                "processes: DDP averages gradients only after the hook has seen them; leave the "
                "model unwrapped and give process_group=torch.distributed.group.WORLD, or use "
                "FSDP2, or lissom.optim.ddp.projected_allreduce(optimizer, model); before a "
                "Trainer trains, call lissom.optim.hf.without_ddp(trainer)")

    def check(self, name: str, p: Tensor, o: Mapping[str, Any]) -> None:
        """Refuse a parameter with which this cannot work; raises ValueError."""

    def ready(self, p: Tensor) -> None:
        """The gradient of p is complete."""

    def finish(self) -> None:
        """The backward pass is over, if :meth:`finish_later` was called in it."""

    def finish_later(self) -> None:
        """Have :meth:`finish` called at the end of the backward pass that runs."""
        if not self._queued:
            self._queued = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(functools.partial(_finish, weakref.ref(self)))

    # ---------------------------------------------------------------- what the optimizer asks

    def begin(self, closure: Any) -> bool:
        self._queued = False  # of a backward pass that failed
        if closure is not None:
            raise RuntimeError(f"{self.name}: step() got a closure, but it must be None: a closure "
                               "may run several backward passes, and each would count; run "
                               "backward before step(), or .remove() the handle")
        return True

    def check_saved(self) -> None:
        if self.replicas is not None:
            self.replicas.settle()

    def loaded(self) -> None:
        if self.replicas is not None:
            self.replicas.forget()


def _fire(handle: weakref.ref[InBackward], p: Tensor) -> None:
    """The hook; does nothing if the optimizer is gone or p is no longer in it."""
    found = handle()
    if found is not None and p.grad is not None and found.knows(p):
        check_capture(found.optimizer.param_groups, found.name)
        if sharding.offloaded(p):  # FSDP2's copy to the host may still be on its way
            torch.cuda.current_stream().synchronize()
        with torch.no_grad(), without_autocast():
            found.ready(p)


def _finish(handle: weakref.ref[InBackward]) -> None:
    """Callback at the end of a backward pass."""
    found = handle()
    if found is not None:
        found._queued = False
        with torch.no_grad(), without_autocast():
            found.finish()


def clip(tensors: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Multiply by min(1, limit / (norm + 1e-6)) in place, as torch's clipping does."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for x in tensors:
        x = sharding.local(x)
        x.mul_(factor.to(x.device))


def forget_scaler(optimizer: MatrixOptimizer) -> None:
    """Remove GradScaler's attributes from an optimizer, as it does itself unless step() raises."""
    for name in ("grad_scale", "found_inf"):
        optimizer.__dict__.pop(name, None)
