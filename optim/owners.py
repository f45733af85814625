"""Whole matrices among ranks: each is put together on one, its owner, and taken apart again.

That is done in rounds, all of which are sent for at once: while an owner computes, what it computes
next is on its way to it, and what it has computed on its way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .sharding import Rows, bytes_of

__all__ = ["by_owner", "exchanged"]

#: Matrices by number: those that each rank owns.
Owned = list[list[int]]

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
    costs = [cut.total * x.shape[1] * min(cut.total, x.shape[1])
             for x, cut in zip(parts, rows, strict=True)]
    failed = torch.zeros(1, dtype=torch.int64, device=parts[0].device)
    rounds = [_Round(owned, parts, rows) for owned in by_owner(costs, len(rows[0].counts))]
    failure: Exception | None = None
    for each in rounds:
        each.arrive()
        try:
            if failure is None:
                each.put(compute(each.numbers, each.whole()))
        except Exception as error:  # the other ranks wait for an answer
            failure = error
        each.give_back()
    failed += failure is not None
    failed = rows[0].max(failed)
    out = list(parts)
    for each in rounds:
        each.arrive()
        for i, x in each.mine():
            out[i] = x
    if failure is not None:
        raise failure
    if int(failed):
        raise RuntimeError("the function of a whole matrix failed on another rank, which says why")
    return out


class _Round:
    """Matrices on their way to their owners, and results on the same way back.

    Two buffers hold both: of this rank's rows by owner, and of all rows of the matrices that it
    owns by rank. So nothing is allocated between the two ways, and an owner that has failed, for
    want of memory perhaps, can give back what it got.
    """

    def __init__(self, owned: Owned, parts: Sequence[Tensor], rows: Sequence[Rows]) -> None:
        """Begin to send each owner its rows."""
        first = rows[0]
        ranks, device = range(len(first.counts)), parts[0].device
        self.owned, self.parts, self.group = owned, parts, first.group
        #: The matrices that this rank owns.
        self.numbers = owned[first.rank]
        # Bytes of each piece: by owner and matrix, and by rank and matrix.
        self.sizes = [[parts[i].numel() * parts[i].element_size() for i in each] for each in owned]
        self.others = [[rows[i].counts[j] * parts[i].shape[1] * parts[i].element_size()
                        for i in self.numbers] for j in ranks]
        self.rows = torch.cat([torch.empty(0, dtype=torch.uint8, device=device),
                               *(bytes_of(parts[i]) for each in owned for i in each)])
        self.all = torch.empty(sum(map(sum, self.others)), dtype=torch.uint8, device=device)
        self._send(self.rows, self.sizes, self.all, self.others)

    def _send(self, source: Tensor, sizes: list[list[int]], target: Tensor,
              others: list[list[int]]) -> None:
        self.work = torch.distributed.all_to_all_single(
            target, source, [*map(sum, others)], [*map(sum, sizes)], group=self.group,
            async_op=True)

    def arrive(self) -> None:
        """Wait for what was sent last."""
        self.work.wait()

    def whole(self) -> list[Tensor]:
        """The matrices that this rank owns."""
        return [torch.cat([_typed(piece, self.parts[i]) for piece in pieces])
                for i, pieces in zip(self.numbers, self._pieces(), strict=True)]

    def put(self, results: Sequence[Tensor]) -> None:
        """Results in the place of the matrices that this rank owns."""
        for i, x, pieces in zip(self.numbers, results, self._pieces(), strict=True):
            x = x.to(self.parts[i].dtype)
            for part, piece in zip(x.split([len(_typed(piece, self.parts[i])) for piece in pieces]),
                                   pieces, strict=True):
                piece.copy_(bytes_of(part))

    def give_back(self) -> None:
        """Begin to send everyone their rows of what is in those places."""
        self._send(self.all, self.others, self.rows, self.sizes)

    def mine(self) -> Iterator[tuple[int, Tensor]]:
        """Numbers of matrices, and this rank's rows of each when they have come back."""
        numbers = [i for each in self.owned for i in each]
        pieces = self.rows.split([size for each in self.sizes for size in each])
        for i, piece in zip(numbers, pieces, strict=True):
            yield i, _typed(piece, self.parts[i])

    def _pieces(self) -> list[tuple[Tensor, ...]]:
        """The bytes of each matrix that this rank owns, in the pieces in which they came."""
        flat = self.all.split([size for each in self.others for size in each])
        count = len(self.numbers)
        return [flat[k::count] for k in range(count)]


def _typed(piece: Tensor, x: Tensor) -> Tensor:
    """Bytes as rows of x's matrix; a copy where they do not begin at an element."""
    if piece.storage_offset() % x.element_size():
        piece = piece.clone()
    return piece.view(x.dtype).view(-1, x.shape[1])
