"""How much memory work needs, without doing it: tensors on the meta device have shapes and no data.

What a run does with them is counted, allocation by allocation, as the tensors come and go.
"""
from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside, `now` and at their `peak`; on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        """Look for another peak from here on."""
        self.peak = self.now

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


class FastKernels(TorchFunctionMode):
    """Inside, meta tensors come as fast kernels make them: attention allocates its result alone, and a convolution of
    channels-last images gives such images.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        result = function(*args, **(kwargs or {}))
        if function is F.conv2d and args[0].is_contiguous(memory_format=torch.channels_last):
            return result.as_strided(result.shape, torch.empty_like(result, memory_format=torch.channels_last).stride())
        return result
