"""State slots: what a rule keeps for a parameter, and how it is stored.

Arithmetic sees fp32. A moment is stored as ``state_bits`` says: in fp32; in bf16, rounded
stochastically, because to nearest a second moment with beta2 = 0.999 never decays (its change of
0.1 % is below half a bf16 step); or in 8 or 4 bits with a dynamic codebook and a scale for each
block of 256 (:mod:`lissom.kernels.dynamic`). Blocks restart at each row of the last dimension, so
that shards of rows cut between them. Moments of fewer than 4096 elements stay in fp32 where
8 or 4 bits are asked for, and rows of 4 or fewer in bf16. Bases and error feedback are stored
linearly in blocks (:mod:`lissom.kernels.linear`) where they are asked for in 8 or 4 bits. Codes
are kept under the slot's name, their scales under ``name.scale``. Only the :class:`Slot` says how
a value is stored; names have no meaning here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..kernels import fakes
from ..kernels.apart import Apart, Matrices
from ..kernels.blocks import code_shapes
from ..kernels.dynamic import dequantize_dynamic, quantize_dynamic
from ..kernels.linear import dequantize_linear, quantize_linear
from ..kernels.philox import stochastic_round
from . import sharding
from .keys import key_of, keys_of

if TYPE_CHECKING:
    from .sharding import Rows

__all__ = ["SMALL", "SPREAD", "Decoded", "Slot", "State", "Together", "basis", "counter",
           "encode", "fill", "moment", "one_of", "pieces", "read", "rounded", "row_sum", "rows_of",
           "slots_of", "stack_of", "stored", "whole_shape", "wide", "write"]

#: Moments of fewer elements are not quantized: their scales and their noise would not pay.
SMALL = 4096
#: Nor are rows of so few, which are kept in bf16: with a 4-byte scale for each, codes save little.
SHORT = 4
#: Slots of fewer elements are not spread over ranks: gathering costs more than it saves.
SPREAD = 4096
# Elements that are quantized at once on a CPU; elsewhere all are.
_PIECE = 1 << 17
_STORAGE = {32: torch.float32, 16: torch.bfloat16}


#: State of one parameter, by name.
State = MutableMapping[str, Tensor]


class Slot(NamedTuple):
    """One value of a state, which starts at zero, and how it is stored.

    Args:
        shape: of the value.
        dtype: in which it is stored, where it is not in codes.
        device: where it is stored.
        bits: 8 or 4 for codes: it is then kept in the two tensors that :func:`stored` gives.
        pinned: on the host, where there is CUDA.
        rows: its first dimension is the parameter's: it is sharded with it.
        spread: its rows are not the parameter's, and it is large (e.g. moments of r rows): each
            rank keeps a part of its rows, and all of it is gathered for an update.
        code: what the codes mean: entries of the dynamic codebook, ``"signed"`` or (for averages of
            squares) ``"unsigned"``, or ``"linear"`` steps.
        stream: for a moment, the stream of the random bits that round it to bf16; None for a slot
            that is not a moment.
        optional: a saved state without this value is complete: it starts at zero.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bits: int = 0
    pinned: bool = False
    rows: bool = False
    spread: bool = False
    code: Literal["signed", "unsigned", "linear"] = "linear"
    stream: int | None = None
    optional: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that the slot's elements take."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self) -> Tensor:
        """The slot's first value: zeros."""
        if not self.shape and fakes.mode() is not None:  # a number that torch keeps there
            return torch.tensor(0, dtype=self.dtype, device=self.device)
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device,
                           pin_memory=self.pinned and torch.cuda.is_available())


def moment(shape: tuple[int, ...], p: Tensor, o: Mapping[str, Any], stream: int,
           squared: bool = False) -> Slot:
    """A slot for an average of gradients, stored as ``state_bits`` says.

    The moments of a float64 parameter are float64 at 32 bits, as torch has them.

    Args:
        shape: of the moment.
        p: the parameter.
        o: options of its group.
        stream: below 64, and no other moment's of this parameter: what rounds one is independent
            of what rounds another.
        squared: it is an average of squares, which has no sign to store.
    """
    rows = shape[:1] == p.shape[:1] != ()
    slot = Slot(tuple(shape), _STORAGE.get(o["state_bits"], torch.float32), p.device, rows=rows,
                spread=not rows and _cuttable(shape), code="unsigned" if squared else "signed",
                stream=stream)
    if o["state_bits"] < 16 and shape and math.prod(shape) >= SMALL:
        if shape[-1] <= SHORT:
            return slot._replace(dtype=torch.bfloat16)
        return slot._replace(bits=o["state_bits"])
    if p.dtype == torch.float64 and slot.dtype == torch.float32:
        return slot._replace(dtype=torch.float64)
    return slot


def basis(shape: tuple[int, ...], bits: int | None, p: Tensor, rows: bool = False) -> Slot:
    """A slot for a tensor that is not a moment: a basis, or error feedback.

    Args:
        shape: of the tensor.
        bits: 32, 16, 8 or 4 bits per element; None is p's own dtype.
        p: the parameter.
        rows: its first dimension may be p's.
    """
    rows = rows and shape[:1] == p.shape[:1]
    slot = Slot(tuple(shape), p.dtype if bits is None else _STORAGE.get(bits, torch.float32),
                p.device, rows=rows, spread=not rows and _cuttable(shape))
    return slot if bits in (None, 16, 32) else slot._replace(bits=bits)


def buffer(shape: tuple[int, ...], p: Tensor, wide: bool = True) -> Slot:
    """A slot for what waits of a gradient from the backward pass to the step.

    Args:
        shape: of the tensor.
        p: the parameter.
        wide: in fp32 at least; else in p's dtype, if that is bf16.
    """
    dtype = p.dtype if p.dtype == torch.float64 or (
        p.dtype == torch.bfloat16 and not wide) else torch.float32
    return basis(shape, 32, p, rows=True)._replace(dtype=dtype, optional=True)


def _cuttable(shape: tuple[int, ...]) -> bool:
    """Whether a part of its rows on each rank saves more than it costs to gather them."""
    return len(shape) > 1 and shape[0] > 1 and math.prod(shape) >= SPREAD


def stored(name: str, slot: Slot) -> dict[str, Slot]:
    """The tensors that are kept for a slot, by name."""
    if not slot.bits:
        return {name: slot}
    codes, scale = code_shapes(slot.shape, slot.bits)
    kind = torch.int8 if slot.code == "linear" and slot.bits == 8 else torch.uint8
    rows = slot.rows and len(slot.shape) > 1  # blocks of a vector are not its rows
    return {name: Slot(codes, kind, slot.device, rows=rows, spread=slot.spread),
            f"{name}.scale": Slot(scale, torch.float32, slot.device, rows=rows,
                                  spread=slot.spread)}


def _decode(kept: Mapping[str, Any], name: str, slot: Slot, dtype: torch.dtype = torch.float32
            ) -> Tensor:
    """The value stored under a name: the tensor itself, or its codes decoded to ``dtype``."""
    if not slot.bits:
        plain: Tensor = kept[name]
        return plain
    codes: Matrices = kept[name]
    scale: Matrices = kept[f"{name}.scale"]
    out = torch.empty((*codes.shape[:-1], slot.shape[-1]), dtype=dtype, device=codes.device)
    if isinstance(codes, Apart) or isinstance(scale, Apart):
        return _dequantize(slot, codes, scale, out)
    for out_, codes_, scale_ in pieces(out, codes, scale):
        _dequantize(slot, codes_, scale_, out_)
    return out


def fill(kept: Mapping[str, Any], name: str, value: Tensor, slot: Slot) -> None:
    """Write a whole value to its store, rounded to nearest.

    For several parameters (``Apart``) only slots without codes.

    Args:
        kept: the store.
        name: of the value.
        value: what it is to be.
        slot: how it is stored.
    """
    store = kept[name]
    if slot.bits:
        for x_, codes_, scale_ in pieces(_readable(slot, value), store, kept[f"{name}.scale"]):
            _quantize(slot, x_, (codes_, scale_))
    elif isinstance(store, Apart):
        each = value.unbind() if value.ndim == store.ndim else [value] * len(store)
        torch._foreach_copy_(store.parts, each)
    else:
        store.copy_(value)


def _readable(slot: Slot, x: Tensor) -> Tensor:
    """x contiguous, in a dtype that :func:`_quantize` takes."""
    narrow = slot.code == "linear" and x.dtype != torch.float64
    return (x if narrow else x.float()).contiguous()


def _quantize(slot: Slot, x: Tensor, out: tuple[Tensor, Tensor] | None = None
              ) -> tuple[Tensor, Tensor]:
    if slot.code == "linear":
        return quantize_linear(x, slot.bits, out=out)
    return quantize_dynamic(x, slot.bits, slot.code == "signed", out=out)


def _dequantize(slot: Slot, codes: Any, scale: Any, out: Tensor | None = None) -> Tensor:
    if slot.code == "linear":
        return dequantize_linear(codes, scale, slot.shape[-1], slot.bits, out=out)
    return dequantize_dynamic(codes, scale, slot.shape[-1], slot.bits, slot.code == "signed",
                              out=out)


def slots_of(s: Mapping[str, Tensor]) -> Mapping[str, Slot]:
    """How the values of a state that is being updated are stored."""
    assert isinstance(s, Decoded)
    return s.slots


def read(s: Mapping[str, Tensor], name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The stored value of a slot that is not a moment.

    Args:
        s: state that is being updated.
        name: of the slot.
        dtype: of the result, if it is decoded from codes.

    Returns:
        The stored tensor itself if it is not in codes, else a new one.
    """
    assert isinstance(s, Decoded)
    return _decode(s.kept, name, s.slots[name], dtype)


def write(s: Mapping[str, Tensor], name: str, value: Tensor) -> None:
    """Store a value at once in a slot that is not a moment: see :func:`fill`."""
    assert isinstance(s, Decoded)
    fill(s.kept, name, value, s.slots[name])


def rounded(s: Mapping[str, Tensor], name: str, value: Tensor) -> Tensor:
    """The value as :func:`read` would give it back after :func:`write`."""
    slot = slots_of(s)[name]
    if not slot.bits:
        return value.to(slot.dtype)
    return _dequantize(slot, *_quantize(slot, _readable(slot, value)))


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of equal leading dimensions into pieces of rows, so that temporaries stay small.

    Pieces of contiguous tensors are views; those of others may be copies, only to be read. A single
    piece is the tensors themselves.
    """
    first = tensors[0]
    count = first.numel()
    if count <= _PIECE or first.device.type != "cpu":
        return iter((tensors,) if count else ())
    rows = max(1, _PIECE // first.shape[-1])
    return zip(*(x.reshape(-1, x.shape[-1]).split(rows) for x in tensors), strict=True)


def wide(x: Tensor) -> Tensor:
    """Return x in the precision of the arithmetic: fp32, or float64 if it is that already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def counter(dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Slot:
    """A slot for one number: on the host, where a read does not synchronize, or on a device."""
    return Slot((), dtype, device or torch.device("cpu"))


class Together(Mapping[str, Tensor]):
    """State of several parameters of one layout: each slot is an :class:`Apart` of theirs.

    For sharded parameters, of the parts that this rank holds.

    Args:
        states: one for each parameter.
    """

    def __init__(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        self.states = states
        self._found: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._found:
            self._found[name] = Apart([sharding.local(s[name]) for s in self.states])
        found: Tensor = self._found[name]
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.states[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.states[0])

    def __len__(self) -> int:
        return len(self.states[0])


class Decoded(MutableMapping[str, Tensor]):
    """State as the arithmetic sees it: a moment is decoded to fp32 when it is first read.

    A moment stored in fp32 is returned as it is, so writing to it writes the state. Other moments
    are decoded once and written back by :func:`encode`. Bases and error feedback are decoded at
    every read.

    Args:
        kept: state of a parameter, or of a block of its rows.
        slots: how its values are stored.
        p: the parameter; a float64 one has float64 arithmetic.
        rows: which of its rows ``kept`` is of, if not of all.
    """

    def __init__(self, kept: Mapping[str, Tensor], slots: Mapping[str, Slot], p: Tensor,
                 rows: Rows | None = None) -> None:
        self.kept, self.slots, self.rows = kept, slots, rows
        self.dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        #: What has been read or set.
        self.opened: dict[str, Tensor] = {}
        #: A move of the moments to new columns, which the kernel makes as it reads them:
        #: (source, rows_move) of :func:`lissom.kernels.adam.adam8`.
        self.moved: tuple[Tensor | None, bool] = (None, False)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.opened:
            return self.opened[name]
        slot = self.slots.get(name)
        if slot is None:
            return self.kept[name]
        value = _decode(self.kept, name, slot)
        if slot.stream is not None:
            value = self.opened[name] = value.to(self.dtype)
        return value

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.opened[name] = value

    def __delitem__(self, name: str) -> None:
        """Forget what was read; the store is not changed."""
        del self.opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self.kept, **self.opened})

    def __len__(self) -> int:
        return len({**self.kept, **self.opened})

    def __contains__(self, name: object) -> bool:
        return name in self.opened or name in self.kept

    def stored_pair(self, g: Tensor, o: Mapping[str, Any]) -> dict[str, Any] | None:
        """Adam's moments as they are stored, for a kernel that decodes and encodes in one pass.

        None where the kernel cannot be used: in float64, with ``amsgrad``, after a moment has been
        decoded, or where the gradient is not contiguous.
        """
        names = ("exp_avg", "exp_avg_sq")
        if (o["amsgrad"] or self.dtype != torch.float32 or g.dtype == torch.float64
                or not g.is_contiguous()
                or any(name in self.opened or name not in self.kept for name in names)):
            return None
        m, v = (self.kept[name] for name in names)
        bits = self.slots["exp_avg"].bits or 8 * m.element_size()
        return {"m": m, "v": v, "m_scale": self.kept.get("exp_avg.scale"),
                "v_scale": self.kept.get("exp_avg_sq.scale"), "bits": bits,
                "beta1": o["betas"][0], "beta2": o["betas"][1], "eps": o["eps"],
                "key": keys_of(self, o), "start": self.offset("exp_avg"), **self._moved()}

    def _moved(self) -> dict[str, Any]:
        source, rows_move = self.moved
        return {} if source is None else {"source": source, "rows_move": rows_move}

    def offset(self, name: str) -> int:
        """Index in the whole slot of the first element that this rank has."""
        slot = self.slots[name]
        return self.rows.start * math.prod(slot.shape[1:]) if self.rows and slot.rows else 0


def one_of(s: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state itself, or that of the first parameter where s is of several."""
    kept = s.kept if isinstance(s, Decoded) else s
    return kept.states[0] if isinstance(kept, Together) else s


def rows_of(s: Mapping[str, Tensor]) -> Rows | None:
    """Which rows of a matrix the state s is of, if not of all."""
    rows = s.rows if isinstance(s, Decoded) else None
    return None if rows is None or rows.stack else rows


def stack_of(s: Mapping[str, Tensor]) -> Rows | None:
    """Which matrices of a stack the state s is of, if not of all."""
    rows = s.rows if isinstance(s, Decoded) else None
    return rows if rows is not None and rows.stack else None


def whole_shape(x: Tensor, s: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Shape of the whole matrix, where x has all its rows or those that the state s is of."""
    rows = rows_of(s)
    return tuple(x.shape) if rows is None else (*x.shape[:-2], rows.total, x.shape[-1])


def row_sum(x: Tensor, s: Mapping[str, Tensor]) -> Tensor:
    """The sum over all rows, from x, the sum over the rows that the state s is of."""
    rows = rows_of(s)
    return x if rows is None else rows.sum(x)


def encode(
    s: Decoded, kept: Mapping[str, Tensor], slots: Mapping[str, Slot], o: Mapping[str, Any],
    step: int | Tensor, start: int = 0,
) -> None:
    """Write decoded moments back to their store.

    Args:
        s: moments in fp32, as changed by the update; one that was never read has not changed.
        kept: their store; where it is the same tensor nothing is to be done.
        slots: as for :class:`Decoded`.
        o: options of the group.
        step: 1-based count of this update, part of the random key.
        start: index of the first element of these tensors among the rows that s is of.
    """
    for name, slot in slots.items():
        if slot.stream is None or name not in s.opened or kept[name] is s[name]:
            continue
        if slot.bits or kept[name].dtype == s[name].dtype:
            fill(kept, name, s[name], slot)
        else:
            kept[name].copy_(stochastic_round(s[name].float(), torch.bfloat16,
                                              start + s.offset(name), key_of(kept, o),
                                              (step, slot.stream)))
