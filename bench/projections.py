"""How much of real gradients each projection captures, and what a refresh costs.

A tiny LLaMA trains on text with AdamW; at a few steps, ``--gap`` apart, every projection finds a
basis for the gradient of each matrix, ``subspace`` from the basis it found ``--gap`` steps
before. Captured energy is |G Q|^2 / |G|^2, here divided by the exact SVD's at the same rank.

    python -m lissom.bench.projections --json bench/results/projections.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ..optim import AdamW, dct, project
from . import text
from .llama import Llama
from .shapes import LLAMA, PAPER_RANK

__all__ = ["main"]

_PROJECTIONS = ("svd", "randomized", "subspace", "dct", "dct, l2", "dct3", "random")


def _basis(projection: str, g: Tensor, r: int, side: str, old: Tensor | None, key: int) -> Tensor:
    if projection == "random":
        n = g.shape[1] if side == "right" else g.shape[0]
        return project.random_basis(n, r, (), (0, key), key, g)
    if projection.startswith("dct"):
        kind = 3 if projection == "dct3" else 2
        index, _ = dct.project(g, r, kind=kind, dim=-1 if side == "right" else -2,
                               norm=2 if "l2" in projection else 1, similarity="auto")
        return dct.columns(index, g.shape[1] if side == "right" else g.shape[0], kind, g)
    found = project.find(g, r, side, projection, old, (0, key), key)
    assert found is not None
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*LLAMA], default="tiny")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--data", metavar="FILE")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    rank = args.rank or PAPER_RANK[args.size]
    model = Llama(replace(LLAMA[args.size], vocabulary=256))
    model.initialize(torch.Generator().manual_seed(0))
    optimizer = AdamW(model.parameters(), lr=1.5e-3)
    data, _ = text.load(args.data)
    matrices = {n: p for n, p in model.named_parameters()
                if p.ndim == 2 and "embed" not in n and "head" not in n}
    old: dict[str, Tensor] = {}
    energy: dict[str, list[float]] = {k: [] for k in _PROJECTIONS}
    share: dict[str, list[float]] = {k: [] for k in _PROJECTIONS}
    seconds: dict[str, list[float]] = {k: [] for k in _PROJECTIONS}
    for step in range(args.steps + 1):
        x, y = text.batch(data, 16, 128, step)
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        if step % args.gap == 0:
            for number, (name, p) in enumerate(matrices.items()):
                g = p.grad
                assert g is not None
                side = project.side_of(p.shape[0], p.shape[1], "std")
                captured: dict[str, float] = {}
                for projection in _PROJECTIONS:
                    start = time.perf_counter()
                    q = _basis(projection, g, rank, side,
                               old.get(name) if projection == "subspace" else None, number)
                    seconds[projection].append(time.perf_counter() - start)
                    low = g @ q if side == "right" else q.mT @ g
                    captured[projection] = (low.norm() / g.norm()).square().item()
                    if projection == "subspace":
                        old[name] = q
                for projection, value in captured.items():
                    share[projection].append(value)
                    energy[projection].append(value / captured["svd"])
        optimizer.step()
        optimizer.zero_grad()
    rows = [{
        "projection": k, "energy": statistics.median(share[k]),
        "of_svd_median": statistics.median(energy[k]), "of_svd_worst": min(energy[k]),
        "time_of_svd": statistics.median(seconds[k]) / statistics.median(seconds["svd"]),
        "gradients": len(energy[k]), "rank": rank, "gap": args.gap, "model": args.size,
        "vocabulary": 256, "torch": torch.__version__, "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    } for k in _PROJECTIONS]
    print(f"{'projection':12}{'energy':>9}{'of svd':>9}{'worst':>9}{'time of svd':>13}")
    for row in rows:
        print(f"{row['projection']:12}{row['energy']:9.3f}{row['of_svd_median']:9.4f}"
              f"{row['of_svd_worst']:9.4f}{row['time_of_svd']:13.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
