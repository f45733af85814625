"""param_groups and plan: which parameter goes where, and why."""

from __future__ import annotations

import warnings

import pytest
import torch
from lissom.bench.llama import Llama
from lissom.bench.shapes import Shape
from lissom.optim import AdamW, GaLoreAdamW, Muon, param_groups
from lissom.optim.layouts import Layouts
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from .helpers import feed

SMALL = Shape(16, 40, 4, 2, 50)


def rules(model, **options):
    return {row.name: row for row in GaLoreAdamW(param_groups(model, **options)).plan()}


@pytest.mark.parametrize("tied", [False, True])
def test_llama(tied):
    model = Llama(SMALL, tied)
    plan = rules(model, rank=4)
    assert set(plan) == {name for name, _ in model.named_parameters()}
    low = {name for name, row in plan.items() if row.rule == "galore"}
    assert low == {n for n in plan if n.startswith("layers") and "proj" in n}
    assert all(plan[n].rank == 4 for n in low)
    groups = param_groups(model, rank=4, weight_decay=0.3)
    decay = {n: g["weight_decay"] for g in groups for n, _ in g["params"]}
    assert decay["norm.weight"] == 0.0
    assert decay["embed_tokens.weight"] == decay["layers.0.gate_proj.weight"] == 0.3
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_as_wide_as_its_table_is_long(tied):
    """Bytes, say, in a width of 256: no layer has as many outputs because it is a head."""
    model = Llama(Shape(16, 40, 4, 2, 16), tied)
    low = {name for name, row in rules(model, rank=4).items() if row.rule == "galore"}
    assert low == {n for n, _ in model.named_parameters() if n.startswith("layers") and "proj" in n}


def test_heads_among_layers():
    """Table of positions as long as the model is wide, layers named output, and what is a head."""
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.output = nn.Linear(8, 8), nn.Linear(8, 8)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(20, 8), nn.Embedding(8, 8)
            self.layers = nn.ModuleList([Layer(), Layer()])
            self.heads = nn.ModuleList([nn.Linear(8, 20), nn.Linear(8, 20)])
            self.output = nn.Linear(8, 3)

    low = {name for name, row in rules(Net(), rank=4).items() if row.rule == "galore"}
    assert low == {f"layers.{i}.{x}.weight" for i in (0, 1) for x in ("key", "output")}


class _OfWidth(nn.Module):
    """One layer, as wide as a table is long; the name of that table is given."""

    def __init__(self, **tables):
        super().__init__()
        for name, (entries, width) in tables.items():
            setattr(self, name, nn.Embedding(entries, width))
        self.layers = nn.ModuleList([nn.ModuleDict({x: nn.Linear(8, 8)
                                                    for x in ("key", "output")})])
        self.pooler, self.out = nn.Linear(8, 8), nn.Linear(8, 20)


def test_a_single_layer_as_wide_as_a_table_is_long():
    low = {name for name, row in rules(_OfWidth(
        tokens=(20, 8), position_embeddings=(8, 8)), rank=4).items() if row.rule == "galore"}
    assert low == {"layers.0.key.weight", "layers.0.output.weight", "pooler.weight"}
    low = {name for name, row in rules(_OfWidth(tokens=(20, 8), bytes=(8, 8)), rank=4).items()
           if row.rule == "galore"}
    # what is no layer may be a head for bytes
    assert low == {"layers.0.key.weight", "layers.0.output.weight"}


def test_a_model_that_declares_several_heads_and_heads_of_several_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = nn.Linear(8, 8)
            self.ends = nn.ModuleList([nn.Linear(8, 6), nn.Linear(8, 7)])
            self.classifier = nn.ModuleDict({"dense": nn.Linear(8, 8), "out_proj": nn.Linear(8, 3)})
            self.head = nn.ModuleDict({"norm": nn.LayerNorm(8), "fc": nn.Linear(8, 5)})

        def get_output_embeddings(self):
            return self.ends

    low = {name for name, row in rules(Net(), rank=4).items() if row.rule == "galore"}
    assert low == {"hidden.weight", "classifier.dense.weight"}


def dense(model):
    """Names of the matrices that get AdamW."""
    return {name for name, row in rules(model, rank=2).items()
            if row.rule == "adamw" and len(row.shape) > 1}


def net(**parts):
    model = nn.Module()
    model.conv, model.hidden = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def test_heads_of_images_of_spans_and_of_several_layers():
    """As torchvision, timm and transformers name them."""
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
    for parts, names in (
            ({"fc": nn.Linear(8, 5)}, {"fc"}),
            ({"classifier": mlp}, {"classifier.3"}),
            ({"head": nn.ModuleDict({"fc1": nn.Linear(8, 6), "fc2": nn.Linear(6, 5)})},
             {"head.fc2"}),
            ({"head": nn.ModuleList([nn.Linear(8, 5), nn.Linear(8, 4)])}, {"head.0", "head.1"}),
            ({"decode_head": nn.ModuleDict({"fuse": nn.Conv2d(8, 6, 1),
                                            "classifier": nn.Conv2d(6, 5, 1)})},
             {"decode_head.classifier"}),
            ({"score": nn.ModuleDict({"norm": nn.LayerNorm(8), "out_proj": nn.Linear(8, 5)})},
             {"score.out_proj"}),
            ({"class_labels_classifier": nn.Linear(8, 5)}, {"class_labels_classifier"}),
            ({"qa_outputs": nn.Linear(8, 2)}, {"qa_outputs"}),
            # no heads: within layers, not the last, of as many outputs as inputs
            ({"layers": nn.ModuleList([nn.ModuleDict({"head": mlp, "fc": nn.Linear(8, 5)})])},
             set()),
            ({"fc": nn.Linear(8, 5), "end": nn.Linear(5, 5)}, set()),
            ({"head": nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))}, set())):
        assert dense(net(**parts)) == {f"{name}.weight" for name in names}
        wrapped = nn.ModuleDict({"model": net(**parts)})
        assert dense(wrapped) == {f"model.{name}.weight" for name in names}


def test_a_model_that_tells_its_classifier():
    """As timm's do, in which a convolution named head may be a stage; what they tell may fail."""
    class Net(nn.Module):
        def __init__(self, told):
            super().__init__()
            self.conv_head, self.top, self.told = nn.Conv2d(4, 9, 1), nn.Linear(9, 3), told

        def get_classifier(self):
            return {"one": self.top, "several": (self.top, None), "itself": self}[self.told]

    assert dense(Net("one")) == dense(Net("several")) == {"top.weight"}
    assert dense(nn.ModuleDict({"model": Net("one")})) == {"model.top.weight"}
    assert dense(Net("itself")) == dense(Net("none of them")) == {"conv_head.weight"}
    model = Net("one")
    model.get_classifier = dict  # of which no signature is known
    assert dense(model) == {"conv_head.weight"}


def test_looking_for_heads_changes_no_weight():
    """As each look at a weight under spectral norm does."""
    model = nn.Sequential(*(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
                            for _ in range(2)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        param_groups(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_modules_without_shapes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"param_groups: 'weight' has no shape yet"):
        param_groups(nn.LazyLinear(4))


def test_convolutions_attention_and_unknown_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 16, 3)
            self.norm = nn.BatchNorm2d(16)
            self.attention = nn.MultiheadAttention(16, 2)
            self.experts = nn.Parameter(torch.randn(4, 16, 8))
            self.position = nn.Parameter(torch.randn(1, 9, 16))
            self.frozen = nn.Linear(16, 16).requires_grad_(False)
            self.classifier = nn.Linear(16, 10)

    plan = rules(Net(), rank=0.25, overrides={"experts": {"rank": 3, "matricize": "batch"},
                                              "*.out_proj.weight": {"rank": None}})
    low = {n: (r.rank, r.side) for n, r in plan.items() if r.rule == "galore"}
    assert low == {"conv.weight": (4, "left"), "attention.in_proj_weight": (4, "right"),
                   "experts": (3, "right")}
    assert "4 x 16 x 8" in plan["experts"].reason
    assert "16 x 72" in plan["conv.weight"].reason
    assert plan["position"].rule == plan["classifier.weight"].rule == "adamw"
    assert not any(name.startswith("frozen") for name in plan)


class _Declares(nn.Module):
    """Its head is found by asking, as in Hugging Face's models."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(8, 8), nn.Linear(8, 6)

    def get_output_embeddings(self):
        return self.out


class _Tied(nn.Module):
    """Its head was made before the vocabulary grew, and stands first."""

    def __init__(self):
        super().__init__()
        self.out, self.hidden, self.table = nn.Linear(8, 9), nn.Linear(8, 8), nn.Embedding(11, 8)
        self.out.weight = self.table.weight


class _Untied(nn.Module):
    """Of a name that no list has: it is as long as the vocabulary."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)


@pytest.mark.parametrize("make", [_Declares, _Tied, _Untied])
def test_a_head_of_any_name_gets_adamw(make):
    low = [name for name, row in rules(make(), rank=4).items() if row.rule == "galore"]
    assert low == ["hidden.weight"]


def test_groups_work_with_any_optimizer_of_the_package():
    model = nn.Linear(6, 4)
    AdamW(model.named_parameters())
    optimizer = GaLoreAdamW(param_groups(model, rank=2, update_proj_gap=7), lr=1e-2)
    assert optimizer.param_groups[0]["update_proj_gap"] == 7
    feed(list(model.parameters()), 0)
    model.weight.grad = None
    optimizer.step()
    text = str(optimizer.plan())
    assert "1 by the class's own rule, 1 by AdamW" in text
    assert optimizer.plan()["weight"].rank == 2
    with pytest.raises(KeyError):
        optimizer.plan()["absent"]


def test_groups_of_layers_and_of_experts_work_with_all():
    """timm's ``lr_scale``, and ``matricize`` where there is nothing to see otherwise."""
    p = nn.Parameter(torch.randn(3, 4, 5))
    for cls in (AdamW, Muon, GaLoreAdamW):
        optimizer = cls([{"params": [p], "matricize": "batch", "rank": 2, "lr_scale": 0.5}])
        assert optimizer.param_groups[0]["lr_scale"] == 0.5
    assert "matricize" not in AdamW([{"params": [p], "matricize": "batch"}]).param_groups[0]


@pytest.mark.parametrize(("rank", "kind"), [(0, ValueError), (-1, ValueError), (1.5, ValueError),
                                            ("8", TypeError), (True, TypeError)])
def test_bad_ranks(rank, kind):
    with pytest.raises(kind, match=rf"'weight': rank={rank!r}, but it must be"):
        param_groups(nn.Linear(4, 4), rank)


def test_a_fraction_is_at_least_one_and_the_last_pattern_wins():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    found = rules(model, rank=0.01, overrides={"*.weight": {"rank": 3}, "1.w*": {"rank": 0.5}})
    assert (found["0.weight"].rank, found["1.weight"].rank) == (3, 4)
    found = rules(model, rank=0.01, overrides={"1.w*": {"rank": 0.5}, "1.weight": {"rank": 2}})
    assert (found["0.weight"].rank, found["1.weight"].rank) == (1, 2)


def test_a_fraction_of_a_stack_is_of_each_matrix():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.zeros(8, 64, 32))
            self.scale = nn.Parameter(torch.zeros(()))

    for matricize, rank in (("batch", 8), ("flatten", 2)):
        groups = param_groups(Experts(), overrides={"up": {"matricize": matricize, "rank": 0.25},
                                                    "scale": {"rank": 0.25}})
        assert {name: g["rank"] for g in groups for name, _ in g["params"]} == {
            "up": rank, "scale": 1}


def test_names_are_those_of_the_model_without_wrappers():
    """As torch.distributed.checkpoint has them: a checkpoint needs no wrappers to be loaded."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[0] = checkpoint_wrapper(model[0])
    wrapped = torch.compile(model, backend="eager")
    assert next(iter(dict(wrapped.named_parameters()))) == (
        "_orig_mod.0._checkpoint_wrapped_module.weight")
    for pattern in ("0.weight", "*_checkpoint_wrapped_module.weight"):
        groups = param_groups(wrapped, 4, overrides={pattern: {"rank": 2}})
        assert {name: g["rank"] for g in groups for name, _ in g["params"]} == {
            "0.weight": 2, "0.bias": None, "1.weight": 4, "1.bias": None}
    ddp = torch.nn.ModuleDict({"module": torch.nn.Linear(8, 8)})
    assert param_groups(ddp, 4)[0]["params"][0][0] == "module.weight"


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=r"'wieght'.*did you mean 'weight'"):
        param_groups(nn.Linear(4, 4), overrides={"wieght": {"rank": 2}})
    with pytest.raises(TypeError, match="must be a module"):
        param_groups([1])
    with pytest.raises(ValueError, match="no parameter"):
        param_groups(nn.ReLU())


@pytest.mark.parametrize("overrides", [["weight"], {"weight": 4}, {"weight": {"params": []}}])
def test_overrides_are_options_by_name(overrides):
    with pytest.raises(TypeError, match=r"overrides (is a list|has 'weight').*must be a dict"):
        param_groups(nn.Linear(4, 4), overrides=overrides)


def test_gpt2_has_matrices():
    """Its linear layers are another module's, with weights in x out."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=8))
    groups = param_groups(model, rank=4)
    names = {name for g in groups if g.get("algorithm") != "adamw" for name, _ in g["params"]}
    assert names == {f"transformer.h.0.{x}.weight" for x in (
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


class _Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Parameter(torch.zeros(4, 6, 8))
        self.down = torch.nn.Parameter(torch.zeros(4, 8, 6))
        self.token = torch.nn.Parameter(torch.zeros(1, 1, 8))
        self.scale = torch.nn.Parameter(torch.zeros(8, 1, 1))
        self.relative_position_bias_table = torch.nn.Parameter(torch.zeros(9, 2))
        self.table = torch.nn.Embedding(5, 8)
        self.norm = torch.nn.LayerNorm((6, 8))


def test_matrices_of_strange_modules_are_pointed_out():
    model = torch.nn.ModuleDict({"experts": _Experts(), "linear": torch.nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match=r"'experts.up' of a _Experts and 1 more may be matrices"):
        param_groups(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = param_groups(model, overrides={"*.up": {"rank": None},
                                                "*experts.down": {"matricize": "batch"}},
                              weight_decay=0.3, update_proj_gap=7)
    taken = [[name for name, _ in g["params"]] for g in groups if g.get("matricize")]
    assert taken == [["experts.down"]]
    # options of matrices are theirs too, and a norm of two dimensions is a norm
    gaps = {name: g.get("update_proj_gap") for g in groups for name, _ in g["params"]}
    assert (gaps["experts.down"], gaps["linear.weight"], gaps["experts.up"]) == (7, 7, None)
    decay = {name: g["weight_decay"] for g in groups for name, _ in g["params"]}
    assert decay["experts.norm.weight"] == 0.0
    assert decay["experts.down"] == decay["experts.table.weight"] == 0.3


def test_state_is_made_by_one_look_at_all_parameters(monkeypatch):
    """A pass over all for each of a thousand groups took seconds."""
    seen = []
    inner = Layouts.sync
    monkeypatch.setattr(Layouts, "sync", lambda self, optimizer: (
        seen.append(len(optimizer.param_groups)), inner(self, optimizer)))
    for groups in (2, 7):
        seen.clear()
        optimizer = GaLoreAdamW([{"params": [nn.Parameter(torch.ones(4, 4))]}
                                 for _ in range(groups)], rank=2)
        assert not seen
        assert len(optimizer.state) == groups
        assert seen == [groups]
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))]})
        assert len(optimizer.state) == groups + 1
