"""Kernels built to machine code, which needs no GPU: what tests of several kernels share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: What a script of :func:`compile_for_a_gpu` begins with.
BUILD = '''
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def built(kernel, types, constants, even, capability, **options):
    """A kernel for an architecture.

    Args:
        kernel: it.
        types: of the parameters by name; those of no mention are 32-bit integers.
        constants: parameters that are compiled in, by name.
        even: whether the parameter of this name is a multiple of 16, asked of all others.
        capability: of the architecture.
        options: of the compiler.
    """
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    values = {(names.index(n),): v for n, v in constants.items()}
    facts = {(names.index(n),): [["tt.divisibility", 16]] for n in names
             if n not in constants and even(n)}
    return compile(ASTSource(kernel, signature, values, facts),
                   target=GPUTarget("cuda", capability, 32),
                   options={"enable_fp_fusion": False, **options})
'''


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
