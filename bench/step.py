"""Time of an optimizer step against other packages', same matrices, same gradients, one run.

Steps of all contestants alternate, so that a slow moment of the machine meets them all. Also
timed: the two matrix products alone that every projection method needs. ``--whole`` adds
embedding, head and norms to the matrices. ``ratio`` is that of the medians; ``pairs`` are the
quartiles of the ratios round by round, for machines that others load.

    python -m lissom.bench.step --json bench/results/step-60m-cpu.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..optim import AdamW, AdamW8bit, DCTAdamW, FiraAdamW, GaLoreAdamW, Muon, PolarGrad
from . import names
from .livebytes import LiveBytes
from .shapes import LLAMA, PAPER_RANK

__all__ = ["main"]


#: Whose step each contestant's is compared with; the others' with galore-torch's.
_AGAINST = {"AdamW": "torch.optim.AdamW foreach", "AdamW8bit": "bitsandbytes AdamW8bit",
            "FiraAdamW": "fira", "DCTAdamW, every step": "GaLoreAdamW",
            "DCTAdamW, gap 200": "GaLoreAdamW",
            "DCTAdamW, every step, by product": "DCTAdamW, every step",
            "Muon": "torch.optim.Muon", "PolarGrad": "torch.optim.Muon"}
_OURS = {"AdamW", "AdamW8bit", "GaLoreAdamW", "FiraAdamW", "DCTAdamW, every step", "Muon",
         "PolarGrad"}


def _weights(size: str, whole: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of the blocks, and with ``whole`` the rest of the model."""
    s = LLAMA[size]
    block = [(s.hidden, s.hidden)] * 4 + [(s.mlp, s.hidden)] * 2 + [(s.hidden, s.mlp)]
    rest = [(s.vocabulary, s.hidden)] * 2 + [(s.hidden,)] * (2 * s.layers + 1) if whole else []
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(x, generator=generator) * 0.02)
            for x in [*block * s.layers, *rest]]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator) * 0.01
    return made[: 7 * s.layers], made[7 * s.layers :]


def _products(matrices: list[nn.Parameter], rank: int) -> Callable[[], Any]:
    """R = G Q and P += R Q^T (or from the left), and nothing else."""
    bases = [torch.randn(min(p.shape), rank) for p in matrices]

    def step() -> None:
        for p, q in zip(matrices, bases, strict=True):
            g = p.grad
            assert g is not None
            if p.shape[0] >= p.shape[1]:
                p.data.addmm_(g @ q, q.mT, beta=0.99, alpha=-1e-3)
            else:
                p.data.addmm_(q, q.mT @ g, beta=0.99, alpha=-1e-3)

    return step


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")),
                platform.processor())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*LLAMA], default="llama-60m")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--only", metavar="NAMES", help="contestants, separated by semicolons")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rank = args.rank or PAPER_RANK[args.size]

    def low_rank(cls: Any, gap: int = 200, alpha: str = "scale", **options: Any
                 ) -> Callable[[], Any]:
        matrices, rest = _weights(args.size, args.whole)
        groups: list[dict[str, Any]] = [{"params": matrices, "rank": rank, alpha: 0.25,
                                         "update_proj_gap": gap, "proj_type": "std"}]
        step: Callable[[], Any] = cls(groups + ([{"params": rest}] if rest else []), lr=1e-3,
                                      weight_decay=0.01, **options).step
        return step

    def dense(cls: Any, **options: Any) -> Callable[[], Any]:
        matrices, rest = _weights(args.size, args.whole)
        step: Callable[[], Any] = cls(matrices + rest, lr=1e-3, **options).step
        return step

    def whole_matrix(cls: Any, **options: Any) -> Callable[[], Any]:
        matrices, rest = _weights(args.size, args.whole)
        groups: list[dict[str, Any]] = [{"params": matrices}]
        if rest:
            groups.append({"params": rest, "algorithm": "adamw"})
        step: Callable[[], Any] = cls(groups, lr=1e-3, **options).step
        return step

    def torch_muon() -> Callable[[], Any]:
        matrices, rest = _weights(args.size, args.whole)
        muon = torch.optim.Muon(matrices, lr=1e-3)
        adamw = torch.optim.AdamW(rest, lr=1e-3, foreach=True) if rest else None

        def step() -> None:
            muon.step()
            if adamw is not None:
                adamw.step()

        return step

    contestants = {
        "GaLoreAdamW": low_rank(GaLoreAdamW),
        "FiraAdamW": low_rank(FiraAdamW),
        "DCTAdamW, every step": low_rank(DCTAdamW, gap=1),
        "DCTAdamW, every step, by product": low_rank(DCTAdamW, gap=1, similarity="matmul"),
        "DCTAdamW, gap 200": low_rank(DCTAdamW),
        "products alone": _products(_weights(args.size, False)[0], rank),
        "AdamW": dense(AdamW),
        "AdamW8bit": dense(AdamW8bit),
        "Muon": whole_matrix(Muon),
        "PolarGrad": whole_matrix(PolarGrad, polar="polar-express", polar_steps=5),
        "torch.optim.Muon": torch_muon(),
        "torch.optim.AdamW foreach": dense(torch.optim.AdamW, foreach=True),
    }
    for peer, module, cls, alpha in (("galore-torch", "galore_torch", "GaLoreAdamW", "scale"),
                                     ("fira", "fira", "FiraAdamW", "alpha")):
        if importlib.util.find_spec(module) is not None:
            make = getattr(importlib.import_module(module), cls)
            contestants[peer] = low_rank(make, alpha=alpha, no_deprecation_warning=True)
    if importlib.util.find_spec("bitsandbytes") is not None:
        contestants["bitsandbytes AdamW8bit"] = dense(
            importlib.import_module("bitsandbytes").optim.AdamW8bit)
    if args.only:
        contestants = {k: v for k, v in contestants.items() if k in args.only.split(";")}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(args.steps):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    peaks = {}
    for name in contestants.keys() & _OURS:
        with LiveBytes() as live:
            contestants[name]()
        peaks[name] = live.peak
    largest = max(p.nbytes for part in _weights(args.size, args.whole) for p in part)
    rows = []
    for name, times in seconds.items():
        rest = sorted(times[1:])
        against = _AGAINST.get(name, "galore-torch")
        pairs = sorted(a / b for a, b in zip(times[1:], seconds.get(against, [])[1:],
                                             strict=False))
        rows.append({
            "optimizer": name, "step_ms": 1e3 * statistics.median(rest),
            "quartiles_ms": [1e3 * rest[len(rest) // 4], 1e3 * rest[3 * len(rest) // 4]],
            "worst_of_median": rest[-1] / statistics.median(rest), "first_ms": 1e3 * times[0],
            "against": against,
            "ratio": statistics.median(rest) / statistics.median(seconds[against][1:])
            if against in seconds else None,
            "pairs": [pairs[len(pairs) * i // 4] for i in (1, 2, 3)] if pairs else None,
            "first_ratio": times[0] / seconds[against][0] if against in seconds else None,
            "peak_of_largest": peaks[name] / largest if name in peaks else None,
            "model": args.size, "vocabulary": 32000 if args.whole else None, "rank": rank,
            "whole": args.whole, "steps": args.steps, "torch": torch.__version__,
            "threads": torch.get_num_threads(), "machine": platform.machine(),
            "processor": _processor(), "commit": names.commit(),
            "command": names.command("step", argv),
        })
    for row in rows:
        print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items() if k in (
                            "optimizer", "step_ms", "worst_of_median", "first_ms", "ratio", "pairs",
                            "first_ratio", "peak_of_largest")))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
