"""Time of an optimizer step against other packages', same matrices, same gradients, one run.

On the CPU steps of all contestants alternate, so that a slow moment of the machine meets them all;
on a GPU, where not all fit, each is built, timed and dropped, and the first is timed again at the
end to show the drift. Also timed: the two matrix products alone that every projection method needs.
``--whole`` adds embedding, head and norms to the matrices. ``ratio`` is that of the medians;
``pairs`` are the quartiles of the ratios round by round, for machines that others load. A package
that is not installed, or that fails, is a row that says so.

    python -m lissom.bench.step --json bench/results/step-60m-cpu.json
    python -m lissom.bench.step --size llama-7b --device cuda --json bench/results/step-7b.json
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..optim import (
    APOLLO,
    FRUGAL,
    AdamW,
    AdamW8bit,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    Muon,
    PolarGrad,
    SwitchLoRAAdamW,
    Trion,
)
from . import clock, names
from .livebytes import LiveBytes
from .shapes import MODELS, PAPER_RANK, Shape

__all__ = ["Made", "main", "roofline", "shapes_of"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Whose step each contestant's is compared with; the others' with galore-torch's.
_AGAINST = {"AdamW": "torch.optim.AdamW foreach", "AdamW8bit": "bitsandbytes AdamW8bit",
            "FiraAdamW": "fira", "DCTAdamW, every step": "GaLoreAdamW",
            "DCTAdamW, gap 200": "GaLoreAdamW",
            "DCTAdamW, every step, by product": "DCTAdamW, every step",
            "Muon": "torch.optim.Muon", "PolarGrad": "torch.optim.Muon"}
#: What runs on a CPU by default.
_CPU = ("GaLoreAdamW", "FiraAdamW", "DCTAdamW, every step", "DCTAdamW, every step, by product",
        "DCTAdamW, gap 200", "products alone", "AdamW", "AdamW8bit", "Muon", "PolarGrad",
        "torch.optim.Muon", "torch.optim.AdamW foreach", "galore-torch", "fira",
        "bitsandbytes AdamW8bit")
_BASELINE = "torch.optim.AdamW fused"
# Of small elements of a step: codes and scales of a moment at 8 bits and blocks of 256.
_MOMENT_BYTES = {32: 4.0, 16: 2.0, 8: 1 + 4 / 256, 4: 0.5 + 4 / 256}


class Made(NamedTuple):
    """A contestant, ready to step.

    Args:
        step: takes one.
        optimizers: whose state is counted.
    """

    step: Callable[[], Any]
    optimizers: tuple[torch.optim.Optimizer, ...] = ()


class Contestant(NamedTuple):
    """How one is made, and what its step must cost.

    Args:
        make: with its weights and gradients, or raises.
        kind: of work for :func:`roofline`, "" for one that has none.
        bits: of its moments.
        below: bits of a weight that are kept in the state.
        package: other than this one.
    """

    make: Callable[[], Made]
    kind: str = ""
    bits: int = 32
    below: int = 0
    package: str | None = None


def shapes_of(shape: Shape, layers: int | None, whole: bool
              ) -> tuple[list[tuple[int, int]], list[tuple[int, ...]]]:
    """Shapes of the blocks' matrices, and with ``whole`` those of the rest of the model."""
    s, count = shape, layers or shape.layers
    keys = s.hidden * (s.kv_heads or s.heads) // s.heads
    block = [(s.hidden, s.hidden), (keys, s.hidden), (keys, s.hidden), (s.hidden, s.hidden),
             (s.mlp, s.hidden), (s.mlp, s.hidden), (s.hidden, s.mlp)]
    vectors = [(s.hidden,)] * (2 * count + 1)
    if s.qkv_bias:
        vectors += [(s.hidden,), (keys,), (keys,)] * count
    return block * count, [*[(s.vocabulary, s.hidden)] * 2, *vectors] if whole else []


def roofline(kind: str, matrices: Sequence[tuple[int, int]], rest: Sequence[tuple[int, ...]],
             rank: int, bits: int, element: int, below: int = 0) -> tuple[float, float]:
    """Bytes that a step must move and operations of products that it must do.

    Every tensor is read or written once for each pass that cannot be avoided: a dense AdamW reads G
    and P and both moments and writes all but G. A projected rule reads G and its basis (b), writes
    and reads R and N, reads and writes the moments, reads the basis again for the lift and P, and
    writes P: e (3 m n + 2 b r + 4 r x) and 4 m n r operations, b the shorter and x the longer side.
    Bits of P in the state are read and written.

    Args:
        kind: ``"adamw"``, ``"galore"``, ``"fira"`` (G once more), ``"dct"`` (a product with the
            whole basis), ``"apollo"`` (one product, and G twice), ``"frugal"`` (coordinates of G,
            no product), ``"muon"`` (five Newton-Schulz steps with symmetric products), ``"trion"``
            (a whole basis, then those on R, and two products back).
        matrices: their shapes.
        rest: shapes that get AdamW.
        rank: of projections.
        bits: of moments.
        element: bytes of a weight.
        below: bits of a weight in the state.
    """
    moment = _MOMENT_BYTES[bits]
    operations = 0.0
    vectors = [torch.Size(x).numel() for x in rest]
    moved = 2 * below / 8 * sum(vectors + [m * n for m, n in matrices])
    if kind == "adamw":
        vectors += [m * n for m, n in matrices]
        matrices = []
    moved += sum(vectors) * (3 * element + 4 * moment)
    for m, n in matrices:
        short, long = sorted((m, n))
        size, r = m * n, min(rank, short)
        if kind == "muon":
            moved += size * (3 * element + 2 * moment)
            operations += 5 * (3 * short * short * long + short**3)
            continue
        if kind == "frugal":
            moved += size * 3 * element + 4 * r * long * moment
            continue
        moved += size * 3 * element + 4 * r * long * element
        if kind == "trion":
            moved += size * 2 * moment + 2 * r * short * element
            operations += 2 * size * short + 4 * size * r + 5 * (3 * r * r * long + r**3)
            continue
        moved += 4 * r * long * moment + 2 * short * r * element
        if kind in ("fira", "apollo"):
            moved += size * element
        operations += 2 * size * r * (1 if kind == "apollo" else 2)
        if kind == "dct":
            operations += 2 * size * (short - r)  # the product with all columns has R in it
    return moved, operations


class _Bench:
    """The contestants of one command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.shape = MODELS[args.size]
        self.rank = args.rank or PAPER_RANK.get(args.size, 1024)
        self.gap = args.gap
        self.projection: str | None = args.projection
        self.device, self.dtype = args.device, _DTYPES[args.dtype]
        self.matrices, self.rest = shapes_of(self.shape, args.layers, args.whole)

    def weights(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Matrices of the blocks and the rest, with gradients; the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)

        def made(shape: tuple[int, ...], scale: float) -> Tensor:
            x = torch.randn(shape, generator=generator, device=self.device)
            return x.mul_(scale).to(self.dtype)

        out = []
        for shape in [*self.matrices, *self.rest]:
            p = nn.Parameter(made(shape, 0.02))
            p.grad = made(shape, 0.01)
            out.append(p)
        return out[: len(self.matrices)], out[len(self.matrices):]

    def low_rank(self, cls: Any, gap: int | None = None, alpha: str = "scale", **options: Any
                 ) -> Made:
        matrices, rest = self.weights()
        groups: list[dict[str, Any]] = [{
            "params": matrices, "rank": self.rank, alpha: 0.25,
            "update_proj_gap": gap or self.gap, "proj_type": "std"}]
        made = cls(groups + ([{"params": rest}] if rest else []), lr=1e-3, weight_decay=0.01,
                   **options)
        return Made(made.step, (made,))

    def dense(self, cls: Any, **options: Any) -> Made:
        matrices, rest = self.weights()
        made = cls(matrices + rest, lr=1e-3, **options)
        return Made(made.step, (made,))

    def whole_matrix(self, cls: Any, **options: Any) -> Made:
        matrices, rest = self.weights()
        groups: list[dict[str, Any]] = [{"params": matrices}]
        if rest:
            groups.append({"params": rest, "algorithm": "adamw"})
        made = cls(groups, lr=1e-3, **options)
        return Made(made.step, (made,))

    def split(self, make: Callable[..., Made], *args: Any, **options: Any) -> Made:
        """With 8 bits of each bf16 weight in the state, as flashoptim has by default."""
        if self.dtype != torch.bfloat16:
            raise ValueError("only bf16 weights have bits that are kept elsewhere")
        return make(*args, master_bits=8, **options)

    def trion(self, **options: Any) -> Made:
        matrices, rest = self.weights()
        groups: list[dict[str, Any]] = [{"params": matrices, "rank": self.rank}]
        if rest:
            groups.append({"params": rest, "rank": None})
        made = Trion(groups, lr=1e-3, **options)
        return Made(made.step, (made,))

    def pairs(self, **options: Any) -> Made:
        """Factors of every matrix, which itself is frozen, with switches."""
        matrices, rest = self.weights()
        groups: list[dict[str, Any]] = []
        for w in matrices:
            m, n = w.shape
            a, b = (nn.Parameter(torch.randn(x, device=self.device).mul_(0.02).to(self.dtype))
                    for x in ((self.rank, n), (m, self.rank)))
            a.grad, b.grad, w.grad = torch.randn_like(a) * 0.01, torch.randn_like(b) * 0.01, None
            w.requires_grad_(False)
            groups.append({"params": [a, b, w], "roles": ("A", "B", "base")})
        made = SwitchLoRAAdamW(groups + ([{"params": rest}] if rest else []), lr=1e-3,
                               candidate_device="cpu", **options)
        return Made(made.step, (made,))

    def torch_muon(self) -> Made:
        matrices, rest = self.weights()
        muon = torch.optim.Muon(matrices, lr=1e-3)
        adamw = torch.optim.AdamW(rest, lr=1e-3, foreach=True) if rest else None

        def step() -> None:
            muon.step()
            if adamw is not None:
                adamw.step()

        return Made(step, (muon,) if adamw is None else (muon, adamw))

    def products(self) -> Made:
        """R = G Q and P += R Q^T (or from the left), and nothing else."""
        matrices, _ = self.weights()
        bases = [torch.randn(min(p.shape), self.rank, device=self.device, dtype=self.dtype)
                 for p in matrices]

        def step() -> None:
            for p, q in zip(matrices, bases, strict=True):
                g = p.grad
                assert g is not None
                if p.shape[0] >= p.shape[1]:
                    p.data.addmm_(g @ q, q.mT, beta=0.99, alpha=-1e-3)
                else:
                    p.data.addmm_(q, q.mT @ g, beta=0.99, alpha=-1e-3)

        return Made(step)

    def peer(self, module: str, cls: str, kind: str = "dense", **options: Any
             ) -> Callable[[], Made]:
        """An optimizer of another package, looked for when it is made."""
        def make() -> Made:
            found: Any = importlib.import_module(module)
            for part in cls.split("."):
                found = getattr(found, part)
            if kind == "low-rank":
                return self.low_rank(found, **options)
            return self.dense(found, **options)

        return make

    def contestants(self) -> dict[str, Contestant]:
        """All of them, the baseline of a GPU first."""
        def ours(make: Callable[..., Made], kind: str, *args: Any, **options: Any
                 ) -> Callable[[int], Contestant]:
            def of(bits: int) -> Contestant:
                more: dict[str, Any] = {} if bits == 32 else {"state_bits": bits}
                if make == self.low_rank and args[0] in (
                        GaLoreAdamW, FiraAdamW, GradNormLoRPAdamW):
                    more |= {"basis_bits": 8} if bits == 8 else {}
                    more |= {"projection": self.projection} if self.projection else {}
                return Contestant(functools.partial(make, *args, **options, **more), kind, bits)

            return of

        own = {
            "AdamW": ours(self.dense, "adamw", AdamW),
            "GaLoreAdamW": ours(self.low_rank, "galore", GaLoreAdamW),
            "FiraAdamW": ours(self.low_rank, "fira", FiraAdamW),
            "DCTAdamW, every step": ours(self.low_rank, "dct", DCTAdamW, 1),
            "DCTAdamW, every step, by product": ours(self.low_rank, "dct", DCTAdamW, 1,
                                                     similarity="matmul"),
            "DCTAdamW, gap 200": ours(self.low_rank, "galore", DCTAdamW, 200),
            "APOLLO": ours(self.low_rank, "apollo", APOLLO),
            "FRUGAL": ours(self.low_rank, "frugal", FRUGAL),
            "GradNormLoRPAdamW": ours(self.low_rank, "", GradNormLoRPAdamW),
            "Trion": ours(self.trion, "trion"),
            "Muon": ours(self.whole_matrix, "muon", Muon),
            "PolarGrad": ours(self.whole_matrix, "muon", PolarGrad, polar="polar-express",
                              polar_steps=5),
            "SwitchLoRAAdamW": ours(self.pairs, ""),
        }
        dense = self.dense
        low: dict[str, Any] = {"kind": "low-rank", "no_deprecation_warning": True}
        found = {
            _BASELINE: Contestant(functools.partial(dense, torch.optim.AdamW, fused=True), "adamw",
                                  8 * self.dtype.itemsize if self.dtype.itemsize < 4 else 32),
            "torch.optim.AdamW foreach": Contestant(
                functools.partial(dense, torch.optim.AdamW, foreach=True)),
            "torch.optim.Muon": Contestant(self.torch_muon),
            "products alone": Contestant(self.products),
        }
        for name, of in own.items():
            found[name] = of(32)
            if name == "AdamW":
                found["AdamW8bit"] = Contestant(functools.partial(dense, AdamW8bit), "adamw", 8)
            elif "by product" not in name:
                found[f"{name}, 8 bits"] = of(8)
        found |= {
            "AdamW8bit, 8 bits of weights": Contestant(
                functools.partial(self.split, dense, AdamW8bit), "adamw", 8, 8),
            "GaLoreAdamW, 8 bits, 8 bits of weights": ours(
                self.split, "galore", self.low_rank, GaLoreAdamW, basis_bits=8)(8)._replace(
                    below=8)}
        return found | {
            "galore-torch": Contestant(self.peer("galore_torch", "GaLoreAdamW", **low),
                                       package="galore-torch"),
            "galore-torch, 8 bits": Contestant(
                self.peer("galore_torch", "GaLoreAdamW8bit", kind="low-rank"),
                package="galore-torch"),
            "fira": Contestant(self.peer("fira", "FiraAdamW", alpha="alpha", **low),
                               package="fira"),
            "bitsandbytes AdamW8bit": Contestant(
                self.peer("bitsandbytes", "optim.AdamW8bit"), package="bitsandbytes"),
            "torchao AdamW8bit": Contestant(self.peer("torchao.optim", "AdamW8bit"),
                                            package="torchao"),
            "flashoptim FlashAdamW": Contestant(self.peer("flashoptim", "FlashAdamW"),
                                                package="flashoptim"),
        }


def _provider(name: str, found: Contestant) -> str:
    return found.package or (
        "torch" if name.startswith("torch.") or name == "products alone" else "lissom")


def _about(name: str, found: Contestant) -> dict[str, Any]:
    """What every row says of its contestant."""
    provider = _provider(name, found)
    return {"optimizer": name, "provider": provider, "version": clock.version(provider)}


def _measure(name: str, found: Contestant, made: Made, taken: list[float], first: float,
             peak: int | None, bench: _Bench) -> dict[str, Any]:
    """One row, without what the others' times say of it."""
    rest = sorted(taken)
    median = statistics.median(rest)
    row = _about(name, found) | {
        "step_ms": median, "quartiles_ms": [rest[len(rest) // 4], rest[3 * len(rest) // 4]],
        "worst_ms": rest[-1], "worst_of_median": rest[-1] / median, "first_ms": first,
        "state_bytes": sum(map(names.state_bytes, made.optimizers)), "peak_extra_bytes": peak}
    if found.kind:
        row["bytes"], row["operations"] = roofline(
            found.kind, bench.matrices, bench.rest, bench.rank, found.bits, bench.dtype.itemsize,
            found.below)
    return row


def _peak_on_cpu(made: Made) -> int:
    live = LiveBytes()
    with live:
        made.step()
    return live.peak


def _alternating(chosen: dict[str, Contestant], bench: _Bench, steps: int,
                 deadline: clock.Deadline) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """On the CPU: all at once, by turns."""
    rows: list[dict[str, Any]] = []
    made: dict[str, Made] = {}
    for name, found in chosen.items():
        try:
            made[name] = found.make()
        except Exception as error:
            rows.append(_missing(name, found, error))
    taken: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(steps):
        if deadline.over() and len(next(iter(taken.values()), [])) > 2:
            break
        for name, x in list(made.items()):
            try:
                taken[name] += clock.times({name: x.step}, 1, "cpu", warm=0)[name]
            except Exception as error:
                rows.append(_missing(name, chosen[name], error))
                del made[name], taken[name]
    for name, x in made.items():
        peak = None if chosen[name].package else _peak_on_cpu(x)
        rows.append(_measure(name, chosen[name], x, taken[name][1:], taken[name][0], peak, bench))
    return rows, taken


def _missing(name: str, found: Contestant, error: Exception) -> dict[str, Any]:
    key = "missing" if isinstance(error, ImportError) else "failed"
    return _about(name, found) | {key: clock.first_line(error, 300)}


def _one_by_one(chosen: dict[str, Contestant], bench: _Bench, steps: int, deadline: clock.Deadline,
                note: Callable[[dict[str, Any]], None]) -> None:
    """On a GPU: each alone, the first again at the end."""
    order = list(chosen)
    for name in [*order, *order[:1]]:
        found = chosen[name]
        if deadline.over():
            note(_about(name, found) | {"skipped": "no time left"})
            continue
        made = None
        try:
            made = found.make()
            first = clock.times({name: made.step}, 1, "cuda", warm=0)[name][0]
            taken = []
            for _ in range(steps):
                taken += clock.times({name: made.step}, 1, "cuda", warm=0)[name]
                if deadline.over() and len(taken) > 4:
                    break
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            made.step()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            row = _measure(name, found, made, taken[2:] or taken, first, peak, bench)
            row["host_ms"], row["device_ms"] = clock.busy(made.step)
            note(row)
        except Exception as error:  # of any package's own code, and OutOfMemoryError
            note(_missing(name, found, error))
        finally:
            del made
            gc.collect()
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*MODELS], default="llama-60m")
    parser.add_argument("--layers", type=int, help="blocks (default: the model's)")
    parser.add_argument("--rank", type=int, help="default: the paper's, else 1024")
    parser.add_argument("--gap", type=int, default=200, help="update_proj_gap (default 200)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--only", metavar="NAMES", help="contestants, separated by semicolons")
    parser.add_argument("--providers", metavar="NAMES", help="only these, separated by commas")
    parser.add_argument("--bits", metavar="N", help="of moments, of lissom's own: 32, 8 or 32,8")
    parser.add_argument("--projection", help="of GaLore, Fira and GradNormLoRP")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=[*_DTYPES], help="default: fp32, bf16 on CUDA")
    parser.add_argument("--seconds", type=float, help="stop when these are over")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    args.dtype = args.dtype or ("bf16" if cuda else "fp32")
    if args.threads:
        torch.set_num_threads(args.threads)
    bench, deadline = _Bench(args), clock.Deadline(args.seconds)
    contestants = bench.contestants()
    chosen = args.only.split(";") if args.only else [*contestants] if cuda else [*_CPU]
    for name in chosen:
        if name not in contestants:
            parser.error(f"--only {name!r} must be of {', '.join(map(repr, contestants))}")
    for flag, text, known in (
            ("--providers", args.providers, {_provider(*x) for x in contestants.items()}),
            ("--bits", args.bits, {"32", "8"})):
        for word in text.split(",") if text else ():
            if word not in known:
                parser.error(f"{flag} {word!r} must be of {', '.join(sorted(known))}")
    if args.providers:
        chosen = [x for x in chosen
                  if _provider(x, contestants[x]) in args.providers.split(",")]
    if args.bits:
        chosen = [x for x in chosen if _provider(x, contestants[x]) != "lissom"
                  or str(contestants[x].bits) in args.bits.split(",")]
    if not chosen:
        parser.error(f"--providers {args.providers} and --bits {args.bits} leave no contestant")
    picked = {name: contestants[name] for name in chosen}
    largest = max(torch.Size(x).numel() for x in [*bench.matrices, *bench.rest])
    common = {"model": args.size, "layers": args.layers or bench.shape.layers,
              "vocabulary": bench.shape.vocabulary if args.whole else None, "rank": bench.rank,
              "gap": bench.gap, "projection": args.projection, "whole": args.whole,
              "steps": args.steps, "dtype": args.dtype, **clock.about("step", argv, args.device)}
    peaks: dict[str, float] = {}
    if cuda:
        peaks = {"bandwidth": clock.copy_bandwidth("cuda"), "peak": clock.product_peak("cuda")}
        common |= {"copy_GB_s": peaks["bandwidth"] / 1e9, "peak_TFLOP_s": peaks["peak"] / 1e12}
    rows: list[dict[str, Any]] = []

    def finished(row: dict[str, Any], against: str, other: float | None,
                 pairs: Sequence[float] = ()) -> None:
        """Add what a row says beside the others, show and keep it."""
        if "step_ms" in row:
            row |= {"against": against, "ratio": row["step_ms"] / other if other else None,
                    "pairs": [pairs[len(pairs) * i // 4] for i in (1, 2, 3)] if pairs else None}
            if row["peak_extra_bytes"] is not None:
                row["peak_of_largest"] = row["peak_extra_bytes"] / (
                    largest * bench.dtype.itemsize)
            if peaks and "bytes" in row:
                row["roofline_ms"] = 1e3 * max(row["bytes"] / peaks["bandwidth"],
                                               row["operations"] / peaks["peak"])
                row["of_roofline"] = row["step_ms"] / row["roofline_ms"]
                row["device_of_roofline"] = row["device_ms"] / row["roofline_ms"]
        rows.append({**row, **common})
        clock.save(args.json, rows)
        print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items() if k in (
                            "optimizer", "step_ms", "worst_of_median", "first_ms", "ratio", "pairs",
                            "first_ratio", "peak_of_largest", "host_ms", "device_ms", "of_roofline",
                            "device_of_roofline", "state_bytes",
                            "missing", "failed", "skipped")), flush=True)

    if cuda:
        def note(row: dict[str, Any]) -> None:
            base = next((x for x in rows if x["optimizer"] == chosen[0] and "step_ms" in x), None)
            finished(row, chosen[0], base["step_ms"] if base else None)

        _one_by_one(picked, bench, args.steps, deadline, note)
        return 0
    made, taken = _alternating(picked, bench, args.steps, deadline)
    of = {row["optimizer"]: row for row in made if "step_ms" in row}
    for row in made:
        name = row["optimizer"]
        against = _AGAINST.get(name, "galore-torch")
        other = of.get(against)
        pairs = sorted(a / b for a, b in zip(taken.get(name, [])[1:], taken.get(against, [])[1:],
                                             strict=False))
        if other and "step_ms" in row:
            row["first_ratio"] = row["first_ms"] / other["first_ms"]
        finished(row, against, other["step_ms"] if other else None, pairs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
