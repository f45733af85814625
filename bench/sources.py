"""Models to be counted or measured: by name, from a configuration, or from a function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .llama import Llama
from .shapes import MODELS, PAPER_RANK

__all__ = ["Source", "from_config", "from_factory", "from_name", "loss_of", "vocabulary"]


class Source(NamedTuple):
    """A model that can be built again and again.

    Args:
        name: as the command line has it.
        make: builds it, on the default device.
        rank: the rank that is taken where none is given.
    """

    name: str
    make: Callable[[], nn.Module]
    rank: int


def from_name(name: str) -> Source:
    """One of :data:`lissom.bench.shapes.MODELS`, at the paper's rank or a quarter of the width."""
    shape = MODELS[name]
    return Source(name, lambda: Llama(shape), PAPER_RANK.get(name, shape.hidden // 4))


def from_config(file: str) -> Source:
    """A Hugging Face model from its ``config.json``, or the folder of one; nothing is downloaded.

    Raises:
        ValueError: transformers is missing, there is no such file, or it cannot make a model.
    """
    path = Path(file)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--config {file!r} must be a config.json, or a folder with one")
    try:
        import transformers
    except ImportError:
        raise ValueError("--config needs transformers: pip install 'lissom[hf]'") from None
    try:
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True,
                                                         trust_remote_code=False)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"--config {file!r} must be of a model that transformers knows: "
                         f"{error}") from None
    names = [x for x in getattr(config, "architectures", None) or [] if hasattr(transformers, x)]

    def make() -> nn.Module:
        if names:
            model: nn.Module = getattr(transformers, names[0])._from_config(config)
        else:
            auto: Any = transformers.AutoModelForCausalLM
            model = auto.from_config(config)
        return model

    width = getattr(config, "hidden_size", None)
    return Source(path.parent.name or str(path), make, width // 4 if width else 128)


def from_factory(text: str) -> Source:
    """``PKG.MOD:FACTORY``, a function without arguments that returns a module.

    Raises:
        ValueError: it is no such thing.
    """
    place, _, factory = text.partition(":")
    if not place or not factory:
        raise ValueError(f"--module {text!r} must be PKG.MOD:FACTORY")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(place), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--module {text!r} must be PKG.MOD:FACTORY: {error}") from None
    return Source(text, make, 128)


def vocabulary(model: nn.Module) -> int:
    """How many tokens the model's largest table has; 0 where it has none."""
    return max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)),
               default=0)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """A training loss in fp32: next tokens from logits, else the mean square of the output.

    Args:
        model: takes tokens and returns a tensor, a tuple that begins with one, or what models of
            Hugging Face return.
        tokens: (batch, length).
    """
    out: Any = model(tokens)
    out = getattr(out, "logits", out)
    x: Tensor = out if isinstance(out, Tensor) else out[0]
    if x.ndim == 3 and x.shape[-1] >= vocabulary(model):
        return functional.cross_entropy(x.flatten(0, 1).float(), tokens.roll(-1, 1).flatten())
    return x.float().square().mean(dtype=torch.float32)
