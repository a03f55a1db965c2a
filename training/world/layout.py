"""Where shapes are and how they move: from names to waves, without overlaps and inside the frame.

Lengths here are pixels of the reference frame; `place` scales them to the world's at the end.
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from training.world.scene import Body, Wave, World
from training.world.shapes import reach
from training.world.truth import ObjectTruth
from training.world.vocabulary import SIZES, SPINNING_KINDS

MARGIN = 5.0      # kept free for the camera's pan and zoom
GAP = 6.0         # between neighbours, so that a blurred video still shows two shapes
PULSE_DEPTH = (0.17, 0.23)
SPIN_TURNS = (0.12, 0.20)   # a second: at most 18 degrees from one latent frame to the next
SPIN_FROM = 0.03            # turns from upright at the start: a random angle is learned as a round shape
TILT_TURNS = 0.012
SMALLEST_ORBIT = (20.0, 10.0)
SMALLEST_ZIGZAG = (14.0, 8.0)
SMALLEST_DRIFT = (11.0, 7.0)
SMALLEST_BOUNCE = 10.0


class NoRoom(ValueError):
    """These sizes cannot make this motion in this frame without overlap."""


@dataclass(frozen=True)
class Extent:
    """The box that a shape needs around its centre, its own tilt or turning or pulsing included."""

    side: float
    up: float
    down: float


@dataclass(frozen=True)
class Path:
    """Where one centre goes."""

    center: tuple[float, float]
    x: Wave = Wave()
    y: Wave = Wave()


def place(
    rng: random.Random, objects: Sequence[ObjectTruth], motion: str, colours: Sequence[tuple], world: World,
) -> tuple[Body, ...]:
    """Bodies for `objects` (every size named), left to right or around the orbit in that order.

    Raises: NoRoom if they do not fit; ask again with smaller sizes.
    """
    extents = [extent(item, motion) for item in objects]
    frame = (world.width / world.unit, world.height / world.unit)
    paths = LAYOUTS[motion](rng, extents, frame)
    bodies = []
    for item, colour, path in zip(objects, colours, paths, strict=True):
        spin, pulse, tilt = 0.0, Wave(), rng.uniform(-TILT_TURNS, TILT_TURNS)
        if motion == "spin":
            spin, tilt = rng.uniform(*SPIN_TURNS) * _sign(rng), rng.uniform(-SPIN_FROM, SPIN_FROM)
        if motion == "pulse":
            pulse = Wave("cosine", rng.uniform(*PULSE_DEPTH), rng.uniform(0.55, 0.9), rng.random())
        bodies.append(Body(
            kind=item.kind, rgb=colour, radius=SIZES[item.size] * world.unit * rng.uniform(0.96, 1.04),
            center=(path.center[0] * world.unit, path.center[1] * world.unit),
            x=_scaled(path.x, world.unit), y=_scaled(path.y, world.unit), tilt=tilt, spin=spin, pulse=pulse,
        ))
    return tuple(bodies)


def extent(item: ObjectTruth, motion: str) -> Extent:
    """The room one shape takes, 4 % for its exact size and the tilt of a few degrees included."""
    side, up, down = reach(item.kind, turning=motion == "spin")
    slack = 1.04 + (0.04 if item.kind in SPINNING_KINDS and motion != "spin" else 0.0)
    radius = SIZES[item.size] * slack * (1 + PULSE_DEPTH[1] if motion == "pulse" else 1.0)
    return Extent(side * radius, up * radius, down * radius)


def _stay(rng: random.Random, extents: Sequence[Extent], frame: tuple[float, float]) -> list[Path]:
    """Spin and pulse: each on its own spot, one in each strip of the frame."""
    paths = []
    for strip, one in zip(_strips(extents, frame), extents, strict=True):
        (x, room_x), (y, room_y) = strip, _rows([one], frame)
        room_x, room_y = min(room_x, 34.0), min(room_y, 24.0)
        paths.append(Path((x + rng.uniform(-room_x, room_x), y + rng.uniform(-room_y, room_y))))
    return paths


def _bounce(rng: random.Random, extents: Sequence[Extent], frame: tuple[float, float]) -> list[Path]:
    """Bounce: thrown up and falling back for ever, slowly wandering sideways within its strip."""
    paths = []
    for strip, one in zip(_strips(extents, frame), extents, strict=True):
        (x, room_x), (y, room_y) = strip, _rows([one], frame)
        room_y = _at_least(room_y, SMALLEST_BOUNCE)
        height = rng.uniform(0.85, 1.0) * min(room_y, 23.0)
        sideways = rng.uniform(0.5, 0.95) * room_x
        paths.append(Path(
            (x + rng.uniform(-1, 1) * (room_x - sideways), y + rng.uniform(-1, 1) * (room_y - height)),
            _sweep(rng, "rounded", sideways, rng.uniform(5, 16), longest_s=12.0),
            Wave("parabola", height, 1 / rng.uniform(1.0, 1.45), rng.random()),
        ))
    return paths


def _orbit(rng: random.Random, extents: Sequence[Extent], frame: tuple[float, float]) -> list[Path]:
    """Orbit: on one ellipse, evenly spaced, so that they never meet."""
    (x, room_x), (y, room_y) = _columns(extents, frame), _rows(extents, frame)
    room_x, room_y = _at_least(min(room_x, 52.0), SMALLEST_ORBIT[0]), _at_least(min(room_y, 30.0), SMALLEST_ORBIT[1])
    wide = max(rng.uniform(0.7, 1.0) * room_x, SMALLEST_ORBIT[0])
    high = max(rng.uniform(0.85 if len(extents) == 1 else 1.0, 1.0) * room_y, SMALLEST_ORBIT[1])
    closest = {1: float("inf"), 2: 2 * min(wide, high), 3: 3 ** 0.5 * min(wide, high)}[len(extents)]
    widest = sorted((max(one.side, one.up, one.down) for one in extents), reverse=True)[:2]
    if closest < sum(widest) + 2.0:
        raise NoRoom(f"{len(extents)} shapes on one orbit of height {high:.0f} would touch")
    turns = _sign(rng) / rng.uniform(2.6, 4.2)
    center = (x + rng.uniform(-1, 1) * max(0.0, _columns(extents, frame)[1] - wide), y)
    first = rng.random()
    phases = [first + index / len(extents) for index in range(len(extents))]
    return [Path(center, Wave("cosine", wide, turns, p), Wave("cosine", high, turns, p - 0.25)) for p in phases]


def _zigzag(rng: random.Random, extents: Sequence[Extent], frame: tuple[float, float]) -> list[Path]:
    """Zigzag: sweep sideways in straight strokes up and down; several go side by side."""
    (x, room_x), (y, room_y) = _formation(extents, frame)
    room_x, room_y = _at_least(room_x, SMALLEST_ZIGZAG[0]), _at_least(room_y, SMALLEST_ZIGZAG[1])
    wide, high = rng.uniform(0.9, 1.0) * room_x, min(room_y, rng.uniform(11.0, 15.0))
    sweep = _sweep(rng, "triangle", wide, min(rng.uniform(28, 42), 2 * wide / 1.6))
    strokes = Wave("triangle", high, 1 / rng.uniform(0.8, 1.15), rng.random())
    lift = rng.uniform(-1, 1) * (room_y - high)
    return [Path((place_x + x, y + lift), sweep, strokes) for place_x in _abreast(extents)]


def _drift(rng: random.Random, extents: Sequence[Extent], frame: tuple[float, float]) -> list[Path]:
    """Drift: slowly and evenly onwards, turning back long before the edge; several go side by side."""
    (x, room_x), (y, room_y) = _formation(extents, frame)
    room_x, room_y = _at_least(min(room_x, 42.0), SMALLEST_DRIFT[0]), _at_least(min(room_y, 26.0), SMALLEST_DRIFT[1])
    speed = rng.uniform(9.0, 14.0)
    slope = rng.uniform(0.2, 0.6)
    wide, high = rng.uniform(0.85, 1.0) * room_x, rng.uniform(0.85, 1.0) * room_y
    sweep = _sweep(rng, "rounded", wide, speed * (1 - slope ** 2) ** 0.5)
    climb = _sweep(rng, "rounded", high, speed * slope)
    return [Path((place_x + x, y), sweep, climb) for place_x in _abreast(extents)]


LAYOUTS = {"spin": _stay, "pulse": _stay, "bounce": _bounce, "orbit": _orbit, "zigzag": _zigzag, "drift": _drift}


def _strips(extents: Sequence[Extent], frame: tuple[float, float]) -> list[tuple[float, float]]:
    """(centre, room to either side) of each shape in its own vertical strip, wide shapes getting wide strips."""
    spare = frame[0] - 2 * MARGIN - GAP * (len(extents) - 1) - sum(2 * one.side for one in extents)
    if spare < 0:
        raise NoRoom(f"{len(extents)} shapes need {-spare:.0f} pixels more than the frame is wide")
    strips, left = [], MARGIN
    for one in extents:
        room = spare / len(extents) / 2
        strips.append((left + one.side + room, room))
        left += 2 * (one.side + room) + GAP
    return strips


def _columns(extents: Sequence[Extent], frame: tuple[float, float]) -> tuple[float, float]:
    return frame[0] / 2, frame[0] / 2 - max(one.side for one in extents) - MARGIN


def _rows(extents: Sequence[Extent], frame: tuple[float, float]) -> tuple[float, float]:
    up, down = max(one.up for one in extents), max(one.down for one in extents)
    return (frame[1] + up - down) / 2, (frame[1] - up - down) / 2 - MARGIN


def _formation(
    extents: Sequence[Extent], frame: tuple[float, float],
) -> tuple[tuple[float, float], tuple[float, float]]:
    width = sum(2 * one.side for one in extents) + GAP * (len(extents) - 1)
    return (frame[0] / 2, (frame[0] - width) / 2 - MARGIN), _rows(extents, frame)


def _abreast(extents: Sequence[Extent]) -> list[float]:
    """Offsets of shapes side by side from the middle of the row."""
    width = sum(2 * one.side for one in extents) + GAP * (len(extents) - 1)
    offsets, left = [], -width / 2
    for one in extents:
        offsets.append(left + one.side)
        left += 2 * one.side + GAP
    return offsets


def _sweep(rng: random.Random, shape: str, amplitude: float, speed: float, longest_s: float = 60.0) -> Wave:
    """There and back at `speed` pixels a second: a period is four amplitudes long."""
    return Wave(shape, amplitude, max(speed / (4 * max(amplitude, 1.0)), 1 / longest_s), rng.random())


def _at_least(room: float, needed: float) -> float:
    if room < needed:
        raise NoRoom(f"{room:.0f} pixels of room where the motion needs {needed:.0f}")
    return room


def _scaled(wave: Wave, unit: float) -> Wave:
    return Wave(wave.shape, wave.amplitude * unit, wave.frequency, wave.phase)


def _sign(rng: random.Random) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0
