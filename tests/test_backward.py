"""What both ways in the backward pass have in common: handles, models, a GPU."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lissom.bench.backward import measure
from lissom.bench.llama import Llama
from lissom.bench.shapes import LLAMA, Shape
from lissom.optim import (
    AdamW,
    GaLoreAdamW,
    ddp,
    param_groups,
    project_in_backward,
    update_in_backward,
)
from lissom.optim.project import Bases
from torch import nn

from .backward import SHAPES, backward, train
from .helpers import assert_same, carry_off, parameters, snapshot, tensors

pytestmark = pytest.mark.usefixtures("quantize_small")


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


@pytest.mark.parametrize("attach", [project_in_backward, update_in_backward])
def test_state_that_others_have_carried_off_comes_back_in_the_backward_pass(attach):
    results = []
    for carried in (False, True):
        ps = parameters(SHAPES)
        optimizer = GaLoreAdamW(ps, rank=3, update_proj_gap=3)
        attach(optimizer)
        for i in range(3):
            if carried:
                carry_off(optimizer)
            train(optimizer, ps, range(2 * i, 2 * i + 2), 1)
        results.append(snapshot(optimizer))
    assert_same(*results)


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


# ---- what only a GPU would show


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
