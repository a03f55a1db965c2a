"""All metrics by name. Each is imported when it is chosen: some need heavy or optional packages."""
from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import get_type_hints

from evaluation.metrics.protocol import NO_CHUNKS, NO_PROMPT, Choices, Metric
from utils.config import ConfigError
from utils.config_schema import nearest

logger = logging.getLogger(__name__)

METRICS = {  # name: module of evaluation.metrics and class, made without arguments
    "picture": ("picture", "Picture"),
    "drift": ("drift", "Drift"),
    "flicker": ("steps", "Flicker"),
    "borders": ("steps", "Borders"),
    "frozen": ("steps", "Frozen"),
    "returns": ("returns", "Returns"),
    "flow": ("flow", "Flow"),
    "brisque": ("brisque", "Brisque"),
    "world": ("world", "WorldMetric"),
}
ON_DEVICE = {"shots": ("shots", "Shots")}  # made with the device
MODELS = {                                 # made with the choices; they need downloaded weights, or a model of yours
    "subject_consistency": ("consistency", "subject"),
    "background_consistency": ("consistency", "background"),
    "clip_score": ("likeness", "clip_score"),
    "aesthetic_quality": ("likeness", "aesthetic_quality"),
    "visual_stability": ("stability", "visual_stability"),
}
EVERY = {**METRICS, **ON_DEVICE, **MODELS}
BASIC = ("picture", "drift", "flicker", "borders", "frozen", "returns")  # no download, no optional package
FREE = (*BASIC, "flow", "brisque", "shots")                              # no download
PAPERS = tuple(name for name in MODELS if name != "visual_stability")    # the papers' own, with downloaded weights
ASKS = {  # what must be known of a video (a field of videos.Video), and how it is told
    "borders": ("chunks", NO_CHUNKS),
    "clip_score": ("prompt", NO_PROMPT),
}


def make_metrics(names: Sequence[str], choices: Choices) -> list[Metric]:
    """The metrics of these names, ready to measure; `basic`, `free` and `papers` stand for several.

    Of `free`, those whose optional package is not installed are left out, with a warning each.
    Raises:
        ConfigError: an unknown name; weights, or a package of a metric that was named, that are missing.
    """
    groups = {"basic": BASIC, "free": FREE, "papers": PAPERS}
    wanted: dict[str, None] = {}
    for name in names:
        wanted |= dict.fromkeys(groups.get(name, (name,)))
    made = []
    for name in wanted:
        if name not in EVERY:
            known = [*groups, *EVERY]
            raise ConfigError(f"metric {name!r} is unknown.{nearest(name, known)} Known: {', '.join(known)}.")
        try:
            made.append(_made(name, choices))
        except ConfigError as error:
            if name in names or name not in FREE:
                raise
            logger.warning("left out: %s", error)
    return made


def value_names(names: Iterable[str] = EVERY) -> set[str]:
    """name@granularity of whatever the metrics of these names may report; none of them is made."""
    return {value.format(name=name) for name in names for value in _kind(name).gives}


@lru_cache(maxsize=1)
def share_names() -> frozenset[str]:
    """Names of the values that are shares, 0 to 1, as `Metric` has them: Wilson's interval is theirs."""
    return frozenset(value for name in EVERY for value in _kind(name).shares)


def _kind(name: str) -> type[Metric]:
    maker = _maker(name)
    return maker if isinstance(maker, type) else get_type_hints(maker)["return"]


def _maker(name: str) -> type[Metric] | Callable[[Choices], Metric]:
    module, kind = EVERY[name]
    return getattr(importlib.import_module(f"evaluation.metrics.{module}"), kind)


def _made(name: str, choices: Choices) -> Metric:
    maker = _maker(name)
    if name in METRICS:
        return maker()
    return maker(choices.device) if name in ON_DEVICE else maker(choices)
