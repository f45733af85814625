"""LowRankOptimizer: project, inner rule, lift. Base of the low-rank methods."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import codec, project
from .base import Lowered, MatrixOptimizer
from .codec import Slot
from .inner import adam
from .options import Option, choice, integer, optional, real

__all__ = ["LowRankOptimizer"]

_log = logging.getLogger(__name__)
Bases = tuple[Tensor | None, Tensor | None]

_FLATTENED = ("a parameter flattened by FSDP1 or ZeRO has lost its matrix shape: use FSDP2 "
              "(torch.distributed.fsdp.fully_shard), which keeps it; for vectors use rank=None")


class LowRankOptimizer(MatrixOptimizer):
    """Adam on R = P^T G Q, lifted back: u = scale * P N Q^T."""

    options: ClassVar[Mapping[str, Option]] = {
        "rank": optional(integer(None, 1)),
        "update_proj_gap": integer(200, 1),
        "scale": real(0.25),
        "proj_type": choice("std", "std", "reverse_std", "left", "right", "full"),
        "projection": choice("subspace", "svd", "subspace", "randomized", "random"),
        "moments": choice("keep", "keep", "rotate", "reset"),
        "refresh": choice("staggered", "staggered", "synchronous"),
        "matricize": choice("flatten", "flatten", "batch"),
    }

    def __init__(self, params: Any, given: Mapping[str, Any], **adamw: Any) -> None:
        super().__init__(params, given, **adamw)
        if not self.plan().matrices:
            warnings.warn(
                f"{type(self).__name__} has no low-rank matrix, so it is AdamW. Give rank= here or "
                "in a group of 2-d weights (lissom.optim.param_groups(model, rank=...) makes such "
                "groups; under FSDP1 and ZeRO weights are 1-d, use FSDP2); plan() tells why.",
                stacklevel=3)

    # ---------------------------------------------------------------- which, and what is kept

    def declines(self, p: Tensor, o: Mapping[str, Any]) -> str | None:
        if o["rank"] is None:
            return "rank is None"
        if p.ndim < 2:
            return f"{p.ndim}-d, not a matrix"
        if not p.numel():
            return "empty"
        return None

    def matrix_shape(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int, ...]:
        """(m, n); convolutions are out x rest, ``matricize="batch"`` is (..., m, n)."""
        return tuple(p.shape) if o["matricize"] == "batch" else super().matrix_shape(p, o)

    def describe(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int | None, str, str]:
        *batch, m, n = self.matrix_shape(p, o)
        r = min(o["rank"], m, n)
        size = f"{math.prod(batch)} x {m} x {n}" if batch else f"{m} x {n}"
        reason = f"{p.ndim}-d seen as {size}" if p.ndim > 2 else "matrix"
        if r < o["rank"]:
            reason += f"; rank {o['rank']} clamped to the shorter side"
        return r, project.side_of(m, n, o["proj_type"]), reason

    def check_combination(self, o: Mapping[str, Any], params: list[Tensor], explicit: set[str],
                          where: str) -> None:
        if o["rank"] is None or o["algorithm"] == "adamw":
            return
        # DeepSpeed and FSDP1 leave these marks on what they flatten.
        marked = any(hasattr(p, "ds_id") or hasattr(p, "_is_flat_param") for p in params)
        if marked or ("rank" in explicit and params and all(p.ndim == 1 for p in params)):
            shapes = ", ".join(str(tuple(p.shape)) for p in params[:3])
            raise ValueError(f"{where}: rank={o['rank']}, but no parameter of this group is a "
                             f"matrix (shapes {shapes}); {_FLATTENED}")

    def slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        *batch, m, n = self.matrix_shape(p, o)
        r, side, _ = self.describe(p, o)
        assert r is not None
        low = (*batch, m if side == "right" else r, n if side == "left" else r)
        slots = {"index": codec.counter(torch.int64), "basis_step": codec.counter(),
                 "exp_avg": codec.moment(low, p, o), "exp_avg_sq": codec.moment(low, p, o)}
        if o["projection"] != "random":
            if side != "right":
                slots["basis_left"] = Slot((*batch, m, r), p.dtype, p.device)
            if side != "left":
                slots["basis_right"] = Slot((*batch, n, r), p.dtype, p.device)
        return slots

    # ---------------------------------------------------------------- the update

    def update(self, g: Tensor, s: dict[str, Tensor], o: Mapping[str, Any], t: int) -> Lowered:
        bases, refreshed = self._bases(g, s, o, t)
        # R = P^T G Q
        low = codec.wide(project.down(g, bases))
        m, v = s["exp_avg"], s["exp_avg_sq"]
        if refreshed is not None and o["moments"] != "keep":
            m, v = ((torch.zeros_like(m), torch.zeros_like(v)) if o["moments"] == "reset"
                    else project.rotate(m, v, refreshed, bases))
        moments = {**s, "exp_avg": m, "exp_avg_sq": v}
        # N = Adam(R), divided out in the denominator's place
        direction = adam(low, moments, o, t, consume=True)
        torch.div(direction.numerator, direction.denominator, out=direction.denominator)
        if m is not s["exp_avg"]:
            s["exp_avg"].copy_(m)
            s["exp_avg_sq"].copy_(v)
        if refreshed is not None:
            s["basis_step"].fill_(t)
            for name, basis in zip(("basis_left", "basis_right"), bases, strict=True):
                if basis is not None and name in s:
                    s[name].copy_(basis)
        # u = scale * P N Q^T
        left, right = bases
        n = direction.denominator.to(g.dtype)
        factor = o["scale"] * direction.factor
        if left is None:
            assert right is not None
            return Lowered(n, right.mT, factor)
        return Lowered(left, n if right is None else n @ right.mT, factor)

    def _bases(self, g: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int
               ) -> tuple[Bases, Bases | None]:
        """Bases for this step, and the ones before where they were refreshed just now."""
        born, k = int(s["basis_step"]), t - 1
        old = self._stored(g, s, o, born)
        if born and (k + self._phase(s, o)) % o["update_proj_gap"]:
            return old, None
        if o["projection"] == "random":
            return self._stored(g, s, o, t), old
        r = min(o["rank"], *g.shape[-2:])
        new: list[Tensor | None] = []
        for number, (basis, side) in enumerate(zip(old, ("left", "right"), strict=True)):
            if basis is None:
                new.append(None)
                continue
            found = project.find(g, r, side, o["projection"], basis if born else None,
                                 codec.key_of(s, o), 2 * t + number)
            if found is None:  # nothing to be learnt from this gradient: try again when due
                return old, None
            new.append(found.to(basis.dtype))
        return (new[0], new[1]), old

    def _phase(self, s: Mapping[str, Tensor], o: Mapping[str, Any]) -> int:
        """How far this matrix's refreshes are shifted.

        index * c mod gap with c coprime to gap is a bijection on each run of gap matrices, so at
        most ceil(matrices / gap) of them are due at one step; c near gap / golden ratio spreads
        the first few evenly.
        """
        gap = int(o["update_proj_gap"])
        if o["refresh"] == "synchronous":
            return 0
        c = max(1, round(gap * 0.618))
        while math.gcd(c, gap) > 1:
            c += 1
        return int(s["index"]) * c % gap

    def _stored(self, g: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], born: int) -> Bases:
        """The bases in the state, or regenerated from the step at which they were drawn."""
        if o["projection"] != "random":
            return s.get("basis_left"), s.get("basis_right")
        *batch, m, n = g.shape
        side, r = project.side_of(m, n, o["proj_type"]), min(o["rank"], m, n)
        drawn: list[Tensor | None] = [
            None if side == other else project.random_basis(
                length, r, tuple(batch), codec.key_of(s, o), 2 * born + number, g)
            for number, (other, length) in enumerate((("right", m), ("left", n)))]
        return drawn[0], drawn[1]
