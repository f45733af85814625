"""Which weights are output heads, that stay with AdamW."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["CONVOLUTIONS", "output_heads"]

#: Layers whose weight is out x in, and then the kernel.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d,
                 nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Last parts of module names under which models of Hugging Face, timm and nanoGPT keep their head.
_HEAD_NAMES = {"lm_head", "head", "output", "embed_out", "classifier", "score", "output_projection",
               "head_dist", "classification_head", "qa_outputs", "dense_prediction",
               "seq_relationship"}
# Module names of heads that may have several layers, or be a convolution.
_HEAD = re.compile(r"(^|_)(head|classifier|score)(_dist)?$")
# Methods of Hugging Face's and timm's models that return the head.
_DECLARING = ("get_output_embeddings", "get_classifier")
# The number of a block in a dotted name: "3." in "layers.3.mlp".
_LAYER = re.compile(r"(?<![^.])\d+(?=\.)")
# Embeddings of positions: their number of entries is no vocabulary.
_POSITIONS = re.compile(r"pos|wpe")


def output_heads(model: nn.Module) -> set[int]:
    """Ids of the weights of output heads.

    A weight is a head if (1) it is an embedding's, hence tied, (2) the model declares it
    (``get_output_embeddings``, ``get_classifier``), (3) it lies under a head's name, the last layer
    if there are several, each of a ``ModuleList``, (4) it is the model's last layer and called
    ``fc``, or (5) it has as many outputs as an embedding has entries. (5) is not used for layers
    that repeat, nor inside a block where the width equals the vocabulary; the name ``output``
    counts only outside blocks.
    """
    tables = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    vocabularies = {m.num_embeddings for name, m in tables.items()
                    if not _POSITIONS.search(name.rpartition(".")[2])}
    widths = {m.embedding_dim for m in tables.values()}
    heads = {id(m.weight) for m in tables.values()}
    declared = {id(p) for module in _declared(model) for p in module.parameters() if p.ndim > 1}
    # A convolution of a head's name may be the last stage before the head.
    last = _last_layers(model, () if declared else CONVOLUTIONS)
    heads |= declared | {id(module.weight) for module in last}
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    alike = Counter(_LAYER.sub("", name) for name in linear)
    for name, module in linear.items():
        parts, outputs = ["", *name.split(".")], module.out_features
        single, numbered = alike[_LAYER.sub("", name)] == 1, _LAYER.search(name) is not None
        inside = numbered and outputs in widths
        if (single and not inside and outputs in vocabularies) or (
                parts[-1] in _HEAD_NAMES and (parts[-1] != "output" or not numbered)):
            heads.add(id(module.weight))
    return heads


def _declared(model: nn.Module) -> Iterator[nn.Module]:
    """The heads that a model, or a module in it, declares."""
    for module in model.modules():
        for name in _DECLARING:
            try:
                method = getattr(module, name, None)
                if not callable(method) or inspect.signature(method).parameters:
                    continue
                told = method()
            except Exception:  # not implemented, or another method of that name
                continue
            # Models with several outputs return a list, or a module of modules.
            yield from (m for m in (told if isinstance(told, (list, tuple)) else [told])
                        if isinstance(m, nn.Module) and m is not module)


def _last_layers(model: nn.Module, more: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """The last layer of each module with a head's name, and a last layer called ``fc``.

    Not inside blocks, and not where the module has as many outputs as inputs: that is a pooling, or
    a layer before the head.

    Args:
        model: their model.
        more: classes of layers that count beside ``nn.Linear``.
    """
    kinds: tuple[type[Any], ...] = (nn.Linear, *more)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, kinds)]
    for name, module in layers[-1:]:
        if name.rpartition(".")[2] == "fc" and not _LAYER.search(name):
            yield module
    for name, module in model.named_modules():
        if _HEAD.search(name.rpartition(".")[2]) and not _LAYER.search(f"{name}."):
            for part in module if isinstance(module, nn.ModuleList) else [module]:
                own = [m for m in part.modules() if isinstance(m, kinds)]
                if own and _sides(own[0])[0] != _sides(own[-1])[1]:
                    yield own[-1]


def _sides(module: Any) -> tuple[int, int]:
    """How many inputs and outputs a layer has."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels
