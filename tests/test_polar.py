"""Polar oracles: residuals, schedules, routes, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lissom.optim import polar_polynomial, polar_rational
from lissom.optim.polar import METHODS, Oracle, polar
from lissom.optim.polar_polynomial import polar_express_schedule
from torch.utils._python_dispatch import TorchDispatchMode

from .helpers import tensors

EXACT = ["qdwh", "zolo-pd", "svd"]


def conditioned(m, n, condition, seed=0):
    """A matrix with singular values from 1 to 1 / condition, float64, and its polar factor."""
    k = min(m, n)
    u, v = (torch.linalg.qr(x.double()).Q for x in tensors([(m, k), (n, k)], seed))
    s = torch.logspace(0, -math.log10(condition), k, dtype=torch.float64)
    return (u * s) @ v.mT, u @ v.mT


def residuals(a, u, h):
    """Orthogonality, reconstruction, negative part of H, gap to the nuclear norm: in float64."""
    a, u, h = a.double(), u.double(), h.double()
    wide = a.shape[-2] < a.shape[-1]
    gram = u @ u.mT if wide else u.mT @ u
    k = gram.shape[-1]
    norm = torch.linalg.matrix_norm(a)
    nuclear = torch.linalg.svdvals(a).sum(-1)
    return {
        "orthogonality": torch.linalg.matrix_norm(gram - torch.eye(k)).max().item() / k**0.5,
        "reconstruction": (torch.linalg.matrix_norm((h @ u if wide else u @ h) - a) / norm).max(
            ).item(),
        "negative": -min(0.0, (torch.linalg.eigvalsh(h).amin(-1) / norm).min().item()),
        "nuclear gap": ((a * u).sum((-2, -1)) / nuclear - 1).abs().max().item(),
    }


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shape", [(1, 1), (40, 40), (90, 31), (31, 90), (200, 3)])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6, 1e12])
def test_residuals_in_float64(method, shape, condition):
    a, exact = conditioned(*shape, condition)
    u, h = polar(a, method, hermitian=True)
    assert u.dtype == h.dtype == torch.float64
    for name, value in residuals(a, u, h).items():
        assert value < 1e-13, name
    assert torch.equal(h, h.mT)
    theirs = scipy.linalg.polar(a.numpy(), side="right" if shape[0] >= shape[1] else "left")
    torch.testing.assert_close(u @ h if shape[0] >= shape[1] else h @ u,
                               torch.from_numpy(np.asarray(a)), rtol=0, atol=1e-13)
    # the factor itself is as sensitive as the matrix is ill-conditioned
    for other in (exact, torch.from_numpy(theirs[0])):
        assert (u - other).norm() < 1e-14 * condition + 1e-13
    assert (h - torch.from_numpy(theirs[1])).norm() < 1e-13


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_residuals_in_lower_precision(method, dtype):
    for shape in ((40, 40), (90, 31), (31, 90)):
        for condition in (1.0, 1e2, 1e4):
            a = conditioned(*shape, condition)[0].to(dtype)
            u, h = polar(a, method, hermitian=True)
            assert u.dtype == dtype
            limit = 1e-5 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
            for name, value in residuals(a, u, h).items():
                assert value < limit, (name, shape, condition)


@pytest.mark.parametrize("method", ["newton-schulz", "polar-express"])
def test_polynomials_converge_without_steps(method):
    """To rounding, for singular values above 1e-3 of the norm."""
    for dtype, limit in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        for shape in ((40, 40), (60, 31), (31, 200)):
            a = conditioned(*shape, 100.0)[0].to(dtype)
            for name, value in residuals(a, *polar(a, method, hermitian=True)).items():
                assert value < limit, (name, shape)
    for lower in (1e-5, "eps"):
        a = conditioned(60, 31, 1e4)[0]
        for value in residuals(a, *polar(a, "polar-express", lower_bound=lower,
                                         hermitian=True)).values():
            assert value < 1e-12


@pytest.mark.parametrize("lower", [1.0, 1e-2, 1e-3, 1e-6])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_qdwh_converges_from_any_bound(lower, condition):
    """Relative to the norm, whatever its estimate; too large a bound costs steps alone."""
    for shape in ((128, 128), (60, 31), (31, 200)):
        a = conditioned(*shape, condition)[0]
        for name, value in residuals(a, *polar(a, lower_bound=lower, hermitian=True)).items():
            assert value < 1e-12, (name, shape)
    for dtype, small, limit in ((torch.float64, 1e-8, 1e-12), (torch.float32, 1e-4, 1e-5)):
        u, v = (torch.linalg.qr(x.double()).Q for x in tensors([(16, 16), (16, 16)]))
        s = torch.ones(16, dtype=torch.float64)
        s[-1] = small
        sigma = torch.linalg.svdvals(polar(((u * s) @ v.mT).to(dtype), lower_bound=lower))
        assert (sigma - 1).abs().max() < limit


def test_a_bound_is_of_the_norm_and_spares_steps():
    """Of a share of the estimate, which is above the norm, four steps would leave 1e-5."""
    for shape in ((60, 60), (60, 31), (31, 200)):
        a, exact = conditioned(*shape, 1e6)
        for scale in (1.0, 1e5):
            u = polar(scale * a, "qdwh", 4, lower_bound=1e-6)
            assert (u - exact).norm() < 1e-8


class TF32(TorchDispatchMode):
    """Products of fp32 factors with ten stored bits, as a GPU takes them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def cut(x):
            if x.dtype != torch.float32:
                return x
            return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)

        aten = torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default):
            args = tuple(map(cut, args))
        elif func is aten.baddbmm.default:
            args = (args[0], *map(cut, args[1:3]))
        return func(*args, **(kwargs or {}))


def test_a_right_bound_is_not_taken_for_a_wrong_one_in_tf32(monkeypatch):
    """Which leaves a thousandth of U^T U - I in every entry; a wrong one costs more steps still."""
    passes = []
    weighted = polar_rational._weighted
    monkeypatch.setattr(polar_rational, "_weighted",
                        lambda *given: passes.append(1) or weighted(*given))
    a = conditioned(400, 400, 1e3)[0].float()
    for tf32, lower, count in ((True, 1e-3, 1), (False, 1e-3, 2), (True, 0.5, 2)):
        monkeypatch.setattr(polar_rational, "in_tf32", lambda x, tf32=tf32: tf32)
        passes.clear()
        with TF32():
            u = polar(a, lower_bound=lower)
        assert len(passes) == count
        assert 1e-5 < (u.mT @ u - torch.eye(400)).abs().max() < 1e-3


def test_every_method_on_zero_tiny_huge_and_spoiled_matrices():
    (a,) = tensors([(7, 5)])
    for method in METHODS:
        for steps in (None, 3):
            assert torch.equal(polar(torch.zeros(2, 7, 5), method, steps), torch.zeros(2, 7, 5))
            assert polar(torch.zeros(0, 5), method, steps).shape == (0, 5)
            assert polar(torch.zeros(3, 4, 0), method, steps).shape == (3, 4, 0)
            u = polar(a, method, steps)
            for scale in (1e-30, 1e30, -1.0):
                torch.testing.assert_close(polar(a * scale, method, steps),
                                           u * math.copysign(1, scale), rtol=0, atol=1e-5)
            torch.testing.assert_close(polar(a.mT, method, steps), u.mT, rtol=0, atol=1e-6)
            # in a batch, what is spoiled stays alone
            for value in (math.nan, math.inf):
                spoiled = a.clone()
                spoiled[2, 3] = value
                both = polar(torch.stack([a, spoiled, torch.zeros(7, 5)]), method, steps)
                torch.testing.assert_close(both[0], u, rtol=0, atol=1e-5)
                assert both[1].isnan().all()
                assert torch.equal(both[2], torch.zeros(7, 5))


def test_rank_deficient_matrices():
    """Reconstruction holds for all; the SVD gives a partial isometry, the rational ones fill up."""
    x, y = tensors([(40, 4), (20, 4)])
    a = x.double() @ y.double().mT
    for method in EXACT:
        u, h = polar(a, method, hermitian=True)
        assert residuals(a, u, h)["reconstruction"] < 1e-13
        s = torch.linalg.svdvals(u)
        torch.testing.assert_close(s[:4], torch.ones(4).double())
        assert (s <= 1 + 1e-12).all()
    torch.testing.assert_close(torch.linalg.svdvals(polar(a, "svd"))[4:], torch.zeros(16).double(),
                               rtol=0, atol=1e-12)
    zeros = torch.cat([a, torch.zeros(40, 3).double()], -1)
    for method in METHODS:
        assert polar(zeros, method).isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
def test_equivariance(method, m, n, seed):
    """polar(U A V) = U polar(A) V for orthogonal U and V."""
    a, x, y = (z.double() for z in tensors([(m, n), (m, m), (n, n)], seed))
    x, y = torch.linalg.qr(x).Q, torch.linalg.qr(y).Q
    steps = 5 if method in ("newton-schulz", "polar-express") else None
    torch.testing.assert_close(polar(x @ a @ y, method, steps), x @ polar(a, method, steps) @ y,
                               rtol=0, atol=1e-7)


def test_polar_express_coefficients_are_the_published_ones():
    """Rows of the paper's first version, the repository's default and dion's five steps."""
    paper = polar_express_schedule(8, 1e-3, 0.0, 0.02407327424182761)
    for ours, theirs in zip(paper, [
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835)], strict=False):
        torch.testing.assert_close(torch.tensor(ours).double(), torch.tensor(theirs).double(),
                                   rtol=1e-6, atol=0)
        assert max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)) < 1e-9
    official = polar_express_schedule(10, 1e-3, 0.01, 0.02)
    for i, theirs in ((0, (8.237312490495555, -23.157747414558198, 16.680568411445915)),
                      (4, (2.297036943455258, -1.636625581259032, 0.40026284559536324)),
                      (9, (1.8749954775622923, -1.2499909551464006, 0.3749954775841083))):
        assert max(abs(a / b - 1) for a, b in zip(official[i], theirs, strict=True)) < 1e-7
    dion = polar_express_schedule(5, 1e-3, 0.02, 0.02)
    for i, theirs in ((0, (8.156554524902461, -22.48329292557795, 15.878769915207462)),
                      (4, (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))):
        assert max(abs(a / b - 1) for a, b in zip(dion[i], theirs, strict=True)) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_after_five_steps(dtype):
    """Within the ranges computed from the scalar iterations, for s above 1e-3 of the norm."""
    slack = 0.02 if dtype == torch.bfloat16 else 1e-4
    u, v = (torch.linalg.qr(x.double()).Q for x in tensors([(150, 150), (150, 150)]))
    s = torch.logspace(0, -3, 149, dtype=torch.float64)
    s = torch.cat([s / s.norm() * 0.999, torch.zeros(1)])
    a = (u * s) @ v.mT
    inside = s[:-1] > 1e-3
    for method, low, high in (("newton-schulz", 0.47, 1.203), ("polar-express", 0.83, 1.14)):
        out = polar(a, method, 5, dtype=dtype).double()
        values = (u.mT @ out @ v).diagonal()[:-1][inside]
        assert low - slack < values.min()
        assert values.max() < high + slack


@pytest.mark.parametrize("method", ["newton-schulz", "polar-express"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_gram_route_equals_the_plain_one(method, dtype, monkeypatch):
    """Tall and wide; a condition number of 1e4 is where a Gram matrix without restarts fails."""
    for shape in ((256, 64), (64, 300), (130, 33)):
        a = conditioned(*shape, 1e4)[0].float().to(dtype)
        results = {}
        for route in ("gram", "plain"):
            calls = []
            real = polar_polynomial._gram

            def gram(x, schedule, real=real, calls=calls):
                calls.append(1)
                return real(x, schedule)

            with monkeypatch.context() as patch:
                patch.setattr(polar_polynomial, "_gram", gram)
                if route == "plain":  # so many restarts that it would not pay
                    patch.setattr(polar_polynomial, "_RESTART", 0.25)
                results[route] = polar(a, method, 5, dtype=dtype).double()
            assert bool(calls) == (route == "gram")
        error = (results["gram"] - results["plain"]).norm() / results["plain"].norm()
        assert error < {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 0.05}[dtype]


@pytest.mark.parametrize("largest", [1.5, 10.0, 1e4])
def test_zolotarev_coefficients_are_elliptic_functions(largest):
    """Against scipy's, which lose their digits beyond."""
    m = 1 - 1 / largest**2
    for fraction in (0.1, 0.3, 0.5, 0.7, 0.93):
        sn, cn, _, _ = scipy.special.ellipj(fraction * scipy.special.ellipkm1(1 / largest**2), m)
        assert abs(polar_rational._tangent_squared(fraction, largest) / (sn / cn) ** 2 - 1) < 1e-6
    assert abs(polar_rational._tangent_squared(0.5, 1e15) / 1e15 - 1) < 1e-12


def test_degrees_are_those_of_the_paper():
    """Poles of one step for a condition number: the table of Nakatsukasa and Freund, 2016."""
    for largest, degree in ((1.0005, 2), (1.05, 4), (1.4, 6), (1.9, 8), (6.0, 2), (100.0, 3),
                            (1e4, 4), (1e6, 5), (1e8, 6), (1e12, 7), (1e15, 8)):
        poles, zeros = polar_rational._zolotarev(largest)
        assert len(poles) == len(zeros) == degree


def test_bad_arguments():
    a = torch.ones(3, 2)
    for words, call in {
        "method|polar": lambda: polar(a, "newton"),
        "steps": lambda: polar(a, "qdwh", 0),
        "lower_bound": lambda: polar(a, lower_bound=2.0),
        "None with 'svd'": lambda: polar(a, "svd", lower_bound=0.1),
        "2 or more": lambda: polar(a[0]),
        "int64": lambda: polar(torch.ones(3, 2, dtype=torch.int64)),
        "dtype": lambda: polar(a, "newton-schulz", dtype=torch.int8),
        "coefficients": lambda: polar(a, "newton-schulz", coefficients=(1.0, 2.0)),
    }.items():
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def test_the_input_is_not_written_to():
    (a,) = tensors([(6, 4)])
    for method in METHODS:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = a.to(dtype)
            before = x.clone()
            polar(x, method, 3)
            assert torch.equal(x, before)


def test_oracles_are_equal_by_value():
    assert Oracle("qdwh", 2) == Oracle("qdwh", 2)
    assert hash(Oracle("qdwh", 2)) == hash(Oracle("qdwh", 2))


# ---- what broke once


def test_any_number_of_leading_dimensions():
    (a,) = tensors([(2, 3, 20, 12)])
    for method in METHODS:
        for x in (a, a.mT, a[..., :12, :]):
            u = polar(x, method, 3)
            assert u.shape == x.shape
            torch.testing.assert_close(u[1, 2], polar(x[1, 2], method, 3), rtol=0, atol=1e-5)


def test_every_lower_bound_has_a_schedule():
    for low in (0.0001292498497801919, 0.9637575496150076, 0.9686760902301552, 0.999999, 1e-16):
        assert all(math.isfinite(x) for step in polar_express_schedule(None, low) for x in step)
    a = conditioned(30, 20, 10.0)[0]
    for low in (0.0001292498497801919, 1e-3):
        u = polar(a, "polar-express", lower_bound=low)
        torch.testing.assert_close(u.mT @ u, torch.eye(20).double(), rtol=0, atol=1e-12)


def test_coefficients_belong_to_one_method():
    with pytest.raises(ValueError, match=r"coefficients=.*must be None with method='svd'"):
        polar(torch.ones(3, 2), "svd", coefficients=(1.0, 2.0, 3.0))


@pytest.mark.parametrize("method", ["newton-schulz", "polar-express", "qdwh", "zolo-pd", "svd"])
def test_autocast_around_it_changes_nothing(method):
    a = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = polar(a, method, hermitian=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = polar(a, method, hermitian=True)
    for x, y in zip(expected, found, strict=True):
        assert torch.equal(x, y)
