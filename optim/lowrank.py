"""LowRankOptimizer: project, inner rule, lift, residual. Base of the low-rank methods."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..kernels._triton import by_kernel
from ..kernels.apart import Apart, stack
from . import codec, dct, metrics, project
from .apply import Update
from .codec import Slot, State
from .common import AdamWPart
from .inner import RULES, Rule
from .keys import key_of, keys_of
from .options import Option, choice, integer, optional, real
from .project import Bases, Shift, Turn
from .ranked import Ranked
from .residual import RESIDUALS, Batched, Residual, residual_of
from .sharding import Rows
from .whole import Waiting

__all__ = ["LowRankOptimizer", "LowRankOptions", "Projected", "SubspaceOptions"]

_SIDES = ("left", "right")


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
    """Options of the other ones; see :class:`LowRankOptimizer`."""

    residual: str
    error_feedback_bits: int | None
    limiter: float | None
    residual_scale: str


class Projected(NamedTuple):
    """What is left of a gradient after the projection: an update needs no more.

    Args:
        bases: of this step.
        low: R on them.
        turns: where they are new, what turns the moments.
        writes: where they are new, what is stored of them, by slot.
        more: what else a rule takes of the gradient, linear in it, by slot of
            :meth:`LowRankOptimizer.buffers`.
    """

    bases: Bases
    low: Tensor
    turns: tuple[Turn | None, Turn | None] | None = None
    writes: Mapping[str, Tensor] = {}
    more: Mapping[str, Tensor] = {}


class LowRankOptimizer(Batched, Ranked):
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
    uncapturable: ClassVar[str | None] = "whether a basis is refreshed is decided on the host"
    #: 0-based step, modulo the gap, of the refreshes of an unshifted matrix after the first.
    first_phase: ClassVar[int] = 0

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
        r, side = self.rank_and_side(p, o)
        slots = {"basis_step": codec.counter()}
        slots |= RULES[o["inner"]].slots(self._low_shape(p, o), p, o)
        slots |= self.residual(o).slots(shape, p, o)
        for name, length in zip(_SIDES, (m, n), strict=True):
            if side in (name, "full") and o["projection"] == "dct":
                slots[f"columns_{name}"] = Slot((*batch, r), torch.int32, p.device)
            elif side in (name, "full") and o["projection"] != "random":
                slots[f"basis_{name}"] = codec.basis((*batch, length, r), o["basis_bits"], p,
                                                     rows=name == "left")
        if o["keep_energy"] is not None:
            slots["basis_energy"] = codec.counter()
        return slots

    def buffers(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        """What :func:`lissom.optim.project_in_backward` keeps: R, and how often it was added to.

        Names begin with ``projected``; each but the first two is one of ``Projected.more``.
        """
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        shape = self._low_shape(p, o)
        return {"projected": Slot(shape, dtype, p.device, rows=shape[0] == p.shape[0]),
                "projected_count": codec.counter()}

    def _low_shape(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of R."""
        *batch, m, n = self.matrix_shape(p, o)
        r, side = self.rank_and_side(p, o)
        return (*batch, m if side == "right" else r, n if side == "left" else r)

    def residual(self, o: Mapping[str, Any]) -> Residual:
        """What puts the update together."""
        return residual_of(o)

    def by_projection(self, o: Mapping[str, Any]) -> bool:
        """Whether an update between two refreshes takes nothing of G but R = P^T G Q.

        A class with a :meth:`project_gradient` of its own says so anew.
        """
        cls, base = type(self), LowRankOptimizer
        whole = cls.update is base.update and cls.project_gradient is base.project_gradient
        return whole and not self.residual(o).needs_gradient

    def by_rows(self, p: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> bool:
        """R = G Q is a product of rows, R = P^T G a sum over them. New bases are of all rows,
        unless they are drawn, or chosen by sums over rows or columns.
        """
        r, side = self.rank_and_side(p, o)
        shape = self.matrix_shape(p, o)
        if len(shape) > 2:
            return False
        if side == "right":
            able = RULES[o["inner"]].elementwise
            local = o["projection"] in ("dct", "random")
        else:  # R is whole on every rank, unless its moments have as many rows as p
            able = r < shape[0]
            local = o["projection"] == "dct" or (
                o["projection"] == "random" and o["moments"] != "rotate")
        return able and ((local and o["keep_energy"] is None) or not self.due(s, o, t))

    def together(self, p: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int,
                 rows: Rows | None) -> tuple[int, Hashable]:
        """R and decoded bases, and where all choose new cosine columns the whole transform."""
        if p.ndim != 2:
            return 0, False
        r, side = self.rank_and_side(p, o)
        residual = self.residual(o)
        able = (self.apart and residual.apart
                and p.dtype in (torch.bfloat16, torch.float32) and side != "full"
                and o["inner"] == "adamw" and not o["amsgrad"] and not o["maximize"]
                # Of rows the others take sums over all ranks, of one matrix at a time.
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

    # ---------------------------------------------------------------- the update

    def update(self, g: Tensor, s: State, o: Mapping[str, Any], t: int
               ) -> Update | Waiting[Update]:
        return self.lift(*self.project_gradient(g, s, o, t), s, o, t)

    def project_gradient(self, g: Tensor, s: State, o: Mapping[str, Any], t: int
                         ) -> tuple[Tensor, Projected]:
        """The first half of an update, which writes nothing: the gradient's projection.

        Returns:
            G as it is projected, A = G + E with error feedback, and what the second half needs.
        """
        if g.dtype == torch.float16:  # R = P^T G Q leaves its range
            g = g.float()
        g = self.residual(o).gradient(g, s, o)
        space = self._subspace(g, s, o, t)
        if o["metrics"]:
            metrics.energy(self, s, space.low, g, space.bases)
        return g, space

    def lift(self, g: Tensor, space: Projected, s: State, o: Mapping[str, Any], t: int) -> Update:
        """The second half: from R to the update.

        Args:
            g: what :meth:`project_gradient` returned. Of its entries only a residual with
                ``needs_gradient`` reads any.
            space: R, which may be overwritten, and its bases.
            s: state, written from here on.
            o: options.
            t: count of this update.
        """
        residual, rule = self.residual(o), RULES[o["inner"]]
        # Kernels widen R as they read it, if it is in 16 bits, and so does the rule by itself.
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
        if factor != 1.0:
            n.mul_(factor)
        for name, x in space.writes.items():
            codec.write(s, name, x)
        # u = scale * P N Q^T, and what the residual adds
        return residual.combine(g, low, n, space.bases, measured, s, o, age)

    def age(self, space: Projected, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> int:
        """Updates that the moments have seen, this one too: the count of Adam's bias correction.

        Moments that are reset begin anew with each basis; where that was not so when the basis was
        found, as the option was changed since, from the next refresh on.
        """
        if o["moments"] != "reset":
            return t
        born = int(space.writes.get("basis_step", codec.one_of(s)["basis_step"]))
        return t - born + 1 if born else t

    def _subspace(self, g: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int
                  ) -> Projected:
        """P, Q and R = P^T G Q: the stored bases, or new ones where a refresh is due."""
        one = codec.one_of(s)  # several are all due or none
        if not self.due(one, o, t):
            old = self.bases(g, s, o)
            return Projected(old, old.down(g))
        born, cosines = int(one["basis_step"]), o["projection"] == "dct"
        # A new choice of cosine columns needs the indices of the last one, not the columns; bases
        # that are drawn need the last ones where moments turn with them.
        spared = cosines or (o["projection"] == "random" and o["moments"] != "rotate")
        last = self.bases(g, s, o) if born and not (spared and o["keep_energy"] is None) else None
        if last is not None and o["keep_energy"] is not None and s["basis_energy"].item() > 0:
            low = last.down(g)
            if _energy(low, g, last) >= o["keep_energy"] * s["basis_energy"].item():
                return Projected(last, low)
        new = self._cosines(g, s, o, born) if cosines else self._found(g, last, s, o, t)
        if new is None:  # nothing to be learnt from this gradient: try again when due
            old = self.bases(g, s, o) if last is None else last
            return Projected(old, old.down(g))
        host: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        writes = {**new.writes, "basis_step": torch.tensor(float(t), **host)}
        if o["keep_energy"] is not None:
            writes["basis_energy"] = torch.tensor(_energy(new.low, g, new.bases), **host)
        # not _replace, which dynamo does not trace in torch 2.9
        return Projected(new.bases, new.low, new.turns if born else None, writes, new.more)

    def due(self, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> bool:
        """Whether update t looks for new bases."""
        return not int(s["basis_step"]) or not (
            t - 1 + self._phase(s, o)) % int(o["update_proj_gap"])

    def bases(self, g: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any],
              born: int | None = None) -> Bases:
        """The bases in the state, or regenerated from what is stored of them.

        Args:
            g: a gradient, of which shape, dtype and device count.
            s: state.
            o: options.
            born: update at which they were found; 0 where none were; None for what the state says.
        """
        *batch, m, n = codec.whole_shape(g, s)
        side, r = project.side_of(m, n, o["proj_type"]), min(o["rank"], m, n)
        rows = codec.rows_of(s)
        bases: list[Tensor | None] = []
        for number, (name, length) in enumerate(zip(_SIDES, (m, n), strict=True)):
            basis = None
            if side in (name, "full"):
                if o["projection"] == "random":
                    basis = self._drawn(length, r, tuple(batch), s, o, born, number, g)
                elif o["projection"] == "dct":
                    basis = dct.columns(s[f"columns_{name}"], length, o["dct_basis"], g)
                else:
                    narrow = g.dtype if g.element_size() == 2 else torch.float32
                    basis = codec.read(s, f"basis_{name}", narrow)
                    basis = basis if basis.dtype == g.dtype else basis.to(g.dtype)
                if rows is not None and name == "left" and o["projection"] in ("dct", "random"):
                    basis = rows.own(basis)  # of what is not stored
            bases.append(basis)
        return Bases(bases[0], bases[1], rows)

    def _drawn(self, length: int, r: int, batch: tuple[int, ...], s: Mapping[str, Any],
               o: Mapping[str, Any], born: int | None, number: int, g: Any) -> Any:
        """A random basis, or one for each of several matrices."""
        steps: Any = s["basis_step"] if born is None else born
        if isinstance(steps, Apart):
            keys: Any = keys_of(s, o)
            like = g.parts[0]
            return Apart([self.draw(length, r, batch[1:], key, 2 * int(at) + number, like)
                          for key, at in zip(keys, steps, strict=True)])
        return self.draw(length, r, batch, key_of(s, o), 2 * int(steps) + number, g)

    draw = staticmethod(project.random_basis)

    def _found(self, g: Tensor, last: Bases | None, s: Mapping[str, Tensor], o: Mapping[str, Any],
               t: int) -> Projected | None:
        """Bases from a decomposition of the gradient, or newly drawn ones.

        Args:
            g: the gradient.
            last: the last bases, from which a decomposition starts and moments turn, if there are
                any; None too where neither is so.
            s: state.
            o: options.
            t: count of this update.
        """
        random = o["projection"] == "random"
        new: list[Tensor | None] = list(self.bases(g, s, o, t)[:2]) if random else [None, None]
        turns: list[Turn | None] = [None, None]
        writes: dict[str, Tensor] = {}
        m, n = codec.whole_shape(g, s)[-2:]
        r, projected = min(o["rank"], m, n), project.side_of(m, n, o["proj_type"])
        old = (None, None) if last is None else last[:2]
        for number, (basis, side) in enumerate(zip(old, _SIDES, strict=True)):
            if projected not in (side, "full"):
                continue
            if not random:
                found = project.find(g, r, side, o["projection"], basis, key_of(s, o),
                                     2 * t + number)
                if found is None:
                    return None
                writes[f"basis_{side}"] = found
                # what later steps will read back
                new[number] = codec.rounded(s, f"basis_{side}", found).to(g.dtype)
            if basis is not None and o["moments"] == "rotate":
                latest = new[number]
                assert latest is not None
                turns[number] = project.turn(basis, latest, side == "left")
        bases = Bases(new[0], new[1], codec.rows_of(s))
        return Projected(bases, bases.down(g), (turns[0], turns[1]), writes)

    def _cosines(self, g: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], born: int
                 ) -> Projected | None:
        """The columns of a cosine basis that the gradient has most of, and R from one transform;
        None where it is the first and has none.
        """
        new: list[Tensor | None] = [None, None]
        turns: list[Turn | None] = [None, None]
        writes: dict[str, Tensor] = {}
        low = None
        rows, lengths = codec.rows_of(s), codec.whole_shape(g, s)[-2:]
        r = min(o["rank"], *lengths)
        for number, side in enumerate(_SIDES):
            left, name = side == "left", f"columns_{side}"
            if name not in s:
                continue
            old = stack(s[name])
            # Who has some rows transforms all of some columns.
            across = rows if left else None
            index, part = dct.project(g if across is None else across.columns(g), r,
                                      kind=o["dct_basis"], dim=-2 if left else -1,
                                      norm=o["column_norm"], similarity=o["similarity"],
                                      old=old if born else None, cut=rows)
            part = part if across is None else across.joined(part, g.shape[-1])
            if o["moments"] == "rotate" and born:
                turns[number] = project.shift(old, index, left)
            if not born and not _learnt(part, s):
                return None
            basis = dct.columns(index, lengths[number], o["dct_basis"], g)
            new[number] = basis if across is None else across.own(basis)
            writes[name] = index
            low = part if low is None else low
        bases = Bases(new[0], new[1], rows)
        assert low is not None
        if bases.left is not None and bases.right is not None:
            low = low @ bases.right.to(low.dtype)
        return Projected(bases, low, (turns[0], turns[1]), writes)

    def _phase(self, s: Mapping[str, Tensor], o: Mapping[str, Any]) -> int:
        """How far this matrix's refreshes are shifted.

        index * c mod gap with c coprime to gap is a bijection on each run of gap matrices, so at
        most ceil(matrices / gap) of them are due at one step; c near gap / golden ratio spreads
        the first few evenly.
        """
        gap = int(o["update_proj_gap"])
        if o["refresh"] == "synchronous":
            return self.first_phase
        return int(s["index"]) * _coprime(gap) % gap + self.first_phase


@functools.cache
def _coprime(gap: int) -> int:
    """The first number coprime to gap from gap / golden ratio on."""
    c = max(1, round(gap * 0.618))
    while math.gcd(c, gap) > 1:
        c += 1
    return c


def _in_passing(rule: Rule, s: State, space: Projected, o: Mapping[str, Any]) -> Shift | None:
    """A change of basis that a kernel makes as it reads the moments, if it is such a one."""
    turns = [x for x in space.turns or () if x is not None]
    if (len(turns) == 1 and isinstance(turns[0], Shift) and rule is RULES["adamw"]
            and isinstance(s, codec.Decoded) and by_kernel(space.low)
            and s.stored_pair(space.low, o) is not None
            and space.low.ndim == 2 + isinstance(s.kept["exp_avg"], Apart)):
        return turns[0]
    return None


def _turned(rule: Rule, s: Mapping[str, Tensor], space: Projected, o: Mapping[str, Any]
            ) -> dict[str, Tensor]:
    """New moments after a change of basis, as ``moments`` says; none where they stay."""
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
            # A mean along the projected dimension has length 1 there and stays what it is.
            if turned is not None and x.shape[dim] == space.low.shape[dim]:
                x = turned(x, power)
        out[name] = x
    return out


def _learnt(low: Tensor, s: Mapping[str, Tensor]) -> bool:
    """Whether R on the columns that a gradient has most of is a number and, somewhere, not zero."""
    size = codec.row_sum(low.double().abs().sum((-2, -1)), s)
    return bool(size.isfinite().all()) and bool(size.any())


def _energy(low: Tensor, g: Tensor, bases: Bases) -> float:
    """|R|^2 / |G|^2, the smallest of a batch; 0 for a zero gradient."""
    return float(metrics.share(low, g, bases).nan_to_num(0.0).min())
