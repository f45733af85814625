"""Inner rules: their limits, and what is kept of a new one."""

from __future__ import annotations

import itertools

import pytest
import torch
from lissom.optim import GaLoreAdamW, codec, convert_state, inner
from lissom.optim.layouts import slots_of
from lissom.optim.options import choice

from .helpers import assert_same, feed, tensors, through_disk


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
