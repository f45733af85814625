"""What a training run takes, before it runs: weights, gradients, optimizer state, activations.

Model and real optimizer are built on the meta device, so that no memory is needed, and what they
would keep is added up. Weights, gradients and state follow the accounting of the GaLore tables:
bfloat16 (2 bytes), 1 GB = 1e9 bytes; those tables leave gradients and activations out of their
totals. ``--state-bits 32`` counts the state that the classes have by default. ``--measure`` takes
real steps instead.

    python -m lissom.bench.memory --model llama-7b --state-bits 8
    python -m lissom.bench.memory --model llama-7b --budget 24GiB
    python -m lissom.bench.memory --model llama-7b --ranks 1,8,64,512
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import optim
from . import budget, curves, names, sources
from .estimate import IN_BACKWARD, RIVALS, activations, count, holdings, modes
from .measure import measure
from .shapes import MODELS
from .sources import Source

__all__ = ["account", "estimate", "main"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Optimizers of the table; what else is on the command line differs from these in rates alone.
_ALL = (*RIVALS, *(x for x in names.OPTIMIZERS if not x.endswith("two-rates")))
_PARTS = ("weights", "gradients", "optimizer_state", "activations", "gathered")
_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")


def account(model: nn.Module, optimizer_name: str, rank: int | None, **options: Any
            ) -> dict[str, Any]:
    """Bytes of weights, gradients and state on one device, in all and per kind of parameter.

    Args:
        model: its parameters say shapes and dtypes; it may be on the meta device.
        optimizer_name: a key of :data:`lissom.bench.names.OPTIMIZERS` or of
            :data:`lissom.bench.estimate.RIVALS`.
        rank: rank of projections.
        options: further options of the optimizer's class.

    Returns:
        As :func:`lissom.bench.estimate.count`.
    """
    return count(holdings(optimizer_name, model, rank, **options))


def estimate(source: Source, name: str, rank: int | None, *, dtype: torch.dtype, batch: int,
             length: int, ranks: Sequence[int] = (1,), in_backward: str = "none", **options: Any
             ) -> list[dict[str, Any]]:
    """One row of bytes for each number of ranks; ``activations`` is None where unknown.

    Args:
        source: the model.
        name: of an optimizer, as in :func:`account`.
        rank: of projections.
        dtype: of the weights; an optimizer of another package may have its own.
        batch: sequences of a micro-batch.
        length: tokens of a sequence.
        ranks: over how many FSDP2 shards.
        in_backward: what happens to gradients, as in :func:`lissom.bench.estimate.count`; where
            it is refused, they wait for the step.
        options: further options of the optimizer's class.
    """
    if name in RIVALS:
        dtype = RIVALS[name].dtype or dtype

    def empty() -> nn.Module:
        with torch.device("meta"):
            return source.make().to(dtype)

    model = empty()
    held = holdings(name, model, rank, **options)
    try:
        active: int | None = activations(model, batch, length)
    except ValueError:
        active = None
    rows = []
    accepted = in_backward in modes(name, empty(), rank, **options)
    for n in ranks:
        row = {"optimizer": name, "dtype": str(dtype).removeprefix("torch."),
               **count(held, in_backward if accepted else "none", n), "activations": active}
        row["total"] = sum(row[k] or 0 for k in _PARTS) - row["host"]
        rows.append(row)
    return rows


# -------------------------------------------------------------------- command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lissom-memory", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", choices=[*MODELS], default="llama-60m")
    source.add_argument("--config", metavar="FILE",
                        help="config.json of a Hugging Face model (extra hf)")
    source.add_argument("--module", metavar="PKG.MOD:FACTORY",
                        help="a function without arguments that returns a module")
    parser.add_argument("--optimizers", "--optimizer", default="all",
                        help="all (default), or comma-separated, of: "
                        + ", ".join([*RIVALS, *names.OPTIMIZERS]))
    names.add_options(parser)
    parser.add_argument("--dtype", choices=[*_DTYPES], default="bf16",
                        help="of the weights (default bf16)")
    parser.add_argument("--in-backward", choices=IN_BACKWARD,
                        help="what happens to gradients: they wait for the step (none, the "
                        "default), project_in_backward, update_in_backward")
    parser.add_argument("--ranks", default="1",
                        help="per-GPU bytes under FSDP2, for these numbers of ranks: 1,8,64")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--budget", metavar="SIZE",
                        help="24GiB, 24GB: what fits, at which rank and bits, and the line of code")
    parser.add_argument("--reserve", metavar="SIZE", default="1GiB",
                        help="of the budget, for what is not estimated: the device's context, "
                        "temporaries of a step, fragmentation (default 1GiB)")
    parser.add_argument("--measure", action="store_true", help="take real steps and measure")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="for --measure")
    parser.add_argument("--steps", type=int, default=3, help="for --measure, >= 2 (default 3)")
    parser.add_argument("--json", metavar="FILE",
                        help="write a list with one row per result; - for stdout")
    parser.add_argument("--plot", metavar="FILE.png", help="stacked bars of the rows")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = _parser()
    args = parser.parse_args(argv)
    curves.check(parser, args.plot)
    args.command = names.command("memory", argv)
    try:
        if args.module:
            source = sources.from_factory(args.module)
        elif args.config:
            source = sources.from_config(args.config)
        else:
            source = sources.from_name(args.model)
        if not all(x.isdigit() for x in args.ranks.split(",")):
            raise ValueError(f"--ranks {args.ranks!r} must be ints >= 1, separated by commas")
        ranks = [int(x) for x in args.ranks.split(",")]
        size = budget.parse_size(args.budget) if args.budget else 0
        reserve = budget.parse_size(args.reserve)
    except ValueError as error:
        parser.error(str(error))
    if min(ranks) < 1 or args.batch < 1 or args.length < 1 or args.steps < 2:
        parser.error("--ranks, --batch and --length must be >= 1, --steps >= 2")
    chosen = [*_ALL] if args.optimizers == "all" else args.optimizers.split(",")
    for name in chosen:
        if name not in RIVALS and name not in names.OPTIMIZERS:
            parser.error(f"--optimizers {name!r} must be all, or of "
                         f"{', '.join([*RIVALS, *names.OPTIMIZERS])}")
    if args.optimizers == "all" and max(ranks) > 1:
        chosen.remove("bnb-adamw8bit")  # it does not know sharded parameters
    if args.optimizers == "all" and args.measure:
        chosen = [x for x in chosen if x != "bnb-adamw8bit" or _installed("bitsandbytes")]
    options = names.options_of(args)
    try:
        if args.budget:
            rows = _budget(source, size, reserve, args, chosen, ranks, options)
        elif args.measure:
            rows = _measured(source, args, chosen, options)
        else:
            rows = _estimated(source, args, chosen, ranks, options)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    if args.json == "-":
        print(json.dumps(rows, indent=1))
    elif args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        _plot(rows, args.plot, size)
    return 0


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def _about(source: Source, args: argparse.Namespace) -> dict[str, Any]:
    """What every row says of its origin."""
    about = {"provider": "lissom", "model": source.name, "batch": args.batch,
             "length": args.length, "torch": torch.__version__,
             "commit": names.commit(), "command": args.command}
    if not args.module and not args.config:
        about["vocabulary"] = MODELS[args.model].vocabulary
    return about


def _options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of one optimizer: 16-bit moments, as in the papers, unless its name says 8."""
    if name == "adamw8bit":
        return options
    return {"state_bits": 16, **options}


def _own(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those that the optimizer has."""
    if name in RIVALS:
        return {}
    table = names.OPTIMIZERS[name].make.table()
    return {k: v for k, v in options.items() if k in table}


def _estimated(source: Source, args: argparse.Namespace, chosen: Sequence[str],
               ranks: Sequence[int], options: dict[str, Any]) -> list[dict[str, Any]]:
    about = {**_about(source, args), "device": "meta"}
    rows = []
    rank = args.rank or source.rank
    for name in chosen:
        own = _options(name, options)
        for row in estimate(source, name, rank, dtype=_DTYPES[args.dtype], batch=args.batch,
                            length=args.length, ranks=ranks,
                            in_backward=args.in_backward or "none", **own):
            rows.append({**about, "rank": rank, **row, "options": _own(name, own)})
    if args.json != "-":
        bits = options.get("state_bits", "16 as in the papers (the classes' default is 32)")
        print(f"{source.name}, {args.dtype} weights, rank {rank}, state_bits {bits}"
              + (f"; activations of {args.batch} x {args.length} tokens"
                 if any(row["activations"] for row in rows) else ""))
        if len(rows) == 1:
            _show_kinds(rows[0])
        else:
            _show(rows, [x for x in _PARTS if any(row[x] for row in rows)])
        pools = max(row["candidates"] for row in rows)
        if pools:
            print(f"{pools / 1e9:.2f} GB of switchlora's state are candidates, which can stay on "
                  "the host (--candidate-device cpu)")
    return rows


def _measured(source: Source, args: argparse.Namespace, chosen: Sequence[str],
              options: dict[str, Any]) -> list[dict[str, Any]]:
    about = {**_about(source, args), "device": _device(args.device), "dtype": args.dtype}
    rows = []
    rank = args.rank or source.rank
    for name in chosen:
        own = _options(name, options)
        with torch.device("meta"):
            model = source.make()
        mode = args.in_backward or "none"
        if mode not in modes(name, model, rank, **own):
            mode = "none"
        keywords = {"dtype": _DTYPES[args.dtype], "device": args.device, "batch": args.batch,
                    "length": args.length, "steps": args.steps, "in_backward": mode, **own}
        # a process of its own, so that nothing of the last one is in memory
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            row = pool.apply(_measure_one, ((args.module, args.config, args.model), name, rank,
                                            keywords))
        rows.append({**about, "rank": rank, **row, "total": row["peak"],
                     "options": _own(name, own)})
    if args.json != "-":
        print(f"{source.name}, {args.dtype} weights, rank {rank}, {args.batch} x {args.length} "
              f"tokens, measured on {rows[0]['device']}")
        _show(rows, ["weights", "optimizer_state", "activations", "gradients", "temporaries",
                     "resident"], "peak")
    return rows


def _measure_one(place: tuple[str | None, str | None, str], name: str, rank: int,
                 keywords: dict[str, Any]) -> dict[str, Any]:
    module, config, model = place
    source = (sources.from_factory(module) if module else sources.from_config(config) if config
              else sources.from_name(model))
    return measure(source, name, rank, **keywords)


def _device(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()


def _budget(source: Source, size: int, reserve: int, args: argparse.Namespace,
            chosen: Sequence[str], ranks: Sequence[int], options: dict[str, Any]
            ) -> list[dict[str, Any]]:
    if len(ranks) > 1:
        raise ValueError(f"--ranks {args.ranks} must be one number with --budget")
    tried = tuple(x for x in budget.CANDIDATES if x in chosen)
    if not tried:
        raise ValueError(f"--optimizers {args.optimizers} must be or have one of "
                         f"{', '.join(budget.CANDIDATES)} with --budget")
    found = budget.choices(source, size, dtype=_DTYPES[args.dtype], reserve=reserve,
                           batch=args.batch, length=args.length, ranks=ranks[0], rank=args.rank,
                           in_backward=args.in_backward, optimizers=tried, **options)
    rows: list[dict[str, Any]] = []
    for x in found:
        rows.append({**_about(source, args), "device": "meta", "dtype": args.dtype,
                     **x.figures, "optimizer": x.optimizer, "rank": x.rank, "state_bits": x.bits,
                     "total": x.total, "reserve": reserve, "budget": size, "fits": x.fits,
                     "line": x.line})
    if args.json != "-":
        print(f"{source.name}, {args.dtype} weights, {args.batch} x {args.length} tokens"
              + (f", {ranks[0]} ranks" if ranks[0] > 1 else "")
              + f"; {_gib(size)} GiB, of which {_gib(reserve)} GiB stay in reserve")
        fitting = [row for row in rows if row["fits"]]
        _lines([("optimizer", "in backward", "rank", "bits", "weights", "state", "gradients",
                 "activations", "GiB in all")] + [
            (row["optimizer"], row["in_backward"], str(row["rank"] or ""), str(row["state_bits"]),
             _gib(row["weights"]), _gib(row["optimizer_state"] - row["host"]),
             _gib(row["gradients"]), _gib(row["activations"]), _gib(row["total"]))
            for row in fitting], left=2)
        for row in rows:
            if not row["fits"]:
                print(f"{row['optimizer']} does not fit: {_gib(row['total'])} GiB at least")
        if fitting:
            words = re.findall(r"\w+", " ".join(row["line"] for row in fitting))
            print(f"\nfrom lissom.optim import {', '.join(sorted({*words} & {*optim.__all__}))}")
        for row in fitting:
            print(row["line"])
    return rows


# -------------------------------------------------------------------- tables and picture


def _gib(count_: int) -> str:
    return f"{count_ / 2**30:.2f}"


def _lines(table: Sequence[tuple[str, ...]], left: int = 1) -> None:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(w) if i < left else cell.rjust(w)
                        for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip())


def _unit(rows: Sequence[dict[str, Any]]) -> tuple[float, str]:
    return (1e9, "GB") if max(row["total"] for row in rows) >= 5e9 else (1e6, "MB")


def _label(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Name of a row, with its ranks and what happens to its gradients where rows differ in it."""
    parts = [row["optimizer"]]
    if "state_bits" in row:  # of a budget
        parts += [f"rank {row['rank']}"] if row["rank"] else []
        parts.append(f"{row['state_bits']} bits")
    if any(x["in_backward"] != "none" for x in rows):
        parts.append(row["in_backward"])
    if any(x.get("ranks", 1) > 1 for x in rows):
        parts.append(f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}")
    return ", ".join(parts)


def _show(rows: Sequence[dict[str, Any]], parts: Sequence[str], last: str = "total") -> None:
    scale, unit = _unit(rows)
    head = (f"{unit} (1e{len(str(int(scale))) - 1} bytes)", *(x.replace("_", " ") for x in parts),
            last)

    def cell(x: int | None) -> str:
        return "" if x is None else f"{x / scale:.2f}"

    _lines([head, *((_label(row, rows), *(cell(row[x]) for x in parts), cell(row[last]))
                    for row in rows)])


def _show_kinds(row: dict[str, Any]) -> None:
    """One row in detail: kinds of parameters apart, exact bytes."""
    columns = ("parameters", "weights", "gradients", "optimizer_state")
    kinds = [*row["by_kind"].items(), ("total", row)]
    _lines([(_label(row, [row]), *(x.replace("_", " ") for x in columns))] + [
        (kind, *(f"{entry[x]:,}" if x in entry else "" for x in columns)) for kind, entry in kinds])
    both = row["weights"] + row["optimizer_state"]
    text = (f"weights + optimizer state {both / 1e9:.2f} GB, "
            f"with gradients {(both + row['gradients']) / 1e9:.2f} GB")
    if row["activations"] is not None:
        text += f", with activations {(both + row['gradients'] + row['activations']) / 1e9:.2f} GB"
    print(text)
    if row["trainable"] != row["parameters"]:
        print(f"{row['trainable'] / 1e6:.1f}M parameters have a gradient")


def _plot(rows: Sequence[dict[str, Any]], file: str, size: int) -> None:
    """Stacked bars, one for each row; the budget as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = "temporaries" in rows[0]
    parts = ["weights", "optimizer_state", "gradients", "activations",
             "temporaries" if measured else "gathered"]
    scale, unit = (2**30, "GiB") if size else _unit(rows)
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.36 * len(rows)), layout="constrained")
    labels = [_label(row, rows) for row in rows]
    left = [0.0] * len(rows)
    for part, colour in zip(parts, _COLOURS, strict=True):
        widths = [(row.get(part) or 0) - (row.get("host", 0) if part == "optimizer_state" else 0)
                  for row in rows]
        if any(widths):
            axes.barh(range(len(rows)), [w / scale for w in widths], left=left, color=colour,
                      label=part.replace("_", " "))
        left = [a + w / scale for a, w in zip(left, widths, strict=True)]
    if size:
        axes.barh(range(len(rows)), [row["reserve"] / scale for row in rows], left=left,
                  color="0.8", label="reserve")
        axes.axvline(size / scale, color="black", linestyle="--", label="budget")
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    of = rows[0]
    axes.set(xlabel=unit, title=f"{of['model']}, {of['batch']} x {of['length']} tokens"
             + (", measured" if measured else ""))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
