"""PolarGrad's matrix problems, side by side with Muon and Adam: losses, gaps, condition numbers.

Sizes, data, rates and schedules are those of arXiv 2505.21799 and of its authors' repository
(timlautk/polargrad): fp32 on the CPU, seed 42 before the data and again before the first iterate,
two QDWH iterations from a lower bound of eps, Muon without a factor for the shape, rates times
0.99 or 0.95 every 25 steps where "decay" is in the name. Beside each figure stands what the
authors' corrected code gave when we ran it; quadratic gaps are computed in float64.

    python -m lissom.bench.polargrad --problem all --json FILE --plot PREFIX
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..optim import Muon, PolarGrad
from . import curves

__all__ = ["PROBLEMS", "main"]

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
_SEED = 42
#: Steps whose gap is reported for the quadratic problem.
MARKS = (100, 500, 1000, 2000, 4000)


class Entry(NamedTuple):
    """A contestant: how it is made, whether its rate decays, its steps, the reference figures."""

    make: Make
    decay: bool
    reference: tuple[float, ...]
    steps: int | None = None


class Problem(NamedTuple):
    """A problem: its first iterate and loss, what is reported, its contestants."""

    start: Callable[[], tuple[list[nn.Parameter], Callable[[], Tensor], Callable[[], list[float]]]]
    figures: str
    steps: int
    decay: float
    entries: dict[str, Entry]


def _polargrad(lr: float, momentum: float | None = None, **options: Any) -> Make:
    given: dict[str, Any] = {"polar": "qdwh", "polar_steps": 2, "lower_bound": "eps", **options}
    return lambda ps: PolarGrad(ps, lr=lr, momentum=momentum, weight_decay=0.0, **given)


def _muon(lr: float, polar: str) -> Make:
    more: dict[str, Any] = {"polar_steps": 2, "lower_bound": "eps"} if polar == "qdwh" else {}
    return lambda ps: Muon(ps, lr=lr, weight_decay=0.0, adjust_lr_fn="unscaled", polar=polar,
                           **more)


def _adam(lr: float) -> Make:
    return lambda ps: torch.optim.Adam(ps, lr=lr)


def _quadratic() -> Any:
    """f(X) = |A X B - C|^2 / 2; the gap to its least value, in float64."""
    torch.manual_seed(_SEED)
    a, b, c = torch.randn(1000, 500), torch.randn(100, 250), torch.randn(1000, 250)
    torch.manual_seed(_SEED)
    x = nn.Parameter(torch.empty(500, 100).uniform_(-1, 1))
    wide = [z.double() for z in (a, b, c)]
    left, right = torch.linalg.qr(wide[0]).Q, torch.linalg.qr(wide[1].mT).Q
    least = 0.5 * (wide[2] - left @ (left.mT @ wide[2] @ right) @ right.mT).square().sum()

    def figures() -> list[float]:
        value = 0.5 * (wide[0] @ x.detach().double() @ wide[1] - wide[2]).square().sum()
        return [(value - least).item()]

    return [x], lambda: 0.5 * (a @ x @ b - c).square().sum(), figures


def _logistic() -> Any:
    """Sum of softplus(-C o (A_b X B)) over 1000 rows a step; the mean over all entries."""
    torch.manual_seed(_SEED)
    a, b = torch.randn(10000, 1000), torch.randn(100, 400)
    c = 2.0 * (torch.randn(10000, 400) > 0.5).float() - 1
    torch.manual_seed(_SEED)
    x = nn.Parameter(torch.empty(1000, 100).uniform_(-1, 1))

    def loss() -> Tensor:
        rows = torch.randint(0, len(a), (1000,))
        return functional.softplus(-c[rows] * (a[rows] @ x @ b)).sum()

    def figures() -> list[float]:
        with torch.no_grad():
            return [functional.softplus(-c * (a @ x @ b)).mean().item()]

    return [x], loss, figures


def _completion() -> Any:
    """Mean square over the 30 % observed entries of X Y^T - T; relative error of all of them."""
    torch.manual_seed(_SEED)
    target = torch.randn(500, 5) @ torch.randn(250, 5).mT
    mask = (torch.rand(500, 250) < 0.3).float()
    torch.manual_seed(_SEED)
    x = nn.Parameter(torch.empty(500, 5).uniform_(-1, 1))
    y = nn.Parameter(torch.empty(250, 5).uniform_(-1, 1))

    def loss() -> Tensor:
        return (mask * (x @ y.mT - target)).square().sum() / mask.sum()

    def figures() -> list[float]:
        with torch.no_grad():
            return [loss().item(), ((x @ y.mT - target).norm() / target.norm()).item()]

    return [x, y], loss, figures


PROBLEMS: dict[str, Problem] = {
    "quadratic": Problem(_quadratic, f"gap after {MARKS} steps", 4000, 0.99, {
        "PolarGrad QDWH": Entry(_polargrad(4e-8), False, (7748, 198, 24.5, 1.15, 5.5e-3)),
        "PolarGrad QDWH, decay": Entry(_polargrad(4.75e-8), True,
                                       (40.4, 5.9e-9, 4.0e-9, 3.1e-9, 3.4e-9)),
        "PolarGrad ZOLO-PD": Entry(
            _polargrad(3e-8, polar="zolo-pd", lower_bound=None), False,
            (4079, 94.5, 12.8, 0.720, 3.4e-3)),
        "Muon NS": Entry(_muon(0.1, "newton-schulz"), False, (3.0e8, 8.0e4, 7.6e4, 7.2e4, 7.9e4)),
        "Muon QDWH": Entry(_muon(0.1, "qdwh"), False, (2.7e8, 7.9e4, 7.6e4, 7.8e4, 7.6e4)),
        "Muon QDWH, decay": Entry(_muon(0.05, "qdwh"), True, (8.7e8, 2.9e6, 8.9e3, 3.8e3, 800)),
        "Adam": Entry(_adam(0.05), False, (3.6e5, 13.0, 66, 935, 3.8e4)),
        "Adam, decay": Entry(_adam(0.05), True, (3.8e5, 7.8, 22.9, 5.1, 0.93)),
        "PolarGradM polar first": Entry(_polargrad(4e-7, 0.95, polar_first=True), False,
                                        (5.0e4, 2.7e-8, 2.7e-8, 2.7e-8, 2.8e-8)),
        "PolarGradM polar first, decay": Entry(_polargrad(5e-7, 0.95, polar_first=True), True,
                                               (6.0e4, 2.8e-8, 2.2e-8, 1.6e-8, 9.6e-9)),
        "PolarGradM momentum first": Entry(_polargrad(2e-7, 0.9), False,
                                           (3.8e4, 1.2e-8, 1.1e-8, 1.2e-8, 1.1e-8)),
        "PolarGradM momentum first, decay": Entry(_polargrad(2.5e-7, 0.9), True,
                                                  (5.1e4, 1.1e-8, 9.4e-9, 8.0e-9, 5.0e-9)),
    }),
    "logistic": Problem(_logistic, "mean loss over all entries at the end", 1500, 0.95, {
        "PolarSGD": Entry(_polargrad(1.5e-7), False, (1.0164,)),
        "PolarSGD, decay": Entry(_polargrad(2.5e-7), True, (0.6865,)),
        "Muon NS": Entry(_muon(0.1, "newton-schulz"), False, (0.9498,)),
        "Muon QDWH": Entry(_muon(0.1, "qdwh"), False, (0.9750,)),
        "Muon QDWH, decay": Entry(_muon(0.2, "qdwh"), True, (0.7071,)),
        "Adam": Entry(_adam(5e-3), False, (0.8033,)),
        "Adam, decay": Entry(_adam(1e-2), True, (0.6877,)),
        "PolarSGDM polar first": Entry(_polargrad(2.5e-7, 0.95, polar_first=True), False,
                                       (1.0248,)),
        "PolarSGDM momentum first": Entry(_polargrad(2.5e-7, 0.9), False, (1.0590,)),
    }),
    "completion": Problem(_completion, "observed loss, relative error of all entries", 1000, 0.95, {
        "PolarGrad": Entry(_polargrad(50), False, (2.3e-14, 7.5e-8)),
        "PolarGrad, decay": Entry(_polargrad(50), True, (2.4e-14,)),
        "Muon NS": Entry(_muon(0.25, "newton-schulz"), False, (1.5e-3, 1.6e-2)),
        "Muon QDWH": Entry(_muon(0.25, "qdwh"), False, (6.0e-4, 1.0e-2)),
        "Muon QDWH, decay": Entry(_muon(0.25, "qdwh"), True, (1.1e-5, 1.4e-3)),
        "Adam": Entry(_adam(0.05), False, (7.4e-8, 1.4e-4)),
        "Adam, decay": Entry(_adam(0.05), True, (1.8e-13, 2.1e-7)),
        "PolarGradM polar first": Entry(_polargrad(100, 0.5, polar_first=True), False, (2.4e-14,),
                                        200),
        "PolarGradM momentum first": Entry(_polargrad(50, 0.5), False, (2.4e-14,), 200),
    }),
}


def _condition(g: Tensor) -> float:
    s = torch.linalg.svdvals(g.double())
    return (s[0] / s[-1]).item() if s[-1] > 0 else math.inf


def run(name: str, contestant: str, steps: int | None = None) -> dict[str, Any]:
    """One contestant on one problem.

    Returns:
        figures beside their reference, curves of (step, figures, condition number of the
        gradient of the first matrix), and seconds.
    """
    problem = PROBLEMS[name]
    entry = problem.entries[contestant]
    params, loss, figures = problem.start()
    optimizer = entry.make(params)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 25, problem.decay)
    total = steps or entry.steps or problem.steps
    every, curve, marked = max(1, total // 40), [], []
    begin = time.perf_counter()
    for k in range(1, total + 1):
        optimizer.zero_grad()
        loss().backward()
        if k % every == 0 or k == 1:
            gradient = params[0].grad
            assert gradient is not None
            curve.append((k, *figures(), _condition(gradient)))
        optimizer.step()
        if entry.decay:
            schedule.step()
        if name == "quadratic" and k in MARKS:
            marked.append(figures()[0])
    return {"problem": name, "optimizer": contestant, "steps": total, "what": problem.figures,
            "figures": marked or figures(), "reference": list(entry.reference),
            "curve": curve, "seconds": time.perf_counter() - begin, "seed": _SEED,
            "torch": torch.__version__, "device": "cpu", "threads": torch.get_num_threads()}


def _plot(rows: list[dict[str, Any]], file: str) -> None:
    """Curves of one problem: its first figure, and the gradient's condition number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5), layout="constrained")
    for i, row in enumerate(rows):
        k, style = [point[0] for point in row["curve"]], "-" if i < 10 else "--"
        left.plot(k, [max(point[1], 1e-16) for point in row["curve"]], style)
        right.plot(k, [point[-1] for point in row["curve"]], style, label=row["optimizer"])
    left.set(yscale="log", xlabel="step", ylabel={
        "quadratic": "gap to the least value", "logistic": "mean loss over all entries",
        "completion": "loss on observed entries"}[rows[0]["problem"]], title=rows[0]["problem"])
    right.set(yscale="log", xlabel="step", ylabel="condition number of the gradient")
    figure.legend(fontsize=8, loc="outside right upper")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=[*PROBLEMS, "all"], default="all")
    parser.add_argument("--steps", type=int, help="default: the problem's own")
    parser.add_argument("--only", metavar="NAMES", help="contestants, separated by semicolons")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="PREFIX", help="PREFIX-PROBLEM.png for each problem")
    args = parser.parse_args(argv)
    curves.check(parser, args.plot)
    rows = []
    for name in PROBLEMS if args.problem == "all" else [args.problem]:
        own = []
        for contestant in PROBLEMS[name].entries:
            if args.only and contestant not in args.only.split(";"):
                continue
            row = run(name, contestant, args.steps)
            print(f"{name}, {contestant}: {', '.join(f'{x:.4g}' for x in row['figures'])} "
                  f"(reference {', '.join(f'{x:.4g}' for x in row['reference'])}), "
                  f"{row['seconds']:.0f} s", flush=True)
            own.append(row)
        if args.plot and own:
            _plot(own, f"{args.plot}-{name}.png")
        rows += own
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
