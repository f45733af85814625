"""What a method says of itself: all that a class of this package is beside the common loop.

Names, here and in every method file (shapes of one matrix, in PyTorch's layout):

=======  =====================================================================================
p        parameter; as a matrix m x n: m = output features (rows), n = input features
g        its gradient G, of p's shape; read, never written
s        its state: a flat dict of tensors
o        its options: the parameter group
t        1-based count of this parameter's updates
r        rank
P, Q     bases of the left (m x r) and the right side (n x r); one of them, or both
R        the projected gradient P^T G Q: r x n, m x r or r x r; ``low`` in code
N        the inner rule's direction, of R's shape; ``direction``
M, V     first and second moment, of R's shape (of p's, where nothing is projected)
E        error feedback, of p's shape
u        the update before learning rate: p <- (1 - lr * weight_decay) p - lr * u
=======  =====================================================================================

A method says which parameters it takes (:meth:`Method.declines`), what it keeps for one
(:meth:`Method.slots`) and what its update is (:meth:`Method.update`); most need no more. All else
is in :mod:`lissom.optim.base`. Parameters that a method declines, or whose group says
``algorithm="adamw"``, get AdamW in the same loop.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from . import sharding
from .apply import Update
from .batches import Work
from .codec import Slot, State
from .common import BOOKKEEPING, COMMON
from .options import Option, choice
from .sharding import Rows
from .whole import Waiting

__all__ = ["Method"]


class Method:
    """A class's own rule: three methods to write, and hooks with defaults for special cases."""

    #: Name of the class's own rule, the default of the ``algorithm`` option.
    algorithm: ClassVar[str] = "adamw"
    #: Its options beside :data:`COMMON`.
    options: ClassVar[Mapping[str, Option]] = {}
    #: Other spellings of options, as other packages have them: {theirs: ours}.
    spellings: ClassVar[Mapping[str, str]] = {}
    #: Whether :meth:`update` yields requests, which are computed for several parameters together.
    waits: ClassVar[bool] = False
    #: Options that say what a slot holds: where one has changed, state begins anew.
    meaning: ClassVar[tuple[str, ...]] = ()
    #: What to do where no parameter gets the class's own rule, for a warning.
    remedy: ClassVar[str] = "Give it parameters of 2 or more dimensions."

    @classmethod
    def table(cls) -> dict[str, Option]:
        """Every option of a group, by name."""
        names = ("adamw",) if cls.algorithm == "adamw" else (cls.algorithm, "adamw")
        own = {"algorithm": choice(cls.algorithm, *names)}
        return COMMON | own | dict(cls.options) | BOOKKEEPING

    def uncapturable(self, o: Mapping[str, Any]) -> str | None:
        """Why a CUDA graph cannot hold a step, for a message; None if it can.

        Then the rule takes tensors for t and ``o["lr"]``, reads no number of the device, and its
        :class:`lissom.optim.apply.Update` has no ``keep``.
        """
        return None

    def unready(self, s: Mapping[str, Tensor]) -> str | None:
        """Why a CUDA graph cannot hold the next step of a parameter with this state, or None."""
        return None

    def declines(self, p: Tensor, o: Mapping[str, Any]) -> str | None:
        """Why this parameter gets AdamW, or None if the class's own rule takes it."""
        if self.algorithm == "adamw":
            return "AdamW is this class's rule"
        if p.ndim < 2:
            return f"{p.ndim}-d, not a matrix"
        return None if p.numel() else "empty"

    def slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        """State of the class's own rule for p, without ``step``."""
        raise AssertionError("a class that declines nothing must say what it keeps")

    def update(self, g: Tensor, s: State, o: Mapping[str, Any], t: int
               ) -> Update | Waiting[Update]:
        """Turn the gradient into the update.

        g is (m, n) or (b, m, n), or a :class:`lissom.kernels.apart.Apart` of several where the
        class has ``apart = True``. t is an int, or a 0-d tensor where the group is capturable. Do
        everything that can fail before the first write to s. A rule that needs a function of the
        whole matrix yields a request for it (:mod:`lissom.optim.whole`) before its first write.
        ``s["weight"]`` is p in the shape of g; read it, do not write to it.
        """
        raise AssertionError("a class that declines nothing must have an update")

    def check_state(self, p: Tensor, state: Mapping[str, Tensor], o: Mapping[str, Any], at: str
                    ) -> None:
        """Rules of a method about what its slots hold when they are loaded; raises ValueError."""

    def by_rows(self, p: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int) -> bool:
        """Whether each rank can make update t from its own rows of p and sums over all rows.

        If so, a sharded p is updated where its rows are: the rule takes sums over rows by
        :func:`lissom.optim.codec.row_sum`, the height of the matrix from
        :func:`lissom.optim.codec.whole_shape`, and what it yields is gathered on one rank, if it is
        not whole already. If not, every rank gathers the whole matrix.

        Args:
            p: the parameter, a DTensor that has rows.
            s: its state as it is kept.
            o: options of its group.
            t: 1-based count of the update.
        """
        return False

    def stacked(self, p: Tensor, o: Mapping[str, Any]) -> bool:
        """Whether p is a stack of matrices, which are updated each alone.

        Then a sharded p is updated where its matrices are, whatever :meth:`by_rows` says: g, state
        and ``s["weight"]`` are of some matrices, which :func:`lissom.optim.codec.stack_of` tells.
        A number of the state that all of them share must become the same on all ranks.
        """
        return p.ndim == 3 and len(self.matrix_shape(p, o)) == 3

    def while_waiting(self, p: Tensor, o: Mapping[str, Any], rows: Rows | None) -> int:
        """Elements that an update keeps while it waits for functions of whole matrices.

        Args:
            p: the parameter, of the own rule.
            o: options of its group.
            rows: which of its rows the update works on, if not all.

        Returns:
            A number that is equal on all ranks.
        """
        return sharding.share(p, rows)

    def together(self, p: Tensor, s: Mapping[str, Tensor], o: Mapping[str, Any], t: int,
                 rows: Rows | None) -> tuple[int, Hashable]:
        """How much memory p takes in a batched update on a GPU.

        Matrices of equal shape, options and count can share one launch: g, ``s["weight"]`` and the
        slots then are :class:`lissom.kernels.apart.Apart`. Return 0 to be updated alone. A low-rank
        subclass with methods of its own must say again that it can be batched (``apart = True``).

        Args:
            p: the parameter, of the own rule.
            s: its state as it is kept.
            o: options of its group.
            t: 1-based count of the update.
            rows: which of its rows the update works on, if not all.

        Returns:
            Elements of temporaries that this update keeps alive; and a key that all updates of one
            batch must share, beyond shape, options and count.
        """
        return 0, False

    def before_updates(self, work: list[Work]) -> list[str]:
        """Change parameters that act together, after all checks of a step, before its updates.

        Args:
            work: every parameter that is about to be updated; empty for a skipped step.

        Returns:
            Names of the parameters that it has moved.
        """
        return []

    def matrix_shape(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of p as the rule sees it: (m, n), or (b, m, n) for a batch of matrices.

        Convolutions are out x rest; with ``matricize="batch"`` the last two dimensions count.
        """
        if p.ndim == 2:
            return tuple(p.shape)
        if o.get("matricize") == "batch":
            return (math.prod(p.shape[:-2]), *p.shape[-2:])
        return (p.shape[0], math.prod(p.shape[1:]))

    def describe(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int | None, str, str]:
        """Rank, side and reason of a parameter of the own rule, for :meth:`plan`."""
        *batch, m, n = self.matrix_shape(p, o)
        size = f"{math.prod(batch)} x {m} x {n}" if batch else f"{m} x {n}"
        return None, "", f"{p.ndim}-d seen as {size}" if p.ndim > 2 else "matrix"

    def check_combination(self, o: Mapping[str, Any], params: list[Tensor], explicit: set[str],
                          where: str) -> None:
        """Rules about several options or the parameters of a group; raises ValueError.

        Args:
            o: all options of the group, and ``param_names`` where there are any.
            params: its parameters.
            explicit: options that the group itself states; none where it comes from a saved state.
            where: beginning of a message.
        """
