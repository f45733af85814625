"""Whole-matrix work: updates that wait for a function of a whole matrix, answered in batches.

An update that needs one (a polar factor, say) is a generator: it yields a :class:`Whole`, and is
sent the results. The loop runs several updates to that point, stacks what they ask for, same
shapes and functions together, computes each stack once and resumes them. A stack of one is the
ordinary case. Of a sharded matrix an update has some rows, and asks with those: each matrix is
gathered on one rank, so that the work is spread evenly, and the rows of the result come back.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .sharding import Rows

__all__ = ["Function", "Waiting", "Whole", "answered", "requested"]

T = TypeVar("T")


class Function(Protocol):
    """Of each matrix of (b, m, n); hashable and equal by value."""

    def __call__(self, a: Tensor) -> Tensor: ...


class Whole(NamedTuple):
    """A request: ``function`` of each matrix.

    Args:
        matrices: (..., m, n) each; shapes may differ.
        function: from (b, m, n) to (b, m, n), matrix by matrix; equal functions are called once.
        rows: which rows of (m, n) matrices these are, if not all.
    """

    matrices: tuple[Tensor, ...]
    function: Function
    rows: Rows | None = None


#: An update in progress: yields requests, is sent their results, returns T.
Waiting = Generator[Whole, tuple[Tensor, ...], T]


def requested(update: Waiting[T], rows: Rows | None) -> Waiting[T]:
    """The same update, whose requests tell which rows theirs are."""
    try:
        request = next(update)
        while True:
            request = update.send((yield request._replace(rows=rows)))
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
    apart: dict[Any, list[int]] = {}
    for i, (_, _, rows) in requests.items():
        apart.setdefault(rows and rows.group, []).append(i)
    for group, members in apart.items():
        asked = [(x, requests[i].function) for i in members for x in requests[i].matrices]
        if group is None:
            outs = _computed(asked)
        else:
            rows_ = [requests[i].rows for i in members for _ in requests[i].matrices]
            outs = _exchanged(asked, [x for x in rows_ if x is not None])
        given = iter(outs)
        for i in members:
            results[i] = [next(given) for _ in requests[i].matrices]
    return results


def _computed(asked: Sequence[tuple[Tensor, Function]]) -> list[Tensor]:
    """Functions of matrices, same shapes and functions in one call."""
    stacks: dict[Hashable, list[int]] = {}
    results = [x for x, _ in asked]
    for i, (x, function) in enumerate(asked):
        stacks.setdefault((x.shape[-2:], x.dtype, x.device, function), []).append(i)
    for places in stacks.values():
        parts, function = [results[i] for i in places], asked[places[0]][1]
        if len(parts) == 1:
            outs: Sequence[Tensor] = [function(parts[0])]
        else:
            stack = torch.cat([x.reshape(-1, *x.shape[-2:]) for x in parts])
            outs = function(stack).split([x.shape[:-2].numel() for x in parts])
        for i, x, out in zip(places, parts, outs, strict=True):
            results[i] = out.reshape(x.shape)
    return results


def _exchanged(asked: Sequence[tuple[Tensor, Function]], rows: Sequence[Rows]) -> list[Tensor]:
    """The same of matrices that are cut by rows among the ranks of one group.

    Each has an owner, which gets all its rows, computes and sends back those of each rank: two
    exchanges for all matrices. The owner is whoever has least to do, by m n min(m, n).
    """
    rank, ranks = rows[0].rank, len(rows[0].counts)
    owners, load = [], [0] * ranks
    for (x, _), cut in zip(asked, rows, strict=True):
        owners.append(load.index(min(load)))
        load[owners[-1]] += cut.total * x.shape[1] * min(cut.total, x.shape[1])
    mine = [i for i, owner in enumerate(owners) if owner == rank]
    # Order of every message: by matrix.
    sent: list[list[Tensor]] = [[] for _ in range(ranks)]
    for (x, _), owner in zip(asked, owners, strict=True):
        sent[owner].append(x)
    shapes = [[(rows[i].counts[j], asked[i][0].shape[1]) for i in mine] for j in range(ranks)]
    kinds = [asked[i][0].dtype for i in mine]
    device = asked[0][0].device
    parts = _all_to_all(sent, shapes, [kinds] * ranks, rows[0], device)
    failure: Exception | None = None
    try:
        outs = _computed([(torch.cat([part[k] for part in parts]), asked[i][1])
                          for k, i in enumerate(mine)])
    except Exception as error:  # the other ranks wait for an answer
        failure, outs = error, []
    failed = rows[0].max(torch.tensor([int(failure is not None)], device=device))
    if failure is not None:
        raise failure
    if int(failed):
        raise RuntimeError("the function of a whole matrix failed on another rank, which says why")
    back = [[out.to(kind).split(rows[i].counts)[j]
             for out, kind, i in zip(outs, kinds, mine, strict=True)] for j in range(ranks)]
    theirs = [[i for i, owner in enumerate(owners) if owner == j] for j in range(ranks)]
    pieces = _all_to_all(back, [[tuple(asked[i][0].shape) for i in each] for each in theirs],
                         [[asked[i][0].dtype for i in each] for each in theirs], rows[0], device)
    results = [x for x, _ in asked]
    for each, piece in zip(theirs, pieces, strict=True):
        for i, x in zip(each, piece, strict=True):
            results[i] = x
    return results


def _all_to_all(sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]],
                dtypes: Sequence[Sequence[torch.dtype]], rows: Rows, device: torch.device
                ) -> list[list[Tensor]]:
    """Send tensors to each rank, and get from each some of the given shapes and dtypes."""
    packed = [torch.cat([torch.empty(0, dtype=torch.uint8, device=device),
                         *(x.contiguous().view(-1).view(torch.uint8) for x in each)])
              for each in sent]
    sizes = [[math.prod(shape) * kind.itemsize for shape, kind in zip(*both, strict=True)]
             for both in zip(shapes, dtypes, strict=True)]
    got = torch.empty(sum(map(sum, sizes)), dtype=torch.uint8, device=device)
    torch.distributed.all_to_all_single(got, torch.cat(packed), [*map(sum, sizes)],
                                        [*map(len, packed)], group=rows.group)
    out: list[list[Tensor]] = []
    for each, bytes_ in zip(range(len(sizes)), got.split([*map(sum, sizes)]), strict=True):
        pieces = bytes_.split(sizes[each])
        # A copy where the bytes do not begin at a multiple of the element's size.
        out.append([piece.clone().view(kind).view(shape) for piece, kind, shape in
                    zip(pieces, dtypes[each], shapes[each], strict=True)])
    return out
