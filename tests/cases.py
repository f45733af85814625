"""One row per optimizer class; the contract tests walk rows x promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lissom.optim import AdamW, GaLoreAdamW
from lissom.optim.base import MatrixOptimizer

from . import oracle


@dataclass(frozen=True)
class Case:
    """A class with options, and its float64 oracle (gradients, start, options) -> weights."""

    name: str
    make: type[MatrixOptimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    oracle: Callable[..., list[torch.Tensor]] = oracle.adamw
    bad: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, params: Any, **more: Any) -> MatrixOptimizer:
        return self.make(params, **{**self.options, **more})


COMMON_BAD = {
    "lr": [-1.0, float("nan"), "fast", True, None],
    "betas": [(0.9, 1.0), (0.9,), 0.9, (-0.1, 0.9), "ab"],
    "eps": [-1e-8, float("inf")],
    "weight_decay": [-0.1, "x"],
    "maximize": [1, None],
    "amsgrad": ["yes"],
    "state_bits": [0, 7, "32", 32.0],
    "nonfinite": ["ignore", None],
    "seed": [-1, 1.5],
}

LOW_RANK_BAD = {
    "rank": [0, -3, 2.0, "8", True],
    "update_proj_gap": [0, 1.5],
    "scale": [-0.25, "x"],
    "proj_type": ["sideways", 1],
    "projection": ["pca"],
    "moments": ["forget"],
    "refresh": ["never"],
    "matricize": ["auto"],
}


def galore(**options: Any) -> Case:
    given = {"rank": 3, "update_proj_gap": 4, **options}
    name = "galore-" + "-".join(str(v) for v in options.values())
    return Case(name.rstrip("-"), GaLoreAdamW, given, oracle.galore, COMMON_BAD | LOW_RANK_BAD)


CASES = [
    Case("adamw", AdamW, bad=COMMON_BAD),
    Case("adamw-amsgrad", AdamW, {"amsgrad": True}, bad=COMMON_BAD),
    Case("adamw-16bit", AdamW, {"state_bits": 16}, bad=COMMON_BAD),
    galore(),
    *(galore(projection=x) for x in ("svd", "randomized", "random")),
    *(galore(proj_type=x, projection="svd") for x in ("reverse_std", "left", "right", "full")),
    *(galore(moments=x) for x in ("rotate", "reset")),
    galore(refresh="synchronous"),
    galore(state_bits=16),
]
SHAPES = [(), (5,), (0, 3), (7, 5), (5, 7), (6, 6), (1, 4), (4, 1), (2, 3), (4, 3, 2), (3, 2, 2, 2)]
