"""The plan of an optimizer: one row per parameter, totals that are exact."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .sharding import lacks_group

if TYPE_CHECKING:
    from .base import MatrixOptimizer

__all__ = ["Plan", "Row", "aligned", "plan_of", "shown"]


def aligned(lines: Sequence[tuple[str, ...]], right: Collection[int] = ()) -> list[str]:
    """Lines of a table, their cells padded; columns in ``right`` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(w) if i in right else cell.ljust(w)
                      for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines]


def shown(shape: Sequence[int]) -> str:
    """A shape as tables show it."""
    return "x".join(map(str, shape)) or "scalar"


@dataclass(frozen=True)
class Row:
    """What an optimizer does to one parameter: its rule, rank and bytes of state, and why.

    Args:
        name: its dotted name, or its place where none was given.
        shape: its shape.
        rule: ``"adamw"`` or the class's own algorithm.
        rank: rank of the projection, None for dense rules.
        side: ``"left"``, ``"right"``, ``"full"`` or ``""``.
        state_bytes: bytes of all its state tensors.
        reason: why this rule, in words.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    rank: int | None
    side: str
    state_bytes: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """What an optimizer does to each parameter, one :class:`Row` each; printed, it is a table."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        """The row of a parameter, by name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    @property
    def state_bytes(self) -> int:
        """Bytes of all state."""
        return sum(row.state_bytes for row in self.rows)

    @property
    def matrices(self) -> int:
        """How many parameters the class's own rule takes."""
        return sum(row.rule != "adamw" for row in self.rows)

    @property
    def dense(self) -> int:
        """How many parameters get AdamW."""
        return len(self.rows) - self.matrices

    def __str__(self) -> str:
        head = ("parameter", "shape", "rule", "rank", "side", "state bytes", "reason")
        body = [(row.name, shown(row.shape), row.rule,
                 "" if row.rank is None else str(row.rank), row.side, f"{row.state_bytes:,}",
                 row.reason) for row in self.rows]
        lines = aligned([head, *body], right={3, 5})
        lines.append(f"{self.matrices} by the class's own rule, {self.dense} by AdamW, "
                     f"{self.state_bytes:,} bytes of state")
        return "\n".join(lines)


def plan_of(optimizer: MatrixOptimizer) -> Plan:
    """See :meth:`lissom.optim.base.MatrixOptimizer.plan`."""
    rows = []
    listed: set[int] = set()
    kept = optimizer._layouts.kept(optimizer)
    for name, p, o in optimizer._named():
        reason = optimizer.why_adamw(p, o)
        rule, rank, side = "adamw", None, ""
        if reason is None:
            rule = optimizer.algorithm
            rank, side, reason = optimizer.describe(p, o)
        held = p in kept
        if not held:
            reason = f"{reason}; frozen: no state"
        elif o["shards"] != "whole" and lacks_group(p, optimizer._layouts.made):
            reason = f"{reason}; gathered on every rank: those that share it have no group"
        size = sum(x.nbytes for x in optimizer.stored_slots(p, o).values()) if held else 0
        if id(p) in listed:  # torch allows it, and updates it twice
            size, reason = 0, f"{reason}; listed before, with its state"
        listed.add(id(p))
        rows.append(Row(name, tuple(p.shape), rule, rank, side, size, reason))
    return Plan(tuple(rows))
