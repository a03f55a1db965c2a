"""What a metric is: it is asked to begin a video, sees every frame once, and then states its values.

A metric knows nothing of files, tables and other metrics. It must not keep frames, but a few kilobytes a second at
most, so that memory does not grow with the video to speak of.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from evaluation.analysers.stability import ChunkLayout

Granularity = Literal["second", "clip2s", "window10s", "whole", "first_last_5s", "first_last_15pct"]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
THUMBNAIL = 48
CELL = 4  # thumbnail pixels a side of a cell; smaller motion averages out in it
NO_PROMPT = "no prompt is known. Give --prompts FILE, or keep the JSON beside the video"
NO_CHUNKS = "the chunk layout is not known. Give --chunk_frames FIRST LATER (Self Forcing: 9 12), or keep the JSON " \
            "beside the video"


class CannotMeasureError(ValueError):
    """This video does not have what the metric needs; the message becomes the error of its row."""


class TooShortError(CannotMeasureError):
    """The video is whole, and the metric says nothing of one so short: it is left out, which is no failure.

    The message says what is needed, not what there is: the log counts the videos of one message together.
    """


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video before its first frame. Units: fps in pixel frames a second, sizes in pixels."""

    name: str                   # for messages
    fps: float
    height: int
    width: int
    prompt: str | None = None   # as it was written, not the longer one that the text encoder may get
    chunks: ChunkLayout | None = None


class Frame:
    """One decoded frame, with what several metrics ask of it computed once."""

    def __init__(self, index: int, rgb: np.ndarray):
        self.index = index  # 0-based
        self.rgb = rgb      # uint8 [H, W, 3]

    @cached_property
    def image(self) -> Image.Image:
        """The frame for Pillow, which copies it."""
        return Image.fromarray(self.rgb)

    @cached_property
    def luma(self) -> np.ndarray:
        """float32 [H, W] in 0..255, ITU-R BT.601."""
        return self.rgb.astype(np.float32) @ LUMA

    @cached_property
    def half(self) -> np.ndarray:
        """Luma averaged over 2 x 2 pixels, float32 [H // 2, W // 2]."""
        height, width = self.luma.shape[0] // 2 * 2, self.luma.shape[1] // 2 * 2
        luma = self.luma[:height, :width]
        return (luma[::2, ::2] + luma[1::2, ::2] + luma[::2, 1::2] + luma[1::2, 1::2]) / 4

    @cached_property
    def thumbnail(self) -> np.ndarray:
        """The picture averaged over squares of pixels, its shorter side about THUMBNAIL pixels: uint8 [h, w, 3]."""
        factor = max(1, min(self.rgb.shape[:2]) // THUMBNAIL)
        return np.asarray(self.image.reduce(factor))

    @cached_property
    def cells(self) -> np.ndarray:
        """Means over cells of CELL x CELL thumbnail pixels: float32 [h / CELL, w / CELL, 3]."""
        size = min(CELL, *self.thumbnail.shape[:2])
        rows, columns = (side // size for side in self.thumbnail.shape[:2])
        whole = self.thumbnail[:rows * size, :columns * size].reshape(rows, size, columns * size * 3)
        lines = whole.sum(1, dtype=np.uint16).reshape(rows, columns, size, 3)  # whole numbers add exactly
        return lines.sum(2, dtype=np.uint16) / np.float32(size * size)


@dataclass(frozen=True)
class Value:
    """One number. `start_s` is where its window begins; None for a value of the whole video."""

    metric: str
    granularity: Granularity
    start_s: float | None
    value: float


class Reader(Protocol):
    """A metric at work on one video."""

    def add(self, frame: Frame) -> None:
        """Take the next frame."""

    def values(self) -> Iterable[Value]:
        """All values, once every frame was added. Raises CannotMeasureError; for a short video TooShortError."""


class Metric(Protocol):
    """One way to read a video."""

    name: str                              # by which it is chosen, as in --metrics
    reports: tuple[str, ...]               # names of the values that every video has; the first one names its errors,
                                           # and always has a value of the whole video
    gives: tuple[str, ...]                 # name@granularity of all that some video may have; {name} is its own name
    protocol: str                          # how its numbers were made, in a line; stands in every row
    shares: tuple[str, ...] = ()           # names of values that are a yes or no of a video, or shares of its frames

    def start(self, video: VideoInfo) -> Reader:
        """Begin a video. Raises CannotMeasureError if what is known of it does not suffice."""


@dataclass(frozen=True)
class Choices:
    """What a user may choose for all metrics."""

    device: str = "cpu"
    weights: Path = Path(".")   # the --folder of `python -m utils.download`
    vlm: str = ""               # MODULE:FUNCTION of a vision-language model, see stability.py
