"""Whole matrices among ranks: each is put together on one, its owner, and taken apart again.

That is done in rounds, all of which are sent for at once: while an owner computes, what it computes
next is on its way to it, and what it has computed on its way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .sharding import Rows

__all__ = ["by_owner", "exchanged"]

#: Matrices by number: those that each rank owns.
Owned = list[list[int]]
#: Waits for a message and gives what came from each rank.
Arriving = Callable[[], list[list[Tensor]]]

# Enough for half of what is sent to be sent beside other work; more would cut stacks of equal
# shapes into smaller ones.
_ROUNDS = 2


def by_owner(costs: Sequence[int], ranks: int) -> list[Owned]:
    """Share work out evenly: for each round, the matrices of each rank.

    The costliest come first, each to the rank that has least to do. So no rank has more than 4/3 of
    what the best division gives the busiest (Graham, "Bounds on multiprocessing timing anomalies",
    1969).

    Args:
        costs: of each matrix.
        ranks: how many there are.
    """
    owned: Owned = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = load.index(min(load))
        owned[least].append(i)
        load[least] += costs[i]
    rounds = [[[i for place, i in enumerate(mine) if place * _ROUNDS // len(mine) == number]
               for mine in owned] for number in range(_ROUNDS)]
    return [each for each in rounds if any(each)]


def exchanged(parts: Sequence[Tensor], rows: Sequence[Rows],
              compute: Callable[[list[int], list[Tensor]], list[Tensor]]) -> list[Tensor]:
    """A function of whole matrices, of which each rank has rows and gets rows.

    Args:
        parts: this rank's rows of each matrix.
        rows: which they are, all among the same ranks.
        compute: numbers of some matrices and those whole, to results of their shapes.

    Returns:
        This rank's rows of each result.

    Raises:
        Exception: what ``compute`` raises.
        RuntimeError: it did so on another rank.
    """
    rank, ranks, device = rows[0].rank, len(rows[0].counts), parts[0].device
    shapes = [(cut.total, x.shape[1]) for x, cut in zip(parts, rows, strict=True)]
    rounds = by_owner([m * n * min(m, n) for m, n in shapes], ranks)

    def gather(owned: Owned) -> Arriving:
        """Begin to send each owner its rows."""
        return _send([[parts[i] for i in each] for each in owned],
                     [[_like(parts[i], rows[i].counts[j]) for i in owned[rank]]
                      for j in range(ranks)], rows[0], device)

    def scatter(owned: Owned, results: Sequence[Tensor]) -> Arriving:
        """Begin to send everyone their rows of the results."""
        cut = [x.to(parts[i].dtype).split(rows[i].counts)
               for i, x in zip(owned[rank], results, strict=True)]
        return _send([[pieces[j] for pieces in cut] for j in range(ranks)],
                     [[parts[i] for i in each] for each in owned], rows[0], device)

    gathers = [gather(owned) for owned in rounds]
    scatters: list[Arriving] = []
    failure: Exception | None = None
    for owned in rounds:
        whole = [torch.cat(pieces) for pieces in zip(*gathers.pop(0)(), strict=True)]
        try:
            results = compute(owned[rank], whole) if failure is None else whole
        except Exception as error:  # the other ranks wait for an answer
            failure, results = error, whole
        scatters.append(scatter(owned, results))
    failed = rows[0].max(torch.tensor([int(failure is not None)], device=device))
    out = list(parts)
    for owned, arriving in zip(rounds, scatters, strict=True):
        for each, pieces in zip(owned, arriving(), strict=True):
            for i, piece in zip(each, pieces, strict=True):
                out[i] = piece
    if failure is not None:
        raise failure
    if int(failed):
        raise RuntimeError("the function of a whole matrix failed on another rank, which says why")
    return out


def _like(x: Tensor, count: int) -> Tensor:
    """Shape and dtype of ``count`` rows of x's matrix, without bytes."""
    return torch.empty((count, x.shape[1]), dtype=x.dtype, device="meta")


def _send(sent: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]], rows: Rows,
          device: torch.device) -> Arriving:
    """Begin to send tensors to each rank, and to get from each such as are expected."""
    packed = [torch.cat([torch.empty(0, dtype=torch.uint8, device=device),
                         *(x.contiguous().view(-1).view(torch.uint8) for x in each)])
              for each in sent]
    sizes = [[x.numel() * x.element_size() for x in each] for each in expected]
    totals = [*map(sum, sizes)]
    got = torch.empty(sum(totals), dtype=torch.uint8, device=device)
    leaving = [torch.cat(packed)]  # until all of it has left
    work = torch.distributed.all_to_all_single(got, leaving[0], totals, [*map(len, packed)],
                                               group=rows.group, async_op=True)

    def arriving() -> list[list[Tensor]]:
        work.wait()
        leaving.clear()
        return [[_typed(piece, x) for piece, x in zip(bytes_.split(size), each, strict=True)]
                for bytes_, size, each in zip(got.split(totals), sizes, expected, strict=True)]

    return arriving


def _typed(piece: Tensor, x: Tensor) -> Tensor:
    """Bytes as a tensor of x's dtype and shape; a copy where they do not begin at an element."""
    if piece.storage_offset() % x.element_size():
        piece = piece.clone()
    return piece.view(x.dtype).view(x.shape)
