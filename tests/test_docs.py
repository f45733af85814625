"""README, docs/ and docstrings: code runs, links lead somewhere, commands parse, all is there."""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import inspect
import json
import math
import pkgutil
import re
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import GenericAlias, ModuleType
from typing import Any

import lissom.bench
import lissom.kernels
import lissom.optim
import pytest
import torch
import torch.distributed as dist
from lissom.bench.converge import METHODS
from lissom.bench.llama import Llama
from lissom.bench.names import REST
from lissom.bench.shapes import Shape
from lissom.optim.base import MatrixOptimizer
from lissom.optim.common import ADAMW_PART, BOOKKEEPING
from lissom.optim.door import TORCH_ONLY
from torch.nn import functional

from .helpers import TOKENS, tiny_llama, tune

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = sorted((ROOT / "bench/results").glob("*.json"))


def name_of(value: Any) -> str:
    return str(getattr(value, "__name__", getattr(value, "name", value)))


# -------------------------------------------------------------------- code


def python(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def loss_of(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def moved(model: Any, start: Any) -> bool:
    return any(not torch.equal(a, b) for a, b in
               zip(model.parameters(), start.parameters(), strict=True))


def test_code_of_checkpoints(tmp_path, monkeypatch, capsys):
    """In order, on one model whose training is two steps."""
    monkeypatch.chdir(tmp_path)
    x = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    model = Llama(Shape(16, 40, 2, 2, 30))
    model.initialize(torch.Generator().manual_seed(1))

    def train(model: Any, optimizer: Any) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, x[:, :-1], x[:, 1:]).backward()
            optimizer.step()

    names: dict[str, Any] = {"model": model, "train": train, "torch": torch}
    first, second, third = python(ROOT / "docs/checkpoints.md")
    exec(first, names)
    held = names["optimizer"].state_dict()["state"]
    assert {int(s["step"]) for s in held.values()} == {2}
    exec(second, names)
    assert "leading 4 columns" in capsys.readouterr().out
    train(model, names["smaller"])
    assert {int(s["step"]) for s in names["smaller"].state_dict()["state"].values()} == {4}
    exec(third, names)
    kept = {int(s["step"]) for s in names["optimizer"].state_dict()["state"].values()}
    assert kept == {0, 2}
    train(model, names["optimizer"])


@pytest.mark.parametrize("page", ["README.md", "docs/options.md", "docs/memory.md"])
def test_code_on_a_plain_model(page, capsys):
    """Every block is executed as it stands, on a new model, and its optimizer takes a step."""
    x = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    x, y = x[:, :-1], x[:, 1:]
    start = Llama(Shape(16, 40, 2, 2, 30))
    start.initialize(torch.Generator().manual_seed(1))
    names: dict[str, Any] = {"loss_of": loss_of, "x": x, "y": y, "micro_batches": [(x, y)] * 2}
    # those for peft are executed with the page they are from
    blocks = [block for block in python(ROOT / page) if "peft" not in block]
    assert blocks
    for block in blocks:
        model = names["model"] = copy.deepcopy(start)
        exec(block, names)
        if not moved(model, start):
            loss_of(model, x, y).backward()
            names["optimizer"].step()
        assert moved(model, start), block
        assert names["optimizer"].plan().matrices, block
        assert all(p.isfinite().all() for p in model.parameters())
    if page == "README.md":
        assert "bytes of state" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the page takes the accelerator's backend")
def test_code_for_several_ranks():
    """On one gloo rank: all blocks train."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        start = Llama(Shape(144, 200, 2, 1, 30))  # the rank of the page is below its width
        x = TOKENS % 30
        names: dict[str, Any] = {}
        blocks = python(ROOT / "docs/distributed.md")
        assert len(blocks) == 4
        ways = ("fully_shard", "set_requires_gradient_sync", "DistributedData", "WORLD")
        micro = (x[:, :-1], x[:, 1:])
        names |= {"loss_of": loss_of, "steps": [[micro, micro]] * 3}
        for block, way in zip(blocks, ways, strict=True):
            assert way in block
            names["model"] = copy.deepcopy(start)
            exec(block, names)
            losses = []
            for _ in range(3):
                loss = loss_of(names["model"], x[:, :-1], x[:, 1:])
                names["optimizer"].zero_grad()
                loss.backward()
                names["optimizer"].step()
                losses.append(loss.item())
            assert losses[2] < losses[0]
        counts = names["counts"]
        assert 0 < counts.bytes_sent < counts.bytes_plain
        assert names["handle"].bytes_sent > 0
    finally:
        dist.destroy_process_group()


def test_code_for_pairs(tmp_path, monkeypatch):
    """In one place, each block in under ten lines; what is loaded or merged is what was trained."""
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    plain = tiny_llama().eval()
    names: dict[str, Any] = {"torch": torch, "steps": 5000}
    logits: list[torch.Tensor] = []
    rules = []

    def train(model: Any, optimizer: Any) -> None:
        rules.append(type(optimizer).algorithm)
        assert rules[-1] in {row.rule for row in optimizer.plan()}
        model.eval()  # no dropout
        logits.append(tune(model, optimizer))

    blocks = python(ROOT / "docs/pairs.md")
    assert [next(x for x in ("PeftModel", "use_dora", "get_peft_model", "lora(") if x in block)
            for block in blocks] == ["lora(", "get_peft_model", "PeftModel", "use_dora"]
    front = [block for block in python(ROOT / "README.md") if "peft" in block]
    assert front == [blocks[1], blocks[3]]
    for block in blocks:
        assert len(block.splitlines()) < 10
        names["model"] = copy.deepcopy(plain)
        exec(block, names | {"train": train}, names)
        after = names["model"].eval()(input_ids=TOKENS).logits.detach()
        torch.testing.assert_close(after, logits[-1], rtol=0, atol=2e-5)
    assert rules == ["switchlora", "switchlora", "gradnormlorp"]
    assert type(names["model"]) is type(plain)


def test_every_page_with_code_is_executed_somewhere():
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    for page in PAGES:
        assert not python(page) or page.name in tests, page.name


# -------------------------------------------------------------------- links, files, commands


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http://", "https://")):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
            slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert not anchor or anchor in slugs, link
    for file in re.findall(r"`((?:bench|optim|kernels|tests|docs)/[\w./*-]+\.\w+)`", text):
        assert list(ROOT.glob(file)), file
    for name in re.findall(r"`([\w-]+-(?:cpu|sst2|7b|ranks|right)\.(?:json|png))`", text):
        assert (ROOT / "bench/results" / name).exists(), name


def commands() -> Iterator[tuple[str, str]]:
    """Where a command of this package is written down, and the command."""
    found = r"(?:OMP_NUM_THREADS=1 )?(?:python3? -m lissom\.|torchrun |lissom-(?:train|memory) )"
    for page in PAGES:
        text = page.read_text()
        for part in re.findall(rf"`({found}[^`]*)`", text):
            yield page.name, part
        for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
            for part in re.findall(rf"^(?:.*&& )?({found}.*)$", block.replace("\\\n", " "),
                                   re.MULTILINE):
                yield page.name, part
    for path in sorted((ROOT / "bench").rglob("*.py")):
        for part in re.findall(rf"^    ({found}.*)$",
                               ast.get_docstring(ast.parse(path.read_text())) or "", re.MULTILINE):
            yield path.name, part
    for path in RESULTS:
        held = json.loads(path.read_text())
        for row in [held, *held.get("rows", [])] if isinstance(held, dict) else held:
            if row.get("command"):
                yield path.name, row["command"]


class _ParsedError(Exception):
    """All arguments are known and have values of their kind."""


def test_commands_that_are_written_down_parse(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: Any, *args: Any, **more: Any) -> None:
        parse(self, *args, **more)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    pytest.importorskip("peft")
    seen = {}
    for where, command in dict.fromkeys(commands()):
        # "for S in 0 1 2; ... --seed S --state-bits 32|8" stands for several commands
        loop = re.match(r"for (\w) in (\w+)[^;]*; ", command)
        plain = re.sub(r"(\w+)(\|\w+)+", r"\1", command.removeprefix(loop[0]) if loop else command)
        words = [loop[2] if loop and w == loop[1] else w for w in shlex.split(plain)]
        if "..." in words or any("NAME" in word for word in words):
            continue
        if words[0].startswith("lissom-"):
            words = ["-m", "lissom.bench." + words[0].removeprefix("lissom-"), *words[1:]]
        at = max(i for i, word in enumerate(words) if word == "-m")
        module = importlib.import_module(words[at + 1])
        try:
            with pytest.raises(_ParsedError):
                module.main(words[at + 2:])
        except SystemExit:
            pytest.fail(f"{where}: {command}")
        seen[where] = command
    assert len(seen) > 20


def test_two_commands_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for block in blocks:
        for extra in re.findall(r'install -e "\.\[(\w+)\]"', block):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
    # CI runs the second one as it stands
    test = next(x for x in blocks if "pytest" in x).strip()
    assert test in (ROOT / ".ci/run").read_text()


# -------------------------------------------------------------------- figures


def test_readme_has_the_table_of_7b():
    readme = (ROOT / "README.md").read_text()
    rows = json.loads((ROOT / "bench/results/memory-7b.json").read_text())
    shown = {"torch-adamw": "`torch.optim.AdamW`, bf16", "adamw8bit": "`AdamW8bit`",
             "muon": "`Muon`, `PolarGrad`, `Trion`", "polargrad": "`Muon`, `PolarGrad`, `Trion`",
             "trion": "`Muon`, `PolarGrad`, `Trion`",
             "galore": "`GaLoreAdamW`, `FiraAdamW`, `GradNormLoRPAdamW`",
             "fira": "`GaLoreAdamW`, `FiraAdamW`, `GradNormLoRPAdamW`",
             "gradnormlorp": "`GaLoreAdamW`, `FiraAdamW`, `GradNormLoRPAdamW`",
             "dct-adamw": "`DCTAdamW`, `APOLLO`, `FRUGAL`",
             "apollo": "`DCTAdamW`, `APOLLO`, `FRUGAL`",
             "frugal": "`DCTAdamW`, `APOLLO`, `FRUGAL`"}
    seen = set()
    for row in rows:
        if row["optimizer"] in shown and row["dtype"] == "bfloat16":
            seen.add(row["optimizer"])
            parts = [row[k] / 1e9
                     for k in ("weights", "gradients", "optimizer_state", "activations")]
            line = f"| {shown[row['optimizer']]} | " + " | ".join(f"{x:.2f}" for x in parts)
            total = row["total"] / 1e9
            assert any(f"{line} | {said} |" in readme for said in (f"{total:.2f}", f"{total:.1f}"))
    assert seen == set(shown)


def test_ranks_and_gaps_are_those_that_were_run():
    rows = json.loads((ROOT / "bench/results/train-tiny-rank-cpu.json").read_text())["rows"]
    page = (ROOT / "docs/results.md").read_text()
    page = page[page.index("## Ranks and gaps"):page.index("## Fewer bits")]
    found: dict[tuple[int, int], dict[str, list[str]]] = {}
    for row in rows:
        one = found.setdefault((row["rank"], row["gap"]), {})
        one.setdefault(row["optimizer"], []).append(f"{row['valid_loss']:.3f}")
    assert len(rows) == 36
    for (rank, gap), one in found.items():
        losses = f"{', '.join(one['galore'])} | {', '.join(one['fira'])} |"
        assert gap != 200 or f"| {rank} | {losses} " in page
        assert rank != 32 or f"| {gap} | {losses}" in page
    states = {row["rank"]: row["state_bytes"] for row in rows if row["optimizer"] == "galore"}
    assert [f"{states[r] / 2**20:.2f}" for r in sorted(states)] == re.findall(
        r"\| ([0-9.]+) \|$", page[:page.index("Gaps, at")], re.MULTILINE)


def test_readme_has_the_losses_of_the_tiny_llama():
    readme = " ".join((ROOT / "README.md").read_text().split())
    rows = {row["optimizer"]: row for row in
            json.loads((ROOT / "bench/results/train-tiny-cpu.json").read_text())}
    at = readme.index("Validation loss of a tiny LLaMA")
    said = readme[at:readme.index("[docs/results.md]", at)]
    for name, optimizer in (("AdamW", "adamw"), ("GaLoreAdamW", "galore"), ("FiraAdamW", "fira"),
                            ("DCTAdamW", "dct-adamw"), ("APOLLO", "apollo")):
        assert f"`{name}` {rows[optimizer]['valid_loss']:.3f}" in said, name
        assert f"{rows[optimizer]['state_bytes'] / 2**20:.2f} MiB" in said, name


def test_longer_training_is_what_was_measured():
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of("converge-tiny-1000-cpu"):
        methods.setdefault(row["method"], []).append(row)
    page, readme = ((ROOT / x).read_text() for x in ("docs/results.md", "README.md"))
    table = page[page.index("## Longer training"):page.index("## The rate of the rest")]
    lines = [x for x in table.splitlines() if x.startswith("| `")]
    assert len(lines) == len(methods) >= 7
    for method, rows in methods.items():
        tuned = [row for row in rows if row["seed"] == 0]
        best = min(tuned, key=lambda row: row["valid_loss"])
        others = [row["lr"] for row in tuned]
        if of := METHODS[method].of:
            assert {row["lr"] for row in rows} == {min(methods[of], key=lambda row: (
                row["seed"], row["valid_loss"]))["lr"]}
        else:
            assert len(tuned) >= 3
            assert min(others) < best["lr"] < max(others), method  # goes on beyond the best
        losses = [f"{row['valid_loss']:.3f}" for row in rows if row["lr"] == best["lr"]]
        losses = [*losses, "not run"][:2]
        shown = f"{best['lr']:.1e}".replace(".0", "").replace("e-0", "e-")
        assert any(x.endswith(f"| {shown} | {' | '.join(losses)} | "
                              f"{best['state_bytes'] / 2**20:.2f} |") for x in lines), method
        if method in ("AdamW", "Fira", "GaLore", "APOLLO", "AdamW, two rates", "Muon",
                      "Muon, 8 bits"):
            said = " ".join(readme[readme.index("After 1000 steps"):].split()).partition(". In")[0]
            assert losses[0] in said, method


def test_rates_of_the_rest_are_those_that_were_run():
    page = (ROOT / "docs/results.md").read_text()
    labels = {"adamw-two-rates": "AdamW", "muon": "Muon", "polargrad": "PolarGrad"}
    rows = rows_of("train-tiny-rest-cpu")
    rates = {row["optimizer"]: row["lr"] for row in rows}
    # Of the other file, whose rest had Muon's own rate, or REST.
    rows += [{**row, "lr_adamw": row["lr"] if row["optimizer"] == "muon" else REST}
             for row in rows_of("converge-tiny-1000-cpu")
             if row["lr"] == rates.get(row["optimizer"]) and not row["options"]]
    for name, label in labels.items():
        tried = sorted((row["lr_adamw"], row["valid_loss"]) for row in rows
                       if row["optimizer"] == name and row["seed"] == 0)
        said = ", ".join(f"{loss:.3f} at {rest:.0e}".replace("e-0", "e-") for rest, loss in tried)
        rate = f"{rates[name]:.1e}".replace(".0", "").replace("e-0", "e-")
        assert f"| `{label}` | {rate} | {said} |" in page, said


def lines_of_4000_steps() -> Iterator[str]:
    labels = {"adamw-two-rates": "`AdamW`, two rates", "muon": "`Muon`", "fira": "`FiraAdamW`",
              "galore": "`GaLoreAdamW`", "dct-adamw": "`DCTAdamW`, gap 200, scale 0.25"}
    tried: dict[str, list[Any]] = {}
    for row in rows_of("train-tiny-4000-cpu"):
        assert row["steps"] == 4000
        tried.setdefault(row["optimizer"], []).append(row)
    for name, rows in tried.items():
        said = ", ".join(f"{row['valid_loss']:.3f} at {row['lr']:.0e}".replace("e-0", "e-")
                         for row in sorted(rows, key=lambda row: row["lr"]))
        yield f"| {labels[name]} | {said} | {rows[0]['state_bytes'] / 2**20:.2f} |"


def test_readme_says_what_became_of_the_order():
    readme = " ".join((ROOT / "README.md").read_text().split())
    said = readme[readme.index("In 4000 steps"):].partition(". In 600")[0]
    best: dict[str, float] = {}
    for row in rows_of("train-tiny-4000-cpu"):
        name = row["optimizer"]
        best[name] = min(row["valid_loss"], best.get(name, math.inf))
    assert [f"{x:.3f}" for x in sorted(best.values())] == re.findall(r"\d\.\d{3}", said)


def lines_of_classes() -> Iterator[str]:
    times = {row["optimizer"]: row["step_ms"] for row in rows_of("step-60m-classes-cpu")}
    base = times.pop("GaLoreAdamW")
    labels = {"DCTAdamW, gap 200": "`DCTAdamW` (gap 200)",
              "torch.optim.AdamW foreach": "`torch.optim.AdamW(foreach=True)`"}
    for name, ms in times.items():
        yield f"{labels.get(name, f'`{name}`')} {ms / base:.2f}"
    half = {row["optimizer"]: row["step_ms"] for row in rows_of("step-60m-bf16-cpu")}
    yield f"`GaLoreAdamW` {half['GaLoreAdamW'] / half['galore-torch']:.2f}"
    yield f"`FiraAdamW` {half['FiraAdamW'] / half['fira']:.2f}"


def test_rates_of_other_ranks_are_those_that_were_run():
    page = (ROOT / "docs/results.md").read_text()
    for name, words in (("rank-rates", "{:.3f} at {}"), ("two-rates", "")):
        rows = json.loads((ROOT / f"bench/results/train-tiny-{name}-cpu.json").read_text())["rows"]
        assert len(rows) == 8
        if words:
            for row in rows:
                rate = f"{row['lr']:.0e}".replace("e-0", "e-")
                assert words.format(row["valid_loss"], rate) in page, row
            continue
        best = {s: min(r["valid_loss"] for r in rows if r["seed"] == s) for s in (0, 1)}
        assert f"reached {best[0]:.3f} and {best[1]:.3f} (seeds 0 and 1" in " ".join(page.split())


def rows_of(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / f"bench/results/{name}.json").read_text())
    return rows


def lines_of_ranks() -> Iterator[str]:
    for file, optimizer, label in (
            ("ranks", "torch-adamw", "torch.optim.AdamW"), ("ranks", "muon", "Muon"),
            ("ranks", "galore", "GaLoreAdamW"), ("ranks", "dct-adamw", "DCTAdamW"),
            ("ranks-right", "dct-adamw", 'DCTAdamW(proj_type="right")')):
        rows = [r for r in rows_of(f"memory-7b-{file}") if r["optimizer"] == optimizer]
        assert [row["ranks"] for row in rows] == [1, 8, 64, 512]
        yield f"| `{label}` | " + " | ".join(f"{r['optimizer_state'] / 1e9:.2f}" for r in rows)


def lines_of_finetuning() -> Iterator[str]:
    for method, label in (("lora", "LoRA with `AdamW`"), ("galore", "`GaLoreAdamW`"),
                          ("gradnormlorp", "`GradNormLoRPAdamW`, plain weights"),
                          ("gradnormlorp-factors", "`GradNormLoRPAdamW`, factors")):
        rows = [row for row in rows_of("finetune-sst2") if row["method"] == method]
        yield f"| {label} | " + " | ".join(
            f"{100 * row['accuracy']:.1f} %, {row['state_bytes'] / 1e6:.2f} MB" for row in rows)


def lines_of_finetuning_in_8_bits() -> Iterator[str]:
    for method, label in (("adamw", "`AdamW`, all weights, 32 bits | "),
                          ("gradnormlorp", "`GradNormLoRPAdamW`, plain weights | 48"),
                          ("gradnormlorp-factors", "`GradNormLoRPAdamW`, factors | 60")):
        rows = [row for row in rows_of("finetune-sst2-8bit") if row["method"] == method]
        assert [row["seed"] for row in rows] == [0, 1, 2]
        hits = [100 * row["accuracy"] for row in rows]
        size = f"{rows[0]['state_bytes'] / 1e6:.2f}"
        if method == "adamw":  # two moments of two bytes
            size += f"; {4 * rows[0]['trainable'] / 1e6:.2f} in bf16"
        rate = f"{rows[0]['lr']:.0e}".replace("e-0", "e-")
        yield (f"| {label} | {rate} | {statistics.fmean(hits):.1f} % "
               f"({min(hits):.1f} to {max(hits):.1f}) | {size} |").replace("|  |", "| |")


def lines_of_projections() -> Iterator[str]:
    for name, label, digits in (
            ("subspace", "`subspace` (default)", 4), ("randomized", "`randomized`", 4),
            ("dct", "`dct`, `column_norm=1`", 3), ("dct, l2", "`dct`, `column_norm=2`", 3),
            ("dct3", "`dct`, `dct_basis=3`", 3), ("random", "`random`", 3)):
        row = next(row for row in rows_of("projections") if row["projection"] == name)
        yield (f"| {label} | {row['of_svd_median']:.{digits}f} | {row['of_svd_worst']:.3f} | "
               f"{row['time_of_svd']:.2f} |")


def lines_of_a_gpu() -> Iterator[str]:
    rows = {row["optimizer"]: row for row in rows_of("step-7b-h100")}
    base = rows["torch.optim.AdamW fused"]["step_ms"]
    for name, label in (
            ("torch.optim.AdamW fused", "`torch.optim.AdamW(fused=True)`, bf16 state"),
            ("AdamW", "`AdamW`, fp32 state"), ("AdamW8bit", "`AdamW8bit`"),
            ("GaLoreAdamW", "`GaLoreAdamW`"), ("GaLoreAdamW, 8 bits", "`GaLoreAdamW`, 8 bits"),
            ("DCTAdamW, gap 200, 8 bits", "`DCTAdamW`, gap 200, 8 bits"),
            ("FiraAdamW, 8 bits", "`FiraAdamW`, 8 bits"), ("APOLLO, 8 bits", "`APOLLO`, 8 bits"),
            ("DCTAdamW, every step, 8 bits", "`DCTAdamW`, new basis every step, 8 bits"),
            ("Muon", "`Muon`")):
        row = rows[name]
        times = [row[key] / base for key in ("step_ms", "host_ms", "device_ms")]
        yield "| " + " | ".join([
            label, *(f"{x:.2f}" for x in (*times, row["device_of_roofline"])),
            f"{row['worst_of_median']:.1f}", f"{row['state_bytes'] / 1e9:.2f}"])
    fits = rows_of("fit-7b-24gib-h100")[0]
    low = {row["optimizer"]: row for row in rows_of("step-7b-rank256-h100")}
    base = low["torch.optim.AdamW fused"]["device_ms"]
    dct, galore = (low[name] for name in ("DCTAdamW, gap 200, 8 bits", "GaLoreAdamW, 8 bits"))
    yield (f"`DCTAdamW` takes {dct['device_ms'] / base:.2f} and `GaLoreAdamW` "
           f"{galore['device_ms'] / base:.2f}")
    yield f"{dct['ratio']:.1f} and {galore['ratio']:.1f} times its step"
    yield f"batches of {fits['batch']} x 256"
    yield f"{fits['tokens_per_s']:.0f} tokens/s"
    yield f"peak of {fits['peak_bytes'] / 2**30:.2f} GiB"


def lines_of_machine_code() -> Iterator[str]:
    rows = {row["kernel"]: row for row in rows_of("machine-sm90")}
    for name, label in (("adamw8, 8 bits", "AdamW on a bf16 weight, 8-bit moments"),
                        ("adamw8, 8 bits, weight and 8 bits more",
                         "the same with `master_bits=8`"),
                        ("adam8, 8 bits", "Adam on a projected gradient, 8-bit moments"),
                        ("adamw8, 32 bits", "AdamW on a bf16 weight, fp32 moments"),
                        ("lift", "lift, decay and rounding, after the product"),
                        ("lift with a gain of rows", "the same with Fira's residual"),
                        ("lift with a gain of rows, of weight and 8 bits more",
                         "the same with `master_bits=8`")):
        row = rows[name]
        yield (f"| {label} | {row['instructions']:.1f} | {row['registers']} | {row['programs']} x "
               f"{row['warps']} |")
    consumer = {row["kernel"]: row for row in rows_of("machine-sm86")}
    assert not any(row["spilled"] for row in [*rows.values(), *consumer.values()])
    assert {consumer[name]["programs"] for name in consumer if name.startswith("lift")} == {2, 7}
    yield f"share a multiprocessor, with {consumer['lift']['shared'] // 1024} KiB each"


def lines_of_host() -> Iterator[str]:
    rows = {row["optimizer"]: row["us_per_matrix"] for row in rows_of("host")}
    yield f"takes {rows['AdamW, 8 bits']:.0f} us a matrix for `AdamW`"
    yield f" {rows['GaLoreAdamW, 8 bits']:.0f} for"
    yield f"{rows['FiraAdamW, 8 bits']:.0f} for `FiraAdamW`"
    yield f"{rows['DCTAdamW, every step, 8 bits']:.0f} for `DCTAdamW`"


def lines_of_communication() -> Iterator[str]:
    rows = {(row["way"], row["vocabulary"], row["step"]): row for row in rows_of("comm-60m-cpu")}
    labels = {"ddp": "DDP", "projected_allreduce": "DDP with `projected_allreduce`",
              "project_in_backward": "`project_in_backward`, no DDP",
              "update_in_backward": "`update_in_backward`, no DDP"}
    for way, label in labels.items():
        cells = []
        for size in (256, 32000):
            mine = [rows[way, size, step] for step in range(4)]
            kept = max(row["gradient_bytes"] for row in mine)
            cells.append(" / ".join(f"{100 * mine[step]['share']:.1f} %" for step in (0, 1, 3)))
            most = max(rows["ddp", size, step]["gradient_bytes"] for step in range(4))
            cells.append(f"{100 * kept / most:.1f} %")
        yield f"| {label} | {' | '.join(cells)} |"
    off = max(row["weights_off"] for row in rows.values())
    yield f"within {off:.1e} of".replace("e-0", "e-")
    assert not any(rows["update_in_backward", size, 3]["weights_off"] for size in (256, 32000))


def lines_of_shards() -> Iterator[str]:
    rows = {(row["cut"], row["optimizer"], row["shards"]): row for row in rows_of("shards-cpu")}
    assert max(row["weights_apart"] for row in rows.values()) <= 1e-7
    for cut in dict.fromkeys(cut for cut, _, _ in rows):
        cells = []
        for name in ("adamw", "galore", "dct-adamw", "fira", "gradnormlorp", "muon"):
            ours, gathered = (rows[cut, name, way] for way in ("rows", "whole"))
            shares = [f"{100 * row['temporaries_share']:.0f}" for row in (ours, gathered)]
            cells.append(f"{' / '.join(shares)} %, {ours['seconds'] / gathered['seconds']:.2f}")
        label = cut.replace("fsdp2", "FSDP2").replace("tp", "TP")
        yield f"| {label} | {' | '.join(cells)} |"


def lines_of_bits() -> Iterator[str]:
    file = ROOT / "bench/results/train-tiny-state-cpu.json"
    rows = {(row["optimizer"], row["state_bits"], row["dtype"]): row
            for row in json.loads(file.read_text())["rows"]}
    for name, label in (("adamw", "AdamW"), ("galore", "GaLoreAdamW"), ("fira", "FiraAdamW"),
                        ("dct-adamw", "DCTAdamW")):
        plain = rows[name, 32, "fp32"]
        cells = [f"{statistics.fmean(plain['valid_loss']):.3f}, "
                 f"{plain['state_bytes'] / 2**20:.2f} MiB"]
        for row in (rows[name, 8, "fp32"], rows[name, 4, "fp32"], rows[name, 32, "bf16"]):
            base = row.get("fp32_there", plain["valid_loss"])
            apart = [a - b for a, b in zip(row["valid_loss"], base, strict=True)]
            assert abs(row["mean_difference"] - statistics.fmean(apart)) < 2e-4  # of four digits
            low, high = row["spread"]
            assert abs(low - min(apart)) + abs(high - max(apart)) < 4e-4
            size = f", {row['state_bytes'] / 2**20:.2f} MiB" if row["dtype"] == "fp32" else ""
            cells.append(f"{row['mean_difference']:.3f} ({low:.3f} to {high:.3f}){size}")
        yield f"| `{label}` | " + " | ".join(cells) + " |"


def lines_of_flips() -> Iterator[str]:
    rows = json.loads((ROOT / "bench/results/flips-tiny-cpu.json").read_text())["rows"]
    exact = [row for row in rows if row["reduce"] == "fp32"]
    assert {(row["optimizer"], row["ranks"]) for row in exact} == {
        (name, ranks) for ranks in (2, 4) for name in
        ("adamw", "adamw8bit", "galore", "fira", "dct-adamw", "muon", "trion")}
    assert not any(row["gradients_apart"] or row["flipped"] for row in exact)
    yield f"AdamW, AdamW8bit, Muon | none | none of {exact[0]['elements']} each |"
    yield f"or found in pieces | none | none of {exact[0]['elements']} each |"
    for row in rows:
        if row["reduce"] == "bf16":
            label = {"adamw": "AdamW", "galore": "GaLore"}[row["optimizer"]]
            shares = [100 * row[key] / row["elements"] for key in ("gradients_apart", "flipped")]
            yield (f"| bf16 | {row['ranks']} | {label} | {shares[0]:.2g} % | {shares[1]:.2g} % "
                   f"({100 * row['worst_share']:.2g} % in the worst step) |")


@pytest.mark.parametrize(("page", "lines"), [
    ("distributed.md", lines_of_flips), ("distributed.md", lines_of_communication),
    ("distributed.md", lines_of_shards),
    ("memory.md", lines_of_ranks), ("results.md", lines_of_machine_code),
    ("results.md", lines_of_host), ("results.md", lines_of_4000_steps),
    ("results.md", lines_of_classes),
    ("results.md", lines_of_bits), ("results.md", lines_of_finetuning),
    ("results.md", lines_of_finetuning_in_8_bits),
    ("results.md", lines_of_projections), ("results.md", lines_of_a_gpu)], ids=name_of)
def test_tables_are_those_of_the_files(page, lines):
    text = " ".join((ROOT / "docs" / page).read_text().split())
    for line in lines():
        assert line in text, line


# -------------------------------------------------------------------- docstrings


def modules(package: ModuleType) -> list[ModuleType]:
    return [package, *(importlib.import_module(m.name) for m in pkgutil.walk_packages(
        package.__path__, package.__name__ + "."))]


def public() -> dict[str, Any]:
    """Every name in an ``__all__``, by where it stands, but names of types."""
    pytest.importorskip("peft")
    found = {f"{module.__name__}.{name}": getattr(module, name)
             for package in (lissom.optim, lissom.kernels, lissom.bench)
             for module in modules(package) for name in getattr(module, "__all__", [])}
    # Python 3.10 takes these for classes.
    return {where: x for where, x in found.items() if not isinstance(x, GenericAlias)}


def documented(x: Any) -> dict[str, str]:
    """Arguments under ``Args:`` and what is said of each."""
    doc = inspect.cleandoc(x.__doc__ or "") + "\n"
    part = re.search(r"^Args:\n((?: {4}.*\n|\n)+)", doc, re.MULTILINE)
    entries: list[list[str]] = []
    for line in part[1].splitlines() if part else []:
        if re.match(r" {4}\S", line):
            entries.append([line.strip()])
        elif entries:
            entries[-1].append(line.strip())
    out = {}
    for entry in entries:
        names, colon, said = " ".join(entry).partition(":")
        assert colon, entry
        for name in names.replace(" and the options of every class", "").split(","):
            out[name.strip().lstrip("*")] = said.strip()
    return out


def optimizers() -> list[type[MatrixOptimizer]]:
    return [x for x in (getattr(lissom.optim, name) for name in lissom.optim.__all__)
            if inspect.isclass(x) and issubclass(x, MatrixOptimizer)]


def test_every_public_name_has_a_docstring():
    for package in (lissom.optim, lissom.kernels, lissom.bench):
        for module in modules(package):
            assert module.__doc__, module.__name__
    for where, x in public().items():
        if not inspect.isroutine(x) and not inspect.isclass(x):
            continue
        doc = x.__dict__.get("__doc__") if inspect.isclass(x) else x.__doc__
        # a named tuple or dataclass without one gets its own signature
        assert doc, where
        assert not doc.startswith(f"{x.__name__}("), where
        if inspect.isclass(x) and where.startswith("lissom.optim."):
            for name, method in vars(x).items():
                if inspect.isfunction(method) and not name.startswith("_"):
                    assert inspect.getdoc(method), f"{where}.{name}"


def test_the_map_of_the_package_names_every_file():
    named = re.findall(r"``(\w+)``", re.sub(r".*reading order:", "", lissom.optim.__doc__,
                                           flags=re.DOTALL))
    assert sorted(named) == sorted(x.stem for x in (ROOT / "optim").glob("[!_]*.py"))


def test_documented_arguments_are_those_that_exist():
    for where, x in public().items():
        if not inspect.isroutine(x) and not inspect.isclass(x):
            continue
        names = documented(x)
        if inspect.isroutine(x):
            known = set(inspect.signature(x).parameters)
            assert not names or set(names) == known, (where, set(names) ^ known)
            continue
        if issubclass(x, (BaseException, dict)):  # a TypedDict is one
            continue
        known = set(inspect.signature(x).parameters) | set(getattr(x, "__annotations__", {}))
        if issubclass(x, MatrixOptimizer):
            known |= set(x.table()) | set(ADAMW_PART) | set(TORCH_ONLY) | {"params"}
        assert set(names) <= known, (where, set(names) - known)


def test_functions_of_the_front_page_say_what_they_take():
    for name in lissom.optim.__all__:
        x = getattr(lissom.optim, name)
        if inspect.isroutine(x):
            assert set(documented(x)) == set(inspect.signature(x).parameters), name
            assert "Returns:" in x.__doc__, name


@pytest.mark.parametrize("cls", optimizers(), ids=lambda x: x.__name__)
def test_every_option_is_documented_with_its_default(cls):
    """In the class, in a class it inherits from, or in AdamW for those that all have."""
    own = documented(cls)
    known = dict(documented(lissom.optim.AdamW))
    for base in reversed(cls.__mro__):
        if issubclass(base, MatrixOptimizer):
            known |= documented(base)
    missing = set(cls.table()) - set(BOOKKEEPING) - set(known)
    assert not missing
    given = {k: v.default for k, v in inspect.signature(cls).parameters.items()
             if v.default is not inspect.Parameter.empty}
    defaults = {k: v.default for k, v in cls.table().items()} | given
    for name, said in own.items():
        if name not in defaults:
            continue
        found = re.search(r"[Dd]efault:? (\([^)]*\)|``[^`]*``|[\w.+-]*\w)|"
                          r"(``\"[\w-]+\"``|\b\w+) \(default\)", said)
        if not found:
            continue
        text = next(x for x in found.groups() if x).strip("`")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            continue
        assert value == defaults[name], (name, said, defaults[name])


@pytest.mark.parametrize("cls", optimizers(), ids=lambda x: x.__name__)
def test_every_optimizer_names_its_source(cls):
    docs = " ".join(base.__doc__ or "" for base in cls.__mro__ if issubclass(base, MatrixOptimizer))
    assert "Source: " in docs or cls is lissom.optim.LowRankOptimizer


def option_lines() -> list[str]:
    """The table of docs/options.md: rule and default of every option, those of most classes first.

    Classes that differ in the default alone share a line.
    """
    lines: dict[tuple[str, str], dict[str, list[str]]] = {}
    classes = [cls for cls in optimizers() if cls is not lissom.optim.LowRankOptimizer
               and not cls.__name__.endswith("8bit")]
    for cls in classes:
        given = {k: v.default for k, v in inspect.signature(cls).parameters.items()}
        for name, option in cls.table().items():
            if name not in BOOKKEEPING:
                rule = "the class's rule or 'adamw'" if name == "algorithm" else option.rule
                value = given.get(name, option.default)
                default = "the class's" if name == "algorithm" else f"`{value!r}`"
                lines.setdefault((name, rule), {}).setdefault(default, []).append(cls.__name__)
    out = []
    for (name, rule), defaults in sorted(
            lines.items(), key=lambda x: (-sum(map(len, x[1].values())), x[0])):
        order = sorted(defaults.items(), key=lambda x: -len(x[1]))
        holders = {name for names in defaults.values() for name in names}
        shared = {cls.__name__ for cls in classes if "inner" in cls.table()}
        whose = sorted(holders - shared) if shared <= holders else sorted(holders)
        said = "; ".join([order[0][0], *(f"{', '.join(names)}: {value}"
                                         for value, names in order[1:])])
        whom = ", ".join(["low-rank", *whose] if shared <= holders else whose)
        out.append(f"| `{name}` | {rule} | {said} | "
                   f"{'all' if len(holders) == len(classes) else whom} |")
    return out


def test_options_are_all_in_the_table():
    page = (ROOT / "docs/options.md").read_text()
    for line in option_lines():
        assert line in page, line
