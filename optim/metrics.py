"""What a step did, in numbers that a training loop can log.

Groups with ``metrics=True`` are measured in each step, here and in
:meth:`lissom.optim.LowRankOptimizer.project_gradient`; the numbers stay tensors on their devices,
so that nothing waits for a device until one of them is read. Where no group asks, a step looks at
the option and does nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import codec, sharding
from .apply import block_of
from .norms import norms

if TYPE_CHECKING:
    from .base import MatrixOptimizer
    from .batches import Work
    from .project import Bases
    from .sharding import Rows

__all__ = ["Before", "after", "before", "energy", "metrics_of", "most", "share"]

#: What was there before a step: copies of a weight and of its limiter.
Before = Mapping[Tensor, tuple[Tensor, Tensor | None]]


def before(optimizer: MatrixOptimizer, window: Sequence[Work]) -> Before:
    """Copies of the weights that are about to be updated together, where they are measured."""
    copies = {}  # names need not differ
    for w in window:
        if w.o["metrics"]:
            last = optimizer.state[w.p].get("limiter")
            copies[w.p] = (w.p.detach().clone(),
                           None if last is None else sharding.local(last).clone())
    return copies


def after(optimizer: MatrixOptimizer, window: Sequence[Work], copies: Before) -> None:
    """Keep what the step did to them."""
    for w in window:
        if w.p not in copies:
            continue
        old, last = copies[w.p]
        found = optimizer._measured.setdefault(int(optimizer.state[w.p]["index"]), {})
        found["update_ratio"] = _ratio(w.p.detach(), old)
        if last is not None:
            # |S_t| / (gamma |S_{t-1}|), the largest of a batch
            now = optimizer.state[w.p]["limiter"]
            found["limiter"] = most(sharding.local(now) / (w.o["limiter"] * last),
                                    sharding.rows_of(now))


def _ratio(new: Tensor, old: Tensor) -> Tensor:
    """|new - old| / |old|, in fp32 and in pieces: neither needs a full-size temporary."""
    a, b = sharding.local(new), sharding.local(old)
    change = b.new_zeros((), dtype=codec.wide(b[:0] if b.ndim else b).dtype)
    size = change.clone()
    block = block_of(b)
    for a_, b_ in zip(a.reshape(-1).split(block), b.reshape(-1).split(block), strict=True):
        b_ = codec.wide(b_)
        change += (codec.wide(a_) - b_).square().sum()
        size += b_.square().sum()
    change, size = sharding.summed(new, torch.stack([change, size])).unbind()
    return (change / size).sqrt()


def energy(optimizer: MatrixOptimizer, s: Mapping[str, Tensor], low: Tensor, g: Tensor,
           bases: Bases) -> None:
    """Keep |R|^2 / |G|^2, the smallest of a batch; of a zero gradient it is NaN."""
    found = optimizer._measured.setdefault(int(s["index"]), {})
    least = -most(-share(low, g, bases), codec.stack_of(s))
    found["energy"] = least.to(torch.float32)


def most(x: Tensor, stack: Rows | None) -> Tensor:
    """The largest number of several matrices; NaN where one is.

    Args:
        x: a number of each matrix.
        stack: which matrices of a stack they are, if not all; then a collective operation.
    """
    if stack is None:
        return x.amax()
    nan = x.isnan()
    here = torch.stack([nan.any().to(x.dtype), *(
        [x.masked_fill(nan, -torch.inf).amax()] if x.numel() else [x.new_tensor(-torch.inf)])])
    any_nan, largest = stack.max(here).unbind()
    return torch.where(any_nan > 0, torch.nan, largest)


def share(low: Tensor, g: Tensor, bases: Bases) -> Tensor:
    """|R|^2 / |G|^2 of each matrix, in float64; NaN for a zero gradient."""
    # A CPU converts as it sums, and is asked nothing; a GPU would copy all of it to float64.
    part, whole = (
        torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float64).square()
        if x.device.type == "cpu" else norms(x, "full")[..., 0, 0].square() for x in (low, g))
    if bases.rows is not None:
        whole = bases.rows.sum(whole)
        part = part if bases.low_rows() is None else bases.rows.sum(part)
    ratio: Tensor = part / whole
    return ratio


def metrics_of(optimizer: MatrixOptimizer) -> list[dict[str, Tensor]]:
    """See :meth:`lissom.optim.base.MatrixOptimizer.metrics`."""
    out = []
    for group in optimizer.param_groups:
        states = [optimizer.state.get(p, {}) for p in group["params"]]
        found: list[Mapping[str, Any]] = [
            optimizer._measured.get(int(s["index"]), {}) if s else {} for s in states]
        columns = {name: _column(x.get(name) for x in found)
                   for name in ("update_ratio", "energy", "limiter")}
        columns["last_refresh"] = _column(s.get("basis_step") for s in states)
        row = {name: x for name, x in columns.items() if x is not None}
        row["skipped_steps"] = torch.tensor(group["skipped_steps"], device="cpu")
        out.append(row)
    return out


def _column(values: Iterable[Tensor | None]) -> Tensor | None:
    """One number for each parameter, NaN where there is none; None where no parameter has one."""
    listed = [*values]
    there = [x for x in listed if x is not None]
    if not there:
        return None
    like = there[0]
    nan = torch.full_like(like, torch.nan)
    ahead = like.device.type != "cpu"  # the host reads a stack there at once
    return torch.stack([nan if x is None else x.to(like, non_blocking=ahead) for x in listed])
