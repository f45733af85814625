"""Stochastic roundings that fall otherwise on several ranks than in one process, in real training.

LLaMA in bf16 on real text under FSDP2, with gloo. Before each step one process gets weights and
state of the ranks, and both take the step: the ranks with a part of the batch each, the one process
with the same parts one after the other. Gradients are added up in fp32, or with ``--reduce bf16``
in bf16, and are bf16 then. Weights that differ after the step are counted, and those that are more
than one unit in the last place apart.

    python -m lissom.bench.flips --data FILE --ranks 2 4 --json bench/results/flips-tiny-cpu.json
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
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional

from ..optim.sharding import whole
from . import names, text
from .llama import Llama
from .ranks import on_ranks
from .shapes import LLAMA, PAPER_RANK

__all__ = ["main", "units_apart"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_WHOLE = StateDictOptions(full_state_dict=True)


def units_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many bf16 numbers further b is than a, element by element: 0 where they are equal."""
    def place(x: Tensor) -> Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -32768 - bits, bits)  # both zeros are one place
    return (place(a) - place(b)).abs()


def _backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten()).backward()


def _worker(rank: int, args: argparse.Namespace, count: int, name: str) -> list[dict[str, int]]:
    """A row per step from rank 0, which is the one process too."""
    r, lr = args.rank or PAPER_RANK[args.size], names.OPTIMIZERS[name].lr
    models, optimizers = [], []
    kind = _DTYPES[args.reduce]
    for sharded in (True, False)[:1 + (rank == 0)]:
        model = Llama(replace(LLAMA[args.size], vocabulary=256))
        model.initialize(torch.Generator().manual_seed(0))
        model.to(torch.bfloat16)
        if sharded:
            for part in (*model.layers, model):
                fully_shard(part, mesh=init_device_mesh("cpu", (count,)),
                            mp_policy=MixedPrecisionPolicy(reduce_dtype=kind))
        elif torch.torch_version.TorchVersion(torch.__version__) >= "2.15":
            for p in model.parameters():
                p.grad_dtype = None  # as FSDP2: fp32 gradients (of norms) are not rounded to bf16
        models.append(model)
        optimizers.append(names.build(name, model, r, lr, state_bits=args.state_bits))
    data, _ = text.load(args.data)
    rows = []
    for step in range(args.steps):
        weights = get_model_state_dict(models[0], options=_WHOLE)
        state = get_optimizer_state_dict(models[0], optimizers[0], options=_WHOLE)
        x, y = text.batch(data, args.batch, args.length, step)
        if rank == 0:
            models[1].load_state_dict(weights)
            set_optimizer_state_dict(models[1], optimizers[1], state, options=_WHOLE)
            sums = [torch.zeros_like(p, dtype=kind) for p in models[1].parameters()]
            for part in zip(x.chunk(count), y.chunk(count), strict=True):
                _backward(models[1], *part)
                for p, total in zip(models[1].parameters(), sums, strict=True):
                    assert p.grad is not None
                    total += p.grad
                    p.grad = None
            for p, total in zip(models[1].parameters(), sums, strict=True):
                p.grad = (total / count).to(p.dtype)
        _backward(models[0], x.chunk(count)[rank], y.chunk(count)[rank])
        grads = [whole(p.grad) for p in models[0].parameters() if p.grad is not None]
        for optimizer in optimizers:
            optimizer.step()
        all_ = [whole(p.detach()) for p in models[0].parameters()]
        if rank == 0:
            ones = list(models[1].parameters())
            apart = [units_apart(a, b.detach()) for a, b in zip(all_, ones, strict=True)]
            mine = [p.grad for p in ones if p.grad is not None]
            other = [torch.ne(a, b) for a, b in zip(grads, mine, strict=True)]
            rows.append({"step": step, "elements": sum(x.numel() for x in apart),
                         "flipped": sum(int((x > 0).sum()) for x in apart),
                         "beyond_one": sum(int((x > 1).sum()) for x in apart),
                         "gradients_apart": sum(int(x.sum()) for x in other)})
        for optimizer in optimizers:
            optimizer.zero_grad()
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", default="adamw,galore,fira,dct-adamw,muon,trion")
    parser.add_argument("--size", choices=[*LLAMA], default="tiny")
    parser.add_argument("--rank", type=int, help="of projections; default: the paper's")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="processes")
    parser.add_argument("--state-bits", type=int, default=32, choices=[32, 16, 8, 4])
    parser.add_argument("--reduce", default="fp32", choices=[*_DTYPES],
                        help="what gradients are added up in")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="sequences that all ranks share")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--data", metavar="FILE", help="plain or .xz text")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    out: list[dict[str, Any]] = []
    for name in args.optimizers.split(","):
        for count in args.ranks:
            rows = on_ranks(count, _worker, args, count, name)[0]
            total = sum(row["elements"] for row in rows)
            out.append({
                "optimizer": name, "ranks": count, "state_bits": args.state_bits,
                "steps": len(rows), "elements": total,
                "flipped": sum(row["flipped"] for row in rows),
                "worst_share": max(row["flipped"] / row["elements"] for row in rows),
                "beyond_one": sum(row["beyond_one"] for row in rows), "reduce": args.reduce,
                "gradients_apart": sum(row["gradients_apart"] for row in rows), "rows": rows,
                "command": names.command("flips", argv), "device": "cpu",
                "machine": platform.machine(), "torch": torch.__version__,
                "commit": names.commit()})
            row = out[-1]
            print(f"{name:10} {count} ranks: {row['flipped']} of {total} roundings fell otherwise "
                  f"({row['flipped'] / total:.1e}, worst step {row['worst_share']:.1e}), "
                  f"{row['beyond_one']} by more than a unit; {row['gradients_apart']} gradients "
                  "differed", flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(out, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
