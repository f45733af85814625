"""Which parameters of a step are updated together, how many at once, and as what."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..kernels._triton import by_kernel
from ..kernels.apart import Apart
from ..kernels.fakes import place
from . import codec, sharding
from .sharding import Rows

if TYPE_CHECKING:
    from .base import MatrixOptimizer

__all__ = ["Work", "operands", "windows"]

# Elements of the parameters in one window, or of the largest parameter if that is more. Windows
# save a fifth of Muon's step on LLaMA-60M, with temporaries below 150 MiB. Of a sharded parameter
# only this rank's rows count, so that there is work for every rank at once. The temporaries of a
# batch have the same bound.
_WINDOW = 1 << 22
# Parameters of a batch: more save nothing, and tables of addresses stay small.
_MOST = 64
# Dense parameters of more elements gain nothing from a batch.
_LARGE = 1 << 26


class Work(NamedTuple):
    """One parameter of a step: its name, itself, its gradient, its options."""

    name: str
    p: Tensor
    g: Tensor
    o: dict[str, Any]


def windows(optimizer: MatrixOptimizer, work: Sequence[Work]) -> Iterator[list[list[Work]]]:
    """Groups of batches in the order of the step.

    A group has one batch, except where updates wait for functions of whole matrices (``waits``):
    then as many as ``_WINDOW`` elements allow, so that equal shapes are computed together; those of
    AdamW come first.

    Args:
        optimizer: of the parameters.
        work: all of a step.
    """
    dense = [not optimizer.own_rule(w.p, w.o) for w in work]
    matrices = [w for w, plain in zip(work, dense, strict=True) if not plain]
    most = max([_WINDOW, *(w.p.numel() for w in matrices)])
    if not optimizer.waits:
        yield from ([batch] for batch in _batches(optimizer, work, dense, most))
        return
    rest = [w for w, plain in zip(work, dense, strict=True) if plain]
    yield from ([batch] for batch in _batches(optimizer, rest, [True] * len(rest), most))
    window: list[list[Work]] = []
    held = 0
    for w in matrices:
        size = optimizer.while_waiting(w.p, w.o, optimizer._rows(w.p, w.o))
        if window and held + size > most:
            yield window
            window, held = [], 0
        window.append([w])
        held += size
    if window:
        yield window


def operands(batch: Sequence[Work], states: Sequence[Mapping[str, Tensor]],
             spread: Collection[str], rows: Rows | None) -> tuple[Any, Any, Mapping[str, Tensor]]:
    """Parameter, gradient and state on which one update works.

    Args:
        batch: one parameter, or several that are alike.
        states: of each.
        spread: names of the slots of a sharded parameter that are always gathered.
        rows: the rows of a sharded parameter that are updated where they are; None to gather it.

    Returns:
        Plain tensors, or for several parameters :class:`lissom.kernels.apart.Apart`.
    """
    p, g, state = batch[0].p, batch[0].g, states[0]
    if len(batch) > 1:
        return (Apart([sharding.local(w.p) for w in batch]),
                Apart([sharding.local(w.g) for w in batch]), codec.Together(states))
    if not sharding.is_sharded(p):
        return p, g, state
    wanted = [x for name, x in state.items() if rows is None or name in spread]
    if rows is None:
        wanted += [p, g]
    unique = {id(x): x for x in wanted}  # g may be a buffer of the state
    found = dict(zip(unique, sharding.gathered([*unique.values()]), strict=True))
    for x in (p, g) if rows is not None else ():
        if id(x) not in found:
            found[id(x)] = sharding.in_rows(x)

    def here(x: Tensor) -> Tensor:
        return found[id(x)] if id(x) in found else sharding.local(x)

    return here(p), here(g), {name: here(x) for name, x in state.items()}


def _batches(optimizer: MatrixOptimizer, work: Sequence[Work], dense: Sequence[bool], most: int
             ) -> Iterator[list[Work]]:
    """Parameters of one update: one, or on a GPU those that are alike.

    A launch takes Python as long as a small matrix takes the GPU.

    Args:
        optimizer: of the parameters.
        work: some of a step.
        dense: which of them get AdamW.
        most: elements of temporaries that the updates of a batch may keep alive.
    """
    begun: dict[Hashable, tuple[list[Work], int]] = {}
    places: set[int] = set()
    for w, plain in zip(work, dense, strict=True):
        p, g = (sharding.local(x) for x in (w.p, w.g))
        size, common = _held(optimizer, w, p, g, plain)
        address = place(p) if p.numel() else id(w.p)
        again = address in places
        places.add(address)
        # A parameter that is listed twice is updated twice, so the first update must run before
        # the second is batched.
        if size and again:
            yield from (batch for batch, _ in begun.values())
            begun.clear()
        if again or not size:
            yield [w]
            continue
        alike = (plain, common, id(w.o), p.shape, p.stride(), g.stride(), p.dtype, p.device,
                 int(optimizer.state[w.p]["step"]), p.data_ptr() % 16, g.data_ptr() % 16)
        batch, held = begun.pop(alike, ([], 0))
        if batch and (held + size > most or len(batch) == _MOST):
            yield batch
            batch, held = [], 0
        batch.append(w)
        begun[alike] = batch, held + size
    yield from (batch for batch, _ in begun.values())


def _held(optimizer: MatrixOptimizer, w: Work, p: Tensor, g: Tensor, dense: bool
          ) -> tuple[int, Hashable]:
    """What :meth:`MatrixOptimizer.together` says, for dense parameters too.

    Args:
        optimizer: of the parameter.
        w: the parameter, and its gradient.
        p: what this rank holds of it.
        g: and of its gradient.
        dense: it gets AdamW.
    """
    state, o = optimizer.state[w.p], w.o
    if (optimizer._gradients.in_backward or o["metrics"] or o["capturable"]
            or not _by_address(p, g)):
        return 0, None
    rows = None
    if p is not w.p:
        rows = optimizer._rows(w.p, o)
        if rows is None or not sharding.held(w.p) or optimizer._layouts.spread(w.p):
            return 0, None  # what is gathered or exchanged goes one by one
    common: Hashable = False
    if dense:  # 1 element: these updates have next to no temporaries
        size = int(p.dtype != torch.float64 and not o["amsgrad"] and p.numel() <= _LARGE)
    else:
        size, common = optimizer.together(w.p, state, o, int(state["step"]) + 1, rows)
    return size, (common, w.p.shape, rows and (rows.start, rows.group))


def _by_address(p: Tensor, g: Tensor) -> bool:
    """Whether kernels work on p, and need only the addresses of it and its gradient."""
    plain = (Tensor, torch.nn.Parameter)
    return (type(p) in plain and type(g) in plain and by_kernel(p) and p.numel() > 0
            and p.is_contiguous() and g.is_contiguous())
