"""A step of every row of cases.py: all or nothing, no side effects, its arithmetic."""

from __future__ import annotations

import warnings

import pytest
import torch
from lissom.optim import PartialStepError, metrics

from .cases import CONTRACT, SHAPES
from .helpers import (
    assert_same,
    feed,
    moments,
    named,
    run,
    snapshot,
    tensors,
    through_disk,
    trained,
)

pytestmark = CONTRACT


# ---- all or nothing, side effects


def test_nonfinite(case):
    for value in (float("nan"), float("inf"), -float("inf")):
        for mode in ("skip", "raise", "propagate"):
            ps = case.parameters([(6, 4), (4, 6), (4,)])
            optimizer = case(named(ps), nonfinite=mode)
            feed(ps, 0)
            optimizer.step()
            before = snapshot(optimizer)
            feed(ps, 1)
            ps[1].grad[1, 2] = value
            if mode == "raise":
                with pytest.raises(FloatingPointError, match="'p1'"):
                    optimizer.step()
                assert_same(before, snapshot(optimizer))
            elif mode == "skip":
                optimizer.step()
                assert optimizer.skipped_steps == 1
                after = snapshot(optimizer)
                for part in ("state", "weights"):
                    assert_same(before[part], after[part])
                ps[1].grad = torch.ones_like(ps[1])
                optimizer.step()
                assert optimizer.skipped_steps == 1
                twin = case(case.parameters([(6, 4), (4, 6), (4,)]))
                twin.load_state_dict(through_disk(
                    {**optimizer.state_dict(), "param_groups": [
                        {k: v for k, v in g.items() if k != "param_names"}
                        for g in optimizer.state_dict()["param_groups"]]}))
                assert twin.skipped_steps == 1
            else:
                for k in range(2, 7):  # refreshes fall into these steps
                    optimizer.step()
                    feed(ps, k)
                    ps[1].grad[1, 2] = value
                assert not ps[1].isfinite().all()
                assert ps[0].isfinite().all()


def test_failure_in_the_middle_names_what_moved(case, monkeypatch):
    ps = case.parameters([(6, 4), (4, 6), (4,)])
    optimizer = case(named(ps), **case.still)
    run(optimizer, ps, range(2))
    feed(ps, 5)
    before = snapshot(optimizer)
    inner = type(optimizer)._step_batch
    # One after the other, also where they wait.
    monkeypatch.setattr("lissom.optim.batches._WINDOW", 1)

    def fails(self, batch):
        if batch[0].p is ps[1]:
            raise torch.OutOfMemoryError("no memory")
        yield from inner(self, batch)

    monkeypatch.setattr(type(optimizer), "_step_batch", fails)
    # those that wait come after those that do not
    moved = "2 parameters.*: p2, p0$" if case.make.waits else "1 parameters.*: p0$"
    with pytest.raises(PartialStepError, match=f"'p1'.*no memory.*{moved}") as error:
        optimizer.step()
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    after = snapshot(optimizer)
    for part in ("state", "weights"):
        still = slice(1, 2) if case.make.waits else slice(1, None)
        assert_same(before[part][still], after[part][still])


@pytest.mark.parametrize("when", ["before", "after"])
def test_failure_of_a_measurement_names_what_moved(case, monkeypatch, when):
    ps = case.parameters([(6, 4), (4, 6), (4,)])
    optimizer = case(named(ps), metrics=True, **case.still)
    run(optimizer, ps, range(2))
    feed(ps, 5)
    monkeypatch.setattr("lissom.optim.batches._WINDOW", 1)
    inner = getattr(metrics, when)

    def fails(optimizer, window, *copies):
        if window[0].p is ps[1]:
            raise torch.OutOfMemoryError("no memory")
        return inner(optimizer, window, *copies)

    monkeypatch.setattr(f"lissom.optim.metrics.{when}", fails)
    how = "not" if when == "before" else "wholly"
    with pytest.raises(PartialStepError, match=f"'p1'.*no memory.*{how} updated") as error:
        optimizer.step()
    assert ("p1" in str(error.value).partition("had been updated")[2]) == (when == "after")


def test_failure_while_updates_wait_changes_nothing(case, monkeypatch):
    if not case.make.waits:
        pytest.skip("its updates do not wait for each other")
    ps = case.parameters([(6, 4), (6, 4), (4, 6)])
    optimizer = case(ps)
    run(optimizer, ps, range(2))
    feed(ps, 5)
    before = snapshot(optimizer)
    monkeypatch.setattr("lissom.optim.polar.Oracle.__call__", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert_same(before, snapshot(optimizer))


def test_alone_or_in_a_batch(case, monkeypatch):
    """Parameters of a shape may be computed together: same result as one after the other."""
    shapes = [(6, 4), (4, 6), (6, 4), (3, 6, 4), (6, 4)]
    results = []
    for window in (1, 1 << 24):
        monkeypatch.setattr("lissom.optim.batches._WINDOW", window)
        ps = case.parameters(shapes)
        optimizer = case(ps, lr=1e-2)
        run(optimizer, ps, range(5))
        results.append([p.detach() for p in ps])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if not case.make.waits else (
            1e-3 if case.option("polar_dtype") == "bfloat16" else 1e-5))


def test_nothing_else_is_touched(case, capfd):
    ps = case.parameters(SHAPES)
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    optimizer = case(ps)
    for i in range(6):
        feed(ps, i)
        grads = [p.grad.clone() for p in trained(ps)]
        optimizer.step()
        for p, g in zip(trained(ps), grads, strict=True):
            assert torch.equal(p.grad, g)
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not torch.distributed.is_initialized()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# ---- arithmetic


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_zero_gradient_moves_only_decay(case, weight_decay):
    ps = case.parameters(SHAPES)
    optimizer = case(ps, lr=1e-2, weight_decay=weight_decay, **case.still)
    for _ in range(5):
        before = [p.detach().clone() for p in ps]
        for p in trained(ps):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p, b in zip(ps, before, strict=True):
            keep = 1 - 1e-2 * weight_decay if p.requires_grad else 1
            torch.testing.assert_close(p.detach(), b * keep, rtol=2e-7, atol=0)


def test_decay_alone_moves_16_bit_weights(case):
    """By 1e-4 at a step, a fortieth of bf16's spacing below 1: to nearest nothing would move."""
    ps = case.parameters([(40, 30)], dtype=torch.bfloat16)
    for p in ps:
        p.detach().fill_(1.0)
    optimizer = case(ps, lr=1e-2, weight_decay=1e-2, rounding="stochastic", **case.still)
    for _ in range(40):
        for p in trained(ps):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p in trained(ps):
        # weights that were rounded down, and five standard errors of their number
        expected = 40 * 1e-4 * p.numel() * 2**8
        assert abs((1 - p.float()).sum().item() * 2**8 - expected) < 5 * expected**0.5


def test_lr_zero_moves_nothing(case):
    ps = case.parameters(SHAPES)
    optimizer = case(ps, lr=0.0)
    before = [x.detach().clone() for x in case.effective(ps)]
    run(optimizer, ps, range(5))
    for a, b in zip(before, case.effective(ps), strict=True):
        # switches keep what the model computes with, up to rounding
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=2e-6 if case.still else 0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_extreme_gradients(case, scale):
    tolerance = 2e-3 if case.same_arithmetic() or case.option("state_bits") == 32 else 0.3
    if case.option("polar_dtype") == "bfloat16":
        tolerance = 0.3
    # A rule that follows the gradient's scale starts from zero, where no update is too small.
    zero = case.scaling == "linear"
    ps = [torch.nn.Parameter(p * (not zero)) for p in case.parameters([(7, 5), (5, 7), (4,)])]
    more = {"weight_decay": 0.0, "eps": 0.0 if scale >= 1e-12 else 1e-8, **case.still}
    if case.options.get("proj_type") == "full":
        # P^T G Q is diagonal at the first step, and the rounding beside it counts in full if eps
        # is 0: two scales round differently. What is rounded to 0 would give 0 / 0.
        tolerance, more["eps"] = 0.3, more["eps"] or 1e-30
    optimizer = case(ps, lr=1e-2, **more)
    run(optimizer, ps, range(6), scale)
    qs = [torch.nn.Parameter(p * (not zero)) for p in case.parameters([(7, 5), (5, 7), (4,)])]
    start = [p.detach().clone() for p in qs]
    twin = case(qs, lr=1e-2, **more)
    run(twin, qs, range(6), 1.0)
    for p, q, w in zip(ps, qs, start, strict=True):
        if not p.requires_grad:
            assert torch.equal(p, w)
            continue
        assert p.isfinite().all()
        moved, reference = (p - w).double().norm(), (q - w).double().norm()
        rule = case.scaling if p.ndim > 1 and p.shape[0] != 4 else "adam"
        if rule == "linear":
            assert abs(moved / (reference * scale) - 1) < tolerance
        elif rule == "sign":
            assert abs(moved / reference - 1) < tolerance or scale in (1e30, 1e-30)
            assert 0.3 < moved / reference < 3
        elif scale < 1e-12:  # epsilon is far above the gradient
            assert moved < 1e-15 * reference
        elif scale < 1e20:
            assert abs(moved / reference - 1) < tolerance
        else:  # squares are out of range: entries count by their sign, at full size
            assert 0.3 < moved / reference < 3
    for s in optimizer.state.values():
        assert all(v.isfinite().all() for v in s.values())


def test_fp16_gradients_near_the_largest(case):
    """Sums of them are out of fp16's range."""
    ps = case.parameters([(8, 6), (6, 8), (4,)], dtype=torch.float16)
    optimizer = case(ps)
    for i in range(3):
        feed(ps, i)
        for p in trained(ps):
            p.grad.sign_().mul_(6e4)
        optimizer.step()
    assert all(p.isfinite().all() for p in ps)
    assert all(x.isfinite().all() for s in optimizer.state.values() for x in s.values())


def test_every_shape_does_a_documented_thing(case):
    ps = case.parameters(SHAPES)
    optimizer = case(ps)
    ps = [p for g in optimizer.param_groups for p in g["params"]]
    start = [p.detach().clone() for p in ps]
    run(optimizer, ps, range(3))
    for row, p, before in zip(optimizer.plan(), ps, start, strict=True):
        assert row.shape == tuple(p.shape)
        assert row.reason
        if p.numel() and p.requires_grad:
            assert not torch.equal(p, before)
            assert p.isfinite().all()


def test_plan_counts_bytes_exactly(case):
    for dtype in (torch.float32, torch.bfloat16):
        ps = case.parameters(SHAPES, dtype=dtype)
        ps[3].requires_grad_(False)
        optimizer = case(ps)
        held = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
        assert optimizer.plan().state_bytes == held
        assert f"{held:,} bytes" in str(optimizer.plan())


def test_memory_formats_and_views(case):
    start = tensors([(8, 6, 3, 3)])[0]
    weights = [torch.nn.Parameter(start.clone().to(memory_format=f))
               for f in (torch.contiguous_format, torch.channels_last)]
    flat = case.parameters([(9, 6)])
    copies = (p.detach().clone() for p in flat)
    across = [torch.nn.Parameter(x.mT.contiguous().mT if x.ndim > 1 else x) for x in copies]
    # P^T D Q is diagonal at a refresh: the rest is rounding, which only eps holds down.
    more = {"eps": 1e-2} if case.options.get("proj_type") == "full" else {}
    for left, right in (([weights[0]], [weights[1]]), (across, flat)):
        for ps in (left, right):
            optimizer = case(ps, lr=1e-2, **more)
            for i in range(5):
                # not the seed of the weights: a gradient along them has no direction part
                for p, g in zip(ps, tensors([p.shape for p in ps], 10 + i), strict=True):
                    if p.requires_grad:
                        p.grad = torch.empty_like(p).copy_(g)
                optimizer.step()
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
            assert a.ndim < 2 or a.stride() != b.stride()


def test_every_moment_is_rounded_by_bits_of_its_own(case):
    ps = case.parameters([(9, 6), (5,)])
    optimizer = case(ps)
    for p in optimizer.state:
        streams = [optimizer._layouts[p][name].stream for name in moments(optimizer, p)]
        assert len(set(streams)) == len(streams)
        assert all(0 <= x < 64 for x in streams)


def test_bf16_weights_keep_fp32_moments(case):
    ps = case.parameters([(9, 6)], dtype=torch.bfloat16)
    optimizer = case(ps, lr=1e-2)
    run(optimizer, ps, range(3))
    bits = optimizer.param_groups[0]["state_bits"]
    state = optimizer.state[ps[0]]
    for name in moments(optimizer, ps[0]):
        assert state[name].dtype == {32: torch.float32, 16: torch.bfloat16}.get(bits, torch.uint8)
        assert (f"{name}.scale" in state) == (bits < 16)
    twin = case(case.parameters([(9, 6)], dtype=torch.bfloat16))
    twin.load_state_dict(through_disk(optimizer.state_dict()))
    assert_same(snapshot(optimizer)["state"], snapshot(twin)["state"])


def test_equals_its_oracle(case):
    if not case.same_arithmetic():
        pytest.skip("its arithmetic is random or quantized: see test_rounding and test_quantizers")
    if case.roles:
        pytest.skip("pairs have oracles in test_switchlora and test_gradnormlorp")
    for shape in [(7, 5), (5, 7), (6, 6), (4, 3, 2)]:
        for more in ({}, {"maximize": True, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}):
            (p,) = case.parameters([shape], 1)
            # Leading singular values far apart, so that every projection finds the same space;
            # one refresh only where the basis is not the SVD's own, signs included.
            options = {**case.options, **more, "lr": 1e-2}
            exact = case.option("projection") in ("svd", "dct", None)
            if options.get("proj_type") == "full":
                # P^T G Q is diagonal at a refresh: the rest is rounding, which only eps holds down.
                options["eps"] = 1e-2
            if case.option("update_proj_gap"):
                options["update_proj_gap"] = case.option("update_proj_gap") if exact else 100
                options["refresh"] = "synchronous"
            gradients = []
            for i in range(7):
                g = tensors([shape], 50 + i)[0].flatten(1)
                u, s, vh = torch.linalg.svd(g, full_matrices=False)
                gradients.append((u * (s * 0.3 ** torch.arange(len(s)))) @ vh)
            gradients = [g.view(shape) for g in gradients]
            expected = case.oracle(p.detach(), gradients, **options)
            optimizer = case.make([p], **options)
            start = p.detach().clone()
            for g, w in zip(gradients, expected, strict=True):
                p.grad = g
                optimizer.step()
                error = (p.detach().double() - w).norm() / (w - start.double()).norm()
                # With another basis of the same space Adam's direction differs in the last
                # singular vectors' rounding only when the vectors agree, up to sign.
                assert error < (2e-4 if exact else 2e-2), (shape, more)


def test_warns_only_when_it_should(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case(case.parameters([(6, 4), (3,)]))


# ---- what broke once


def test_a_failure_says_what_is_partly_written(case, monkeypatch):
    ps = case.parameters([(8, 6)])
    optimizer = case(named(ps), **case.still)
    run(optimizer, ps, range(1))
    feed(ps, 1)

    def fails(*args, **kwargs):
        optimizer.state[ps[0]]["step"].add_(0)
        raise torch.OutOfMemoryError("no memory")
        yield

    monkeypatch.setattr(type(optimizer), "_step_batch", fails)
    with pytest.raises(PartialStepError, match=r"'p0'.*partly updated; 0 parameters"):
        optimizer.step()
    monkeypatch.setattr(type(optimizer), "_step_batch", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()


def test_seeds_differ_in_their_upper_half(case):
    results = []
    for seed in (0, 1 << 32, 1 << 40):
        ps = case.parameters([(60, 9)], dtype=torch.bfloat16)
        optimizer = case(ps, seed=seed, rounding="stochastic")
        run(optimizer, ps, range(2))
        results.append(ps[0].detach())
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
