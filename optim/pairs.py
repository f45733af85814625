"""Low-rank pairs: what they are, how they start, and the checks that layers and optimizers share.

For a weight W, m x n, here and in :mod:`lissom.optim.layers` and :mod:`lissom.optim.adapters`:

========  =========================================================================================
A         r x n, first factor: ``lora_A``
B         m x r, second factor: ``lora_B``
s         their scaling: alpha / r
base      W, frozen
V         W + s B A; a plain layer has this weight
c, mu     norms of V's columns (one per input feature) or rows (one per output feature), and the
          trained magnitudes: a normalized layer has the weight V mu / c
========  =========================================================================================
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..kernels.fakes import place
from . import sharding
from .keys import unwrapped
from .options import Option, optional

__all__ = ["DTYPES", "bounds", "check_base", "check_factors", "only_name", "places",
           "roles"]

#: Dtypes that factors and their base may have.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def roles(*allowed: tuple[str, ...], hint: str) -> Option:
    """The option that says what a group's parameters are, in the order in which they repeat.

    Args:
        allowed: what they may be.
        hint: for messages, where such pairs come from.
    """

    def convert(value: Any) -> tuple[str, ...]:
        if not isinstance(value, (tuple, list)):
            raise TypeError
        if tuple(value) not in allowed:
            raise ValueError
        return tuple(value)

    rule = f"one of {', '.join(map(repr, allowed))}: {hint}"
    return optional(Option(None, rule, convert, tuple))


def bounds(base: Tensor, r: int, scaling: float) -> tuple[float, float]:
    """Bounds of the uniform entries of A and of B, for a pair of rank r beside an m x n weight.

    sqrt(3) sigma with sigma_A = (sqrt(m) r / n^1.5)^(1/4) g^(1/2), sigma_B = (r / sqrt(m n))^(1/4)
    g^(1/2), g = sqrt(1/3), for s = 1/r: B A / r then has entries of the variance that nn.Linear
    starts with. For another s both are multiplied by (s r)^(-1/2), so that s B A keeps it.

    Source: Zhou et al., arXiv 2406.06564.
    """
    m, n = base.shape
    gain = math.sqrt(3) * 3**-0.25 / math.sqrt(scaling * r)
    return (gain * (math.sqrt(m) * r / n**1.5) ** 0.25, gain * (r / math.sqrt(m * n)) ** 0.25)


def check_base(weight: Tensor, r: int, layer: str) -> None:
    """A base weight must be a plain matrix that can be added to, larger than the rank.

    Raises:
        TypeError, ValueError: names the layer, the value and the rule.
    """
    plain = type(weight) in (Tensor, nn.Parameter, FakeTensor) or sharding.is_sharded(weight)
    if weight.dtype not in DTYPES or not plain:
        kind = f"dtype {weight.dtype}" if plain else f"type {type(weight).__name__}"
        raise TypeError(f"{layer}: its base weight has {kind}, but it must be a plain tensor of a "
                        "floating dtype: changes are added to it, which quantized ones cannot take")
    if weight.ndim != 2:
        raise ValueError(f"{layer}: its base weight has shape {tuple(weight.shape)}, but it must "
                         "be a matrix")
    if r >= min(weight.shape):
        raise ValueError(f"{layer}: rank={r}, but it must be below the smaller side of "
                         f"{tuple(weight.shape)}: a full-rank pair has nothing to switch or save")


def check_factors(a: Tensor, b: Tensor, shape: tuple[int, ...] | None, at: str) -> None:
    """A and B must be r x n and m x r, of one dtype; (m, n) is None where no base is known.

    Raises:
        ValueError: begins with ``at``, gives shapes or dtypes and the rule.
    """
    good = a.ndim == b.ndim == 2 and len(a) == b.shape[1]
    if not good or shape not in (None, (len(b), a.shape[1])):
        what, rule = ("A and B", "r x n and m x r") if shape is None else \
            ("A, B and base", "r x n, m x r and m x n")
        shapes = [tuple(x.shape) for x in (a, b)] + ([] if shape is None else [shape])
        raise ValueError(f"{at}: {what} have shapes {shapes}, but they must be {rule}")
    if a.dtype != b.dtype:
        raise ValueError(f"{at}: A is {a.dtype} and B {b.dtype}, but they must have one dtype")


def places(model: nn.Module) -> dict[int, list[str]]:
    """By :func:`lissom.kernels.fakes.place`, all names of the parameters there."""
    found: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found.setdefault(place(p), []).append(unwrapped(name))
    return found


def only_name(found: dict[int, list[str]], layer: str, p: Tensor) -> str:
    """The name of a parameter of a pair, which must have only one.

    Args:
        found: :func:`places` of the model.
        layer: that the parameter is of, for the message.
        p: the parameter.

    Raises:
        ValueError: it has several; names them.
    """
    names = found[place(p)]
    if len(names) > 1:
        raise ValueError(f"{layer}: its weight is shared ({', '.join(names)}), but a base weight "
                         "must belong to one layer: a change of it would reach the others")
    return names[0]
