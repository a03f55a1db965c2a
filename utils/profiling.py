"""Time per stage and peak memory, without stalling the device."""
from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StageClock:
    """Sums milliseconds per named stage: CUDA events on a GPU, the wall clock elsewhere.

    A stage counts what the stream that is current does between its begin and its end; stages of two streams may
    overlap, and then slow each other. The time of a stage inside another does not count for the outer one. Only
    `totals_ms` waits for events; those that are over are read as stages go by.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: deque[tuple[str, int, Any, Any]] = deque()  # name, 1 or -1, begin, end
        self._open: list[str] = []
        self._totals_ms: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`."""
        begin, outer = self._mark(), self._open[-1:]
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
            end = self._mark()
            self._marks += [(name, 1, begin, end), *((around, -1, begin, end) for around in outer)]
            while self._marks and (not self._cuda or self._marks[0][3].query()):
                self._read(*self._marks.popleft())

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def totals_ms(self) -> dict[str, float]:
        """Milliseconds of every stage so far; waits for their ends."""
        while self._marks:
            if self._cuda:
                self._marks[0][3].synchronize()
            self._read(*self._marks.popleft())
        return dict(self._totals_ms)

    def _read(self, name: str, sign: int, begin: Any, end: Any) -> None:
        self._totals_ms[name] += sign * (begin.elapsed_time(end) if self._cuda else 1000 * (end - begin))


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement; on a CPU the peak is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes allocated on the GPU since the last reset, or held by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
