"""Gradients that lie in one buffer, which lives as long as one of them does."""

from __future__ import annotations

import weakref

from torch import Tensor

from . import sharding

__all__ = ["Buffers"]


class Buffers:
    """Copies gradients that stay out of buffers of which others are freed.

    FSDP2 reduces the gradients of a layer in one buffer: a norm's, which waits for the step, would
    keep the memory of all matrices beside it.
    """

    def __init__(self) -> None:
        # By id: each buffer, whether a gradient of it is freed, parameters whose gradients stay.
        self._seen: dict[int, tuple[weakref.ref[Tensor], bool, list[Tensor]]] = {}

    def stays(self, p: Tensor) -> None:
        """The gradient of p waits in ``p.grad``."""
        base = _buffer(p)
        if base is None:
            return
        freed, others = self._entry(base)
        if freed:
            _copy(p)
        else:
            others.append(p)

    def goes(self, p: Tensor) -> None:
        """The gradient of p is about to be freed."""
        base = _buffer(p)
        if base is None:
            return
        freed, others = self._entry(base)
        if not freed:
            self._seen[id(base)] = weakref.ref(base), True, []
        for other in others:
            if _buffer(other) is base:
                _copy(other)

    def clear(self) -> None:
        """The backward pass is over."""
        self._seen.clear()

    def _entry(self, base: Tensor) -> tuple[bool, list[Tensor]]:
        ref, freed, others = self._seen.get(id(base), (None, False, []))
        if ref is None or ref() is not base:  # new, or another one lay there
            freed, others = False, []
            self._seen[id(base)] = weakref.ref(base), freed, others
        return freed, others


def _buffer(p: Tensor) -> Tensor | None:
    """What this rank's part of p's gradient is a part of."""
    if p.grad is None or not sharding.is_sharded(p.grad):
        return None
    part = sharding.local(p.grad)
    base: Tensor | None = part._base
    return None if base is None or base.numel() == part.numel() else base


def _copy(p: Tensor) -> None:
    assert p.grad is not None
    p.grad = p.grad.clone()
