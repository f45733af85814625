"""Train LLaMA-7B on one GPU with 24 GiB: GaLore in 8 bits, and no gradient outlives its update.

``python -m lissom.bench.memory --model llama-7b --budget 24GiB`` found this: 12.55 GiB of weights
in bf16, 4.45 of state, 0.24 of gradients, 1.59 of activations at 1 x 256 tokens, in all 19.84 GiB
with 1 GiB in reserve (bench/results/memory-7b-24gib.json). On an H100 ``lissom.bench.fit`` trained
4 x 256 tokens so, in 22.53 GiB (bench/results/fit-7b-24gib-h100.json); this script, which holds a
larger GPU to 24 GiB, has not run on one yet. Without one it trains ``--size tiny``, which shows
that it works and no more (bench/results/recipe-one-gpu-24gib.json: 20 steps on the CPU).

    python -m lissom.bench.recipes.one_gpu_24gib --steps 100
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from ...optim import GaLoreAdamW, param_groups, update_in_backward
from .. import text
from ..llama import Llama
from ..names import state_bytes
from ..shapes import LLAMA, PAPER_RANK
from .common import capped, finish, parser, schedule


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, and return the result."""
    cuda = torch.cuda.is_available()
    options = parser(__doc__, 100)
    options.add_argument("--data", metavar="FILE", help="plain or .xz text")
    options.add_argument("--size", choices=[*LLAMA], default="llama-7b" if cuda else "tiny")
    options.add_argument("--length", type=int, default=256, help="bytes in a sequence")
    options.add_argument("--lr", type=float, default=1e-2)
    args = options.parse_args(argv)
    device = torch.device("cuda" if cuda else "cpu")
    data, _ = text.load(args.data)
    if cuda:
        capped(24 * 2**30)

    # Made where they stay, in 16 bits: nothing is 27 GB large on the way.
    with torch.device(device):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        model = Llama(replace(LLAMA[args.size], vocabulary=32000 if cuda else 256))
        torch.set_default_dtype(torch.float32)
    optimizer = GaLoreAdamW(param_groups(model, rank=PAPER_RANK[args.size]), lr=args.lr,
                            state_bits=8, basis_bits=8)
    print(f"state: {optimizer.plan().state_bytes:,} bytes")
    rates = schedule(optimizer, args.steps)

    losses, ends = [], []
    with update_in_backward(optimizer, max_grad_norm=1.0):  # of each tensor: there is no joint norm
        for step in range(args.steps):
            x, y = (z.to(device) for z in text.batch(data, 1, args.length, step))
            loss = functional.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
            loss.backward()   # every weight has moved when this returns, and no gradient is left
            optimizer.step()  # counts
            rates.step()
            losses.append(loss.item())  # waits for the GPU
            ends.append(time.perf_counter())
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)

    rate = {}
    if ends[1:]:  # after the first step, which makes all bases, and compiles
        rate["tokens_per_s"] = args.length * (len(ends) - 1) / (ends[-1] - ends[0])
    peak = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {}
    return finish("one_gpu_24gib", argv, args.json, {
        "size": args.size, "device": device.type, "state_bytes": state_bytes(optimizer), **rate,
        **peak, "steps": args.steps, "losses": losses})


if __name__ == "__main__":
    main()
