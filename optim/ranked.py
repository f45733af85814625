"""Ranked: which matrices a class with a rank takes, and what it says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor

from .base import MatrixOptimizer
from .options import Option, choice, integer, optional
from .project import side_of

__all__ = ["Ranked"]

_FLATTENED = ("a parameter flattened by FSDP1 or ZeRO has lost its matrix shape: use FSDP2 "
              "(torch.distributed.fsdp.fully_shard), which keeps it; for vectors use rank=None")


class Ranked(MatrixOptimizer):
    """Base of the classes whose own rule takes matrices of groups with a ``rank``."""

    options: ClassVar[Mapping[str, Option]] = {
        "rank": optional(integer(None, 1)),
        "matricize": choice("flatten", "flatten", "batch"),
    }
    remedy: ClassVar[str] = (
        "Give rank= here or in a group of 2-d weights (lissom.optim.param_groups(model, rank=...) "
        "makes such groups; under FSDP1 and ZeRO weights are 1-d, use FSDP2).")

    def declines(self, p: Tensor, o: Mapping[str, Any]) -> str | None:
        return "rank is None" if o["rank"] is None else super().declines(p, o)

    def rank_and_side(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int, str]:
        """Rank, at most the shorter side of p, and the side that is projected."""
        m, n = self.matrix_shape(p, o)[-2:]
        return min(o["rank"], m, n), side_of(m, n, "std")

    def describe(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int | None, str, str]:
        rank, side = self.rank_and_side(p, o)
        reason = super().describe(p, o)[2]
        if rank < o["rank"]:
            reason += f"; rank {o['rank']} clamped to the shorter side"
        return rank, side, reason

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

    def advice(self, given: Mapping[str, Any]) -> Iterator[str]:
        yield from super().advice(given)
        rank, held = given.get("rank"), {g["rank"] for g in self.param_groups} - {None}
        if rank is not None and held and rank not in held:
            yield (f"{type(self).__name__}(): rank={rank} has no effect: every group with matrices "
                   f"states its own rank ({', '.join(map(str, sorted(held)))}), as "
                   "param_groups(model, rank=...) gives it; give this rank there")
