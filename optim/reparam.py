"""Trainable reparameterizations of nn.Linear: low-rank pairs, with or without normalization.

:func:`lora` puts a pair A, B beside frozen weights, :func:`merge` turns the layers back into plain
``nn.Linear``, and :func:`adapter_groups` reads the pairs of a model, these or those of ``peft``,
into parameter groups whose ``roles`` say what each parameter is. For a weight W, m x n:

========  =========================================================================================
A         r x n, first factor: ``lora_A``
B         m x r, second factor: ``lora_B``
s         their scaling: alpha / r
base      W, frozen
V         W + s B A; a plain layer has this weight
c, mu     norms of V's columns (one per input feature) or rows (one per output feature), and the
          trained magnitudes: a normalized layer has the weight V mu / c
========  =========================================================================================
"""

from __future__ import annotations

import fnmatch
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import sharding
from .codec import wide
from .groups import output_heads, param_groups
from .options import Option, nearest, optional

__all__ = ["Adapter", "LoRALinear", "NormalizedLinear", "adapter_groups", "adapters",
           "base_weights", "bounds", "check_base", "check_factors", "lora", "memory", "merge",
           "roles"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def roles(*allowed: tuple[str, ...]) -> Option:
    """The option that says what a group's parameters are, in the order in which they repeat."""

    def convert(value: Any) -> tuple[str, ...]:
        if not isinstance(value, (tuple, list)):
            raise TypeError
        if tuple(value) not in allowed:
            raise ValueError
        return tuple(value)

    rule = "one of " + ", ".join(map(repr, allowed))
    return optional(Option(None, rule, convert, tuple))


def bounds(base: Tensor, r: int, scaling: float) -> tuple[float, float]:
    """Bounds of the uniform entries of A and of B, for a pair of rank r beside an m x n weight.

    sqrt(3) sigma with sigma_A = (sqrt(m) r / n^1.5)^(1/4) g^(1/2), sigma_B = (r / sqrt(m n))^(1/4)
    g^(1/2), g = sqrt(1/3), for s = 1/r: B A / r then has entries of the variance that nn.Linear
    starts with. For another s both are multiplied by (s r)^(-1/2), so that s B A keeps it.

    Source: Zhou et al., arXiv 2406.06564.
    """
    m, n = base.shape
    gain = math.sqrt(3) * 3**-0.25 / math.sqrt(scaling * r)
    return (gain * (math.sqrt(m) * r / n**1.5) ** 0.25, gain * (r / math.sqrt(m * n)) ** 0.25)


class LoRALinear(nn.Module):
    """y = (W + s B A) x + bias, W frozen.

    Args:
        linear: the layer to put the pair beside; its parameters are taken over, W is frozen.
        rank: r, below both sides of W.
        scaling: s, > 0.
        dtype: of A and B; None is W's.

    Both factors start at zero: :func:`lora` draws them.

    Source: Hu et al., arXiv 2106.09685.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, rank: int, scaling: float,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.register_parameter("bias", linear.bias)
        m, n = self.weight.shape
        like = torch.empty(0, dtype=dtype or self.weight.dtype, device=self.weight.device)
        self.lora_A = nn.Parameter(like.new_zeros(rank, n))
        self.lora_B = nn.Parameter(like.new_zeros(m, rank))
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        low = functional.linear(x.to(self.lora_A.dtype), self.lora_A)
        y = functional.linear(low, self.lora_B).to(x.dtype) * self.scaling
        return functional.linear(x, self.weight, self.bias) + y

    def effective(self) -> Tensor:
        """The weight of the layer as it is now, in the arithmetic's precision."""
        return _summed(self.weight, self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A plain layer with the same weight, in the dtype that W has."""
        m, n = self.weight.shape
        linear = nn.Linear(n, m, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.effective().to(self.weight.dtype))
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        m, n = self.weight.shape
        return f"in_features={n}, out_features={m}, rank={len(self.lora_A)}, scaling={self.scaling}"


class NormalizedLinear(LoRALinear):
    """y = (V mu / c) x + bias with V = W + s B A, W frozen: direction and magnitude are trained.

    The gradients are exact, through the norms c too (peft's DoRA takes those as constants). A
    column (row) of V that is zero stays so and gets no gradient.

    Args:
        linear, rank, scaling, dtype: as :class:`LoRALinear`.
        axis: ``"input"``: c are the norms of V's columns, one per input feature, as the papers have
            it; ``"output"``: of its rows, one per output feature, as peft's DoRA.

    The magnitudes start at the norms of W; :meth:`renorm` sets them to those of V.

    Source: Huang et al., arXiv 2412.19616; Liu et al., arXiv 2402.09353.
    """

    def __init__(self, linear: nn.Linear, rank: int, scaling: float,
                 dtype: torch.dtype | None = None, axis: str = "input") -> None:
        super().__init__(linear, rank, scaling, dtype)
        if axis not in ("input", "output"):
            raise ValueError(f"NormalizedLinear: axis={axis!r}, but it must be one of 'input', "
                             "'output'")
        self.axis = axis
        self.magnitude = nn.Parameter(_norms(self.weight.detach(), axis).flatten().to(
            self.lora_A.dtype))

    @torch.no_grad()
    def renorm(self) -> None:
        """Mu <- c: the layer's weight is V."""
        self.magnitude.copy_(_norms(super().effective(), self.axis).flatten())

    def effective(self) -> Tensor:
        """V mu / c."""
        return _normalized(*self._factors(), self.scaling, self.axis)[0]

    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.lora_A, self.lora_B, self.magnitude

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        y: Tensor = _NormalizedProduct.apply(  # type: ignore[no-untyped-call]
            x, *self._factors(), self.bias, self.scaling, self.axis)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, axis={self.axis}"


def _summed(w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """V, in the arithmetic's precision under autocast too."""
    with torch.autocast("cpu" if w.is_meta else w.device.type, enabled=False):
        delta = wide(b) @ wide(a)
    return torch.add(w.to(delta.dtype), delta, alpha=scaling)


def _norms(v: Tensor, axis: str) -> Tensor:
    """The norms c, as a row or a column."""
    c: Tensor = torch.linalg.vector_norm(wide(v), dim=0 if axis == "input" else 1, keepdim=True)
    return c


def _normalized(w: Tensor, a: Tensor, b: Tensor, mu: Tensor, scaling: float, axis: str
                ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """V mu / c, V, mu / c and 1 / c, the last two zero where c is; not in 16 bits."""
    v = _summed(w, a, b, scaling)
    c = _norms(v, axis)
    # where twice: the gradient of 1 / c must not be seen where c is zero
    alive = c > 0
    inverse = torch.where(alive, 1 / torch.where(alive, c, 1.0), 0.0)
    factor = mu.to(v.dtype).view(c.shape) * inverse
    return v * factor, v, factor, inverse


class _NormalizedProduct(torch.autograd.Function):
    """y = (V mu / c) x + bias, whose backward pass finds V anew: autograd would keep copies of it.

    With the gradient G of the weight, f = mu / c and S, the sum of V o G along the axis:
    dmu = S / c and dV = f G - f / c^2 S V.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, a: Tensor, b: Tensor, mu: Tensor, bias: Tensor | None,
                scaling: float, axis: str) -> Tensor:
        return functional.linear(x, _normalized(w, a, b, mu, scaling, axis)[0].to(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, bias, ctx.scaling, ctx.axis = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        x, w, a, b, mu = ctx.saved_tensors
        weight, v, factor, inverse = _normalized(w, a, b, mu, ctx.scaling, ctx.axis)
        needed = ctx.needs_input_grad
        dx = (dy @ weight.to(dy.dtype)).to(x.dtype) if needed[0] else None
        del weight
        dy, x = (t.reshape(-1, t.shape[-1]) for t in (dy, x.to(dy.dtype)))
        dbias = dy.sum(0).to(ctx.bias_dtype) if needed[5] else None
        if not any(needed[1:5]):
            return dx, None, None, None, None, dbias, None, None
        g = (dy.mT @ x).to(v.dtype)
        slope = (g * v).sum(0 if ctx.axis == "input" else 1, keepdim=True)
        dv = g * factor - v * (factor * inverse.square() * slope)
        return (dx, dv.to(w.dtype) if needed[1] else None,
                (ctx.scaling * (wide(b).mT @ dv)).to(a.dtype),
                (ctx.scaling * (dv @ wide(a).mT)).to(b.dtype),
                (slope * inverse).view(mu.shape).to(mu.dtype), dbias, None, None)


# -------------------------------------------------------------------- putting in, taking out


def check_base(weight: Tensor, r: int, layer: str) -> None:
    """A base weight must be a plain matrix that can be added to, larger than the rank.

    Raises:
        TypeError, ValueError: names the layer, the value and the rule.
    """
    plain = type(weight) in (Tensor, nn.Parameter) or sharding.is_sharded(weight)
    if weight.dtype not in _DTYPES or not plain:
        kind = f"dtype {weight.dtype}" if plain else f"type {type(weight).__name__}"
        raise TypeError(f"{layer}: its base weight has {kind}, but it must be a plain tensor of a "
                        "floating dtype: changes are added to it, which quantized ones cannot take")
    if weight.ndim != 2:
        raise ValueError(f"{layer}: its base weight has shape {tuple(weight.shape)}, but it must "
                         "be a matrix")
    if r >= min(weight.shape):
        raise ValueError(f"{layer}: rank={r}, but it must be below the smaller side of "
                         f"{tuple(weight.shape)}: a full-rank pair has nothing to switch or save")


def check_factors(a: Tensor, b: Tensor, shape: tuple[int, ...] | None, at: str) -> None:
    """A and B must be r x n and m x r, of one dtype; (m, n) is None where no base is known.

    Raises:
        ValueError: begins with ``at``, gives shapes or dtypes and the rule.
    """
    good = a.ndim == b.ndim == 2 and len(a) == b.shape[1]
    if not good or shape not in (None, (len(b), a.shape[1])):
        what, rule = ("A and B", "r x n and m x r") if shape is None else \
            ("A, B and base", "r x n, m x r and m x n")
        shapes = [tuple(x.shape) for x in (a, b)] + ([] if shape is None else [shape])
        raise ValueError(f"{at}: {what} have shapes {shapes}, but they must be {rule}")
    if a.dtype != b.dtype:
        raise ValueError(f"{at}: A is {a.dtype} and B {b.dtype}, but they must have one dtype")


def memory(p: Tensor) -> int:
    """A number that tensors share whose elements lie in the same place."""
    return p.data_ptr() or id(p)  # no address on the meta device and for empty ones


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Every name that the parameters in one place have."""
    places: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        places.setdefault(memory(p), []).append(name)
    return places


def _only_name(places: dict[int, list[str]], layer: str, p: Tensor) -> str:
    names = places[memory(p)]
    if len(names) > 1:
        raise ValueError(f"{layer}: its weight is shared ({', '.join(names)}), but a base weight "
                         "must belong to one layer: a change of it would reach the others")
    return names[0]


def _targets(model: nn.Module, target: str | Sequence[str] | None) -> dict[str, nn.Linear]:
    """The layers to be given a pair, by name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if target is None:
        heads = output_heads(model)
        found = {k: x for k, x in modules.items()
                 if k and type(x) is nn.Linear and id(x.weight) not in heads}
        if not found:
            raise ValueError("lora: the model has no nn.Linear inside but its output head")
        return found
    chosen: dict[str, nn.Linear] = {}
    for pattern in [target] if isinstance(target, str) else target:
        hits = {k: modules[k] for k in fnmatch.filter(modules, pattern)}
        linear = {k: x for k, x in hits.items() if k and type(x) is nn.Linear}
        if not linear:
            what = [f"{k!r}, a {type(x).__name__}" for k, x in hits.items()]
            raise ValueError(f"lora: target has {pattern!r}, which matches "
                             f"{what[0] if what else 'nothing' + nearest(pattern, modules)}, but "
                             "it must match an nn.Linear inside the model")
        chosen |= linear
    return chosen


@torch.no_grad()
def lora(
    model: nn.Module, rank: int, *, target: str | Sequence[str] | None = None,
    init: str = "switchlora", alpha: float | None = None, normalize: str | None = None,
    preserve: bool = True, dtype: torch.dtype | None = None, seed: int = 0,
) -> nn.Module:
    """Put a pair A, B beside the weights of ``nn.Linear`` layers and freeze those, in place.

    What else the model has stays as trainable as it was: call ``model.requires_grad_(False)``
    first to train the pairs alone.

    Args:
        model: any module; its layers are replaced by :class:`LoRALinear`, whose state_dict has the
            weight under the name it had, and ``lora_A``, ``lora_B`` (and ``magnitude``).
        rank: r, an int >= 1 and below the smaller side of every weight.
        target: glob or globs on the dotted names of layers. Default None: every ``nn.Linear`` but
            the output head.
        init: ``"switchlora"`` (default): both factors uniform within :func:`bounds`; ``"lora"``: A
            as nn.Linear starts, B zero.
        alpha: s = alpha / rank, > 0. Default None: 1 with ``"switchlora"`` as in its paper, rank
            (s = 1) with ``"lora"``.
        normalize: None (default), or ``"input"``, ``"output"`` for a :class:`NormalizedLinear`
            with one magnitude for each such feature.
        preserve: subtract the first s B A from the weight, so that the model computes what it did
            (default). False adds it to a random start, as the paper's pre-training runs.
        dtype: of the factors; None (default) is the weights'.
        seed: of the factors. The global generator is not touched.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: names the layer or argument, the value and the rule; the model is
            unchanged.

    Source: Zhou et al., arXiv 2406.06564; Hu et al., arXiv 2106.09685.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"lora: rank={rank!r}, but it must be an int >= 1")
    if init not in ("switchlora", "lora"):
        raise ValueError(f"lora: init={init!r}, but it must be one of 'switchlora', 'lora'")
    if normalize not in (None, "input", "output"):
        raise ValueError(f"lora: normalize={normalize!r}, but it must be one of None, 'input', "
                         "'output'")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"lora: alpha={alpha!r}, but it must be a finite number > 0")
    scaling = (alpha or (1.0 if init == "switchlora" else float(rank))) / rank
    chosen = _targets(model, target)
    places = _places(model)
    for name, linear in chosen.items():
        check_base(linear.weight, rank, name)
        _only_name(places, name, linear.weight)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in chosen.items():
        layer = LoRALinear(linear, rank, scaling, dtype) if normalize is None else \
            NormalizedLinear(linear, rank, scaling, dtype, normalize)
        n = layer.weight.shape[1]
        if not layer.weight.is_meta:
            a, b = bounds(layer.weight, rank, scaling) if init == "switchlora" else (n**-0.5, 0.0)
            for factor, bound in ((layer.lora_A, a), (layer.lora_B, b)):
                if bound:
                    drawn = torch.rand(factor.shape, generator=generator, device="cpu",
                                       dtype=torch.float32)
                    factor.copy_((2 * drawn - 1) * bound)
            if preserve and b:
                layer.weight.sub_((wide(layer.lora_B) @ wide(layer.lora_A)) * scaling)
            if isinstance(layer, NormalizedLinear):
                layer.renorm()
        _replace(model, name, layer.train(linear.training))
    return model


def merge(model: nn.Module) -> nn.Module:
    """Turn every layer of :func:`lora` back into a plain ``nn.Linear``, in place; no cost is left.

    Args:
        model: any module. Layers of ``peft`` are left alone: they have ``merge_and_unload``.

    Returns:
        The model, its layers with weights in the dtype of their base, rounded to nearest.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            _replace(model, name, module.merge())
    return model


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


# -------------------------------------------------------------------- reading


class Adapter(NamedTuple):
    """One layer's pair.

    Args:
        layer: its dotted name.
        names: of the parameters, by role: ``"A"``, ``"B"``, ``"base"``, ``"magnitude"``.
        tensors: the parameters, by role.
        scaling: s.
    """

    layer: str
    names: dict[str, str]
    tensors: dict[str, Tensor]
    scaling: float


def adapters(model: nn.Module) -> list[Adapter]:
    """Every pair of the model: of :func:`lora`, and of ``peft``'s LoRA and DoRA on linear layers.

    Raises:
        TypeError, ValueError: a pair that cannot be trained here, by layer: without its partner,
            merged, several active at once, of another kind, with a quantized or shared base, or of
            a rank that is not below the smaller side.
    """
    places, found = _places(model), []
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
        check_base(parts["base"], len(parts["A"]), layer)
        names = {k: _only_name(places, layer, p) for k, p in parts.items()}
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
    return parts, float(x.scaling[key])


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base weights of all pairs, named as in the model without them.

    Switching moves them, and ``peft``'s ``save_pretrained`` leaves them out: save these beside it,
    and ``load_state_dict(..., strict=False)`` them into the model that the adapter is put on.

    Args:
        model: with layers of :func:`lora` or of ``peft``.

    Returns:
        {name: weight (m, n)}; the tensors are those of the model, not copies.

    Raises:
        TypeError, ValueError: a pair that :func:`adapter_groups` would refuse.
    """
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
    """Groups with names and declared roles, for SwitchLoRAAdamW and GradNormLoRPAdamW.

    Plain pairs are in groups of (A, B, base, A, B, base, ...) with ``roles=("A", "B", "base")``
    and their ``scaling``, without decay unless ``options`` ask for it: the decay would undo half of
    what a switch has moved into the base. Normalized ones are (A, B, A, B, ...) with
    ``roles=("A", "B")``, and their magnitudes in a group that gets AdamW without decay. All else
    that needs a gradient gets AdamW, as :func:`lissom.optim.param_groups` groups it.

    Args:
        model: with layers of :func:`lora`, or a ``peft`` model with LoRA or DoRA.
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
