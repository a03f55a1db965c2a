"""Moments of the first captions' videos, kept while the study runs, and laid side by side afterwards."""
from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from evaluation.study.results import Key, Saved, key_of
from evaluation.study.settings import CaptionSet
from training.sheets import contact_sheet
from training.world import Clip
from utils.config import ConfigError
from utils.files import write_atomically


def keep_moments(
    folder: Path, method: str, clip: Clip, frames: np.ndarray, seconds: Sequence[float], fps: float,
) -> None:
    """Write a PNG of the frames at `seconds`, side by side. Shapes: frames uint8 [T, H, W, 3]."""
    moments = [min(len(frames) - 1, round(moment * fps)) for moment in seconds]
    strip = np.concatenate([frames[moment] for moment in moments], axis=1)
    path = _path(folder, method, clip.split, clip.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as buffer:
        Image.fromarray(strip).save(buffer, "PNG")
        write_atomically(path, buffer.getvalue())


def draw_sheet(saved: Saved, path: Path, methods: Sequence[str] | None = None) -> dict[str, list[str]]:
    """One PNG: for each kept caption a row a method, moments from left to right.

    Returns: captions, as `split-seed`, whose moments are missing or damaged, of each method that lacks some. One that
        was not run lacks all.
    Raises: ConfigError if no moments were kept, or a method is unknown.
    """
    for name in methods or ():
        if name not in saved.rows:
            raise ConfigError(f"{saved.folder} has no method {name!r}. It has: {', '.join(saved.rows)}.")
    study, moments = saved.study, saved.study["sheet_seconds"]
    names = methods or list(dict.fromkeys([*study["references"], *study["methods"], *saved.rows]))
    times = ", ".join(f"{moment:g}" for moment in moments)
    rows = {key_of(row): row for mine in saved.rows.values() for row in mine}
    asked = _captions(study, rows)
    videos, texts, missing = [], [], {}
    for key in dict.fromkeys([*asked, *rows]):
        strips = {name: _frames(_path(saved.folder, name, *key), len(moments)) for name in names}
        shown = {name: strip for name, strip in strips.items() if strip is not None}
        for name, strip in shown.items():
            videos.append(strip)
            first = name == next(iter(shown))
            texts.append(f"{name}: {rows[key]['caption']}  (at {times} s)" if first else name)
        if key in asked:
            for name in strips.keys() - shown.keys():
                missing.setdefault(name, []).append(f"{key[0]}-{key[1]}")
    if not videos:
        raise ConfigError(
            f"{saved.folder} holds no kept frames. Ask for them with sheet_captions and sheet_seconds of the study, "
            "and run it in a new folder."
        )
    contact_sheet(videos, texts, len(moments), path)
    return {name: missing[name] for name in names if name in missing}


def _captions(study: Mapping[str, Any], rows: Collection[Key]) -> list[Key]:
    """The captions whose moments should be there: the first ones of the study that any method has met."""
    every = ((part["split"], seed) for part in study["captions"] for seed in CaptionSet(**part).seeds)
    return [key for key in every if key in rows][:study["sheet_captions"]]


def _frames(strip: Path, columns: int) -> torch.Tensor | None:
    """A strip as uint8 frames [columns, H, W, 3]; None if it is missing, damaged, or of other moments."""
    try:
        with Image.open(strip) as image:
            return torch.from_numpy(np.stack(np.split(np.asarray(image.convert("RGB")), columns, axis=1)))
    except (OSError, SyntaxError, ValueError):  # a torn PNG is a syntax error to Pillow; a width that does not divide
        return None


def _path(folder: Path, method: str, split: str, seed: int) -> Path:
    return folder / "frames" / method / f"{split}-{seed}.png"
