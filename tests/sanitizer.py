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
#: Addresses in order, each once, the first and the last program that used them, and the number of
#: the last access.
Used = tuple[Array, Array, Array, Array]
# Accesses that are noted before they are put in order.
_PENDING = 1 << 21


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor, and the one behind its last."""
    if not x.numel():
        return x.data_ptr(), x.data_ptr()
    last = sum((n - 1) * abs(s) for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


class _Accesses:
    """What programs have read, or written."""

    def __init__(self) -> None:
        self._pending: list[tuple[Array, int, int]] = []
        self._count = 0
        empty = np.empty(0, np.int64)
        self._used: Used = (np.empty(0, np.uint64), empty, empty, empty)

    def add(self, addresses: Array, program: int, number: int) -> None:
        self._pending.append((addresses, program, number))
        self._count += addresses.size
        if self._count > _PENDING:
            self.used()

    def used(self) -> Used:
        """All of it so far."""
        if self._pending:
            sizes = [x.size for x, _, _ in self._pending]
            program, number = (np.repeat([entry[i] for entry in self._pending], sizes)
                               for i in (1, 2))
            old, first, last, latest = self._used
            address = np.concatenate([old, *(x for x, _, _ in self._pending)])
            order = np.argsort(address, kind="stable")
            address = address[order]
            begins = np.flatnonzero(np.append(True, address[1:] != address[:-1]))
            self._used = (address[begins],
                          np.minimum.reduceat(np.append(first, program)[order], begins),
                          np.maximum.reduceat(np.append(last, program)[order], begins),
                          np.maximum.reduceat(np.append(latest, number)[order], begins))
            self._pending, self._count = [], 0
        return self._used


class _Launch:
    """Addresses of one launch in order, each with the number of its program and its access."""

    def __init__(self, name: str, extents: list[tuple[int, int]]) -> None:
        self.name, self.program, self.count = name, -1, 0
        # Numbers that every thread of the program reads, since they last waited for each other.
        self.common: set[int] = set()
        ordered = np.array(sorted(extents), dtype=np.uint64).reshape(-1, 2)
        self.begins, self.ends = ordered[:, 0], np.maximum.accumulate(ordered[:, 1])
        self.reads, self.writes = _Accesses(), _Accesses()
        self.written = 0

    def begin(self) -> None:
        self.program += 1
        self.common.clear()

    def use(self, addresses: Array, size: int, write: bool) -> None:
        """Note an access; AssertionError if it is outside all tensors, or not aligned."""
        what = "writes" if write else "reads"
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
        self.written += write * addresses.size
        (self.writes if write else self.reads).add(addresses, self.program, self.count)

    def end(self) -> None:
        """AssertionError if what was read or written depends on who came first."""
        written, first, last, number = self.writes.used()
        assert (first == last).all(), f"{self.name}: two programs write to one place"
        assert len(written) == self.written, f"{self.name}: a program writes to one place twice"
        read, lowest, highest, latest = self.reads.used()
        if not len(written) or not len(read):
            return
        place = np.minimum(np.searchsorted(written, read), len(written) - 1)
        both, by = written[place] == read, first[place]
        other = both & ((lowest != by) | (highest != by))
        assert not other.any(), f"{self.name}: a program reads what another one writes"
        assert not (both & (number[place] < latest)).any(), f"{self.name}: reads what it wrote"


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
        launch.use(ptrs.data[mask.data.astype(bool)], size, write=False)
        if ptrs.data.size == 1:
            launch.common.add(int(ptrs.data.item()))
        return load(self, ptrs, mask, *rest, **options)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size, launch = ptrs.get_element_ty().primitive_bitwidth // 8, launches[-1]
        addresses = ptrs.data[mask.data.astype(bool)]
        launch.use(addresses, size, write=True)
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
