"""A compact LLaMA: RMSNorm, rotary positions, SwiGLU, tied or untied head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .shapes import Shape

__all__ = ["Llama"]


def _rotary(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, width / 2) of the rotary positions (arXiv 2104.09864)."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(length, device=device)[:, None] * rates
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """X (batch, heads, length, width) turned by its position."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads or shape.heads
        width = shape.hidden // shape.heads
        for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            self.add_module(f"{name}_proj", nn.Linear(shape.hidden, heads * width, shape.qkv_bias))
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, length, hidden) to the same."""
        q, k, v = (self.get_submodule(f"{name}_proj")(x).unflatten(-1, (heads, -1)).transpose(1, 2)
                   for name, heads in (("q", self.heads), ("k", self.kv_heads),
                                       ("v", self.kv_heads)))
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                    enable_gqa=self.kv_heads != self.heads)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(-2))
        return out


class Block(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=1e-6)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.hidden, eps=1e-6)
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, length, hidden) to the same."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.mlp_norm(x)
        out: Tensor = x + self.down_proj(functional.silu(self.gate_proj(y)) * self.up_proj(y))
        return out


class Llama(nn.Module):
    """A LLaMA of the given shape.

    Args:
        shape: sizes, the vocabulary included.
        tied: the head shares the embedding's weight.
    """

    def __init__(self, shape: Shape, tied: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-6)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def initialize(self, generator: torch.Generator) -> None:
        """Weights from N(0, 0.02), as the released configurations have it; norms at one."""
        for p in self.parameters():
            if p.ndim == 2:
                with torch.no_grad():
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, length) to logits (batch, length, vocabulary)."""
        x = self.embed_tokens(tokens)
        cos, sin = _rotary(tokens.shape[1], self.shape.hidden // self.shape.heads, x.device)
        for block in self.layers:
            x = block(x, cos, sin)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits
