"""Times on a device, the best that it can do, and what every result says of its making."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..kernels import _triton
from . import names

__all__ = ["Deadline", "about", "busy", "copy_bandwidth", "first_line", "medians", "processor",
           "product_peak", "save", "times", "version"]


class Deadline:
    """Seconds that a script may take; None is no limit."""

    def __init__(self, seconds: float | None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, negative when they are over."""
        return float("inf") if self.end is None else self.end - time.monotonic()

    def over(self) -> bool:
        return self.left() <= 0


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")),
                platform.processor())


def about(module: str, argv: Sequence[str] | None, device: str) -> dict[str, Any]:
    """Device, versions, commit and command of a result."""
    row: dict[str, Any] = {
        "device": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "triton": getattr(_triton.triton, "__version__", None), "python":
        platform.python_version(), "commit": names.commit(),
        "command": names.command(module, argv)}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {"device": properties.name, "cuda": torch.version.cuda,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory, "processors":
                properties.multi_processor_count}
    return row


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(error: BaseException, length: int = 200) -> str:
    """What a row says of an error: its first line, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:length]


def times(contestants: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cuda",
          warm: int = 3, ahead: bool = False, fewer: Mapping[str, int] | None = None
          ) -> dict[str, list[float]]:
    """Milliseconds of each, by turns, after some rounds to warm up.

    Args:
        contestants: calls by name.
        repeats: rounds that count.
        device: ``"cuda"``, by events, or ``"cpu"``.
        warm: rounds before.
        ahead: on CUDA the device is first given other work, which leaves nothing in its cache, and
            no round waits for the one before, so that its time counts and not the host's.
        fewer: rounds that count of those contestants that would take most of the time.
    """
    rounds = {k: min(repeats, (fewer or {}).get(k, repeats)) + warm for k in contestants}
    cuda = device == "cuda"
    other = torch.empty(2**28 if cuda and ahead else 0, dtype=torch.uint8, device=device)
    events: dict[str, list[tuple[Any, Any]]] = {k: [] for k in contestants}
    taken: dict[str, list[float]] = {k: [] for k in contestants}
    for i in range(repeats + warm):
        for name, call in contestants.items():
            if i >= rounds[name]:
                continue
            if cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                if ahead:  # a third of a millisecond and more
                    for _ in range(4):
                        other.zero_()
                begin.record()
                call()
                end.record()
                if not ahead:
                    torch.cuda.synchronize()
                if i >= warm:
                    events[name].append((begin, end))
            else:
                start = time.perf_counter()
                call()
                if i >= warm:
                    taken[name].append(1e3 * (time.perf_counter() - start))
    if cuda:
        torch.cuda.synchronize()
        taken = {k: [a.elapsed_time(b) for a, b in v] for k, v in events.items()}
    return taken


def medians(contestants: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cuda"
            ) -> dict[str, float]:
    """Median milliseconds of each, the host ahead; see :func:`times`."""
    return {k: statistics.median(v)
            for k, v in times(contestants, repeats, device, ahead=True).items()}


def busy(call: Callable[[], Any], repeats: int = 7) -> tuple[float, float]:
    """Milliseconds of the host to issue a call to CUDA, and of the device where that is ahead.

    A training step issues its optimizer's while the device is still at the backward pass: what
    counts then is the device, and what is seen alone is the larger of both.
    """
    other = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    fill = medians({"fill": other.zero_}, 5)["fill"]
    host, device = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - start))
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2 + int(statistics.median(host) / fill)):
            other.zero_()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        device.append(begin.elapsed_time(end))
    return statistics.median(host), statistics.median(device)


def copy_bandwidth(device: str, repeats: int = 20) -> float:
    """Bytes per second that a copy reads and writes, the best of several sizes."""
    best = 0.0
    for size in (2**28, 2**30) if device == "cuda" else (2**24, 2**26):
        x = torch.empty(size, dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        ms = medians({"copy": functools.partial(y.copy_, x)}, repeats, device)["copy"]
        best = max(best, 2 * size / (ms * 1e-3))
    return best


def product_peak(device: str, repeats: int = 20) -> float:
    """Operations per second of the fastest product: bf16 on CUDA, fp32 on the CPU."""
    best = 0.0
    cuda = device == "cuda"
    for n in (4096, 8192, 12288) if cuda else (512, 1024):
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
                for _ in range(2))
        ms = medians({"product": functools.partial(torch.mm, a, b)}, repeats, device)["product"]
        best = max(best, 2 * n**3 / (ms * 1e-3))
    return best


def save(file: str | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON, one a line; the file is whole at any time."""
    if file is None:
        return
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    part = Path(f"{file}.part")
    part.write_text(text)
    os.replace(part, file)
