"""Rotary position embedding of Wan, split into space and time: the only file with cos and sin.

A head's channels are time, then height, then width. Height and width never change, so they turn once,
when a token is written. Time depends on the window that a token is seen in, so it turns when a window
is built. Angles are float64, products at least float32, and each result is rounded once.

B batch, L tokens, H heads, D head dim.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

THETA = 10_000.0


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """How a head's channels are shared out to time, height and width: d - 4 (d // 6), 2 (d // 6), 2 (d // 6)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def phase_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products are computed in: float32, or float64 where the input is."""
    return torch.promote_types(dtype, torch.float32)


class Turn(NamedTuple):
    """A rotation of pairs of channels, in a form that compilers fuse: x * cos + (x, pairs swapped) * sin.

    `cos`, `sin`: [..., L, 1, channels], ready to be broadcast over heads, float32 (float64 for float64 inputs);
    1 and 0 for channels that stay.
    """

    cos: Tensor
    sin: Tensor

    def repeated(self, frames: int) -> Turn:
        """Of one frame's tokens [n, 1, D] -> of `frames` such frames'."""
        return Turn(*(x.repeat(frames, 1, 1) for x in self))


def turn(x: Tensor, by: Turn) -> Tensor:
    """Rotate interleaved pairs (2i, 2i + 1) of the last dimension.

    Shapes: x [..., L, H, D], of which `by` turns all channels.
    Returns: same shape and dtype as `x`, rounded once.
    Source: Wan2.1 3D RoPE; keys cached before rotation after StreamingLLM, arXiv:2309.17453.
    """
    wide = x.to(by.cos.dtype)
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (wide * by.cos + swapped * by.sin).to(x.dtype)


def time_turn(position: Tensor, head_dim: int, dtype: torch.dtype) -> Turn:
    """Rotation of a head's temporal channels, and of these alone, to `position`.

    Shapes: position [B, L] or [L], window time in latent frames; any sign, any size.
    """
    return _turn_by(_angles(position, axis_channels(head_dim)[0]), dtype)


def space_turn(
    rows: int, columns: int, head_dim: int, dtype: torch.dtype, device: torch.device, covers: int = 1,
) -> Turn:
    """Rotation of one frame's tokens in height and width, row by row: [rows * columns, 1, head_dim].

    A token that stands for `covers` x `covers` others sits at their centre. Temporal channels stay.
    """
    (time, height, width), centre = axis_channels(head_dim), (covers - 1) / 2
    row = _angles(torch.arange(rows, device=device) * covers + centre, height)
    column = _angles(torch.arange(columns, device=device) * covers + centre, width)
    row = row[:, None].expand(-1, columns, -1)
    column = column[None].expand(rows, -1, -1)
    by = _turn_by(torch.cat([row, column], dim=-1).flatten(0, 1), dtype)
    return Turn(F.pad(by.cos, (time, 0), value=1.0), F.pad(by.sin, (time, 0)))


def both_turns(times: Tensor, space: Turn) -> Turn:
    """All channels of whole frames at `times` [F], in latent frames: the temporal ones, and from `space` the others.

    Shapes: space [F * n, 1, head_dim], of frames of n tokens; the result is like it.
    """
    tokens, _, head_dim = space.cos.shape
    time = time_turn(times.repeat_interleave(tokens // len(times)), head_dim, space.cos.dtype)
    pairs, moving = zip(time, space, strict=True), time.cos.shape[-1]
    return Turn(*(torch.cat([temporal, spatial[..., moving:]], dim=-1) for temporal, spatial in pairs))


class FrameTurns:
    """Rotations of whole frames' tokens; they repeat, so each is made once and keeps its address.

    Args:
        frame: of one frame in height and width, as `space_turn` makes it.
        centres: [F] float64, when frames are, in latent frames from the first; None: at 0, 1, ..., however many.
    """

    def __init__(self, frame: Turn, centres: Tensor | None = None):
        self._frame, self.centres = frame, centres
        self._made: dict[tuple[int, int | None], Turn] = {}

    def space(self, frames: int) -> Turn:
        """Height and width of `frames` frames' tokens: [L, 1, D]."""
        if (frames, None) not in self._made:
            self._made[frames, None] = self._frame.repeated(frames)
        return self._made[frames, None]

    def window(self, frames: int, position: int) -> Turn:
        """The same, and time, what `centres` count from being at `position`."""
        if (frames, position) not in self._made:
            centres = torch.arange(frames, device=self._frame.cos.device) if self.centres is None else self.centres
            self._made[frames, position] = both_turns(position + centres, self.space(frames))
        return self._made[frames, position]


def _angles(position: Tensor, channels: int) -> Tensor:
    """[...] positions -> [..., channels / 2] angles, float64; each axis has frequencies of its own width."""
    exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=position.device) / max(channels, 1)
    return position.to(torch.float64).unsqueeze(-1) * THETA**-exponent


def _turn_by(angles: Tensor, dtype: torch.dtype) -> Turn:
    """[..., L, pairs] angles -> rotation of as many pairs."""
    angles = angles.unsqueeze(-2)
    cos, sin = angles.cos().to(phase_dtype(dtype)), angles.sin().to(phase_dtype(dtype))
    return Turn(torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2))
