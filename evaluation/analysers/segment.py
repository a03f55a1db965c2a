"""Subjects against background: which pixels belong to shapes, and which of them belong together.

T frames, H height, W width, C components of all frames together.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from evaluation.analysers.palette import SUBJECTS, name_pixels

REFERENCE_AREA = 96 * 160
SMALLEST_SHARE = 100 / REFERENCE_AREA   # of the frame; the smallest shape of this world takes 250 of 15,360 pixels
LARGEST_SHARE = 0.45
BORDER_CONTACT = 0.10                   # of the frame's outline; shapes stay clear of it
BORDER_RULE = 0.5                       # a subject colour along half of the outline is the background
BLOCK_FRAMES = 64                       # looked at together: what is made of them stays in the processor's cache
SECOND_COLOUR = 0.2                     # share of a component from which its second colour is a shape of its own


@dataclass(frozen=True)
class Pixels:
    """The pixels of components, one component after the other, each in the order of reading."""

    at: np.ndarray          # [P] int64, index into the flattened [T, H, W]
    area: np.ndarray        # [C] int64, pixels of each component
    frame: np.ndarray       # [C] int64, ascending
    touches: np.ndarray     # [C] int64, pixels on the frame's outline

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sums over each component, whole numbers as int64. Shapes: [P, ...] -> [C, ...]."""
        kind = values.dtype if values.dtype.kind in "fc" else np.int64
        return np.add.reduceat(values, np.cumsum(self.area) - self.area, 0, dtype=kind)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Each component's value for all of its pixels. Shapes: [C] -> [P]."""
        return np.repeat(values, self.area)


def blocks(num_frames: int) -> Iterator[slice]:
    """The frames of a video in turns of BLOCK_FRAMES."""
    return (slice(start, start + BLOCK_FRAMES) for start in range(0, num_frames, BLOCK_FRAMES))


def subject_mask(names: np.ndarray) -> np.ndarray:
    """Pixels of a subject's colour, except that of the background where it is one. [T, H, W] names -> bool."""
    mask = names < len(SUBJECTS)
    outline = np.concatenate([names[:, 0], names[:, -1], names[:, 1:-1, 0], names[:, 1:-1, -1]], 1)
    for index in range(len(SUBJECTS)):
        behind = (outline == index).mean(1) > BORDER_RULE
        if behind.any():
            mask[behind] &= names[behind] != index
    return mask


def components(names: np.ndarray, mask: np.ndarray) -> Pixels:
    """Connected shapes of all frames: neither specks nor half the picture.

    Shapes: names, mask [T, H, W]. Touching shapes of two colours are taken apart.
    """
    found = _connected(mask)
    mixed = _two_coloured(found, names)
    if mixed.any():
        mask = mask.copy()
        apart = _apart(found, names, mixed)
        found = _connected(mask, apart)
    return _accepted(found, mask.shape)


def _connected(mask: np.ndarray, barrier: np.ndarray | None = None) -> Pixels:
    """4-connected components by runs: rows are cut into runs, runs that touch are united until nothing changes.

    `barrier` [T, H, W] int: pixels of different values are not joined.
    """
    frames, height, width = mask.shape
    padded = width + 1                                            # nothing ends every row
    value = np.zeros(1 + frames * height * padded, np.int16)      # and begins all
    rows = value[1:].reshape(frames, height, padded)
    rows[:, :, :width] = mask if barrier is None else np.where(mask, barrier + 1, 0)
    change = np.flatnonzero(value[1:] != value[:-1])
    colour = value[1:].take(change)
    runs = np.flatnonzero(colour)
    begin, end, colour = change[runs], change[runs + 1], colour[runs]
    row, x = np.divmod(begin, padded)
    frame, y = np.divmod(row, height)
    first = np.searchsorted(end, begin - padded, "right")         # the runs above: those that end after mine begins
    met = np.searchsorted(begin, end - padded) - first            # and begin before mine ends
    met[y == 0] = 0                                               # above is another frame
    upper, lower = _ranges(first, met), np.repeat(np.arange(len(runs)), met)
    same = colour[upper] == colour[lower]
    root = _unite(len(runs), upper[same], lower[same])

    component = (np.cumsum(root == np.arange(len(runs))) - 1)[root]
    order = np.argsort(component, kind="stable")
    length = end - begin
    on_edge = np.where((y == 0) | (y == height - 1), length, (x == 0).astype(np.int64) + (x + length == width))
    area, touches = (np.bincount(component, count).astype(np.int64) for count in (length, on_edge))
    return Pixels(_ranges((row * width + x)[order], length[order]), area, frame[root == np.arange(len(runs))], touches)


def _ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """All of start[0] ... start[0] + length[0] - 1, then those of start[1], and so on."""
    return np.arange(length.sum()) + np.repeat(start - np.cumsum(length) + length, length)


def _unite(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest member of each node's connected set. Shapes: a, b [E] the edges; returns [count]."""
    root = np.arange(count)
    while True:
        low = np.minimum(root[a], root[b])
        new = root.copy()
        np.minimum.at(new, root[a], low)
        np.minimum.at(new, root[b], low)
        new = new[new]
        while not np.array_equal(new, new[new]):
            new = new[new]
        if np.array_equal(new, root):
            return root
        root = new


def _colour_counts(found: Pixels, names: np.ndarray) -> np.ndarray:
    """[C, subjects]: how many pixels of each colour, counting only those whose neighbours to the sides share it."""
    colours = len(SUBJECTS) + 1
    inside = np.where(_like_neighbours(names, axes=(2,)), np.minimum(names, len(SUBJECTS)), len(SUBJECTS))
    entry = found.spread(np.arange(len(found.area)) * colours) + inside.take(found.at)
    return np.bincount(entry, minlength=len(found.area) * colours).reshape(-1, colours)[:, :-1]


def _two_coloured(found: Pixels, names: np.ndarray) -> np.ndarray:
    """[C] bool: components with two colours of weight, large enough for two shapes."""
    smallest = SMALLEST_SHARE * names.shape[1] * names.shape[2]
    second = np.sort(_colour_counts(found, names), 1)[:, -2]
    return (second > SECOND_COLOUR * found.area) & (second > 0.6 * smallest)


def _apart(found: Pixels, names: np.ndarray, mixed: np.ndarray) -> np.ndarray:
    """A barrier map [T, H, W] int16: the colour's index inside two-coloured components, one value elsewhere."""
    barrier = np.full(names.shape, len(SUBJECTS), np.int16)
    inside = found.at[found.spread(mixed)]
    barrier.reshape(-1)[inside] = names.take(inside)
    return barrier


def _accepted(found: Pixels, shape: tuple[int, ...]) -> Pixels:
    """Drop specks, what covers half the frame, and what runs along its outline."""
    _, height, width = shape
    keep = (found.area >= SMALLEST_SHARE * height * width) & (found.area <= LARGEST_SHARE * height * width)
    keep &= found.touches <= BORDER_CONTACT * 2 * (height + width)
    return Pixels(found.at[found.spread(keep)], found.area[keep], found.frame[keep], found.touches[keep])


def grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """`mask` [T, H, W] widened by a square of `pixels` to every side."""
    wide = mask.copy()
    for axis in (1, 2):
        source = wide.copy()
        for step in range(1, pixels + 1):
            ahead = [slice(None)] * 3
            behind = [slice(None)] * 3
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            wide[tuple(ahead)] |= source[tuple(behind)]
            wide[tuple(behind)] |= source[tuple(ahead)]
    return wide


def surrounded(owner: np.ndarray) -> np.ndarray:
    """Pixels of `owner` [T, H, W] whose four neighbours, as far as the frame reaches, all equal them."""
    return _like_neighbours(owner, axes=(1, 2))


def _like_neighbours(owner: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Pixels of `owner` [T, H, W] that equal their neighbours along these axes."""
    inside = np.ones(owner.shape, bool)
    for axis in axes:
        here, there = (np.moveaxis(values, axis, 0) for values in (owner, inside))
        same = here[1:] == here[:-1]
        there[1:] &= same
        there[:-1] &= same
    return inside


def inner_edge(mask: np.ndarray) -> np.ndarray:
    """Pixels of `mask` [T, H, W] with a neighbour outside it."""
    return mask & ~surrounded(mask)


def name_and_segment(frames: np.ndarray) -> tuple[np.ndarray, Pixels]:
    """Mask of subject colours [T, H, W] and the accepted components of uint8 frames [T, H, W, 3]."""
    names = name_pixels(frames)
    mask = subject_mask(names)
    return mask, components(names, mask)
