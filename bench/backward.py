"""Bytes of gradients that are alive in a backward pass, with and without work in it.

Counted at the moment each gradient is complete: every ``p.grad``, and beside them the buffers of
projected gradients and the bases that wait for the step. ``backward_bytes`` is the peak of all
that the backward pass made, the temporaries of a refresh included.

    python -m lissom.bench.backward --json bench/results/backward-60m-cpu.json
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

from ..optim import (
    AdamW,
    GaLoreAdamW,
    param_groups,
    project_in_backward,
    sharding,
    update_in_backward,
)
from ..optim.backward_project import ProjectInBackward
from ..optim.backward_update import UpdateInBackward
from ..optim.base import MatrixOptimizer
from . import names
from .livebytes import LiveBytes
from .llama import Llama
from .shapes import LLAMA, PAPER_RANK

__all__ = ["held", "main", "measure"]

#: Contestants: class, what works in the backward pass, micro-batches a step.
CONTESTANTS: dict[str, tuple[str, int]] = {
    "ordinary": ("", 1),
    "project_in_backward": ("project", 1),
    "project_in_backward, 4 micro-batches": ("project", 4),
    "update_in_backward": ("update", 1),
    "update_in_backward, AdamW": ("update", 1),
}


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in what a refresh keeps until the step."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [x for part in value for x in _tensors(part)] if isinstance(value, tuple) else []


def held(optimizer: MatrixOptimizer, handle: Any) -> int:
    """Bytes of gradients, their buffers, and means and bases that wait; storages once.

    Of what is sharded, this rank's part.
    """
    # Not the model's: in its backward pass FSDP2 has whole parameters there.
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = [p.grad for p in params if p.grad is not None]
    for state in optimizer.state.values():
        found += [x for k, x in state.items() if k.startswith("projected")]
    if isinstance(handle, ProjectInBackward):
        found += [x for now in handle._now.values() if now.pending is not None
                  for x in _tensors(now.pending)]
    if isinstance(handle, UpdateInBackward):
        found += [sent.mean for _, sent in handle._sent.values()]
    found = [*map(sharding.local, found)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    return sum(storages.values())


def measure(name: str, size: str, vocabulary: int, rank: int, steps: int = 3, tied: bool = False,
            gap: int = 200) -> list[dict[str, Any]]:
    """One row per step: peaks of gradient bytes and of all that the backward pass made."""
    kind, micro = CONTESTANTS[name]
    model = Llama(replace(LLAMA[size], vocabulary=vocabulary), tied)
    model.initialize(torch.Generator().manual_seed(0))
    peak = 0

    def count(_: Tensor) -> None:
        nonlocal peak
        peak = max(peak, held(optimizer, handle))

    for p in model.parameters():  # before the optimizer's own hooks
        p.register_post_accumulate_grad_hook(count)
    optimizer: MatrixOptimizer
    if name.endswith("AdamW"):
        optimizer = AdamW(model.named_parameters(), lr=1e-3)
    else:
        optimizer = GaLoreAdamW(param_groups(model, rank), lr=1e-2, update_proj_gap=gap)
    handle: Any = None
    if kind:
        handle = (project_in_backward(optimizer, micro) if kind == "project"
                  else update_in_backward(optimizer))
    generator = torch.Generator().manual_seed(1)
    rows = []
    for step in range(steps):
        peak, made = 0, 0
        for _ in range(micro):
            tokens = torch.randint(vocabulary, (1, 33), generator=generator)
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[0, 1:])
            del logits
            with LiveBytes() as live:
                loss.backward()
            made = max(made, live.peak)
        optimizer.step()
        optimizer.zero_grad()
        rows.append({"path": name, "model": size, "vocabulary": vocabulary, "tied": tied,
                     "rank": rank, "gap": gap, "micro_batches": micro, "step": step,
                     "gradient_bytes": peak, "backward_bytes": made})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*LLAMA], default="llama-60m")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    rank = args.rank or PAPER_RANK[args.size]
    rows: list[dict[str, Any]] = []
    for vocabulary, tied in ((256, False), (32000, False), (32000, True)):
        for name in CONTESTANTS:
            rows += measure(name, args.size, vocabulary, rank, args.steps, tied, args.gap)
            same = [r for r in rows if r["path"] == "ordinary"
                    and (r["vocabulary"], r["tied"]) == (vocabulary, tied)]
            for row in rows[-args.steps:]:
                for what in ("gradient", "backward"):
                    row[f"{what}_of_ordinary"] = (
                        row[f"{what}_bytes"] / max(r[f"{what}_bytes"] for r in same))
                row |= {"provider": "lissom", "device": "cpu", "machine": platform.machine(),
                        "torch": torch.__version__, "commit": names.commit()}
            print(f"{vocabulary} tokens{', tied' if tied else ''}, {name}: gradients "
                  + ", ".join(f"{r['gradient_bytes'] / 1e6:.2f} MB "
                              f"({100 * r['gradient_of_ordinary']:.1f} %)"
                              for r in rows[-args.steps:])
                  + "; all " + ", ".join(f"{r['backward_bytes'] / 1e6:.1f} MB"
                                         for r in rows[-args.steps:]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
