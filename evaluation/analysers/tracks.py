"""Shapes over time: which component of one frame is which of the next.

T frames, S slots. A slot follows one shape; a shape that vanishes and one that appears at the same time share
a slot, and the distance between them is a jump.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.analysers.shapes import Shapes

SLOTS = 6                 # this world shows three shapes; more are duplicates
COLOUR_COST = 0.25        # of the frame's height: a neighbour of another colour is as far as that
KIND_COST = 0.10
PATIENCE_FRAMES = 4       # a shape missing for longer has ended; what comes later starts anew


@dataclass(frozen=True)
class Tracks:
    """Per slot and frame; NaN and -1 where the slot is empty. Lengths in pixels."""

    kind: np.ndarray      # [T, S] index into KINDS or -1
    colour: np.ndarray    # [T, S] index into SUBJECTS or -1
    rgb: np.ndarray       # [T, S, 3]
    x: np.ndarray         # [T, S]
    y: np.ndarray         # [T, S]
    radius: np.ndarray    # [T, S]
    turn: np.ndarray      # [T, S] cycles within a symmetry sector

    @property
    def present(self) -> np.ndarray:
        """[T, S] bool."""
        return self.kind >= 0


def follow(shapes: Shapes, num_frames: int, height: int) -> Tracks:
    """Assign every component to a slot, largest first where there are more than SLOTS in a frame."""
    chosen = np.full((num_frames, SLOTS), -1)
    order = np.lexsort((-shapes.area, shapes.frame))
    bounds = np.searchsorted(shapes.frame[order], np.arange(num_frames + 1))
    last = np.full(SLOTS, -1)                 # the slot's newest component
    seen = np.full(SLOTS, -10 ** 6)           # and its frame
    for frame in range(num_frames):
        found = order[bounds[frame]:bounds[frame + 1]][:SLOTS]
        alive = [slot for slot in range(SLOTS) if frame - seen[slot] <= PATIENCE_FRAMES]
        for slot, component in _match(shapes, found, alive, last, seen, height).items():
            chosen[frame, slot] = component
            last[slot], seen[slot] = component, frame
    return _gather(shapes, chosen)


def _match(
    shapes: Shapes, found: np.ndarray, alive: list[int], last: np.ndarray, seen: np.ndarray, height: int,
) -> dict[int, int]:
    """slot -> component: the nearest pairs first, then newcomers into the slots longest empty."""
    assigned: dict[int, int] = {}
    left = list(found)
    if alive and left:
        before = last[alive]
        cost = np.hypot(shapes.x[before][:, None] - shapes.x[left], shapes.y[before][:, None] - shapes.y[left]) / height
        cost += COLOUR_COST * (shapes.colour[before][:, None] != shapes.colour[left])
        cost += KIND_COST * (shapes.kind[before][:, None] != shapes.kind[left])
        for _ in range(min(cost.shape)):
            row, column = divmod(int(cost.argmin()), len(left))
            assigned[alive[row]] = left[column]
            cost[row], cost[:, column] = np.inf, np.inf
        left = [component for component in left if component not in assigned.values()]
    free = sorted((slot for slot in range(SLOTS) if slot not in assigned), key=lambda slot: (seen[slot], slot))
    assigned.update(zip(free, left, strict=False))
    return assigned


def _gather(shapes: Shapes, chosen: np.ndarray) -> Tracks:
    empty = chosen < 0

    def of(values: np.ndarray, missing: float) -> np.ndarray:
        if not len(values):
            return np.full(chosen.shape + values.shape[1:], missing, values.dtype)
        taken = values[np.maximum(chosen, 0)].copy()
        taken[empty] = missing
        return taken

    return Tracks(
        kind=of(shapes.kind, -1), colour=of(shapes.colour, -1), rgb=of(shapes.rgb, np.nan),
        x=of(shapes.x, np.nan), y=of(shapes.y, np.nan), radius=of(shapes.radius, np.nan), turn=of(shapes.turn, np.nan),
    )
