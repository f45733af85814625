"""PolarGrad: official trajectories and limits."""

from __future__ import annotations

import pytest
import torch
from lissom.optim import Muon, PolarGrad
from lissom.optim.polar import METHODS

from .golden import follow, load, needs_golden, worst
from .helpers import parameters, run, tensors


@needs_golden
@pytest.mark.parametrize("shape", ["16x24", "24x16"])
@pytest.mark.parametrize(("name", "limit"), [
    ("ns5_momentumfirst", 4e-2), ("polar_express5_momentumfirst", 4e-2),
    ("qdwh2_momentumfirst", 1e-5), ("qdwh2_polarfirst", 1e-5), ("qdwh6_momentumfirst", 1e-5),
    ("qdwh6_polarfirst", 1e-5), ("zolo-pd2_momentumfirst", 1e-5)])
def test_official_polargrad(name, limit, shape):
    case, start, gradients, weights = load(f"polargrad_{name}_{shape}")
    p = torch.nn.Parameter(start.clone())
    method = {"ns": "newton-schulz", "polar_express": "polar-express"}.get(
        case["polar_method"], case["polar_method"])
    optimizer = PolarGrad([p], lr=case["lr"], weight_decay=case["weight_decay"],
                          momentum=case["momentum"], polar_first=case["polar_first"],
                          polar=method, polar_steps=case["inner_steps"],
                          lower_bound="eps" if method == "qdwh" else None)
    assert worst(follow(optimizer, p, gradients), weights, start) < limit


def test_polargrad_on_rank_one_is_gradient_descent():
    """sigma u v^T has nuclear norm sigma and polar factor u v^T.

    What rounding leaves of the other singular values, 1e-8, the polynomials bring to 1e-5.
    """
    x, y = tensors([(7, 1), (1, 5)])
    for method, limit in (("svd", 1e-6), ("polar-express", 1e-3), ("newton-schulz", 1e-2)):
        (p,) = parameters([(7, 5)])
        q = torch.nn.Parameter(p.detach().clone())
        p.grad, q.grad = x @ y, x @ y
        PolarGrad([p], lr=0.1, momentum=None, weight_decay=0.0, polar=method,
                  polar_dtype="float32").step()
        torch.optim.SGD([q], lr=0.1).step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_polar_first_in_half_precision(dtype):
    """The released code crashes there."""
    for method in METHODS:
        ps = parameters([(9, 6), (6, 9)], dtype=dtype)
        start = [p.detach().clone() for p in ps]
        run(PolarGrad(ps, lr=1e-2, polar_first=True, polar=method), ps, range(3))
        for p, w in zip(ps, start, strict=True):
            assert p.isfinite().all()
            assert not torch.equal(p, w)


def test_update_vanishes_with_the_gradient():
    """f = |X - T|^2 / 2 at a constant rate: PolarGrad arrives, Muon circles around."""
    (target,) = tensors([(12, 8)])
    gaps = {}
    for name, make in (("polargrad", PolarGrad), ("muon", Muon)):
        p = torch.nn.Parameter(torch.zeros(12, 8))
        options = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "polar": "qdwh"}
        optimizer = make([p], **options)
        for _ in range(200):
            p.grad = p.detach() - target
            optimizer.step()
        gaps[name] = (p.detach() - target).norm().item()
    assert gaps["polargrad"] < 1e-4
    assert gaps["muon"] > 1e-2


def test_momentum_may_be_scheduled_from_zero():
    (p,) = parameters([(6, 4)])
    optimizer = PolarGrad([p], momentum=0.0)
    for momentum in (0.0, 0.5, 0.0, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        run(optimizer, [p], range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert int(optimizer.state[p]["step"]) == 4
