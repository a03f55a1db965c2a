"""The grammar: a sentence for a truth, in many phrasings, some things left unsaid, none said wrong.

A colour is said whenever it has a name.
"""
from __future__ import annotations

import random
from dataclasses import replace
from itertools import groupby

from training.world.truth import ObjectTruth, Truth
from training.world.vocabulary import (
    BACKGROUND_WORDS,
    MOTION_PHRASES,
    NUMBER_WORDS,
    PATTERN_PHRASES,
    SIZE_WORDS,
    UNPATTERNED_PHRASES,
    plural,
)

SAY_SIZE, SAY_PATTERN, SAY_MOTION = 0.6, 0.75, 0.85  # the share of captions that mention it
VOWELS = "aeiou"
THIRD_PERSON, PLURAL, PARTICIPLE = range(3)

# {who} the shapes, {does} a finite verb, {doing} a participle, {where} a background phrase
MOVING = (
    "{who} {does} on {where}",
    "{who} {does} in front of {where}",
    "on {where}, {who} {does}",
    "{who} {doing} on {where}",
    "{who} {doing} against {where}",
    "{where} with {who} {doing}",
    "{where}, {who} {doing}",
    "there {be} {who} {doing} on {where}",
    "a video of {who} {doing} on {where}",
    "{who} on {where}, {doing}",
    "against {where}, {who} {does}",
)
STILL = (
    "{who} on {where}",
    "{who} against {where}",
    "{where} with {who}",
    "there {be} {who} on {where}",
    "a video of {who} on {where}",
    "{who} in front of {where}",
)


def write_caption(rng: random.Random, truth: Truth) -> tuple[str, Truth]:
    """A sentence about `truth`, and what that sentence says (None for what it leaves out)."""
    says_size, says_motion = rng.random() < SAY_SIZE, rng.random() < SAY_MOTION
    said = Truth(
        objects=truth.objects if says_size else tuple(replace(item, size=None) for item in truth.objects),
        motion=truth.motion if says_motion else None,
        background=truth.background,
        pattern=truth.pattern if rng.random() < SAY_PATTERN else None,
    )
    forms = _choose(rng, MOTION_PHRASES[truth.motion])
    several = len(said.objects) > 1
    sentence = _choose(rng, MOVING if says_motion else STILL).format(
        who=_who(rng, said.objects),
        does=forms[PLURAL if several else THIRD_PERSON],
        doing=forms[PARTICIPLE],
        where=_where(rng, said),
        be="are" if several else "is",
    )
    sentence = sentence[0].upper() + sentence[1:]
    return sentence + ("." if rng.random() < 0.7 else ""), said


def with_article(phrase: str) -> str:
    """`phrase` after a or an."""
    return ("an " if phrase[0] in VOWELS else "a ") + phrase


def _who(rng: random.Random, objects: tuple[ObjectTruth, ...]) -> str:
    groups = [list(group) for _, group in groupby(objects)]
    phrases = [_noun_phrase(rng, group) for group in groups]
    if len(phrases) < 3:
        return " and ".join(phrases)
    return f"{phrases[0]}, {phrases[1]} and {phrases[2]}"


def _noun_phrase(rng: random.Random, group: list[ObjectTruth]) -> str:
    item = group[0]
    size = None if item.size is None else _choose(rng, SIZE_WORDS[item.size])
    adjectives = [word for word in (size, item.colour) if word is not None]
    if len(group) == 1:
        return with_article(" ".join([*adjectives, item.kind]))
    return " ".join([NUMBER_WORDS[len(group)], *adjectives, plural(item.kind)])


def _where(rng: random.Random, said: Truth) -> str:
    phrases = UNPATTERNED_PHRASES if said.pattern is None else PATTERN_PHRASES[said.pattern]
    phrase = _choose(rng, phrases)
    colour = "" if said.background is None else _choose(rng, BACKGROUND_WORDS[said.background])
    return " ".join(phrase.format(c=colour).split())


def _choose(rng: random.Random, options: tuple):
    return options[int(rng.random() * len(options))]
