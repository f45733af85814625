"""Optimizers by their names on the command line, with the options that the scripts share."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from ..optim import AdamW, GaLoreAdamW, param_groups
from ..optim.base import MatrixOptimizer

__all__ = ["OPTIMIZERS", "add_options", "build", "options_of"]

#: Command-line name: class, and learning rate that suits the training demo (tuned on it).
OPTIMIZERS: dict[str, tuple[type[MatrixOptimizer], float]] = {
    "adamw": (AdamW, 3e-3),
    "galore": (GaLoreAdamW, 1e-2),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of optimizers, spelled the same in every script."""
    parser.add_argument("--rank", type=int, help="rank of projections; default: the paper's")
    parser.add_argument("--gap", type=int, help="steps between two refreshes of a basis")
    parser.add_argument("--scale", type=float, help="multiplies the lifted update")
    parser.add_argument("--projection", help="svd, subspace, randomized, random")
    parser.add_argument("--moments", help="keep, rotate, reset")
    parser.add_argument("--state-bits", type=int, help="32 or 16 bits per moment element")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The optimizer options that were given, by the names of the classes."""
    given = {"update_proj_gap": args.gap, "scale": args.scale, "projection": args.projection,
             "moments": args.moments, "state_bits": args.state_bits}
    return {k: v for k, v in given.items() if v is not None}


def build(name: str, model: nn.Module, rank: int | None, lr: float, **options: Any
          ) -> MatrixOptimizer:
    """The named optimizer over the model; options of other classes are left out."""
    cls, _ = OPTIMIZERS[name]
    known = {k: v for k, v in options.items() if k in cls.table()}
    if cls is AdamW:
        return cls(model.named_parameters(), lr=lr, **known)  # type: ignore[call-arg]
    return cls(param_groups(model, rank), lr=lr, **known)  # type: ignore[call-arg]
