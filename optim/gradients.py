"""Where a step takes its gradients from: ``p.grad``, or what a backward pass has made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .apply import Update
from .codec import Slot, State

if TYPE_CHECKING:
    from .batches import Work
    from .sharding import Rows

__all__ = ["Gradients"]


class Gradients:
    """The ordinary way: a step takes ``p.grad`` and keeps nothing of it.

    The optimizer asks this wherever work in the backward pass would make a difference;
    :class:`lissom.optim.backward.InBackward` answers otherwise.
    """

    #: The function that changes the way, for messages.
    name: ClassVar[str] = ""
    #: Whether gradients are worked on in the backward pass.
    in_backward: ClassVar[bool] = False

    def follow(self) -> None:
        """Parameters may have come or gone."""

    def slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        """Slots beside the rule's own."""
        return {}

    def gradient(self, p: Tensor) -> Tensor | None:
        """What a step takes as p's gradient, or None."""
        return p.grad

    def rows(self, p: Tensor, rows: Rows | None) -> Rows | None:
        """The rows of a sharded p that its next update works on, where ``rows`` would do."""
        return rows

    def begin(self, closure: Any) -> bool:
        """Whether the step is to be taken; raises RuntimeError where it cannot."""
        return True

    def before(self, work: Sequence[Work]) -> None:
        """Called after the checks of a step, before its first write; a skipped step has no work."""

    def lifted(self, p: Tensor, s: State, o: Mapping[str, Any], t: int) -> Update | None:
        """The update of p, or None if it is to be made from its gradient."""
        return None

    def consumed(self, p: Tensor) -> None:
        """P has been updated."""

    def end(self) -> None:
        """The step is over."""

    def clear(self) -> None:
        """Forget gradients that wait."""

    def check_saved(self) -> None:
        """Raise RuntimeError if something that the state does not hold would be lost."""

    def loaded(self) -> None:
        """A state dict has been loaded."""
