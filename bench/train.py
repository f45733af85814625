"""Train a small LLaMA on real text, once per optimizer, and compare.

Same seed, same batches, same schedule (a tenth of warm-up, cosine to a tenth); gradients clipped
to norm 1. The text is Python's own standard library, byte by byte, or ``--data FILE``.

    python -m lissom.bench.train --optimizers adamw,galore --steps 300
    torchrun --nproc-per-node 2 -m lissom.bench.train --parallel fsdp2
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..optim.sharding import local
from . import curves, names, text
from .livebytes import LiveBytes
from .llama import Llama
from .parallel import KINDS, Ranks, join
from .shapes import LLAMA, PAPER_RANK

__all__ = ["Run", "main", "train"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_VALIDATION_BATCHES = 16


@dataclass(frozen=True)
class Run:
    """Everything that decides a run, the same for each optimizer."""

    size: str
    tied: bool
    steps: int
    until: int
    batch: int
    length: int
    seed: int
    device: str
    dtype: str
    rank: int
    lr: float | None
    options: dict[str, Any]
    ranks: Ranks = field(default_factory=Ranks)


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


@torch.no_grad()
def _validate(model: nn.Module, data: Tensor, run: Run) -> float:
    """Mean loss in nats per byte over fixed batches of the validation text."""
    losses = []
    for i in range(_VALIDATION_BATCHES):
        x, y = (z.to(run.device) for z in text.batch(data, run.batch, run.length, 7 + i))
        losses.append(_loss(model, x, y).item())
    return statistics.fmean(losses)


def _factor(step: int, steps: int) -> float:
    """Learning rate at a 0-based step, relative to its peak."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def train(
    name: str, data: tuple[Tensor, Tensor], run: Run, report: Callable[[dict[str, Any]], None],
    save: Path | None = None, resume: Path | None = None,
) -> dict[str, Any]:
    """Train with one optimizer.

    Args:
        name: a key of :data:`lissom.bench.names.OPTIMIZERS`.
        data: training and validation bytes.
        run: sizes, seed, schedule and options.
        report: called after each step with step, loss, tokens per second and live bytes.
        save: where model, optimizer and schedule go at the end.
        resume: such a file, to go on from.

    Returns:
        optimizer, valid_loss, train_loss, state_bytes, peak_bytes, step_ms, losses and what the
        table shows beside them. step_ms is the median without the first step. peak_bytes is the
        largest sum of live tensor bytes (weights, state, gradients, activations, temporaries)
        over the first two steps on the CPU, the allocator's peak on CUDA. Of several processes
        both count what rank 0 holds, peak_bytes on the CPU its weights and state alone.
    """
    shape = replace(LLAMA[run.size], vocabulary=256)
    model = Llama(shape, run.tied)
    model.initialize(torch.Generator().manual_seed(run.seed))
    model.to(device=run.device, dtype=_DTYPES[run.dtype])
    names.prepare(name, model, run.rank)  # what is wrapped has all its parameters
    ranks, called = run.ranks, run.ranks.wrapped(model)
    default = names.PEERS[name] if name in names.PEERS else names.OPTIMIZERS[name].lr
    lr = run.lr if run.lr is not None else default
    build = names.build_peer if name in names.PEERS else names.build
    optimizer = build(name, model, run.rank, lr, **run.options)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _factor(step, run.steps))
    losses: list[float] = []
    if resume is not None:
        saved = torch.load(resume, map_location=run.device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        losses = list(saved["losses"])
    cuda = run.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    # A peer makes its state in the first step, where LiveBytes sees it.
    held = sum(local(p.detach()).nbytes for p in model.parameters()) + names.state_bytes(optimizer)
    peak = held
    step_s: list[float] = []
    run_s: list[float] = []

    def one(step: int) -> float:
        x, y = (ranks.part(z).to(run.device) for z in
                text.batch(data[0], run.batch, run.length, (run.seed << 32) + step))
        loss = _loss(called, x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        _synchronize(run.device)
        start = time.perf_counter()
        optimizer.step()
        _synchronize(run.device)
        step_s.append(time.perf_counter() - start)
        schedule.step()
        optimizer.zero_grad()
        return ranks.mean(loss)

    for step in range(len(losses), run.until):
        start = time.perf_counter()
        if len(run_s) < 2 and not cuda and not ranks.kind:
            with LiveBytes() as live:
                losses.append(one(step))
            peak = max(peak, held + live.peak)
            live_bytes = held + live.live
        else:
            losses.append(one(step))
            live_bytes = torch.cuda.memory_allocated() if cuda else peak
        run_s.append(time.perf_counter() - start)
        report({"step": step + 1, "loss": losses[-1], "memory": live_bytes if cuda else peak,
                "tokens_per_s": run.batch * run.length / run_s[-1]})
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    if save is not None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(), "losses": losses}, save)
    tail = losses[-20:]
    timed = step_s[1:] or step_s
    return {
        "optimizer": name, "valid_loss": _validate(model, data[1], run),
        "train_loss": statistics.fmean(tail) if tail else math.nan,
        "state_bytes": names.state_bytes(optimizer), "peak_bytes": peak,
        "step_ms": 1e3 * statistics.median(timed) if timed else math.nan,
        "step_ms_worst": 1e3 * max(timed) if timed else math.nan,
        "optimizer_share": sum(step_s) / sum(run_s) if run_s else math.nan,
        "model": run.size, "vocabulary": shape.vocabulary, "rank": run.rank, "lr": lr,
        "steps": len(losses), "seed": run.seed, "dtype": run.dtype, "device": run.device,
        "parallel": ranks.kind, "ranks": ranks.size, "options": run.options, "losses": losses,
    }


def _plot(rows: Sequence[dict[str, Any]], file: str) -> None:
    """Loss curves of all rows in one picture, as running means over 10 steps."""
    labels = (f"{row['optimizer']}: validation {row['valid_loss']:.3f}, "
              f"state {row['state_bytes'] / 2**20:.2f} MiB" for row in rows)
    curves.draw(file, ((label, row["losses"]) for label, row in zip(labels, rows, strict=True)),
                window=10, linewidth=1.5, figsize=(8, 5),
                title=f"{rows[0]['model']} LLaMA, {rows[0]['vocabulary']}-byte vocabulary")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lissom-train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", "--optimizer", default="adamw,galore",
                        help="comma-separated, of: " + ", ".join(names.OPTIMIZERS)
                        + "; of other packages: " + ", ".join(names.PEERS))
    parser.add_argument("--size", choices=[*LLAMA], default="tiny")
    parser.add_argument("--tied", action="store_true", help="the head shares the embedding")
    parser.add_argument("--steps", type=int, default=300, help="steps of the schedule")
    parser.add_argument("--until", type=int, help="stop after this step (default: --steps)")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a batch")
    parser.add_argument("--length", type=int, default=128, help="bytes in a sequence")
    parser.add_argument("--lr", help="peak rate; one, or comma-separated as --optimizers")
    parser.add_argument("--lr-adamw", type=float,
                        help="that of what is no matrix of a block, where it has its own")
    names.add_options(parser)
    parser.add_argument("--data", metavar="FILE", help="plain or .xz text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=[*_DTYPES], default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", choices=KINDS,
                        help="under torchrun: the batch is shared out among its ranks")
    parser.add_argument("--json", metavar="FILE", help="write a list with a row per optimizer")
    parser.add_argument("--plot", metavar="FILE.png", default="lissom-train.png",
                        help="all curves in one picture (default lissom-train.png), '' for none")
    parser.add_argument("--save", metavar="FILE",
                        help="checkpoint at the end; FILE.NAME with several optimizers")
    parser.add_argument("--resume", metavar="FILE", help="go on from what --save wrote")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    try:
        import rich.console
        import rich.progress
        import rich.table
    except ImportError:
        raise SystemExit("lissom.bench.train needs its extra: "
                         "pip install 'lissom[bench]'") from None
    parser = _parser()
    args = parser.parse_args(argv)
    curves.check(parser, args.plot)
    chosen = args.optimizers.split(",")
    known = [*names.OPTIMIZERS, *names.PEERS]
    for name in chosen:
        if name not in known:
            parser.error(f"--optimizers {name!r} must be of {', '.join(known)}")
    rates: list[float | None] = [None] * len(chosen)
    if args.lr:
        try:
            rates = [float(x) for x in args.lr.split(",")]
        except ValueError:
            parser.error(f"--lr {args.lr!r} must be a number, or numbers separated by commas")
        rates = rates * len(chosen) if len(rates) == 1 else rates
        if len(rates) != len(chosen):
            parser.error(f"--lr has {len(rates)} rates for {len(chosen)} optimizers")
    if args.steps < 1 or args.batch < 1 or args.length < 1:
        parser.error("--steps, --batch and --length must be >= 1")
    for option in ("save", "resume"):
        if args.parallel and getattr(args, option):
            parser.error(f"--{option} is of one process: with --parallel use "
                         "torch.distributed.checkpoint")
    try:
        ranks = join(args.parallel, args.device, args.batch)
    except ValueError as error:
        parser.error(str(error))

    def place(file: str | None, name: str) -> Path | None:
        if file is None:
            return None
        return Path(file if len(chosen) == 1 else f"{file}.{name}")

    console = rich.console.Console(stderr=True, quiet=ranks.rank > 0)
    try:
        data = text.load(args.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options = names.options_of(args)
    if args.lr_adamw is not None:
        options["lr_adamw"] = args.lr_adamw
    rows = []
    for name, lr in zip(chosen, rates, strict=True):
        run = Run(args.size, args.tied, args.steps, min(args.until or args.steps, args.steps),
                  args.batch, args.length, args.seed, args.device, args.dtype,
                  args.rank or PAPER_RANK[args.size], lr, options, ranks)
        with rich.progress.Progress(
            f"{name:8}", rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(),
            "loss {task.fields[loss]:.3f}", "{task.fields[tokens_per_s]:.0f} tokens/s",
            "{task.fields[mib]:.1f} MiB", rich.progress.TimeRemainingColumn(), console=console,
        ) as progress:
            task = progress.add_task(name, total=run.until, loss=math.nan, tokens_per_s=0.0,
                                     mib=0.0)

            def report(now: dict[str, Any], task: Any = task, progress: Any = progress) -> None:
                progress.update(task, completed=now["step"], loss=now["loss"],
                                tokens_per_s=now["tokens_per_s"], mib=now["memory"] / 2**20)

            try:
                rows.append(train(name, data, run, report, place(args.save, name),
                                  place(args.resume, name)))
            except (OSError, TypeError, ValueError) as error:
                parser.error(f"{name}: {error}")
    ranks.leave()
    if ranks.rank:
        return 0
    table = rich.table.Table(title=f"{args.size} LLaMA, 256-byte vocabulary, {args.dtype}, "
                                   f"{rows[0]['steps']} steps")
    for column in ("optimizer", "valid loss", "train loss", "state MiB", "peak MiB",
                   "ms/step", "share of run"):
        first = column == "optimizer"
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    for row in rows:
        table.add_row(row["optimizer"], f"{row['valid_loss']:.4f}", f"{row['train_loss']:.4f}",
                      f"{row['state_bytes'] / 2**20:.2f}", f"{row['peak_bytes'] / 2**20:.1f}",
                      f"{row['step_ms']:.2f}", f"{row['optimizer_share']:.1%}")
    rich.console.Console().print(table)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        _plot(rows, args.plot)
        console.print(f"curves: {args.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
