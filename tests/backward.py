"""Backward passes with random gradients, for the tests of both ways."""

from __future__ import annotations

from typing import Any

import torch

from .helpers import tensors

SHAPES = [(9, 6), (6, 9), (6, 6), (4, 3, 5), (4,)]


def backward(params: list[Any], seed: int, scale: float = 1.0) -> None:
    """Give each parameter a random gradient, through autograd."""
    for p, g in zip(params, tensors([p.shape for p in params], seed, scale), strict=True):
        (p * g.to(p.dtype)).sum().backward()


def train(optimizer: Any, params: list[Any], steps: range, micro: int) -> None:
    for i in steps:
        for j in range(micro):
            backward(params, 100 * i + j)
        optimizer.step()
        optimizer.zero_grad()


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        worst = (x.double() - y.double()).abs().max() / y.double().abs().max()
        assert worst <= tolerance, float(worst)
