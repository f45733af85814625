"""Optimizers by their names on the command line, with the options that the scripts share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import AdamW, GaLoreAdamW, param_groups
from ..optim.base import MatrixOptimizer

__all__ = ["OPTIMIZERS", "PEERS", "add_options", "build", "build_peer", "options_of",
           "state_bytes"]

#: Command-line name: class, and learning rate that suits the training demo (tuned on it).
OPTIMIZERS: dict[str, tuple[type[MatrixOptimizer], float]] = {
    "adamw": (AdamW, 1.5e-3),
    "galore": (GaLoreAdamW, 3e-2),
}

#: Optimizers of other packages, to compare with where they are installed, and their rates.
PEERS: dict[str, float] = {"torch-adamw": 1.5e-3, "galore-torch": 3e-2}


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
    make: Callable[..., MatrixOptimizer] = cls
    params = param_groups(model, rank) if "rank" in cls.table() else model.named_parameters()
    return make(params, lr=lr, **known)


def build_peer(name: str, model: nn.Module, rank: int | None, lr: float, **options: Any
               ) -> torch.optim.Optimizer:
    """An optimizer of another package over the same groups, with the same decay and epsilon."""
    if name == "torch-adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr)
    from galore_torch import GaLoreAdamW as Peer

    groups = param_groups(model, rank)
    for group in groups:
        group["params"] = [p for _, p in group["params"]]
        if group.pop("rank") is not None:
            group |= {"rank": rank, "update_proj_gap": options.get("update_proj_gap", 200),
                      "scale": options.get("scale", 0.25), "proj_type": "std"}
    peer: torch.optim.Optimizer = Peer(groups, lr=lr, eps=1e-8, weight_decay=1e-2,
                                       no_deprecation_warning=True)
    return peer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor in the state, those inside a peer's projector objects included."""
    storages: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for x in value:
                walk(x)
        elif isinstance(value, dict) or hasattr(value, "__dict__"):
            for x in (value if isinstance(value, dict) else vars(value)).values():
                walk(x)

    for entry in optimizer.state.values():
        walk(entry)
    return sum(storages.values())
