"""Reading a sentence of this world back: text -> Truth, or an error that names the word.

The sentence is read left to right. Adjectives wait for the next noun; a shape noun closes a group of shapes,
a background noun takes the colours that wait for one. Verbs may stand anywhere.
"""
from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field

from training.world.truth import ObjectTruth, Truth
from training.world.vocabulary import (
    BACKGROUND_NOUNS,
    BACKGROUND_SYNONYMS,
    BACKGROUNDS,
    COLOUR_SYNONYMS,
    COLOURS,
    COUNT_WORDS,
    DARKENED,
    FILLER_WORDS,
    KIND_NOUNS,
    MOTION_STEMS,
    PATTERN_ADJECTIVES,
    SIZE_SYNONYMS,
    plural,
    words,
)

MOST_SHAPES = 3
SAME_SENSE = (("zig zag", "zigzag"), ("zig zags", "zigzags"), ("zig zagging", "zigzagging"))


class CaptionError(ValueError):
    """A sentence that this world cannot read."""


@dataclass
class _Reading:
    text: str
    objects: list[ObjectTruth] = field(default_factory=list)
    count: int | None = None
    size: str | None = None
    colour: str | None = None
    behind: str | None = None          # a background colour that waits for its noun
    laid: str | None = None            # a pattern that does
    motion: str | None = None
    background: str | None = None
    pattern: str | None = None

    def set_once(self, name: str, value: str) -> None:
        held = {"motion": self.motion, "background": self.background, "pattern": self.pattern}[name]
        if held is not None and held != value:
            raise CaptionError(
                f"{self.text!r} names two kinds of {name}, {held} and {value}. A scene has one: drop either."
            )
        setattr(self, name, value)

    def describe(self, name: str, value: str) -> None:
        """Let an adjective wait for its noun."""
        held = {"size": self.size, "colour": self.colour, "behind": self.behind, "laid": self.laid}[name]
        if held is not None and held != value:
            raise CaptionError(f"{self.text!r}: {held} and {value} wait for one noun. Give each its own.")
        setattr(self, name, value)


def parse_caption(text: str) -> Truth:
    """What `text` says, None for what it leaves out.

    Raises: CaptionError for words outside `vocabulary.words()`, for no shape, more than three, or contradictions.
    """
    reading = _Reading(text)
    for token in _tokens(text):
        _read(reading, token)
    _settle_background(reading)
    if reading.colour is not None or reading.size is not None:
        raise CaptionError(
            f"{text!r}: {reading.colour or reading.size!r} describes nothing that follows it. "
            "Put it before its noun, as in 'a large red star'."
        )
    if not 1 <= len(reading.objects) <= MOST_SHAPES:
        raise CaptionError(
            f"{text!r} names {len(reading.objects)} shapes; this world shows one to {MOST_SHAPES} of: "
            f"{', '.join(KIND_NOUNS)}."
        )
    return Truth(tuple(reading.objects), reading.motion, reading.background, reading.pattern)


def _tokens(text: str) -> list[str]:
    """Words and two-word background colours, lower case, checked against the vocabulary."""
    plain = " ".join(re.findall(r"[^\s,.;:!?\-\"'()]+", text.lower()))
    for phrase, sense in SAME_SENSE:
        plain = re.sub(rf"\b{phrase}\b", sense, plain)
    known = set(words())
    tokens: list[str] = []
    for word in plain.split():
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise CaptionError(
                f"{text!r}: unknown word {word!r}.{hint} The words of this world are in training/world/vocabulary.py."
            )
        pair = f"{tokens[-1]} {word}" if tokens else word
        if tokens and (pair in BACKGROUNDS or pair in BACKGROUND_SYNONYMS):
            tokens[-1] = pair
        else:
            tokens.append(word)
    return tokens


def _read(reading: _Reading, token: str) -> None:
    kind, motion = _KIND_OF.get(token), _MOTION_OF.get(token)
    colour = COLOUR_SYNONYMS.get(token, token)
    behind = BACKGROUND_SYNONYMS.get(token, token)
    if kind is not None:
        _close_group(reading, token, kind)
    elif motion is not None:
        reading.set_once("motion", motion)
    elif token in COUNT_WORDS:
        reading.count = COUNT_WORDS[token]
    elif token in SIZE_SYNONYMS:
        reading.describe("size", SIZE_SYNONYMS[token])
    elif colour in COLOURS:
        reading.describe("colour", colour)
    elif behind in BACKGROUNDS:
        reading.describe("behind", behind)
    elif token in PATTERN_ADJECTIVES:
        reading.describe("laid", PATTERN_ADJECTIVES[token])
    elif token in BACKGROUND_NOUNS:
        _close_background(reading, token)
    elif token not in FILLER_WORDS:
        raise CaptionError(
            f"{reading.text!r}: {token!r} alone says nothing here. A background may be 'dark blue', for one."
        )
    elif token in ("of", "in", "with") and reading.count == 1:
        reading.count = None  # 'a video of', 'a pair of' keeps its two


def _close_group(reading: _Reading, token: str, kind: str) -> None:
    if reading.behind is not None and reading.background is None and reading.colour is not None:
        _settle_background(reading)  # 'on plain navy a red circle'
    if reading.behind is not None or reading.laid is not None:
        raise CaptionError(
            f"{reading.text!r}: no {token} is {reading.behind or reading.laid}; that is a background. "
            f"Shapes are: {', '.join(COLOURS)}."
        )
    several = token in _PLURALS
    count = reading.count if reading.count is not None else (None if several else 1)
    if count is None:
        raise CaptionError(f"{reading.text!r}: how many {token}? Say one, two or three.")
    if several != (count > 1):
        raise CaptionError(f"{reading.text!r}: {count} does not agree with {token!r}.")
    reading.objects += [ObjectTruth(kind, reading.colour, reading.size)] * count
    reading.count = reading.size = reading.colour = None


def _close_background(reading: _Reading, token: str) -> None:
    if reading.colour is not None:
        if reading.colour not in DARKENED:
            raise CaptionError(
                f"{reading.text!r}: {reading.colour} is a colour of shapes. Backgrounds are: {', '.join(BACKGROUNDS)}."
            )
        reading.describe("behind", DARKENED[reading.colour])
    if BACKGROUND_NOUNS[token] is not None:
        reading.describe("laid", BACKGROUND_NOUNS[token])
    _settle_background(reading)
    reading.colour = reading.count = None


def _settle_background(reading: _Reading) -> None:
    """What waits for a background has found it."""
    if reading.behind is not None:
        reading.set_once("background", reading.behind)
    if reading.laid is not None:
        reading.set_once("pattern", reading.laid)
    reading.behind = reading.laid = None


_PLURALS = frozenset(plural(noun) for nouns in KIND_NOUNS.values() for noun in nouns)
_KIND_OF = {form: kind for kind, nouns in KIND_NOUNS.items() for noun in nouns for form in (noun, plural(noun))}
_MOTION_OF = {form: motion for motion, forms in MOTION_STEMS.items() for form in forms}
