"""Whole-matrix work: updates that wait for a function of a whole matrix, answered in batches.

An update that needs one (e.g. a polar factor) is a generator: it yields a :class:`Whole`, and is
sent the results. The loop runs several updates to that point, stacks requests of the same shape
and function, computes each stack once and resumes the updates. A stack of one is the ordinary
case. A request with some rows of a sharded matrix is answered with the same rows of the result:
each matrix is gathered on one rank (:mod:`lissom.optim.owners`). One with a matrix that is whole on
each rank is answered on each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .owners import exchanged
from .sharding import Rows

__all__ = ["Waiting", "Whole", "answered", "requested"]

T = TypeVar("T")
_Function = Callable[[Tensor], Tensor]


class Whole(NamedTuple):
    """A request: ``function`` of each matrix.

    Args:
        matrices: (..., m, n) each; shapes may differ.
        function: from (b, m, n) to (b, m, n), matrix by matrix; hashable and comparable by value,
            so that equal functions are called once.
        rows: which rows of (m, n) matrices these are, if not all.
        whole: they are whole on each rank, also where an update works on some rows.
    """

    matrices: tuple[Tensor, ...]
    function: _Function
    rows: Rows | None = None
    whole: bool = False


#: An update in progress: yields requests, is sent their results, returns T.
Waiting = Generator[Whole, tuple[Tensor, ...], T]


def requested(update: Waiting[T], rows: Rows | None) -> Waiting[T]:
    """The same update, with ``rows`` added to its requests of matrices that are not whole."""
    try:
        request = next(update)
        while True:
            request = update.send((yield request if request.whole else
                                   request._replace(rows=rows)))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def answered(updates: Sequence[Waiting[None]]) -> Iterator[int]:
    """Run updates together; gives the position of each as it ends.

    An update that has written nothing before its last request has written nothing when a
    function fails.
    """
    requests: dict[int, Whole] = {}
    for i, update in enumerate(updates):
        try:
            requests[i] = next(update)
        except StopIteration:
            yield i
    while requests:
        results, asked = _results(requests), list(requests)
        requests = {}
        for i in asked:
            try:
                requests[i] = updates[i].send(tuple(results.pop(i)))
            except StopIteration:
                yield i


def _results(requests: dict[int, Whole]) -> dict[int, list[Tensor]]:
    """The results of every request."""
    results: dict[int, list[Tensor]] = {i: [] for i in requests}
    sharers: dict[Any, list[int]] = {}
    for i, request in requests.items():
        sharers.setdefault(request.rows and request.rows.group, []).append(i)
    for group, members in sharers.items():
        asked = [x for i in members for x in requests[i].matrices]
        functions = [requests[i].function for i in members for _ in requests[i].matrices]
        if group is None:
            outs = _computed(asked, functions)
        else:
            rows_ = [requests[i].rows for i in members for _ in requests[i].matrices]
            outs = exchanged(asked, [x for x in rows_ if x is not None],
                             functools.partial(_owned, functions))
        given = iter(outs)
        for i in members:
            results[i] = [next(given) for _ in requests[i].matrices]
    return results


def _owned(functions: Sequence[_Function], numbers: Sequence[int], matrices: Sequence[Tensor]
           ) -> list[Tensor]:
    """Apply the functions of some matrices, given by number, to these matrices."""
    return _computed(matrices, [functions[i] for i in numbers])


def _computed(matrices: Sequence[Tensor], functions: Sequence[_Function]) -> list[Tensor]:
    """Functions of matrices, same shapes and functions in one call."""
    stacks: dict[Hashable, list[int]] = {}
    results = list(matrices)
    for i, (x, function) in enumerate(zip(matrices, functions, strict=True)):
        stacks.setdefault((x.shape[-2:], x.dtype, x.device, function), []).append(i)
    for places in stacks.values():
        parts, function = [results[i] for i in places], functions[places[0]]
        if len(parts) == 1:
            outs: Sequence[Tensor] = [function(parts[0])]
        else:
            stack = torch.cat([x.reshape(-1, *x.shape[-2:]) for x in parts])
            outs = function(stack).split([x.shape[:-2].numel() for x in parts])
        for i, x, out in zip(places, parts, outs, strict=True):
            results[i] = out.reshape(x.shape)
    return results
