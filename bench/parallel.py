"""One rank of ``torchrun``: joining the others, wrapping a model, a batch's part."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

__all__ = ["KINDS", "Ranks", "join"]

#: What ``--parallel`` takes.
KINDS = ("ddp", "fsdp2")


class Ranks(NamedTuple):
    """One rank among all; without ``kind`` there is one.

    Args:
        kind: of :data:`KINDS`, or None for a single process.
        rank: number of this one.
        size: how many there are.
    """

    kind: str | None = None
    rank: int = 0
    size: int = 1

    def wrapped(self, model: nn.Module) -> nn.Module:
        """What is to be called in the place of a model with ``layers``.

        FSDP2 shards the model itself, block by block; its optimizer is made after it.
        """
        if self.kind == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        if self.kind == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            layers = model.layers
            assert isinstance(layers, nn.ModuleList)
            # Its default mesh is of the accelerator, also where the model is on the CPU.
            mesh = init_device_mesh(next(model.parameters()).device.type, (self.size,))
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    def leave(self) -> None:
        """End the meeting of :func:`join`; nothing for a single process."""
        if self.kind:
            dist.destroy_process_group()

    def part(self, x: Tensor) -> Tensor:
        """The rows of a batch that this rank has: as many as every other."""
        return x.chunk(self.size)[self.rank]

    def mean(self, x: Tensor) -> float:
        """The mean of a number over all ranks."""
        total = x.detach().clone()
        if self.kind:
            dist.all_reduce(total)
        return float(total) / self.size


def join(kind: str | None, device: str, batch: int) -> Ranks:
    """Meet the other ranks that torchrun has started.

    Args:
        kind: of :data:`KINDS`, or None.
        device: ``"cpu"``, which speaks gloo, or ``"cuda"``, nccl with one device per rank.
        batch: sequences that all ranks share out, a multiple of their number.

    Raises:
        ValueError: outside torchrun, or for a device or batch that the ranks cannot share.
    """
    if kind is None:
        return Ranks()
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise ValueError(f"--parallel {kind} needs torchrun, which sets {', '.join(missing)}: "
                         "torchrun --nproc-per-node 2 -m lissom.bench.train ...")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device} with --parallel must be cpu, or cuda, of which each "
                         "rank takes its own")
    count = int(os.environ["WORLD_SIZE"])
    if batch % count:
        raise ValueError(f"--batch {batch} must be a multiple of the {count} ranks")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return Ranks(kind, dist.get_rank(), dist.get_world_size())
