"""Every row of cases.py takes the place of torch's optimizers."""

from __future__ import annotations

import copy
import gc
import pickle
import typing
from collections import UserList

import numpy as np
import pytest
import torch
from lissom.optim import dct, polar_polynomial

from .cases import CONTRACT
from .helpers import (
    Elsewhere,
    assert_same,
    carry_off,
    feed,
    named,
    run,
    snapshot,
    tensors,
    through_disk,
    trained,
)

pytestmark = CONTRACT


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


def test_a_module_is_converted_by_exchanging_tensors(case):
    """As torch converts those of FSDP2, and all where it is told so: no weak references to any."""
    model = torch.nn.ParameterList(case.parameters([(6, 4), (5,)]))
    ps = [*model]
    optimizer = case(ps, lr=1e-2)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
        run(optimizer, ps, range(1))
        gc.collect()
        for p in ps:
            p.grad = None
        model.to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(p is q and p.dtype == torch.float32 for p, q in zip(ps, model, strict=True))
    run(optimizer, ps, range(1, 2))
    assert all(int(optimizer.state[p]["step"]) == 2 for p in trained(ps))


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


def test_state_that_others_have_carried_off_comes_back(case):
    """Lightning does that at its start, and after loading."""
    def trained(carried):
        ps = case.parameters([(8, 6), (6, 8), (5,)])
        optimizer = case(ps)
        for i in range(3):
            if carried:
                carry_off(optimizer)
            run(optimizer, ps, range(2 * i, 2 * i + 2))
        assert {x.device.type for s in optimizer.state.values() for x in s.values()} == {"cpu"}
        return [p.detach() for p in ps], snapshot(optimizer)

    assert_same(trained(False), trained(True))


def test_what_others_keep_beside_the_state_does_no_harm(case):
    """Numbers and tensors of theirs, in the state of one parameter of several alike."""
    notes = {"number": 3, "word": "a", "nothing": None, "tensor": torch.zeros(())}

    def trained(more):
        ps = case.parameters([(8, 6), (8, 6), (5,)])
        optimizer = case(ps)
        run(optimizer, ps, range(2))
        optimizer.state[ps[0]].update(more)
        run(optimizer, ps, range(2, 4))
        optimizer.state[ps[0]]["key"] = Elsewhere(optimizer.state[ps[0]]["key"])
        optimizer.state[ps[0]]["index"] = Elsewhere(optimizer.state[ps[0]]["index"])
        run(optimizer, ps, range(4, 6))
        assert {k: optimizer.state[ps[0]].pop(k) for k in more} == more
        return [p.detach() for p in ps], snapshot(optimizer)

    assert_same(trained({}), trained(notes))


def test_numbers_in_any_sequence(case):
    """As readers of configuration files have them."""
    for betas in ([0.8, 0.9], UserList([0.8, 0.9]), (np.float64(0.8), torch.tensor(0.9).double())):
        optimizer = case(case.parameters([(6, 4)]), betas=betas)
        assert type(optimizer.param_groups[0]["betas"]) is tuple
        assert optimizer.param_groups[0]["betas"] == (0.8, pytest.approx(0.9))


# ---- what broke once


def test_names_need_not_differ(case):
    """Of two groups: measured, and failures are told, by parameter."""
    if case.roles:
        pytest.skip("its groups are of three")
    ps = case.parameters([(6, 6), (8, 6)])
    optimizer = case([{"params": [("w", ps[0])]}, {"params": [("w", ps[1])]}], metrics=True)
    run(optimizer, ps, range(2))
    for row, p in zip(optimizer.metrics(), ps, strict=True):
        assert 0 < float(row["update_ratio"]) < 1, p.shape


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
