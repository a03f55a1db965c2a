"""What stands between two causal convolutions of the VAE, as one pass over memory: add, normalise, activate, stack.

A causal convolution over three frames is a 2-D one over each frame stacked with the two before it. The plain twin
says what is computed; the Triton kernel reads every value once and writes its three copies.

B clips, T frames, H, W size, C channels; frames are channels-last.
"""
from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

PAST = 2  # frames before the first that a convolution over three sees


@dataclass
class Sum:
    """A value that is still to be added up: x + bias + shortcut. x and shortcut [B, T, H, W, C], bias [C]."""

    x: Tensor | None
    bias: Tensor | None = None
    shortcut: Tensor | None = None

    @property
    def is_settled(self) -> bool:
        return self.bias is None and self.shortcut is None

    def settled(self) -> Tensor:
        """The value, rounded once."""
        if self.is_settled:
            return self.x
        x = _wide(self.x)
        for more in (self.bias, self.shortcut):
            x = x if more is None else x + more
        return x.to(self.x.dtype)

    def release(self) -> None:
        """Let go of the tensors: it was read for the last time, and whoever still holds it shall hold no memory."""
        self.x = self.bias = self.shortcut = None


def stack(value: Sum, gamma: Tensor | None, past: Tensor, keep: bool = True) -> tuple[Tensor, Tensor | None]:
    """Each frame, normalised and activated, behind the two before it.

    Args:
        gamma: [C], scale of an RMS norm over channels that SiLU follows; None: neither.
        past: [B, PAST, H, W, C], the frames before the first; overwritten by the last ones of this call.
        keep: the settled value is wanted; it may take the place of value.x, which nobody else may need then.
    Returns: the stacks [B, T, H, W, 3 C], oldest first, and the settled value [B, T, H, W, C] or None.
    """
    settled = value.settled()
    x = settled if gamma is None else activate(Sum(settled), gamma)
    video = torch.cat([past, x], dim=1)
    past.copy_(video[:, -PAST:])
    frames = x.shape[1]
    return torch.cat([video[:, tap:tap + frames] for tap in range(PAST + 1)], dim=-1), settled if keep else None


def activate(value: Sum, gamma: Tensor) -> Tensor:
    """The value, RMS-normalised over channels, scaled by gamma [C], and SiLU: [B, T, H, W, C]."""
    x = value.settled()
    return F.silu(F.normalize(_wide(x), dim=-1) * x.shape[-1] ** 0.5 * gamma).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def spread(value: Sum, times: int) -> Tensor:
    """The value, each pixel twice in height and in width; C = times * c channels become `times` frames in a row.

    Returns: [B, T * times, 2 H, 2 W, c].
    """
    x = value.settled()
    clips, frames, height, width, channels = x.shape
    x = x.view(clips, frames, height, 1, width, 1, times, channels // times).permute(0, 1, 6, 2, 3, 4, 5, 7)
    x = x.expand(-1, -1, -1, -1, 2, -1, 2, -1)
    return x.reshape(clips, frames * times, 2 * height, 2 * width, channels // times)


def load_kernels(device: torch.device) -> ModuleType:
    """The module whose `stack`, `activate` and `spread` are the fastest for a device: this one or a twin."""
    if device.type == "meta":
        return import_module("wan.stacking_shapes")
    on_gpu = device.type == "cuda" and find_spec("triton") is not None
    return import_module("wan.stacking_triton" if on_gpu else "wan.stacking")
