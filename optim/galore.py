"""GaLore: Adam in a low-rank subspace of the gradient that is found anew every few steps."""

from __future__ import annotations

from typing import Any, ClassVar

from .lowrank import LowRankOptimizer

__all__ = ["GaLoreAdamW"]


class GaLoreAdamW(LowRankOptimizer):
    """AdamW on the projected gradient R = P^T G or G Q, lifted back and scaled.

    Every ``update_proj_gap`` steps the basis becomes the leading singular vectors of the current
    gradient; p <- (1 - lr wd) p - lr * scale * lift(Adam(R)). For an m x n weight the state is
    r (min + 2 max) elements instead of 2 m n. Parameters without a rank, and those that are not
    matrices, get plain AdamW in the same object.

    Args:
        params: tensors, (name, tensor) pairs, or groups of either;
            :func:`lissom.optim.param_groups` makes suitable groups from a model.
        lr, betas, eps, weight_decay, amsgrad, maximize, state_bits, nonfinite, foreach, fused,
            capturable, differentiable: as :class:`lissom.optim.AdamW`. The paper trains with
            lr 0.01, so that matrices move by lr * scale = 0.0025.
        rank: columns of the basis, an int >= 1; None (default) is dense AdamW. Larger than the
            shorter side it is clamped, which :meth:`plan` reports.
        update_proj_gap: steps between two refreshes of a basis, >= 1. Default 200.
        scale: multiplies the lifted update (the paper's alpha), >= 0. Default 0.25.
        proj_type: ``"std"`` (default) projects the shorter side, square matrices on the right;
            ``"reverse_std"`` the longer; ``"left"``, ``"right"``; ``"full"`` both.
        projection: ``"subspace"`` (default): power iterations from the last basis;
            ``"randomized"``: a randomized SVD; ``"svd"``: the exact one, as released;
            ``"random"``: a random orthonormal basis, regenerated from a seed and not stored.
        moments: at a refresh ``"keep"`` them as they are (default, as released), ``"rotate"``
            them into the new basis, or ``"reset"`` them to zero.
        refresh: ``"staggered"`` (default): each matrix has its own phase, at most
            ceil(matrices / gap) are refreshed at one step after the first; ``"synchronous"``:
            all when 0-based step % gap == 0.
        matricize: how a tensor of 3 or more dimensions is seen: ``"flatten"`` (default) is
            out x rest, for convolutions; ``"batch"`` is a stack of matrices in the last two
            dimensions, for experts, each with a basis of its own.
        seed: of random starts and bases, an int >= 0. Default 0.
        lr_adamw, betas_adamw, weight_decay_adamw: these options for the parameters that get
            AdamW, which then are groups of their own. Default None: the same as above.

    Raises:
        TypeError, ValueError: an option or parameter that breaks its rule, by name and value.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    arXiv 2403.03507. Epsilon and decay are placed as in torch.optim.AdamW.
    """

    algorithm: ClassVar[str] = "galore"

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False, *,
        rank: int | None = None, update_proj_gap: int = 200, scale: float = 0.25,
        proj_type: str = "std", projection: str = "subspace", moments: str = "keep",
        refresh: str = "staggered", matricize: str = "flatten", maximize: bool = False,
        state_bits: int = 32, nonfinite: str = "propagate", seed: int = 0,
        lr_adamw: float | None = None, betas_adamw: tuple[float, float] | None = None,
        weight_decay_adamw: float | None = None, foreach: bool | None = None,
        fused: bool | None = None, capturable: bool = False, differentiable: bool = False,
    ) -> None:
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, "rank": rank, "update_proj_gap": update_proj_gap, "scale": scale,
            "proj_type": proj_type, "projection": projection, "moments": moments,
            "refresh": refresh, "matricize": matricize, "maximize": maximize,
            "state_bits": state_bits, "nonfinite": nonfinite, "seed": seed, "foreach": foreach,
            "fused": fused, "capturable": capturable, "differentiable": differentiable,
        }, lr_adamw=lr_adamw, betas_adamw=betas_adamw, weight_decay_adamw=weight_decay_adamw)
