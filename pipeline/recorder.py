"""Work that is recorded once and replayed: CUDA graphs, behind a protocol that tests can stand in for."""
from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Replay = Callable[[], None]


class Recorder(Protocol):
    """Turns a function of fixed shapes and addresses into a replay of its device work."""

    def __call__(self, function: Callable[[], None]) -> Replay:
        """Record without running; the function's work on the host is done now, that on the device by each replay.

        The function has run before in the same shapes, asks the device nothing, and draws no random numbers.
        """


class CudaRecorder:
    """Records CUDA graphs; all share one pool of memory, so they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        return graph.replay
