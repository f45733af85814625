"""Models that are compiled, or that compute their activations again: the same training."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from lissom.optim import (
    AdamW,
    FiraAdamW,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    Muon,
    SwitchLoRAAdamW,
    adapter_groups,
    lora,
    param_groups,
    project_in_backward,
    update_in_backward,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from .helpers import tensors

# name: class, groups of a model, options
METHODS: dict[str, Any] = {
    "galore": (GaLoreAdamW, lambda m: param_groups(m, rank=4), {"update_proj_gap": 3}),
    "fira": (FiraAdamW, lambda m: param_groups(m, rank=4), {"update_proj_gap": 3}),
    "muon": (Muon, param_groups, {}),
    "pairs": (SwitchLoRAAdamW, adapter_groups, {"decay_steps": 20}),
    "normalized pairs": (GradNormLoRPAdamW, lambda m: adapter_groups(m, rank=2), {}),
}
HANDLES = {"step": None, "project": project_in_backward, "update": update_in_backward}


class Net(nn.Module):
    """Two blocks, each computed once more in the backward pass where that is asked for."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 12), nn.Linear(12, 50)
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12), nn.LayerNorm(12)) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(
                block, x, use_reentrant=self.reentrant)
        return self.head(x)


def trained(method: str, how: str, *, compiled: bool = False, reentrant: bool | None = None
            ) -> list[torch.Tensor]:
    """Weights after six steps."""
    cls, groups, options = METHODS[method]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(reentrant)
        if "pairs" in method:
            lora(model, rank=4, **({"normalize": "input"} if "normalized" in method else {}))
    run = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = cls(groups(run), lr=1e-2, **options)
    attach = HANDLES[how]
    with contextlib.nullcontext() if attach is None else attach(optimizer):
        for i in range(6):
            tokens = (tensors([(3, 8)], 20 + i)[0].abs() * 20).long() % 50
            loss = nn.functional.cross_entropy(run(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def ways() -> list[tuple[str, str]]:
    return [(method, how) for method in METHODS for how in HANDLES if how == "step" or (
        method == "galore" or (how == "update" and method in ("fira", "muon")))]


@pytest.mark.parametrize(("method", "how"), ways())
@pytest.mark.parametrize("options", [
    {"compiled": True}, {"reentrant": False}, {"reentrant": True},
    {"compiled": True, "reentrant": False}], ids=str)
def test_the_same_training(method: str, how: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    for a, b in zip(trained(method, how, **options), trained(method, how), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_adapters_beside_a_quantized_base(kind: str) -> None:
    """All of the model's parameters may be given; those that bitsandbytes has quantized stay."""
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    more = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {
        "compute_dtype": torch.float32}
    results = []
    for cls, rank in ((torch.optim.AdamW, 0), (AdamW, 0), (AdamW, None), (GaLoreAdamW, 4)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(*(getattr(bnb.nn, kind)(64, 64, **more) for _ in range(2)))
            model = peft.get_peft_model(model.to("cpu"), peft.LoraConfig(
                r=8, target_modules=["0", "1"]))
        codes = [p.clone() for p in model.parameters() if not p.is_floating_point()]
        optimizer = cls(model.parameters() if rank == 0 else param_groups(model, rank), lr=1e-2)
        for i in range(4):
            x = tensors([(16, 64)], i)[0]
            (model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(codes) == 2
        left = [p for p in model.parameters() if not p.is_floating_point()]
        assert all(torch.equal(a, b) for a, b in zip(codes, left, strict=True))
        results.append([p.detach() for p in model.parameters() if p.requires_grad])
    plain, ours, groups, low = results
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, groups, strict=True))
    assert len(low) == 4
    assert all(bool(x.isfinite().all()) and bool(x.any()) for x in low)
