"""Work that is recorded once and replayed: CUDA graphs, behind a protocol that tests can stand in for."""
from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

Replay = Callable[[], None]


class Recorder(Protocol):
    """Turns a function of fixed shapes and addresses into a replay of its device work."""

    def __call__(self, function: Callable[[], None]) -> Replay:
        """Record without running; the function's work on the host is done now, that on the device by each replay.

        The function has run before in the same shapes, asks the device nothing, and draws no random numbers.
        """


class CudaRecorder:
    """Records CUDA graphs of one device (None: the current one); all share one pool of memory, so they never run at
    the same time. What does needs a recorder of its own.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # others may go on
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
            function()
        return graph.replay


class Replays:
    """Calls functions of one tensor; what is met again under the same key is recorded, and replayed from then on.

    The key stands for the function, its shapes, and all else that it depends on.
    """

    def __init__(self, recorder: Recorder | None):
        self._record = recorder
        self._met: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[Replay, Tensor, list[Tensor]]] = {}

    def clear(self) -> None:
        self._met.clear()
        self._recorded.clear()

    def __call__(self, key: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x); the result is overwritten by the next call with the same key."""
        if self._record is None or key not in self._met:
            self._met.add(key)
            return function(x)
        if key not in self._recorded:
            place, results = x.clone(), []
            self._recorded[key] = self._record(lambda: results.append(function(place))), place, results
        replay, place, results = self._recorded[key]
        place.copy_(x)
        replay()
        return results[0]
