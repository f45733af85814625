"""Bytes of a training run while it runs: a few real steps, one phase after the other.

On CUDA the allocator counts. On the CPU live tensor bytes are counted
(:mod:`lissom.bench.livebytes`), and the operating system tells what the process has in memory.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..optim import project_in_backward, update_in_backward
from ..optim.base import MatrixOptimizer
from . import names
from .estimate import IN_BACKWARD, RIVALS
from .livebytes import LiveBytes
from .sources import Source, loss_of, vocabulary

__all__ = ["attached", "fill", "measure", "rival"]


class _Counter:
    """Bytes that are alive now, and the most since :meth:`reset`."""

    def __init__(self, device: torch.device, live: LiveBytes) -> None:
        self.device, self.live = device, live

    def now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self.live.live

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.live.peak = self.live.live

    def most(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self.live.peak


def _resident() -> int:
    """The most that the process has had in memory, in bytes."""
    import resource  # Windows has none, and can estimate all the same

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def fill(model: nn.Module) -> None:
    """Small random weights, the same on devices of a kind; one-dimensional ones at 1, as of norms.

    They are drawn where they are: billions of them would take a minute on a CPU.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        with torch.no_grad():
            if p.ndim < 2:
                p.fill_(1.0)
            else:
                for row in p.split(max(1, (1 << 20) // p[0].numel())):
                    row.copy_(torch.randn(row.shape, generator=generator, device=device) * 0.02)


def rival(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """One of :data:`lissom.bench.estimate.RIVALS`; raises ImportError where it is missing."""
    if name == "bnb-adamw8bit":
        made: torch.optim.Optimizer = importlib.import_module("bitsandbytes").optim.AdamW8bit(
            model.parameters(), lr=1e-3)
        return made
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


@contextlib.contextmanager
def attached(optimizer: torch.optim.Optimizer, in_backward: str) -> Iterator[None]:
    """Work in the backward pass, one of :data:`lissom.bench.estimate.IN_BACKWARD`, for a while."""
    if in_backward == "none":
        yield
        return
    assert isinstance(optimizer, MatrixOptimizer)
    attach: Any = project_in_backward if in_backward == "project" else update_in_backward
    with attach(optimizer):
        yield


def measure(source: Source, name: str, rank: int | None, *, dtype: torch.dtype, device: str,
            batch: int, length: int, steps: int = 3, in_backward: str = "none", **options: Any
            ) -> dict[str, Any]:
    """Real steps on random tokens; the most of each phase over all steps.

    Args:
        source: the model; it must take tokens.
        name: a key of :data:`lissom.bench.names.OPTIMIZERS` or of ``RIVALS``.
        rank: of projections.
        dtype: of the weights.
        device: ``"cpu"`` or ``"cuda"``.
        batch: sequences.
        length: tokens of one.
        steps: how many, >= 2: some optimizers make their state in the first.
        in_backward: one of :data:`lissom.bench.estimate.IN_BACKWARD`.
        options: of the optimizer's class.

    Returns:
        Bytes: ``weights``; ``optimizer_state`` (on the device, without buffers of gradients);
        ``activations``, held after the forward pass; ``gradients``, held after the backward
        pass, buffers included; ``backward`` and ``step``, the most that those phases had at once;
        ``temporaries``, what ``step()`` had beyond what it found; ``peak`` of all phases;
        ``resident``, the most that the process had, the interpreter included.

    Raises:
        ValueError: the model takes no tokens, or an option breaks its rule.
    """
    assert in_backward in IN_BACKWARD
    place = torch.device(device)
    dtype = RIVALS[name].dtype or dtype if name in RIVALS else dtype
    with contextlib.ExitStack() as stack:
        live = LiveBytes()
        if place.type != "cuda":
            stack.enter_context(live)
        counter = _Counter(place, live)
        start = counter.now()
        with torch.device("meta"):
            model = source.make().to(dtype)
        tokens = vocabulary(model)
        if not tokens:
            raise ValueError(f"{source.name} takes no tokens, so its steps cannot be measured")
        model = model.to_empty(device=place)
        fill(model)
        weights = counter.now() - start
        optimizer: torch.optim.Optimizer
        if name in RIVALS:
            optimizer = rival(name, model)
        else:
            optimizer = names.build(name, model, rank, 1e-3, **options)
            # factors and candidates that a method has added
            weights = sum(p.nbytes for p in model.parameters())
        stack.enter_context(attached(optimizer, in_backward))
        generator = torch.Generator().manual_seed(1)
        most = dict.fromkeys(("activations", "gradients", "backward", "step", "temporaries"), 0)
        peak = state = 0
        for step in range(steps):
            idle = counter.now()
            batch_ = torch.randint(tokens, (batch, length), generator=generator).to(place)
            counter.reset()
            loss = loss_of(model, batch_)
            held = {"activations": counter.now() - idle}
            peak = max(peak, counter.most())
            counter.reset()
            loss.backward()
            del loss, batch_
            held |= {"gradients": counter.now() - idle, "backward": counter.most()}
            before = counter.now()
            counter.reset()
            optimizer.step()
            held |= {"step": counter.most(), "temporaries": counter.most() - before}
            optimizer.zero_grad()
            if step == 0 and counter.now() > idle:  # state that was made in this step
                held["temporaries"] -= counter.now() - idle
            for key, x in held.items():
                most[key] = max(most[key], x)
            peak = max(peak, most["backward"], most["step"])
            state = counter.now() - weights - start
        buffers = 0
        if isinstance(optimizer, MatrixOptimizer):
            buffers = sum(x.nbytes for s in optimizer.state.values() for k, x in s.items()
                          if k.startswith("projected"))
        most["gradients"] += buffers
        return {"optimizer": name, "in_backward": in_backward, "weights": weights,
                "optimizer_state": state - buffers, **most, "peak": peak - start,
                "resident": _resident(), "steps": steps}
