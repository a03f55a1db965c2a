"""Naming colours: the nearest of this world's prototypes, as the eye would measure it."""
from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import combinations

import numpy as np

from training.world.vocabulary import BACKGROUNDS, COLOURS

SUBJECTS = tuple(COLOURS)
BEHIND = tuple(BACKGROUNDS)
PROTOTYPES = np.array([*COLOURS.values(), *BACKGROUNDS.values()])   # [16, 3], subjects first
TABLE_BITS = 6


def half_way(colours: Iterable[tuple[float, float, float]]) -> float:
    """Half the distance of the two nearest of these colours, mean absolute RGB: from there on it may be another one."""
    return min(float(np.abs(np.subtract(a, b)).mean()) for a, b in combinations(colours, 2)) / 2


SUBJECT_KEPT, BEHIND_KEPT = half_way(COLOURS.values()), half_way(BACKGROUNDS.values())


def oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..1 [..., 3] -> Oklab [..., 3], in which distance is what the eye sees.

    Source: B. Ottosson, "A perceptual color space for image processing" (2020).
    """
    rgb = np.clip(rgb, 0, 1)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array([
        [0.4122214708, 0.2119034982, 0.0883024619],
        [0.5363325363, 0.6806995451, 0.2817188376],
        [0.0514459929, 0.1073969566, 0.6299787005],
    ])
    return np.cbrt(cones) @ np.array([
        [0.2104542553, 1.9779984951, 0.0259040371],
        [0.7936177850, -2.4285922050, 0.7827717662],
        [-0.0040720468, 0.4505937099, -0.8086757660],
    ])


def nearest(rgb: np.ndarray, *, lightness: float = 1.0) -> np.ndarray:
    """Index into PROTOTYPES of the nearest colour. Shapes: rgb [..., 3] in 0..1; returns int64 [...].

    `lightness` below 1 trusts the hue more than the brightness.
    """
    weight = np.array([lightness, 1.0, 1.0])
    apart = (oklab(rgb)[..., None, :] - oklab(PROTOTYPES)) * weight
    return (apart ** 2).sum(-1).argmin(-1)


@functools.cache
def pixel_table() -> np.ndarray:
    """uint8 [2 ** (3 * TABLE_BITS)]: the nearest prototype of every coarse colour: naming a pixel is one look-up."""
    levels = (np.arange(2 ** TABLE_BITS) + 0.5) / 2 ** TABLE_BITS
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    return np.concatenate([nearest(part) for part in np.array_split(grid, 16)]).astype(np.uint8)


def name_pixels(frames: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> index into PROTOTYPES, uint8 [...]."""
    coarse = frames >> (8 - TABLE_BITS)
    entry = coarse[..., 0].astype(np.int32)
    for channel in (1, 2):
        entry <<= TABLE_BITS
        entry |= coarse[..., channel]
    return pixel_table().take(entry)
