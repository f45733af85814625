"""Which parameters of a step are updated together, and how many at once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import sharding
from .inner import by_kernel

if TYPE_CHECKING:
    from .base import MatrixOptimizer

__all__ = ["Work", "windows"]

# Elements of all parameters whose updates wait together, or as many as the largest of them has:
# batches are worth a fifth of Muon's step on LLaMA-60M, and their temporaries stay below 150 MiB.
# Of sharded ones a rank's rows count, so that there is work for every rank at once. What the
# updates of a batch hold has the same bound.
_WINDOW = 1 << 22


class Work(NamedTuple):
    """One parameter of a step: its name, itself, its gradient, its options."""

    name: str
    p: Tensor
    g: Tensor
    o: dict[str, Any]


def windows(optimizer: MatrixOptimizer, work: Sequence[Work]) -> Iterator[list[list[Work]]]:
    """Batches that run together: one, or as many as fit where their updates may wait.

    Args:
        optimizer: of the parameters.
        work: all of a step.
    """
    dense = [optimizer._reason(w.p, w.o) is not None for w in work]
    matrices = [w for w, apart in zip(work, dense, strict=True) if not apart]
    most = max([_WINDOW, *(w.p.numel() for w in matrices)])
    if not optimizer.waits:
        yield from ([batch] for batch in _batches(optimizer, work, dense, most))
        return
    rest = [w for w, apart in zip(work, dense, strict=True) if apart]
    yield from ([batch] for batch in _batches(optimizer, rest, [True] * len(rest), most))
    window: list[list[Work]] = []
    held = 0
    for w in matrices:
        size = sharding.share(w.p, optimizer._rows(w.p, w.o))
        if window and held + size > most:
            yield window
            window, held = [], 0
        window.append([w])
        held += size
    if window:
        yield window


def _batches(optimizer: MatrixOptimizer, work: Sequence[Work], dense: Sequence[bool], most: int
             ) -> Iterator[list[Work]]:
    """Parameters of one update: one, or on a GPU those that are alike.

    There a launch costs Python as much as a small matrix costs the device.

    Args:
        optimizer: of the parameters.
        work: some of a step.
        dense: which of them get AdamW.
        most: elements that the updates of a batch may hold.
    """
    begun: dict[Hashable, tuple[list[Work], int]] = {}
    for w, apart in zip(work, dense, strict=True):
        size, common = _held(optimizer, w, apart)
        if not size:
            yield [w]
            continue
        alike = (apart, common, id(w.o), w.p.shape, w.p.dtype, w.p.device,
                 int(optimizer.state[w.p]["step"]))
        batch, held = begun.pop(alike, ([], 0))
        if batch and held + size > most:
            yield batch
            batch, held = [], 0
        batch.append(w)
        begun[alike] = batch, held + size
    yield from (batch for batch, _ in begun.values())


def _held(optimizer: MatrixOptimizer, w: Work, apart: bool) -> tuple[int, bool]:
    """What :meth:`MatrixOptimizer.together` says, for dense parameters too."""
    state, o = optimizer.state[w.p], w.o
    if (optimizer._backward is not None or o["metrics"] or o["capturable"] or "master" in state
            or not _by_address(w.p, w.g)):
        return 0, False
    if apart:  # nothing is held
        return int(w.p.dtype != torch.float64 and not o["amsgrad"]), False
    return optimizer.together(w.p, state, o, int(state["step"]) + 1)


def _by_address(p: Tensor, g: Tensor) -> bool:
    """Whether kernels work on p, and find it and its gradient by an address alone."""
    plain = (Tensor, torch.nn.Parameter)
    return (type(p) in plain and type(g) in plain and by_kernel(p) and p.numel() > 0
            and p.is_contiguous() and g.is_contiguous())
