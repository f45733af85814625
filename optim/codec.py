"""State slots: what a rule keeps for a parameter, and how it is stored.

Arithmetic sees fp32. A moment is stored as ``state_bits`` says: in fp32; in bf16, rounded
stochastically, because to nearest a second moment with beta2 = 0.999 never decays (its change of
0.1 % is below half a bf16 step); or in 8 or 4 bits with a dynamic codebook and a scale for each
block of 256 (:mod:`lissom.kernels.quant8`). Blocks restart at each row of the last dimension, so
that shards of rows cut between them. Moments of fewer than 4096 elements stay in fp32 where
8 or 4 bits are asked for, and rows of 4 or fewer in bf16. Bases and error feedback are stored
linearly in blocks (:mod:`lissom.kernels.linear`) where they are asked for in 8 or 4 bits. What is
in codes has them under its name and its scales under ``name.scale``.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.apart import Apart, Keys, Matrices
from ..kernels.blocks import code_shapes
from ..kernels.linear import dequantize_linear, quantize_linear
from ..kernels.philox import WEIGHT_STREAM, random_bits16_ref, stochastic_round
from ..kernels.quant8 import dequantize_dynamic, quantize_dynamic
from . import sharding

if TYPE_CHECKING:
    from .sharding import Rows

__all__ = ["MOMENTS", "SMALL", "Decoded", "Slot", "State", "Together", "counter", "encode", "fill",
           "first", "held", "key_of", "keys_of", "master_slots", "moment", "name_key", "pieces",
           "plain_name", "random_rounding", "read", "read_weight", "rounded", "row_sum", "rows_of",
           "stored", "whole_shape", "wide", "write", "write_weight"]

# Their positions are the streams of random bits that round them.
_ORDER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col",
          "momentum_buffer", "magnitude_exp_avg", "magnitude_exp_avg_sq",
          "magnitude_max_exp_avg_sq")
#: Names of the slots that are averages of gradients; all others are stored as they are.
MOMENTS = frozenset(_ORDER)

#: Moments of fewer elements are not quantized: their scales and their noise would not pay.
SMALL = 4096
#: Nor are rows of so few: a scale for each is larger than the half of bf16, in which they are kept.
SHORT = 4
# Averages of squares, which have no sign to store.
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col",
            "magnitude_exp_avg_sq", "magnitude_max_exp_avg_sq"}
# Elements that are quantized at once on a CPU; elsewhere all are.
_PIECE = 1 << 17
_STORAGE = {32: torch.float32, 16: torch.bfloat16}


#: State of one parameter, by name.
State = MutableMapping[str, Tensor]


class Slot(NamedTuple):
    """Shape, dtype and device of one state tensor, which starts at zero.

    With ``bits`` of 8 or 4 it stands for the two tensors that :func:`stored` gives. On the host it
    may be ``pinned``, which is done where there is CUDA. ``rows`` tells that its first dimension is
    the parameter's: it is sharded with it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bits: int = 0
    pinned: bool = False
    rows: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes that the slot's elements take."""
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize

    def empty(self) -> Tensor:
        """The slot's first value: zeros."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device,
                           pin_memory=self.pinned and torch.cuda.is_available())


def moment(shape: tuple[int, ...], p: Tensor, o: Mapping[str, Any]) -> Slot:
    """A slot for an average of gradients, stored as ``state_bits`` says.

    The moments of a float64 parameter are float64 at 32 bits, as torch has them.
    """
    slot = Slot(tuple(shape), _STORAGE.get(o["state_bits"], torch.float32), p.device,
                rows=shape[:1] == p.shape[:1] != ())
    if o["state_bits"] < 16 and shape and math.prod(shape) >= SMALL:
        if shape[-1] <= SHORT:
            return slot._replace(dtype=torch.bfloat16)
        return slot._replace(bits=o["state_bits"])
    if p.dtype == torch.float64 and slot.dtype == torch.float32:
        return slot._replace(dtype=torch.float64)
    return slot


def stored(name: str, slot: Slot) -> dict[str, Slot]:
    """The tensors that are kept for a slot, by name."""
    if not slot.bits:
        return {name: slot}
    codes, scale = code_shapes(slot.shape, slot.bits)
    rows = slot.rows and len(slot.shape) > 1  # blocks of a vector are not its rows
    return {name: Slot(codes, torch.uint8, slot.device, rows=rows),
            f"{name}.scale": Slot(scale, torch.float32, slot.device, rows=rows)}


def held(name: str, shape: tuple[int, ...], bits: int | None, p: Tensor, rows: bool = False
         ) -> dict[str, Slot]:
    """Slots for a tensor that is no average: a basis, a residue. See :func:`read`.

    Args:
        name: of the slot; scales are under ``name.scale``.
        shape: of the tensor.
        bits: 32, 16, 8 or 4 bits per element; None is p's own dtype.
        p: the parameter.
        rows: its first dimension may be p's.
    """
    rows = rows and shape[:1] == p.shape[:1]
    if bits in (None, 16, 32):
        dtype = p.dtype if bits is None else _STORAGE[bits]
        return {name: Slot(tuple(shape), dtype, p.device, rows=rows)}
    codes, scale = code_shapes(tuple(shape), bits)
    kind = torch.int8 if bits == 8 else torch.uint8
    return {name: Slot(codes, kind, p.device, rows=rows),
            f"{name}.scale": Slot(scale, torch.float32, p.device, rows=rows)}


def read(s: Mapping[str, Tensor], name: str, columns: int, dtype: torch.dtype = torch.float32
         ) -> Tensor | None:
    """The tensor that :func:`held` made slots for, or None where there is none.

    Args:
        s: state of a parameter.
        name: of the slot.
        columns: length of its last dimension, which packed codes do not tell.
        dtype: of a quantized one.

    Returns:
        The stored tensor itself if it is not quantized, else a new one.
    """
    stored, scale = s.get(name), s.get(f"{name}.scale")
    if stored is None or scale is None:
        return stored
    dequantize = functools.partial(dequantize_linear, columns=columns, bits=_linear_bits(stored))
    return _unpacked(stored, scale, columns, dequantize, dtype)


def write(s: Mapping[str, Any], name: str, value: Tensor) -> None:
    """Store a value under the slots of :func:`held`; for several parameters what is no code."""
    stored, scale = s[name], s.get(f"{name}.scale")
    if isinstance(stored, Apart):
        each = value.unbind() if value.ndim == stored.ndim else [value] * len(stored)
        torch._foreach_copy_(stored.parts, each)
        return
    if scale is None:
        stored.copy_(value)
        return
    _pack(stored, scale, _single(value),
          functools.partial(quantize_linear, bits=_linear_bits(stored)))


def _linear_bits(stored: Tensor) -> int:
    return 8 if stored.dtype == torch.int8 else 4


def _single(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of tensors of equal leading dimensions, so many that temporaries stay small.

    They are views of contiguous tensors; of others they may be copies, to be read only. Where one
    piece is all, it is the tensors themselves.
    """
    first = tensors[0]
    count = first.numel()
    if count <= _PIECE or first.device.type != "cpu":
        return iter((tensors,) if count else ())
    rows = max(1, _PIECE // first.shape[-1])
    return zip(*(x.reshape(-1, x.shape[-1]).split(rows) for x in tensors), strict=True)


def _pack(codes: Tensor, scale: Tensor, x: Tensor, quantize: Callable[..., Any]) -> None:
    """Quantize x into its store, piece by piece."""
    for x_, codes_, scale_ in pieces(x.contiguous(), codes, scale):
        quantize(x_, out=(codes_, scale_))


def _unpacked(codes: Matrices, scale: Matrices, columns: int, dequantize: Callable[..., Any],
              dtype: torch.dtype = torch.float32) -> Tensor:
    """What a store stands for, piece by piece."""
    out = torch.empty((*codes.shape[:-1], columns), dtype=dtype, device=codes.device)
    if isinstance(codes, Apart) or isinstance(scale, Apart):
        dequantize(codes, scale, out=out)
        return out
    for out_, codes_, scale_ in pieces(out, codes, scale):
        dequantize(codes_, scale_, out=out_)
    return out


def rounded(s: Mapping[str, Tensor], name: str, value: Tensor) -> Tensor:
    """The value as :func:`read` would give it back after :func:`write`."""
    stored, scale = s[name], s.get(f"{name}.scale")
    if scale is None:
        return value.to(stored.dtype)
    bits = _linear_bits(stored)
    return dequantize_linear(*quantize_linear(_single(value).contiguous(), bits), value.shape[-1],
                             bits)


def wide(x: Tensor) -> Tensor:
    """Return x in the precision of the arithmetic: fp32, or float64 if it is that already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def counter(dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Slot:
    """A number kept on the host, where reading it waits for no device, or on one."""
    return Slot((), dtype, device or torch.device("cpu"))


# Put into names by what wraps a module; DDP's is at the beginning alone.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def plain_name(name: str) -> str:
    """A parameter's dotted name without what wrapping the model has put into it.

    That is done by torch.compile, DDP, FSDP1 and activation checkpointing.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[:1] == ["module"] else parts)


def name_key(name: str) -> int:
    """A parameter's ``key`` from its plain name: the first 63 bits of its BLAKE2b hash."""
    digest = hashlib.blake2b(plain_name(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def key_of(s: Mapping[str, Tensor], o: Mapping[str, Any]) -> tuple[int, int]:
    """The two 32-bit words that key a parameter's random numbers, from ``seed`` and its ``key``.

    For one seed different keys give different words.
    """
    return _words(int(o["seed"]), int(s["key"]))


def keys_of(s: Mapping[str, Tensor], o: Mapping[str, Any]) -> Keys:
    """The same, for each of several parameters where s is of them."""
    key: Matrices = s["key"]
    seed = int(o["seed"])
    return [_words(seed, int(x)) for x in key.parts] if isinstance(key, Apart) else key_of(s, o)


def _words(seed: int, key: int) -> tuple[int, int]:
    # Philox takes 32 bits: the upper half of a longer seed is mixed into the lower.
    return (seed ^ (seed >> 32) * 0x9E3779B9 ^ key >> 32) & 0xFFFFFFFF, key & 0xFFFFFFFF


class Together(Mapping[str, Tensor]):
    """State of several parameters of one layout: each slot is an :class:`Apart` of theirs.

    Of sharded ones it is of what this rank holds.

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

    What is stored in the precision of the arithmetic is the store itself.

    Args:
        kept: state of a parameter, or of a block of its rows.
        slots: of which quantized moments tell bits and columns.
        p: the parameter; a float64 one has float64 arithmetic.
        rows: which of its rows ``kept`` is of, if not of all.
    """

    def __init__(self, kept: Mapping[str, Tensor], slots: Mapping[str, Slot], p: Tensor,
                 rows: Rows | None = None) -> None:
        self.kept, self.slots, self.rows = kept, slots, rows
        self.dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        #: What has been read or set.
        self.opened: dict[str, Tensor] = {}
        #: Where moments are to come from as a kernel reads them: (source, rows_move) of
        #: :func:`lissom.kernels.adam.adam8`.
        self.moved: tuple[Tensor | None, bool] = (None, False)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.opened:
            return self.opened[name]
        stored = self.kept[name]
        if name in MOMENTS:
            slot, scale = self.slots[name], self.kept.get(f"{name}.scale")
            if scale is not None:
                columns, bits, signed = slot.shape[-1], slot.bits, name not in _SQUARES
                stored = _unpacked(stored, scale, columns, functools.partial(
                    dequantize_dynamic, columns=columns, bits=bits, signed=signed))
            stored = self.opened[name] = stored.to(self.dtype)
        return stored

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

        None where there is none: in float64, with a third moment, after one has been decoded, or
        where the gradient is not contiguous.
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
                "key": keys_of(self, o), "start": self.first("exp_avg"), **self._moved()}

    def _moved(self) -> dict[str, Any]:
        source, rows_move = self.moved
        return {} if source is None else {"source": source, "rows_move": rows_move}

    def first(self, name: str) -> int:
        """Index in the whole slot of the first element of what is here of it."""
        slot = self.slots[name]
        return self.rows.start * math.prod(slot.shape[1:]) if self.rows and slot.rows else 0


def first(s: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state itself, or of several parameters that of the first one."""
    kept = s.kept if isinstance(s, Decoded) else s
    return kept.states[0] if isinstance(kept, Together) else s


def rows_of(s: Mapping[str, Tensor]) -> Rows | None:
    """Which rows of the parameter the state s is of, if not of all."""
    return s.rows if isinstance(s, Decoded) else None


def whole_shape(x: Tensor, s: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Shape of the matrix of which x is all, or the rows that the state ``s`` is of."""
    rows = rows_of(s)
    return tuple(x.shape) if rows is None else (*x.shape[:-2], rows.total, x.shape[-1])


def row_sum(x: Tensor, s: Mapping[str, Tensor]) -> Tensor:
    """The sum over all rows, of which x is one over those that the state ``s`` is of."""
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
    for stream, name in enumerate(_ORDER):
        if name not in kept or name not in s.opened or kept[name] is s[name]:
            continue
        if slots[name].bits or kept[name].dtype == s[name].dtype:
            fill(kept, name, s[name], slots[name])
        else:
            kept[name].copy_(stochastic_round(s[name].float(), torch.bfloat16,
                                              start + s.first(name), key_of(kept, o),
                                              (step, stream)))


def fill(kept: Mapping[str, Tensor], name: str, value: Tensor, slot: Slot) -> None:
    """Write a moment to its store, whole and to nearest.

    Args:
        kept: the store.
        name: of the moment.
        value: its new value.
        slot: how it is stored.
    """
    if slot.bits:
        _pack(kept[name], kept[f"{name}.scale"], value.float(), functools.partial(
            quantize_dynamic, bits=slot.bits, signed=name not in _SQUARES))
    else:
        kept[name].copy_(value)


def master_slots(p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
    """What a bf16 weight lacks of fp32: 8 or 16 bits per element, as ``master_bits`` says."""
    if o["master_bits"] is None or p.dtype != torch.bfloat16:
        return {}
    kind = torch.int16 if o["master_bits"] == 16 else torch.int8
    return {"master": Slot(tuple(p.shape), kind, p.device, rows=p.ndim > 0)}


def read_weight(p: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
    """The weight in the precision of the arithmetic, with the bits that the state keeps of it.

    bits(fp32) = bits(bf16) 2^16 + master, or master 2^8 where that has 8 bits.
    """
    master = kept.get("master")
    if master is None:
        return wide(p)
    low = master.int() if master.dtype == torch.int16 else master.int() << 8
    return torch.add((p.contiguous().view(torch.int16).int() << 16), low).view(torch.float32)


def _split_weight(p: Tensor, x: Tensor, master: Tensor, random: Tensor | None) -> None:
    """Write the nearest bf16 number to p and what it lacks to master; ties away from zero.

    Source: the split of master weights as in FlashOptim (databricks/flashoptim).
    """
    # above it the nearest bf16 number, or what 8 bits round to, would be infinite
    top = torch.full((), 0x7F7F7E00, dtype=torch.int32, device=x.device).view(torch.float32)
    bits = torch.where(x.isfinite(), torch.minimum(torch.maximum(x, -top), top), x
                       ).contiguous().view(torch.int32)
    eight = master.dtype == torch.int8
    if eight:  # 24 bits of fp32 stay
        bits = (bits + (128 if random is None else random >> 8)) & -256
    upper = (bits + 0x8000) >> 16
    low = bits - (upper << 16)
    finite = x.isfinite()
    p.copy_(torch.where(finite, upper.to(torch.int16).view(torch.bfloat16), x.bfloat16()))
    master.copy_(torch.where(finite, low >> 8 if eight else low, 0))


def random_rounding(p: Matrices, o: Mapping[str, Any]) -> bool:
    """Whether results are rounded into this weight at random: by default where it is 16-bit."""
    return (o["rounding"] != "nearest" and p.dtype in (torch.bfloat16, torch.float16)
            and not (o["master_bits"] == 16 and p.dtype == torch.bfloat16))


def write_weight(p: Tensor, x: Tensor, kept: Mapping[str, Tensor], o: Mapping[str, Any],
                 step: int | Tensor, start: int = 0) -> None:
    """Round fp32 results into a weight, once.

    Where the state keeps more of it (:func:`master_slots`) what is cut off goes there. The random
    bits are those of (seed, key of the parameter; step, element): the same on resume, on any number
    of ranks and on every device, and where parameters have names in any order and grouping.

    Args:
        p: a weight or a block of its rows.
        x: its new value; nothing is done where it is p itself.
        kept: state of the parameter.
        o: options of the group.
        step: 1-based count of this update.
        start: index in the whole parameter of the first element of p.
    """
    if x is p:
        return
    if "master" in kept:
        random = None
        if random_rounding(p, o):
            random = random_bits16_ref(start, x.numel(), key_of(kept, o), (step, WEIGHT_STREAM),
                                       x.device).view(x.shape)
        _split_weight(p, x, kept["master"], random)
        return
    if random_rounding(p, o):
        x = stochastic_round(x, p.dtype, start, key_of(kept, o), (step, WEIGHT_STREAM))
    p.copy_(x)
