"""param_groups: from a model to the parameter groups of a low-rank or matrix optimizer."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .checks import check_module, check_parameter
from .heads import CONVOLUTIONS, output_heads
from .keys import unwrapped
from .options import either, integer, nearest, optional, real

__all__ = ["param_groups"]

# Parts of the names of parameters of 2 or more dimensions that are no weight matrices: positions
# and low-rank pairs.
_NO_MATRICES = ("lora_", "pos_embed", "position", "rel_pos", "A_log")
_TABLES = (nn.Embedding, nn.EmbeddingBag)
# Linear layers of other classes: GPT-2's in transformers, whose weight is in x out.
_LINEAR_NAMES = {"transformers.pytorch_utils.Conv1D"}
# A rank, or a fraction of a matrix's shorter side.
_RANK = optional(either(integer(None, 1), real(None, 0.0, 1.0, above=True, below=True)))


def _has_matrix(module: nn.Module, short: str) -> bool:
    """Whether the parameter ``short`` of a module is the weight matrix of a known class."""
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return short.endswith("proj_weight")
    return short == "weight" and (isinstance(module, (nn.Linear, *CONVOLUTIONS))
                                  or f"{kind.__module__}.{kind.__qualname__}" in _LINEAR_NAMES)


def _rank_of(rank: int | float | None, p: Tensor, name: str, stack: bool) -> int | None:
    """The rank of a matrix, or of each of a stack; a fraction is of a shorter side, at least 1."""
    checked: int | float | None = _RANK.check("rank", rank, f"param_groups, {name!r}")
    if not isinstance(checked, float):
        return checked
    side = min(p.shape[-2:] if stack else (p.shape[:1].numel(), p.shape[1:].numel()))
    return max(1, round(checked * side))


def param_groups(
    model: nn.Module, rank: int | float | None = 128, *, weight_decay: float | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None, **options: Any,
) -> list[dict[str, Any]]:
    """Make parameter groups of a model for any optimizer of this package.

    Groups have names. Weights of ``nn.Linear`` (the output head apart), of GPT-2's ``Conv1D`` in
    transformers, of convolutions and the packed input projection of ``nn.MultiheadAttention`` go to
    the matrix rule. Embeddings, the head, norms, biases and parameters that no known module owns
    get AdamW, with a warning where matrices are among the last; those of fewer than two dimensions
    and all parameters of norms without decay. A weight used twice (a tied head) appears once, as
    the embedding that it is. Parameters that need no gradient are left out. A head is told by its
    name (:func:`output_heads` in the code), the model's ``get_output_embeddings()`` or
    ``get_classifier()``, or as many outputs as an embedding has entries. This may be wrong for a
    model with other names: ``plan()`` shows what each parameter gets, and ``overrides`` change it.

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
        Groups whose ``params`` are (name, tensor) pairs, in the order of the model. Names are those
        of the model without torch.compile's, FSDP1's and activation checkpointing's additions.

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
    plain = [*map(unwrapped, names)]
    for pattern in overrides:
        if not fnmatch.filter([*plain, *names], pattern):
            raise ValueError(f"param_groups: overrides has {pattern!r}, which matches no trainable "
                             f"parameter{nearest(pattern, plain)}")
    groups: dict[tuple[tuple[str, Any], ...], dict[str, Any]] = {}
    seen: set[int] = set()
    strange: dict[str, str] = {}
    for prefix, module in model.named_modules():
        # named_parameters, not _parameters: a parametrization owns its original under another name.
        for short, p in module.named_parameters(recurse=False):
            if id(p) in seen or not p.requires_grad:
                continue
            seen.add(id(p))
            wrapped = f"{prefix}.{short}" if prefix else short
            name = unwrapped(wrapped)
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
            # One row or column: a learnt token or a scale. Pairs are for adapter_groups.
            if not (is_matrix or is_norm or id(p) in heads or isinstance(module, _TABLES)
                    or sum(x > 1 for x in p.shape) < 2 or any(x in name for x in _NO_MATRICES)):
                strange[name] = type(module).__name__
            for pattern, own in overrides.items():
                if any(fnmatch.fnmatchcase(x, pattern) for x in (name, wrapped)):
                    strange.pop(name, None)
                    if "rank" in own and own["rank"] is None:
                        chosen |= dense
                    elif "algorithm" in chosen and own.keys() & {"rank", "matricize"}:
                        chosen |= {"rank": rank, **options}
                        del chosen["algorithm"]
                    chosen |= own
            stack = chosen.get("matricize") == "batch" and p.ndim > 2
            chosen["rank"] = _rank_of(chosen["rank"], p, name, stack)
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
