"""The last pass of a step: decay and update applied to the weight, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels._triton import by_kernel
from ..kernels.apart import Apart, Matrices, parts_of
from ..kernels.lift import lift
from ..kernels.narrow import slow
from . import codec
from .keys import keys_of
from .weights import masters, random_rounding, read_weight, write_weight

__all__ = ["Update", "apply", "block_of", "block_rows", "negated"]

# Elements in one block of an element-wise update: temporaries stay this small, and in a CPU's
# cache. A GPU is not busy with fewer than some millions.
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}


class Update(NamedTuple):
    """The update u = factor * left @ right + gain * dense.

    The product is never formed at full size. Where ``dense`` is the gradient itself, neither is
    the second term. For several parameters each tensor is stacked, or one
    :class:`lissom.kernels.apart.Apart`.

    Args:
        left, right: (..., m, r) and (..., r, n), or None for no such term.
        factor: multiplies their product: a number, or a 0-d tensor.
        dense: (..., m, n), or None for no such term.
        gain: multiplies ``dense``: a number or a tensor that broadcasts to it.
        keep: the decay factor in p <- keep * p - lr * u: a tensor that broadcasts to p, or None
            for 1 - lr * weight_decay.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    factor: float | Tensor = 1.0
    dense: Tensor | None = None
    gain: Tensor | float = 1.0
    keep: Tensor | None = None


def negated(g: Tensor, o: Mapping[str, Any]) -> Tensor:
    """The gradient of what is minimized."""
    return -g if o["maximize"] else g


def block_of(x: Tensor) -> int:
    """Elements of a block for an element-wise update of x."""
    return _BLOCK.get(x.device.type, _BLOCK["cuda"])


def block_rows(x: Tensor) -> int:
    """Rows of a matrix, or of each of a stack, in such a block; at least one."""
    return max(1, block_of(x) // max(1, x[..., :1, :].numel()))


def _in_one_pass(p: Matrices, u: Update) -> bool:
    """Whether a kernel applies the update to the weight: on a GPU, except products in fp32."""
    narrow = u.left is None or u.left.element_size() == p.element_size() == 2
    return narrow and by_kernel(p) and p.dtype != torch.float64


def apply(p: Matrices, u: Update, kept: Mapping[str, Tensor], o: Mapping[str, Any],
          t: int | Tensor, start: int = 0) -> None:
    """p <- (1 - lr * weight_decay) p - lr * u, rounded once.

    Args:
        p: (m, n), a batch (b, m, n) of one parameter, or several parameters.
        u: the update.
        kept: the state as it is stored.
        o: options of the group.
        t: 1-based count of the update.
        start: index of p's first element in its parameter, for random bits.
    """
    lr = o["lr"]
    if isinstance(lr, Tensor):
        u, lr, o = _with_rate(p, u, o), 1.0, {**o, "lr": 1.0}
    keep: Tensor | float = 1 - lr * o["weight_decay"] if u.keep is None else u.keep.expand(p.shape)
    if _in_one_pass(p, u):
        # A copy where the memory format is another.
        x: Any = p if isinstance(p, Apart) else p.contiguous()
        lift(x, u.left, u.right, alpha=-lr * u.factor, keep=keep, dense=u.dense, gain=u.gain,
             beta=-lr, key=keys_of(kept, o) if random_rounding(p, o) else None, t=t, start=start,
             below=[*masters(p, kept).values()])
        if isinstance(p, Tensor) and x is not p:
            p.copy_(x)
    elif isinstance(p, Apart):  # fp32: the library computes each product
        assert isinstance(kept, codec.Together)
        for p_, u_, kept_ in zip(p.parts, _each(u, p), kept.states, strict=True):
            apply(p_, u_, kept_, o, t, start)
    elif p.ndim == 3 and random_rounding(p, o):
        # One matrix after the other, whose elements have consecutive numbers.
        below = masters(p, kept)
        for i, (p_, u_) in enumerate(zip(p, _each(u, p), strict=True)):
            kept_ = {**kept, **{k: x[i] for k, x in below.items()}} if below else kept
            apply(p_, u_, kept_, o, t, start + i * p_.numel())
    else:
        _by_blocks(p, u, keep, kept, o, t, start)


def _with_rate(p: Matrices, u: Update, o: Mapping[str, Any]) -> Update:
    """The update with a rate from a tensor multiplied in, and its decay: nothing is read back."""
    assert u.keep is None
    lr = o["lr"].double()
    kind = torch.float64 if p.dtype == torch.float64 else torch.float32
    return Update(u.left, u.right, (lr * u.factor).to(kind), u.dense, (lr * u.gain).to(kind),
                  (1 - lr * o["weight_decay"]).to(kind))


def _each(u: Update, p: Matrices) -> list[Update]:
    """The update of each of several matrices."""
    def parts(x: Any) -> Any:
        if isinstance(p, Apart) or not isinstance(x, Tensor):
            return parts_of(x, len(p))
        return x.expand(len(p), *x.shape[-2:]).unbind()

    left, right, dense, gain, keep = map(parts, (u.left, u.right, u.dense, u.gain, u.keep))
    return [Update(left_, right_, u.factor, dense_, gain_, keep_)
            for left_, right_, dense_, gain_, keep_ in zip(left, right, dense, gain, keep,
                                                           strict=True)]


def _by_blocks(p: Tensor, u: Update, keep: Tensor | float, kept: Mapping[str, Tensor],
               o: Mapping[str, Any], t: int | Tensor, start: int) -> None:
    """By torch operations; on blocks of rows where temporaries are needed."""
    lr, rows = o["lr"], p.shape[-2]
    left, right, factor = u.left, u.right, u.factor
    if left is not None and right is not None and isinstance(factor, Tensor):
        # A product's factor is a number, and this one is not to be read.
        left, right = codec.wide(left) * factor, codec.wide(right)
    factor = 1.0 if isinstance(factor, Tensor) else factor
    if left is not None and right is not None and slow(left) and not by_kernel(left):
        left, right = codec.wide(left), codec.wide(right)
    if u.dense is not None or p.element_size() == 2:
        # In blocks, so that temporaries stay small and a second pass finds p in the cache.
        rows = block_rows(p)
    parts = torch.split(p, rows, -2)
    below = masters(p, kept)
    gain = u.gain.expand(p.shape) if isinstance(u.gain, Tensor) else u.gain
    cut = [torch.split(x, rows, -2) if isinstance(x, Tensor) else [x] * len(parts)
           for x in (left, u.dense, gain, keep, *below.values())]
    for p_, left_, dense, gain_, keep_, *below_ in zip(parts, *cut, strict=True):
        kept_ = {**kept, **dict(zip(below, below_, strict=True))} if below else kept
        x = read_weight(p_, kept_)
        _add(x, Update(left_, right, factor, dense, gain_), keep_, lr)
        write_weight(p_, x, kept_, o, t, start)
        start += p_.numel()


def _add(x: Tensor, u: Update, keep: Tensor | float, lr: float) -> None:
    """X <- keep o X - lr u.

    Args:
        x: a block of the weight, or a copy of it in fp32.
        u: its part of the update.
        keep: its decay.
        lr: the rate.
    """
    left, right, dense, gain = u.left, u.right, u.dense, u.gain
    assert not isinstance(u.factor, Tensor)
    if isinstance(keep, Tensor):
        x.mul_(keep)
        keep = 1.0
    if left is None or right is None:
        x.mul_(keep)
    elif left.dtype != x.dtype:
        x.mul_(keep).add_(left @ right, alpha=-lr * u.factor)
    elif x.ndim == 2:
        # The decay is the product's beta: one pass over x.
        x.addmm_(left, right, beta=keep, alpha=-lr * u.factor)
    else:
        x.baddbmm_(left.expand(len(x), *left.shape[-2:]), right.expand(len(x), *right.shape[-2:]),
                   beta=keep, alpha=-lr * u.factor)
    if dense is None:
        return
    if isinstance(gain, Tensor):
        x.addcmul_(codec.wide(dense), gain, value=-lr)
    else:
        x.add_(dense, alpha=-lr * gain)
