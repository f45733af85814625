"""Bytes of a training run before it runs: model and optimizer on the meta device.

Weights, gradients and optimizer state are exact: the real optimizer object says which tensors it
keeps. Activations are what autograd saves for the backward pass with a fused attention and unfused
norms, so devices that fuse those have less. Temporaries are not estimated (``lissom-memory
--measure`` has them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..optim import project_in_backward, update_in_backward
from ..optim.base import MatrixOptimizer
from ..optim.codec import Slot
from ..optim.heads import output_heads
from ..optim.lowrank import LowRankOptimizer
from . import names
from .livebytes import LiveBytes
from .sharding import rank_bytes
from .sources import loss_of, vocabulary

__all__ = ["IN_BACKWARD", "RIVALS", "Held", "activations", "count", "holdings", "modes", "passes"]

#: What may be done with gradients: kept until the step, projected or used up in the backward pass.
IN_BACKWARD = ("none", "project", "update")


class Held(NamedTuple):
    """One parameter and what is kept for it, in full.

    Args:
        name: its dotted name.
        kind: ``"embedding"``, ``"head"``, ``"low-rank matrices"`` (of the class's own rule),
            ``"matrices"`` or ``"vectors"``.
        weight: itself, as a slot.
        trainable: whether it has a gradient.
        slots: state.
        buffers: what stands for its gradient under ``project_in_backward``; none where it keeps
            its gradient.
        waiting: bytes of a new basis that waits for the step there, in the backward pass.
        gap: steps between two such.
        uses: how many modules it belongs to (2 for a tied head).
    """

    name: str
    kind: str
    weight: Slot
    trainable: bool
    slots: Mapping[str, Slot]
    buffers: Mapping[str, Slot] = {}
    waiting: int = 0
    gap: int = 1
    uses: int = 1


# -------------------------------------------------------------------- what is kept


def _torch_adamw(model: nn.Module) -> dict[Tensor, dict[str, Slot]]:
    """The state of torch.optim.AdamW, which has the weights' dtype, after a step without values."""
    twins = {nn.Parameter(torch.empty_like(p, device="meta")): p for p in model.parameters()
             if p.requires_grad}
    optimizer = torch.optim.AdamW(twins, lr=1e-3)
    for twin in twins:
        twin.grad = torch.empty_like(twin)
    optimizer.step()
    return {p: {k: Slot(tuple(x.shape), x.dtype, p.device if x.is_meta else x.device,
                        rows=x.ndim > 0)
                for k, x in optimizer.state[twin].items()} for twin, p in twins.items()}


def _bitsandbytes(model: nn.Module) -> dict[Tensor, dict[str, Slot]]:
    """AdamW8bit of bitsandbytes: two codes an element, scales for 256 in a row; small ones in fp32.

    Beside them one codebook of 256 values for each moment, which all parameters share; it is
    counted with the first.
    """
    kept: dict[Tensor, dict[str, Slot]] = {}
    shared = ["qmap1", "qmap2"]
    for p in model.parameters():
        if not p.requires_grad:
            continue
        eight = p.numel() >= 4096
        slots = {}
        for i in "12":
            slots[f"state{i}"] = Slot(tuple(p.shape), torch.uint8 if eight else torch.float32,
                                      p.device)
            if eight:
                slots[f"absmax{i}"] = Slot((-(-p.numel() // 256),), torch.float32, p.device)
        while eight and shared:
            slots[shared.pop()] = Slot((256,), torch.float32, p.device)
        kept[p] = slots
    return kept


class Rival(NamedTuple):
    """An optimizer of another package: what it keeps, and the dtype of weights that it is for."""

    slots: Callable[[nn.Module], dict[Tensor, dict[str, Slot]]]
    dtype: torch.dtype | None = None


#: Optimizers of other packages to compare with. torch's state has the dtype of the weights.
RIVALS: dict[str, Rival] = {
    "torch-adamw": Rival(_torch_adamw),
    "torch-adamw-fp32": Rival(_torch_adamw, torch.float32),
    "bnb-adamw8bit": Rival(_bitsandbytes),
}


def _kinds(model: nn.Module) -> Callable[[str, Tensor], str]:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = output_heads(model)

    def kind(name: str, p: Tensor) -> str:
        if id(p) in tables:
            return "embedding"
        if id(p) in heads:
            return "head"
        return "matrices" if p.ndim >= 2 else "vectors"

    return kind


def _waiting(optimizer: LowRankOptimizer, p: Tensor, o: Mapping[str, Any]) -> int:
    """Bytes of a basis that was found in the backward pass: as found, and as it is used."""
    *batch, m, n = optimizer.matrix_shape(p, o)
    r, side = optimizer.rank_and_side(p, o)
    length = (m if side in ("left", "full") else 0) + (n if side in ("right", "full") else 0)
    count = length * r
    for b in batch:
        count *= b
    if o["projection"] in ("dct", "random"):
        return count * p.element_size()
    return count * (4 if p.dtype == torch.float32 else 4 + p.element_size())


def _placed(slots: dict[str, Slot], o: Mapping[str, Any]) -> dict[str, Slot]:
    """Slots on their devices: candidates that go to the host are not put there from meta."""
    if o.get("candidate_device") == "cpu" and "candidates" in slots:
        pool = slots["candidates"]._replace(device=torch.device("cpu"))
        slots = {**slots, "candidates": pool}
    return slots


def holdings(name: str, model: nn.Module, rank: int | None, **options: Any) -> list[Held]:
    """What an optimizer keeps for each parameter of a model.

    Args:
        name: a key of :data:`lissom.bench.names.OPTIMIZERS` or :data:`RIVALS`.
        model: on the meta device, say; a method that adds factors changes it.
        rank: rank of projections.
        options: of the optimizer's class; those it does not have are left out.
    """
    optimizer: MatrixOptimizer | None = None
    slots: dict[Tensor, dict[str, Slot]]
    options_of: dict[Tensor, dict[str, Any]] = {}
    if name in RIVALS:
        slots = RIVALS[name].slots(model)
    else:
        optimizer = names.build(name, model, rank, 1e-3, **options)
        options_of = {p: o for _, p, o in optimizer._named()}
        slots = {p: _placed(optimizer.stored_slots(p, o), o) for p, o in options_of.items()
                 if p in optimizer.state}
    kind = _kinds(model)
    uses: dict[Tensor, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        uses[p] = uses.get(p, 0) + 1
    found = []
    for label, p in model.named_parameters():
        what, own = kind(label, p), False
        if optimizer is not None and p in options_of:
            own = optimizer.own_rule(p, options_of[p])
        buffers: dict[str, Slot] = {}
        waiting, gap = 0, 1
        if own and isinstance(optimizer, LowRankOptimizer):  # it can be projected early
            buffers = optimizer.buffers(p, options_of[p], sums=False)
            waiting, gap = _waiting(optimizer, p, options_of[p]), options_of[p]["update_proj_gap"]
        found.append(Held(label, "low-rank matrices" if own and what == "matrices" else what,
                          Slot(tuple(p.shape), p.dtype, p.device), p.requires_grad,
                          slots.get(p, {}), buffers, waiting, gap, uses[p]))
    return found


def modes(name: str, model: nn.Module, rank: int | None, **options: Any) -> tuple[str, ...]:
    """Which of :data:`IN_BACKWARD` the optimizer accepts."""
    if name in RIVALS:
        return ("none",)
    optimizer = names.build(name, model, rank, 1e-3, **options)
    accepted = ["none"]
    for mode, attach in (("project", project_in_backward), ("update", update_in_backward)):
        try:
            attach(optimizer).remove()
        except ValueError:
            continue
        accepted.append(mode)
    return tuple(accepted)


# -------------------------------------------------------------------- sums


def _first(h: Held, slots: Mapping[str, Slot], ranks: int) -> int:
    """Bytes on the first rank, which has the most of every parameter."""
    return rank_bytes(h.weight.shape, slots, ranks)[0]


def _gradients(held: Sequence[Held], in_backward: str, ranks: int) -> int:
    """Peak of gradient bytes for one micro-batch a step; see :func:`count`.

    Gradients that are freed early exist one at a time, or under FSDP2 those of one layer, which are
    reduced in one buffer.
    """
    kept = 0
    buffers: dict[Any, int] = {}
    freed: set[Any] = set()
    waiting: dict[int, list[int]] = {}
    for i, h in enumerate(held):
        if not h.trainable:
            continue
        gradient = _first(h, {"gradient": h.weight}, ranks)
        buffer = _unit(h.name) if ranks > 1 else i
        buffers[buffer] = buffers.get(buffer, 0) + gradient
        if h.uses > 1:  # two parts of a shared weight's gradient, while autograd adds them
            kept += 2 * gradient
        if in_backward == "update":
            freed.add(buffer)
        elif in_backward == "project" and h.buffers:
            freed.add(buffer)
            kept += _first(h, h.buffers, ranks)
            waiting.setdefault(h.gap, []).append(h.waiting)
        else:
            kept += gradient
    bases = sum(-(-len(sizes) // gap) * max(sizes) for gap, sizes in waiting.items())
    return kept + bases + max((buffers[x] for x in freed), default=0)


def _unit(name: str) -> str:
    """The layer that ``fully_shard`` would be called on: up to the first number in the name."""
    parts = name.split(".")
    digits = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[:digits[0] + 1]) if digits else ""


def _gathered(held: Sequence[Held]) -> int:
    """Bytes of whole parameters and gradients that FSDP2 has at once.

    With ``fully_shard`` on each layer and on the model: what belongs to no layer stays whole from
    the forward pass on, its gradient until the end; of the layers two are there (the next one is
    fetched early), and one's gradient.
    """
    weights: dict[str, int] = {"": 0}
    gradients: dict[str, int] = {"": 0}
    for h in held:
        unit = _unit(h.name)
        weights[unit] = weights.get(unit, 0) + h.weight.nbytes
        gradients[unit] = gradients.get(unit, 0) + h.weight.nbytes * h.trainable
    layers = sorted((x for unit, x in weights.items() if unit), reverse=True)[:2]
    largest = max((x for unit, x in gradients.items() if unit), default=0)
    return weights[""] + gradients[""] + sum(layers) + largest


def count(held: Sequence[Held], in_backward: str = "none", ranks: int = 1) -> dict[str, Any]:
    """Bytes on the fullest rank: weights, gradients, state, in all and per kind of parameter.

    Args:
        held: of :func:`holdings`.
        in_backward: ``"none"``: every gradient waits for the step; ``"project"``: with
            ``project_in_backward`` and one micro-batch a step, the gradients of AdamW's part, the
            buffers, one full gradient and the new bases of a step; ``"update"``: with
            ``update_in_backward``, the largest gradient. In each, two more of a shared weight's.
        ranks: over which FSDP2 shards; see :mod:`lissom.bench.sharding`.

    Returns:
        ``parameters``, ``trainable`` (how many, in all), ``weights``, ``gradients``,
        ``optimizer_state`` (bytes), ``candidates`` (bytes of it that a switching optimizer can
        keep on the host), ``host`` (bytes of it that are there), ``gathered`` (whole layers
        beside the shards, an estimate; 0 for one rank), ``by_kind`` (the same, where it can be
        divided).
    """
    total = {"parameters": 0, "weights": 0, "gradients": 0, "optimizer_state": 0}
    by_kind: dict[str, dict[str, int]] = {}
    host = candidates = trainable = 0
    for h in held:
        size = torch.Size(h.weight.shape).numel()
        weights = _first(h, {"weight": h.weight}, ranks)
        new = {"parameters": size, "weights": weights, "gradients": weights * h.trainable,
               "optimizer_state": _first(h, h.slots, ranks)}
        entry = by_kind.setdefault(h.kind, dict.fromkeys(new, 0))
        for key, x in new.items():
            entry[key] += x
            total[key] += x
        trainable += size * h.trainable
        away = {k: x for k, x in h.slots.items() if x.device != h.weight.device}
        host += _first(h, away, ranks)
        candidates += _first(h, {k: x for k, x in h.slots.items() if k == "candidates"}, ranks)
    total["gradients"] = _gradients(held, in_backward, ranks)
    if in_backward != "none":
        for entry in by_kind.values():
            del entry["gradients"]
    return {**total, "trainable": trainable, "candidates": candidates, "host": host,
            "gathered": _gathered(held) if ranks > 1 else 0, "in_backward": in_backward,
            "ranks": ranks, "by_kind": by_kind}


# -------------------------------------------------------------------- activations


class _Attention(torch.autograd.Function):
    """What a fused attention kernel saves: its arguments, its output, a number for each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        *batch, heads, length, _ = q.shape
        # laid out as such kernels do it, heads inside
        out = v.new_empty(*batch, length, heads, v.shape[-1]).transpose(-3, -2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention as :class:`_Attention`: on the meta device torch takes the unfused one."""
    attention: Any = _Attention  # torch before 2.15 has no types for it
    out: Tensor = attention.apply(query, key, value)
    return out


def _fused() -> Any:
    """A context in which models find that attention, also where they compute again."""
    return mock.patch.object(functional, "scaled_dot_product_attention", _attention)


def activations(model: nn.Module, batch: int, length: int) -> int:
    """Bytes that autograd saves between a forward pass and its backward pass, weights apart.

    Args:
        model: on the meta device; takes tokens.
        batch: sequences.
        length: tokens of one.

    Raises:
        ValueError: the model has no table of tokens, or cannot run without values.
    """
    if not vocabulary(model):
        raise ValueError("the model takes no tokens")
    own = {x.untyped_storage()._cdata for x in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # held, so that no other gets its number
        return x

    tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
    try:
        with _fused(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss_of(model, tokens)
    except Exception as error:  # of any model's own code
        raise ValueError(f"the model does not run without values: {error}") from error
    return sum(storage.nbytes() for storage in saved.values())


def passes(model: nn.Module, batch: int, length: int, freed: Iterable[Tensor] = ()) -> int:
    """The most bytes alive at once in a forward and a backward pass, gradients included.

    Both are run on the meta device, operation by operation. Weights and optimizer state are not
    counted.

    Args:
        model: on the meta device; takes tokens; it has no gradients afterwards.
        batch: sequences.
        length: tokens of one.
        freed: parameters whose gradients are used up as soon as they are ready.
    """
    def free(p: Tensor) -> None:
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(free) for p in freed if p.requires_grad]
    live = LiveBytes(meta=True)
    try:
        tokens = torch.zeros(batch, length, dtype=torch.long, device="meta")
        with _fused(), live:
            loss_of(model, tokens).backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad()
    return live.peak
