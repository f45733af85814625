"""Fira: GaLore, with the rest of the gradient scaled as Adam scaled its subspace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .lowrank import LowRankOptimizer
from .options import Option, choice
from .residual import RESIDUALS

__all__ = ["FiraAdamW"]


class FiraAdamW(LowRankOptimizer):
    """Full-rank training with low-rank state: u = scale * (P N + S), S the scaled residual.

    S = (G - P R) diag(phi), phi_i = |N_i| / |R_i| for each column i (each row, for a right
    basis), held by a limiter to a growth of ``limiter`` - 1 = 1 % a step. State is GaLoreAdamW's
    and one number per matrix. Arguments, defaults and errors are those of
    :class:`lissom.optim.LowRankOptimizer`, but for these:

    Args:
        residual: default ``"fira"``.
        limiter: default 1.01; None is off, which the paper finds worse.
        residual_scale: ``"paper"`` (default) is the equation above; ``"released"`` is the authors'
            code, which leaves S and the gradient in it unscaled: scale * P N +
            (G - scale * P R) diag(phi), and limits before Adam's bias correction.
        scale: default 0.25, the paper's up to 350M parameters; it takes 0.0625 at 1B.

    A column whose R vanishes while its N does not would get an unbounded phi: it is capped where
    S would exceed 10 times what is expected of that column. A limiter that has seen only a zero
    or tiny gradient limits nothing. |S| is computed from the norms of G and R; with bf16 weights
    the scale of S gets less exact the less of the gradient is outside the subspace.

    Source: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
    Constraint?", arXiv 2410.01623.
    """

    algorithm: ClassVar[str] = "fira"
    apart: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        **LowRankOptimizer.options, "residual": choice("fira", *RESIDUALS)}
