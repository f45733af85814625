"""A trial of the kernels, before they are used on a GPU of which Triton promises nothing."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from . import fakes
from ._triton import FLOATS
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
_ROWS, _COLUMNS, _RANK = 20, 600, 40


def fault(device: torch.device) -> str:
    """Run a few kernels, and torch in their place.

    Args:
        device: where to.

    Returns:
        What is wrong with the kernels there, which is logged too; "" if their results are torch's.

    Raises:
        torch.OutOfMemoryError: which says nothing about the kernels.
    """
    try:
        # Whatever modes, default device or dtype the caller has.
        with fakes.real(), device, torch.no_grad(), torch.autocast(device.type, enabled=False):
            for kind in FLOATS:
                for kernel, reference in zip(*[_results(device, kind, backend) for backend in
                                               ("triton", "torch")], strict=True):
                    # All are of size one: a rounding of an 8-bit code may differ.
                    torch.testing.assert_close(kernel, reference, rtol=2.0**-4, atol=2.0**-4)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, of the driver, or of the comparison
        reason = " ".join(str(error).split())[:200]
        _LOG.warning("kernels fail on %s (%s); torch does their work", device, reason)
        return f"its kernels fail a trial ({reason})"
    return ""


def _results(device: torch.device, kind: torch.dtype, backend: str) -> list[Tensor]:
    """AdamW on 8-bit moments, projection, lift, basis in 8 bits, norms: what a step consists of."""
    drawn = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=drawn, dtype=torch.float32, device="cpu")
        return x.to(device, kind)

    g, p, basis = normal(_ROWS, _COLUMNS), normal(_ROWS, _COLUMNS), normal(_COLUMNS, _RANK)
    codes, scales = code_shapes(g.shape, 8)
    stored = [torch.zeros(codes, dtype=torch.uint8, device=device) for _ in range(2)]
    stored += [torch.zeros(scales, dtype=torch.float32, device=device) for _ in range(2)]
    for t in (1, 2):
        adamw8(p, g, *stored, bits=8, lr=1.0, weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8,
               t=t, key=_KEY, stochastic=True, backend=backend)
    basis /= _COLUMNS**0.5
    low, scores = project(g, basis, scores=1, backend=backend)
    assert scores is not None
    lifted = p.clone()
    lift(lifted, low.to(kind), basis.mT.contiguous(), alpha=-4.0, keep=0.5, key=_KEY, t=3,
         backend=backend)
    kept = dequantize_linear(*quantize_linear(basis, 8, backend=backend), _RANK, 8, backend=backend)
    # Codes of equal size differ by one where a rounding does, and scales are the largest moments.
    return [p, *(x.float() / 16 for x in stored[:2]), stored[2] * 10, stored[3] * 1000, low,
            scores / _ROWS, lifted, kept * 20, row_norms(g, backend=backend) / _COLUMNS**0.5]
