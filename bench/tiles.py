"""Which tiles a GPU works fastest with: where the constants of the kernels come from.

Each kernel is timed with the tiles that it has and with others, by turns, on the work of
:mod:`lissom.bench.kernels`; the line of the present choice ends with a star. What does not compile,
or not in time, is a row that says so. A choice is changed by hand, where it is written down.

    python -m lissom.bench.tiles --json bench/results/tiles.json
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ..kernels import _triton, adam, blocks, lift
from ..kernels.tiles import Tiles
from . import clock, kernels

__all__ = ["CHOICES", "Choice", "main"]


class Choice(NamedTuple):
    """Constants that belong together.

    Args:
        places: modules and names.
        values: of all of them, the present ones or others.
        rows: kernels of :data:`lissom.bench.kernels.CASES` and sizes.
    """

    places: tuple[tuple[ModuleType, str], ...]
    values: tuple[tuple[Any, ...], ...]
    rows: tuple[tuple[str, int], ...]

    def present(self) -> tuple[Any, ...]:
        """The values that the kernels have."""
        return tuple(getattr(*place) for place in self.places)

    @contextlib.contextmanager
    def taken(self, values: tuple[Any, ...]) -> Iterator[None]:
        """Other values, for a while."""
        before = self.present()
        try:
            for place, value in zip(self.places, values, strict=True):
                setattr(*place, value)
            yield
        finally:
            for place, value in zip(self.places, before, strict=True):
                setattr(*place, value)


_LIFTS = (Tiles(128, 128, 64, 8, 8, 3), Tiles(64, 128, 64, 8, 4, 3), Tiles(128, 128, 64, 8, 8, 4),
          Tiles(128, 256, 64, 8, 8, 3), Tiles(256, 128, 64, 8, 8, 3))
#: By name.
CHOICES: Mapping[str, Choice] = {
    "lift": Choice(((lift, "_SHARED"), (lift, "_SLICES")),
                   tuple((tile, slices) for tile in _LIFTS for slices in (4, 2, 1)),
                   (("lift", 4096), ("lift, residual", 4096))),
    "adam": Choice(((blocks, "_TILE"), (adam, "WARPS")),
                   tuple((32 * warps * each, warps) for each in (8, 16) for warps in (2, 4, 8)),
                   (("adamw8, 8 bits", 2**28), ("adam8, 8 bits", 2**28))),
}


def _called(choice: Choice, values: tuple[Any, ...], run: Callable[[str], Any]) -> None:
    with choice.taken(values):
        run("triton")


def _rows(choice: Choice, kernel: str, size: int, bandwidth: float, peak: float, repeats: int,
          deadline: clock.Deadline) -> list[dict[str, Any]]:
    """A row for each of the values, which take turns; the present ones are compiled first."""
    present = choice.present()
    rows: dict[tuple[Any, ...], dict[str, Any]] = {
        values: {"values": [str(x) for x in values], "present": values == present, "kernel": kernel}
        for values in sorted(choice.values, key=lambda x: x != present)}
    calls: dict[str, Callable[[], None]] = {}
    work: kernels.Work | None = None
    for values, row in rows.items():
        if deadline.over():
            row["skipped"] = "no time left"
            continue
        try:
            work = work or kernels.CASES[kernel][1](size, "cuda", torch.bfloat16)
            call = functools.partial(_called, choice, values, work.run)
            call()
            torch.cuda.synchronize()
            calls[str(values)] = call
        except Exception as error:  # more memory or registers than there are, say
            row["failed"] = clock.first_line(error)
    if work is not None and calls:
        taken = clock.times(calls, repeats, "cuda", ahead=True)
        for values, row in rows.items():
            if str(values) in taken:
                ms = statistics.median(taken[str(values)])
                row |= {"ms": ms, "repeats": repeats, "dtype": "bfloat16",
                        **kernels.judged(kernel, size, work, ms, bandwidth, peak)}
    return list(rows.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each choice and kernel, and write rows as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--choices", default=";".join(CHOICES),
                        help=f"names separated by semicolons (default {';'.join(CHOICES)})")
    parser.add_argument("--device", choices=("cuda", "cpu"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="stop when these are over")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args(argv)
    chosen = args.choices.split(";")
    for name in chosen:
        if name not in CHOICES:
            parser.error(f"--choices {name!r} must be of {', '.join(map(repr, CHOICES))}")
    rows: list[dict[str, Any]] = []
    about = clock.about("tiles", argv, args.device)
    if args.device != "cuda" or _triton.triton is None:
        print("no CUDA device with Triton: tiles are nothing to torch, so there is nothing to time")
        clock.save(args.json, [{"skipped": "no CUDA device with Triton", **about}])
        return 0
    deadline = clock.Deadline(args.seconds)
    bandwidth, peak = clock.copy_bandwidth("cuda"), clock.product_peak("cuda")
    left = sum(len(CHOICES[name].rows) for name in chosen)
    for name in chosen:
        for kernel, size in CHOICES[name].rows:
            # What is left is shared by those that are left.
            share = None if args.seconds is None else deadline.left() / left
            left -= 1
            for row in _rows(CHOICES[name], kernel, size, bandwidth, peak, args.repeats,
                             clock.Deadline(share)):
                rows.append({"choice": name, "provider": "lissom", **row, **about})
                said = (f"{row['share_of_roofline']:.1%} of the roofline"
                        if "share_of_roofline" in row else row.get("failed") or row["skipped"])
                print(f"{kernel:18} {' '.join(row['values'])}: {said}"
                      + " *" * row["present"], flush=True)
            clock.save(args.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
