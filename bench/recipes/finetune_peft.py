"""Fine-tune DoRA adapters of peft on a pretrained encoder, their gradients projected.

The optimizer is one line over the model that peft made. Encoder and files are those of
``finetune_encoder`` (extra ``hf``). The merged model is tested: it needs no peft.

    python -m lissom.bench.recipes.finetune_peft --data FILE --valid FILE --json FILE
    python -m lissom.bench.recipes.finetune_peft --data FILE --valid FILE --adamw --json FILE

Measured on SST-2, 80 batches of 32 (bench/results/recipe-finetune-peft.json, one seed): 83.3 % of
872 sentences with 1.54 MB of state; AdamW on the same adapters 82.8 % with 2.88 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from ...optim import AdamW, GradNormLoRPAdamW, adapter_groups
from ..names import state_bytes
from .common import accuracy, batches, encoder, finish, parser, schedule


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, merge, measure accuracy, and return the result."""
    from peft import LoraConfig, get_peft_model

    options = parser(__doc__, 80)
    options.add_argument("--data", metavar="FILE", required=True)
    options.add_argument("--valid", metavar="FILE", required=True)
    options.add_argument("--model", help="folder of an encoder (default: all-MiniLM-L6-v2)")
    options.add_argument("--adamw", action="store_true", help="AdamW, to compare with")
    options.add_argument("--rank", type=int, default=8, help="of the adapters; half of it of their "
                         "gradients")
    options.add_argument("--lr", type=float, default=4e-3)
    args = options.parse_args(argv)

    tokenizer, model = encoder(args.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the adapters
        model = get_peft_model(model, LoraConfig(
            task_type="SEQ_CLS", r=args.rank, lora_alpha=args.rank, use_dora=True,
            target_modules=["query", "key", "value", "dense"], modules_to_save=["classifier"]))
    optimizer: torch.optim.Optimizer
    if args.adamw:
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
    else:
        optimizer = GradNormLoRPAdamW(adapter_groups(model, rank=max(1, args.rank // 2)),
                                      lr=args.lr, scale=1.0)
    rates = schedule(optimizer, args.steps)

    losses = []
    for inputs, labels in batches(tokenizer, args.data, 32, args.steps):
        loss = functional.cross_entropy(model(**inputs).logits, labels)
        loss.backward()
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    model = model.merge_and_unload()
    return finish("finetune_peft", argv, args.json, {
        "optimizer": type(optimizer).__name__,
        "accuracy": accuracy(model, tokenizer, args.valid),
        "state_bytes": state_bytes(optimizer), "steps": args.steps, "losses": losses})


if __name__ == "__main__":
    main()
