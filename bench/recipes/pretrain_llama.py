"""Pre-train a small LLaMA with Fira in the place of AdamW, on bytes of text.

The text is Python's own sources, or ``--data FILE``. What to copy is the line with FiraAdamW.

    python -m lissom.bench.recipes.pretrain_llama --json FILE
    python -m lissom.bench.recipes.pretrain_llama --adamw --json FILE

Measured on the CPU (bench/results/recipe-pretrain-llama.json): validation loss 1.490 nats per byte
with 2.46 MiB of state; AdamW 1.743 with 6.54 MiB. One seed; rates as in ``lissom.bench.train``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...optim import AdamW, FiraAdamW, param_groups
from .. import text
from ..llama import Llama
from ..names import state_bytes
from ..shapes import LLAMA
from .common import finish, parser, schedule

BATCH, LENGTH = 16, 128


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Nats per byte."""
    return functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, validate, and return the result."""
    options = parser(__doc__, 300)
    options.add_argument("--data", metavar="FILE", help="plain or .xz text")
    options.add_argument("--adamw", action="store_true", help="AdamW, to compare with")
    options.add_argument("--rank", type=int, default=32)
    options.add_argument("--lr", type=float, help="default 2e-2, with --adamw 1.5e-3")
    args = options.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data, valid = text.load(args.data)

    model = Llama(replace(LLAMA["tiny"], vocabulary=256))
    model.initialize(torch.Generator().manual_seed(0))
    model.to(device)
    optimizer: torch.optim.Optimizer
    if args.adamw:
        optimizer = AdamW(model.parameters(), lr=args.lr or 1.5e-3)
    else:
        optimizer = FiraAdamW(param_groups(model, rank=args.rank), lr=args.lr or 2e-2)
        print(optimizer.plan())
    rates = schedule(optimizer, args.steps)

    losses = []
    for step in range(args.steps):
        x, y = (z.to(device) for z in text.batch(data, BATCH, LENGTH, step))
        loss = loss_of(model, x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    with torch.no_grad():
        held = [loss_of(model, *(z.to(device) for z in text.batch(valid, BATCH, LENGTH, 7 + i)))
                for i in range(16)]
    return finish("pretrain_llama", argv, args.json, {
        "optimizer": type(optimizer).__name__, "valid_loss": float(torch.stack(held).mean()),
        "state_bytes": state_bytes(optimizer), "steps": args.steps, "losses": losses})


if __name__ == "__main__":
    main()
