"""Residuals: what a low-rank method does with the part of the gradient outside its subspace.

A residual is a small class: what it keeps, what gradient is projected, what it measures before
the first write, and how the update is put together. A new one is those few lines and an entry
in :data:`RESIDUALS`. Norms and gains run along the projected dimension: one per column of G for
a left basis, one per row for a right one, one per matrix for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels._triton import by_kernel
from ..kernels.apart import Matrices
from ..kernels.lift import lift
from ..kernels.limit import limited_gains
from ..kernels.tiles import in_tf32
from . import codec
from .apply import Update
from .codec import Slot
from .norms import ALONG, sizes
from .project import Bases
from .sharding import Rows

__all__ = ["RESIDUALS", "Batched", "Fira", "Residual", "gains", "residual_of"]


class Batched:
    """Base of classes that may be given several matrices at once.

    ``apart = True`` is a promise about the methods of that very class: a subclass that defines any
    method loses it until it makes the promise again. Checked when the class is created.
    """

    #: Whether it takes several matrices as one :class:`lissom.kernels.apart.Apart`.
    apart: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in cls.__mro__:
            if "apart" in vars(base):
                return
            if any((callable(x) or isinstance(x, property)) and not name.startswith("__")
                   for name, x in vars(base).items()):
                cls.apart = False
                return


class Residual(Batched):
    """Base of all: what is outside the subspace is dropped."""

    #: True if :meth:`combine` reads R, in fp32 or (for kernels) in the dtype of the projection. If
    #: False, the inner rule may reuse R's memory for N.
    needs_low = False
    #: True if :meth:`measure` or :meth:`combine` reads the entries of G. If False, they use only
    #: its shape, dtype and device.
    needs_gradient = False

    def slots(self, shape: tuple[int, ...], p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        """State for a parameter that the rule sees in this shape."""
        return {}

    def gradient(self, g: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any]) -> Tensor:
        """What is projected."""
        return g

    def measure(self, g: Tensor, low: Tensor, bases: Bases, o: Mapping[str, Any]) -> Tensor | None:
        """Compute what :meth:`combine` needs of G, and allocate it before the first write.

        Args:
            g: what :meth:`gradient` returned.
            low: R, in fp32 or as it was projected.
            bases: of this step.
            o: options of the group.
        """
        return None

    def combine(self, g: Tensor, low: Tensor, n: Tensor, bases: Bases, measured: Tensor | None,
                s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> Update:
        """U = scale * P N Q^T, plus the residual's term; n is a temporary, free to overwrite."""
        left, right = bases.factors(n)
        return Update(left, right, o["scale"])


class Dropped(Residual):
    """No residual (GaLore)."""

    apart = True


class Fira(Residual):
    """u = scale * (P N + S), S = (G - P R) diag(phi) / c with the factors phi = |N_i| / |R_i|.

    c is the norm-growth limiter: |S| may grow by ``limiter`` - 1 from one step to the next.
    Nothing of G's size is made: u = scale * P (N - R diag(phi / c)) + scale * G diag(phi / c),
    and |G_i - P R_i|^2 = |G_i|^2 - |R_i|^2. With ``residual_scale="released"`` the rule of the
    authors' code: u = scale * P N + (G - scale * P R) diag(phi) / c, the limiter before Adam's
    bias correction.

    Source: Chen et al., arXiv 2410.01623.
    """

    apart = True
    needs_low = True
    needs_gradient = True

    def slots(self, shape: tuple[int, ...], p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        return limiter_slot(shape, p, o)

    def measure(self, g: Tensor, low: Tensor, bases: Bases, o: Mapping[str, Any]) -> Tensor | None:
        # At full rank G - P R is rounding, which is not to be scaled up.
        leak = 1 - o["scale"] if o["residual_scale"] == "released" else 0.0
        if leak == 0 and bases.span(g):
            return None
        return sizes(g, bases.side(), bases.rows)

    def combine(self, g: Tensor, low: Tensor, n: Tensor, bases: Bases, measured: Tensor | None,
                s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> Update:
        if measured is None:
            return super().combine(g, low, n, bases, measured, s, o, t)
        side, rows = bases.side(), bases.low_rows()
        released = o["residual_scale"] == "released"
        scale = o["scale"]
        correction = 1.0
        if released and o["inner"] == "adamw":
            beta1, beta2 = o["betas"]
            correction = math.sqrt(1 - beta2**t) / (1 - beta1**t)
        n_ = sizes(n, side, rows)
        if correction != 1.0:
            n_ /= correction
        gain = gains(n_, sizes(low, side, rows), measured, larger(g, low, bases), rows, s, o,
                     1 - scale if released else 0.0)
        wide = torch.promote_types(low.dtype, torch.float32)
        gain = (gain if correction == 1.0 else gain * correction).to(wide)
        left, right = bases.factors(_less(n, low, gain))
        return Update(left, right, scale, g, gain if released else gain * scale)


class Sign(Residual):
    """u = scale * (P N + sign(G - P R)): the rest of the gradient moves by its sign, stateless.

    A column (a row, a matrix: what norms are along) of which only rounding is left has no sign.
    That of a basis in 4 bits is too large to tell apart.

    Source: FRUGAL (Zmushko et al., arXiv 2411.07837), with one rate for both parts.
    """

    needs_gradient = True

    def measure(self, g: Tensor, low: Tensor, bases: Bases, o: Mapping[str, Any]) -> Tensor | None:
        if bases.span(g):  # full rank: the rest is rounding, whose sign means nothing
            return None
        # A kernel rounds the difference once, which leaves its sign: 16 bits will do.
        kind = g.dtype if _by_lift(g, low, bases) else codec.wide(g[:0]).dtype
        rest = g.to(kind, copy=True, memory_format=torch.contiguous_format)
        _without(rest, low, bases)
        side, rows = bases.side(), bases.rows
        rounding = sizes(rest, side, rows) <= _rounding(g, low, bases, o) * sizes(g, side, rows)
        return rest.sign_().masked_fill_(rounding, 0.0)

    def combine(self, g: Tensor, low: Tensor, n: Tensor, bases: Bases, measured: Tensor | None,
                s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> Update:
        left, right = bases.factors(n)
        return Update(left, right, o["scale"], measured, o["scale"])


class ErrorFeedback(Residual):
    """A = G + E is projected; what the projection drops is kept: E <- A - P R.

    Kept in ``error_feedback_bits``, and with it what R lacks where kernels round it to 16 bits.
    Source: arXiv 2505.17967, as in its DCT-AdamW.
    """

    needs_gradient = True

    def slots(self, shape: tuple[int, ...], p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        slot = codec.basis(shape, o["error_feedback_bits"] or 32, p, rows=True)
        return {"error": slot._replace(optional=True)}

    def gradient(self, g: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any]) -> Tensor:
        return (g + codec.wide(codec.read(s, "error"))).contiguous()

    def measure(self, g: Tensor, low: Tensor, bases: Bases, o: Mapping[str, Any]) -> Tensor | None:
        return _without(g, low, bases)  # g is A, a temporary

    def combine(self, g: Tensor, low: Tensor, n: Tensor, bases: Bases, measured: Tensor | None,
                s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> Update:
        assert measured is not None
        codec.write(s, "error", measured)
        return super().combine(g, low, n, bases, measured, s, o, t)


#: Values of the option ``residual``.
RESIDUALS: dict[str, Residual] = {"none": Dropped(), "fira": Fira(), "sign": Sign(),
                                  "error_feedback": ErrorFeedback()}


def residual_of(o: Mapping[str, Any]) -> Residual:
    """The group's residual; bits for error feedback ask for it."""
    return RESIDUALS["error_feedback" if o["error_feedback_bits"] else o["residual"]]


def limiter_slot(shape: tuple[int, ...], p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
    """The last norm that a limiter compares with, one per matrix."""
    if o["limiter"] is None:
        return {}
    return {"limiter": Slot((*shape[:-2], 1, 1), torch.float32, p.device, optional=True)}


def _less(n: Tensor, low: Tensor, gain: Tensor) -> Tensor:
    """N - gain R in N's place, rounded once."""
    if by_kernel(n) and n.dtype != torch.float64 and n.is_contiguous():
        lift(n, dense=low, gain=gain, beta=-1.0)
        return n
    return n.addcmul_(codec.wide(low), gain, value=-1)


def _by_lift(g: Tensor, low: Tensor, bases: Bases) -> bool:
    """Whether a kernel takes P R Q^T from G; with both bases its product would be rounded twice."""
    return by_kernel(g) and low.element_size() == 2 and bases.side() != "full"


# By bits of a stored basis, what its rounding leaves of G - P R, over G's norm. That of 4 bits
# would hide a true rest.
_STORED = {16: 2.0**-7, 8: 2.0**-6}


def _rounding(g: Tensor, low: Tensor, bases: Bases, o: Mapping[str, Any]) -> float:
    """The share of G's norm that rounding leaves of G - P R where that is zero, at most."""
    share: float = _STORED.get(o["basis_bits"], 0.0)
    if low.is_cuda and low.dtype == torch.float32 and (
            torch.compiler.is_compiling() or in_tf32(low)):  # no graph can tell
        share = max(share, 2.0**-8)
    # Errors of sums and of bases grow with the root of their length.
    length = max(8.0, 2 * math.sqrt(max(bases.height(g), g.shape[-1])))
    for x in (low, *bases[:2]):
        if isinstance(x, Tensor):  # what is rounded to 16 bits outweighs sums
            eps: float = torch.finfo(x.dtype).eps
            share = max(share, eps if x.element_size() == 2 else eps * length)
    return share


def _without(g: Tensor, low: Tensor, bases: Bases) -> Tensor:
    """G - P R Q^T in g's place; g is contiguous."""
    if _by_lift(g, low, bases):
        lift(g, *bases.factors(low), alpha=-1.0)
        return g
    left, right = (x if x is None else x.to(g.dtype) for x in bases[:2])
    left, right = Bases(left, right).factors(low.to(g.dtype))
    return g.addmm_(left, right, alpha=-1) if g.ndim == 2 else g.baddbmm_(left, right, alpha=-1)


def larger(g: Tensor, low: Tensor, bases: Bases) -> float:
    """Length of a column of G over that of a column of R, along the projected dimension."""
    whole = {-2: bases.height(g), -1: g.shape[-1]}
    return math.prod([whole[i] / low.shape[i] for i in ALONG[bases.side()]])


def gains(size_n: Tensor, size_r: Tensor, size_g: Tensor, more: float, rows: Rows | None,
          s: Mapping[str, Tensor], o: Mapping[str, Any], leak: float | None = None) -> Tensor:
    """Factors |N_i| / |R_i|, bounded, after the norm-growth limiter: :mod:`lissom.kernels.limit`.

    Args:
        size_n: norms of the columns of N.
        size_r: of R.
        size_g: of G, all in float64 and with the projected dimension as 1.
        more: length of a column of G over that of a column of N (see :func:`larger`).
        rows: the rows that this rank has, if not all.
        s: state, with the last norm that the limiter compares with, where there is one.
        o: options of the group.
        leak: the factors are for G - R + leak R; None for G.
    """
    batch = math.prod(size_n.shape[:-2])
    n, r, g = (x.reshape(batch, math.prod(x.shape[-2:])) for x in (size_n, size_r, size_g))
    last: Matrices | None = s.get("limiter")
    if isinstance(last, Tensor):
        last = last.view(-1)
    gain = limited_gains(n, r, g, last, more=more, eps=o["eps"], leak=leak,
                         limiter=o["limiter"] or 1.0,
                         count=math.prod(size_n.shape[-2:]) if rows is None else rows.total,
                         total=None if rows is None else rows.sum)
    return gain.view(size_n.shape)
