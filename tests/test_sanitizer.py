"""The watch over kernels sees what it is there for: each of these a GPU would not forgive."""

from __future__ import annotations

import pytest
import torch
from lissom.kernels import _triton
from lissom.kernels._triton import jit, launch, tl
from lissom.kernels.apart import Apart, address, item_ptr, kind

pytestmark = pytest.mark.skipif(not _triton.INTERPRETED, reason="it watches the interpreter")
CPU = torch.device("cpu")


@jit
def _double(x_ptr: tl.tensor, out_ptr: tl.tensor, n: tl.tensor, step: tl.tensor,
            FAULT: tl.constexpr) -> None:
    place = tl.program_id(0) * step + tl.arange(0, 8)
    mask = place < n
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    if FAULT == "repeat":
        tl.store(out_ptr + place // 2, x, mask=mask)
    tl.store(out_ptr + place, 2 * x, mask=mask)
    if FAULT == "again":
        tl.store(out_ptr + place, 2 * x, mask=mask)
    if FAULT == "back":
        x = tl.load(out_ptr + place, mask=mask, other=0.0)
        tl.store(x_ptr + place, x, mask=mask)
    if FAULT == "neighbour":
        tl.load(out_ptr + (place + 8) % n, mask=mask)
    if FAULT == "hint":
        tl.multiple_of(out_ptr + 1 + tl.program_id(0), 16)


def _run(fault: str = "", n: int = 20, step: int = 8) -> torch.Tensor:
    x, out = torch.arange(20.0), torch.empty(20)
    launch(_double, 3, CPU, x, out, n, step, FAULT=fault)
    return out


def test_what_is_right() -> None:
    assert torch.equal(_run(), 2 * torch.arange(20.0))


@pytest.mark.parametrize(("fault", "options", "message"), [
    ("", {"n": 24}, "reads 4 elements outside"),
    ("", {"step": 6}, "two programs write to one place"),
    ("repeat", {}, "to one place"),
    ("again", {}, "a program writes to one place twice"),
    ("back", {}, "reads what it wrote"),
    ("neighbour", {}, "a program reads what another one writes"),
    ("hint", {}, "no multiple of"),
])
def test_faults(fault: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(Exception, match=message):
        _run(fault, **options)


@jit
def _fill(table_ptr: tl.tensor, SIZE: tl.constexpr, KIND: tl.constexpr, ALIGN: tl.constexpr
          ) -> None:
    x_ptr = item_ptr(table_ptr, tl.program_id(0), 0, KIND, ALIGN)
    tl.store(x_ptr + tl.arange(0, SIZE), tl.full([SIZE], 1.0, tl.float32))


@jit
def _grow(x_ptr: tl.tensor, last_ptr: tl.tensor, EARLY: tl.constexpr) -> None:
    last = tl.load(last_ptr)
    total = tl.sum(tl.load(x_ptr + tl.arange(0, 8)), 0)
    if not EARLY:
        last = tl.load(last_ptr)
    tl.store(last_ptr, tl.maximum(total, last))


def test_a_number_that_all_threads_read() -> None:
    """As the limiter's was, which on a GPU some of them would have read after it was written."""
    x, last = torch.ones(8), torch.ones(1)
    launch(_grow, 1, CPU, x, last, EARLY=True)
    assert last.item() == 8
    with pytest.raises(Exception, match="writes a number that its threads may not have read yet"):
        launch(_grow, 1, CPU, x, last, EARLY=False)


def test_tensors_apart() -> None:
    """Those behind a table of addresses are known, and their ends too."""
    x = Apart([torch.zeros(8), torch.zeros(8)])
    launch(_fill, 2, CPU, address(x), SIZE=8, KIND=kind(x), ALIGN=4)
    assert all(bool((y == 1).all()) for y in x)
    whole = torch.zeros(16)
    short = Apart([whole[:8]])
    with pytest.raises(Exception, match="writes 8 elements outside"):
        launch(_fill, 1, CPU, address(short), SIZE=16, KIND=kind(short), ALIGN=4)
    assert not whole.any()


@pytest.mark.parametrize(("align", "message"), [(2, "writes across alignment"),
                                                (4, "no multiple of")])
def test_across_an_alignment(align: int, message: str) -> None:
    x = Apart([torch.zeros(16, dtype=torch.uint8)])
    table = torch.tensor([x.parts[0].data_ptr() + 2])
    with pytest.raises(Exception, match=message):
        launch(_fill, 1, CPU, table, SIZE=2, KIND=tl.float32, ALIGN=align)
