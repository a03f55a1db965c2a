"""Brightness, contrast, saturation, sharpness and clipped pixels of every frame, and how far they drift."""
from __future__ import annotations

import numpy as np

from evaluation.metrics.protocol import Frame, Metric, Value, VideoInfo
from evaluation.metrics.series import of_frames

MEASURES = ("brightness", "contrast", "saturation", "sharpness", "clipped")
UNSEEN = (float("nan"),) * len(MEASURES)
SAMPLES_PER_S = 8.0
CLIPPED, CLEAR = 3.0, 15.0  # levels from black or white: clipped up to here, and by less and less up to there


class Picture(Metric):
    """Picture statistics of eight frames a second, all in 0..1.

    brightness: mean luma. contrast: its standard deviation (RMS contrast). saturation: mean of max - min of R, G, B
    (the chroma of HSV) of the thumbnail, since video stores colour coarsely. sharpness: mean gradient of luma at half
    size. clipped: share of pixels nearly black or white, with soft edges so that no single level decides.
    """

    name = "picture"
    reports = tuple(name for measure in MEASURES for name in (measure, f"{measure}_drift"))
    gives = tuple(f"{measure}{value}" for measure in MEASURES
                  for value in ("@second", "@whole", "_drift@first_last_5s", "_drift@first_last_15pct"))
    protocol = "8 frames a second; luma BT.601; colours of the thumbnail; gradient at half size; drift: |first - last|"

    def start(self, video: VideoInfo) -> PictureReader:
        return PictureReader(video)


class PictureReader:
    def __init__(self, video: VideoInfo):
        self.fps = video.fps
        self.every = max(1, round(video.fps / SAMPLES_PER_S))
        self.series: list[tuple[float, ...]] = []

    def add(self, frame: Frame) -> None:
        self.series.append(UNSEEN if frame.index % self.every else measures(frame))

    def values(self) -> list[Value]:
        columns = np.array(self.series, np.float64).T
        return [
            value for name, column in zip(MEASURES, columns, strict=True)
            for value in of_frames(name, column, self.fps, drift=True)
        ]


def measures(frame: Frame) -> tuple[float, ...]:
    """The numbers of one frame, in the order of MEASURES."""
    luma = frame.luma
    red, green, blue = np.moveaxis(frame.thumbnail, 2, 0)
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    from_edge = np.minimum(luma, 255 - luma)
    clipped = np.clip((CLEAR - from_edge) / (CLEAR - CLIPPED), 0, 1)
    return (
        float(luma.mean()) / 255, float(luma.std()) / 255, float(chroma.mean()) / 255, gradient(frame.half) / 255,
        float(clipped.mean()),
    )


def gradient(luma: np.ndarray) -> float:
    """Mean length of the gradient, central differences, inside the border. 0 for pictures below 3 pixels."""
    if min(luma.shape) < 3:
        return 0.0
    across = (luma[1:-1, 2:] - luma[1:-1, :-2]) / 2
    down = (luma[2:, 1:-1] - luma[:-2, 1:-1]) / 2
    return float(np.sqrt(across * across + down * down).mean())
