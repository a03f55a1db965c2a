"""Work that is recorded once and replayed: CUDA graphs, behind a protocol that tests can stand in for."""
from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Replay = Callable[[], None]
Result = TypeVar("Result")


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
    """Does work by key: what is met again under the same one is recorded, and replayed from then on.

    The key stands for the work, the shapes and addresses of what it reads, and all else that it depends on.
    """

    def __init__(self, recorder: Recorder | None):
        self._record = recorder
        self._met: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[Replay, list[Any]]] = {}
        self._places: dict[Hashable, Tensor] = {}

    def clear(self) -> None:
        self._met.clear()
        self._recorded.clear()
        self._places.clear()

    def place(self, name: Hashable, x: Tensor) -> Tensor:
        """A copy of x at the address that recorded work knows by this name; x itself where nothing is recorded."""
        if self._record is None:
            return x
        if name not in self._places:
            self._places[name] = torch.empty_like(x)
        return self._places[name].copy_(x)

    def __call__(self, key: Hashable, work: Callable[[], Result]) -> Result:
        """What `work` returns; its tensors are written again by the next call with the same key."""
        if self._record is None or key not in self._met:
            self._met.add(key)
            return work()
        if key not in self._recorded:
            results = []
            self._recorded[key] = self._record(lambda: results.append(work())), results
        replay, results = self._recorded[key]
        replay()
        return results[0]
