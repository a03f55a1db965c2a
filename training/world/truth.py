"""What a video should show, as data: the common language of captions, scenes and analysers."""
from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from training.world.vocabulary import BACKGROUNDS, COLOURS, KINDS, MOTIONS, PATTERNS, SIZES


@dataclass(frozen=True)
class ObjectTruth:
    """One shape. None is what was left unsaid; a colour that has no name is None even where all else is known."""

    kind: str
    colour: str | None
    size: str | None = None

    def __post_init__(self) -> None:
        _member("kind", self.kind, KINDS)
        if self.colour is not None:
            _member("colour", self.colour, COLOURS)
        if self.size is not None:
            _member("size", self.size, SIZES)


@dataclass(frozen=True)
class Truth:
    """What a caption says, or what is true of a scene: then nothing is None but colours that have no name.

    `motion` is that of all shapes. `background` is a colour of `BACKGROUNDS`, `pattern` one of `PATTERNS`.
    """

    objects: tuple[ObjectTruth, ...]
    motion: str | None = None
    background: str | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        if not self.objects:
            raise ValueError("a truth without a shape: name at least one object")
        for name, value, allowed in (
            ("motion", self.motion, MOTIONS), ("background", self.background, BACKGROUNDS),
            ("pattern", self.pattern, PATTERNS),
        ):
            if value is not None:
                _member(name, value, allowed)

    @property
    def kinds(self) -> Counter[str]:
        """How often each kind is named."""
        return Counter(item.kind for item in self.objects)

    @property
    def colours(self) -> Counter[str]:
        """How often each subject colour is named."""
        return Counter(item.colour for item in self.objects if item.colour is not None)

    @property
    def pairs(self) -> Counter[tuple[str, str]]:
        """How often each (kind, colour) is named."""
        return Counter((item.kind, item.colour) for item in self.objects if item.colour is not None)

    def to_json(self) -> dict:
        """Plain lists, strings and None."""
        data = asdict(self)
        data["objects"] = list(data["objects"])
        return data


def _member(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not in this world. Use one of: {', '.join(allowed)}.")
