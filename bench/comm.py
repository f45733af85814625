"""Bytes that a rank gives to reductions under DDP, with projected gradients and without.

python -m lissom.bench.comm --json bench/results/comm-60m-cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..optim import GaLoreAdamW, param_groups
from ..optim.ddp import projected_allreduce
from . import names
from .llama import Llama
from .shapes import LLAMA, PAPER_RANK

__all__ = ["main"]


def _train(rank: int, ranks: int, folder: str, size: str, vocabulary: int, r: int, steps: int,
           projected: bool) -> None:
    """One rank; rank 0 leaves a row per step in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=ranks)
    model = Llama(replace(LLAMA[size], vocabulary=vocabulary))
    model.initialize(torch.Generator().manual_seed(0))
    wrapped = DistributedDataParallel(model)
    # Where a gradient has no part Adam divides rounding by its own size; eps holds that down, so
    # that the weights of the two paths can be compared.
    optimizer = GaLoreAdamW(param_groups(model, r), lr=1e-2, eps=1e-4)
    counts = projected_allreduce(optimizer, wrapped) if projected else None
    generator = torch.Generator().manual_seed(1 + rank)
    rows = []
    for step in range(steps):
        before = (counts.bytes_sent, counts.bytes_plain) if counts else (0, 0)
        tokens = torch.randint(vocabulary, (2, 129), generator=generator)
        logits = wrapped(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if counts:
            rows.append({"step": step, "bytes_sent": counts.bytes_sent - before[0],
                         "bytes_plain": counts.bytes_plain - before[1]})
    if rank == 0:
        Path(folder, f"{projected}.json").write_text(json.dumps(rows))
        torch.save([p.detach() for p in model.parameters()], Path(folder, f"{projected}.pt"))
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*LLAMA], default="llama-60m")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[256, 32000])
    parser.add_argument("--rank", type=int)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    r = args.rank or PAPER_RANK[args.size]
    out: list[dict[str, Any]] = []
    for vocabulary in args.vocabulary:
        weights = []
        for projected in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                mp.start_processes(  # type: ignore[attr-defined, no-untyped-call]
                    _train, (args.ranks, folder, args.size, vocabulary, r, args.steps, projected),
                    nprocs=args.ranks)
                weights.append(torch.load(Path(folder, f"{projected}.pt"), weights_only=True))
                rows = json.loads(Path(folder, f"{projected}.json").read_text())
        off = max(float((a - b).norm() / a.norm()) for a, b in zip(*weights, strict=True))
        for row in rows:
            row |= {"model": args.size, "vocabulary": vocabulary, "rank": r, "gap": 200,
                    "ranks": args.ranks, "share": row["bytes_sent"] / row["bytes_plain"],
                    "weights_off": off, "command": names.command("comm", argv),
                    "provider": "lissom", "device": "cpu", "machine": platform.machine(),
                    "torch": torch.__version__, "commit": names.commit()}
            print(f"{vocabulary} tokens, step {row['step']}: {row['bytes_sent'] / 1e6:.2f} MB of "
                  f"{row['bytes_plain'] / 1e6:.2f} ({100 * row['share']:.1f} %)", flush=True)
        print(f"  weights after {args.steps} steps: off by at most {off:.1e} of a tensor's norm")
        out += rows
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
