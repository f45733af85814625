"""Gradients projected in the backward pass: equal to the ordinary path, clipped, saved."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from typing import Any

import pytest
import torch
from lissom.optim import (
    APOLLO,
    AdamW,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GradNormLoRPAdamW,
    Muon,
    PartialStepError,
    PolarGrad,
    Trion,
    adapter_groups,
    lora,
    project_in_backward,
    update_in_backward,
)
from lissom.optim.codec import Decoded
from torch import nn

from .backward import SHAPES, backward, close, train
from .cases import Case, dctadamw, galore, gradnormlorp
from .helpers import assert_same, parameters, snapshot, tensors, through_disk

pytestmark = pytest.mark.usefixtures("quantize_small")


def low_rank_cases() -> list[Case]:
    options: list[dict[str, Any]] = [
        {}, {"projection": "svd"}, {"projection": "randomized"}, {"projection": "random"},
        {"projection": "dct"}, {"projection": "dct", "moments": "rotate"}, {"moments": "rotate"},
        {"moments": "reset"}, {"proj_type": "full"}, {"proj_type": "left"},
        {"proj_type": "reverse_std"}, {"state_bits": 8}, {"state_bits": 4}, {"basis_bits": 8},
        {"keep_energy": 0.9}, {"inner": "lion"}, {"inner": "factored"}, {"inner": "momentum"},
        {"matricize": "batch"}, {"maximize": True}, {"amsgrad": True}]
    cases = [galore(**x) for x in options]
    cases += [Case("galore8bit", GaLoreAdamW8bit, {"rank": 3, "update_proj_gap": 4}),
              dctadamw(), gradnormlorp(projection="svd"),
              gradnormlorp(axis="output", proj_type="full"),
              gradnormlorp(matricize="batch", axis="input")]
    return cases


@pytest.mark.parametrize("case", low_rank_cases(), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_micro_batch_is_bitwise(case, dtype):
    ps, qs = parameters(SHAPES, dtype=dtype), parameters(SHAPES, dtype=dtype)
    plain, other = case(ps, lr=1e-2), case(qs, lr=1e-2)
    handle = project_in_backward(other)
    for i in range(11):
        backward(ps, i)
        backward(qs, i)
        assert [q.grad is None for q in qs] == [True] * 4 + [False]
        plain.step()
        other.step()
        plain.zero_grad()
        other.zero_grad()
    assert_same(snapshot(plain)["weights"], snapshot(other)["weights"])
    handle.remove()
    assert_same(snapshot(plain), snapshot(other))
    train(plain, ps, range(11, 14), 1)
    train(other, qs, range(11, 14), 1)
    assert_same(snapshot(plain), snapshot(other))


@pytest.mark.parametrize("case", low_rank_cases(), ids=lambda c: c.name)
@pytest.mark.parametrize("micro", [2, 8])
def test_micro_batches_are_summed(case, micro):
    # double arithmetic: what differs is the order of sums, and codes may flip with it
    exact = case.option("state_bits") == 32 and case.option("inner") != "lion"
    ps, qs = parameters(SHAPES), parameters(SHAPES)
    plain = case(ps, lr=1e-2, update_proj_gap=10)
    other = case(qs, lr=1e-2, update_proj_gap=10)
    project_in_backward(other, micro)
    train(plain, ps, range(14), micro)
    train(other, qs, range(14), micro)
    close(qs, ps, 1e-6 if exact else 1e-2)


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_fp16_and_fewer_micro_batches(micro):
    """A step may come early; half-precision weights have fp32 buffers."""
    ps, qs = (parameters(SHAPES, dtype=torch.float16) for _ in range(2))
    plain = GaLoreAdamW(ps, rank=3, update_proj_gap=10, rounding="nearest")
    other = GaLoreAdamW(qs, rank=3, update_proj_gap=10, rounding="nearest")
    project_in_backward(other, micro)
    train(plain, ps, range(4), max(1, micro // 2))
    train(other, qs, range(4), max(1, micro // 2))
    close(qs, ps, 2e-3)


def test_buffers_count_and_are_saved_in_the_middle():
    for micro, cut in ((2, 1), (8, 5)):
        ps = parameters(SHAPES)
        optimizer = GaLoreAdamW(ps, rank=3, update_proj_gap=10)
        before = optimizer.plan().state_bytes
        project_in_backward(optimizer, micro)
        low = 4 * (9 * 3 + 3 * 9 + 6 * 3 + 3 * 15) + 4 * 4
        assert optimizer.plan().state_bytes == before + low
        held = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
        assert optimizer.plan().state_bytes == held
        train(optimizer, ps, range(6), micro)
        for j in range(cut):
            backward(ps, 600 + j)
        assert any(int(s["projected_count"]) for s in optimizer.state.values()
                   if "projected_count" in s)
        saved = through_disk({"o": optimizer.state_dict(), "w": [p.detach() for p in ps],
                              "g": [p.grad for p in ps]})
        qs = [nn.Parameter(w) for w in saved["w"]]
        twin = GaLoreAdamW(qs, rank=3, update_proj_gap=10)
        with pytest.raises(ValueError, match=r"projected_count.*call project_in_backward"):
            twin.load_state_dict(saved["o"])
        project_in_backward(twin, micro)
        broken = copy.deepcopy(saved["o"])
        broken["state"][0]["projected_count"].fill_(-1)
        with pytest.raises(ValueError, match=r"projected_count=-1\.0, but it must be >= 0"):
            twin.load_state_dict(broken)
        twin.load_state_dict(saved["o"])
        for q, g in zip(qs, saved["g"], strict=True):
            q.grad = g
        for o, xs in ((optimizer, ps), (twin, qs)):
            for j in range(cut, micro):
                backward(xs, 600 + j)
            o.step()
            o.zero_grad()
            train(o, xs, range(7, 14), micro)
        assert_same(snapshot(optimizer), snapshot(twin))


def test_checkpoints_with_and_without_it_fit():
    ps = parameters(SHAPES)
    optimizer = GaLoreAdamW(ps, rank=3, update_proj_gap=4)
    handle = project_in_backward(optimizer)
    train(optimizer, ps, range(3), 1)
    with_buffers = through_disk(optimizer.state_dict())
    handle.remove()
    without = through_disk(optimizer.state_dict())
    weights = [p.detach().clone() for p in ps]
    train(optimizer, ps, range(3, 7), 1)
    for saved in (with_buffers, without):
        for attach in (False, True):
            qs = [nn.Parameter(w.clone()) for w in weights]
            twin = GaLoreAdamW(qs, rank=3, update_proj_gap=4)
            if attach:
                project_in_backward(twin)
            twin.load_state_dict(saved)
            train(twin, qs, range(3, 7), 1)
            assert_same([p.detach() for p in ps], [q.detach() for q in qs])


def test_no_state_is_saved_between_a_refresh_and_its_step():
    ps = parameters(SHAPES)
    optimizer = GaLoreAdamW(ps, rank=3)
    project_in_backward(optimizer)
    backward(ps, 0)
    for save in (optimizer.state_dict, lambda: copy.deepcopy(optimizer)):
        with pytest.raises(RuntimeError, match=r"parameter 0' has a new basis.*after step"):
            save()
    optimizer.step()
    optimizer.state_dict()
    backward(ps, 1)  # no refresh
    optimizer.state_dict()


def test_copies_have_the_ordinary_behaviour():
    ps = parameters(SHAPES)
    optimizer = GaLoreAdamW(ps, rank=3)
    project_in_backward(optimizer)
    train(optimizer, ps, range(2), 1)
    twin = copy.deepcopy(optimizer)
    qs = [q for g in twin.param_groups for q in g["params"]]
    train(optimizer, ps, range(2, 5), 1)
    for i in range(2, 5):
        backward(qs, 100 * i)
        assert all(q.grad is not None for q in qs)
        twin.step()
        twin.zero_grad()
    assert_same([p.detach() for p in ps], [q.detach() for q in qs])


@pytest.mark.parametrize("micro", [1, 2])
def test_zero_grad_clears(micro):
    ps, qs = parameters(SHAPES), parameters(SHAPES)
    optimizers = [GaLoreAdamW(x, rank=3, update_proj_gap=4) for x in (ps, qs)]
    for o, xs in zip(optimizers, (ps, qs), strict=True):
        project_in_backward(o, micro)
        train(o, xs, range(5), micro)
    before = snapshot(optimizers[1])
    backward(qs, 77)
    optimizers[1].zero_grad()
    assert all(q.grad is None for q in qs)
    optimizers[1].step()
    assert_same(before["weights"], snapshot(optimizers[1])["weights"])
    for o, xs in zip(optimizers, (ps, qs), strict=True):
        train(o, xs, range(5, 9), micro)
    assert_same([p.detach() for p in ps], [q.detach() for q in qs])


def test_step_consumes_without_zero_grad():
    """What was projected is used once, as the ordinary path with zero_grad."""
    ps, qs = parameters(SHAPES[:3]), parameters(SHAPES[:3])
    plain, other = (GaLoreAdamW(x, rank=3, update_proj_gap=4) for x in (ps, qs))
    project_in_backward(other, 3)
    train(plain, ps, range(6), 3)
    for i in range(6):
        for j in range(3):
            backward(qs, 100 * i + j)
        other.step()
        assert all(q.grad is None for q in qs)
    close(qs, ps, 1e-6)
    before = snapshot(other)
    other.step()
    assert_same(before, snapshot(other))


@pytest.mark.parametrize("micro", [1, 2, 8])
@pytest.mark.parametrize("exact", [False, True])
def test_clipping(micro, exact):
    if exact and micro > 1:
        with pytest.raises(ValueError, match=r"exact_norm=True.*must be False.*accumulation=2"):
            project_in_backward(GaLoreAdamW(parameters(SHAPES), rank=3), 2, exact_norm=True)
        return
    ps, qs, rs = (parameters(SHAPES) for _ in range(3))
    plain, other, third = (GaLoreAdamW(x, rank=3, update_proj_gap=10) for x in (ps, qs, rs))
    handle = project_in_backward(other, micro, exact_norm=exact)
    project_in_backward(third, micro, exact_norm=exact, max_grad_norm=0.5)
    for i in range(12):
        for j in range(micro):
            for xs in (ps, qs, rs):
                backward(xs, 100 * i + j)
        norm = handle.clip_grad_norm_(0.5)
        if exact:
            expected = torch.nn.utils.clip_grad_norm_(ps, 0.5)
        else:  # the same norm, by hand: R of what has been projected, G of the rest
            parts = []
            for p, q in zip(ps, qs, strict=True):
                s = Decoded(plain.state[p], plain._layouts[p], p)
                if q.grad is None and int(s["basis_step"]) and not plain.due(
                        s, plain.param_groups[0], i + 1):
                    o, shape = plain.param_groups[0], plain.matrix_shape(p, plain.param_groups[0])
                    g = p.grad.view(shape)
                    parts.append(plain.bases(g, s, o, 1).down(g))
                elif q.grad is None:  # refreshed in the hook
                    s["weight"] = p.view(plain.matrix_shape(p, plain.param_groups[0]))
                    parts.append(plain.project_gradient(
                        p.grad.view(s["weight"].shape), s, plain.param_groups[0], i + 1)[1].low)
                else:
                    parts.append(p.grad)
            expected = torch.nn.utils.get_total_norm(parts)
            torch.nn.utils.clip_grads_with_norm_(ps, 0.5, expected)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
        assert handle.clip_grad_norm_(10.0).item() == pytest.approx(0.5, rel=1e-4)
        for o in (plain, other, third):
            o.step()
            o.zero_grad()
    close(qs, ps, 1e-6)
    assert_same([q.detach() for q in qs], [r.detach() for r in rs])


def test_clipping_arguments():
    ps = parameters(SHAPES)
    handle = project_in_backward(GaLoreAdamW(ps, rank=3))
    for bad in (0, -1.0, math.inf, math.nan, "1", True, None):
        with pytest.raises((TypeError, ValueError), match=r"max_norm=.*must be"):
            handle.clip_grad_norm_(bad)
    with pytest.raises(RuntimeError, match="grad_scaler="):
        handle.unscale_()


def test_what_waits_beside_a_projection_is_clipped_with_it():
    """GradNormLoRP keeps the slopes of its magnitudes too."""
    ps, qs = parameters(SHAPES[:3]), parameters(SHAPES[:3])
    plain, other = (GradNormLoRPAdamW(x, lr=1e-2, rank=3, update_proj_gap=4, betas=(0.5, 0.5))
                    for x in (ps, qs))
    handle = project_in_backward(other, exact_norm=True)
    for i in range(6):
        for xs in (ps, qs):
            backward(xs, 1 + i, 10.0 ** -(i % 3))  # no. 0 is the weight itself
        expected = torch.nn.utils.clip_grad_norm_(ps, 0.1)
        assert handle.clip_grad_norm_(0.1).item() == pytest.approx(expected.item(), rel=1e-5)
        for o in (plain, other):
            o.step()
            o.zero_grad()
    close(qs, ps, 1e-6)


def test_a_gap_does_not_change_between_micro_batches():
    """What is in the buffer is on the old basis, to which nothing on a new one can be added."""
    ps = parameters(SHAPES[:1])
    optimizer = GaLoreAdamW(ps, rank=3, update_proj_gap=10)
    project_in_backward(optimizer, 2)
    train(optimizer, ps, range(3), 2)
    backward(ps, 300)
    optimizer.param_groups[0]["update_proj_gap"] = 3
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0' would get a new basis .* after step"):
        backward(ps, 301)
    assert_same(before, snapshot(optimizer))
    optimizer.zero_grad()
    train(optimizer, ps, range(3, 5), 2)


@pytest.mark.parametrize("micro", [1, 2])
def test_loading_forgets_what_waited(micro):
    """Gradients and bases of the state that was there before."""
    def begun(steps: int) -> tuple[list[Any], Any]:
        ps = parameters(SHAPES[:3])
        optimizer = GaLoreAdamW(ps, rank=3, update_proj_gap=4, refresh="staggered")
        project_in_backward(optimizer, micro)
        train(optimizer, ps, range(steps), micro)
        return ps, optimizer

    ps, optimizer = begun(2)
    saved = through_disk({"o": optimizer.state_dict(), "w": [p.detach() for p in ps]})
    results = []
    for steps in range(2, 7):  # the next one is a refresh of each matrix in turn
        qs, twin = begun(steps)
        if steps > 2:
            backward(qs, 99)
        twin.load_state_dict(saved["o"])
        for q, w in zip(qs, saved["w"], strict=True):
            q.data.copy_(w)
            q.grad = None
        train(twin, qs, range(2, 7), micro)
        results.append(snapshot(twin))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("steps", [0, 1])
def test_what_waits_goes_on_where_its_state_changes(rank, steps):
    """Between backward and step; at full rank R has the gradient's shape."""
    results = []
    for change in (False, True):
        ps = parameters([(8, 5), (5, 8)])
        optimizer = GaLoreAdamW(ps, rank=rank, lr=0.1)
        project_in_backward(optimizer)
        for i in range(steps):
            backward(ps, i)
            optimizer.step()
        backward(ps, 7)
        if change:
            optimizer.param_groups[0]["state_bits"] = 16
        optimizer.step()
        results.append([p.detach() for p in ps])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * 0.1)


def test_a_norm_does_not_come_with_a_saved_state():
    ps = parameters(SHAPES[:3])
    optimizer = GaLoreAdamW(ps, rank=3, update_proj_gap=10)
    handle = project_in_backward(optimizer, exact_norm=True)
    train(optimizer, ps, range(3), 1)
    while True:  # to a step without a refresh, whose state can be saved
        backward(ps, 5)
        if not any(now.pending for now in handle._now.values()):
            break
        optimizer.step()
    saved = through_disk(optimizer.state_dict())
    assert float(handle.clip_grad_norm_(1e9)) > 0
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"exact_norm=True, but the gradient of .*saved state"):
        handle.clip_grad_norm_(1e9)


@pytest.mark.parametrize("micro", [1, 2])
def test_a_removed_handle_leaves_no_gradient(micro):
    """Neither in a buffer nor, where the step would have refreshed the basis, in p.grad."""
    for steps in range(5):
        ps, qs = parameters(SHAPES[:4]), parameters(SHAPES[:4])
        plain, other = (GaLoreAdamW(x, rank=3, update_proj_gap=4) for x in (ps, qs))
        handle = project_in_backward(other, micro)
        with project_in_backward(plain, micro):
            train(plain, ps, range(steps), micro)
        train(other, qs, range(steps), micro)
        backward(qs, 7)
        handle.remove()
        assert all(q.grad is None for q in qs)
        assert_same(snapshot(plain), snapshot(other))


@pytest.mark.parametrize("micro", [1, 2, 8])
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_grad_scaler(micro, explicit, dense):
    """Scale and skips are those of the ordinary path; an overflow skips the whole step."""
    shapes = SHAPES if dense else SHAPES[:4]
    ps, qs = parameters(shapes), parameters(shapes)
    plain, other = (GaLoreAdamW(x, rank=3, update_proj_gap=10) for x in (ps, qs))
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in range(2)]
    handle = project_in_backward(other, micro, grad_scaler=scalers[1])
    for i in range(10):
        for j in range(micro):
            for scaler, xs in zip(scalers, (ps, qs), strict=True):
                for k, (p, g) in enumerate(zip(xs, tensors([p.shape for p in xs], 100 * i + j),
                                               strict=True)):
                    if i == 4 and j == micro - 1 and k == 2:
                        g[0, 0] = float("nan")
                    scaler.scale((p * g).sum()).backward()
        before = snapshot(other)["weights"]
        if explicit:
            with pytest.raises(RuntimeError, match=r"still scaled; call unscale_\(\)"):
                handle.clip_grad_norm_(1e3)
            scalers[0].unscale_(plain)
            handle.unscale_()
            handle.clip_grad_norm_(1e3)
        for scaler, o in zip(scalers, (plain, other), strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                scaler.step(o)
                scaler.update()
            o.zero_grad()
        if i == 4:
            assert_same(before, snapshot(other)["weights"])
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert int(other.state[qs[0]]["step"]) == 9
    close(qs, ps, 1e-6)


def test_grad_scaler_must_be_known():
    ps = parameters(SHAPES)
    optimizer = GaLoreAdamW(ps, rank=3)
    scaler = torch.amp.GradScaler("cpu")
    handle = project_in_backward(optimizer)
    scaler.scale(sum(p.sum() for p in ps)).backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"give project_in_backward\(\.\.\., grad_scaler"):
        scaler.step(optimizer)
    assert_same(before, snapshot(optimizer))
    optimizer.step()
    handle.remove()
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    project_in_backward(optimizer, grad_scaler=scaler)
    backward(ps, 0)
    with pytest.raises(RuntimeError, match=r"grad_scaler\.step"):
        optimizer.step()
    with pytest.raises(TypeError, match="grad_scaler is a int"):
        project_in_backward(GaLoreAdamW(parameters(SHAPES), rank=3), grad_scaler=1)


def test_no_gradient_comes_after_unscale():
    """It would be added, still scaled, to what has been divided by the scale."""
    ps = parameters(SHAPES)
    optimizer, scaler = GaLoreAdamW(ps, rank=3), torch.amp.GradScaler("cpu")
    handle = project_in_backward(optimizer, 2, grad_scaler=scaler)
    scaler.scale(sum(p.sum() for p in ps)).backward()
    handle.unscale_()
    with pytest.raises(RuntimeError, match=r"got a gradient after unscale_\(\)"):
        scaler.scale(sum(p.sum() for p in ps)).backward()


@pytest.mark.parametrize("mode", ["skip", "raise"])
@pytest.mark.parametrize("micro", [1, 2])
def test_nonfinite(mode, micro):
    ps = parameters(SHAPES)
    optimizer = GaLoreAdamW(ps, rank=3, update_proj_gap=10, nonfinite=mode)
    project_in_backward(optimizer, micro)
    train(optimizer, ps, range(12), micro)
    before = snapshot(optimizer)["weights"]
    for _ in range(micro):
        backward(ps, 3)
    optimizer.zero_grad()
    for j in range(micro):
        for k, (p, g) in enumerate(zip(ps, tensors(SHAPES, j), strict=True)):
            if k == 2 and j == 0:
                g[0, 0] = float("inf")
            (p * g).sum().backward()
    if mode == "skip":
        optimizer.step()
        assert optimizer.skipped_steps == 1
    else:
        with pytest.raises(FloatingPointError, match="parameter 2"):
            optimizer.step()
    assert_same(before, snapshot(optimizer)["weights"])
    optimizer.zero_grad()
    train(optimizer, ps, range(1), micro)
    assert all(p.isfinite().all() for p in ps)
    assert int(optimizer.state[ps[0]]["step"]) == 13


def test_bound_on_full_gradients():
    """After the first step at most ceil(matrices / gap) keep theirs; every one does in a gap."""
    count, gap, micro = 14, 5, 3
    ps = parameters([(6, 4)] * count)
    optimizer = GaLoreAdamW(ps, rank=2, update_proj_gap=gap)
    project_in_backward(optimizer, micro)
    kept = []
    for i in range(1 + 2 * gap):
        for j in range(micro):
            backward(ps, 100 * i + j)
            kept.append(sum(p.grad is not None for p in ps))
        optimizer.step()
        assert all(p.grad is None for p in ps)
    assert kept[:micro] == [count] * micro
    assert max(kept[micro:]) <= math.ceil(count / gap)
    assert sum(kept[micro:]) == 2 * count * micro


def test_micro_batches_are_counted():
    for micro in (1, 2):
        ps = parameters(SHAPES)
        optimizer = GaLoreAdamW(ps, rank=3, update_proj_gap=10)
        project_in_backward(optimizer, micro)
        for start in (0, 1):
            for j in range(micro):
                backward(ps, start + j)
            with pytest.raises(RuntimeError, match=f"micro-batch {micro + 1}, but"):
                backward(ps, 9)
            optimizer.zero_grad()
            for j in range(micro):
                backward(ps, start + j)
            optimizer.step()
            optimizer.zero_grad()


def test_schedule_late_parameters_and_hooks():
    ps, qs = parameters(SHAPES), parameters(SHAPES)
    ps[1].requires_grad_(False)
    qs[1].requires_grad_(False)
    optimizers, schedules = [], []
    for xs in (ps, qs):
        o = GaLoreAdamW([("a", xs[0]), ("b", xs[1])], rank=3, update_proj_gap=4, lr=1e-2)
        if xs is qs:
            project_in_backward(o)
        optimizers.append(o)
        schedules.append(torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20,
                                                             cycle_momentum=False))
    for i in range(9):
        for o, xs, schedule in zip(optimizers, (ps, qs), schedules, strict=True):
            if i == 3:
                o.add_param_group({"params": [("c", xs[2])], "rank": 2})
                schedule = None
            if i == 5:
                xs[1].requires_grad_(True)
            live = [x for x in (xs[0], xs[1], xs[2]) if x.requires_grad
                    and any(x is y for g in o.param_groups for y in g["params"])]
            backward(live, i)
            o.step()
            o.zero_grad()
            if schedule is not None and i < 3:
                schedule.step()
    assert_same(snapshot(optimizers[0])["weights"], snapshot(optimizers[1])["weights"])


class Doubled(GaLoreAdamW):
    """Its update is not project_gradient() and lift()."""

    def update(self, g, s, o, t):
        return super().update(2 * g, s, o, t)


def refusals() -> list[Any]:
    two = {"rank": 3, "update_proj_gap": 10}
    return [
        (lambda ps: FiraAdamW(ps, **two), {}, ["residual='fira'", "full gradient",
                                              "update_in_backward"]),
        (lambda ps: GaLoreAdamW(ps, residual="sign", **two), {}, ["residual='sign'"]),
        (lambda ps: GaLoreAdamW(ps, residual="error_feedback", **two), {},
         ["residual='error_feedback'"]),
        (lambda ps: DCTAdamW(ps, error_feedback_bits=8, **two), {}, ["error_feedback_bits=8"]),
        (lambda ps: APOLLO(ps, **two), {}, ["algorithm='apollo'", "GaLoreAdamW"]),
        (Muon, {}, ["algorithm='muon'", "update_in_backward"]),
        (PolarGrad, {}, ["algorithm='polargrad'"]),
        (lambda ps: Trion(ps, rank=3), {}, ["algorithm='trion'"]),
        (lambda ps: Doubled(ps, **two), {}, ["algorithm='galore'", "update_in_backward"]),
        (AdamW, {}, ["no low-rank matrix", "rank="]),
        (lambda ps: GaLoreAdamW(ps, rank=3, update_proj_gap=1), {"accumulation": 2},
         ["update_proj_gap=1", "accumulation=2", "longer"]),
        (lambda ps: GaLoreAdamW(ps, rank=3, update_proj_gap=8), {"accumulation": 8},
         ["update_proj_gap=8"]),
        (lambda ps: GaLoreAdamW(ps, refresh="synchronous", **two), {"accumulation": 2},
         ["refresh='synchronous'", "staggered"]),
        (lambda ps: GaLoreAdamW(ps, **two), {"accumulation": 0}, ["accumulation=0"]),
        (lambda ps: GaLoreAdamW(ps, **two), {"accumulation": True}, ["accumulation=True"]),
        (lambda ps: GaLoreAdamW(ps, **two), {"accumulation": 2.0}, ["accumulation=2.0"]),
        (lambda ps: GaLoreAdamW(ps, **two), {"max_grad_norm": 0.0}, ["max_grad_norm=0.0"]),
        (lambda ps: GaLoreAdamW(ps, **two), {"exact_norm": 1}, ["exact_norm=1"]),
        (torch.optim.AdamW, {}, ["optimizer is a AdamW", "lissom"]),
    ]


@pytest.mark.parametrize(("make", "arguments", "words"), refusals())
def test_refusals(make, arguments, words):
    ps = parameters(SHAPES)
    optimizer = make(ps)
    with pytest.raises((TypeError, ValueError)) as error:
        project_in_backward(optimizer, **arguments)
    for word in words:
        assert word in str(error.value)
    backward(ps, 0)
    assert all(p.grad is not None for p in ps)
    optimizer.step()


def test_refused_later():
    ps = parameters(SHAPES)
    optimizer = GaLoreAdamW(ps[:3], rank=3, update_proj_gap=10)
    handle = project_in_backward(optimizer)
    with pytest.raises(ValueError, match="residual='sign'"):
        optimizer.add_param_group({"params": ps[3:], "residual": "sign"})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: 0.0)
    for attach in (project_in_backward, update_in_backward):
        with pytest.raises(RuntimeError, match="already has project_in_backward"):
            attach(optimizer)
    backward(ps[:3], 0)
    ps[0].grad = torch.zeros_like(ps[0])
    with pytest.raises(RuntimeError, match="beside what is in its buffer"):
        optimizer.step()
    handle.remove()
    handle.remove()
    assert "projected" not in optimizer.state[ps[0]]
    with update_in_backward(optimizer):
        backward(ps[:3], 0)
        optimizer.step()
    backward(ps[:3], 0)
    assert ps[0].grad is not None


def test_hooks_of_a_dropped_optimizer_do_nothing():
    ps = parameters(SHAPES)
    project_in_backward(GaLoreAdamW(ps, rank=3))
    gc.collect()
    backward(ps, 0)
    assert all(p.grad is not None for p in ps)


@pytest.mark.parametrize("micro", [1, 2])
def test_a_failed_step_can_be_repeated(micro, monkeypatch):
    ps, qs = parameters(SHAPES), parameters(SHAPES)
    plain, other = (GaLoreAdamW(x, rank=3, update_proj_gap=10) for x in (ps, qs))
    project_in_backward(other, micro)
    train(plain, ps, range(3), micro)
    train(other, qs, range(3), micro)
    for xs in (ps, qs):
        for j in range(micro):
            backward(xs, j)
    plain.step()
    lift = GaLoreAdamW.lift
    calls = []

    def fails(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return lift(self, *arguments)

    monkeypatch.setattr(GaLoreAdamW, "lift", fails)
    with pytest.raises(PartialStepError, match=r"parameter 2' .*not updated; 2 parameters"):
        other.step()
    qs[4].grad, dense = None, qs[4].grad
    other.step()
    qs[4].grad = dense
    for q in qs[:4]:
        assert q.grad is None
    other.step()
    close(qs, ps, 1e-6)


def test_nan_propagates_as_always():
    ps, qs = parameters(SHAPES), parameters(SHAPES)
    plain, other = (GaLoreAdamW(x, rank=3, update_proj_gap=3) for x in (ps, qs))
    project_in_backward(other)
    for i in range(6):
        for o, xs in ((plain, ps), (other, qs)):
            for k, (p, g) in enumerate(zip(xs, tensors(SHAPES, i), strict=True)):
                g[0] = float("nan") if (i, k) == (3, 1) else 0.0 if (k == 0 and i < 2) else g[0]
                (p * (g * 0 if k == 2 and i < 2 else g)).sum().backward()
            o.step()
            o.zero_grad()
    assert_same([p.detach() for p in ps], [q.detach() for q in qs])
    assert bool(ps[1].isnan().any())


def test_copied_models_and_swapped_parameters():
    model = nn.Sequential(nn.Linear(6, 6))
    optimizer = GaLoreAdamW(model.parameters(), rank=2)
    project_in_backward(optimizer)
    twin = copy.deepcopy(model)
    twin(torch.ones(1, 6)).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    old = optimizer.param_groups[0]["params"][0]
    optimizer.param_groups[0]["params"][0] = twin[0].weight
    optimizer.step()
    twin.zero_grad()
    twin(torch.ones(1, 6)).sum().backward()
    model(torch.ones(1, 6)).sum().backward()
    assert twin[0].weight.grad is None
    assert old.grad is not None
    model.to(torch.bfloat16)
    twin.to(torch.bfloat16)
    optimizer.zero_grad()
    twin(torch.ones(1, 6).bfloat16()).sum().backward()
    assert twin[0].weight.grad is None
    optimizer.step()


@pytest.mark.parametrize("micro", [1, 2])
def test_factors_of_normalized_layers(micro):
    """GradNormLoRP's second form: pairs, whose gradients are projected once more."""
    results = []
    for attach in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
        lora(model, 4, normalize="output")
        optimizer = GradNormLoRPAdamW(adapter_groups(model, rank=2), lr=1e-2, update_proj_gap=5)
        if attach:
            project_in_backward(optimizer, micro)
        generator = torch.Generator().manual_seed(1)
        for _ in range(7):
            for _ in range(micro):
                model(torch.randn(8, 12, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    close(results[1], results[0], 0 if micro == 1 else 1e-5)


def test_a_parameter_that_is_replaced_between_backward_and_step_leaves_nothing_behind():
    """Its new basis once stayed after step() and zero_grad(), and no state could be saved."""
    old, new = parameters([(6, 8)]), parameters([(6, 8)], 1)
    optimizer = GaLoreAdamW(old, rank=2, update_proj_gap=2)
    handle = project_in_backward(optimizer)
    for _ in range(3):  # of which the last finds a new basis, that waits
        old[0].square().sum().backward()
        if optimizer.state[old[0]]["step"] < 2:
            optimizer.step()
    assert [now.pending is not None for now in handle._now.values()] == [True]
    optimizer.param_groups[0]["params"][0] = new[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    assert not handle._now
    new[0].square().sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 1
