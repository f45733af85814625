"""Shapes of real models, in one place."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LLAMA", "PAPER_RANK", "Shape"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA: width, width of the MLP, heads, layers, tokens in the vocabulary."""

    hidden: int
    mlp: int
    heads: int
    layers: int
    vocabulary: int = 32000


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

#: Ranks of GaLore's table 2, and a quarter of the width for "tiny".
PAPER_RANK: dict[str, int] = {
    "tiny": 32, "llama-60m": 128, "llama-130m": 256, "llama-350m": 256, "llama-1b": 512,
    "llama-7b": 1024,
}
