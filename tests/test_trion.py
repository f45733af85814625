"""Trion: official trajectories, either side, its momentum and its dense part."""

from __future__ import annotations

import warnings

import pytest
import torch
from lissom.optim import Trion

from .golden import follow, load, needs_golden, worst
from .helpers import cosines, feed, parameters, tensors


@needs_golden
@pytest.mark.parametrize("shape", ["16x24", "24x16"])
def test_official_trion(shape):
    case, start, gradients, weights = load(f"trion_{shape}_kj")
    p = torch.nn.Parameter(start.clone())
    optimizer = Trion([p], lr=case["lr"], rank=case["rank"], weight_decay=case["weight_decay"],
                      momentum=case["momentum"], ns_steps=case["ns_steps"],
                      dct_basis=3 if start.shape[0] >= start.shape[1] else 2)
    assert worst(follow(optimizer, p, gradients), weights, start) < 2e-2


@pytest.mark.parametrize("dct_basis", [2, 3])
def test_trion_transposes_with_its_matrix(dct_basis):
    """The released code projects wide matrices on another basis than tall ones."""
    tall = torch.nn.Parameter(tensors([(9, 5)])[0])
    wide = torch.nn.Parameter(tall.detach().mT.clone())
    options = {"rank": 3, "dct_basis": dct_basis, "adjust_lr_fn": "unscaled",
               "polar_dtype": "float32"}
    a, b = Trion([tall], **options), Trion([wide], **options)
    for i in range(4):
        g = tensors([(9, 5)], i)[0]
        tall.grad, wide.grad = g, g.mT.clone()
        a.step()
        b.step()
        torch.testing.assert_close(tall.detach(), wide.detach().mT, rtol=0, atol=1e-5)


def test_trion_momentum_keeps_what_was_not_taken():
    (p,) = parameters([(9, 5)])
    optimizer = Trion([p], rank=2, momentum=0.9)
    feed([p], 1)
    g = p.grad.clone()
    optimizer.step()
    b, m = cosines(g), cosines(optimizer.state[p]["momentum_buffer"])
    ratio = (m / b).mean(0)
    taken = b.abs().sum(0).topk(2).indices
    expected = torch.ones(5)
    expected[taken] = 0.9
    torch.testing.assert_close(ratio, expected, rtol=1e-4, atol=1e-4)


def test_trion_dense_part_has_its_own_rate():
    ps = parameters([(6, 4), (4,)])
    optimizer = Trion(ps, rank=2)
    assert {g["lr"] for g in optimizer.param_groups} == {0.02, 3e-4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.plan()
