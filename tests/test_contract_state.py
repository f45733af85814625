"""Every row of cases.py saves its state, and goes on from it bit for bit."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from lissom.optim import report

from .cases import CASES, CONTRACT, SHAPES, WRITING
from .helpers import assert_same, feed, moments, named, run, snapshot, through_disk, trained

pytestmark = CONTRACT


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
    kept = sum(x.nbytes for s in one.state.values() for x in s.values())
    assert one.plan().state_bytes == report(one).state_bytes == kept
    assert report(one).elements == 24
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
    with pytest.warns(UserWarning, match=r"in torch.float32 now.*are dropped"):
        run(optimizer, ps, range(4, 5))
    assert "master" not in optimizer.state[ps[0]]


def test_fewer_bits_are_never_more_bytes(case, monkeypatch):
    monkeypatch.undo()  # as it is for users
    for shape in ((64, 64, 1, 1), (8192, 1), (64, 64, 3, 3), (4096, 8), (300, 40), (5000,)):
        sizes = [case(case.parameters([shape]), state_bits=bits).plan().state_bytes
                 for bits in (32, 16, 8, 4)]
        assert max(sizes[1:]) <= sizes[0]
