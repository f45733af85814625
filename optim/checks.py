"""Checks of parameters and gradients, and of torch's switches that must be off here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .sharding import is_sharded

__all__ = ["TORCH_ONLY", "check_capturable", "check_capture", "check_gradient", "check_parameter",
           "refuse_torch_only"]

#: Options of torch.optim.AdamW about how it runs, which change no result.
TORCH_ONLY = {"foreach", "fused", "differentiable", "decoupled_weight_decay"}


def refuse_torch_only(given: Mapping[str, Any], where: str) -> None:
    """Torch's switches about how a step runs are taken where they ask for nothing else."""
    if given.get("differentiable"):
        raise ValueError(f"{where}: differentiable={given['differentiable']!r}, but it must be "
                         "False: this step is not differentiated through")
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


def check_capturable(o: Mapping[str, Any], params: list[Tensor], able: str | None, where: str
                     ) -> None:
    """What a step in a CUDA graph needs: nothing of it is decided or counted on the host.

    Args:
        o: all options of a group with ``capturable=True``, and its ``param_names`` or None.
        params: its parameters.
        able: why the class cannot, or None.
        where: beginning of a message.

    Raises:
        ValueError: what the group has that a graph would freeze.
    """
    names = o["param_names"] or [f"parameter {i}" for i in range(len(params))]
    sharded = [name for name, p in zip(names, params, strict=False) if is_sharded(p)]
    reason = able
    if reason is None and o["nonfinite"] != "propagate":
        reason = f"nonfinite={o['nonfinite']!r} looks at the gradients on the host"
    if reason is None and sharded:
        reason = f"{sharded[0]} is sharded, and what its ranks exchange is decided on the host"
    if reason is not None:
        raise ValueError(f"{where}: capturable=True, but it must be False: {reason}; capture "
                         "forward and backward, and call step() outside the graph")
    lr = o["lr"]
    if not isinstance(lr, Tensor):
        return
    elsewhere = [f"{name} on {p.device}" for name, p in zip(names, params, strict=False)
                 if p.device != lr.device]
    if lr.shape != () or lr.dtype not in (torch.float32, torch.float64) or elsewhere:
        beside = f", beside {elsewhere[0]}" if elsewhere else ""
        raise ValueError(f"{where}: lr is a tensor of shape {tuple(lr.shape)}, {lr.dtype}, on "
                         f"{lr.device}{beside}, but it must be 0-d, fp32 or float64 and on the "
                         "device of the parameters")


def check_capture(groups: list[dict[str, Any]], where: str) -> None:
    """Refuse to be recorded in a CUDA graph that would freeze what changes from step to step.

    Args:
        groups: of the optimizer.
        where: beginning of a message.

    Raises:
        RuntimeError: a group without ``capturable=True`` in a graph.
    """
    if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        return
    for i, group in enumerate(groups):
        if group["params"] and not group["capturable"]:
            raise RuntimeError(f"{where}: group {i} has capturable=False, but it must be True in "
                               "a CUDA graph, which would freeze the rate, the count of steps and "
                               "the random bits")
