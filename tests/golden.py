"""Recorded official trajectories: ../shared/golden, where that folder is at hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(),
                                  reason="../shared/golden (official runs) is absent")


def load(name: str) -> tuple[dict[str, Any], Tensor, list[Tensor], list[Tensor]]:
    """The case, the initial weight, gradients, and weights after each step."""
    from safetensors import safe_open

    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        case = json.loads(file.metadata()["case"])
        gradients = [file.get_tensor(f"grad.{i:03d}") for i in range(case["steps"])]
        weights = [file.get_tensor(f"weight.{i + 1:03d}") for i in range(case["steps"])]
        return case, file.get_tensor("w0"), gradients, weights


def follow(optimizer: Any, p: Any, gradients: list[Tensor],
           before: Callable[[int], Any] = lambda t: None) -> list[Tensor]:
    """Our weights after each step; ``before`` is called with the step's 1-based number."""
    out = []
    for t, g in enumerate(gradients, 1):
        before(t)
        p.grad = g.clone()
        optimizer.step()
        out.append(p.detach().clone())
    return out


def worst(ours: list[Tensor], theirs: list[Tensor], start: Tensor) -> float:
    """Largest distance along the way, relative to the total movement."""
    whole = (theirs[-1] - start).norm()
    return max(((a - b).norm() / whole).item() for a, b in zip(ours, theirs, strict=True))
