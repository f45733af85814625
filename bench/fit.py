"""The largest batch that trains inside a hard memory cap, and how fast.

For each method model and optimizer are built once, in bf16; real training steps on random tokens
are taken with batches that double until one fails, then halve the interval. On CUDA the allocator
holds the cap; on the CPU live tensors are counted and a step that had more is one that failed. The
measured peak stands beside what ``lissom.bench.memory`` expects: weights, gradients, state and
activations.

    python -m lissom.bench.fit --cap 24GiB --json bench/results/fit-7b-24gib.json
    python -m lissom.bench.fit --cap 24GiB --length 2048 --checkpoint
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import clock, names
from .budget import parse_size
from .estimate import RIVALS, count, holdings, passes
from .livebytes import LiveBytes
from .measure import attached, fill, rival
from .shapes import MODELS
from .sources import Source, from_name, loss_of, vocabulary

__all__ = ["METHODS", "Method", "expected", "largest", "main"]

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Method(NamedTuple):
    """A way to train.

    Args:
        optimizer: its name on the command line, or one of ``lissom.bench.estimate.RIVALS``.
        in_backward: what happens to gradients: ``"none"``, ``"project"`` or ``"update"``.
        options: of the optimizer.
    """

    optimizer: str
    in_backward: str = "none"
    options: Mapping[str, Any] = {}


_EIGHT: dict[str, Any] = {"state_bits": 8}
_BASIS: dict[str, Any] = {"state_bits": 8, "basis_bits": 8}

METHODS: dict[str, Method] = {
    "galore 8 bits, project": Method("galore", "project", _BASIS),
    "galore 8 bits, update": Method("galore", "update", _BASIS),
    "dct-adamw 8 bits, project": Method("dct-adamw", "project", _EIGHT),
    "dct-adamw 8 bits, update": Method("dct-adamw", "update", _EIGHT),
    "fira 8 bits, update": Method("fira", "update", _BASIS),
    "apollo 8 bits, update": Method("apollo", "update", _EIGHT),
    "muon 8 bits, update": Method("muon", "update", _EIGHT),
    "adamw 8 bits, update": Method("adamw", "update", _EIGHT),
    "galore 8 bits": Method("galore", "none", _BASIS),
    "adamw 8 bits": Method("adamw", "none", _EIGHT),
    "bitsandbytes AdamW8bit": Method("bnb-adamw8bit"),
    "torch AdamW": Method("torch-adamw"),
}
_PROVIDERS = {"bnb-adamw8bit": "bitsandbytes", "torch-adamw": "torch"}


class _OverCap(torch.OutOfMemoryError):
    """A step had more than the cap, where no allocator refuses."""


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether this, or what it came from, is a lack of memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False


def largest(attempt: Callable[[int], bool], limit: int) -> int:
    """The largest number for which an attempt succeeds, if all smaller ones do; 0 if 1 fails.

    Args:
        attempt: from a number to whether it fits.
        limit: the largest number that is tried.
    """
    fits, fails = 0, limit + 1
    while fits + 1 < fails:
        next_ = min(2 * fits or 1, fails - 1) if fails == limit + 1 else (fits + fails) // 2
        if attempt(next_):
            fits = next_
        else:
            fails = next_
    return fits


def _checkpointed(model: nn.Module) -> None:
    """Keep the inputs of blocks and compute them again in the backward pass."""
    layers: Any = model.layers
    for block in layers:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False,
                                          preserve_rng_state=False)


def expected(source: Source, method: Method, rank: int | None, dtype: torch.dtype, batch: int,
             length: int, checkpointing: bool) -> dict[str, int]:
    """Bytes by the memory script's estimate, and the peak of a training step that they give.

    Activations go as gradients come, so that ``passes``, the most of both at once in a forward and
    backward pass simulated on the meta device, is less than their sum. The step's temporaries are
    not estimated.
    """
    with torch.device("meta"):
        model = source.make().to(dtype)
    held = holdings(method.optimizer, model, rank, **method.options)
    figures = count(held, method.in_backward)
    parts = {k: int(figures[k]) for k in ("weights", "optimizer_state")}
    parts["optimizer_state"] -= int(figures["host"])
    projected = {h.name for h in held if h.buffers} if method.in_backward == "project" else set()
    parts["buffers"] = sum(slot.nbytes for h in held if h.name in projected
                           for slot in h.buffers.values())
    if checkpointing:
        _checkpointed(model)
    freed = [p for name, p in model.named_parameters()
             if method.in_backward == "update" or name in projected]
    parts["passes"] = passes(model, batch, length, freed)
    return {**parts, "total": sum(parts.values())}


class _Run:
    """One method on one device."""

    def __init__(self, args: argparse.Namespace, method: Method, cap: int) -> None:
        self.args, self.method, self.cap = args, method, cap
        self.cuda = args.device == "cuda"
        self.live = LiveBytes()
        with contextlib.ExitStack() as stack:  # left at once if something here fails
            if not self.cuda:
                stack.enter_context(self.live)
            source = from_name(args.model)
            with torch.device("meta"):
                model = source.make().to(_DTYPES[args.dtype])
            self.tokens = vocabulary(model)
            self.model = model.to_empty(device=args.device)
            fill(self.model)
            if method.optimizer in RIVALS:
                self.optimizer = rival(method.optimizer, self.model)
            else:
                self.optimizer = names.build(method.optimizer, self.model,
                                             args.rank or source.rank, 1e-4, **method.options)
            self.hooks = stack.enter_context(contextlib.ExitStack())
            self.attach()
            if args.checkpoint:
                _checkpointed(self.model)
            self.generator = torch.Generator().manual_seed(1)
            self.stack = stack.pop_all()

    def attach(self) -> None:
        """Work in the backward pass from a clean start."""
        self.hooks.close()
        self.hooks.enter_context(attached(self.optimizer, self.method.in_backward))

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.live.peak = self.live.live

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else self.live.peak

    def step(self, batch: int) -> float:
        """Seconds of a training step."""
        tokens = torch.randint(self.tokens, (batch, self.args.length), generator=self.generator)
        tokens = tokens.to(self.args.device)
        start = time.perf_counter()
        loss_of(self.model, tokens).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.cuda:
            torch.cuda.synchronize()
        elif self.peak() > self.cap:
            raise _OverCap(f"{self.peak()} bytes were alive at once")
        return time.perf_counter() - start

    def attempt(self, batch: int, steps: int = 2) -> bool:
        """Whether training steps with this batch fit."""
        self.reset()
        try:
            for _ in range(steps):
                self.step(batch)
        except Exception as error:
            if not _out_of_memory(error):
                raise
            self.optimizer.zero_grad()
        else:
            return True
        # Out of the handler, whose traceback holds the step's tensors.
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        # A backward pass that broke off has used up some gradients: hooks take the next one as the
        # second before a step.
        self.attach()
        return False


def _about(name: str) -> dict[str, Any]:
    """What every row says of its method."""
    provider = _PROVIDERS.get(METHODS[name].optimizer, "lissom")
    return {"method": name, "provider": provider, "version": clock.version(provider)}


def _row(name: str, args: argparse.Namespace, cap: int, deadline: clock.Deadline) -> dict[str, Any]:
    method = METHODS[name]
    row = {**_about(name), "in_backward": method.in_backward, "options": dict(method.options)}
    run: _Run | None = None

    def attempt(batch: int, run: _Run) -> bool:
        if deadline.over():
            row["stopped"] = f"no time left to try {batch}"
            return False
        return run.attempt(batch)

    try:
        if method.optimizer in RIVALS:
            importlib.import_module(row["provider"])  # before the model, which takes longer
        run = _Run(args, method, cap)
        batch = largest(functools.partial(attempt, run=run), args.limit)
        row["batch"] = batch
        if batch:
            run.reset()
            seconds = [run.step(batch) for _ in range(args.steps)]
            row |= {"tokens_per_s": batch * args.length / statistics.median(seconds),
                    "step_s": [min(seconds), statistics.median(seconds), max(seconds)],
                    "peak_bytes": run.peak()}
    except ImportError as error:
        return {**row, "missing": str(error)}
    except Exception as error:
        if not _out_of_memory(error):
            return {**row, "failed": f"{type(error).__name__}: {error}"[:300]}
        row["batch"] = 0  # weights and state alone are too large
    finally:
        if run is not None:
            run.stack.close()
        run = None
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return row


def _expect(row: dict[str, Any], args: argparse.Namespace) -> None:
    """Add what was expected of a measured row."""
    source = from_name(args.model)
    parts = expected(source, METHODS[row["method"]], args.rank or source.rank,
                     _DTYPES[args.dtype], max(1, row["batch"]), args.length, args.checkpoint)
    row["expected"] = parts
    if row.get("peak_bytes"):
        row["peak_of_expected"] = row["peak_bytes"] / parts["total"]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="lissom-fit", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS], default="llama-7b")
    parser.add_argument("--methods", default=";".join(METHODS),
                        help="separated by semicolons (default: all)")
    parser.add_argument("--cap", default="24GiB", help="bytes of the device (default 24GiB)")
    parser.add_argument("--rank", type=int, help="of projections; default: the paper's")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--checkpoint", action="store_true", help="compute activations again")
    parser.add_argument("--limit", type=int, default=256, help="largest batch to try")
    parser.add_argument("--steps", type=int, default=5, help="timed, at the largest batch")
    parser.add_argument("--dtype", choices=[*_DTYPES], default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, help="stop when these are over")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    chosen = args.methods.split(";")
    for name in chosen:
        if name not in METHODS:
            parser.error(f"--methods {name!r} must be of {', '.join(map(repr, METHODS))}")
    try:
        cap = parse_size(args.cap)
    except ValueError as error:
        parser.error(f"--cap {error}")
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: there is no CUDA device")
        total = torch.cuda.get_device_properties(0).total_memory
        if cap > total:
            parser.error(f"--cap {args.cap!r} must be at most the device's {total} bytes")
        torch.cuda.set_per_process_memory_fraction(cap / total)
    deadline = clock.Deadline(args.seconds)
    common = {"model": args.model, "cap": cap, "length": args.length, "dtype": args.dtype,
              "checkpoint": args.checkpoint, **clock.about("fit", argv, args.device)}
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(chosen):
        if deadline.over():
            row = {**_about(name), "skipped": "no time left"}
        else:  # what is left is shared by those that are left
            share = None if args.seconds is None else deadline.left() / (len(chosen) - i)
            row = _row(name, args, cap, clock.Deadline(share))
        rows.append({**row, **common})
        clock.save(args.json, rows)
        if "batch" in row:
            print(f"{name:28} batch {row['batch']:>4} x {args.length}  "
                  + (f"{row['tokens_per_s']:8.0f} tokens/s  peak {row['peak_bytes'] / 2**30:.2f} "
                     "GiB" if row["batch"] else "does not fit"), flush=True)
        else:
            print(f"{name:28} " + next(f"{k}: {row[k]}" for k in ("missing", "failed", "skipped")
                                       if k in row), flush=True)
    # The device's time is for measurements: this is the host's, and comes when they are done.
    for row in rows:
        if "batch" in row:
            _expect(row, args)
            clock.save(args.json, rows)
            print(f"{row['method']:28} expected at batch {max(1, row['batch'])}: "
                  f"{row['expected']['total'] / 2**30:.2f} GiB" + (
                      f", of which the peak is {row['peak_of_expected']:.3f}"
                      if "peak_of_expected" in row else ""), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
