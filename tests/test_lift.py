"""The two kernels around a low-rank rule, projection and lift, against float64.

On CUDA, and on the CPU under TRITON_INTERPRET=1. Outputs are filled with NaN first, so that a tile
that is left out shows.
"""

from __future__ import annotations

import pytest
import torch
from lissom.bench.livebytes import LiveBytes
from lissom.kernels import _triton, symmul, tiles
from lissom.kernels import lift as lifting
from lissom.kernels.apart import Apart
from lissom.kernels.lift import lift, lift_ref
from lissom.kernels.limit import limited_gains, limited_gains_ref
from lissom.kernels.norms import row_norms, row_norms_ref
from lissom.kernels.philox import WEIGHT_STREAM, stochastic_round
from lissom.kernels.project import project, project_ref
from lissom.kernels.split import join, split
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from .aot import compile_for_a_gpu

CUDA = torch.cuda.is_available() and _triton.triton is not None
DEVICES = (["cuda"] if CUDA else []) + (["cpu"] if _triton.INTERPRETED else [])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: (batch), m, k, n of a product.
SIZES = [(1, 1, 1), (7, 5, 3), (33, 64, 20), (64, 33, 65), (129, 100, 8), (3, 33, 20, 9),
         (2, 2, 7, 9, 16)]
if CUDA:
    SIZES += [(4096, 4096, 1024), (4096, 11008, 1000), (16, 512, 1376, 128)]
KEY = (0x9234567890, 7)

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(params=DEVICES or ["none"])
def device(request, monkeypatch):
    if request.param == "none":
        pytest.skip("kernels run on CUDA, or on the CPU under TRITON_INTERPRET=1")
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    return request.param


def whole(shape, dtype, device, low=-3, high=4):
    """Small integers: every sum is exact, so that equality can be asked."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high, shape, generator=generator).to(device, dtype)


def drawn(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


# -------------------------------------------------------------------- projection


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product_and_sums_of_integers_are_exact(size, dtype, backend, device):
    *batch, m, k, n = size
    a, b = whole((*batch, m, k), dtype, device), whole((*batch, k, n), dtype, device)
    exact = a.double() @ b.double()
    count = exact[..., 0, 0].numel()
    largest = (2.0 ** (1 + torch.arange(count, device=device) % 3)).view(*batch, 1, 1)
    squares = (exact / largest).square().sum(-2)
    for order, sums in ((1, exact.abs().sum(-2)), (2, squares)):
        c, scores = project(a, b, scores=order, backend=backend, largest=largest)
        assert c.dtype == scores.dtype == torch.float32
        assert torch.equal(c.double(), exact)
        torch.testing.assert_close(scores.double(), sums, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_strides_are_followed_and_a_basis_serves_a_batch(dtype, transposed, device):
    g, q = whole((3, 40, 70), dtype, device), whole((12, 40), dtype, device).mT
    c, scores = project(g.mT, q, scores=1, transposed=transposed, dtype=dtype, backend="triton")
    exact = g.mT.double() @ q.double()
    assert c.dtype == dtype
    assert torch.equal(c, exact.to(dtype))
    assert (c.mT if transposed else c).is_contiguous()
    torch.testing.assert_close(scores.double(), exact.abs().sum(-2), rtol=1e-6, atol=0)


def test_scores_do_not_depend_on_the_run(device):
    a, b = drawn((300, 80), torch.bfloat16, device), drawn((80, 130), torch.bfloat16, device)
    first, again = (project(a, b, scores=2, backend="triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_nothing_is_asked_and_nothing_is_there(device):
    a, b = drawn((0, 5), torch.float32, device), drawn((5, 3), torch.float32, device)
    c, scores = project(a, b, scores=1, backend="triton")
    assert c.shape == (0, 3)
    assert torch.equal(scores, torch.zeros(3, device=device))
    c, scores = project(b, b.mT, backend="triton")
    assert scores is None


# -------------------------------------------------------------------- lift


def terms(size, kind, dtype, device, make=whole):
    """P, L, R, D, one gain for each column, one share for each row."""
    *batch, m, k, n = size
    return (make((*batch, m, n), kind, device), make((*batch, m, k), dtype, device),
            make((*batch, k, n), dtype, device), make((*batch, m, n), dtype, device),
            whole((*batch, 1, n), torch.float32, device, 1, 5) / 4,
            whole((*batch, m, 1), torch.float32, device, 0, 5) / 4)


@pytest.fixture(params=["few tiles", "many tiles"])
def many(request, monkeypatch):
    """Whether matrices count as large: then programs do their columns in slices."""
    if request.param == "many tiles":
        monkeypatch.setattr(tiles, "_ENOUGH", 0)
    return request.param


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_terms_of_small_numbers_are_exact(size, dtype, backend, device, many):
    p, left, right, dense, gain, keep = terms(size, torch.float32, dtype, device)
    exact = keep * p.double() - 0.5 * (left.double() @ right.double()) + 2 * gain * dense
    lift(p, left, right, alpha=-0.5, keep=keep, dense=dense, gain=gain, beta=2.0, backend=backend)
    assert torch.equal(p.double(), exact)


@pytest.mark.parametrize("part", ["product", "dense", "keep"])
def test_each_term_may_be_missing(part, device, many):
    size = (2, 33, 20, 70)
    p, left, right, dense, _, _ = terms(size, torch.float32, torch.float16, device)
    exact, given = 0.5 * p.double(), {"keep": 0.5}
    if part == "product":
        exact, given = exact + 2 * (left.double() @ right.double()), {**given, "alpha": 2.0}
    elif part == "dense":
        exact, given = exact - 3 * dense, {**given, "dense": dense, "gain": -1.5, "beta": 2.0}
    factors = (left, right) if part == "product" else (None, None)
    lift(p, *factors, **given, backend="triton")
    assert torch.equal(p.double(), exact)


def test_views_and_factors_that_a_batch_shares(device, many):
    p = whole((3, 20, 33), torch.bfloat16, device)
    left, right = whole((8, 20), torch.bfloat16, device).mT, whole((3, 33, 8), torch.bfloat16,
                                                                  device).mT
    dense = whole((3, 33, 20), torch.bfloat16, device).mT
    exact = p.double() + 0.25 * (left.double() @ right.double()) + dense
    lift(p, left, right, alpha=0.25, dense=dense, backend="triton")
    assert torch.equal(p, exact.to(torch.bfloat16))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [0, 8, 5, (1 << 35) + 8])
@pytest.mark.parametrize("shape", [(20, 64), (20, 33), (2, 9, 40), (130, 200)])
def test_random_bits_are_those_of_the_reference(shape, start, kind, device, many):
    """The numbers before rounding are equal, so that the weights are."""
    *batch, m, n = shape
    p, left, right, _, _, _ = terms((*batch, m, 7, n), kind, kind, device)
    wide = p.float() + 0.000244140625 * (left.float() @ right.float())
    expected = stochastic_round(wide, kind, start, KEY, (3, WEIGHT_STREAM), backend="torch")
    plain = p.clone()
    for backend in ("torch", "triton"):
        x = p.clone()
        lift(x, left, right, alpha=0.000244140625, key=KEY, t=3, start=start, backend=backend)
        assert torch.equal(x, expected), backend
    lift(plain, left, right, alpha=0.000244140625, backend="triton")
    assert torch.equal(plain, wide.to(kind))
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("start", [0, 5, (1 << 35) + 8])
@pytest.mark.parametrize("shape", [(20, 64), (2, 9, 33), (130, 200)])
def test_bits_below_a_weight_are_those_of_the_reference(shape, start, count, device, many):
    """Of numbers that are exact before they are rounded; at random, and to nearest."""
    *batch, m, n = shape
    x, left, right, _, _, _ = terms((*batch, m, 7, n), torch.float32, torch.bfloat16, device)
    below = [torch.full(x.shape, 77, dtype=kind, device=device)
             for kind in (torch.int8, torch.uint8)[:count]]
    parts = [x.bfloat16(), *below]
    split(x * (1 + 2**-14), *parts, backend="torch")
    wide = join(*parts) + 2**-18 * (left.float() @ right.float())
    results = []
    for key in (KEY, None):
        expected = [y.clone() for y in parts]
        split(wide, *expected, key=key, t=3, start=start, backend="torch")
        for backend in ("torch", "triton"):
            found = [y.clone() for y in parts]
            versions = [y._version for y in found]
            lift(found[0], left, right, alpha=2**-18, key=key, t=3, start=start, below=found[1:],
                 backend=backend)
            assert all(map(torch.equal, found, expected)), (backend, key)
            assert all(y._version > v for y, v in zip(found, versions, strict=True))
        results.append(expected)
    assert all(map(torch.equal, *results)) == (count == 2)  # where nothing is rounded at random


@pytest.mark.parametrize("gain", ["rows", "columns", "elements", "one"])
def test_gains_and_shares_of_any_extent(gain, device, many):
    p, left, right, dense, _, _ = terms((3, 33, 8, 70), torch.float32, torch.bfloat16, device)
    shape = {"rows": (3, 33, 1), "columns": (1, 70), "elements": (33, 70), "one": ()}[gain]
    gains, keep = (whole(shape, torch.float32, device, 1, 5) / 4 for _ in range(2))
    exact = keep * p.double() + left.double() @ right.double() + gains * dense
    lift(p, left, right, keep=keep, dense=dense, gain=gains, backend="triton")
    assert torch.equal(p.double(), exact)


def test_what_is_not_finite_stays_so(device, many):
    p, left, right, dense, _, _ = terms((20, 5, 40), torch.bfloat16, torch.bfloat16, device)
    left[3, 1], dense[7, 7], p[9, 9] = torch.nan, torch.inf, -torch.inf
    expected = p.clone()
    lift_ref(expected, left, right, alpha=0.125, dense=dense, key=KEY)
    lift(p, left, right, alpha=0.125, dense=dense, key=KEY, backend="triton")
    torch.testing.assert_close(p, expected, rtol=0, atol=0, equal_nan=True)
    assert p[3].isnan().all()
    assert p.isfinite().logical_not().sum() == 42


def test_a_write_shows_in_the_version(device):
    p = whole((3, 4), torch.float32, device)
    before = p._version
    lift(p, keep=0.5, backend="triton")
    assert p._version > before


# -------------------------------------------------------------------- operators, compile, errors


def test_an_operator_is_called_where_somebody_looks():
    """Elsewhere what it does is called itself: then numbers come as they were given."""
    got = []
    call = _triton.define("probe_of_a_test(Tensor(a!) x, int[] words) -> ()",
                          lambda x, words: got.append(type(words)))

    def kind(x):
        got.clear()
        call(x, (1, 2))
        return got

    x = torch.zeros(2)
    assert kind(x) == [list]  # gradients are asked for
    with torch.no_grad():
        assert kind(x) == kind(torch.nn.Parameter(x)) == [tuple]
        assert kind(torch.zeros(2, device="meta")) == []
        with LiveBytes():
            assert kind(x) == [list]
        with torch.profiler.profile() as profile:
            assert kind(x) == [list]
        assert any(e.key == "lissom::probe_of_a_test" for e in profile.key_averages())
        with FakeTensorMode() as mode:
            assert kind(torch.zeros(2)) == []
        assert kind(mode.from_tensor(x)) == []


def test_operators_and_compile(device):
    p, left, right, dense, gain, keep = terms((20, 7, 33), torch.float32, torch.float32, device)
    opcheck(torch.ops.lissom.lift.default, (
        p[None], left[None], right[None], dense[None], gain.expand(20, 33)[None],
        keep.expand(20, 33)[None], 0.5, 1.0, 1.0, [1, 2], False, 1, 0))
    opcheck(torch.ops.lissom.lift.default, (
        p, left, right, dense, None, None, 0.5, 1.0, 1.0, [1, 2], False, 1, 0))
    sums = torch.empty(1, 1, 33, device=device)
    opcheck(torch.ops.lissom.project.default, (
        left[None], right[None], torch.empty(1, 20, 33, device=device), sums, None, 1))

    def step(p, left, right):
        c, scores = project(left, right, scores=1, backend="triton")
        lift(p, left, right, dense=c, gain=scores[None], backend="triton")

    compiled = p.clone()
    step(p, left, right)
    torch.compile(step, fullgraph=True, backend="aot_eager")(compiled, left, right)
    assert torch.equal(p, compiled)


def test_refusals():
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"a, b: expected .*, got \(4, 6\) and \(4, 6\)"):
        project(x, x)
    with pytest.raises(TypeError, match=r"a, b: expected one dtype of .*, got torch\.float32 and"):
        project(x, x.mT.half())
    with pytest.raises(ValueError, match=r"scores: expected None, 1 or 2, got 3"):
        project(x, x.mT, scores=3)
    with pytest.raises(ValueError, match=r"largest: expected shape \(1, 1\), got \(2,\)"):
        project(x, x.mT, scores=2, largest=torch.ones(2))
    with pytest.raises(ValueError, match=r"p: expected \(\.\.\., m, n\), got shape \(4,\)"):
        lift(x[:, 0])
    with pytest.raises(ValueError, match=r"p: expected a contiguous tensor"):
        lift(x.mT)
    with pytest.raises(ValueError, match=r"left, right: expected two tensors or None and None"):
        lift(x, x)
    with pytest.raises(ValueError, match=r"left, right: expected .* for p of \(4, 6\), got"):
        lift(x, x, x)
    with pytest.raises(TypeError, match=r"left, right: expected one dtype"):
        lift(x, x, x.mT.double())
    with pytest.raises(ValueError, match=r"dense: expected shape \(4, 6\), got \(6, 4\)"):
        lift(x, dense=x.mT)
    with pytest.raises(TypeError, match=r"p: expected torch.bfloat16, got torch.float32"):
        lift(x, below=[x.to(torch.int8)])
    with pytest.raises(TypeError, match=r"low: expected torch.uint8, got torch.int8"):
        lift(x.bfloat16(), below=[x.to(torch.int8)] * 2)
    with pytest.raises(TypeError, match=r"below: expected Tensor as for p, got Apart"):
        lift(x.bfloat16(), below=[Apart([x.to(torch.int8)])])
    with pytest.raises(ValueError, match=r"below: expected up to 2 tensors, got 3"):
        lift(x.bfloat16(), below=[x.to(torch.int8)] * 3)


COMPILE = """
import re
from lissom.kernels import lift, limit, norms, project, tiles

def build(kernel, constants, types, t, capability):
    names = [p.name for p in kernel.params]
    uneven = {"tiles_m", "tiles_n", "start", "seed", "parameter", "step"}
    tile = {"BM": t.rows, "BN": t.columns, "BK": t.depth, "GROUP": t.group, "PRECISION": "ieee",
            "WIDEN": False, "SLICES": lift._SLICES if t == lift._SHARED else 1,
            **{x: None for x in ("high_ptr", "low_ptr") if x not in types}}
    constants = {**constants, **{k: v for k, v in tile.items() if k in names}}
    kernel = built(kernel, types, constants,
                   lambda n: types.get(n) != "fp32" and n not in uneven,
                   capability, num_warps=t.warps, num_stages=t.stages)
    ptx = kernel.asm["ptx"]
    # 16 bytes at a time
    assert all("v4" in x or "b64" in x or x.endswith("b32") for x in
               re.findall(r"st\\.global\\S*", ptx))
    # Of two programs, but for the largest tiles.
    assert kernel.metadata.shared <= (1 if t == tiles.LARGE else 0.5) * 226 * 1024
    return ptx

for capability in (80, 90):
    dot = "wgmma" if capability == 90 else "mma.sync"
    for kind, t in (("*bf16", tiles.LARGE), ("*fp16", tiles.SMALL), ("*fp32", tiles.WIDE)):
        types = {"a_ptr": kind, "b_ptr": kind, "c_ptr": "*fp32", "scores_ptr": "*fp32",
                 "largest_ptr": "*fp32"}
        for left, scores in ((False, 1), (True, 2)):
            ptx = build(project._project_kernel, {
                "SCORES": scores, "a_row" if left else "a_column": 1,
                "b_column": 1, "c_row" if left else "c_column": 1}, types, t, capability)
            assert kind == "*fp32" or (dot in ptx and "cp.async.cg" in ptx)
    flat = {"left_ptr": None, "right_ptr": None}
    for kind, t, none, below in (("*bf16", lift._SHARED, {}, 0), ("*fp16", tiles.SMALL, {}, 0),
                                 ("*fp32", lift._FLAT, flat, 0), ("*bf16", lift._SHARED, {}, 8),
                                 ("*bf16", lift._FLAT, flat, 16)):
        held = kind == "*fp16"
        types = {f"{x}_ptr": kind for x in ("p", "left", "right", "dense")}
        types |= {"gain_ptr": "*fp32", "keep_ptr": "*fp32", "alpha": "fp32", "beta": "fp32",
                  "keep": "fp32", **({"step": "*i64"} if held else {}),
                  **({"alpha": "*fp32"} if below == 8 else {}),
                  **({"high_ptr": "*i8"} if below else {}),
                  **({"low_ptr": "*u8"} if below == 16 else {})}
        ptx = build(lift._lift_kernel, {
            **none, "HELD": held, "BELOW": below, "RATED": below == 8, "PRODUCT": not none,
            "DENSE": True,
            "GAIN": 2 if kind == "*bf16" else 3, "KEEP": 1 if kind == "*bf16" else 3,
            "STOCHASTIC": kind != "*fp32" and below < 16, "ALIGNED": True, "left_column": 1,
            "right_column": 1, "dense_column": 1, "gain_row": 0, "gain_column": 1, "keep_row": 1,
            "keep_column": 0},
            types, t, capability)
        assert none or dot in ptx
    flat = tiles.Tiles(1, 1, 1, 1, 4, 1)
    for name, (rows, columns) in (("x_column", norms._ALONG), ("x_row", norms._ACROSS)):
        ptx = build(norms._row_norms_kernel, {"R": rows, "C": columns, "ROOT": True, name: 1},
                    {"x_ptr": "*bf16", "out_ptr": "*fp64"}, flat, capability)
        assert "ld.global.v4.b32" in ptx
    pointers = {f"{x}_ptr": "*fp64" for x in ("n", "r", "g", "out")}
    ptx = build(limit._limit_kernel, {"LEAK": True, "LIMIT": True, "BLOCK": limit._BLOCK},
                {**pointers, "last_ptr": "*fp32", "factor": "fp32", "eps": "fp32", "leak": "fp32",
                 "limiter": "fp32"}, flat, capability)
    assert "div.rn.f64" in ptx
"""


@pytest.mark.slow
@pytest.mark.skipif(_triton.triton is None, reason="needs triton")
def test_compiles_for_a_gpu(tmp_path):
    """To machine code, which needs no GPU: tensor cores, wide accesses, two programs' memory."""
    compile_for_a_gpu(COMPILE, tmp_path)


def test_tiles_are_small_where_there_are_few():
    x = torch.empty(1, 4096, 4096, dtype=torch.bfloat16, device="meta")
    assert tiles.tiles_for(x, 1, 4096, 1024) == tiles.LARGE
    assert tiles.tiles_for(x, 1, 2048, 1024) == tiles.MEDIUM
    assert tiles.tiles_for(x, 1, 1024, 1024) == tiles.SMALL
    assert tiles.tiles_for(x, 2, 1024, 2048) == tiles.LARGE
    assert tiles.tiles_for(x.float(), 8, 4096, 4096) == tiles.WIDE


def test_tiles_are_smaller_where_they_would_not_fit(monkeypatch):
    x = torch.empty(1, 4096, 4096, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(tiles, "fits", lambda device, size: size <= 99 * 1024)
    monkeypatch.setattr(symmul, "fits", tiles.fits)
    assert tiles.tiles_for(x, 1, 4096, 1024) == tiles.MEDIUM
    assert symmul._tiles(x, True) == symmul._SMALL
    assert symmul._tiles(x, False) == symmul._LARGE


@pytest.mark.parametrize(("architecture", "halves"), [((8, 0), True), ((8, 6), True),
                                                       ((8, 9), True), ((9, 0), False),
                                                       ((10, 0), False), ((12, 0), True)])
def test_tiles_are_less_deep_where_factors_take_registers(architecture, halves, monkeypatch):
    """Of 100 KiB that programs share on a consumer GPU, two then have less than half each."""
    cuda = torch.device("cuda", 98)
    monkeypatch.setattr(_triton, "_CAPABILITY", {cuda: architecture})
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    for t in (tiles.LARGE, tiles.MEDIUM, tiles.SMALL, lifting._SHARED):
        expected = t._replace(depth=32, stages=4) if halves else t
        assert tiles.suited(t, cuda) == expected
        assert tiles.suited(t, torch.device("cpu")) == t
    assert tiles.suited(tiles.WIDE, cuda) == tiles.WIDE
    large = symmul._LARGE._replace(depth=32, stages=4) if halves else symmul._LARGE
    assert symmul._suited(symmul._LARGE, cuda) == large
    assert lifting._after(tiles.suited(lifting._SHARED, cuda)) == (lifting._SLICES, 128)
    assert lifting._after(tiles.suited(tiles.SMALL, cuda)) == (1, None)


def test_reference_is_the_formula():
    a, b = drawn((9, 5), torch.float64, "cpu").float(), drawn((5, 4), torch.float64, "cpu").float()
    c, scores = project_ref(a, b, scores=2)
    torch.testing.assert_close(c, a @ b)
    torch.testing.assert_close(scores, (a @ b).square().sum(0))


# -------------------------------------------------------------------- norms, gains


def test_norms_of_a_batch_are_those_of_each(device, monkeypatch):
    """Sums have one order: rows are read in parts, whose number does not depend on the batch."""
    monkeypatch.setattr("lissom.kernels.norms._BUSY", 8)
    x = torch.randn(7, 3, 9000, generator=torch.Generator().manual_seed(0)).to(device)
    found = row_norms(x, backend="triton")
    assert torch.equal(found, torch.stack([row_norms(y, backend="triton") for y in x]))



@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (33, 300), (300, 33), (2, 3, 17, 129)])
def test_row_norms(shape, dtype, device):
    x = drawn(shape, dtype, device)
    for y in (x, x.mT):
        torch.testing.assert_close(row_norms(y, backend="triton"), row_norms_ref(y), rtol=1e-6,
                                   atol=0)
    assert torch.equal(row_norms(x[..., :0], backend="triton"), torch.zeros_like(
        x[..., 0], dtype=torch.float64))


def test_row_norms_of_hard_rows(device):
    x = torch.zeros(5, 300, device=device)
    x[0], x[1], x[2, 7], x[3, 299] = 1e30, 1e-30, torch.inf, torch.nan
    expected = torch.tensor([1e30, 1e-30, torch.inf, torch.nan, 0], dtype=torch.float64,
                            device=device) * torch.tensor([300.0, 300, 1, 1, 1],
                                                          device=device).double().sqrt()
    torch.testing.assert_close(row_norms(x, backend="triton"), expected, rtol=1e-6, atol=0,
                               equal_nan=True)


def test_row_norms_of_hard_rows_in_pieces(device):
    """A peak that rises on the way, an infinity that comes first; no row helps another."""
    for first, then in ((1e29, 3e30), (1e-30, 1e-30), (1e-32, 1e-30), (torch.inf, 1.0)):
        x = torch.full((1, 1300), then, device=device)
        x[0, :600] = first
        for y in (x, x.expand(3, 1300).mT.contiguous().mT):
            torch.testing.assert_close(row_norms(y, backend="triton"), row_norms_ref(y), rtol=1e-6,
                                       atol=0)


@pytest.mark.parametrize("limiter", [None, 1.0, 1.01])
@pytest.mark.parametrize("leak", [None, 0.0, 0.75])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 1500)])
@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
def test_gains_are_those_of_the_reference(shape, leak, limiter, size, device):
    n, r, g = (drawn(shape, torch.float64, device, seed).abs() * size for seed in (1, 2, 3))
    n /= size  # Adam's direction
    n[0, 0] = 0
    r[-1, -1] = 0
    g[0, shape[1] // 2] = 0
    if size == 1 and shape[0] > 2:
        n[1, 3], g[2, 2] = torch.nan, torch.inf
    options = {"more": 4.0, "eps": 1e-8, "leak": leak, "limiter": limiter or 1.0}
    for before in (0.0, 1e-6, 0.3, 1e30):
        last = [torch.full(shape[:1], before, device=device) if limiter else None
                for _ in range(2)]
        expected = limited_gains_ref(n, r, g, last[0], **options)
        got = limited_gains(n, r, g, last[1], backend="triton", **options)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0, equal_nan=True)
        if limiter:
            torch.testing.assert_close(last[1], last[0], rtol=1e-6, atol=0, equal_nan=True)


def test_the_limiter_is_the_formula():
    n, r, g = (torch.tensor([x], dtype=torch.float64) for x in ([3.0, 4.0], [1.0, 2.0], [6.0, 8.0]))
    last = torch.tensor([10.0])
    gain = limited_gains_ref(n, r, g, last, more=1e6, eps=0.0, limiter=1.5)
    # phi = 3 and 2; |S| = |(18, 16)| = 24.083, of which 15 are let through
    torch.testing.assert_close(gain, torch.tensor([[3.0, 2.0]], dtype=torch.float64)
                               * 15 / 580**0.5)
    assert last.item() == pytest.approx(15.0)
    # none where neither N nor R is, with nothing added that would keep the quotient finite
    n[0, 0] = r[0, 0] = 0.0
    gain = limited_gains_ref(n, r, g, None, more=1e6, eps=0.0)
    assert gain.tolist() == [[0.0, 2.0]]


def test_what_gains_and_norms_refuse():
    x = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"size_r: expected torch\.float64, got torch\.float32"):
        limited_gains(x, x.float(), x, None, more=1.0, eps=0.0)
    with pytest.raises(ValueError, match=r"last: expected shape \(2,\), got \(3,\)"):
        limited_gains(x, x, x, torch.ones(3), more=1.0, eps=0.0)
    with pytest.raises(ValueError, match=r"x: expected \(\.\.\., m, n\), got shape \(3,\)"):
        row_norms(x[0])


@pytest.mark.parametrize("way", ["highest", "high", "allow_tf32", "matmul", "all"])
def test_fp32_products_follow_each_of_torchs_settings(way):
    """The newer setting makes the older question an error."""
    matmul = torch.backends.cuda.matmul
    if way in ("matmul", "all") and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("since torch 2.9")
    assert tiles.precision() == "ieee"
    try:
        if way == "allow_tf32":
            matmul.allow_tf32 = True
        elif way == "matmul":
            matmul.fp32_precision = "tf32"
        elif way == "all":
            matmul.fp32_precision = "none"  # nothing of its own
            torch.backends.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision(way)
        assert tiles.precision() == ("ieee" if way == "highest" else "tf32")
    finally:
        if hasattr(torch.backends, "fp32_precision"):
            torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
    assert tiles.precision() == "ieee"
