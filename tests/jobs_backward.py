"""What ranks do in tests of work in the backward pass: jobs of :mod:`tests.pool`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lissom.bench import names
from lissom.bench.backward import held
from lissom.bench.llama import Llama
from lissom.bench.shapes import Shape
from lissom.optim import project_in_backward, update_in_backward
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from . import jobs
from .jobs import network, optimizer_of, outcome, plain, quantize_small, sharded, take


def projected(mesh: DeviceMesh | None, name: str, steps: int = 8, micro: int = 1, work: bool = True,
              unsynced: bool = False, half: bool = False, given: dict[str, Any] | None = None,
              limit: float | None = None, change: dict[str, Any] | None = None, **more: Any
              ) -> dict[str, Any]:
    """A model whose gradients are projected in the backward pass, under FSDP2 or on one device.

    Args:
        mesh: the ranks; None is one device.
        name: of the case.
        steps: how many.
        micro: micro-batches of a step.
        work: project; else gradients wait for the step as always.
        unsynced: FSDP2 sums all micro-batches but the last of a step by itself.
        half: FSDP2's mixed precision.
        given: to the handle.
        limit: norm to which the handle clips before a step.
        change: options from the fourth step on, changed after its backward pass.
        more: options.
    """
    rank, ranks = (0, 1) if mesh is None else (mesh.get_rank(), mesh.size())
    if mesh is not None:
        quantize_small()
    model = network() if mesh is None else sharded(mesh, half)
    optimizer = optimizer_of(model, name, **more)
    handle = project_in_backward(optimizer, micro, **(given or {})) if work else None
    kept: list[int] = []
    norms: list[Tensor] = []

    def before(*_: Any) -> None:
        kept.append(sum(p.grad is not None for p in model.parameters()))
        if handle is not None and limit is not None:
            norms.append(handle.clip_grad_norm_(limit))
        for group in optimizer.param_groups if len(kept) == 4 else ():
            group.update(change or {})

    optimizer.register_step_pre_hook(before)
    if unsynced:
        def sync(module: Any, _: Any) -> None:
            nonlocal micro_batch
            micro_batch += 1
            module.set_requires_gradient_sync(micro_batch % micro == 0)

        micro_batch = 0
        model.register_forward_pre_hook(sync)
    take(model, optimizer, range(steps), rank, ranks, micro)
    while_on = outcome(optimizer, list(model.parameters()))
    if handle is not None:
        handle.remove()  # and its buffers
    return outcome(optimizer, list(model.parameters())) | {
        "kept": kept, "norms": norms, "slots": while_on["slots"], "bytes": while_on["bytes"]}


def projected_scaled(mesh: DeviceMesh, explicit: bool, alone: bool) -> dict[str, Any]:
    """Steps that a GradScaler takes under FSDP2, with an overflow in one rank's rows of a matrix.

    Args:
        mesh: the ranks.
        explicit: by unscale_() and clip_grad_norm_() of the handle.
        alone: the matrix is the whole model, so that no other gradient overflows.
    """
    quantize_small()
    model: Any = torch.nn.Linear(12, 12, bias=False)
    torch.nn.init.eye_(model.weight)
    model = fully_shard(model, mesh=mesh) if alone else sharded(mesh)
    optimizer = optimizer_of(model, "galoreadamw")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    handle = project_in_backward(optimizer, grad_scaler=scaler)
    scales, skipped = [], []
    for i in range(8):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(9 * i + mesh.get_rank()))
        loss = model(x).square().mean()
        if i == 3:  # of the weight the last rank has the last row
            loss = loss + 1e38 * model(x)[:, -1].sum()
        before = [plain(p) for p in model.parameters()]
        scaler.scale(loss).backward()
        if explicit:
            handle.unscale_()
            handle.clip_grad_norm_(0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        skipped.append(all(map(torch.equal, before, map(plain, model.parameters()))))
    handle.remove()
    return outcome(optimizer, list(model.parameters())) | {"scales": scales, "skipped": skipped}


def projected_saved(mesh: DeviceMesh, name: str, folder: str, save: bool) -> dict[str, Any]:
    """A state in the middle of an accumulation, saved, or loaded and gone on with.

    Every rank sees the whole batch, so that their number changes nothing. Of the second step the
    first of two micro-batches is in the checkpoint; nothing is refreshed then.
    """
    quantize_small()
    model = sharded(mesh)
    optimizer = optimizer_of(model, name, update_proj_gap=7)
    group = mesh.get_group()

    def backward(seed: int) -> None:
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed))
        (model(x) - 1).square().mean().backward()

    project_in_backward(optimizer, 2)
    if save:
        backward(0)
        backward(1)
        optimizer.step()
        optimizer.zero_grad()
        backward(2)
    state = {"model": get_model_state_dict(model),
             "optimizer": get_optimizer_state_dict(model, optimizer)}
    dense = [p for p in model.parameters() if "projected" not in optimizer.state[p]]
    if save:
        dcp.save(state, checkpoint_id=folder, process_group=group)
        torch.save([plain(p.grad) for p in dense if p.grad is not None], f"{folder}/dense.pt")
    else:
        dcp.load(state, checkpoint_id=folder, process_group=group)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        for p, g in zip(dense, torch.load(f"{folder}/dense.pt"), strict=True):
            assert isinstance(p, DTensor)
            p.grad = jobs.placed(g, mesh)
    waiting = [plain(s["projected"]) for s in optimizer.state.values() if "projected" in s]
    backward(3)
    optimizer.step()
    return outcome(optimizer, list(model.parameters())) | {"waiting": waiting}


def gradient_bytes(mesh: DeviceMesh, way: str) -> int:
    """Peak of what this rank holds of gradients, as each is complete, in three steps under FSDP2.

    Args:
        mesh: the ranks.
        way: one of :data:`lissom.bench.estimate.IN_BACKWARD`.
    """
    quantize_small()
    model = small_llama()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    peak = 0

    def count(_: Tensor) -> None:
        nonlocal peak
        peak = max(peak, held(optimizer, handle))

    for p in model.parameters():  # before the optimizer's own hooks
        p.register_post_accumulate_grad_hook(count)
    optimizer = names.build("galore", model, 8, 1e-3)
    attach: Any = {"project": project_in_backward, "update": update_in_backward}.get(way)
    handle = attach and attach(optimizer)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed + mesh.get_rank())
        model(torch.randint(64, (2, 8), generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return peak


def small_llama() -> Llama:
    """Three layers whose rows two and four ranks share evenly."""
    return Llama(Shape(32, 80, 4, 3, vocabulary=64))
