"""The pairs of a model, of :func:`lissom.optim.lora` or ``peft``, and parameter groups of them.

The groups' ``roles`` say what each parameter is. Letters are those of :mod:`lissom.optim.pairs`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from .checks import check_module
from .groups import param_groups
from .layers import LoRALinear, NormalizedLinear
from .pairs import check_base, only_name, places

__all__ = ["Adapter", "adapter_groups", "adapters", "base_weights"]


class Adapter(NamedTuple):
    """One layer's pair.

    Args:
        layer: its dotted name.
        names: of the parameters, by role: ``"A"``, ``"B"``, ``"base"`` of a plain pair,
            ``"magnitude"`` of a normalized one.
        tensors: the parameters, by role, the base of any pair.
        scaling: s.
    """

    layer: str
    names: dict[str, str]
    tensors: dict[str, Tensor]
    scaling: float


def adapters(model: nn.Module) -> list[Adapter]:
    """Every pair of the model: of :func:`lissom.optim.lora`, and LoRA and DoRA of ``peft``.

    Of ``peft`` only those on linear layers.

    Raises:
        TypeError, ValueError: a pair that cannot be trained here, by layer: without its partner,
            merged, several active at once, of another kind, with a quantized or shared base, or of
            a rank that is not below the smaller side.
    """
    held, found = places(model), []
    for layer, module in model.named_modules():
        if isinstance(module, LoRALinear):
            parts = {"A": module.lora_A, "B": module.lora_B, "base": module.weight}
            if isinstance(module, NormalizedLinear):
                parts["magnitude"] = module.magnitude
            scaling = module.scaling
        else:
            read = _of_peft(module, layer)
            if read is None:
                continue
            parts, scaling = read
        plain = "magnitude" not in parts
        if plain:  # a normalized pair leaves its base as it is
            check_base(parts["base"], len(parts["A"]), layer)
        names = {k: only_name(held, layer, p) for k, p in parts.items() if plain or k != "base"}
        found.append(Adapter(layer, names, parts, scaling))
    return found


def _of_peft(module: nn.Module, layer: str) -> tuple[dict[str, Tensor], float] | None:
    """The active pair of a peft layer on a matrix; None for any other module."""
    peft = sys.modules.get("peft.tuners.lora.layer")  # where it is not imported no model has one
    if peft is None or not isinstance(module, peft.LoraLayer):
        return None
    x: Any = module
    if not len(x.lora_A) and not len(x.lora_B):
        return None  # of an embedding
    active = [k for k in x.active_adapters if k in x.lora_A or k in x.lora_B]
    if len(active) != 1:
        raise ValueError(f"{layer}: active adapters {active}, but exactly one must be: a change "
                         "of the base weight would reach the others")
    key = active[0]
    for side, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        if key not in getattr(x, other):
            raise ValueError(f"{layer}: {side} has adapter {key!r}, {other} has not, but a pair "
                             "must have both")
    if x.merged:
        raise ValueError(f"{layer}: its adapter is merged, but it must not be while it trains")
    weight = getattr(x.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{layer}: its base layer is a {type(x.get_base_layer()).__name__} without "
                        "a weight tensor, but it must have one: changes are added to it, which "
                        "quantized ones cannot take")
    parts: dict[str, Tensor] = {"A": x.lora_A[key].weight, "B": x.lora_B[key].weight,
                                "base": weight}
    if parts["A"].ndim != 2:
        return None  # of a convolution
    if getattr(x, "fan_in_fan_out", False):
        raise ValueError(f"{layer}: fan_in_fan_out=True, but it must be False: its base weight is "
                         "stored transposed")
    if key in x.lora_magnitude_vector:
        parts["magnitude"] = x.lora_magnitude_vector[key].weight
    elif key in x.lora_variant:
        raise ValueError(f"{layer}: its adapter is a {type(x.lora_variant[key]).__name__}, but it "
                         "must be plain LoRA or DoRA")
    elif others := sorted(x.lora_A.keys() - {key}):
        raise ValueError(f"{layer}: has adapters {others} beside {key!r}, but it must have one: "
                         "switches change the base weight, which is theirs too (delete_adapter, "
                         "or load them on the weights that they were trained on)")
    return parts, float(x.scaling[key])


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The frozen weights beside all pairs, to save with an adapter that SwitchLoRA has trained.

    Switching changes them, and ``peft``'s ``save_pretrained`` leaves them out. Save these too, and
    load them by ``load_state_dict(..., strict=False)`` into the model that the adapter is put on.

    Args:
        model: with layers of :func:`lissom.optim.lora` or of ``peft``.

    Returns:
        {name: weight (m, n)}, named as in the model without pairs; not copies.

    Raises:
        TypeError, ValueError: a pair that :func:`adapter_groups` would refuse.
    """
    check_module(model, "base_weights")
    kept = {}
    for adapter in adapters(model):
        layer = adapter.layer
        inner = getattr(model, "base_model", None)
        if inner is not None and hasattr(model, "peft_config"):
            # PeftModel.base_model is the tuner, whose .model is what was given to peft
            layer = layer.removeprefix("base_model.model.")
        kept[f"{layer}.weight"] = adapter.tensors["base"].detach()
    return kept


def adapter_groups(model: nn.Module, rank: int | None = None, *, weight_decay: float | None = None,
                   **options: Any) -> list[dict[str, Any]]:
    """Make parameter groups of a model with LoRA layers, for SwitchLoRAAdamW or GradNormLoRPAdamW.

    The groups have names, and ``roles`` that say what each parameter is. Plain pairs are in groups
    of (A, B, base, A, B, base, ...) with ``roles=("A", "B", "base")`` and their ``scaling``,
    without decay unless you set a group's ``weight_decay`` afterwards: it would undo half of what a
    switch has moved into the base. Normalized ones are (A, B, A, B, ...) with ``roles=("A", "B")``,
    and their magnitudes in a group that gets AdamW without decay. All else that needs a gradient
    gets AdamW, as :func:`lissom.optim.param_groups` groups it.

    Args:
        model: with layers of :func:`lissom.optim.lora`, or a ``peft`` model with LoRA or DoRA.
        rank: of the projection of the factors' gradients (GradNormLoRPAdamW), an int >= 1. Default
            None: none, so that factors get AdamW. It saves where it is below the rank of the pair,
            or with ``proj_type="full"``.
        weight_decay: of what is no pair, norms and biases apart. Default: the optimizer's.
        options: further options of the pairs' groups.

    Returns:
        Groups whose ``params`` are (name, tensor) pairs, for either optimizer.

    Raises:
        TypeError, ValueError: as :func:`adapters`; a model without any pair.
    """
    check_module(model, "adapter_groups")
    found = adapters(model)
    if not found:
        raise ValueError("adapter_groups: the model has no LoRA layer; lissom.optim.lora(model, "
                         "rank) puts some in")
    groups: list[dict[str, Any]] = []
    for scaling, members in _by_scaling(found):
        params = [(x.names[k], x.tensors[k]) for x in members for k in ("A", "B", "base")]
        groups.append({"params": params, "roles": ("A", "B", "base"), "scaling": scaling,
                       "weight_decay": 0.0, **options})
    normalized = [x for x in found if "magnitude" in x.tensors]
    if normalized:
        pairs = [(x.names[k], x.tensors[k]) for x in normalized for k in ("A", "B")]
        groups.append({"params": pairs, "roles": ("A", "B"), "rank": rank, **options})
        groups.append({"params": [(x.names["magnitude"], x.tensors["magnitude"])
                                  for x in normalized],
                       "roles": ("magnitude",), "algorithm": "adamw", "weight_decay": 0.0})
    taken = {id(p) for x in found for p in x.tensors.values()}
    for group in param_groups(model, None, weight_decay=weight_decay):
        rest = [(name, p) for name, p in group["params"] if id(p) not in taken]
        if rest:
            group.pop("rank", None)
            groups.append({**group, "params": rest, "algorithm": "adamw"})
    return groups


def _by_scaling(found: list[Adapter]) -> Iterator[tuple[float, list[Adapter]]]:
    plain = [x for x in found if "magnitude" not in x.tensors]
    for scaling in dict.fromkeys(x.scaling for x in plain):
        yield scaling, [x for x in plain if x.scaling == scaling]
