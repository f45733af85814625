"""Algebra of the parts: random bits, rounding, projections, memory of a step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lissom.bench.livebytes import LiveBytes
from lissom.kernels.philox import random_bits16_ref, stochastic_bf16_ref
from lissom.optim import AdamW, GaLoreAdamW, project

from .helpers import feed, parameters, run, tensors


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
        monkeypatch.setattr("lissom.optim.base._BLOCK", block)
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


def test_rotation_is_exact_where_columns_are_shared():
    (m,) = tensors([(5, 3)])
    v = m.square()
    basis = torch.eye(6)
    old, new = basis[:, [0, 2, 4]], basis[:, [4, 1, 0]]
    a, b = project.rotate(m, v, (None, old), (None, new))
    zero = torch.zeros(5)
    assert torch.equal(a, torch.stack([m[:, 2], zero, m[:, 0]], -1))
    assert torch.equal(b, torch.stack([v[:, 2], zero, v[:, 0]], -1))
    a, _ = project.rotate(m.mT, v.mT, (old, None), (new, None))
    assert torch.equal(a, torch.stack([m[:, 2], zero, m[:, 0]]))


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
    for i in range(2):
        feed(ps, i)
        with LiveBytes() as live:
            optimizer.step()
        assert 0 < live.peak <= 3 * 2048 * 512 * 4


def test_uninitialized_memory_is_never_read(monkeypatch):
    """torch.empty and its kin give NaN; nothing of it may reach a weight."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _real=real, **k: _real(*a, **k).fill_(math.nan))
    for make in (lambda ps: AdamW(ps), lambda ps: GaLoreAdamW(ps, rank=3, moments="rotate")):
        ps = parameters([(7, 5), (5, 7), (4,)])
        run(make(ps), ps, range(3))
        assert all(np.isfinite(p.detach().numpy()).all() for p in ps)
