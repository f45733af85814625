"""States saved under other options, by other rules and other packages."""

from __future__ import annotations

import io
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lissom.kernels.dynamic import codebook
from lissom.optim import (
    APOLLO,
    AdamW,
    AdamW8bit,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    Muon,
    PolarGrad,
    SwitchLoRAAdamW,
    adapter_groups,
    codec,
    convert_state,
    loading,
    lora,
)
from lissom.optim.layouts import slots_of

from .helpers import assert_same, named, parameters, run, snapshot

pytestmark = pytest.mark.usefixtures("quantize_small")

SHAPES = [(40, 24), (24, 40), (24,)]
NAMES = ["p0", "p1", "p2"]


def trained(cls, steps=4, shapes=SHAPES, **options):
    ps = parameters(shapes)
    optimizer = cls(named(ps), lr=1e-2, **options)
    run(optimizer, ps, range(steps))
    return optimizer, ps


def moved(old, ps, cls, names=None, **options):
    """The optimizer that goes on, on copies of the weights, and what became of the state."""
    twins = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    optimizer = cls(named(twins), lr=1e-2, **options)
    before = snapshot(optimizer)
    kept = {"state": dict(old["state"]), "param_groups": list(old["param_groups"])}
    converted = convert_state(old, optimizer, names)
    assert_same(snapshot(optimizer), before)
    assert old == kept or old["state"].keys() == kept["state"].keys()
    optimizer.load_state_dict(converted)
    return optimizer, twins, {name: (state, why) for name, state, why in converted.rows}


def wide(optimizer, p, name):
    """A slot, decoded."""
    o = next(group for _, q, group in optimizer._named() if q is p)
    return codec.Decoded(optimizer.state[p], slots_of(optimizer, p, o), p)[name].clone()


def test_nothing_changes_where_nothing_changed():
    optimizer, ps = trained(GaLoreAdamW, rank=6, state_bits=8, basis_bits=8)
    other, twins, rows = moved(optimizer.state_dict(), ps, GaLoreAdamW, rank=6, state_bits=8,
                               basis_bits=8)
    assert {state for state, _ in rows.values()} == {"kept"}
    for p, q in zip(ps, twins, strict=True):
        for k, x in optimizer.state[p].items():
            assert torch.equal(x, other.state[q][k]), k
    run(optimizer, ps, range(4, 8))
    run(other, twins, range(4, 8))
    assert_same(ps, twins)


@pytest.mark.parametrize(("before", "after"), [(32, 8), (8, 32), (32, 4), (16, 8), (8, 4)])
def test_bits_change_the_store_alone(before, after):
    optimizer, ps = trained(FiraAdamW, rank=6, state_bits=before)
    other, twins, rows = moved(optimizer.state_dict(), ps, FiraAdamW, rank=6, state_bits=after)
    assert {state for state, _ in rows.values()} == {"kept"}
    tolerance = {32: 1e-6, 8: 0.02, 4: 0.3}[after]
    for p, q in zip(ps, twins, strict=True):
        assert int(other.state[q]["step"]) == 4
        for name in ("exp_avg", "exp_avg_sq"):
            a, b = wide(optimizer, p, name), wide(other, q, name)
            assert a.abs().max() > 0
            assert (a - b).abs().max() <= tolerance * a.abs().max(), name
    if before == 32 and after == 8:  # exactly what quantizing the moments gives
        x = wide(optimizer, ps[0], "exp_avg")
        codes, scale = codec.quantize_dynamic(x, 8, True)
        assert torch.equal(other.state[twins[0]]["exp_avg"], codes)
        assert torch.equal(other.state[twins[0]]["exp_avg.scale"], scale)
    run(other, twins, range(4, 6))


def test_bits_of_a_basis_and_of_an_error():
    optimizer, ps = trained(GaLoreAdamW, rank=5, basis_bits=4, residual="error_feedback",
                            error_feedback_bits=8)
    other, twins, rows = moved(optimizer.state_dict(), ps, GaLoreAdamW, rank=5,
                               residual="error_feedback", error_feedback_bits=32)
    assert {state for state, _ in rows.values()} == {"kept"}
    for p, q, side in ((ps[0], twins[0], "right"), (ps[1], twins[1], "left")):
        a = wide(optimizer, p, f"basis_{side}")
        torch.testing.assert_close(other.state[q][f"basis_{side}"], a)
        error = wide(optimizer, p, "error")
        torch.testing.assert_close(other.state[q]["error"], error)


def test_a_smaller_rank_keeps_the_leading_columns():
    optimizer, ps = trained(GaLoreAdamW, rank=8, projection="svd")
    other, twins, rows = moved(optimizer.state_dict(), ps, GaLoreAdamW, rank=3, projection="svd")
    assert rows["p0"] == ("kept", "leading 3 columns")
    for p, q, side, cut in ((ps[0], twins[0], "right", (slice(None), slice(3))),
                            (ps[1], twins[1], "left", (slice(3), slice(None)))):
        assert torch.equal(other.state[q][f"basis_{side}"],
                           optimizer.state[p][f"basis_{side}"][:, :3])
        assert torch.equal(other.state[q]["exp_avg"], optimizer.state[p]["exp_avg"][cut])
    run(other, twins, range(4, 8))


@pytest.mark.parametrize(("before", "after", "why"), [
    ({"rank": 3}, {"rank": 8}, "rank 3, now 8"),
    ({"rank": 4}, {"rank": 4, "proj_type": "reverse_std"}, "another side is projected"),
    ({"rank": 4}, {"rank": 4, "projection": "dct"}, "bases by 'subspace', now by 'dct'"),
    ({"rank": 4}, {"rank": 4, "projection": "random"}, "bases by 'subspace', now by 'random'"),
    ({"rank": 4}, {"rank": 4, "inner": "lion"}, "inner rule 'adamw', now 'lion'"),
    ({"rank": 4}, {"rank": None}, "saved by galore, goes on as adamw"),
])
def test_what_cannot_go_on_begins_anew(before, after, why):
    """Step included: zero moments with a late bias correction would take steps three times long."""
    optimizer, ps = trained(GaLoreAdamW, **before)
    warn = pytest.warns(UserWarning, match="no matrix") if after["rank"] is None else None
    if warn:
        with warn:
            other, twins, rows = moved(optimizer.state_dict(), ps, GaLoreAdamW, **after)
    else:
        other, twins, rows = moved(optimizer.state_dict(), ps, GaLoreAdamW, **after)
    assert rows["p0"] == ("restarted", why)
    assert rows["p2"][0] == "kept"
    assert int(other.state[twins[0]]["step"]) == 0
    assert int(other.state[twins[2]]["step"]) == 4
    assert torch.equal(other.state[twins[2]]["exp_avg"], optimizer.state[ps[2]]["exp_avg"])
    size = max(float((p - q).abs().max()) for p, q in zip(ps, twins, strict=True))
    assert size == 0
    run(other, twins, range(4, 5))
    # a first step of Adam, scaled
    assert (ps[0] - twins[0]).abs().max() <= 1e-2 * (1 + 0.01 * ps[0].abs().max())


def test_relatives_share_their_state():
    """GaLore to Fira: the limiter begins at zero, and back: it is dropped."""
    optimizer, ps = trained(GaLoreAdamW, rank=4)
    fira, twins, rows = moved(optimizer.state_dict(), ps, FiraAdamW, rank=4)
    assert rows["p0"] == ("kept", "limiter begins at zero")
    assert torch.equal(fira.state[twins[0]]["exp_avg"], optimizer.state[ps[0]]["exp_avg"])
    run(fira, twins, range(4, 6))
    _, _, rows = moved(fira.state_dict(), twins, GaLoreAdamW, rank=4)
    assert rows["p0"] == ("kept", "without limiter")
    _, _, rows = moved(optimizer.state_dict(), ps, GradNormLoRPAdamW, rank=4)
    assert rows["p0"][0] == "restarted"
    assert "magnitude" in rows["p0"][1]
    _, _, rows = moved(optimizer.state_dict(), ps, DCTAdamW, rank=4)
    assert rows["p0"] == ("restarted", "bases by 'subspace', now by 'dct'")


def test_a_maximum_and_missing_bits():
    optimizer, ps = trained(AdamW)
    other, twins, rows = moved(optimizer.state_dict(), ps, AdamW, amsgrad=True)
    assert rows["p0"][0] == "kept"
    assert torch.equal(other.state[twins[0]]["max_exp_avg_sq"],
                       optimizer.state[ps[0]]["exp_avg_sq"])
    half = [torch.nn.Parameter(p.detach().bfloat16()) for p in ps]
    split = AdamW(named(half), lr=1e-2, master_bits=16)
    split.load_state_dict(convert_state(optimizer.state_dict(), split))
    assert not split.state[half[0]]["master"].any()
    assert int(split.state[half[0]]["step"]) == 4


@pytest.mark.parametrize(("before", "after", "tolerance"), [
    (8, 4, 0.2), (4, 8, 0.01), (None, 8, 0.01), (None, 4, 0.2), (8, None, 1e-6)])
@pytest.mark.parametrize("rank", [6, 3])
def test_codes_of_a_basis_and_of_an_error_are_made_anew(before, after, tolerance, rank):
    """At the same rank and at a smaller one; what they stand for is what it was."""
    optimizer, ps = trained(GaLoreAdamW, rank=6, basis_bits=before, projection="svd",
                            residual="error_feedback", error_feedback_bits=before or 32)
    other, twins, rows = moved(optimizer.state_dict(), ps, GaLoreAdamW, rank=rank,
                               basis_bits=after, projection="svd", residual="error_feedback",
                               error_feedback_bits=after or 32)
    assert {state for state, _ in rows.values()} == {"kept"}
    assert all("scale" not in why for _, why in rows.values())
    for p, q, side in ((ps[0], twins[0], "right"), (ps[1], twins[1], "left")):
        a = wide(optimizer, p, f"basis_{side}").float()[:, :rank]
        b = wide(other, q, f"basis_{side}").float()
        assert (a - b).norm() <= tolerance * a.norm()
        a, b = wide(optimizer, p, "error"), wide(other, q, "error")
        assert a.abs().max() > 0
        assert (a - b).norm() <= tolerance * a.norm()
    run(other, twins, range(4, 6))


def test_a_new_threshold_of_energy_still_refreshes():
    optimizer, ps = trained(GaLoreAdamW, rank=4, update_proj_gap=2)
    other, twins, _ = moved(optimizer.state_dict(), ps, GaLoreAdamW, rank=4, update_proj_gap=2,
                            keep_energy=0.9)
    run(other, twins, range(4, 8))
    assert int(other.state[twins[0]]["basis_step"]) > 4
    assert float(other.state[twins[0]]["basis_energy"]) > 0


@pytest.mark.parametrize(("make", "before", "to", "after", "why"), [
    (PolarGrad, {"polar_first": True}, PolarGrad, {}, "polar_first was True, is False"),
    (GaLoreAdamW, {"rank": 4, "projection": "random"}, APOLLO, {"rank": 4},
     "random bases of another class or seed"),
    (APOLLO, {"rank": 4}, APOLLO, {"rank": 4, "seed": 3}, "random bases of another class or seed"),
    (DCTAdamW, {"rank": 4}, DCTAdamW, {"rank": 4, "dct_basis": 3}, "dct_basis 2, now 3"),
    # their moments have no leading columns
    (DCTAdamW, {"rank": 6}, DCTAdamW, {"rank": 4}, "rank 6, now 4"),
    (APOLLO, {"rank": 6}, APOLLO, {"rank": 4}, "rank 6, now 4"),
    (APOLLO, {"rank": 4}, APOLLO, {"rank": 4, "proj_type": "reverse_std"},
     "another side is projected"),
    (GradNormLoRPAdamW, {"rank": 4}, GradNormLoRPAdamW, {"rank": 4, "axis": "output"},
     "axis was 'input', is 'output'"),
])
def test_what_has_another_meaning_begins_anew(make, before, to, after, why):
    optimizer, ps = trained(make, **before)
    other, twins, rows = moved(optimizer.state_dict(), ps, to, **after)
    assert rows["p0"] == ("restarted", why)
    assert rows["p2"][0] == "kept"
    run(other, twins, range(4, 6))


def test_bits_of_a_weight_of_another_width_are_kept():
    half = [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters(SHAPES)]
    optimizer = AdamW(named(half), lr=1e-2, master_bits=16)
    run(optimizer, half, range(3))
    exact = optimizer.full_precision(half[0])
    assert optimizer.state[half[0]]["master_low"].any()
    other = AdamW(named(half), lr=1e-2, master_bits=8)
    converted = convert_state(optimizer.state_dict(), other)
    assert converted.rows[0] == ("p0", "kept", "without master_low")
    other.load_state_dict(converted)
    off = (other.full_precision(half[0]) - exact).abs()
    assert off.any()
    assert (off <= 2.0**-15 * exact.abs()).all()
    back = AdamW(named(half), lr=1e-2, master_bits=16)
    converted = convert_state(other.state_dict(), back)
    assert converted.rows[0] == ("p0", "kept", "master_low begins at zero")
    back.load_state_dict(converted)
    assert_same(back.full_precision(half[0]), other.full_precision(half[0]))


def test_numbers_are_those_that_were_saved_if_no_two_are_one():
    """Phases of refreshes and random bits go on, in whatever order parameters are now."""
    ps = parameters(SHAPES[:2])
    old = GaLoreAdamW(named(ps), rank=4)
    run(old, ps, range(2))
    order, saved = named(ps)[::-1], [int(old.state[p]["index"]) for p in ps]
    other = GaLoreAdamW(order, rank=4)
    own = [int(other.state[p]["index"]) for p in ps]
    assert (saved, own) == ([0, 1], [1, 0])
    other.load_state_dict(convert_state(old.state_dict(), other))
    assert [int(other.state[p]["index"]) for p in ps] == saved
    assert [int(other.state[p]["key"]) for p in ps] == [int(old.state[p]["key"]) for p in ps]
    # p1 begins anew, with the number that it has here, which is p0's of the saved state
    other = GaLoreAdamW([{"params": order[:1], "rank": 8}, {"params": order[1:], "rank": 4}])
    converted = convert_state(old.state_dict(), other)
    assert [row[1] for row in converted.rows] == ["restarted", "kept"]
    other.load_state_dict(converted)
    assert [int(other.state[p]["index"]) for p in ps] == own


def test_vectors_in_a_group_of_matrices_are_kept():
    ps = parameters(SHAPES)
    optimizer = GaLoreAdamW([{"params": named(ps), "rank": 4}], lr=1e-2)
    run(optimizer, ps, range(3))
    for make, options in ((FiraAdamW, {"rank": 4}), (AdamW, {}), (Muon, {})):
        _, _, rows = moved(optimizer.state_dict(), ps, make, **options)
        assert rows["p2"][0] == "kept", make


def test_a_converted_state_is_saved_as_plain_values():
    optimizer, ps = trained(GaLoreAdamW, rank=4)
    other = GaLoreAdamW(named(ps), lr=1e-2, rank=4, state_bits=8)
    converted = convert_state(optimizer.state_dict(), other)
    back = torch.load(_file({"optimizer": converted}), weights_only=True)["optimizer"]
    other.load_state_dict(back)
    assert int(other.state[ps[0]]["step"]) == 4


# -------------------------------------------------------------------- other packages


def test_from_torch_adamw_by_name():
    """In another order: the matrices first; AdamW itself then goes on bit for bit."""
    ps = parameters([(24,), (40, 24), (24, 40)])
    theirs = torch.optim.AdamW(ps, lr=1e-2)
    run(theirs, ps, range(4))
    saved = theirs.state_dict()
    order = [ps[1], ps[2], ps[0]]
    ours, twins, rows = moved(saved, order, AdamW, names=["p2", "p0", "p1"])
    assert {state for state, _ in rows.values()} == {"kept"}
    run(theirs, order, range(4, 8))
    run(ours, twins, range(4, 8))
    assert_same(order, twins)
    _, _, rows = moved(saved, order, GaLoreAdamW, names=["p2", "p0", "p1"], rank=4)
    assert rows["p0"] == ("restarted", "saved by adamw, goes on as galore")
    assert rows["p2"][0] == "kept"


def test_from_torch_muon():
    ps = parameters(SHAPES[:2])
    theirs = torch.optim.Muon(ps, lr=1e-2)
    run(theirs, ps, range(3))
    ours, twins, rows = moved(theirs.state_dict(), ps, Muon, names=NAMES[:2], weight_decay=0.1)
    assert {state for state, _ in rows.values()} == {"kept"}
    run(theirs, ps, range(3, 6))
    run(ours, twins, range(3, 6))
    for p, q in zip(ps, twins, strict=True):
        assert (p - q).abs().max() <= 0.02 * 3 * 1e-2


@pytest.mark.parametrize("eight", [True, False])
def test_from_bitsandbytes(eight):
    """Rows of 256: its codes are ours; and the next steps follow its own."""
    bnb = pytest.importorskip("bitsandbytes")
    ps = parameters([(32, 256), (16, 512)])
    theirs = (bnb.optim.AdamW8bit if eight else bnb.optim.AdamW)(ps, lr=1e-2)
    run(theirs, ps, range(4))
    saved = torch.load(_file(theirs.state_dict()), weights_only=True)
    ours, twins, rows = moved(saved, ps, AdamW8bit if eight else AdamW, names=NAMES[:2])
    assert {state for state, _ in rows.values()} == {"kept"}
    for p, q in zip(ps, twins, strict=True):
        entry = theirs.state[p]
        assert int(ours.state[q]["step"]) == 4
        if entry["state1"].dtype == torch.uint8:
            same = ours.state[q]["exp_avg"] == entry["state1"].view_as(ours.state[q]["exp_avg"])
            assert same.double().mean() > 0.99
            torch.testing.assert_close(ours.state[q]["exp_avg.scale"].flatten(),
                                       entry["absmax1"].flatten())
    run(theirs, ps, range(4, 7))
    run(ours, twins, range(4, 7))
    for p, q in zip(ps, twins, strict=True):
        assert (p - q).abs().mean() < 0.05 * 3 * 1e-2


@pytest.mark.parametrize("columns", [512, 384])
def test_codes_of_bitsandbytes(columns):
    """As they are where no block is of two rows; a second moment's zero becomes the least."""
    ps = parameters([(4, columns)])
    entry, books = {"step": 3}, {}
    for i, signed in (("1", True), ("2", False)):
        x = ps[0].detach() if signed else ps[0].detach().square()
        codes, scale = codec.quantize_dynamic(x.reshape(1, -1), 8, signed)
        codes[0, :8] = 0
        books[i] = codebook(8, signed, torch.device("cpu"))
        entry |= {f"state{i}": codes.view(4, columns), f"absmax{i}": scale.flatten(),
                  f"qmap{i}": books[i]}
    saved = {"state": {0: entry}, "param_groups": [{"params": [0]}]}
    ours, twins, rows = moved(saved, ps, AdamW8bit, names=["p0"])
    assert rows["p0"][0] == "kept"
    state = ours.state[twins[0]]
    for i, name, codes in (("1", "exp_avg", entry["state1"]),
                           ("2", "exp_avg_sq", entry["state2"].clamp_min(1))):
        each = entry[f"absmax{i}"].repeat_interleave(256).view(4, columns)
        expected, got = books[i][codes.long()] * each, wide(ours, twins[0], name)
        assert bool((got > 0).all()) == (i == "2")
        if columns == 512:
            assert torch.equal(state[name], codes)
            assert torch.equal(got, expected)
        assert ((got - expected).abs() <= 0.02 * each).all()


def _file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(("module", "cls", "alpha"), [("galore_torch", "GaLoreAdamW", "scale"),
                                                      ("fira", "FiraAdamW", "alpha")])
def test_from_galore_torch_and_fira(module, cls, alpha):
    """The real packages, through a file; then both go on side by side."""
    package = pytest.importorskip(module)
    ps = parameters(SHAPES)
    make = getattr(package, cls)
    groups = [{"params": ps[:2], "rank": 4, "update_proj_gap": 50, alpha: 0.25,
               "proj_type": "std"}, {"params": ps[2:]}]
    theirs = make(groups, lr=1e-2, eps=1e-8, weight_decay=0.0, no_deprecation_warning=True)
    run(theirs, ps, range(4))
    projector = type(theirs.state[ps[0]]["projector"])
    with torch.serialization.safe_globals([projector]):
        saved = torch.load(_file(theirs.state_dict()), weights_only=True)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    ours_cls = GaLoreAdamW if module == "galore_torch" else FiraAdamW
    more = {} if module == "galore_torch" else {"residual_scale": "released"}
    ours = ours_cls([{"params": list(zip(NAMES[:2], twins[:2], strict=True)), "rank": 4},
                     {"params": [(NAMES[2], twins[2])], "rank": None}], lr=1e-2, scale=0.25,
                    update_proj_gap=50, projection="svd", refresh="synchronous", weight_decay=0.0,
                    **more)
    converted = convert_state(saved, ours, NAMES)
    assert [row[1] for row in converted.rows] == ["kept"] * 3
    ours.load_state_dict(converted)
    start = [p.detach().clone() for p in ps]
    # at the step after, a column of Fira's residual reaches our cap, which the package has not
    run(theirs, ps, range(4, 7))
    run(ours, twins, range(4, 7))
    for p, q, s in zip(ps, twins, start, strict=True):
        way = (p - s).abs().max()
        assert way > 1e-3
        assert (p - q).abs().max() <= 0.01 * way


# -------------------------------------------------------------------- refusals, format


def test_refusals():
    optimizer, ps = trained(AdamW)
    with pytest.raises(TypeError, match=r"optimizer is a Adam, but it must be one of lissom"):
        convert_state(optimizer.state_dict(), torch.optim.Adam(ps))
    with pytest.raises(ValueError, match="no 'state' in this dict, so it is no optimizer's state"):
        convert_state({"model": 1}, optimizer)
    theirs = torch.optim.AdamW(ps)
    run(theirs, ps, range(1))
    with pytest.raises(ValueError, match="the saved state has no names, so names= must give"):
        convert_state(theirs.state_dict(), optimizer)
    with pytest.raises(ValueError, match="names has 1 entries, but 3 parameters are saved"):
        convert_state(theirs.state_dict(), optimizer, ["p0"])
    with pytest.raises(ValueError, match="names are not unique"):
        convert_state(theirs.state_dict(), optimizer, ["p0", "p0", "p1"])
    plain = AdamW(ps[:2])
    with pytest.raises(ValueError, match="3 parameters saved, but this optimizer has 2"):
        convert_state(theirs.state_dict(), plain)
    sgd = torch.optim.SGD(ps, momentum=0.9)
    run(sgd, ps, range(1))
    odd = torch.optim.Adagrad(ps)
    run(odd, ps, range(1))
    with pytest.raises(ValueError, match=r"'p0': saved state has \['step', 'sum'\]"):
        convert_state(odd.state_dict(), optimizer, NAMES)
    odd = torch.optim.Adamax(ps)
    run(odd, ps, range(1))
    with pytest.raises(ValueError, match=r"'p0': saved state has \['exp_avg', 'exp_inf', 'step'\]"):
        convert_state(odd.state_dict(), optimizer, NAMES)


def test_entries_that_are_none_are_refused_by_name():
    optimizer, ps = trained(AdamW)
    other = AdamW([("model." + name, p) for name, p in named(ps)])
    with pytest.raises(ValueError, match=r"no name of the saved state is .*: 'p0' is saved"):
        convert_state(optimizer.state_dict(), other)
    broken = optimizer.state_dict()
    broken["state"] = {**broken["state"], 0: 5}
    with pytest.raises(ValueError, match="'p0': saved state is a int, but it must be a dictionary"):
        convert_state(broken, optimizer)
    broken["state"][0] = {"step": 1, "state1": torch.zeros(40, 24)}
    with pytest.raises(ValueError, match=r"'p0': state2 saved as None, expected \(40, 24\)"):
        convert_state(broken, optimizer)
    sgd = torch.optim.SGD(ps, momentum=0.9)
    run(sgd, ps, range(1))
    with pytest.raises(ValueError, match=r"saved state has \['momentum_buffer'\]"):
        convert_state(sgd.state_dict(), Muon(named(ps)), NAMES)


@pytest.mark.parametrize(("name", "value"), [
    ("index", torch.tensor(float("inf"))), ("index", {}), ("index", -1), ("key", "x"),
    ("key", torch.zeros(2)), ("key", True), ("step", None), ("step", "x"), ("step", 2.5),
    ("step", torch.tensor(1, device="meta"))], ids=str)
def test_counts_that_are_none_are_refused_by_name(name, value):
    optimizer, _ = trained(AdamW)
    broken = optimizer.state_dict()
    broken["state"][0] = {**broken["state"][0], name: value}
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"'p0': {name}=.*, but it must be an integer >= 0"):
        convert_state(broken, optimizer)
    assert_same(snapshot(optimizer), before)


def test_counts_may_be_numpys():
    optimizer, _ = trained(AdamW)
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "step": np.int64(3), "index": np.int64(0)}
    assert convert_state(saved, optimizer)["state"][0]["step"].item() == 3.0


def test_pairs_go_on_or_begin_anew():
    """Roles say what a parameter's slots are, in its group."""
    def pairs(lr=1e-2, **options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 8))
        lora(model, rank=2)
        return model, SwitchLoRAAdamW(adapter_groups(model), lr=lr, **options)

    model, optimizer = pairs()
    for i in range(3):
        optimizer.zero_grad()
        torch.manual_seed(i)
        model(torch.randn(3, 8)).square().sum().backward()
        optimizer.step()
    saved = optimizer.state_dict()
    for options in ({}, {"state_bits": 16}):
        _, other = pairs(lr=2e-2, **options)
        converted = convert_state(saved, other)
        assert {state for _, state, _ in converted.rows} == {"kept"}
        other.load_state_dict(converted)
        assert all(int(s["step"]) == 3 for s in other.state.values() if "exp_avg" in s)
        if not options:
            assert_same(other.state_dict()["state"], saved["state"])
    plain = AdamW(model.named_parameters())
    rows = {name: state for name, state, _ in convert_state(saved, plain).rows}
    assert rows["0.lora_A"] == "restarted"
    _, other = pairs()
    rows = {name: state for name, state, _ in convert_state(plain.state_dict(), other).rows}
    assert rows["0.lora_A"] == "restarted"


def test_what_is_frozen_now_is_not_forgotten_silently():
    optimizer, ps = trained(AdamW)
    ps[0].requires_grad_(False)
    saved = optimizer.state_dict()
    qs = [torch.nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in ps]
    converted = convert_state(saved, AdamW(named(qs)))
    assert converted.rows[0] == ("p0", "restarted",
                                 "frozen, so without state until it is trained")
    assert sorted(converted["state"]) == [1, 2]


def test_eight_bits_of_galore_torch():
    """Its codes are of the projected moments (made by hand: its class needs CUDA)."""
    optimizer, ps = trained(GaLoreAdamW, shapes=[(64, 48)], rank=8, projection="svd")
    kept = optimizer.state[ps[0]]
    low = {name: codec.quantize_dynamic(kept[name].reshape(1, -1), 8, name == "exp_avg")
           for name in ("exp_avg", "exp_avg_sq")}
    entry = {"step": 4, "projector": SimpleNamespace(
        ortho_matrix=kept["basis_right"].mT.contiguous(), update_proj_gap=200)}
    for name, i in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        codes, scale = low[name]
        entry |= {f"state{i}": codes.view(64, 8), f"absmax{i}": scale.flatten(),
                  f"qmap{i}": codebook(8, i == "1", torch.device("cpu"))}
    saved = {"state": {0: entry}, "param_groups": [{"params": [0], "rank": 8}]}
    other, twins, rows = moved(saved, ps, GaLoreAdamW, names=["p0"], rank=8, projection="svd")
    assert rows["p0"][0] == "kept"
    assert torch.equal(other.state[twins[0]]["basis_right"], kept["basis_right"])
    a, b = kept["exp_avg"], other.state[twins[0]]["exp_avg"]
    assert (a - b).abs().max() <= 0.02 * a.abs().max()


def test_shapes_that_differ_begin_anew_by_name():
    optimizer, _ = trained(AdamW)
    other = parameters([(40, 25), (24, 40), (24,)])
    wider = AdamW(named(other), lr=1e-2)
    rows = convert_state(optimizer.state_dict(), wider).rows
    assert rows[0] == ("p0", "restarted", "exp_avg saved as (40, 24), expected (40, 25)")
    assert rows[1][1] == "kept"


def test_loading_with_other_options_says_so():
    """Saved options go on, as in torch; what they replace is named once, with the remedy."""
    optimizer, ps = trained(GaLoreAdamW, rank=4)
    other = GaLoreAdamW(named(ps), lr=1e-2, rank=8, state_bits=8)
    with pytest.warns(UserWarning, match=r"the saved options go on: state_bits=32 \(group 0: 8\), "
                                         r"rank=4 \(group 0: 8\)\. .*convert_state"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["rank"] == 4
    other = GaLoreAdamW(named(ps), lr=1e-2, rank=4, nonfinite="skip")
    with pytest.warns(UserWarning, match=r"go on: nonfinite='propagate' \(group 0: 'skip'\)\."):
        other.load_state_dict(optimizer.state_dict())
    other = FiraAdamW(named(ps), lr=1e-2, rank=4, limiter=None)
    with pytest.warns(UserWarning, match=r"go on: limiter=1.01 \(group 0: None\)\."):
        other.load_state_dict(trained(FiraAdamW, rank=4)[0].state_dict())
    # schedules change numbers, and logging asks for metrics now and then
    same = GaLoreAdamW(named(ps), lr=2e-2, rank=4, scale=0.5, betas=(0.8, 0.9), metrics=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(optimizer.state_dict())
    fused, ps = trained(Muon, split_sizes=(20, 20), shapes=[(40, 24)])
    with pytest.warns(UserWarning, match=r"split_sizes=\(20, 20\) \(group 0: None\)"):
        Muon(named(ps), lr=1e-2).load_state_dict(fused.state_dict())
    wrong = AdamW(named(parameters([(40, 25), (24, 40), (24,)])))
    with pytest.raises(ValueError, match=r"exp_avg saved as \(40, 24\).*convert_state"):
        wrong.load_state_dict(trained(AdamW)[0].state_dict())


def test_names_are_strings():
    optimizer, _ = trained(AdamW)
    with pytest.raises(TypeError, match=r"names has tuple .*must be a list of strings"):
        convert_state(optimizer.state_dict(), optimizer, named(parameters([(40, 24)])))


@pytest.mark.parametrize(("cls", "other"), [
    (GaLoreAdamW, Muon), (GaLoreAdamW, AdamW), (GaLoreAdamW, APOLLO), (Muon, GaLoreAdamW)])
def test_a_state_of_another_class_is_refused_with_the_remedy(cls, other):
    """Of its groups that get AdamW too."""
    ps = parameters([(40, 24), (24,)])
    a, b = (x([{"params": ps[:1], "rank": 4}, {"params": ps[1:], "algorithm": "adamw"}])
            for x in (cls, other))
    with pytest.raises(ValueError, match=r"saved with .*convert_state"):
        b.load_state_dict(a.state_dict())
    saved = a.state_dict()
    saved["param_groups"] = [{**g, "algorithm": "adamw"} for g in saved["param_groups"]]
    with pytest.raises(ValueError, match=r"which is no option of \w+, but of another class.*conv"):
        b.load_state_dict(saved)


def test_keys_of_ones_own_in_groups_are_saved_and_loaded():
    """As in torch, also where the other optimizer has none."""
    for cls in (AdamW, GaLoreAdamW):
        optimizer, ps = trained(cls, **({"rank": 4} if cls is GaLoreAdamW else {}))
        own = {"tag": "body", "roles": 1, "momentum": 0.5, "depth": None}
        optimizer.param_groups[0] |= {k: x for k, x in own.items() if k not in cls.table()}
        run(optimizer, ps, range(4, 5))
        other = cls(named([torch.nn.Parameter(p.detach().clone()) for p in ps]),
                    **({"rank": 4} if cls is GaLoreAdamW else {}))
        other.load_state_dict(optimizer.state_dict())
        assert own.items() <= other.param_groups[0].items()
    theirs = torch.optim.AdamW(ps)
    theirs.param_groups[0]["tag"] = "body"
    run(theirs, ps, range(2))
    other = AdamW(ps)
    other.load_state_dict(theirs.state_dict())
    assert other.param_groups[0]["tag"] == "body"
    with pytest.raises(ValueError, match="unknown option 'momentum_decay'"):
        other.load_state_dict(torch.optim.NAdam(ps).state_dict())


def test_an_older_format_is_upgraded(monkeypatch):
    """By one function for each version; a newer one is refused."""
    optimizer, ps = trained(AdamW)
    old = optimizer.state_dict()
    for group in old["param_groups"]:
        group["format"] = 0
        group["decay"] = group.pop("weight_decay")

    def upgrade(saved):
        groups = [{**{k: v for k, v in g.items() if k != "decay"}, "weight_decay": g["decay"],
                   "format": 1} for g in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    monkeypatch.setitem(loading.UPGRADES, 0, upgrade)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    other = AdamW(named(twins), lr=1e-2)
    other.load_state_dict(old)
    run(optimizer, ps, range(4, 6))
    run(other, twins, range(4, 6))
    assert_same(ps, twins)
    newer = optimizer.state_dict()
    for group in newer["param_groups"]:
        group["format"] = 2
    with pytest.raises(ValueError, match="format=2, but this version of lissom reads format 1"):
        other.load_state_dict(newer)


#: GaLoreAdamW(rank=1, state_bits=8), two steps on a 2 x 3 matrix and a vector, saved by 0.1.0.
FORMAT_1 = {
    "weights": [[[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]], [1.0, -2.0]],
    "gradient": [[[0.1, 0.2, -0.3], [0.3, -0.1, 0.2]], [0.5, -0.25]],
}


def test_a_state_of_format_1_goes_on_as_recorded(tmp_path):
    """Options and slots as they were written when the format was fixed."""
    ps = [torch.nn.Parameter(torch.tensor(w)) for w in FORMAT_1["weights"]]
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "maximize": False,
             "amsgrad": False, "state_bits": 32, "rounding": None, "master_bits": None,
             "nonfinite": "propagate", "seed": 0, "algorithm": "galore", "rank": 1,
             "update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "projection": "svd",
             "inner": "adamw", "moments": "keep", "residual": "none", "refresh": "staggered",
             "matricize": "flatten", "basis_bits": None, "keep_energy": None,
             "error_feedback_bits": None, "limiter": 1.01, "residual_scale": "paper",
             "dct_basis": 2, "column_norm": 1, "similarity": "auto", "format": 1,
             "skipped_steps": 0, "params": [0, 1]}
    state = {0: {"step": torch.tensor(2.0), "index": torch.tensor(0), "basis_step":
                 torch.tensor(1.0), "exp_avg": torch.tensor([[0.1, -0.2, 0.3]]),
                 "exp_avg_sq": torch.tensor([[0.01, 0.04, 0.09]]),
                 "basis_left": torch.tensor([[0.6], [0.8]])},
             1: {"step": torch.tensor(2.0), "index": torch.tensor(2**31),
                 "exp_avg": torch.tensor([0.1, -0.1]), "exp_avg_sq": torch.tensor([0.01, 0.01])}}
    torch.save({"state": state, "param_groups": [group]}, tmp_path / "old.pt")
    optimizer = GaLoreAdamW(ps, rank=1)
    optimizer.load_state_dict(torch.load(tmp_path / "old.pt", weights_only=True))
    for p, g in zip(ps, FORMAT_1["gradient"], strict=True):
        p.grad = torch.tensor(g)
    optimizer.step()
    # by hand: R = P^T G, t = 3, P N lifted, times 0.25 * 0.1
    basis = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    low = basis.mT @ torch.tensor(FORMAT_1["gradient"][0], dtype=torch.float64)
    m = 0.9 * torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64) + 0.1 * low
    v = 0.999 * torch.tensor([[0.01, 0.04, 0.09]], dtype=torch.float64) + 0.001 * low**2
    n = m / (1 - 0.9**3) / ((v / (1 - 0.999**3)).sqrt() + 1e-8)
    expected = torch.tensor(FORMAT_1["weights"][0], dtype=torch.float64) - 0.025 * basis @ n
    torch.testing.assert_close(ps[0].detach().double(), expected, rtol=0, atol=1e-6)


def test_options_of_the_same_name_need_not_have_one_range():
    old, ps = trained(PolarGrad, momentum=None)
    _, _, rows = moved(old.state_dict(), ps, Muon)
    assert rows["p0"] == ("restarted", "saved by another rule, goes on as muon")
    assert rows["p2"][0] == "kept"


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_parameters_in_another_order_begin_anew(bits, amsgrad):
    ps = parameters([(6, 6), (5,)])
    old = AdamW(ps, state_bits=bits)
    run(old, ps, range(2))
    optimizer = AdamW(ps[::-1], state_bits=bits, amsgrad=amsgrad)
    rows = convert_state(old.state_dict(), optimizer).rows
    assert [row[1] for row in rows] == ["restarted"] * 2
    assert all("shape" in why or "saved as" in why for _, _, why in rows)
    muon = Muon(ps, lr_adamw=None)
    run(muon, ps, range(2))
    rows = convert_state(muon.state_dict(), Muon(ps[::-1], amsgrad=True, lr_adamw=None)).rows
    assert [row[1] for row in rows] == ["restarted"] * 2
