"""Marks in time: CUDA events on a GPU, the processor's clock elsewhere.

A mark costs no synchronisation, so it may stand between passes; only `wait` and `ms` ask the device.
"""
from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """What a measurement needs of time; a mark means something to the clock that made it."""

    def mark(self) -> Any:
        """Now, as the device sees it: after all work that was queued before."""

    def wait(self, mark: Any) -> None:
        """Block the host until `mark` has passed."""

    def ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks that have passed."""


class DeviceClock:
    """Events in the current CUDA stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def ms(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end)


class HostClock:
    """The wall clock, for devices that work while the host waits."""

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self, mark: float) -> None:
        """Nothing to wait for: the work before a mark is done when the mark is made."""

    def ms(self, begin: float, end: float) -> float:
        return 1000 * (end - begin)


def clock_of(device: torch.device) -> Clock:
    """The clock that suits a device."""
    return DeviceClock() if device.type == "cuda" else HostClock()
