"""Every row of cases.py checks options, parameters and gradients at the door."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lissom.optim.checks import check_gradient
from lissom.optim.common import BOOKKEEPING
from lissom.optim.loading import REMEDY
from lissom.optim.options import nearest

from .cases import CONTRACT
from .helpers import assert_same, feed, named, run, snapshot, tensors, through_disk, trained

pytestmark = CONTRACT


@pytest.mark.parametrize("door", ["constructor", "group", "added", "loaded"])
def test_bad_options_are_refused(case, door):
    ps, qs = case.parameters([(6, 4)]), case.parameters([(4, 6)])
    optimizer = case(ps)
    before = snapshot(optimizer)  # is what it stays, through all refusals
    assert case.make.table().keys() - BOOKKEEPING.keys() <= case.bad.keys()
    for name, values in case.bad.items():
        for value in values:
            with pytest.raises((TypeError, ValueError)) as error:
                if door == "constructor":
                    case(ps, **{name: value})
                elif door == "group":
                    case([{"params": ps, name: value}])
                elif door == "added":
                    optimizer.add_param_group(case.groups([{"params": qs, name: value}])[0])
                else:
                    saved = copy.deepcopy(optimizer.state_dict())
                    saved["param_groups"][0][name] = value
                    optimizer.load_state_dict(saved)
            assert name in str(error.value)
            assert repr(value) in str(error.value)
            # of another class's rule it is told who reads it
            other = (name, door) == ("algorithm", "loaded") and isinstance(value, str)
            assert (REMEDY if other else "must be") in str(error.value)
            assert_same(before, snapshot(optimizer))


def test_parameters_of_inference_mode_are_refused_by_name(case):
    with torch.inference_mode():
        ps = case.parameters([(6, 4)])
    if case.roles:
        pytest.skip("its groups are of three")
    with pytest.raises(TypeError, match=r"p0 was made in inference mode, but it must be"):
        case(named(ps))


def test_misspelt_options_name_the_nearest(case):
    ps = case.parameters([(6, 4)])
    for name in case.make.table():
        if name in ("lr", "eps"):
            continue
        wrong = name[:-2] + name[-1] + name[-2]
        if wrong == name:
            wrong = name[1:]
        with pytest.raises(ValueError, match=f"{wrong}.*did you mean '{name}'"):
            case([{"params": ps, wrong: 1}])
        with pytest.raises(TypeError):
            case(ps, **{wrong: 1})
    assert nearest("zzzz", ["rank"]) == ""


def test_complex_parameters(case):
    bad = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.cfloat))
    ps = case.parameters([(6, 4)])
    optimizer = case(ps)
    groups = len(optimizer.param_groups)
    for params in ([bad], [("embed.codes", bad)]):
        name = "embed.codes" if isinstance(params[0], tuple) else "parameter 0"
        with pytest.raises(TypeError, match=f"{name}.*{bad.dtype}"):
            optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == groups


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.cfloat])
def test_frozen_parameters_of_any_dtype(case, dtype):
    """As the codes of a quantized model's weights; torch.optim.AdamW takes them too."""
    ps = case.parameters([(6, 4)])
    codes = torch.nn.Parameter(torch.ones(5, 3, dtype=dtype), requires_grad=False)
    optimizer = case(ps)
    optimizer.add_param_group({"params": [codes]})
    run(optimizer, ps, range(2))
    assert not optimizer.state.get(codes)
    assert optimizer.plan().rows[-1].state_bytes == 0
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(through_disk(optimizer.state_dict()))
    assert_same(snapshot(twin), snapshot(optimizer))
    assert bool((codes == 1).all())


def test_parameters_that_cannot_be_trained_are_refused_by_name(case):
    """Those that need no gradient may be anything that is floating."""
    ps = case.parameters([(6, 4)])
    optimizer = case(named(ps))
    before, groups = snapshot(optimizer), len(optimizer.param_groups)
    leaf, plain = torch.nn.Parameter(torch.ones(6, 4)), torch.nn.Parameter(torch.ones(1, 4))
    eight = torch.ones(6, 4).to(torch.float8_e4m3fn)
    for bad, error, words in (
            (torch.nn.Parameter(eight), TypeError, "late has dtype torch.float8_e4m3fn"),
            (leaf * 2, ValueError, "late is computed from other tensors"),
            (torch.nn.Parameter(torch.eye(4).to_sparse()), TypeError, "late has layout.*sparse"),
            (torch.nn.Parameter(plain.detach().expand(6, 4)), ValueError, r"late has strides \(0"),
            (torch.nn.UninitializedParameter(), ValueError, "late has no shape yet.*lazy"),
            (ps[0], ValueError, "late is in more than one group, in 0 too")):
        with pytest.raises(error, match=rf"group {groups}: {words}"):
            optimizer.add_param_group({"params": [("late", bad)]})
    for bad in ((leaf, "late"), ("late", leaf, 1), (3, leaf), ()):
        with pytest.raises(TypeError, match=r"parameter 0 is a tuple of .*\(name, tensor\)"):
            optimizer.add_param_group({"params": [bad]})
    with pytest.raises(TypeError, match="params is a int, but it must be a tensor"):
        optimizer.add_param_group({"params": 5})
    assert len(optimizer.param_groups) == groups
    assert_same(before, snapshot(optimizer))
    optimizer.add_param_group({"params": [("frozen", torch.nn.Parameter(eight, False))]})
    run(optimizer, ps, range(2))


def test_bad_gradients_name_the_parameter(case):
    with pytest.raises(ValueError, match=r"'w' has device meta, but it must be .*cpu"):
        # torch lets no such pair come about, so the check is asked by itself
        check_gradient(torch.zeros(2), torch.zeros(2, device="meta"), "w")
    for what in ("sparse", "shape", "dtype"):
        ps = case.parameters([(6, 4), (4, 6)])
        optimizer = case(named(ps))
        feed(ps, 0)
        optimizer.step()
        feed(ps, 1)
        if what == "sparse":
            ps[1].grad = ps[1].grad.to_sparse()
        else:  # torch checks at the assignment only: the weight may change under its gradient
            w = ps[1].data
            ps[1].data = {"shape": w.mT, "dtype": w.double()}[what]
        before = snapshot(optimizer)
        with pytest.raises((TypeError, ValueError), match=f"p1.*{what}|p1.*sparse"):
            optimizer.step()
        assert_same(before, snapshot(optimizer))


# ---- what broke once


def test_a_parameter_that_changes_its_shape_is_refused_before_any_write(case):
    ps = case.parameters([(8, 6), (7, 5)])
    optimizer = case(named(ps))
    run(optimizer, ps, range(1))
    weights = [ps[0].detach().clone()]
    ps[1].grad = None
    ps[1].data = torch.randn(9, 5)
    feed(ps, 1)
    with pytest.raises(ValueError, match=r"'p1' has changed its shape from"):
        optimizer.step()
    assert_same(weights, [ps[0].detach()])
    assert int(optimizer.state[ps[0]]["step"]) == 1


def test_an_option_changed_under_the_state_is_refused(case):
    ps = case.parameters([(8, 6)])
    optimizer = case(named(ps))
    run(optimizer, ps, range(1))
    group = optimizer.param_groups[0]
    feed(ps, 1)
    for name, value in {"amsgrad": not group["amsgrad"], "rank": 2, "keep_energy": 0.123,
                        "limiter": None, "candidates": 5}.items():
        if name not in group or group[name] == value:
            continue
        slots, before, old = optimizer.stored_slots(ps[0], group), snapshot(optimizer), group[name]
        group[name] = value
        if optimizer.stored_slots(ps[0], group) == slots:  # this state does not depend on it
            group[name] = old
            continue
        with pytest.raises(ValueError, match=r"'p0' or its options have changed|amsgrad=True, but"):
            optimizer.step()
        group[name] = old
        assert_same(before, snapshot(optimizer))


def test_an_option_changed_to_a_bad_value_is_refused(case):
    """Before the first write, by the rule of the constructor."""
    ps = case.parameters([(8, 6), (6, 8)])
    optimizer = case(named(ps))
    run(optimizer, ps, range(2))
    group = optimizer.param_groups[0]
    feed(ps, 2)
    for name, value in {"state_bits": 3, "update_proj_gap": 0, "rank": "8", "projection": "pca",
                        "betas": (0.9, 1.5), "eps": -1.0, "weight_decay": "much",
                        "polar": "none"}.items():
        if name not in group:
            continue
        old, group[name] = group[name], value
        before = snapshot(optimizer)
        with pytest.raises((ValueError, TypeError), match=name):
            optimizer.step()
        assert_same(before, snapshot(optimizer))
        group[name] = old
    optimizer.step()


def test_a_rate_that_is_no_number_is_refused(case):
    """Any number is taken, as in torch."""
    ps = case.parameters([(8, 6), (6, 8), (4,)])
    optimizer = case(named(ps))
    run(optimizer, ps, range(2))
    group = optimizer.param_groups[-1]
    feed(ps, 2)
    for value in (None, "0.1", torch.tensor([1e-3, 1e-3]), torch.tensor(1j), np.ones(2), (1e-3,)):
        group["lr"] = value
        weights = [p.detach().clone() for p in ps]
        states = [{k: x.clone() for k, x in optimizer.state[p].items()} for p in trained(ps)]
        with pytest.raises(TypeError, match=r"group \d: lr=.*but it must be a finite number"):
            optimizer.step()
        assert_same([p.detach() for p in ps], weights)
        assert_same([optimizer.state[p] for p in trained(ps)], states)
    for value in (1, -1e-3, np.float32(1e-3), np.array([1e-3]), torch.tensor([1e-3])):
        group["lr"] = value
        optimizer.step()


def test_a_changed_option_passes_the_door_of_the_constructor(case):
    """Combinations are checked before the first write, and values become plain ones."""
    ps = case.parameters([(8, 6), (6, 8), (6,)])
    optimizer = case(named(ps))
    run(optimizer, ps, range(2))
    group = optimizer.param_groups[0]
    for changed in ({"nonfinite": "skip", "capturable": True}, {"split_sizes": (3, 3)},
                    {"interval": 1.0, "freeze_steps": 5}, {"inner": "lion", "amsgrad": True},
                    {"momentum": None, "nesterov": 1}):
        if not changed.keys() <= group.keys():
            continue
        feed(ps, 2)
        old = {k: group[k] for k in changed}
        group.update(changed)
        before = snapshot(optimizer)
        with pytest.raises((ValueError, TypeError), match="|".join(changed)):
            optimizer.step()
        assert_same(before, snapshot(optimizer))
        group.update(old)
    feed(ps, 2)
    decay = torch.tensor(0.5)
    group.update(betas=[torch.tensor(0.5), 0.25], weight_decay=decay)
    if "ns_coefficients" in group:
        group["ns_coefficients"] = [3.0, -4.0, 2.0]
    if "update_proj_gap" in group:
        group["update_proj_gap"] = torch.tensor(50)
    optimizer.step()
    feed(ps, 3)
    group["metrics"] = True  # a change beside what is still in tensors
    optimizer.step()
    assert group["betas"] == (0.5, 0.25)
    assert group.get("ns_coefficients", (3.0, -4.0, 2.0)) == (3.0, -4.0, 2.0)
    assert group["weight_decay"] is decay  # whose owner may change it


def test_a_refused_group_leaves_no_trace(case):
    """Nor in the numbers that the next parameter gets."""
    ps = case.parameters([(8, 6)])
    one, other = case(named(ps)), case(named(ps))
    (late,) = tensors([(6, 8)], 5)
    late = torch.nn.Parameter(late)
    group = case.groups([{"params": [("late", late)]}])[0]
    with pytest.raises(ValueError, match=r"more than one|pair|given 2 times"):
        one.add_param_group({"params": [("late", late), ("again", ps[0])]})
    for optimizer in (one, other):
        optimizer.add_param_group(dict(group))
    for number in ("index", "key"):
        assert torch.equal(one.state[late][number], other.state[late][number])


def test_add_param_group_adds_all_or_nothing(case):
    ps, qs = case.parameters([(8, 6), (8,)]), case.parameters([(6, 8)])
    more = {"lr_adamw": 1e-3} if case.make.algorithm != "adamw" else {}
    optimizer = case(ps, **more)
    before, held = snapshot(optimizer), len(optimizer.state)
    with pytest.raises(ValueError, match=r"more than one|given 2 times"):
        optimizer.add_param_group(case.groups([{"params": [*qs, *ps[:-1]]}])[0])
    assert_same(before, snapshot(optimizer))
    assert len(optimizer.state) == held
