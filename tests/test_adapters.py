"""Parameter groups of a model's pairs, of lora and of peft."""

from __future__ import annotations

import pytest
import torch
from lissom.optim import GradNormLoRPAdamW, SwitchLoRAAdamW, adapter_groups, base_weights, lora
from lissom.optim.adapters import adapters
from torch import nn

from .helpers import TOKENS, tiny_llama, tune
from .pairs import QUICK, net


def test_pairs_and_magnitudes_do_not_decay():
    for model, zero in ((net(), ("up.lora_A", "up.lora_B", "up.weight", "norm.weight")),
                        (net(normalize="input"), ("up.magnitude", "norm.weight"))):
        groups = adapter_groups(model, weight_decay=0.3)
        decay = {name: g.get("weight_decay") for g in groups for name, _ in g["params"]}
        assert [decay[name] for name in zero] == [0.0] * len(zero)
        assert decay["embed.weight"] == decay["lm_head.weight"] == 0.3


def test_pairs_of_several_scalings_are_groups_of_their_own():
    model = net(rank=None)
    for name, alpha in (("up", 2.0), ("down", 8.0), ("square", 2.0)):
        lora(model, 4, target=name, alpha=alpha)
    found = {g["scaling"]: [name for name, _ in g["params"]] for g in adapter_groups(model)
             if "scaling" in g}
    names = ("lora_A", "lora_B", "weight")
    assert found == {0.5: [f"{x}.{k}" for x in ("up", "square") for k in names],
                     2.0: [f"down.{k}" for k in names]}


def test_declared_roles_come_from_modules_not_from_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A = nn.Linear(8, 8)  # a name, and no more
            self.inner = nn.Linear(8, 8)

    model = lora(Named(), 2, target="inner")
    assert [x.layer for x in adapters(model)] == ["inner"]
    roles = {name: g.get("roles")
             for g in adapter_groups(model) for name, _ in g["params"]}
    assert roles["lora_A.weight"] is None
    assert roles["inner.lora_A"] == ("A", "B", "base")


# ---- peft


def peft_model(dora=False, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}, use_dora=dora,
                             target_modules=["q_proj", "v_proj", "down_proj"])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize("dora", [False, True])
def test_peft_models_train_save_and_merge(dora, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft_model(dora)
    rank = {"rank": 2} if dora else {}
    groups = adapter_groups(model, **rank)
    if dora:
        optimizer = GradNormLoRPAdamW(groups, lr=2e-2)
    else:
        optimizer = SwitchLoRAAdamW(groups, lr=2e-2, **QUICK)
        assert groups[0]["scaling"] == 2.0
    assert sum(row.rule != "adamw" for row in optimizer.plan()) == 6 * (2 if dora else 3)
    model.eval()
    start = {k: v.clone() for k, v in base_weights(model).items()}
    logits = tune(model, optimizer)
    bases = base_weights(model)
    assert set(bases) <= set(tiny_llama().state_dict())
    assert all(torch.equal(v, start[k]) == dora for k, v in bases.items())
    model.save_pretrained(tmp_path)
    again = tiny_llama()
    assert not again.load_state_dict(bases, strict=False).unexpected_keys
    loaded = peft.PeftModel.from_pretrained(again, tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=TOKENS).logits, logits, rtol=0, atol=1e-6)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, logits, rtol=0, atol=2e-5)


def test_peft_models_that_cannot_be_read_are_refused():
    model = peft_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    name = r"base_model\.model\.model\.layers\.0\.self_attn\.q_proj"
    partner = layer.lora_B.pop("default")
    with pytest.raises(ValueError, match=rf"{name}: lora_A has adapter 'default', lora_B has not"):
        adapter_groups(model)
    layer.lora_B["default"] = partner
    layer.base_layer.weight.data = layer.base_layer.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=rf"{name}.*float8"):
        adapter_groups(model)
    layer.base_layer.weight.data = layer.base_layer.weight.data.float()
    layer.merge()
    with pytest.raises(ValueError, match=rf"{name}: its adapter is merged"):
        adapter_groups(model)
    layer.unmerge()
    layer.fan_in_fan_out = True
    with pytest.raises(ValueError, match=rf"{name}: fan_in_fan_out=True, but it must be False"):
        adapter_groups(model)
    layer.fan_in_fan_out = False
    layer.lora_variant["default"] = object()
    with pytest.raises(ValueError, match=rf"{name}: its adapter is a object, but it must be plain"):
        adapter_groups(model)
    del layer.lora_variant["default"]
    kept, layer.base_layer = layer.base_layer, nn.Identity()  # as GPTQ layers have no weight
    with pytest.raises(TypeError, match=rf"{name}: its base layer is a Identity without a weight"):
        adapter_groups(model)
    layer.base_layer = kept
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="exactly one"):
        adapter_groups(model)
    with pytest.raises(ValueError, match=rf"{name}: rank=32, but it must be below the smaller"):
        adapter_groups(peft_model(r=32))


@pytest.mark.parametrize("dora", [False, True])
def test_other_adapters_keep_the_weight_that_they_were_trained_on(dora):
    """Plain pairs write to it; normalized ones leave it, so that others may be there."""
    pytest.importorskip("peft")
    model = peft_model(dora)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter("other")
    if not dora:
        with pytest.raises(ValueError, match=r"has adapters \['default'\] beside 'other'"):
            adapter_groups(model)
        model.delete_adapter("default")
    assert any("other" in name for g in adapter_groups(model) for name, _ in g["params"])


def test_normalized_pairs_need_nothing_of_their_base():
    """It may be quantized, or shared."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], use_dora=True)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    model = peft.get_peft_model(model, config)
    first, second = (model.base_model.model[i] for i in (0, 1))
    optimizer = GradNormLoRPAdamW(adapter_groups(model, rank=1), lr=1e-2)
    model(torch.ones(3, 6)).square().sum().backward()
    optimizer.step()
    first.base_layer.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)
    second.base_layer.weight = first.base_layer.weight
    names = [name for g in adapter_groups(model) for name, _ in g["params"]]
    assert not any("base_layer.weight" in name for name in names)


def test_pairs_of_the_other_kind_are_refused_by_their_kind():
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"roles=\('A', 'B', 'base'\).*normalized pairs"):
        GradNormLoRPAdamW(adapter_groups(peft_model(False)))
    with pytest.raises(ValueError, match=r"roles=\('A', 'B'\).*plain pairs"):
        SwitchLoRAAdamW(adapter_groups(peft_model(True), rank=2))
    with pytest.raises(ValueError, match=r"unknown option 'scaling'=2.0 \(did you mean 'scale'"):
        GradNormLoRPAdamW([{"params": [torch.zeros(4, 4)], "scaling": 2.0}])


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantized_bases_are_refused(kind):
    bnb, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    more = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    model = nn.Sequential(getattr(bnb.nn, kind)(16, 16, **more), nn.Linear(16, 16))
    with pytest.raises(ValueError, match=f"'0', a {kind}, but it must match an nn.Linear"):
        lora(model, 2, target="0")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(TypeError, match=r"base_model\.model\.0: its base weight has .*quantized"):
        adapter_groups(model)
