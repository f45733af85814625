"""Requests for functions of whole matrices: which are answered together, and resumed between."""

from __future__ import annotations

import torch
from lissom.optim import Muon, PolarGrad, Trion, whole

from .helpers import assert_same, feed, parameters, run, snapshot, tensors


def test_requests_of_a_shape_are_answered_by_one_call():
    calls = []

    def double(x):
        calls.append(tuple(x.shape))
        return 2 * x

    def update(x, out):
        first, second = yield whole.Whole((x, x.mT), double)
        (third,) = yield whole.Whole((first,), double)
        out.append((x, first, second, third))

    out = []
    xs = tensors([(3, 2), (3, 2), (2, 3), (2, 3, 2)])
    order = list(whole.answered([update(x, out) for x in xs]))
    assert order == [0, 1, 2, 3]
    for x, first, second, third in out:
        assert torch.equal(first, 2 * x)
        assert torch.equal(second, 2 * x.mT)
        assert torch.equal(third, 4 * x)
    assert sorted(calls) == sorted([(5, 3, 2), (5, 2, 3), (4, 3, 2), (1, 2, 3)]) or len(calls) == 4


def test_requests_of_a_shape_that_are_unlike_are_answered_apart():
    """Of another function, or in another dtype."""
    def update(x, factor, out):
        (y,) = yield whole.Whole((x,), functions[factor])
        out.append((x, factor, y))

    functions = {2: lambda x: 2 * x, 3: lambda x: 3 * x}
    out = []
    asked = [(x.to(kind), factor) for x in tensors([(3, 2), (3, 2)]) for factor in (2, 3)
             for kind in (torch.float32, torch.bfloat16)]
    list(whole.answered([update(x, factor, out) for x, factor in asked]))
    assert len(out) == len(asked)
    for x, factor, y in out:
        assert y.dtype == x.dtype
        assert torch.equal(y, factor * x)


def test_resume_in_the_middle_of_a_window():
    for make in (Muon, PolarGrad, Trion):
        more = {"rank": 3} if make is Trion else {}
        ps, qs = parameters([(8, 6)] * 3), parameters([(8, 6)] * 3)
        a, b = make(ps, **more), make(qs, **more)
        run(a, ps, range(3))
        run(b, qs, range(2))
        saved = b.state_dict()
        c = make(qs, **more)
        c.load_state_dict(saved)
        feed(qs, 102)
        c.step()
        assert_same(snapshot(a)["weights"], snapshot(c)["weights"])
