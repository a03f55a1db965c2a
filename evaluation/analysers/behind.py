"""What lies behind the subjects: its colour, its pattern, and how far it has moved from what it was.

T frames, H height, W width.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from evaluation.analysers.palette import nearest
from evaluation.analysers.segment import blocks
from training.world.vocabulary import PATTERNS

LEVELS = 256
CELL = 2                 # pixels averaged before the pattern is judged: noise and compression go, stripes stay
PLAIN_DEVIATION = 0.018  # of brightness in 0..1; the faintest pattern of this world has 0.035
GRADIENT_SHARE = 0.65    # of the variance that a plane explains
PEAK_REACH = 1.3         # cycles a frame height around a peak that belong to it
CONE = 0.15              # half the opening of the cone around a direction
# Stripes and checks have two tones (a fourth moment near 1) and one wave or two equal crossing ones; noise has neither.
FOURTH_WEIGHT = 0.5
STRIPED, CHECKED = -0.27, -0.36  # midway between them and noise, as rendered and as blurred
LOWEST = 2.0             # frequencies below, in cycles a frame height, are slow shading and no pattern


@dataclass(frozen=True)
class Behind:
    """The background of every frame."""

    rgb: np.ndarray         # [T, 3] mean, 0..1
    name: np.ndarray        # [T] index into palette.PROTOTYPES; a subject's colour where it left the backgrounds
    pattern: np.ndarray     # [T] index into PATTERNS
    histogram: np.ndarray   # [T, 3, LEVELS] pixels of each level
    energy: np.ndarray      # [T, 5] deviation of brightness; its variance's shares of plane, line, grid; fourth moment


def look_behind(frames: np.ndarray, free: np.ndarray) -> Behind:
    """Measure the background. Shapes: frames uint8 [T, H, W, 3]; free bool [T, H, W], True where no subject is near."""
    histogram = np.zeros((len(frames), 3, LEVELS), np.int64)
    for index, (frame, open_) in enumerate(zip(frames, free, strict=True)):
        histogram[index] = np.reshape(Image.fromarray(frame).histogram(Image.fromarray(open_)), (3, LEVELS))
    rgb = mean_of(histogram)
    energy = np.concatenate([_pattern_energy(frames[block], free[block]) for block in blocks(len(frames))])
    return Behind(rgb, nearest(rgb, lightness=0.7), name_pattern(energy), histogram, energy)


def mean_of(histogram: np.ndarray) -> np.ndarray:
    """Mean colour in 0..1 of histograms [..., 3, LEVELS] -> [..., 3]; 0 where nothing was seen."""
    return histogram @ np.arange(LEVELS) / np.maximum(histogram.sum(-1), 1) / (LEVELS - 1)


def colour_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far one distribution of colours lies from another, mean over the channels, 0..1.

    The mean absolute difference after sorting both (the 1-Wasserstein distance): a sliding texture costs nothing,
    a change of any tone counts in full. Shapes: [..., 3, LEVELS] counts, broadcast; returns [...].
    """
    cdf_a = np.cumsum(a, -1) / np.maximum(a.sum(-1, keepdims=True), 1)
    cdf_b = np.cumsum(b, -1) / np.maximum(b.sum(-1, keepdims=True), 1)
    return np.abs(cdf_a - cdf_b).sum(-1).mean(-1) / (LEVELS - 1)


def name_pattern(energy: np.ndarray) -> np.ndarray:
    """[T, 5] energies -> index into PATTERNS [T]."""
    deviation, plane, line, grid, fourth = energy.T
    choice = np.full(len(energy), PATTERNS.index("noise"))
    choice[grid - FOURTH_WEIGHT * fourth > CHECKED] = PATTERNS.index("checker")
    choice[line - grid - FOURTH_WEIGHT * fourth > STRIPED] = PATTERNS.index("stripes")
    choice[plane >= GRADIENT_SHARE] = PATTERNS.index("gradient")
    choice[deviation < PLAIN_DEVIATION] = PATTERNS.index("plain")
    return choice


def _pattern_energy(frames: np.ndarray, free: np.ndarray) -> np.ndarray:
    """[T, 5], see Behind.energy; line, grid and fourth moment are of what the plane leaves."""
    bright, open_ = _reduced(frames, free)
    count = np.maximum(_dot(open_, open_), 1)
    bright = (bright - (_dot(bright, open_) / count)[:, None, None]) * open_
    rest = bright - _plane(bright, open_)
    square = rest ** 2
    total, left = _dot(bright, bright) / count, _dot(rest, rest) / count
    fourth = _dot(square, square) / count / np.maximum(left ** 2, 1e-16)
    return np.stack([np.sqrt(total), 1 - left / np.maximum(total, 1e-12), *_peaks(rest), fourth], 1)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sums of products over height and width, [T, h, w] -> [T]."""
    return np.einsum("thw,thw->t", a, b)


def _reduced(frames: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brightness averaged over cells [T, h, w], and 1 where a whole cell is background; both float32."""
    height, width = (size // CELL * CELL for size in free.shape[1:])
    rows = [(slice(None), slice(y, height, CELL), slice(width)) for y in range(CELL)]
    sums = sum(frames[row].astype(np.uint16) for row in rows).reshape(len(frames), height // CELL, width // CELL, -1)
    bright = sum(np.moveaxis(sums, -1, 0)).astype(np.float32) / (3 * 255 * CELL ** 2)
    open_ = np.logical_and.reduce([free[row][:, :, x::CELL] for row in rows for x in range(CELL)])
    return bright, open_.astype(np.float32)


def _plane(bright: np.ndarray, open_: np.ndarray) -> np.ndarray:
    """The least-squares plane through `bright` where `open_`, zero elsewhere. [T, h, w]."""
    count, height, width = bright.shape
    ys, xs = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
    basis = np.stack([np.ones_like(xs), xs, ys], -1).reshape(-1, 3).astype(np.float32)          # [h * w, 3]
    products = (basis[:, :, None] * basis[:, None]).reshape(-1, 9)
    normal = (open_.reshape(count, -1) @ products).reshape(count, 3, 3)
    right = bright.reshape(count, -1) @ basis
    slope = np.linalg.solve(normal + 1e-3 * np.eye(3), right[..., None])[..., 0].astype(np.float32)
    return (slope @ basis.T).reshape(bright.shape) * open_


def _peaks(rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the energy along the strongest wave's direction, and in its square grid. [T] each.

    The first is that of all frequencies within a narrow double cone, as stripes have, harmonics included.
    The second is that of the strongest frequency and of the same frequency turned by 90 degrees, the weaker
    counted twice, as checks have.
    """
    count, height, width = rest.shape
    taper = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[1:-1]
    wave = np.fft.rfft2(rest * taper.astype(np.float32))
    half = wave.real ** 2 + wave.imag ** 2
    other = half[:, :, (width - 1) // 2:0:-1][:, -np.arange(height)]                  # the rest is its mirror image
    fy = (np.fft.fftfreq(height) * height)[:, None].astype(np.float32)                # cycles a frame height
    fx = (np.fft.fftfreq(width) * height).astype(np.float32)
    power = np.concatenate([half, other], 2) * (fx ** 2 + fy ** 2 >= LOWEST ** 2)

    def near(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """`power` within reach of one frequency a frame, x and y [T, 1, 1]."""
        return power * ((fx - x) ** 2 + (fy - y) ** 2 <= PEAK_REACH ** 2)

    total = np.maximum(power.sum((1, 2)), 1e-12)
    row, column = np.divmod(power.reshape(count, -1).argmax(1), width)
    top_x, top_y = fx[column][:, None, None], fy[row][:, :, None]
    for _ in range(2):                                                                # to the peak's centre of mass
        weight = near(top_x, top_y)
        mass = np.maximum(weight.sum((1, 2), keepdims=True), 1e-12)
        top_x, top_y = (weight * fx).sum((1, 2), keepdims=True) / mass, (weight * fy).sum((1, 2), keepdims=True) / mass
    length = np.maximum(np.hypot(top_x, top_y), 1e-9)
    unit_x, unit_y = top_x / length, top_y / length
    beside = np.abs(fx * unit_y - fy * unit_x)                                        # distance from the wave's line
    along = np.abs(fx * unit_x + fy * unit_y)
    cone = _dot(power, (beside <= np.maximum(PEAK_REACH, CONE * along)).astype(np.float32)) / total
    mine, turned = near(top_x, top_y).sum((1, 2)), near(-top_y, top_x).sum((1, 2))
    return cone, 4 * np.minimum(mine, turned) / total                                 # 4: each has its mirror image
