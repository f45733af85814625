"""Triton's interpreter without a fifth of its time.

At every launch, and at every call of a function in a kernel, it lists all members of
``triton.language`` to replace its builtins. Their names do not change, so they are listed once.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

from lissom.kernels._triton import tl
from triton.runtime import interpreter


def list_builtins_once() -> None:
    """To be called before any kernel runs, while the builtins are as Triton made them."""
    names: dict[int, list[str]] = {}
    for place in (tl, tl.core, tl.math, tl.tensor):
        names[id(place)] = [name for name, x in inspect.getmembers(place) if tl.core.is_builtin(x)]

    def getmembers(place: Any) -> list[tuple[str, Any]]:
        known = names.get(id(place))
        if known is None:
            return inspect.getmembers(place)
        return [(name, getattr(place, name)) for name in known]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})
