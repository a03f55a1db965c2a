"""The headline score of a long video: how far its look has gone from its first five seconds, as an eye would see it.

Two terms, both blind to where things are, so that motion alone costs little:
* colour: distance between the distributions of colours, in CIE Lab units (Delta E): the sliced Wasserstein distance.
  Brightening, over-saturation, fading and turning hues all move it, and so does a background that changes.
* detail: halvings or doublings of the mean gradient, each as bad as DETAIL_WEIGHT Delta E. Blur and grain move it.

0 means that the look held. As a rule of thumb a Delta E of 2 is just seen, and one of 10 at a glance. What moves away
by itself, such as a camera that turns to another scene, counts as drift too: compare methods on the same prompts.
"""
from __future__ import annotations

from collections import deque

import numpy as np

from evaluation.metrics.picture import gradient
from evaluation.metrics.protocol import Frame, Metric, TooShortError, Value, VideoInfo
from evaluation.metrics.series import ENDS_S

SAMPLES_PER_S = 4.0
DIRECTIONS, QUANTILES = 16, 32
SLICES = 2.0             # a shift of all colours by d moves random projections by |d| / 2 on average
DETAIL_WEIGHT = 10.0     # Delta E that a halving or doubling of the mean gradient counts for
LEAST_GRADIENT = 0.25    # levels of 255; plain pictures have no detail to lose
WHITE_XYZ = np.array([0.95047, 1.0, 1.08883])
RGB_TO_XYZ = np.array([
    [0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041],
])
LINEAR = np.where(np.arange(256) <= 10, np.arange(256) / 255 / 12.92, ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4)


class Drift(Metric):
    """`drift`: the mean distance of the last 5 s from the first 5 s (whole seconds of half the video, if it is shorter
    than 10 s). Every look at the video weighs the same.

    Per second: that second's distance from the first 5 s. `drift_colour` and `drift_detail` are the two terms.
    """

    name = "drift"
    reports = ("drift", "drift_colour", "drift_detail")
    gives = tuple(f"drift{part}@{at}" for part in ("", "_colour", "_detail") for at in ("second", "whole"))
    protocol = "sliced Wasserstein distance of colours in Delta E + 10 |log2 gradient ratio|, against the first 5 s"

    def start(self, video: VideoInfo) -> DriftReader:
        return DriftReader(video)


class Looks:
    """The mean of some looks at the video, such as those of a second."""

    def __init__(self):
        self.count, self.colours, self.gradients = 0, 0.0, 0.0

    def add(self, colours: np.ndarray, gradient: float) -> None:
        """Add a look. Shapes: colours [DIRECTIONS, QUANTILES]."""
        self.count += 1
        self.colours = self.colours + colours
        self.gradients += gradient

    def terms(self, colours: np.ndarray, detail: float) -> tuple[float, float]:
        """Distance of the colours, and of the detail, from these; both in Delta E."""
        colour = SLICES * float(np.abs(self.colours / self.count - colours).mean())
        return colour, DETAIL_WEIGHT * abs(self.detail - detail)

    @property
    def detail(self) -> float:
        """log2 of the mean gradient: one less is a halving."""
        return float(np.log2(max(self.gradients / self.count, LEAST_GRADIENT)))


class DriftReader:
    """Keeps a sum a second, and the looks of the last seconds, which are counted from the video's end."""

    def __init__(self, video: VideoInfo):
        self.fps = video.fps
        self.every = max(1, round(video.fps / SAMPLES_PER_S))
        self.frames = 0
        self.seconds: dict[int, Looks] = {}
        self.recent: deque[tuple] = deque(maxlen=int(ENDS_S * video.fps / self.every) + 1)  # index, colours, gradient

    def add(self, frame: Frame) -> None:
        self.frames = frame.index + 1
        if frame.index % self.every:
            return
        look = colour_quantiles(frame.thumbnail), gradient(frame.half)
        self.seconds.setdefault(int(frame.index / self.fps), Looks()).add(*look)
        self.recent.append((frame.index, *look))

    def values(self) -> list[Value]:
        reach = int(min(ENDS_S, self.frames / self.fps / 2))
        if reach < 1:
            raise TooShortError("too short to drift: 2 s are needed")
        first, last = [self.seconds[second] for second in range(reach)], self._last(reach)
        weights = [looks.count for looks in first]
        then = (
            sum(looks.colours for looks in first) / sum(weights),
            float(np.average([looks.detail for looks in first], weights=weights)),
        )
        whole = np.average([looks.terms(*then) for looks in last], axis=0, weights=[looks.count for looks in last])
        curve = np.array([looks.terms(*then) for looks in self.seconds.values()])  # [seconds, 2]
        names = {"drift_colour": [1, 0], "drift_detail": [0, 1], "drift": [1, 1]}
        return [
            value for name, terms in names.items() for value in (
                Value(name, "whole", None, float(whole @ terms)),
                *(Value(name, "second", float(second), float(look @ terms))
                  for second, look in zip(self.seconds, curve, strict=True)),
            )
        ]

    def _last(self, reach: int) -> list[Looks]:
        """The last `reach` seconds, counted from the end, so that each is whole however the video's length falls."""
        seconds: dict[int, Looks] = {}
        for index, *look in self.recent:
            back = int((self.frames - 1 - index) / self.fps)
            if back < reach:
                seconds.setdefault(back, Looks()).add(*look)
        return [*seconds.values()]


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of sRGB. Shapes: uint8 [..., 3] -> float64 [..., 3]."""
    ratio = LINEAR[rgb] @ RGB_TO_XYZ.T / WHITE_XYZ
    curve = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(curve, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def directions(number: int = DIRECTIONS) -> np.ndarray:
    """Unit vectors spread evenly over a half sphere (opposite ones project alike). Shapes: [number, 3]."""
    height = (np.arange(number) + 0.5) / number
    angle = np.arange(number) * np.pi * (3 - np.sqrt(5))
    radius = np.sqrt(1 - height ** 2)
    return np.stack([height, radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def colour_quantiles(rgb: np.ndarray) -> np.ndarray:
    """Quantiles of the colours along every direction; their mean absolute difference is the sliced Wasserstein
    distance of two pictures. Shapes: uint8 [H, W, 3] -> float64 [DIRECTIONS, QUANTILES].
    """
    along = np.sort(directions() @ lab(rgb).reshape(-1, 3).T, axis=1)                        # [DIRECTIONS, H * W]
    edges = np.linspace(0, along.shape[1], QUANTILES + 1).astype(int)
    if edges[1] == 0:  # fewer pixels than quantiles
        return np.repeat(along, -(-QUANTILES // along.shape[1]), axis=1)[:, :QUANTILES]
    return np.add.reduceat(along, edges[:-1], axis=1) / np.diff(edges)
