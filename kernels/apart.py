"""Tensors of one shape that lie apart, as if they were stacked: one launch works on all of them.

Weights, gradients and state are tensors of their own, and a launch costs Python as much as a small
matrix costs the GPU. A kernel gets a table of addresses in place of a pointer, and finds its matrix
by its number. Nothing is copied but the table.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._triton import jit, signed32, tl

__all__ = ["Apart", "Keys", "Matrices", "address", "alignment", "item_ptr", "key_words", "kind",
           "parts_of", "stack", "writable"]

#: (seed, parameter) of random bits, or one such pair for each tensor.
Keys = tuple[int, int] | Sequence[tuple[int, int]]

# Bytes of alignment that makes loads wide, if all addresses of a table have it.
_ALIGNED = 16


class Apart:
    """Tensors of one shape and dtype on one device, used as their stack (count, ...) would be.

    Args:
        parts: tensors, at least one.

    Raises:
        ValueError: a tensor is not like the first one.
    """

    __slots__ = ("device", "dtype", "parts", "shape", "transposed")

    def __init__(self, parts: Sequence[Tensor]) -> None:
        first = parts[0]
        shape, strides, dtype, device = first.shape, first.stride(), first.dtype, first.device
        for x in parts:
            if (x.shape != shape or x.dtype != dtype or x.device != device
                    or x.stride() != strides):
                raise ValueError(f"expected tensors of shape {tuple(shape)} and strides {strides}, "
                                 f"{dtype}, on {device}, got {tuple(x.shape)} and {x.stride()}, "
                                 f"{x.dtype}, on {x.device}")
        self.parts, self.dtype, self.device = tuple(parts), dtype, device
        self.shape, self.transposed = torch.Size((len(parts), *shape)), False

    @property
    def ndim(self) -> int:
        """Dimensions of the stack."""
        return len(self.shape)

    @property
    def mT(self) -> Apart:
        """The transpose of each."""
        turned = copy.copy(self)
        turned.shape = torch.Size((*self.shape[:-2], self.shape[-1], self.shape[-2]))
        turned.transposed = not self.transposed
        return turned

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Tensor]:
        """The tensors, as views where they are transposed."""
        return iter([x.mT for x in self.parts] if self.transposed else self.parts)

    def __matmul__(self, other: Matrices) -> Tensor:
        return _products(self, other)

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return _products(other, self)

    def numel(self) -> int:
        """Elements of the stack."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def stride(self) -> tuple[int, ...]:
        """Strides of one tensor, after a zero for the tensor's number."""
        return (0, *(self.parts[0].mT if self.transposed else self.parts[0]).stride())

    def is_contiguous(self) -> bool:
        """Whether each tensor is."""
        return not self.transposed and self.parts[0].is_contiguous()

    def to(self, dtype: torch.dtype) -> Matrices:
        """Itself, or a stack in another dtype."""
        return self if dtype == self.dtype else torch.stack([x.to(dtype) for x in self])


#: A stack, or tensors that are used as one.
Matrices = Tensor | Apart


def _products(a: Matrices, b: Matrices) -> Tensor:
    """A B of each pair, by one library call each: the same bits as for a single one."""
    out = torch.empty((len(a), a.shape[-2], b.shape[-1]), dtype=a.dtype, device=a.device)
    for x, y, z in zip(a, b, out.unbind(), strict=True):
        torch.mm(x, y, out=z)
    return out


def stack(x: Matrices) -> Tensor:
    """A stack of copies of what lies apart; a tensor as it is."""
    return torch.stack([*x]) if isinstance(x, Apart) else x


def parts_of(x: Any, count: int) -> Sequence[Any]:
    """What each of ``count`` tensors has of x: its part, or all of a number or None."""
    return [*x] if isinstance(x, (Apart, Tensor)) else [x] * count


@functools.lru_cache(maxsize=1 << 14)
def _table(numbers: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """The numbers as a tensor on the device, cached; copied without a synchronization.

    ``stream`` is not read: it is part of the cache's key, because a copy is ordered on one stream
    only.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    return torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=True).to(
        device, non_blocking=True)


def _on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _table(numbers, device, stream)


def address(x: Matrices | None) -> Tensor | None:
    """What a kernel gets for x: itself, or the table of its parts' addresses."""
    if isinstance(x, Apart):
        return _on(x.device, tuple([y.data_ptr() for y in x.parts]))
    return x


def kind(x: Matrices | None) -> Any:
    """The type that a table's addresses point to, for a kernel; None where x is no table."""
    if not isinstance(x, Apart):
        return None
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
            torch.uint8: tl.uint8, torch.int8: tl.int8}[x.dtype]


def alignment(*given: Matrices | None) -> int:
    """What all addresses in tables are known to be multiples of."""
    for x in given:
        if isinstance(x, Apart):
            for y in x.parts:
                if y.data_ptr() % _ALIGNED:
                    return 1
    return _ALIGNED


def key_words(key: Keys, like: Matrices) -> tuple[Any, Any]:
    """Seed and parameter for a kernel; where each tensor has its own the first is a table."""
    given: Any = key
    if isinstance(given[0], int):
        seed, parameter = given
        return signed32(seed), signed32(parameter)
    return _on(like.device, tuple([signed32(word) for pair in given for word in pair])), 0


def writable(*given: Matrices | None) -> list[Tensor]:
    """All tensors of these; a kernel that wrote to them must increment their versions."""
    found: list[Tensor] = []
    for x in given:
        if isinstance(x, Apart):
            found += x.parts
        elif x is not None:
            found.append(x)
    return found


@jit
def item_ptr(ptr: tl.tensor, item: tl.tensor, stride: tl.tensor, KIND: tl.constexpr,
             ALIGN: tl.constexpr) -> tl.tensor:
    """Pointer to tensor number ``item``: in a stack, or from a table of addresses of type KIND."""
    if KIND is None:
        return ptr + item * stride
    else:
        return tl.multiple_of(tl.load(ptr + item).to(tl.pointer_type(KIND)), ALIGN)
