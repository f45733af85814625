"""Every class on a GPU against the same on the CPU, and what its step takes there."""

from __future__ import annotations

import copy

import pytest
import torch
from lissom.kernels import _triton
from lissom.optim import (
    GaLoreAdamW,
    param_groups,
    project,
    project_in_backward,
    update_in_backward,
)
from torch.distributed.fsdp import fully_shard

from .cases import CASES, SPLIT, first_of_each_class
from .helpers import run, tensors

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _triton.INTERPRETED, reason="no CUDA device")
SHAPES = [(64, 48), (48, 64), (40,), (33, 33)]


def trained(case, device, kind, steps=6):
    ps = [torch.nn.Parameter(p.detach().to(device), p.requires_grad)
          for p in case.parameters(SHAPES, dtype=kind)]
    optimizer = case(ps, lr=1e-2)
    run(optimizer, ps, range(steps))
    return optimizer, ps


def options(case):
    """No refresh in the steps that count, and no polar factor that looks at its numbers."""
    given = {"rank": 256, "update_proj_gap": 1000, "polar": "polar-express"}
    return {k: x for k, x in given.items() if k in case.make.table()}


@pytest.fixture
def draws_of_the_cpu(monkeypatch):
    """Starts of range finders are drawn on the device: here on the CPU, the same for both."""
    def drawn(shape, key, stream, like):
        x = torch.randn(shape, generator=project.generator(key, stream))
        return x.to(like.device)

    monkeypatch.setattr(project, "gaussian", drawn)


@pytest.mark.usefixtures("draws_of_the_cpu")
@pytest.mark.parametrize("case", [c for c in (*CASES, *SPLIT)
                                  if c.option("projection") != "random"], ids=lambda c: c.name)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_gpu_trains_as_the_cpu(case, kind):
    """Random bits are the same; sums have another order, and codes at an edge another value."""
    _, here = trained(case, "cpu", kind)
    _, there = trained(case, "cuda", kind)
    for a, b in zip(here, there, strict=True):
        apart = (a.detach().double() - b.detach().double().cpu()).abs()
        assert apart.max() <= 6 * 1e-2 * 2
        assert apart.mean() <= (1e-3 if kind == torch.float32 else 4e-3)


@pytest.mark.usefixtures("draws_of_the_cpu")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512, 384), (384, 512), (2, 257, 129)])
@pytest.mark.parametrize("projection", ["subspace", "randomized"])
def test_a_gpu_finds_bases_as_good_as_a_cpus(projection, shape, kind):
    """Orthonormal, and warm from the same start the same; with the products that bf16 has there.

    Other draws of a randomized start capture norms that are up to 6e-3 apart.
    """
    u, v = (torch.linalg.qr(x).Q for x in tensors(
        [(*shape[:-2], n, min(shape[-2:])) for n in shape[-2:]], 2))
    g = (u * torch.logspace(0, -2, u.shape[-1]) @ v.mT).to(kind)
    side = "right" if shape[-2] >= shape[-1] else "left"
    old = project.find(g, 32, side, "svd", None, (0, 0), 1)
    expected = project.find(g, 32, side, projection, old, (0, 0), 2)
    got = project.find(g.cuda(), 32, side, projection, old.cuda(), (0, 0), 2).cpu()
    torch.testing.assert_close(got.mT @ got, torch.eye(32).expand_as(got.mT @ got), atol=1e-5,
                               rtol=0)
    if projection == "subspace":
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    low = [(g.float() @ q if side == "right" else g.float().mT @ q).norm()
           for q in (got, expected)]
    assert float(low[0] / low[1]) == pytest.approx(1, abs=1e-4)
    drawn = project.random_basis(384, 96, (2,), (1, 2), 3, g.cuda().float()).cpu()
    torch.testing.assert_close(drawn.mT @ drawn, torch.eye(96).expand(2, 96, 96), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [*first_of_each_class(), *SPLIT], ids=lambda c: c.name)
def test_resumes_on_a_gpu(case):
    optimizer, ps = trained(case, "cuda", torch.bfloat16)
    kept = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in ps]
    run(optimizer, ps, range(6, 9))
    twins = [torch.nn.Parameter(w, p.requires_grad) for w, p in zip(weights, ps, strict=True)]
    other = case(twins, lr=1e-2)
    other.load_state_dict(kept)
    run(other, twins, range(6, 9))
    assert all(torch.equal(a, b) for a, b in zip(ps, twins, strict=True))


@pytest.mark.parametrize("case", [c for c in (*first_of_each_class(), *SPLIT)
                                  if not c.roles], ids=lambda c: c.name)
def test_a_step_is_frugal(case):
    """Temporaries of a step without a refresh, of the largest matrix in fp32.

    Rules of whole matrices work on a batch of them, and in more than one copy.
    """
    ps = [torch.nn.Parameter(torch.randn(x, device="cuda").bfloat16())
          for x in [(2048, 2048), (2048, 4096), (4096, 2048), (2048, 2048), (2048,)]]
    optimizer = case(ps, lr=1e-3, **options(case))
    run(optimizer, ps, range(2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    times = 8 if optimizer.waits else 5
    assert torch.cuda.max_memory_allocated() - before <= times * 4 * 2048 * 4096


@pytest.mark.parametrize("case", [c for c in (*first_of_each_class(), *SPLIT)
                                  if not c.roles], ids=lambda c: c.name)
def test_a_step_between_refreshes_waits_for_nothing(case):
    """Nor where gradients have moved, whose addresses are then sent anew."""
    ps = [torch.nn.Parameter(torch.randn(shape, device="cuda").bfloat16())
          for shape in [(256, 128)] * 3 + [(128,)] * 2]
    optimizer = case(ps, lr=1e-3, **{k: x for k, x in options(case).items() if k != "rank"})
    run(optimizer, ps, range(2))
    moved = [p.grad.clone() for p in ps]
    for p, g in zip(ps, moved, strict=True):
        p.grad = g
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attach", [project_in_backward, update_in_backward])
def test_means_over_one_rank_are_its_gradients(attach):
    """They go through NCCL and its stream, and wait there for what computes them."""
    results = []
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    try:
        for group in (None, torch.distributed.group.WORLD):
            torch.manual_seed(0)
            model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8))).cuda()
            optimizer = GaLoreAdamW(param_groups(model, rank=8), lr=1e-2, update_proj_gap=3)
            attach(optimizer, process_group=group)
            for i in range(6):
                x = torch.randn(64, 256, generator=torch.Generator().manual_seed(i)).cuda()
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append([p.detach().cpu() for p in model.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(*results, strict=True):  # what had not arrived would be off by the rate
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("attach", [project_in_backward, update_in_backward])
def test_hooks_run_where_fsdp2_reduces(attach):
    """On a stream of its own, at the end of which the step waits for it."""
    results = []
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    try:
        for handle in (None, attach):
            torch.manual_seed(0)
            model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8))).cuda()
            for layer in model:
                fully_shard(layer)
            fully_shard(model)
            optimizer = GaLoreAdamW(param_groups(model, rank=8), lr=1e-2, update_proj_gap=3)
            if handle is not None:
                handle(optimizer)
            for i in range(6):
                x = torch.randn(64, 256, generator=torch.Generator().manual_seed(i)).cuda()
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append([p.full_tensor().detach().cpu() for p in model.parameters()])
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
