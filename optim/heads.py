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
# Those of heads in general, which may be several layers, or a convolution.
_HEAD = re.compile(r"(^|_)(head|classifier|score)(_dist)?$")
# Methods by which models of Hugging Face and of timm tell theirs.
_DECLARING = ("get_output_embeddings", "get_classifier")
# The number of a layer in a dotted name, which other names follow.
_LAYER = re.compile(r"(?<![^.])\d+(?=\.)")
# Tables of these names have an entry for a position, which no head gives.
_POSITIONS = re.compile(r"pos|wpe")


def output_heads(model: nn.Module) -> set[int]:
    """Ids of the weights of output heads.

    Those are tied or declared, go by a head's name (of several layers the last one does, of a list
    of layers each), are a last layer named ``fc``, or have as many outputs as a table has entries.
    This says nothing of what several layers have alike, nor of one layer that is as wide as a
    table: where a model is as wide as its table of bytes is long, that would be most of it. The
    name ``output`` says nothing of what is in a layer.
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
    """The heads that a model tells, or what is wrapped in it."""
    for module in model.modules():
        for name in _DECLARING:
            try:
                method = getattr(module, name, None)
                if not callable(method) or inspect.signature(method).parameters:
                    continue
                told = method()
            except Exception:  # one that cannot tell, or has something else under that name
                continue
            # Of models with several outputs it is a list, or modules in one.
            yield from (m for m in (told if isinstance(told, (list, tuple)) else [told])
                        if isinstance(m, nn.Module) and m is not module)


def _last_layers(model: nn.Module, more: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """Layers that a head's output comes from, by its name.

    Those within layers are no heads, nor is what has as many outputs as inputs: a pooling, or a
    layer before the head.

    Args:
        model: their model.
        more: what a head may be beside linear.
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
