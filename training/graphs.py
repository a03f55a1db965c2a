"""Training steps without launch overhead: captured once as CUDA graphs, replayed from then on."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = 3  # calls before a capture: kernels are compiled and chosen then


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: dict[str, Tensor]


class Graphs:
    """Calls functions of fixed shapes; on a GPU by replaying what their first call recorded, elsewhere plainly.

    A function may read its inputs and module weights, differentiate, and write to tensors that outlive it. It must
    not draw random numbers, look at values, or depend on anything else that changes.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._captured: dict[str, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def __call__(
        self, name: str, function: Callable[..., dict[str, Tensor]], *inputs: Tensor,
    ) -> dict[str, Tensor]:
        """What `function(*inputs)` returns; `name` stands for the function and its shapes."""
        if self._pool is None:
            return function(*inputs)
        if name not in self._captured:
            self._captured[name] = self._capture(function, inputs)
        captured = self._captured[name]
        torch._foreach_copy_(captured.inputs, list(inputs))
        captured.graph.replay()
        return {key: value.clone() for key, value in captured.outputs.items()}

    def _capture(self, function: Callable[..., dict[str, Tensor]], inputs: tuple[Tensor, ...]) -> _Captured:
        fixed = [x.clone() for x in inputs]
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                function(*fixed)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = {key: value.detach() for key, value in function(*fixed).items()}
        return _Captured(graph, fixed, outputs)
