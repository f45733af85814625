"""Train a small LLaMA on several ranks with FSDP2, save it, and go on.

gloo on the CPU, nccl on CUDA. The optimizer is made after ``fully_shard`` and needs no option.
With ``proj_type="right"`` moments have the rows of their weights and are sharded with them; bases
of 4096 elements or more are sharded too, and gathered for an update.

    torchrun --nproc-per-node 2 -m lissom.bench.recipes.fsdp2 --json FILE

Measured on the CPU (bench/results/recipe-fsdp2.json): after 60 steps two ranks are at a training
loss of 2.274 with 0.55 MB of state each, one rank at 2.274 with 1.10 MB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from ...optim import GaLoreAdamW, param_groups
from .. import text
from ..llama import Llama
from ..names import state_bytes
from ..shapes import LLAMA
from .common import finish, parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, save and load after half of the steps, and return the result."""
    options = parser(__doc__, 60)
    options.add_argument("--data", metavar="FILE", help="plain or .xz text")
    args = options.parse_args(argv)
    data, _ = text.load(args.data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())

    def built() -> tuple[Llama, GaLoreAdamW]:
        model = Llama(replace(LLAMA["tiny"], vocabulary=256)).to(device)
        model.initialize(torch.Generator().manual_seed(0))
        mesh = init_device_mesh(device, (ranks,))
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
        return model, GaLoreAdamW(param_groups(model, rank=32), lr=2e-2, proj_type="right",
                                  state_bits=8)

    model, optimizer = built()
    losses = []
    for step in range(args.steps):
        if step == args.steps // 2:  # a new model goes on from what was saved
            with tempfile.TemporaryDirectory() as folder:
                place = [folder]
                dist.broadcast_object_list(place)
                weights, state = get_state_dict(model, optimizer)
                save({"model": weights, "optimizer": state}, checkpoint_id=place[0])
                model, optimizer = built()
                weights, state = get_state_dict(model, optimizer)
                load({"model": weights, "optimizer": state}, checkpoint_id=place[0])
                set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
                dist.barrier()  # before the folder goes
        x, y = (z.chunk(ranks)[rank].to(device) for z in text.batch(data, 16, 128, step))
        loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        losses.append(mean.item())

    dist.destroy_process_group()
    row = {"ranks": ranks, "state_bytes_of_a_rank": state_bytes(optimizer), "losses": losses}
    return finish("fsdp2", argv, args.json, row) if rank == 0 else row


if __name__ == "__main__":
    main()
