"""Gradients that are projected, or used up, in the backward pass: equal to the ordinary path."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lissom.bench.backward import measure
from lissom.bench.llama import Llama
from lissom.bench.shapes import LLAMA, Shape
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
    SwitchLoRAAdamW,
    Trion,
    adapter_groups,
    ddp,
    lora,
    param_groups,
    project_in_backward,
    update_in_backward,
)
from lissom.optim.codec import Decoded
from lissom.optim.project import Bases
from torch import nn

from .cases import Case, apollo, dctadamw, first_of_each_class, galore, gradnormlorp
from .helpers import assert_same, parameters, snapshot, tensors, through_disk

SHAPES = [(9, 6), (6, 9), (6, 6), (4, 3, 5), (4,)]


@pytest.fixture(autouse=True)
def _quantize_small(monkeypatch):
    monkeypatch.setattr("lissom.optim.codec.SMALL", 1)


def backward(params: list[Any], seed: int, scale: float = 1.0) -> None:
    """Give each parameter a random gradient, through autograd."""
    for p, g in zip(params, tensors([p.shape for p in params], seed, scale), strict=True):
        (p * g.to(p.dtype)).sum().backward()


def train(optimizer: Any, params: list[Any], steps: range, micro: int) -> None:
    for i in steps:
        for j in range(micro):
            backward(params, 100 * i + j)
        optimizer.step()
        optimizer.zero_grad()


def close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        worst = (x.double() - y.double()).abs().max() / y.double().abs().max()
        assert worst <= tolerance, float(worst)


def ours(snap: dict[str, Any]) -> dict[str, Any]:
    """Without the buffers."""
    states = [{k: v for k, v in s.items() if not k.startswith("projected")} for s in snap["state"]]
    return {**snap, "state": states}


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


# ---- projected gradients


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


def test_a_handle_that_cannot_be_attached_leaves_no_trace(monkeypatch):
    ps = parameters(SHAPES)
    optimizer = GaLoreAdamW(ps, rank=3)

    def fails() -> None:
        monkeypatch.undo()
        raise MemoryError

    for attach in (project_in_backward, update_in_backward):
        monkeypatch.setattr(optimizer, "_sync_state", fails)
        with pytest.raises(MemoryError):
            attach(optimizer)
        backward(ps, 0)
        assert all(p.grad is not None for p in ps)
        assert not any(k.startswith("projected") for p in ps for k in optimizer.state[p])
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("attach", [project_in_backward, update_in_backward])
def test_state_that_cannot_be_made_leaves_no_handle(attach):
    expanded = torch.nn.Parameter(torch.ones(4, 1).expand(4, 3), requires_grad=False)
    optimizer = GaLoreAdamW([*parameters(SHAPES), expanded], rank=3)
    expanded.requires_grad_()
    with pytest.raises(ValueError, match="strides"):
        attach(optimizer)
    expanded.requires_grad_(False)
    attach(optimizer).remove()


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


@pytest.mark.parametrize("attach", [project_in_backward, update_in_backward])
def test_a_backward_pass_in_autocast_changes_nothing(attach):
    results = []
    for enabled in (False, True):
        ps = parameters(SHAPES)
        optimizer = GaLoreAdamW(ps, rank=3, update_proj_gap=3)
        attach(optimizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            train(optimizer, ps, range(5), 1)
        results.append(snapshot(optimizer))
    assert_same(*results)


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


# ---- updates


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
            assert "no backward pass" in str(caught[0].message)
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


# ---- models


TINY = Shape(32, 48, 4, 2, 64)


def llama(tied: bool = False, seed: int = 0) -> Llama:
    model = Llama(TINY, tied=tied)
    model.initialize(torch.Generator().manual_seed(seed))
    return model


def loss_of(model: Llama, seed: int) -> torch.Tensor:
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(seed))
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("attach", [project_in_backward, update_in_backward])
def test_tied_weights_fire_once(attach):
    models = [llama(tied=True), llama(tied=True)]
    optimizers = [GaLoreAdamW([{"params": [p], "rank": 8 if p.ndim == 2 else None}
                               for p in m.parameters()], update_proj_gap=3) for m in models]
    attach(optimizers[1])
    for i in range(5):
        for m, o in zip(models, optimizers, strict=True):
            loss_of(m, i).backward()
            o.step()
            o.zero_grad()
    assert_same([p.detach() for p in models[0].parameters()],
                [p.detach() for p in models[1].parameters()])


@pytest.mark.parametrize("kind", ["project", "update", "plain"])
def test_live_gradients(kind):
    """What exists of gradients when each becomes ready: one, and what is kept on purpose."""
    model = llama()
    optimizer = GaLoreAdamW(param_groups(model, rank=8), update_proj_gap=3)
    peak = 0

    def measure(_: Any) -> None:
        nonlocal peak
        peak = max(peak, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(measure)
    if kind != "plain":
        {"project": project_in_backward, "update": update_in_backward}[kind](optimizer)
    for i in range(4):
        loss_of(model, i).backward()
        optimizer.step()
        optimizer.zero_grad()
    largest = max(p.nbytes for p in model.parameters())
    dense = sum(row.shape[0] * math.prod(row.shape[1:]) * 4 for row in optimizer.plan()
                if row.rule == "adamw")
    expected = {"plain": sum(p.nbytes for p in model.parameters()), "update": largest,
                "project": dense + largest}[kind]
    assert peak <= expected
    assert kind != "plain" or peak == expected


def test_gradient_bytes_of_60m():
    """Of the ordinary path's, first step included; buffers and waiting bases count."""
    whole = sum(p.nbytes for p in Llama(replace(LLAMA["llama-60m"], vocabulary=256)).parameters())
    for name, share in (("project_in_backward", 0.3), ("update_in_backward", 0.05)):
        for row in measure(name, "llama-60m", 256, 128, steps=2):
            assert row["gradient_bytes"] <= share * whole
            # one gradient and what a refresh takes beside it
            assert row["backward_bytes"] <= 0.1 * whole


@pytest.mark.parametrize("name", ["weight_decay", "betas", "update_proj_gap"])
@pytest.mark.parametrize("handle", [project_in_backward, update_in_backward])
def test_a_bad_option_stops_before_the_hook_writes(handle, name):
    ps = parameters([(8, 6), (6, 8)])
    optimizer = GaLoreAdamW(ps, lr=1e-2, rank=2)
    with handle(optimizer):
        sum(p.square().sum() for p in ps).backward()
        optimizer.step()
        optimizer.zero_grad()
        group = optimizer.param_groups[0]
        old = group[name]
        group[name] = {"weight_decay": -5.0, "betas": (0.9, 1.5), "update_proj_gap": 0}[name]
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=name):
            sum(p.square().sum() for p in ps).backward()
        assert_same(before, snapshot(optimizer))
        group[name] = old
        optimizer.zero_grad()
        sum(p.square().sum() for p in ps).backward()
        optimizer.step()
        assert int(optimizer.state[ps[0]]["step"]) == 2


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


# -------------------------------------------------------------------- what only a GPU would show


@pytest.mark.parametrize("attach", [project_in_backward, update_in_backward])
def test_no_hook_is_recorded_in_a_cuda_graph(attach, monkeypatch):
    """Which would replay one step's count, rate and random bits, or train nothing at all."""
    p = torch.nn.Parameter(torch.ones(6, 8))
    attach(GaLoreAdamW([p], rank=2))
    before = p.detach().clone()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=f"{attach.__name__}: group 0 has capturable=False"):
        p.square().sum().backward()
    assert torch.equal(p, before)


def test_a_gradient_on_its_way_to_the_host_is_waited_for(monkeypatch):
    """FSDP2 copies it there without waiting, and older ones call the hook before it has arrived
    (pytorch/pytorch#180666).
    """
    p = torch.nn.Parameter(torch.ones(6, 8))
    optimizer, seen = AdamW([p], lr=0.5), []
    update_in_backward(optimizer)
    stream = SimpleNamespace(synchronize=lambda: seen.append(bool((p == 1).all())))
    monkeypatch.setattr("lissom.optim.sharding.offloaded", lambda x: x is p)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    p.square().sum().backward()
    assert seen == [True]
    assert not (p == 1).any()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_projected_means_are_written_in_blocks(kind, sides, monkeypatch):
    """DDP's hook, of which each future may have memory of its own."""
    m, n, r = 13, 9, 3
    left, right = (torch.linalg.qr(x)[0] * 1.01 if there else None
                   for x, there in zip(tensors([(m, r), (n, r)]), sides, strict=True))
    g = torch.full((m, n), torch.nan, dtype=kind)
    shape = (r if sides[0] else m, r if sides[1] else n)
    low = tensors([shape], 1)[0]
    monkeypatch.setattr(ddp, "_BLOCK", 4 * n)
    ddp._Lift(Bases(left, right), torch.Size(shape), g)(low.flatten())
    expected = low
    if left is not None:
        expected = left @ torch.linalg.solve(left.mT @ left, expected)
    if right is not None:
        expected = expected @ torch.linalg.solve(right.mT @ right, right.mT)
    torch.testing.assert_close(g, expected.to(kind), rtol=1e-5 if kind == torch.float32 else 2**-7,
                               atol=1e-6)
