"""What each rank holds of a parameter under FSDP2: a model, in one place.

``fully_shard`` cuts a parameter along dimension 0 into the chunks of ``torch.chunk``: ranks get
ceil(rows / ranks) rows each until none are left, so the last ones may get fewer, or nothing. Slots
of the state follow by one rule, :func:`is_sharded`:

================================================  ================================================
a slot of rows whose first dimension is that of   cut alike: moments that have the parameter's
the parameter                                     rows, buffers of R alike, error feedback, split
                                                  masters, a left basis (m, r)
another matrix of 4096 elements or more           cut along its own rows: a right basis (n, r),
                                                  moments (r, n) whose rows are the rank
every other slot                                  the same on every rank: indices of cosine columns,
                                                  limiters, candidates, counters, what is small
================================================  ================================================

Codes and scales of a quantized slot are slots of their own; as blocks restart at each row both
have its rows. A vector has no rows that blocks could restart at: quantized moments that are
vectors are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..optim.codec import Slot

__all__ = ["chunk_rows", "is_sharded", "rank_bytes"]

# The parameter and what has its shape, which are no slots of the state.
_WHOLE = ("weight", "gradient")


def chunk_rows(rows: int, ranks: int) -> list[int]:
    """Rows of each rank: those of ``torch.chunk``, then zeros."""
    most = -(-rows // ranks)
    return [max(0, min(most, rows - i * most)) for i in range(ranks)]


def is_sharded(shape: Sequence[int], name: str, slots: Mapping[str, Slot]) -> bool:
    """Whether a slot of a parameter of this (full) shape is cut along its dimension 0."""
    return slots[name].rows or slots[name].spread or (name in _WHOLE and len(shape) > 0)


def rank_bytes(shape: Sequence[int], slots: Mapping[str, Slot], ranks: int) -> list[int]:
    """Bytes of a parameter's slots on each rank.

    Args:
        shape: full shape of the parameter.
        slots: tensors that are kept for it, in full: ``optimizer.stored_slots(p, group)``. The
            parameter itself is a slot ``"weight"``, its gradient ``"gradient"``.
        ranks: how many it is sharded over, >= 1.

    Returns:
        One number for each rank; the first is the largest.
    """
    held = [0] * ranks
    for name, slot in slots.items():
        if is_sharded(shape, name, slots):
            rows = chunk_rows(slot.shape[0], ranks)
            row = slot.nbytes // slot.shape[0] if slot.shape[0] else 0
            held = [h + row * count for h, count in zip(held, rows, strict=True)]
        else:
            held = [h + slot.nbytes for h in held]
    return held
