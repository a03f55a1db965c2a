"""The meta twin of wan/stacking_triton.py: what its kernels allocate, for a count before anything is loaded."""
from __future__ import annotations

from torch import Tensor

from wan.stacking import PAST, Sum


def stack(value: Sum, gamma: Tensor | None, past: Tensor, keep: bool = True) -> tuple[Tensor, Tensor | None]:
    """Shapes of wan.stacking.stack."""
    x = value.x
    return x.new_empty(*x.shape[:-1], (PAST + 1) * x.shape[-1]), x if keep else None


def activate(value: Sum, gamma: Tensor) -> Tensor:
    """Shapes of wan.stacking.activate."""
    return value.x.new_empty(value.x.shape)


def spread(value: Sum, times: int) -> Tensor:
    """Shapes of wan.stacking.spread."""
    clips, frames, height, width, channels = value.x.shape
    return value.x.new_empty(clips, frames * times, 2 * height, 2 * width, channels // times)
