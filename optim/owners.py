"""Whole matrices among ranks: each is gathered on one rank, its owner, and scattered again.

In rounds, whose gathers all begin at once: while an owner computes one round, the matrices of the
next arrive and the results of the last are sent back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.fakes import truth
from .sharding import Rows, bytes_of

__all__ = ["by_owner", "exchanged"]

#: For each rank the numbers of the matrices that it owns.
Owned = list[list[int]]

# With two, half of the communication overlaps with work; more would make the stacks of equal shapes
# smaller.
_ROUNDS = 2


def by_owner(costs: Sequence[int], ranks: int) -> list[Owned]:
    """Share work out evenly: for each round, the matrices of each rank.

    Greedy: the costliest first, each to the rank with the least work. The busiest rank then has at
    most 4/3 of what it has in the best division (Graham, "Bounds on multiprocessing timing
    anomalies", 1969).

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
    """Apply a function of whole matrices to matrices that are sharded by rows.

    Args:
        parts: this rank's rows of each matrix.
        rows: which rows they are; the same ranks for all matrices.
        compute: (numbers of some matrices, these matrices whole) to results of their shapes.

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
        except Exception as error:  # raised later: the other ranks wait for the exchange
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
    if truth(failed, False):
        raise RuntimeError("the function of a whole matrix failed on another rank, which says why")
    return out


class _Round:
    """One round: matrices are sent to their owners, and results back.

    Two buffers serve both directions: this rank's rows ordered by owner, and all rows of the
    matrices that it owns ordered by rank. Nothing is allocated in between, so an owner that has
    failed, e.g. out of memory, can still send something back.
    """

    def __init__(self, owned: Owned, parts: Sequence[Tensor], rows: Sequence[Rows]) -> None:
        """Begin to send each owner its rows."""
        first = rows[0]
        ranks, device = range(len(first.counts)), parts[0].device
        self.owned, self.parts, self.cuts, self.group = owned, parts, rows, first.group
        #: The matrices that this rank owns.
        self.numbers = owned[first.rank]
        # Bytes of each piece that is sent, by owner and matrix, and received, by rank and matrix.
        self.sizes = [[parts[i].numel() * parts[i].element_size() for i in each] for each in owned]
        self.others = [[rows[i].counts[j] * parts[i].shape[1] * parts[i].element_size()
                        for i in self.numbers] for j in ranks]
        self.rows = torch.cat([torch.empty(0, dtype=torch.uint8, device=device),
                               *(bytes_of(parts[i]) for each in owned for i in each)])
        self.all = torch.empty(sum(map(sum, self.others)), dtype=torch.uint8, device=device)
        self._send(self.rows, self.sizes, self.all, self.others)

    def _send(self, source: Tensor, sizes: list[list[int]], target: Tensor,
              others: list[list[int]]) -> None:
        self.work: Any = torch.distributed.all_to_all_single(
            target, source, [*map(sum, others)], [*map(sum, sizes)], group=self.group,
            async_op=True)

    def arrive(self) -> None:
        """Wait for the last exchange."""
        self.work.wait()

    def whole(self) -> list[Tensor]:
        """The matrices that this rank owns."""
        return [torch.cat([_typed(piece, self.parts[i]) for piece in pieces])
                for i, pieces in zip(self.numbers, self._pieces(), strict=True)]

    def put(self, results: Sequence[Tensor]) -> None:
        """Write results over the matrices that this rank owns."""
        for i, x, pieces in zip(self.numbers, results, self._pieces(), strict=True):
            x = x.to(self.parts[i].dtype)
            for part, piece in zip(x.split([len(_typed(piece, self.parts[i])) for piece in pieces]),
                                   pieces, strict=True):
                piece.copy_(bytes_of(part))

    def give_back(self) -> None:
        """Begin to send each rank its rows of the results."""
        self._send(self.all, self.others, self.rows, self.sizes)

    def mine(self) -> Iterator[tuple[int, Tensor]]:
        """Numbers of matrices and this rank's rows of their results, once they have arrived."""
        numbers = [i for each in self.owned for i in each]
        pieces = self.rows.split([size for each in self.sizes for size in each])
        for i, piece in zip(numbers, pieces, strict=True):
            yield i, _typed(piece, self.parts[i])

    def _pieces(self) -> list[list[Tensor]]:
        """The bytes of each matrix that this rank owns, one piece per rank, from top to bottom."""
        flat = self.all.split([size for each in self.others for size in each])
        count = len(self.numbers)
        return [self.cuts[i].sorted(flat[k::count]) for k, i in enumerate(self.numbers)]


def _typed(piece: Tensor, x: Tensor) -> Tensor:
    """Bytes as rows of x's matrix, in its dtype; a copy where they are not aligned to it."""
    if piece.storage_offset() % x.element_size():
        piece = piece.clone()
    return piece.view(x.dtype).view(-1, x.shape[1])
