"""What a model's weights, gradients and optimizer state take, without the memory for them.

The model and the real optimizer are built on the meta device. Defaults follow the accounting of
the GaLore tables: everything in bfloat16 (2 bytes), 1 GB = 1e9 bytes; their totals leave
gradients out, which are reported apart here.

    python -m lissom.bench.memory --model llama-60m --optimizer galore --rank 128
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import names
from .llama import Llama
from .shapes import LLAMA, PAPER_RANK

__all__ = ["account", "main"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _kind(name: str, shape: tuple[int, ...], heads: set[str], tables: set[str]) -> str:
    if name in tables:
        return "embedding"
    if name in heads:
        return "head"
    return "matrices" if len(shape) >= 2 else "vectors"


def account(model: nn.Module, optimizer_name: str, rank: int | None, **options: Any
            ) -> dict[str, Any]:
    """Bytes of weights, gradients and state, in all and per kind of parameter.

    Beside them ``trainable``, the number of parameters with a gradient, and ``candidates``, the
    bytes of state that a switching optimizer can keep on the host.

    Args:
        model: its parameters say shapes and dtypes; it may be on the meta device.
        optimizer_name: a key of :data:`lissom.bench.names.OPTIMIZERS`.
        rank: rank of projections.
        options: further options of the optimizer's class.
    """
    optimizer = names.build(optimizer_name, model, rank, 1e-3, **options)
    modules = dict(model.named_modules())
    tables = {f"{n}.weight" for n, m in modules.items() if isinstance(m, nn.Embedding)}
    vocabularies = {m.num_embeddings for m in modules.values() if isinstance(m, nn.Embedding)}
    heads = {f"{n}.weight" for n, m in modules.items()
             if isinstance(m, nn.Linear) and m.out_features in vocabularies}
    zero = {"parameters": 0, "weights": 0, "gradients": 0, "optimizer_state": 0}
    by_kind: dict[str, dict[str, int]] = {}
    parameters = dict(model.named_parameters())
    plan = optimizer.plan()
    state = {row.name: row.state_bytes for row in plan}
    rules = {row.name: row.rule for row in plan}
    for name, p in parameters.items():
        kind = _kind(name, tuple(p.shape), heads, tables)
        if kind == "matrices" and rules.get(name, "adamw") != "adamw":
            kind = "low-rank matrices"
        entry = by_kind.setdefault(kind, dict(zero))
        entry["parameters"] += p.numel()
        entry["weights"] += p.nbytes
        entry["gradients"] += p.nbytes if p.requires_grad else 0
        entry["optimizer_state"] += state.get(name, 0)
    total = {key: sum(entry[key] for entry in by_kind.values()) for key in zero}
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    pools = sum(s["candidates"].nbytes for s in optimizer.state.values() if "candidates" in s)
    return {**total, "trainable": trainable, "candidates": pools, "by_kind": by_kind}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="lissom-memory", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", choices=[*LLAMA], default="llama-60m")
    source.add_argument("--module", metavar="PKG.MOD:FACTORY",
                        help="a function without arguments that returns a module")
    parser.add_argument("--optimizer", "--optimizers", choices=[*names.OPTIMIZERS],
                        default="galore")
    names.add_options(parser)
    parser.add_argument("--dtype", choices=[*_DTYPES], default="bf16",
                        help="of the weights (default bf16)")
    parser.add_argument("--json", metavar="FILE", help="write the figures as JSON; - for stdout")
    parser.set_defaults(state_bits=16)
    args = parser.parse_args(argv)

    with torch.device("meta"):
        if args.module:
            place, _, factory = args.module.partition(":")
            if not factory:
                parser.error(f"--module {args.module!r} must be PKG.MOD:FACTORY")
            sys.path.insert(0, "")
            model = getattr(importlib.import_module(place), factory)()
        else:
            model = Llama(LLAMA[args.model])
    model = model.to(_DTYPES[args.dtype])
    rank = args.rank or (PAPER_RANK[args.model] if not args.module else 128)
    options = names.options_of(args)
    try:
        figures = account(model, args.optimizer, rank, **options)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    name = args.module or args.model
    figures["options"] = {"model": name, "optimizer": args.optimizer, "rank": rank,
                          "dtype": args.dtype, **options}
    if not args.module:
        figures["options"]["vocabulary"] = LLAMA[args.model].vocabulary
    text = json.dumps(figures, indent=2)
    if args.json == "-":
        print(text)
        return 0
    if args.json:
        Path(args.json).write_text(text + "\n")
    _show(figures)
    return 0


def _show(figures: dict[str, Any]) -> None:
    chosen = ", ".join(f"{k} {v}" for k, v in figures["options"].items())
    print(chosen)
    columns = ("parameters", "weights", "gradients", "optimizer_state")
    print(f"{'':18}" + "".join(f"{c.replace('_', ' '):>18}" for c in columns))
    for kind, entry in [*figures["by_kind"].items(), ("total", figures)]:
        print(f"{kind:18}" + "".join(f"{entry[c]:>18,}" for c in columns))
    print(f"{'GB (1e9 bytes)':18}{'':>18}"
          + "".join(f"{figures[c] / 1e9:>18.2f}" for c in columns[1:]))
    both = figures["weights"] + figures["optimizer_state"]
    print(f"weights + optimizer state {both / 1e9:.2f} GB, "
          f"with gradients {(both + figures['gradients']) / 1e9:.2f} GB")
    if figures["candidates"]:
        print(f"{figures['candidates'] / 1e9:.2f} GB of the state are candidates, which can stay "
              f"on the host; {figures['trainable'] / 1e6:.1f}M parameters have a gradient")


if __name__ == "__main__":
    raise SystemExit(main())
