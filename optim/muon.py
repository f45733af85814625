"""Muon: momentum whose matrices are orthogonalized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
from .options import Option, boolean, choice, integer, optional, real, several
from .whole import Waiting

__all__ = ["ADJUST_LR", "Muon"]

#: ``adjust_lr_fn``: (m, n) to the factor s of the update; None is ``"original"``.
ADJUST_LR: dict[str, Callable[[int, int], float]] = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),  # Jordan et al., 2024
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),  # Moonlight, arXiv 2502.16982
    "spectral": lambda m, n: math.sqrt(m / n),
    "spectral_unclamped": lambda m, n: math.sqrt(m / n),  # torch.optim.Muon's name, from 2.14 on
    "unscaled": lambda m, n: 1.0,
}


class MuonOptions(AdamWPart, total=False):
    """Options of :class:`Muon`, for type checkers."""

    betas: tuple[float, float]
    amsgrad: bool
    polar: str
    polar_steps: int | None
    polar_dtype: str
    lower_bound: float | str | None
    split_sizes: tuple[int, ...] | None
    matricize: str


class Muon(MatrixOptimizer):
    """Momentum SGD that orthogonalizes the update of each matrix, with half of AdamW's state.

    B <- mu B + (1 - mu) G;  p <- (1 - lr wd) p - lr s polar(mu B + (1 - mu) G). polar() sets every
    singular value to 1, or to about 1 with the default iteration. Vectors, and groups with
    ``algorithm="adamw"`` (or ``use_muon=False``), get AdamW in the same object: embeddings, head
    and norms belong there, as :func:`lissom.optim.param_groups` arranges. State: B, of the weight's
    size. Same-shape matrices are orthogonalized in one batch.

    Args:
        params: tensors, (name, tensor) pairs, or groups of either.
        lr: of the matrices, >= 0. Default 1e-3. AdamW's part has ``lr_adamw``.
        weight_decay: decoupled, multiplied by lr (not by s), of both parts. Default 0.1.
        momentum: mu in [0, 1). Default 0.95. Torch's OneCycleLR and CyclicLR cycle ``betas``
            instead, as they look for that first.
        nesterov: look one step ahead, as written above; else polar(B). Default True.
        ns_coefficients: (a, b, c) of ``polar="newton-schulz"``. Default (3.4445, -4.7750, 2.0315).
        eps: of AdamW's part; the orthogonalization needs none. Default 1e-8.
        ns_steps: steps of ``"newton-schulz"`` and ``"polar-express"``, >= 1. Default 5.
        adjust_lr_fn: s for an m x n matrix: None (default) or ``"original"`` sqrt(max(1, m / n));
            ``"match_rms_adamw"`` 0.2 sqrt(max(m, n)), with which AdamW's lr and decay carry over
            (then give ``lr_adamw=None``); ``"spectral"``, which torch calls
            ``"spectral_unclamped"``, sqrt(m / n); ``"unscaled"`` 1.
        polar: the oracle: ``"newton-schulz"`` (default), ``"polar-express"``, ``"qdwh"``,
            ``"zolo-pd"``, ``"svd"``; see :func:`lissom.optim.polar.polar`.
        polar_steps: of any iteration; ``"svd"`` is none. Default None: ``ns_steps``, or to
            convergence.
        polar_dtype: of the products of the first two: ``"bfloat16"`` (default), ``"float16"``,
            ``"float32"``.
        lower_bound: see :func:`lissom.optim.polar.polar`. Default None: estimated.
        split_sizes: rows of the matrices that are fused in one, such as (q, k, v): each is
            orthogonalized and scaled as if it stood alone. Default None: one matrix.
        matricize: tensors of 3 or more dimensions: ``"flatten"`` (default) is out x rest, for
            convolutions; ``"batch"`` a stack of matrices in the last two dimensions, for experts.
        betas, amsgrad, lr_adamw, betas_adamw, weight_decay_adamw: of AdamW's part. Defaults
            (0.9, 0.95), False, 3e-4, as betas, as weight_decay.
        maximize, state_bits, rounding, master_bits, nonfinite, seed, shards, metrics, algorithm,
            foreach, fused, capturable, differentiable: as :class:`lissom.optim.AdamW`.

    Raises:
        TypeError, ValueError: an option or parameter that breaks its rule, by name and value.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; with
    defaults and conventions of torch.optim.Muon, whose average is the same.
    """

    algorithm: ClassVar[str] = "muon"
    waits: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        **polar.OPTIONS,
        "polar": choice("newton-schulz", *polar.METHODS),
        "weight_decay": real(0.1),
        "betas": several((0.9, 0.95), real(None, 0.0, 1.0, below=True), 2),
        "momentum": real(0.95, 0.0, 1.0, below=True),
        "nesterov": boolean(True),
        "ns_coefficients": polar.COEFFICIENTS,
        "ns_steps": integer(5, 1, 100),
        "adjust_lr_fn": optional(choice(None, *ADJUST_LR)),
        "split_sizes": optional(several(None, integer(None, 1))),
        "matricize": choice("flatten", "flatten", "batch"),
    }

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, weight_decay: float = 0.1,
        momentum: float = 0.95, nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = polar.QUINTIC, eps: float = 1e-8,
        ns_steps: int = 5, adjust_lr_fn: str | None = None, **options: Unpack[MuonOptions],
    ) -> None:
        super().__init__(params, {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn, "lr_adamw": 3e-4, **options})

    def check_combination(self, o: Mapping[str, Any], params: list[Tensor], explicit: set[str],
                          where: str) -> None:
        polar.check_options(o, where)
        parts = o["split_sizes"]
        for p in params:
            if parts is None or self.declines(p, o) is not None or o["algorithm"] == "adamw":
                continue
            rows = self.matrix_shape(p, o)[-2]
            if sum(parts) != rows:
                raise ValueError(f"{where}: split_sizes={parts}, but it must be a split of the "
                                 f"rows of every matrix of the group, and one has {rows}")

    def slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        return momentum_slots(self.matrix_shape(p, o), p, o)

    def by_rows(self, p: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> bool:
        return o["split_sizes"] is None and len(self.matrix_shape(p, o)) == 2

    def update(self, g: Tensor, s: State, o: Mapping[str, Any], t: int
               ) -> Waiting[Update]:
        mu = o["momentum"]
        # B <- mu B + (1 - mu) G is written once the polar factor is there; with nesterov the factor
        # is that of mu B + (1 - mu) G. Made in pieces, so that the only temporary of matrix size
        # has the dtype of the products.
        b = torch.empty(g.shape, dtype=polar.input_dtype(o, g), device=g.device)
        for b_, m_, g_ in codec.pieces(b, s["momentum_buffer"], g):
            g_ = codec.wide(g_)
            ahead = torch.lerp(m_, g_, 1 - mu)
            b_.copy_(torch.lerp(g_, ahead, mu, out=ahead) if o["nesterov"] else ahead)
        parts = b.split(o["split_sizes"], -2) if o["split_sizes"] else (b,)
        factors = yield polar.request(o, *parts, steps=o["ns_steps"],
                                      coefficients=o["ns_coefficients"])
        for m_, g_ in codec.pieces(s["momentum_buffer"], g):
            m_.lerp_(codec.wide(g_), 1 - mu)
        # u = s polar(B), part by part
        scale = ADJUST_LR[o["adjust_lr_fn"] or "original"]
        if len(parts) == 1:
            return Update(dense=factors[0], gain=scale(*codec.whole_shape(g, s)[-2:]))
        kind = codec.wide(g[:0]).dtype
        gain = torch.cat([torch.full((x.shape[-2], 1), scale(*x.shape[-2:]), dtype=kind,
                                     device=g.device) for x in parts])
        return Update(dense=torch.cat(factors, -2), gain=gain)
