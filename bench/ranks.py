"""A job on several processes of this machine, joined by gloo."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["on_ranks"]


def on_ranks(ranks: int, job: Callable[..., Any], *given: Any) -> list[Any]:
    """What ``job(rank, *given)`` returns on each rank: numbers, strings, tensors, and lists and
    dicts of these.

    Args:
        ranks: processes, of one thread each, in one gloo group.
        job: a function of a module.
        given: its arguments after the rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(  # type: ignore[attr-defined, no-untyped-call]
            _work, (ranks, folder, job, given), nprocs=ranks)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(ranks)]


def _work(rank: int, ranks: int, folder: str, job: Callable[..., Any], given: tuple[Any, ...]
          ) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=ranks)
    torch.save(job(rank, *given), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()
