"""What a GPU would not forgive, watched for in Triton's interpreter.

On a GPU the programs of a launch run at once and in any order, a program's threads do too, and what
is beyond a tensor's end belongs to someone else. The interpreter, which runs them one by one, hides
all of that. Here every address that a kernel reads or writes is looked at, and a launch is refused
in which

- an access is outside the tensors that were given, or not aligned to its size,
- two programs write to one place, or one reads what another writes,
- a program reads what it has written, or writes there twice: its threads are not in step,
- one thread writes a number that all of them read, with no sum in between for which they wait,
- a pointer or number is not the multiple that the compiler was told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lissom.kernels import apart

Array = np.ndarray[Any, Any]
#: Addresses, the number of the program and that of the access.
Access = tuple[Array, int, int]


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor, and the one behind its last."""
    if not x.numel():
        return x.data_ptr(), x.data_ptr()
    last = sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _joined(given: list[Access]) -> tuple[Array, Array, Array]:
    """All addresses, and for each the numbers of program and access."""
    sizes = [x.size for x, _, _ in given]
    return (np.concatenate([x for x, _, _ in given]), np.repeat([p for _, p, _ in given], sizes),
            np.repeat([a for _, _, a in given], sizes))


class _Launch:
    """Addresses of one launch in order, each with the number of its program and its access."""

    def __init__(self, name: str, extents: list[tuple[int, int]]) -> None:
        self.name, self.program, self.count = name, -1, 0
        # Numbers that every thread of the program reads, since they last waited for each other.
        self.common: set[int] = set()
        ordered = np.array(sorted(extents), dtype=np.uint64).reshape(-1, 2)
        self.begins, self.ends = ordered[:, 0], np.maximum.accumulate(ordered[:, 1])
        self.reads: list[Access] = []
        self.writes: list[Access] = []

    def begin(self) -> None:
        self.program += 1
        self.common.clear()

    def use(self, what: str, into: list[Access], addresses: Array, size: int) -> None:
        """Note an access; AssertionError if it is outside all tensors, or not aligned."""
        if not addresses.size:
            return
        ends = addresses + np.uint64(size)
        first = np.searchsorted(self.begins, addresses.min(), "right")
        if first == 0 or ends.max() > self.ends[first - 1]:
            place = np.searchsorted(self.begins, addresses, "right")
            outside = (place == 0) | (ends > self.ends[place - 1])
            assert not outside.any(), f"{self.name}: {what} {outside.sum()} elements outside"
        assert not (addresses & np.uint64(size - 1)).any(), f"{self.name}: {what} across alignment"
        self.count += 1
        into.append((addresses, self.program, self.count))

    def end(self) -> None:
        """AssertionError if what was read or written depends on who came first."""
        if not self.writes:
            return
        written, by, at = _joined(self.writes)
        order = np.argsort(written, kind="stable")
        written, by, at = written[order], by[order], at[order]
        twice = np.flatnonzero(written[1:] == written[:-1])
        if len(twice):
            a, b = twice[0], twice[0] + 1
            who = ("two programs write" if by[a] != by[b] else
                   "a program writes again" if at[a] != at[b] else "a store writes twice")
            raise AssertionError(f"{self.name}: {who} to one place")
        if not self.reads:
            return
        read, reader, then = _joined(self.reads)
        place = np.minimum(np.searchsorted(written, read), len(written) - 1)
        both = written[place] == read
        other = both & (by[place] != reader)
        assert not other.any(), f"{self.name}: a program reads what another one writes"
        assert not (both & (at[place] < then)).any(), f"{self.name}: reads what it has written"


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Watch every launch; AssertionError where a GPU's result would be undefined."""
    from triton.runtime import interpreter

    builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
    run, load, store, place = (grid.__call__, builder.create_masked_load,
                               builder.create_masked_store, builder.set_grid_idx)
    hint, make = interpreter.TensorHandle.set_attr, apart.Apart.__init__
    reduce = interpreter.ReduceOps.apply
    known: list[tuple[int, int]] = []
    launches: list[_Launch] = []

    def watched_run(self: Any, *args: Any, **options: Any) -> Any:
        given = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
        launches.append(_Launch(self.fn.__name__, known + [_extent(x) for x in given]))
        try:
            result = run(self, *args, **options)
            launches[-1].end()
            return result
        finally:
            launches.pop()

    def watched_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        launch = launches[-1]
        launch.use("reads", launch.reads, ptrs.data[mask.data.astype(bool)], size)
        if ptrs.data.size == 1:
            launch.common.add(int(ptrs.data.item()))
        return load(self, ptrs, mask, *rest, **options)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size, launch = ptrs.get_element_ty().primitive_bitwidth // 8, launches[-1]
        addresses = ptrs.data[mask.data.astype(bool)]
        launch.use("writes", launch.writes, addresses, size)
        late = launch.common.intersection(np.atleast_1d(addresses).tolist()) if launch.common else 0
        assert not late, f"{launch.name}: writes a number that its threads may not have read yet"
        return store(self, ptrs, value, mask, *rest)

    def watched_place(self: Any, *index: int) -> None:
        launches[-1].begin()
        place(self, *index)

    def watched_reduce(self: Any, x: Any) -> Any:
        out = reduce(self, x)
        if not (out[0] if isinstance(out, tuple) else out).shape:
            launches[-1].common.clear()
        return out

    def watched_hint(self: Any, key: str, value: Any) -> None:
        if key == "tt.divisibility":
            assert not (self.data % np.asarray(value).astype(self.data.dtype)).any(), (
                f"{launches[-1].name}: no multiple of {value}")
        hint(self, key, value)

    def watched_make(self: apart.Apart, parts: Any) -> None:
        make(self, parts)
        known.extend(_extent(x) for x in self.parts)

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, new in (
                (grid, "__call__", watched_run), (builder, "create_masked_load", watched_load),
                (builder, "create_masked_store", watched_store),
                (builder, "set_grid_idx", watched_place),
                (interpreter.ReduceOps, "apply", watched_reduce),
                (interpreter.TensorHandle, "set_attr", watched_hint),
                (apart.Apart, "__init__", watched_make)):
            patch.setattr(owner, name, new)
        yield
