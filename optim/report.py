"""report(optimizer): what an optimizer does and holds, in one screen."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass

from .base import MatrixOptimizer, checked_optimizer
from .plan import aligned, shown

__all__ = ["Line", "Report", "report"]

_HEAD = ("rule", "rank", "side", "shape", "parameters", "elements", "weight bytes", "state bytes",
         "bytes/element")
# Columns of numbers.
_RIGHT = {1, 4, 5, 6, 7, 8}


@dataclass(frozen=True)
class Line:
    """Parameters that are alike.

    Args:
        rule: ``"adamw"`` or the class's own algorithm.
        rank: of the projection, None for dense rules.
        side: ``"left"``, ``"right"``, ``"full"`` or ``""``.
        shape: theirs.
        parameters: how many there are.
        elements: of all of them.
        weight_bytes: of all of them.
        state_bytes: of all of them.
    """

    rule: str
    rank: int | None
    side: str
    shape: tuple[int, ...]
    parameters: int
    elements: int
    weight_bytes: int
    state_bytes: int


@dataclass(frozen=True)
class Report:
    """What an optimizer does and holds, with one line for parameters that are alike.

    :func:`report` returns it; printed, it is a table.

    Args:
        title: the class, and its options that differ from the defaults.
        lines: parameters that are alike, those with the most state first.
        notes: what else is worth knowing, one sentence each.
    """

    title: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of all state."""
        return sum(line.state_bytes for line in self.lines)

    @property
    def elements(self) -> int:
        """Elements of all parameters."""
        return sum(line.elements for line in self.lines)

    def _cells(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for x in self.lines:
            rows.append((x.rule, "" if x.rank is None else str(x.rank), x.side,
                         shown(x.shape), f"{x.parameters:,}", f"{x.elements:,}",
                         f"{x.weight_bytes:,}", f"{x.state_bytes:,}",
                         _per(x.state_bytes, x.elements)))
        rows.append(("total", "", "", "", f"{sum(x.parameters for x in self.lines):,}",
                     f"{self.elements:,}", f"{sum(x.weight_bytes for x in self.lines):,}",
                     f"{self.state_bytes:,}", _per(self.state_bytes, self.elements)))
        return rows

    def text(self) -> str:
        """The table in plain text."""
        return "\n".join([self.title, *aligned([_HEAD, *self._cells()], _RIGHT), *self.notes])

    def terminal(self) -> str:
        """The table as rich draws it, colours included.

        Raises:
            ImportError: rich is not installed (extra ``bench``).
        """
        import rich.console
        import rich.table

        table = rich.table.Table(title=self.title, title_justify="left",
                                 caption="\n".join(self.notes), caption_justify="left")
        for i, name in enumerate(_HEAD):
            table.add_column(name, justify="right" if i in _RIGHT else "left")
        *rows, total = self._cells()
        for row in rows:
            table.add_row(*row, style=None if row[0] == "adamw" else "bold")
        table.add_section()
        table.add_row(*total)
        file = io.StringIO()
        rich.console.Console(file=file, force_terminal=True).print(table)
        return file.getvalue().rstrip("\n")

    def __str__(self) -> str:
        if sys.stdout is not None and sys.stdout.isatty():
            try:
                return self.terminal()
            except ImportError:
                pass
        return self.text()


def report(optimizer: MatrixOptimizer) -> Report:
    """What an optimizer does and holds: parameters that are alike in one line, exact bytes.

    ``optimizer.plan()`` has a row for each parameter, with the reason. ``str()`` of the result is
    a table: of rich, where that is installed (extra ``bench``) and standard output is a terminal,
    else plain text.

    Args:
        optimizer: any of this package.

    Returns:
        A :class:`Report`, whose figures are bytes and elements.

    Raises:
        TypeError: it is of another package.
    """
    optimizer = checked_optimizer(optimizer, "report")
    alike: dict[tuple[object, ...], list[int]] = {}
    first: dict[tuple[object, ...], Line] = {}
    frozen = 0
    seen: set[int] = set()
    kept = optimizer._layouts.kept(optimizer)
    for row, (_, p, _) in zip(optimizer.plan(), optimizer._named(), strict=True):
        if id(p) in seen:  # a parameter that is listed twice is one
            continue
        seen.add(id(p))
        key = (row.rule, row.rank, row.side, row.shape, p.dtype)
        first.setdefault(key, Line(row.rule, row.rank, row.side, row.shape, 0, 0, 0, 0))
        sums = alike.setdefault(key, [0, 0, 0, 0])
        for i, x in enumerate((1, p.numel(), p.nbytes, row.state_bytes)):
            sums[i] += x
        frozen += p not in kept
    lines = [Line(line.rule, line.rank, line.side, line.shape, *alike[key])
             for key, line in first.items()]
    lines.sort(key=lambda line: -line.state_bytes)
    return Report(_title(optimizer), tuple(lines), tuple(_notes(optimizer, frozen)))


def _per(count: int, elements: int) -> str:
    return f"{count / elements:.2f}" if elements else ""


def _title(optimizer: MatrixOptimizer) -> str:
    """Class, and options that differ from its defaults; values of all groups that do."""
    changed = []
    for name, option in optimizer.table().items():
        values = dict.fromkeys(repr(g[name]) for g in optimizer.param_groups)
        other = [x for x in values if x != repr(option.default)]
        if other and name not in ("algorithm", "format", "skipped_steps"):
            changed.append(f"{name}={' or '.join(other)}")
    return f"{type(optimizer).__name__}({', '.join(changed)})"


def _notes(optimizer: MatrixOptimizer, frozen: int) -> list[str]:
    notes = []
    if frozen:
        notes.append(f"{frozen} frozen parameters have no state")
    if optimizer._gradients.in_backward:
        notes.append(f"{optimizer._gradients.name} is attached; its buffers are in the state")
    if optimizer.skipped_steps:
        notes.append(f"{optimizer.skipped_steps} steps were skipped for a NaN or Inf")
    return notes
