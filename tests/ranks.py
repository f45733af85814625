"""What tests of several ranks ask of what each of them returned (:func:`tests.jobs.outcome`)."""

from __future__ import annotations

from typing import Any

from lissom.bench.sharding import rank_bytes

from .helpers import assert_same


def assert_close(one: dict[str, Any], outs: list[dict[str, Any]], exact: bool,
                 tolerance: float = 1e-6) -> None:
    """Weights equal on all ranks, and those of one process: exactly, or to 1e-6 of the largest."""
    for out in outs[1:]:
        assert_same(outs[0]["weights"], out["weights"], "other rank")
    for i, (a, b) in enumerate(zip(one["weights"], outs[0]["weights"], strict=True)):
        if exact:
            assert_same(a, b, f"weight {i}")
        else:
            assert (a - b).abs().max() <= tolerance * a.abs().max(), i
    for a, b in zip(one["state"], outs[0]["state"], strict=True):
        assert a.keys() == b.keys()
        assert int(a.get("step", 0)) == int(b.get("step", 0))


def assert_bytes(outs: list[dict[str, Any]], ranks: int) -> None:
    """What each rank holds is what the memory profiler's model says, to the byte."""
    for i, state in enumerate(outs[0]["state"]):
        shape = tuple(outs[0]["weights"][i].shape)
        slots = outs[0]["slots"][i]
        expected = rank_bytes(shape, slots, ranks)
        held = [sum(out["bytes"][i].values()) for out in outs]
        assert held == expected, (i, shape, list(state))
