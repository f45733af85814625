"""What a step costs the processor that issues it to a GPU, without one.

Kernels are compiled for an architecture and launched into nothing: all that Python, torch and
Triton do on the way is done, on tensors of the CPU. Matrices are small, and the product that
projects one, which torch then computes, is timed apart and taken off. What the driver takes to
start a kernel, some microseconds, is left out.

    python -m lissom.bench.host --json bench/results/host.json
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels, optim
from ..kernels import _triton
from . import clock

__all__ = ["main", "nowhere"]

# Shape and rank: R has the 4096 elements from which moments are quantized.
_SHAPE, _RANK, _COUNT = (512, 16), 8, 56
#: Optimizers by name, with options beside a rate.
_STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("AdamW", {}),
    "AdamW, 8 bits": ("AdamW", {"state_bits": 8}),
    "GaLoreAdamW": ("GaLoreAdamW", {"rank": _RANK}),
    "GaLoreAdamW, 8 bits": ("GaLoreAdamW", {"rank": _RANK, "state_bits": 8, "basis_bits": 8}),
    "DCTAdamW, gap 200, 8 bits": ("DCTAdamW", {"rank": _RANK, "state_bits": 8,
                                               "update_proj_gap": 200}),
    "DCTAdamW, every step, 8 bits": ("DCTAdamW", {"rank": _RANK, "state_bits": 8}),
    "FiraAdamW, 8 bits": ("FiraAdamW", {"rank": _RANK, "state_bits": 8, "basis_bits": 8}),
    "APOLLO, 8 bits": ("APOLLO", {"rank": _RANK, "state_bits": 8}),
}


def nowhere(launched: Callable[..., None], capability: int = 90) -> None:
    """Make Triton compile for an architecture and call a function where it would launch.

    For this process, and CPU tensors; kernels are taken in place of torch by default.

    Args:
        launched: gets what was compiled, numbers of programs, and the kernel's arguments.
        capability: of the architecture.
    """
    compiler = importlib.import_module("triton.backends.compiler")
    cuda = importlib.import_module("triton.backends.nvidia.driver")
    runtime = importlib.import_module("triton.runtime.driver")

    class Utilities:
        def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
            return 1, 1, 64, 0, 1024

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32,
                    "max_num_regs": 65536}

    class Driver(cuda.CudaDriver):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.utils = Utilities()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
            # Programs in three dimensions; stream, function, metadata and hooks; arguments.
            return lambda *args: launched(source, args[:3], args[-len(source.fn.params):])

        def get_current_target(self) -> Any:
            return compiler.GPUTarget("cuda", capability, 32)

    runtime.driver.set_active(Driver())

    def able(backend: str | None, device: torch.device) -> bool:
        return backend != "torch"

    for name, module in list(sys.modules.items()):
        if name.startswith((kernels.__name__, optim.__name__)) and hasattr(module, "use_triton"):
            setattr(module, "use_triton", able)  # noqa: B010


def _weights() -> list[tuple[str, Tensor]]:
    made: list[tuple[str, Tensor]] = []
    for i in range(_COUNT):
        p = torch.nn.Parameter(torch.randn(_SHAPE).bfloat16())
        p.grad = torch.randn(_SHAPE).bfloat16()
        made.append((f"weight{i}", p))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each optimizer, and write rows as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=30, help="steps that count (default 30)")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args(argv)
    if _triton.triton is None or _triton.INTERPRETED:
        parser.error("needs triton, and TRITON_INTERPRET unset: nothing is compiled with it")
    torch.set_num_threads(1)
    launches = 0

    def launched(source: Any, programs: Any, arguments: Any) -> None:
        nonlocal launches
        launches += 1

    nowhere(launched)
    about, rows = clock.about("host", argv, "cpu"), []
    made = {name: getattr(optim, kind)(_weights(), lr=1e-4, **options)
            for name, (kind, options) in _STEPS.items()}
    taken: dict[str, list[float]] = {name: [] for name in made}
    count = dict.fromkeys(made, float("inf"))
    g, q = (torch.randn(shape).bfloat16() for shape in (_SHAPE, (_SHAPE[1], _RANK)))
    for i in range(args.repeats + 3):  # by turns; the first ones compile and find bases
        start = time.perf_counter()
        for _ in range(_COUNT):
            g @ q
        product = time.perf_counter() - start
        for name, optimizer in made.items():
            # Kernels that went nowhere have found whatever was in memory, or nothing: it counts.
            for state in optimizer.state.values() if i == 3 else ():
                if "basis_step" in state:
                    state["basis_step"].clamp_(min=1)
            before, start = launches, time.perf_counter()
            optimizer.step()
            if i >= 3:
                spent = time.perf_counter() - start
                if "rank" in _STEPS[name][1]:
                    spent -= product
                taken[name].append(1e6 * spent / _COUNT)
                # Of a step without a refresh, where there was one.
                count[name] = min(count[name], (launches - before) / _COUNT)
    for name, times in taken.items():
        low, middle, high = statistics.quantiles(times, n=4)
        rows.append({"optimizer": name, "us_per_matrix": middle, "quartiles_us": [low, high],
                     "launches_per_matrix": count[name], **about})
        print(f"{name:28} {middle:6.0f} us a matrix ({low:.0f} to {high:.0f}), "
              f"{count[name]:.2f} kernels")
    clock.save(args.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
