"""Whole matrices among ranks: who computes what, and what is sent while others compute."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lissom.bench.llama import Llama
from lissom.bench.shapes import LLAMA
from lissom.optim import Muon, owners, param_groups, sharding
from lissom.optim.batches import Work, windows
from lissom.optim.sharding import Rows


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_work_is_shared_out_evenly(costs, ranks):
    rounds = owners.by_owner(costs, ranks)
    assert len(rounds) <= 2
    assert all(len(owned) == ranks and any(owned) for owned in rounds)
    assert sorted(i for owned in rounds for mine in owned for i in mine) == [*range(len(costs))]
    load = [sum(costs[i] for owned in rounds for i in owned[rank]) for rank in range(ranks)]
    # Longest first: whoever is busiest got the last piece when nobody had less to do.
    busiest = load.index(max(load))
    last = min((costs[i] for owned in rounds for i in owned[busiest]), default=0)
    assert max(load) - last <= min(load)


@pytest.mark.parametrize(("ranks", "most"), [(8, 1.2), (64, 1.5)])
def test_no_rank_of_a_large_model_waits_long_for_another(monkeypatch, ranks, most):
    """The busiest rank of each exchange against the mean, with the memory of one large matrix."""
    with torch.device("meta"):
        model = Llama(LLAMA["llama-7b"])
    optimizer = Muon(param_groups(model))
    monkeypatch.setattr(sharding, "share", lambda p, rows: math.ceil(len(p) / ranks) * math.prod(
        p.shape[1:]))
    work = [Work(name, p, p, o) for name, p, o in optimizer._named()]
    busiest = total = 0
    for window in windows(optimizer, work):
        window = [w for batch in window for w in batch]
        if not optimizer.own_rule(window[0].p, window[0].o):
            assert len(window) == 1
            continue
        assert sum(sharding.share(w.p, None) for w in window) <= 4096 * 11008
        costs = [w.p.numel() * min(w.p.shape) for w in window]
        rounds = owners.by_owner(costs, ranks)
        assert max(sum(window[i].p.numel() for owned in rounds for i in owned[rank])
                   for rank in range(ranks)) <= 1.2 * 4096 * 11008
        busiest += max(sum(costs[i] for owned in rounds for i in owned[rank])
                       for rank in range(ranks))
        total += sum(costs)
    assert busiest * ranks <= most * total


def test_all_ranks_reckon_with_one_share():
    """Of uneven shards, or they would not update the same matrices at once."""
    p = torch.empty(7, 5)
    rows = [Rows(3 * rank, 7, (3, 3, 1), rank, None) for rank in range(3)]  # type: ignore[arg-type]
    assert [sharding.share(p, x) for x in rows] == [15] * 3
    assert sharding.share(p, None) == 35


class Network:
    """One rank that is its own peer, and notes what happens when."""

    def __init__(self, monkeypatch) -> None:
        self.events: list[str] = []
        self.rows = Rows(0, 3, (3,), 0, None)  # type: ignore[arg-type]
        monkeypatch.setattr(torch.distributed, "all_to_all_single", self.all_to_all_single)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **given: None)

    def all_to_all_single(self, got, sent, sizes, gone, group, async_op):
        assert (sum(sizes), sum(gone)) == (len(got), len(sent))
        self.events.append("send")
        events = self.events

        class Handle:
            def wait(self):
                got.copy_(sent)
                events.append("wait")

        got.fill_(255)  # nothing may be read before it has arrived
        return Handle()


def test_an_owner_computes_while_the_rest_is_sent(monkeypatch):
    network = Network(monkeypatch)
    parts = [torch.full((3, 2), float(i)) for i in range(4)]

    def compute(numbers, matrices):
        network.events.append("compute")
        return [10 * x + i for i, x in zip(numbers, matrices, strict=True)]

    out = owners.exchanged(parts, [network.rows] * 4, compute)
    assert network.events == ["send", "send", "wait", "compute", "send", "wait", "compute", "send",
                              "wait", "wait"]
    assert [x.unique().tolist() for x in out] == [[0.0], [11.0], [22.0], [33.0]]


@pytest.mark.parametrize("where", ["compute", "whole"])
def test_a_failure_leaves_nobody_waiting(monkeypatch, where):
    """Whoever fails gives back what it got, computes no more, and raises after all are told.

    A rank without memory fails as it puts matrices together, and then can allocate nothing.
    """
    network = Network(monkeypatch)

    def compute(numbers, matrices):
        network.events.append("compute")
        raise MemoryError("of this rank")

    def whole(self):
        for name in ("cat", "empty"):
            monkeypatch.setattr(torch, name, None)
        compute(None, None)

    if where == "whole":
        monkeypatch.setattr(owners._Round, "whole", whole)
    with pytest.raises(MemoryError, match="of this rank"):
        owners.exchanged([torch.ones(3, 2)] * 4, [network.rows] * 4, compute)
    assert network.events.count("send") == network.events.count("wait") == 4
    assert network.events.count("compute") == 1


def test_a_failure_of_another_rank_is_an_error_here(monkeypatch):
    """What it gives back is what it got, which is no result."""
    network = Network(monkeypatch)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, *args, **given: x.fill_(1))
    with pytest.raises(RuntimeError, match="failed on another rank"):
        owners.exchanged([torch.ones(3, 2)] * 4, [network.rows] * 4,
                         lambda numbers, matrices: matrices)


def test_results_may_have_another_layout_and_dtype(monkeypatch):
    network = Network(monkeypatch)
    parts = [torch.rand(3, 4).bfloat16() for _ in range(3)]
    out = owners.exchanged(parts, [network.rows] * 3, lambda numbers, matrices: [
        (2 * x.double()).mT.contiguous().mT for x in matrices])
    torch.testing.assert_close(out, [2 * x for x in parts], rtol=0, atol=0)


def test_dtypes_of_one_message_need_not_agree(monkeypatch):
    """An odd number of bytes before a matrix whose elements are longer."""
    network = Network(monkeypatch)
    parts = [torch.rand(3, 5).mul(9).to(kind) for kind in (torch.int8, torch.float64) * 2]
    out = owners.exchanged(parts, [network.rows] * 4, lambda numbers, matrices: matrices)
    torch.testing.assert_close(out, parts, rtol=0, atol=0)
