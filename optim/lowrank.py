"""LowRankOptimizer: project, inner rule, lift, residual. Base of the low-rank methods."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..kernels._triton import by_kernel
from ..kernels.apart import Apart
from . import codec, dct, metrics, project
from .apply import Update
from .codec import Slot, State
from .common import AdamWPart
from .coordinates import Shift
from .inner import RULES, Rule
from .options import Option, choice, integer, optional, real
from .ranked import Ranked
from .residual import RESIDUALS, Batched, Residual, residual_of
from .sharding import Rows
from .subspace import Projected, Subspace
from .whole import Waiting

__all__ = ["LowRankOptimizer", "LowRankOptions", "SubspaceOptions"]

class SubspaceOptions(AdamWPart, total=False):
    """Options of the low-rank classes without a choice of residual, for type checkers."""

    rank: int | None
    update_proj_gap: int
    scale: float
    proj_type: str
    projection: str
    inner: str
    moments: str
    refresh: str
    matricize: str
    basis_bits: int | None
    keep_energy: float | None
    dct_basis: int
    column_norm: int
    similarity: str


class LowRankOptions(SubspaceOptions, total=False):
    """Options of the low-rank classes with a choice of residual, for type checkers."""

    residual: str
    error_feedback_bits: int | None
    limiter: float | None
    residual_scale: str


class LowRankOptimizer(Batched, Subspace):
    """An inner rule on the projected gradient R = P^T G Q, lifted back: u = scale * P N Q^T.

    Projection, inner rule, residual and what happens to the moments at a refresh are free
    choices of each group. For an m x n weight Adam keeps r (min + 2 max) elements instead of
    2 m n. Parameters without a rank, and those that are not matrices, get plain AdamW in the same
    object. ``scale`` may also be spelled ``alpha``. This is the base of the low-rank classes, to
    derive from; with all of its defaults it is :class:`lissom.optim.GaLoreAdamW`.

    Args:
        params: tensors, (name, tensor) pairs, or groups of either;
            :func:`lissom.optim.param_groups` makes suitable groups from a model.
        lr, betas, eps, weight_decay, amsgrad, maximize, state_bits, rounding, master_bits,
            nonfinite, seed, shards, metrics, algorithm, foreach, fused, capturable,
            differentiable: as :class:`lissom.optim.AdamW`.
        rank: columns of the basis, an int >= 1; None (default) is dense AdamW. Larger than the
            shorter side it is clamped, which :meth:`plan` reports.
        update_proj_gap: steps between two refreshes of a basis, >= 1. Default 200.
        scale: multiplies the lifted update (the papers' alpha), >= 0. Default 0.25.
        proj_type: ``"std"`` (default) projects the shorter side, square matrices on the right;
            ``"reverse_std"`` the longer; ``"left"``, ``"right"``; ``"full"`` both.
        projection: ``"subspace"`` (default): power iterations from the last basis;
            ``"randomized"``: a randomized SVD; ``"svd"``: the exact one; ``"dct"``: the columns
            of a cosine basis that the gradient has most of, of which only indices are stored;
            ``"random"``: a random orthonormal basis, regenerated from a seed and not stored.
        inner: rule on R: ``"adamw"`` (default); ``"momentum"``, SGD with momentum betas[0];
            ``"lion"`` (arXiv 2302.06675); ``"factored"``, Adam with a second moment of rank one.
        moments: at a refresh ``"keep"`` them as they are (default), ``"rotate"`` them into the
            new basis, or ``"reset"`` them to zero, and the count of their bias correction with
            them.
        residual: what is done with the gradient outside the subspace: ``"none"`` (default),
            ``"fira"`` (scaled columns with a norm-growth limiter), ``"sign"`` (its sign, as
            FRUGAL), ``"error_feedback"`` (added to the next gradient).
        refresh: ``"staggered"`` (default): each matrix has its own phase, at most
            ceil(matrices / gap) are refreshed at one step after the first; ``"synchronous"``:
            all when 0-based step % gap == 0.
        matricize: how a tensor of 3 or more dimensions is seen: ``"flatten"`` (default) is
            out x rest, for convolutions; ``"batch"`` is a stack of matrices in the last two
            dimensions, for experts, each with a basis of its own.
        basis_bits: storage of a basis: None (default) is the weight's dtype, 16, or 8 and 4 in
            blocks of 256 (as Q-GaLore, arXiv 2407.08296).
        keep_energy: at a refresh keep the basis if it still captures this fraction, in (0, 1], of
            the gradient energy share that it captured when it was new. Default None: always new.
        error_feedback_bits: 32, 8 or 4 bits of an error feedback, which asks for it. Default None.
        limiter: growth per step that Fira's limiter allows, >= 1; None is off. Default 1.01.
        residual_scale: ``"paper"`` (default) or ``"released"``, the two readings of Fira. See
            :class:`lissom.optim.FiraAdamW`.
        dct_basis: 2 or 3, which cosine basis. Default 2.
        column_norm: 1 or 2, the norm by which its columns are chosen. Default 1.
        similarity: ``"auto"`` (default), ``"matmul"`` or ``"fft"``: how the transform is computed.
        lr_adamw, betas_adamw, weight_decay_adamw: these options for the parameters that get
            AdamW, which then are groups of their own. Default None: the same as above.

    Raises:
        TypeError, ValueError: an option or parameter that breaks its rule, by name and value; a
            class without an ``algorithm`` of its own, as this one.
    """

    options: ClassVar[Mapping[str, Option]] = {
        **Ranked.options,
        "update_proj_gap": integer(200, 1),
        "scale": real(0.25),
        "proj_type": choice("std", "std", "reverse_std", "left", "right", "full"),
        "projection": choice("subspace", "svd", "subspace", "randomized", "dct", "random"),
        "inner": choice("adamw", *RULES),
        "moments": choice("keep", "keep", "rotate", "reset"),
        "residual": choice("none", *RESIDUALS),
        "refresh": choice("staggered", "staggered", "synchronous"),
        "basis_bits": optional(choice(None, 16, 8, 4)),
        "keep_energy": optional(real(None, 0.0, 1.0, above=True)),
        "error_feedback_bits": optional(choice(None, 32, 8, 4)),
        "limiter": optional(real(1.01, 1.0)),
        "residual_scale": choice("paper", "paper", "released"),
        **dct.OPTIONS,
    }
    spellings: ClassVar[Mapping[str, str]] = {"alpha": "scale"}

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False,
        **options: Unpack[LowRankOptions],
    ) -> None:
        if self.algorithm == "adamw":
            raise TypeError(f"{type(self).__name__}: has no rule of its own, so all would get "
                            "AdamW; use lissom.optim.GaLoreAdamW, which has these options and "
                            "defaults, or derive a class that names its `algorithm`")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay, "amsgrad": amsgrad, **options})

    # ---------------------------------------------------------------- which, and what is kept

    def rank_and_side(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int, str]:
        m, n = self.matrix_shape(p, o)[-2:]
        return min(o["rank"], m, n), project.side_of(m, n, o["proj_type"])

    def check_combination(self, o: Mapping[str, Any], params: list[Tensor], explicit: set[str],
                          where: str) -> None:
        super().check_combination(o, params, explicit, where)
        if o["rank"] is None or o["algorithm"] == "adamw":
            return
        if o["amsgrad"] and o["inner"] != "adamw":
            raise ValueError(f"{where}: amsgrad=True, but it must be False with "
                             f"inner={o['inner']!r}, which has no second moment of Adam's")
        bits = o.get("error_feedback_bits")  # which classes without a choice of residual lack
        if bits and o["residual"] not in ("none", "error_feedback"):
            raise ValueError(f"{where}: error_feedback_bits={bits}, but it must be None with "
                             f"residual={o['residual']!r}: both want the same part of the gradient")

    def slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        shape = self.matrix_shape(p, o)
        *batch, m, n = shape
        r = self.rank_and_side(p, o)[0]
        slots = {"basis_step": codec.counter()}
        slots |= RULES[o["inner"]].slots(self._low_shape(p, o), p, o)
        slots |= self.residual(o).slots(shape, p, o)
        for _, name, length in project.sides(m, n, o["proj_type"]):
            if o["projection"] == "dct":
                slots[f"columns_{name}"] = Slot((*batch, r), torch.int32, p.device)
            elif o["projection"] != "random":
                slots[f"basis_{name}"] = codec.basis((*batch, length, r), o["basis_bits"], p,
                                                     rows=name == "left")
        if o["keep_energy"] is not None:
            # At zero it asks for a refresh.
            slots["basis_energy"] = codec.counter()._replace(optional=True)
        return slots

    def buffers(self, p: Tensor, o: Mapping[str, Any], sums: bool = True) -> dict[str, Slot]:
        """Slots of :func:`lissom.optim.project_in_backward`: the sum of R, and its number of terms.

        Names begin with ``projected``. Further ones hold the tensors of ``Projected.more``.

        Args:
            p: the parameter.
            o: its options.
            sums: of several terms, or means over ranks, which need fp32. One R is kept as it is:
                in bf16 for a bf16 gradient.
        """
        return {"projected": codec.buffer(self._low_shape(p, o), p, wide=sums),
                "projected_count": codec.counter()._replace(optional=True)}

    def _low_shape(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of R."""
        *batch, m, n = self.matrix_shape(p, o)
        r, side = self.rank_and_side(p, o)
        return (*batch, m if side == "right" else r, n if side == "left" else r)

    def residual(self, o: Mapping[str, Any]) -> Residual:
        """The residual of a group, which builds the update."""
        return residual_of(o)

    def by_projection(self, o: Mapping[str, Any]) -> bool:
        """Whether an update between two refreshes needs only R = P^T G Q of the gradient.

        False for a class with its own ``update`` or ``project_gradient``, unless it overrides this.
        """
        cls, base = type(self), LowRankOptimizer
        whole = cls.update is base.update and cls.project_gradient is base.project_gradient
        return whole and not self.residual(o).needs_gradient

    def projects_weight(self, o: Mapping[str, Any]) -> bool:
        """Whether :meth:`project_gradient` reads the weight, ``s["weight"]``."""
        return False

    def by_rows(self, p: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> bool:
        """R = G Q is computed row by row, R = P^T G is a sum over rows. A refresh needs all rows,
        unless the basis is random, or cosine columns chosen by norms that are sums over ranks.
        """
        r, side = self.rank_and_side(p, o)
        shape = self.matrix_shape(p, o)
        if len(shape) > 2:
            return False
        if side == "right":
            able = RULES[o["inner"]].elementwise
            local = o["projection"] in ("dct", "random")
        else:  # R is whole on every rank; r = m would make its moments look sharded by rows
            able = r < shape[0]
            local = o["projection"] == "dct" or (
                o["projection"] == "random" and o["moments"] != "rotate")
        return able and ((local and o["keep_energy"] is None) or not self.due(s, o, t))

    def together(self, p: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int,
                 rows: Rows | None) -> tuple[int, Hashable]:
        """Held: R and the decoded basis, and when cosine columns are chosen the full transform."""
        if p.ndim != 2:
            return 0, False
        r, side = self.rank_and_side(p, o)
        residual = self.residual(o)
        able = (self.apart and residual.apart
                and p.dtype in (torch.bfloat16, torch.float32) and side != "full"
                and o["inner"] == "adamw" and not o["amsgrad"] and not o["maximize"]
                # Other cases on row shards need sums over ranks, one matrix at a time.
                and (rows is None or (side == "right" and not residual.needs_gradient)))
        due = able and self.due(s, o, t)
        if due:
            n = p.shape[side != "left"]
            able = (o["projection"] == "dct" and int(s["basis_step"]) > 0
                    and o["keep_energy"] is None and o["moments"] != "reset"
                    and o["column_norm"] == 1 and p.element_size() == 2 and rows is None
                    and not dct.by_fft(n, p, o["similarity"]))
        m, n = p.shape if rows is None else (rows.counts[rows.rank], p.shape[1])
        age = o["moments"] == "reset" and int(s["basis_step"])
        return (r * (m + n) + due * p.numel() if able else 0), (due, age)

    def uncapturable(self, o: Mapping[str, Any]) -> str | None:
        if o["rank"] is None or o["algorithm"] == "adamw":
            return None
        for name, rule in (("projection", "dct"), ("update_proj_gap", 1), ("keep_energy", None)):
            if o[name] != rule:
                return (f"with {name}={o[name]!r} the host decides whether a basis is refreshed; "
                        "it does not with projection='dct', update_proj_gap=1 and keep_energy=None")
        released = o["residual_scale"] if o.get("residual") == "fira" else None
        for name, value, unfit in (("moments", o["moments"], "reset"),
                                   ("inner", o["inner"], "factored"),
                                   ("residual_scale", released, "released")):
            if value == unfit:
                return f"with {name}={unfit!r} steps are counted on the host"
        return None

    def unready(self, s: Mapping[str, Tensor]) -> str | None:
        if int(s["basis_step"]):
            return None
        return "must have a basis, from a step with a finite gradient that is not zero,"

    # ---------------------------------------------------------------- the update

    def update(self, g: Tensor, s: State, o: Mapping[str, Any], t: int
               ) -> Update | Waiting[Update]:
        return self.lift(*self.project_gradient(g, s, o, t), s, o, t)

    def project_gradient(self, g: Tensor, s: State, o: Mapping[str, Any], t: int
                         ) -> tuple[Tensor, Projected]:
        """The first half of an update, which writes nothing: the gradient's projection.

        One that reads ``s["weight"]`` needs :meth:`projects_weight`.

        Returns:
            G as it is projected, A = G + E with error feedback, and what the second half needs.
        """
        if g.dtype == torch.float16:  # R = P^T G Q leaves its range
            g = g.float()
        kind = g.dtype
        g = self.residual(o).gradient(g, s, o)
        # On a GPU products are of the gradient's 16 bits.
        space = self._subspace(g.to(kind) if by_kernel(g) else g, s, o, t)
        if o["metrics"]:
            metrics.energy(self, s, space.low, g, space.bases)
        return g, space

    def lift(self, g: Tensor, space: Projected, s: State, o: Mapping[str, Any], t: int) -> Update:
        """The second half: from R to the update.

        Args:
            g: what :meth:`project_gradient` returned. Only a residual with ``needs_gradient`` reads
                its entries; else shape, dtype and device suffice.
            space: R, which may be overwritten, and its bases.
            s: state, written from here on.
            o: options.
            t: count of this update.
        """
        residual, rule = self.residual(o), RULES[o["inner"]]
        # A 16-bit R may stay so: kernels and inner rules widen it as they read it.
        narrow = by_kernel(space.low) or not residual.needs_low
        low = space.low if narrow else codec.wide(space.low)
        shift = _in_passing(rule, s, space, o)
        moments = {} if shift else _turned(rule, s, space, o)
        measured = residual.measure(g, low, space.bases, o)
        # N = inner(R); state is written from here on
        for name, x in moments.items():
            s[name] = x
        if shift and isinstance(s, codec.Decoded):
            s.moved = shift.source, shift.left
        age = self.age(space, s, o, t)
        n, factor = rule.direction(low, s, o, age, not residual.needs_low)
        if isinstance(factor, Tensor) or factor != 1.0:
            n.mul_(factor)
        for name, x in space.writes.items():
            codec.write(s, name, x)
        # u = scale * P N Q^T, and what the residual adds
        return residual.combine(g, low, n, space.bases, measured, s, o, age)

    def age(self, space: Projected, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> int:
        """How many gradients are in the moments, this one included: t in Adam's bias correction.

        Counts from the last refresh with ``moments="reset"``.
        """
        if o["moments"] != "reset":
            return t
        born = int(space.writes.get("basis_step", codec.one_of(s)["basis_step"]))
        return t - born + 1 if born else t


def _in_passing(rule: Rule, s: State, space: Projected, o: Mapping[str, Any]) -> Shift | None:
    """The change of basis, if the Adam kernel can make it as it reads the moments; else None."""
    turns = [x for x in space.turns or () if x is not None]
    if (len(turns) == 1 and isinstance(turns[0], Shift) and rule is RULES["adamw"]
            and isinstance(s, codec.Decoded) and by_kernel(space.low)
            and s.stored_pair(space.low, o) is not None
            and space.low.ndim == 2 + isinstance(s.kept["exp_avg"], Apart)):
        return turns[0]
    return None


def _turned(rule: Rule, s: Mapping[str, Tensor], space: Projected, o: Mapping[str, Any]
            ) -> dict[str, Tensor]:
    """The moments after a change of basis, as ``moments`` says; {} where they stay."""
    if space.turns is None or o["moments"] == "keep":
        return {}
    out: dict[str, Tensor] = {}
    for name, power in rule.powers.items():
        x = s.get(name)
        if x is None:
            continue
        if o["moments"] == "reset":
            out[name] = torch.zeros_like(x)
            continue
        for turned, dim in zip(space.turns, (-2, -1), strict=True):
            # A factored moment that is a mean along the projected dimension is not rotated.
            if turned is not None and x.shape[dim] == space.low.shape[dim]:
                x = turned(x, power)
        out[name] = x
    return out
