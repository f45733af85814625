"""Trion: Muon's update on the cosine-basis columns that the momentum has most of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import codec, dct, polar, project
from .apply import Update
from .codec import Slot, State
from .common import AdamWPart
from .inner import momentum_slots
from .muon import ADJUST_LR
from .options import Option, choice, integer, optional, real
from .ranked import Ranked
from .sharding import Rows
from .whole import Waiting, Whole

__all__ = ["Trion"]


class TrionOptions(AdamWPart, total=False):
    """Options of :class:`Trion`, for type checkers."""

    rank: int | None
    momentum: float
    ns_steps: int
    adjust_lr_fn: str | None
    polar_dtype: str
    matricize: str
    dct_basis: int
    column_norm: int
    similarity: str


class Trion(Ranked):
    """Muon in a low-rank subspace: only ``rank`` columns of the momentum are orthogonalized.

    Dion with columns of a cosine basis instead of power iterations. B = M + G; b = the ``rank``
    columns of B Q with the largest norm (rows of Q^T B where m < n); M <- B - (1 - momentum) b
    Q_r^T, so that what b misses stays in M in full (error feedback); u = s * NewtonSchulz(b) Q_r^T.
    Q is the same cosine basis for tall and for wide matrices, so the update of a transpose is the
    transpose of the update, up to s. State: M, of the weight's size. Parameters that are no
    matrices, or without a rank, get AdamW.

    Args:
        params: as :class:`lissom.optim.LowRankOptimizer`.
        lr: of the matrices, >= 0. Default 0.02. AdamW's part has ``lr_adamw``.
        betas, eps, weight_decay, amsgrad: of AdamW's part; decay is for both. Defaults
            (0.9, 0.95), 1e-8, 0.01, False.
        rank: columns, an int >= 1; None (default) is AdamW.
        momentum: in (0, 1]. Default 0.95.
        ns_steps: Newton-Schulz iterations, >= 1. Default 5.
        adjust_lr_fn: s for an m x n matrix: None or ``"original"`` sqrt(max(1, m / n));
            ``"match_rms_adamw"`` 0.2 sqrt(max(m, n)); ``"spectral"`` or
            ``"spectral_unclamped"`` sqrt(m / n); ``"unscaled"`` 1.
        polar_dtype: ``"bfloat16"`` (default), ``"float16"`` or ``"float32"``, of the Newton-Schulz
            products.
        lr_adamw: default 3e-4.
        dct_basis, column_norm, similarity, matricize and the options of every class: as
            :class:`lissom.optim.LowRankOptimizer`.

    Raises:
        TypeError, ValueError: an option or parameter that breaks its rule, by name and value.

    Source: Modoranu et al., arXiv 2505.17967. Its code transforms wide matrices with the other
    basis; ``dct_basis=3`` for m >= n and 2 for m < n follows it.
    """

    algorithm: ClassVar[str] = "trion"
    waits: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        **Ranked.options,
        "momentum": real(0.95, 0.0, 1.0, above=True),
        "ns_steps": integer(5, 1, 100),
        "adjust_lr_fn": optional(choice(None, *ADJUST_LR)),
        "polar_dtype": polar.OPTIONS["polar_dtype"],
        **dct.OPTIONS,
    }

    def __init__(
        self, params: Any, lr: float | Tensor = 0.02, betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False,
        **options: Unpack[TrionOptions],
    ) -> None:
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, "lr_adamw": 3e-4, **options})

    def slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        return momentum_slots(self.matrix_shape(p, o), p, o)

    def by_rows(self, p: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> bool:
        return len(self.matrix_shape(p, o)) == 2

    def while_waiting(self, p: Tensor, o: Mapping[str, Any], rows: Rows | None) -> int:
        rank, side = self.rank_and_side(p, o)
        elements = super().while_waiting(p, o, rows)
        if rows is None or side == "right":
            return elements
        # Q_r^T B is whole on each rank, and Newton-Schulz keeps several of its size.
        return max(elements, 4 * rank * self.matrix_shape(p, o)[-1])

    def update(self, g: Tensor, s: State, o: Mapping[str, Any], t: int
               ) -> Waiting[Update]:
        m, n = codec.whole_shape(g, s)[-2:]
        left = project.side_of(m, n, "std") == "left"
        # B = M + G
        full = s["momentum_buffer"] + g
        del s["momentum_buffer"]  # decoded, it would be a third matrix
        # b = columns of B Q, or rows of Q^T B
        rows = codec.rows_of(s)
        index, low = dct.project(full, min(o["rank"], m, n), kind=o["dct_basis"],
                                 dim=-2 if left else -1, norm=o["column_norm"],
                                 similarity=o["similarity"], held=rows)
        oracle = polar.Oracle("newton-schulz", o["ns_steps"], o["polar_dtype"])
        (o_,) = yield Whole((low,), oracle, whole=left)
        o_ = o_.to(g.dtype)
        basis = dct.columns(index, m if left else n, o["dct_basis"], full)
        basis = rows.own(basis) if left and rows is not None else basis
        factors = (basis, low) if left else (low, basis.mT)
        # M <- B - (1 - mu) b Q_r^T
        add = torch.addmm if g.ndim == 2 else torch.baddbmm
        s["momentum_buffer"] = add(full, *factors, alpha=o["momentum"] - 1, out=full)
        # u = s * NS(b) Q_r^T
        basis = basis.to(g.dtype)
        factor = ADJUST_LR[o["adjust_lr_fn"] or "original"](m, n)
        return Update(basis, o_, factor) if left else Update(o_, basis.mT, factor)
