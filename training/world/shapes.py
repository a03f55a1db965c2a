"""Shapes as signed distances, in pixels: negative inside, exact along the edges.

Polygons with n-fold symmetry are one formula: fold the angle into half a sector, then measure to the one
edge that is left, from an outer corner to an inner one.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

from training.world.vocabulary import KINDS

# kind -> (corners, outer radius, inner corner's radius / outer), both radii in units of the nominal radius
POLYGONS = {
    "square": (4, 1.12, math.cos(math.pi / 4)),
    "triangle": (3, 1.18, 0.5),
    "star": (5, 1.15, 0.45),
}
ROUND = {"circle": 1.0, "ring": 1.05}
RING_HOLE = 0.55  # inner radius / nominal radius
FIRST_CORNER = {"square": -1 / 8, "triangle": -1 / 4, "star": -1 / 4}  # in turns; y points down, so -1/4 is up


def reach(kind: str, turning: bool) -> tuple[float, float, float]:
    """How far a shape extends sideways, up and down from its centre, in units of its nominal radius."""
    if kind in ROUND:
        return (ROUND[kind],) * 3
    corners, outer, _ = POLYGONS[kind]
    if turning:
        return (outer,) * 3
    angles = [2 * math.pi * (FIRST_CORNER[kind] + corner / corners) for corner in range(corners)]
    xs, ys = [outer * math.cos(a) for a in angles], [outer * math.sin(a) for a in angles]
    return max(xs), -min(ys), max(ys)


def signed_distance(kind: Tensor, radius: Tensor, turn: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Distance to the outline.

    Shapes: `kind` [B] index into KINDS; `radius` and `turn` (cycles) broadcast against the offsets `dx`, `dy` [B, ..].
    Returns: pixels, negative inside, shape of `dx` and `dy` broadcast.
    """
    def table(values: list[float]) -> Tensor:
        column = torch.tensor(values, dtype=dx.dtype).to(dx.device)[kind]
        return column.view(-1, *([1] * (dx.dim() - 1)))

    polygon = [POLYGONS.get(name, (3, 1.0, 0.5)) for name in KINDS]
    half = table([math.pi / corners for corners, _, _ in polygon])
    outer = table([size for _, size, _ in polygon]) * radius
    inner = outer * table([ratio for _, _, ratio in polygon])
    first = table([FIRST_CORNER.get(name, 0.0) for name in KINDS])

    length = torch.hypot(dx, dy)
    angle = torch.atan2(dy, dx) - 2 * torch.pi * (first + turn)
    folded = (torch.remainder(angle + half, 2 * half) - half).abs()
    edge_x, edge_y = inner * torch.cos(half) - outer, inner * torch.sin(half)   # from outer to inner corner
    scale = torch.hypot(edge_x, edge_y)
    to_edge = (edge_y * (length * torch.cos(folded) - outer) - edge_x * length * torch.sin(folded)) / scale

    round_outer = table([ROUND.get(name, 1.0) for name in KINDS]) * radius
    to_circle = length - round_outer
    to_ring = torch.maximum(to_circle, RING_HOLE * radius - length)
    is_ring = table([float(name == "ring") for name in KINDS]).bool()
    is_round = table([float(name in ROUND) for name in KINDS]).bool()
    return torch.where(is_round, torch.where(is_ring, to_ring, to_circle), to_edge)
