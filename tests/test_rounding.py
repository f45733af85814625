"""Random bits are Philox, and what is rounded by them."""

from __future__ import annotations

import math

import pytest
import torch
from lissom.kernels.philox import (
    _bf16_ref,
    _fp16_ref,
    random_bits16_ref,
    stochastic_bf16_ref,
    stochastic_fp16_ref,
)
from lissom.optim import AdamW

from .helpers import parameters, run


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


@pytest.mark.parametrize(("rounding", "last"), [(_bf16_ref, 2.0**-7), (_fp16_ref, 2.0**-10)])
def test_of_all_random_bits_as_many_round_up_as_the_mean_asks_for(rounding, last):
    """Of a number that is exact none does; of one a little above it few do."""
    random = torch.arange(1 << 16, dtype=torch.int32)
    for sign in (1.0, -1.0):
        for kept in (1.0, 1 + last, 2 - last, 2.0**-9):
            for part in (0.0, 2.0**-13, 0.25, 1 - 2.0**-13):
                step = last * 2.0 ** math.floor(math.log2(kept))
                x = torch.full((1 << 16,), sign * (kept + part * step))
                rounded = rounding(x, random.clone())
                assert set(rounded.tolist()) <= {sign * kept, sign * (kept + step)}
                assert (rounded != sign * kept).double().mean() == part


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
