"""Options: what each may be, and the one function that checks a group of them.

An :class:`Option` couples a default with a rule. Optimizer classes list theirs in a table, and
:func:`checked` is called wherever options enter: the constructor, ``add_param_group``, loading.
Values leave it as plain ``str``, ``int``, ``float``, ``bool``, ``tuple`` or ``None``, which is
what ``torch.load(weights_only=True)`` can read back.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch

__all__ = ["Option", "boolean", "checked", "choice", "either", "integer", "nearest", "optional",
           "real", "several", "unknown"]


@dataclass(frozen=True)
class Option:
    """One option: its default, and how a received value becomes a stored one.

    Args:
        default: the value where neither the group nor the constructor gives one.
        rule: what is allowed, in the words that an error message shows.
        convert: returns the plain value to store; raises ``TypeError`` for a value of the wrong
            kind and ``ValueError`` for one out of range (their texts are not shown).
        kind: type of a value that is not None, for command lines.
        number: the value is a real number or a tuple of them. Schedules may change it at any step,
            and the slots do not depend on it.
    """

    default: Any
    rule: str
    convert: Callable[[Any], Any]
    kind: type
    number: bool = False

    def check(self, name: str, value: Any, where: str) -> Any:
        """The plain value, or an error that gives place, option, value and rule."""
        try:
            return self.convert(value)
        except TypeError:
            raise TypeError(f"{where}: {name}={value!r}, but it must be {self.rule}") from None
        except (ValueError, OverflowError):
            raise ValueError(f"{where}: {name}={value!r}, but it must be {self.rule}") from None


def real(default: float | None, minimum: float = 0.0, maximum: float = math.inf, *,
         above: bool = False, below: bool = False) -> Option:
    """A finite number from ``minimum`` to ``maximum``; a one-element tensor becomes one.

    Args:
        default: as of :class:`Option`.
        minimum: the least that is allowed; ``-math.inf`` is no bound.
        maximum: the most that is allowed; ``math.inf`` is no bound.
        above: the minimum itself is not allowed.
        below: the maximum itself is not allowed.
    """

    def convert(value: Any) -> float:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError
        number = float(value)
        if (not math.isfinite(number) or not minimum <= number <= maximum
                or (above and number == minimum) or (below and number == maximum)):
            raise ValueError
        return number

    bounds = [f"{sign} {bound:g}" for sign, bound in
              ((">" if above else ">=", minimum), ("<" if below else "<=", maximum))
              if math.isfinite(bound)]
    return Option(default, f"a finite number {' and '.join(bounds)}".rstrip(), convert, float,
                  number=True)


def integer(default: int | None, minimum: int, maximum: int | None = None) -> Option:
    """An int from ``minimum`` to ``maximum``; ``True`` and ``2.0`` are not ints."""

    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError
        number = int(value)
        if number < minimum or (maximum is not None and number > maximum):
            raise ValueError
        return number

    end = "" if maximum is None else f" and <= {maximum}"
    return Option(default, f"an int >= {minimum}{end}", convert, int)


def choice(default: Any, *allowed: Any) -> Option:
    """One of a few strings or ints."""
    kinds = tuple({type(a) for a in allowed})

    def convert(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError
        if value not in allowed:
            raise ValueError
        return value

    return Option(default, "one of " + ", ".join(repr(a) for a in allowed), convert, kinds[0])


def boolean(default: bool) -> Option:
    """True or False, and not 1 or 0."""

    def convert(value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value

    return Option(default, "True or False", convert, bool)


def several(default: tuple[Any, ...] | None, one: Option, count: int | None = None) -> Option:
    """A tuple, list or other sequence of ``count`` values (None: one or more), each as ``one``.

    Sets are refused because they have no order, dictionaries because only their keys would be used.
    """

    def convert(value: Any) -> tuple[Any, ...]:
        value = value.tolist() if hasattr(value, "tolist") else value  # of numpy and torch
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise TypeError
        values = tuple(one.convert(v) for v in value)
        if not values or count not in (None, len(values)):
            raise ValueError
        return values

    size = "one or more" if count is None else str(count)
    return Option(default, f"a tuple of {size} values, each {one.rule}", convert, tuple,
                  one.number)


def either(first: Option, second: Option) -> Option:
    """What one of two options allows; the first one's default."""

    def convert(value: Any) -> Any:
        try:
            return first.convert(value)
        except (TypeError, ValueError):
            return second.convert(value)

    return Option(first.default, f"{first.rule}, or {second.rule}", convert, second.kind)


def optional(option: Option) -> Option:
    """The same option with None allowed."""

    def convert(value: Any) -> Any:
        return None if value is None else option.convert(value)

    return replace(option, rule=f"None or {option.rule}", convert=convert)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as `` (did you mean 'rank'?)``, or nothing when no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(name: object, value: Any, known: Iterable[str], where: str) -> str:
    """The message for an option that there is not."""
    names = sorted(known)
    return (f"{where}: unknown option {name!r}={value!r}{nearest(str(name), names)}; known are "
            f"{', '.join(names)}")


def checked(values: Mapping[str, Any], table: Mapping[str, Option], where: str) -> dict[str, Any]:
    """The options of ``values`` as plain values; unknown names and bad values raise.

    Raises:
        TypeError: a value of the wrong kind.
        ValueError: a value out of range, or a name that is not in ``table``.
    """
    for name in values:
        if not isinstance(name, str) or name not in table:
            raise ValueError(unknown(name, values[name], table, where))
    return {name: table[name].check(name, value, where) for name, value in values.items()}
