"""Optimizers by their names on the command line, with the options that the scripts share."""

from __future__ import annotations

import argparse
import importlib
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..optim import (
    APOLLO,
    FRUGAL,
    AdamW,
    AdamW8bit,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    Muon,
    PolarGrad,
    SwitchLoRAAdamW,
    Trion,
    adapter_groups,
    lora,
    param_groups,
)
from ..optim.adapters import adapters
from ..optim.base import MatrixOptimizer
from ..optim.common import COMMON
from ..optim.options import Option
from ..optim.sharding import local

__all__ = ["OPTIMIZERS", "PEERS", "REST", "Entry", "add_options", "build", "build_peer", "command",
           "commit", "options_of", "prepare", "state_bytes"]

#: Rate of embeddings, head and norms in entries with two rates.
REST = 1e-2


class Entry(NamedTuple):
    """An optimizer on the command line.

    Args:
        make: its class.
        lr: learning rate that suits the training demo (tuned on it).
        options: options that differ from the class's defaults there.
        groups: from the model and the rank to what is optimized.
        pairs: options of :func:`lissom.optim.lora` for the pairs that the model gets before; None:
            it gets none.
    """

    make: type[MatrixOptimizer]
    lr: float
    options: Mapping[str, Any] = {}
    groups: Callable[[nn.Module, int | None], Any] = param_groups
    pairs: Mapping[str, Any] | None = None


def _named(model: nn.Module, rank: int | None) -> Any:
    return model.named_parameters()


def _two_rates(model: nn.Module, rank: int | None) -> Any:
    """Matrices of the blocks at the given rate, everything else at REST."""
    groups = param_groups(model, rank)
    for group in groups:
        if group.pop("rank") is None:
            group["lr"] = REST
    return groups


def _lora(model: nn.Module, rank: int | None) -> Any:
    """Factors and everything else that was no matrix of a block, at one rate."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _lora_two_rates(model: nn.Module, rank: int | None) -> Any:
    """Factors at the given rate, everything else at REST."""
    factors = [(x.names[k], x.tensors[k]) for x in adapters(model) for k in "AB"]
    taken = {name for name, _ in factors}
    rest = [(name, p) for name, p in model.named_parameters()
            if p.requires_grad and name not in taken]
    return [{"params": factors}, {"params": rest, "lr": REST}]


def _switchlora(model: nn.Module, rank: int | None) -> Any:
    """Pairs as they are, without a projection of their gradients."""
    return adapter_groups(model)


def _normalized_factors(model: nn.Module, rank: int | None) -> Any:
    """Factors of normalized layers, their gradients projected to 5/8 of the pairs' rank."""
    assert rank is not None
    groups = adapter_groups(model, max(1, rank * 5 // 8))
    for group in groups:
        if group.get("roles") == ("magnitude",):
            group["lr"] = 3e-3  # columns of a fresh layer have norms of 0.2
    return groups


#: Optimizers by command-line name.
OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(AdamW, 1.5e-3, groups=_named),
    "adamw-two-rates": Entry(AdamW, 1e-3, groups=_two_rates),
    "adamw8bit": Entry(AdamW8bit, 1.5e-3, groups=_named),
    "lora": Entry(AdamW, 4e-3, groups=_lora, pairs={"init": "lora"}),
    "lora-two-rates": Entry(AdamW, 4e-3, groups=_lora_two_rates, pairs={"init": "lora"}),
    # a tenth of 600 steps, as the paper takes a tenth of its runs
    "switchlora": Entry(SwitchLoRAAdamW, 1e-2, {"decay_steps": 60}, _switchlora, {}),
    "galore": Entry(GaLoreAdamW, 4e-2),
    "dct-adamw": Entry(DCTAdamW, 4e-2, {"scale": 0.25, "update_proj_gap": 200}),
    "fira": Entry(FiraAdamW, 2e-2),
    "apollo": Entry(APOLLO, 1e-2),
    "frugal": Entry(FRUGAL, 2e-3),
    "gradnormlorp": Entry(GradNormLoRPAdamW, 1e-2),
    "gradnormlorp-factors": Entry(GradNormLoRPAdamW, 4e-3, {"scale": 1.0, "update_proj_gap": 50},
                                  _normalized_factors, {"init": "lora", "normalize": "input"}),
    # one rate for all parameters
    "trion": Entry(Trion, 2e-2, {"adjust_lr_fn": "match_rms_adamw", "lr_adamw": None}),
    "muon": Entry(Muon, 5e-3, {"adjust_lr_fn": "match_rms_adamw", "lr_adamw": None,
                               "weight_decay": 1e-2}),
    "polargrad": Entry(PolarGrad, 6.25e-2, {"lr_adamw": REST, "polar": "polar-express",
                                            "polar_steps": 5}),
}

#: Optimizers of other packages, to compare with where they are installed, and their rates.
PEERS: dict[str, float] = {"torch-adamw": 1.5e-3, "galore-torch": 4e-2, "fira-package": 2e-2}

#: Command-line spelling of an option, where it is not the option's own.
_SPELLED = {"update_proj_gap": "gap"}


def _table() -> dict[str, Option]:
    """Every option that some class's groups take beyond the common ones, and state_bits."""
    table = {k: v for entry in OPTIMIZERS.values() for k, v in entry.make.table().items()}
    own = {k for k in table if k not in COMMON and k not in ("algorithm", "format",
                                                             "skipped_steps", "rank")}
    return {k: table[k] for k in sorted(own | {"state_bits"})}


def _rank(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be an int >= 1")
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of optimizers, spelled the same in every script."""
    parser.add_argument("--rank", type=_rank, help="rank of projections; default: the paper's")
    for name, option in _table().items():
        parser.add_argument("--" + _SPELLED.get(name, name).replace("_", "-"), dest=name,
                            type=option.kind, help=option.rule)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The optimizer options that were given, by the names of the classes."""
    return {k: getattr(args, k) for k in _table() if getattr(args, k) is not None}


def prepare(name: str, model: nn.Module, rank: int | None) -> None:
    """Give the model the pairs that the named optimizer trains, unless it has them.

    :func:`build` does so too; before a model is sharded or wrapped it has to be done apart.
    """
    pairs = OPTIMIZERS[name].pairs if name in OPTIMIZERS else None
    if pairs is not None and not adapters(model):
        assert rank is not None
        lora(model, rank, **pairs)


def build(name: str, model: nn.Module, rank: int | None, lr: float, **options: Any
          ) -> MatrixOptimizer:
    """The named optimizer over the model; options of other classes are left out.

    ``lr_adamw`` is the rate of what is no matrix: that of AdamW's part, or with AdamW itself of the
    groups that have another one than ``lr``.
    """
    cls, _, own, groups, _ = OPTIMIZERS[name]
    prepare(name, model, rank)
    parts = ("lr_adamw",) if cls.algorithm != "adamw" else ()
    known = {**own, **{k: v for k, v in options.items() if k in cls.table() or k in parts}}
    made = groups(model, rank)
    if not parts and "lr_adamw" in options:
        made = [{**group, "lr": options["lr_adamw"]}
                if isinstance(group, dict) and "lr" in group else group for group in made]
    make: Callable[..., MatrixOptimizer] = cls
    return make(made, lr=lr, **known)


def build_peer(name: str, model: nn.Module, rank: int | None, lr: float, **options: Any
               ) -> torch.optim.Optimizer:
    """An optimizer of another package over the same groups, with the same decay and epsilon."""
    if name == "torch-adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr)
    module = importlib.import_module("fira" if name == "fira-package" else "galore_torch")
    make = getattr(module, "FiraAdamW" if name == "fira-package" else "GaLoreAdamW")
    kind = "alpha" if name == "fira-package" else "scale"
    groups = param_groups(model, rank)
    for group in groups:
        group["params"] = [p for _, p in group["params"]]
        if group.pop("rank") is not None:
            group |= {"rank": rank, "update_proj_gap": options.get("update_proj_gap", 200),
                      kind: options.get("scale", 0.25), "proj_type": "std"}
    peer: torch.optim.Optimizer = make(groups, lr=lr, eps=1e-8, weight_decay=1e-2,
                                       no_deprecation_warning=True)
    return peer


def command(module: str, argv: Sequence[str] | None) -> str:
    """The command line that makes a result: ``python -m lissom.bench.`` and so on.

    Args:
        module: its last part.
        argv: what ``main`` was given; None is the process's own arguments.
    """
    return shlex.join(["python", "-m", f"lissom.bench.{module}",
                       *(sys.argv[1:] if argv is None else argv)])


def commit() -> str | None:
    """The commit that a result was measured at, None outside a repository."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).resolve().parent,
                          capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor in the state, those inside a peer's projector objects included.

    Of a sharded one it counts what this rank holds; of a tensor that is made of others, those.
    """
    storages: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            part: Any = local(value)
            if is_traceable_wrapper_subclass(part):  # has no storage of its own
                walk([getattr(part, name) for name in part.__tensor_flatten__()[0]])
            else:
                storages[part.data_ptr()] = part.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for x in value:
                walk(x)
        elif isinstance(value, dict) or hasattr(value, "__dict__"):
            for x in (value if isinstance(value, dict) else vars(value)).values():
                walk(x)

    for entry in optimizer.state.values():
        walk(entry)
    return sum(storages.values())
