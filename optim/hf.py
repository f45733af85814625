"""Hugging Face's Trainer: its optimizer from its arguments, and work in the backward pass.

Needs ``transformers`` (extra ``hf``), which nothing else of this package imports.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .backward import NORM, InBackward
from .backward_project import project_in_backward
from .backward_update import update_in_backward
from .base import MatrixOptimizer
from .groups import param_groups
from .options import optional

__all__ = ["ProjectInBackwardCallback", "UpdateInBackwardCallback", "trainer_optimizer",
           "without_ddp"]

Groups = list[dict[str, Any]]
Build = Callable[..., MatrixOptimizer]


def trainer_optimizer(
    cls: type[MatrixOptimizer], args: Any, rank: int | float | None = 128, *,
    groups: Callable[[nn.Module], Groups] | None = None, **options: Any,
) -> tuple[Callable[[], Build], dict[str, Any]]:
    """Use an optimizer of this package in a ``Trainer``, as its ``optimizer_cls_and_kwargs``.

    The Trainer's own groups distinguish only weight decay, so a low-rank class would project
    embeddings and head too. This makes the groups of :func:`lissom.optim.param_groups`, when the
    Trainer creates its optimizer, from the model that it has then (``model_init``, FSDP).

    Args:
        cls: any class of this package.
        args: the Trainer's ``TrainingArguments``; ``learning_rate``, ``adam_beta1``,
            ``adam_beta2``, ``adam_epsilon`` and ``weight_decay`` (0 where it was not given) are
            the optimizer's. With Muon, PolarGrad and Trion, ``learning_rate`` is that of the
            matrices; the rest has ``lr_adamw``.
        rank: of every matrix, as :func:`lissom.optim.param_groups` takes it. Default 128.
        groups: from the model to groups, in place of ``param_groups(model, rank=rank)``:
            ``adapter_groups`` for pairs, ``lambda model: param_groups(model, overrides=...)``.
        options: further options of the class; they win over ``args``.

    Returns:
        A pair for ``Trainer(..., optimizer_cls_and_kwargs=...)``.

    Raises:
        TypeError: cls is no class of this package. What is wrong with options or model is told
            by the class when the Trainer makes its optimizer.

    Source: ``Trainer.create_optimizer`` of transformers 5.2 and later, which calls such a pair as
    ``pair[0]()(model, **pair[1])``.
    """
    if not (isinstance(cls, type) and issubclass(cls, MatrixOptimizer)):
        raise TypeError(f"trainer_optimizer: cls={cls!r}, but it must be a class of lissom.optim")
    given: dict[str, Any] = {
        "lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon, "weight_decay": args.weight_decay} | options

    def build(model: nn.Module) -> MatrixOptimizer:
        found = param_groups(model, rank=rank) if groups is None else groups(model)
        make: Build = cls
        return make(found, **given)

    return lambda: build, {}


class _InBackwardCallback(TrainerCallback):
    """Hangs a handle on the Trainer's optimizer while it trains."""

    def __init__(self, max_grad_norm: float | None) -> None:
        self.max_grad_norm: float | None = optional(NORM).check(
            "max_grad_norm", max_grad_norm, type(self).__name__)
        #: The handle during training, else None.
        self.handle: InBackward | None = None
        #: Whether the backward pass averages over ranks: see :func:`without_ddp`.
        self.replicated = False

    def attach(self, optimizer: Any, args: Any, scaler: Any, group: Any) -> InBackward:
        """The handle for one training."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any = None,
                       **kwargs: Any) -> None:
        """Attach; raises what the handle's function raises, ValueError where the Trainer clips."""
        self._remove()  # left by a training that ended with an error
        name = type(self).__name__
        if args.max_grad_norm:
            raise ValueError(
                f"{name}: TrainingArguments have max_grad_norm={args.max_grad_norm}, but it must "
                "be 0: the Trainer would clip by what is left in p.grad; give TrainingArguments("
                f"max_grad_norm=0.0), and {name}(max_grad_norm={args.max_grad_norm})")
        scaler = getattr(optimizer, "scaler", None)
        while not isinstance(optimizer, MatrixOptimizer) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # Accelerate's wrapper
        group = torch.distributed.group.WORLD if self.replicated else None
        self.handle = self.attach(optimizer, args, scaler, group)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the handle off."""
        self._remove()

    def _remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = None


class ProjectInBackwardCallback(_InBackwardCallback):
    """:func:`lissom.optim.project_in_backward` while a Trainer trains.

    ``gradient_accumulation_steps`` of the Trainer is the handle's ``accumulation``, its GradScaler
    (``fp16=True``) the handle's. Checkpoints are the ordinary ones: a training may go on from them
    with or without this. The ``grad_norm`` in the Trainer's log is of dense gradients alone.

    Args:
        max_grad_norm: clip to this joint norm in each step, > 0; for it ``TrainingArguments`` must
            have ``max_grad_norm=0.0``, since the Trainer would clip dense gradients only.
            Default None: not clipped.
        exact_norm: see :func:`lissom.optim.project_in_backward`. Default False.

    Raises:
        TypeError, ValueError: an argument. When training begins, what ``project_in_backward``
            refuses, and ``max_grad_norm`` in ``TrainingArguments``.
    """

    def __init__(self, max_grad_norm: float | None = None, exact_norm: bool = False) -> None:
        super().__init__(max_grad_norm)
        self.exact_norm = exact_norm

    def attach(self, optimizer: Any, args: Any, scaler: Any, group: Any) -> InBackward:
        return project_in_backward(
            optimizer, args.gradient_accumulation_steps, max_grad_norm=self.max_grad_norm,
            exact_norm=self.exact_norm, grad_scaler=scaler, process_group=group)


class UpdateInBackwardCallback(_InBackwardCallback):
    """:func:`lissom.optim.update_in_backward` while a Trainer trains.

    For ``gradient_accumulation_steps=1``. The ``grad_norm`` in the Trainer's log is 0: no gradient
    is left when it looks.

    Args:
        max_grad_norm: clip each parameter's gradient to this norm, > 0; for it
            ``TrainingArguments`` must have ``max_grad_norm=0.0``. Default None: not clipped.

    Raises:
        TypeError, ValueError: an argument. When training begins, what ``update_in_backward``
            refuses, ``max_grad_norm`` in ``TrainingArguments``, accumulation and ``fp16=True``.
    """

    def __init__(self, max_grad_norm: float | None = None) -> None:
        super().__init__(max_grad_norm)

    def attach(self, optimizer: Any, args: Any, scaler: Any, group: Any) -> InBackward:
        count = args.gradient_accumulation_steps
        if count != 1:
            raise ValueError(
                f"UpdateInBackwardCallback: TrainingArguments have gradient_accumulation_steps="
                f"{count}, but it must be 1: each backward pass updates the weights; use "
                "ProjectInBackwardCallback to accumulate")
        if scaler is not None:
            raise ValueError("UpdateInBackwardCallback: TrainingArguments have fp16=True, but it "
                             "must be False: the weights would move by scaled gradients; use bf16")
        return update_in_backward(optimizer, max_grad_norm=self.max_grad_norm, process_group=group)


def without_ddp(trainer: Any) -> None:
    """Have the backward pass average gradients over ranks, in place of DistributedDataParallel.

    Under ``torchrun`` a Trainer wraps its model in DDP, which keeps every gradient in full size.
    Called before ``trainer.train()``, this leaves the model unwrapped, and the Trainer's
    ``ProjectInBackwardCallback`` or ``UpdateInBackwardCallback`` averages projections, or one
    gradient at a time, over all ranks (``process_group`` of
    :func:`lissom.optim.project_in_backward`). The steps are those of DDP, and checkpoints are the
    ordinary ones. With a single process it changes nothing, so that a script may always call it.

    Args:
        trainer: a ``transformers.Trainer`` with one of the two callbacks.

    Raises:
        ValueError: it has no such callback; it shards its model (FSDP, DeepSpeed); it has
            ``auto_find_batch_size=True``, which builds what wraps the model anew.
    """
    where = "without_ddp"
    given = trainer.callback_handler.callbacks
    callbacks = [x for x in given if isinstance(x, _InBackwardCallback)]
    if not callbacks:
        raise ValueError(f"{where}: the Trainer has no callback that works in the backward pass, "
                         "so nobody would average gradients; give it ProjectInBackwardCallback or "
                         "UpdateInBackwardCallback (callbacks=[...]) before")
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        if getattr(trainer, name, False):
            raise ValueError(f"{where}: {name} is True, but it must be False: what shards a model "
                             "averages its gradients too")
    if getattr(trainer.args, "auto_find_batch_size", False):
        raise ValueError(f"{where}: TrainingArguments have auto_find_batch_size=True, but it must "
                         "be False: the Trainer would wrap the model in DDP at its second attempt")
    if trainer.args.world_size == 1:
        return
    accelerator = trainer.accelerator
    accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
    for callback in callbacks:
        callback.replicated = True
