"""Polar oracles: the orthogonal factor U of A = U H, exactly or roughly."""

from __future__ import annotations

import torch
from torch import Tensor

from . import codec

__all__ = ["newton_schulz"]

# Quintic coefficients of Muon (Jordan et al., 2024), chosen for speed: singular values end
# between about 0.7 and 1.2 and no number of steps brings them to 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(a: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Muon's approximation of the polar factor by a quintic iteration.

    X <- A / |A|, then ``steps`` times X <- a X + (b S + c S^2) X with S = X X^T, on the shorter
    side. Zero gives zero.

    Args:
        a: (..., m, n), any floating dtype.
        steps: iterations.
        dtype: of the products.

    Returns:
        (..., m, n) in ``dtype``.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    x = codec.wide(a)
    # Scaled first, so that the norm of 1e30 is finite.
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    x = (x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    first, second, third = _QUINTIC
    for _ in range(steps):
        s = x @ x.mT
        x = first * x + (second * s + third * s @ s) @ x
    out: Tensor = x.mT if tall else x
    return out
