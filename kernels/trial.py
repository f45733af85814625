"""A trial of the kernels, before they are used on a GPU of which Triton promises nothing."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from . import fakes
from .adam import adamw8
from .blocks import code_shapes
from .lift import lift
from .linear import dequantize_linear, quantize_linear
from .norms import row_norms
from .project import project

__all__ = ["fault"]

_LOG = logging.getLogger(__name__)
_KEY = (0x9234567890, 7)
# Two blocks of codes and a part of one.
_ROWS, _COLUMNS, _RANK = 48, 600, 40
# What differs by one rounding of a code of 8 bits, or of fp16.
_CLOSE = 2.0**-6


def fault(device: torch.device) -> str:
    """Run a few kernels, and torch in their place.

    Args:
        device: where to.

    Returns:
        What is wrong with the kernels there, which is logged too; "" if their results are torch's.
    """
    try:
        with fakes.real(), torch.no_grad():
            for kind in (torch.float32, torch.float16):
                for kernel, reference in zip(*[_results(device, kind, backend) for backend in
                                               ("triton", "torch")], strict=True):
                    torch.testing.assert_close(kernel, reference, rtol=_CLOSE, atol=_CLOSE)
    except Exception as error:  # of the compiler, of the driver, or of the comparison
        reason = " ".join(str(error).split())[:200]
        _LOG.warning("kernels fail on %s (%s); torch does their work", device, reason)
        return f"its kernels fail a trial ({reason})"
    return ""


def _results(device: torch.device, kind: torch.dtype, backend: str) -> list[Tensor]:
    """AdamW on 8-bit moments, projection, lift, basis in 8 bits, norms: what a step consists of."""
    drawn = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn).to(device, kind)

    g, p, basis = normal(_ROWS, _COLUMNS), normal(_ROWS, _COLUMNS), normal(_COLUMNS, _RANK) / 20
    codes, scales = code_shapes(g.shape, 8)
    stored = [torch.zeros(codes, dtype=torch.uint8, device=device) for _ in range(2)]
    stored += [torch.zeros(scales, device=device) for _ in range(2)]
    for t in (1, 2):
        adamw8(p, g, *stored, bits=8, lr=0.01, weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8,
               t=t, key=_KEY, stochastic=True, backend=backend)
    low, scores = project(g, basis, scores=1, backend=backend)
    assert scores is not None
    lift(p, low.to(kind), basis.mT.contiguous(), alpha=-0.01, keep=0.99, key=_KEY, t=3,
         backend=backend)
    kept = dequantize_linear(*quantize_linear(basis, 8, backend=backend), _RANK, 8, backend=backend)
    return [p, low, scores / _ROWS, kept, row_norms(g, backend=backend)]
