"""Gradients averaged over ranks that each hold the whole model, one at a time, as they are ready.

Data parallelism for handles that work in the backward pass (:mod:`lissom.optim.backward`):
DistributedDataParallel averages gradients after the hooks, and keeps all of them in full size.

Reductions are matched by their order, which is that of the backward pass: each rank has to run the
same graph, and a parameter that gets a gradient on one rank must get one on all. Ranks compare
whose gradients they have sent: else those of two parameters could be averaged in silence.
"""

from __future__ import annotations

import itertools
import zlib
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


class _Compared(NamedTuple):
    """What ranks are told of the gradients that they have sent.

    Args:
        sent: numbers and names of this rank's parameters.
        both: int64 (2,) on the host: the largest digest of such numbers, and less the smallest.
        arrived: where it comes from a GPU, when it is there.
    """

    sent: list[tuple[int, str]]
    both: Tensor
    arrived: torch.cuda.Event | None

    def differ(self) -> bool:
        """Whether ranks have sent different ones; waits for the answer."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.both.sum())


class Replicas:
    """The ranks of a process group, which average their gradients.

    Attributes:
        bytes_sent: bytes that this rank has put into reductions.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, where: str) -> None:
        """Nothing is sent yet.

        Args:
            group: the ranks.
            device: for small tensors that are no gradients.
            where: named in errors.
        """
        self.group, self.size = group, torch.distributed.get_world_size(group)
        self.device, self.where, self.bytes_sent = device, where, 0
        # Whose gradients were sent since they were compared.
        self._sent: list[Tensor] = []
        # Whether hosts can compare them without the GPU; else they read the answer a step later.
        self._at_once = device.type == "cpu" or _by_hosts(group)
        self._compared: _Compared | None = None

    def send(self, p: Tensor, x: Tensor, in_place: bool = False) -> Sent:
        """Begin to take the mean of x over ranks.

        Args:
            p: the parameter.
            x: this rank's tensor. A gradient is not written to: in the backward pass it may share
                memory with one that is still propagated, as those of views do.
            in_place: x is a buffer, which becomes the mean.
        """
        if not self._sent:
            self._name_them()
        self._sent.append(p)
        # Divided first, as DDP does, so that fp16 stays in its range.
        mean = x.div_(self.size) if in_place else x.div(self.size).contiguous()
        work = torch.distributed.all_reduce(mean, group=self.group, async_op=True)
        self.bytes_sent += mean.nbytes
        return Sent(work, mean)

    def compare(self, optimizer: MatrixOptimizer) -> None:
        """Check that all ranks have sent the same gradients in one order; collective if any was.

        Where only a GPU knows, the next :meth:`send` asks it, so that it need not be waited for.

        Raises:
            RuntimeError: on every rank, names the first two parameters that differ.
        """
        if not self._sent:
            return
        places = {p: (i, name) for i, (name, p, _) in enumerate(optimizer._named())}
        # One device's have an order: each has a thread of its own in the backward pass.
        own = sorted(self._sent, key=lambda p: str(p.device))
        sent = [places.get(p, (-1, "a parameter that is gone")) for p in own]
        self._sent = []
        digest = zlib.crc32(" ".join(str(i) for i, _ in sent).encode())
        both = torch.full((2,), digest, device="cpu" if self._at_once else self.device)
        both[1].neg_()
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=self.group)
        arrived = None
        if both.is_cuda:
            there = both
            both = torch.empty(2, dtype=there.dtype, device="cpu", pin_memory=True)
            both.copy_(there, non_blocking=True)
            arrived = torch.cuda.current_stream(there.device).record_event()
        self._compared = _Compared(sent, both, arrived)
        if self._at_once:
            self._name_them()

    def settle(self) -> None:
        """Raise if :meth:`compare` has found a difference; not collective."""
        if self._compared is not None and self._compared.differ():
            raise RuntimeError(self._told("some differ"))

    def forget(self) -> None:
        """Begin anew, on all ranks: weights and state have been loaded."""
        self._sent, self._compared = [], None

    def _name_them(self) -> None:
        last, self._compared = self._compared, None
        if last is None or not last.differ():
            return
        of: list[list[tuple[int, str]]] = [[]] * self.size
        torch.distributed.all_gather_object(of, last.sent, self.group)
        numbers = [[i for i, _ in x] for x in of]
        rank = next(i for i, x in enumerate(numbers) if x != numbers[0])
        pairs = itertools.zip_longest(of[0], of[rank], fillvalue=(-1, None))
        number, (first, other) = next((i, pair) for i, pair in enumerate(pairs, 1)
                                      if pair[0][0] != pair[1][0])
        raise RuntimeError(self._told(
            f"number {number} is {first[1]!r} on rank 0 of the group and {other[1]!r} on rank "
            f"{rank}"))

    def _told(self, difference: str) -> str:
        return (f"{self.where}: ranks do not have gradients of the same parameters in one order: "
                f"{difference}; each rank must run the same graph (call an expert without tokens "
                "on an empty batch, expert(x[:0])); means were taken of what does not belong "
                "together, so go on from a checkpoint")

    def agree(self, failure: Exception | None) -> None:
        """Raise a failure, or that there is one on another rank; collective."""
        named = torch.tensor(float(failure is not None), device=self.device)
        torch.distributed.all_reduce(named, torch.distributed.ReduceOp.MAX, group=self.group)
        if failure is not None:
            raise failure
        if float(named):
            raise ValueError(f"{self.where}: another rank refuses, and says why")

    @torch.no_grad()
    def check(self, optimizer: MatrixOptimizer) -> None:
        """Refuse ranks whose weights or steps differ; collective.

        Raises:
            ValueError: on every rank, names the parameter.
        """
        named = [(name, p) for name, p, _ in optimizer._named()]
        few, many = map(int, self._range(torch.tensor([float(len(named))], device=self.device)))
        if few != many:
            raise ValueError(f"{self.where}: ranks have from {few} to {many} parameters, but each "
                             "must have the same model")
        if not named:
            return
        numbers = torch.stack([_fingerprint(optimizer, *x) for x in named]).to(self.device)
        low, high = self._range(numbers)
        same = (high - low <= _SAME * torch.maximum(low.abs(), high.abs())).all(1)
        for (name, _), ok in zip(named, same.tolist(), strict=True):
            if not ok:
                raise ValueError(
                    f"{self.where}: {name!r} differs between ranks in its name, its shape, its "
                    "weights or the steps it has taken, but each rank must hold the same; load one "
                    "checkpoint on all, or send rank 0's (torch.distributed.broadcast) before")

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest x of all ranks."""
        both = torch.cat([x, -x])
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=self.group)
        high, low = both.split(len(x))
        return -low, high


def _fingerprint(optimizer: MatrixOptimizer, name: str, p: Tensor) -> Tensor:
    """Numbers that differ where weights do, or what random bits come from: name, size, rows, steps,
    sum and norm.
    """
    steps = float(optimizer.state[p]["step"]) if p in optimizer.state else 0.0
    # In pieces, since each is copied to float64.
    real = torch.view_as_real(p) if p.is_complex() else p
    parts = real.detach().reshape(-1).split(_PIECE)
    total = sum(float(x.sum(dtype=torch.float64)) for x in parts)
    norm = sum(float(x.double().square().sum()) for x in parts)
    rows = float(len(p)) if p.ndim else 1.0
    numbers = [float(zlib.crc32(name.encode())), float(p.numel()), rows, steps, total, norm]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu").nan_to_num()


def _by_hosts(group: ProcessGroup) -> bool:
    """Whether the group reduces tensors of CPUs; False for groups that torch did not make."""
    try:
        return "cpu:" in torch.distributed.get_backend_config(group)
    except (TypeError, ValueError):
        return False


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
    return Replicas(group, device, where)
