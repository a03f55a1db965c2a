"""From what people say to what the grammar writes: a model of this world has read nothing else.

The tokenizer carries these rules, so that "a tiny disc twirls" reaches the network as "a small circle spins".
"""
from __future__ import annotations

import re

from training.world.captions import MOVING, STILL
from training.world.vocabulary import (
    BACKGROUND_NOUNS,
    BACKGROUND_SYNONYMS,
    BACKGROUND_WORDS,
    COLOUR_SYNONYMS,
    COLOURS,
    DARKENED,
    KIND_NOUNS,
    MOTION_PHRASES,
    NUMBER_WORDS,
    PATTERN_PHRASES,
    SIZE_SYNONYMS,
    SIZE_WORDS,
    UNPATTERNED_PHRASES,
    plural,
    words,
)

MOTION_SYNONYMS = {  # inflection by inflection
    "circling": "orbiting", "loops": "orbits", "looping": "orbiting", "travelling": "traveling",
    "twirl": "spin", "twirls": "spins", "twirling": "spinning", "turn": "spin", "turns": "spins", "turning": "spinning",
    "pulsate": "pulse", "pulsates": "pulses", "pulsating": "pulsing",
    "glide": "drift", "glides": "drifts", "gliding": "drifting",
}
OTHER_SYNONYMS = {
    "a single": "a", "one": "a", "a pair of": "two", "a trio of": "three", "middle": "center", "clip": "video",
    "checked": "checkered", "noisy": "cloudy", "grainy": "cloudy", "clouds": "noise", "checks": "checkerboard",
    "checkers": "checkerboard", "wall": "background", "scene": "background", "field": "background",
    "texture": "background",
}


def written() -> list[str]:
    """Every word that the grammar writes, lower case, sorted."""
    tables = (SIZE_WORDS, PATTERN_PHRASES, BACKGROUND_WORDS)
    phrases = [
        *MOVING, *STILL, *UNPATTERNED_PHRASES, *COLOURS, *NUMBER_WORDS.values(),
        *(form for kind in KIND_NOUNS for form in (kind, plural(kind))),
        *(form for forms in MOTION_PHRASES.values() for phrase in forms for form in phrase),
        *(phrase for table in tables for some in table.values() for phrase in some),
    ]
    plain = re.sub(r"{\w+}", " ", " ".join(phrases))
    return sorted({*re.findall("[a-z]+", plain), "a", "an", "and", "is", "are"} - {"one"})  # of one it writes "a"


def spellings() -> list[tuple[str, str]]:
    """(regular expression, what the grammar writes in its place), applied in this order to lower-case text.

    Fillers, and what is left of a phrase that it does not write, become nothing. What it writes itself stays.
    """
    said = {word for words in (*SIZE_WORDS.values(), *BACKGROUND_WORDS.values()) for word in words}
    synonyms = OTHER_SYNONYMS | MOTION_SYNONYMS | COLOUR_SYNONYMS | BACKGROUND_SYNONYMS
    synonyms |= {word: SIZE_WORDS[size][0] for word, size in SIZE_SYNONYMS.items()}
    for kind, (_, *others) in KIND_NOUNS.items():
        synonyms |= {form(noun): form(kind) for noun in others for form in (str, plural)}
    rules = [(rf"\b{word}\b", meant) for word, meant in synonyms.items() if word not in said]
    rules.sort(key=lambda rule: -len(rule[0]))  # "dark gray" before what its words might mean alone
    patterns = [noun for noun, pattern in BACKGROUND_NOUNS.items() if pattern in PATTERN_PHRASES]
    behind = "|".join(["background", "backdrop", *patterns])
    rules += [  # "a blue background"
        (rf"(?<!dark )\b{bright}(?=( \w+)? ({behind})\b)", BACKGROUND_WORDS[dark][-1])
        for bright, dark in DARKENED.items()
    ]
    return [*rules, (rf"\b({'|'.join(sorted(set(words()) - set(written())))})\b", "")]
