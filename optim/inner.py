"""Inner rules: from a gradient (full or projected) to a direction, in fp32.

A :class:`Rule` is what it keeps and how it turns the projected gradient R into the direction N.
A new rule is two functions and an entry in :data:`RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels._triton import by_kernel
from ..kernels.adam import adam8
from . import codec
from .codec import Slot
from .dense import adam, adam_slots, representable

__all__ = ["RULES", "Rule", "momentum_slots"]

Shape = tuple[int, ...]
State = Mapping[str, Tensor]
Options = Mapping[str, Any]


class Rule(NamedTuple):
    """An inner rule of a low-rank method.

    Args:
        slots: (shape of R, parameter, options) to what is kept: moments by
            :func:`lissom.optim.codec.moment`, each with a stream of its own from 0 to 5 (those of
            a magnitude beside them follow).
        direction: (R, state, options, t, consume) to (N, factor), the direction being
            factor * N in fp32, or in R's 16 bits by a kernel. Moments in the state change in place.
            With ``consume`` R may be overwritten. Where t is a tensor the factor may be one.
        powers: for each moment, what a rotation of the basis does to it: 1 for Rot, 2 for
            Rot o Rot, which keeps a second moment positive.
        elementwise: an entry of N depends on the same entry of R alone.
    """

    slots: Callable[[Shape, Tensor, Options], dict[str, Slot]]
    direction: Callable[[Tensor, State, Options, Any, bool], tuple[Tensor, Any]]
    powers: Mapping[str, int]
    elementwise: bool = True


def _decoded_pair(r: Tensor, s: State, o: Options) -> dict[str, Any] | None:
    """Moments in fp32, after a change of basis, for the kernel; None where it cannot be used."""
    m, v = s["exp_avg"], s["exp_avg_sq"]
    if o["amsgrad"] or r.dtype == torch.float64 or m.dtype != torch.float32 or not all(
            x.is_contiguous() for x in (r, m, v)):
        return None
    beta1, beta2 = o["betas"]
    return {"m": m, "v": v, "bits": 32, "beta1": beta1, "beta2": beta2, "eps": o["eps"]}


def _adamw(r: Tensor, s: State, o: Options, t: Any, consume: bool) -> tuple[Tensor, Any]:
    if by_kernel(r):
        fused = s.stored_pair(r, o) if isinstance(s, codec.Decoded) else None
        fused = fused or _decoded_pair(r, s, o)
        if fused is not None:
            return adam8(r, **fused, t=t, out=r if consume else torch.empty_like(r)), 1.0
    wide = codec.wide(r)
    m, denominator, factor = adam(wide, s, o, t, consume=consume or wide is not r)
    return torch.div(m, denominator, out=denominator), factor


def momentum_slots(shape: Shape, p: Tensor, o: Options) -> dict[str, Slot]:
    """M alone."""
    return {"momentum_buffer": codec.moment(shape, p, o, 5)}


def _momentum(r: Tensor, s: State, o: Options, t: Any, consume: bool) -> tuple[Tensor, Any]:
    """N = M, M <- b1 M + R: torch.optim.SGD(momentum=b1)."""
    r = codec.wide(r)
    n = r if consume else torch.empty_like(r)
    m = s["momentum_buffer"].mul_(o["betas"][0]).add_(r)
    return n.copy_(m), 1.0


def _lion(r: Tensor, s: State, o: Options, t: Any, consume: bool) -> tuple[Tensor, Any]:
    """N = sign(b1 M + (1 - b1) R), M <- b2 M + (1 - b2) R: Chen et al., arXiv 2302.06675."""
    beta1, beta2 = o["betas"]
    m = s["momentum_buffer"]
    r = codec.wide(r)
    mixed = torch.lerp(m, r, 1 - beta1)
    n = torch.where(mixed.isnan(), mixed, mixed.sign())  # the sign of a NaN would be 0
    m.lerp_(r, 1 - beta2)
    return n, 1.0


def _factored_slots(shape: Shape, p: Tensor, o: Options) -> dict[str, Slot]:
    *batch, rows, columns = shape
    return {"exp_avg": codec.moment(shape, p, o, 0),
            "exp_avg_sq_row": codec.moment((*batch, rows, 1), p, o, 3, squared=True),
            "exp_avg_sq_col": codec.moment((*batch, 1, columns), p, o, 4, squared=True)}


def _factored(r: Tensor, s: State, o: Options, t: Any, consume: bool) -> tuple[Tensor, Any]:
    """Adam with V of rank one: V = row mean x column mean / mean, as Adafactor factors it.

    Source: Shazeer and Stern, arXiv 1804.04235 (averages with a constant beta2 and Adam's bias
    correction instead of their schedule and clipping).
    """
    beta1, beta2 = o["betas"]
    r = representable(codec.wide(r), o["state_bits"], sum(r.shape[-2:]))
    square = r.square()
    row, column = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)
    row = s["exp_avg_sq_row"].lerp_(row, 1 - beta2)
    column = s["exp_avg_sq_col"].lerp_(column, 1 - beta2)
    m = s["exp_avg"].lerp_(r, 1 - beta1)
    # sqrt(V) as a product of roots: V itself would leave fp32's range sooner.
    correction = math.sqrt(1 - beta2**t)
    mean = row.mean(-2, keepdim=True).sqrt()
    part = torch.where(mean > 0, row.sqrt() / mean, row) / correction
    torch.mul(part, column.sqrt(), out=square)
    return torch.div(m, square.add_(o["eps"]), out=square), 1 / (1 - beta1**t)


#: Values of the option ``inner``.
RULES: dict[str, Rule] = {
    "adamw": Rule(adam_slots, _adamw, {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}),
    "momentum": Rule(momentum_slots, _momentum, {"momentum_buffer": 1}),
    "lion": Rule(momentum_slots, _lion, {"momentum_buffer": 1}),
    "factored": Rule(_factored_slots, _factored,
                     {"exp_avg": 1, "exp_avg_sq_row": 2, "exp_avg_sq_col": 2},
                     elementwise=False),
}
