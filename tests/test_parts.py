"""Algebra of the parts: random bits, rounding, projections, memory of a step."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import scipy.fft
import torch
from lissom.bench.livebytes import LiveBytes
from lissom.kernels.blocks import code_shapes
from lissom.kernels.dynamic import codebook, dequantize_dynamic_ref, quantize_dynamic_ref
from lissom.kernels.linear import dequantize_linear_ref, quantize_linear_ref
from lissom.kernels.philox import random_bits16_ref, stochastic_bf16_ref, stochastic_fp16_ref
from lissom.optim import (
    APOLLO,
    AdamW,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    Trion,
    codec,
    convert_state,
    dct,
    inner,
    project,
)
from lissom.optim.layouts import slots_of
from lissom.optim.options import choice

from .helpers import assert_same, feed, parameters, run, tensors, through_disk


def philox_in_python(counter, key):
    """Philox 4x32-10 with Python's integers (Salmon et al., 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_random_bits_are_philox():
    # Known answers of the Random123 distribution for philox4x32-10.
    assert philox_in_python([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_in_python([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    bits = random_bits16_ref(0, 40, (7, 9), (3, 1)).tolist()
    for block in range(5):
        words = philox_in_python([block, 0, 3, 1], [7, 9])
        assert bits[8 * block : 8 * block + 8] == [h for w in words for h in (w & 65535, w >> 16)]
    assert random_bits16_ref(13, 11, (7, 9), (3, 1)).tolist() == bits[13:24]
    assert random_bits16_ref(5, 0, (7, 9), (3, 1)).shape == (0,)


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_exact():
    x = torch.tensor([1.001, -3.3e-5, 1e30, 1e-30]).repeat_interleave(20000)
    rounded = stochastic_bf16_ref(x, 0, (1, 2), (3, 4)).double().view(4, -1)
    for value, row in zip(x.view(4, -1)[:, 0].double(), rounded, strict=True):
        assert len(row.unique()) == 2
        assert abs(row.mean() - value) < 4 * row.std() / math.sqrt(20000)
    exact = torch.tensor([0.0, -2.5, float("inf"), float("-inf"), 0.1875])
    assert torch.equal(stochastic_bf16_ref(exact, 0, (1, 2), (3, 4)).float(), exact)
    assert stochastic_bf16_ref(torch.tensor([float("nan")]), 0, (1, 2), (3, 4)).isnan().all()


def test_stochastic_fp16_is_unbiased_and_keeps_what_is_exact():
    x = torch.tensor([1.0001, -3.3e-6, 60001.3, 1e-8, -0.33333]).repeat_interleave(20000)
    rounded = stochastic_fp16_ref(x, 0, (1, 2), (3, 4)).double().view(5, -1)
    for value, row in zip(x.view(5, -1)[:, 0].double(), rounded, strict=True):
        assert len(row.unique()) == 2
        assert abs(row.mean() - value) < 4 * row.std() / math.sqrt(20000) + 1e-5 * row.std()
    exact = torch.tensor([0.0, -2.5, float("inf"), float("-inf"), 0.1875, 65504.0, 2.0**-24])
    assert torch.equal(stochastic_fp16_ref(exact, 0, (1, 2), (3, 4)).float(), exact)
    assert stochastic_fp16_ref(torch.tensor([float("nan")]), 0, (1, 2), (3, 4)).isnan().all()
    assert stochastic_fp16_ref(torch.tensor([1e9]), 0, (1, 2), (3, 4)).isinf().all()


def test_16_bit_second_moments_decay():
    """To nearest they never would: a change of 0.1 % is less than half a bf16 step."""
    (p,) = parameters([(50, 40)])
    optimizer = AdamW([p], state_bits=16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    first = optimizer.state[p]["exp_avg_sq"].float().mean()
    p.grad = torch.zeros_like(p)
    for _ in range(200):
        optimizer.step()
    ratio = optimizer.state[p]["exp_avg_sq"].float().mean() / first
    assert abs(ratio - 0.999**200) < 0.01


def test_16_bit_state_does_not_depend_on_the_blocks(monkeypatch):
    results = []
    for block in (64, 1 << 18):
        monkeypatch.setattr("lissom.optim.apply._BLOCK", {"cuda": block})
        (p,) = parameters([(31, 17)])
        optimizer = AdamW([p], state_bits=16, lr=1e-2)
        run(optimizer, [p], range(5))
        results.append((p.detach().clone(), optimizer.state[p]["exp_avg"]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("projection", ["svd", "randomized", "subspace"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_bases_are_orthonormal_and_near_the_best(side, projection, scale):
    # 200 x 500, singular values from 1 to 1e-3, as in methods of Halko et al.
    u, v = (torch.linalg.qr(x).Q for x in tensors([(200, 200), (500, 200)]))
    s = torch.logspace(0, -3, 200)
    g = (u * s) @ v.mT * scale
    q = project.find(g, 16, side, projection, None, (0, 0), 1)
    if projection == "subspace":
        old = q
        q = project.find(g, 16, side, projection, old, (0, 0), 2)
        assert ((q * old).sum(0) > 0).all()
    torch.testing.assert_close(q.mT @ q, torch.eye(16), rtol=0, atol=1e-5)
    unit = g / scale
    rest = unit - (q @ (q.mT @ unit) if side == "left" else (unit @ q) @ q.mT)
    assert rest.norm() < 1.05 * s[16:].norm()


@pytest.mark.parametrize("left", [False, True])
def test_rotation_is_exact_where_columns_are_shared(left):
    """The permutation of indices and the general product agree; V stays positive."""
    (m,) = tensors([(5, 3)])
    basis = torch.eye(6)
    old, new = torch.tensor([0, 2, 4]), torch.tensor([1, 2, 4])
    zero = torch.zeros(5)
    expected = torch.stack([zero, m[:, 1], m[:, 2]], -1)
    for turned in (project.turn(basis[:, old], basis[:, new], left),
                   project.shift(old.int(), new.int(), left)):
        for power, x, y in ((1, m, expected), (2, m.square(), expected.square())):
            moved = turned(x.mT if left else x, power)
            assert torch.equal(moved.mT if left else moved, y)
    batch = project.shift(torch.stack([old, new]).int(), torch.stack([new, old]).int(), left)
    moved = batch(torch.stack([m.mT, m.mT] if left else [m, m]), 1)
    back = torch.stack([zero, m[:, 1], m[:, 2]], -1)
    for x, y in zip(moved, (expected, back), strict=True):
        assert torch.equal(x.mT if left else x, y)


def test_random_bases_come_from_the_seed_alone():
    torch.manual_seed(1)
    a = project.random_basis(9, 4, (2,), (5, 6), 7, torch.empty(0))
    torch.manual_seed(2)
    assert torch.equal(a, project.random_basis(9, 4, (2,), (5, 6), 7, torch.empty(0)))
    assert not torch.equal(a, project.random_basis(9, 4, (2,), (5, 6), 8, torch.empty(0)))
    ps = parameters([(8, 6), (8, 6)])
    optimizer = GaLoreAdamW(ps, rank=2, projection="random")
    assert not any("basis_" in k and k != "basis_step" for k in optimizer.state[ps[0]])
    for p in ps:
        p.grad = tensors([(8, 6)])[0]
    optimizer.step()
    start = parameters([(8, 6), (8, 6)])
    assert not torch.allclose(ps[0] - start[0], ps[1] - start[1])


def test_live_bytes_counts_what_is_alive():
    x = torch.zeros(1000)
    with LiveBytes() as live:
        a = x + 1
        b = a + 1
        del a
        c = b + 1
        c.add_(x)
    assert live.peak == 8000
    assert live.live == 8000
    del b, c
    assert live.live == 0


@pytest.mark.parametrize("options", [{}, {"projection": "randomized"}, {"moments": "rotate"},
                                     {"projection": "random"}, {"proj_type": "full"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporaries_are_bounded_by_the_largest_matrix(options, dtype):
    """At most three times the largest matrix, in fp32, the first step's refreshes included."""
    ps = parameters([(1376, 512), (512, 1376), (2048, 512), (512,)], dtype=dtype)
    optimizer = GaLoreAdamW(ps, rank=64, **options)
    assert optimizer.state  # made, so that it is no temporary
    for i in range(2):
        feed(ps, i)
        with LiveBytes() as live:
            optimizer.step()
        assert 0 < live.peak <= 3 * 2048 * 512 * 4


@pytest.mark.parametrize("make", [
    FiraAdamW, DCTAdamW, Trion, APOLLO, functools.partial(DCTAdamW, similarity="matmul"),
    functools.partial(DCTAdamW, error_feedback_bits=4), functools.partial(Trion, state_bits=8),
    functools.partial(GaLoreAdamW, residual="sign", state_bits=4, basis_bits=4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporaries_of_the_family_are_bounded(make, dtype, monkeypatch):
    monkeypatch.setattr("lissom.optim.batches._WINDOW", 1)  # else by the window, if that is larger
    ps = parameters([(1376, 512), (512, 1376), (2048, 512), (512,)], dtype=dtype)
    optimizer = make(ps, rank=64)
    assert optimizer.state  # made, so that it is no temporary
    for i in range(2):
        feed(ps, i)
        with LiveBytes() as live:
            optimizer.step()
        assert 0 < live.peak <= 3.5 * 2048 * 512 * 4


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_temporaries_of_blocks_are_those_of_a_block(bits):
    """Where no operation takes all at once: what is decoded is a part of the whole."""
    ps = parameters([(4096, 512)])
    optimizer = AdamW(ps, state_bits=bits, amsgrad=True)
    assert optimizer.state  # made, so that it is no temporary
    feed(ps, 0)
    with LiveBytes() as live:
        optimizer.step()
    assert 0 < live.peak <= ps[0].nbytes / 2


def test_uninitialized_memory_is_never_read(monkeypatch):
    """torch.empty and its kin give NaN; nothing of it may reach a weight."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _real=real, **k: _real(*a, **k).fill_(math.nan))
    for make in (lambda ps: AdamW(ps), lambda ps: GaLoreAdamW(ps, rank=3, moments="rotate")):
        ps = parameters([(7, 5), (5, 7), (4,)])
        run(make(ps), ps, range(3))
        assert all(np.isfinite(p.detach().numpy()).all() for p in ps)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 64, 65, 200])
@pytest.mark.parametrize("kind", [2, 3])
@pytest.mark.parametrize("dim", [-1, -2])
def test_transforms_are_scipys(n, kind, dim):
    """In float64 to 1e-12, by product and by FFT, and so is what is selected from them."""
    x = tensors([(7, n) if dim == -1 else (n, 7)], n)[0].double()
    expected = torch.from_numpy(scipy.fft.dct(x.numpy(), type=kind, norm="ortho", axis=dim))
    r = max(1, n // 3)
    other = -1 if dim == -2 else -2
    for similarity in ("matmul", "fft"):
        full = dct.project(x, n, kind=kind, dim=dim, norm=1, similarity=similarity)[1]
        torch.testing.assert_close(full, expected, rtol=0, atol=1e-12)
        for norm in (1, 2):
            for batch in (x, torch.stack([x, x.flip(dim), x * x])):
                index, low = dct.project(batch, r, kind=kind, dim=dim, norm=norm,
                                         similarity=similarity)
                assert index.dtype == torch.int32
                for one, i, part in zip(batch.view(-1, *x.shape), index.view(-1, r),
                                        low.view(-1, *low.shape[-2:]), strict=True):
                    scipys = torch.from_numpy(
                        scipy.fft.dct(one.numpy(), type=kind, norm="ortho", axis=dim))
                    best = scipys.norm(norm, other).topk(r).indices.sort().values
                    assert i.tolist() == best.tolist()
                    torch.testing.assert_close(part, scipys.index_select(dim, best), rtol=0,
                                               atol=1e-12)


def test_cosine_bases_are_orthonormal_in_fp32():
    for kind in (2, 3):
        q = dct.rows(1024, kind, torch.float32, torch.device("cpu")).double()
        assert (q @ q.mT - torch.eye(1024, dtype=torch.float64)).abs().max() < 5e-7
    index = torch.tensor([0, 3, 5], dtype=torch.int32)
    q = dct.columns(index, 8, 2, torch.empty(0, dtype=torch.bfloat16))
    assert q.shape == (8, 3)
    assert q.dtype == torch.bfloat16
    assert dct.columns(index, 8, 2, torch.empty(0)).dtype == torch.float32  # no stale cache


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(3, 256), (5, 257), (4, 7), (1, 1), (2, 3, 300), (0, 5), (3, 0)])
def test_linear_quantizer_errs_by_half_a_step(bits, shape):
    for scale in (1e-30, 1.0, 1e30):
        (x,) = tensors([shape], 3, scale)
        codes, scales = quantize_linear_ref(x, bits)
        assert (tuple(codes.shape), tuple(scales.shape)) == code_shapes(shape, bits)
        back = dequantize_linear_ref(codes, scales, shape[-1], bits)
        levels = 127 if bits == 8 else 7
        for part, other in zip(x.split(256, -1), back.split(256, -1), strict=True):
            if part.numel():
                step = part.abs().amax(-1, keepdim=True) / levels
                assert ((part - other).abs() <= 0.5001 * step).all()
                assert torch.equal(part.abs().amax(-1), other.abs().amax(-1)) or bits == 8 or (
                    other.abs().amax(-1) / part.abs().amax(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_linear_quantizer_on_constants_zeros_and_outliers(bits):
    x = torch.zeros(4, 300)
    x[1] = -2.5
    x[2, 7] = 1e4
    x[3, ::2] = 3.0
    back = dequantize_linear_ref(*quantize_linear_ref(x, bits), 300, bits)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=0)
    odd = torch.tensor([[float("nan"), 1.0, *[0.0] * 254, 2.0]])
    back = dequantize_linear_ref(*quantize_linear_ref(odd, bits), 257, bits)
    assert back[0, 256] == 2.0
    assert back[0, :256].isnan().all()


def test_inner_rules_in_their_limits():
    """Momentum is torch's SGD; a factored second moment is exact where it has rank one."""
    (r,) = tensors([(4, 3)])
    o = {"betas": (0.9, 0.99), "eps": 0.0, "amsgrad": False, "state_bits": 32}
    p = torch.nn.Parameter(torch.zeros(4, 3))
    sgd = torch.optim.SGD([p], lr=1.0, momentum=0.9)
    s = {"momentum_buffer": torch.zeros(4, 3)}
    moved = torch.zeros(4, 3)
    for _ in range(3):
        p.grad = r.clone()
        sgd.step()
        n, factor = inner.RULES["momentum"].direction(r, s, o, 1, False)
        moved -= factor * n
    torch.testing.assert_close(moved, p.detach())
    s = {"momentum_buffer": torch.full((4, 3), 0.5)}  # Lion, a step after another
    for g in (r, -3.0 * r):
        m = s["momentum_buffer"].clone()
        n, factor = inner.RULES["lion"].direction(g.clone(), s, o, 1, False)
        assert torch.equal(factor * n, (0.9 * m + 0.1 * g).sign())
        torch.testing.assert_close(s["momentum_buffer"], 0.99 * m + 0.01 * g)
    outer = torch.outer(torch.rand(4) + 0.1, torch.rand(3) + 0.1)
    slots = {"exp_avg": (4, 3), "exp_avg_sq_row": (4, 1), "exp_avg_sq_col": (1, 3)}
    a = {k: torch.zeros(x) for k, x in slots.items()}
    b = {"exp_avg": torch.zeros(4, 3), "exp_avg_sq": torch.zeros(4, 3)}
    for t in (1, 2, 3):
        x, f = inner.RULES["factored"].direction(outer.clone(), a, o, t, False)
        y, h = inner.RULES["adamw"].direction(outer.clone(), b, o, t, False)
        torch.testing.assert_close(f * x, h * y, rtol=1e-5, atol=0)


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("name", inner.RULES)
def test_a_rule_widens_r(name, consume):
    """A projected gradient of 16 bits gives what it gives in fp32, and an fp32 direction."""
    r = tensors([(4, 3)])[0].bfloat16()
    rule, o = inner.RULES[name], {"betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": False,
                                  "state_bits": 32}
    results = []
    for given in (r.clone(), r.float()):
        s = {k: slot.empty() for k, slot in rule.slots((4, 3), r, o).items()}
        n, factor = rule.direction(given, s, o, 1, consume)
        results.append([n * factor, *s.values()])
        # a residual may write to it
        assert n.data_ptr() not in {x.data_ptr() for x in s.values()}
    assert all(x.dtype == torch.float32 and torch.equal(x, y)
               for x, y in zip(*results, strict=True))


def _skewed_slots(shape, p, o):
    return {"exp_avg": codec.moment(shape, p, o, 0),
            "exp_avg_sq": codec.moment(shape, p, o, 1, squared=True),
            "third_moment": codec.moment(shape, p, o, 2)}


def _skewed(r, s, o, t, consume):
    """Three averages with one weight; the direction is that of the first."""
    for name, power in (("exp_avg", 1), ("exp_avg_sq", 2), ("third_moment", 3)):
        s[name].lerp_(r**power, 1 - o["betas"][1])
    return s["exp_avg"].clone(), 1.0


@pytest.fixture
def skewed(monkeypatch):
    """GaLore with an inner rule that is no other's, of which the package knows only its entry."""
    monkeypatch.setitem(inner.RULES, "skewed", inner.Rule(
        _skewed_slots, _skewed, {"exp_avg": 1, "exp_avg_sq": 2, "third_moment": 3}))
    monkeypatch.setattr("lissom.optim.codec.SMALL", 1)
    Skewed = type("Skewed", (GaLoreAdamW,), {
        "options": {**GaLoreAdamW.options, "inner": choice("skewed", *inner.RULES)}})

    def trained(bits, beta=0.5, steps=4):
        p = torch.nn.Parameter(tensors([(12, 8)], 1)[0])
        optimizer = Skewed([p], rank=8, lr=1e-3, state_bits=bits, betas=(0.9, beta))
        for _ in range(steps):
            feed([p], 5)
            optimizer.step()
        return optimizer, p
    return trained


@pytest.mark.parametrize(("bits", "beta", "steps", "error", "bias"), [
    (32, 0.999, 30, 1e-5, 1e-5), (16, 0.999, 1000, 0.08, 0.02), (8, 0.5, 4, 0.02, 0.005),
    (4, 0.5, 4, 0.25, 0.15)])
def test_moments_of_a_new_rule_are_stored_as_all_are(skewed, bits, beta, steps, error, bias):
    """Rounded to nearest in 16 bits an average with beta 0.999 would stop at half of its way."""
    optimizer, p = skewed(bits, beta, steps)
    state = optimizer.state[p]
    r = p.grad @ state["basis_right"]
    s = codec.Decoded(state, optimizer._layouts[p], p)
    for name, power in (("exp_avg", 1), ("exp_avg_sq", 2), ("third_moment", 3)):
        assert state[name].dtype == {32: torch.float32, 16: torch.bfloat16}.get(bits, torch.uint8)
        assert (f"{name}.scale" in state) == (bits < 16)
        exact = (1 - beta**steps) * r**power
        assert (s[name] - exact).norm() <= error * exact.norm(), name
        assert abs((s[name] * exact).sum() / exact.square().sum() - 1) <= bias, name
    twin, q = skewed(bits, beta, 0)
    twin.load_state_dict(through_disk(optimizer.state_dict()))
    q.data.copy_(p.data)
    for x, o in ((p, optimizer), (q, twin)):
        feed([x], 6)
        o.step()
    assert_same(state, twin.state[q])


@pytest.mark.parametrize("bits", [16, 8])
def test_moments_of_a_new_rule_are_converted(skewed, bits):
    optimizer, p = skewed(32)
    other, q = skewed(bits, steps=0)
    converted = convert_state(optimizer.state_dict(), other)
    assert [row[1] for row in converted.rows] == ["kept"]
    other.load_state_dict(converted)
    exact = optimizer.state[p]["third_moment"]
    slots = slots_of(other, q, other.param_groups[0])
    kept = codec.Decoded(other.state[q], slots, q)["third_moment"]
    assert (kept - exact).norm() <= 0.02 * exact.norm()


def test_two_moments_are_rounded_by_different_bits(skewed):
    optimizer, p = skewed(16, steps=0)
    s = codec.Decoded(optimizer.state[p], optimizer._layouts[p], p)
    names = ("exp_avg", "exp_avg_sq", "third_moment")
    for name in names:
        s[name] = torch.full((12, 8), 1 + 2**-8)  # half way between two numbers of 16 bits
    codec.encode(s, s.kept, s.slots, optimizer.param_groups[0], 1)
    up = [s.kept[name] > 1 for name in names]
    assert all(24 < x.sum() < 72 for x in up)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(up, 2))


CPU = torch.device("cpu")


def test_codebooks():
    """The 8-bit ones are bitsandbytes' (values recorded from its 0.50.2)."""
    signed, unsigned = codebook(8, True, CPU), codebook(8, False, CPU)
    for book, ends in ((signed, [-0.9929687, -0.9789062, 0.9789062, 0.9929687, 1.0]),
                       (unsigned, [0.0, 3.25e-7, 0.9894531, 0.9964844, 1.0])):
        assert len(book) == 256
        assert torch.equal(book, book.sort().values)
        torch.testing.assert_close(book[[0, 1, -3, -2, -1]], torch.tensor(ends), rtol=1e-5, atol=0)
    assert (len(codebook(4, True, CPU)), len(codebook(4, False, CPU))) == (16, 16)
    assert codebook(4, False, CPU)[0] == 1 / 16


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 256), (5, 257), (4, 7), (1, 1), (2, 3, 300), (9,), (0, 5),
                                   (3, 0), (2, 1030)])
def test_dynamic_quantizer_takes_the_nearest(bits, signed, shape):
    for scale in (1e-30, 1.0, 1e30):
        x = tensors([shape], 3, scale)[0].pow(3 if scale == 1 else 1)
        x = x if signed else x.abs()
        codes, scales = quantize_dynamic_ref(x, bits, signed)
        assert (tuple(codes.shape), tuple(scales.shape)) == code_shapes(shape, bits)
        back = dequantize_dynamic_ref(codes, scales, shape[-1], bits, signed)
        book = codebook(bits, signed, CPU).double()
        for part, other in zip(x.split(256, -1), back.split(256, -1), strict=True):
            if part.numel():
                top = part.abs().amax(-1, keepdim=True).double()
                best = (part.double() / top).unsqueeze(-1).sub(book).abs().amin(-1)
                error = (part.double() - other.double()).abs() / top
                assert (error <= best + 1e-6).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_dynamic_quantizer_on_constants_zeros_outliers_and_nan(bits):
    x = torch.zeros(4, 300)
    x[1] = 2.5
    x[2, 7] = 1e4
    for signed in (True, False):
        back = dequantize_dynamic_ref(*quantize_dynamic_ref(x, bits, signed), 300, bits, signed)
        assert torch.equal(back[:2], x[:2])
        assert back[2, 7] == 1e4
        assert torch.equal(back[3], x[3])
        odd = torch.tensor([[float("nan"), 1.0, *[0.0] * 254, 2.0]])
        back = dequantize_dynamic_ref(*quantize_dynamic_ref(odd, bits, signed), 257, bits, signed)
        assert back[0, 256] == 2.0
        assert back[0, :256].isnan().all()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_read_alike_wherever_they_lie(signed):
    """Two at a time where memory allows it, one by one elsewhere."""
    codes = torch.randint(0, 256, (5, 9), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(2))
    scale = torch.rand(5, 1)
    expected = codebook(8, signed, CPU)[codes.long()] * scale
    for place in (codes, codes[1:], codes[:4], codes[1:4], codes[3:3], codes[:, :4], codes.mT[:5]):
        rows = place.shape[0]
        back = dequantize_dynamic_ref(place, scale[:1].expand(rows, 1), place.shape[1], 8, signed)
        assert torch.equal(back, codebook(8, signed, CPU)[place.long()] * scale[0])
    assert torch.equal(dequantize_dynamic_ref(codes, scale, 9, 8, signed), expected)


@pytest.mark.parametrize("projection", ["svd", "randomized", "subspace"])
@pytest.mark.parametrize("warm", [False, True])
def test_bases_do_not_follow_rounding_errors(projection, warm):
    """Singular values down to 1e-3 of the largest: their vectors are there to 1e-3.

    A gradient that was summed in another order (threads, ranks) then has the same basis; squares
    in fp32 turned its last columns by 0.3.
    """
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, 48, generator=generator)).Q for n in (96, 64))
    g = u * torch.logspace(0, -4, 48) @ v.mT
    start = torch.linalg.qr(v[:, :32] + 0.01 * torch.randn(64, 32, generator=generator)).Q
    old = start if warm else None
    one = project.find(g, 32, "right", projection, old, (0, 0), 1)
    noisy = g * (1 + 1e-7 * torch.randn(g.shape, generator=generator))
    other = project.find(noisy, 32, "right", projection, old, (0, 0), 1)
    assert (one * other).sum(0).abs().min() > 1 - 1e-6
    assert (one - other * (one * other).sum(0).sign()).norm(dim=0).max() < 1e-3
