"""What ranks do in tests of work in the backward pass: jobs of :mod:`tests.pool`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lissom.bench import names
from lissom.bench.backward import held
from lissom.bench.llama import Llama
from lissom.bench.shapes import Shape
from lissom.optim import project_in_backward, update_in_backward
from lissom.optim.ddp import projected_allreduce
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
from .jobs import (
    case_of,
    network,
    optimizer_of,
    outcome,
    plain,
    quantize_small,
    sharded,
    take,
)


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


def _scaled(mesh: DeviceMesh, model: torch.nn.Module, optimizer: Any, scaler: Any, handle: Any,
            explicit: bool, overflow: Callable[[Tensor], Any]) -> dict[str, Any]:
    """Eight steps that a GradScaler takes.

    Args:
        mesh: the ranks.
        model: what is trained.
        optimizer: of its parameters.
        scaler: takes the steps.
        handle: works in the backward pass.
        explicit: by unscale_() and clip_grad_norm_() of the handle.
        overflow: is added to the loss before the fourth step, from the batch.
    """
    scales, skipped = [], []
    for i in range(8):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(9 * i + mesh.get_rank()))
        loss = model(x).square().mean() + (overflow(x) if i == 3 else 0.0)
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
    # Of the weight the last rank has the last row.
    return _scaled(mesh, model, optimizer, scaler, handle, explicit,
                   lambda x: 1e38 * model(x)[:, -1].sum())


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


class Stack(torch.nn.Module):
    """Five experts in one stack of weights, of which a line uses the mean, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = torch.nn.Parameter(torch.randn(5, 8, 12) / 4)
        self.head = torch.nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(torch.tanh(x @ self.experts.mT).mean(0)))


def stacked(mesh: DeviceMesh | None, name: str, way: str = "step", steps: int = 6,
            folder: str | None = None, resume: bool = False, **more: Any) -> dict[str, Any]:
    """Experts under FSDP2, or on one device, where every rank sees the whole batch.

    Args:
        mesh: the ranks; None is one device.
        name: of the case.
        way: "step", or what works in the backward pass: "project", "update".
        steps: how many.
        folder: where the state is saved after three steps.
        resume: the state there is loaded before the fourth step, the first.
        more: options.
    """
    model = Stack()
    if mesh is not None:
        quantize_small()
        fully_shard(model, mesh=mesh)
    optimizer = case_of(name)([
        {"params": [("experts", model.experts), ("head", model.head.weight)], "rank": 3,
         "matricize": "batch"} if case_of(name).option("rank") else
        {"params": [("experts", model.experts), ("head", model.head.weight)],
         "matricize": "batch"}, {"params": [("bias", model.head.bias)]}], lr=1e-2, **more)
    if way != "step":
        {"project": project_in_backward, "update": update_in_backward}[way](optimizer)

    def state() -> dict[str, Any]:
        return {"model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, optimizer)}

    if resume:
        found = state()
        assert mesh is not None
        dcp.load(found, checkpoint_id=folder, process_group=mesh.get_group())
        set_model_state_dict(model, found["model"])
        set_optimizer_state_dict(model, optimizer, found["optimizer"])
    for i in range(3 if resume else 0, steps):
        if i == 3 and folder is not None and not resume:
            assert mesh is not None
            dcp.save(state(), checkpoint_id=folder, process_group=mesh.get_group())
        x = torch.randn(7, 12, generator=torch.Generator().manual_seed(i))
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcome(optimizer, list(model.parameters()))


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


def accumulated(mesh: DeviceMesh, name: str, in_backward: bool) -> tuple[dict[str, Any], str]:
    """Two micro-batches a step under FSDP2, of which the second is reduced; and what it says if
    both are.
    """
    quantize_small()
    model = sharded(mesh)
    optimizer = optimizer_of(model, name)
    if in_backward:
        update_in_backward(optimizer)

    def backward(seed: int) -> None:
        generator = torch.Generator().manual_seed(10 * seed + mesh.get_rank())
        model(torch.randn(4, 12, generator=generator)).square().mean().backward()

    for i in range(8):
        model.set_requires_gradient_sync(bool(i % 2))
        backward(i)
        if i % 2:
            assert not in_backward or all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    result, message = outcome(optimizer, list(model.parameters())), ""
    try:
        backward(8)
        backward(9)
    except RuntimeError as error:
        message = str(error)
    return result, message


def replicas(mesh: DeviceMesh, name: str, steps: int = 8, way: str = "project", micro: int = 1,
             given: dict[str, Any] | None = None, cut: int = 0, turned: bool = False, **more: Any
             ) -> dict[str, Any]:
    """The same with no DDP: each rank has the model, and the backward pass averages gradients.

    Args:
        mesh: the ranks.
        name: of the case.
        steps: how many.
        way: what works in the backward pass.
        micro: micro-batches of a step.
        given: to the handle.
        cut: micro-batches that every step has less than the handle was told.
        turned: weights lie column by column, and so do their gradients.
        more: options.
    """
    quantize_small()
    model = network()
    for p in model.parameters() if turned else ():
        p.data = p.data.mT.contiguous().mT if p.ndim == 2 else p.data
    optimizer = optimizer_of(model, name, **more)
    given = {"process_group": mesh.get_group(), **(given or {})}
    handle = (update_in_backward(optimizer, **given) if way == "update" else
              project_in_backward(optimizer, micro + cut, **given))
    at_once = 0

    def count(_: Tensor) -> None:
        nonlocal at_once
        at_once = max(at_once, sum(p.grad is not None for p in model.parameters()))

    for p in model.parameters():  # after the optimizer's own hooks
        p.register_post_accumulate_grad_hook(count)
    take(model, optimizer, range(steps), mesh.get_rank(), mesh.size(), micro)
    handle.remove()  # and its buffers
    return outcome(optimizer, list(model.parameters())) | {"sent": handle.bytes_sent,
                                                           "at_once": at_once}


def replicas_scaled(mesh: DeviceMesh, explicit: bool, accumulation: int) -> dict[str, Any]:
    """Steps that a GradScaler takes, an overflow on the last rank before the third; they come
    early with more micro-batches than there are.
    """
    quantize_small()
    model = network()
    optimizer = optimizer_of(model, "galoreadamw")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    handle = project_in_backward(optimizer, accumulation, grad_scaler=scaler,
                                 process_group=mesh.get_group())
    last = mesh.get_rank() == mesh.size() - 1
    return _scaled(mesh, model, optimizer, scaler, handle, explicit,  # of a dense parameter alone
                   lambda x: 1e38 * model[4].bias.sum() if last else 0.0)


def replicas_spoilt(mesh: DeviceMesh, nonfinite: str) -> dict[str, Any]:
    """A NaN in what one rank computes."""
    model = network()
    optimizer = optimizer_of(model, "galoreadamw", nonfinite=nonfinite)
    project_in_backward(optimizer, process_group=mesh.get_group())
    take(model, optimizer, range(2), mesh.get_rank(), mesh.size())
    before = [plain(p) for p in model.parameters()]
    x = torch.ones(2, 12)
    x[0, 0] = torch.nan if mesh.get_rank() == 1 else 1.0
    model(x).square().mean().backward()
    error = ""
    try:
        optimizer.step()
    except FloatingPointError as found:
        error = str(found)
    optimizer.zero_grad()
    after = [plain(p) for p in model.parameters()]
    take(model, optimizer, range(2, 4), mesh.get_rank(), mesh.size())
    return {"before": before, "after": after, "error": error, "skipped": optimizer.skipped_steps,
            **outcome(optimizer, list(model.parameters()))}


class Viewed(torch.nn.Module):
    """A parameter that is used through a view: its gradient lies where another one lies."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(5, 6), torch.nn.Linear(6, 3)
        self.place = torch.nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down((0.1 * self.up(x) + self.place.unsqueeze(0)).tanh())
        return out


def replicas_of_views(mesh: DeviceMesh, way: str) -> dict[str, Any]:
    """Gradients that share memory, and one that a hook has not seen; clipped by torch.

    Returns:
        Weights, and those of ordinary steps by the mean of the gradients.
    """
    weights = []
    for group in (None, mesh.get_group()):
        model = Viewed()
        optimizer = case_of("galoreadamw-full-svd" if way == "project" else "adamw")(
            [{"params": [p], **({"rank": 9} if way == "project" and p.ndim == 2 else {})}
             for p in model.parameters()], lr=1e-2)
        handle: Any = None
        if group is not None and way == "project":
            handle = project_in_backward(optimizer, process_group=group)
        elif group is not None:
            handle = update_in_backward(optimizer, process_group=group)
        model.down.bias.requires_grad_(False)
        for i in range(4):
            generator = torch.Generator().manual_seed(9 * i + mesh.get_rank())
            x = torch.randn(1, 4, 5, generator=generator)
            model(x).square().mean().backward()
            if group is None:
                for p in model.parameters():
                    if p.grad is not None:
                        torch.distributed.all_reduce(p.grad.div_(mesh.size()),
                                                     group=mesh.get_group())
            assert handle is None or not handle._sent  # nothing is on its way
            optimizer.step()
            optimizer.zero_grad()
            if i == 1:
                model.down.bias.requires_grad_(True)
        weights.append([plain(p) for p in model.parameters()])
    return {"plain": weights[0], "weights": weights[1], "state": []}


def replicas_after_failure(mesh: DeviceMesh, way: str) -> dict[str, Any]:
    """A step after a backward pass that failed on all ranks, and that step alone."""
    found = []
    for fails in (False, True):
        model = network()
        optimizer = optimizer_of(model, "galoreadamw")
        attach = project_in_backward if way == "project" else update_in_backward
        handle = attach(optimizer, process_group=mesh.get_group())
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(mesh.get_rank()))
        if fails:
            hook = model[4].bias.register_post_accumulate_grad_hook(lambda p: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(x).square().mean().backward()
            hook.remove()
            optimizer.zero_grad()
        model(x).square().mean().backward()
        assert not handle._sent
        optimizer.step()
        found.append([plain(p) for p in model.parameters()])
    return {"plain": found[0], "weights": found[1]}


class Experts(torch.nn.Module):
    """Experts of one shape, of which a rank may need one and another rank another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(12, 12) for _ in range(3))
        self.out = torch.nn.Linear(12, 12)

    def forward(self, parts: list[Tensor | None]) -> Tensor:
        done = [expert(x) for expert, x in zip(self.experts, parts, strict=True) if x is not None]
        out: Tensor = self.out(torch.cat(done).tanh())
        return out


def replicas_of_experts(mesh: DeviceMesh, way: str, used: list[list[int]], empty: bool,
                        late: bool = False) -> dict[str, Any]:
    """Two steps in which ranks use experts of their own.

    Args:
        mesh: all ranks.
        way: what works in the backward pass; "" averages gradients before the step.
        used: numbers of each rank's experts.
        empty: the others get an empty batch, else nothing.
        late: what was sent is compared as where a GPU must not be waited for.

    Returns:
        The error, whether weights have moved before it, those of saving, and weights.
    """
    group = torch.distributed.new_group()  # where ranks do not match it is spoilt
    model, rank = Experts(), mesh.get_rank()
    optimizer = case_of("galoreadamw")([
        {"params": [(name, p)], **({"rank": 3} if p.ndim == 2 else {})}
        for name, p in model.named_parameters()], lr=1e-2)
    attach: Any = {"project": project_in_backward, "update": update_in_backward}.get(way)
    if attach is not None:
        replicas = attach(optimizer, process_group=group).replicas
        assert replicas._at_once  # gloo
        replicas._at_once = not late
    before = [plain(p) for p in model.parameters()]
    error, saving = "", []
    for step in range(2):
        generator = torch.Generator().manual_seed(9 * step + rank)
        x = torch.randn(4, 12, generator=generator)
        parts = [x if i in used[rank] else x[:0] if empty else None for i in range(3)]
        try:
            model(parts).square().sum().backward()
        except RuntimeError as found:
            error = str(found)
            break
        for p in model.parameters() if attach is None else ():
            assert p.grad is not None
            torch.distributed.all_reduce(p.grad.div_(mesh.size()), group=group)
        optimizer.step()
        optimizer.zero_grad()
        try:
            optimizer.state_dict()
        except RuntimeError as found:
            saving.append(str(found))
    after = [plain(p) for p in model.parameters()]
    return {"error": error, "saving": saving, "weights": after,
            "moved": not all(map(torch.equal, before, after))}


def replicas_noticed_late(mesh: DeviceMesh, way: str) -> list[str]:
    """What is said, where a GPU must not be waited for, of gradients that do not match: when the
    state is saved; then, after it was loaded, saved and did not match again, when the handle goes.
    """
    group = torch.distributed.new_group()  # all ranks'
    model, used, messages = Experts(), int(mesh.get_rank() == 2), []
    optimizer = case_of("galoreadamw")([
        {"params": [p], **({"rank": 3} if p.ndim == 2 else {})} for p in model.parameters()])
    state = copy.deepcopy(optimizer.state_dict())
    attach = project_in_backward if way == "project" else update_in_backward
    handle = attach(optimizer, process_group=group)
    assert handle.replicas is not None
    handle.replicas._at_once = False
    for last in (optimizer.state_dict, handle.remove):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(mesh.get_rank()))
        model([x if i == used else None for i in range(3)]).square().sum().backward()
        optimizer.step()
        with pytest.raises(RuntimeError) as error:
            last()
        messages.append(str(error.value))
        if last == optimizer.state_dict:
            optimizer.load_state_dict(state)
            optimizer.state_dict()
    optimizer.state_dict()
    return messages


def experts_under_ddp(mesh: DeviceMesh, projected: bool, **given: Any) -> dict[str, Any]:
    """Six steps in which a rank uses one of three experts, and all of them two or one.

    Args:
        mesh: the ranks.
        projected: DDP sends projected gradients.
        given: to DDP.
    """
    model, rank = Experts(), mesh.get_rank()
    wrapped = torch.nn.parallel.DistributedDataParallel(
        model, process_group=mesh.get_group(), find_unused_parameters=True, **given)
    optimizer = case_of("galoreadamw")([
        {"params": [p], **({"rank": 3} if p.ndim == 2 else {})} for p in model.parameters()],
        lr=1e-2, update_proj_gap=3)
    counts = projected_allreduce(optimizer, wrapped) if projected else None
    for step in range(6):
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(9 * step + rank))
        used = (step + rank) % 3 if step % 2 else step % 3
        wrapped([x if i == used else None for i in range(3)]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcome(optimizer, list(model.parameters())) | {
        "less": counts is not None and counts.bytes_sent < 0.9 * counts.bytes_plain}


def replicas_refusals(mesh: DeviceMesh) -> list[str]:
    """What both handles say of what ranks cannot do together, and that training goes on."""
    group, messages = mesh.get_group(), []

    def said(call: Any) -> None:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            call()
        messages.append(str(error.value))

    def loss(model: torch.nn.Module) -> Tensor:
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(mesh.get_rank()))
        return model(x).square().mean()

    other = network()
    with torch.no_grad():
        other[2].weight[0, 0] += mesh.get_rank()
    said(lambda: project_in_backward(optimizer_of(other, "galoreadamw"), process_group=group))
    said(lambda: update_in_backward(optimizer_of(other, "galoreadamw"), process_group=group))
    fewer = list(network().parameters())[:4 - mesh.get_rank()]
    said(lambda: update_in_backward(case_of("adamw")(fewer), process_group=group))
    other = network()
    renamed = [("wrapped." * mesh.get_rank() + name, p) for name, p in other.named_parameters()]
    said(lambda: update_in_backward(case_of("adamw")(renamed), process_group=group))
    said(lambda: update_in_backward(optimizer_of(sharded(mesh), "adamw"), process_group=group))
    model = network()
    optimizer = optimizer_of(model, "galoreadamw")
    said(lambda: project_in_backward(optimizer, process_group=mesh))
    said(lambda: project_in_backward(optimizer, exact_norm=True, process_group=group))
    scaler = torch.amp.GradScaler("cpu")
    with project_in_backward(optimizer, 2, process_group=group) as handle:
        loss(model).backward()
        said(optimizer.state_dict)
        handle.clip_grad_norm_(1.0)
        said(loss(model).backward)
        optimizer.zero_grad()
        loss(model).backward()
        loss(model).backward()
        said(loss(model).backward)
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
        optimizer.state_dict()
    with project_in_backward(optimizer, 2, grad_scaler=scaler, process_group=group):
        scaler.scale(loss(model)).backward()
        scaler.unscale_(optimizer)
        said(lambda: scaler.step(optimizer))
        optimizer.zero_grad()
    with update_in_backward(optimizer, process_group=group):
        loss(model).backward()
        optimizer.state_dict()
        for p in model[0].parameters():
            said(p.sum().backward)
        optimizer.zero_grad()
        before = [plain(p) for p in model.parameters()]
        optimizer.step()
        assert all(map(torch.equal, before, map(plain, model.parameters())))
    wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    with update_in_backward(optimizer, process_group=group):
        loss(wrapped).backward()
        said(optimizer.step)
        optimizer.zero_grad()
    more = {"capturable": True} if mesh.get_rank() == 0 else {}
    adam = case_of("adamw")(list(network().parameters()), **more)
    said(lambda: update_in_backward(adam, process_group=group))
    optimizer.load_state_dict(optimizer.state_dict())
    return messages


def in_backward_refused(mesh: DeviceMesh) -> list[str]:
    """What both say of DDP."""
    messages = []
    for work in (project_in_backward, update_in_backward):
        try:
            work(optimizer_of(network(), "galoreadamw"))
        except ValueError as error:
            messages.append(str(error))
    return messages
