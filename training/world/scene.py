"""A scene: every number that its video is drawn from, and the same as tensors for a batch.

The scene knows no caption and no class name beyond shapes and patterns; what is named is in truth.py.
Lengths are pixels of the rendered frame, frequencies cycles a second, phases and angles cycles (1 = a full turn),
colours RGB in 0..1. Every motion is a stationary process: it may be drawn from any second on.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.world.vocabulary import REFERENCE_HEIGHT

WAVES = ("still", "cosine", "triangle", "rounded", "parabola")


@dataclass(frozen=True)
class World:
    """The frame in which everything is sampled and drawn."""

    height: int = 96
    width: int = 160
    fps: int = 16

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.fps) < 1 or 5 * self.width < 8 * self.height:
            raise ValueError(
                f"World(height={self.height}, width={self.width}, fps={self.fps}): three shapes need a frame "
                "of at least 8:5 and positive numbers. Widen it."
            )

    @property
    def unit(self) -> float:
        """Pixels per pixel of the reference frame."""
        return self.height / REFERENCE_HEIGHT


@dataclass(frozen=True)
class Wave:
    """One coordinate over time: centre + amplitude * shape(frequency * t + phase), the shape within [-1, 1]."""

    shape: str = "still"
    amplitude: float = 0.0
    frequency: float = 0.0
    phase: float = 0.0


@dataclass(frozen=True)
class Body:
    """One shape on its way."""

    kind: str
    rgb: tuple[float, float, float]
    radius: float
    center: tuple[float, float]
    x: Wave
    y: Wave
    tilt: float = 0.0        # angle at t = 0
    spin: float = 0.0        # turns a second
    pulse: Wave = Wave()     # relative change of the radius


@dataclass(frozen=True)
class Backdrop:
    """What lies behind: two tones of one colour in a pattern that slides."""

    pattern: str
    dark: tuple[float, float, float]
    light: tuple[float, float, float]
    angle: float
    period: float                   # of the stripes; checker cells and noise cells are half of it
    phase: tuple[float, float]
    slide: tuple[float, float]      # pixels a second
    texture_seed: int


@dataclass(frozen=True)
class View:
    """Camera and light: all small and slow."""

    pan_x: Wave
    pan_y: Wave
    zoom: Wave
    light: Wave            # relative gain of all colours
    shade: float           # how much darker a shape is on its far side
    shade_angle: float


@dataclass(frozen=True)
class Scene:
    """One clip's world."""

    bodies: tuple[Body, ...]
    backdrop: Backdrop
    view: View


@dataclass(frozen=True)
class WaveBatch:
    """Waves as tensors, all of one shape [...]; `shape` is an index into WAVES."""

    shape: Tensor
    amplitude: Tensor
    frequency: Tensor
    phase: Tensor

    @staticmethod
    def of(waves: list[Wave], device: torch.device | str) -> WaveBatch:
        """Stack `waves` to tensors of shape [len(waves)], float64: a minute of phase must not cost precision."""
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).to(device)

        return WaveBatch(
            shape=torch.tensor([WAVES.index(wave.shape) for wave in waves]).to(device),
            amplitude=column([wave.amplitude for wave in waves]),
            frequency=column([wave.frequency for wave in waves]),
            phase=column([wave.phase for wave in waves]),
        )

    def at(self, seconds: Tensor) -> Tensor:
        """amplitude * shape(frequency * t + phase) for every wave and time.

        Shapes: seconds [T] float64; returns [..., T] float64.
        """
        cycles = self.frequency[..., None] * seconds + self.phase[..., None]
        u = cycles - cycles.floor()
        sine = torch.sin(2 * torch.pi * cycles)
        rounded = 0.97  # how far the rounded wave goes towards the triangle's corner
        shapes = torch.stack((
            torch.zeros_like(u),
            torch.cos(2 * torch.pi * cycles),
            1 - 4 * (u - 0.5).abs(),
            torch.asin(rounded * sine) / torch.asin(torch.tensor(rounded, dtype=torch.float64)).to(sine.device),
            1 - 8 * u * (1 - u),  # y points down: rests on +1, flies up to -1
        ))
        index = self.shape[..., None].expand_as(u)[None]
        return self.amplitude[..., None] * shapes.gather(0, index)[0]
