"""How much of the gap between LoRA and full rank does switching close, and what does it cost? And
does 8-bit GradNormLoRP hold the loss at a tenth of AdamW's state? Tiny LLaMA, one budget for all.

Embeddings, head and norms get the same rate in every run (``names.REST``), and the matrices, or the
pairs beside them, a rate that is tuned for each method alike: on a ladder of half decades, from two
in its middle on, until the loss rises on both sides of the best (seed 0). Further seeds run at the
best rate, and so does a variant that is derived from a method. Batches, schedule and clipping are
those of ``lissom.bench.train``.

    python -m lissom.bench.reparam --data FILE --json rows.json --plot curves.png

A row is written as soon as its run ends, and rows that the file has are not run again: an
interrupted command goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..optim import SwitchLoRAAdamW, codec, switchlora
from ..optim.apply import Update
from ..optim.codec import State
from . import curves, names, text, train
from .shapes import LLAMA

__all__ = ["METHODS", "climb", "main"]

#: Peak rates of the matrices: half decades.
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


class NoRest(SwitchLoRAAdamW):
    """Switches alone: the counterpart keeps its moments and its count, and is not frozen."""

    def update(self, g: Tensor, s: State, o: Mapping[str, Any], t: int) -> Update:
        s["frozen"].zero_()
        return super().update(g, s, o, t)


class RestAlone(SwitchLoRAAdamW):
    """Rests alone: counterparts restart and are frozen as ever, but no vector is exchanged."""

    def _switch(self, pair: Any, o: Mapping[str, Any]) -> bool:
        a, b = (self.state[p] for p in (pair.a, pair.b))
        for mine, other in ((a, b), (b, a)):
            rows, _ = switchlora.chosen(mine, other, o)
            other["frozen"][rows] = o["freeze_steps"]
        return False


#: What tells apart the two things that a switch costs.
_APART = {"switchlora-no-rest": NoRest, "switchlora-rest-alone": RestAlone}


class Method(NamedTuple):
    """One line of the comparison.

    Args:
        optimizer: its name on the command line.
        options: of the optimizer.
        share: the rank as a share of the model's width, or None for the command's rank.
        small: quantize moments of any size, as all of LLaMA-7B's are large enough.
        of: the method whose best rate it takes, where it is not tuned itself.
    """

    optimizer: str
    options: Mapping[str, Any] = {}
    share: float | None = None
    small: bool = False
    of: str | None = None


METHODS: dict[str, Method] = {
    "AdamW, full rank": Method("adamw-two-rates"),
    "LoRA": Method("lora-two-rates"),
    "SwitchLoRA": Method("switchlora"),
    "SwitchLoRA, no switches": Method("switchlora", {"interval": 1e9}, of="SwitchLoRA"),
    "SwitchLoRA, three times the switches": Method("switchlora", {"decay_steps": 200},
                                                   of="SwitchLoRA"),
    "SwitchLoRA, no rests": Method("switchlora-no-rest", of="SwitchLoRA"),
    "SwitchLoRA, rests alone": Method("switchlora-rest-alone", of="SwitchLoRA"),
    # Ranks of 512 and 640 on LLaMA-7B, where both save nine tenths of bf16 AdamW's state.
    "GradNormLoRP, 8 bits": Method(
        "gradnormlorp", {"state_bits": 8, "basis_bits": 8, "update_proj_gap": 50}, 1 / 8, True),
    "GradNormLoRP, 8 bits, factors": Method(
        "gradnormlorp-factors", {"state_bits": 8, "basis_bits": 8}, 5 / 32, True),
    "GradNormLoRP, 32 bits, factors": Method(
        "gradnormlorp-factors", {}, 5 / 32, of="GradNormLoRP, 8 bits, factors"),
}


def climb(loss: Any, ladder: Sequence[float], start: int) -> float:
    """The rate with the least loss on a ladder, if there is one valley.

    Args:
        loss: from a rate to a loss.
        ladder: rates in ascending order.
        start: index of the first rate; the second is the next one.
    """
    low, high = start, start + 1
    best = low if loss(ladder[low]) <= loss(ladder[high]) else high
    step = -1 if best == low else 1
    while 0 <= best + step < len(ladder) and loss(ladder[best + step]) < loss(ladder[best]):
        best += step
    return ladder[best]


def _plot(rows: Sequence[dict[str, Any]], best: dict[str, float], file: str) -> None:
    """Curves of the first seed at the best rates; validation losses of all seeds in the legend."""
    lines = []
    for method, lr in best.items():
        mine = [row for row in rows if row["method"] == method and row["lr"] == lr]
        losses = ", ".join(f"{row['valid_loss']:.3f}" for row in mine)
        rank = "" if method == "AdamW, full rank" else f", rank {mine[0]['rank']}"
        lines.append((f"{method}{rank}, rate {lr:g}: validation {losses}", mine[0]["losses"]))
    curves.draw(file, lines, ylim=(None, 3.0),
                title=f"{rows[0]['model']} LLaMA, {rows[0]['vocabulary']}-byte vocabulary")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="lissom-reparam", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=";".join(METHODS),
                        help="separated by semicolons (default: all)")
    parser.add_argument("--data", metavar="FILE", help="plain or .xz text")
    parser.add_argument("--size", choices=[*LLAMA], default="tiny")
    parser.add_argument("--rank", type=int, default=8, help="of pairs (default 8)")
    parser.add_argument("--steps", type=int, default=600, help="of each run (default 600)")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a batch (default 16)")
    parser.add_argument("--length", type=int, default=128, help="bytes in one (default 128)")
    parser.add_argument("--seeds", type=int, default=2, help="runs at the best rate (default 2)")
    parser.add_argument("--rates", metavar="FILE",
                        help="no tuning: the best rates of these rows (say, of shorter runs)")
    parser.add_argument("--json", metavar="FILE", required=True, help="rows, read and written")
    parser.add_argument("--plot", metavar="FILE.png", help="curves at the best rates")
    args = parser.parse_args(argv)
    curves.check(parser, args.plot)
    chosen = args.methods.split(";")
    for name in chosen:
        if name not in METHODS:
            parser.error(f"--methods {name!r} must be of {', '.join(map(repr, METHODS))}")
    torch.set_num_threads(1)
    for name, cls in _APART.items():
        names.OPTIMIZERS[name] = names.OPTIMIZERS["switchlora"]._replace(make=cls)
    file = Path(args.json)
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    data = text.load(args.data)
    known: list[dict[str, Any]] = json.loads(Path(args.rates).read_text())["rows"] if (
        args.rates) else []

    def run(name: str, lr: float, seed: int) -> float:
        """Validation loss."""
        method = METHODS[name]
        rank = round(LLAMA[args.size].hidden * method.share) if method.share else args.rank
        for row in rows:
            if (row["method"], row["lr"], row["seed"], row["rank"]) == (name, lr, seed, rank):
                return float(row["valid_loss"])
        one = train.Run(args.size, False, args.steps, args.steps, args.batch, args.length, seed,
                        "cpu", "fp32", rank, lr, {
                            "lr_adamw": names.REST,
                            # as the paper, a tenth of its runs
                            "decay_steps": max(1, args.steps // 10), **method.options})
        limits = codec.SMALL, codec.SHORT
        codec.SMALL, codec.SHORT = (1, 0) if method.small else limits
        try:
            row = train.train(method.optimizer, data, one, lambda now: None)
        finally:
            codec.SMALL, codec.SHORT = limits
        row["losses"] = [round(x, 4) for x in row["losses"]]
        rows.append({"method": name, **row, "options": dict(method.options),
                     "commit": names.commit()})
        head = {"command": "python -m lissom.bench.reparam --data FILE --rank "
                           f"{args.rank} --steps {args.steps} --seeds {args.seeds} --json FILE"
                           + (f" --rates {args.rates}" if args.rates else ""),
                "device": f"1 thread of {platform.machine()}", "torch": torch.__version__,
                "batch": args.batch, "length": args.length, "rest_lr": names.REST}
        lines = ",\n".join(json.dumps(row) for row in rows)  # one each: curves are long
        file.write_text(json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n')
        print(f"{name}, rank {rank}, rate {lr:g}, seed {seed}: {row['valid_loss']:.4f}, "
              f"{row['state_bytes']:,} bytes of state", flush=True)
        return float(row["valid_loss"])

    best: dict[str, float] = {}
    for name in chosen:
        base = METHODS[name].of
        if base in best:
            best[name] = best[base]
        elif tuned := [row for row in known if row["method"] == (base or name)]:
            best[name] = float(min(tuned, key=lambda row: row["valid_loss"])["lr"])
        else:
            best[name] = climb(lambda lr, name=name: run(name, lr, 0), LADDER, LADDER.index(3e-3))
    means = {}
    for seed in range(args.seeds):
        for name in chosen:
            run(name, best[name], seed)
    for name in chosen:
        losses = [run(name, best[name], seed) for seed in range(args.seeds)]
        means[name] = statistics.fmean(losses)
        print(f"{name:38} rate {best[name]:<8g} mean {means[name]:.4f}  of "
              + " ".join(f"{x:.4f}" for x in losses))
    if {"AdamW, full rank", "LoRA", "SwitchLoRA"} <= means.keys():
        gap = means["LoRA"] - means["AdamW, full rank"]
        print(f"gap of LoRA {gap:.4f}; SwitchLoRA closes "
              f"{(means['LoRA'] - means['SwitchLoRA']) / gap:.0%}")
    if args.plot:
        _plot(rows, best, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
