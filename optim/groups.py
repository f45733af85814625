"""param_groups: from a model to the parameter groups of a low-rank or matrix optimizer."""

from __future__ import annotations

import fnmatch
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .checks import check_module, check_parameter
from .options import either, integer, nearest, optional, real

__all__ = ["output_heads", "param_groups"]

# Parts of names of parameters of two and more dimensions that are tables or pairs.
_NO_MATRICES = ("lora_", "pos_embed", "position", "rel_pos", "A_log")
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d,
                 nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Linear maps under another name: GPT-2's in transformers, whose weight is in x out.
_LINEAR_NAMES = {"transformers.pytorch_utils.Conv1D"}
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
# A rank, or a fraction of a matrix's shorter side.
_RANK = optional(either(integer(None, 1), real(None, 0.0, 1.0, above=True, below=True)))


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
    last = _last_layers(model, () if declared else _CONVOLUTIONS)
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


def _has_matrix(module: nn.Module, short: str) -> bool:
    """Whether a parameter of that name is the matrix of a module that is known."""
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return short.endswith("proj_weight")
    return short == "weight" and (isinstance(module, (nn.Linear, *_CONVOLUTIONS))
                                  or f"{kind.__module__}.{kind.__qualname__}" in _LINEAR_NAMES)


def _rank_of(rank: int | float | None, p: Tensor, name: str) -> int | None:
    """The rank of one matrix; a fraction is of its shorter side, at least 1."""
    checked: int | float | None = _RANK.check("rank", rank, f"param_groups, {name!r}")
    if not isinstance(checked, float):
        return checked
    return max(1, round(checked * min(p.shape[0], p[0].numel())))


def param_groups(
    model: nn.Module, rank: int | float | None = 128, *, weight_decay: float | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None, **options: Any,
) -> list[dict[str, Any]]:
    """Groups with names for any optimizer of this package.

    Weights of ``nn.Linear`` (the output head apart), of GPT-2's ``Conv1D`` in transformers, of
    convolutions and the packed input projection of ``nn.MultiheadAttention`` go to the matrix rule.
    Embeddings, the head, norms, biases and parameters that no known module owns get AdamW, with a
    warning where matrices are among the last; those of fewer than two dimensions and all parameters
    of norms without decay. A weight used twice (a tied head) appears once, as
    the embedding that it is. Parameters that need no gradient are left out. A head is told by its
    name (:func:`output_heads` in the code), the model's ``get_output_embeddings()`` or
    ``get_classifier()``, or as many outputs as a table has entries. Names may deceive: ``plan()``
    shows what became of each, and an override says otherwise.

    Args:
        model: any module.
        rank: rank of every matrix: an int >= 1, a fraction of its shorter side in (0, 1), or None.
            Default 128. Rules of whole matrices, such as Muon's, have none and pass it over.
        weight_decay: of all but norms and biases. Default: the optimizer's.
        overrides: {glob on the dotted name: options}, the last match wins. ``{"*.gate": {"rank":
            None}}`` makes routers dense; a ``rank`` or ``matricize`` given here also takes in what
            is AdamW by default: ``{"*.experts.*": {"matricize":
            "batch"}}`` for those of a mixture, whose parameters are stacks of matrices.
        options: further options of the matrix groups, such as ``update_proj_gap``, ``scale``.

    Returns:
        Groups whose ``params`` are (name, tensor) pairs, in the order of the model.

    Raises:
        TypeError, ValueError: a rank that breaks its rule; a glob that matches nothing; weights
            that FSDP1 or ZeRO have flattened; no parameter at all.
    """
    check_module(model, "param_groups")
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping):
        raise TypeError(f"param_groups: overrides is a {type(overrides).__name__}, but it must be "
                        "a dict of {glob on the dotted name: options}")
    for pattern, own in overrides.items():
        if not isinstance(own, Mapping) or "params" in own:
            raise TypeError(f"param_groups: overrides has {pattern!r}: {own!r}, but it must be a "
                            "dict of options such as {'rank': 8}")
    heads = output_heads(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for pattern in overrides:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"param_groups: overrides has {pattern!r}, which matches no trainable "
                             f"parameter{nearest(pattern, names)}")
    groups: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    seen: set[int] = set()
    strange: dict[str, str] = {}
    for prefix, module in model.named_modules():
        # named_parameters, not _parameters: a parametrization owns its original under another name.
        for short, p in module.named_parameters(recurse=False):
            if id(p) in seen or not p.requires_grad:
                continue
            seen.add(id(p))
            name = f"{prefix}.{short}" if prefix else short
            check_parameter(p, repr(name), "param_groups")
            if p.ndim < 2 and (hasattr(p, "_is_flat_param") or (
                    isinstance(module, nn.Linear) and short == "weight")):
                raise ValueError(
                    f"param_groups: {name!r} of a {type(module).__name__} has shape "
                    f"{tuple(p.shape)}, but it must be a matrix: FSDP1 and ZeRO stage 3 flatten "
                    "weights; use FSDP2 (torch.distributed.fsdp.fully_shard), which keeps their "
                    "shapes, or model.parameters() for AdamW")
            is_matrix = p.ndim >= 2 and id(p) not in heads and _has_matrix(module, short)
            is_norm = "norm" in type(module).__name__.lower()
            dense = {"rank": None, "algorithm": "adamw"}
            chosen: dict[str, Any] = {"rank": rank, **options} if is_matrix else dict(dense)
            if p.ndim < 2 or is_norm:
                chosen["weight_decay"] = 0.0
            elif weight_decay is not None:
                chosen["weight_decay"] = weight_decay
            # Of one row or column it is a learnt token or a scale; adapter_groups knows of pairs.
            if not (is_matrix or is_norm or id(p) in heads or isinstance(module, _TABLES)
                    or sum(x > 1 for x in p.shape) < 2 or any(x in name for x in _NO_MATRICES)):
                strange[name] = type(module).__name__
            for pattern, own in overrides.items():
                if fnmatch.fnmatchcase(name, pattern):
                    strange.pop(name, None)
                    if "rank" in own and own["rank"] is None:
                        chosen |= dense
                    elif "algorithm" in chosen and own.keys() & {"rank", "matricize"}:
                        chosen |= {"rank": rank, **options}
                        del chosen["algorithm"]
                    chosen |= own
            chosen["rank"] = _rank_of(chosen["rank"], p, name)
            key = tuple(sorted((k, repr(v)) for k, v in chosen.items()))
            groups.setdefault(key, {"params": [], **chosen})["params"].append((name, p))
    if not groups:
        raise ValueError("param_groups: the model has no parameter that needs a gradient")
    if strange:
        name, kind = next(iter(strange.items()))
        others = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        warnings.warn(
            f"param_groups: {name!r} of a {kind}{others} may be matrices, but no module that is "
            "known here has them, so they get AdamW; overrides={glob on the name: {'rank': ...}} "
            "gives them the matrix rule, {'matricize': 'batch'} takes them for stacks, and "
            "{'rank': None} is AdamW without this warning", stacklevel=2)
    return list(groups.values())
