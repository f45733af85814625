"""Random bits belong to a parameter by its name: any order and grouping gives the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from lissom.kernels.philox import WEIGHT_STREAM, random_bits16_ref
from lissom.optim import AdamW, GaLoreAdamW, SwitchLoRAAdamW, adapter_groups, gradnormlorp
from lissom.optim.inner import RULES
from lissom.optim.keys import key_of, name_key
from torch import nn

from .cases import CASES
from .helpers import assert_same, feed, parameters, run, tensors, through_disk
from .pairs import QUICK, net

pytestmark = pytest.mark.usefixtures("quantize_all")

SHAPES = {"layers.0.weight": (9, 6), "layers.1.weight": (6, 9), "layers.0.bias": (9,),
          "layers.2.weight": (9, 6), "head.weight": (3, 4, 2), "layers.3.weight": (9, 6)}


def trained(case, groups, dtype=torch.bfloat16, **options):
    """Weights by name after five steps, from groups of names, or names in one group."""
    ps = dict(zip(SHAPES, parameters(SHAPES.values(), dtype=dtype), strict=True))
    more = {"refresh": "synchronous"} if "refresh" in case.make.options else {}
    optimizer = case([{"params": [(name, ps[name]) for name in group]} for group in groups],
                     lr=1e-2, rounding="stochastic", **{**more, **options})
    run(optimizer, list(ps.values()), range(5))
    return {name: p.detach() for name, p in ps.items()}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_order_and_grouping_change_nothing(case):
    names = list(SHAPES)
    expected = trained(case, [names])
    assert_same(expected, trained(case, [names[::-1]]))
    assert_same(expected, trained(case, [names[4:], names[1:3], [names[0], names[3]]]))
    # the bits do differ between parameters
    assert not torch.equal(*(random_bits16_ref(0, 8, key_of(
        {"key": torch.tensor(name_key(name))}, {"seed": 0}), (1, 64)) for name in names[:2]))


@pytest.mark.parametrize("bits", [16, 8])
def test_the_same_where_state_or_master_bits_are_rounded(bits):
    case = next(c for c in CASES if c.name == "adamw")
    names = list(SHAPES)
    for options in ({"state_bits": 16}, {"master_bits": bits}):
        results = [trained(case, groups, **options) for groups in ([names], [names[::-1]])]
        assert_same(*results)


def test_pairs_in_another_order():
    results = []
    for way in (1, -1):
        model = net(dtype=torch.bfloat16)
        groups = adapter_groups(model)
        for group in groups:
            if group.get("roles"):
                triples = [group["params"][i:i + 3] for i in range(0, len(group["params"]), 3)]
                group["params"] = [entry for triple in triples[::way] for entry in triple]
        optimizer = SwitchLoRAAdamW(groups[::way], lr=1e-2, **QUICK)
        trainable = [p for p in model.parameters() if p.requires_grad]
        for i in range(6):
            for p, g in zip(trainable, tensors([p.shape for p in trainable], i), strict=True):
                p.grad = g.to(p.dtype)
            optimizer.step()
        results.append({name: p.detach() for name, p in model.named_parameters()})
    assert_same(*results)
    start = net(dtype=torch.bfloat16)
    assert any(not torch.equal(p, results[0][name]) for name, p in start.named_parameters()
               if not p.requires_grad)  # base weights have moved


def test_frozen_keys():
    """What a name's bits are must stay what it is, or runs do not continue."""
    assert name_key("layers.0.weight") == 459896534589147935
    key = key_of({"key": torch.tensor(name_key("layers.0.weight"))}, {"seed": 3})
    assert key == (107078005, 698256159)
    assert key_of({"key": torch.tensor((1 << 31) + 5)}, {"seed": 7}) == (7, (1 << 31) + 5)


def test_frozen_streams():
    """Nor may the streams that round what has 16 bits change."""
    o = {"amsgrad": True, "state_bits": 16}
    found = {name: slot.stream for rule in RULES.values()
             for name, slot in rule.slots((3, 4), torch.zeros(3, 4), o).items()}
    assert found == {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 2, "exp_avg_sq_row": 3,
                     "exp_avg_sq_col": 4, "momentum_buffer": 5}
    assert gradnormlorp._STREAM == 6
    assert WEIGHT_STREAM == 64


def test_wrappers_keep_the_key():
    plain = name_key("layers.0.weight")
    for name in ("module.layers.0.weight", "_orig_mod.layers.0.weight",
                 "_orig_mod.module.layers.0._checkpoint_wrapped_module.weight",
                 "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.weight"):
        assert name_key(name) == plain
    for name in ("layers.0.bias", "layers.module.0.weight", "Layers.0.weight"):
        assert name_key(name) != plain
    assert name_key("module") != name_key("_orig_mod.weight")


def test_compiled_model_gives_the_keys_of_the_plain_one():
    model = nn.Sequential(nn.Linear(3, 2))
    keys = [[int(s["key"]) for s in AdamW(m.named_parameters()).state.values()]
            for m in (model, torch.compile(model))]
    assert keys[0] == keys[1]


def test_no_key_twice(monkeypatch):
    """Names with one hash, or of one name: their keys are counted up, and are saved."""
    ps = parameters([(4, 2)] * 4, dtype=torch.bfloat16)
    named = [("w", ps[0]), ("v", ps[1]), ("module.w", ps[2])]
    with monkeypatch.context() as patch:
        patch.setattr("lissom.optim.keys.name_key", lambda name: 5)
        optimizer = AdamW(named)
        optimizer.add_param_group({"params": [("late", ps[3])]})
        assert [int(optimizer.state[p]["key"]) for p in ps] == [5, 6, 7, 8]
    twin = AdamW([*named, ("late", ps[3])])
    first = name_key("w")
    assert [int(twin.state[p]["key"]) for p in ps] == [
        first, name_key("v"), first + 1, name_key("late")]
    loaded = AdamW([{"params": named}, {"params": [("late", ps[3])]}])
    loaded.load_state_dict(optimizer.state_dict())
    assert [int(loaded.state[p]["key"]) for p in ps] == [5, 6, 7, 8]
    monkeypatch.setattr("lissom.optim.keys.name_key", lambda name: 6)
    ps += parameters([(4, 2)])
    loaded.add_param_group({"params": [("later", ps[4])]})
    assert int(loaded.state[ps[4]]["key"]) == 9


def test_without_names_the_key_is_the_index():
    ps = parameters([(4, 2), (3,), (2, 2)])
    for s in AdamW(ps).state.values():
        assert int(s["key"]) == int(s["index"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_states_saved_without_key_continue(case):
    """They drew by index, and go on so, in an optimizer with names too."""
    shapes = [(9, 6), (6, 9), (4,)]
    ps = parameters(shapes, dtype=torch.bfloat16)
    optimizer = case(ps, lr=1e-2)
    run(optimizer, ps, range(2))
    saved = through_disk({"o": optimizer.state_dict(), "w": [p.detach() for p in ps]})
    for entry in saved["o"]["state"].values():
        del entry["key"]
    before = copy.deepcopy(saved["o"])
    qs = [nn.Parameter(w) for w in saved["w"]]
    twin = case([(f"w{i}", q) for i, q in enumerate(qs)], lr=1e-2)
    twin.load_state_dict(saved["o"])
    assert_same(before, saved["o"])
    for i in range(2, 6):
        feed(ps, i)
        feed(qs, i)
        optimizer.step()
        twin.step()
    assert_same([p.detach() for p in ps], [q.detach() for q in qs])
    for q in qs:
        assert int(twin.state[q]["key"]) == int(twin.state[q]["index"])


def test_a_parameter_that_changes_before_the_first_step_keeps_its_numbers():
    p, q = parameters([(4, 2), (4, 2)])
    optimizer = AdamW([("v", q), ("w", p)])
    index = int(optimizer.state[p]["index"])
    assert index > int(optimizer.state[q]["index"])
    p.data = p.data.double()
    optimizer.state_dict()
    assert int(optimizer.state[p]["key"]) == name_key("w")
    assert int(optimizer.state[p]["index"]) == index


def test_parameters_in_the_place_of_all_others_have_their_numbers():
    """As FSDP2 and Accelerate put them there; without names random bits follow the number."""
    optimizer = AdamW(parameters([(4, 2)] * 3))
    before = [(int(s["index"]), int(s["key"])) for s in optimizer.state.values()]
    optimizer.param_groups[0]["params"] = parameters([(4, 2)] * 3)
    optimizer.state_dict()
    assert [(int(s["index"]), int(s["key"])) for s in optimizer.state.values()] == before


def test_a_state_of_torch_keeps_the_key_of_the_name():
    (p,) = parameters([(4, 2)])
    other = torch.optim.AdamW([("w", p)])
    feed([p], 0)
    other.step()
    optimizer = AdamW([("w", p)])
    optimizer.load_state_dict(other.state_dict())
    assert int(optimizer.state[p]["key"]) == name_key("w")


def test_numbers_count_each_rule_alone():
    """Matrices from 0 on, whose refreshes they spread, whatever vectors are among them."""
    ps, late = parameters([(4, 3), (4,), (3, 4), (3,)]), parameters([(4, 3), (4,)], 1)
    optimizer = GaLoreAdamW(ps, rank=2)
    run(optimizer, ps, range(1))
    optimizer.load_state_dict(optimizer.state_dict())  # after which they are counted anew
    optimizer.add_param_group({"params": late})
    assert [int(optimizer.state[p]["index"]) for p in [*ps, *late]] == [
        0, 2**31, 1, 2**31 + 1, 2, 2**31 + 2]
