"""Options that every class has: their rules, and what else is in a group."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from .options import Option, boolean, choice, integer, optional, real, several

__all__ = ["ADAMW_PART", "BOOKKEEPING", "COMMON", "FOREIGN", "FORMAT", "OF_SOME",
           "AdamWPart", "CommonOptions"]

#: Version of the state dict, kept in every group.
FORMAT = 1

#: Options of every class.
COMMON: dict[str, Option] = {
    "lr": real(1e-3),
    "betas": several((0.9, 0.999), real(None, 0.0, 1.0, below=True), 2),
    "eps": real(1e-8),
    "weight_decay": real(1e-2),
    "maximize": boolean(False),
    "amsgrad": boolean(False),
    "state_bits": choice(32, 32, 16, 8, 4),
    "rounding": optional(choice(None, "nearest", "stochastic")),
    "master_bits": optional(choice(None, 8, 16)),
    "nonfinite": choice("propagate", "propagate", "skip", "raise"),
    "seed": integer(0, 0, 2**63 - 1),
    "shards": choice("rows", "rows", "whole"),
    "metrics": boolean(False),
    "capturable": boolean(False),
}
#: Kept in the groups by this package, not given by users.
BOOKKEEPING = {"format": integer(FORMAT, 1), "skipped_steps": integer(0, 0)}
#: Written into groups by torch's schedulers, or by people for their own use.
FOREIGN = {"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum",
            "param_names", "name", "lr_scale"}
#: Keys that ``param_groups`` writes for some classes; the others ignore them.
OF_SOME = {"rank", "matricize"}
#: Options of the parameters that get AdamW, which then are groups of their own.
ADAMW_PART = {"lr_adamw": "lr", "betas_adamw": "betas", "weight_decay_adamw": "weight_decay"}


class CommonOptions(TypedDict, total=False):
    """Options of every class, for type checkers; see :class:`lissom.optim.AdamW`."""

    maximize: bool
    state_bits: int
    rounding: str | None
    master_bits: int | None
    nonfinite: str
    seed: int
    shards: str
    metrics: bool
    capturable: bool
    foreach: bool | None
    fused: bool | None
    differentiable: bool


class AdamWPart(CommonOptions, total=False):
    """Options of the parameters that get AdamW in another class's object."""

    lr_adamw: float | Tensor | None
    betas_adamw: tuple[float, float] | None
    weight_decay_adamw: float | None
