"""How right the analysers are where the truth is known: on rendered clips that no model ever saw.

    python -m evaluation.analysers.selfcheck --clips 500 --json selfcheck.json

Prints a table and one JSON line: per property the share of videos in which it holds, on clean clips, on clips
blurred, noisy and compressed as generated ones are, with the truths shuffled among the videos, and by chance;
then how each damage moves each number. Exit status 1 if a share falls short of what is required.
"""
from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluation.analysers import PROPERTIES, Analysis, Observation, analyse, chance, damage, judge, observe
from training.world import Clip, Scene, render, sample, to_frames
from training.world.scene import Wave

REQUIRED = {"colour": 0.99, "background": 0.99, "shape": 0.97, "count": 0.97, "motion": 0.90}
SHUFFLED_WITHIN = 0.05
FIRST_SEED = 10_000
DAMAGE_CLIPS = 6
LONG_FRAMES = 241


def held_out_clips(count: int, first_seed: int = FIRST_SEED) -> list[Clip]:
    """Clips that training never shows: unseen sentences and unseen pairs in turn."""
    return [sample(first_seed + index, ("test", "held_out")[index % 2]) for index in range(count)]


def draw(scene: Scene, num_frames: int = 81) -> np.ndarray:
    """uint8 frames [T, H, W, 3] of one scene."""
    return to_frames(render([scene], num_frames=num_frames))[0].numpy()


def shares(seen: list[Observation], clips: list[Clip], order: list[int]) -> dict[str, float]:
    """Share of videos in which each property holds, video i judged by the truth of clip order[i]."""
    holds = [judge(one, clips[index].truth).video.holds for one, index in zip(seen, order, strict=True)]
    return {name: float(np.mean([hold[name] for hold in holds])) for name in PROPERTIES}


def shuffled(count: int, seed: int = 0) -> list[int]:
    """An order in which no video keeps its own caption: a random cycle through all."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    moved = [0] * count
    for place, index in enumerate(order):
        moved[index] = order[(place + 1) % count]
    return moved


def accuracy(clips: list[Clip], tell: Callable[[], object] = lambda: None) -> dict[str, dict[str, float]]:
    """Every share for every property: {"clean": {...}, "as_generated": ..., "shuffled": ..., "chance": ...}.

    `tell` is called after each clip.
    """
    clean, degraded = [], []
    for index, clip in enumerate(clips):
        frames = draw(clip.scene)
        clean.append(observe(frames))
        degraded.append(observe(damage.as_generated(frames, seed=index)))
        tell()
    own = list(range(len(clips)))
    truths = [clip.truth for clip in clips]
    return {
        "clean": shares(clean, clips, own), "as_generated": shares(degraded, clips, own),
        "shuffled": shares(clean, clips, shuffled(len(clips))), "chance": chance(truths, truths),
    }


def with_backdrop_gain(scene: Scene, gain: float, channel: int = 0) -> Scene:
    """The scene with one channel of its background brighter by `gain` in 0..1."""
    def tinted(rgb: tuple[float, float, float]) -> tuple[float, ...]:
        return tuple(min(1.0, value + gain * (index == channel)) for index, value in enumerate(rgb))

    return replace(
        scene,
        backdrop=replace(scene.backdrop, dark=tinted(scene.backdrop.dark), light=tinted(scene.backdrop.light)),
    )


def with_kind(scene: Scene, kind: str) -> Scene:
    """The scene with every shape of another kind."""
    return replace(scene, bodies=tuple(replace(body, kind=kind) for body in scene.bodies))


def with_duplicate(scene: Scene, height: int, width: int) -> Scene:
    """The scene with a second, small copy of its first shape, still in the corner furthest from where that moves."""
    body = scene.bodies[0]
    corner = tuple(
        size * (0.12 if center > size / 2 else 0.88) for center, size in zip(body.center, (width, height), strict=True)
    )
    copy = replace(body, center=corner, x=Wave(), y=Wave(), radius=0.11 * height)
    return replace(scene, bodies=(*scene.bodies, copy))


# name -> (strengths, the number that must grow with them, what to do to a clip's frames)
Damage = tuple[tuple[float, ...], Callable[[Analysis], float], Callable[[Clip, np.ndarray, float], np.ndarray]]
DAMAGES: dict[str, Damage] = {
    "hue ramp, degrees": (
        (0, 15, 30, 60), lambda a: a.video.colour_error, lambda clip, frames, s: damage.hue_ramp(frames, s),
    ),
    "background tint ramp": (
        (0, 0.05, 0.1, 0.2), lambda a: a.video.background_drift,
        lambda clip, frames, s: damage.cross_fade(frames, draw(with_backdrop_gain(clip.scene, s), len(frames))),
    ),
    "blur, sigma": ((0, 0.8, 1.6, 3.2), lambda a: -a.video.sharpness, lambda clip, frames, s: damage.blur(frames, s)),
    "freeze, share": ((0, 0.2, 0.4, 0.6), lambda a: -a.video.speed, lambda clip, frames, s: damage.freeze(frames, s)),
    "duplicate, share": (
        (0, 0.2, 0.5, 1.0), lambda a: a.video.duplicates,
        lambda clip, frames, s: damage.switch(
            frames, draw(with_duplicate(clip.scene, *frames.shape[1:3]), len(frames)), s,
        ),
    ),
    "jump cuts": ((0, 1, 3, 5), lambda a: a.video.jumps, lambda clip, frames, s: damage.jump_cuts(frames, int(s), 17)),
    "loop backs": (
        (0, 1, 3, 5), lambda a: a.video.rollbacks, lambda clip, frames, s: damage.loop_backs(frames, int(s)),
    ),
    "shape swap, share": (
        (0, 0.25, 0.5, 0.75), lambda a: -a.video.rate["shape"],
        lambda clip, frames, s: damage.switch(frames, draw(with_kind(clip.scene, _other(clip)), len(frames)), s),
    ),
    "chunk flicker, levels": (
        (0, 2, 4, 8), lambda a: a.video.flicker, lambda clip, frames, s: damage.chunk_flicker(frames, s),
    ),
}


def _other(clip: Clip) -> str:
    return "ring" if clip.truth.objects[0].kind != "ring" else "square"


def damage_clips(count: int = DAMAGE_CLIPS) -> list[Clip]:
    """Clips of one coloured, orbiting or zigzagging shape: where freezing, leaping and doubling can be seen."""
    found, seed = [], FIRST_SEED
    while len(found) < count:
        clip = sample(seed, "test")
        first = clip.truth.objects[0]
        travels = clip.truth.motion in ("orbit", "zigzag") and first.size != "large"
        if len(clip.scene.bodies) == 1 and travels and first.colour != "white":
            found.append(clip)
        seed += 1
    return found


def responses(clips: list[Clip], tell: Callable[[], object] = lambda: None) -> dict[str, dict[str, list]]:
    """Mean response of the matching number to every damage: name -> {"strength": [...], "response": [...]}.

    The mean is over the clips in which it can be read: a subject whose hue has become its background's has no colour.
    `tell` is called after each damage.
    """
    originals = [draw(clip.scene, LONG_FRAMES) for clip in clips]
    table = {}
    for name, (strengths, number, apply) in DAMAGES.items():
        response = [
            float(np.nanmean([
                number(analyse(apply(clip, frames, s), clip.truth))
                for clip, frames in zip(clips, originals, strict=True)
            ]))
            for s in strengths
        ]
        table[name] = {"strength": list(strengths), "response": [round(value, 5) for value in response]}
        tell()
    return table


def shortfalls(table: dict[str, dict[str, float]]) -> list[str]:
    """What does not reach the required figures, in words."""
    found = []
    for name, needed in REQUIRED.items():
        for column in ("clean", "as_generated"):
            if table[column][name] < needed:
                found.append(
                    f"{name} holds in {table[column][name]:.1%} of the {column} videos; {needed:.0%} are required"
                )
    for name in PROPERTIES:
        if abs(table["shuffled"][name] - table["chance"][name]) > SHUFFLED_WITHIN:
            found.append(
                f"{name}: {table['shuffled'][name]:.1%} with truths shuffled, {table['chance'][name]:.1%} by chance"
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=500, help="rendered clips to read, 2 or more (default 500)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file, too")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the renderer (default 1)")
    options = parser.parse_args(arguments)
    for name, value, least in (("clips", options.clips, 2), ("threads", options.threads, 1)):  # 2 can be shuffled
        if value < least:
            parser.error(f"--{name} {value} is too small. Ask for {least} or more")
    torch.set_num_threads(options.threads)
    with tqdm(total=options.clips, desc="clips", disable=None) as bar:  # None: shown on a terminal only
        table = accuracy(held_out_clips(options.clips), bar.update)
    print(f"{'property':<12}{'clean':>10}{'degraded':>10}{'shuffled':>10}{'chance':>10}")
    for name in PROPERTIES:
        print(f"{name:<12}" + "".join(
            f"{table[column][name]:>10.1%}" for column in ("clean", "as_generated", "shuffled", "chance")
        ))
    with tqdm(total=len(DAMAGES), desc="damages", disable=None) as bar:
        damages = responses(damage_clips(), bar.update)
    print()
    for name, row in damages.items():
        pairs = (f"{strength:g}: {value:.4g}" for strength, value in zip(row["strength"], row["response"], strict=True))
        print(f"{name:<24}" + "   ".join(pairs))
    missing = shortfalls(table)
    figures = {"clips": options.clips, "accuracy": table, "damage": damages, "shortfalls": missing}
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
