"""Timelines: the prompts of one video, and the second at which each begins.

    .jsonl   one video: one object a line, {"time": 0, "prompt": ...}, {"time": 10, "prompt": ...}
             many videos, one a line: {"timeline": [{"time": 0, "prompt": ...}, ...]} in place of {"prompt": ...}
    .yaml    one video: a list of {time, prompt}; many videos: a list of such lists

Times are seconds of the finished video. The first is 0, and they rise.
"""
from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

Later = tuple[tuple[float, str], ...]  # (seconds, prompt) of every prompt but the first
KEYS = ("time", "prompt")


class TimelineError(ValueError):
    """A timeline cannot be read, or does not fit its video; the message says where, why, and what to do."""


def read_timeline(entries: Any, where: str) -> tuple[str, Later]:
    """The first prompt of a video, and the later ones with their seconds.

    Args:
        entries: plain data, a list of {time, prompt}.
        where: file and line, for messages.
    Raises:
        TimelineError: anything else, a first time that is not 0, or times that do not rise.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise TimelineError(f"{where}: a timeline is a list of {{time, prompt}}, at least one. Got {entries!r:.80}")
    read = [_read_entry(entry, f"{where}: prompt {number}") for number, entry in enumerate(entries, 1)]
    for (before, _), (time, _) in zip(read, read[1:], strict=False):
        if time <= before:
            raise TimelineError(f"{where}: time {time:g} follows {before:g}. Put the prompts in order, each later")
    if read[0][0] != 0:
        raise TimelineError(f"{where}: the first time is {read[0][0]:g}, and a video begins at 0. Add a prompt at 0")
    return read[0][1], tuple(read[1:])


def is_entry(record: Any) -> bool:
    """Whether a line of a file is one moment of a timeline, so that the whole file is one video."""
    return isinstance(record, dict) and "time" in record


def _read_entry(entry: Any, where: str) -> tuple[float, str]:
    if not isinstance(entry, dict):
        raise TimelineError(f"{where} is {entry!r:.80}, and {{time, prompt}} is wanted")
    for key in entry:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Use {' and '.join(KEYS)}"
            raise TimelineError(f"{where}: unknown key {key!r}. {hint}")
    missing = [key for key in KEYS if key not in entry]
    if missing:
        raise TimelineError(f"{where}: has no {missing[0]!r}. Add it")
    time, prompt = entry["time"], entry["prompt"]
    if isinstance(time, bool) or not isinstance(time, int | float) or not math.isfinite(time) or time < 0:
        raise TimelineError(f"{where}: time is {time!r}, and a number of seconds from 0 on is wanted")
    if not isinstance(prompt, str) or not prompt.strip():
        raise TimelineError(f"{where}: prompt is {prompt!r}, and text is wanted")
    return float(time), " ".join(prompt.split())
