"""A model with low-rank pairs, and pairs alone, for several test files."""

from __future__ import annotations

import torch
from lissom.optim import lora
from torch import nn
from torch.nn import functional

from .helpers import tensors

QUICK = {"interval": 8, "freeze_steps": 2, "decay_steps": 1000}


class Net(nn.Module):
    """Tall, wide and square weights, a bias, a norm, an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.down = nn.Linear(20, 12, bias=False)
        self.square = nn.Linear(12, 12)
        self.lm_head = nn.Linear(12, 11, bias=False)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.down(functional.silu(self.norm(self.up(x))))
        return self.lm_head(x + torch.tanh(self.square(x)))


def net(rank=4, dtype=torch.float32, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().to(dtype)
    return lora(model, rank, **options) if rank else model


def batch(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randint(0, 11, (2, 6, 9), generator=generator)


def train(model, optimizer, steps, watch=None):
    for i in steps:
        x, y = batch(i)
        optimizer.zero_grad()
        functional.cross_entropy(model(x).float().flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        if watch:
            watch(i)
    return model(batch(0)[0]).detach()


def pair(shape=(9, 7), r=3, seed=0, dtype=torch.float32, **more):
    """One pair as parameters, and its group."""
    m, n = shape
    w, a, b = (torch.nn.Parameter(x.to(dtype)) for x in
               tensors([(m, n), (r, n), (m, r)], seed))
    w.requires_grad_(False)
    params = [("l.A", a), ("l.B", b), ("l.weight", w)]
    return w, a, b, {"params": params, "roles": ("A", "B", "base"), "scaling": 0.5, **more}
