"""Whole-matrix work: updates that wait for a function of a whole matrix, answered in batches.

An update that needs one (a polar factor, say) is a generator: it yields a :class:`Whole`, and is
sent the results. The loop runs several updates to that point, stacks what they ask for, same
shapes and functions together, computes each stack once and resumes them. A stack of one is the
ordinary case; a sharded matrix will be gathered here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["Function", "Waiting", "Whole", "answered"]

T = TypeVar("T")


class Function(Protocol):
    """Of each matrix of (b, m, n); hashable and equal by value."""

    def __call__(self, a: Tensor) -> Tensor: ...


class Whole(NamedTuple):
    """A request: ``function`` of each matrix.

    Args:
        matrices: (..., m, n) each; shapes may differ.
        function: from (b, m, n) to (b, m, n), matrix by matrix; equal functions are called once.
    """

    matrices: tuple[Tensor, ...]
    function: Function


#: An update in progress: yields requests, is sent their results, returns T.
Waiting = Generator[Whole, tuple[Tensor, ...], T]


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
    """The results of every request, same shapes and functions computed in one call."""
    stacks: dict[Hashable, list[tuple[int, int]]] = {}
    results: dict[int, list[Tensor]] = {}
    for i, (matrices, function) in requests.items():
        results[i] = [*matrices]
        for j, x in enumerate(matrices):
            key = (x.shape[-2:], x.dtype, x.device, function)
            stacks.setdefault(key, []).append((i, j))
    for places in stacks.values():
        parts = [results[i][j] for i, j in places]
        function = requests[places[0][0]].function
        if len(parts) == 1:
            outs: Sequence[Tensor] = [function(parts[0])]
        else:
            stack = torch.cat([x.reshape(-1, *x.shape[-2:]) for x in parts])
            outs = function(stack).split([x.shape[:-2].numel() for x in parts])
        for (i, j), x, out in zip(places, parts, outs, strict=True):
            results[i][j] = out.reshape(x.shape)
    return results
