"""What kernels cost a GPU, from their machine code, which needs no GPU.

Triton's compiler and NVIDIA's assembler build each kernel for an architecture. Its registers and
shared memory tell how many programs a processor has at once, its instructions what an element
takes: an H100 can issue ten while it moves a byte (132 processors, 4 warps of 32 threads a cycle,
1.75 GHz; 3 TB/s), so AdamW on 8-bit moments, which moves ten bytes, is held up by more than a
hundred. Instructions are those of the kernel's body, without what rare cases of a division call; of
a product those after it.

    python -m lissom.bench.machine --json bench/results/machine-sm90.json
    python -m lissom.bench.machine --capability 86 --json bench/results/machine-sm86.json
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..kernels import (
    _triton,
    adam,
    blocks,
    dynamic,
    lift,
    linear,
    philox,
    project,
    split,
    symmul,
    tiles,
)
from ..kernels._triton import tl
from . import clock

__all__ = ["Case", "Cost", "built", "cases", "cost", "main"]

_KIB = 1024
# Of a processor of each architecture: KiB of memory that programs share, and programs and warps
# that it can have at most (CUDA C++ Programming Guide, technical specifications).
_PROCESSORS = {75: (64, 16, 32), 80: (164, 32, 64), 86: (100, 16, 48), 89: (100, 24, 48),
               90: (228, 32, 64), 100: (228, 32, 64), 120: (100, 24, 48)}
# Its registers; bytes that a program needs beside its own.
_REGISTERS, _RESERVED = 65536, 1024
_THREADS = 32
# No device of this machine: the one that kernels are built for.
_DEVICE = torch.device("cuda", 99)
# Of several tensors at addresses in a table.
_SEVERAL: Mapping[str, Any] = {"ALIGN": 16, "KEYED": True}


class Case(NamedTuple):
    """A kernel as it is used.

    Args:
        name: of the row.
        kernel: it.
        types: of parameters that are no 32-bit integers.
        constants: parameters that are compiled in.
        elements: of one program.
        warps: of one program.
        stages: of a product's loads.
        most: registers of a thread, None for any number.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    elements: int
    warps: int
    stages: int = 3
    most: int | None = None


class Cost(NamedTuple):
    """Of one program, and of a processor that has several.

    Args:
        registers: of each thread.
        spilled: bytes of a thread that had no register.
        shared: bytes.
        programs: as many as a processor has at once, by registers and shared memory.
        instructions: for each element.
        barriers: of a program.
    """

    registers: int
    spilled: int
    shared: int
    programs: int
    instructions: float
    barriers: int


def built(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any],
          even: Callable[[str], bool], capability: int, **options: Any) -> Any:
    """A kernel compiled for an architecture.

    Args:
        kernel: it, of a process without Triton's interpreter.
        types: of the parameters by name; those of no mention are 32-bit integers.
        constants: parameters that are compiled in, by name, but for those with a default.
        even: whether the parameter of this name is a multiple of 16, asked of all others.
        capability: of the architecture, such as 90.
        options: of the compiler.
    """
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget
    parameters = [p.name for p in kernel.params]
    constants = {p.name: p.default for p in kernel.params if p.is_constexpr and p.has_default
                 } | {**constants}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in parameters}
    values = {(parameters.index(n),): v for n, v in constants.items()}
    facts = {(parameters.index(n),): [["tt.divisibility", 16]] for n in parameters
             if n not in constants and even(n)}
    return compiler.compile(compiler.ASTSource(kernel, signature, values, facts),
                            target=target("cuda", capability, _THREADS),
                            options={"enable_fp_fusion": False, **options})


def cost(case: Case, capability: int) -> Cost:
    """Compile a case and count."""
    volatile = {"start", "seed", "parameter", "step", "stream", "tiles_m", "tiles_n"}
    made = built(case.kernel, case.types, case.constants, lambda n: n not in volatile, capability,
                 num_warps=case.warps, num_stages=case.stages, maxnreg=case.most)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        used = _tool("cuobjdump", "-res-usage", str(file))
        code = _tool("nvdisasm", "-c", str(file))
    registers, spilled = (int(x) for x in re.findall(r"REG:(\d+) STACK:(\d+)", used)[0])
    body = [*_body(code)]
    products = [i for i, x in enumerate(body) if x in ("HGMMA", "HMMA")]
    rest = body[products[-1] + 1:] if products else body
    room, most, warps = _PROCESSORS[capability]
    threads = _THREADS * case.warps
    shared = int(made.metadata.shared)
    programs = min(_REGISTERS // (-(-registers // 8) * 8 * threads),
                   room * _KIB // (shared + _RESERVED), most, warps // case.warps)
    return Cost(registers, spilled, shared, programs, len(rest) * threads / case.elements,
                sum(x == "BAR" for x in rest))


def _tool(name: str, *arguments: str) -> str:
    """What one of the programs says that come with Triton."""
    folder = Path(_triton.triton.__file__).parent / "backends" / "nvidia" / "bin"
    done = subprocess.run([str(folder / name), *arguments], capture_output=True, text=True,
                          check=True)
    return done.stdout


def _body(code: str) -> Iterator[str]:
    """Names of the instructions before the first subroutine."""
    for line in code.splitlines():
        if re.match(r"\$\S+:$", line):
            return
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9]*)",
                          line)
        if found and found[1] != "NOP":
            yield found[1]


def cases(capability: int = 90) -> Iterator[Case]:
    """The kernels of a step on bf16 weights, at sizes without remainders, with the tiles that this
    architecture has.
    """
    _triton._CAPABILITY[_DEVICE] = divmod(capability, 10)
    at = blocks.cut(4096, 4096)
    tile = {"R": at.height, "W": at.width, "per_row": at.per_row}
    of_blocks = at.height * at.width
    for bits in (32, 8, 4):
        store = "*fp32" if bits == 32 else "*u8"
        tables = ("scale", "book", "lines")
        pointers = {f"{x}_{y}_ptr": "*i64" if y == "lines" else "*fp32"
                    for x in "mv" for y in tables}
        none = dict.fromkeys(pointers) if bits == 32 else {}
        types = {**pointers, "target_ptr": "*bf16", "g_ptr": "*bf16", "m_ptr": store,
                 "v_ptr": store, **dict.fromkeys(("weight1", "beta2", "weight2", "eps",
                                                  "correction", "keep", "factor"), "fp32")}
        for name, weight in (("adamw8", True), ("adam8", False)):
            flags = {"BITS": bits, "FAST": bits < 16, "WEIGHT": weight, "MAXIMIZE": False,
                     "STOCHASTIC": weight, "HELD": False, "ALIGNED": True, **none, **tile,
                     "high_ptr": None, "low_ptr": None}
            yield Case(f"{name}, {bits} bits", adam._adam_kernel, types, flags, of_blocks,
                       blocks.WARPS)
            if bits == 8 and weight:
                yield Case(f"{name}, {bits} bits, weight and 8 bits more", adam._adam_kernel,
                           {**types, "high_ptr": "*i8"},
                           {k: v for k, v in flags.items() if k != "high_ptr"} | {"BELOW": 8},
                           of_blocks, blocks.WARPS)
            if bits == 8 and not weight:  # from rows or columns of a copy
                old = {"m_old_ptr": store, "v_old_ptr": store, "m_old_scale_ptr": "*fp32",
                       "v_old_scale_ptr": "*fp32", "source_ptr": "*i64"}
                # Rows stay rows, of several blocks.
                in_rows = {k: v for k, v in flags.items() if k != "per_row"}
                for moved, what in ((1, "rows"), (2, "columns")):
                    yield Case(f"{name}, {bits} bits, moved {what}", adam._adam_kernel,
                               {**types, **old}, {**in_rows, "MOVED": moved}, of_blocks,
                               blocks.WARPS)
            if bits == 8:
                listed = ["m_ptr", "v_ptr", "m_scale_ptr", "v_scale_ptr", "seed"]
                kind = tl.bfloat16 if weight else None  # directions and gradients are stacked
                listed += ["target_ptr", "g_ptr"] if weight else []
                yield Case(f"{name}, {bits} bits, of several", adam._adam_kernel,
                           {**types, **dict.fromkeys(listed, "*i64")},
                           {**flags, **_SEVERAL, "TARGET": kind, "GRADIENT": kind,
                            "MOMENT": tl.uint8}, of_blocks, blocks.WARPS)
    for bits in (8, 4):
        codes = {"codes_ptr": "*i8" if bits == 8 else "*u8", "scale_ptr": "*fp32",
                 "x_ptr": "*fp32", "out_ptr": "*bf16"}
        yield Case(f"quantize_linear, {bits} bits", linear._quantize_linear_kernel, codes,
                   {**tile, "BITS": bits, "LEVELS": 127 if bits == 8 else 7}, of_blocks,
                   blocks.WARPS)
        yield Case(f"dequantize_linear, {bits} bits", linear._dequantize_linear_kernel, codes,
                   {**tile, "BITS": bits}, of_blocks, blocks.WARPS)
        codes |= {"codes_ptr": "*u8", "out_ptr": "*fp32", "book_ptr": "*fp32",
                  "lines_ptr": "*i64"}
        yield Case(f"quantize_dynamic, {bits} bits", dynamic._quantize_kernel, codes,
                   {**tile, "BITS": bits, "SIGNED": True}, of_blocks, blocks.WARPS)
        yield Case(f"dequantize_dynamic, {bits} bits", dynamic._dequantize_kernel, codes,
                   {**tile, "BITS": bits}, of_blocks, blocks.WARPS)
    yield Case("stochastic_round", philox._stochastic_round_kernel,
               {"x_ptr": "*fp32", "out_ptr": "*bf16"},
               {"HELD": False, "ALIGNED": True, "TILE": philox._TILE}, philox._TILE, 4)
    parts = {"x_ptr": "*fp32", "p_ptr": "*bf16", "high_ptr": "*i8", "out_ptr": "*fp32"}
    high = {"low_ptr": None, "BELOW": 8, "TILE": split._TILE}
    yield Case("join", split._join_kernel, parts, high, split._TILE, 4)
    yield Case("split", split._split_kernel, parts,
               {**high, "STOCHASTIC": True, "HELD": False, "ALIGNED": True}, split._TILE, 4)
    yield from _products()
    yield from _symmetric()


def _products() -> Iterator[Case]:
    """R = G Q, and what lifts it back: alone, with Fira's residual, and without a product."""
    t = tiles.suited(tiles.LARGE, _DEVICE)
    sizes = {"BM": t.rows, "BN": t.columns, "BK": t.depth, "GROUP": t.group, "PRECISION": "tf32",
             "WIDEN": False}
    yield Case("project", project._project_kernel,
               {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*bf16"},
               {**sizes, "scores_ptr": None, "largest_ptr": None, "SCORES": 0, "a_column": 1,
                "b_column": 1, "c_column": 1}, t.rows * t.columns, t.warps, t.stages)
    for name, product, gain in (("lift", True, 0), ("lift of several", True, 0),
                                ("lift with a gain of columns", True, 2),
                                ("lift with a gain of rows", True, 1),
                                ("lift of weight and 8 bits more", True, 0),
                                ("lift with a gain of rows, of weight and 8 bits more", True, 1),
                                ("lift without a product", False, 2)):
        t = tiles.suited(lift._SHARED, _DEVICE) if product else lift._FLAT
        slices, registers = lift._after(t)
        sizes |= {"BM": t.rows, "BN": t.columns, "BK": t.depth, "GROUP": t.group}
        none = {} if product else {"left_ptr": None, "right_ptr": None}
        none |= {"keep_ptr": None} if gain else {"keep_ptr": None, "dense_ptr": None,
                                                 "gain_ptr": None}
        none |= {"low_ptr": None} if name.endswith("more") else {"high_ptr": None, "low_ptr": None}
        types = {**dict.fromkeys(("p_ptr", "left_ptr", "right_ptr", "dense_ptr"), "*bf16"),
                 "high_ptr": "*i8", "gain_ptr": "*fp32",
                 **dict.fromkeys(("alpha", "beta", "keep"), "fp32")}
        ones = {"left_column": 1, "right_row": 1, "dense_column": 1,
                "gain_column" if gain == 2 else "gain_row": 1}
        if name.endswith("several"):  # weights and bases lie apart, directions are stacked
            none |= {"WEIGHT": tl.bfloat16, "RIGHT": tl.bfloat16, **_SEVERAL}
            types |= dict.fromkeys(("p_ptr", "right_ptr", "seed"), "*i64")
        yield Case(name, lift._lift_kernel, types,
                   {**sizes, **none, **ones, "PRODUCT": product, "DENSE": bool(gain), "GAIN": gain,
                    "KEEP": 0, "STOCHASTIC": True, "HELD": False, "ALIGNED": True,
                    "SLICES": slices, "BELOW": 8 * name.endswith("more")},
                   t.rows * t.columns, t.warps, t.stages, registers)


def _symmetric() -> Iterator[Case]:
    """The two products of a Newton-Schulz step that are symmetric, below the diagonal."""
    for name, adds, t in (("syrk", False, symmul._LARGE), ("symm_muladd", True, symmul._ADDING)):
        t = symmul._suited(t, _DEVICE)
        yield Case(name, symmul._symmul_kernel,
                   {**dict.fromkeys(("left_ptr", "right_ptr", "out_ptr"), "*bf16"),
                    "alpha": "fp32", "beta": "fp32"},
                   {"ADD": adds, "B": t.size, "K": t.depth, "TILES": 8, "PRECISION": "tf32",
                    "WIDEN": False, "left_column": 1,
                    "right_column" if adds else "right_row": 1}, t.size**2, t.warps, t.stages)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each kernel, and write rows as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--capability", type=int, choices=[*_PROCESSORS], default=90,
                        help="of the architecture (default 90)")
    parser.add_argument("--kernels", help="names of rows, separated by semicolons (default all)")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args(argv)
    if _triton.triton is None or _triton.INTERPRETED:
        parser.error("needs triton, and TRITON_INTERPRET unset: nothing is compiled with it")
    known = {case.name: case for case in cases(args.capability)}
    chosen = args.kernels.split(";") if args.kernels else [*known]
    for name in chosen:
        if name not in known:
            parser.error(f"--kernels {name!r} must be of {', '.join(map(repr, known))}")
    rows: list[dict[str, Any]] = []
    about = clock.about("machine", argv, "cpu")
    for case in (known[name] for name in chosen):
        found = cost(case, args.capability)
        rows.append({"kernel": case.name, **found._asdict(), "warps": case.warps,
                     "elements": case.elements, "capability": args.capability, **about})
        print(f"{case.name:28} {found.instructions:6.1f} instructions an element, "
              f"{found.registers:3} registers, {found.spilled} bytes spilled, "
              f"{found.programs} programs on a processor, {found.barriers} barriers")
        clock.save(args.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
