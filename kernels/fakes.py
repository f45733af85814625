"""Tensors without numbers, in which torch estimates memory: those of its FakeTensorMode.

A step there allocates what a real one does. What it would decide by a number it decides as usual.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["is_fake", "mode", "place", "real", "scalar", "table", "truth"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def real() -> AbstractContextManager[Any]:
    """A context in which what is computed is real, whatever mode is on."""
    return _disable_current_modes()


def mode() -> Any:
    """torch's FakeTensorMode, where that is on; else None."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def is_fake(x: Tensor) -> bool:
    """Whether x has no numbers. A fake scalar that torch knows, such as a count, has one."""
    return isinstance(x, FakeTensor) and x.constant is None


def scalar(x: Tensor, usual: float) -> float:
    """The one number of x, or the usual one."""
    return usual if is_fake(x) else x.item()


def truth(x: Tensor, usual: bool) -> bool:
    """Whether the one number of x is not zero, or what is usual."""
    return usual if is_fake(x) else bool(x)


def place(x: Tensor) -> int:
    """A number that is equal for tensors whose elements begin at the same address, if they have
    one: those of fakes, of the meta device and empty ones have none.
    """
    return id(x) if isinstance(x, FakeTensor) else x.data_ptr() or id(x)


def table(make: Callable[_P, _T]) -> Callable[_P, _T]:
    """Keep for good what ``make`` returns for its arguments: tensors, the last argument being their
    device. Nothing fake is kept.
    """
    kept = functools.cache(make)

    @functools.wraps(make)
    def get(*args: Any) -> Any:
        faking = None if torch.compiler.is_compiling() else mode()
        if faking is None:
            return kept(*args)
        *rest, device = args
        with real():
            made: Any = kept(*rest, torch.device("cpu"))
        if isinstance(made, Tensor):
            return faking.from_tensor(made).to(device)
        return tuple([faking.from_tensor(x).to(device) for x in made])

    get.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return cast("Callable[_P, _T]", get)
