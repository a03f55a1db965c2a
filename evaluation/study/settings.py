"""What a study is, as a typed YAML: evaluation/studies/*.yaml hold the values."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.render import MOST_VIDEOS
from training.world import SPLITS, Clip, World, sample
from utils.config import REPOSITORY, ConfigError
from utils.yaml_files import load_structured

REFERENCES = ("rendered", "reconstructed")  # the true video; the same through the autoencoder
NAME = re.compile(r"[a-z0-9][a-z0-9_]*")    # of a method; it names files


@dataclass
class Method:
    """One way to make the videos."""

    config: str                                         # a YAML of configs/, relative to the repository
    set: list[str] = field(default_factory=list)        # key=value, as inference.py's --set


@dataclass
class CaptionSet:
    """Captions of consecutive seeds of one split of the world."""

    split: str
    count: int
    first: int = 0                                      # seed

    @property
    def seeds(self) -> range:
        """Of its captions."""
        return range(self.first, self.first + self.count)

    def fault(self) -> str | None:
        """What is wrong, and what to do; None if nothing is."""
        if self.split not in SPLITS:
            return f"split={self.split!r} is unknown. Use one of: {', '.join(SPLITS)}."
        if self.count < 1 or self.first < 0:
            return (
                f"count={self.count} from first={self.first} names no caption. Ask for at least one, from seed 0 on."
            )
        if self.count > MOST_VIDEOS:
            return f"count={self.count} is more than {MOST_VIDEOS:,} captions. Ask for fewer at a time."
        return None


@dataclass
class Study:
    """Every method meets every caption, from the same noise."""

    seconds: float                                      # videos show the moments 0 .. seconds, both included
    captions: list[CaptionSet]
    methods: dict[str, Method] = field(default_factory=dict)
    references: list[str] = field(default_factory=list)  # of REFERENCES, measured beside the methods
    model: str = "tiny"                                 # a file stem in configs/models, or a path
    seed: int = 0                                       # of the noise; each caption has noise of its own
    batch_size: int = 16                                # videos made side by side
    against: list[str] = field(default_factory=list)    # methods that the report compares every other one with
    chains: list[list[str]] = field(default_factory=list)  # methods that should drift less and less
    sheet_captions: int = 0                             # the first so many captions are kept for contact sheets
    sheet_seconds: list[float] = field(default_factory=list)  # at these moments

    @property
    def names(self) -> list[str]:
        """References and methods, in the order of the tables."""
        return [*self.references, *self.methods]


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read and check the study at `path`; `overrides` are key=value.

    Raises:
        ConfigError: a key, type or value that cannot be used.
    """
    study = load_structured(path, Study, overrides)
    wrong = _first_fault(study)
    if wrong is not None:
        raise ConfigError(f"{path}: {wrong}")
    return study


def clips_of(study: Study, world: World, count: int | None = None) -> list[Clip]:
    """The clips whose captions are shown: of each set all, or the first `count`."""
    return [
        sample(seed, part.split, world)
        for part in study.captions
        for seed in part.seeds[:count]
    ]


def config_path(method: Method) -> Path:
    """Where the method's YAML lies."""
    return REPOSITORY / method.config


def _first_fault(study: Study) -> str | None:
    """What is wrong, and what to do; None if nothing is."""
    if not study.seconds > 0:
        return f"seconds={study.seconds} is no length that a video can have. Ask for more than 0."
    if study.batch_size < 1:
        return f"batch_size={study.batch_size} is too small. Ask for 1 or more."
    if not study.captions:
        return "captions is empty: a study needs captions. Name a split and a count, such as {split: test, count: 64}."
    return _caption_fault(study) or _method_fault(study)


def _caption_fault(study: Study) -> str | None:
    taken: set[tuple[str, int]] = set()
    for part in study.captions:
        wrong = part.fault()
        if wrong is not None:
            return f"captions: {wrong}"
        seeds = {(part.split, seed) for seed in part.seeds}
        if seeds & taken:
            return f"captions: two sets share captions of {part.split}. Let the later one start after the earlier one."
        taken |= seeds
    if study.sheet_captions > 0 and not study.sheet_seconds:
        return f"sheet_captions={study.sheet_captions} without sheet_seconds. Name the moments, such as [1, 5]."
    late = [moment for moment in study.sheet_seconds if not 0 <= moment <= study.seconds]
    if late:
        return (
            f"sheet_seconds names {late[0]:g} s, outside of 0..{study.seconds:g} s. Leave it out, or name others: "
            f'--set "sheet_seconds=[{study.seconds:g}]".'
        )
    return None


def _method_fault(study: Study) -> str | None:
    if not study.names:
        return f"neither methods nor references: nothing to measure. Add a method, or references: [{REFERENCES[0]}]."
    for name in study.references:
        if name not in REFERENCES:
            return f"references: {name!r} is unknown. Use: {', '.join(REFERENCES)}."
    for name in study.methods:
        if not NAME.fullmatch(name) or name in REFERENCES:
            return (
                f"methods: {name!r} cannot be a method's name. Use lower-case letters, digits and _, "
                f"and none of {', '.join(REFERENCES)}."
            )
    for key, names in (("against", study.against), *(("chains", chain) for chain in study.chains)):
        for name in names:
            if name not in study.names:
                return f"{key}: {name!r} is none of the study's methods. Known: {', '.join(study.names)}."
    return None
