"""Dense attention alone: time and error of every kernel that is there, over the windows that a policy shows.

One layer's call with random queries, keys and values. Attention over many random keys leaves little but the mean of
the values, so they have one.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.clock import Clock
from benchmarks.cycles import Schedule
from benchmarks.summary import Spread, finite_or_none
from pipeline.build import RunPlan
from wan.backends import FP8_BACKENDS, AttentionBackend, installed, load_backend, sdpa
from wan.fp8 import FP8, LEAST_CAPABILITY

WARM_CALLS, CALLS = 5, 30
COMPARED = 256  # queries whose result is held against float32, which takes a map of all their keys
MEAN = 0.3      # of the values, whose spread is 1


@dataclass(frozen=True, kw_only=True)
class KernelSpeed:
    """One kernel over one window."""

    kernel: str
    window_frames: float
    query_tokens: int
    key_tokens: int
    call_ms: Spread
    tflops: float          # a second, by the median call
    relative_error: float | None  # against float32 attention of the numbers that the kernel was given; None: no number


def measure_attention(plan: RunPlan, schedule: Schedule, clock: Clock) -> list[KernelSpeed]:
    """Every kernel over every window that the schedule's steady chunks show."""
    a, g, device = plan.architecture, plan.geometry, plan.device
    new, lines = g.chunk_frames * g.frame_tokens, []
    for frames in sorted({schedule.windows[i] for i in schedule.steady}):
        seen = round(frames * g.frame_tokens)
        generator = torch.Generator(device).manual_seed(0)
        query, keys, values = (
            torch.randn(1, tokens, a.num_heads, a.head_dim, device=device, generator=generator)
            for tokens in (new, seen, seen)
        )
        for name, dtype, kernel in _kernels(plan):
            given = [x.to(dtype) for x in (query, keys, values + MEAN)]
            call_ms = Spread.of(_times(kernel, given, clock))
            lines.append(KernelSpeed(
                kernel=name, window_frames=frames, query_tokens=new, key_tokens=seen, call_ms=call_ms,
                tflops=4 * new * seen * a.dim / call_ms.median / 1e9, relative_error=_error(kernel, given),
            ))
    return lines


def _kernels(plan: RunPlan) -> Iterator[tuple[str, torch.dtype, AttentionBackend]]:
    """What runs on the plan's device in its dtype, and in 8-bit floats."""
    device, dtype = plan.device, plan.dtype
    on_gpu = device.type == "cuda"
    packages = installed() - {"sdpa", "cudnn"} if on_gpu and dtype == torch.bfloat16 else frozenset()
    narrow = on_gpu and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    for name in ("sdpa", *(["cudnn"] if on_gpu else []), *sorted(packages)):
        kernel = load_backend(name, device, dtype, plan.architecture.head_dim)[1]
        yield name, dtype, kernel
        if narrow and name in FP8_BACKENDS:
            yield f"{name}, 8 bits", FP8, kernel


@torch.inference_mode()
def _times(kernel: AttentionBackend, given: list[torch.Tensor], clock: Clock) -> list[float]:
    """Milliseconds of each call."""
    for _ in range(WARM_CALLS):
        kernel(*given)
    times = []
    for _ in range(CALLS):
        begin = clock.mark()
        kernel(*given)
        end = clock.mark()
        clock.wait(end)
        times.append(clock.ms(begin, end))
    return times


@torch.inference_mode()
def _error(kernel: AttentionBackend, given: list[torch.Tensor]) -> float | None:
    ours = kernel(*given)[:, :COMPARED].float()
    query, keys, values = (x.float() for x in given)
    exact = sdpa(query[:, :COMPARED], keys, values)
    return finite_or_none((ours - exact).norm() / exact.norm())
