"""How much memory work needs, without doing it: tensors on the meta device have shapes and no data.

What a run does with them is counted, allocation by allocation, as the tensors come and go.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside, `now` and at their `peak`; on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        taken = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_iter(result):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage(), taken)
        return result

    def _note(self, storage: torch.UntypedStorage, taken: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in taken:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_bytes(work: Callable[[], Any]) -> tuple[int, int]:
    """The most bytes that `work` holds at a time beside what was there before, and how many its result keeps."""
    with LiveBytes() as live:
        result = work()
    kept = live.now
    del result
    return live.peak, kept


def tensor_bytes(*tensors: Tensor) -> int:
    """Bytes of tensors, each storage once."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())
