"""Linear layers with a pair: their function and gradients, merged again, what cannot get one."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from lissom.optim import adapter_groups, base_weights, lora, merge
from lissom.optim.layers import LoRALinear, NormalizedLinear
from torch import nn

from .helpers import assert_same, tensors, through_disk
from .pairs import batch, net


def test_lora_keeps_the_function_and_merges_back():
    x = batch(0)[0]
    plain = net(rank=None)
    expected = plain(x)
    for options in ({}, {"init": "lora"}, {"normalize": "input"}, {"normalize": "output"},
                    {"alpha": 3.0, "dtype": torch.float32}):
        model = net(**options)
        assert torch.allclose(model(x), expected, rtol=0, atol=2e-6)
        kind = NormalizedLinear if "normalize" in options else LoRALinear
        assert all(type(getattr(model, k)) is kind for k in ("up", "down", "square"))
        assert type(model.lm_head) is nn.Linear
        for v in model.state_dict().values():
            assert type(v) is torch.Tensor
        assert set(plain.state_dict()) <= set(model.state_dict())
        twin = net(**{**options, "seed": 5})
        twin.load_state_dict(through_disk(model.state_dict()))
        assert_same(model(x), twin(x))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05)
        moved = model(x)
        merged = merge(model)
        assert all(type(getattr(merged, k)) is nn.Linear for k in ("up", "down", "square"))
        assert merged.state_dict().keys() == plain.state_dict().keys()
        assert torch.allclose(merged(x), moved, rtol=0, atol=1e-5)


def test_lora_in_autocast_keeps_the_function():
    x, plain = batch(0)[0], net(rank=None)
    with torch.autocast("cpu", torch.bfloat16):
        model = net()
    assert torch.allclose(model(x), plain(x), rtol=0, atol=2e-6)


def test_lora_draws_within_the_papers_bounds():
    model = nn.Sequential(nn.Linear(80, 60), nn.Linear(60, 60))
    before = torch.get_rng_state()
    lora(model, 16)
    assert torch.equal(before, torch.get_rng_state())
    layer = model[0]
    m, n, r = 60, 80, 16
    g = (1 / 3) ** 0.5
    sigma_a = (m**0.5 * r / n**1.5) ** 0.25 * g**0.5
    sigma_b = (r / (m * n) ** 0.5) ** 0.25 * g**0.5
    for factor, sigma in ((layer.lora_A, sigma_a), (layer.lora_B, sigma_b)):
        assert 0.97 < factor.abs().max() / (3**0.5 * sigma) <= 1
        assert abs(factor.std() / sigma - 1) < 0.05
    assert layer.scaling == 1 / 16
    raw = lora(nn.Sequential(nn.Linear(80, 60), nn.Linear(60, 60)), 16, preserve=False)
    delta = layer.scaling * layer.lora_B @ layer.lora_A
    assert abs(delta.std() * 80**0.5 / g - 1) < 0.1
    assert not torch.equal(raw[0].effective(), raw[0].weight)


@pytest.mark.parametrize("axis", ["input", "output"])
def test_normalized_gradients_are_exact(axis):
    """N3 to N5 against autograd through the module, and autograd in float64."""
    m, n, r = 9, 7, 3
    layer = NormalizedLinear(nn.Linear(n, m), r, 0.5, axis=axis)
    with torch.no_grad():
        for p, x in zip((layer.lora_A, layer.lora_B, layer.magnitude),
                        tensors([(r, n), (m, r), layer.magnitude.shape], 1), strict=True):
            p.copy_(x)
    x, target = tensors([(20, n), (20, m)], 2)
    y = layer(x)
    (y * target).sum().backward()
    dim = 0 if axis == "input" else 1
    w, a, b, mu = (p.detach().double() for p in
                   (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude))
    mu = mu.unsqueeze(dim)
    v = w + 0.5 * b @ a
    c = v.norm(dim=dim, keepdim=True)
    unit = v / c
    g = target.double().mT @ x.double()
    slope = (g * unit).sum(dim, keepdim=True)
    d = (g - unit * slope) * mu / c
    out = x.double() @ (unit * mu).mT + layer.bias.double()
    for got, want in ((layer.magnitude.grad, slope.squeeze(dim)), (y, out),
                      (layer.lora_B.grad, 0.5 * d @ a.mT), (layer.lora_A.grad, 0.5 * b.mT @ d)):
        assert (got.double() - want).norm() < 1e-6 * want.norm()


@pytest.mark.parametrize("axis", ["input", "output"])
def test_a_normalized_layer_keeps_nothing_of_its_weights_size(axis):
    """From the forward to the backward pass: of LLaMA-7B it would be 49 GB."""
    layer = NormalizedLinear(nn.Linear(64, 96), 4, 0.5, axis=axis)
    kept, own = [], {p.data_ptr() for p in layer.parameters()}
    (x,) = tensors([(5, 64)], 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x.requires_grad_())
    fresh = [t for t in kept if t.data_ptr() not in own]
    assert fresh
    assert all(t.numel() <= x.numel() for t in fresh)
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        y.sum().backward()
        assert torch.equal(before, torch.get_rng_state())
    assert layer.lora_A.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y.detach(), atol=0, rtol=0)
    torch.testing.assert_close(x.grad, layer.effective().sum(0).expand_as(x).detach())


@pytest.mark.parametrize("axis", ["input", "output"])
def test_a_normalized_layer_is_a_function_of_its_tensors(axis):
    """Gradients of gradients, of other tensors in its place, and under torch.func and autocast."""
    layer = NormalizedLinear(nn.Linear(5, 4), 2, 0.5, axis=axis).double()
    names = ("lora_A", "lora_B", "magnitude", "bias")
    shapes = [dict(layer.named_parameters())[k].shape for k in names]
    given = [t.double().requires_grad_() for t in tensors([*shapes, (3, 5)], 7)]

    def call(*tensors_):
        *rest, x = tensors_
        return torch.func.functional_call(layer, dict(zip(names, rest, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)
    expected = torch.autograd.grad(call(*given).square().sum(), given)
    for got, want in zip(torch.func.grad(lambda *t: call(*t).square().sum(), tuple(range(5)))(
            *given), expected, strict=True):
        torch.testing.assert_close(got, want)
    rows = torch.func.vmap(lambda x: call(*given[:-1], x))(given[-1])
    torch.testing.assert_close(rows, call(*given))
    torch.testing.assert_close(layer(given[-1][0]), layer(given[-1])[0])
    y = layer(given[-1])
    with torch.no_grad():
        layer.lora_A.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    layer = layer.float()
    with torch.no_grad():
        layer.lora_A.copy_(given[0])
        layer.lora_B.copy_(given[1])
    results = []
    for enabled in (False, True):
        x = given[-1].detach().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        results.append(torch.autograd.grad(y.float().square().sum(), [x, layer.lora_B]))
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() < 0.05 * one.norm()


class Shared(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        if kind == "weight":
            self.two.weight = self.one.weight
        elif kind == "module":
            self.two = self.one
        elif kind == "storage":  # another parameter on the same memory
            self.two.weight = nn.Parameter(self.one.weight.data)
        else:
            self.table = nn.Embedding(8, 8)
            self.table.weight = self.two.weight


@pytest.mark.parametrize("kind", ["weight", "module", "embedding", "storage"])
def test_shared_weights_are_refused(kind):
    model = Shared(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"(one|two): its weight is shared .*\.weight.*\.weight"):
        lora(model, 2, target=["one", "two"])
    assert type(model.one) is type(model.two) is nn.Linear
    assert_same(before, model.state_dict())


def test_layers_keep_the_mode_of_those_they_replace():
    model = net(rank=None).eval()
    lora(model, 4)
    assert not any(m.training for m in model.modules())
    merge(model.train())
    assert all(m.training for m in model.modules())
    merge(lora(model.eval(), 4, normalize="output"))
    assert not any(m.training for m in model.modules())


def test_magnitudes_are_set_to_the_norms_of_what_is_there():
    layer = net(normalize="input").up
    with torch.no_grad():
        layer.lora_B.mul_(3.0)
    layer.renorm()
    v = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.magnitude.detach(), v.detach().norm(dim=0))
    torch.testing.assert_close(layer.effective(), v)


def test_bad_arguments_of_lora():
    def refuse(words, rank=2, error=ValueError, model=None, **options):
        model = model or net(rank=None)
        before = [(k, type(m)) for k, m in model.named_modules()]
        with pytest.raises(error, match=words):
            lora(model, rank, **options)
        assert before == [(k, type(m)) for k, m in model.named_modules()]

    for rank in (0, -1):
        refuse(f"lora: rank={rank!r}, but it must be an int >= 1", rank)
    for rank in (2.0, True, "3"):
        refuse(f"lora: rank={rank!r}, but it must be an int >= 1", rank, TypeError)
    for name, value, rule in (("init", 1, "one of 'switchlora', 'lora'"),
                              ("alpha", "1", "None or a finite number > 0"),
                              ("alpha", True, "None or a finite number > 0"),
                              ("normalize", 0, "None or one of 'input', 'output'"),
                              ("preserve", 1, "True or False"), ("seed", "x", "an int"),
                              ("dtype", torch.int8, "None or one of"),
                              ("target", 5, "None, a glob"), ("target", [], "None, a glob")):
        refuse(rf"lora: {name}={re.escape(repr(value))}, but it must be {rule}", error=TypeError,
               **{name: value})
    for function in (lora, merge, adapter_groups, base_weights):
        with pytest.raises(TypeError, match=f"{function.__name__}: model is a list, but it must"):
            function([nn.Linear(4, 4)], **({"rank": 2} if function is lora else {}))
    refuse("alpha=inf", alpha=float("inf"))
    refuse(r"up: rank=12.*smaller side of \(20, 12\)", 12)
    refuse("init='zeros'", init="zeros")
    refuse("alpha=-1", alpha=-1)
    refuse("normalize='column'", normalize="column")
    refuse(r"'upp', which matches nothing \(did you mean 'up'\?\)", target="upp")
    refuse("'embed', a Embedding", target="embed")
    refuse("no nn.Linear inside", model=nn.Linear(4, 4))
    refuse("nn.Linear inside the model", model=nn.Linear(4, 4), target="*")
    quantized = net(rank=None)
    quantized.down.weight = nn.Parameter(torch.zeros(12, 20, dtype=torch.int8), requires_grad=False)
    refuse(r"down: its base weight has dtype torch.int8.*quantized", error=TypeError,
           model=quantized)
    with pytest.raises(ValueError, match="no LoRA layer"):
        adapter_groups(net(rank=None))
    with pytest.raises(ValueError, match="axis='rows'"):
        NormalizedLinear(nn.Linear(4, 4), 2, 1.0, axis="rows")
    with pytest.raises(TypeError, match="NormalizedLinear: axis=0, but it must be one of 'input'"):
        NormalizedLinear(nn.Linear(4, 4), 2, 1.0, axis=0)
    model = net()
    model.square = model.down
    with pytest.raises(ValueError, match="down: its weight is shared"):
        adapter_groups(model)
