"""What low-rank methods share: any options together, batches, refreshes, stored bases."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lissom.optim import (
    APOLLO,
    FRUGAL,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    GradNormLoRPAdamW,
    LowRankOptimizer,
    Trion,
    codec,
    project,
)
from lissom.optim.inner import RULES
from lissom.optim.residual import RESIDUALS, Fira

from .helpers import assert_same, feed, parameters, run, snapshot, tensors, through_disk

# ---- the free product


@given(m=st.integers(1, 9), n=st.integers(1, 9), rank=st.integers(1, 10), data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_combination_trains_and_resumes(m, n, rank, data):
    """projection x inner x residual x moments x side x storage: finite, resumed bit for bit."""
    pick = {k: data.draw(st.sampled_from(v), label=k) for k, v in {
        "projection": ["svd", "subspace", "randomized", "dct", "random"],
        "inner": list(RULES), "residual": list(RESIDUALS), "moments": ["keep", "rotate", "reset"],
        "proj_type": ["std", "reverse_std", "left", "right", "full"],
        "basis_bits": [None, 16, 8, 4], "keep_energy": [None, 0.5], "state_bits": [32, 16],
        "residual_scale": ["paper", "released"], "similarity": ["auto", "fft"],
        "dct_basis": [2, 3]}.items()}
    if pick["residual"] == "error_feedback":
        pick["error_feedback_bits"] = data.draw(st.sampled_from([None, 32, 8, 4]))
    (p,) = parameters([(m, n)])
    optimizer = GaLoreAdamW([p], lr=1e-2, rank=rank, update_proj_gap=2, **pick)
    run(optimizer, [p], range(3))
    q = torch.nn.Parameter(p.detach().clone())
    twin = GaLoreAdamW([q], lr=1e-2, rank=rank, update_proj_gap=2, **pick)
    twin.load_state_dict(through_disk(optimizer.state_dict()))
    run(optimizer, [p], range(3, 6))
    run(twin, [q], range(3, 6))
    assert_same(snapshot(optimizer), snapshot(twin))
    assert p.isfinite().all()
    held = sum(v.nbytes for v in optimizer.state[p].values())
    assert optimizer.plan().state_bytes == held


@pytest.mark.parametrize("options", [
    {"projection": "dct"}, {"residual": "fira"}, {"residual": "error_feedback"},
    {"projection": "dct", "residual": "fira", "proj_type": "full", "moments": "rotate"},
    {"residual": "sign", "inner": "factored"}], ids=str)
@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 4, 6)])
def test_a_batch_equals_its_matrices(options, shape):
    (stack,) = parameters([shape])
    single = [torch.nn.Parameter(x.clone()) for x in stack.detach()]
    given = {"lr": 1e-2, "rank": 2, "projection": "svd", "update_proj_gap": 3,
             "refresh": "synchronous", **options}
    a = GaLoreAdamW([{"params": [stack], "matricize": "batch"}], **given)
    b = GaLoreAdamW(single, **given)
    for i in range(7):
        feed([stack], i)
        for p, g in zip(single, stack.grad, strict=True):
            p.grad = g.clone()
        a.step()
        b.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]),
                               rtol=0, atol=1e-5)


def test_combinations_that_cannot_be_are_refused():
    (p,) = parameters([(6, 4)])
    with pytest.raises(ValueError, match=r"amsgrad=True.*inner='lion'"):
        GaLoreAdamW([p], rank=2, inner="lion", amsgrad=True)
    with pytest.raises(ValueError, match=r"error_feedback_bits=8.*residual='fira'"):
        FiraAdamW([p], rank=2, error_feedback_bits=8)


@pytest.mark.parametrize("residual", ["sign", "error_feedback", "fira", "none"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_residuals_of_any_side_and_dtype_follow_fp32(residual, proj_type, dtype):
    results = []
    for kind in (torch.float32, dtype):
        ps = [torch.nn.Parameter(torch.zeros(shape, dtype=kind)) for shape in ((8, 6), (6, 8))]
        optimizer = GaLoreAdamW(ps, lr=1e-2, rank=2, proj_type=proj_type, residual=residual,
                                rounding="nearest", scale=1.0, inner="momentum")
        feed(ps, 0)
        for p in ps:
            p.grad = p.grad.to(dtype).to(kind)
        optimizer.step()
        results.append([p.detach().float() for p in ps])
    for one, other in zip(*results, strict=True):  # but for a few signs of next to nothing
        assert float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)) > 0.95
        assert float(one.norm() / other.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_moment_at_its_limit_is_rotated(dtype):
    """Whose entries a rotation's rounding may raise: of gradients in four dimensions."""
    rows = torch.linalg.qr(tensors([(16, 4)])[0]).Q.mT
    p = torch.nn.Parameter(tensors([(24, 16)], 1)[0].to(dtype))
    optimizer = GaLoreAdamW([p], lr=1e-3, rank=4, betas=(0.9, 0.0), moments="rotate",
                            update_proj_gap=1)
    for i in range(40):
        p.grad = (tensors([(24, 4)], 2 + i)[0] @ rows * 1e30).to(dtype)
        optimizer.step()
    assert p.isfinite().all()


# ---- lazy refresh, stored bases


def test_lazy_refresh_keeps_what_still_captures():
    (p,) = parameters([(12, 8)])
    gradient = tensors([(12, 2)], 1)[0] @ tensors([(2, 8)], 2)[0]
    other = tensors([(12, 2)], 3)[0] @ tensors([(2, 8)], 4)[0]
    optimizer = GaLoreAdamW([p], rank=2, update_proj_gap=2, keep_energy=0.8, projection="svd",
                            refresh="synchronous")
    born = []
    for g in [gradient] * 4 + [other] * 4:
        p.grad = g.clone()
        optimizer.step()
        born.append(int(optimizer.state[p]["basis_step"]))
    assert born == [1, 1, 1, 1, 5, 5, 5, 5]
    # of what it captured when it was new, which of a gradient of full rank is not all
    optimizer = GaLoreAdamW([p], rank=2, update_proj_gap=2, keep_energy=0.8, projection="svd",
                            refresh="synchronous")
    for _ in range(4):
        p.grad = tensors([(12, 8)], 5)[0]
        optimizer.step()
        assert int(optimizer.state[p]["basis_step"]) == 1
    assert 0.3 < float(optimizer.state[p]["basis_energy"]) < 0.8
    # of a stack it is the matrix that captures least
    (p,) = parameters([(2, 12, 8)])
    optimizer = GaLoreAdamW([p], rank=2, update_proj_gap=2, keep_energy=0.8, projection="svd",
                            refresh="synchronous", matricize="batch")
    born = []
    for second in [gradient] * 2 + [other] * 2:
        p.grad = torch.stack([gradient, second])
        optimizer.step()
        born.append(int(optimizer.state[p]["basis_step"]))
    assert born == [1, 1, 3, 3]


@pytest.mark.parametrize(("bits", "error"), [(16, 4e-3), (8, 4e-3), (4, 0.08)])
def test_stored_bases_are_near_the_exact(bits, error):
    (p,), (q,) = parameters([(40, 30)]), parameters([(40, 30)])
    a = GaLoreAdamW([p], rank=4, basis_bits=bits, projection="svd")
    b = GaLoreAdamW([q], rank=4, projection="svd")
    run(a, [p], range(1))
    run(b, [q], range(1))
    basis = codec.Decoded(a.state[p], a._layouts[p], p)["basis_right"].float()
    exact = b.state[q]["basis_right"]
    assert 0 < (basis - exact).abs().max() < error
    # what was projected was so onto what is stored
    torch.testing.assert_close(a.state[p]["exp_avg"], 0.1 * p.grad @ basis, rtol=1e-5, atol=1e-6)
    sizes = {16: 30 * 4 * 2, 8: 30 * 4 + 30 * 4, 4: 30 * 2 + 30 * 4}
    stored = [v.nbytes for k, v in a.state[p].items() if k.startswith("basis_right")]
    assert sum(stored) == sizes[bits]


@pytest.mark.parametrize("projection", ["dct", "subspace", "svd", "randomized"])
@pytest.mark.parametrize("first", [0.0, torch.nan])
def test_a_gradient_of_nothing_chooses_no_basis(projection, first):
    """A layer above one that begins at zero has none at first: the next one is looked at."""
    p, q = parameters([(12, 9)], 1)[0], parameters([(12, 9)], 1)[0]
    make = {"lr": 1e-2, "rank": 3, "projection": projection, "update_proj_gap": 200,
            "weight_decay": 0.0}
    ours, fresh = GaLoreAdamW([p], **make), GaLoreAdamW([q], **make)
    p.grad = torch.full_like(p, first)
    ours.step()
    assert int(ours.state[p]["basis_step"]) == 0
    if first != 0:
        return
    assert torch.equal(p, q)
    for x in (p, q):
        feed([x], 3)
    ours.step()
    fresh.step()
    assert int(ours.state[p]["basis_step"]) == 2
    if projection in ("dct", "svd"):  # the others begin with random numbers of the step
        name = next(k for k in ours.state[p] if k.startswith(("basis_r", "columns_")))
        torch.testing.assert_close(ours.state[p][name], fresh.state[q][name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("cls", "options"), [
    (GaLoreAdamW, {"projection": "random"}), (GaLoreAdamW, {"projection": "random",
                                                            "moments": "reset"}),
    (APOLLO, {}), (FRUGAL, {})])
def test_a_basis_is_drawn_once_a_step(cls, options, monkeypatch):
    """The last one is needed at a refresh where moments turn with it, or its energy is asked."""
    drawn, draw = [], cls.draw

    def counted(*given):
        drawn.append(given)
        return draw(*given)

    monkeypatch.setattr(cls, "draw", staticmethod(counted))

    def counts(**more):
        (p,) = parameters([(12, 9)])
        optimizer = cls([p], rank=2, update_proj_gap=3, **options | more)
        found = []
        for step in range(7):
            drawn.clear()
            run(optimizer, [p], range(step, step + 1))
            found.append(len(drawn))
        return found

    assert counts() == [1] * 7
    assert counts(moments="rotate") == [1, 1, 1, 2, 1, 1, 2]
    assert counts(keep_energy=1e-3) == [1] * 7


# ---- classes


RANKED = [APOLLO, DCTAdamW, FRUGAL, FiraAdamW, GaLoreAdamW, GaLoreAdamW8bit, GradNormLoRPAdamW,
          Trion]


@pytest.mark.parametrize("cls", RANKED, ids=lambda x: x.__name__)
def test_a_rank_that_no_group_takes_is_pointed_out(cls):
    (p,) = parameters([(12, 9)])
    with pytest.warns(UserWarning, match=r"rank=8 has no effect: .* own rank \(4\)") as told:
        cls([{"params": [p], "rank": 4}], rank=8)
    assert [x.filename for x in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls([{"params": [p], "rank": 4}])
        cls([{"params": [p]}], rank=8)


@pytest.mark.parametrize("cls", RANKED, ids=lambda x: x.__name__)
def test_a_class_without_a_matrix_says_so_where_it_was_made(cls):
    with pytest.warns(UserWarning, match="has no matrix of its own, so it is AdamW") as told:
        cls(parameters([(12, 9)]))
    assert [x.filename for x in told] == [__file__]


def test_the_base_is_no_optimizer_of_its_own():
    """It would be AdamW, without a word."""
    class Nameless(LowRankOptimizer):
        pass

    class Named(LowRankOptimizer):
        algorithm = "theirs"

    (p,) = parameters([(12, 9)])
    for cls in (LowRankOptimizer, Nameless):
        with pytest.raises(TypeError, match=f"{cls.__name__}: has no rule .*GaLoreAdamW"):
            cls([p], rank=2)
    assert Named([p], rank=2).plan().matrices == 1


def test_classes_without_methods_of_their_own_stay_in_batches():
    class Options(GaLoreAdamW):
        algorithm = "theirs"

        def __init__(self, params, **options):
            super().__init__(params, rank=2, **options)

    class Draws(Options):
        draw = staticmethod(project.gaussian_basis)

    class Mixin:
        @property
        def residual(self):
            return lambda o: RESIDUALS["none"]

    class Mixed(Mixin, GaLoreAdamW):
        pass

    class Looks(Fira):
        def combine(self, *given):
            return super().combine(*given)

    class Promised(Looks):
        apart = True

    assert [x.apart for x in (GaLoreAdamW8bit, Options, type("More", (Options,), {}), Promised,
                              type("Same", (Promised,), {}))] == [True] * 5
    assert [x.apart for x in (FRUGAL, LowRankOptimizer, Draws, type("More", (Draws,), {}), Mixed,
                              Looks)] == [False] * 6


def test_which_updates_take_the_projected_gradient_alone():
    """What DDP may send in place of the gradient; a method of others may want all of it."""
    class Updates(GaLoreAdamW):
        def update(self, g, s, o, t):
            return super().update(g, s, o, t)

    class Projects(GaLoreAdamW):
        def project_gradient(self, g, s, o, t):
            return super().project_gradient(g, s, o, t)

    def asked(cls, **options):
        optimizer = cls(parameters([(12, 9)]), rank=2, **options)
        return optimizer.by_projection(optimizer.param_groups[0])

    assert asked(GaLoreAdamW)
    assert asked(DCTAdamW)
    assert not asked(DCTAdamW, error_feedback_bits=8)
    for cls in (FiraAdamW, APOLLO, FRUGAL, GradNormLoRPAdamW, Updates, Projects):
        assert not asked(cls)
    pair = [{"params": parameters([(3, 9), (12, 3)]), "roles": ("A", "B")}]
    factors = GradNormLoRPAdamW(pair, rank=2)
    assert factors.by_projection(factors.param_groups[0])
