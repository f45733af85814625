"""What the ranks of :mod:`tests.pool` do."""

from __future__ import annotations

from typing import Any

import torch
from lissom.optim import codec
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

from .cases import CASES
from .helpers import parameters, tensors

#: Tall, wide, square, one row, fewer rows than ranks, a vector, an image filter, a tensor.
SHAPES = [(10, 6), (6, 10), (7, 7), (1, 5), (2, 9), (5,), (5, 3, 2, 2)]


def case_of(name: str) -> Any:
    return next(case for case in CASES if case.name == name)


def quantize_small() -> None:
    """As the contract table does: its matrices are far below the size that is quantized."""
    codec.SMALL, codec.SHORT = 1, 0


def placed(x: Tensor, mesh: DeviceMesh | None, places: list[Placement] | None = None) -> Tensor:
    if mesh is None:
        return x
    return distribute_tensor(x, mesh, places or [Shard(0)] * mesh.ndim, src_data_rank=None)


def plain(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def trained(mesh: DeviceMesh | None, name: str, steps: int = 20, dtype: torch.dtype = torch.float32,
            shapes: Any = SHAPES, places: list[Placement] | None = None, first: int = 0,
            **more: Any) -> dict[str, Any]:
    """Weights and state after some steps with the same gradients on any number of ranks."""
    quantize_small()
    ps = [torch.nn.Parameter(placed(p.detach(), mesh, places))
          for p in parameters(shapes, dtype=dtype)]
    optimizer = case_of(name)([(f"p{i}", p) for i, p in enumerate(ps)], **{"lr": 1e-2, **more})
    for i in range(first, first + steps):
        for p, g in zip(ps, tensors([p.shape for p in ps], 100 + i), strict=True):
            p.grad = placed(g.to(dtype), mesh, places)
        optimizer.step()
    state = [{k: plain(x) for k, x in optimizer.state[p].items()} for p in ps]
    sharded = [{k: isinstance(x, DTensor) for k, x in optimizer.state[p].items()} for p in ps]
    return {"weights": [plain(p) for p in ps], "state": state, "sharded": sharded}
