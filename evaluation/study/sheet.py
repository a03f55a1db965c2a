"""Moments of the first captions' videos, kept while the study runs, and laid side by side afterwards."""
from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluation.study.results import Saved, key_of
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


def draw_sheet(saved: Saved, path: Path, methods: Sequence[str] | None = None) -> None:
    """One PNG: for each kept caption a row a method, moments from left to right.

    Raises: ConfigError if no moments were kept, or a method is unknown.
    """
    for name in methods or ():
        if name not in saved.rows:
            raise ConfigError(f"{saved.folder} has no method {name!r}. It has: {', '.join(saved.rows)}.")
    moments = saved.study["sheet_seconds"]
    times = ", ".join(f"{moment:g}" for moment in moments)
    rows = {key_of(row): row for mine in saved.rows.values() for row in mine}
    videos, texts = [], []
    for (split, seed), row in rows.items():
        strips = {name: _path(saved.folder, name, split, seed) for name in methods or saved.rows}
        strips = {name: strip for name, strip in strips.items() if strip.exists()}
        for name, strip in strips.items():
            videos.append(_frames(strip, len(moments)))
            first = name == next(iter(strips))
            texts.append(f"{name}: {row['caption']}  (at {times} s)" if first else name)
    if not videos:
        raise ConfigError(
            f"{saved.folder} holds no kept frames. Ask for them with sheet_captions and sheet_seconds of the study, "
            "and run it in a new folder."
        )
    contact_sheet(videos, texts, len(moments), path)


def _frames(strip: Path, columns: int) -> torch.Tensor:
    """A strip as uint8 frames [columns, H, W, 3]."""
    with Image.open(strip) as image:
        return torch.from_numpy(np.stack(np.split(np.asarray(image.convert("RGB")), columns, axis=1)))


def _path(folder: Path, method: str, split: str, seed: int) -> Path:
    return folder / "frames" / method / f"{split}-{seed}.png"
