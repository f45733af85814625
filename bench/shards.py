"""What a step costs on each rank, however weights are cut: updated by rows, and gathered.

Four gloo processes on the CPU, with weights as FSDP2 and FSDP2 over tensor parallelism cut them,
and random gradients, the same in both ways. Temporaries are the most bytes alive at one time that a
step makes, state is what stays, both relative to the bytes of the whole weights; of all ranks the
largest. The first step makes all bases.

    python -m lissom.bench.shards --json bench/results/shards-cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from ..optim.base import MatrixOptimizer
from ..optim.sharding import whole
from . import names
from .livebytes import LiveBytes
from .ranks import on_ranks

__all__ = ["CUTS", "main"]

_RANKS = 4


class _Experts(nn.Module):
    """Stacks of 16 matrices."""

    def __init__(self, count: int, rows: int, columns: int) -> None:
        super().__init__()
        self.stacks = nn.ParameterList(torch.empty(16, rows, columns) for _ in range(count))


def _linear(count: int, rows: int, columns: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(columns, rows, bias=False) for _ in range(count)))


def _sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model, mesh=mesh)
    return model


def _fsdp2(count: int, rows: int, columns: int) -> nn.Module:
    return _sharded(_linear(count, rows, columns), DeviceMesh("cpu", [*range(_RANKS)]))


def _experts(count: int, rows: int, columns: int) -> nn.Module:
    # as many numbers as the others have, in two stacks
    return _sharded(_Experts(2, rows * count // 32, columns), DeviceMesh("cpu", [*range(_RANKS)]))


def _both(style: Callable[[], ParallelStyle]) -> Callable[[int, int, int], nn.Module]:
    """FSDP2 on two ranks over tensor parallelism on two."""
    def make(count: int, rows: int, columns: int) -> nn.Module:
        mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("data", "tensor"))
        model = parallelize_module(_linear(count, rows, columns), mesh["tensor"],
                                   {str(i): style() for i in range(count)})
        return _sharded(model, mesh["data"])
    return make


#: How weights are cut: from the number of matrices and their shape to the sharded model.
CUTS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "fsdp2": _fsdp2, "fsdp2, stacks of experts": _experts,
    "fsdp2 over column-wise tp": _both(ColwiseParallel),
    "fsdp2 over row-wise tp": _both(RowwiseParallel)}


def _give(model: nn.Module, generator: torch.Generator) -> None:
    """Random gradients, placed as their weights."""
    for p in model.parameters():
        assert isinstance(p, DTensor)
        part = torch.randn(p.to_local().shape, generator=generator)
        p.grad = DTensor.from_local(part, p.device_mesh, p.placements, run_check=False,
                                    shape=p.shape, stride=p.stride())


def _stepped(optimizer: MatrixOptimizer) -> float:
    """Seconds of a step, from when all ranks are there until all are done."""
    dist.barrier()
    start = time.perf_counter()
    optimizer.step()
    dist.barrier()
    return time.perf_counter() - start


def _measured(rank: int, cut: str, name: str, shape: tuple[int, int, int], r: int, steps: int
              ) -> dict[str, Any]:
    """One rank: both ways in turn. The first and the third step have their bytes counted."""
    entry = names.OPTIMIZERS[name]
    table = entry.make.table()
    more: dict[str, Any] = {"rank": r} if "rank" in table else {}
    if "experts" in cut and "matricize" in table:
        more["matricize"] = "batch"
    make: Callable[..., MatrixOptimizer] = entry.make
    out: dict[str, Any] = {}
    ways = {}
    for way in ("rows", "whole"):
        torch.manual_seed(0)
        model = CUTS[cut](*shape)
        for i, p in enumerate(model.parameters()):
            assert isinstance(p, DTensor)
            nn.init.normal_(p.to_local(), std=0.02,
                            generator=torch.Generator().manual_seed(_RANKS * i + rank))
        optimizer = make(model.named_parameters(), lr=entry.lr, shards=way,
                         **{**entry.options, **more})
        ways[way] = (model, optimizer, torch.Generator().manual_seed(rank))
        out[way] = {"seconds": []}
    for step in range(steps):
        for way, (model, optimizer, generator) in ways.items():
            _give(model, generator)
            if step in (0, 2):
                with LiveBytes() as live:
                    optimizer.step()
                out[way]["first" if step == 0 else "temporaries"] = live.peak
            else:
                seconds = _stepped(optimizer)
                if step > 2:
                    out[way]["seconds"].append(seconds)
    for way, (_, optimizer, _) in ways.items():
        out[way]["state"] = names.state_bytes(optimizer)
    found = [[whole(p.detach()) for p in model.parameters()] for model, *_ in ways.values()]
    out["weights"] = sum(x.nbytes for x in found[0])
    out["apart"] = max(_apart(a, b) for a, b in zip(*found, strict=True))
    return out


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", default="adamw,galore,dct-adamw,fira,gradnormlorp,muon")
    parser.add_argument("--cuts", nargs="+", choices=[*CUTS], default=[*CUTS])
    parser.add_argument("--shape", type=int, nargs=3, default=[8, 1024, 768],
                        metavar=("COUNT", "ROWS", "COLUMNS"), help="of the matrices")
    parser.add_argument("--rank", type=int, default=64, help="of projections")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for cut in args.cuts:
        for name in args.optimizers.split(","):
            ranks = on_ranks(_RANKS, _measured, cut, name, tuple(args.shape), args.rank, args.steps)
            whole_ = ranks[0]["weights"]
            for way in ("rows", "whole"):
                mine = [x[way] for x in ranks]
                seconds = mine[0]["seconds"]
                rows.append({
                    "cut": cut, "optimizer": name, "shards": way, "ranks": _RANKS,
                    **{f"{k}_share": max(x[k] for x in mine) / whole_
                       for k in ("first", "temporaries", "state")},
                    "seconds": statistics.median(seconds), "fastest": min(seconds),
                    "slowest": max(seconds), "weights_apart": ranks[0]["apart"],
                    "shape": args.shape, "rank": args.rank, "steps": args.steps,
                    "command": names.command("shards", argv), "device": "cpu",
                    "machine": platform.machine(), "torch": torch.__version__,
                    "commit": names.commit()})
                row = rows[-1]
                print(f"{cut:26} {name:10} {way:5}: temporaries {row['temporaries_share']:.3f} of "
                      f"the weights ({row['first_share']:.3f} in the first step), state "
                      f"{row['state_share']:.3f}, {1000 * row['seconds']:.0f} ms", flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
