"""What the ranks of :mod:`tests.pool` do."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lissom.bench.livebytes import LiveBytes
from lissom.optim import (
    AdamW,
    SwitchLoRAAdamW,
    adapter_groups,
    batches,
    codec,
    lora,
    param_groups,
    project_in_backward,
    sharding,
    update_in_backward,
)
from lissom.optim.ddp import projected_allreduce
from lissom.optim.layers import LoRALinear
from lissom.optim.owners import exchanged as exchanged_whole
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard

from .cases import CASES
from .helpers import named, tensors

#: Tall, wide, square, one row, fewer rows than ranks, a vector, an image filter, a tensor.
SHAPES = [(10, 6), (6, 10), (7, 7), (1, 5), (2, 9), (5,), (5, 3, 2, 2)]


def case_of(name: str) -> Any:
    return next(case for case in CASES if case.name == name)


def quantize_small(spread: int = 1) -> None:
    """As the contract table does: its matrices are far below what is quantized, and spread."""
    codec.SMALL, codec.SHORT, codec.SPREAD = 1, 0, spread


def placed(x: Tensor, mesh: DeviceMesh | None, places: list[Placement] | None = None) -> Tensor:
    if mesh is None:
        return x
    # a dimension that x has not is not cut
    places = [Replicate() if isinstance(place, Shard) and place.dim >= x.ndim else place
              for place in places or [Shard(0)] * mesh.ndim]
    return distribute_tensor(x, mesh, places, src_data_rank=None)


def plain(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def trained(mesh: DeviceMesh | None, name: str, steps: int = 20, dtype: torch.dtype = torch.float32,
            shapes: Any = SHAPES, places: list[Placement] | None = None, spread: int = 1,
            small: int | None = None, still: bool = False, others: bool = False, **more: Any
            ) -> dict[str, Any]:
    """Weights and state after some steps with the same gradients on any number of ranks.

    With ``still`` the last matrix of each stack has none; with ``others`` the ranks have no group
    of their own, as if there were more of them.
    """
    if others:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, "_group_among", lambda *_: None)
            return trained(mesh, name, steps, dtype, shapes, places, spread, small, still, **more)
    if mesh is not None:
        quantize_small(spread)
        if small is not None:
            sharding._SMALL = small
    case = case_of(name)
    ps = [torch.nn.Parameter(placed(p.detach(), mesh, places), requires_grad=p.requires_grad)
          for p in case.parameters(shapes, dtype=dtype)]
    optimizer = case(named(ps), **{"lr": 1e-2, **more})
    for i in range(steps):
        give(ps, i, mesh, places, still)
        optimizer.step()
    return outcome(optimizer, ps)


def by_kernels(mesh: DeviceMesh | None, name: str, dtype: torch.dtype, shapes: Any, together: bool,
               spread: int = 1 << 20, **options: Any) -> dict[str, Any]:
    """The same through kernels, as on GPUs, and how many parameters were updated at once."""
    case, found = case_of(name), []
    inner = case.make._step_batch

    def counted(self: Any, batch: Any) -> Any:
        found.append(len(batch))
        return inner(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        for module in [m for k, m in sys.modules.items() if k.startswith("lissom.")]:
            if hasattr(module, "use_triton"):
                patch.setattr(module, "use_triton", lambda backend, device: backend != "torch")
        if not together:
            patch.setattr(batches, "_by_address", lambda p, g: False)
        patch.setattr(case.make, "_step_batch", counted)
        more = {"update_proj_gap": 3} if case.option("update_proj_gap") else {}
        # What is gathered goes alone: by default nothing is.
        out = trained(mesh, name, 4, dtype, shapes, spread=spread, **more, **options)
    return {**out, "found": found}


def temporaries(mesh: DeviceMesh, make: Any, shape: tuple[int, int]) -> int:
    """Peak bytes of the second step's temporaries on this rank, of 16 sharded matrices."""
    ps = [torch.nn.Parameter(placed(x, mesh)) for x in tensors([shape] * 16)]
    optimizer = make(ps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lissom.optim.batches._WINDOW", 1)  # windows of one matrix, in elements
        for i in range(2):
            give(ps, i, mesh)
            with LiveBytes() as live:
                optimizer.step()
    return int(live.peak)


def exchanged(mesh: DeviceMesh, name: str, shape: tuple[int, ...], steps: int,
              places: list[Placement] | None = None, **more: Any
              ) -> list[tuple[list[int], list[int]]]:
    """For each step the elements of each tensor that was gathered, and of each sum over the ranks.
    """
    quantize_small()
    case = case_of(name)
    p = torch.nn.Parameter(placed(tensors([shape])[0], mesh, places))
    optimizer = case([("w", p)], metrics=False, **more)
    gathers: list[int] = []
    sums: list[int] = []
    gather, reduce, found = sharding.gathered, torch.distributed.all_reduce, []

    def gathering(tensors: Any) -> list[Tensor]:
        gathers.extend(x.numel() for x in tensors if isinstance(x, DTensor))
        return gather(tensors)

    def reducing(x: Tensor, *args: Any, **given: Any) -> Any:
        if x.is_floating_point():  # not the flags by which ranks agree that all is finite
            sums.append(x.numel())
        return reduce(x, *args, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "gathered", gathering)
        patch.setattr(torch.distributed, "all_reduce", reducing)
        for i in range(steps):
            give([p], i, mesh, places)
            optimizer.step()
            found.append(([*gathers], [*sums]))
            gathers.clear()
            sums.clear()
    return found


def give(ps: list[Any], step: int, mesh: DeviceMesh | None,
         places: list[Placement] | None = None, still: bool = False) -> None:
    """The gradients of a step, the same on any number of ranks; ``still``: see :func:`trained`."""
    for p, g in zip(ps, tensors([p.shape for p in ps], 100 + step), strict=True):
        if still and p.ndim > 2:
            g[-1] = 0
        if p.requires_grad:
            p.grad = placed(g.to(p.dtype), mesh, places)


def outcome(optimizer: Any, ps: list[Any]) -> dict[str, Any]:
    """Weights and state in full, and the bytes of the state that this rank holds."""
    states = [optimizer.state.get(p, {}) for p in ps]
    of = {p: o for o in optimizer.param_groups for p in o["params"]}
    return {"weights": [plain(p) for p in ps],
            "state": [{k: plain(x) for k, x in s.items()} for s in states],
            "metrics": optimizer.metrics(),
            "reasons": [row.reason for row in optimizer.plan()],
            "slots": [optimizer.stored_slots(p, of[p]) if p in optimizer.state else {} for p in ps],
            "bytes": [{k: (x.to_local() if isinstance(x, DTensor) else x).nbytes
                       for k, x in s.items()} for s in states]}


def rows_and_back(mesh: DeviceMesh, places: list[Placement], sizes: list[int]) -> list[Any]:
    """Of matrices of so many rows, what this rank has as rows, and what one that it changes
    becomes.
    """
    found = []
    for size in sizes:
        x = torch.arange(5.0 * size).view(size, 5)
        p = placed(x.clone(), mesh, places)
        rows, part = sharding.rows_of(p), sharding.in_rows(p).clone()
        assert rows is not None
        (whole,) = sharding.gathered([p])
        (sums,) = exchanged_whole([part], [rows], lambda _, some: [a.cumsum(0) for a in some])
        sharding.put_rows(p, part + 1000)
        found.append({"start": rows.start, "counts": rows.counts, "rank": rows.rank,
                      "right": torch.equal(part, rows.own(x)), "whole": torch.equal(whole, x),
                      "back": sharding.held(p) or torch.equal(plain(p), x + 1000),
                      "owned": torch.equal(sums, rows.own(x.cumsum(0))),
                      "sum": rows.sum(part.sum()).item() == x.sum().item(),
                      "columns": torch.equal(rows.joined(rows.columns(part), 5), x)})
    return found


def with_nan(mesh: DeviceMesh, name: str, nonfinite: str) -> dict[str, Any]:
    """A NaN in the rows of one rank."""
    quantize_small()
    ps = [torch.nn.Parameter(placed(p.detach(), mesh))
          for p in case_of(name).parameters([(7, 5), (4,)])]
    optimizer = case_of(name)(named(ps), nonfinite=nonfinite)
    give(ps, 0, mesh)
    optimizer.step()
    before = [plain(p) for p in ps]
    give(ps, 1, mesh)
    if mesh.get_rank() == 1:
        ps[0].grad.to_local()[0, 0] = torch.nan
    error = ""
    try:
        optimizer.step()
    except FloatingPointError as found:
        error = str(found)
    return {"before": before, "after": [plain(p) for p in ps], "error": error,
            "skipped": optimizer.skipped_steps}


def refusals(mesh: DeviceMesh, name: str) -> list[str]:
    """Messages about what cannot be: a partial sum as parameter, a gradient on another mesh, a
    saved value that is placed elsewhere.
    """
    messages = []
    partial = DTensor.from_local(torch.ones(6, 4), mesh, [Partial()])
    p = torch.nn.Parameter(placed(torch.ones(6, 4), mesh))
    other = DeviceMesh("cpu", [[*range(mesh.size())]])
    for step in (lambda: case_of(name)([("w", torch.nn.Parameter(partial))]), None):
        try:
            if step is not None:
                step()
            else:
                optimizer = case_of(name)([("w", p)])
                p.grad = placed(torch.ones(6, 4), other, [Replicate(), Shard(0)])
                optimizer.step()
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    x = torch.ones(2, 2)
    for here in (placed(x, mesh), x):
        try:
            sharding.put(here, placed(x, mesh, [Shard(1)]))
        except ValueError as error:
            messages.append(str(error))
    return messages


def from_torch(mesh: DeviceMesh, places: list[Placement]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights after steps of torch's AdamW, and where ours has taken over its state halfway."""
    found = []
    for cls in (torch.optim.AdamW, AdamW):
        ps = [torch.nn.Parameter(placed(x, mesh, places)) for x in tensors([(6, 9), (7, 4)])]
        optimizer: Any = torch.optim.AdamW(ps, lr=1e-2)
        for i in range(6):
            if i == 3 and cls is AdamW:
                saved = optimizer.state_dict()
                optimizer = AdamW(ps, lr=1e-2)
                optimizer.load_state_dict(saved)
            give(ps, i, mesh, places)
            optimizer.step()
        found.append([plain(p) for p in ps])
    return found[0], found[1]


# ---- real models


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    """Odd sizes, so that shards are uneven; the head has fewer rows than there are ranks."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(12, 18), torch.nn.Tanh(), torch.nn.Linear(18, 7), torch.nn.Tanh(),
              torch.nn.Linear(7, 2)]
    return torch.nn.Sequential(*layers).to(dtype)


def optimizer_of(model: torch.nn.Module, name: str, **more: Any) -> Any:
    case = case_of(name)
    if case.roles:
        return case(list(model.named_parameters()), **{"lr": 1e-2, **more})
    rank = case.options.get("rank")
    return case(param_groups(model, rank=rank or 3), **{"lr": 1e-2, **more})


def take(model: torch.nn.Module, optimizer: Any, steps: range, rank: int = 0, ranks: int = 1,
         micro: int = 1, autocast: bool = False) -> list[float]:
    """Steps on batches of 12 lines, of which a rank has its part; the losses of the whole.

    DDP sends the gradients of the last of a rank's ``micro`` micro-batches, with those before it.
    """
    losses = []
    for i in steps:
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(12, 12, generator=generator)
        y = x[:, :2].sin()
        part = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
        losses.append(0.0)
        for j in range(micro):
            here = range(*part.indices(12))[j::micro]
            waits = j < micro - 1 and hasattr(model, "no_sync")
            with (model.no_sync() if waits else contextlib.nullcontext(),
                  torch.autocast("cpu", torch.bfloat16, enabled=autocast)):
                loss = (model(x[here]).float() - y[here]).square().mean() / micro
                loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def fsdp(mesh: DeviceMesh | None, name: str, steps: int = 8, half: bool = False,
         in_backward: bool = False, limit: float | None = None, **more: Any) -> dict[str, Any]:
    """A model trained under FSDP2, or on one device."""
    if mesh is None:
        model = network()
        optimizer = optimizer_of(model, name, **more)
        if in_backward:
            update_in_backward(optimizer, max_grad_norm=limit)
        take(model, optimizer, range(steps))
        return outcome(optimizer, list(model.parameters()))
    quantize_small()
    model = sharded(mesh, half)
    optimizer = optimizer_of(model, name, **more)
    if in_backward:
        update_in_backward(optimizer, max_grad_norm=limit)
    take(model, optimizer, range(steps), mesh.get_rank(), mesh.size())
    return outcome(optimizer, list(model.parameters()))


def sharded(mesh: DeviceMesh, half: bool = False, tensor: bool = False) -> torch.nn.Module:
    """Under FSDP2, with two dimensions HSDP; or over tensor parallelism along the inner one."""
    model = network()
    if tensor:
        parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        mesh = mesh["outer"]
    policy = MixedPrecisionPolicy(torch.bfloat16 if half else None,
                                  torch.float32 if half else None)
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def adapted(mesh: DeviceMesh | None, cls: type, engine: str = "fsdp", steps: int = 12,
            magnitude: bool = False, **more: Any) -> dict[str, Any]:
    """Pairs beside frozen weights in a real model, trained on any number of ranks.

    Returns:
        Weights in full by name, and how often vectors were exchanged where they are.
    """
    quantize_small()
    model = lora(network(), rank=2, target="[02]", init="lora" if magnitude else "switchlora",
                 normalize="input" if magnitude else None)
    wrapped = model
    if mesh is not None and engine == "fsdp":
        for layer in model:
            if isinstance(layer, torch.nn.Linear | LoRALinear):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif mesh is not None:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    optimizer = cls(adapter_groups(model, **({"rank": 1} if magnitude else {})), lr=1e-2, **more)
    rank, ranks = (0, 1) if mesh is None else (mesh.get_rank(), mesh.size())
    take(wrapped, optimizer, range(steps), rank, ranks)
    return {name: plain(p) for name, p in model.named_parameters()}


def switched_bits(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Masters and weights of bf16 pairs that switches alone move, all in full by name."""
    model = lora(network(torch.bfloat16), rank=4, target="[02]")
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = SwitchLoRAAdamW(adapter_groups(model), lr=0.0, weight_decay=0.0, interval=8,
                                freeze_steps=1, decay_steps=1000, master_bits=16)
    for state in optimizer.state.values():
        for x in state.values():
            if x.dtype in (torch.int8, torch.uint8):
                sharding.local(x).fill_(3)
    rank, ranks = (0, 1) if mesh is None else (mesh.get_rank(), mesh.size())
    take(model, optimizer, range(4), rank, ranks, autocast=True)
    found = {name: plain(p) for name, p in model.named_parameters()}
    for name, p, _ in optimizer._named():
        found |= {f"{name}.{k}": plain(x) for k, x in optimizer.state[p].items() if "master" in k}
    return found


def ddp(mesh: DeviceMesh, name: str, steps: int = 8, projected: bool = False, micro: int = 1,
        autocast: bool = False, **more: Any) -> dict[str, Any]:
    """The same under DistributedDataParallel, with or without projected reductions."""
    quantize_small()
    model = network()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    optimizer = optimizer_of(model, name, **more)
    counts = projected_allreduce(optimizer, wrapped) if projected else None
    take(wrapped, optimizer, range(steps), mesh.get_rank(), mesh.size(), micro, autocast)
    result = outcome(optimizer, list(model.parameters()))
    if counts is not None:
        result |= {"sent": counts.bytes_sent, "plain": counts.bytes_plain}
    return result


class Parallel(torch.nn.Module):
    """A table, a norm, and layers, as tensor parallelism cuts them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = torch.nn.Embedding(30, 12), torch.nn.LayerNorm(12)
        self.up, self.down = torch.nn.Linear(12, 20), torch.nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(self.norm(self.table(x))).tanh())
        return out


def tensor_parallel(mesh: DeviceMesh | None, name: str, way: str = "step", limit: float = 1.0,
                    **more: Any) -> dict[str, Any]:
    """Trained with every style of the usual plan: the table's is cut by rows and its gradient
    whole, the norm is whole and its gradient a part of a sum.

    Args:
        mesh: the ranks; of two dimensions the outer one is FSDP2's.
        name: of the case.
        way: ``"step"``, with gradients clipped; ``"update"`` in the backward pass; ``"project"``
            there, clipped by the step, or ``"clip"`` by a call.
        limit: norm to which gradients are clipped.
        more: options.
    """
    quantize_small()
    model: Any = Parallel()
    if mesh is not None:
        parallelize_module(model, mesh["inner"] if mesh.ndim == 2 else mesh, {
            "table": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel()})
        if mesh.ndim == 2:
            fully_shard(model, mesh=mesh["outer"])
            cuts = model.up.weight.placements
            assert [type(x) for x in cuts] == [_StridedShard, Shard], cuts
    optimizer = optimizer_of(model, name, **more)
    handle: Any = contextlib.nullcontext()
    if way == "update":
        handle = update_in_backward(optimizer)
    elif way == "project":
        handle = project_in_backward(optimizer, max_grad_norm=limit, exact_norm=True)
    elif way == "clip":
        handle = project_in_backward(optimizer, exact_norm=True)
    norms = []
    for i in range(6):
        x = torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(i))
        model(x).square().mean().backward()
        if way == "step":
            norms.append(plain(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        elif way == "clip":
            norms.append(handle.clip_grad_norm_(limit))
        optimizer.step()
        optimizer.zero_grad()
    with handle:  # ends here, and its buffers
        pass
    return outcome(optimizer, list(model.parameters())) | {"norms": norms}


def eight(rank: int, names: list[str], places: list[Placement], shapes: Any
          ) -> list[list[dict[str, Any]]]:
    """Weights that a square of four of eight ranks shares, the other four being replicas.

    For each name what :func:`trained` gives, of ranks without a group of their own, then of others
    that made one, and what was gathered in the last of two steps.
    """
    near = DeviceMesh("cpu", torch.arange(8).view(2, 2, 2))
    far = DeviceMesh("cpu", torch.arange(8).view(2, 2, 2).permute(2, 0, 1))
    early = AdamW([("w", torch.nn.Parameter(placed(torch.zeros(11, 8), far, [Replicate(), *places]))
                    )]).plan()  # which settles nothing
    assert "have no group" in early["w"].reason
    for mesh, backend in ((near, "fake"), (far, "fake"), (far, None)):  # the last as the docs say
        torch.distributed.new_subgroups_by_enumeration(mesh.mesh.flatten(1).tolist(),
                                                       backend=backend)
    found = []
    for name in names:
        outs: list[dict[str, Any]] = []
        for mesh in (near, far):
            out = trained(mesh, name, 5, shapes=shapes, places=[Replicate(), *places])
            gathers, _ = exchanged(mesh, name, (11, 8), 2, [Replicate(), *places])[-1]
            outs.append({"weights": out["weights"], "state": out["state"], "gathers": sum(gathers),
                         "reasons": out["reasons"]})
        found.append(outs)
    return found


def fsdp1(mesh: DeviceMesh, cls: type, views: bool) -> dict[str, Any]:
    """Flattened by FSDP1, saved and loaded in the middle, and once more at the end."""
    def start() -> tuple[Any, Any]:
        torch.manual_seed(0)
        inner = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Tanh(),
                                    torch.nn.Linear(48, 32))
        model = FullyShardedDataParallel(inner, process_group=mesh.get_group(),
                                         device_id=torch.device("cpu"), use_orig_params=views)
        return model, cls(model.parameters(), lr=1e-2)

    def steps(model: Any, optimizer: Any, numbers: range) -> None:
        for i in numbers:
            generator = torch.Generator().manual_seed(10 * i + mesh.get_rank())
            model(torch.randn(4, 32, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = start()
    steps(model, optimizer, range(3))
    saved = get_optimizer_state_dict(model, optimizer), get_model_state_dict(model)
    saved = copy.deepcopy(saved)
    steps(model, optimizer, range(3, 6))
    resumed, other = start()
    set_optimizer_state_dict(resumed, other, saved[0])
    set_model_state_dict(resumed, saved[1])
    steps(resumed, other, range(3, 6))
    set_optimizer_state_dict(resumed, other, get_optimizer_state_dict(resumed, other))
    return {"straight": [plain(p) for p in model.parameters()],
            "resumed": [plain(p) for p in resumed.parameters()]}


def flattened(mesh: DeviceMesh) -> list[str]:
    """What is said of matrices that FSDP1 has flattened."""
    messages = []
    for views in (True, False):
        model = FullyShardedDataParallel(network(), process_group=mesh.get_group(),
                                         device_id=torch.device("cpu"), use_orig_params=views)
        try:
            param_groups(model, rank=2)
        except ValueError as error:
            messages.append(str(error))
    return messages


def damaged(mesh: DeviceMesh, name: str) -> tuple[str, bool]:
    """What loading says of a state that is damaged on rank 1, and whether it changed nothing."""
    model = sharded(mesh)
    optimizer = optimizer_of(model, name)
    take(model, optimizer, range(2))
    state = optimizer.state_dict()
    entry = max(state["state"].values(), key=lambda s: s["exp_avg_sq"].numel())
    entry["exp_avg_sq"] = entry["exp_avg_sq"].clone()
    if mesh.get_rank() == 1:
        entry["exp_avg_sq"].to_local().sub_(1.0)
    take(model, optimizer, range(2, 3))
    before = outcome(optimizer, list(model.parameters()))
    message = ""
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        message = str(error)
    after = outcome(optimizer, list(model.parameters()))
    same = all(torch.equal(a[k], b[k]) for a, b in zip(before["state"], after["state"], strict=True)
               for k in a)
    return message, same


def begun_on_some(mesh: DeviceMesh, name: str) -> tuple[str, int]:
    """What loading says where rank 0 has got a state that has not begun, and the step after it."""
    model = sharded(mesh)
    optimizer = optimizer_of(model, name)
    take(model, optimizer, range(2))
    state = optimizer.state_dict()
    if mesh.get_rank() == 0:
        state = {"state": {}, "param_groups": [{**g, "format": 0} for g in state["param_groups"]]}
    message = ""
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        message = str(error)
    take(model, optimizer, range(2, 3))
    return message, int(next(iter(optimizer.state.values()))["step"])


# ---- checkpoints


def saved(mesh: DeviceMesh, name: str, folder: str, steps: range, resume: bool, way: str = "dcp",
          die_at: int | None = None, **more: Any) -> dict[str, Any]:
    """Train from or to a checkpoint; the last rank may die in the middle.

    Args:
        mesh: of this run; with two dimensions FSDP2 over tensor parallelism.
        name: of the row.
        folder: of the checkpoint, written after the last step, or before a death.
        steps: to take.
        resume: from the checkpoint.
        way: ``"dcp"``, by torch.distributed.checkpoint; ``"full"``, one whole state dict.
        die_at: the step at which the last rank is gone.
        more: options.
    """
    quantize_small()
    model = sharded(mesh, tensor=mesh.ndim == 2)
    optimizer = optimizer_of(model, name, **more)
    group = mesh.get_group() if mesh.ndim == 1 else None
    whole = StateDictOptions(full_state_dict=True)
    if resume and way == "dcp":
        state = {"model": get_model_state_dict(model),
                 "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder, process_group=group)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    elif resume:
        state = torch.load(f"{folder}/full.pt", weights_only=True)
        set_model_state_dict(model, state["model"], options=whole)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=whole)
    losses = []
    for i in steps:
        if die_at is not None and i == die_at and mesh.get_rank() == mesh.size() - 1:
            os._exit(1)
        # every rank sees the whole batch: the mean over ranks does not depend on their number
        losses += take(model, optimizer, range(i, i + 1))
        if die_at is None and i < steps[-1]:
            continue
        if way == "dcp":
            dcp.save({"model": get_model_state_dict(model),
                      "optimizer": get_optimizer_state_dict(model, optimizer)},
                     checkpoint_id=folder, process_group=group)
        else:
            state = {"model": get_model_state_dict(model, options=whole),
                     "optimizer": get_optimizer_state_dict(model, optimizer, options=whole)}
            if mesh.get_rank() == 0:
                torch.save(state, f"{folder}/full.pt")
            torch.distributed.barrier(group=group)
    return {**outcome(optimizer, list(model.parameters())), "losses": losses}


def masters_in_a_whole_state(mesh: DeviceMesh) -> tuple[list[Tensor], list[Tensor]]:
    """Weights in full precision after four steps, without and with a whole state in between."""
    results = []
    for resumed in (False, True):
        model = fully_shard(network(torch.bfloat16), mesh=mesh)
        optimizer = optimizer_of(model, "galoreadamw", master_bits=16)
        for i in range(4):
            if resumed and i == 2:
                whole = StateDictOptions(full_state_dict=True)
                saved = (get_model_state_dict(model, options=whole),
                         get_optimizer_state_dict(model, optimizer, options=whole))
                model = fully_shard(network(torch.bfloat16), mesh=mesh)
                optimizer = optimizer_of(model, "galoreadamw", master_bits=16)
                set_model_state_dict(model, saved[0], options=whole)
                set_optimizer_state_dict(model, optimizer, saved[1], options=whole)
            give(list(model.parameters()), i, mesh)
            optimizer.step()
        results.append([plain(optimizer.full_precision(p)) for p in model.parameters()])
    return results[0], results[1]
