"""FRUGAL: Adam on a few rows or columns of the gradient, its sign everywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import project
from .apply import Update
from .base import MatrixOptimizer
from .lowrank import LowRankOptimizer, SubspaceOptions
from .options import Option, choice, real
from .project import Bases
from .residual import Residual, Sign

__all__ = ["FRUGAL"]


class _Free(Sign):
    """u = scale * P N + free_scale * sign(G - P R)."""

    def combine(self, g: Tensor, low: Tensor, n: Tensor, bases: Bases, measured: Tensor | None,
                s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> Update:
        u = super().combine(g, low, n, bases, measured, s, o, t)
        # not _replace, which dynamo does not trace in torch 2.9 and 2.11
        return Update(u.left, u.right, u.factor, u.dense, o["free_scale"])


def _coordinates(n: int, r: int, batch: tuple[int, ...], key: tuple[int, int], stream: int,
                 like: Tensor) -> Tensor:
    """The columns of the identity for r of n coordinates, drawn at random: (..., n, r)."""
    # Drawn on the GPU if it is used there, as by project.gaussian, so that nothing synchronizes. A
    # comparison for the same reason: functional.one_hot would check the indices on the host.
    place = like.device if like.device.type == "cuda" else torch.device("cpu")
    drawn = torch.rand((*batch, n), generator=project.generator(key, stream, place), device=place,
                       dtype=torch.float32)
    index = drawn.topk(r).indices.sort().values
    numbers = torch.arange(n, device=place).unsqueeze(-1)
    return (index.unsqueeze(-2) == numbers).to(like)


class FRUGALOptions(SubspaceOptions, total=False):
    """Options of :class:`FRUGAL`, for type checkers."""

    free_scale: float


class FRUGAL(LowRankOptimizer):
    """Full-rank training with low-rank state: AdamW in a subspace, signSGD in all the rest.

    R = P^T G, N = Adam(R), u = scale * P N + free_scale * sign(G - P R). Every
    ``update_proj_gap`` steps the subspace is another one, and Adam starts anew in it, its bias
    correction too. State: 2 r max(m, n) numbers. Other arguments, defaults and errors are those of
    :class:`lissom.optim.LowRankOptimizer`; there is no ``residual``, and so no ``limiter``,
    ``residual_scale`` or ``error_feedback_bits``.

    Args:
        lr: of both parts: AdamW's, not GaLore's.
        rank: the paper takes a quarter of the width.
        scale: default 1.
        free_scale: multiplies the signs, >= 0. Default 1; the paper's, too, for pre-training.
        projection: ``"random"`` (default): r coordinates of the shorter side, the same for the
            whole matrix, drawn from a seed (the paper's RandK in columns); or any other of the
            base, ``"svd"`` for GaLore's.
        moments: default ``"reset"``.

    Source: Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for
    Scalable Training", arXiv 2411.07837. Not offered: its blocks of whole layers, and other rules
    than Adam and the sign.
    """

    algorithm: ClassVar[str] = "frugal"
    options: ClassVar[Mapping[str, Option]] = {
        **{k: v for k, v in LowRankOptimizer.options.items()
           if k not in ("residual", "residual_scale", "error_feedback_bits", "limiter")},
        "projection": choice("random", "svd", "subspace", "randomized", "dct", "random"),
        "moments": choice("reset", "keep", "rotate", "reset"),
        "scale": real(1.0),
        "free_scale": real(1.0),
    }
    draw = staticmethod(_coordinates)

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False,
        **options: Unpack[FRUGALOptions],
    ) -> None:
        MatrixOptimizer.__init__(self, params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, **options})

    def residual(self, o: Mapping[str, Any]) -> Residual:
        return _FREE


_FREE = _Free()
