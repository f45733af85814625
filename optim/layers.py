"""Linear layers with a low-rank pair beside a frozen weight, with or without normalization.

:func:`lora` puts a pair A, B into the place of ``nn.Linear``, :func:`merge` turns the layers back
into plain ones. What pairs a model has is read by :mod:`lissom.optim.adapters`. Letters are those
of :mod:`lissom.optim.pairs`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checks import check_module
from .codec import wide
from .heads import output_heads
from .options import boolean, choice, integer, nearest, optional, real
from .pairs import DTYPES, bounds, check_base, only_name, places

__all__ = ["LoRALinear", "NormalizedLinear", "lora", "merge"]

_AXIS = choice("input", "input", "output")


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
        self.axis: str = _AXIS.check("axis", axis, "NormalizedLinear")
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
        product: Any = _NormalizedProduct  # torch before 2.15 has no types for it
        y: Tensor = product.apply(x, *self._factors(), self.bias, self.scaling, self.axis)
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
    # Two `where`: a zero c must not reach 1 / c, whose gradient would be NaN.
    alive = c > 0
    inverse = torch.where(alive, 1 / torch.where(alive, c, 1.0), 0.0)
    factor = mu.to(v.dtype).view(c.shape) * inverse
    return v * factor, v, factor, inverse


class _NormalizedProduct(torch.autograd.Function):
    """y = (V mu / c) x + bias; the backward pass recomputes V, of which autograd would keep copies.

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
    globs = [target] if isinstance(target, str) else target
    if not isinstance(globs, Collection) or not globs or not all(
            isinstance(x, str) for x in globs):
        raise TypeError(f"lora: target={target!r}, but it must be None, a glob or some globs")
    chosen: dict[str, nn.Linear] = {}
    for pattern in globs:
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
    """Add a trainable low-rank pair to each ``nn.Linear`` of a model and freeze its weight.

    In place: each layer computes (W + s B A) x + bias with W frozen. Other parameters stay as
    trainable as they were: call ``model.requires_grad_(False)`` first to train the pairs alone.

    Args:
        model: any module; its layers are replaced by :class:`LoRALinear`, whose state_dict has the
            weight under the name it had, and ``lora_A``, ``lora_B`` (and ``magnitude``).
        rank: r, an int >= 1 and below the smaller side of every weight.
        target: glob or globs on the dotted names of layers. Default None: every ``nn.Linear`` but
            the output head.
        init: ``"switchlora"`` (default): both factors uniform within
            :func:`lissom.optim.pairs.bounds`; ``"lora"``: A as nn.Linear starts, B zero.
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
    check_module(model, "lora")
    rank = integer(None, 1).check("rank", rank, "lora")
    init = choice("switchlora", "switchlora", "lora").check("init", init, "lora")
    normalize = optional(_AXIS).check("normalize", normalize, "lora")
    alpha = optional(real(None, above=True)).check("alpha", alpha, "lora")
    preserve = boolean(True).check("preserve", preserve, "lora")
    seed = integer(0, -2**63, 2**64 - 1).check("seed", seed, "lora")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"lora: dtype={dtype!r}, but it must be None or one of "
                        f"{', '.join(map(str, DTYPES))}")
    scaling = (alpha or (1.0 if init == "switchlora" else float(rank))) / rank
    chosen = _targets(model, target)
    found = places(model)
    for name, linear in chosen.items():
        check_base(linear.weight, rank, name)
        only_name(found, name, linear.weight)
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
                layer.weight.copy_(_summed(layer.weight, layer.lora_A, layer.lora_B, -scaling))
            if isinstance(layer, NormalizedLinear):
                layer.renorm()
        _replace(model, name, layer.train(linear.training))
    return model


def merge(model: nn.Module) -> nn.Module:
    """Turn every layer of :func:`lora` back into a plain ``nn.Linear`` with the trained weight.

    In place: W <- W + s B A, or V mu / c with normalization. Inference then costs nothing extra.

    Args:
        model: any module. Layers of ``peft`` are left alone: they have ``merge_and_unload``.

    Returns:
        The model, its layers with weights in the dtype of their base, rounded to nearest.
    """
    check_module(model, "merge")
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            _replace(model, name, module.merge())
    return model


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
