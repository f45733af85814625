"""Four processes with gloo that run jobs on any number of them, started once for all tests."""

from __future__ import annotations

import faulthandler
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lissom.kernels._triton import INTERPRETED
from torch.distributed.device_mesh import DeviceMesh

RANKS = 4
# Seconds after which a job has hung.
PATIENCE = 120


class Pool:
    """Runs ``job(mesh, **given)`` on each rank of a mesh and gathers what it returns."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.closed = False
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.workers = []
        for rank in range(RANKS):
            mine, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(rank, self.folder.name, theirs),
                                     daemon=True)
            worker.start()
            theirs.close()  # so that a death is the end of the pipe
            self.pipes.append(mine)
            self.workers.append(worker)

    def run(self, job: Callable[..., Any], ranks: int | tuple[int, int], **given: Any) -> list[Any]:
        """What each rank returned.

        Args:
            job: a function of a module, called with a mesh and ``given``.
            ranks: shape of the mesh: 1 to 4, or (2, 2).
            given: more arguments.
        """
        if self.closed:  # a rank died or hung in an earlier job, whose test has failed
            self.start()
        count = ranks if isinstance(ranks, int) else ranks[0] * ranks[1]
        pipes = self.pipes[:count]
        for pipe in pipes:
            pipe.send((job, ranks, given))
        results: list[Any] = [None] * count
        failures = []
        left = list(pipes)
        while left:
            ready = wait(left, PATIENCE)
            if not ready:
                self.close()
                raise AssertionError("\n".join(["a rank hangs", *failures]))
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    ok, results[rank] = pipe.recv()
                except EOFError:  # the others wait for it
                    self.workers[rank].join(5)
                    code = self.workers[rank].exitcode
                    self.close()
                    raise AssertionError(f"rank {rank} died, exit code {code}") from None
                left.remove(pipe)
                if not ok:
                    failures.append(f"rank {rank}: {results[rank]}")
        if failures:
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        self.closed = True
        for worker in self.workers:
            worker.kill()
        self.folder.cleanup()


def _work(rank: int, folder: str, pipe: Connection) -> None:
    faulthandler.enable()  # says where a process was that aborts
    if INTERPRETED:
        from .interpreter import list_builtins_once

        list_builtins_once()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=RANKS)
    meshes: dict[Any, DeviceMesh] = {n: DeviceMesh("cpu", list(range(n)))
                                     for n in range(1, RANKS + 1)}
    meshes[2, 2] = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("outer", "inner"))
    while True:
        try:
            job, ranks, given = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, job(meshes[ranks], **given)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
