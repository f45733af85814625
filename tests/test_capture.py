"""Steps in CUDA graphs: on the CPU a list of operations that is replayed, on a GPU a graph."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from lissom.kernels import _triton, adam, narrow, philox
from lissom.kernels.lift import lift
from lissom.optim import (
    APOLLO,
    FRUGAL,
    AdamW,
    AdamW8bit,
    DCTAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    Muon,
    PolarGrad,
    SwitchLoRAAdamW,
    Trion,
    convert_state,
    dct,
    norms,
    polar_polynomial,
    update_in_backward,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .helpers import assert_same, feed, parameters, tensors

SHAPES = [(12, 70), (70, 12), (9,), (3, 4, 5)]


@pytest.fixture(autouse=True)
def wide_products(monkeypatch):
    """On any CPU: one with instructions for bf16 would round what plain steps lift to bf16, as a
    kernel and a captured step, whose factor is a tensor, do not.
    """
    monkeypatch.setattr(narrow, "_FAST", [])


CHOICES = {
    "adamw": (AdamW, {}),
    "amsgrad": (AdamW, {"amsgrad": True, "maximize": True}),
    "16 bits": (AdamW, {"state_bits": 16}),
    "8 bits": (AdamW8bit, {}),
    "4 bits": (AdamW, {"state_bits": 4}),
    "split": (AdamW, {"master_bits": 8}),
    "muon": (Muon, {"polar_dtype": "float32"}),
    "muon, fused matrices": (Muon, {"split_sizes": (3, 9), "polar_dtype": "float32"}),
    "muon, 16 bits": (Muon, {"state_bits": 16, "matricize": "batch", "polar_dtype": "float32"}),
    "trion": (Trion, {"rank": 4, "polar_dtype": "float32", "lr_adamw": None}),
    "trion, 16 bits": (Trion, {"rank": 4, "state_bits": 16, "master_bits": 8, "matricize": "batch",
                               "similarity": "matmul", "polar_dtype": "float32"}),
    "dct-adamw": (DCTAdamW, {"rank": 4}),
    "dct-adamw, 8 bits": (DCTAdamW, {"rank": 4, "state_bits": 8, "error_feedback_bits": 8,
                                     "proj_type": "full"}),
    "dct-adamw, 16 bits": (DCTAdamW, {"rank": 4, "state_bits": 16, "master_bits": 16,
                                      "matricize": "batch", "similarity": "matmul"}),
    "fira": (FiraAdamW, {"rank": 4, "projection": "dct", "update_proj_gap": 1}),
    "apollo": (APOLLO, {"rank": 4, "projection": "dct", "update_proj_gap": 1}),
    "frugal": (FRUGAL, {"rank": 4, "projection": "dct", "update_proj_gap": 1, "moments": "keep"}),
    "lion": (GaLoreAdamW, {"rank": 4, "projection": "dct", "update_proj_gap": 1, "inner": "lion"}),
    "polargrad": (PolarGrad, {"polar": "polar-express", "polar_steps": 5, "lr_adamw": None,
                              "polar_dtype": "float32"}),
}


class Graph(TorchDispatchMode):
    """What a CUDA graph is: operations on the memory that they had, numbers as they were.

    Args:
        host: tensors of the host, which may be read while it is recorded.
    """

    recording = False

    def __init__(self, host):
        super().__init__()
        self.calls = []
        self.host = {x.data_ptr() for x in host}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            assert args[0].data_ptr() in self.host, "a number of the device is read"
        # Results of unknown size: on a GPU the host waits for it.
        assert not any(x in str(func) for x in ("nonzero", "masked_select", "unique"))
        assert "aten.index" not in str(func) or not any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args))
        # torch.tensor(number, device=...): a copy from the host, which CUDA refuses to record
        assert func is not torch.ops.aten.lift_fresh.default
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("aten", "lissom"):  # not the profiler's marks
            self.calls.append((func, args, kwargs or {}, out))
        return out

    def __enter__(self):
        Graph.recording = True
        return super().__enter__()

    def __exit__(self, *error):
        Graph.recording = False
        return super().__exit__(*error)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            memory = {place(x) for x in tree_leaves(args)}
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                # neither a view of what it was given, nor that itself
                if isinstance(old, torch.Tensor) and place(old) not in memory:
                    old.copy_(new)


def place(x):
    return x.untyped_storage().data_ptr() if isinstance(x, torch.Tensor) else None


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Without the shortcuts that look at numbers on the host; small moments are quantized."""
    for module in (norms, polar_polynomial):
        monkeypatch.setattr(module, "norms", lambda x, side: torch.linalg.vector_norm(
            x, dim=norms.ALONG[side], keepdim=True, dtype=torch.float64))
    monkeypatch.setattr(philox, "_bounded", lambda x, largest: False)
    monkeypatch.setattr("lissom.optim.codec.SMALL", 1)


def shapes_of(options):
    """With a split of rows all matrices have as many."""
    return [(12, 70), (12, 5), (9,)] if "split_sizes" in options else SHAPES


def rates(optimizer, lr):
    """AdamW's part of Muon has a rate of its own, which stays."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        elif not optimizer.defaults.get("capturable") and group["lr"] != 3e-4:
            group["lr"] = lr


@pytest.mark.skipif(not _triton.INTERPRETED, reason="needs triton's interpreter")
@pytest.mark.parametrize("choice", ["amsgrad", "split", "muon", "trion", "dct-adamw",
                                    "dct-adamw, 8 bits", "fira"])
def test_replayed_steps_through_kernels(choice, monkeypatch):
    """Of which none is launched first while a step is recorded: compiling it then would fail."""
    launched = {False: set(), True: set()}

    def launch(kernel, programs, device, *args, **constants):
        kinds = [(x.dtype, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else type(x)
                 for x in args]
        launched[Graph.recording].add((kernel, *kinds, *constants.values()))
        inner(kernel, programs, device, *args, **constants)

    inner = _triton.launch
    for name, module in list(sys.modules.items()):
        if name.startswith("lissom.") and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda backend, device: backend != "torch")
        if name.startswith("lissom.") and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", launch)
    dct._twiddles.cache_clear()
    dct.rows.cache_clear()
    test_replayed_steps_are_steps(choice, torch.bfloat16)
    assert launched[True]
    assert launched[True] <= launched[False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", CHOICES)
def test_replayed_steps_are_steps(choice, dtype):
    """With other gradients, rates, counts and random bits than those that were recorded."""
    make, options = CHOICES[choice]
    ps, twins = (parameters(shapes_of(options), dtype=dtype) for _ in range(2))
    captured = make(ps, lr=torch.tensor(1e-2), capturable=True, **options)
    plain = make(twins, lr=1e-2, **options)
    for i in range(2):  # new bases of moments come with the second
        for params, optimizer in ((ps, captured), (twins, plain)):
            feed(params, i)
            optimizer.step()
    host = [s[k] for s in captured.state.values() for k in ("index", "key", "basis_step") if k in s]
    graph = Graph(host)
    with torch.no_grad():
        for p, g in zip(ps, tensors([p.shape for p in ps], 2), strict=True):
            p.grad.copy_(g)
    feed(twins, 2)
    with graph:
        captured.step()
    plain.step()
    for i in range(3, 7):
        rates(captured, 1e-2 / i)
        rates(plain, 1e-2 / i)
        feed(twins, i)
        with torch.no_grad():
            for p, q in zip(ps, twins, strict=True):
                p.grad.copy_(q.grad)
        graph.replay()
        plain.step()
    apart = total = 0
    for p, q in zip(ps, twins, strict=True):
        assert captured.state[p]["step"] == plain.state[q]["step"] == 7
        # a rate in fp32 moves a weight by a rounding, a bf16 one by a unit where it falls so
        unit = 2**-7 if dtype == torch.bfloat16 else 2**-20
        off = (p.detach().double() - q.detach().double()).abs()
        assert (off <= unit * q.detach().abs().double().clamp(min=1e-2)).all()
        apart, total = apart + int((off > 0).sum()), total + off.numel()
        for name, x in captured.state[p].items():
            if name == "basis_step":  # which is on the host: of the first step
                assert (x, plain.state[q][name]) == (1, 7)
            elif x.dtype not in (torch.uint8, torch.int8):
                torch.testing.assert_close(x, plain.state[q][name], rtol=2**-6, atol=1e-6)
    assert dtype == torch.float32 or apart <= 0.01 * total


def test_what_is_not_a_tensor_is_frozen():
    """A rate that is a number stays what it was when the graph was recorded, as in torch."""
    (p,), (q,) = parameters([(6, 5)]), parameters([(6, 5)])
    captured, plain = AdamW([p], lr=1e-2, capturable=True), AdamW([q], lr=1e-2)
    for params, optimizer in (([p], captured), ([q], plain)):
        feed(params, 0)
        optimizer.step()
    with Graph([captured.state[p]["key"]]) as graph:
        captured.step()
    plain.step()
    captured.param_groups[0]["lr"] = 1.0
    graph.replay()
    plain.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_saved_and_resumed():
    ps = parameters(SHAPES)
    optimizer = AdamW(ps, lr=torch.tensor(1e-2), capturable=True)
    feed(ps, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    twins = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    again = AdamW(twins, lr=torch.tensor(0.5), capturable=True)
    held = again.param_groups[0]["lr"]
    again.load_state_dict(saved)
    rate = again.param_groups[0]["lr"]
    assert rate == torch.tensor(1e-2)
    assert rate is not saved["param_groups"][0]["lr"]
    assert rate is held  # a graph, or whoever else has it, goes on with it
    for params, one in ((ps, optimizer), (twins, again)):
        feed(params, 1)
        one.step()
    assert_same(ps, twins)
    # back to the host, and from it: how a step runs is the optimizer's own
    plain = AdamW(twins, lr=0.7)
    plain.load_state_dict(again.state_dict())
    assert plain.param_groups[0]["lr"] == pytest.approx(1e-2)
    assert plain.param_groups[0]["capturable"] is False
    third = AdamW(twins, lr=torch.tensor(0.5), capturable=True)
    third.load_state_dict(plain.state_dict())
    assert third.param_groups[0]["lr"] == torch.tensor(1e-2)
    weights = [p.detach().clone() for p in twins]
    for one in (plain, third):
        for p, w in zip(twins, weights, strict=True):
            p.data.copy_(w)
        feed(ps, 2)
        feed(twins, 2)
        one.step()
        if one is plain:
            optimizer.step()
        assert int(one.state[twins[0]]["step"]) == 3
        torch.testing.assert_close(ps[0], twins[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("make", "options"), [
    (GaLoreAdamW, {}), (DCTAdamW, {"update_proj_gap": 7, "moments": "reset"}), (AdamW, None),
    (GradNormLoRPAdamW, {"projection": "dct"})])
def test_what_was_saved_is_converted(make, options):
    """To an optimizer that could not capture, or from one into one that does."""
    ps, twins = parameters([(12, 9), (5,)]), parameters([(12, 9), (5,)])
    options = {} if options is None else {"rank": 2, **options}
    capturable, plain = DCTAdamW(ps, rank=2, capturable=True), make(twins, **options)
    for params, optimizer in ((ps, capturable), (twins, plain)):
        feed(params, 0)
        optimizer.step()
    for saved, into in ((capturable, plain), (plain, capturable)):
        converted = convert_state(saved.state_dict(), into)
        assert converted.rows[1][1] == "kept"
        into.load_state_dict(converted)
        into.step()
        assert into.param_groups[0]["capturable"] == (into is capturable)


def test_schedulers_move_the_tensors():
    """Each group has one of its own, which stays the same."""
    ps = parameters([(6, 5), (5, 6), (4,)])
    groups = [{"params": [ps[0]]}, {"params": [ps[1]]}]
    optimizer = AdamW(groups, lr=torch.tensor(1e-2), capturable=True)
    held = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda k: 1 / (1 + k), lambda k: 1 / (1 + 3 * k)])
    feed(ps, 0)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == held
    assert [float(x) for x in held] == pytest.approx([5e-3, 2.5e-3])
    optimizer.add_param_group({"params": [ps[2]]})
    assert float(optimizer.param_groups[2]["lr"]) == pytest.approx(1e-2)


def test_rates_of_groups_and_of_the_other_part():
    ps = parameters([(6, 5), (4,)])
    muon = Muon(ps, lr=torch.tensor(1e-2), lr_adamw=torch.tensor(3e-3), capturable=True)
    assert [group["lr"] for group in muon.param_groups] == [torch.tensor(1e-2), torch.tensor(3e-3)]
    muon = Muon(ps, lr=torch.tensor(1e-2), lr_adamw=None, weight_decay_adamw=0.0, capturable=True)
    first, second = (group["lr"] for group in muon.param_groups)
    assert torch.is_tensor(first)
    assert torch.equal(first, second)
    assert first is not second
    optimizer = AdamW([{"params": [ps[0]], "capturable": True}, {"params": [ps[1]]}],
                      lr=torch.tensor(1e-2))
    assert torch.is_tensor(optimizer.param_groups[0]["lr"])
    assert optimizer.param_groups[1]["lr"] == pytest.approx(1e-2)
    feed(ps, 0)
    optimizer.param_groups[0]["lr"] = 0  # an int, as people write it
    before = ps[0].detach().clone()
    optimizer.step()
    assert torch.equal(before, ps[0])


def test_a_copy_has_its_rate_in_a_tensor_of_its_own():
    ps = parameters([(6, 5), (4,)])
    rate = torch.tensor(1e-2)
    copied = copy.deepcopy(AdamW(ps[:1], lr=rate, capturable=True))
    copied.add_param_group({"params": [ps[1]]})
    for group in copied.param_groups:
        assert torch.equal(group["lr"], rate)
        assert group["lr"].data_ptr() != rate.data_ptr()


def test_a_graph_without_capturable_is_refused(monkeypatch):
    ps = parameters([(6, 5), (4,)])
    optimizer = AdamW([{"params": [ps[0]], "capturable": True}, {"params": [ps[1]]}])
    feed(ps, 0)
    before = [p.detach().clone() for p in ps]
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with pytest.raises(RuntimeError, match="group 1 has capturable=False, but it must be True"):
        optimizer.step()
    assert_same(before, [p.detach() for p in ps])
    optimizer.param_groups[1]["capturable"] = True
    optimizer.step()


@pytest.mark.parametrize(("make", "options", "message"), [
    (GaLoreAdamW, {"rank": 2}, "with projection='subspace' the host decides whether a basis"),
    (DCTAdamW, {"rank": 2, "update_proj_gap": 2}, "with update_proj_gap=2 the host decides"),
    (DCTAdamW, {"rank": 2, "keep_energy": 0.9}, r"with keep_energy=0\.9 the host decides"),
    (DCTAdamW, {"rank": 2, "moments": "reset"}, "with moments='reset' steps are counted"),
    (DCTAdamW, {"rank": 2, "inner": "factored"}, "with inner='factored' steps are counted"),
    (FiraAdamW, {"rank": 2, "projection": "dct", "update_proj_gap": 1,
                 "residual_scale": "released"}, "with residual_scale='released' steps are counted"),
    (GradNormLoRPAdamW, {"rank": 2}, "its decay of columns is computed with a rate"),
    (SwitchLoRAAdamW, {}, "which vectors are switched"),
    (AdamW, {"nonfinite": "skip"}, "nonfinite='skip' looks at the gradients"),
    (Muon, {"polar": "svd"}, "polar='svd', but it must be one of 'newton-schulz'"),
    (PolarGrad, {}, "polar='qdwh', but it must be one of"),
    (AdamW, {"lr": torch.tensor([1e-2])}, r"lr is a tensor of shape \(1,\).* must be 0-d"),
    (AdamW, {"lr": torch.tensor(1e-2, dtype=torch.bfloat16)}, r"bfloat16, on cpu, but it must be"),
])
def test_refusals(make, options, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        make(parameters([(6, 5)]), capturable=True, **options)


def test_a_matrix_without_a_basis_is_refused(monkeypatch):
    """Its gradient was zero, so the first columns are still to be looked at."""
    ps = parameters([(12, 9), (9, 12), (5,)])
    optimizer = DCTAdamW([("seen", ps[0]), ("unseen", ps[1]), ("vector", ps[2])], rank=2,
                         capturable=True)
    feed(ps, 0)
    ps[1].grad.zero_()
    optimizer.step()
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    feed(ps, 1)
    before = [p.detach().clone() for p in ps]
    with pytest.raises(RuntimeError, match="step\\(\\): 'unseen' must have a basis, from a step"):
        optimizer.step()
    assert_same(before, [p.detach() for p in ps])
    monkeypatch.undo()
    optimizer.step()
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    optimizer.step()


@pytest.mark.filterwarnings("ignore:GradNormLoRPAdamW has no matrix of its own")
def test_where_nothing_is_projected_nothing_is_refused():
    (p, v), cosines = parameters([(6, 5), (4,)]), {"projection": "dct", "update_proj_gap": 1}
    GaLoreAdamW([{"params": [p], **cosines}, {"params": [v], "algorithm": "adamw"}], rank=2,
                capturable=True)
    GaLoreAdamW([p], rank=2, residual_scale="released", capturable=True, **cosines)
    GradNormLoRPAdamW([{"params": [p], "algorithm": "adamw"}, {"params": [v], "rank": None}],
                      capturable=True)


def test_hooks_are_refused():
    with pytest.raises(ValueError, match="parameter 0' has capturable=True"):
        update_in_backward(AdamW(parameters([(6, 5)]), capturable=True))


# ---- kernels: numbers on the device


def device_of(backend):
    """Where it runs."""
    if backend == "torch" or _triton.INTERPRETED:
        return "cpu"
    if not torch.cuda.is_available() or _triton.triton is None:
        pytest.skip("no device for Triton")
    return "cuda"


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
@pytest.mark.parametrize("bits", [32, 16, 8])
def test_adamw8_reads_rate_and_count(bits, rate, backend):
    device = device_of(backend)
    results = []
    for held in (False, True):
        p, g = (x.to(device) for x in tensors([(5, 300), (5, 300)], 3))
        p = p.bfloat16()
        kind = {32: torch.float32, 16: torch.bfloat16, 8: torch.uint8}[bits]
        m, v = (torch.zeros(5, 300, dtype=kind, device=device) for _ in range(2))
        scales = {}
        if bits == 8:
            m += 127  # the code of zero
            scales = {k: torch.zeros(5, 2, device=device) for k in ("m_scale", "v_scale")}
        t = 70000
        at = rate.to(device) if torch.is_tensor(rate) else rate
        adam.adamw8(p, g, m, v, **scales, bits=bits, lr=at if held else 0.01, weight_decay=0.1,
                     beta1=0.9, beta2=0.999, eps=1e-8,
                     t=torch.tensor(t, device=device) if held else t,
                     key=(1, 2), stochastic=True, backend=backend)
        results.append((p, m, v))
    assert_same(*results)


def test_adamw8_refuses_a_rate_without_a_count():
    p, g, m, v = tensors([(4, 4)] * 4, 0)
    given = {"bits": 32, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    with pytest.raises(ValueError, match="lr: expected a number with a number for t"):
        adam.adamw8(p, g, m, v, lr=torch.tensor(0.1), t=1, **given)
    with pytest.raises(TypeError, match=r"t: expected torch\.int64"):
        adam.adamw8(p, g, m, v, lr=0.1, t=torch.tensor(1.0), **given)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_lift_and_rounding_read_the_count(backend):
    device = device_of(backend)
    d = tensors([(6, 20)], 4)[0].to(device)
    results = []
    for t in (2**32 - 1, torch.tensor(2**32 - 1, device=device)):
        p = torch.ones(6, 20, dtype=torch.bfloat16, device=device)
        lift(p, dense=d, beta=-0.01, key=(3, 4), t=t, backend=backend)
        results.append((p, philox.stochastic_round(d, torch.float16, 5, (3, 4), (t, 1),
                                                   backend=backend)))
    assert_same(*results)
    left, right = (x.to(device, torch.bfloat16) for x in tensors([(6, 3), (3, 20)], 5))
    products = []
    for alpha in (-0.25, torch.tensor(-0.25, device=device)):
        p = torch.ones(6, 20, dtype=torch.bfloat16, device=device)
        lift(p, left, right, alpha=alpha, backend=backend)
        products.append(p)
    assert_same(*products)
    with pytest.raises(TypeError, match=r"alpha: expected torch\.float32, got torch\.float64"):
        lift(p, left, right, alpha=torch.tensor(1.0, dtype=torch.float64, device=device))
    other = torch.ones(6, 20, dtype=torch.bfloat16, device=device)
    lift(other, dense=d, beta=-0.01, key=(3, 4), t=torch.tensor(7, device=device),
         backend=backend)
    assert not torch.equal(other, results[0][0])


# ---- a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("choice", CHOICES)
def test_a_cuda_graph_of_steps(choice):
    make, options = CHOICES[choice]
    shapes = shapes_of(options)
    ps, twins = ([torch.nn.Parameter(p.detach().cuda().bfloat16()) for p in parameters(shapes)]
                 for _ in range(2))
    captured = make(ps, lr=torch.tensor(1e-2, device="cuda"), capturable=True, **options)
    plain = make(twins, lr=1e-2, **options)
    grads = [[g.cuda().bfloat16() for g in tensors(shapes, i)] for i in range(6)]
    for params in (ps, twins):
        for p, g in zip(params, grads[0], strict=True):
            p.grad = g.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()  # recorded, not taken
    for i in range(1, 6):
        rates(captured, 1e-2 / i)
        rates(plain, 1e-2 / i)
        for params in (ps, twins):
            for p, g in zip(params, grads[i], strict=True):
                p.grad.copy_(g)
        graph.replay()
        plain.step()
    for p, q in zip(ps, twins, strict=True):
        assert int(captured.state[p]["step"]) == int(plain.state[q]["step"]) == 8
        off = (p.detach().double() - q.detach().double()).abs()
        assert (off <= 2**-7 * q.detach().abs().double().clamp(min=1e-2)).all()
        assert (off > 0).double().mean() <= 0.02
