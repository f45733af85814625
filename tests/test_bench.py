"""The command-line programs: their figures, resume, bad input."""

from __future__ import annotations

import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lissom.bench import (
    flips,
    memory,
    names,
    polargrad,
    projections,
    reparam,
    shards,
    step,
    text,
    train,
)
from lissom.bench.llama import Llama
from lissom.bench.shapes import LLAMA, PAPER_RANK, Shape
from torch import nn

# Recomputed from the released configurations under the papers' accounting (bf16 weights and
# states, 1 GB = 1e9 bytes): parameters in millions; weights, Adam states, GaLore states, of these
# low-rank matrices, GB.
TABLE = {
    "llama-60m": (58.1, 0.12, 0.23, 0.16, 0.03),
    "llama-130m": (134.1, 0.27, 0.54, 0.34, 0.15),
    "llama-350m": (368.0, 0.74, 1.47, 0.65, 0.39),
    "llama-1b": (1339.1, 2.68, 5.36, 2.08, 1.56),
    "llama-7b": (6738.4, 13.48, 26.95, 9.40, 8.36),
}


@pytest.mark.parametrize("model", TABLE)
def test_memory_gives_the_table(model, tmp_path):
    figures = {}
    for optimizer in ("adamw", "galore"):
        file = tmp_path / f"{optimizer}.json"
        assert memory.main(["--model", model, "--optimizer", optimizer, "--rank",
                            str(PAPER_RANK[model]), "--json", str(file)]) == 0
        (figures[optimizer],) = json.loads(file.read_text())
    parameters, weights, adam, galore, low = TABLE[model]
    got = figures["galore"]
    assert round(got["parameters"] / 1e6, 1) == parameters
    assert round(got["weights"] / 1e9, 2) == round(got["gradients"] / 1e9, 2) == weights
    assert round(figures["adamw"]["optimizer_state"] / 1e9, 2) == adam
    assert round(got["optimizer_state"] / 1e9, 2) == galore
    assert round(got["by_kind"]["low-rank matrices"]["optimizer_state"] / 1e9, 2) == low
    for key in ("weights", "gradients", "optimizer_state"):
        assert sum(kind[key] for kind in got["by_kind"].values()) == got[key]
    assert got["options"]["state_bits"] == 16


def factory():
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 40), nn.Linear(40, 16))


def test_memory_of_a_module_equals_what_is_held(capsys):
    assert memory.main(["--module", "tests.test_bench:factory", "--rank", "4", "--dtype", "fp32",
                        "--state-bits", "32", "--optimizer", "galore", "--json", "-"]) == 0
    (figures,) = json.loads(capsys.readouterr().out)
    model = factory()
    optimizer = names.build("galore", model, 4, 1e-3)
    assert figures["optimizer_state"] == names.state_bytes(optimizer)
    assert figures["weights"] == sum(p.nbytes for p in model.parameters())
    assert memory.main(["--model", "tiny"]) == 0
    assert "optimizer state" in capsys.readouterr().out


def counted(capsys, *argv):
    assert memory.main([*argv, "--json", "-"]) == 0
    (figures,) = json.loads(capsys.readouterr().out)
    return figures


def test_memory_of_reparameterizations(capsys):
    full = counted(capsys, "--model", "llama-7b", "--optimizer", "adamw")
    for projection, part in (("std", 0.9014), ("full", 0.9275)):
        small = counted(capsys, "--model", "llama-7b", "--optimizer", "gradnormlorp", "--rank",
                        "512", "--state-bits", "8", "--basis-bits", "8", "--proj-type", projection)
        saved = 1 - small["optimizer_state"] / full["optimizer_state"]
        assert saved == pytest.approx(part, abs=1e-4)
        assert saved > 0.895  # the paper's claim
    factors = counted(capsys, "--model", "llama-7b", "--optimizer", "gradnormlorp-factors",
                      "--rank", "640", "--state-bits", "8", "--basis-bits", "8")
    saved = 1 - factors["optimizer_state"] / full["optimizer_state"]
    assert saved == pytest.approx(0.9003, abs=1e-4)
    assert saved > 0.895
    full = counted(capsys, "--model", "llama-1b", "--optimizer", "adamw")
    pairs = counted(capsys, "--model", "llama-1b", "--optimizer", "switchlora", "--rank", "512")
    assert round(pairs["trainable"] / 1e6, 1) == 609.3  # the paper prints 609.7 of 1339.5
    assert pairs["gradients"] == 2 * pairs["trainable"]
    assert full["trainable"] == full["parameters"]
    assert full["candidates"] == 0
    assert round(1 - pairs["gradients"] / full["gradients"], 3) == 0.545
    device = pairs["optimizer_state"] - pairs["candidates"]
    assert round(1 - device / full["optimizer_state"], 3) == 0.545
    sums = [x["weights"] + x["gradients"] + x["optimizer_state"] for x in (pairs, full)]
    assert round(1 - (sums[0] - pairs["candidates"]) / sums[1], 3) == 0.319
    # pools of min(m, n) vectors beside A and beside B
    sizes = [(2048, 2048)] * 4 + [(2048, 5461)] * 3
    assert pairs["candidates"] == 24 * sum(2 * min(m, n) * (m + n) for m, n in sizes)


def test_memory_refuses(capsys):
    for argv in (["--projection", "pca"], ["--module", "json"], ["--state-bits", "5"]):
        with pytest.raises(SystemExit):
            memory.main(argv)
        assert "must be" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(LLAMA, "tiny", Shape(16, 40, 2, 1))


def quick(tmp_path, *argv):
    file = tmp_path / "out.json"
    arguments = ["--batch", "2", "--length", "16", "--rank", "4", "--plot", "",
                 "--device", "cpu", "--json", str(file), *argv]
    assert train.main(arguments) == 0
    return json.loads(file.read_text())


def test_train_rows_table_and_picture(tmp_path, capsys):
    picture = tmp_path / "curves.png"
    rows = quick(tmp_path, "--steps", "6", "--plot", str(picture))
    out = capsys.readouterr().out
    assert [row["optimizer"] for row in rows] == ["adamw", "galore"]
    for row in rows:
        assert len(row["losses"]) == 6
        assert row["losses"][0] == pytest.approx(5.545, abs=0.05)  # log 256
        assert 0 < row["valid_loss"] < 6
        assert row["peak_bytes"] > row["state_bytes"] > 0
        assert row["step_ms"] > 0
        assert row["optimizer"] in out
    assert rows[0]["losses"][0] == rows[1]["losses"][0]
    assert rows[1]["state_bytes"] < rows[0]["state_bytes"]
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("bits", ["32", "16"])
@pytest.mark.parametrize("name", ["galore", "switchlora", "gradnormlorp"])
def test_train_resumes_exactly(tmp_path, name, bits):
    common = ["--optimizers", name, "--steps", "8", "--gap", "3", "--state-bits", bits,
              "--interval", "10"]
    whole = quick(tmp_path, *common)
    saved = str(tmp_path / "run.pt")
    quick(tmp_path, *common, "--until", "4", "--save", saved)
    resumed = quick(tmp_path, *common, "--resume", saved)
    assert resumed[0]["losses"] == whole[0]["losses"]
    assert resumed[0]["valid_loss"] == whole[0]["valid_loss"]


@pytest.mark.parametrize("valley", [0, 1, 3, 4, 5, 7])
def test_climb_finds_the_valley_and_looks_at_both_sides(valley):
    seen = []

    def loss(rate):
        seen.append(rate)
        return abs(reparam.LADDER.index(rate) - valley)

    assert reparam.climb(loss, reparam.LADDER, 3) == reparam.LADDER[valley]
    sides = {i for i in (valley - 1, valley, valley + 1) if 0 <= i < len(reparam.LADDER)}
    assert sides <= {reparam.LADDER.index(rate) for rate in seen}


def test_reparam_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    file, picture = tmp_path / "rows.json", tmp_path / "curves.png"
    argv = ["--steps", "2", "--batch", "2", "--length", "16", "--rank", "4", "--json", str(file)]
    assert reparam.main([*argv, "--seeds", "1"]) == 0
    first = json.loads(file.read_text())["rows"]
    assert {row["method"] for row in first} == set(reparam.METHODS)
    shares = {name: method.share or 4 / 16 for name, method in reparam.METHODS.items()}
    assert all(row["rank"] == round(16 * shares[row["method"]]) for row in first)
    assert reparam.main([*argv, "--plot", str(picture)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert rows[:len(first)] == first
    assert [row["seed"] for row in rows[len(first):]] == [1] * len(reparam.METHODS)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    gap, closed = re.findall(r"gap of LoRA (\S+); SwitchLoRA closes (\S+)%", out)[-1]
    best = {}
    for row in rows:
        if row["seed"] == 1:
            twin = next(x for x in first if (x["method"], x["lr"]) == (row["method"], row["lr"]))
            best[row["method"]] = (row["valid_loss"] + twin["valid_loss"]) / 2
    full, plain, switched = (best[k] for k in ("AdamW, full rank", "LoRA", "SwitchLoRA"))
    assert float(gap) == pytest.approx(plain - full, abs=1e-4)
    assert int(closed) == round(100 * (plain - switched) / (plain - full))
    monkeypatch.setattr(reparam.train, "train", lambda *a: 1 / 0)
    assert reparam.main(argv) == 0  # all is there
    with pytest.raises(SystemExit):
        reparam.main([*argv, "--methods", "Adam"])


def test_docs_have_the_figures_of_the_comparison_of_pairs():
    root = Path(__file__).parent.parent
    page = (root / "docs/results.md").read_text()
    rows = json.loads((root / "bench/results/reparam-tiny-cpu.json").read_text())["rows"]
    for name, method in reparam.METHODS.items():
        mine = [row for row in rows if row["method"] == name]
        tuned = [row for row in rows if row["method"] == (method.of or name)]
        rate = min((row for row in tuned if row["seed"] == 0), key=lambda x: x["valid_loss"])["lr"]
        best = sorted((row for row in mine if row["lr"] == rate), key=lambda row: row["seed"])
        losses = ", ".join(f"{row['valid_loss']:.3f}" for row in best)
        rank = "" if name == "AdamW, full rank" else best[0]["rank"]
        line = f"| {name} | {rank} | {rate:g} | {losses} | {best[0]['state_bytes'] / 2**20:.2f} |"
        assert line.replace("|  |", "| |") in page, line


def test_train_reads_files_and_refuses(tmp_path, capsys):
    file = tmp_path / "text.txt.xz"
    file.write_bytes(lzma.compress(b"the quick brown fox. " * 4000))
    rows = quick(tmp_path, "--optimizers", "adamw", "--steps", "2", "--data", str(file), "--tied",
                 "--dtype", "bf16")
    assert len(rows[0]["losses"]) == 2
    rows += quick(tmp_path, "--optimizers", "muon", "--steps", "2", "--data", str(file),
                  "--lr-adamw", "7e-2")
    assert rows[1]["options"] == {"lr_adamw": 7e-2}
    short = tmp_path / "short.txt"
    short.write_text("abc")
    for argv in (["--optimizers", "adam"], ["--data", str(short)], ["--data", "absent"],
                 ["--lr", "x"], ["--lr", "1,2,3"], ["--steps", "0"], ["--moments", "forget"]):
        with pytest.raises(SystemExit):
            train.main([*argv, "--plot", ""])
        assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "rates"), [
    ("adamw", [1e-3]), ("adamw-two-rates", [7e-2, 7e-2, 1e-3]), ("muon", [7e-2, 7e-2, 1e-3]),
    ("galore", [7e-2, 7e-2, 1e-3])])
def test_what_is_no_matrix_can_have_its_own_rate(name, rates):
    optimizer = names.build(name, Llama(Shape(16, 40, 2, 2, 30)), 4, 1e-3, lr_adamw=7e-2)
    assert [group["lr"] for group in optimizer.param_groups] == rates


def test_text_batches_depend_on_the_key_alone():
    data, valid = text.load(None)
    assert len(data) > 10 * len(valid) > 0
    a, b = text.batch(data, 3, 8, 5), text.batch(data, 3, 8, 5)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[0][:, 1:], a[1][:, :-1])


def test_llama_is_causal_and_ties():
    model = Llama(Shape(16, 40, 2, 2, 30), tied=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    tokens = torch.randint(0, 30, (1, 9), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 30
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


def test_benchmarks_run(tmp_path, capsys):
    step.main(["--size", "tiny", "--rank", "4", "--steps", "3", "--json", str(tmp_path / "s")])
    for problem in polargrad.PROBLEMS:
        polargrad.main(["--problem", problem, "--steps", "3", "--json", str(tmp_path / problem),
                        "--only", "PolarGrad QDWH;PolarSGD;Muon NS;Adam",
                        "--plot", str(tmp_path / "curves")])
        rows = json.loads((tmp_path / problem).read_text())
        assert [len(row["curve"]) for row in rows] == [3] * len(rows)
        assert (tmp_path / f"curves-{problem}.png").stat().st_size > 1000
    projections.main(["--steps", "2", "--gap", "1", "--rank", "4", "--json", str(tmp_path / "p")])
    assert "GaLoreAdamW" in capsys.readouterr().out
    rows = {row["projection"]: row for row in json.loads((tmp_path / "p").read_text())}
    assert rows["svd"]["of_svd_worst"] == 1.0
    assert rows["random"]["of_svd_median"] < rows["randomized"]["of_svd_median"] < 1.0001


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_training_under_torchrun_follows_one_process(kind, tmp_path):
    """AdamW and pairs; a rule that projects gradients enlarges rounding errors."""
    chosen = "adamw,lora,switchlora,gradnormlorp-factors"
    common = ["-m", "lissom.bench.train", "--optimizers", chosen, "--steps", "40", "--until", "3",
              "--batch", "4", "--length", "16", "--device", "cpu", "--plot", ""]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    runs = []
    for run, more in (([], []), (launcher, ["--parallel", kind])):
        file = tmp_path / f"{len(runs)}.json"
        subprocess.run([sys.executable, *run, *common, *more, "--json", str(file)], check=True,
                       capture_output=True, timeout=300)
        runs.append(json.loads(file.read_text()))
    assert len(runs[0]) == len(runs[1]) == 4
    for one, two in zip(*runs, strict=True):
        assert [(x["parallel"], x["ranks"]) for x in (one, two)] == [(None, 1), (kind, 2)]
        close = 1e-3 if one["optimizer"] == "gradnormlorp-factors" else 1e-5
        assert one["losses"] == pytest.approx(two["losses"], rel=close)
        assert one["valid_loss"] == pytest.approx(two["valid_loss"], rel=close)
        assert one["losses"][0] > one["losses"][2]
        share = two["state_bytes"] / one["state_bytes"]
        assert share == 1 if kind == "ddp" else 0.5 <= share < 1
        if kind == "fsdp2" and one["optimizer"] == "adamw":
            assert share < 0.501  # moments are halved, counters are not


@pytest.mark.parametrize(("given", "said"), [
    ([], "--parallel ddp needs torchrun, which sets RANK"),
    (["--batch", "4"], "--batch 4 must be a multiple of the 3 ranks"),
    (["--batch", "3", "--device", "cuda:1"], "--device cuda:1 with --parallel must be cpu, or"),
    (["--batch", "3", "--save", "x"], "--save is of one process"),
    (["--batch", "3", "--resume", "x"], "--resume is of one process"),
], ids=str)
def test_parallel_is_refused(given, said, monkeypatch, capsys):
    if given:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "localhost")):
            monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        train.main(["--device", "cpu", "--parallel", "ddp", "--data", __file__, *given])
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_flipped_roundings_are_counted(tmp_path, capsys):
    file = tmp_path / "flips.json"
    assert flips.main(["--optimizers", "galore,muon", "--ranks", "2", "--steps", "2",
                       "--batch", "4", "--length", "16", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    for row in json.loads(file.read_text()):
        weights = row["elements"] // row["steps"]
        assert row["rows"][0]["elements"] == weights > 10**5
        # one process adds up the gradients of the same two parts
        assert row["gradients_apart"] == 0
        assert row["flipped"] <= 1e-4 * row["elements"]
        assert row["beyond_one"] <= row["flipped"]
        assert f"{row['flipped']} of {row['elements']} roundings" in out


@pytest.mark.slow
def test_steps_by_rows_and_gathered_are_compared(tmp_path, capsys):
    file = tmp_path / "shards.json"
    assert shards.main(["--optimizers", "adamw,galore", "--cuts", "fsdp2 over row-wise tp",
                        "--shape", "2", "32", "24", "--rank", "4", "--steps", "5",
                        "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["optimizer"], row["shards"]) for row in rows] == [
        (name, way) for name in ("adamw", "galore") for way in ("rows", "whole")]
    for ours, gathered in zip(rows[::2], rows[1::2], strict=True):
        assert 0 < ours["temporaries_share"] < gathered["temporaries_share"]
        assert ours["weights_apart"] <= 1e-6
    assert rows[0]["state_share"] == pytest.approx(2 / 4, rel=0.05)  # two moments, on four ranks
    assert capsys.readouterr().out.count("temporaries") == 4


def test_units_apart():
    a = torch.tensor([1.0, -1.0, 0.0, 3.0, -2**-130], dtype=torch.bfloat16)
    bits = a.view(torch.int16)
    b = torch.stack([bits[0] + 1, bits[1] + 2, torch.tensor(-32768), bits[3] - 3, bits[4]])
    assert flips.units_apart(a, b.to(torch.int16).view(torch.bfloat16)).tolist() == [1, 2, 0, 3, 0]
    assert flips.units_apart(torch.tensor([2.0**-133], dtype=torch.bfloat16),
                             torch.tensor([-(2.0**-133)], dtype=torch.bfloat16)).tolist() == [2]


def test_a_picture_that_cannot_be_drawn_is_refused_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for script in (train, memory):
        with pytest.raises(SystemExit):
            script.main(["--plot", "curves.png"])
        assert "needs matplotlib: pip install 'lissom[bench]'" in capsys.readouterr().err
