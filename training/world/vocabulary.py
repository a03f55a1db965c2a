"""Everything that can be named in this world, and every word it is named with.

One place for the names, their appearance, the phrases of the grammar and the words the parser knows.
It knows no sampling, no rendering and no sentences.

Colours are RGB in 0..1. Lengths are pixels of a 96-pixel-high frame and scale with the height.
"""
from __future__ import annotations

REFERENCE_HEIGHT = 96  # the frame height in which every length of this world is given

KINDS = ("circle", "square", "triangle", "star", "ring")

# Bright and saturated (or white), so that none meets a background under any tint, shade or lighting.
COLOURS = {
    "red": (0.90, 0.13, 0.14),
    "green": (0.16, 0.80, 0.24),
    "blue": (0.15, 0.33, 0.98),
    "yellow": (0.97, 0.88, 0.12),
    "orange": (1.00, 0.51, 0.07),
    "purple": (0.66, 0.22, 0.92),
    "cyan": (0.12, 0.84, 0.93),
    "white": (0.96, 0.96, 0.96),
}

SIZES = {"small": 15.0, "medium": 20.0, "large": 26.0}  # radius

MOTIONS = ("bounce", "orbit", "zigzag", "spin", "pulse", "drift")
SPINNING_KINDS = ("square", "triangle", "star")  # a turning circle or ring looks like a still one

PATTERNS = ("plain", "gradient", "stripes", "checker", "noise")

# Dark and muted.
BACKGROUNDS = {
    "charcoal": (0.14, 0.14, 0.16),
    "gray": (0.44, 0.45, 0.46),
    "navy": (0.10, 0.15, 0.37),
    "maroon": (0.37, 0.09, 0.14),
    "dark green": (0.10, 0.31, 0.16),
    "teal": (0.07, 0.36, 0.40),
    "plum": (0.32, 0.14, 0.38),
    "brown": (0.41, 0.27, 0.14),
}

# Never shown in training; evaluation asks whether the model composes them.
HELD_OUT_PAIRS = frozenset({
    ("circle", "orange"), ("square", "cyan"), ("triangle", "purple"),
    ("star", "red"), ("ring", "green"), ("square", "yellow"),
})

# What the grammar writes ----------------------------------------------------------------------

NUMBER_WORDS = {1: "one", 2: "two", 3: "three"}
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium",), "large": ("large", "big")}

# (third person singular, plural, participle)
MOTION_PHRASES = {
    "bounce": (
        ("bounces up and down", "bounce up and down", "bouncing up and down"),
        ("bounces", "bounce", "bouncing"),
        ("hops up and down", "hop up and down", "hopping up and down"),
    ),
    "orbit": (
        ("orbits around the center", "orbit around the center", "orbiting around the center"),
        ("travels around in a loop", "travel around in a loop", "traveling around in a loop"),
        ("orbits", "orbit", "orbiting"),
        ("orbits the centre", "orbit the centre", "orbiting the centre"),
    ),
    "zigzag": (
        ("zigzags", "zigzag", "zigzagging"),
        ("moves in a zigzag", "move in a zigzag", "moving in a zigzag"),
        ("zigzags back and forth", "zigzag back and forth", "zigzagging back and forth"),
    ),
    "spin": (
        ("spins in place", "spin in place", "spinning in place"),
        ("spins", "spin", "spinning"),
        ("rotates on the spot", "rotate on the spot", "rotating on the spot"),
        ("spins slowly", "spin slowly", "spinning slowly"),
    ),
    "pulse": (
        ("pulses", "pulse", "pulsing"),
        ("grows and shrinks", "grow and shrink", "growing and shrinking"),
        ("pulses in place", "pulse in place", "pulsing in place"),
        ("pulses slowly", "pulse slowly", "pulsing slowly"),
    ),
    "drift": (
        ("drifts slowly", "drift slowly", "drifting slowly"),
        ("floats along", "float along", "floating along"),
        ("drifts gently", "drift gently", "drifting gently"),
    ),
}

# `{c}` stands for a background colour; every phrase reads after "on" or "against".
PATTERN_PHRASES = {
    "plain": ("a plain {c} background", "a solid {c} background", "a plain {c} backdrop"),
    "gradient": ("a {c} gradient", "a {c} gradient background", "a soft {c} gradient"),
    "stripes": ("a striped {c} background", "{c} stripes", "a {c} background with stripes"),
    "checker": ("a checkered {c} background", "a {c} checkerboard", "a {c} checker background"),
    "noise": ("a cloudy {c} background", "a mottled {c} backdrop", "a {c} background with noise"),
}
UNPATTERNED_PHRASES = ("a {c} background", "a {c} backdrop")
BACKGROUND_WORDS = {  # how the grammar says each background colour
    "charcoal": ("charcoal", "black"), "gray": ("gray", "grey"), "navy": ("navy", "dark blue"),
    "maroon": ("maroon", "dark red"),
    "dark green": ("dark green",), "teal": ("teal",), "plum": ("plum", "dark purple"), "brown": ("brown",),
}

# What the parser reads beyond that ------------------------------------------------------------

KIND_NOUNS = {  # singular nouns; the plural adds s
    "circle": ("circle", "disc", "disk", "ball", "dot"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "hoop", "donut"),
}
COUNT_WORDS = {"a": 1, "an": 1, "one": 1, "single": 1, "two": 2, "pair": 2, "three": 3, "trio": 3}
SIZE_SYNONYMS = {
    "small": "small", "little": "small", "tiny": "small", "medium": "medium", "mid": "medium",
    "large": "large", "big": "large", "huge": "large",
}
COLOUR_SYNONYMS = {"violet": "purple", "turquoise": "cyan"}
MOTION_STEMS = {
    "bounce": ("bounce", "bounces", "bouncing", "hop", "hops", "hopping"),
    "orbit": ("orbit", "orbits", "orbiting", "circling", "loop", "loops", "looping"),
    "zigzag": ("zigzag", "zigzags", "zigzagging"),
    "spin": ("spin", "spins", "spinning", "rotate", "rotates", "rotating", "twirl", "twirls", "twirling",
             "turn", "turns", "turning"),
    "pulse": ("pulse", "pulses", "pulsing", "pulsate", "pulsates", "pulsating", "grow", "grows", "growing",
              "shrink", "shrinks", "shrinking"),
    "drift": ("drift", "drifts", "drifting", "float", "floats", "floating", "glide", "glides", "gliding"),
}
BACKGROUND_NOUNS = {  # noun -> the pattern it names, or None
    "background": None, "backdrop": None, "wall": None, "scene": None, "field": None, "texture": None,
    "gradient": "gradient", "stripes": "stripes", "checkerboard": "checker", "checkers": "checker",
    "checks": "checker", "noise": "noise", "clouds": "noise",
}
PATTERN_ADJECTIVES = {
    "plain": "plain", "solid": "plain", "striped": "stripes",
    "checkered": "checker", "checked": "checker", "checker": "checker",
    "cloudy": "noise", "mottled": "noise", "noisy": "noise", "grainy": "noise",
}
BACKGROUND_SYNONYMS = {
    "grey": "gray", "black": "charcoal", "dark blue": "navy", "dark red": "maroon", "forest green": "dark green",
    "dark purple": "plum", "dark gray": "charcoal", "dark grey": "charcoal",
    "light gray": "gray", "light grey": "gray", "dark teal": "teal", "dark brown": "brown",
    "navy blue": "navy", "dark cyan": "teal",
}
# A bright colour before a background noun means the dark background of the same hue.
DARKENED = {"red": "maroon", "green": "dark green", "blue": "navy", "purple": "plum", "cyan": "teal"}
FILLER_WORDS = frozenset([
    "the", "of", "in", "on", "over", "against", "with", "and", "is", "are", "there", "before", "front", "across",
    "along", "around", "back", "forth", "up", "down", "place", "spot", "center", "centre", "middle", "frame",
    "its", "it", "that", "which", "while", "as", "slowly", "gently", "soft", "softly", "smoothly", "steadily",
    "quickly", "moves", "move", "moving", "travels", "travel", "traveling", "travelling", "video", "clip",
    "showing", "shows", "shape", "shapes", "sized", "each", "both", "together", "to", "from", "side", "under",
    "very", "calm", "at", "sits", "sit", "here", "we", "see", "path", "left", "right", "upwards", "downwards",
    "sideways", "diagonally", "quietly",
])


def words() -> list[str]:
    """Every word this world's captions and parser know, lower case, sorted: what a tokenizer must cover."""
    known: set[str] = set(FILLER_WORDS) | set(COUNT_WORDS) | set(SIZE_SYNONYMS) | set(COLOURS) | set(COLOUR_SYNONYMS)
    known |= set(BACKGROUND_NOUNS) | set(PATTERN_ADJECTIVES)
    for phrase in (*BACKGROUNDS, *BACKGROUND_SYNONYMS):
        known |= set(phrase.split())
    for nouns in KIND_NOUNS.values():
        known |= {form for noun in nouns for form in (noun, plural(noun))}
    for forms in MOTION_STEMS.values():
        known |= set(forms)
    return sorted(known)


def plural(noun: str) -> str:
    """The plural of a noun of this world."""
    return noun + ("es" if noun.endswith("x") else "s")
