"""Checks of parameters and gradients, and of a step inside a CUDA graph or autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.fakes import is_fake
from .sharding import agreed, is_sharded, local, placed

if TYPE_CHECKING:
    from .batches import Work

__all__ = ["capturing", "check_capture", "check_gradient", "check_module", "check_parameter",
           "listed", "spoilt", "without_autocast"]

# Devices whose autocast may be on during a step.
_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


def check_module(model: Any, where: str) -> None:
    """A model must be a module, and not its parameters."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{where}: model is a {type(model).__name__}, but it must be a module")


def listed(params: Any, where: str, names: Any = None) -> list[Any]:
    """A group's ``params`` as a list: tensors or (name, tensor) pairs; sets are refused.

    ``names`` are those of a group's ``param_names``: tensors without names get them, if there is
    one for each. Wrappers that divide a group's parameters leave all names in each part.
    """
    if isinstance(params, set):
        raise TypeError(f"{where}: params is a set, whose order changes between runs; use a list")
    if not isinstance(params, Iterable):
        raise TypeError(f"{where}: params is a {type(params).__name__}, but it must be a tensor "
                        "or an iterable of them")
    found = [params] if isinstance(params, Tensor) else list(params)
    for i, entry in enumerate(found):
        if isinstance(entry, tuple) and not (len(entry) == 2 and isinstance(entry[0], str)):
            raise TypeError(f"{where}: parameter {i} is a tuple of "
                            f"{', '.join(type(x).__name__ for x in entry) or 'nothing'}, but it "
                            "must be a tensor or (name, tensor)")
    if (isinstance(names, (list, tuple)) and len(names) == len(found)
            and all(isinstance(name, str) for name in names)
            and not any(isinstance(entry, tuple) for entry in found)):
        return [*zip(names, found, strict=True)]
    return found


def check_parameter(p: Any, name: str, where: str) -> None:
    """What is trained must be a real floating tensor that can be written to; what is frozen may be
    of any dtype, as the codes of quantized weights are.
    """
    if not isinstance(p, Tensor):
        raise TypeError(f"{where}: {name} is a {type(p).__name__}, but it must be a tensor")
    if torch.nn.parameter.is_lazy(p):
        raise ValueError(f"{where}: {name} has no shape yet, but it must have one: run the model "
                         "once (it has lazy modules) before the optimizer is built")
    if not p.requires_grad:
        return
    if not p.is_floating_point():
        raise TypeError(f"{where}: {name} has dtype {p.dtype}, but it must be a real floating one, "
                        "or not require a gradient")
    if p.dtype.itemsize == 1:
        raise TypeError(f"{where}: {name} has dtype {p.dtype}, but it must be one of 16 bits or "
                        "more, or not require a gradient")
    if not (p.is_leaf or p.retains_grad):
        raise ValueError(f"{where}: {name} is computed from other tensors, but it must be a leaf "
                         "of the graph, as parameters of modules are")
    if p.is_inference():
        raise TypeError(f"{where}: {name} was made in inference mode, but it must be an ordinary "
                        "tensor, which may be written to: make the model outside of it")
    if p.layout != torch.strided:
        raise TypeError(f"{where}: {name} has layout {p.layout}, but it must be dense")
    if p.numel() and any(step == 0 and size > 1
                         for step, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(f"{where}: {name} has strides {p.stride()}, but no element may lie where "
                         "another does (it was expanded: .clone() it)")


def check_gradient(p: Tensor, g: Tensor, name: str) -> Tensor:
    """A gradient must be dense and like its parameter.

    Returns:
        The gradient. If tensor parallelism has left it on the parameter's mesh with other
        placements (embeddings sharded by rows, norms under sequence parallelism), a copy with the
        parameter's; that is a collective operation.
    """
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
        return g
    meshes, places = ([getattr(x, what, None) for x in (p, g)]
                      for what in ("device_mesh", "placements"))
    if meshes[0] != meshes[1]:
        raise ValueError(f"the gradient of {name!r} has placements {places[1]} on {meshes[1]}, "
                         f"but it must have its parameter's {places[0]} on {meshes[0]}")
    return g if places[0] == places[1] else placed(g, p)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def spoilt(work: Sequence[Work]) -> bool:
    """Whether a gradient is a reason to skip the step; raises FloatingPointError if so asked."""
    work = [w for w in work if w.o["nonfinite"] != "propagate"]
    if not work:
        return False
    bad = agreed(_nonfinite([local(w.g) for w in work]), [w.p for w in work])
    if is_fake(bad):
        return False
    for w, flag in zip(work, bad.tolist(), strict=True):
        if flag and w.o["nonfinite"] == "raise":
            raise FloatingPointError(f"the gradient of {w.name!r} has a NaN or Inf "
                                     "(nonfinite='raise'); nothing was written")
    return bool(bad.any())


def _nonfinite(gradients: Sequence[Tensor]) -> Tensor:
    """1 for each with a NaN or Inf, int64 on the host, which waits once for each device."""
    bad = torch.zeros(len(gradients), dtype=torch.int64, device="cpu")
    found: dict[torch.device, dict[int, Tensor]] = {}
    for i, g in enumerate(gradients):
        if g.numel():
            low, high = torch.aminmax(g)
            found.setdefault(g.device, {})[i] = (low.isfinite() & high.isfinite()).logical_not()
    for flags in found.values():
        bad[[*flags]] = torch.stack([*flags.values()]).to(bad)
    return bad


def capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_capture(groups: list[dict[str, Any]], where: str) -> None:
    """Refuse to be captured in a CUDA graph, which would freeze what changes from step to step.

    Args:
        groups: of the optimizer.
        where: beginning of a message.

    Raises:
        RuntimeError: a group without ``capturable=True`` in a graph.
    """
    if not capturing():
        return
    for i, group in enumerate(groups):
        if group["params"] and not group["capturable"]:
            raise RuntimeError(f"{where}: group {i} has capturable=False, but it must be True in "
                               "a CUDA graph, which would freeze the rate, the count of steps and "
                               "the random bits")


def without_autocast() -> contextlib.AbstractContextManager[Any]:
    """Autocast off, so that a step taken inside it computes in the dtypes of its tensors."""
    kinds = [kind for kind in _AUTOCAST if torch.is_autocast_enabled(kind)]
    if not kinds:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for kind in kinds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
