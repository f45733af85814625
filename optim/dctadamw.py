"""DCT-AdamW: Adam on the columns of a cosine basis that are largest in the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .lowrank import LowRankOptimizer
from .options import Option, choice, integer, real

__all__ = ["DCTAdamW"]


class DCTAdamW(LowRankOptimizer):
    """GaLore with a fixed cosine basis: no SVD, no QR, no basis in the state.

    At each step (or each ``update_proj_gap``) Adam works on the r columns of G Q with the largest
    norm, Q the n x n cosine basis; moments of columns that stay are kept. State is Adam's on
    an m x r matrix and r indices. Arguments, defaults and errors are those of
    :class:`lissom.optim.LowRankOptimizer`, but for these:

    Args:
        projection: default ``"dct"``.
        update_proj_gap: default 1. With a longer gap refreshes come at the 1-based steps 1 and
            t % gap == 0, as in the authors' code, shifted per matrix unless
            ``refresh="synchronous"``.
        moments: default ``"rotate"``.
        scale: default 1.
        dct_basis: 2 (default): the DCT-II of G's rows, what the authors' FFT computes; 3: the
            columns of the same matrix, what their matrix product computes.
        column_norm: 1 (default) or 2; with 2 the choice captures the most energy.
        error_feedback_bits: what the projection drops is added to the next gradient, kept in 32,
            8 or 4 bits per element of the weight. Default None: dropped.

    Source: Modoranu et al., arXiv 2505.17967. Epsilon is placed as in torch.optim.AdamW.
    """

    algorithm: ClassVar[str] = "dct-adamw"
    apart: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        **LowRankOptimizer.options,
        "projection": choice("dct", "svd", "subspace", "randomized", "dct", "random"),
        "update_proj_gap": integer(1, 1),
        "moments": choice("rotate", "keep", "rotate", "reset"),
        "scale": real(1.0),
    }
    first_phase: ClassVar[int] = 1
