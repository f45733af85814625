"""What several test files need."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from lissom.optim import dct
from torch import Tensor
from torch.utils._pytree import tree_map_only


def tensors(shapes: Iterable[tuple[int, ...]], seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) * scale for s in shapes]


def parameters(shapes: Iterable[tuple[int, ...]], seed: int = 0,
               dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(x.to(dtype)) for x in tensors(shapes, seed)]


def feed(params: list[Any], seed: int, scale: float = 1.0) -> None:
    """Random gradients for all that take one."""
    for p, g in zip(params, tensors([p.shape for p in params], seed, scale), strict=True):
        if p.requires_grad:
            p.grad = g.to(p)


def trained(params: Iterable[Any]) -> list[Any]:
    return [p for p in params if p.requires_grad]


def named(params: Iterable[Any]) -> list[tuple[str, Any]]:
    """With the names p0, p1, ..."""
    return [(f"p{i}", p) for i, p in enumerate(params)]


def moments(optimizer: Any, p: Any) -> list[str]:
    """Names of the averages that are kept for a parameter."""
    return [k for k, slot in optimizer._layouts[p].items() if slot.stream is not None]


def run(optimizer: Any, params: list[Any], steps: range, scale: float = 1.0) -> None:
    for i in steps:
        feed(params, 100 + i, scale)
        optimizer.step()


def snapshot(optimizer: Any) -> dict[str, Any]:
    """Everything that a refused call must leave as it was, weights included."""
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} if p in optimizer.state else None
             for g in optimizer.param_groups for p in g["params"]]
    weights = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return {"state": state, "weights": weights, "options": options}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bitwise equality through dicts and lists (NaN equals NaN, and nothing but infinity that)."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor), where
        assert a.dtype == b.dtype, (where, a.dtype, b.dtype)
        a, b = (x.detach().nan_to_num(7.5, math.inf, -math.inf) for x in (a, b))
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, (where, a, b)


def through_disk(value: Any) -> Any:
    """Saved and read back with the safe loader."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def cosines(x: Tensor) -> Tensor:
    """All of X Q."""
    return dct.project(x, x.shape[-1], kind=2, dim=-1, norm=1, similarity="auto")[1]


#: What :func:`tune` trains on.
TOKENS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(2))


def tiny_llama() -> Any:
    """A model of transformers, always the same one."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def tune(model: Any, optimizer: Any, steps: int = 20) -> Tensor:
    """Train such a model, and return its logits."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS).logits
    return logits


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a device, so that the host had to wait to read it."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Elsewhere:
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device="lazy")

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, lambda x: x.x, (args, kwargs or {}))
        return func(*args, **kwargs)


def carry_off(optimizer: Any) -> None:
    """Move all state but ``step`` to another device, as Lightning does."""
    for state in optimizer.state.values():
        state.update({k: Elsewhere(x) for k, x in state.items() if k != "step"})
