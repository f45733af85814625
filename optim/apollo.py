"""APOLLO: the gradient itself, scaled channel by channel as Adam would in a random subspace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import project
from .apply import Update
from .base import MatrixOptimizer
from .codec import Slot
from .lowrank import LowRankOptimizer, SubspaceOptions
from .norms import sizes
from .options import Option, choice, real
from .project import Bases
from .residual import Residual, gains, larger, limiter_slot

__all__ = ["APOLLO"]


class _Scaling(Residual):
    """u = scale * G diag(s), s_j = |N_j| / |R_j| along the longer side, or one s for all."""

    apart = True
    needs_low = True
    needs_gradient = True

    def slots(self, shape: tuple[int, ...], p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        return limiter_slot(shape, p, o)

    def measure(self, g: Tensor, low: Tensor, bases: Bases, o: Mapping[str, Any]) -> Tensor | None:
        return sizes(g, "full" if o["scale_type"] == "tensor" else bases.side(), bases.rows)

    def combine(self, g: Tensor, low: Tensor, n: Tensor, bases: Bases, measured: Tensor | None,
                s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> Update:
        assert measured is not None
        along = "full" if o["scale_type"] == "tensor" else bases.side()
        rows = bases.low_rows()
        gain = gains(sizes(n, along, rows), sizes(low, along, rows), measured,
                     larger(g, low, bases), rows if along == "right" else None, s, o)
        wide = torch.promote_types(low.dtype, torch.float32)
        return Update(dense=g, gain=(gain * o["scale"]).to(wide))


class APOLLOOptions(SubspaceOptions, total=False):
    """Options of :class:`APOLLO`, for type checkers."""

    limiter: float | None
    scale_type: str


class APOLLO(LowRankOptimizer):
    """AdamW-like training with the state of SGD: SGD with a scale for each channel.

    R = P G with a random P of r rows, N = Adam(R), u = scale * G diag(s) with s_j = |N_j| / |R_j|
    for each channel j of the longer side, held by Fira's limiter. P is drawn anew every
    ``update_proj_gap`` steps from a seed and never stored. ``APOLLO(rank=1, scale_type="tensor",
    scale=128 ** 0.5)`` is APOLLO-Mini. Other arguments, defaults and errors are those of
    :class:`lissom.optim.LowRankOptimizer`; there is no ``residual``, ``residual_scale`` or
    ``error_feedback_bits``.

    Args:
        rank: the paper takes a quarter of the hidden size.
        scale: default 1. The authors' code takes the square root of its ``scale``: their 128 is
            ``128 ** 0.5`` here.
        scale_type: ``"channel"`` (default), or ``"tensor"``: one factor per matrix.
        projection: default ``"random"``: independent normal entries of variance 1/r. May also be
            spelled ``proj``, as the authors' code does.
        limiter: default 1.01; None is off.

    A channel whose R vanishes while its N does not would get an unbounded s: it is capped, as in
    :class:`FiraAdamW`. With a random P of rank 1 this happens now and then.

    Source: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270.
    """

    algorithm: ClassVar[str] = "apollo"
    apart: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        **{k: v for k, v in LowRankOptimizer.options.items()
           if k not in ("residual", "residual_scale", "error_feedback_bits")},
        "projection": choice("random", "svd", "subspace", "randomized", "dct", "random"),
        "scale": real(1.0),
        "scale_type": choice("channel", "channel", "tensor"),
    }
    spellings: ClassVar[Mapping[str, str]] = {**LowRankOptimizer.spellings, "proj": "projection"}
    draw: ClassVar[Callable[..., Any]] = staticmethod(project.gaussian_basis)

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False,
        **options: Unpack[APOLLOOptions],
    ) -> None:
        MatrixOptimizer.__init__(self, params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, **options})

    def residual(self, o: Mapping[str, Any]) -> Residual:
        return _SCALING


_SCALING = _Scaling()
