"""AdamW of whole parameters, and Adam's arithmetic, which the low-rank rules share.

From gradient to weight: :func:`step_adamw`, by one kernel where it can be, else :func:`adam` on
blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.adam import adamw8
from ..kernels.philox import within
from . import codec
from .apply import block_of, negated
from .codec import Slot
from .sharding import Rows
from .weights import MASTERS, masters, random_rounding, read_weight, write_weight

__all__ = ["Quotient", "adam", "adam_slots", "averages", "representable", "step_adamw"]

Shape = tuple[int, ...]
State = Mapping[str, Tensor]
Options = Mapping[str, Any]


def step_adamw(p: Tensor, g: Tensor, stored: Mapping[str, Tensor], slots: Mapping[str, Slot],
               o: dict[str, Any], t: int | Tensor, rows: Rows | None = None) -> None:
    """AdamW by one kernel, or on row blocks: no temporary is larger than a block.

    Source: Loshchilov and Hutter, arXiv 1711.05101; decay before the update, as in torch.
    """
    first = 0 if rows is None else rows.start * math.prod(p.shape[1:])
    if not p.numel():
        return
    # Not under torch.compile, which would recompile for each rate.
    fused = None if torch.compiler.is_compiling() else codec.Decoded(
        stored, slots, p, rows).stored_pair(g, o)
    if fused is not None and p.is_contiguous():
        adamw8(p, g, **fused, lr=o["lr"], weight_decay=o["weight_decay"], t=t,
               maximize=o["maximize"], stochastic=random_rounding(p, o),
               below=[*masters(p, stored).values()])
        return
    entries = {k for k, slot in slots.items() if slot.stream is not None}
    names = [k for k in stored if k in MASTERS or k.partition(".")[0] in entries]
    start = 0
    for p_, g_, *moments in _blocks(p, g, *(stored[k] for k in names)):
        block = {**stored, **dict(zip(names, moments, strict=True))}
        s = codec.Decoded(block, slots, p, rows)
        x = read_weight(p_, block)
        pair = s.stored_pair(g_, o) if fused is not None and x.is_contiguous() else None
        if pair is not None:
            adamw8(x, g_, **pair | {"start": pair["start"] + start}, lr=o["lr"],
                   weight_decay=o["weight_decay"], t=t, maximize=o["maximize"])
        else:
            _by_torch(x, g_, s, o, t)
        write_weight(p_, x, block, o, t, first + start)
        codec.encode(s, block, slots, o, t, start)
        start += p_.numel()


def _by_torch(x: Tensor, g: Tensor, s: codec.Decoded, o: dict[str, Any], t: int | Tensor) -> None:
    """X <- (1 - lr * weight_decay) X - lr * Adam(G), moments in s."""
    lr = o["lr"].double() if isinstance(o["lr"], Tensor) else o["lr"]
    u = adam(negated(codec.wide(g), o), s, o, t)
    x.mul_(1 - lr * o["weight_decay"])
    if isinstance(u.factor, Tensor):  # addcdiv would read the tensor back to the host
        x += (u.numerator * (-lr * u.factor)).div_(u.denominator)
    else:
        x.addcdiv_(u.numerator, u.denominator, value=-lr * u.factor)


def _blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors cut together along their rows; small ones are whole.

    All have the first one's shape, or (codes and scales) its shape but for the last dimension.
    """
    first = tensors[0]
    block = block_of(first)
    if first.numel() <= block or first.ndim == 0 or torch.compiler.is_compiling():
        return [tensors]
    alike = all(x.shape == first.shape for x in tensors)
    rows = max(1, block // first[0].numel())
    if all(x.is_contiguous() for x in tensors):
        tensors = tuple(x.view(-1) if alike else x.view(-1, x.shape[-1]) for x in tensors)
        # halved: codes need more temporaries to decode and encode
        rows = block if alike else max(1, block // 2 // first.shape[-1])
    elif first.ndim == 1 and not alike:
        return [tensors]
    return zip(*(torch.split(x, rows) for x in tensors), strict=True)


class Quotient(NamedTuple):
    """The direction factor * numerator / denominator, not yet divided out."""

    numerator: Tensor
    denominator: Tensor
    factor: Any  # a number, or a 0-d tensor where t is one


def representable(g: Tensor, state_bits: int = 32, terms: int = 1) -> Tensor:
    """g, its finite entries clamped so that a sum of ``terms`` squares is finite in the state too.

    Adam's direction depends on the ratio of g to the root of its mean square, so an entry of
    1e30 that enters as 1.3e19 still moves its weight by the learning rate, where the plain
    formula gets g / inf = 0. Infinities and NaN stay what they are.
    """
    # Moments of fewer bits have fp32's range. Half of it, as a change of basis may round V up.
    largest = torch.finfo(g.dtype if state_bits == 32 else torch.float32).max / 2
    return within(g, math.sqrt(largest / terms))


def adam_slots(shape: Shape, p: Tensor, o: Options, stream: int = 0) -> dict[str, Slot]:
    """M and V, and V's maximum with ``amsgrad``; ``stream`` is M's, the others' follow."""
    names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if o["amsgrad"] else ()))
    return {name: codec.moment(shape, p, o, stream + i, squared=i > 0)
            for i, name in enumerate(names)}


def averages(g: Tensor, s: State, o: Options) -> tuple[Tensor, Tensor]:
    """M <- b1 M + (1 - b1) G;  V <- b2 V + (1 - b2) G o G, in place.

    Returns:
        M and V; with ``amsgrad`` the maximum that V has had.
    """
    beta1, beta2 = o["betas"]
    m, v = s["exp_avg"], s["exp_avg_sq"]
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if o["amsgrad"]:
        v = torch.maximum(s["max_exp_avg_sq"], v, out=s["max_exp_avg_sq"])
    return m, v


def adam(g: Tensor, s: State, o: Options, t: int | Tensor, *, consume: bool = False) -> Quotient:
    """Adam's direction, with epsilon placed as in torch.optim.AdamW.

    M <- b1 M + (1 - b1) G;  V <- b2 V + (1 - b2) G o G;
    direction = M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps).

    Source: Kingma and Ba, arXiv 1412.6980; the maximum of V (``amsgrad``): Reddi et al.,
    arXiv 1904.09237.

    Args:
        g: gradient, fp32, any shape.
        s: ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``) of g's shape, changed in place.
        o: options ``betas``, ``eps``, ``amsgrad``.
        t: 1-based count of this update, a number or a 0-d tensor on g's device.
        consume: g is a temporary, and its place may hold the denominator.
    """
    beta1, beta2 = o["betas"]
    t = t.double() if isinstance(t, Tensor) else t
    g = representable(g, o["state_bits"])
    # The last allocation: state is written from here on.
    denominator = g if consume else torch.empty_like(g)
    m, v = averages(g, s, o)
    torch.sqrt(v, out=denominator)
    remaining = 1 - beta2**t
    root = remaining.sqrt() if isinstance(remaining, Tensor) else math.sqrt(remaining)
    denominator.div_(root).add_(o["eps"])
    return Quotient(m, denominator, 1 / (1 - beta1**t))
