"""GradNormLoRP: direction and magnitude of a weight apart, the direction's gradient low-rank."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..kernels._triton import by_kernel
from ..kernels.lift import lift
from ..kernels.narrow import matmul
from . import codec
from .apply import Update, block_rows
from .base import MatrixOptimizer
from .codec import Slot, State
from .dense import adam, adam_slots
from .inner import RULES
from .lowrank import LowRankOptimizer, SubspaceOptions
from .options import Option, choice, real
from .pairs import check_factors, roles
from .project import wide_product
from .residual import RESIDUALS, Residual
from .sharding import Rows
from .subspace import Projected

__all__ = ["GradNormLoRPAdamW"]

# Slots of the magnitude's moments begin with this.
_MAGNITUDE = "magnitude_"
# Stream of the random bits of its first moment, after those of the inner rules.
_STREAM = 6
# The buffer of dL/dmu, where gradients are projected in the backward pass.
_SLOPE = "projected_slope"
# Where a step keeps c between its halves.
_NORMS = "column_norms"
# A column's direction step may shorten it to this share; below, it would be all rounding.
_SHORTEST = 1e-6


class GradNormLoRPOptions(SubspaceOptions, total=False):
    """Options of :class:`GradNormLoRPAdamW`, for type checkers."""

    axis: str
    magnitude_scale: float


class GradNormLoRPAdamW(LowRankOptimizer):
    """GaLore with weight normalization: magnitudes get AdamW, directions low-rank Adam.

    W = V diag(mu / c), c the norms of V's columns. With G = dL/dW and V^ = V diag(1 / c):
    dL/dmu_j = <G_j, V^_j>, and D = dL/dV = (G - V^ diag(V^^T G)) diag(mu / c), whose columns are
    orthogonal to those of V. What the paper then projects is not settled; there are two forms here:

    **A plain weight** (the default; reading A: GaLore on the direction). V is defined only up to
    the length of its columns, so after each step it is W itself and mu its norms: no copy is kept,
    and W' = V' diag(mu' / c') with V' = W - lr scale P N Q^T, N = Adam(P^T D Q), and
    mu' = (1 - lr weight_decay) mu - lr magnitude_scale Adam(dL/dmu). State: GaLore's, and 2 numbers
    for each column. A zero column has no direction and takes the low-rank update as it is.

    **The factors of a normalized layer** (reading B): groups of
    :func:`lissom.optim.adapter_groups`, for layers of ``lora(model, rank, normalize=...)`` or
    ``peft`` models with ``use_dora=True``. Gradients of A and B are projected as GaLore does it,
    magnitudes get AdamW. The authors' code does this, with a rank of the projection that equals
    the adapters', which rotates and saves nothing: give a smaller one, or ``proj_type="full"``.

    Reading C, the factors' gradients from a D that was projected first, is not offered: it needs D
    in full beside them. Other arguments, defaults and errors are those of
    :class:`lissom.optim.LowRankOptimizer`; there is no ``residual``, and so no ``limiter``,
    ``residual_scale`` or ``error_feedback_bits``.

    Args:
        proj_type: ``"full"`` is the paper's two-sided projection, with a core of rank x rank.
            Default ``"std"``.
        axis: ``"input"`` (default): one magnitude per input feature, a column of W; ``"output"``:
            per output feature, a row, as peft's DoRA. For plain weights.
        magnitude_scale: multiplies the update of their magnitudes, as ``scale`` that of their
            directions, >= 0. Default 1. A magnitude moves by up to lr * magnitude_scale: keep that
            well below the norms of the columns.
        roles: of a group, as ``adapter_groups`` declares them; None (default) is plain weights.

    Source: Huang et al., "Gradient Weight-normalized Low-rank Projection for Efficient LLM
    Training", arXiv 2412.19616.
    """

    algorithm: ClassVar[str] = "gradnormlorp"
    meaning: ClassVar[tuple[str, ...]] = ("axis",)
    apart: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        **{k: v for k, v in LowRankOptimizer.options.items()
           if k not in ("residual", "residual_scale", "error_feedback_bits", "limiter")},
        "axis": choice("input", "input", "output"),
        "magnitude_scale": real(1.0),
        "roles": roles(("A", "B"), ("magnitude",), hint="normalized pairs, as of peft's "
                       "use_dora=True; SwitchLoRAAdamW takes plain ones"),
    }

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False,
        **options: Unpack[GradNormLoRPOptions],
    ) -> None:
        MatrixOptimizer.__init__(self, params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "amsgrad": amsgrad, **options})

    def check_combination(self, o: Mapping[str, Any], params: list[Tensor], explicit: set[str],
                          where: str) -> None:
        super().check_combination(o, params, explicit, where)
        if o["roles"] != ("A", "B"):
            return
        if len(params) % 2:
            raise ValueError(f"{where}: {len(params)} parameters with roles={o['roles']}, but they "
                             "must be pairs: a factor needs its partner")
        names = o.get("param_names")
        for i in range(0, len(params), 2):
            name = names[i] if names else f"parameters {i} and {i + 1}"
            check_factors(params[i], params[i + 1], None, f"{where}, {name}")

    def uncapturable(self, o: Mapping[str, Any]) -> str | None:
        plain = o["rank"] is None or o["algorithm"] == "adamw"
        return None if plain else "its decay of columns is computed with a rate that is a number"

    def residual(self, o: Mapping[str, Any]) -> Residual:
        return RESIDUALS["none"]

    def by_projection(self, o: Mapping[str, Any]) -> bool:
        return o["roles"] is not None

    def projects_weight(self, o: Mapping[str, Any]) -> bool:
        return o["roles"] is None

    def together(self, p: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int,
                 rows: Rows | None) -> tuple[int, Hashable]:
        # With a plain weight the update reads W itself, so it is not batched.
        return (0, False) if o["roles"] is None else super().together(
            p, s, o, t, rows)

    def describe(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int | None, str, str]:
        rank, side, reason = super().describe(p, o)
        return rank, side, reason if o["roles"] is None else f"factor of a pair, {reason}"

    def slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        slots = super().slots(p, o)
        if o["roles"] is None:
            *batch, m, n = self.matrix_shape(p, o)
            count = (*batch, n if o["axis"] == "input" else m)
            # Of a matrix cut by rows each rank has all of these.
            slots |= {_MAGNITUDE + k: slot if batch else slot._replace(rows=False)
                      for k, slot in adam_slots(count, p, o, _STREAM).items()}
        return slots

    def buffers(self, p: Tensor, o: Mapping[str, Any], sums: bool = True) -> dict[str, Slot]:
        slots = super().buffers(p, o, sums)
        if o["roles"] is None:
            *batch, m, n = self.matrix_shape(p, o)
            count = (1, n) if o["axis"] == "input" else (m, 1)
            slope = codec.buffer((*batch, *count), p)
            slots[_SLOPE] = slope if batch else slope._replace(rows=o["axis"] == "output")
        return slots

    def project_gradient(self, g: Tensor, s: State, o: Mapping[str, Any], t: int
                         ) -> tuple[Tensor, Projected]:
        if o["roles"] is not None:
            return super().project_gradient(g, s, o, t)
        w = s["weight"]
        dim = _dim(o)
        s[_NORMS], dots = _norms(w, codec.rows_of(s), dim, g)
        inverse = _inverse(s[_NORMS])
        assert dots is not None
        # dL/dmu = <G_j, V^_j>
        slope = dots * inverse
        # D = G - V^ diag(V^^T G), as mu = c
        d = _minus(g, w, slope * inverse)
        d, space = super().project_gradient(d, s, o, t)
        return d, space._replace(more={_SLOPE: slope})

    def lift(self, g: Tensor, space: Projected, s: State, o: Mapping[str, Any], t: int) -> Update:
        # V' = W - lr f L R
        u = super().lift(g, space, s, o, t)
        if o["roles"] is not None:
            return u
        w, slope, columns = s["weight"], space.more[_SLOPE], o["axis"] == "input"
        rows, dim = codec.rows_of(s), _dim(o)
        c = s[_NORMS] if _NORMS in s else _norms(w, rows, dim)[0]
        inverse = _inverse(c)
        assert u.left is not None
        assert u.right is not None
        # L and R with entries up to 1, so that their squares are in range.
        (left, one), (right, other) = _scaled(u.left, rows), _scaled(u.right)
        if columns:
            along = (_product(left, w.to(left.dtype), rows) * right).sum(dim, keepdim=True)
            left, right = codec.wide(left), codec.wide(right)
            gram = left.mT @ left
            if rows is not None:
                along, gram = rows.sums(along, gram)
            along = along.to(c.dtype)
            square = (right * (gram @ right)).sum(dim, keepdim=True)
        else:
            along = (left * codec.wide(matmul(w.to(right.dtype), right.mT))).sum(dim, keepdim=True)
            left, right = codec.wide(left), codec.wide(right)
            square = (left * (left @ (right @ right.mT))).sum(dim, keepdim=True)
        length = _length(o["lr"] * u.factor * one * other * inverse, along * inverse, square)
        # mu' / mu
        moments = {k: s[_MAGNITUDE + k] for k in RULES["adamw"].powers if _MAGNITUDE + k in s}
        own = None if columns else rows
        n = adam((slope if own is None else own.all(slope)).squeeze(dim), moments, o, t)
        direction = n.numerator / n.denominator
        ratio = (direction if own is None else own.own(direction)).unsqueeze(dim) * inverse
        decay = 1 - o["lr"] * o["weight_decay"]
        growth = decay - o["lr"] * o["magnitude_scale"] * n.factor * ratio
        # W' = W diag(a) - lr f L R diag(a), a = (mu' / mu) / (|V'| / c)
        a = torch.where(c > 0, growth / length, 1.0)
        if columns:
            return Update(u.left, (u.right * a).to(u.right.dtype), u.factor, keep=a)
        return Update((u.left * a).to(u.left.dtype), u.right, u.factor, keep=a)


def _scaled(x: Tensor, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
    """x over its largest entry, and that as (..., 1, 1); 1 where all are zero.

    With ``rows`` x has some of a matrix, or none of them.
    """
    if x.numel():
        most = codec.wide(x.abs().amax((-2, -1), keepdim=True))
    else:
        most = codec.wide(x.new_zeros(*x.shape[:-2], 1, 1))
    if rows is not None:
        most = rows.max(most)
    most = torch.where(most == 0, 1.0, most)
    return (x / most).to(x.dtype), most


def _length(step: Tensor, along: Tensor, square: Tensor) -> Tensor:
    """|V'_j| / c_j of V' = V - s D, from s / c_j, <V_j, D_j> / c_j and |D_j|^2.

    |V'_j|^2 / c_j^2 = 1 - 2 x cos + x^2, x = s |D_j| / c_j; over the larger of 1 and x^2, which may
    be beyond fp32's range.
    """
    norm = square.clamp_min(0).sqrt()
    cosine = torch.where(norm > 0, along / norm, 0.0)
    x = step * norm
    most = x.clamp_min(1.0)
    part, rest = x / most, 1 / most
    return most * (rest.square() - 2 * part * rest * cosine + part.square()).clamp_min_(
        _SHORTEST**2).sqrt()


def _product(left: Tensor, w: Tensor, rows: Rows | None) -> Tensor:
    """L^T W of these rows; in fp32 at least, as the sum over ranks is to be rounded once."""
    if rows is None and (by_kernel(w) or w.device.type != "cpu"):
        return codec.wide(matmul(left.mT, w))
    return wide_product(left, w)


def _dim(o: Mapping[str, Any]) -> int:
    """The dimension that c is a norm along."""
    return -2 if o["axis"] == "input" else -1


def _inverse(c: Tensor) -> Tensor:
    """1 / c, or 0 for a column of zeros."""
    return torch.where(c > 0, 1 / c, 0.0)


def _norms(w: Tensor, rows: Rows | None, dim: int, g: Tensor | None = None
           ) -> tuple[Tensor, Tensor | None]:
    """c of the columns (dim -2) or rows (-1), and <G_j, W_j> where G is given."""
    rows, kind = rows if dim == -2 else None, codec.wide(w[:0]).dtype
    dots = [] if g is None else [_dots(g, w, dim)]
    if rows is None and (dim == -1 or w.device.type != "cpu"):
        c = torch.linalg.vector_norm(w, dim=dim, keepdim=True, dtype=kind)
    else:  # where vector_norm is slow, or has not all rows
        dots.append(_dots(w, w, dim))
        dots = dots if rows is None else rows.sums(*dots)
        c = dots.pop().to(kind).sqrt()
    return c, dots[0].to(kind) if dots else None


def _dots(g: Tensor, w: Tensor, dim: int) -> Tensor:
    """<G_j, W_j> of these columns (dim -2) or rows (-1) of both, in blocks of rows."""
    rows = block_rows(g)
    # On a CPU in float64, so that a sum hardly depends on which rows are added up first.
    kind = torch.float64 if g.device.type == "cpu" else codec.wide(g[:0]).dtype
    parts = [(codec.wide(g_) * w_).sum(dim, keepdim=True, dtype=kind)
             for g_, w_ in zip(g.split(rows, -2), w.split(rows, -2), strict=True)]
    return torch.cat(parts, -2) if dim == -1 else torch.stack(parts).sum(0)


def _minus(g: Tensor, w: Tensor, factor: Tensor) -> Tensor:
    """G - factor o W in G's dtype, but in fp32 for fp16, whose range it leaves."""
    kind = torch.float32 if g.dtype == torch.float16 else g.dtype
    d = g.to(kind, copy=True, memory_format=torch.contiguous_format)
    if by_kernel(d) and kind != torch.float64:
        lift(d, dense=w, gain=factor, beta=-1.0)
        return d
    rows = block_rows(d)
    for d_, w_, factor_ in zip(*(x.split(rows, -2) for x in (d, w, factor.expand(d.shape))),
                               strict=True):
        d_.copy_(codec.wide(d_) - factor_ * codec.wide(w_))  # no FMA, as in the kernel
    return d
