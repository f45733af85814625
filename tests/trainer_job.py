"""What each rank of a Trainer does: ``torchrun -m tests.trainer_job FOLDER ddp``, or ``fsdp2``."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import accelerate.state
import torch
import transformers
from lissom.optim import AdamW, GaLoreAdamW, GaLoreAdamW8bit, Muon
from lissom.optim.hf import (
    ProjectInBackwardCallback,
    UpdateInBackwardCallback,
    without_ddp,
)
from torch.distributed.tensor import DTensor

from .test_hf import asked, looped, result, trained

RANKS = {"ddp_backend": "gloo", "per_device_train_batch_size": 2}
SHARDED = {**RANKS, "fsdp": True, "fsdp_config": {
    "version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "SHARDED_STATE_DICT"}}


def fsdp_without_accelerators() -> None:
    """Accelerate takes FSDP's configuration on accelerators alone, though gloo would do."""
    state = accelerate.state.AcceleratorState
    inner = state.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        first = not state._shared_state
        inner(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if first and fsdp_plugin is not None:
            for shared in (state._shared_state, accelerate.state.PartialState._shared_state):
                shared["distributed_type"] = accelerate.utils.DistributedType.FSDP
            state._shared_state["fsdp_plugin"] = fsdp_plugin

    state.__init__ = init


class Survivors(transformers.TrainerCallback):
    """How many of the whole parameters are in memory when training begins."""

    def watch(self, model: torch.nn.Module) -> torch.nn.Module:
        self.seen = [weakref.ref(p) for p in model.parameters()]
        return model

    def on_train_begin(self, *args: Any, **more: Any) -> None:
        gc.collect()
        self.left = sum(ref() is not None for ref in self.seen)


def ddp(folder: Path) -> list[Any]:
    """Train, and resume from the checkpoint; weights of Accelerate's loop with DDP and without."""
    how = asked(GaLoreAdamW, update_proj_gap=3)
    options = {**RANKS, "max_grad_norm": 0.5}
    found: list[Any] = [
        result(trained(folder / "a", how, **options)),
        result(trained(folder / "b", how, resume=folder / "a/checkpoint-5", **options))]
    for ddp in (True, False):
        # Not clipped: projections have another norm.
        loop = looped(GaLoreAdamW, 6, ddp=ddp, in_backward=not ddp, limit=1e3, update_proj_gap=4)
        found.append(dict(loop["weights"]))
    found.append({name: unwrapped(folder / name, *run) for name, run in REPLICATED.items()})
    return found


# Without DDP: how the Trainer gets the optimizer, the callback, its arguments.
REPLICATED: dict[str, Any] = {
    "project": (asked(GaLoreAdamW, update_proj_gap=7), ProjectInBackwardCallback,
                {"gradient_accumulation_steps": 2}),
    "update": (asked(Muon), UpdateInBackwardCallback, {}),
    "bf16": (asked(GaLoreAdamW8bit, update_proj_gap=3), UpdateInBackwardCallback, {"bf16": True}),
}


def unwrapped(folder: Path, how: Any, callback: Any, more: dict[str, Any]) -> list[Any]:
    """Results with DDP, without it, and resumed without it."""
    options = {**RANKS, **more}
    # Gradients that are clipped by nothing, as their projections have another norm.
    found = [result(trained(folder / "ddp", how, **options))]
    for at, resume in (("straight", None), ("resumed", folder / "straight/checkpoint-5")):
        trainer = trained(folder / at, how, resume=resume, callbacks=[callback()],
                          before=without_ddp, **options)
        assert trainer.model_wrapped is trainer.model
        assert not trainer.optimizer.optimizer._gradients.in_backward  # it is off again
        found.append(result(trainer))
    return found


# name: how the Trainer gets the optimizer, its arguments, callbacks
RUNS: dict[str, Any] = {
    "galore": (asked(GaLoreAdamW, update_proj_gap=3), {"max_grad_norm": 0.5}, []),
    "galore-8bit": (asked(GaLoreAdamW8bit, update_proj_gap=3), {}, []),
    "bf16": (asked(AdamW), {"bf16": True}, []),
    "muon": (asked(Muon), {}, []),
    "muon-update": (asked(Muon), {}, [UpdateInBackwardCallback()]),
    "galore-project": (asked(GaLoreAdamW, update_proj_gap=7), {"gradient_accumulation_steps": 2},
                       [ProjectInBackwardCallback()]),
}


def fsdp2(folder: Path) -> dict[str, Any]:
    """Whole parameters that stayed; results straight, resumed, and with DDP in its place."""
    found: dict[str, Any] = {name: {} for name in RUNS}
    for name, (how, more, _) in RUNS.items():
        found[name]["ddp"] = result(trained(folder / name / "ddp", how, **RANKS, **more))
    fsdp_without_accelerators()
    for name, (how, more, callbacks) in RUNS.items():
        survivors = Survivors()
        checkpoint = folder / name / "straight/checkpoint-5"
        for at, resume in (("straight", None), ("resumed", checkpoint)):
            trainer = trained(folder / name / at, how, resume=resume, prepare=survivors.watch,
                              callbacks=[survivors, *callbacks], **SHARDED, **more)
            assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
            found[name] |= {at: whole(result(trainer)), "left": survivors.left}
    return found


def whole(value: Any) -> Any:
    """The same without shards."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {k: whole(x) for k, x in value.items()}
    return value


def main(folder: Path, engine: str) -> None:
    """Run one of them; the first rank saves what it returns."""
    found = {"ddp": ddp, "fsdp2": fsdp2}[engine](folder)
    if os.environ["RANK"] == "0":
        torch.save(found, folder / "results.pt")
    # Else threads of gloo may let go of a tensor when Python is gone, and abort the process.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
