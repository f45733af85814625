"""GaLore: Adam in a low-rank subspace of the gradient that is found anew every few steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .lowrank import LowRankOptimizer
from .options import Option, choice

__all__ = ["GaLoreAdamW", "GaLoreAdamW8bit"]


class GaLoreAdamW(LowRankOptimizer):
    """AdamW on the projected gradient R = P^T G or G Q, lifted back and scaled.

    Every ``update_proj_gap`` steps the basis becomes the leading singular vectors of the current
    gradient; p <- (1 - lr wd) p - lr * scale * lift(Adam(R)). The paper trains with lr 0.01, so
    that matrices move by lr * scale = 0.0025. Arguments, defaults and errors are those of
    :class:`lissom.optim.LowRankOptimizer`.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    arXiv 2403.03507. Epsilon and decay are placed as in torch.optim.AdamW; bases are found by
    warm-started power iterations where the authors' code takes an SVD (``projection="svd"``).
    """

    algorithm: ClassVar[str] = "galore"
    apart: ClassVar[bool] = True


class GaLoreAdamW8bit(GaLoreAdamW):
    """:class:`GaLoreAdamW` with ``state_bits=8``, under the name that galore-torch gave it."""

    options: ClassVar[Mapping[str, Option]] = {
        **GaLoreAdamW.options, "state_bits": choice(8, 32, 16, 8, 4)}
