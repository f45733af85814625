"""Memory of a step beside its state: how much, and none of it read before it is written."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from lissom.bench.livebytes import LiveBytes
from lissom.optim import (
    APOLLO,
    FRUGAL,
    AdamW,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    Trion,
)

from .helpers import feed, parameters, run


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
    FiraAdamW, DCTAdamW, Trion, APOLLO, FRUGAL, functools.partial(DCTAdamW, similarity="matmul"),
    GradNormLoRPAdamW, functools.partial(GradNormLoRPAdamW, axis="output"),
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


@pytest.mark.parametrize(("make", "most"), [
    (GaLoreAdamW, 0.5), (FiraAdamW, 0.5), (APOLLO, 0.5), (FRUGAL, 1.25), (GradNormLoRPAdamW, 1.5),
    (DCTAdamW, 1.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_between_refreshes_no_matrix_is_copied(make, most, dtype):
    """But by FRUGAL for signs and by GradNormLoRP for D; a cosine transform is at every step."""
    (p,) = parameters([(4096, 512)], dtype=dtype)
    optimizer = make([p], rank=64)
    feed([p], 0)
    optimizer.step()
    feed([p], 1)
    with LiveBytes() as live:
        optimizer.step()
    assert 0 < live.peak <= most * 4096 * 512 * 4


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
