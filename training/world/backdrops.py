"""Backgrounds: two tones of one colour mixed by a pattern that slides slowly.

Each pattern is a field in [-1, 1], -1 the dark tone and +1 the light one.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.world.scene import Backdrop, World

SOFT_PIXELS = 1.6      # half the width of an edge between two tones
NOISE_CELLS = 64       # the noise repeats after so many cells, beyond the frame
NOISE_GAIN = 2.4       # value noise rarely reaches its extremes


@dataclass(frozen=True)
class Placed:
    """The backdrops of one pattern, turned and slid into place."""

    u: Tensor          # [n, T, H, W] pixels along the pattern's angle
    v: Tensor          # [n, T, H, W] pixels across it
    period: Tensor     # [n, 1, 1, 1] pixels
    seeds: Tensor      # [n] int64
    reach: Tensor      # [n, 1, 1, 1] half the frame's extent along u


def paint(
    backdrops: Sequence[Backdrop], world: World, seconds: Tensor, pan_x: Tensor, pan_y: Tensor, zoom: Tensor,
) -> Tensor:
    """All backgrounds.

    Shapes: seconds [T]; pan_x, pan_y (pixels), zoom [B, T], all float64. Returns float32 [B, 3, T, H, W] in 0..1.
    """
    device, frames = seconds.device, seconds.shape[0]
    pixels = torch.empty(len(backdrops), 3, frames, world.height, world.width, device=device)
    for pattern in FIELDS:
        clips = [index for index, backdrop in enumerate(backdrops) if backdrop.pattern == pattern]
        if not clips:
            continue
        chosen = [backdrops[index] for index in clips]
        which = torch.tensor(clips).to(device)
        placed = _place(chosen, world, seconds, pan_x[which], pan_y[which], zoom[which])
        mix = FIELDS[pattern](placed).mul(0.5).add(0.5)
        dark = torch.tensor([backdrop.dark for backdrop in chosen]).to(device)[..., None, None, None]
        light = torch.tensor([backdrop.light for backdrop in chosen]).to(device)[..., None, None, None]
        for channel in range(3):
            pixels[which, channel] = dark[:, channel] + mix * (light - dark)[:, channel]
    return pixels


def _place(
    backdrops: list[Backdrop], world: World, seconds: Tensor, pan_x: Tensor, pan_y: Tensor, zoom: Tensor,
) -> Placed:
    device = seconds.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(device)[:, None]

    angle = 2 * torch.pi * column([backdrop.angle for backdrop in backdrops])
    cos, sin = torch.cos(angle), torch.sin(angle)
    period = column([backdrop.period for backdrop in backdrops])
    slide_x = column([backdrop.slide[0] for backdrop in backdrops]) * seconds
    slide_y = column([backdrop.slide[1] for backdrop in backdrops]) * seconds
    cycle = period * NOISE_CELLS / 2    # every pattern repeats after this; keeps float32 exact for hours
    start_u = column([backdrop.phase[0] for backdrop in backdrops]) * cycle
    start_v = column([backdrop.phase[1] for backdrop in backdrops]) * cycle
    # world = (screen - middle - pan) / zoom + slide, then turned: linear in the screen, so only offsets vary with time
    offset_x, offset_y = slide_x - pan_x / zoom, slide_y - pan_y / zoom
    offset_u = torch.remainder(start_u + cos * offset_x + sin * offset_y, cycle).float()[..., None, None]
    offset_v = torch.remainder(start_v - sin * offset_x + cos * offset_y, cycle).float()[..., None, None]
    scale = (1 / zoom).float()[..., None, None]
    cos, sin = cos.float()[..., None, None], sin.float()[..., None, None]
    x = (torch.arange(world.width, device=device) + 0.5 - world.width / 2).float()
    y = (torch.arange(world.height, device=device) + 0.5 - world.height / 2).float()[:, None]
    across, along = cos * x + sin * y, cos * y - sin * x          # [n, 1, H, W]
    reach = (cos.abs() * world.width + sin.abs() * world.height) / 2
    return Placed(
        u=scale * across + offset_u, v=scale * along + offset_v, period=period.float()[..., None, None],
        seeds=torch.tensor([backdrop.texture_seed for backdrop in backdrops]).to(device), reach=reach,
    )


def _plain(placed: Placed) -> Tensor:
    return torch.zeros_like(placed.u)


def _stripes(placed: Placed) -> Tensor:
    return _square_wave(placed.u, placed.period)


def _checker(placed: Placed) -> Tensor:
    return _square_wave(placed.u, placed.period) * _square_wave(placed.v, placed.period)


def _square_wave(position: Tensor, period: Tensor) -> Tensor:
    """A square wave with edges as soft as the shapes': a clipped triangle of the same zero crossings."""
    phase = torch.remainder(position / period, 1.0)
    to_edge = (0.25 - (phase - 0.5).abs()) * period        # pixels from the nearest change, signed
    return (to_edge / SOFT_PIXELS).clamp_(-1, 1)


def _gradient(placed: Placed) -> Tensor:
    """Dark to light across the frame; it stays with the frame, as only a boundless texture can slide for ever."""
    middle = placed.u.mean(dim=(2, 3), keepdim=True)
    return ((placed.u - middle) / placed.reach).clamp_(-1, 1)


def _noise(placed: Placed) -> Tensor:
    """Two layers of value noise, the finer one turned by 45 degrees to hide the grid; both repeat with the cycle."""
    cell = placed.period / 2
    u, v = placed.u / cell, placed.v / cell
    grid = _lattice(placed.seeds)
    return (0.6 * _value_noise(u, v, grid) + 0.4 * _value_noise(u + v, v - u, grid)).mul_(NOISE_GAIN).clamp_(-1, 1)


def _value_noise(u: Tensor, v: Tensor, grid: Tensor) -> Tensor:
    """Random numbers at whole (u, v), blended smoothly between. Shapes: u, v [n, T, H, W], grid [n, cells ** 2]."""
    whole_u, whole_v = u.floor(), v.floor()
    part_u, part_v = _smooth(u - whole_u), _smooth(v - whole_v)
    left, up = whole_u.long(), whole_v.long()

    def corner(du: int, dv: int) -> Tensor:
        index = torch.remainder(left + du, NOISE_CELLS) * NOISE_CELLS + torch.remainder(up + dv, NOISE_CELLS)
        return grid.gather(1, index.view(len(grid), -1)).view_as(u)

    top = torch.lerp(corner(0, 0), corner(1, 0), part_u)
    bottom = torch.lerp(corner(0, 1), corner(1, 1), part_u)
    return torch.lerp(top, bottom, part_v)


def _smooth(fraction: Tensor) -> Tensor:
    return fraction * fraction * (3 - 2 * fraction)


def _lattice(seeds: Tensor) -> Tensor:
    """Random numbers in [-1, 1] for every grid point, by integer hashing: exact on every device.

    Shapes: seeds [n] int64; returns float32 [n, NOISE_CELLS ** 2].
    """
    state = (seeds[:, None] + torch.arange(NOISE_CELLS ** 2, device=seeds.device) * 0x9E3779B1) & 0xFFFFFFFF
    for _ in range(2):
        state = ((state ^ (state >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    state = state ^ (state >> 16)
    return (state & 0xFFFF).float() / 32767.5 - 1


FIELDS = {"plain": _plain, "gradient": _gradient, "stripes": _stripes, "checker": _checker, "noise": _noise}
