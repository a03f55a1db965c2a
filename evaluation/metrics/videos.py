"""Which videos to measure, and what is known of each before it is opened.

Our own videos say it in the JSON beside them (utils/outputs.py). For anyone's, the method is the folder's name and
the prompt comes from a prompts file or from the file name.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.analysers.stability import ChunkLayout
from utils.config import ConfigError
from utils.prompts import VIDEO_SUFFIXES, load_prompts, read_text_lines

UNFINISHED = ".partial"
TEMPORAL_STRIDE = 4  # pixel frames a latent frame, of the Wan VAE; the first latent frame is a single pixel frame


@dataclass(frozen=True)
class Video:
    """One video file and what is known of it."""

    path: Path
    method: str
    prompt: str | None
    seed: str
    chunks: ChunkLayout | None

    @property
    def name(self) -> str:
        """What stands in the table's column `video`."""
        return f"{self.method}/{self.path.name}"


def find_videos(
    folders: Sequence[str], *, prompts: Path | None = None, chunks: ChunkLayout | None = None,
) -> list[Video]:
    """All videos of the folders, in order of name; unfinished ones are left out.

    Args:
        folders: `FOLDER`, whose name is the method, or `METHOD=FOLDER`.
        prompts: a .json {file name with or without suffix: prompt}, or what inference.py takes, a .txt or .jsonl,
            whose line n (from 0) belongs to the videos whose names begin with the number n, as `--save_with_index`
            writes them.
        chunks: layout of videos that have no JSON beside them.
    Raises:
        ConfigError: a folder that is missing, a file, empty, or of the same method as another; a bad prompts file.
    """
    known, by_method, videos = _read_prompts(prompts), {}, []
    for text in folders:
        method, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        if path.is_file():
            raise ConfigError(
                f"{path} is a file, and videos are found by their folder. Give FOLDER or METHOD=FOLDER: {path.parent} "
                "has this one and all beside it; to have it alone, move it to a folder of its own."
            )
        if not path.is_dir():
            raise ConfigError(f"{text}: no such folder. Give FOLDER or METHOD=FOLDER.")
        method = method if equals else path.resolve().name
        if method in by_method:
            raise ConfigError(
                f"{by_method[method]} and {path} would both be method {method!r}. Tell them apart: NAME={path}."
            )
        by_method[method] = path
        files = sorted(
            file for file in path.iterdir()
            if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file() and not file.name.startswith(".")
            and not file.stem.endswith(UNFINISHED)
        )
        if not files:
            raise ConfigError(f"{path}: no videos in there ({', '.join(VIDEO_SUFFIXES)}).")
        videos += [_video(file, method, known, chunks) for file in files]
    return videos


def _video(path: Path, method: str, prompts: Mapping[str, str], chunks: ChunkLayout | None) -> Video:
    record = sidecar(path)
    prompt = record.get("prompt") or prompts.get(path.name) or prompts.get(path.stem) or _numbered(path, prompts)
    return Video(
        path, method, prompt or _prompt_in_name(path.stem), _seed(record) or _seed_in_name(path.stem),
        _chunks(record) or chunks,
    )


def sidecar(path: Path) -> dict:
    """The JSON beside a video; empty if there is none that can be read."""
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _chunks(record: Mapping) -> ChunkLayout | None:
    config = (record.get("settings") or {}).get("config") or {}
    frames = config.get("num_frame_per_block")
    if not isinstance(frames, int):
        return None
    first = 1 if config.get("independent_first_frame") else frames
    return ChunkLayout(1 + TEMPORAL_STRIDE * (first - 1), TEMPORAL_STRIDE * frames)


def _seed(record: Mapping) -> str:
    seed, sample = record.get("seed"), record.get("sample") or 0
    if seed is None:
        return ""
    return f"{seed}-{sample}" if sample else str(seed)


def _seed_in_name(stem: str) -> str:
    """`...-s<seed>-<sample>` as we write it, or the sample of `<prompt>-<sample>` as VBench does."""
    ours = re.search(r"-s(\d+)-(\d+)$", stem)
    if ours:
        return f"{ours[1]}-{ours[2]}" if int(ours[2]) else ours[1]
    vbench = re.search(r"-(\d+)$", stem)
    return vbench[1] if vbench else ""


def _prompt_in_name(stem: str) -> str | None:
    """A name with spaces is a prompt, less VBench's `-<sample>`."""
    words = re.sub(r"-\d+$", "", stem).strip()
    return words if " " in words else None


def _numbered(path: Path, prompts: Mapping[str, str]) -> str | None:
    number = re.match(r"\d+(?=\D|$)", path.stem)
    return prompts.get(f"#{int(number[0])}") if number else None


def _read_prompts(path: Path | None) -> dict[str, str]:
    """File names, or `#<line>`, to prompts."""
    if path is None:
        return {}
    try:
        if path.suffix.lower() == ".jsonl":
            items = load_prompts(prompt=None, data_path=path, extended_prompt_path=None, i2v=False)
            return {f"#{item.index}": item.prompt for item in items}
        if path.suffix.lower() != ".json":
            return {f"#{number}": " ".join(line.split()) for number, line in enumerate(read_text_lines(path)) if line}
        named = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts {path}: cannot be read: {error}") from error
    if not isinstance(named, dict) or not all(isinstance(prompt, str) for prompt in named.values()):
        raise ConfigError(f'--prompts {path}: must be one JSON object {{"file name": "prompt", ...}}.')
    return named
