"""GradNormLoRP on weights and on pairs: directions, limits, bad input."""

from __future__ import annotations

import pytest
import torch
from lissom.optim import GradNormLoRPAdamW, adapter_groups, lora, merge
from torch import nn
from torch.nn import functional

from . import oracle
from .helpers import tensors
from .pairs import batch, net, pair


def test_a_column_of_zeros_is_no_trap():
    linear = nn.Linear(6, 8)
    linear.weight.data[:, 2] = 0
    model = lora(nn.Sequential(linear, nn.Linear(8, 8)), 3, init="lora", normalize="input")
    optimizer = GradNormLoRPAdamW(adapter_groups(model, rank=2), lr=0.1)
    x = tensors([(5, 6)])[0]
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    w = nn.Parameter(torch.randn(8, 6))
    w.data[:, 2] = 0
    optimizer = GradNormLoRPAdamW([w], rank=2, lr=0.1)
    for i in range(3):
        w.grad = tensors([(8, 6)], i)[0]
        optimizer.step()
        if i == 0:  # the low-rank update as it is
            s = optimizer.state[w]
            u = 0.25 * s["exp_avg"].sign() @ s["basis_right"].mT
            torch.testing.assert_close(w.detach()[:, 2], -0.1 * u[:, 2], rtol=1e-5, atol=0)
    assert w.isfinite().all()
    assert w[:, 2].any()


# ---- on weights


def test_a_step_to_zero_has_a_direction_of_rounding_and_a_finite_length():
    """A weight put where the step of the momentum ends at zero, as far as fp32 can tell."""
    p = nn.Parameter(tensors([(4, 60)])[0])
    optimizer = GradNormLoRPAdamW([p], rank=4, lr=0.1, scale=0.25, weight_decay=0.0,
                                  projection="svd")
    p.grad = tensors([(4, 60)], 1)[0]
    optimizer.step()
    s = optimizer.state[p]
    n = 0.09 / 0.19 / (0.000999 / 0.001999) ** 0.5  # of an entry's second step without a gradient
    with torch.no_grad():
        p.copy_(0.1 * 0.25 * n * s["basis_left"] @ s["exp_avg"].sign())
    before = p.detach().norm(dim=0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert p.isfinite().all()
    assert (p.detach().norm(dim=0) < before + 0.2).all()


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e15, 1e30])
def test_a_step_of_any_length(size, axis):
    """With a rule whose step is as long as its gradient, squares of which leave fp32's range.

    Magnitudes stay, as Adam's second moment has the same range.
    """
    ends = []
    for dtype in (torch.float64, torch.float32):
        p = nn.Parameter(tensors([(9, 7)])[0].to(dtype))
        optimizer = GradNormLoRPAdamW([p], rank=3, lr=0.1, weight_decay=0.0, inner="momentum",
                                      axis=axis, projection="svd", update_proj_gap=2,
                                      magnitude_scale=0.0)
        for i in range(3):
            p.grad = size * tensors([(9, 7)], i + 1)[0].to(dtype)
            optimizer.step()
        ends.append(p.detach().double())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-5)


# ---- on pairs


def test_factors_without_a_partner_are_refused():
    _, a, b, _ = pair()
    for params, words in (([("l.A", a)], r"1 parameters with roles=\('A', 'B'\).*partner"),
                          ([("l.B", b), ("l.A", a)], r"l\.B: A and B have shapes \[\(9, 3\)"),
                          ([("l.A", a), ("l.B", nn.Parameter(b.data.double()))],
                           r"l\.A: A is torch.float32 and B torch.float64")):
        with pytest.raises(ValueError, match=words):
            GradNormLoRPAdamW([{"params": params, "roles": ("A", "B")}], rank=2)


@pytest.mark.parametrize("axis", ["input", "output"])
def test_gradnormlorp_trains_factors_and_magnitudes(axis, monkeypatch):
    monkeypatch.setattr("lissom.optim.codec.SMALL", 1)
    model = net(init="lora", normalize=axis)
    model.requires_grad_(False)
    for layer in (model.up, model.down, model.square):
        for p in (layer.lora_A, layer.lora_B, layer.magnitude):
            p.requires_grad_(True)
    groups = adapter_groups(model, rank=2, proj_type="full")
    optimizer = GradNormLoRPAdamW(groups, lr=1e-2, state_bits=8, scale=1.0)
    plan = optimizer.plan()
    assert plan["up.lora_A"].rank == 2
    assert plan["up.lora_A"].side == "full"
    assert plan["up.magnitude"].rule == "adamw"
    losses = []
    x, y = batch(0)
    for _ in range(40):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    out = model(x).detach()
    assert torch.allclose(merge(model)(x), out, atol=1e-5)


def test_factors_are_projected_as_galore_projects():
    """Reading B is GaLore on each factor."""
    model = net(init="lora", normalize="input")
    ours = GradNormLoRPAdamW(adapter_groups(model, rank=2, projection="svd"), lr=1e-2)
    group = next(g for g in ours.param_groups if g["roles"] == ("A", "B"))
    start = [p.detach().clone() for p in group["params"]]
    gradients = [tensors([p.shape for p in group["params"]], i) for i in range(5)]
    for row in gradients:
        for p, g in zip(group["params"], row, strict=True):
            p.grad = g
        ours.step()
    for i, (p, w) in enumerate(zip(group["params"], start, strict=True)):
        want = oracle.lowrank(w, [row[i] for row in gradients], rank=2, update_proj_gap=200,
                              lr=1e-2)[-1]
        assert (p.detach().double() - want).norm() < 2e-4 * (want - w.double()).norm()
