"""Symmetric products against float64, on CUDA and on the CPU under TRITON_INTERPRET=1.

Outputs are filled with NaN first, so that a tile that is left out shows.
"""

from __future__ import annotations

import pytest
import torch
from lissom.kernels import _triton, narrow, symmul
from lissom.kernels.symmul import (
    newton_schulz_step,
    newton_schulz_step_ref,
    symm_muladd,
    symm_muladd_ref,
    syrk,
    syrk_ref,
)
from torch.library import opcheck

from .aot import compile_for_a_gpu

CUDA = torch.cuda.is_available() and _triton.triton is not None
DEVICES = (["cuda"] if CUDA else []) + (["cpu"] if _triton.INTERPRETED else [])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (7, 5), (33, 64), (64, 33), (100, 129), (129, 100), (3, 33, 20), (2, 2, 7, 9)]
if CUDA:
    SHAPES += [(1000, 777), (1032, 520), (2048, 2048), (3, 1376, 512)]


@pytest.fixture(params=DEVICES or ["none"])
def device(request, monkeypatch):
    if request.param == "none":
        pytest.skip("kernels run on CUDA, or on the CPU under TRITON_INTERPRET=1")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(
        torch.nan))
    return request.param


def whole(shape, dtype, device, low=-3, high=4):
    """Small integers: every sum is exact, so that equality can be asked."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high, shape, generator=generator).to(device, dtype)


def assert_rounded(got, exact, dtype, terms):
    """Within one step of the dtype, beside what sums of fp32 lose: each element and its mirror."""
    assert got.dtype == dtype
    assert torch.equal(got, got.mT)
    exact = exact.double()
    step = exact.abs().clamp_min(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps
    slack = terms * 2.0**-24 * exact.abs().amax((-2, -1), keepdim=True)
    assert ((got.double() - exact).abs() <= step + slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_integers_are_exact(shape, dtype, device):
    x = whole(shape, dtype, device)
    gram = x.double() @ x.double().mT
    got = syrk(x, backend="triton")
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert torch.equal(got, gram.to(dtype))
    assert torch.equal(syrk_ref(x), got)
    a = got.clamp(-3, 3)
    exact = 0.5 * a.double() + 2 * a.double() @ a.double()
    assert torch.equal(symm_muladd(a, 0.5, 2.0, backend="triton"), exact.to(dtype))
    assert torch.equal(symm_muladd_ref(a, 0.5, 2.0), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(33, 129), (900, 40), (2, 100, 64)])
def test_products_of_16_bits_on_a_cpu_without_them(shape, dtype, monkeypatch):
    """In fp32, rounded once: by the definition, whatever this CPU is."""
    monkeypatch.setattr(narrow, "_FAST", [])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = (x / x.norm()).to(dtype)
    asked = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__",
                        lambda a, b: asked.append(a.dtype) or matmul(a, b))
    s = syrk(x)
    assert asked
    assert set(asked) == {torch.float32}
    assert s.dtype == dtype
    torch.testing.assert_close(s, syrk_ref(x), rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(symm_muladd(s, 0.5, 0.25), symm_muladd_ref(s, 0.5, 0.25),
                               rtol=torch.finfo(dtype).eps, atol=1e-6)
    out, exact = (f(x, 3.4, -4.8, 2.0) for f in (newton_schulz_step, newton_schulz_step_ref))
    assert out.dtype == dtype
    assert (out.double() - exact.double()).norm() < 1e-2 * exact.double().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 129), (129, 33), (2, 100, 64)])
def test_rounded_once_and_symmetric(shape, dtype, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    s = syrk(x, backend="triton")
    assert_rounded(s, x.double() @ x.double().mT, dtype, shape[-1])
    s = s / s.double().norm(dim=(-2, -1), keepdim=True).to(dtype)
    z = symm_muladd(s, -4.775, 2.0315, backend="triton")
    assert_rounded(z, -4.775 * s.double() + 2.0315 * s.double() @ s.double(), dtype, shape[-2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_are_followed(dtype, device):
    base = whole((2, 3, 70, 90), dtype, device)
    for x in (base.mT, base[0, 0].mT, base[:, 1], base[0, 0, ::2, 3:40:3], base[0, 0, :1].expand(
            5, 90), base[:, :, :7].permute(2, 1, 0, 3)):
        exact = (x.double() @ x.double().mT).to(dtype)
        assert torch.equal(syrk(x, backend="triton"), exact)
    a = syrk(base[..., :66, :2], backend="triton").clamp(-3, 3)[..., 1:, 1:]
    exact = (a.double() - a.double() @ a.double()).to(dtype)
    assert torch.equal(symm_muladd(a.mT, 1.0, -1.0, backend="triton"), exact)


def test_several_squares_of_tiles(device, monkeypatch):
    """Rows of tiles past the first square, at a size that the interpreter can take."""
    for tiles in (symmul.SquareTiles(16, 16, 32, 4, 3), symmul.SquareTiles(32, 32, 32, 4, 3)):
        monkeypatch.setattr(symmul, "_tiles", lambda *_, tiles=tiles: tiles)
        for m in (97, 160):
            x = whole((2, m, 20), torch.float32, device)
            assert torch.equal(syrk(x, backend="triton"), x @ x.mT)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_zero_empty_nan(backend, device):
    zero = torch.zeros(2, 70, 40, device=device)
    assert torch.equal(syrk(zero, backend=backend), zero.new_zeros(2, 70, 70))
    assert torch.equal(newton_schulz_step(zero, 1.0, 2.0, 3.0, backend=backend), zero)
    assert torch.equal(syrk(zero[..., :0], backend=backend), zero.new_zeros(2, 70, 70))
    assert syrk(zero[:, :0], backend=backend).shape == (2, 0, 0)
    assert syrk(zero[:0], backend=backend).shape == (0, 70, 70)
    zero[0, 3, 5] = torch.nan
    s = syrk(zero, backend=backend)
    assert s[0, 3].isnan().all()
    assert int(s.isnan().sum()) == 139
    left = torch.ones(2, 2, 64, device=device)
    left[0] = torch.inf  # the other matrix is not touched
    assert torch.equal(syrk(left, backend=backend)[1], torch.full((2, 2), 64.0, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (3, 33, 33), (2, 2, 20, 30)])
def test_a_step_of_newton_schulz(shape, dtype, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device)
    x = (x / x.norm(dim=(-2, -1), keepdim=True)).to(dtype)
    wide = x.double() if shape[-2] <= shape[-1] else x.double().mT
    s = wide @ wide.mT
    exact = 3.4445 * wide + (-4.775 * s + 2.0315 * s @ s) @ wide
    exact = exact if shape[-2] <= shape[-1] else exact.mT
    for backend in ("torch", "triton"):
        got = newton_schulz_step(x, 3.4445, -4.775, 2.0315, backend=backend)
        assert got.shape == x.shape
        assert got.dtype == dtype
        error = (got.double() - exact).norm() / exact.norm()
        assert error < torch.finfo(dtype).eps
    if shape[-2] <= shape[-1]:
        ref = newton_schulz_step_ref(x, 3.4445, -4.775, 2.0315).double()
        assert (ref - exact).norm() / exact.norm() < torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(768, 40), (801, 900), (2, 801, 30), (2, 2, 780, 5)])
def test_halves_on_the_cpu(shape):
    x = whole(shape, torch.float32, "cpu")
    got = syrk(x, backend="torch")
    assert torch.equal(got, (x.double() @ x.double().mT).float())
    a = got.clamp(-3, 3)
    exact = 0.5 * a.double() + 2 * a.double() @ a.double()
    assert torch.equal(symm_muladd(a, 0.5, 2.0), exact.float())


def test_operator_and_compile(device):
    x = whole((3, 20, 30), torch.float32, device)
    out = torch.zeros(3, 20, 20, device=device)
    opcheck(torch.ops.lissom.symmul.default, (x, x.mT, None, 1.0, out))
    opcheck(torch.ops.lissom.symmul.default, (out, out.clone(), 2.0, 1.0, out.clone()))
    for backend in ("torch", "triton"):
        compiled = torch.compile(newton_schulz_step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, 2.0, -1.5, 0.5, backend=backend),
                           newton_schulz_step(x, 2.0, -1.5, 0.5, backend=backend))


def test_refusals():
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"expected None, 'torch' or 'triton', got 'cuda'"):
        syrk(x, backend="cuda")
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., rows, columns\), got .*\(3,\)"):
        syrk(x[:, 0])
    with pytest.raises(TypeError, match=r"x: expected .*bfloat16.*, got torch.int64"):
        syrk(x.long())
    if _triton.INTERPRETED:
        with pytest.raises(TypeError, match="no float64"):
            syrk(x.double(), backend="triton")
    with pytest.raises(ValueError, match=r"a: expected \(\.\.\., m, m\), got shape \(3, 4\)"):
        symm_muladd(x, 1.0, 1.0)
    if not _triton.INTERPRETED:
        with pytest.raises(RuntimeError, match="'triton' cannot run on cpu"):
            syrk(x, backend="triton")


COMPILE = """
import re
from lissom.kernels import symmul

for capability in (80, 90):
    for kind, t in (("*bf16", symmul._LARGE), ("*bf16", symmul._ADDING), ("*fp16", symmul._SMALL),
                    ("*fp32", symmul._WIDE)):
        for add in (False, True):
            if add == (t == symmul._LARGE) and kind == "*bf16":
                continue
            constants = {"left_column": 1, "right_column" if add else "right_row": 1, "ADD": add,
                         "B": t.size, "K": t.depth, "TILES": t.side // t.size,
                         "PRECISION": "ieee", "WIDEN": False}
            types = {"left_ptr": kind, "right_ptr": kind, "out_ptr": kind, "alpha": "fp32",
                     "beta": "fp32"}
            kernel = built(symmul._symmul_kernel, types, constants,
                           lambda n: n not in ("alpha", "beta", "programs"), capability,
                           num_warps=t.warps, num_stages=t.stages)
            ptx = kernel.asm["ptx"]
            assert "cp.async.cg" in ptx
            assert kind == "*fp32" or ("wgmma" if capability == 90 else "mma.sync") in ptx
            # 16 bytes at a time, the mirror image too
            assert all("v4" in x for x in re.findall(r"st\\.global\\S*", ptx))
            # Of two programs, but of the one with more stages.
            assert kernel.metadata.shared <= (1 if t == symmul._ADDING else 0.5) * 226 * 1024
"""


@pytest.mark.slow
@pytest.mark.skipif(_triton.triton is None, reason="needs triton")
def test_compiles_for_a_gpu(tmp_path):
    """To machine code, which needs no GPU: tensor cores, 16-byte accesses, two programs' memory."""
    compile_for_a_gpu(COMPILE, tmp_path)
