"""Keys of random numbers.

A parameter's key is a hash of its name, so it draws the same numbers wherever it stands among the
others. Random bits depend on the key and on the option ``seed``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..kernels.apart import Apart, Keys, Matrices

__all__ = ["key_of", "keys_of", "name_key", "names_of", "plain_name", "unwrapped"]

# Parts of names that wrappers add; DDP's "module" is removed only at the beginning.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(name: str) -> str:
    """A parameter's dotted name without the parts that torch.compile, FSDP1 and activation
    checkpointing have added, which torch.distributed.checkpoint leaves out of its keys too.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plain_name(name: str) -> str:
    """The same without DDP's "module" before it."""
    return unwrapped(name).removeprefix("module.")


def names_of(group: Mapping[str, Any]) -> Sequence[str] | None:
    """The names of a group's parameters.

    None where it has none, or not one for each (DeepSpeed flattens several into one parameter).
    """
    names: Sequence[str] | None = group.get("param_names")
    return names if names and len(names) == len(group["params"]) else None


def name_key(name: str) -> int:
    """A parameter's ``key`` from its plain name: the first 63 bits of its BLAKE2b hash."""
    digest = hashlib.blake2b(plain_name(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def key_of(s: Mapping[str, Tensor], o: Mapping[str, Any]) -> tuple[int, int]:
    """The two 32-bit words that key a parameter's random numbers, from ``seed`` and its ``key``.

    For one seed different keys give different words.
    """
    return _words(int(o["seed"]), int(s["key"]))


def keys_of(s: Mapping[str, Tensor], o: Mapping[str, Any]) -> Keys:
    """The same, for each of several parameters where s is of them."""
    key: Matrices = s["key"]
    seed = int(o["seed"])
    return [_words(seed, int(x)) for x in key.parts] if isinstance(key, Apart) else key_of(s, o)


def _words(seed: int, key: int) -> tuple[int, int]:
    # Philox takes 32 bits: the upper half of a longer seed is mixed into the lower.
    return (seed ^ (seed >> 32) * 0x9E3779B9 ^ key >> 32) & 0xFFFFFFFF, key & 0xFFFFFFFF
