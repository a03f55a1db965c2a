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
    """The pixels of all accepted components, in no special order."""

    component: np.ndarray   # [P] int64
    y: np.ndarray           # [P]
    x: np.ndarray           # [P]
    frame: np.ndarray       # [C] int64, the frame of each component
    touches: np.ndarray     # [C] pixels on the frame's outline


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
    value = mask.astype(np.int16) if barrier is None else np.where(mask, barrier.astype(np.int16) + 1, 0)
    starts = value != 0
    starts[:, :, 1:] &= value[:, :, 1:] != value[:, :, :-1]
    run_of = np.cumsum(starts.reshape(-1), dtype=np.int64).reshape(mask.shape) - 1
    runs = int(run_of.reshape(-1)[-1]) + 1 if mask.size else 0
    if runs <= 0:
        empty = np.zeros(0, np.int64)
        return Pixels(empty, empty, empty, empty, empty)
    meets = (value[:, 1:] != 0) & (value[:, 1:] == value[:, :-1])
    upper, lower = run_of[:, :-1][meets], run_of[:, 1:][meets]
    root = _unite(runs, upper, lower)
    flat = np.flatnonzero(mask)
    number = np.cumsum(root == np.arange(runs)) - 1
    component = number[root][run_of.reshape(-1)[flat]]
    frame, rest = np.divmod(flat, height * width)
    y, x = np.divmod(rest, width)
    count = int(number[-1]) + 1
    of_frame = np.zeros(count, np.int64)
    of_frame[component] = frame
    edge = (y == 0) | (y == height - 1) | (x == 0) | (x == width - 1)
    return Pixels(component, y, x, of_frame, np.bincount(component, edge, count))


def _unite(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest member of each node's connected set. Shapes: a, b [E] the edges; returns [count]."""
    pairs = np.unique(a * count + b)
    a, b = np.divmod(pairs, count)
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
    frame = found.frame[found.component]
    width = names.shape[2]
    here = names[frame, found.y, found.x]
    left = names[frame, found.y, np.maximum(found.x - 1, 0)]
    right = names[frame, found.y, np.minimum(found.x + 1, width - 1)]
    inside = (here == left) & (here == right) & (here < len(SUBJECTS))
    table = np.bincount(
        found.component[inside] * len(SUBJECTS) + here[inside], minlength=len(found.frame) * len(SUBJECTS),
    )
    return table.reshape(-1, len(SUBJECTS))


def _two_coloured(found: Pixels, names: np.ndarray) -> np.ndarray:
    """[C] bool: components with two colours of weight, large enough for two shapes."""
    if not len(found.frame):
        return np.zeros(0, bool)
    smallest = SMALLEST_SHARE * names.shape[1] * names.shape[2]
    second = np.sort(_colour_counts(found, names), 1)[:, -2]
    area = np.bincount(found.component, minlength=len(found.frame))
    return (second > SECOND_COLOUR * area) & (second > 0.6 * smallest)


def _apart(found: Pixels, names: np.ndarray, mixed: np.ndarray) -> np.ndarray:
    """A barrier map [T, H, W] int16: the colour's index inside two-coloured components, one value elsewhere."""
    barrier = np.full(names.shape, len(SUBJECTS), np.int16)
    inside = mixed[found.component]
    frame, y, x = found.frame[found.component[inside]], found.y[inside], found.x[inside]
    barrier[frame, y, x] = names[frame, y, x]
    return barrier


def _accepted(found: Pixels, shape: tuple[int, ...]) -> Pixels:
    """Drop specks, what covers half the frame, and what runs along its outline."""
    _, height, width = shape
    area = np.bincount(found.component, minlength=len(found.frame))
    keep = (area >= SMALLEST_SHARE * height * width) & (area <= LARGEST_SHARE * height * width)
    keep &= found.touches <= BORDER_CONTACT * 2 * (height + width)
    number = np.cumsum(keep) - 1
    inside = keep[found.component] if len(found.component) else np.zeros(0, bool)
    return Pixels(
        number[found.component[inside]], found.y[inside], found.x[inside], found.frame[keep], found.touches[keep],
    )


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
    inside = np.ones(owner.shape, bool)
    for axis in (1, 2):
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
