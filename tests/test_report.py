"""report() and metrics(): what an optimizer holds, and what its last step did."""

from __future__ import annotations

import copy
import io
import sys

import pytest
import torch
from lissom.optim import (
    APOLLO,
    AdamW,
    FiraAdamW,
    GaLoreAdamW,
    Muon,
    Trion,
    project_in_backward,
    report,
    update_in_backward,
)
from torch.utils._python_dispatch import TorchDispatchMode

from .helpers import assert_same, feed, parameters, run, snapshot, tensors, through_disk

# ---- report


class Terminal(io.StringIO):
    def isatty(self):
        return True


def make(**options):
    ps = parameters([(6, 10), (6, 10), (8, 4), (5,)])
    ps[2].requires_grad_(False)
    return ps, GaLoreAdamW([(f"w{i}", p) for i, p in enumerate(ps)], rank=3, **options)


def test_report_adds_up():
    _, optimizer = make(scale=0.5)
    found = report(optimizer)
    assert found.title == "GaLoreAdamW(rank=3, scale=0.5)"
    assert found.state_bytes == optimizer.plan().state_bytes
    assert found.elements == 60 + 60 + 32 + 5
    first = found.lines[0]
    # left bases 6 x 3, two moments 3 x 10, counters
    assert (first.rule, first.rank, first.side, first.shape) == ("galore", 3, "left", (6, 10))
    assert (first.parameters, first.elements, first.weight_bytes) == (2, 120, 480)
    assert first.state_bytes == 2 * (4 * 18 + 2 * 4 * 30 + 4 + 8 + 8 + 4)
    assert found.lines[1].rule == "adamw"
    assert found.lines[2].state_bytes == 0  # frozen
    assert found.notes == ("1 frozen parameters have no state",)


def test_report_prints(monkeypatch):
    ps, optimizer = make()
    text = str(report(optimizer))
    lines = text.splitlines()
    assert lines[0] == "GaLoreAdamW(rank=3)"
    assert lines[2].split() == ["galore", "3", "left", "6x10", "2", "120", "480", "672", "5.60"]
    assert lines[-2].split()[:3] == ["total", "4", "157"]
    monkeypatch.setattr(sys, "stdout", Terminal())
    shown = str(report(optimizer))
    assert "\x1b[" in shown
    assert "672" in shown
    assert "frozen" in shown
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert str(report(optimizer)) == text
    with pytest.raises(TypeError, match=r"is a SGD, but it must be one of lissom\.optim"):
        report(torch.optim.SGD(ps, lr=0.1))


def test_report_notes():
    ps, optimizer = make(nonfinite="skip")
    feed(ps, 0)
    ps[2].grad = None
    ps[0].grad[0, 0] = torch.nan
    optimizer.step()
    assert "1 steps were skipped for a NaN or Inf" in report(optimizer).notes
    assert report(optimizer).title == "GaLoreAdamW(nonfinite='skip', rank=3)"
    with project_in_backward(optimizer) as handle:
        found = report(optimizer)
        assert any("project_in_backward is attached" in x for x in found.notes)
        assert found.state_bytes == optimizer.plan().state_bytes
        assert handle is not None


def test_report_tells_groups_and_dtypes_apart():
    (a,), (b,), (c,) = (parameters([(8, 6)], dtype=kind) for kind in
                        (torch.float32, torch.float32, torch.bfloat16))
    found = report(GaLoreAdamW([{"params": [a], "rank": 2}, {"params": [b, c], "rank": 4}]))
    assert found.title == "GaLoreAdamW(rank=2 or 4)"
    assert sorted((x.rank, x.parameters, x.weight_bytes) for x in found.lines) == [
        (2, 1, 192), (4, 1, 96), (4, 1, 192)]


# ---- metrics


def test_update_ratio_is_that_of_the_weights():
    for make in (lambda ps: AdamW(ps, lr=1e-2, metrics=True),
                 lambda ps: Muon(ps, lr=1e-2, lr_adamw=None, metrics=True),
                 lambda ps: GaLoreAdamW(ps, rank=3, lr=1e-2, weight_decay=0.5, metrics=True)):
        for dtype in (torch.float32, torch.bfloat16):
            ps = parameters([(6, 10), (6, 10), (5,), (4, 3, 2), ()], dtype=dtype)
            optimizer = make(ps)
            for step in range(3):
                old = [p.detach().double().clone() for p in ps]
                feed(ps, step)
                ps[1].grad = ps[1].grad if step == 0 else None
                optimizer.step()
                (found,) = optimizer.metrics()
                want = torch.stack([(p.double() - q).norm() / q.norm()
                                    for p, q in zip(ps, old, strict=True)])
                got = found["update_ratio"].double()
                assert got.shape == (5,)
                moved = [0, 2, 3, 4]
                assert torch.allclose(got[moved], want[moved].detach(), rtol=1e-5)
                assert got[1] > 0  # of its own last step


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_energy_is_what_the_subspace_captures(proj_type):
    ps = parameters([(6, 10), (5,)])
    optimizer = GaLoreAdamW(ps, rank=3, projection="svd", proj_type=proj_type, update_proj_gap=2,
                            refresh="synchronous", metrics=True)
    bases = {}
    for step in range(4):
        feed(ps, step)
        g = ps[0].grad.double()
        if step % 2 == 0:
            u, values, vh = torch.linalg.svd(g, full_matrices=False)
            bases = {"left": u[:, :3], "right": vh[:3].mT}
        low = bases["left"].mT @ g if proj_type != "right" else g
        low = low @ bases["right"] if proj_type != "left" else low
        optimizer.step()
        (found,) = optimizer.metrics()
        assert found["energy"][0].item() == pytest.approx(
            (low.norm() / g.norm()).item() ** 2, rel=1e-5)
        if step % 2 == 0:
            assert found["energy"][0].item() == pytest.approx(
                (values[:3].square().sum() / values.square().sum()).item(), rel=1e-5)
        assert found["energy"][1].isnan()
        assert found["last_refresh"][0] == (1 if step < 2 else 3)
        assert found["last_refresh"][1].isnan()


def test_energy_of_a_batch_is_its_smallest():
    (p,) = parameters([(2, 6, 4)])
    optimizer = GaLoreAdamW([p], rank=2, projection="svd", matricize="batch", metrics=True)
    feed([p], 0)
    optimizer.step()
    shares = []
    for g in p.grad:
        values = torch.linalg.svdvals(g).square()
        shares.append((values[:2].sum() / values.sum()).item())
    assert optimizer.metrics()[0]["energy"].item() == pytest.approx(min(shares), rel=1e-5)


def test_limiter():
    ps = parameters([(6, 10), (6, 10)])
    optimizer = FiraAdamW(ps, rank=3, metrics=True, betas=(0.0, 0.999))
    last = torch.zeros(2)
    for step, scale in enumerate((1.0, 30.0, 0.1)):
        feed(ps, 3, scale)
        optimizer.step()
        (found,) = optimizer.metrics()
        now = torch.stack([optimizer.state[p]["limiter"].flatten()[0] for p in ps])
        assert torch.equal(found["limiter"], now / (1.01 * last))
        last = now
        if step == 0:
            assert found["limiter"].isinf().all()
        elif step == 1:  # a gradient that has grown: held to 1 % more
            assert torch.allclose(found["limiter"], torch.ones(2), atol=1e-6)
        else:
            assert (found["limiter"] < 0.9).all()
    assert "limiter" not in GaLoreAdamW(ps, rank=3).metrics()[0]


def test_limiter_of_a_batch_is_its_largest():
    (p,) = parameters([(2, 6, 10)])
    optimizer = FiraAdamW([p], rank=3, metrics=True, matricize="batch", betas=(0.0, 0.999))
    feed([p], 3)
    optimizer.step()
    last = optimizer.state[p]["limiter"].clone()
    p.grad *= torch.tensor([30.0, 0.1]).view(2, 1, 1)
    optimizer.step()
    shares = optimizer.state[p]["limiter"] / (1.01 * last)
    assert shares.min() < 0.9
    assert optimizer.metrics()[0]["limiter"].item() == shares.max().item()


def test_skipped_steps_and_groups():
    ps = parameters([(6, 10), (5,), (4,)])
    optimizer = GaLoreAdamW([{"params": ps[:1], "rank": 3, "metrics": True}, {"params": ps[1:]}],
                            nonfinite="skip")
    feed(ps, 0)
    optimizer.step()
    first, second = optimizer.metrics()
    assert first.keys() == {"update_ratio", "energy", "last_refresh", "skipped_steps"}
    assert second.keys() == {"skipped_steps"}
    ps[2].grad[0] = torch.inf
    optimizer.step()
    assert [int(m["skipped_steps"]) for m in optimizer.metrics()] == [1, 1]


def test_measured_in_the_backward_pass():
    def trained(mode):
        ps = parameters([(6, 10), (5,)])
        optimizer = GaLoreAdamW(ps, rank=3, update_proj_gap=3, metrics=True)
        handle = {"project": project_in_backward, "update": update_in_backward}.get(mode)
        if handle:
            handle(optimizer)
        found = []
        for step in range(4):
            gradients = tensors([p.shape for p in ps], step)
            sum((p * g).sum() for p, g in zip(ps, gradients, strict=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(optimizer.metrics())
        return found

    plain = trained("")
    assert_same(trained("update"), plain)
    assert_same(trained("project"), plain)


@pytest.mark.parametrize("cls", [GaLoreAdamW, FiraAdamW, APOLLO, Muon, Trion, AdamW])
def test_measuring_changes_nothing(cls):
    options = {"rank": 3} if "rank" in cls.table() else {}
    twins = []
    for on in (False, True):
        ps = parameters([(6, 10), (8, 8), (5,)], dtype=torch.bfloat16)
        optimizer = cls(ps, metrics=on, **options)
        run(optimizer, ps, range(4))
        optimizer.metrics()
        for group in optimizer.param_groups:
            group["metrics"] = False
        optimizer.state_dict()
        twins.append(snapshot(optimizer))
    assert_same(*twins)


def test_copies_and_checkpoints_start_without_numbers():
    ps = parameters([(6, 10)])
    optimizer = GaLoreAdamW(ps, rank=3, metrics=True)
    run(optimizer, ps, range(2))
    assert "energy" in optimizer.metrics()[0]
    saved = through_disk(optimizer.state_dict())
    assert saved["param_groups"][0]["metrics"] is True
    assert "energy" not in copy.deepcopy(optimizer).metrics()[0]
    optimizer.load_state_dict(saved)
    assert optimizer.metrics()[0].keys() == {"last_refresh", "skipped_steps"}
    for group in saved["param_groups"]:  # of an earlier version
        del group["metrics"]
    twin = GaLoreAdamW(parameters([(6, 10)]), rank=3)
    twin.load_state_dict(saved)
    assert twin.param_groups[0]["metrics"] is False


class Reads(TorchDispatchMode):
    """Storages of which a number is read by Python."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.read.append(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["skip", "raise"])
def test_gradients_are_looked_at_together(mode):
    """Whether one is no number: a GPU is waited for once, not for each parameter."""
    counts = []
    for mode_ in ("propagate", mode):
        ps = parameters([(6, 10)] * 10 + [(0, 3), ()])
        optimizer = AdamW(ps, nonfinite=mode_)
        feed(ps, 0)
        optimizer.step()
        mine = {x.data_ptr() for s in optimizer.state.values() for x in s.values()}
        feed(ps, 1)
        with Reads() as reads:
            optimizer.step()
        counts.append(sum(x not in mine for x in reads.read))
    assert counts[1] - counts[0] == 1  # the answer for all


@pytest.mark.parametrize("cls", [GaLoreAdamW, FiraAdamW, Muon, AdamW])
def test_nothing_is_read_but_counters(cls):
    """What measuring reads are the state's counters, which are on the host."""
    options = {"rank": 3} if "rank" in cls.table() else {}
    counts = []
    for on in (False, True):
        ps = parameters([(6, 10), (5,)])
        optimizer = cls(ps, metrics=on, **options)
        feed(ps, 0)
        optimizer.step()
        counters = {x.data_ptr() for s in optimizer.state.values() for k, x in s.items()
                    if k in ("step", "index", "basis_step")}
        feed(ps, 1)
        with Reads() as reads:
            optimizer.step()
            optimizer.metrics()
        counts.append(sum(x not in counters for x in reads.read))
        assert len(reads.read) > counts[-1]
    assert counts[0] == counts[1]
