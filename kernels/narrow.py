"""Products of 16-bit matrices on CPUs without instructions for them.

With sums in float64 an entry hardly depends on their order, so that it is rounded to the same 16
bits whatever rows are multiplied at once: those of one rank, or all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import use_triton
from .apart import Matrices

__all__ = ["exact", "matmul", "slow"]

# The dtypes of 16 bits whose products oneDNN computes on this CPU: it asks for AVX-512. torch's own
# loops take 7 to 40 times as long as fp32's do with AVX2.
_FAST = [dtype for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"))
         if getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)()]
# Elements that are copied to float64 at a time.
_BLOCK = 1 << 18


def slow(x: Matrices) -> bool:
    """Whether products of x are to be computed in more bits, and rounded."""
    return x.device.type == "cpu" and x.element_size() == 2 and x.dtype not in _FAST


def matmul(a: Matrices, b: Matrices) -> Tensor:
    """A B of one dtype, rounded once.

    Args:
        a: (..., m, k).
        b: (..., k, n).

    Returns:
        (..., m, n) in their dtype.
    """
    # Only where kernels work do matrices lie apart.
    if not slow(a) or use_triton(None, a.device):
        return a @ b
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    return exact(a, b, a.dtype)


def exact(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """A B with sums in float64, a block of the larger one at a time.

    Args:
        a: (..., m, k).
        b: (..., k, n).
        dtype: of the result.
    """
    by_rows = a.numel() >= b.numel()
    large, small = (a, b.double()) if by_rows else (b, a.double())
    dim = -2 if by_rows else -1
    each = max(1, _BLOCK // max(1, large.numel() // max(1, large.shape[dim])))
    parts = [((x.double() @ small) if by_rows else (small @ x.double())).to(dtype)
             for x in large.split(each, dim)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
