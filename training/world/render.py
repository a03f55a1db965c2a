"""From scenes to pixels: batched over clips and frames, anti-aliased, on any device.

B clips, T pixel frames, N shapes, H height, W width.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.world.backdrops import paint
from training.world.scene import Scene, WaveBatch, World
from training.world.shapes import signed_distance
from training.world.vocabulary import KINDS

EDGE_PIXELS = 1.3  # width of the soft edge
CLIP_FRAMES = 81


@dataclass(frozen=True)
class BodyBatch:
    """One shape of each of several clips."""

    clips: list[int]  # which clip of the batch each belongs to; on the host, so that no one asks the device
    kind: Tensor      # [n] int64
    rgb: Tensor       # [n, 3]
    x: Tensor         # [n, T] pixels, camera applied
    y: Tensor         # [n, T]
    radius: Tensor    # [n, T]
    turn: Tensor      # [n, T] cycles


def render(
    scenes: Sequence[Scene], *, world: World = World(), start_frame: int = 0, num_frames: int = CLIP_FRAMES,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw pixel frames start_frame .. start_frame + num_frames - 1 of every scene.

    Returns: float32 [B, T, 3, H, W] in [-1, 1]. A scene looks the same in any batch and on any device, up to rounding.
    Raises: ValueError for no scene, no frame or a negative start.
    """
    if not scenes or num_frames < 1 or start_frame < 0:
        raise ValueError(
            f"render got {len(scenes)} scenes, start_frame={start_frame}, num_frames={num_frames}; "
            "it needs at least one scene and one frame, from frame 0 on."
        )
    seconds = (torch.arange(start_frame, start_frame + num_frames, dtype=torch.float64) / world.fps).to(device)
    views = [scene.view for scene in scenes]
    pan_x = WaveBatch.of([view.pan_x for view in views], device).at(seconds)
    pan_y = WaveBatch.of([view.pan_y for view in views], device).at(seconds)
    zoom = 1 + WaveBatch.of([view.zoom for view in views], device).at(seconds)
    light = WaveBatch.of([view.light for view in views], device).at(seconds)
    pixels = paint([scene.backdrop for scene in scenes], world, seconds, pan_x, pan_y, zoom)   # [B, 3, T, H, W]
    for slot in range(max(len(scene.bodies) for scene in scenes)):
        _draw(pixels, scenes, _bodies(scenes, slot, world, seconds, pan_x, pan_y, zoom), world)
    pixels.mul_((1 + light).to(pixels.dtype)[:, None, :, None, None]).clamp_(0, 1)
    return pixels.mul_(2).sub_(1).transpose(1, 2)


def to_frames(pixels: Tensor) -> Tensor:
    """[B, T, 3, H, W] in [-1, 1] -> uint8 [B, T, H, W, 3]."""
    return pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


def _bodies(
    scenes: Sequence[Scene], slot: int, world: World, seconds: Tensor, pan_x: Tensor, pan_y: Tensor, zoom: Tensor,
) -> BodyBatch:
    clips = [index for index, scene in enumerate(scenes) if slot < len(scene.bodies)]
    bodies = [scenes[index].bodies[slot] for index in clips]
    device = seconds.device

    def column(values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(device)[:, None]

    which = torch.tensor(clips).to(device)
    zoom = zoom[which]
    x = column([body.center[0] for body in bodies]) + WaveBatch.of([body.x for body in bodies], device).at(seconds)
    y = column([body.center[1] for body in bodies]) + WaveBatch.of([body.y for body in bodies], device).at(seconds)
    pulse = WaveBatch.of([body.pulse for body in bodies], device).at(seconds)
    turn = column([body.tilt for body in bodies]) + column([body.spin for body in bodies]) * seconds
    middle_x, middle_y = world.width / 2, world.height / 2
    return BodyBatch(
        clips=clips,
        kind=torch.tensor([KINDS.index(body.kind) for body in bodies]).to(device),
        rgb=torch.tensor([body.rgb for body in bodies]).to(device),
        x=(middle_x + pan_x[which] + zoom * (x - middle_x)).float(),
        y=(middle_y + pan_y[which] + zoom * (y - middle_y)).float(),
        radius=(column([body.radius for body in bodies]) * (1 + pulse) * zoom).float(),
        turn=(turn - turn.floor()).float(),
    )


def _draw(pixels: Tensor, scenes: Sequence[Scene], bodies: BodyBatch, world: World) -> None:
    """Paint one shape of each clip over `pixels` [B, 3, T, H, W], in place, shaded along the clip's light."""
    device = pixels.device
    views = [scenes[index].view for index in bodies.clips]
    across = torch.arange(world.width, device=device) + 0.5
    down = torch.arange(world.height, device=device) + 0.5
    dx = across - bodies.x[..., None, None]                      # [n, T, 1, W]
    dy = down[:, None] - bodies.y[..., None, None]               # [n, T, H, 1]
    radius = bodies.radius[..., None, None]
    distance = signed_distance(bodies.kind, radius, bodies.turn[..., None, None], dx, dy)
    cover = (0.5 - distance / EDGE_PIXELS).clamp_(0, 1)          # [n, T, H, W]
    angle = torch.tensor([view.shade_angle for view in views]).to(device).mul(2 * torch.pi)[:, None, None, None]
    strength = torch.tensor([view.shade for view in views]).to(device)[:, None, None, None]
    facing = (dx * torch.cos(angle) + dy * torch.sin(angle)) / radius
    tone = 1 - strength * (0.5 + 0.5 * facing).clamp_(0, 1)
    whole = len(views) == len(scenes)  # then no copy is needed
    which = torch.tensor(bodies.clips).to(device)
    for channel in range(3):
        behind = pixels[:, channel] if whole else pixels[which, channel]
        behind += cover * (bodies.rgb[:, channel, None, None, None] * tone - behind)
        if not whole:
            pixels[which, channel] = behind
