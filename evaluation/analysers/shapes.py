"""What a component is: kind, colour, place, size and turn, from its pixels' moments.

A shape with n-fold symmetry has a large complex moment of order n: the sum of z**n over its pixels, z = x + iy
from its centre. Its size says which kind it is, its phase how far it is turned.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.analysers.palette import PROTOTYPES, SUBJECTS, oklab
from evaluation.analysers.segment import Pixels, surrounded
from training.world.vocabulary import KINDS

SYMMETRY = {"triangle": 3, "square": 4, "star": 5}
ORDERS = (3, 4, 5)
CORE = 0.6      # of the rms radius: empty in a ring, full in all else

# Each kind's features (|moment| of order 3, 4, 5; compactness, 1 for a disc; share of the core), as rendered.
CENTRES = np.array([
    {"circle": (0.01, 0.01, 0.01, 1.00, 0.18), "square": (0.01, 0.42, 0.02, 0.96, 0.19),
     "triangle": (0.65, 0.02, 0.03, 0.83, 0.22), "star": (0.02, 0.03, 0.80, 0.82, 0.22),
     "ring": (0.01, 0.01, 0.01, 0.55, 0.00)}[kind] for kind in KINDS
])
SCALES = np.array([0.32, 0.21, 0.40, 0.22, 0.10])  # half the way between two kinds counts as one, in every feature


@dataclass(frozen=True)
class Shapes:
    """All components of all frames; lengths in pixels."""

    frame: np.ndarray    # [C]
    kind: np.ndarray     # [C] index into KINDS
    colour: np.ndarray   # [C] index into SUBJECTS
    rgb: np.ndarray      # [C, 3] 0..1, mean
    x: np.ndarray        # [C]
    y: np.ndarray        # [C]
    radius: np.ndarray   # [C] of the disc of equal area
    turn: np.ndarray     # [C] cycles within one symmetry sector, for polygons
    area: np.ndarray     # [C]
    features: np.ndarray  # [C, 5]


def describe(frames: np.ndarray, found: Pixels) -> Shapes:
    """Measure and name every component. Shapes: frames uint8 [T, H, W, 3]."""
    total, spread, area = found.total, found.spread, found.area
    rows, columns = np.divmod(found.at % (frames.shape[1] * frames.shape[2]), frames.shape[2])
    x, y = total(columns) / area, total(rows) / area
    z = (columns - spread(x)) + 1j * (rows - spread(y))
    distance = np.abs(z)
    scatter = total(distance ** 2) / area                     # squared rms radius
    moments, power, length = [], z * z, distance ** 2
    for _ in ORDERS:                                          # each the one before times z
        power, length = power * z, length * distance
        moments.append(total(power) / np.maximum(total(length), 1e-9))
    core = total(distance < spread(CORE * np.sqrt(scatter))) / area
    compact = area / (2 * np.pi * np.maximum(scatter, 1e-9))
    features = np.stack([*(np.abs(moment) for moment in moments), compact, core], 1)
    kind = name_kind(features)
    rgb = _mean_colour(frames, found)
    phase = np.zeros(len(area))
    for name, order in SYMMETRY.items():
        mine = kind == KINDS.index(name)
        phase[mine] = np.angle(moments[ORDERS.index(order)][mine]) / (2 * np.pi * order)
    return Shapes(found.frame, kind, name_colour(rgb), rgb, x, y, np.sqrt(area / np.pi), phase, area, features)


def _mean_colour(frames: np.ndarray, found: Pixels) -> np.ndarray:
    """Mean over the pixels that are surrounded by their own component: its rim is mixed with the background."""
    owner = np.zeros(frames.shape[:3], np.uint16)
    first = np.searchsorted(found.frame, found.frame)                   # of its frame: neighbours are told apart there
    owner.reshape(-1)[found.at] = found.spread(1 + np.arange(len(first)) - first)
    inside = surrounded(owner).take(found.at)
    sums = found.total(frames.reshape(-1, 3).take(found.at, 0) * inside[:, None])
    return sums / np.maximum(found.total(inside), 1)[:, None] / 255


def name_colour(rgb: np.ndarray) -> np.ndarray:
    """The nearest subject colour, index into SUBJECTS. Shapes: rgb [C, 3] in 0..1; returns [C]."""
    apart = oklab(rgb)[:, None] - oklab(PROTOTYPES[: len(SUBJECTS)])
    return (apart ** 2).sum(-1).argmin(-1)


def name_kind(features: np.ndarray) -> np.ndarray:
    """The nearest kind, index into KINDS. Shapes: features [C, 5]; returns [C]."""
    return (((features[:, None] - CENTRES) / SCALES) ** 2).sum(-1).argmin(-1)
