"""Gradients averaged over ranks that each hold the whole model, one at a time, as they are ready.

Data parallelism for handles that work in the backward pass (:mod:`lissom.optim.backward`):
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
# Elements of a weight that are looked at together.
_PIECE = 1 << 24


class Sent(NamedTuple):
    """A reduction on its way.

    Args:
        work: what torch knows of it.
        mean: becomes the mean over ranks; read it after :meth:`arrive`.
    """

    work: Work
    mean: Tensor

    def arrive(self) -> Tensor:
        """Wait and return the mean; on a GPU only later work of the stream waits, not the host."""
        self.work.wait()
        return self.mean


class Replicas:
    """The ranks of a process group, which average their gradients.

    Attributes:
        bytes_sent: bytes that this rank has put into reductions.
    """

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        """Nothing is sent yet.

        Args:
            group: the ranks.
            device: for small tensors that are no gradients.
        """
        self.group, self.size = group, torch.distributed.get_world_size(group)
        self.device, self.bytes_sent = device, 0

    def send(self, x: Tensor, in_place: bool = False) -> Sent:
        """Begin to take the mean of x over ranks.

        Args:
            x: this rank's tensor. A gradient is not written to: in the backward pass it may share
                memory with one that is still propagated, as those of views do.
            in_place: x is a buffer, which becomes the mean.
        """
        # Divided first, as DDP does, so that fp16 stays in its range.
        mean = x.div_(self.size) if in_place else x.div(self.size).contiguous()
        work = torch.distributed.all_reduce(mean, group=self.group, async_op=True)
        self.bytes_sent += mean.nbytes
        return Sent(work, mean)

    def agree(self, failure: Exception | None, where: str) -> None:
        """Raise a failure, or that there is one on another rank; collective."""
        named = torch.tensor(float(failure is not None), device=self.device)
        torch.distributed.all_reduce(named, torch.distributed.ReduceOp.MAX, group=self.group)
        if failure is not None:
            raise failure
        if float(named):
            raise ValueError(f"{where}: another rank refuses, and says why")

    @torch.no_grad()
    def check(self, optimizer: MatrixOptimizer, where: str) -> None:
        """Refuse ranks whose weights or steps differ; collective.

        Raises:
            ValueError: on every rank, names the parameter.
        """
        named = [(name, p) for name, p, _ in optimizer._named()]
        few, many = map(int, self._range(torch.tensor([float(len(named))], device=self.device)))
        if few != many:
            raise ValueError(f"{where}: ranks have from {few} to {many} parameters, but each must "
                             "have the same model")
        if not named:
            return
        numbers = torch.stack([_fingerprint(optimizer, p) for _, p in named]).to(self.device)
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


def _fingerprint(optimizer: MatrixOptimizer, p: Tensor) -> Tensor:
    """Numbers that differ where weights do: size, rows, steps, sum and norm."""
    steps = float(optimizer.state[p]["step"]) if p in optimizer.state else 0.0
    # In pieces, since each is copied to float64.
    real = torch.view_as_real(p) if p.is_complex() else p
    parts = real.detach().reshape(-1).split(_PIECE)
    total = sum(float(x.sum(dtype=torch.float64)) for x in parts)
    norm = sum(float(x.double().square().sum()) for x in parts)
    rows = float(len(p)) if p.ndim else 1.0
    numbers = [float(p.numel()), rows, steps, total, norm]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu").nan_to_num()


def replicas_of(group: Any, optimizer: MatrixOptimizer, where: str) -> Replicas | None:
    """The ranks of ``process_group``, or None for one process; TypeError for anything else."""
    if group is None:
        return None
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or not isinstance(
            group, dist.ProcessGroup):
        raise TypeError(f"{where}: process_group is a {type(group).__name__}, but it must be a "
                        "process group of torch.distributed, which init_process_group makes "
                        "(torch.distributed.group.WORLD for all ranks), or None")
    device = next((p.device for _, p, _ in optimizer._named()), torch.device("cpu"))
    return Replicas(group, device)
