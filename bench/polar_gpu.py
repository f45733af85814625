"""Five Newton-Schulz steps in bf16 on a GPU: our symmetric kernels against the compiled iteration.

Contestants alternate on the same matrices; times are medians of CUDA events. The peak is the best
rate of torch's own bf16 product at several sizes, in the same run. Without CUDA one row says so.

    python -m lissom.bench.polar_gpu --json bench/results/polar-h100.json
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import _triton, symmul
from . import clock

__all__ = ["main"]

_SHAPES = ((2048, 2048), (4096, 4096), (8192, 8192), (4096, 11008), (16, 1024, 1024))
_STEPS = 5
# Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def _plain(x: Tensor) -> Tensor:
    """The iteration as released, for torch.compile."""
    for _ in range(_STEPS):
        s = x @ x.mT
        x = _A * x + (_B * s + _C * s @ s) @ x
    return x


def _steps(backend: str) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for _ in range(_STEPS):
            x = symmul.newton_schulz_step(x, _A, _B, _C, backend=backend)
        return x

    return run


def _measure(shape: tuple[int, ...], peak: float, repeats: int) -> dict[str, Any]:
    """One row: five steps, and the products of one."""
    x = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    x = (x / x.norm(dim=(-2, -1), keepdim=True)).bfloat16()
    batch, m, n = (1, *shape)[-3:]
    # Two products with X and the square of S; of ours two are symmetric, at half the operations.
    general = _STEPS * batch * (4 * m * m * n + 2 * m**3)
    needed = _STEPS * batch * (3 * m * m * n + m**3)
    torch.compiler.reset()  # for the shape alone: a second one would be compiled for any
    compiled, ours = torch.compile(_plain, dynamic=False), _steps("triton")
    ms = clock.medians({"lissom": lambda: ours(x), "compiled": lambda: compiled(x),
                 "torch": lambda: _steps("torch")(x)}, repeats)
    s = symmul.syrk(x, backend="triton")
    parts = clock.medians({"syrk": lambda: symmul.syrk(x, backend="triton"),
                    "syrk_torch": lambda: x @ x.mT,
                    "symm_muladd": lambda: symmul.symm_muladd(s, _B, _C, backend="triton"),
                    "symm_muladd_torch": lambda: symmul.symm_muladd(s, _B, _C, backend="torch"),
                    "product": lambda: s @ x}, repeats)
    exact, got, plain = x.double(), ours(x).double(), compiled(x).double()
    exact = _plain(exact)
    return {
        "shape": list(shape), "dtype": "bfloat16", "steps": _STEPS, "repeats": repeats,
        "ms": ms, "speedup_over_compiled": ms["compiled"] / ms["lissom"],
        "share_of_peak": {"lissom": needed / (ms["lissom"] * 1e-3) / peak,
                          "lissom, counted as general products":
                              general / (ms["lissom"] * 1e-3) / peak,
                          "compiled": general / (ms["compiled"] * 1e-3) / peak},
        "parts_ms": parts, "peak_tflops": peak / 1e12,
        "error": {"lissom": ((got - exact).norm() / exact.norm()).item(),
                  "compiled": ((plain - exact).norm() / exact.norm()).item()},
        "symmetric": bool(torch.equal(s, s.mT)),
    }


def _sweep(shape: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of the two symmetric products by tiles, to choose the table from."""
    x = torch.randn(shape, device="cuda").bfloat16()
    chosen = symmul._tiles
    rows = []
    for size, depth, warps, stages in ((128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3),
                                       (128, 32, 8, 4), (128, 128, 8, 2), (64, 64, 4, 4),
                                       (64, 64, 4, 3), (64, 128, 4, 3)):
        for side in (512, 1024, 2048):
            tiles = symmul.SquareTiles(size, depth, side, warps, stages)
            try:
                symmul._tiles = lambda *_, tiles=tiles: tiles
                s = symmul.syrk(x, backend="triton") / 1e4
                ms = clock.medians({
                    "syrk": functools.partial(symmul.syrk, x, backend="triton"),
                    "symm_muladd": functools.partial(symmul.symm_muladd, s, _B, _C,
                                                     backend="triton")}, repeats)
            finally:
                symmul._tiles = chosen
            rows.append({"shape": list(shape), "tiles": tiles._asdict(), "ms": ms})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sweep", action="store_true", help="time other tiles instead")
    parser.add_argument("--seconds", type=float, help="begin no further shape when these are over")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    deadline = clock.Deadline(args.seconds)
    cuda = torch.cuda.is_available()
    common = {"provider": "lissom", **clock.about("polar_gpu", argv, "cuda" if cuda else "cpu")}
    rows: list[dict[str, Any]] = []
    if not cuda or _triton.triton is None:
        missing = "no Triton" if cuda else "no CUDA device"
        rows.append({"skipped": missing, **common})
        print(f"skipped: {missing}")
    else:
        peak = 0.0 if args.sweep else clock.product_peak("cuda", args.repeats)
        for shape in _SHAPES:
            if deadline.over():
                rows.append({"shape": list(shape), "skipped": "no time left", **common})
                continue
            try:
                made = _sweep(shape, args.repeats) if args.sweep else [
                    _measure(shape, peak, args.repeats)]
            except Exception as error:  # of this shape alone: more memory than there is, say
                made = [{"shape": list(shape), "failed": clock.first_line(error)}]
            for row in made:
                rows.append({**row, **common})
                print(json.dumps(row), flush=True)
            clock.save(args.json, rows)
    clock.save(args.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
