"""From an integer to a clip: what is in it, where, how it looks, and what its caption says.

A clip depends on its split and seed alone. Splits differ by what they may contain:
    train    no held-out shape-colour pair, no held-out sentence; some colours are free
    test     no held-out pair; only held-out sentences
    free     as test, and every colour is free
    held_out at least one held-out pair; any sentence
Shapes stand from left to right, or around their orbit, in the order in which the caption names them.
A free colour is any of its kind, between the named ones too, and the caption does not say it: nothing but the picture
itself can hold it. Whether a sentence is held out is a property of its text, so training never sees a test sentence.
"""
from __future__ import annotations

import colorsys
import math
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from training.world.captions import write_caption
from training.world.layout import NoRoom, place
from training.world.scene import Backdrop, Scene, View, Wave, World
from training.world.truth import ObjectTruth, Truth
from training.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_PAIRS,
    KINDS,
    MOTIONS,
    PATTERNS,
    SIZES,
    SPINNING_KINDS,
)

SPLITS = ("train", "test", "free", "held_out")
HELD_OUT_SENTENCES = 16   # one sentence in so many
COUNT_SHARES = ((1, 0.65), (2, 0.25), (3, 0.10))
TRAINING_COUNT_SHARES = ((1, 0.35), (2, 0.37), (3, 0.28))  # what is hard is shown more often
ALIKE_SHARE, TRAINING_ALIKE_SHARE = 0.5, 0.25  # of the scenes with several shapes: all of one kind, colour and size
FREE_SHARE = 0.25        # of the training scenes: shapes of free colours; independently, a free background
FREE_REACH = 0.4         # of the way to the next hue, at most
GRAYISH = 0.2            # saturation below which a colour has no hue to speak of
RETRIES = 400


@dataclass(frozen=True)
class Clip:
    """A scene with its sentence. `said` holds what the caption says, `truth` all that is true, in the same order."""

    seed: int
    split: str
    caption: str
    said: Truth
    truth: Truth
    scene: Scene


def sample(seed: int, split: str = "train", world: World = World()) -> Clip:
    """The clip of `seed` in `split`: the same on every machine and in every order.

    Args: seed: any non-negative int; split: one of SPLITS; world: frame size and rate.
    Raises: ValueError for an unknown split or a negative seed.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}.")
    if seed < 0:
        raise ValueError(f"seed={seed}: seeds count from 0.")
    rng = random.Random(f"{split}:{seed}")
    for _ in range(RETRIES):
        truth = _draw_truth(rng, split)
        caption, said = write_caption(rng, truth)
        if split != "held_out" and sentence_is_held_out(caption) != (split in ("test", "free")):
            continue
        try:
            scene = _draw_scene(rng, truth, world)
        except NoRoom:
            continue
        return Clip(seed, split, caption, said, truth, scene)
    raise ValueError(f"{split} seed {seed}: nothing of this split in {RETRIES} tries. Use the next seed.")


def sentence_is_held_out(caption: str) -> bool:
    """Whether `caption` belongs to the sentences that training never sees."""
    return zlib.crc32(caption.encode()) % HELD_OUT_SENTENCES == 0


def pick(rng: random.Random, options):
    """One of `options`, by a single draw: stable across Python versions."""
    options = tuple(options)
    return options[int(rng.random() * len(options))]


def _draw_truth(rng: random.Random, split: str) -> Truth:
    training = split == "train"
    motion = pick(rng, MOTIONS)
    count = _draw_count(rng, TRAINING_COUNT_SHARES if training else COUNT_SHARES)
    kinds = SPINNING_KINDS if motion == "spin" else KINDS
    free_shapes, free_background = (_is_free(rng, split) for _ in range(2))
    pairs = [(kind, colour) for kind in kinds for colour in ((None,) if free_shapes else COLOURS)]
    seen = [pair for pair in pairs if pair not in HELD_OUT_PAIRS]
    unseen = [pair for pair in pairs if pair in HELD_OUT_PAIRS]
    first = _draw_object(rng, unseen if split == "held_out" else seen, count, motion)
    if rng.random() < (TRAINING_ALIKE_SHARE if training else ALIKE_SHARE):
        objects = (first,) * count
    else:
        objects = (first, *(_draw_object(rng, seen, count, motion) for _ in range(count - 1)))
    background = None if free_background else pick(rng, BACKGROUNDS)
    return Truth(_grouped(objects), motion, background, pick(rng, PATTERNS))


def _is_free(rng: random.Random, split: str) -> bool:
    return split == "free" or (split == "train" and rng.random() < FREE_SHARE)


def _draw_count(rng: random.Random, shares: tuple[tuple[int, float], ...]) -> int:
    draw = rng.random()
    for count, share in shares:
        if draw < share:
            return count
        draw -= share
    return shares[-1][0]


def _draw_object(rng: random.Random, pairs: list[tuple[str, str | None]], count: int, motion: str) -> ObjectTruth:
    """One shape of a size that can make this motion in such company."""
    kind, colour = pick(rng, pairs)
    crowded = count == 3 or (count == 2 and motion in ("orbit", "zigzag"))
    sizes = ("small",) if count == 3 and motion != "spin" else ("small", "medium") if crowded else tuple(SIZES)
    return ObjectTruth(kind, colour, pick(rng, sizes))


def _grouped(objects: tuple[ObjectTruth, ...]) -> tuple[ObjectTruth, ...]:
    """Alike shapes next to each other, and of one size, so that a caption can count them."""
    size_of = {(item.kind, item.colour): item.size for item in reversed(objects)}
    order = list(dict.fromkeys((item.kind, item.colour) for item in objects))
    alike = [replace(item, size=size_of[(item.kind, item.colour)]) for item in objects]
    return tuple(sorted(alike, key=lambda item: order.index((item.kind, item.colour))))


def _draw_scene(rng: random.Random, truth: Truth, world: World) -> Scene:
    colours = [_tint(rng, _rgb(rng, item), hue=0.012, saturation=0.04, value=0.04) for item in truth.objects]
    bodies = place(rng, truth.objects, truth.motion, colours, world)
    return Scene(bodies, _draw_backdrop(rng, truth, world), _draw_view(rng, world))


def _draw_backdrop(rng: random.Random, truth: Truth, world: World) -> Backdrop:
    named = _free(rng, BACKGROUNDS, BACKGROUNDS) if truth.background is None else BACKGROUNDS[truth.background]
    base = _tint(rng, named, hue=0.012, saturation=0.06, value=0.05)
    contrast = rng.uniform(0.05, 0.07) if truth.pattern != "gradient" else rng.uniform(0.07, 0.09)
    step = [contrast * (0.4 + 0.6 * channel / max(base)) for channel in base]
    period = {"stripes": rng.uniform(18, 28), "checker": rng.uniform(28, 40), "noise": rng.uniform(30, 42)}
    heading, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0.0, 4.0) * world.unit
    return Backdrop(
        pattern=truth.pattern,
        dark=tuple(max(0.0, channel - by) for channel, by in zip(base, step, strict=True)),
        light=tuple(min(1.0, channel + by) for channel, by in zip(base, step, strict=True)),
        angle=rng.random(),
        period=period.get(truth.pattern, 1.0) * world.unit,
        phase=(rng.random(), rng.random()),
        slide=(speed * math.cos(heading), speed * math.sin(heading)),
        texture_seed=int(rng.random() * 2 ** 31),
    )


def _draw_view(rng: random.Random, world: World) -> View:
    def slow(amplitude: float) -> Wave:
        return Wave("cosine", amplitude * rng.random(), 1 / rng.uniform(4.0, 7.0), rng.random())

    return View(
        pan_x=slow(2.2 * world.unit), pan_y=slow(2.2 * world.unit), zoom=slow(0.018), light=slow(0.045),
        shade=rng.uniform(0.0, 0.10), shade_angle=rng.random(),
    )


def _rgb(rng: random.Random, item: ObjectTruth) -> tuple[float, float, float]:
    if item.colour is not None:
        return COLOURS[item.colour]
    return _free(rng, COLOURS, [name for name in COLOURS if (item.kind, name) not in HELD_OUT_PAIRS])


def _free(rng: random.Random, named: dict[str, tuple[float, float, float]], names: Iterable[str]):
    """One of the `names`' colours, moved towards the next hue, though not so far that it has that one's name."""
    h, s, v = colorsys.rgb_to_hsv(*named[pick(rng, names)])
    hues = [colorsys.rgb_to_hsv(*rgb)[0] for rgb in named.values() if colorsys.rgb_to_hsv(*rgb)[1] > GRAYISH]
    side = 1 if rng.random() < 0.5 else -1
    gap = min((side * (other - h) % 1.0 or 1.0) for other in hues)
    if s > GRAYISH:
        h += side * FREE_REACH * gap * rng.random()
    return colorsys.hsv_to_rgb(h % 1.0, s, v)


def _tint(rng: random.Random, rgb: tuple[float, float, float], hue: float, saturation: float, value: float):
    """`rgb` moved a little within its name: hue in turns, saturation and value relative."""
    h, s, v = colorsys.rgb_to_hsv(*rgb)
    h += rng.uniform(-hue, hue)
    s = min(1.0, s * (1 + rng.uniform(-saturation, saturation)))
    v = min(1.0, v * (1 + rng.uniform(-value, value)))
    return colorsys.hsv_to_rgb(h % 1.0, s, v)
