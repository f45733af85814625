"""docs/migration.md: both sides of each section run, and steps are equal where it says so."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lissom.bench.llama import Llama
from lissom.bench.shapes import Shape
from lissom.optim import APOLLO, AdamW, FiraAdamW, GaLoreAdamW, Muon
from lissom.optim.base import MatrixOptimizer

from .helpers import TOKENS, feed, tiny_llama

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/migration.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
LLAMA = Llama(Shape(160, 200, 4, 2, 30))  # wider than the rank of the page
LLAMA.initialize(torch.Generator().manual_seed(1))


def code(section: str, side: str) -> list[str]:
    return re.findall(rf"```python\n# {side}\n(.*?)```", SECTIONS[section], re.DOTALL)


def names() -> dict[str, Any]:
    """A model, and its parameters as the blocks call them."""
    model = copy.deepcopy(LLAMA)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "proj" in n]
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    return {"model": model, "matrices": matrices, "rest": rest}


def stepped(found: dict[str, Any], steps: int = 4) -> list[torch.Tensor]:
    """Weights after steps of what a block has made, on random gradients of full rank."""
    made = found.get("optimizers", [found.get("optimizer")])
    params = list(found["model"].parameters())
    for seed in range(steps):
        feed(params, seed)
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in params]


def run(block: str) -> dict[str, Any]:
    found = names()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other packages
        exec(block, found)
    return found


def far(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Of the way from the start to b, in the norm of all weights."""
    x, y, start = (torch.cat([w.detach().flatten() for w in ws])
                   for ws in (a, b, list(LLAMA.parameters())))
    return float((x - y).norm() / (y - start).norm())


PLAIN = [section for section in SECTIONS if "transformers" not in section and "```" in
         SECTIONS[section]]


@pytest.mark.parametrize("section", PLAIN)
def test_both_sides_run(section):
    start = [p.detach().clone() for p in LLAMA.parameters()]
    assert code(section, "before")
    assert code(section, "after")
    for block in code(section, "after"):
        found = run(block)
        assert isinstance(found["optimizer"], MatrixOptimizer)
        if type(found["optimizer"]).algorithm != "adamw":
            assert found["optimizer"].plan().matrices == 14
        assert far(stepped(found), start) > 0
    package = re.search(r"from (\w+)", code(section, "before")[0])
    assert package
    pytest.importorskip(package[1])
    for block in code(section, "before"):
        assert far(stepped(run(block)), start) > 0


def test_the_transformers_section_runs(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers, "TrainingArguments", lambda *args, **more: (
        real(*args, max_steps=2, report_to="none", use_cpu=True, **more)))
    real = transformers.training_args.TrainingArguments
    section = next(s for s in SECTIONS if s.startswith("transformers"))
    data = [{"input_ids": row, "labels": row} for row in TOKENS]

    def trainer(side: str) -> Any:
        found: dict[str, Any] = {"model": tiny_llama(), "data": data}
        exec(code(section, side)[0], found)
        return found["trainer"]

    after = trainer("after")
    after.train()
    optimizer = after.optimizer.optimizer
    assert type(optimizer) is GaLoreAdamW
    assert optimizer.plan().matrices == 14
    groups = optimizer.param_groups
    assert {g["initial_lr"] for g in groups} == {1e-2}
    assert {(g["eps"], g["weight_decay"]) for g in groups} == {(1e-8, 0.0)}
    pytest.importorskip("galore_torch")
    before = trainer("before").create_optimizer()
    # what the page says of the string: neither epsilon nor decay are those of the arguments
    assert {(g["eps"], g["weight_decay"]) for g in before.param_groups} == {(1e-6, 0.0)}


def test_adamw_is_torchs_bit_for_bit():
    before, after = (run(code("torch.optim.AdamW", side)[0]) for side in ("before", "after"))
    assert far(stepped(before), stepped(after)) == 0


# options that keep the released behaviour, as the page has them
RELEASED = {"projection": "svd", "refresh": "synchronous", "eps": 1e-6, "weight_decay": 0.0}


@pytest.mark.parametrize(("section", "cls", "more"), [
    ("galore-torch", GaLoreAdamW, {}), ("fira", FiraAdamW, {"residual_scale": "released"})])
def test_released_options_are_the_package(section, cls, more):
    """With an epsilon too small for its place to matter, to a hundredth of the way: Adam's first
    step is a sign, which rounding turns where an entry of R is next to zero.
    """
    pytest.importorskip({"galore-torch": "galore_torch"}.get(section, section))
    for option, value in {**RELEASED, **more}.items():
        said = f'{option}="{value}"' if isinstance(value, str) else f"{option}={value!r}"
        assert said.replace("1e-06", "1e-6") in SECTIONS[section] + SECTIONS["galore-torch"]
    theirs = run(code(section, "before")[0])
    kept = ("params", "rank", "update_proj_gap", "scale", "alpha", "proj_type")

    def ours(**options: Any) -> list[torch.Tensor]:
        found = names()
        place = dict(zip(theirs["model"].parameters(), found["model"].parameters(), strict=True))
        groups = [{k: v for k, v in g.items() if k in kept} for g in
                  theirs["optimizer"].param_groups]
        groups = [{**g, "params": [place[p] for p in g["params"]]} for g in groups]
        found["optimizer"] = cls(groups, lr=1e-2, **options)
        return stepped(found)

    assert {(g["eps"], g["weight_decay"]) for g in theirs["optimizer"].param_groups} == {
        (1e-6, 0.0)}
    for group in theirs["optimizer"].param_groups:
        group["eps"] = 1e-14
    released, default = ours(**{**RELEASED, **more, "eps": 1e-14}), ours(eps=1e-14)
    expected = stepped(theirs)
    assert apart(released, expected) < 1e-2
    assert apart(default, expected) > 1e-1


def test_muon_is_torchs_muon_and_adamw():
    """Muon's matrices to the rounding of bf16 products; decay of the other part apart."""
    before = run(code("torch.optim.Muon", "before")[0])
    after = run(code("torch.optim.Muon", "after")[0])
    assert isinstance(after["optimizer"], Muon)
    stepped(before, 1)
    stepped(after, 1)
    for a, b, p in zip(before["matrices"], after["matrices"], names()["matrices"], strict=True):
        step = (a - p).abs().max()
        assert (a - b).abs().max() < 0.02 * step
    rest = {(g["lr"], g["betas"], g["weight_decay"]) for g in after["optimizer"].param_groups
            if g["algorithm"] == "adamw"}
    assert rest == {(3e-4, (0.9, 0.95), 0.1), (3e-4, (0.9, 0.95), 0.0)}


def test_the_key_of_apollo_torch_is_the_projection():
    found = run(code("apollo-torch", "after")[0])
    assert found["optimizer"].param_groups[1]["projection"] == "random"
    found = names()
    optimizer = APOLLO([{"params": found["matrices"], "rank": 2, "proj": "svd"}])
    assert optimizer.param_groups[0]["projection"] == "svd"
    with pytest.raises(ValueError, match="'projection' is given twice"):
        APOLLO([{"params": found["matrices"], "rank": 2, "proj": "svd", "projection": "svd"}])


def test_defaults_that_the_page_names():
    table = GaLoreAdamW.table()
    assert (table["eps"].default, table["weight_decay"].default, table["scale"].default) == (
        1e-8, 0.01, 0.25)
    assert AdamW([torch.nn.Parameter(torch.zeros(2))], fused=True, foreach=True)
    assert AdamW([torch.nn.Parameter(torch.zeros(2))], capturable=True)
    with pytest.raises((TypeError, ValueError), match="differentiable"):
        AdamW([torch.nn.Parameter(torch.zeros(2))], differentiable=True)
