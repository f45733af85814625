"""Shapes of real models, in one place."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LLAMA", "MODELS", "PAPER_RANK", "Shape"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA: width, width of the MLP, heads, layers, tokens in the vocabulary.

    ``kv_heads`` are the heads of keys and values where there are fewer (grouped queries, arXiv
    2305.13245); with ``qkv_bias`` the projections to queries, keys and values have biases.
    """

    hidden: int
    mlp: int
    heads: int
    layers: int
    vocabulary: int = 32000
    kv_heads: int | None = None
    qkv_bias: bool = False


#: The released configurations of the C4 pre-training tables (GaLore, arXiv 2403.03507, and those
#: after it), and "tiny", which two CPU cores train in a minute.
LLAMA: dict[str, Shape] = {
    "tiny": Shape(128, 344, 4, 4),
    "llama-60m": Shape(512, 1376, 8, 8),
    "llama-130m": Shape(768, 2048, 12, 12),
    "llama-350m": Shape(1024, 2736, 16, 24),
    "llama-1b": Shape(2048, 5461, 32, 24),
    "llama-7b": Shape(4096, 11008, 32, 32),
}

#: Models that are counted, not trained here: those, and two in use (their released configurations,
#: untied heads; Llama 3: arXiv 2407.21783, Qwen 2.5: arXiv 2412.15115).
MODELS: dict[str, Shape] = {
    **LLAMA,
    "llama-3-8b": Shape(4096, 14336, 32, 32, 128256, kv_heads=8),
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 152064, kv_heads=4, qkv_bias=True),
}

#: Ranks of GaLore's table 2, and a quarter of the width for "tiny".
PAPER_RANK: dict[str, int] = {
    "tiny": 32, "llama-60m": 128, "llama-130m": 256, "llama-350m": 256, "llama-1b": 512,
    "llama-7b": 1024,
}
