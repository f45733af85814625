"""Peak of live tensor bytes, on any device, where no allocator keeps count (the CPU)."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes"]


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make inside the ``with`` block.

    ``peak`` is the largest sum of bytes alive at one time that did not exist at entry; ``live``
    what is alive now.

    Args:
        meta: count tensors of the meta device, which others would take; they are left out else.
    """

    def __init__(self, meta: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch annotates it not
        self.meta = meta
        self.live = 0
        self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._inputs: dict[int, weakref.ref[Any]] = {}

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in self._inputs:
            return

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self.live -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _note(self, storage: torch.UntypedStorage) -> None:
        """A storage that an operation reads before any made it was there at entry."""
        key = storage._cdata
        if key not in self._seen and key not in self._inputs:
            self._inputs[key] = weakref.ref(storage, lambda _: self._inputs.pop(key, None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count what it made."""
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (self.meta or x.device.type != "meta"):
                self._add(x.untyped_storage())
        return out
