"""Every row of cases.py x every promise of the package."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import pickle
import typing
import warnings
import weakref
from collections import UserList

import numpy as np
import pytest
import torch
from lissom.optim import PartialStepError, dct, metrics, polar_polynomial
from lissom.optim.checks import check_gradient
from lissom.optim.common import BOOKKEEPING
from lissom.optim.loading import REMEDY
from lissom.optim.options import nearest

from .cases import CASES, SHAPES, WRITING
from .helpers import assert_same, feed, named, run, snapshot, tensors, through_disk, trained


def moments(optimizer, p):
    """Names of the averages that are kept for a parameter."""
    return [k for k, slot in optimizer._layouts[p].items() if slot.stream is not None]


@pytest.fixture(autouse=True)
def _quantize_small(monkeypatch):
    """Matrices of these tests are far below the size from which moments are quantized."""
    monkeypatch.setattr("lissom.optim.codec.SMALL", 1)
    monkeypatch.setattr("lissom.optim.codec.SHORT", 0)


pytestmark = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


# ---- drop-in


def test_takes_what_torch_takes(case):
    ps = case.parameters([(6, 4), (4,)])
    for params in (ps, iter(ps), [{"params": ps}], named(ps),
                   [{"params": named(ps[:-1])}, {"params": [("b", ps[-1])], "lr": 0.5}]):
        optimizer = case(params)
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert bool(optimizer.plan().matrices) == (case.make.algorithm != "adamw")
        assert "lr" in repr(optimizer)


def test_closure_runs_with_gradients(case):
    ps = case.parameters([(6, 4)])
    optimizer = case(ps, lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = sum(x.square().sum() for x in case.effective(ps))
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_schedulers_and_hooks(case):
    ps = case.parameters([(6, 4), (4,)])
    optimizer = case(ps, lr=1.0)
    # it changes betas too
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=6)
    calls = []
    optimizer.register_step_pre_hook(lambda *a: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *a: calls.append("post"))
    for i in range(3):
        feed(ps, i)
        optimizer.step()
        schedule.step()
    assert calls == ["pre", "post"] * 3
    twin = case(case.parameters([(6, 4), (4,)]))
    twin.load_state_dict(through_disk(optimizer.state_dict()))
    assert twin.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert twin.param_groups[0]["initial_lr"] == optimizer.param_groups[0]["initial_lr"]
    assert twin.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]
    assert optimizer.param_groups[0]["betas"][0] != optimizer.defaults["betas"][0]


#: Of any class; a group takes those that its class has.
OWN = {"lr": 3e-3, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.3, "maximize": True,
       "state_bits": 8, "master_bits": 8, "seed": 5, "scale": 0.5, "update_proj_gap": 2, "rank": 2,
       "proj_type": "right", "column_norm": 2, "magnitude_scale": 0.5, "free_scale": 2.0,
       "residual_scale": "released", "momentum": 0.5, "nesterov": False, "ns_steps": 3,
       "interval": 6.0, "freeze_steps": 3}


@pytest.mark.filterwarnings("ignore:.*rank=.* has no effect")  # of the second group alone
def test_options_of_a_group_are_its_own(case):
    """Two groups in one optimizer do what each does in one of its own, bit for bit."""
    kinds = [(case.parameters([(9, 6), (5,)], dtype=torch.bfloat16), {}),
             (case.parameters([(5, 7), (3,)], 1, torch.bfloat16),
              {k: v for k, v in OWN.items() if k in case.make.table()
               and not (k == "rank" and case.roles)})]  # it would ask for matrices in each group
    more = {"refresh": "synchronous"} if "refresh" in case.make.table() else {}

    def built(*which):
        copies = [[(f"{i}.{j}", torch.nn.Parameter(p.detach().clone(), p.requires_grad))
                   for j, p in enumerate(kinds[i][0])] for i in which]
        groups = [{**g, **kinds[i][1]} for i, ps in zip(which, copies, strict=True)
                  for g in case.groups([{"params": ps}])]
        return case.make(groups, **{**case.options, **more}), [[p for _, p in x] for x in copies]

    results = []
    for optimizers in ([built(0, 1)], [built(0), built(1)]):
        sets = [(i, ps) for i, ps in enumerate(ps for _, x in optimizers for ps in x)]
        for step in range(5):
            for i, ps in sets:
                feed(ps, 100 * i + step)
            for optimizer, _ in optimizers:
                optimizer.step()
        results.append([ps for _, ps in sets])
    for a, b in zip(*results, strict=True):
        assert_same([p.detach() for p in a], [p.detach() for p in b])


def test_rates_of_any_kind_of_number(case):
    """Schedules write numpy's numbers into groups, or tensors."""
    results = []
    for kind in (float, np.float64, np.float32, torch.tensor):
        ps = case.parameters([(6, 4), (4,)])
        optimizer = case(ps)
        for i in range(2):
            for group in optimizer.param_groups:
                group["lr"] = kind(2.0**-7 / (i + 1))
            feed(ps, i)
            optimizer.step()
        results.append(ps)
    for other in results[1:]:
        assert_same(results[0], other)


def test_numbers_of_others_are_saved_as_plain_ones(case):
    """In any option, before a step has looked at it or after; a tensor too, if it is no rate."""
    ps = case.parameters([(6, 4), (4,)])
    optimizer = case(ps)
    run(optimizer, ps, range(1))
    for group in optimizer.param_groups:
        group.update(lr=np.float64(0.25), weight_decay=np.float32(0.5), initial_lr=np.float64(0.5),
                     betas=(np.float64(0.5), 0.75), max_momentum=[np.float64(0.5)],
                     seed=torch.tensor(7), maximize=torch.tensor(True), metrics=np.bool_(True))
    optimizer.load_state_dict(through_disk(optimizer.state_dict()))  # before any step
    for steps in range(1, 3):
        saved = through_disk(optimizer.state_dict())
        assert [group["lr"] for group in saved["param_groups"]] == [0.25] * len(
            optimizer.param_groups)
        run(optimizer, ps, range(steps, steps + 1))
    copy.deepcopy(optimizer)
    optimizer.load_state_dict(through_disk(optimizer.state_dict()))
    for group in optimizer.param_groups:
        assert (group["seed"], group["maximize"], group["weight_decay"]) == (7, True, 0.5)


def test_autocast_around_a_step_changes_nothing(case):
    results = []
    for enabled in (False, True):
        ps = case.parameters([(8, 6), (6, 8), (6, 6), (4,)])
        optimizer = case(named(ps), lr=1e-2)
        seen = []

        def closure(ps=ps, seen=seen):
            seen.append(torch.is_autocast_enabled("cpu"))
            feed(ps, len(seen))
            return 0.0

        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(3):
                optimizer.step(closure)
        assert seen == [enabled] * 3  # the model's precision is its own
        results.append(snapshot(optimizer))
    assert_same(*results)


def test_inference_mode_around_anything_changes_nothing(case):
    results = []
    for enabled in (False, True):
        ps = case.parameters([(8, 6), (6, 8), (4,)])
        with torch.inference_mode(enabled):
            optimizer = case(named(ps), lr=1e-2)
        run(optimizer, ps, range(2))
        with torch.inference_mode(enabled):
            run(optimizer, ps, range(2, 4))
            optimizer.load_state_dict(through_disk(optimizer.state_dict()))
        run(optimizer, ps, range(4, 6))
        results.append(snapshot(optimizer))
    assert_same(*results)


def test_grad_scaler_skips_overflow(case):
    ps = case.parameters([(6, 4)])
    optimizer = case(ps, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = snapshot(optimizer)
    scaler.scale(ps[0].sum()).backward()
    ps[0].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert_same(before, snapshot(optimizer))
    optimizer.zero_grad()
    scaler.scale(ps[0].sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(before["weights"][0], ps[0])


def test_torchs_defaults_change_nothing(case):
    """Neither its default dtype nor its default device, where nothing has a value."""
    results = []
    for cached in (polar_polynomial._shortened, dct.rows, dct._twiddles,
                   dct._packing):
        getattr(cached, "cache_clear", lambda: None)()
    for kind, place in ((torch.bfloat16, "meta"), (torch.float64, "meta"), (torch.float32, "cpu")):
        ps = case.parameters([(6, 4), (4,), (5, 7)])
        grads = [tensors([p.shape for p in ps], i) for i in range(3)]
        torch.set_default_dtype(kind)
        try:
            with torch.device(place):
                optimizer = case(ps, lr=1e-2, nonfinite="skip")
                for step in grads:
                    for p, g in zip(ps, step, strict=True):
                        p.grad = g if p.requires_grad else None
                    optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(snapshot(optimizer))
        assert all(row["skipped_steps"].device.type == "cpu" for row in optimizer.metrics())
    assert_same(results[2], results[0])
    assert_same(results[2], results[1])


def test_deepcopy_and_pickle_continue_alike(case):
    ps = case.parameters([(6, 4), (4,)])
    optimizer = case(ps, lr=1e-2)
    run(optimizer, ps, range(3))
    twin = copy.deepcopy(optimizer)
    qs = [p for g in twin.param_groups for p in g["params"]]
    assert qs[0] is not ps[0]
    run(optimizer, ps, range(3, 7))
    run(twin, qs, range(3, 7))
    assert_same(snapshot(optimizer), snapshot(twin))


def test_a_copy_knows_who_was_trained_from_the_start(case):
    """Before there is state: one that is frozen then has its number among the others."""
    ps = case.parameters([(6, 4), (8, 6)])
    optimizer = case(ps)
    twins = [copy.deepcopy((optimizer, ps)), pickle.loads(pickle.dumps((optimizer, ps)))]
    numbers = []
    for o, qs in ((optimizer, ps), *twins):
        trained(qs)[0].requires_grad_(False)
        numbers.append([[int(o.state[q][k]) for k in ("index", "key")] for q in trained(qs)])
    assert numbers[1:] == numbers[:1] * 2


def test_numbers_do_not_depend_on_when_the_state_is_read(case):
    numbers = []
    for read in (False, True):
        ps = case.parameters([(6, 4), (8, 6)])
        late = trained(ps)[-1].requires_grad_(False)
        new = case.parameters([(9, 7)])
        optimizer = case(ps)
        run(optimizer, ps, range(1))
        late.requires_grad_(True)
        if read:
            optimizer.state_dict()
        for group in case.groups(new) if case.roles else [{"params": new}]:
            optimizer.add_param_group(group)
        numbers.append([int(optimizer.state[p]["index"]) for p in trained([*ps, *new])])
    assert numbers[0] == numbers[1]


def test_parameters_without_gradient_frozen_and_late(case):
    first, second, (third,) = (case.parameters([shape]) for shape in ((6, 4), (4, 6), (4,)))
    resting = trained(second)
    for p in resting:
        p.requires_grad_(False)
    optimizer = case(first + second, lr=1e-2)
    assert [*map(id, optimizer.state)] == [*map(id, trained(first))]
    feed(first + second, 0)
    frozen = [p.clone() for p in second]
    optimizer.step()
    assert_same(frozen, [p.detach() for p in second])
    optimizer.add_param_group({"params": [third]})
    for p in resting:
        p.requires_grad_(True)
    feed([*first, *second, third], 1)
    optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 2 for p in trained(first))
    assert all(int(optimizer.state[p]["step"]) == 1 for p in [*resting, third])
    assert not any(torch.equal(a, b) for a, b in zip(frozen, second, strict=True)
                   if b.requires_grad)


def test_swapped_parameters(case):
    ps, qs = case.parameters([(6, 4)]), case.parameters([(6, 4)])
    optimizer = case(ps)
    other = {id(p): q for p, q in zip(ps, qs, strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [other[id(p)] for p in group["params"]]
    feed(qs, 0)
    optimizer.step()
    assert [*map(id, optimizer.state)] == [*map(id, trained(qs))]


def test_state_of_replaced_parameters_is_dropped_with_a_word(case):
    ps = case.parameters([(6, 4), (4,)])
    optimizer = case(named(ps), lr=1e-2)
    run(optimizer, ps, range(2))
    qs = [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in ps]
    other = {id(p): q for p, q in zip(ps, qs, strict=True)}
    for group in optimizer.param_groups:
        group["params"] = [other[id(p)] for p in group["params"]]
    feed(qs, 0)
    count = len(trained(ps))
    with pytest.warns(UserWarning, match=f"{count} parameters with state have been replaced"):
        optimizer.step()
    assert {*optimizer.state} == {*trained(qs)}
    assert all(int(s["step"]) == 1 for s in optimizer.state.values())


def test_matrices_that_others_flatten_are_refused(case):
    """As stages 1 to 3 of DeepSpeed's ZeRO do once the optimizer is there."""
    ps = case.parameters([(6, 4), (4, 6)])
    optimizer = case(named(ps))
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in ps]))
    before = flat.detach().clone()
    for group in optimizer.param_groups:
        group["params"] = []
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    if case.make.algorithm == "adamw":
        optimizer.step()
        assert not torch.equal(before, flat)
        saved = through_disk(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        return
    with pytest.raises(ValueError, match=f"matrices have been replaced .*{len(flat)},.*use FSDP2"):
        optimizer.step()
    assert_same(before, flat.detach())


def test_state_of_others_may_be_read(case):
    """Torch's default dictionary then has an empty one."""
    first, second = case.parameters([(6, 4)]), case.parameters([(6, 4), (4,)])
    resting = trained(second)
    for p in resting:
        p.requires_grad_(False)
    optimizer = case(named([*first, *second]), lr=1e-2)
    for p in [*second, torch.ones(3)]:
        assert optimizer.state[p] == {}
    run(optimizer, first, range(2))
    assert optimizer.plan().state_bytes == sum(
        x.nbytes for s in optimizer.state.values() for x in s.values())
    optimizer.metrics()
    optimizer.load_state_dict(optimizer.state_dict())
    for p in resting:
        assert optimizer.state[p] == {}
        p.requires_grad_(True)
    feed([*first, *second], 2)
    optimizer.step()
    assert all(int(optimizer.state[p]["step"]) == 1 for p in resting)


def test_numbers_in_any_sequence(case):
    """As readers of configuration files have them."""
    for betas in ([0.8, 0.9], UserList([0.8, 0.9]), (np.float64(0.8), torch.tensor(0.9).double())):
        optimizer = case(case.parameters([(6, 4)]), betas=betas)
        assert type(optimizer.param_groups[0]["betas"]) is tuple
        assert optimizer.param_groups[0]["betas"] == (0.8, pytest.approx(0.9))


# ---- checked at the door


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


# ---- state, resume


def test_state_is_flat_tensors_from_the_start(case):
    ps = case.parameters(SHAPES)
    optimizer = case(ps)
    keys = {p: set(optimizer.state[p]) for p in trained(ps)}
    run(optimizer, ps, range(2))
    assert optimizer.state.keys() == keys.keys()
    for p in keys:
        assert set(optimizer.state[p]) == keys[p]
        assert all(type(v) is torch.Tensor for v in optimizer.state[p].values())
    for group in optimizer.state_dict()["param_groups"]:
        for name, value in group.items():
            if name != "params":
                assert isinstance(value, (str, int, float, bool, tuple, type(None))), name


def test_no_state_keeps_parameters_that_others_replace_before_the_first_step(case):
    """Accelerate saves, loads, and puts placeholders and then shards into the groups."""
    ps = case.parameters(SHAPES)
    twins = [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in ps]
    optimizer, fresh = case(named(ps)), case(named(twins))
    planned = optimizer.plan()
    before = optimizer.state_dict()
    assert before["state"] == {}
    assert {group["format"] for group in before["param_groups"]} == {0}
    optimizer.load_state_dict(through_disk(before))
    copies = [copy.deepcopy((optimizer, ps)), pickle.loads(pickle.dumps((optimizer, ps)))]
    seen = [weakref.ref(p) for p in ps]
    places = {id(p): i for i, p in enumerate(ps)}
    order = [[places[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        for i in range(len(group["params"])):
            group["params"][i] = torch.empty(1)
    del ps
    if any(ref() is not None for ref in seen):  # seconds, in a process with much in it
        gc.collect()
    assert not any(ref() is not None for ref in seen)
    new = [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in twins]
    for group, numbers in zip(optimizer.param_groups, order, strict=True):
        group["params"] = [new[i] for i in numbers]
    run(fresh, twins, range(4))
    copies.append((optimizer, new))
    for other, others in copies:
        run(other, others, range(4))
        assert_same(snapshot(fresh), snapshot(other))
    assert planned.state_bytes == optimizer.plan().state_bytes == sum(
        x.nbytes for s in optimizer.state.values() for x in s.values())
    # What has not begun is loaded as that, also into one that has.
    with torch.no_grad():
        for p, q in zip(new, case.parameters(SHAPES), strict=True):
            p.copy_(q)
    optimizer.load_state_dict(before)
    run(optimizer, new, range(4))
    assert_same(snapshot(fresh), snapshot(optimizer))
    # A template without state, into which torch.distributed.checkpoint has read the groups.
    read = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
    with pytest.raises(ValueError, match=r"state is missing, .* read optimizer\.state first"):
        case(named(case.parameters(SHAPES))).load_state_dict(read)


def test_when_state_is_made_changes_nothing(case):
    """Whoever looks at it, and whatever is frozen or not until then."""
    found = []
    for look in (False, True):
        ps = case.parameters([(6, 4), (4, 6), (4,), (3, 5)])
        late, early = trained(ps)[1], trained(ps)[0]
        late.requires_grad_(False)
        optimizer = case(named(ps), lr=1e-2)
        if look:
            assert late not in optimizer.state
        late.requires_grad_(True)
        early.requires_grad_(False)
        run(optimizer, ps, range(2))
        assert int(optimizer.state[early]["step"]) == 0
        # saved so, and loaded before it is frozen again
        qs = case.parameters([(6, 4), (4, 6), (4,), (3, 5)])
        again = case(named(qs), lr=1e-2)
        again.load_state_dict(through_disk(optimizer.state_dict()))
        found.append([dict(o.state[p]) for o, group in ((optimizer, ps), (again, qs))
                      for p in group if p in o.state])
    assert_same(found[0], found[1])
    half = len(found[0]) // 2
    assert_same(found[0][:half], found[0][half:])


def test_hooks_that_change_what_is_saved(case):
    ps = case.parameters([(6, 4)])
    optimizer = case(named(ps))
    optimizer.register_state_dict_post_hook(lambda optimizer, saved: {"mine": saved})
    for steps in (0, 1):
        run(optimizer, ps, range(steps))
        saved = optimizer.state_dict()["mine"]
        again = case(named(case.parameters([(6, 4)])))
        again.load_state_dict(saved)
        assert len(again.state_dict()["state"]) == len(trained(ps)) * steps
        assert all(group["format"] == 1 for group in optimizer.param_groups)


CUTS = [1, 3, 6]


@functools.cache
def without_a_break(name, dtype):
    """What a row is after 11 steps, and what was saved of it on the way."""
    case = next(c for c in CASES if c.name == name)
    ps = case.parameters([(9, 6), (6, 9), (6, 6), (4,)], dtype=dtype)
    optimizer = case(ps, lr=1e-2)
    saved = {}
    for start, end in itertools.pairwise([0, *CUTS, 11]):
        run(optimizer, ps, range(start, end))
        saved[end] = through_disk({"o": optimizer.state_dict(), "w": [p.detach() for p in ps]})
    return snapshot(optimizer), saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", CUTS)
def test_resume_is_bitwise(case, dtype, cut):
    expected, saved = without_a_break(case.name, dtype)
    qs = [torch.nn.Parameter(w.clone()) for w in saved[cut]["w"]]
    twin = case(qs, lr=0.5)
    twin.load_state_dict(saved[cut]["o"])
    run(twin, qs, range(cut, 11))
    assert_same(expected, snapshot(twin))


@pytest.mark.parametrize(("options", "random"), WRITING, ids=str)
def test_ways_to_write_16_bit_weights(case, options, random):
    """Resumed bit for bit; the seed decides where rounding is random, and only there."""
    shapes = [(9, 6), (6, 9), (3, 4, 2), (50,)]
    results = []
    for seed, cut in ((0, None), (0, 2), (1, None)):
        ps = case.parameters(shapes, dtype=torch.bfloat16)
        optimizer = case(ps, lr=1e-2, seed=seed, **options)
        for i in range(5):
            if i == cut:
                saved = through_disk({"o": optimizer.state_dict(), "w": [p.detach() for p in ps]})
                ps = [torch.nn.Parameter(w) for w in saved["w"]]
                optimizer = case(ps, lr=0.5, **options)
                optimizer.load_state_dict(saved["o"])
            feed(ps, i)
            optimizer.step()
        results.append(snapshot(optimizer))
        held = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
        assert optimizer.plan().state_bytes == held
        for p in trained(ps):
            bits = options.get("master_bits")
            assert ("master" in optimizer.state[p]) == (bits is not None)
            exact = optimizer.full_precision(p)
            assert exact.dtype == torch.float32
            # what the weight shows is the nearest bf16 number of what is kept
            assert (exact - p.float()).abs().max() <= 2.0**-8 * p.float().abs().max()
            if bits is None:
                assert torch.equal(exact, p.float())
    assert_same(results[0], results[1])
    # the seed also draws random bases and rounds 16-bit state; vectors have no basis
    if case.option("state_bits") != 16:
        written = [(r["weights"][-1].tolist(),
                    r["state"][-1].get("master", torch.ones(1)).tolist()) for r in results]
        assert (written[0] == written[2]) != random


def test_master_bits_need_bf16(case):
    ps = case.parameters([(6, 4)], dtype=torch.float16)
    with pytest.raises(ValueError, match="master_bits=16, but it must be None for fp16"):
        case(ps, master_bits=16)
    ps = case.parameters([(6, 4)])
    assert "master" not in case(ps, master_bits=16).state[ps[0]]  # fp32 lacks nothing
    for steps in (0, 1):  # what becomes of a model after that goes by the same door
        ps = case.parameters([(6, 4)], dtype=torch.bfloat16)
        optimizer = case(named(ps), master_bits=16)
        run(optimizer, ps, range(steps))
        for p in ps:
            p.data, p.grad = p.data.half(), None
        feed(ps, 1)
        before = [p.detach().clone() for p in ps]
        with pytest.raises(ValueError, match=r"'p.': master_bits=16, but it must be None for fp16"):
            optimizer.step()
        assert_same(before, [p.detach() for p in ps])


def test_loading_something_damaged_changes_nothing(case):
    ps = case.parameters([(6, 4), (4,)])
    optimizer = case(ps)
    run(optimizer, ps, range(2))
    before = snapshot(optimizer)
    good = optimizer.state_dict()

    def damaged(change):
        saved = copy.deepcopy(good)
        change(saved)
        return saved

    moment = next(iter(moments(optimizer, ps[0])), "step")  # some keep none
    changes = {
        "param_groups": lambda s: s.pop("param_groups"),
        "state": lambda s: s.pop("state"),
        "groups": lambda s: s["param_groups"].append(s["param_groups"][0]),
        "parameters saved": lambda s: s["param_groups"][0]["params"].append(7),
        "missing": lambda s: s["state"].pop(0),
        "is missing": lambda s: (s["state"].pop(0), s["param_groups"][0].update(format=0)),
        moment: lambda s: s["state"][0].pop(moment),
        "keeps": lambda s: s["state"][0].update(extra=torch.zeros(1)),
        "expected": lambda s: s["state"][0].update({moment: torch.zeros(2, 9)}),
        "torch.cfloat|complex64": lambda s: s["state"][0].update(
            {moment: s["state"][0][moment].to(torch.cfloat)}),
        "no saved group": lambda s: s["state"].update({99: {}}),
        "format": lambda s: s["param_groups"][0].update(format=99),
        "algorithm": lambda s: s["param_groups"][0].update(algorithm="other"),
    }
    for words, change in changes.items():
        with pytest.raises((TypeError, ValueError), match=words):
            optimizer.load_state_dict(damaged(change))
        assert_same(before, snapshot(optimizer))
    with pytest.raises(ValueError, match="state"):
        optimizer.load_state_dict({"model": 1})


# ---- all or nothing, side effects


def test_nonfinite(case):
    for value in (float("nan"), float("inf"), -float("inf")):
        for mode in ("skip", "raise", "propagate"):
            ps = case.parameters([(6, 4), (4, 6), (4,)])
            optimizer = case(named(ps), nonfinite=mode)
            feed(ps, 0)
            optimizer.step()
            before = snapshot(optimizer)
            feed(ps, 1)
            ps[1].grad[1, 2] = value
            if mode == "raise":
                with pytest.raises(FloatingPointError, match="'p1'"):
                    optimizer.step()
                assert_same(before, snapshot(optimizer))
            elif mode == "skip":
                optimizer.step()
                assert optimizer.skipped_steps == 1
                after = snapshot(optimizer)
                for part in ("state", "weights"):
                    assert_same(before[part], after[part])
                ps[1].grad = torch.ones_like(ps[1])
                optimizer.step()
                assert optimizer.skipped_steps == 1
                twin = case(case.parameters([(6, 4), (4, 6), (4,)]))
                twin.load_state_dict(through_disk(
                    {**optimizer.state_dict(), "param_groups": [
                        {k: v for k, v in g.items() if k != "param_names"}
                        for g in optimizer.state_dict()["param_groups"]]}))
                assert twin.skipped_steps == 1
            else:
                for k in range(2, 7):  # refreshes fall into these steps
                    optimizer.step()
                    feed(ps, k)
                    ps[1].grad[1, 2] = value
                assert not ps[1].isfinite().all()
                assert ps[0].isfinite().all()


def test_failure_in_the_middle_names_what_moved(case, monkeypatch):
    ps = case.parameters([(6, 4), (4, 6), (4,)])
    optimizer = case(named(ps), **case.still)
    run(optimizer, ps, range(2))
    feed(ps, 5)
    before = snapshot(optimizer)
    inner = type(optimizer)._step_batch
    # One after the other, also where they wait.
    monkeypatch.setattr("lissom.optim.batches._WINDOW", 1)

    def fails(self, batch):
        if batch[0].p is ps[1]:
            raise torch.OutOfMemoryError("no memory")
        yield from inner(self, batch)

    monkeypatch.setattr(type(optimizer), "_step_batch", fails)
    # those that wait come after those that do not
    moved = "2 parameters.*: p2, p0$" if case.make.waits else "1 parameters.*: p0$"
    with pytest.raises(PartialStepError, match=f"'p1'.*no memory.*{moved}") as error:
        optimizer.step()
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    after = snapshot(optimizer)
    for part in ("state", "weights"):
        still = slice(1, 2) if case.make.waits else slice(1, None)
        assert_same(before[part][still], after[part][still])


@pytest.mark.parametrize("when", ["before", "after"])
def test_failure_of_a_measurement_names_what_moved(case, monkeypatch, when):
    ps = case.parameters([(6, 4), (4, 6), (4,)])
    optimizer = case(named(ps), metrics=True, **case.still)
    run(optimizer, ps, range(2))
    feed(ps, 5)
    monkeypatch.setattr("lissom.optim.batches._WINDOW", 1)
    inner = getattr(metrics, when)

    def fails(optimizer, window, *copies):
        if window[0].p is ps[1]:
            raise torch.OutOfMemoryError("no memory")
        return inner(optimizer, window, *copies)

    monkeypatch.setattr(f"lissom.optim.metrics.{when}", fails)
    how = "not" if when == "before" else "wholly"
    with pytest.raises(PartialStepError, match=f"'p1'.*no memory.*{how} updated") as error:
        optimizer.step()
    assert ("p1" in str(error.value).partition("had been updated")[2]) == (when == "after")


def test_failure_while_updates_wait_changes_nothing(case, monkeypatch):
    if not case.make.waits:
        pytest.skip("its updates do not wait for each other")
    ps = case.parameters([(6, 4), (6, 4), (4, 6)])
    optimizer = case(ps)
    run(optimizer, ps, range(2))
    feed(ps, 5)
    before = snapshot(optimizer)
    monkeypatch.setattr("lissom.optim.polar.Oracle.__call__", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert_same(before, snapshot(optimizer))


def test_alone_or_in_a_batch(case, monkeypatch):
    """Parameters of a shape may be computed together: same result as one after the other."""
    shapes = [(6, 4), (4, 6), (6, 4), (3, 6, 4), (6, 4)]
    results = []
    for window in (1, 1 << 24):
        monkeypatch.setattr("lissom.optim.batches._WINDOW", window)
        ps = case.parameters(shapes)
        optimizer = case(ps, lr=1e-2)
        run(optimizer, ps, range(5))
        results.append([p.detach() for p in ps])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if not case.make.waits else (
            1e-3 if case.option("polar_dtype") == "bfloat16" else 1e-5))


def test_nothing_else_is_touched(case, capfd):
    ps = case.parameters(SHAPES)
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    optimizer = case(ps)
    for i in range(6):
        feed(ps, i)
        grads = [p.grad.clone() for p in trained(ps)]
        optimizer.step()
        for p, g in zip(trained(ps), grads, strict=True):
            assert torch.equal(p.grad, g)
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not torch.distributed.is_initialized()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# ---- arithmetic


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_zero_gradient_moves_only_decay(case, weight_decay):
    ps = case.parameters(SHAPES)
    optimizer = case(ps, lr=1e-2, weight_decay=weight_decay, **case.still)
    for _ in range(5):
        before = [p.detach().clone() for p in ps]
        for p in trained(ps):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p, b in zip(ps, before, strict=True):
            keep = 1 - 1e-2 * weight_decay if p.requires_grad else 1
            torch.testing.assert_close(p.detach(), b * keep, rtol=2e-7, atol=0)


def test_decay_alone_moves_16_bit_weights(case):
    """By 1e-4 at a step, a fortieth of bf16's spacing below 1: to nearest nothing would move."""
    ps = case.parameters([(40, 30)], dtype=torch.bfloat16)
    for p in ps:
        p.detach().fill_(1.0)
    optimizer = case(ps, lr=1e-2, weight_decay=1e-2, rounding="stochastic", **case.still)
    for _ in range(40):
        for p in trained(ps):
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p in trained(ps):
        # weights that were rounded down, and five standard errors of their number
        expected = 40 * 1e-4 * p.numel() * 2**8
        assert abs((1 - p.float()).sum().item() * 2**8 - expected) < 5 * expected**0.5


def test_lr_zero_moves_nothing(case):
    ps = case.parameters(SHAPES)
    optimizer = case(ps, lr=0.0)
    before = [x.detach().clone() for x in case.effective(ps)]
    run(optimizer, ps, range(5))
    for a, b in zip(before, case.effective(ps), strict=True):
        # switches keep what the model computes with, up to rounding
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=2e-6 if case.still else 0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_extreme_gradients(case, scale):
    tolerance = 2e-3 if case.same_arithmetic() or case.option("state_bits") == 32 else 0.3
    if case.option("polar_dtype") == "bfloat16":
        tolerance = 0.3
    # A rule that follows the gradient's scale starts from zero, where no update is too small.
    zero = case.scaling == "linear"
    ps = [torch.nn.Parameter(p * (not zero)) for p in case.parameters([(7, 5), (5, 7), (4,)])]
    more = {"weight_decay": 0.0, "eps": 0.0 if scale >= 1e-12 else 1e-8, **case.still}
    if case.options.get("proj_type") == "full":
        # P^T G Q is diagonal at the first step, and the rounding beside it counts in full if eps
        # is 0: two scales round differently. What is rounded to 0 would give 0 / 0.
        tolerance, more["eps"] = 0.3, more["eps"] or 1e-30
    optimizer = case(ps, lr=1e-2, **more)
    run(optimizer, ps, range(6), scale)
    qs = [torch.nn.Parameter(p * (not zero)) for p in case.parameters([(7, 5), (5, 7), (4,)])]
    start = [p.detach().clone() for p in qs]
    twin = case(qs, lr=1e-2, **more)
    run(twin, qs, range(6), 1.0)
    for p, q, w in zip(ps, qs, start, strict=True):
        if not p.requires_grad:
            assert torch.equal(p, w)
            continue
        assert p.isfinite().all()
        moved, reference = (p - w).double().norm(), (q - w).double().norm()
        rule = case.scaling if p.ndim > 1 and p.shape[0] != 4 else "adam"
        if rule == "linear":
            assert abs(moved / (reference * scale) - 1) < tolerance
        elif rule == "sign":
            assert abs(moved / reference - 1) < tolerance or scale in (1e30, 1e-30)
            assert 0.3 < moved / reference < 3
        elif scale < 1e-12:  # epsilon is far above the gradient
            assert moved < 1e-15 * reference
        elif scale < 1e20:
            assert abs(moved / reference - 1) < tolerance
        else:  # squares are out of range: entries count by their sign, at full size
            assert 0.3 < moved / reference < 3
    for s in optimizer.state.values():
        assert all(v.isfinite().all() for v in s.values())


def test_fp16_gradients_near_the_largest(case):
    """Sums of them are out of fp16's range."""
    ps = case.parameters([(8, 6), (6, 8), (4,)], dtype=torch.float16)
    optimizer = case(ps)
    for i in range(3):
        feed(ps, i)
        for p in trained(ps):
            p.grad.sign_().mul_(6e4)
        optimizer.step()
    assert all(p.isfinite().all() for p in ps)
    assert all(x.isfinite().all() for s in optimizer.state.values() for x in s.values())


def test_every_shape_does_a_documented_thing(case):
    ps = case.parameters(SHAPES)
    optimizer = case(ps)
    ps = [p for g in optimizer.param_groups for p in g["params"]]
    start = [p.detach().clone() for p in ps]
    run(optimizer, ps, range(3))
    for row, p, before in zip(optimizer.plan(), ps, start, strict=True):
        assert row.shape == tuple(p.shape)
        assert row.reason
        if p.numel() and p.requires_grad:
            assert not torch.equal(p, before)
            assert p.isfinite().all()


def test_plan_counts_bytes_exactly(case):
    for dtype in (torch.float32, torch.bfloat16):
        ps = case.parameters(SHAPES, dtype=dtype)
        ps[3].requires_grad_(False)
        optimizer = case(ps)
        held = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
        assert optimizer.plan().state_bytes == held
        assert f"{held:,} bytes" in str(optimizer.plan())


def test_memory_formats_and_views(case):
    start = tensors([(8, 6, 3, 3)])[0]
    weights = [torch.nn.Parameter(start.clone().to(memory_format=f))
               for f in (torch.contiguous_format, torch.channels_last)]
    flat = case.parameters([(9, 6)])
    copies = (p.detach().clone() for p in flat)
    across = [torch.nn.Parameter(x.mT.contiguous().mT if x.ndim > 1 else x) for x in copies]
    # P^T D Q is diagonal at a refresh: the rest is rounding, which only eps holds down.
    more = {"eps": 1e-2} if case.options.get("proj_type") == "full" else {}
    for left, right in (([weights[0]], [weights[1]]), (across, flat)):
        for ps in (left, right):
            optimizer = case(ps, lr=1e-2, **more)
            for i in range(5):
                # not the seed of the weights: a gradient along them has no direction part
                for p, g in zip(ps, tensors([p.shape for p in ps], 10 + i), strict=True):
                    if p.requires_grad:
                        p.grad = torch.empty_like(p).copy_(g)
                optimizer.step()
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
            assert a.ndim < 2 or a.stride() != b.stride()


def test_every_moment_is_rounded_by_bits_of_its_own(case):
    ps = case.parameters([(9, 6), (5,)])
    optimizer = case(ps)
    for p in optimizer.state:
        streams = [optimizer._layouts[p][name].stream for name in moments(optimizer, p)]
        assert len(set(streams)) == len(streams)
        assert all(0 <= x < 64 for x in streams)


def test_bf16_weights_keep_fp32_moments(case):
    ps = case.parameters([(9, 6)], dtype=torch.bfloat16)
    optimizer = case(ps, lr=1e-2)
    run(optimizer, ps, range(3))
    bits = optimizer.param_groups[0]["state_bits"]
    state = optimizer.state[ps[0]]
    for name in moments(optimizer, ps[0]):
        assert state[name].dtype == {32: torch.float32, 16: torch.bfloat16}.get(bits, torch.uint8)
        assert (f"{name}.scale" in state) == (bits < 16)
    twin = case(case.parameters([(9, 6)], dtype=torch.bfloat16))
    twin.load_state_dict(through_disk(optimizer.state_dict()))
    assert_same(snapshot(optimizer)["state"], snapshot(twin)["state"])


def test_equals_its_oracle(case):
    if not case.same_arithmetic():
        pytest.skip("its arithmetic is random or quantized: see test_rounding and test_quantizers")
    if case.roles:
        pytest.skip("pairs have oracles in test_switchlora and test_gradnormlorp")
    for shape in [(7, 5), (5, 7), (6, 6), (4, 3, 2)]:
        for more in ({}, {"maximize": True, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}):
            (p,) = case.parameters([shape], 1)
            # Leading singular values far apart, so that every projection finds the same space;
            # one refresh only where the basis is not the SVD's own, signs included.
            options = {**case.options, **more, "lr": 1e-2}
            exact = case.option("projection") in ("svd", "dct", None)
            if options.get("proj_type") == "full":
                # P^T G Q is diagonal at a refresh: the rest is rounding, which only eps holds down.
                options["eps"] = 1e-2
            if case.option("update_proj_gap"):
                options["update_proj_gap"] = case.option("update_proj_gap") if exact else 100
                options["refresh"] = "synchronous"
            gradients = []
            for i in range(7):
                g = tensors([shape], 50 + i)[0].flatten(1)
                u, s, vh = torch.linalg.svd(g, full_matrices=False)
                gradients.append((u * (s * 0.3 ** torch.arange(len(s)))) @ vh)
            gradients = [g.view(shape) for g in gradients]
            expected = case.oracle(p.detach(), gradients, **options)
            optimizer = case.make([p], **options)
            start = p.detach().clone()
            for g, w in zip(gradients, expected, strict=True):
                p.grad = g
                optimizer.step()
                error = (p.detach().double() - w).norm() / (w - start.double()).norm()
                # With another basis of the same space Adam's direction differs in the last
                # singular vectors' rounding only when the vectors agree, up to sign.
                assert error < (2e-4 if exact else 2e-2), (shape, more)


def test_warns_only_when_it_should(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case(case.parameters([(6, 4), (3,)]))


# ---- what broke once


def test_groups_of_vectors_come_back(case):
    """A constructor's rank serves groups of vectors too: they are saved, loaded and copied."""
    ps = case.parameters([(8, 6), (8,)])
    more = {"lr_adamw": 1e-3} if case.make.algorithm != "adamw" else {}
    optimizer = case(ps, **more)
    run(optimizer, ps, range(2))
    optimizer.load_state_dict(through_disk(optimizer.state_dict()))
    twin = copy.deepcopy(optimizer)
    run(optimizer, ps, range(2, 4))
    run(twin, [p for g in twin.param_groups for p in g["params"]], range(2, 4))
    assert_same(snapshot(optimizer), snapshot(twin))


def test_distributed_checkpoint_functions(case):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    for flat in (False, True):
        results = []
        for again in (False, True):
            model = torch.nn.ParameterList(case.parameters([(5, 6), (5,)]))
            optimizer = case(model.parameters(), lr=1e-2)
            for i in range(6):
                if i == 3 and again:
                    options = StateDictOptions(flatten_optimizer_state_dict=flat)
                    saved = through_disk(get_optimizer_state_dict(model, optimizer,
                                                                  options=options))
                    optimizer = case(model.parameters(), lr=0.3)
                    set_optimizer_state_dict(model, optimizer, saved, options=options)
                feed(list(model.parameters()), i)
                optimizer.step()
            results.append(snapshot(optimizer))
        for part in ("state", "weights"):
            assert_same(results[0][part], results[1][part])


def test_replaced_parameters_can_be_saved_at_once(case):
    ps = case.parameters([(8, 6), (8,)])
    optimizer = case(ps)
    assert optimizer.state
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(ps[0].detach().clone())
    saved = optimizer.state_dict()
    assert sorted(saved["state"]) == [i for i, p in enumerate(ps) if p.requires_grad]
    optimizer.load_state_dict(saved)


def test_a_model_that_changes_dtype_takes_its_state_along(case):
    for steps in (0, 2):
        for dtype in (torch.float64, torch.bfloat16):
            ps = case.parameters([(8, 6), (8,)])
            optimizer = case(ps, lr=1e-2)
            run(optimizer, ps, range(steps))
            for p in ps:
                p.data, p.grad = p.data.to(dtype), None
            run(optimizer, ps, range(steps, steps + 3))
            assert all(int(optimizer.state[p]["step"]) == steps + 3 for p in trained(ps))
            assert all(p.isfinite().all() for p in ps)
            assert optimizer.plan().state_bytes == sum(
                v.nbytes for s in optimizer.state.values() for v in s.values())


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


def test_names_need_not_differ(case):
    """Of two groups: measured, and failures are told, by parameter."""
    if case.roles:
        pytest.skip("its groups are of three")
    ps = case.parameters([(6, 6), (8, 6)])
    optimizer = case([{"params": [("w", ps[0])]}, {"params": [("w", ps[1])]}], metrics=True)
    run(optimizer, ps, range(2))
    for row, p in zip(optimizer.metrics(), ps, strict=True):
        assert 0 < float(row["update_ratio"]) < 1, p.shape


def test_a_parameter_that_is_twice_in_a_group_is_saved_and_loaded(case):
    """torch warns of it, and goes on."""
    if case.roles:
        pytest.skip("its groups are of three")
    ps = case.parameters([(6, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, other = (case([*ps, *ps]) for _ in range(2))
    run(one, ps, range(2))
    saved = through_disk(one.state_dict())
    other.load_state_dict(saved)
    assert_same(snapshot(one)["state"], snapshot(other)["state"])
    two = case.parameters([(6, 4), (6, 4)])
    with pytest.raises(ValueError, match="saved twice"):
        case(two).load_state_dict(saved)


def test_groups_without_parameters_are_saved_and_loaded(case):
    """torch takes them, beside others."""
    ps = case.parameters([(6, 4), (4,)])
    optimizer = case([*case.groups([{"params": ps}]), {"params": []}], lr=1e-2)
    run(optimizer, ps, range(2))
    qs = [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in ps]
    twin = case([*case.groups([{"params": qs}]), {"params": []}])
    twin.load_state_dict(through_disk(optimizer.state_dict()))
    for o, xs in ((optimizer, ps), (twin, qs)):
        run(o, xs, range(2, 4))
    assert_same(snapshot(optimizer), snapshot(twin))


def test_add_param_group_adds_all_or_nothing(case):
    ps, qs = case.parameters([(8, 6), (8,)]), case.parameters([(6, 8)])
    more = {"lr_adamw": 1e-3} if case.make.algorithm != "adamw" else {}
    optimizer = case(ps, **more)
    before, held = snapshot(optimizer), len(optimizer.state)
    with pytest.raises(ValueError, match=r"more than one|given 2 times"):
        optimizer.add_param_group(case.groups([{"params": [*qs, *ps[:-1]]}])[0])
    assert_same(before, snapshot(optimizer))
    assert len(optimizer.state) == held


def test_the_same_names_in_another_order_are_refused(case):
    """By place each would get another's state, which fits where shapes are alike."""
    if case.roles:
        pytest.skip("its groups are of three")
    ps = case.parameters([(6, 6), (6, 6), (4,), (4,)])
    optimizer = case(named(ps))
    run(optimizer, ps, range(2))
    saved = through_disk(optimizer.state_dict())
    other = case(named(ps)[::-1])
    before = snapshot(other)
    with pytest.raises(ValueError, match="saved with 'p0' where this optimizer has 'p3'"):
        other.load_state_dict(saved)
    assert_same(before, snapshot(other))
    other = case([(f"module.{name}", p) for name, p in named(ps)])  # of a wrapped model
    other.load_state_dict(saved)
    assert_same(snapshot(optimizer)["state"], snapshot(other)["state"])


def test_damaged_counters_and_layouts_are_refused(case):
    ps = case.parameters([(8, 6)])
    optimizer = case(ps)
    run(optimizer, ps, range(2))
    before = snapshot(optimizer)
    state = optimizer.state[ps[0]]
    bad = [("step", torch.tensor(x)) for x in (-1.0, float("nan"), float("inf"), 2.0**53)]
    bad += [("step", torch.tensor(2.5)), ("step", torch.tensor(0, device="meta"))]
    bad += [(k, state[k].to_sparse()) for k in moments(optimizer, ps[0])]
    if "index" in state:
        bad += [(k, torch.tensor(x)) for k in ("index", "key") for x in (-5, True)]
        bad += [(k, x) for k in ("index", "key") for x in (2.7, float("nan"), 10**30, -1)]
    if "basis_step" in state:
        bad.append(("basis_step", torch.tensor(50.0)))
    for name in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg.scale"):
        if name in state and state[name].is_floating_point():
            bad.append((name, -torch.ones_like(state[name])))
    for name, value in bad:
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0][name] = value
        with pytest.raises(ValueError, match=name):
            optimizer.load_state_dict(saved)
        assert_same(before, snapshot(optimizer))
    for change, words in ((lambda s: s["param_groups"][0].update(params=0), "params"),
                          (lambda s: s["param_groups"][0].update(param_names=["a"] * 9),
                           "param_names"),
                          (lambda s: s["param_groups"][0].pop("format"), "format"),
                          (lambda s: s["state"].update({0: torch.zeros(2)}), "state is a Tensor")):
        saved = copy.deepcopy(optimizer.state_dict())
        change(saved)
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(saved)
        assert_same(before, snapshot(optimizer))


def test_keys_of_the_users_own_stay_in_a_group(case):
    ps = case.parameters([(8, 6)])
    optimizer = case(ps)
    optimizer.param_groups[0]["lr_scale"] = 0.5
    optimizer.param_groups[0]["mine"] = np.array([1.0, 2.0])  # which torch.optim.AdamW takes
    run(optimizer, ps, range(2))
    del optimizer.param_groups[0]["mine"]
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["lr_scale"] == 0.5
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr_scale"] == 0.5


def test_a_hook_does_not_change_the_callers_dict(case):
    ps = case.parameters([(8, 6)])
    optimizer = case(ps)
    optimizer.register_load_state_dict_pre_hook(lambda o, d: d.update(extra=1))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert "extra" not in saved


def test_unfrozen_parameters_are_saved_and_counted(case):
    ps = case.parameters([(8, 6), (6, 8)])
    ps[1].requires_grad_(False)
    optimizer = case(ps)
    run(optimizer, ps[:1], range(1))
    ps[1].requires_grad_(True)
    saved = optimizer.state_dict()
    held = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    assert optimizer.plan().state_bytes == held
    case(case.parameters([(8, 6), (6, 8)])).load_state_dict(saved)


def test_a_failure_says_what_is_partly_written(case, monkeypatch):
    ps = case.parameters([(8, 6)])
    optimizer = case(named(ps), **case.still)
    run(optimizer, ps, range(1))
    feed(ps, 1)

    def fails(*args, **kwargs):
        optimizer.state[ps[0]]["step"].add_(0)
        raise torch.OutOfMemoryError("no memory")
        yield

    monkeypatch.setattr(type(optimizer), "_step_batch", fails)
    with pytest.raises(PartialStepError, match=r"'p0'.*partly updated; 0 parameters"):
        optimizer.step()
    monkeypatch.setattr(type(optimizer), "_step_batch", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()


def test_indices_stay_apart_when_a_parameter_is_replaced(case):
    ps = case.parameters([(8, 6)] * 3)
    optimizer = case(ps)
    count = len(optimizer.state)
    assert count >= 3
    first = ps[0]
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones_like(first))
    optimizer.state_dict()
    assert first not in optimizer.state
    for number in ("index", "key"):
        values = [int(s[number]) for s in optimizer.state.values()]
        assert len(set(values)) == len(values) == count


def test_a_tensor_may_stand_for_a_rate(case):
    """As LambdaLR leaves it, whose function returns tensors; for type checkers too."""
    assert typing.get_type_hints(case.make.__init__)["lr"] == float | torch.Tensor
    results = []
    for kind in (float, torch.tensor):
        ps = case.parameters([(8, 6), (6, 8), (4,)])
        optimizer = case(ps)
        for group in optimizer.param_groups:
            group["lr"] = kind(1e-2)
        run(optimizer, ps, range(2))
        results.append([p.detach() for p in ps])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_master_bits_start_where_there_were_none(case):
    ps = case.parameters([(8, 6), (4,)], dtype=torch.bfloat16)
    old = case(ps)
    run(old, ps, range(2))
    optimizer = case(ps, master_bits=16)
    optimizer.load_state_dict({**old.state_dict(), "param_groups": [
        {**g, "master_bits": 16} for g in old.state_dict()["param_groups"]]})
    assert not optimizer.state[ps[0]]["master"].any()
    run(optimizer, ps, range(2, 4))
    for p in ps:
        p.data, p.grad = p.data.float(), None
    run(optimizer, ps, range(4, 5))
    assert "master" not in optimizer.state[ps[0]]


def test_seeds_differ_in_their_upper_half(case):
    results = []
    for seed in (0, 1 << 32, 1 << 40):
        ps = case.parameters([(60, 9)], dtype=torch.bfloat16)
        optimizer = case(ps, seed=seed, rounding="stochastic")
        run(optimizer, ps, range(2))
        results.append(ps[0].detach())
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


def test_fewer_bits_are_never_more_bytes(case, monkeypatch):
    monkeypatch.undo()  # as it is for users
    for shape in ((64, 64, 1, 1), (8192, 1), (64, 64, 3, 3), (4096, 8), (300, 40), (5000,)):
        sizes = [case(case.parameters([shape]), state_bits=bits).plan().state_bytes
                 for bits in (32, 16, 8, 4)]
        assert max(sizes[1:]) <= sizes[0]
