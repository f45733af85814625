"""Bytes to train on: the standard library's sources, or a file."""

from __future__ import annotations

import lzma
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["batch", "load"]

_LIMIT = 16 << 20  # bytes of the standard library that are read


def _standard_library() -> tuple[bytes, bytes]:
    """Training and validation bytes: every twentieth source file is kept aside."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in root.rglob("*.py")
                   if not {"site-packages", "test", "tests"} & set(f.relative_to(root).parts))
    parts: tuple[list[bytes], list[bytes]] = [], []
    size = 0
    for i, file in enumerate(files):
        data = file.read_bytes()
        size += len(data)
        parts[i % 20 == 19].append(data)
        if size > _LIMIT:
            break
    return b"".join(parts[0]), b"".join(parts[1])


def load(file: str | None) -> tuple[Tensor, Tensor]:
    """Training and validation bytes, uint8.

    Args:
        file: plain or .xz text, whose last twentieth validates; None for Python's own sources.

    Raises:
        ValueError: the text is too short to train on.
    """
    if file is None:
        train, valid = _standard_library()
    else:
        path = Path(file)
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        cut = len(data) - len(data) // 20
        train, valid = data[:cut], data[cut:]
    if len(valid) < 2048:
        raise ValueError(f"--data {file}: {len(train) + len(valid)} bytes, but at least 40960 are "
                         "needed")
    return tuple(torch.frombuffer(bytearray(x), dtype=torch.uint8)  # type: ignore[return-value]
                 for x in (train, valid))


def batch(data: Tensor, count: int, length: int, key: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (count, length), at places that depend on the key alone."""
    generator = torch.Generator().manual_seed(key)
    starts = torch.randint(0, len(data) - length - 1, (count,), generator=generator)
    rows = data[starts[:, None] + torch.arange(length + 1)].long()
    return rows[:, :-1], rows[:, 1:]
