"""SwitchLoRA: low-rank pairs whose vectors are exchanged with candidates, a few at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..kernels.fakes import is_fake, place, scalar, truth
from . import codec, project, sharding
from .apply import Update
from .base import MatrixOptimizer, PartialStepError
from .batches import Work
from .codec import Slot, State
from .common import AdamWPart
from .dense import adam_slots, averages, representable
from .keys import key_of
from .options import Option, choice, integer, optional, real
from .pairs import bounds, check_base, check_factors, roles
from .weights import MASTERS, write_weight

__all__ = ["SwitchLoRAAdamW"]

_ROLES = ("A", "B", "base")
# Elements of a base weight that are changed at once.
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 22}
# Flipped in B's key: gives the random rounding of the base weight bits of its own.
_BASE = 1 << 30
# Random stream from which candidates are drawn; switches use the number of their step.
_POOL = 0


class SwitchLoRAOptions(AdamWPart, total=False):
    """Options of :class:`SwitchLoRAAdamW`, for type checkers."""

    interval: float
    interval_decay: float
    decay_steps: int
    freeze_steps: int
    candidates: int | None
    candidate_device: str


class _Pair(NamedTuple):
    """One layer: y = (base + scaling * B A) x."""

    name: str
    a: Tensor
    b: Tensor
    base: Tensor


class SwitchLoRAAdamW(MatrixOptimizer):
    """LoRA training whose pairs change over time, so that the sum of changes has full rank.

    AdamW on the pairs. For W + s B A, at each step before the updates, about r / interval(k) rows
    of A and as many columns of B are replaced: A_i goes back to a pool, a random candidate A' takes
    its place, and W <- W + s B_i (A_i - A') keeps the function. The moments of the counterpart B_i
    restart, and it is frozen (not updated) for some steps. interval(k) = interval /
    interval_decay^((k + 1) / decay_steps). Adam's bias correction counts each vector's updates.

    Pairs are declared by the groups of :func:`lissom.optim.adapter_groups`, for models of
    :func:`lissom.optim.lora` and of ``peft``; all other parameters get AdamW. The base weight is
    frozen for autograd, but this optimizer moves it. With dropout on the input of A a switch keeps
    the function of evaluation.

    Args:
        params: groups with ``roles=("A", "B", "base")`` and ``scaling``, as ``adapter_groups``
            makes them; other parameters may stand beside.
        lr: >= 0. Default 1e-3; the paper takes 10 to 20 times the rate of full training.
        betas, eps, weight_decay, amsgrad and the options of every class: as
            :class:`lissom.optim.AdamW`.
        roles: of a group, what its parameters are, in turn: ``("A", "B", "base")``, A (r, n), B
            (m, r), base (m, n), or None (default) for others.
        scaling: of such a group, s in W + s B A, > 0. Default 1.
        interval: steps in which r vectors of each factor are switched at the start, > 0 and at
            least twice ``freeze_steps``. Default 40.
        interval_decay: what is left of the frequency after ``decay_steps``, in (0, 1]. Default 0.3.
        decay_steps: >= 1. Default 4000; the paper takes a tenth of the run.
        freeze_steps: steps for which a counterpart is frozen, >= 1. Default 5.
        candidates: vectors in the pool of each factor, those in use included, more than the rank
            and at most the smaller side of W, which is the default (None) and the paper's.
        candidate_device: ``"same"`` (default), or ``"cpu"``: pools stay on the host, pinned where
            there is CUDA, and only what is switched goes over.

    Raises:
        TypeError, ValueError: an option or a pair that breaks its rule, by name and value.

    Source: Zhou et al., "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank
    Information", arXiv 2406.06564. Learned vectors go back to the pool as in the paper, before
    candidates are drawn, so that one may be drawn again at once.
    """

    algorithm: ClassVar[str] = "switchlora"
    remedy: ClassVar[str] = ("There is no pair to switch: put pairs into the model "
                             "(lissom.optim.lora, or peft) and pass "
                             "lissom.optim.adapter_groups(model).")
    options: ClassVar[Mapping[str, Option]] = {
        "roles": roles(_ROLES, hint="plain pairs; GradNormLoRPAdamW takes normalized ones"),
        "scaling": real(1.0, above=True),
        "interval": real(40.0, above=True),
        "interval_decay": real(0.3, 0.0, 1.0, above=True),
        "decay_steps": integer(4000, 1),
        "freeze_steps": integer(5, 1),
        "candidates": optional(integer(None, 2)),
        "candidate_device": choice("same", "same", "cpu"),
    }

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, amsgrad: bool = False,
        **options: Unpack[SwitchLoRAOptions],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay, "amsgrad": amsgrad, **options})

    # ---------------------------------------------------------------- which, and what is kept

    def uncapturable(self, o: Mapping[str, Any]) -> str | None:
        return "which vectors are switched is decided on the host"

    def declines(self, p: Tensor, o: Mapping[str, Any]) -> str | None:
        return "no roles in its group" if o["roles"] is None else None

    def check_combination(self, o: Mapping[str, Any], params: list[Tensor], explicit: set[str],
                          where: str) -> None:
        if o["interval"] < 2 * o["freeze_steps"]:
            raise ValueError(f"{where}: interval={o['interval']}, but it must be at least twice "
                             f"freeze_steps={o['freeze_steps']}: only one of a pair can be frozen "
                             "at a time")
        if o["roles"] is None or o["algorithm"] == "adamw":
            return
        if len(params) % 3:
            raise ValueError(f"{where}: {len(params)} parameters with roles={_ROLES}, but they "
                             "must be triples: a pair needs its partner and its base weight")
        # A new group must not share parameters with the present ones; a saved group is one of them.
        others = [p for group in self.param_groups for p in group["params"]] if explicit else []
        held = Counter(map(place, (*params, *others)))
        for pair in _pairs({**o, "params": params}):
            at = f"{where}, {pair.name}"
            a, b, base = pair[1:]
            r = len(a)
            check_factors(a, b, tuple(base.shape), at)
            check_base(base, r, at)
            if held[place(base)] > 1:
                raise ValueError(f"{at}: its base weight is given {held[place(base)]} times, but "
                                 "it must belong to one layer: a switch would change the others")
            if base.requires_grad or base.grad is not None:
                raise ValueError(f"{at}: its base weight has requires_grad={base.requires_grad}, "
                                 "but it must be frozen: switches alone move it")
            if len({x.device for x in (a, b, base)}) > 1:
                raise ValueError(f"{at}: A, B and base are on {a.device}, {b.device}, "
                                 f"{base.device}, but they must be on one device")
            if not r < _pool_size(o, base) <= min(base.shape):
                raise ValueError(f"{at}: candidates={o['candidates']}, but it must be > rank {r} "
                                 f"and <= the smaller side {min(base.shape)}")

    def slots(self, p: Tensor, o: Mapping[str, Any]) -> dict[str, Slot]:
        pair = next(x for x in _pairs(o) if p is x.a or p is x.b or p is x.base)
        if p is pair.base:
            return {}
        r = len(pair.a)
        host = o["candidate_device"] == "cpu" and not p.is_meta
        pool = Slot((_pool_size(o, pair.base), p.numel() // r), p.dtype,
                    torch.device("cpu") if host else p.device, pinned=host)
        # Per-vector numbers are read on the host, where that waits for no device.
        numbers = Slot((r,), torch.int32, torch.device("cpu"))
        return {**adam_slots(tuple(p.shape), p, o), "updates": numbers, "frozen": numbers,
                "active": numbers, "pointer": codec.counter(torch.int64),
                "pool_step": codec.counter(), "candidates": pool}

    def check_state(self, p: Tensor, state: Mapping[str, Tensor], o: Mapping[str, Any], at: str
                    ) -> None:
        if "candidates" not in state:
            return
        rows = {"active": len(state["candidates"]), "pointer": len(state["active"])}
        for name in ("updates", "frozen", "active", "pointer"):
            low, high = int(state[name].min()), int(state[name].max())
            if low < 0 or high >= rows.get(name, high + 1):
                end = f" and < {rows[name]}" if name in rows else ""
                raise ValueError(f"{at}: {name} from {low} to {high}, but it must be >= 0{end}")

    def describe(self, p: Tensor, o: Mapping[str, Any]) -> tuple[int | None, str, str]:
        pair = next(x for x in _pairs(o) if p is x.a or p is x.b or p is x.base)
        if p is pair.base:
            return None, "", "base of a pair, moved by switches alone"
        pool = self.slots(p, o)["candidates"]
        return len(pair.a), "", (f"{'A' if p is pair.a else 'B'} of a pair; {pool.nbytes:,} of "
                                 f"these bytes are {pool.shape[0]} candidates on {pool.device}")

    # ---------------------------------------------------------------- switches

    def before_updates(self, work: list[Work]) -> list[str]:
        """The switches of this step, in every pair whose two factors have a gradient."""
        names = {p: name for name, p, _ in self._named()}
        switched: list[str] = []
        ready = {w.p for w in work}
        for group in self.param_groups:
            for pair in _pairs(group):
                if pair.base in ready:
                    raise ValueError(f"the base weight of {pair.name!r} has a gradient, but it "
                                     "must be frozen: switches alone move it")
        for group in self.param_groups:
            for pair in _pairs(group):
                if pair.a in ready and pair.b in ready:
                    mine = [names[p] for p in pair[1:]]
                    try:
                        switched += mine if self._switch(pair, group) else []
                    except Exception as error:
                        raise PartialStepError(
                            f"{type(self).__name__}.step() failed while it switched vectors of "
                            f"{', '.join(mine)} ({error}), which may be partly switched; before "
                            f"these {', '.join(switched) or 'none'} had been moved") from error
        return switched

    def _switch(self, pair: _Pair, o: Mapping[str, Any]) -> bool:
        """Exchange some vectors of one pair, if it is time; the base takes up the difference."""
        a, b, base = pair[1:]
        sa, sb = self.state[a], self.state[b]
        bound_a, bound_b = bounds(base, len(a), o["scaling"])
        # Half a round apart, so that neither finds its next vector frozen by the other.
        for s, bound, pointer in ((sa, bound_a, 0), (sb, bound_b, len(a) // 2)):
            if not scalar(s["pool_step"], 0):
                _draw_pool(s, o, bound)
                s["pointer"].fill_(pointer)
        # A first: it freezes columns of B, which then are not switched.
        i, to_a = chosen(sa, sb, o)
        sb["frozen"][i] = o["freeze_steps"]
        j, to_b = chosen(sb, sa, o)
        sa["frozen"][j] = o["freeze_steps"]
        if not len(i) and not len(j):
            return False
        all_a, all_b = sharding.whole(a), sharding.whole(b)
        out_a = _exchanged(all_a, sa, i, to_a)
        out_b = _exchanged(all_b.mT, sb, j, to_b)
        _clear_masters(sa, i, 0)
        _clear_masters(sb, j, 1)
        # W <- W + s (B_I (A_I - A'_I) + (B_J - B'_J) A_J); I and J have nothing in common
        wide = torch.promote_types(base.dtype, torch.float32)
        left = torch.cat([all_b[:, _sent(i, b.device)].to(wide), out_b.mT.to(wide)], 1)
        right = torch.cat([out_a.to(wide), all_a[_sent(j, a.device)].to(wide)])
        rows = sharding.rows_of(base)
        gather = sharding.whole if rows is None else sharding.in_rows
        w, first = gather(base), 0 if rows is None else rows.start
        # The base has no state in which the bits that are cut off could be kept.
        _add(w, left[first:first + len(w)], right, {"key": sb["key"] ^ _BASE},
             {**o, "master_bits": None}, int(sb["step"]) + 1, first * base.shape[1])
        for p, value in ((a, all_a), (b, all_b), *(((base, w),) if rows is None else ())):
            if sharding.is_sharded(p):
                sharding.keep(p, value)
        if rows is not None:
            sharding.put_rows(base, w)
        return True

    # ---------------------------------------------------------------- the update

    def update(self, g: Tensor, s: State, o: Mapping[str, Any], t: int) -> Update:
        """AdamW with a count of updates for each vector; frozen vectors are left out.

        r is below both sides of the base, so A is wide and its rows are the vectors, B is tall.
        """
        shape = (-1, 1) if g.shape[0] < g.shape[1] else (1, -1)
        beta1, beta2 = o["betas"]
        resting = s["frozen"] > 0
        count = torch.where(resting, 0, s["updates"] + 1)
        k = count.clamp(min=1).double()
        # The counts are on the host: send the three numbers of each vector in one copy.
        sent = _sent(torch.stack([1 - beta1**k, (1 - beta2**k).sqrt(), resting.double()]), g.device)
        first, second, frozen = (x.view(shape) for x in sent)
        frozen = frozen > 0
        g = representable(codec.wide(g), o["state_bits"]).masked_fill(frozen, 0.0)
        first, second = first.to(g), second.to(g)
        for name, slot in codec.slots_of(s).items():
            if slot.stream is not None:  # a frozen vector's moments restart
                s[name].masked_fill_(frozen, 0.0)
        # N = (M / (1 - b1^k)) / (sqrt(V / (1 - b2^k)) + eps)
        m, v = averages(g, s, o)
        n = (m / first).div_(v.sqrt().div_(second).add_(o["eps"])).masked_fill_(frozen, 0.0)
        s["updates"].copy_(count)
        s["frozen"].sub_(1).clamp_(min=0)
        keep = torch.where(frozen, n.new_ones(()), 1 - o["lr"] * o["weight_decay"])
        return Update(dense=n, keep=keep)


# -------------------------------------------------------------------- parts of a switch


def _pairs(o: Mapping[str, Any]) -> Iterator[_Pair]:
    """The pairs of a group; messages call a layer by the name of its A."""
    if o["roles"] is None or o["algorithm"] == "adamw":
        return
    names = o.get("param_names")
    for i in range(0, len(o["params"]), 3):
        name = names[i] if names else f"parameters {i} to {i + 2}"
        yield _Pair(name, *o["params"][i:i + 3])


def _pool_size(o: Mapping[str, Any], base: Tensor) -> int:
    return min(base.shape) if o["candidates"] is None else int(o["candidates"])


def _draw_pool(s: dict[str, Tensor], o: Mapping[str, Any], bound: float) -> None:
    """Uniform candidates; vector i is in the place of candidate i."""
    pool = s["candidates"]
    drawn = torch.rand(pool.shape, generator=project.generator(key_of(s, o), _POOL),
                       device="cpu", dtype=torch.float32)
    pool.copy_(drawn.mul_(2).sub_(1).mul_(bound))
    s["active"].copy_(torch.arange(len(s["active"]), device="cpu"))
    s["pool_step"].copy_(s["step"] + 1)


def chosen(s: Mapping[str, Tensor], partner: Mapping[str, Tensor], o: Mapping[str, Any]
           ) -> tuple[Tensor, Tensor]:
    """Which vectors of a factor are switched at this step, and the candidates they go to.

    From the pointer on, round-robin, up to the first that is frozen or whose counterpart is.

    Returns:
        int64 indices on the host. The pointer in s has moved on.
    """
    r, k = len(s["active"]), int(s["step"])
    generator = project.generator(key_of(s, o), k + 1)
    # count = r / interval(k), rounded stochastically
    mean = r * o["interval_decay"] ** ((k + 1) / o["decay_steps"]) / o["interval"]
    draw = scalar(torch.rand((), generator=generator, device="cpu", dtype=torch.float32), 0.0)
    count = min(r, math.floor(mean) + (draw < mean % 1))
    if not count:
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        return none, none
    order = (int(scalar(s["pointer"], 0)) + torch.arange(count, device="cpu")) % r
    busy = (s["frozen"][order] > 0) | (partner["frozen"][order] > 0)
    order = order[:int(busy.int().argmax()) if truth(busy.any(), False) else count]
    s["pointer"].add_(len(order)).remainder_(r)
    # Vectors in use are no candidates, except those that are given back now.
    free = torch.ones(len(s["candidates"]), dtype=torch.bool, device="cpu")
    free[s["active"].long()] = False
    free[s["active"][order].long()] = True
    if is_fake(free):  # how many are, its numbers would say
        return order, order
    places = free.nonzero().flatten()
    picked = torch.randperm(len(places), generator=generator, device="cpu")[:len(order)]
    return order, places[picked]


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on a device, for which the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _exchanged(vectors: Tensor, s: Mapping[str, Tensor], order: Tensor, places: Tensor) -> Tensor:
    """Give vectors (rows) back to their pool and take candidates; old minus new ones."""
    pool, rows = s["candidates"], _sent(order, vectors.device)
    old = vectors[rows]
    pool[_sent(s["active"][order].long(), pool.device)] = old.to(pool.device)
    new = pool[_sent(places, pool.device)].to(vectors.device)
    vectors[rows] = new
    s["active"][order] = places.int()
    return codec.wide(old) - codec.wide(new)


def _clear_masters(s: Mapping[str, Tensor], order: Tensor, dim: int) -> None:
    """Vectors that were candidates have no bits but their own."""
    for name in MASTERS:
        if name in s and len(order):
            bits = sharding.whole(s[name])
            bits.index_fill_(dim, _sent(order, bits.device), 0)
            if bits is not s[name]:
                sharding.keep(s[name], bits)


def _add(p: Tensor, left: Tensor, right: Tensor, kept: Mapping[str, Tensor], o: Mapping[str, Any],
         t: int, start: int) -> None:
    """p <- p + scaling * left @ right, rounded once, in blocks.

    In float64: in fp32 the last bit of a product depends on how many rows it has, for which a CPU's
    library takes other code, and shards of an fp32 or 16-bit weight would drift from the whole.

    ``start`` is the index in the whole weight of p's first element.
    """
    left, right = left.double(), right.double()
    rows = max(1, _BLOCK.get(p.device.type, _BLOCK["cuda"]) // p.shape[1])
    for i in range(0, len(p), rows):
        part = p[i:i + rows]
        x = part.double().addmm_(left[i:i + rows], right, alpha=o["scaling"])
        x = x if p.dtype == torch.float64 else x.float()
        write_weight(part, x, kept, o, t, start + i * p.shape[1])
