"""State slots: what a rule keeps for a parameter, and how a moment is stored.

Arithmetic sees fp32; storage is fp32 or bf16 (``state_bits`` 32 or 16). bf16 moments are rounded
stochastically, because to nearest a second moment with beta2 = 0.999 never decays: its change of
0.1 % is below half a bf16 step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.philox import stochastic_bf16_ref

__all__ = ["MOMENTS", "Slot", "counter", "decode", "encode", "key_of", "moment", "wide"]

#: Names of the slots that are averages of gradients; all others are stored as they are.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

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


def wide(x: Tensor) -> Tensor:
    """Return x in the precision of the arithmetic: fp32, or float64 if it is that already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def counter(dtype: torch.dtype = torch.float32) -> Slot:
    """A number kept on the host, where reading it waits for no device."""
    return Slot((), dtype, torch.device("cpu"))


def key_of(s: Mapping[str, Tensor], o: Mapping[str, Any]) -> tuple[int, int]:
    """Key of a parameter's random numbers: (seed of the group, index of the parameter)."""
    return int(o["seed"]), int(s["index"])


def decode(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state as the arithmetic sees it: moments in fp32, which is the store itself at 32."""
    return {k: wide(v) if k in MOMENTS else v for k, v in stored.items()}


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
            rounded = stochastic_bf16_ref(s[name].float(), start, key_of(stored, o), (step, stream))
            stored[name].copy_(rounded)
