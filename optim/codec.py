"""State slots: what a rule keeps for a parameter, and how it is stored.

Arithmetic sees fp32. A moment is stored in fp32 or bf16 (``state_bits`` 32 or 16). bf16 moments
are rounded stochastically, because to nearest a second moment with beta2 = 0.999 never decays:
its change of 0.1 % is below half a bf16 step. Bases and error feedback are stored linearly in
blocks (:mod:`lissom.kernels.linear`) where they are asked for in 8 or 4 bits: codes under their
name, scales under ``name.scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.linear import dequantize_linear_ref, linear_shapes, quantize_linear_ref
from ..kernels.philox import stochastic_bf16_ref

__all__ = ["MOMENTS", "Slot", "counter", "decode", "encode", "held", "key_of", "moment", "read",
           "wide", "write"]

#: Names of the slots that are averages of gradients; all others are stored as they are.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col",
           "momentum_buffer")

_STORAGE = {32: torch.float32, 16: torch.bfloat16}


class Slot(NamedTuple):
    """Shape, dtype and device of one state tensor, which starts at zero."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes that the slot's elements take."""
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize

    def empty(self) -> Tensor:
        """The slot's first value: zeros."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


def moment(shape: tuple[int, ...], p: Tensor, o: Mapping[str, Any]) -> Slot:
    """A slot for an average of gradients, stored as ``state_bits`` says.

    The moments of a float64 parameter are float64 at 32 bits, as torch has them.
    """
    dtype = _STORAGE[o["state_bits"]]
    if p.dtype == torch.float64 and dtype == torch.float32:
        dtype = torch.float64
    return Slot(tuple(shape), dtype, p.device)


def held(name: str, shape: tuple[int, ...], bits: int | None, p: Tensor) -> dict[str, Slot]:
    """Slots for a tensor that is no average: a basis, a residue. See :func:`read`.

    Args:
        name: of the slot; scales are under ``name.scale``.
        shape: of the tensor.
        bits: 32, 16, 8 or 4 bits per element; None is p's own dtype.
        p: the parameter.
    """
    if bits in (None, 16, 32):
        dtype = p.dtype if bits is None else _STORAGE[bits]
        return {name: Slot(tuple(shape), dtype, p.device)}
    codes, scale = linear_shapes(tuple(shape), bits)
    kind = torch.int8 if bits == 8 else torch.uint8
    return {name: Slot(codes, kind, p.device),
            f"{name}.scale": Slot(scale, torch.float32, p.device)}


def read(s: Mapping[str, Tensor], name: str, columns: int) -> Tensor | None:
    """The tensor that :func:`held` made slots for, or None where there is none.

    Args:
        s: state of a parameter.
        name: of the slot.
        columns: length of its last dimension, which packed codes do not tell.

    Returns:
        The stored tensor itself if it is not quantized, else a new one in fp32.
    """
    stored, scale = s.get(name), s.get(f"{name}.scale")
    if stored is None or scale is None:
        return stored
    return dequantize_linear_ref(stored, scale, columns, 8 if stored.dtype == torch.int8 else 4)


def write(s: Mapping[str, Tensor], name: str, value: Tensor) -> None:
    """Store a value under the slots of :func:`held`."""
    stored, scale = s[name], s.get(f"{name}.scale")
    if scale is None:
        stored.copy_(value)
        return
    codes, scales = quantize_linear_ref(value, 8 if stored.dtype == torch.int8 else 4)
    stored.copy_(codes)
    scale.copy_(scales)


def rounded(s: Mapping[str, Tensor], name: str, value: Tensor) -> Tensor:
    """The value as :func:`read` would give it back after :func:`write`."""
    stored, scale = s[name], s.get(f"{name}.scale")
    if scale is None:
        return value.to(stored.dtype)
    bits = 8 if stored.dtype == torch.int8 else 4
    return dequantize_linear_ref(*quantize_linear_ref(value, bits), value.shape[-1], bits)


def wide(x: Tensor) -> Tensor:
    """Return x in the precision of the arithmetic: fp32, or float64 if it is that already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def counter(dtype: torch.dtype = torch.float32) -> Slot:
    """A number kept on the host, where reading it waits for no device."""
    return Slot((), dtype, torch.device("cpu"))


def key_of(s: Mapping[str, Tensor], o: Mapping[str, Any]) -> tuple[int, int]:
    """Key of a parameter's random numbers: (seed of the group, index of the parameter)."""
    return int(o["seed"]), int(s["index"])


def decode(stored: Mapping[str, Tensor], p: Tensor) -> dict[str, Tensor]:
    """The state as the arithmetic sees it: moments in fp32, which is the store itself at 32.

    Args:
        stored: state of a parameter.
        p: the parameter; a float64 one has float64 arithmetic.
    """
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return {k: v.to(dtype) if k in MOMENTS else v for k, v in stored.items()}


def encode(
    s: Mapping[str, Tensor], stored: Mapping[str, Tensor], o: Mapping[str, Any], step: int,
    start: int = 0,
) -> None:
    """Write decoded moments back to their store.

    Args:
        s: moments in fp32, as changed by the update.
        stored: their store; where it is the same tensor nothing is to be done.
        o: options of the group.
        step: 1-based count of this update, part of the random key.
        start: index in the whole parameter of the first element of these tensors.
    """
    for stream, name in enumerate(MOMENTS):
        if name in stored and stored[name] is not s[name]:
            fresh = stochastic_bf16_ref(s[name].float(), start, key_of(stored, o), (step, stream))
            stored[name].copy_(fresh)
