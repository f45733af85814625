"""Options of any class in any combination: refused by name, or the promises hold."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from lissom.optim import project_in_backward, update_in_backward
from lissom.optim.base import MatrixOptimizer
from lissom.optim.common import BOOKKEEPING
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from . import jobs
from .cases import CASES, all_slow_but
from .helpers import assert_same, named, parameters, snapshot, tensors, through_disk

pytestmark = pytest.mark.usefixtures("quantize_small")

BOTH = (False, True)
#: Values of every option but those that tests of their own are for.
VALUES: dict[str, tuple[Any, ...]] = {
    "lr": (0.0, 1e-3, 0.1), "betas": ((0.9, 0.999), (0.0, 0.9), (0.5, 0.5)), "eps": (1e-8, 1e-3),
    "weight_decay": (0.0, 0.5), "maximize": BOTH, "amsgrad": BOTH, "state_bits": (32, 16, 8, 4),
    "rounding": (None, "nearest", "stochastic"), "master_bits": (None, 8, 16),
    "nonfinite": ("propagate", "skip", "raise"), "seed": (0, 2**63 - 1),
    "shards": ("rows", "whole"), "metrics": BOTH, "rank": (None, 1, 2, 3, 100),
    "matricize": ("flatten", "batch"), "update_proj_gap": (1, 2, 3, 200),
    "scale": (0.0, 0.25, 2.0), "proj_type": ("std", "reverse_std", "left", "right", "full"),
    "projection": ("svd", "subspace", "randomized", "dct", "random"),
    "inner": ("adamw", "momentum", "lion", "factored"), "moments": ("keep", "rotate", "reset"),
    "residual": ("none", "fira", "sign", "error_feedback"),
    "refresh": ("staggered", "synchronous"), "basis_bits": (None, 16, 8, 4),
    "keep_energy": (None, 0.5, 1.0), "error_feedback_bits": (None, 32, 8, 4),
    "limiter": (None, 1.0, 1.01), "residual_scale": ("paper", "released"), "dct_basis": (2, 3),
    "column_norm": (1, 2), "similarity": ("auto", "matmul", "fft"),
    "scale_type": ("channel", "tensor"), "free_scale": (0.0, 1.0), "axis": ("input", "output"),
    "magnitude_scale": (0.0, 1.0), "momentum": (0.5, 0.95), "nesterov": BOTH,
    "ns_coefficients": ((3.4445, -4.775, 2.0315), (2.0, -1.5, 0.5)), "ns_steps": (1, 5),
    "adjust_lr_fn": (None, "original", "match_rms_adamw", "spectral", "unscaled"),
    "polar": ("newton-schulz", "polar-express", "qdwh", "zolo-pd", "svd"),
    "polar_dtype": ("bfloat16", "float16", "float32"), "polar_steps": (None, 1, 5),
    "lower_bound": (None, "eps", 0.1), "polar_first": BOTH, "nuclear_scaling": BOTH,
}
#: The class's rule, CUDA graphs, fused matrices and pairs.
ELSEWHERE = {"algorithm", "capturable", "split_sizes", "roles", "scaling", "interval", "candidates",
             "interval_decay", "decay_steps", "freeze_steps", "candidate_device", *BOOKKEEPING}
CLASSES = sorted({case.make for case in CASES if not case.roles}, key=lambda cls: cls.__name__)
SHAPES = [(8, 5), (5, 8), (6, 6), (1, 9), (9, 1), (1, 1), (7,), (), (0, 4), (3, 4, 5), (4, 3, 3, 2),
          (12, 300)]
KINDS = ("random", "random", "random", "random", "zero", "none", "tiny", "columns")
STEPS, CUT = 5, 2
#: Ranks, and how they cut what they share.
CUTS: list[tuple[Any, list[Placement] | None]] = [
    (1, None), (2, None), (3, None), (4, None), (3, [Shard(1)]), ((2, 2), [Replicate(), Shard(0)]),
    ((2, 2), [Shard(0), Shard(0)]), ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]), ((2, 2), [Replicate(), Shard(1)])]
HANDLES = {"update": update_in_backward, "project": project_in_backward}


def test_every_option_is_tried():
    known = {name for cls in CLASSES for name in cls.table()}
    assert known - ELSEWHERE == VALUES.keys()


def plan(seed: int) -> dict[str, Any]:
    """A class, options, shapes, a dtype, and of each step what gradients are like.

    All drawn evenly: searches that begin with the simplest example rarely combine two options.
    """
    draw = random.Random(seed)
    cls = draw.choice(CLASSES)
    names = [k for k in cls.table() if k in VALUES and k != "rank"]
    options = {k: draw.choice(VALUES[k])
               for k in draw.sample(names, draw.randint(2, min(len(names), 12)))}
    if "rank" in cls.table():
        options["rank"] = draw.choice(VALUES["rank"])
    shapes = [draw.choice(SHAPES) for _ in range(draw.randint(1, 4))]
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    return {"cls": cls, "options": options, "shapes": shapes, "dtype": dtype,
            "script": [[draw.choice(KINDS) for _ in shapes] for _ in range(STEPS)]}


def gradients(params: list[Any], kinds: list[str], seed: int) -> list[torch.Tensor | None]:
    out: list[torch.Tensor | None] = []
    for x, p, kind in zip(tensors([p.shape for p in params], seed), params, kinds, strict=True):
        if kind == "columns" and x.ndim > 1:
            x = x * (torch.arange(x.shape[-1]) % 2)
        x = x * {"zero": 0.0, "tiny": 1e-30}.get(kind, 1.0)
        out.append(None if kind == "none" else x.to(p.dtype))
    return out


def go(optimizer: Any, params: list[Any], script: list[list[str]], steps: range) -> None:
    for i in steps:
        given_ = gradients(params, script[i], i)
        before = copy.deepcopy(given_)
        for p, g in zip(params, given_, strict=True):
            p.grad = g
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, given_, strict=True))
        assert_same(given_, before, "p.grad")


def backward(optimizer: Any, params: list[Any], script: list[list[str]]) -> None:
    """All steps, their gradients by autograd."""
    for i in range(STEPS):
        optimizer.zero_grad()
        pairs = [(p, g) for p, g in zip(params, gradients(params, script[i], i), strict=True)
                 if g is not None]
        if pairs:
            torch.autograd.backward([p.view_as(p) for p, _ in pairs], [g for _, g in pairs])
        optimizer.step()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", all_slow_but([*range(200)], [*range(1000)]))
def test_any_options_are_refused_or_keep_the_promises(seed):
    cls, options, shapes, dtype, script = plan(seed).values()

    def made() -> tuple[Any, list[Any]]:
        params = parameters(shapes, dtype=dtype)
        return cls(named(params), **options), params

    refused = ""
    try:
        optimizer, params = made()
    except ValueError as error:
        refused = str(error)
    if refused:
        assert cls.__name__ in refused
        assert any(k in refused for k in options)
        return
    state = torch.get_rng_state()
    go(optimizer, params, script, range(CUT))
    saved, (copied, copies) = through_disk(optimizer.state_dict()), copy.deepcopy(
        (optimizer, params))
    resumed, others = made()
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    resumed.load_state_dict(saved)
    for each, theirs in ((optimizer, params), (resumed, others), (copied, copies)):
        go(each, theirs, script, range(CUT, STEPS))
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.isfinite().all() for p in params)
    end = snapshot(optimizer)
    assert_same(snapshot(resumed), end, "resumed")
    assert_same(snapshot(copied), end, "deepcopy")
    assert optimizer.plan().state_bytes == sum(x.nbytes for s in end["state"] for x in s.values())

    for attach in (update_in_backward, project_in_backward):
        other, theirs = made()
        try:
            attach(other)
        except ValueError as error:
            refused = str(error)
        if refused:
            assert attach.__name__ in refused
            refused = ""
            continue
        backward(other, theirs, script)
        for p, q in zip(theirs, params, strict=True):
            # R may be in 16 bits where gradients are, but in buffers it is in fp32.
            # Polynomials are in fp32 at most, and a stack may be rounded otherwise than one matrix.
            exact = 1e-5 if cls.waits else 1e-12
            tolerance = {torch.float32: 1e-5, torch.float64: exact}.get(dtype, 0.03)
            torch.testing.assert_close(p, q, rtol=0, atol=tolerance * float(
                max(q.detach().abs().max(), 1e-30)) if q.numel() else 0.0)


def on_ranks(mesh: Any, cls: type[MatrixOptimizer], options: dict[str, Any], shapes: list[Any],
             dtype: torch.dtype, script: list[list[str]], places: list[Placement] | None, way: str
             ) -> dict[str, Any]:
    """What becomes of sharded parameters, straight on and resumed, or why they are refused."""
    if mesh is not None:
        jobs.quantize_small()
    values = [x.to(dtype) for x in tensors(shapes)]

    def made(values: list[Any]) -> tuple[Any, list[Any]]:
        params = [torch.nn.Parameter(x) for x in values]
        optimizer = cls(named(params), **options)
        return HANDLES[way](optimizer).optimizer if way in HANDLES else optimizer, params

    try:
        runs = [made([jobs.placed(x, mesh, places) for x in values])]
    except ValueError as error:
        return {"refused": str(error)}
    for i, kinds in enumerate(script):
        if i == CUT:
            optimizer, params = runs[0]
            runs.append(made([p.detach().clone() for p in params]))
            runs[1][0].load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for optimizer, params in runs:
            optimizer.zero_grad()
            pairs = [(p, jobs.placed(g, mesh, places))
                     for p, g in zip(params, gradients(params, kinds, i), strict=True)
                     if g is not None]
            if way in HANDLES and pairs:
                torch.autograd.backward([p * 1 for p, _ in pairs], [g for _, g in pairs])
            elif way not in HANDLES:
                for p, g in pairs:
                    p.grad = g
            optimizer.step()
    straight, resumed = (jobs.outcome(*run) for run in runs)
    return {k: [straight[k], resumed[k]] for k in ("weights", "state")}


@pytest.mark.usefixtures("quantize_shards")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", all_slow_but([*range(30)], [*range(120)]))
def test_any_options_are_the_same_on_all_ranks(pool, seed):
    """Weights and state bit for bit, resumed too, and close to what one process makes."""
    draw = random.Random(-1 - seed)
    ranks, places = draw.choice(CUTS)
    given = plan(seed) | {"way": draw.choice(["step", "step", *HANDLES])}
    given["shapes"] = [x or (2,) for x in given["shapes"]]
    outs = pool.run(on_ranks, ranks, places=places, **given)
    one = on_ranks(None, places=None, **given)
    for out in outs:
        assert_same(outs[0], out, "other rank")
        assert one.keys() == out.keys()
    if "refused" in one:
        return
    for straight, resumed in outs[0].values():
        assert_same(straight, resumed, "resumed")
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-9}.get(given["dtype"], 0.1)
    for a, b in zip(one["weights"][0], outs[0]["weights"][0], strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=tolerance * float(a.abs().max())
                                   if a.numel() else 0.0)
