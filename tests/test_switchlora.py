"""SwitchLoRA: figures, promises, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from lissom.optim import (
    AdamW,
    GradNormLoRPAdamW,
    PartialStepError,
    SwitchLoRAAdamW,
    adapter_groups,
    lora,
    merge,
    switchlora,
)
from torch import nn

from . import oracle
from .helpers import assert_same, feed, snapshot, tensors, through_disk
from .pairs import QUICK, net, pair, train

# ---- figures


@pytest.mark.parametrize(("dtype", "factors", "bound"), [
    (torch.float32, None, 1e-6), (torch.bfloat16, None, 1e-2),
    (torch.bfloat16, torch.float32, 1e-2)])
@pytest.mark.parametrize("where", ["same", "cpu"])
def test_a_switch_keeps_the_function(dtype, factors, bound, where):
    model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 48)).to(dtype)
    lora(model, 8, dtype=factors)
    optimizer = SwitchLoRAAdamW(adapter_groups(model), lr=0.0, candidate_device=where, interval=8,
                                freeze_steps=1, seed=1)
    x = tensors([(50, 40)])[0].to(dtype)
    switched = 0
    for _ in range(12):
        before, pairs = model(x).detach(), model[0].lora_A.detach().clone()
        model(x).sum().backward()
        optimizer.step()
        after = model(x).detach()
        switched += int((pairs != model[0].lora_A).any(1).sum())
        assert (after - before).double().norm() <= bound * before.double().norm()
    assert switched >= 8


@pytest.mark.parametrize("bits", [8, 16])
def test_masters_of_the_factors_do_not_round_the_base_otherwise(bits):
    """It has none, so what a switch adds to it is rounded at random."""
    found = []
    layer = nn.Linear(40, 64, dtype=torch.bfloat16)
    for kept in (None, bits):
        model = lora(nn.Sequential(copy.deepcopy(layer)), 8)
        optimizer = SwitchLoRAAdamW(adapter_groups(model), lr=0.0, interval=8, freeze_steps=1,
                                    seed=1, master_bits=kept)
        for _ in range(4):
            model(tensors([(5, 40)])[0].bfloat16()).sum().backward()
            optimizer.step()
        found.append(model[0].weight.detach().clone())
    assert torch.equal(*found)


def change_ranks(cls, **options):
    """Numerical rank of the change of each weight after training."""
    model = net(rank=None)
    start = [getattr(model, k).weight.detach().clone() for k in ("up", "down", "square")]
    lora(model, 4, init="switchlora" if cls is SwitchLoRAAdamW else "lora")
    params = adapter_groups(model) if cls is SwitchLoRAAdamW else model.parameters()
    train(model, cls(params, lr=2e-2, **options), range(60))
    merge(model)
    ranks = []
    for k, w in zip(("up", "down", "square"), start, strict=True):
        values = torch.linalg.svdvals((getattr(model, k).weight.detach() - w).double())
        ranks.append(int((values > 1e-2 * values[0]).sum()))
    return ranks


def test_the_change_has_full_rank_and_loras_has_not():
    assert change_ranks(AdamW) == [4, 4, 4]
    assert min(change_ranks(SwitchLoRAAdamW, **QUICK)) >= 10


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (8, 8)])
def test_equals_its_oracle(shape):
    options = {"lr": 1e-2, "weight_decay": 0.1, "interval": 6, "freeze_steps": 3, "seed": 4}
    w, a, b, group = pair(shape)
    start = [x.detach().clone() for x in (w, a, b)]
    quiet = SwitchLoRAAdamW([pair(shape)[3]], **{**options, "interval": 1e9, "lr": 0.0})
    for p in quiet.param_groups[0]["params"][:2]:
        p.grad = torch.zeros_like(p)
    quiet.step()
    pools = [quiet.state[p]["candidates"] for p in quiet.param_groups[0]["params"][:2]]
    first = [int(quiet.state[p]["pointer"]) for p in quiet.param_groups[0]["params"][:2]]
    assert first == [0, 1]  # of three vectors: half a round apart
    optimizer = SwitchLoRAAdamW([group], **options)
    gradients, switches, got = [], [], []
    for i in range(40):
        g = tensors([shape], 10 + i)[0]
        a.grad, b.grad = 0.5 * b.detach().mT @ g, 0.5 * g @ a.detach().mT
        # a candidate's number can come back at once: the pointer tells how many went
        old = [int(optimizer.state[p]["pointer"]) for p in (a, b)] if i else first
        optimizer.step()
        step = []
        for p, begin in zip((a, b), old, strict=True):
            s = optimizer.state[p]
            order = [(begin + j) % 3 for j in range((int(s["pointer"]) - begin) % 3)]
            step += [order, [int(s["active"][j]) for j in order]]
        gradients.append(g)
        switches.append(step)
        got.append([x.detach().clone() for x in (w, a, b)])
    assert sum(len(s[0]) for s in switches) > 5
    assert sum(len(s[2]) for s in switches) > 5
    expected = oracle.switchlora(*start, *pools, gradients, switches, scaling=0.5, **options)
    for mine, theirs in zip(got, expected, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert (x.double() - y).norm() < 2e-5 * y.norm()


def test_without_switches_it_is_adamw():
    w, a, b, group = pair()
    qs = [nn.Parameter(x.detach().clone()) for x in (a, b)]
    ours = SwitchLoRAAdamW([group], lr=1e-2, weight_decay=0.1, interval=1e9)
    theirs = torch.optim.AdamW(qs, lr=1e-2, weight_decay=0.1)
    before = w.clone()
    for i in range(10):
        for p, q, g in zip((a, b), qs, tensors([a.shape, b.shape], i), strict=True):
            p.grad, q.grad = g, g.clone()
        ours.step()
        theirs.step()
    for p, q in zip((a, b), qs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(before, w)


def test_frozen_vectors_are_left_out_and_counted():
    _w, a, b, group = pair((30, 40), 8, weight_decay=0.5)
    optimizer = SwitchLoRAAdamW([group], lr=0.1, interval=12, freeze_steps=3, decay_steps=10**6)
    vectors = {a: a, b: b.mT}
    for i in range(60):
        for p, g in zip((a, b), tensors([a.shape, b.shape], i), strict=True):
            p.grad = g
        before = {p: x.detach().clone() for p, x in vectors.items()}
        rest = {p: optimizer.state[p]["frozen"].clone() for p in vectors}
        optimizer.step()
        for p, x in vectors.items():
            s = optimizer.state[p]
            still = rest[p] > 0
            assert torch.equal(before[p][still], x.detach()[still])
            moments = [s[k] if p is a else s[k].mT for k in ("exp_avg", "exp_avg_sq")]
            assert all(not z[still].any() for z in moments)
            assert not s["updates"][still].any()
            # only one of a pair rests at a time, and nobody longer than asked
            assert s["frozen"].max() < 3
        assert not ((optimizer.state[a]["frozen"] > 0) & (optimizer.state[b]["frozen"] > 0)).any()
        assert len(set(optimizer.state[a]["active"].tolist())) == 8


def test_frequency_follows_the_schedule():
    _w, a, b, group = pair((64, 64), 32)
    optimizer = SwitchLoRAAdamW([group], lr=0.0, interval=16, decay_steps=200, freeze_steps=1)
    counts = []
    for _ in range(400):
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        begin = int(optimizer.state[a]["pointer"])
        optimizer.step()
        counts.append((int(optimizer.state[a]["pointer"]) - begin) % 32)
    for part in (range(100), range(300, 400)):
        expected = sum(32 / 16 * 0.3 ** ((k + 1) / 200) for k in part)
        assert abs(sum(counts[k] for k in part) - expected) < 4 * (len(part) / 4) ** 0.5


def test_the_first_interval_is_that_of_the_first_step():
    """r decay^((k + 1) / decay_steps) / interval, k from 0; whole ones are not drawn."""
    _w, a, b, group = pair((16, 16), 8)
    optimizer = SwitchLoRAAdamW([group], interval=2, interval_decay=0.5, decay_steps=1,
                                freeze_steps=1)
    moved = []
    for _ in range(2):
        a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
        optimizer.step()
        moved.append([int(optimizer.state[p]["pointer"]) for p in (a, b)])
    assert moved == [[2, 6], [3, 7]]


def test_the_base_weight_is_rounded_by_bits_of_its_own(monkeypatch):
    """At each step others, and none that round a factor."""
    w, a, b, group = pair((30, 40), 8, dtype=torch.bfloat16)
    optimizer = SwitchLoRAAdamW([group], lr=0.0, interval=2, freeze_steps=1, candidates=12)
    write, seen = switchlora.write_weight, []

    def watched(p, x, kept, o, step, start):
        seen.append((int(kept["key"]), step))
        write(p, x, kept, o, step, start)

    monkeypatch.setattr(switchlora, "write_weight", watched)
    for i in range(4):
        feed([a, b], i)
        optimizer.step()
    assert [step for _, step in seen] == [1, 2, 3, 4]
    assert len({key for key, _ in seen}) == 1
    assert not {key for key, _ in seen} & {int(s["key"]) for s in optimizer.state.values()}
    assert w.isfinite().all()


def test_vectors_go_back_to_the_pool_as_they_are():
    """What was learnt is a candidate again, and may be drawn at once: no more are needed."""
    _w, a, b, group = pair((30, 40), 8)
    optimizer = SwitchLoRAAdamW([group], lr=1e-2, interval=2, freeze_steps=1, candidates=9)
    returned = 0
    for i in range(12):
        feed([a, b], i)
        before = {p: (x.detach().clone(), optimizer.state[p]["active"].clone().long())
                  for p, x in ((a, a), (b, b.mT))}
        fresh = i == 0  # the pools are drawn in the first step
        optimizer.step()
        for p, (vectors, places) in before.items():
            now, pool = optimizer.state[p]["active"].long(), optimizer.state[p]["candidates"]
            for old, place in zip(vectors, places, strict=True):
                if place not in now and not fresh:
                    assert torch.equal(pool[place], old)
                    returned += 1
    assert returned > 5


# ---- promises


VARIANTS = [{}, {"state_bits": 16}, {"state_bits": 8}, {"state_bits": 4, "candidate_device": "cpu"},
            {"amsgrad": True, "candidates": 9, "lr_adamw": 1e-3}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_resume_is_bitwise(options, dtype, monkeypatch):
    monkeypatch.setattr("lissom.optim.codec.SMALL", 1)
    options = {**QUICK, **options}
    for cut in (1, 5, 17):
        model = net(dtype=dtype)
        optimizer = SwitchLoRAAdamW(adapter_groups(model), lr=1e-2, **options)
        torch.manual_seed(cut)
        generator = torch.get_rng_state()
        train(model, optimizer, range(cut))
        saved = through_disk({"o": optimizer.state_dict(), "m": model.state_dict()})
        train(model, optimizer, range(cut, 24))
        assert torch.equal(generator, torch.get_rng_state())
        twin = net(dtype=dtype, seed=9)
        twin.load_state_dict(saved["m"])
        other = SwitchLoRAAdamW(adapter_groups(twin), lr=0.5, **options)
        other.load_state_dict(saved["o"])
        train(twin, other, range(cut, 24))
        assert_same(snapshot(optimizer), snapshot(other))
        assert_same(model.state_dict(), twin.state_dict())
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_state_is_flat_and_planned(options, monkeypatch):
    monkeypatch.setattr("lissom.optim.codec.SMALL", 1)
    model = net()
    optimizer = SwitchLoRAAdamW(adapter_groups(model), **options)
    keys = {p: set(s) for p, s in optimizer.state.items()}
    train(model, optimizer, range(3))
    assert keys == {p: set(s) for p, s in optimizer.state.items()}
    held = 0
    for s in optimizer.state.values():
        assert all(type(v) is torch.Tensor for v in s.values())
        held += sum(v.nbytes for v in s.values())
    assert optimizer.plan().state_bytes == held
    for group in optimizer.state_dict()["param_groups"]:
        assert all(isinstance(v, (str, int, float, bool, tuple, type(None)))
                   for k, v in group.items() if k not in ("params", "param_names"))
    assert model.up.weight not in optimizer.state
    assert optimizer.plan()["up.lora_A"].rank == 4
    assert "switches alone" in optimizer.plan()["up.weight"].reason
    assert optimizer.plan()["embed.weight"].rule == "adamw"


def test_deepcopy_and_swapped_parameters():
    model = net()
    optimizer = SwitchLoRAAdamW(adapter_groups(model), lr=1e-2, **QUICK)
    train(model, optimizer, range(5))
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(5, 15))
    train(twin_model, twin, range(5, 15))
    assert_same(snapshot(optimizer), snapshot(twin))


def test_distributed_checkpoint_functions():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    results = []
    for again in (False, True):
        model = net()
        optimizer = SwitchLoRAAdamW(adapter_groups(model), lr=1e-2, **QUICK)
        train(model, optimizer, range(9))
        if again:
            saved = through_disk(get_optimizer_state_dict(model, optimizer))
            optimizer = SwitchLoRAAdamW(adapter_groups(model), lr=1.0, **QUICK)
            set_optimizer_state_dict(model, optimizer, saved)
        train(model, optimizer, range(9, 16))
        results.append(snapshot(optimizer))
    for part in ("state", "weights"):
        assert_same(results[0][part], results[1][part])


@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_a_refused_step_switches_nothing(mode):
    w, a, b, group = pair()
    optimizer = SwitchLoRAAdamW([group], interval=2, freeze_steps=1, nonfinite=mode)
    for i in range(5):
        for p, g in zip((a, b), tensors([a.shape, b.shape], i), strict=True):
            p.grad = g
        before = snapshot(optimizer)
        if i % 2:
            b.grad[0, 0] = float("nan")
            if mode == "raise":
                with pytest.raises(FloatingPointError, match=r"l\.B"):
                    optimizer.step()
            else:
                optimizer.step()
            after = snapshot(optimizer)
            for part in ("state", "weights"):
                assert_same(before[part], after[part])
        else:
            grads = [p.grad.clone() for p in (a, b)]
            optimizer.step()
            assert_same(grads, [p.grad for p in (a, b)])
            assert not torch.equal(before["weights"][0], a)
    w.grad = torch.ones_like(w)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"base weight of 'l\.A' has a gradient"):
        optimizer.step()
    assert_same(before["weights"], snapshot(optimizer)["weights"])


def test_a_pair_that_is_not_used_rests():
    _w, a, b, group = pair()
    optimizer = SwitchLoRAAdamW([group], interval=2, freeze_steps=1)
    before = snapshot(optimizer)
    a.grad = torch.zeros_like(a)
    a.grad[0, 0] = 1
    optimizer.step()
    assert_same(before["weights"][1:], snapshot(optimizer)["weights"][1:])
    assert int(optimizer.state[a]["pool_step"]) == 0
    for i in range(4):
        a.grad, b.grad = tensors([a.shape, b.shape], i)
        optimizer.step()
    assert int(optimizer.state[a]["pool_step"]) == 2
    assert int(optimizer.state[b]["pool_step"]) == 1


def test_damaged_states_change_nothing():
    _w, a, b, group = pair()
    optimizer = SwitchLoRAAdamW([group], interval=4, freeze_steps=1)
    for i in range(4):
        a.grad, b.grad = tensors([a.shape, b.shape], i)
        optimizer.step()
    before = snapshot(optimizer)
    good = optimizer.state_dict()
    for key, value in (("active", torch.full((3,), 7, dtype=torch.int32)),
                       ("active", torch.full((3,), -1, dtype=torch.int32)),
                       ("pointer", torch.tensor(3)), ("frozen", -torch.ones(3, dtype=torch.int32)),
                       ("updates", torch.zeros(4, dtype=torch.int32)),
                       ("candidates", torch.zeros(3, 3)), ("pool_step", torch.tensor(99.0))):
        bad = copy.deepcopy(good)
        bad["state"][0][key] = value
        with pytest.raises(ValueError, match=key):
            optimizer.load_state_dict(bad)
        assert_same(before, snapshot(optimizer))


def test_state_of_pairs_stays_small():
    """Per-vector numbers are r, not the size of a moment; pools can be left out of the device."""
    _w, a, b, group = pair((64, 48), 8)
    optimizer = SwitchLoRAAdamW([group], candidates=9)
    for p in (a, b):
        s = optimizer.state[p]
        extra = sum(v.nbytes for k, v in s.items()
                    if k not in ("exp_avg", "exp_avg_sq", "candidates"))
        assert extra == 3 * 4 * 8 + 4 + 8 + 8 + 8 + 4


# ---- bad input


def refused(words, group=None, error=ValueError, **options):
    group = group or pair()[3]
    with pytest.raises(error, match=words):
        SwitchLoRAAdamW([group], **options)


def test_bad_pairs_are_refused_by_name():
    good = pair()[3]["params"]
    base = {"roles": ("A", "B", "base"), "scaling": 1.0}
    for params in (good[:2], good[:1], [*good, good[0]]):
        refused(r"triples.*partner", {**base, "params": params})
    refused(r"l\.A: A, B and base have shapes \[\(9, 3\), \(3, 7\), \(9, 7\)\]",
            {**base, "params": [("l.A", good[1][1]), ("l.B", good[0][1]), good[2]]})
    refused(r"rank=7, but it must be below the smaller side", pair(r=7)[3])
    refused(r"candidates=3, but it must be > rank 3", candidates=3)
    refused(r"candidates=8, but it must be > rank 3 and <= the smaller side 7", candidates=8)
    refused(r"interval=9\.0.*at least twice freeze_steps=5", interval=9)
    trainable = pair()
    trainable[0].requires_grad_(True)
    refused(r"l\.A.*requires_grad=True.*frozen", trainable[3])
    refused(r"l\.A: A, B and base are on cpu, cpu, meta, but they must be on one device",
            {**base, "params": [*good[:2], ("l.weight", nn.Parameter(
                torch.empty(9, 7, device="meta"), requires_grad=False))]})
    with pytest.raises(TypeError, match=r"l\.A.*dtype torch.uint8.*quantized"):
        SwitchLoRAAdamW([{**base, "params": [*good[:2], (
            "l.weight", nn.Parameter(torch.zeros(9, 7, dtype=torch.uint8), requires_grad=False))]}])
    refused(r"l\.A.*float8_e4m3fn.*quantized", {**base, "params": [*good[:2], (
        "l.weight", nn.Parameter(torch.zeros(9, 7).to(torch.float8_e4m3fn), requires_grad=False))]},
        TypeError)
    refused(r"one dtype", {**base, "params": [good[0], ("l.B", nn.Parameter(
        torch.zeros(9, 3, dtype=torch.bfloat16))), good[2]]})
    with pytest.raises(ValueError, match=r"l\.A: its base weight is given 2 times"):
        SwitchLoRAAdamW([{**base, "params": good}, {**base, "params": good}])
    with pytest.raises(ValueError, match=r"roles=\('A', 'B', 'base'\), but it must be"):
        GradNormLoRPAdamW([{"params": good, "roles": base["roles"]}])
    with pytest.warns(UserWarning, match="no pair to switch"):
        SwitchLoRAAdamW([good[0]])
    optimizer = SwitchLoRAAdamW([pair()[3]])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="triples"):
        optimizer.add_param_group({**pair(seed=3)[3], "params": pair(seed=3)[3]["params"][:2]})
    assert_same(before, snapshot(optimizer))


def test_a_base_weight_that_is_given_twice_is_refused():
    (w, _, _, group), (_, a, b, _) = pair(), pair(seed=3)
    alias = nn.Parameter(w.data, requires_grad=False)
    for base in (w, alias):
        other = [("k.A", a), ("k.B", b), ("k.weight", base)]
        words = r"l\.A: its base weight is given 2 times, but it must belong to one layer"
        refused(words, {**group, "params": [*group["params"], *other]})
        optimizer = SwitchLoRAAdamW([group])
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=words.replace("l", "k", 1)):
            optimizer.add_param_group({**group, "params": other})
        assert_same(before, snapshot(optimizer))
    # as the weight of an embedding that is trained
    with pytest.raises(ValueError, match=words):
        SwitchLoRAAdamW([{"params": [("embed.weight", nn.Parameter(w.data))]}, group])


def test_a_failure_says_what_was_switched(monkeypatch):
    *_, group = pair()
    optimizer = SwitchLoRAAdamW([group], interval=2, freeze_steps=1)
    for p, g in zip(group["params"][:2], tensors([(3, 7), (9, 3)]), strict=True):
        p[1].grad = g

    def fails(*args):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(SwitchLoRAAdamW, "update", fails)
        with pytest.raises(PartialStepError, match=r"'l\.A'.*no memory.*not updated; 0 parameters"
                           r".*before all updates l\.A, l\.B, l\.weight had been moved"):
            optimizer.step()
    monkeypatch.setattr("lissom.optim.switchlora._add", fails)
    with pytest.raises(PartialStepError, match=r"while it switched vectors of l\.A, l\.B, "
                       r"l\.weight \(no memory\).*partly switched; before these none"):
        optimizer.step()
