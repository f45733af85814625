"""Gradients averaged over ranks that each hold the whole model, one at a time, as they are ready.

Data parallelism for who works in the backward pass (:mod:`lissom.optim.hooks`):
DistributedDataParallel averages gradients after the hooks, and keeps all of them in full size.

Reductions are matched by their order, which is that of the backward pass: each rank has to run the
same graph, and a parameter that gets a gradient on one rank must get one on all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

    from .base import MatrixOptimizer

__all__ = ["Replicas", "Sent", "replicas_of"]

# Sums of weights that are equal may differ by this share where devices add up in another order.
_SAME = 1e-9


class Sent(NamedTuple):
    """A reduction on its way.

    Args:
        work: what torch knows of it.
        x: where the mean is to be.
        part: what is being reduced: x itself, or a contiguous copy.
    """

    work: Work
    x: Tensor
    part: Tensor

    def arrive(self) -> None:
        """Wait until x is the mean; on a GPU only what is issued after it waits."""
        self.work.wait()
        if self.part is not self.x:
            self.x.copy_(self.part)


class Replicas:
    """The ranks that average their gradients.

    Args:
        group: they.

    Attributes:
        bytes_sent: what this rank has given to reductions.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.size = group, torch.distributed.get_world_size(group)
        self.bytes_sent = 0

    def send(self, x: Tensor) -> Sent:
        """Begin to put the mean over ranks in the place of x, not to be touched until then."""
        part = x if x.is_contiguous() else x.contiguous()
        part.div_(self.size)  # first, as DDP does, so that fp16 stays in its range
        work = torch.distributed.all_reduce(part, group=self.group, async_op=True)
        self.bytes_sent += part.nbytes
        return Sent(work, x, part)

    @torch.no_grad()
    def check(self, optimizer: MatrixOptimizer, where: str) -> None:
        """Refuse ranks whose weights or steps differ; collective.

        Raises:
            ValueError: on every rank, names the parameter.
        """
        named = [(name, p) for name, p, _ in optimizer._named()]
        device = named[0][1].device
        few, many = map(int, self._range(torch.tensor([float(len(named))], device=device)))
        if few != many:
            raise ValueError(f"{where}: ranks have from {few} to {many} parameters, but each must "
                             "have the same model")
        numbers = torch.stack([_seen(optimizer, p, device) for _, p in named])
        low, high = self._range(numbers)
        same = (high - low <= _SAME * torch.maximum(low.abs(), high.abs())).all(1)
        for (name, _), ok in zip(named, same.tolist(), strict=True):
            if not ok:
                raise ValueError(
                    f"{where}: {name!r} differs between ranks in its shape, its weights or the "
                    "steps it has taken, but each rank must hold the same; load one checkpoint on "
                    "all, or send rank 0's (torch.distributed.broadcast) before")

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest x of all ranks."""
        both = torch.cat([x, -x])
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=self.group)
        high, low = both.split(len(x))
        return -low, high


def _seen(optimizer: MatrixOptimizer, p: Tensor, device: torch.device) -> Tensor:
    """Numbers by which one weight is told from another: its size, steps, sum and norm."""
    steps = float(optimizer.state[p]["step"]) if p in optimizer.state else 0.0
    total, norm = p.sum(dtype=torch.float64), torch.linalg.vector_norm(p, dtype=torch.float64)
    rows = float(len(p)) if p.ndim else 1.0
    numbers = [float(p.numel()), rows, steps, float(total), float(norm)]
    return torch.tensor(numbers, dtype=torch.float64).nan_to_num().to(device)


def replicas_of(group: Any, where: str) -> Replicas | None:
    """What ``process_group`` asks for; None for one process. TypeError for what is none."""
    if group is None:
        return None
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or not isinstance(
            group, dist.ProcessGroup):
        raise TypeError(f"{where}: process_group is a {type(group).__name__}, but it must be a "
                        "process group of torch.distributed, which init_process_group makes "
                        "(torch.distributed.group.WORLD for all ranks), or None")
    return Replicas(group)
