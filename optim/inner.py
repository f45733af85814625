"""Inner rules: from a gradient (full or projected) to a direction. Element-wise, in fp32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Quotient", "adam", "representable"]


class Quotient(NamedTuple):
    """The direction factor * numerator / denominator, not yet divided out."""

    numerator: Tensor
    denominator: Tensor
    factor: float


def representable(g: Tensor) -> Tensor:
    """g, its finite entries brought to where their squares are finite too.

    Adam's direction depends on the ratio of g to the root of its mean square, so an entry of
    1e30 that enters as 1.8e19 still moves its weight by the learning rate, where the plain
    formula gets g / inf = 0. Infinities and NaN stay what they are.
    """
    limit = math.sqrt(torch.finfo(g.dtype).max)  # squares of larger numbers are infinite
    if g.device.type == "cpu" and g.numel():
        low, high = torch.aminmax(g)
        # False for NaN too, which the clamp below would pass on in any case.
        if low.item() >= -limit and high.item() <= limit:
            return g
    elif g.device.type == "meta" or not g.numel():
        return g
    return torch.where(g.isinf(), g, g.clamp(-limit, limit))


def adam(
    g: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int, *, consume: bool = False
) -> Quotient:
    """Adam's direction, with epsilon placed as in torch.optim.AdamW.

    M <- b1 M + (1 - b1) G;  V <- b2 V + (1 - b2) G o G;
    direction = M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps).

    Source: Kingma and Ba, arXiv 1412.6980; the maximum of V (``amsgrad``): Reddi et al.,
    arXiv 1904.09237.

    Args:
        g: gradient, fp32, any shape.
        s: ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``) of g's shape, changed in place.
        o: options ``betas``, ``eps``, ``amsgrad``.
        t: 1-based count of this update.
        consume: g is a temporary, and its place may hold the denominator.
    """
    beta1, beta2 = o["betas"]
    g = representable(g)
    # The last allocation: state is written from here on.
    denominator = g if consume else torch.empty_like(g)
    m, v = s["exp_avg"], s["exp_avg_sq"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if o["amsgrad"]:
        v = torch.maximum(s["max_exp_avg_sq"], v, out=s["max_exp_avg_sq"])
    torch.sqrt(v, out=denominator)
    denominator.div_(math.sqrt(1 - beta2**t)).add_(o["eps"])
    return Quotient(m, denominator, 1 / (1 - beta1**t))
