"""How kernels are launched: what is found again is what Triton itself would take."""

from __future__ import annotations

import pytest
from lissom.kernels import _triton

from .aot import compile_for_a_gpu

LAUNCH = """
import numpy
import torch
from lissom.bench.host import nowhere
from lissom.kernels import _triton
from lissom.kernels._triton import jit, launch, tl

@jit
def kernel(x_ptr, y_ptr, n, stride, factor, start, PLUS: tl.constexpr, SIZE: tl.constexpr,
           MORE: tl.constexpr = 2):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i * stride, mask=i < n) * factor + start
    if y_ptr is not None:
        x += tl.load(y_ptr + i)
    if PLUS:
        x += MORE
    tl.store(x_ptr + i * stride, x.to(x_ptr.dtype.element_ty), mask=i < n)

launched = []
nowhere(lambda *given: launched.append(given))
whole = torch.zeros(256)
aligned, shifted, narrow = whole[:64], whole[1:65], torch.zeros(64, dtype=torch.bfloat16)
for x in (aligned, shifted, narrow):
    for y in (None, aligned, shifted):
        for n in (64, 63, 1, 2**31, -1):
            for stride, start in ((1, 0), (2, 1), (16, 17), (16, 16)):
                args = (x, y, n, stride, 0.5, start)
                for plus in (True, False):
                    constants = {"SIZE": 64, "PLUS": plus}
                    kernel[(3, 2)](*args, **constants, enable_fp_fusion=False)
                    source, programs, expected = launched[-1]
                    for _ in range(2):
                        launch(kernel, (3, 2), x.device, *args, **constants)
                        assert launched[-1][0] is source, args
                        assert launched[-1][1] == programs == (3, 2, 1)
                        assert len(launched[-1][2]) == len(expected) == 9
                        assert all(a is b for a, b in zip(launched[-1][2], expected)), args
# Numbers of other types, such as a scheduler of numpy's leaves in a rate.
for n, factor in ((True, 0.5), (64, numpy.float64(0.5)), (False, numpy.float64(0.25))):
    kernel[(1,)](aligned, None, n, 1, factor, 32, SIZE=64, PLUS=True, enable_fp_fusion=False)
    source = launched[-1][0]
    for _ in range(2):
        launch(kernel, 1, aligned.device, aligned, None, n, 1, factor, 32, SIZE=64, PLUS=True)
        assert launched[-1][0] is source, (n, factor)
# Found again indeed, also where what a kernel may not be compiled for has changed.
before = len(_triton._COMPILED)
launch(kernel, 3, aligned.device, aligned, None, 64, 1, 0.25, 32, SIZE=64, PLUS=True)
assert len(_triton._COMPILED) == before
# And an optimizer whose scheduler does so.
from lissom.optim import AdamW, GaLoreAdamW
for cls, given in ((AdamW, {}), (GaLoreAdamW, {"rank": 8})):
    p = torch.nn.Parameter(torch.randn(64, 16).bfloat16())
    optimizer = cls([p], **given)
    for rate in (1e-3, numpy.float64(1e-3), numpy.float32(1e-3)):
        optimizer.param_groups[0]["lr"] = rate
        p.grad = torch.randn(64, 16).bfloat16()
        optimizer.step()
# Weights with bits below them: in the kernels that write them, of one and of several, and apart.
for cls, given in ((AdamW, {"amsgrad": True}), (AdamW, {}), (AdamW, {"state_bits": 8}),
                   (GaLoreAdamW, {"rank": 8}), (GaLoreAdamW, {"rank": 8, "proj_type": "left"})):
    for bits in (8, 16):
        for rounding in (None, "nearest"):
            ps = [torch.nn.Parameter(torch.randn(64, 16).bfloat16()) for _ in range(3)]
            ps.append(torch.nn.Parameter(torch.randn(16, 64).bfloat16().t()))
            optimizer = cls(ps, master_bits=bits, rounding=rounding, **given)
            for _ in range(2):
                for p in ps:
                    p.grad = torch.randn_like(p)
                optimizer.step()
"""


@pytest.mark.slow
@pytest.mark.skipif(not _triton.EXACT, reason="needs triton >= 3.6")
def test_kernels_that_are_found_again_are_those_of_triton(tmp_path):
    compile_for_a_gpu(LAUNCH, tmp_path)


HOST = """
import json, sys
from lissom.bench import host
assert host.main(["--repeats", "2", "--json", FILE]) == 0
rows = json.load(open(FILE))
assert [row["optimizer"] for row in rows] == [*host._STEPS]
launches = {row["optimizer"]: row["launches_per_matrix"] for row in rows}
# All 56 at once, but for the few that are refreshed at a step.
for name, each in (("AdamW", 1), ("AdamW, 8 bits", 1), ("GaLoreAdamW", 2),
                   ("GaLoreAdamW, 8 bits", 3), ("DCTAdamW, gap 200, 8 bits", 2),
                   ("DCTAdamW, every step, 8 bits", 3), ("FiraAdamW, 8 bits", 8),
                   ("APOLLO, 8 bits", 6)):
    assert each <= 56 * launches[name] <= (1 if name.startswith("AdamW") else 3) * each, launches
assert all(row["us_per_matrix"] > 0 for row in rows)
"""


@pytest.mark.slow
@pytest.mark.skipif(not _triton.EXACT, reason="needs triton >= 3.6")
def test_host_time_is_taken_without_a_gpu(tmp_path):
    """One kernel for all of dense AdamW, two to eight beside products for a projected rule."""
    compile_for_a_gpu(f"FILE = {str(tmp_path / 'rows.json')!r}\n{HOST}", tmp_path)
