"""Kernels built to machine code, which needs no GPU: what tests of several kernels share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: What a script of :func:`compile_for_a_gpu` begins with.
BUILD = "from lissom.bench.machine import built, cases, cost\n"


def compile_for_a_gpu(script: str, folder: Path) -> None:
    """Run a script that builds kernels, in a process without Triton's interpreter.

    Where this process has it, its kernels are nothing that a compiler takes.

    Args:
        script: Python, after :data:`BUILD`.
        folder: for the script and what it makes.
    """
    file = folder / "build.py"
    file.write_text(BUILD + script)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
