"""The last pass of a step: an update applied to its weight, or all of AdamW at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.adam import adamw8
from ..kernels.apart import Apart, Matrices, parts_of
from ..kernels.lift import lift
from . import codec
from .codec import Slot
from .inner import adam, by_kernel
from .keys import keys_of
from .sharding import Rows
from .weights import random_rounding, read_weight, write_weight

__all__ = ["Update", "apply", "negated", "step_adamw"]

# Elements in one block of an element-wise update: temporaries stay this small, and in a CPU's
# cache. A GPU is not busy with fewer than some millions.
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}


class Update(NamedTuple):
    """The update u = factor * left @ right + gain * dense.

    No full-size tensor of the product exists, and neither of the other term where ``dense`` is
    the gradient itself. Of several parameters each is stacked, or lies
    :class:`lissom.kernels.apart.Apart`.

    Args:
        left, right: (..., m, r) and (..., r, n), or None for no such term.
        factor: multiplies their product.
        dense: (..., m, n), or None for no such term.
        gain: multiplies it, a number or a tensor that broadcasts to it.
        keep: what is left of p, p <- keep * p - lr * u: a tensor that broadcasts to p, or None
            for 1 - lr * weight_decay.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    factor: float = 1.0
    dense: Tensor | None = None
    gain: Tensor | float = 1.0
    keep: Tensor | None = None


def negated(g: Tensor, o: Mapping[str, Any]) -> Tensor:
    """The gradient of what is minimized."""
    return -g if o["maximize"] else g


def step_adamw(p: Tensor, g: Tensor, stored: Mapping[str, Tensor], slots: Mapping[str, Slot],
               o: dict[str, Any], t: int | Tensor, rows: Rows | None = None) -> None:
    """AdamW in one operation, or on row blocks: no temporary is larger than a block.

    Source: Loshchilov and Hutter, arXiv 1711.05101; decay before the update, as in torch.
    """
    first = 0 if rows is None else rows.start * math.prod(p.shape[1:])
    if not p.numel():
        return
    # Traced, the operator would be compiled anew for each rate.
    fused = None if torch.compiler.is_compiling() else codec.Decoded(
        stored, slots, p, rows).stored_pair(g, o)
    if fused is not None and p.is_contiguous() and "master" not in stored:
        adamw8(p, g, **fused, lr=o["lr"], weight_decay=o["weight_decay"], t=t,
               maximize=o["maximize"], stochastic=random_rounding(p, o))
        return
    lr = o["lr"].double() if isinstance(o["lr"], Tensor) else o["lr"]
    keep = 1 - lr * o["weight_decay"]
    names = [k for k in stored
             if k == "master" or slots[k.partition(".")[0]].stream is not None]
    start = 0
    for p_, g_, *moments in _blocks(p, g, *(stored[k] for k in names)):
        block = {**stored, **dict(zip(names, moments, strict=True))}
        s = codec.Decoded(block, slots, p, rows)
        x = read_weight(p_, block)
        u = adam(negated(codec.wide(g_), o), s, o, t)
        x.mul_(keep)
        if isinstance(u.factor, Tensor):  # addcdiv would read it
            x += (u.numerator * (-lr * u.factor)).div_(u.denominator)
        else:
            x.addcdiv_(u.numerator, u.denominator, value=-lr * u.factor)
        write_weight(p_, x, block, o, t, first + start)
        codec.encode(s, block, slots, o, t, start)
        start += p_.numel()


def _blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors cut together along their rows; small ones are whole.

    All have the first one's shape, or (codes and scales) its shape but for the last dimension.
    """
    first = tensors[0]
    block = _BLOCK.get(first.device.type, _BLOCK["cuda"])
    if first.numel() <= block or first.ndim == 0 or torch.compiler.is_compiling():
        return [tensors]
    alike = all(x.shape == first.shape for x in tensors)
    rows = max(1, block // first[0].numel())
    if all(x.is_contiguous() for x in tensors):
        tensors = tuple(x.view(-1) if alike else x.view(-1, x.shape[-1]) for x in tensors)
        # codes take more temporaries to decode and to encode
        rows = block if alike else max(1, block // 2 // first.shape[-1])
    elif first.ndim == 1 and not alike:
        return [tensors]
    return zip(*(torch.split(x, rows) for x in tensors), strict=True)


def _in_one_pass(p: Matrices, u: Update, kept: Mapping[str, Tensor]) -> bool:
    """Whether a kernel applies the update: on a GPU, but for products in fp32 and split weights."""
    product = u.left is None or (u.left.element_size() == 2 and p.element_size() == 2)
    return (product and by_kernel(p) and p.dtype != torch.float64 and "master" not in kept
            and p.is_contiguous())


def apply(p: Matrices, u: Update, kept: Mapping[str, Tensor], o: Mapping[str, Any],
          t: int | Tensor, start: int = 0) -> None:
    """P <- (1 - lr * weight_decay) p - lr * u, rounded once.

    p is (m, n), a batch (b, m, n) of one parameter, or several parameters.
    """
    lr = o["lr"]
    keep: Tensor | float = 1 - lr * o["weight_decay"] if u.keep is None else u.keep.expand(p.shape)
    if isinstance(lr, Tensor):  # no number is read: lr is in keep and gain, and 1 elsewhere
        assert u.keep is None
        assert u.left is None
        kind = torch.float64 if p.dtype == torch.float64 else torch.float32
        keep = (1 - lr.double() * o["weight_decay"]).to(kind).expand(p.shape)
        u = Update(dense=u.dense, gain=(lr.double() * u.gain).to(kind))
        lr, o = 1.0, {**o, "lr": 1.0}
    if _in_one_pass(p, u, kept):
        lift(p, u.left, u.right, alpha=-lr * u.factor, keep=keep, dense=u.dense, gain=u.gain,
             beta=-lr, key=keys_of(kept, o) if random_rounding(p, o) else None, t=t,
             start=start)
        return
    if isinstance(p, Apart):  # in fp32, whose product a library computes
        assert isinstance(kept, codec.Together)
        each = zip(*(parts_of(x, len(p)) for x in (p, u.left, u.right, u.dense, u.gain)),
                   kept.states, strict=True)
        for p_, left, right, dense, gain, kept_ in each:
            apply(p_, Update(left, right, u.factor, dense, gain), kept_, o, t, start)
        return
    master = kept["master"].view(p.shape) if "master" in kept else None
    gain = u.gain.expand(p.shape) if isinstance(u.gain, Tensor) else u.gain
    if p.ndim == 3 and random_rounding(p, o):
        # One matrix after the other, whose elements have consecutive numbers.
        for i, p_ in enumerate(p):
            left, right, dense = (None if x is None else x.expand(len(p), *x.shape[-2:])[i]
                                  for x in (u.left, u.right, u.dense))
            part = Update(left, right, u.factor, dense, gain[i] if isinstance(gain, Tensor)
                          else gain, keep[i] if isinstance(keep, Tensor) else None)
            part_kept = kept if master is None else {**kept, "master": master[i]}
            apply(p_, part, part_kept, o, t, start + i * p_.numel())
        return
    rows = p.shape[-2]
    if u.dense is not None or codec.wide(p) is not p:
        # In blocks, so that temporaries stay small and a second pass finds p in the cache.
        block = _BLOCK.get(p.device.type, _BLOCK["cuda"])
        rows = max(1, block // max(1, p[..., :1, :].numel()))
    parts = torch.split(p, rows, -2)
    cut = [torch.split(x, rows, -2) if isinstance(x, Tensor) else [x] * len(parts)
           for x in (u.left, u.dense, gain, keep, master)]
    for p_, left, dense, gain_, keep_, master_ in zip(parts, *cut, strict=True):
        kept_ = kept if master_ is None else {**kept, "master": master_}
        x = read_weight(p_, kept_)
        if isinstance(keep_, Tensor):
            x.mul_(keep_)
            keep_ = 1.0
        if left is None or u.right is None:
            x.mul_(keep_)
        elif x is p_ and p.ndim == 2:
            # The decay is the product's beta: one pass over p.
            x.addmm_(left, u.right, beta=keep_, alpha=-lr * u.factor)
        elif x is p_:
            right = u.right.expand(len(p), *u.right.shape[-2:])
            x.baddbmm_(left.expand(len(p), *left.shape[-2:]), right, beta=keep_,
                       alpha=-lr * u.factor)
        else:
            x.mul_(keep_).add_(codec.wide(left @ u.right), alpha=-lr * u.factor)
        if dense is not None and isinstance(gain_, Tensor):
            x.addcmul_(codec.wide(dense), gain_, value=-lr)
        elif dense is not None:
            x.add_(dense, alpha=-lr * gain_)
        write_weight(p_, x, kept_, o, t, start)
        start += p_.numel()
