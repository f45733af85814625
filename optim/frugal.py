"""FRUGAL: Adam on a few rows or columns of the gradient, its sign everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import codec, project
from .apply import Update
from .base import MatrixOptimizer
from .coordinates import Coordinates, put
from .lowrank import LowRankOptimizer, SubspaceOptions
from .options import Option, choice, real
from .project import Bases
from .residual import Residual, Sign

__all__ = ["FRUGAL"]


class _Free(Sign):
    """u = scale * P N + free_scale * sign(G - P R).

    With coordinates G - P R is G, where N does not take its place: one matrix D has both, and
    nothing is multiplied.
    """

    def measure(self, g: Tensor, low: Tensor, bases: Bases, o: Mapping[str, Any]) -> Tensor | None:
        rows, columns = bases.coordinates()
        if rows is None and columns is None:
            return super().measure(g, low, bases, o)
        *batch, m, n = g.shape
        cut = rows is not None and rows.cut
        # Signs are exact in 16 bits; two scales are not.
        kind = g.dtype if o["scale"] == o["free_scale"] else codec.wide(g[:0]).dtype
        d = g.new_empty((*batch, m + cut, n), dtype=kind)
        signs = d[..., :m, :]
        torch.sign(g if g.dtype == kind else signs.copy_(g), out=signs)
        signs.add_(g, alpha=0)  # NaN where G is not finite, where the sign is a number
        return d

    def combine(self, g: Tensor, low: Tensor, n: Tensor, bases: Bases, measured: Tensor | None,
                s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> Update:
        scale, free = o["scale"], o["free_scale"]
        rows, columns = bases.coordinates()
        if rows is None and columns is None:
            u = super().combine(g, low, n, bases, measured, s, o, t)
            # not _replace, which dynamo does not trace in torch 2.9 and 2.11
            return Update(u.left, u.right, u.factor, u.dense, free)
        assert measured is not None
        n = n.to(g.dtype).to(measured.dtype)
        if scale != free:
            measured.mul_(free)
            n = n * scale
        put(measured, n, rows, columns)
        return Update(dense=measured[..., :g.shape[-2], :], gain=scale if scale == free else 1.0)


def _coordinates(n: int, r: int, batch: tuple[int, ...], key: tuple[int, int], stream: int,
                 like: Tensor) -> Coordinates:
    """R of n coordinates, drawn at random, as a basis (..., n, r)."""
    # Drawn on the GPU if it is used there, as by project.gaussian, so that nothing synchronizes.
    place = like.device if like.device.type == "cuda" else torch.device("cpu")
    drawn = torch.rand((*batch, n), generator=project.generator(key, stream, place), device=place,
                       dtype=torch.float32)
    return Coordinates(drawn.topk(r).indices.sort().values.to(like.device), n)


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
    draw: ClassVar[Callable[..., Any]] = staticmethod(_coordinates)

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
