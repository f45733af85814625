"""Checks of parameters and gradients, and of torch's switches that must be off here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .sharding import is_sharded

__all__ = ["TORCH_ONLY", "check_gradient", "check_parameter", "refuse_torch_only"]

#: Options of torch.optim.AdamW about how it runs, which change no result.
TORCH_ONLY = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}


def refuse_torch_only(given: Mapping[str, Any], where: str) -> None:
    """Torch's switches about how a step runs are taken where they ask for nothing else."""
    for name, reason in (
            ("capturable", "step and lr are numbers of the host, which a CUDA graph would freeze; "
             "capture forward and backward, and call step() outside the graph"),
            ("differentiable", "this step is not differentiated through")):
        if given.get(name):
            raise ValueError(f"{where}: {name}={given[name]!r}, but it must be False: {reason}")
    if not given.get("decoupled_weight_decay", True):
        raise ValueError(f"{where}: decoupled_weight_decay=False, but it must be True: "
                         "decay is decoupled")
    for name in ("foreach", "fused"):
        if not isinstance(given.get(name), (bool, type(None))):
            raise TypeError(f"{where}: {name}={given[name]!r}, but it must be None, True or False")


def check_parameter(p: Any, name: str, where: str) -> None:
    """A parameter must be a real floating tensor."""
    if not isinstance(p, Tensor):
        raise TypeError(f"{where}: {name} is a {type(p).__name__}, but it must be a tensor")
    if not p.is_floating_point():
        raise TypeError(f"{where}: {name} has dtype {p.dtype}, but it must be a real floating one "
                        "(integer and complex parameters have no place here)")


def check_gradient(p: Tensor, g: Tensor, name: str) -> None:
    """A gradient must be dense and like its parameter."""
    if g.layout != torch.strided:
        raise TypeError(f"the gradient of {name!r} is sparse ({g.layout}), but it must be dense "
                        "(an embedding needs sparse=False)")
    if g.dtype != p.dtype or g.shape != p.shape or g.device != p.device:
        for what in ("dtype", "shape", "device"):
            has, needs = getattr(g, what), getattr(p, what)
            if has != needs:
                kind = TypeError if what == "dtype" else ValueError
                raise kind(f"the gradient of {name!r} has {what} {_plain(has)}, "
                           f"but it must be its parameter's {_plain(needs)}")
    if not is_sharded(p) and not is_sharded(g):
        return
    places = [getattr(x, "placements", None) for x in (p, g)]
    if places[0] != places[1]:
        raise ValueError(f"the gradient of {name!r} has placements {places[1]}, "
                         f"but it must have its parameter's {places[0]}")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


