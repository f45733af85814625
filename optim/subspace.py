"""Subspace: which bases an update has, and R on them; half of a low-rank method."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..kernels.apart import Apart, stack
from ..kernels.fakes import scalar
from . import codec, dct, metrics, project
from .coordinates import chosen, shift
from .keys import key_of, keys_of
from .project import Bases, Turn
from .ranked import Ranked

__all__ = ["BASES", "COLUMNS", "Projected", "Subspace"]

#: Slots of bases, and of the indices of cosine columns.
BASES, COLUMNS = ("basis_left", "basis_right"), ("columns_left", "columns_right")


class Projected(NamedTuple):
    """A projected gradient: all that the second half of an update (``lift``) needs.

    Except with residuals that read G itself. ``turns`` and ``writes`` are set at a refresh only.

    Args:
        bases: P and Q of this step.
        low: R = P^T G Q.
        turns: for the left and the right side, how moments move to the new basis.
        writes: what is stored of the new bases, by slot.
        more: other quantities that a rule needs of the gradient, linear in it, by slot of
            :meth:`LowRankOptimizer.buffers`.
    """

    bases: Bases
    low: Tensor
    turns: tuple[Turn | None, Turn | None] | None = None
    writes: Mapping[str, Tensor] = {}
    more: Mapping[str, Tensor] = {}


class Subspace(Ranked):
    """Base of the low-rank classes: when a basis is refreshed, how it is found, read and stored."""

    #: A matrix is refreshed at 0-based step k if (k + phase) % gap == 0; this is the phase of an
    #: unshifted matrix. The first step refreshes in any case.
    first_phase: ClassVar[int] = 0

    def _subspace(self, g: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any],
                  t: int | Tensor) -> Projected:
        """P, Q and R = P^T G Q: the stored bases, or new ones where a refresh is due."""
        one = codec.one_of(s)  # in a batch all are due or none is
        if not self.due(one, o, t):
            old = self.bases(g, s, o)
            return Projected(old, old.down(g))
        born, cosines = int(one["basis_step"]), o["projection"] == "dct"
        # Whether a refresh can do without the last basis: cosine columns need only its indices,
        # random bases need it only to rotate the moments.
        spared = cosines or (o["projection"] == "random" and o["moments"] != "rotate")
        last = self.bases(g, s, o) if born and not (spared and o["keep_energy"] is None) else None
        if last is not None and o["keep_energy"] is not None and s["basis_energy"].item() > 0:
            low = last.down(g)
            if _energy(low, g, last, s) >= o["keep_energy"] * s["basis_energy"].item():
                return Projected(last, low)
        new = self._cosines(g, s, o, born) if cosines else self._found(g, last, s, o, int(t))
        if new is None:  # zero or not finite gradient: keep the basis until the next refresh
            old = self.bases(g, s, o) if last is None else last
            return Projected(old, old.down(g))
        host: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        writes = dict(new.writes)
        if not (born and isinstance(t, Tensor)):  # in a CUDA graph every step is a refresh
            writes["basis_step"] = torch.tensor(float(t), **host)
        if o["keep_energy"] is not None:
            writes["basis_energy"] = torch.tensor(_energy(new.low, g, new.bases, s), **host)
        # not _replace, which dynamo does not trace in torch 2.9
        return Projected(new.bases, new.low, new.turns if born else None, writes, new.more)

    def due(self, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int | Tensor) -> bool:
        """Whether update t looks for new bases."""
        gap = int(o["update_proj_gap"])
        return gap == 1 or not int(s["basis_step"]) or not int(t - 1 + self._phase(s, o)) % gap

    def bases(self, g: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any],
              born: int | None = None) -> Bases:
        """The bases in the state, or regenerated from what is stored of them.

        Args:
            g: a gradient; only its shape, dtype and device are used.
            s: state.
            o: options.
            born: update at which they were found, 0 for none yet; None: as the state says.
        """
        *batch, m, n = codec.whole_shape(g, s)
        r, rows = min(o["rank"], m, n), codec.rows_of(s)
        bases: list[Tensor | None] = [None, None]
        for number, name, length in project.sides(m, n, o["proj_type"]):
            if o["projection"] == "random":
                basis = self._drawn(length, r, tuple(batch), s, o, born, number, g)
            elif o["projection"] == "dct":
                basis = dct.columns(s[f"columns_{name}"], length, o["dct_basis"], g)
            else:
                narrow = g.dtype if g.element_size() == 2 else torch.float32
                basis = codec.read(s, f"basis_{name}", narrow)
                basis = basis if basis.dtype == g.dtype else basis.to(g.dtype)
            if rows is not None and name == "left" and o["projection"] in ("dct", "random"):
                basis = rows.own(basis)  # a basis that is not stored is made whole, then cut
            bases[number] = basis
        return Bases(bases[0], bases[1], rows)

    def _drawn(self, length: int, r: int, batch: tuple[int, ...], s: Mapping[str, Any],
               o: Mapping[str, Any], born: int | None, number: int, g: Any) -> Any:
        """A random basis, or one for each of several matrices."""
        steps: Any = s["basis_step"] if born is None else born
        some = codec.stack_of(s)
        if isinstance(steps, Apart):
            keys: Any = keys_of(s, o)
            like = g.parts[0]
            return Apart([self.draw(length, r, batch[1:], key, 2 * int(at) + number, like)
                          for key, at in zip(keys, steps, strict=True)])
        key, stream = key_of(s, o), 2 * int(steps) + number
        if some is None:
            return self.draw(length, r, batch, key, stream, g)
        basis = self.draw(length, r, (some.total,), key, stream, g)
        among = chosen(basis)
        return some.own(basis) if among is None else replace(among, index=some.own(among.index))

    draw: ClassVar[Callable[..., Any]] = staticmethod(project.random_basis)

    def _found(self, g: Tensor, last: Bases | None, s: Mapping[str, Tensor], o: Mapping[str, Any],
               t: int) -> Projected | None:
        """Bases from a decomposition of the gradient, or newly drawn ones.

        Args:
            g: the gradient.
            last: the last bases, to start a decomposition from and to rotate moments; None where
                there are none or neither is needed.
            s: state.
            o: options.
            t: count of this update.
        """
        random = o["projection"] == "random"
        new: list[Tensor | None] = list(self.bases(g, s, o, t)[:2]) if random else [None, None]
        turns: list[Turn | None] = [None, None]
        writes: dict[str, Tensor] = {}
        m, n = codec.whole_shape(g, s)[-2:]
        r = min(o["rank"], m, n)
        for number, side, _ in project.sides(m, n, o["proj_type"]):
            basis = None if last is None else last.left if side == "left" else last.right
            if not random:
                found = project.find(g, r, side, o["projection"], basis, key_of(s, o),
                                     2 * t + number, codec.stack_of(s))
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
        """The cosine columns with the largest norms in the transform of G, and R from the same
        transform; None at a first refresh from a gradient that is zero or not finite.
        """
        new: list[Tensor | None] = [None, None]
        turns: list[Turn | None] = [None, None]
        writes: dict[str, Tensor] = {}
        low = None
        rows, (m, n) = codec.rows_of(s), codec.whole_shape(g, s)[-2:]
        r = min(o["rank"], m, n)
        for number, side, length in project.sides(m, n, o["proj_type"]):
            left, name = side == "left", f"columns_{side}"
            old = stack(s[name])
            index, part = dct.project(g, r, kind=o["dct_basis"], dim=-2 if left else -1,
                                      norm=o["column_norm"], similarity=o["similarity"],
                                      old=old if born else None, held=rows)
            if o["moments"] == "rotate" and born:
                turns[number] = shift(old, index, left)
            if not born and not project.learnt(
                    codec.row_sum(part.double().abs().sum((-2, -1)), s), codec.stack_of(s)):
                return None
            basis = dct.columns(index, length, o["dct_basis"], g)
            new[number] = rows.own(basis) if left and rows is not None else basis
            writes[name] = index
            low = part if low is None else low
        bases = Bases(new[0], new[1], rows)
        assert low is not None
        if bases.left is not None and bases.right is not None:
            low = low @ bases.right.to(low.dtype)
        # As a product with stored bases is, and with the kernel of a GPU.
        return Projected(bases, low.to(g.dtype), (turns[0], turns[1]), writes)

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


def _energy(low: Tensor, g: Tensor, bases: Bases, s: Mapping[str, Tensor]) -> float:
    """|R|^2 / |G|^2, the smallest of a batch; 0 for a zero gradient."""
    found = -metrics.most(-metrics.share(low, g, bases).nan_to_num(0.0), codec.stack_of(s))
    return scalar(found, 0.0)
