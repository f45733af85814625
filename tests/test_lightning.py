"""PyTorch Lightning: a module trains on real text, is saved, resumed and compared.

Lightning's automatic optimization takes a step by ``optimizer.step(closure)``; the closure runs
model and backward pass.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.bench.llama import Llama
from lissom.bench.shapes import Shape
from lissom.optim import (
    APOLLO,
    FRUGAL,
    AdamW,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GradNormLoRPAdamW,
    Muon,
    PolarGrad,
    SwitchLoRAAdamW,
    Trion,
    adapter_groups,
    lora,
    param_groups,
    project_in_backward,
    update_in_backward,
)
from torch.nn import functional

from .helpers import assert_same

L = pytest.importorskip("lightning")

CLASSES = [APOLLO, FRUGAL, AdamW, DCTAdamW, FiraAdamW, GaLoreAdamW, GaLoreAdamW8bit,
           GradNormLoRPAdamW, Muon, PolarGrad, SwitchLoRAAdamW, Trion]
LENGTH, BATCHES = 32, 4


def text() -> torch.utils.data.DataLoader[Any]:
    """Four batches of four rows of bytes of a module of the standard library."""
    data = Path(argparse.__file__).read_bytes()[:BATCHES * 4 * LENGTH]
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().view(-1, LENGTH)
    return torch.utils.data.DataLoader(rows, batch_size=4)


def groups_of(module: Any, cls: Any) -> Any:
    """What a user of the class gives it; pairs are put in before."""
    return adapter_groups(module) if cls is SwitchLoRAAdamW else param_groups(module, rank=8)


class Module(L.LightningModule):
    """A language model; ``spoilt`` is the batch whose loss is infinite."""

    def __init__(self, cls: Any, spoilt: int = -1, **options: Any) -> None:
        super().__init__()
        self.model = Llama(Shape(32, 512, 4, 2, 128))
        self.model.initialize(torch.Generator().manual_seed(0))
        if cls is SwitchLoRAAdamW:
            torch.manual_seed(0)  # of the factors
            lora(self.model, rank=4)
        self.cls, self.spoilt, self.options = cls, spoilt, options
        self.losses: list[float] = []

    def loss(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        logits = self.model(rows[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        return loss * torch.inf if index == self.spoilt else loss

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.loss(batch, index)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.cls(groups_of(self, self.cls), lr=1e-2, **self.options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fitted(module: Any, folder: Path, epochs: int, load: Path | None = None, **options: Any) -> Any:
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
                        enable_model_summary=False, default_root_dir=str(folder),
                        max_epochs=epochs, enable_checkpointing=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one about workers of the loader, one about an empty log
        trainer.fit(module, text(), ckpt_path=None if load is None else str(load),
                    **({} if load is None else {"weights_only": True}))
    return trainer


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_step_with_a_closure_is_the_ordinary_step(cls, tmp_path):
    """Eight steps as in a plain loop, bit for bit; two of them are skipped for an infinite loss."""
    module = Module(cls, spoilt=1, nonfinite="skip")
    trainer = fitted(module, tmp_path, 2)
    plain = Module(cls, spoilt=1, nonfinite="skip")
    made = plain.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for _ in range(2):
        for index, rows in enumerate(text()):
            optimizer.zero_grad()
            plain.loss(rows, index).backward()
            optimizer.step()
            schedule.step()
    found = trainer.optimizers[0]
    assert type(found) is cls
    assert found.skipped_steps == optimizer.skipped_steps == 2
    assert module.losses[-1] < module.losses[0]
    assert_same(module.state_dict(), plain.state_dict())
    assert_same(found.state_dict(), optimizer.state_dict())


# name: class, its options, the Trainer's
RUNS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "galore": (GaLoreAdamW, {"update_proj_gap": 3}, {}),
    "galore-8bit-accumulation-clipping": (
        GaLoreAdamW8bit, {"update_proj_gap": 3},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    "muon-bf16": (Muon, {"lr_adamw": 1e-2}, {"precision": "bf16-mixed"}),
    "fira-bf16-weights": (FiraAdamW, {"update_proj_gap": 3, "state_bits": 8},
                          {"precision": "bf16-true"}),
    "pairs": (SwitchLoRAAdamW, {"decay_steps": 4}, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_training_is_the_uninterrupted_one(name, tmp_path):
    """Three epochs, and one, a checkpoint, two more in a new Trainer: equal bit for bit."""
    cls, options, more = RUNS[name]
    straight = Module(cls, **options)
    trainer = fitted(straight, tmp_path, 3, **more)
    assert straight.losses[-1] < straight.losses[0]
    first = Module(cls, **options)
    fitted(first, tmp_path, 1, **more).save_checkpoint(tmp_path / "saved.ckpt")
    second = Module(cls, **options)
    resumed = fitted(second, tmp_path, 3, load=tmp_path / "saved.ckpt", **more)
    assert first.losses + second.losses == straight.losses
    assert_same(second.state_dict(), straight.state_dict())
    assert_same(resumed.optimizers[0].state_dict(), trainer.optimizers[0].state_dict())


class Manual(Module):
    """Gradients projected or used up in the backward pass: manual optimization, no closure."""

    def __init__(self, attach: Any, wrapped: bool, **options: Any) -> None:
        super().__init__(GaLoreAdamW, **options)
        self.automatic_optimization, self.attach, self.left = False, attach, 0
        self.wrapped = wrapped

    def on_fit_start(self) -> None:
        self.attach(self.optimizers(use_pl_optimizer=self.wrapped))

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.manual_backward(self.loss(batch, index))
        self.left += sum(p.grad is not None for n, p in self.named_parameters() if "proj" in n)
        optimizer.step()
        self.lr_schedulers().step()
        optimizer.zero_grad()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("attach", [project_in_backward, update_in_backward])
def test_manual_optimization_works_in_the_backward_pass(attach, wrapped, tmp_path):
    plain = Module(GaLoreAdamW, update_proj_gap=3)
    manual = Manual(attach, wrapped, update_proj_gap=3)
    fitted(plain, tmp_path, 2)
    trainer = fitted(manual, tmp_path, 2)
    assert trainer.global_step == 0  # Lightning counts its wrapper's steps alone
    assert manual.left == 0
    assert_same(manual.state_dict(), plain.state_dict())


def test_automatic_optimization_refuses_it_with_the_reason(tmp_path):
    class Automatic(Module):
        def on_fit_start(self) -> None:
            project_in_backward(self.optimizers(use_pl_optimizer=False))

    with pytest.raises(RuntimeError, match=r"step\(\) got a closure"):
        fitted(Automatic(GaLoreAdamW), tmp_path, 1)


class Wrapped(Module):
    """It drives the optimizer itself, through what Lightning wraps it in."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False
        self.energies: list[float] = []

    def training_step(self, batch: torch.Tensor, index: int) -> None:
        wrapped: Any = self.optimizers()
        assert len(wrapped.state) == sum(p.requires_grad for p in self.parameters())
        assert len(wrapped.plan()) == len(wrapped.state_dict()["param_groups"][0]["params"]) + sum(
            len(group["params"]) for group in wrapped.param_groups[1:])
        wrapped.zero_grad()
        self.manual_backward(self.loss(batch, index))
        wrapped.step()
        self.energies += [float(m["energy"].nanmean()) for m in wrapped.metrics() if "energy" in m]


def test_manual_optimization_through_the_wrapper(tmp_path):
    module = Wrapped(GaLoreAdamW, metrics=True)
    fitted(module, tmp_path, 1)
    assert len(module.energies) == BATCHES
    assert all(0 < x <= 1 + 1e-5 for x in module.energies)
