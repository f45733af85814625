"""Steps in torch's FakeTensorMode, in which tools estimate memory without using any."""

from __future__ import annotations

import pytest
import torch
from lissom.bench.livebytes import LiveBytes
from lissom.kernels import adam, dynamic
from lissom.optim import AdamW, DCTAdamW, GaLoreAdamW, dct, param_groups
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from .cases import CASES, QUICK, all_slow_but, first_of_each_class
from .helpers import feed, tensors

SHAPES = [(40, 24), (24, 40), (24, 24), (40,), (), (4, 3, 2)]


@pytest.fixture
def fresh_tables():
    """No table from before, and none of this test left."""
    tables = (dynamic.codebook, dynamic.lines, dynamic._carries, dynamic._twos, adam._tables,
              dct.rows, dct._twiddles, dct._packing)
    for table in tables:
        table.cache_clear()
    yield
    for table in tables:
        table.cache_clear()


def stepped(case, dtype, steps=3):
    """An optimizer after some steps, its parameters, and the most bytes that a step held."""
    params = case.parameters(SHAPES, 1, dtype)
    optimizer, most = case(params), []
    for i in range(steps):
        feed(params, i)
        with LiveBytes() as live:
            optimizer.step()
        most.append(live.peak)
    return optimizer, params, most


@pytest.mark.parametrize("case", all_slow_but(QUICK, CASES), ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("quantize_all", "fresh_tables")
def test_a_step_of_fakes_allocates_what_a_real_one_does(case, dtype):
    """And leaves nothing fake behind for later steps, such as a table."""
    with FakeTensorMode():
        fakes, of_fakes, most = stepped(case, dtype)
    optimizer, params, real = stepped(case, dtype)
    for p, q in zip(of_fakes, params, strict=True):
        assert isinstance(p, FakeTensor)
        assert fakes.state[p].keys() == optimizer.state[q].keys()
        for name, x in fakes.state[p].items():
            y = optimizer.state[q][name]
            assert isinstance(x, FakeTensor)
            assert not isinstance(y, FakeTensor)
            assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device), name
    # A fake is not asked whether its numbers allow to spare a copy.
    room = 2 * 960 * 4
    assert 0.7 * real[-1] <= most[-1] <= 1.3 * real[-1] + room


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"nonfinite": "raise"},
                                     {"metrics": True}, {"capturable": True}, {"master_bits": 8}],
                         ids=str)
def test_options_that_ask_for_numbers(options):
    """They ask fakes for none."""
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.ones(24, 16, dtype=torch.bfloat16)) for _ in range(2)]
        for optimizer in (AdamW(params[:1], **options), DCTAdamW(params[1:], rank=4, **options)):
            for _ in range(2):
                for p in params:
                    p.grad = torch.ones_like(p)
                optimizer.step()
            steps = [int(optimizer.state[g["params"][0]]["step"]) for g in optimizer.param_groups]
            assert steps == [2] or options.get("capturable")
            assert len(optimizer.plan()) > 0


def test_torchs_memory_tracker_counts_the_state():
    """In bytes: weights, and of the optimizer what a real one has."""
    def model():
        return torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(),
                                   torch.nn.Linear(256, 64))

    def trained(model, optimizer):
        model(torch.zeros(4, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with FakeTensorMode():
        fake = model()
        optimizer = GaLoreAdamW(param_groups(fake, rank=16))
        tracker = MemTracker()
        tracker.track_external(fake, optimizer)
        with tracker:
            trained(fake, optimizer)
        found = tracker.get_tracker_snapshot("current")[torch.device("cpu")]
    real = model()
    optimizer = GaLoreAdamW(param_groups(real, rank=16))
    trained(real, optimizer)
    state = sum(x.nbytes for s in optimizer.state.values() for x in s.values())
    assert found[_MemRefType.PARAM] == sum(p.nbytes for p in real.parameters())
    # Storages of one number are rounded up by torch.
    assert state <= found[_MemRefType.OPT] <= 1.01 * state


@pytest.fixture
def four_ranks():
    """A process group of four, of which three exist in name only."""
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", [x for x in first_of_each_class() if not x.roles],
                         ids=lambda c: c.name)
def test_one_rank_of_four_under_fsdp2(case, four_ranks):
    """Its state has the shapes that it has on one rank, and a quarter of the rows is here."""
    def trained(optimizer, params):
        for i in range(2):
            for p, g in zip(params, tensors(shapes, i), strict=True):
                sharded = isinstance(p, DTensor)
                p.grad = distribute_tensor(g, four_ranks, [Shard(0)]) if sharded else g
            optimizer.step()
        return optimizer

    shapes = [(40, 24), (24, 44), (40,)]
    with FakeTensorMode():
        model = torch.nn.Module()
        for i, x in enumerate(tensors(shapes, 9)):
            model.register_parameter(f"p{i}", torch.nn.Parameter(x))
        fully_shard(model, mesh=four_ranks)
        fakes = [*model.parameters()]
        of_fakes = trained(case(fakes), fakes)
    params = [torch.nn.Parameter(x) for x in tensors(shapes, 9)]
    optimizer = trained(case(params), params)
    for p, q in zip(fakes, params, strict=True):
        assert 4 * len(p.to_local()) == len(p)
        assert of_fakes.state[p].keys() == optimizer.state[q].keys()
        for name, x in of_fakes.state[p].items():
            y = optimizer.state[q][name]
            assert (x.shape, x.dtype) == (y.shape, y.dtype), name
            if isinstance(x, DTensor):
                assert isinstance(x.to_local(), FakeTensor)
                assert 4 * x.to_local().nbytes == y.nbytes
    assert any(isinstance(x, DTensor) for s in of_fakes.state.values() for x in s.values())
