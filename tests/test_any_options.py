"""Options of any class in any combination: refused by name, or the promises hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lissom.optim import project_in_backward, update_in_backward
from lissom.optim.base import MatrixOptimizer
from lissom.optim.common import BOOKKEEPING

from .cases import CASES
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


def test_every_option_is_tried():
    known = {name for cls in CLASSES for name in cls.table()}
    assert known - ELSEWHERE == VALUES.keys()


@st.composite
def plans(draw: Any) -> tuple[type[MatrixOptimizer], dict[str, Any], list[Any], torch.dtype, Any]:
    """A class, options, shapes, a dtype, and of each step what gradients are like."""
    cls = draw(st.sampled_from(CLASSES))
    names = [k for k in cls.table() if k in VALUES and k != "rank"]
    options = {k: draw(st.sampled_from(VALUES[k]))
               for k in draw(st.lists(st.sampled_from(names), unique=True, min_size=6))}
    if "rank" in cls.table():
        options["rank"] = draw(st.sampled_from(VALUES["rank"]))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    kinds = st.lists(st.sampled_from(KINDS), min_size=len(shapes), max_size=len(shapes))
    return cls, options, shapes, dtype, [draw(kinds) for _ in range(STEPS)]


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
@given(plan=plans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_options_are_refused_or_keep_the_promises(plan):
    cls, options, shapes, dtype, script = plan

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
    random = torch.get_rng_state()
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
    assert torch.equal(random, torch.get_rng_state())
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
            tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 0.03)
            torch.testing.assert_close(p, q, rtol=0, atol=tolerance * float(
                max(q.detach().abs().max(), 1e-30)) if q.numel() else 0.0)
