"""Gradients used up in the backward pass: equal to a step, clipped, refused."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from lissom.optim import (
    AdamW,
    GaLoreAdamW,
    PartialStepError,
    SwitchLoRAAdamW,
    adapter_groups,
    lora,
    update_in_backward,
)
from torch import nn

from .backward import SHAPES, backward, close, train
from .cases import Case, apollo, first_of_each_class, galore
from .helpers import assert_same, parameters, snapshot, through_disk

pytestmark = pytest.mark.usefixtures("quantize_small")


def update_cases() -> list[Case]:
    rows = [c for c in first_of_each_class() if c.make is not SwitchLoRAAdamW]
    return [*rows, galore(residual="error_feedback"), galore(state_bits=8), apollo(state_bits=4),
            galore(projection="dct", moments="rotate"), galore(proj_type="full")]


@pytest.mark.parametrize("case", update_cases(), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_equals_the_step(case, dtype):
    ps, qs = parameters(SHAPES, dtype=dtype), parameters(SHAPES, dtype=dtype)
    plain, other = case(ps, lr=1e-2), case(qs, lr=1e-2)
    handle = update_in_backward(other)
    for i in range(9):
        for o, xs in ((plain, ps), (other, qs)):
            o.param_groups[0]["lr"] = (torch.tensor if i % 2 else float)(1e-2 / (1 + i))
            backward(xs, i)
            if xs is qs:
                assert all(q.grad is None for q in qs)
                before = snapshot(o)
            o.step()
            if xs is qs:
                assert_same(before, snapshot(o))
            o.zero_grad()
    # one matrix at a time instead of a batch of equal shapes
    close(qs, ps, 1e-6 if case.make.waits and dtype == torch.float32 else
          1e-2 if case.make.waits else 0)
    saved = through_disk({"o": other.state_dict(), "w": [q.detach() for q in qs]})
    rs = [nn.Parameter(w) for w in saved["w"]]
    twin = case(rs, lr=0.5)
    twin.load_state_dict(saved["o"])
    handle.remove()
    train(other, qs, range(9, 12), 1)
    train(twin, rs, range(9, 12), 1)
    assert_same(snapshot(other), snapshot(twin))


def test_update_clips_each_tensor():
    ps, qs = parameters(SHAPES), parameters(SHAPES)
    plain, other = (AdamW(x, lr=1e-2) for x in (ps, qs))
    update_in_backward(other, max_grad_norm=0.5)
    for i in range(5):
        backward(ps, i)
        for p in ps:
            torch.nn.utils.clip_grad_norm_([p], 0.5)
        plain.step()
        plain.zero_grad()
        backward(qs, i)
        other.step()
    assert_same(snapshot(plain), snapshot(other))


def test_clipping_does_not_reach_gradients_that_flow_on():
    """Of a view's the gradient lies where that of the sum lies, which others get next."""
    results = []
    for attached in (False, True):
        torch.manual_seed(0)
        up, place = torch.nn.Linear(5, 6), torch.nn.Parameter(torch.randn(4, 6))
        ps = [*up.parameters(), place]
        optimizer = AdamW(ps, lr=1e-2)
        if attached:
            update_in_backward(optimizer, max_grad_norm=1e-3)
        for i in range(3):
            x = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(i))
            (0.1 * up(x) + place.unsqueeze(0)).tanh().square().mean().backward()
            for p in ps if not attached else ():
                torch.nn.utils.clip_grad_norm_([p], 1e-3)
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in ps])
    close(*results, 1e-6)


def test_update_refusals():
    ps = parameters(SHAPES)
    optimizer = AdamW(ps, lr=1e-2)
    for bad in (0, "1", math.inf):
        with pytest.raises((TypeError, ValueError), match="max_grad_norm="):
            update_in_backward(optimizer, max_grad_norm=bad)
    with pytest.raises(ValueError, match=r"nonfinite='skip'.*'raise'"):
        update_in_backward(AdamW(ps, nonfinite="skip"))
    with pytest.raises(TypeError, match="lissom"):
        update_in_backward(torch.optim.AdamW(ps))
    model = nn.Sequential(nn.Linear(6, 6))
    lora(model, 2)
    with pytest.raises(ValueError, match=r"SwitchLoRAAdamW exchanges.*step\(\)"):
        update_in_backward(SwitchLoRAAdamW(adapter_groups(model)))
    update_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: 0.0)
    backward(ps, 0)
    with pytest.raises(RuntimeError, match=r"second gradient.*project_in_backward"):
        backward(ps, 1)
    optimizer.zero_grad()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(sum(p.sum() for p in ps)).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler.*moved already"):
        scaler.step(optimizer)
    optimizer.step()
    for expected in (1, 0):
        for p in ps:
            p.grad = torch.ones_like(p)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert len(caught) == expected
        if caught:
            assert "no hook has seen" in str(caught[0].message)
            assert caught[0].filename == __file__


def test_update_after_loading_takes_a_gradient_again():
    ps = parameters(SHAPES)
    optimizer = AdamW(ps, lr=1e-2)
    update_in_backward(optimizer)
    saved, weights = optimizer.state_dict(), [p.detach().clone() for p in ps]
    saved = through_disk(saved)
    backward(ps, 0)
    first = [p.detach().clone() for p in ps]
    optimizer.load_state_dict(saved)
    for p, w in zip(ps, weights, strict=True):
        p.data.copy_(w)
    backward(ps, 0)
    assert_same(first, [p.detach() for p in ps])
    optimizer.step()


def test_update_raises_before_the_write():
    ps = parameters(SHAPES)
    optimizer = AdamW(ps, nonfinite="raise")
    update_in_backward(optimizer)
    before = snapshot(optimizer)
    with pytest.raises(FloatingPointError, match="parameter 0"):
        (ps[0] * float("nan")).sum().backward()
    assert_same(before, snapshot(optimizer))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failed_measurement_brings_no_gradient_back(when, monkeypatch):
    p = parameters([(6, 4)])[0]
    optimizer = GaLoreAdamW([p], rank=2, metrics=True)
    update_in_backward(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(f"lissom.optim.metrics.{when}", lambda *a: 1 / 0)
        with pytest.raises(PartialStepError if when == "after" else ZeroDivisionError):
            backward([p], 3)
    assert (p.grad is None) == (when == "after")
    optimizer.step()  # which applies what has not been
    assert int(optimizer.state[p]["step"]) == 1


def test_the_hooks_of_a_device_apply_its_own_means(monkeypatch):
    """Each device's hooks run in a thread of their own: those of two must not take one mean."""
    ps = [nn.Parameter(torch.zeros(2, device=d)) for d in ("cpu", "meta", "cpu", "meta")]
    handle = update_in_backward(AdamW(ps))
    applied: list[tuple[int, float]] = []
    sent: list[int] = []

    class Mean(NamedTuple):
        number: int

        def arrive(self):
            return float(self.number)

    def send(p, g):
        sent.append(number(p))
        return Mean(number(p))

    def number(p):
        return next(i for i, x in enumerate(ps) if x is p)

    monkeypatch.setattr(handle, "replicas", SimpleNamespace(
        send=send, compare=lambda optimizer: None, size=2))
    monkeypatch.setattr(handle, "finish_later", lambda: None)
    monkeypatch.setattr(handle, "_update", lambda p, mean: applied.append((number(p), mean)))
    for p, before in zip(ps, ([], [], [0], [0, 1]), strict=True):
        p.grad = torch.ones_like(p)
        handle.ready(p)
        assert [i for i, _ in applied] == before
    handle.finish()
    assert sent == [0, 1, 2, 3]
    assert sorted(applied) == [(i, float(i)) for i in range(4)]
