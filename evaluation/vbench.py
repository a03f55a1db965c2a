"""To and from the official VBench suite, which runs in an environment of its own (evaluation/vbench_suite.sh).

VBench-Long reads the prompt from the file's name and groups a video's 2 s clips by what stands before the first
underscore. So a name is the prompt itself: no underscore, no slash, no `-Scene`, and short enough that the suffix of a
clip fits. A cut prompt costs nothing: ViCLIP, which alone reads it, sees 32 tokens.
"""
from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from evaluation.metrics.table import Row
from evaluation.metrics.videos import Video
from utils.config import ConfigError
from utils.files import write_atomically

SUITE = "VBench commit"            # stands in the protocol of all its rows, whichever commit it was
VERSION = f"{SUITE} 98b19513"
INDEX = "vbench_export.json"      # what each exported name is
PROMPTS = "vbench_prompts.json"   # for `--mode custom_input --prompt_file`, which takes whole prompts
NAME_BYTES = 230                  # of the 255 that file systems allow; clips get a suffix
DIMENSIONS = (                    # that it may rate, as it calls them; evaluation/vbench_suite.sh asks for seven
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality", "object_class", "multiple_objects", "human_action", "color",
    "spatial_relationship", "scene", "appearance_style", "temporal_style", "overall_consistency",
)
PERCENT = ("imaging_quality",)    # whose single results are 0..100 where the mean is 0..1


def export(videos: Sequence[Video], output: Path) -> dict[str, Path]:
    """Lay the videos out as VBench expects them, one folder a method; returns method -> folder.

    Files are hard links where the disk allows it, else copies.
    Raises: ConfigError, before anything is written, for a video without a prompt, and for two videos that would get
        one name (the same prompt twice in a method: export one seed at a time).
    """
    named: dict[tuple[str, str], Video] = {}
    for video in videos:
        if not video.prompt:
            raise ConfigError(f"{video.path}: no prompt is known, and VBench reads it from the name. Give --prompts.")
        name = f"{vbench_stem(video.prompt)}{video.path.suffix.lower()}"
        other = named.setdefault((video.method, name.casefold()), video)
        if other is not video:
            raise ConfigError(
                f"{other.path} and {video.path} would both be {video.method}/{name!r}. VBench-Long knows a video by "
                "its prompt: put one seed into each folder, and export them as methods of their own (NAME=FOLDER)."
            )
    folders = {}
    for method in dict.fromkeys(video.method for video in videos):
        ours = [video for video in videos if video.method == method]
        folders[method] = _export_method(ours, output / method)
    return folders


def _export_method(videos: Sequence[Video], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    for video in videos:
        name = f"{vbench_stem(video.prompt)}{video.path.suffix.lower()}"
        target = folder / name
        if target.exists() and not _same(target, video.path):
            raise ConfigError(f"{target} is there already and is another video. Choose an empty --output.")
        if not target.exists():
            try:
                os.link(video.path, target)
            except OSError:  # another disk
                shutil.copy2(video.path, target)
        index[name] = {"video": video.name, "method": video.method, "prompt": video.prompt, "seed": video.seed}
    extra = [path.name for path in folder.glob("*.*") if path.name not in {*index, INDEX, PROMPTS}]
    if extra:
        raise ConfigError(f"{folder} holds other files, such as {extra[0]!r}, which VBench would rate. Remove them.")
    write_atomically(folder / INDEX, (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())
    prompts = {name: entry["prompt"] for name, entry in index.items()}
    write_atomically(folder / PROMPTS, (json.dumps(prompts, indent=1, ensure_ascii=False) + "\n").encode())
    return folder


def vbench_stem(prompt: str) -> str:
    """The file name, without suffix, from which VBench-Long reads this prompt."""
    text = re.sub(r"[\x00-\x1f/\\]", " ", prompt.replace("_", " ")).replace("-Scene", " Scene")
    text = re.sub(r"-(\d+)$", r" \1", re.sub(r"\s+", " ", text).strip()).lstrip(".")
    if len(text.encode()) > NAME_BYTES:
        text = text.encode()[:NAME_BYTES].decode(errors="ignore")
        text = text.rpartition(" ")[0] or text
    return text.strip() or "video"


def read_results(results: Path, exported: Path) -> list[Row]:
    """Rows of one `<name>_eval_results.json` of VBench or VBench-Long.

    Args: exported, the folder of one method that `export` wrote.
    Returns: one row a video and dimension; granularity clip2s if VBench-Long rated clips, whole otherwise.
    Raises: ConfigError for files of another kind, and for results of a video that was not exported.
    """
    try:
        index = json.loads((exported / INDEX).read_bytes())
        content = json.loads(results.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read as an export and its results: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{results}: not a file of VBench's results ({{dimension: [mean, videos]}}).")
    rows = []
    for dimension, result in content.items():
        lists = [part for part in result[1:] if _is_results(part)] if isinstance(result, list) else []
        if not lists:
            raise ConfigError(f"{results}: {dimension} has no results of single videos. Run VBench again.")
        rows += _rows(dimension, lists, index, results)
    return rows


def is_imported(row: Row) -> bool:
    """Whether the suite said it."""
    return SUITE in row.protocol


def _rows(dimension: str, lists: Sequence[list[dict]], index: dict, results: Path) -> list[Row]:
    clips = any("split_clip" in entry["video_path"] for part in lists for entry in part if "video_path" in entry)
    by_stem: dict[str, list[float]] = defaultdict(list)
    for entry in lists[0]:
        if "video_path" in entry:
            by_stem[Path(entry["video_path"]).stem.partition("_")[0]].append(float(entry["video_results"]))
    named = {Path(name).stem: entry for name, entry in index.items()}
    unknown = sorted(set(by_stem) - set(named))
    if unknown:
        raise ConfigError(f"{results}: {dimension} rates {unknown[0]!r}, which was not exported there.")
    granularity = "clip2s" if clips else "whole"
    how = "VBench-Long, 2 s clips" if clips else "VBench, whole videos"
    scale = 100 if dimension in PERCENT else 1
    rows = []
    for stem, entry in named.items():
        head = (entry["video"], entry["method"], entry["prompt"], entry["seed"], dimension)
        values = by_stem.get(stem)
        if values:
            value = sum(values) / len(values) / scale
            rows.append(Row(*head, granularity, None, value, f"{how}, {VERSION}"))
        else:
            rows.append(Row(*head, "", None, None, f"{how}, {VERSION}", "VBench has no result for this video"))
    return rows


def _is_results(part: object) -> bool:
    return isinstance(part, list) and any(isinstance(entry, dict) and "video_results" in entry for entry in part)


def _same(one: Path, other: Path) -> bool:
    return one.samefile(other) or one.read_bytes() == other.read_bytes()
