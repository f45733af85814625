"""Each kernel against what its work must cost, and against torch, plain and compiled.

A kernel must move its bytes and do its operations: their time at the measured copy bandwidth and at
the measured bf16 peak, the larger of the two, is the roofline. Contestants alternate on the same
tensors; torch without its compiler, which is slow, in fewer rounds. Where a kernel rounds
stochastically the others do so with torch's own random bits: ours, made by torch, are tens of
thousands of small operations, which no compiler fuses. On the CPU the torch definitions are timed
as they are, at a small size, so that the script runs anywhere.

    python -m lissom.bench.kernels --json bench/results/kernels.json
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ..kernels import _triton, dynamic
from ..kernels import adam as adam_module
from ..kernels import lift as lift_module
from ..kernels import split as split_module
from ..kernels.adam import adam8, adam8_ref, adamw8, adamw8_ref
from ..kernels.blocks import BLOCK, unpack4
from ..kernels.dynamic import (
    dequantize_dynamic,
    quantize_dynamic,
    quantize_dynamic_ref,
)
from ..kernels.lift import lift
from ..kernels.limit import limited_gains
from ..kernels.linear import (
    dequantize_linear,
    dequantize_linear_ref,
    quantize_linear,
    quantize_linear_ref,
)
from ..kernels.norms import row_norms
from ..kernels.philox import stochastic_round
from ..kernels.project import project
from ..kernels.split import join, join_ref, split, split_ref
from ..kernels.symmul import newton_schulz_step, symm_muladd, syrk
from . import clock

__all__ = ["CASES", "Work", "judged", "main", "row_of"]

_MIB = 2**20
_KEY = (1, 2)
#: Shares of the roofline to reach, and from which size on.
_GOALS = {"memory": (0.8, 64 * _MIB), "product": (0.7, 4096)}
#: Rounds that count of torch without its compiler.
_FEW = 4


class Work(NamedTuple):
    """One kernel at one size.

    Args:
        run: from a backend, "torch" or "triton", to the call.
        moved: bytes that it must read and write.
        operations: that it must do.
        definition: what torch.compile is given where ``run`` is an operation of its own, into which
            it does not look.
        rounds: stochastically, for which torch has its own random bits on CUDA.
    """

    run: Callable[[str], Any]
    moved: float
    operations: float = 0.0
    definition: Callable[[], Any] | None = None
    rounds: bool = False


def _flat(size: int, each: float, device: str, dtype: torch.dtype) -> Tensor:
    """A matrix of rows of 4096, of which ``each`` bytes an element are ``size`` in all."""
    columns = 4096
    rows = max(1, round(size / each / columns))
    return torch.randn(rows, columns, device=device).to(dtype)


def _rounded(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """fp32 to bf16 as ``stochastic_bf16_ref`` does it, with random bits of torch's generator."""
    largest = torch.finfo(torch.bfloat16).max
    random = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device)
    bits = x.clamp(-largest, largest).view(torch.int32)
    rounded = (bits + random).bitwise_and_(-65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def _bits(start: int, count: int, key: Any, stream: Any, device: torch.device) -> Tensor:
    """``random_bits16_ref`` with bits of torch's generator."""
    return torch.randint(1 << 16, (count,), dtype=torch.int32, device=device)


# Of 8- and 4-bit codes, by name, bits and sign: from here a compiler takes them as they are. What
# else keeps them it would trace through, and make them at each call.
_TABLES: dict[tuple[str, int, bool], Tensor] = {}


def _carries(bits: int, signed: bool, device: torch.device) -> Tensor:
    return _TABLES["carries", bits, signed]


def _decoded(codes: Tensor, scale: Tensor, columns: int, bits: int, signed: bool) -> Tensor:
    """``dequantize_dynamic_ref`` of whole blocks, in what a compiler takes in one piece."""
    if bits == 4:
        codes = unpack4(codes, columns)
    values = _TABLES["book", bits, signed][codes.int()]
    blocks: Tensor = values.unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)
    return blocks.flatten(-2)


def _moments(g: Tensor, bits: int) -> dict[str, Any]:
    if bits >= 16:
        kind = torch.float32 if bits == 32 else torch.bfloat16
        return {"m": torch.zeros_like(g, dtype=kind), "v": torch.zeros_like(g, dtype=kind)}
    wide = torch.zeros_like(g, dtype=torch.float32)
    (m, m_scale), (v, v_scale) = (quantize_dynamic(wide, bits, signed) for signed in (True, False))
    return {"m": m, "v": v, "m_scale": m_scale, "v_scale": v_scale}


def _adamw(bits: int) -> Callable[[int, str, torch.dtype], Work]:
    """Decode, AdamW on the weight with stochastic rounding, encode."""
    def make(size: int, device: str, dtype: torch.dtype) -> Work:
        g = _flat(size, 2, device, dtype)
        p, kept = torch.randn_like(g), _moments(g, bits)
        state = sum(x.nbytes for x in kept.values() if x is not None)

        given: dict[str, Any] = {
            **kept, "bits": bits, "lr": 1e-3, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999,
            "eps": 1e-8, "t": 2, "key": _KEY, "stochastic": True}
        return Work(lambda backend: adamw8(p, g, **given, backend=backend),
                    2 * p.nbytes + g.nbytes + 2 * state,
                    definition=lambda: adamw8_ref(p, g, **given), rounds=True)

    return make


def _adam(bits: int) -> Callable[[int, str, torch.dtype], Work]:
    """Decode, Adam's direction of a projected gradient in its place, encode."""
    def make(size: int, device: str, dtype: torch.dtype) -> Work:
        g = _flat(size, 4, device, torch.float32)
        kept = _moments(g, bits)
        state = sum(x.nbytes for x in kept.values() if x is not None)

        given: dict[str, Any] = {**kept, "bits": bits, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
                                 "t": 2, "key": _KEY}
        return Work(lambda backend: adam8(g, **given, out=g, backend=backend),
                    2 * g.nbytes + 2 * state, definition=lambda: g.copy_(adam8_ref(g, **given)),
                    rounds=bits == 16)

    return make


def _coded(name: str, bits: int) -> Callable[[int, str, torch.dtype], Work]:
    def make(size: int, device: str, dtype: torch.dtype) -> Work:
        x = _flat(size, 4, device, torch.float32)
        dynamic = "dynamic" in name
        store = quantize_dynamic(x, bits, True) if dynamic else quantize_linear(x, bits)
        codes, scale = store

        calls: dict[str, tuple[Callable[[str], Any], Callable[[], Any]]] = {
            "quantize_dynamic": (
                lambda backend: quantize_dynamic(x, bits, True, out=store, backend=backend),
                lambda: quantize_dynamic_ref(x, bits, True)),
            "dequantize_dynamic": (
                lambda backend: dequantize_dynamic(codes, scale, 4096, bits, True, out=x,
                                                   backend=backend),
                lambda: _decoded(codes, scale, 4096, bits, True)),
            "quantize_linear": (
                lambda backend: quantize_linear(x, bits, out=store, backend=backend),
                lambda: quantize_linear_ref(x, bits)),
            "dequantize_linear": (
                lambda backend: dequantize_linear(codes, scale, 4096, bits, out=x, backend=backend),
                lambda: dequantize_linear_ref(codes, scale, 4096, bits)),
        }
        run, definition = calls[name]
        return Work(run, x.nbytes + codes.nbytes + scale.nbytes, definition=definition)

    return make


def _round(size: int, device: str, dtype: torch.dtype) -> Work:
    x = _flat(size, 4, device, torch.float32)
    out = torch.empty_like(x, dtype=torch.bfloat16)

    def run(backend: str) -> Tensor:
        if backend == "torch" and device == "cuda":
            return out.copy_(_rounded(x))
        return stochastic_round(x, torch.bfloat16, 0, _KEY, (1, 2), out=out, backend=backend)

    return Work(run, x.nbytes + out.nbytes, definition=lambda: out.copy_(_rounded(x)), rounds=True)


def _halves(writes: bool) -> Callable[[int, str, torch.dtype], Work]:
    """An fp32 weight from bf16 and 8 bits more, or to them, rounded at random."""
    def make(size: int, device: str, dtype: torch.dtype) -> Work:
        x = _flat(size, 4, device, torch.float32)
        p, high = x.bfloat16(), torch.zeros_like(x, dtype=torch.int8)
        moved = x.nbytes + p.nbytes + high.nbytes
        if not writes:
            return Work(lambda backend: join(p, high, backend=backend), moved,
                        definition=lambda: join_ref(p, high))
        return Work(lambda backend: split(x, p, high, key=_KEY, backend=backend), moved,
                    definition=lambda: split_ref(x, p, high, None, _bits(
                        0, x.numel(), _KEY, None, x.device).view(x.shape)), rounds=True)

    return make


def _norms(transposed: bool) -> Callable[[int, str, torch.dtype], Work]:
    def make(size: int, device: str, dtype: torch.dtype) -> Work:
        x = _flat(size, dtype.itemsize, device, dtype)
        y = x.mT if transposed else x
        return Work(lambda backend: row_norms(y, backend=backend), x.nbytes)

    return make


def _limited(size: int, device: str, dtype: torch.dtype) -> Work:
    """Fira's factors of the 4096 columns of as many matrices as have norms of this size."""
    n, r, g = (_flat(size, 8, device, torch.float64).abs() for _ in range(3))
    last = torch.ones(len(n), device=device)
    return Work(lambda backend: limited_gains(n, r, g, last, more=4.0, eps=1e-8, leak=0.0,
                                              limiter=1.01, backend=backend), 4 * n.nbytes)


def _apply(size: int, device: str, dtype: torch.dtype) -> Work:
    """The lift without a product: decay, a scaled dense update, stochastic rounding."""
    p = _flat(size, dtype.itemsize, device, dtype)
    d = torch.randn_like(p)
    gain = torch.ones(1, p.shape[1], device=device)
    return Work(lambda backend: lift(p, keep=0.99, dense=d, gain=gain, beta=-1e-3, key=_KEY,
                                     backend=backend), 2 * p.nbytes + d.nbytes, rounds=True)


def _square(n: int, device: str, dtype: torch.dtype) -> Tensor:
    x: Tensor = (torch.randn(n, n, device=device) / n**0.5).to(dtype)
    return x


def _projection(left: bool) -> Callable[[int, str, torch.dtype], Work]:
    """R of rank n / 4."""
    def make(n: int, device: str, dtype: torch.dtype) -> Work:
        g, r = _square(n, device, dtype), n // 4
        q = torch.randn(n, r, device=device).to(dtype)
        a = g.mT if left else g
        return Work(lambda backend: project(a, q, transposed=left, backend=backend),
                    g.nbytes + q.nbytes + 4 * n * r, 2 * n * n * r)

    return make


def _similarity(n: int, device: str, dtype: torch.dtype) -> Work:
    """A gradient on a whole cosine basis, with the sums of its columns."""
    g, q = _square(n, device, dtype), _square(n, device, dtype)
    return Work(lambda backend: project(g, q.mT, dtype=dtype, scores=1, backend=backend),
                3 * g.nbytes, 2 * n**3)


def _lift(dense: bool) -> Callable[[int, str, torch.dtype], Work]:
    """P N of rank n / 4, decay and stochastic rounding; with ``dense`` Fira's residual too."""
    def make(n: int, device: str, dtype: torch.dtype) -> Work:
        p, r = _square(n, device, dtype), n // 4
        left, right = (torch.randn(*x, device=device).to(dtype) for x in ((n, r), (r, n)))
        d = _square(n, device, dtype) if dense else None
        gain = torch.ones(1, n, device=device)
        return Work(lambda backend: lift(p, left, right, alpha=-1e-6, keep=0.999, dense=d,
                                         gain=gain, beta=-1e-6, key=_KEY, backend=backend),
                    2 * p.nbytes + left.nbytes + right.nbytes + (p.nbytes if dense else 0),
                    2 * n * n * r, rounds=True)

    return make


def _symmetric(kernel: str) -> Callable[[int, str, torch.dtype], Work]:
    """Half the operations of general products, where the result is symmetric."""
    def make(n: int, device: str, dtype: torch.dtype) -> Work:
        x = _square(n, device, dtype)
        s = x @ x.mT
        calls: dict[str, tuple[Callable[[str], Any], float]] = {
            "syrk": (lambda backend: syrk(x, backend=backend), n**3),
            "symm_muladd": (lambda backend: symm_muladd(s, -4.775, 2.0315, backend=backend), n**3),
            "newton_schulz_step": (lambda backend: newton_schulz_step(
                x, 3.4445, -4.775, 2.0315, backend=backend), 4 * n**3),
        }
        run, operations = calls[kernel]
        return Work(run, 2 * x.nbytes, operations)

    return make


#: By name: what bounds the kernel, and how its work is made from a size: bytes of its main tensor,
#: or n of an n x n matrix. Products come first, for time that runs out.
CASES: dict[str, tuple[str, Callable[[int, str, torch.dtype], Work]]] = {
    "project, right": ("product", _projection(False)),
    "project, left": ("product", _projection(True)),
    "project, scores": ("product", _similarity),
    "lift": ("product", _lift(False)),
    "lift, residual": ("product", _lift(True)),
    "syrk": ("product", _symmetric("syrk")),
    "symm_muladd": ("product", _symmetric("symm_muladd")),
    "newton_schulz_step": ("product", _symmetric("newton_schulz_step")),
    **{f"adamw8, {bits} bits": ("memory", _adamw(bits)) for bits in (32, 16, 8, 4)},
    **{f"adam8, {bits} bits": ("memory", _adam(bits)) for bits in (32, 16, 8, 4)},
    **{f"{name}, {bits} bits": ("memory", _coded(name, bits)) for bits in (8, 4)
       for name in ("quantize_dynamic", "dequantize_dynamic", "quantize_linear",
                    "dequantize_linear")},
    "stochastic_round": ("memory", _round),
    "join": ("memory", _halves(False)),
    "split": ("memory", _halves(True)),
    "row_norms": ("memory", _norms(False)),
    "row_norms, transposed": ("memory", _norms(True)),
    "limited_gains": ("memory", _limited),
    "lift, no product": ("memory", _apply),
}


@contextlib.contextmanager
def _fair(device: str) -> Iterator[None]:
    """Torch does with what its compiler can fuse, in the place of what defines the kernels."""
    for bits in (8, 4):
        for signed in (True, False):
            given = bits, signed, torch.device(device)
            _TABLES["book", bits, signed] = dynamic.codebook(*given)
            _TABLES["carries", bits, signed] = dynamic._carries(*given)
    with (mock.patch.object(dynamic, "_carries", _carries),
          mock.patch.multiple(adam_module, stochastic_bf16_ref=_rounded,
                              dequantize_dynamic_ref=_decoded),
          mock.patch.object(lift_module, "stochastic_round", _rounded),
          mock.patch.object(split_module, "random_bits16_ref", _bits)):
        yield


def judged(name: str, size: int, work: Work, ms: float, bandwidth: float, peak: float
           ) -> dict[str, Any]:
    """What a kernel must cost, and what share of its time that is.

    Args:
        name: a key of :data:`CASES`.
        size: bytes, or n.
        work: that was done.
        ms: that it took.
        bandwidth: bytes per second of a copy.
        peak: operations per second of a product.
    """
    bound, _ = CASES[name]
    roofline = 1e3 * max(work.moved / bandwidth, work.operations / peak)
    share, start = _GOALS[bound]
    return {"kernel": name, "bound": bound, "size": size, "bytes": work.moved,
            "operations": work.operations, "roofline_ms": roofline,
            "share_of_roofline": roofline / ms, "goal": share if size >= start else None}


def row_of(name: str, size: int, device: str, dtype: torch.dtype, bandwidth: float, peak: float,
           repeats: int, compiled: bool) -> dict[str, Any]:
    """Medians of all contestants, and our share of the roofline.

    Args:
        name: a key of :data:`CASES`.
        size: bytes, or n.
        device: ``"cuda"`` or ``"cpu"``.
        dtype: of weights and gradients.
        bandwidth: bytes per second of a copy.
        peak: operations per second of a product.
        repeats: rounds.
        compiled: time torch.compile of the torch definition too.
    """
    work = CASES[name][1](size, device, dtype)
    contestants: dict[str, Callable[[], Any]] = {"torch": lambda: work.run("torch")}
    fewer = {}
    if device == "cuda":
        contestants["lissom"] = lambda: work.run("triton")
        fewer["torch"] = _FEW
    missing = {}
    # On the CPU torch's work is the product, and is timed as it is.
    with _fair(device) if device == "cuda" else contextlib.nullcontext():
        if compiled:
            # A copy of the frame for this row alone, so that sizes do not share a graph.
            torch.compiler.reset()
            try:
                defined = work.definition or (lambda: work.run("torch"))
                contestants["compiled"] = torch.compile(defined, dynamic=False)
                contestants["compiled"]()
            except Exception as error:  # whatever the compiler cannot do is the answer
                missing["compiled"] = clock.first_line(error)
                del contestants["compiled"]
        taken = clock.times(contestants, repeats, device, ahead=True, fewer=fewer)
    ms = {k: statistics.median(v) for k, v in taken.items()}
    quartiles = {k: [sorted(v)[len(v) // 4], sorted(v)[3 * len(v) // 4]] for k, v in taken.items()}
    ours = "lissom" if "lissom" in ms else "torch"
    others = {k: v for k, v in ms.items() if k != ours}
    row = {
        "provider": ours, "dtype": str(dtype)[6:], "ms": ms, "quartiles_ms": quartiles,
        "missing": missing, "repeats": {k: len(v) for k, v in taken.items()},
        **judged(name, size, work, ms[ours], bandwidth, peak),
        "fastest_alternative": min(others, key=others.__getitem__) if others else None,
        "ratio": ms[ours] / min(others.values()) if others else None}
    if work.rounds and others:
        row["random_bits"] = "of the others: torch's own"
    return row


def _warm_up(names: Sequence[str], device: str, dtype: torch.dtype, deadline: clock.Deadline
             ) -> None:
    """Call each kernel once with each of its tiles: what Triton compiles it keeps on disk."""
    for name in names:
        bound, make = CASES[name]
        for size in _sizes(device, bound)[:1 if bound == "memory" else None]:
            if deadline.over():
                print("no time left")
                return
            try:
                make(size, device, dtype).run("triton" if device == "cuda" else "torch")
            except Exception as error:  # its row will say so
                print(f"{name}, {size}: {clock.first_line(error)}", flush=True)


def _sizes(device: str, bound: str) -> tuple[int, ...]:
    if device == "cpu":
        return (_MIB,) if bound == "memory" else (256,)
    return (64 * _MIB, 256 * _MIB, 1024 * _MIB) if bound == "memory" else (2048, 4096, 8192)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="lissom-kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=";".join(CASES),
                        help="names separated by semicolons (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", help="bytes or n, separated by commas, for all kernels named")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warm-up", action="store_true",
                        help="call each kernel once, so that it is compiled, and time nothing")
    parser.add_argument("--no-compile", action="store_true",
                        help="leave torch.compile out (it is on CUDA alone)")
    parser.add_argument("--seconds", type=float, help="stop when these are over")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    chosen = args.kernels.split(";")
    for name in chosen:
        if name not in CASES:
            parser.error(f"--kernels {name!r} must be of {', '.join(map(repr, CASES))}")
    deadline = clock.Deadline(args.seconds)
    device, cuda = args.device, args.device == "cuda"
    if cuda and (not torch.cuda.is_available() or _triton.triton is None):
        parser.error("--device cuda needs a CUDA device and Triton")
    dtype = torch.bfloat16 if cuda else torch.float32
    if args.warm_up:
        _warm_up(chosen, device, dtype, deadline)
        return 0
    bandwidth, peak = clock.copy_bandwidth(device), clock.product_peak(device)
    common = {**clock.about("kernels", argv, device), "copy_GB_s": bandwidth / 1e9,
              "peak_TFLOP_s": peak / 1e12}
    print(f"{common['device']}: copies {bandwidth / 1e9:.0f} GB/s, products "
          f"{peak / 1e12:.1f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    for name in chosen:
        given = args.sizes and tuple(map(int, args.sizes.split(",")))
        for size in given or _sizes(device, CASES[name][0]):
            if deadline.over():
                rows.append({"kernel": name, "size": size, "skipped": "no time left", **common})
                continue
            try:
                row = row_of(name, size, device, dtype, bandwidth, peak, args.repeats,
                             cuda and not args.no_compile)
            except Exception as error:  # more memory or registers than there are, say
                row = {"kernel": name, "size": size, "failed": clock.first_line(error)}
                print(f"{name:28} {size:>11} failed: {row['failed']}", flush=True)
            rows.append({**row, **common})
            clock.save(args.json, rows)
            if "ms" in row:
                ours, goal = row["share_of_roofline"], row["goal"]
                mark = "" if goal is None or not cuda else " ok" if ours >= goal else " MISSED"
                print(f"{name:28} {size:>11} {row['ms'][row['provider']]:9.3f} ms  "
                      f"{ours:6.1%} of roofline{mark}  " + ", ".join(
                          f"{k} {v:.3f}" for k, v in row["ms"].items() if k != row["provider"]),
                      flush=True)
    clock.save(args.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
