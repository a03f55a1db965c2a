"""The embedded model's world: procedural captioned video, the same from a seed everywhere.

    clip = sample(7, "train")                       # caption, what it says, what is true, the scene
    pixels = render([clip.scene], num_frames=81)    # [1, 81, 3, 96, 160] in [-1, 1]
    parse_caption("Two green stars spin on a navy background.")
"""
from training.world.parsing import CaptionError, parse_caption
from training.world.render import CLIP_FRAMES, render, to_frames
from training.world.sampling import SPLITS, Clip, sample, sentence_is_held_out
from training.world.scene import Scene, World
from training.world.truth import ObjectTruth, Truth
from training.world.vocabulary import words
from training.world.wording import spellings

__all__ = [
    "CLIP_FRAMES", "SPLITS", "CaptionError", "Clip", "ObjectTruth", "Scene", "Truth", "World", "parse_caption",
    "render", "sample", "sentence_is_held_out", "spellings", "to_frames", "words",
]
