"""AdamW is torch.optim.AdamW, bit for bit in fp32."""

from __future__ import annotations

import gc
import importlib.util
import math
import re
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lissom.optim import AdamW, AdamW8bit, GaLoreAdamW, weights
from lissom.optim.keys import name_key

from .helpers import assert_same, feed, named, parameters, run, snapshot, through_disk

SHAPES = [(7, 5), (3,), (), (0, 3), (600, 500), (2, 3, 4)]


@pytest.mark.parametrize("options", [
    {}, {"maximize": True}, {"amsgrad": True}, {"weight_decay": 0.0},
    {"lr": 0.1, "betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.3},
    {"betas": (0.0, 0.0)}, {"fused": False, "foreach": True}, {"lr": torch.tensor(1e-2)},
], ids=str)
def test_equals_torch_over_100_steps(options):
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    options = {"lr": 1e-2, **options}
    a = AdamW([{"params": ours[:3], "lr": 3e-3}, {"params": ours[3:]}], **options)
    b = torch.optim.AdamW([{"params": theirs[:3], "lr": 3e-3}, {"params": theirs[3:]}],
                          **{**options, "foreach": False, "lr": float(options["lr"])})
    for i in range(100):
        feed(ours, i)
        feed(theirs, i)
        a.step()
        b.step()
    assert_same([p.detach() for p in ours], [p.detach() for p in theirs])
    states = [{k: v for k, v in a.state[p].items() if k not in ("index", "key")}
              for p in ours]
    assert_same(states, [{k: b.state[q][k] for k in s}
                         for s, q in zip(states, theirs, strict=True)])


@given(shape=st.lists(st.integers(0, 9), max_size=4),
       betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
       eps=st.floats(1e-12, 1e-2), lr=st.floats(0, 1), weight_decay=st.floats(0, 1),
       amsgrad=st.booleans(), maximize=st.booleans())
@settings(max_examples=40, deadline=None)
def test_equals_torch_everywhere(shape, **options):
    ours, theirs = parameters([tuple(shape)]), parameters([tuple(shape)])
    a, b = AdamW(ours, **options), torch.optim.AdamW(theirs, foreach=False, **options)
    for i in range(4):
        feed(ours, i)
        feed(theirs, i)
        a.step()
        b.step()
    assert_same([p.detach() for p in ours], [p.detach() for p in theirs])


@pytest.mark.parametrize("schedule", [
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=4),
    lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1)],
    ids=["onecycle", "cyclic", "plateau"])
def test_schedules_of_rate_and_momentum_are_torchs(schedule):
    """As torch makes them by default: the first two change beta1 at each step."""
    results = []
    for cls in (AdamW, torch.optim.AdamW):
        ps = parameters([(7, 5), (5,)])
        optimizer = cls(ps, lr=1e-2)
        moves, seen = schedule(optimizer), []
        for i in range(15):
            feed(ps, i)
            optimizer.step()
            moves.step(*([1.0] if hasattr(moves, "patience") else []))
            seen.append([optimizer.param_groups[0][k] for k in ("lr", "betas")])
        results.append([seen, [p.detach() for p in ps]])
    assert any(x != seen[0] for x in seen)
    assert_same(*results)


def test_float64_weights_stay_float64():
    ours, theirs = (parameters([(7, 5)], dtype=torch.float64) for _ in range(2))
    a, b = AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, foreach=False)
    for i in range(5):
        feed(ours, i)
        feed(theirs, i)
        a.step()
        b.step()
    assert torch.equal(ours[0], theirs[0])
    assert a.state[ours[0]]["exp_avg"].dtype == torch.float64


def test_reads_a_torch_checkpoint():
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    b = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.2, foreach=False)
    for i in range(3):
        feed(theirs, i)
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
    a = AdamW(ours)
    a.load_state_dict(b.state_dict())
    for i in range(3, 6):
        for params, optimizer in ((ours, a), (theirs, b)):
            feed(params, i)
            optimizer.step()
    assert_same([p.detach() for p in ours], [p.detach() for p in theirs])


def test_switches_that_cannot_be_honoured_are_refused():
    with pytest.raises(ValueError, match=r"differentiable=True, but it must be False: .*through"):
        AdamW(parameters([(2,)]), differentiable=True)
    with pytest.raises(TypeError, match="fused='yes'"):
        AdamW(parameters([(2,)]), fused="yes")


def test_bf16_weights_are_rounded_once():
    (p,) = parameters([(40, 30)], dtype=torch.bfloat16)
    q = torch.nn.Parameter(p.detach().float())
    a = AdamW([p], lr=1e-2, weight_decay=0.1, rounding="nearest")
    b = torch.optim.AdamW([q], lr=1e-2, weight_decay=0.1)
    feed([p], 0)
    q.grad = p.grad.float()
    a.step()
    b.step()
    assert torch.equal(p, q.to(torch.bfloat16))


def test_float64_weights_with_16_bit_state():
    (p,) = parameters([(4, 3)], dtype=torch.float64)
    optimizer = AdamW([p], state_bits=16)
    run(optimizer, [p], range(3))
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16


def test_16_bit_second_moments_stay_finite():
    (p,) = parameters([(4, 3)])
    optimizer = AdamW([p], state_bits=16, betas=(0.9, 0.5))
    for _ in range(50):
        p.grad = torch.full((4, 3), 1e30)
        optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].isfinite().all()


def test_a_step_saved_as_an_int_is_read():
    ours, theirs = parameters([(4, 3)]), parameters([(4, 3)])
    torch_optimizer = torch.optim.AdamW(theirs)
    run(torch_optimizer, theirs, range(2))
    saved = torch_optimizer.state_dict()
    saved["state"][0]["step"] = 2
    saved["param_groups"][0]["capturable"] = True
    optimizer = AdamW(ours)
    optimizer.load_state_dict(saved)
    assert int(optimizer.state[ours[0]]["step"]) == 2
    assert optimizer.param_groups[0]["capturable"] is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("make", "n"), [
    (AdamW, 1024), (lambda p, **o: GaLoreAdamW(p, rank=32, scale=1.0, **o), 64)])
def test_small_steps_add_up_in_16_bit_weights(dtype, make, n):
    """At lr 1e-5 a step is far below half a unit of a weight near 1: to nearest, nothing moves."""
    start = torch.linspace(0.5, 1.5, n * n).view(n, n).to(dtype)
    moved = {}
    for kind, rounding in ((torch.float32, None), (dtype, "stochastic"), (dtype, "nearest")):
        p = torch.nn.Parameter(start.to(kind, copy=True))
        optimizer = make([p], lr=1e-5, weight_decay=0.0, rounding=rounding)
        for _ in range(100):
            p.grad = torch.eye(n).to(kind) + 0.5
            optimizer.step()
        moved[kind, rounding] = (p.detach().double() - start.double()).mean().item()
    exact = moved[torch.float32, None]
    # A movement d is made of d / unit roundings up per element: four standard errors of the mean
    # of n^2 elements, below 1 % of d for the larger n.
    unit = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    noise = 4 * (abs(exact) * unit) ** 0.5 / n
    assert n == 64 or noise < 0.01 * abs(exact)
    assert abs(moved[dtype, "stochastic"] - exact) < max(0.01 * abs(exact), noise)
    assert abs(moved[dtype, "nearest"]) < 0.5 * abs(exact)


def test_stochastic_rounding_is_the_same_however_it_is_run(monkeypatch):
    results = []
    for block in (64, 1 << 18):
        monkeypatch.setattr("lissom.optim.apply._BLOCK", {"cuda": block})
        stack = {"rank": 3, "matricize": "batch"}
        for cls, options in ((AdamW, {}), (GaLoreAdamW, stack), (AdamW, {"master_bits": 8}),
                             (GaLoreAdamW, {**stack, "master_bits": 8})):
            ps = parameters([(31, 17), (17, 31), (3, 20, 17)], dtype=torch.bfloat16)
            torch.manual_seed(block)
            optimizer = cls(ps, lr=1e-2, **options)
            run(optimizer, ps, range(4))
            results.append([optimizer.full_precision(p) for p in ps])
    assert_same(results[:4], results[4:])


def test_8bit_is_a_name_for_an_option():
    ours, theirs = parameters([(80, 60)]), parameters([(80, 60)])
    a, b = AdamW8bit(ours, lr=1e-2), AdamW(theirs, lr=1e-2, state_bits=8)
    run(a, ours, range(3))
    run(b, theirs, range(3))
    assert torch.equal(ours[0], theirs[0])
    assert a.state[ours[0]]["exp_avg"].dtype == torch.uint8
    few = parameters([(63, 65), (64, 64), (2048, 4), (2048, 5)])
    state = AdamW8bit(few).state
    assert [state[p]["exp_avg"].dtype for p in few] == [torch.float32, torch.uint8, torch.bfloat16,
                                                        torch.uint8]


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.03), (4, 0.25)])
def test_quantized_state_follows_the_exact(bits, tolerance):
    ours, theirs = parameters([(300, 257)]), parameters([(300, 257)])
    start = ours[0].detach().clone()
    a, b = AdamW(ours, lr=1e-2, state_bits=bits), AdamW(theirs, lr=1e-2)
    run(a, ours, range(20))
    run(b, theirs, range(20))
    assert (ours[0] - theirs[0]).norm() < tolerance * (theirs[0] - start).norm()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None,
                    reason="bitsandbytes is not installed")
def test_parity_with_bitsandbytes():
    import bitsandbytes

    ours, theirs = parameters([(64, 512)]), parameters([(64, 512)])
    start = ours[0].detach().clone()
    a = AdamW8bit(ours, lr=1e-2, weight_decay=0.1)
    b = bitsandbytes.optim.AdamW8bit(theirs, lr=1e-2, weight_decay=0.1)
    run(a, ours, range(10))
    run(b, theirs, range(10))
    assert (ours[0] - theirs[0]).norm() < 5e-3 * (theirs[0] - start).norm()
    for name, other in (("exp_avg", "state1"), ("exp_avg_sq", "state2")):
        differs = (a.state[ours[0]][name] != b.state[theirs[0]][other]).double().mean()
        assert differs < 0.02  # its CPU code looks tiny values up in a coarse table


def test_master_bits_follow_fp32_weights():
    """On the same gradients: 16 bits are fp32 training bit for bit, 8 bits ten times nearer to it
    than bf16 weights alone.
    """
    errors = {}
    for bits in (16, 8, None):
        ps = parameters([(70, 50), (9,)], dtype=torch.bfloat16)
        qs = [torch.nn.Parameter(p.detach().float()) for p in ps]
        ours, exact = AdamW(ps, lr=1e-4, master_bits=bits), AdamW(qs, lr=1e-4)
        start = qs[0].detach().clone()
        for i in range(30):
            feed(ps, i)
            for p, q in zip(ps, qs, strict=True):
                q.grad = p.grad.float()
            ours.step()
            exact.step()
        held = [sum(8 * x.element_size() for k, x in ours.state[p].items() if "master" in k)
                for p in ps]
        assert held == [bits or 0] * 2
        kept = [ours.full_precision(p) for p in ps]
        if bits == 16:
            assert_same(kept, [q.detach() for q in qs])
        errors[bits] = ((kept[0] - qs[0]).norm() / (qs[0] - start).norm()).item()
    assert errors[8] < 0.1
    assert errors[None] > 10 * errors[8]


@pytest.mark.parametrize("bits", [8, 16])
def test_split_weights_at_the_ends_of_the_range(bits):
    x = torch.tensor([3.3e38, 3.4028e38, -3.4028e38, math.inf, math.nan, 0.0, -0.0, 1e-40, -1e-45,
                      1.00390625, -2.5, 1e-30])
    p = torch.zeros(len(x), dtype=torch.bfloat16)
    kept = {"master": torch.zeros(len(x), dtype=torch.int8), "key": torch.tensor(0)}
    if bits == 16:
        kept["master_low"] = torch.zeros(len(x), dtype=torch.uint8)
    o = {"rounding": "nearest", "master_bits": bits, "seed": 0}
    weights.write_weight(p, x, kept, o, 1)
    back = weights.read_weight(p, kept)
    finite = x.isfinite() & (x.abs() < 3.39e38)
    if bits == 16:
        assert torch.equal(back[finite], x[finite])
    else:
        assert ((back - x).abs()[finite] <= 2.0**-16 * x.abs()[finite] + 2e-43).all()
    assert back[~x.isfinite()].tolist()[0] == math.inf
    assert back[4].isnan()
    assert back[1:3].isfinite().all()
    assert p.isfinite().sum() == len(x) - 2


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"betas": (0.9, 0.99)}],
                         ids=["plain", "amsgrad", "betas"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_fewer_bits_make_no_wild_steps(bits, options):
    """Gradients of an embedding: in a row some are a million times smaller, and most rows rest.

    Adam's own largest step is (1 - b1) / sqrt(1 - b2) times the rate, but where gradients rest.
    A second moment rounded to zero beside a first one that was not made some ten thousand.
    """
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(24, 300))
    optimizer = AdamW([p], lr=1e-3, weight_decay=0, state_bits=bits, **options)
    sizes = 10.0 ** -(6 * torch.rand(24, 300, generator=generator))
    most = 0.0
    for _ in range(40):
        active = torch.rand(24, 1, generator=generator) < 0.3
        p.grad = sizes * torch.randn(24, 300, generator=generator) * active
        before = p.detach().clone()
        optimizer.step()
        most = max(most, float((p.detach() - before).abs().max()))
    assert most < 8e-3


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_huge_gradient_does_not_stop_a_weight_for_good(bits, dtype):
    p = torch.nn.Parameter(torch.zeros(64, 70, dtype=dtype))
    optimizer = AdamW([p], state_bits=bits, weight_decay=0)
    p.grad = torch.full_like(p, 1e30)
    optimizer.step()
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    change = (p.detach() - before).abs()
    assert bool((change > 3e-4).all())
    assert bool((change < 2e-3).all())


class _Layers(torch.nn.Module):
    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, torch.nn.Linear(4, 4))

    def ready(self) -> AdamW:
        """Of a step whose gradients tell the layers apart."""
        optimizer = AdamW(self.named_parameters(), nonfinite="raise")
        for name, p in self.named_parameters():
            p.grad = torch.full_like(p, float(ord(name[0])))
        return optimizer


def test_names_that_a_checkpoint_has_in_another_order():
    """torch.distributed.checkpoint puts parameters into this optimizer's order, their names not."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, other, third = _Layers("abc"), _Layers("cba"), _Layers("cba")
    optimizer, loaded, resumed = model.ready(), other.ready(), third.ready()
    optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(other, loaded, saved)
    for module, mine in ((other, loaded), (third, resumed)):
        if mine is resumed:
            resumed.load_state_dict(through_disk(loaded.state_dict()))
        assert mine.param_groups[0]["param_names"] == [*dict(module.named_parameters())]
        for name, p in module.named_parameters():
            assert_same(dict(mine.state[p]), dict(optimizer.state[model.get_parameter(name)]))
    # by place, as load_state_dict reads it, c would get the state of a
    with pytest.raises(ValueError, match=r"saved with 'a\.weight' where .* has 'c\.weight'"):
        resumed.load_state_dict(saved)


def test_what_is_trained_later_is_checked_then():
    ps = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(
        torch.ones(4, 1).expand(4, 3), requires_grad=False)]
    optimizer = AdamW(ps)
    before = snapshot(optimizer)
    ps[1].requires_grad_()
    for p in ps:
        p.grad = torch.ones(p.shape)
    with pytest.raises(ValueError, match=r"parameter 1' has strides \(1, 0\)"):
        optimizer.step()
    ps[1].requires_grad_(False)
    ps[1].grad = None
    assert_same(before, snapshot(optimizer))


def test_tensors_that_are_trained_as_they_are():
    """What keeps its gradient though it is computed, and what has no element to share."""
    leaf = torch.ones(3, requires_grad=True)
    computed = leaf * 2
    computed.retain_grad()
    optimizer = AdamW([computed, torch.nn.Parameter(torch.empty(0, 1).expand(0, 5))], lr=0.1,
                      weight_decay=0.0)
    computed.sum().backward()
    optimizer.step()
    assert torch.allclose(computed, torch.full((3,), 1.9))


@pytest.mark.parametrize("cls", [AdamW, AdamW8bit])
def test_one_parameter_at_a_time_in_the_groups(cls, monkeypatch):
    """Stage 3 of DeepSpeed's ZeRO: a step for each part of what it has flattened."""
    monkeypatch.setattr("lissom.optim.codec.SMALL", 1)
    shapes = [(300,), (512,), (20,)]

    def begun():
        optimizer = cls([{"params": named(parameters([(6, 50), (512,)]))},
                         {"params": [("p2", parameters([(20,)])[0])]}], lr=1e-2)
        place(optimizer, [], [])
        return optimizer

    def place(optimizer, *params):
        for group, mine in zip(optimizer.param_groups, params, strict=True):
            group["params"] = [*mine]

    def train(optimizer, parts, steps):
        for i in steps:
            feed(parts, i)
            for part in parts[:2]:
                place(optimizer, [part], [])
                optimizer.step()
            place(optimizer, [], parts[2:])
            optimizer.step()
            place(optimizer, [], [])

    first, third = parameters(shapes), parameters(shapes)
    optimizer = begun()
    train(optimizer, first, range(3))
    assert optimizer.state_dict()["state"] == {}
    place(optimizer, first[:2], first[2:])
    saved = through_disk(optimizer.state_dict())
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    place(optimizer, [], [])
    train(optimizer, first, range(3, 6))

    again = begun()
    place(again, second[:2], second[2:])
    again.load_state_dict(saved)
    place(again, [], [])
    train(again, second, range(3, 6))

    whole = cls([{"params": third[:2]}, {"params": third[2:]}], lr=1e-2)
    for i in range(6):
        feed(third, i)
        whole.step()
    results = [([p.detach() for p in parts],
                [{k: x for k, x in o.state[p].items() if k not in ("index", "key")} for p in parts])
               for o, parts in ((optimizer, first), (again, second), (whole, third))]
    assert_same(results[0], results[2])
    assert_same(results[1], results[2])
    assert all(int(s["step"]) == 6 for s in results[0][1])


def test_a_parameter_that_is_taken_away_is_let_go():
    """Out of the groups, and its state with it: nothing of the optimizer holds it."""
    ps = parameters([(6, 4), (4,)])
    optimizer = AdamW(ps)
    run(optimizer, ps, range(1))
    del optimizer.param_groups[0]["params"][0], optimizer.state[ps[0]]
    gone = weakref.ref(ps.pop(0))
    run(optimizer, ps, range(1, 2))
    gc.collect()
    assert gone() is None


def test_a_shape_may_change_before_the_first_step():
    (p,) = parameters([(4, 2)])
    optimizer = AdamW([("w", p)])
    assert optimizer.state[p]["exp_avg"].shape == (4, 2)
    p.data = torch.ones(6, 2)
    run(optimizer, [p], range(1))
    assert optimizer.state[p]["exp_avg"].shape == (6, 2)


def test_a_gradient_may_be_set_by_hand():
    """Of what asks for none, as torch takes it."""
    ps = [torch.nn.Parameter(torch.ones(3), requires_grad=False) for _ in range(2)]
    for cls, p in zip((AdamW, torch.optim.AdamW), ps, strict=True):
        p.grad = torch.ones(3)
        cls([p], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(*ps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_that_lacks_nothing_any_more_has_no_missing_bits(dtype):
    (p,) = parameters([(8, 6)], dtype=torch.bfloat16)
    optimizer = AdamW([p], master_bits=16)
    run(optimizer, [p], range(2))
    p.data, p.grad = p.data.to(dtype), None
    with pytest.warns(UserWarning, match=r"0.* is in .* now.*are dropped"):
        run(optimizer, [p], range(2, 3))
    assert set(optimizer.state[p]) == {"step", "index", "key", "exp_avg", "exp_avg_sq"}
    assert int(optimizer.state[p]["step"]) == 3


def test_a_state_of_torchs_adam_with_decay_is_refused():
    """Its decay is part of the gradient; without decay it is AdamW."""
    for decay in (0.0, 0.1):
        (p,) = parameters([(8, 6)])
        other = torch.optim.Adam([p], weight_decay=decay)
        run(other, [p], range(2))
        optimizer = AdamW([p])
        before = snapshot(optimizer)
        if decay:
            with pytest.raises(ValueError, match="decoupled_weight_decay=False and weight_decay=0"):
                optimizer.load_state_dict(other.state_dict())
            assert_same(before, snapshot(optimizer))
        else:
            optimizer.load_state_dict(other.state_dict())
            assert torch.equal(optimizer.state[p]["exp_avg"], other.state[p]["exp_avg"])


def test_adamw_has_no_part_of_another_rate():
    """It would be the rate of everything."""
    for cls, name, value in ((AdamW, "lr_adamw", 1e-2), (AdamW8bit, "betas_adamw", (0.8, 0.9)),
                             (AdamW, "weight_decay_adamw", 0.0)):
        with pytest.raises(TypeError, match=rf"{name}={re.escape(repr(value))}, but {cls.__name__}"
                                            " has no such option"):
            cls(parameters([(4, 2)]), **{name: value})
        cls(parameters([(4, 2)]), **{name: None})
    with pytest.raises(TypeError) as error:
        AdamW(parameters([(4, 2)]), momentum=0.9)
    assert "lr_adamw" not in str(error.value)


def test_a_number_in_two_groups_is_refused():
    """Both would get one parameter's state, which fits where shapes are alike."""
    ps = parameters([(4, 2), (4, 2)])
    optimizer = AdamW([{"params": [p]} for p in ps])
    run(optimizer, ps, range(1))
    saved, before = optimizer.state_dict(), snapshot(optimizer)
    del saved["state"][1]
    saved["param_groups"][1]["params"] = [0]
    with pytest.raises(ValueError, match=r"group 1: parameters \[0\] are saved twice"):
        optimizer.load_state_dict(saved)
    assert_same(before, snapshot(optimizer))


def test_names_come_with_a_state_where_there_are_none():
    ps = parameters([(4, 2), (3,)])
    saved = AdamW(named(ps)).state_dict()
    nameless, wrapped = AdamW(ps), AdamW([(f"module.{name}", p) for name, p in named(ps)])
    for optimizer, names in ((nameless, ["p0", "p1"]), (wrapped, ["module.p0", "module.p1"])):
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["param_names"] == names


def test_names_of_a_group_as_torch_keeps_it_name_its_tensors():
    """So do torch.optim's groups arrive that another optimizer or torchtitan has made."""
    ps = parameters([(4, 2), (3,)])
    groups = [{**g, "lr": 0.5} for g in AdamW(named(ps)).param_groups]
    optimizer = AdamW(groups)
    assert optimizer.param_groups[0]["param_names"] == ["p0", "p1"]
    assert [int(s["key"]) for s in optimizer.state.values()] == [name_key("p0"), name_key("p1")]
    kept = {"params": named(ps), "param_names": ["a", "b"]}  # pairs win, as in torch
    assert AdamW([kept]).param_groups[0]["param_names"] == ["p0", "p1"]
    assert kept["param_names"] == ["a", "b"]
    # ZeroRedundancyOptimizer leaves all names to a part of the parameters.
    for others in (None, [], ["a"], ["a", "b", "c"], [None, "a"], [1, 2], "ab"):
        optimizer = AdamW([{"params": ps, "param_names": others}])
        assert "param_names" not in optimizer.param_groups[0]
        assert [int(s["key"]) for s in optimizer.state.values()] != [
            name_key("p0"), name_key("p1")]


@pytest.mark.parametrize("bits", [32, 8])
def test_a_gradient_need_not_lie_as_its_weight_does(bits):
    ps = [parameters([(64, 80)])[0] for _ in range(2)]
    for p, turned in zip(ps, (False, True), strict=True):
        optimizer = AdamW([p], lr=1e-2, state_bits=bits)
        for i in range(2):
            feed([p], i)
            p.grad = p.grad.mT.contiguous().mT if turned else p.grad
            optimizer.step()
    torch.testing.assert_close(*ps, rtol=0, atol=1e-6)
