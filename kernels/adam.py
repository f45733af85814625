"""Adam on moments as they are stored, in one pass: decode, update, encode.

``bits`` is how both moments are stored: 8 or 4 (codes and scales of :mod:`.dynamic`), 16 (bf16,
rounded stochastically) or 32 (fp32, scales None). Arithmetic is fp32:

    M <- b1 M + (1 - b1) G;  V <- b2 V + (1 - b2) G o G;
    N = M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps);  P <- (1 - lr weight_decay) P - lr N

with M and V as they are before they are encoded. Finite entries of G are brought to where their
squares are finite; infinities and NaN stay what they are. At 8 and 4 bits, where codes have errors
of a hundredth, a GPU's fast root and inverse are used, right to two units in the last place, unless
eps is below 1e-10.

Sources: Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101; Dettmers et al.,
arXiv 2110.02861.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._triton import FLOATS, INTERPRETED, check, define, jit, launch, signed32, tl, use_triton
from .apart import (
    Apart,
    Keys,
    Matrices,
    address,
    alignment,
    item_ptr,
    key_words,
    kind,
    parts_of,
    stack,
    writable,
)
from .blocks import (
    WARPS,
    block_place,
    check_store,
    code_bytes,
    cut,
    load_codes,
    store_codes,
    store_shapes,
)
from .dynamic import (
    block_codes,
    block_values,
    codebook,
    dequantize_dynamic_ref,
    lines,
    quantize_dynamic_ref,
)
from .philox import (
    WEIGHT_STREAM,
    nearest,
    random16_tile,
    round_bf16,
    stochastic_bf16_ref,
    stochastic_fp16_ref,
    within,
)
from .split import check_below, join_ref, load_weight, pair, random_split_ref, store_weight

__all__ = ["STREAMS", "adam8", "adam8_ref", "adamw8", "adamw8_ref"]

#: Streams of the random bits that round M and V.
STREAMS = (0, 1)

_RATES = (torch.float32, torch.float64)
# What a moment is stored in, by bits.
_KINDS = {32: torch.float32, 16: torch.bfloat16, 8: torch.uint8, 4: torch.uint8}
# Squares of larger numbers are more than half of fp32's largest: a change of basis may round V up.
_LIMIT = math.sqrt(torch.finfo(torch.float32).max / 2)
# An epsilon beside which the roots of subnormal numbers have no weight.
_LEAST = 1e-10
# Elements that torch code works on at once: on a CPU so many that they stay in its cache.
_PIECE, _LARGE_PIECE = 1 << 17, 1 << 24
# Elements that a kernel takes as one row, in which it counts in int32.
_LONGEST = 1 << 30


class Step(NamedTuple):
    """Arguments of a step that are not tensors: see :func:`adam8` and :func:`adamw8`.

    Args:
        lr: learning rate of a weight; None to compute the direction.
        key: one key, or one for each of several tensors.
    """

    bits: int
    beta1: float
    beta2: float
    eps: float
    t: int | Tensor
    lr: float | Tensor | None = None
    weight_decay: float = 0.0
    maximize: bool = False
    key: Any = (0, 0)
    stochastic: bool = False
    start: int = 0

    @property
    def fast(self) -> bool:
        """Whether a GPU's fast root and inverse will do, which take subnormal numbers for zero."""
        return self.bits < 16 and self.eps >= _LEAST


#: The target (a weight, or the direction's output), the gradient, M, V, their scales or None, and
#: what is kept below a weight or None and None (:mod:`.split`). For several tensors all are
#: ``Apart``, but the direction's output and its gradient stacks.
Tensors = tuple[Any, ...]


def _numbers(step: Step) -> tuple[Any, Any, Any]:
    """sqrt(1 - b2^t), 1 - lr weight_decay and -lr / (1 - b1^t); 1 and 1 / (1 - b1^t) without lr.

    Python numbers, or 0-d float64 tensors where t is a tensor on a device.
    """
    t, lr = step.t, step.lr
    if isinstance(t, Tensor):
        t = t.double()
        # Of a direction the rate is -1.
        lr = lr.double() if isinstance(lr, Tensor) else torch.full_like(
            t, -1.0 if lr is None else lr)
        return ((1 - step.beta2**t).sqrt_(), 1 - lr * step.weight_decay,
                -lr * (1 / (1 - step.beta1**t)))
    root, factor = math.sqrt(1 - step.beta2**t), 1 / (1 - step.beta1**t)
    return (root, 1.0, factor) if lr is None else (root, 1 - lr * step.weight_decay, -lr * factor)


def _decode_ref(x: Tensor, scale: Tensor | None, columns: int, bits: int, signed: bool) -> Tensor:
    return x.float() if scale is None else dequantize_dynamic_ref(x, scale, columns, bits, signed)


def _encode_ref(x: Tensor, stored: Tensor, scale: Tensor | None, step: Step, stream: int) -> None:
    if scale is not None:
        codes, fresh = quantize_dynamic_ref(x, step.bits, stream == STREAMS[0])
        stored.copy_(codes)
        scale.copy_(fresh)
    elif step.bits == 16:
        stored.copy_(stochastic_bf16_ref(x, step.start, step.key, (step.t, stream)))


def _moments_ref(g: Tensor, stored: Sequence[Any], step: Step, root: float | Tensor,
                 source: Tensor | None, rows_move: bool) -> tuple[Tensor, Tensor]:
    """Update the stored moments; M and sqrt(V) / root + eps in fp32, root being sqrt(1 - b2^t)."""
    m, v, m_scale, v_scale = stored
    g = within(g.float(), _LIMIT)
    columns = g.shape[-1] if g.ndim else 1
    wide_m = _decode_ref(m, m_scale, columns, step.bits, True)
    wide_v = _decode_ref(v, v_scale, columns, step.bits, False)
    if source is not None:
        dim = -2 if rows_move else -1
        new = (source < 0).unsqueeze(-1 if rows_move else -2)
        old_m, old_v = (x.index_select(dim, source.clamp(min=0)).masked_fill_(new, 0.0)
                        for x in (wide_m, wide_v))
        # At 32 bits the decoded moment is the stored tensor itself.
        wide_m, wide_v = (x.copy_(y) if step.bits == 32 else y
                          for x, y in ((wide_m, old_m), (wide_v, old_v)))
    wide_m.lerp_(g, 1 - step.beta1)
    wide_v.mul_(step.beta2).addcmul_(g, g, value=1 - step.beta2)
    denominator = torch.sqrt(wide_v).div_(root).add_(step.eps)
    _encode_ref(wide_m, m, m_scale, step, STREAMS[0])
    _encode_ref(wide_v, v, v_scale, step, STREAMS[1])
    return wide_m, denominator


def _adam_ref(tensors: Tensors, step: Step, source: Tensor | None = None, rows_move: bool = False
              ) -> None:
    """Define both operations."""
    target, g, *stored, high, low = tensors
    root, keep, factor = _numbers(step)
    numerator, denominator = _moments_ref(-g if step.maximize else g, stored, step, root, source,
                                          rows_move)
    if step.lr is None:
        target.copy_(torch.div(numerator, denominator, out=denominator).mul_(factor))
        return
    x = (target.float() if high is None else join_ref(target, high, low)).mul_(keep)
    if isinstance(factor, Tensor):  # addcdiv would read it
        x += (numerator * factor).div_(denominator)
    else:
        x.addcdiv_(numerator, denominator, value=factor)
    if high is not None:
        random_split_ref(x, target, high, low, step.key if step.stochastic else None, step.t,
                         step.start)
        return
    if step.stochastic and target.dtype != torch.float32:
        rounding = stochastic_bf16_ref if target.dtype == torch.bfloat16 else stochastic_fp16_ref
        x = rounding(x, step.start, step.key, (step.t, WEIGHT_STREAM))
    target.copy_(x)


def adam8_ref(g: Tensor, m: Tensor, v: Tensor, m_scale: Tensor | None = None,
              v_scale: Tensor | None = None, *, bits: int, beta1: float, beta2: float, eps: float,
              t: int, key: tuple[int, int] = (0, 0), start: int = 0,
              source: Tensor | None = None, rows_move: bool = False) -> Tensor:
    """Define :func:`adam8`."""
    n = torch.empty_like(g, dtype=torch.float32)
    step = Step(bits, beta1, beta2, eps, t, key=key, start=start)
    _adam_ref((n, g, m, v, m_scale, v_scale, None, None), step, source, rows_move)
    return n


def adamw8_ref(p: Tensor, g: Tensor, m: Tensor, v: Tensor, m_scale: Tensor | None = None,
               v_scale: Tensor | None = None, *, bits: int, lr: float | Tensor,
               weight_decay: float, beta1: float, beta2: float, eps: float, t: int | Tensor,
               maximize: bool = False, key: tuple[int, int] = (0, 0), stochastic: bool = False,
               start: int = 0, below: Sequence[Tensor] = ()) -> None:
    """Define :func:`adamw8`."""
    step = Step(bits, beta1, beta2, eps, t, lr, weight_decay, maximize, key, stochastic, start)
    _adam_ref((p, g, m, v, m_scale, v_scale, *pair(below)), step)


def _root(x: tl.tensor) -> tl.tensor:
    """The square root of a normal number to a unit in the last place."""
    return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32,
                                     is_pure=True, pack=1)


def _root_interpreted(x: tl.tensor) -> tl.tensor:
    return tl.sqrt(x)


def _inverse(x: tl.tensor) -> tl.tensor:
    """1 / x of a normal number to a unit in the last place."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32,
                                     is_pure=True, pack=1)


def _inverse_interpreted(x: tl.tensor) -> tl.tensor:
    return 1 / x


_fast_root = jit(_root_interpreted if INTERPRETED else _root)
_fast_inverse = jit(_inverse_interpreted if INTERPRETED else _inverse)


@jit
def _quotient(x: tl.tensor, y: tl.tensor, FAST: tl.constexpr) -> tl.tensor:
    return x * _fast_inverse(y) if FAST else tl.div_rn(x, y)


@jit
def _sum(x: tl.tensor, y: tl.tensor, z: tl.tensor, FAST: tl.constexpr) -> tl.tensor:
    """x y + z, rounded once if fast."""
    return tl.fma(x, y, z) if FAST else x * y + z


@jit
def _moved(ptr: tl.tensor, scale_ptr: tl.tensor, book_ptr: tl.tensor, row: tl.tensor,
           column: tl.tensor, mask: tl.tensor, columns: tl.tensor, width: tl.tensor,
           per_row: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """A stored moment at rows and columns that broadcast to [R, W]; zero outside the mask."""
    if BITS >= 16:
        return tl.load(ptr + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    else:
        if BITS == 8:
            codes = tl.load(ptr + row * width + column, mask=mask, other=0).to(tl.int32)
        else:
            codes = tl.load(ptr + row * width + column // 2, mask=mask, other=0).to(tl.int32)
            codes = (codes >> 4 * (column % 2)) & 15
        scale = tl.load(scale_ptr + row * per_row + column // 256, mask=mask, other=0.0)
        return tl.where(mask, block_values(codes, scale, book_ptr, BITS), 0.0)


@jit
def _decoded(ptr: tl.tensor, scale_ptr: tl.tensor, book_ptr: tl.tensor, offset: tl.tensor,
             mask: tl.tensor, row: tl.tensor, first: tl.tensor, block: tl.tensor,
             inside: tl.tensor, width: tl.tensor, BITS: tl.constexpr, W: tl.constexpr,
             SIGNED: tl.constexpr) -> tl.tensor:
    """A stored moment of a program's blocks, fp32 [R, W]; zero beyond the end of a row, but at 4
    bits.
    """
    if BITS < 16:
        # The code of zero; that of M is in the middle.
        codes = load_codes(ptr, row, first, inside, width, BITS, W, 127 if SIGNED else 0)
        scale = tl.load(scale_ptr + block, mask=inside, other=0.0)
        return block_values(codes, scale[:, None], book_ptr, BITS)
    else:
        return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@jit
def _encode(x: tl.tensor, ptr: tl.tensor, scale_ptr: tl.tensor, lines_ptr: tl.tensor,
            offset: tl.tensor, mask: tl.tensor, row: tl.tensor, first: tl.tensor, block: tl.tensor,
            inside: tl.tensor, columns: tl.tensor, width: tl.tensor, index: tl.tensor,
            seed: tl.tensor, parameter: tl.tensor, step: tl.tensor, STREAM: tl.constexpr,
            BITS: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr, W: tl.constexpr) -> None:
    """Store a moment [R, W] of a program's blocks; stream 0 is M's, which has a sign."""
    if BITS < 16:
        codes, scale = block_codes(x, lines_ptr, BITS, STREAM == 0)
        store_codes(ptr, codes, row, first, inside, columns, width, BITS, R, W)
        tl.store(scale_ptr + block, scale, mask=inside)
    else:
        if BITS == 16:
            x = round_bf16(x, random16_tile(index, seed, parameter, step, STREAM, ALIGNED, W))
        tl.store(ptr + offset, x, mask=mask)


@jit
def _adam_kernel(target_ptr: tl.tensor, g_ptr: tl.tensor, m_ptr: tl.tensor, v_ptr: tl.tensor,
                 m_scale_ptr: tl.tensor, v_scale_ptr: tl.tensor, high_ptr: tl.tensor,
                 low_ptr: tl.tensor, m_book_ptr: tl.tensor, v_book_ptr: tl.tensor,
                 m_lines_ptr: tl.tensor, v_lines_ptr: tl.tensor, m_old_ptr: tl.tensor,
                 v_old_ptr: tl.tensor, m_old_scale_ptr: tl.tensor, v_old_scale_ptr: tl.tensor,
                 source_ptr: tl.tensor, rows: tl.tensor, columns: tl.tensor, per_row: tl.tensor,
                 width: tl.tensor, start: tl.tensor, seed: tl.tensor, parameter: tl.tensor,
                 step: tl.tensor, weight1: tl.tensor, beta2: tl.tensor, weight2: tl.tensor,
                 eps: tl.tensor, correction: tl.tensor, keep: tl.tensor, factor: tl.tensor,
                 BITS: tl.constexpr, FAST: tl.constexpr, WEIGHT: tl.constexpr,
                 MAXIMIZE: tl.constexpr, STOCHASTIC: tl.constexpr, HELD: tl.constexpr,
                 ALIGNED: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
                 TARGET: tl.constexpr = None, GRADIENT: tl.constexpr = None,
                 MOMENT: tl.constexpr = None, ALIGN: tl.constexpr = 1, KEYED: tl.constexpr = False,
                 MOVED: tl.constexpr = 0, BELOW: tl.constexpr = 0) -> None:
    # weight1 and weight2 are 1 - b1 and 1 - b2. The root of V is multiplied by the correction if
    # fast, else divided by it.
    if HELD:  # numbers that change from step to step are in memory, for CUDA graphs
        keep = tl.load(correction + 1)
        factor = tl.load(correction + 2)
        correction = tl.load(correction)
        step = tl.load(step).to(tl.int32)
    item = tl.program_id(1).to(tl.int64)
    if MOMENT is not None:  # several tensors; each program works on a part of one
        size = tl.cast(rows, tl.int64) * columns
        target_ptr = item_ptr(target_ptr, item, size, TARGET, ALIGN)
        g_ptr = item_ptr(g_ptr, item, size, GRADIENT, ALIGN)
        m_ptr = item_ptr(m_ptr, item, 0, MOMENT, ALIGN)
        v_ptr = item_ptr(v_ptr, item, 0, MOMENT, ALIGN)
        if BELOW > 0:
            high_ptr = item_ptr(high_ptr, item, 0, tl.int8, ALIGN)
        if BELOW == 16:
            low_ptr = item_ptr(low_ptr, item, 0, tl.uint8, ALIGN)
        if BITS < 16:
            m_scale_ptr = item_ptr(m_scale_ptr, item, 0, tl.float32, ALIGN)
            v_scale_ptr = item_ptr(v_scale_ptr, item, 0, tl.float32, ALIGN)
        if KEYED:
            parameter = tl.load(seed + 2 * item + 1).to(tl.int32)
            seed = tl.load(seed + 2 * item).to(tl.int32)
    row, first, block, inside = block_place(rows, per_row, R, W)
    column = first[:, None] + tl.arange(0, W)[None, :]
    mask = inside[:, None] & (column < columns)  # [R, W], as all that follows
    offset = row[:, None] * columns + column
    index = row * columns + first + start

    g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if MAXIMIZE:
        g = -g
    limit = 1.3043817436596711e19  # _LIMIT
    # Infinities and NaN stay.
    g = tl.where(tl.abs(g) < float("inf"), tl.clamp(g, -limit, limit), g)

    if MOVED > 0:  # read from copies, as other programs overwrite the stored moments
        if MOVED == 1:
            source = tl.load(source_ptr + item * rows + row, mask=inside, other=-1)[:, None]
            from_row, from_column = tl.maximum(source, 0).to(tl.int64), column
        else:
            source = tl.load(source_ptr + item * columns + column, mask=mask, other=-1)
            from_row, from_column = row[:, None], tl.maximum(source, 0).to(tl.int32)
        there = mask & (source >= 0)
        before = item * tl.cast(rows, tl.int64)  # rows of the tensors before this one
        m_old_ptr += before * width
        v_old_ptr += before * width
        if BITS < 16:
            m_old_scale_ptr += before * per_row
            v_old_scale_ptr += before * per_row
        m = _moved(m_old_ptr, m_old_scale_ptr, m_book_ptr, from_row, from_column, there, columns,
                   width, per_row, BITS)
        v = _moved(v_old_ptr, v_old_scale_ptr, v_book_ptr, from_row, from_column, there, columns,
                   width, per_row, BITS)
    else:
        m = _decoded(m_ptr, m_scale_ptr, m_book_ptr, offset, mask, row, first, block, inside, width,
                     BITS, W, True)
        v = _decoded(v_ptr, v_scale_ptr, v_book_ptr, offset, mask, row, first, block, inside, width,
                     BITS, W, False)
        if BITS == 4:
            # Beyond a row's end codes are 0: M's lowest value, which would raise its scale, and V's
            # smallest, which cannot.
            m = tl.where(mask, m, 0.0)
    if FAST:
        m = tl.fma(weight1, g, (1 - weight1) * m)
        v = tl.fma(weight2 * g, g, v * beta2)
        denominator = _fast_root(v) * correction + eps
    else:
        # As torch.lerp, which is exact at both ends.
        nearer = tl.where(weight1 < 0.5, m, g)
        m = nearer + tl.where(weight1 < 0.5, weight1, weight1 - 1) * (g - m)
        v = v * beta2 + weight2 * g * g
        denominator = tl.div_rn(tl.sqrt_rn(v), tl.zeros_like(v) + correction) + eps

    if WEIGHT:
        x = load_weight(target_ptr, high_ptr, low_ptr, offset, mask, BELOW)
        x = _sum(x, keep, _quotient(factor * m, denominator, FAST), FAST)
        store_weight(x, target_ptr, high_ptr, low_ptr, offset, mask, index, seed, parameter, step,
                     BELOW, STOCHASTIC, ALIGNED, W)
    else:
        x = _quotient(m, denominator, FAST) * factor
        tl.store(target_ptr + offset, nearest(x, target_ptr), mask=mask)

    _encode(m, m_ptr, m_scale_ptr, m_lines_ptr, offset, mask, row, first, block, inside,
            columns, width, index, seed, parameter, step, 0, BITS, ALIGNED, R, W)
    _encode(v, v_ptr, v_scale_ptr, v_lines_ptr, offset, mask, row, first, block, inside,
            columns, width, index, seed, parameter, step, 1, BITS, ALIGNED, R, W)


def _pieces(tensors: Tensors, step: Step, elements: int) -> Iterator[tuple[Tensors, Step]]:
    """Views of the same rows of all tensors, of about ``elements`` elements, and their step."""
    given = [x for x in tensors if x is not None]
    columns = given[0].shape[-1] if step.bits < 16 else 1  # without scales rows do not matter
    rows, start = max(1, elements // columns), step.start
    for part in zip(*((x.view(-1, x.shape[-1]) if step.bits < 16 else x.view(-1)).split(rows)
                      for x in given), strict=True):
        pieces = iter(part)
        yield (tuple(None if x is None else next(pieces) for x in tensors),
               step if start == step.start else step._replace(start=start))
        start += part[0].numel()


def _by_torch(tensors: Tensors, step: Step, source: Tensor | None, rows_move: bool) -> None:
    """A step by torch's operations, on one tensor after another, piece by piece."""
    if isinstance(tensors[2], Apart):
        each = zip(*(parts_of(x, len(tensors[2])) for x in (*tensors, source)), strict=True)
        for (*parts, from_), key in zip(each, step.key, strict=True):
            _by_torch(tuple(parts), step._replace(key=key), from_, rows_move)
    elif source is not None:
        _adam_ref(tensors, step, source, rows_move)
    else:
        elements = _PIECE if tensors[1].device.type == "cpu" else _LARGE_PIECE
        for piece, step_ in _pieces(tensors, step, elements):
            _adam_ref(piece, step_)


@functools.lru_cache(maxsize=32)
def _tables(bits: int, device: torch.device) -> tuple[Tensor, ...]:
    """Tables for decoding and encoding both moments in a kernel."""
    return (codebook(bits, True, device), codebook(bits, False, device),
            lines(bits, True, device), lines(bits, False, device))


def _kernel_numbers(step: Step) -> tuple[Any, ...]:
    """Count, correction, keep and factor for the kernel; if the count is a tensor, the rest are
    together in a second one.
    """
    root, keep, factor = _numbers(step)
    correction = 1 / root if step.fast else root
    if isinstance(step.t, Tensor):
        return step.t, torch.stack((correction, keep, factor)).float(), 0.0, 0.0
    return signed32(step.t), correction, keep, factor


def _by_kernel(tensors: Tensors, step: Step, source: Tensor | None, rows_move: bool) -> None:
    """A step in one launch."""
    target, g, m, v, m_scale, v_scale, high, low = tensors
    bits, start = step.bits, step.start
    count, given, kinds, align = 1, tensors, (None, None, None), 1
    if isinstance(m, Apart):
        count, given = len(m), tuple([address(x) for x in tensors])
        kinds, align = (kind(target), kind(g), kind(m)), alignment(*tensors)
    size = g.numel() // count
    columns = g.shape[-1] if bits < 16 or source is not None else size  # as in pieces
    at = cut(size // columns, columns, whole=source is not None)
    tables: tuple[Any, ...] = _tables(bits, g.device) if bits < 16 else (None,) * 4
    old: tuple[Any, ...] = (None,) * 5
    if source is not None:
        old = *(stack(x) if isinstance(x, Apart) else x if x is None else x.clone()
                for x in (m, v, m_scale, v_scale)), source
    t, *numbers = _kernel_numbers(step)
    words = key_words(step.key, g)
    launch(_adam_kernel, (at.programs, count), g.device, *given, *tables, *old, at.rows, at.columns,
           at.per_row, code_bytes(at.columns, bits), start, *words, t, 1 - step.beta1, step.beta2,
           1 - step.beta2, step.eps, *numbers, BITS=bits, FAST=step.fast,
           WEIGHT=step.lr is not None, MAXIMIZE=step.maximize,
           STOCHASTIC=step.stochastic and target.dtype != torch.float32,
           HELD=isinstance(t, Tensor),
           ALIGNED=start % 8 == 0 and (at.rows == 1 or at.columns % 8 == 0),
           R=at.height, W=at.width,
           TARGET=kinds[0], GRADIENT=kinds[1], MOMENT=kinds[2], ALIGN=align,
           KEYED=isinstance(words[0], Tensor), MOVED=0 if source is None else 2 - rows_move,
           BELOW=0 if high is None else 8 if low is None else 16, num_warps=WARPS)
    torch.autograd.graph.increment_version(
        writable(target, m, v, m_scale, v_scale, high, low))


def _adam8(target: Matrices, g: Matrices, m: Matrices, v: Matrices, m_scale: Matrices | None,
           v_scale: Matrices | None, bits: int, beta1: float, beta2: float, eps: float, t: int,
           lr: float | None, weight_decay: float, maximize: bool, key: Keys, stochastic: bool,
           start: int, triton: bool, held_lr: Tensor | None = None, held_t: Tensor | None = None,
           source: Tensor | None = None, rows_move: bool = False,
           high: Matrices | None = None, low: Matrices | None = None) -> None:
    """Both operations, with the arguments of a torch operator: ``held_t`` and ``held_lr`` are t and
    lr in tensors. See :func:`adam8` for ``source`` and ``rows_move``.
    """
    tensors = target, g, m, v, m_scale, v_scale, high, low
    step = Step(bits, beta1, beta2, eps, t if held_t is None else held_t,
                lr if held_lr is None else held_lr, weight_decay, maximize, key, stochastic, start)
    if not g.numel():
        return
    if not triton:
        _by_torch(tensors, step, source, rows_move)
    elif bits >= 16 and source is None and not isinstance(m, Apart) and g.numel() > _LONGEST:
        for part, step_ in _pieces(tensors, step, _LONGEST):
            _by_kernel(part, step_, None, False)
    else:
        _by_kernel(tensors, step, source, rows_move)


_op = define(
    "adam8(Tensor(a!) target, Tensor g, Tensor(b!) m, Tensor(c!) v, Tensor(d!)? m_scale, "
    "Tensor(e!)? v_scale, int bits, float beta1, float beta2, float eps, int t, float? lr, "
    "float weight_decay, bool maximize, int[] key, bool stochastic, int start, bool triton, "
    "Tensor? held_lr=None, Tensor? held_t=None, Tensor? source=None, bool rows_move=False, "
    "Tensor(f!)? high=None, Tensor(g!)? low=None) -> ()",
    _adam8)


def _check(g: Matrices, m: Matrices, v: Matrices, m_scale: Matrices | None,
           v_scale: Matrices | None, bits: int, t: int, random: bool, key: Keys | None) -> None:
    shape, device = tuple(g.shape), g.device
    if bits not in _KINDS:
        raise ValueError(f"bits: expected 32, 16, 8 or 4, got {bits}")
    if t < 1:
        raise ValueError(f"t: expected a count of 1 or more, got {t}")
    if random and key is None:
        raise ValueError("key: expected two words for stochastic rounding, got None")
    check("g", g, shape=shape, dtypes=FLOATS, device=device)
    shapes = store_shapes(shape, bits) if bits < 16 else (shape, ())
    for name, x, scale in (("m", m, m_scale), ("v", v, v_scale)):
        if bits < 16 and scale is None:
            raise ValueError(f"{name}_scale: expected a tensor at {bits} bits, got None")
        if bits >= 16 and scale is not None:
            raise ValueError(f"{name}_scale: expected None at {bits} bits, got a tensor")
        check_store(name, x, scale, shapes, device, _KINDS[bits])


def _keys(key: Keys | None, m: Matrices) -> Keys:
    """The key, or zeros: one pair, or one for each of several tensors."""
    if key is not None:
        if isinstance(m, Apart) and len(key) != len(m):
            raise ValueError(f"key: expected {len(m)} for as many tensors, got {len(key)}")
        return key
    return [(0, 0)] * len(m) if isinstance(m, Apart) else (0, 0)


def _counted(t: int | Tensor, g: Matrices) -> tuple[int, Tensor | None]:
    """A count, and the tensor that it is in: an operator's argument has one type."""
    if not isinstance(t, Tensor):
        return t, None
    check("t", t, shape=(), dtypes=(torch.int64,), device=g.device)
    return 1, t


def adam8(g: Tensor, m: Matrices, v: Matrices, m_scale: Matrices | None = None,
          v_scale: Matrices | None = None, *, bits: int, beta1: float, beta2: float, eps: float,
          t: int | Tensor, key: Keys | None = None, start: int = 0, out: Tensor | None = None,
          source: Tensor | None = None, rows_move: bool = False, backend: str | None = None
          ) -> Tensor:
    """Adam's direction N, as the module says; moments change in place.

    Moments and scales of several tensors may lie :class:`lissom.kernels.apart.Apart`, with
    gradients stacked and a key for each.

    Args:
        g: gradient (..., columns), fp32, bf16 or fp16.
        m: stored first moment: fp32 or bf16 of g's shape, or uint8 codes (..., columns) at 8 and
            (..., ceil(columns / 2)) at 4 bits.
        v: stored second moment, likewise.
        m_scale: fp32 (..., ceil(columns / 256)) at 8 and 4 bits, else None.
        v_scale: likewise.
        bits: of a stored moment: 32, 16, 8 or 4.
        beta1: decay of M.
        beta2: decay of V.
        eps: added to the root of V.
        t: 1-based count of this update; at 16 bits also the random streams' step. A number, or for
            one tensor as for :func:`adamw8`.
        key: (seed, parameter) of the random bits, needed at 16 bits.
        start: index in the whole parameter of g's first element.
        out: where N goes, of g's shape, such as g itself, rounded to nearest in 16 bits; None for a
            new fp32 tensor.
        source: int64 (columns,), or (count, columns) for several: for each column, the old column
            whose moments it continues, or -1 to start at zero; None where each stays. With
            ``rows_move`` (rows,) or (count, rows).
        rows_move: ``source`` is about rows of matrices instead of columns.
        backend: "torch", "triton", or None for Triton on CUDA and torch elsewhere.

    Returns:
        N, of g's shape.

    Raises:
        TypeError: a dtype is another one.
        ValueError: a shape, layout or option is wrong.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    count, held_t = _counted(t, g)
    _check(g, m, v, m_scale, v_scale, bits, count, bits == 16, key)
    if out is None:
        out = torch.empty_like(g, dtype=torch.float32)
    else:
        check("out", out, shape=tuple(g.shape), dtypes=FLOATS, device=g.device)
    if source is not None:
        of_one = g.shape[1:] if isinstance(m, Apart) else g.shape
        if len(of_one) != 2:
            raise ValueError(f"g: expected matrices with a source, got shape {tuple(g.shape)}")
        lead = g.shape[:1] if isinstance(m, Apart) else ()
        check("source", source, shape=(*lead, of_one[-2 if rows_move else -1]),
              dtypes=(torch.int64,), device=g.device)
    run = _adam8 if isinstance(m, Apart) else _op
    run(out, g, m, v, m_scale, v_scale, bits, beta1, beta2, eps, count, None, 0.0, False,
        _keys(key, m), False, start, use_triton(backend, g.device), None, held_t, source, rows_move)
    return out


def adamw8(p: Matrices, g: Matrices, m: Matrices, v: Matrices, m_scale: Matrices | None = None,
           v_scale: Matrices | None = None, *, bits: int, lr: float | Tensor, weight_decay: float,
           beta1: float, beta2: float, eps: float, t: int | Tensor, maximize: bool = False,
           key: Keys | None = None, stochastic: bool = False, start: int = 0,
           below: Sequence[Matrices] = (), backend: str | None = None) -> None:
    """AdamW on a weight, as the module says; weight and moments change in place.

    The new weight is rounded once. A tensor of no dimension is taken at 32 and 16 bits. Several
    weights may lie :class:`lissom.kernels.apart.Apart`, with all that belongs to them and a key for
    each, where t is a number.

    Args:
        p: weight (..., columns), fp32, bf16 or fp16.
        g: gradient of p's shape, fp32, bf16 or fp16.
        m: as for :func:`adam8`.
        v: as for :func:`adam8`.
        m_scale: as for :func:`adam8`.
        v_scale: as for :func:`adam8`.
        bits: of a stored moment: 32, 16, 8 or 4.
        lr: learning rate, with a t on the device a number or a 0-d tensor there.
        weight_decay: decoupled decay, multiplied by lr.
        beta1: decay of M.
        beta2: decay of V.
        eps: added to the root of V.
        t: 1-based count of this update, and the random streams' step: a number, or a 0-d int64
            tensor on the device, which a CUDA graph reads when it is replayed.
        maximize: go up the gradient.
        key: (seed, parameter) of the random bits, needed at 16 bits and with ``stochastic``.
        stochastic: round a bf16 or fp16 weight at random instead of to nearest.
        start: index in the whole parameter of p's first element.
        below: what is kept below a bf16 weight and changes with it: its ``high``, or ``high`` and
            ``low``, of p's shape (:mod:`lissom.kernels.split`). With ``high`` alone ``stochastic``
            rounds to 8 bits more than bf16, with both to nearest.
        backend: "torch", "triton", or None for Triton on CUDA and torch elsewhere.

    Raises:
        TypeError: a dtype is another one.
        ValueError: a shape, layout or option is wrong.
        RuntimeError: "triton" was asked for and cannot run there.
    """
    count, held_t = _counted(t, g)
    rate, held_lr = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    if held_lr is not None:
        check("lr", held_lr, shape=(), dtypes=_RATES, device=g.device)
        if held_t is None:
            raise ValueError("lr: expected a number with a number for t, got a tensor")
    _check(g, m, v, m_scale, v_scale, bits, count, bits == 16 or stochastic, key)
    check("p", p, shape=tuple(g.shape), dtypes=FLOATS, device=g.device)
    check_below(p, below)
    run = _adam8 if isinstance(m, Apart) else _op
    run(p, g, m, v, m_scale, v_scale, bits, beta1, beta2, eps, count, rate, weight_decay, maximize,
        _keys(key, m), stochastic and len(below) < 2, start, use_triton(backend, g.device), held_lr,
        held_t, None, False, *pair(below))
