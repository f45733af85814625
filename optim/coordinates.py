"""Bases that are columns of a fixed one, known by their numbers: nothing is multiplied by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Coordinates", "Shift", "chosen", "put", "shift"]


def _taken(x: Tensor, place: Tensor, dim: int) -> Tensor:
    """Rows (dim -2) or columns (-1) of x, of which each matrix of a batch may have its own."""
    if place.ndim == 1:
        return x.index_select(dim, place)
    return x.take_along_dim(place.unsqueeze(-3 - dim), dim)


@dataclass(frozen=True)
class Shift:
    """A change between two choices of columns of one orthonormal basis.

    The rotation is a partial permutation: moments are copied to the column's new place, and a
    column that was not chosen before starts at zero.

    Args:
        source: (..., r), place of each new column among the old ones, -1 if it was not there.
        left: whether the basis is a left one.
    """

    source: Tensor
    left: bool

    def __call__(self, x: Tensor, power: int) -> Tensor:
        dim, other = (-2, -1) if self.left else (-1, -2)
        taken = _taken(x, self.source.clamp(min=0), dim)
        return taken.masked_fill_((self.source < 0).unsqueeze(other), 0.0)


def shift(old: Tensor, new: Tensor, left: bool) -> Shift:
    """From old to new columns, given by their indices (..., r).

    Both lists ascend, so a column is found by bisection.
    """
    place = torch.searchsorted(old, new).clamp_max_(old.shape[-1] - 1)
    return Shift(torch.where(old.gather(-1, place) == new, place, -1), left)


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Columns of the identity as a basis (..., n, r).

    Args:
        index: (..., r) int64, which ones, ascending.
        length: n, or how many of its rows there are here.
        cut: whether they are only some rows, so that an index may lie outside of them.
    """

    index: Tensor
    length: int
    cut: bool = False

    @property
    def shape(self) -> torch.Size:
        """That of the matrix."""
        *batch, r = self.index.shape
        return torch.Size((*batch, self.length, r))

    def __getitem__(self, rows: slice) -> Coordinates:
        """Some rows of it alone."""
        start, stop, _ = rows.indices(self.length)
        return Coordinates(self.index - start, stop - start, cut=True)

    def to(self, dtype: torch.dtype) -> Coordinates:
        """Itself: zeros and ones are those of any dtype."""
        return self

    def matrix(self, like: Tensor) -> Tensor:
        """It as a matrix of like's dtype."""
        numbers = torch.arange(self.length, device=self.index.device).unsqueeze(-1)
        return (self.index.unsqueeze(-2) == numbers).to(like)

    def down(self, g: Tensor, dim: int) -> Tensor:
        """The chosen rows (dim -2) or columns (-1) of G; zeros for those that are elsewhere."""
        if not self.cut:
            return _taken(g, self.index, dim)
        if not self.length:
            shape = [*g.shape]
            shape[dim] = self.index.shape[-1]
            return g.new_zeros(shape)
        place = self.places()
        return _taken(g, place.clamp(max=self.length - 1), dim).masked_fill_(
            (place == self.length).unsqueeze(-3 - dim), 0.0)

    def places(self) -> Tensor:
        """Where a matrix of ``length`` rows has them; behind its last row if they are elsewhere."""
        if not self.cut:
            return self.index
        inside = (self.index >= 0) & (self.index < self.length)
        return torch.where(inside, self.index, self.length)


def chosen(basis: object) -> Coordinates | None:
    """The basis, if it is coordinates in a tensor's place."""
    return basis if isinstance(basis, Coordinates) else None


def put(d: Tensor, n: Tensor, left: Coordinates | None, right: Coordinates | None) -> None:
    """N into the chosen rows and columns of D, in place.

    Args:
        d: (..., m, n), contiguous; with a row more, for what is elsewhere, if ``left`` is cut.
        n: what to put there, of D's dtype.
        left: None for all rows.
        right: None for all columns.
    """
    if left is not None and right is not None:
        number = left.places().unsqueeze(-1) * d.shape[-1] + right.places().unsqueeze(-2)
        d.flatten(-2).scatter_(-1, number.flatten(-2), n.flatten(-2))
        return
    for basis, dim in ((left, -2), (right, -1)):
        if basis is not None and basis.index.ndim == 1:
            d.index_copy_(dim, basis.places(), n)
        elif basis is not None:
            d.scatter_(dim, basis.places().unsqueeze(-3 - dim).expand_as(n), n)
