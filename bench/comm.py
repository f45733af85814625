"""Bytes of data parallelism: what a rank gives to reductions, and what it keeps of gradients.

DistributedDataParallel, its hook that sends projected gradients, no DDP at all, where the
backward pass averages gradients, and FSDP2, which reduces them by itself (what it sends is not
counted). What is kept is counted as each gradient is complete: every ``p.grad``, which with
``gradient_as_bucket_view`` is a view of DDP's buckets and under FSDP2 this rank's rows, and buffers
of projections.

    python -m lissom.bench.comm --json bench/results/comm-60m-cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ..optim import GaLoreAdamW, param_groups, project_in_backward, sharding, update_in_backward
from ..optim.ddp import projected_allreduce
from . import names
from .backward import held
from .llama import Llama
from .ranks import on_ranks
from .shapes import LLAMA, PAPER_RANK

__all__ = ["WAYS", "main"]

#: Who averages gradients.
WAYS = ("ddp", "projected_allreduce", "project_in_backward", "update_in_backward", "fsdp2",
        "fsdp2, project_in_backward", "fsdp2, update_in_backward")

_HANDLES: dict[str, Any] = {"project_in_backward": project_in_backward,
                            "update_in_backward": update_in_backward}


def _train(rank: int, size: str, vocabulary: int, r: int, steps: int, way: str
           ) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """A row per step, and the weights after the last."""
    model = Llama(replace(LLAMA[size], vocabulary=vocabulary))
    model.initialize(torch.Generator().manual_seed(0))
    engine, _, work = way.rpartition(", ")
    if way.startswith("fsdp2"):
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    # Where a gradient has no part Adam divides rounding by its own size; eps holds that down, so
    # that the weights of the ways can be compared.
    optimizer = GaLoreAdamW(param_groups(model, r), lr=1e-2, eps=1e-4)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = 0
    called: nn.Module = model

    def count(_: Tensor) -> None:
        nonlocal peak
        peak = max(peak, held(optimizer, handle))

    for p in model.parameters():  # before the optimizer's own hooks
        p.register_post_accumulate_grad_hook(count)
    handle: Any = None
    counts: Any = None
    if work in _HANDLES:
        handle = counts = _HANDLES[work](
            optimizer, process_group=None if engine else dist.group.WORLD)
    elif way != "fsdp2":
        # Else there are buckets beside the gradients.
        called = wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if way == "projected_allreduce":
            counts = projected_allreduce(optimizer, wrapped)
    generator = torch.Generator().manual_seed(1 + rank)
    rows = []
    for step in range(steps):
        before, peak = (counts.bytes_sent if counts else 0), 0
        tokens = torch.randint(vocabulary, (2, 129), generator=generator)
        logits = called(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        sent: int | None = counts.bytes_sent - before if counts else whole
        if way.startswith("fsdp2"):
            sent = None
        rows.append({"step": step, "bytes_sent": sent, "bytes_plain": whole,
                     "share": None if sent is None else sent / whole, "gradient_bytes": peak})
    return rows, [sharding.whole(p.detach()) for p in model.parameters()]


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
        plain: list[Tensor] = []
        for way in WAYS:
            rows, weights = on_ranks(args.ranks, _train, args.size, vocabulary, r, args.steps,
                                     way)[0]
            plain = plain or weights
            off = max(float((a - b).norm() / a.norm()) for a, b in zip(plain, weights, strict=True))
            for row in rows:
                row |= {"way": way, "model": args.size, "vocabulary": vocabulary, "rank": r,
                        "gap": 200, "ranks": args.ranks, "weights_off": off,
                        "command": names.command("comm", argv), "provider": "lissom",
                        "device": "cpu", "machine": platform.machine(), "torch": torch.__version__,
                        "commit": names.commit()}
                sent = "" if row["share"] is None else (
                    f"{row['bytes_sent'] / 1e6:.2f} MB of {row['bytes_plain'] / 1e6:.2f} "
                    f"({100 * row['share']:.1f} %) sent, ")
                print(f"{way}, {vocabulary} tokens, step {row['step']}: {sent}"
                      f"{row['gradient_bytes'] / 1e6:.2f} MB of gradients kept", flush=True)
            print(f"  weights after {args.steps} steps: at most {off:.1e} of a tensor's norm off")
            out += rows
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
