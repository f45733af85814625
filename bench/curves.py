"""A picture of training losses, as several scripts draw it."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import torch

__all__ = ["check", "draw"]


def check(parser: argparse.ArgumentParser, file: str | None) -> None:
    """Refuse, before any work, a picture that could not be drawn in the end."""
    if file and importlib.util.find_spec("matplotlib") is None:
        parser.error(f"--plot {file!r} needs matplotlib: pip install 'lissom[bench]'")


def draw(file: str, curves: Iterable[tuple[str, Sequence[float]]], *, window: int = 20,
         linewidth: float = 1, figsize: tuple[float, float] = (9, 6),
         fontsize: str | None = None, **axes: Any) -> None:
    """Running means of losses in nats per byte, by the step.

    Args:
        file: the picture.
        curves: lines of the legend, and the losses of all steps.
        window: steps that a mean is over; the whole of a shorter curve.
        linewidth: of curves, in points.
        figsize: inches.
        fontsize: of the legend, as matplotlib calls it.
        axes: title, limits and so on.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=figsize, layout="constrained")
    for label, losses in curves:
        curve = torch.tensor(losses, dtype=torch.float64)
        width = min(window, len(curve))
        panel.plot(range(width, len(curve) + 1), curve.unfold(0, width, 1).mean(-1),
                   linewidth=linewidth, label=label)
    panel.set(xlabel="step", ylabel="training loss, nats per byte", **axes)
    panel.legend(fontsize=fontsize)
    panel.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
