"""Which optimizer reaches what loss with the same tokens? LLaMA-60M or 130M on a text file.

Every run of a seed sees the same batches in the same order, the schedule and clipping of
``lissom.bench.train``. The rate of each method is tuned alike on the first seed: half its usual
rate, itself, and twice that, and on to the side where the loss still falls. Further seeds run at
the best rate, and so do the 8-bit forms.

    python -m lissom.bench.converge --data FILE --json bench/results/converge-60m.json

A run is taken in pieces whose end is kept beside the rows (``FILE.json.parts/``), so that a command
that was stopped, or whose ``--seconds`` are over, goes on where it was: a long comparison can be
made in many short sessions.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import clock, curves, names, text, train
from .shapes import LLAMA, PAPER_RANK

__all__ = ["METHODS", "Method", "main", "tuned"]


class Method(NamedTuple):
    """One line of the comparison.

    Args:
        optimizer: its name on the command line.
        options: of the optimizer.
        of: the method whose best rate it takes, where it is not tuned itself.
        goal: the most that its loss may be of AdamW's, where there is a goal.
    """

    optimizer: str
    options: Mapping[str, Any] = {}
    of: str | None = None
    goal: float | None = None


_BASIS = {"state_bits": 8, "basis_bits": 8}

METHODS: dict[str, Method] = {
    "AdamW": Method("adamw"),
    "AdamW, two rates": Method("adamw-two-rates"),  # of the blocks' matrices; of all else REST
    "Muon": Method("muon", goal=1.0),
    "Fira": Method("fira", goal=1.0),
    "GaLore": Method("galore", goal=1.01),
    "GaLore, SVD": Method("galore", {"projection": "svd"}, of="GaLore"),
    "DCT-AdamW": Method("dct-adamw", goal=1.01),
    "APOLLO": Method("apollo"),
    "FRUGAL": Method("frugal"),
    "PolarGrad": Method("polargrad"),
    "Trion": Method("trion"),
    "SwitchLoRA": Method("switchlora"),
    "GradNormLoRP": Method("gradnormlorp"),
    "GradNormLoRP, factors": Method("gradnormlorp-factors"),
    "AdamW, 8 bits": Method("adamw", {"state_bits": 8}, of="AdamW"),
    "Fira, 8 bits": Method("fira", _BASIS, of="Fira", goal=1.0),
    "GaLore, 8 bits": Method("galore", _BASIS, of="GaLore", goal=1.01),
    "DCT-AdamW, 8 bits": Method("dct-adamw", {"state_bits": 8}, of="DCT-AdamW", goal=1.01),
    "Muon, 8 bits": Method("muon", {"state_bits": 8}, of="Muon", goal=1.0),
    "PolarGrad, 8 bits": Method("polargrad", {"state_bits": 8}, of="PolarGrad"),
    "Trion, 8 bits": Method("trion", {"state_bits": 8}, of="Trion"),
    "SwitchLoRA, 8 bits": Method("switchlora", {"state_bits": 8}, of="SwitchLoRA"),
    "GradNormLoRP, 8 bits": Method("gradnormlorp", _BASIS, of="GradNormLoRP"),
}


class _OutOfTime(Exception):
    """The command's seconds are over; what was done is kept."""


def tuned(loss: Any, usual: float) -> float:
    """The best rate of half the usual one, itself, twice it, and on while the loss falls.

    A loss that is no number, of a run that diverged, is the worst.

    Args:
        loss: from a rate to a loss.
        usual: the rate to begin with.
    """
    def tried(rate: float) -> float:
        value = float(loss(rate))
        return math.inf if math.isnan(value) else value

    rates = {x: tried(x) for x in (usual, usual / 2, usual * 2)}
    for factor in (0.5, 2.0):
        while True:
            best = min(rates, key=rates.__getitem__)
            if best != (min(rates) if factor < 1 else max(rates)):
                break
            rates[best * factor] = tried(best * factor)
    return min(rates, key=rates.__getitem__)


class _Runs:
    """Rows that are done, and how others are made."""

    def __init__(self, args: argparse.Namespace, argv: Sequence[str] | None) -> None:
        self.args, self.file = args, Path(args.json)
        self.parts = Path(f"{args.json}.parts")
        self.rows: list[dict[str, Any]] = (json.loads(self.file.read_text())
                                           if self.file.exists() else [])
        self.deadline = clock.Deadline(args.seconds)
        self.data = text.load(args.data)
        self.about = clock.about("converge", argv, args.device)
        self.steps = max(1, args.tokens // (args.batch * args.length))
        self.rank = args.rank or PAPER_RANK[args.size]
        # What two runs must share to be compared; rows that differ in it are of another comparison.
        digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in self.data)).hexdigest()
        self.shared = {"rank": self.rank, "model": args.size, "steps": self.steps,
                       "batch": args.batch, "length": args.length, "dtype": args.dtype,
                       "run_on": args.device, "text": digest[:12]}

    def loss(self, name: str, lr: float, seed: int) -> float:
        """Validation loss of a run, taken from the rows or made.

        Raises:
            _OutOfTime: before it was done.
        """
        key = {"method": name, "lr": lr, "seed": seed, **self.shared}
        for row in self.rows:
            if all(row.get(k) == v for k, v in key.items()):
                return float(row["valid_loss"])
        method = METHODS[name]
        options = dict(method.options)
        if method.optimizer == "switchlora":  # a tenth of the run, as the paper takes it
            options["decay_steps"] = max(1, self.steps // 10)
        self.parts.mkdir(exist_ok=True)
        slug = "-".join(str(x) for x in key.values())
        slug = slug.replace(" ", "_").replace(",", "").replace(":", "")
        part, note = self.parts / f"{slug}.pt", self.parts / f"{slug}.json"
        kept = json.loads(note.read_text()) if note.exists() else {"steps": 0, "seconds": 0.0}
        made: dict[str, Any] = {}
        while not made or kept["steps"] < self.steps:
            if self.deadline.over():
                raise _OutOfTime(f"{name}, rate {lr:g}, seed {seed}: {kept['steps']} of "
                                 f"{self.steps} steps are done")
            until = min(kept["steps"] + self.args.piece, self.steps)
            run = train.Run(self.args.size, False, self.steps, until, self.args.batch,
                            self.args.length, seed, self.args.device, self.args.dtype, self.rank,
                            lr, options)
            start = time.perf_counter()
            made = train.train(method.optimizer, self.data, run, lambda now: None,
                               self.parts / f"{slug}.new", part if kept["steps"] else None)
            kept = {"steps": until, "seconds": kept["seconds"] + time.perf_counter() - start}
            (self.parts / f"{slug}.new").replace(part)
            note.write_text(json.dumps(kept))
        made["losses"] = [round(x, 4) for x in made["losses"]]
        self.rows.append({**made, **key, "wall_s": kept["seconds"], **self.about})
        clock.save(str(self.file), self.rows)
        part.unlink()
        note.unlink()
        print(f"{name}, rate {lr:g}, seed {seed}: {made['valid_loss']:.4f}, {kept['seconds']:.0f} "
              f"s, {made['state_bytes']:,} bytes of state", flush=True)
        return float(made["valid_loss"])

    def of(self, name: str, lr: float) -> list[dict[str, Any]]:
        """Rows of a method at a rate in this comparison, by seed."""
        key = {"method": name, "lr": lr, **self.shared}
        return sorted((row for row in self.rows if all(row.get(k) == v for k, v in key.items())),
                      key=lambda row: int(row["seed"]))


def _table(runs: _Runs, best: Mapping[str, float]) -> None:
    """Mean and range of the losses, time and memory, beside AdamW's."""
    means = {name: statistics.fmean(row["valid_loss"] for row in runs.of(name, lr))
             for name, lr in best.items() if runs.of(name, lr)}
    base = means.get("AdamW")
    seconds = {name: statistics.median(row["wall_s"] for row in runs.of(name, best[name]))
               for name in means}
    for name, mean in means.items():
        rows = runs.of(name, best[name])
        losses = [row["valid_loss"] for row in rows]
        line = (f"{name:22} rate {best[name]:<8g} loss {mean:.4f} ({min(losses):.4f} to "
                f"{max(losses):.4f}, {len(losses)} seeds)  state "
                f"{rows[0]['state_bytes'] / 2**20:8.2f} MiB  peak "
                f"{rows[0]['peak_bytes'] / 2**20:8.1f} MiB  {seconds[name]:6.0f} s")
        if base is not None:
            line += f"  {mean / base:.4f} of AdamW's"
            goal = METHODS[name].goal
            if goal is not None:
                line += f" (goal {goal:g}: {'met' if mean <= goal * base else 'MISSED'})"
        print(line)
    if {"GaLore, SVD", "DCT-AdamW"} <= means.keys():
        print(f"DCT-AdamW against GaLore with SVD: loss {means['DCT-AdamW']:.4f} and "
              f"{means['GaLore, SVD']:.4f}, time {seconds['DCT-AdamW']:.0f} and "
              f"{seconds['GaLore, SVD']:.0f} s")


def _plot(runs: _Runs, best: Mapping[str, float], file: str) -> None:
    """Curves of the first seed at the best rates."""
    lines = []
    for name, lr in best.items():
        rows = runs.of(name, lr)
        if rows:
            mean = statistics.fmean(row["valid_loss"] for row in rows)
            lines.append((f"{name}, rate {lr:g}: validation {mean:.3f}", rows[0]["losses"]))
    curves.draw(file, lines, figsize=(10, 6.5), fontsize="small",
                title=f"{runs.args.size}, {runs.steps} steps of {runs.args.batch} x "
                      f"{runs.args.length} bytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="lissom-converge", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=";".join(METHODS),
                        help="separated by semicolons (default: all)")
    parser.add_argument("--data", metavar="FILE", help="plain or .xz text; default: Python's own")
    parser.add_argument("--size", choices=[*LLAMA], default="llama-60m")
    parser.add_argument("--rank", type=int, help="default: the paper's")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of a run (default 1e7)")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a batch (default 32)")
    parser.add_argument("--length", type=int, default=256, help="bytes in one (default 256)")
    parser.add_argument("--seeds", type=int, default=2, help="runs at the best rate (default 2)")
    parser.add_argument("--piece", type=int, default=200, help="steps between two checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seconds", type=float, help="stop when these are over")
    parser.add_argument("--json", metavar="FILE", required=True, help="rows, read and written")
    parser.add_argument("--plot", metavar="FILE.png", help="curves at the best rates")
    args = parser.parse_args(argv)
    chosen = args.methods.split(";")
    for name in chosen:
        if name not in METHODS:
            parser.error(f"--methods {name!r} must be of {', '.join(map(repr, METHODS))}")
    try:
        runs = _Runs(args, argv)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    best: dict[str, float] = {}
    left = ""
    try:
        for name in chosen:
            method = METHODS[name]
            if method.of in best:
                best[name] = best[method.of]
            else:
                usual = names.OPTIMIZERS[method.optimizer].lr
                best[name] = tuned(lambda lr, name=name: runs.loss(name, lr, 0), usual)
            runs.loss(name, best[name], 0)
        for seed in range(1, args.seeds):
            for name in chosen:
                runs.loss(name, best[name], seed)
    except _OutOfTime as error:
        left = str(error)
    _table(runs, best)
    if left:
        print(f"not done: {left}; the same command goes on")
    if args.plot and best and importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
    elif args.plot and best:
        _plot(runs, best, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
