"""PolarGrad: the polar factor of the gradient, at the gradient's own scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import codec, polar
from .apply import Update
from .base import MatrixOptimizer
from .codec import Slot, State
from .common import AdamWPart
from .inner import momentum_slots
from .options import Option, boolean, choice, optional, real, several
from .whole import Waiting

__all__ = ["PolarGrad"]


class PolarGradOptions(AdamWPart, total=False):
    """Options of :class:`PolarGrad`, for type checkers."""

    betas: tuple[float, float]
    eps: float
    amsgrad: bool
    polar: str
    polar_steps: int | None
    polar_dtype: str
    lower_bound: float | str | None
    nuclear_scaling: bool
    matricize: str


class PolarGrad(MatrixOptimizer):
    """Like Muon, with updates that keep the scale of the gradient and so vanish with it.

    Steepest descent in the spectral norm: u = |M|_* U with U = polar(M). Momentum first (default):
    M <- beta M + (1 - beta) G, u = <M, U> U with U = polar(M). Polar first: U = polar(G),
    M <- beta M + (1 - beta) U, u = <G, U> M. <A, polar(A)> is the nuclear norm |A|_*, which Muon
    leaves out: with it the update vanishes with the gradient, and a constant rate converges.
    ``momentum=None`` is the paper's PolarGrad, without an average and without state; with
    ``momentum`` it is its PolarGradM. Vectors and groups with ``algorithm="adamw"`` get AdamW.

    The rate has units of 1 / (smoothness), not of a change of weights: the change of p is
    lr |M|_* in spectral norm and lr |M|_* sqrt(rank) in Frobenius norm. No rate of Muon or AdamW
    carries over, and nuclear norms vary by orders during training: warm up or clip.

    Args:
        params: tensors, (name, tensor) pairs, or groups of either.
        lr: of the matrices, >= 0. Default 0.02, the released code's. AdamW's part has ``lr_adamw``.
        momentum: beta in [0, 1), or None for no average and no state. Default 0.95.
        weight_decay: decoupled, multiplied by lr, before the update, of both parts. Default 0.01.
        polar_first: average the factors instead of the gradients. Default False.
        polar: the oracle: ``"qdwh"`` (default), ``"zolo-pd"``, ``"svd"``, ``"polar-express"``,
            ``"newton-schulz"``; see :func:`lissom.optim.polar.polar`. On matrices without full rank
            they differ: the rational ones bring directions of rounding noise to 1.
        polar_steps: of the iteration; ``"svd"`` is none. Default None: to convergence. The released
            default is ``polar="qdwh", polar_steps=2, lower_bound="eps"``, which does not converge.
        polar_dtype: of the products of the polynomial ones: ``"bfloat16"`` (default),
            ``"float16"``, ``"float32"``. ``"qdwh"`` is fp32 for 16-bit weights, ``"zolo-pd"``
            float64.
        lower_bound: see :func:`lissom.optim.polar.polar`. Default None: estimated.
        nuclear_scaling: False leaves the nuclear norm out. Default True. It is found as
            <A, polar(A)>, exact where the oracle has converged: ``"newton-schulz"`` in 5 steps is
            10 to 30 % off.
        matricize: as :class:`lissom.optim.Muon`. Default ``"flatten"``.
        betas, eps, amsgrad, lr_adamw, betas_adamw, weight_decay_adamw: of AdamW's part. Defaults
            (0.9, 0.95), 1e-8, False, 3e-4, as betas, as weight_decay.
        maximize, state_bits, rounding, master_bits, nonfinite, seed, shards, metrics, algorithm,
            foreach, fused, capturable, differentiable: as :class:`lissom.optim.AdamW`.

    Raises:
        TypeError, ValueError: an option or parameter that breaks its rule, by name and value.

    Source: Lau, Long, Su, "PolarGrad: A Class of Matrix-Gradient Optimizers from a Unifying
    Preconditioning Perspective", arXiv 2505.21799.
    """

    algorithm: ClassVar[str] = "polargrad"
    meaning: ClassVar[tuple[str, ...]] = ("polar_first",)
    waits: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        **polar.OPTIONS,
        "betas": several((0.9, 0.95), real(None, 0.0, 1.0, below=True), 2),
        "momentum": optional(real(0.95, 0.0, 1.0, below=True)),
        "polar_first": boolean(False),
        "nuclear_scaling": boolean(True),
        "matricize": choice("flatten", "flatten", "batch"),
    }

    def __init__(
        self, params: Any, lr: float | Tensor = 0.02, momentum: float | None = 0.95,
        weight_decay: float = 1e-2, polar_first: bool = False, **options: Unpack[PolarGradOptions],
    ) -> None:
        super().__init__(params, {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay,
            "polar_first": polar_first, "lr_adamw": 3e-4, **options})

    def check_combination(self, o: Mapping[str, Any], params: list[Tensor], explicit: set[str],
                          where: str) -> None:
        polar.check_options(o, where)

    def slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        if o["momentum"] is None:
            return {}
        return momentum_slots(self.matrix_shape(p, o), p, o)

    def by_rows(self, p: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> bool:
        return len(self.matrix_shape(p, o)) == 2

    def update(self, g: Tensor, s: State, o: Mapping[str, Any], t: int
               ) -> Waiting[Update]:
        average, g = s.get("momentum_buffer"), codec.wide(g)
        # A = G, or M <- beta M + (1 - beta) G, which is written once the polar factor is there
        direct = average is None or o["polar_first"]
        a = g if average is None or direct else torch.lerp(average, g, 1 - o["momentum"])
        (u,) = yield polar.request(o, a)
        gain: Tensor | float = 1.0
        if o["nuclear_scaling"]:
            # <A, polar(A)> = |A|_*
            inner = torch.linalg.vecdot(a.flatten(-2), u.flatten(-2).to(a.dtype))
            gain = codec.row_sum(inner[..., None, None], s)
        if average is None:
            return Update(dense=u, gain=gain)
        average.lerp_(u.to(a.dtype) if direct else g, 1 - o["momentum"])
        return Update(dense=average if direct else u, gain=gain)
