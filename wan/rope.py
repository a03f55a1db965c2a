"""Rotary position embedding of Wan, split into space and time: the only file with cos and sin.

A head's channels are time, then height, then width. Height and width never change, so they turn once,
when a token is written. Time depends on the window that a token is seen in, so it turns when a window
is built. Angles are float64, products at least float32, and each result is rounded once.

B batch, L tokens, H heads, D head dim.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

THETA = 10_000.0


@dataclass(frozen=True)
class AxisChannels:
    """How a head's channels are shared out; each count is even."""

    time: int
    height: int
    width: int

    @classmethod
    def of(cls, head_dim: int) -> AxisChannels:
        """Shares of a head of `head_dim` channels: d - 4 (d // 6), 2 (d // 6), 2 (d // 6)."""
        side = 2 * (head_dim // 6)
        return cls(time=head_dim - 2 * side, height=side, width=side)


@dataclass(frozen=True)
class Phase:
    """Cosine and sine of one rotation, ready to be broadcast over heads.

    `cos`, `sin`: [..., L, 1, channels / 2], float32 (float64 for float64 inputs).
    """

    cos: Tensor
    sin: Tensor


def phase_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products are computed in: float32, or float64 where the input is."""
    return torch.promote_types(dtype, torch.float32)


def _angles(position: Tensor, channels: int) -> Tensor:
    """[...] positions -> [..., channels / 2] angles, float64; each axis has frequencies of its own width."""
    exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=position.device) / max(channels, 1)
    return position.to(torch.float64).unsqueeze(-1) * THETA**-exponent


def _phase(angles: Tensor, dtype: torch.dtype) -> Phase:
    angles = angles.unsqueeze(-2)
    return Phase(cos=angles.cos().to(phase_dtype(dtype)), sin=angles.sin().to(phase_dtype(dtype)))


def time_phase(position: Tensor, head_dim: int, dtype: torch.dtype) -> Phase:
    """Rotation of the temporal channels to `position`.

    Shapes: position [B, L] or [L], window time in latent frames; any sign, any size.
    """
    return _phase(_angles(position, AxisChannels.of(head_dim).time), dtype)


def space_phase(
    rows: int, columns: int, head_dim: int, dtype: torch.dtype, device: torch.device, covers: int = 1,
) -> Phase:
    """Rotation of the height and width channels of one frame's tokens, row by row: [rows * columns, 1, ...].

    A token that stands for `covers` x `covers` others sits at their centre.
    """
    share, centre = AxisChannels.of(head_dim), (covers - 1) / 2
    row = _angles(torch.arange(rows, device=device) * covers + centre, share.height)
    column = _angles(torch.arange(columns, device=device) * covers + centre, share.width)
    row = row[:, None].expand(-1, columns, -1)
    column = column[None].expand(rows, -1, -1)
    return _phase(torch.cat([row, column], dim=-1).flatten(0, 1), dtype)


def _turn(x: Tensor, phase: Phase) -> Tensor:
    """Rotate interleaved pairs (2i, 2i + 1) of the last dimension; returns the phase's dtype."""
    real, imaginary = x.to(phase.cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(
        [real * phase.cos - imaginary * phase.sin, real * phase.sin + imaginary * phase.cos], dim=-1
    ).flatten(-2)


@dataclass(frozen=True)
class Turn:
    """A rotation of all channels of a head, in a form that compilers fuse: x * cos + (x, pairs swapped) * sin.

    `cos`, `sin`: [..., L, 1, D] as in `Phase`; 1 and 0 for channels that stay.
    """

    cos: Tensor
    sin: Tensor

    @property
    def inverse(self) -> Turn:
        """The rotation that undoes this one."""
        return Turn(self.cos, -self.sin)


def turn_of(phase: Phase, channels: int, first: int = 0) -> Turn:
    """`phase` applied to the channels from `first` on, of `channels` in all; the others stay."""
    behind = channels - first - 2 * phase.cos.shape[-1]
    cos = torch.stack([phase.cos, phase.cos], dim=-1).flatten(-2)
    sin = torch.stack([-phase.sin, phase.sin], dim=-1).flatten(-2)
    return Turn(F.pad(cos, (first, behind), value=1.0), F.pad(sin, (first, behind)))


def both_turns(time: Turn, space: Turn) -> Turn:
    """Time and space at once: no channel is turned by both, so cosines multiply and sines add."""
    return Turn(time.cos * space.cos, time.sin + space.sin)


def turn(x: Tensor, by: Turn) -> Tensor:
    """What `rotate_time` and `rotate_space` give, bit for bit: same shape and dtype as `x` [..., L, H, D]."""
    wide = x.to(by.cos.dtype)
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (wide * by.cos + swapped * by.sin).to(x.dtype)


def time_table(position: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the `Turn` of the temporal channels alone, to `position` [B, L] or [L]."""
    phase = time_phase(position, head_dim, dtype)
    table = turn_of(phase, 2 * phase.cos.shape[-1])
    return table.cos, table.sin


def rotate_time(x: Tensor, phase: Phase) -> Tensor:
    """Rotate the temporal channels of `x`; leave the rest untouched.

    Shapes:
        x: [..., L, H, D]; the first `AxisChannels.time` of D are temporal.
    Returns: same shape and dtype as `x`, rounded once.
    Source: Wan2.1 3D RoPE; keys cached before rotation after StreamingLLM, arXiv:2309.17453.
    """
    time = 2 * phase.cos.shape[-1]
    return torch.cat([_turn(x[..., :time], phase).to(x.dtype), x[..., time:]], dim=-1)


def rotate_space(x: Tensor, phase: Phase) -> Tensor:
    """Rotate the height and width channels of whole frames; leave the temporal ones untouched.

    Shapes:
        x: [B, frames, frame_tokens, H, D]; phase from `space_phase`.
    Returns: same shape and dtype as `x`, rounded once.
    """
    time = x.shape[-1] - 2 * phase.cos.shape[-1]
    return torch.cat([x[..., :time], _turn(x[..., time:], phase).to(x.dtype)], dim=-1)
