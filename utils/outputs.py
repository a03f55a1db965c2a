"""What lies in an output folder: names, sidecars, the manifest, and what counts as finished.

    <stem>.mp4           a finished video          <stem>.partial.mp4    an interrupted one
    <stem>.json          its record                <stem>.partial.json   its record
    manifest.jsonl       one line for every video that finished, stopped or failed, in order of time

A video is finished only when its sidecar says so, with the fingerprint of its settings and the size of
the file. The sidecar is written after the video has its final name, so a killed run leaves nothing that
looks finished.
"""
from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import time
import traceback
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from utils.files import remove_abandoned, remove_stale, write_atomically
from utils.hashing import fingerprint, sha256_file
from utils.prompts import PromptItem

logger = logging.getLogger(__name__)

State = Literal["new", "finished", "other_settings", "partial"]
MANIFEST = "manifest.jsonl"
SLUG_CHARACTERS = 60
DIGEST_CHARACTERS = 8
INDEX_DIGITS = 4
UNWRITABLE = "{} {} cannot be written to"
FOLDER_REMEDY = "Choose another folder, or make room and set its permissions"
SHOWN_SETTINGS, SHOWN_CHARACTERS = 4, 24


class ManifestError(OSError):
    """The manifest could not take a line, which is written last: what the line is about is in place."""


def video_stem(item: PromptItem, index: int, sample: int, seed: int, *, with_index: bool) -> str:
    """Portable, collision-free file name without suffix: lower-case ASCII letters, digits, hyphens.

    Args: index of the prompt in its file; sample, 0-based; seed of the run.
    Returns: `<words of the prompt>-<8 hex>-s<seed>-<sample>`, the hex standing for prompt, extended prompt,
        the bytes of the source and a timeline; or with_index `0007-<sample>`, which is unique within one prompt file.
        No underscore: VBench-Long groups clips by what stands before the first one.
    """
    if min(index, sample, seed) < 0:
        raise ValueError(f"index={index}, sample={sample}, seed={seed}: names need numbers from 0 on")
    if with_index:
        return f"{index:0{INDEX_DIGITS}d}-{sample}"
    source = None if item.source is None else sha256_file(item.source)
    later = [list(item.later)] if item.later else []
    digest = fingerprint([item.prompt, item.extended, source, *later])[:DIGEST_CHARACTERS]
    return f"{_slug(item.prompt)}-{digest}-s{seed}-{sample}"


def _slug(text: str) -> str:
    """Readable ASCII words of `text`, at most SLUG_CHARACTERS, cut between words where there is a choice."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")
    if len(words) > SLUG_CHARACTERS:
        cut = words[: SLUG_CHARACTERS + 1].rfind("-")
        words = words[: cut if cut > 0 else SLUG_CHARACTERS]
    return words or "video"


class OutputFolder:
    """One output folder, shared by any number of processes that each make their own videos.

    With `overwrite`, every video counts as new. Errors: OSError, before anything is computed, if the folder
    cannot be made or written to.
    """

    def __init__(self, folder: Path, *, overwrite: bool):
        self.folder = Path(folder)
        self.overwrite = overwrite
        check_writable(self.folder)
        with _told(OSError, UNWRITABLE.format("--output_folder", self.folder), FOLDER_REMEDY):
            self.folder.mkdir(parents=True, exist_ok=True)
            for suffix in (".mp4", ".json"):
                remove_abandoned(self.folder, suffix)  # of killed runs, whatever their videos were called

    def video_path(self, stem: str) -> Path:
        return self.folder / f"{stem}.mp4"

    def sidecar_path(self, stem: str) -> Path:
        return self.folder / f"{stem}.json"

    def partial_path(self, stem: str) -> Path:
        return self.folder / f"{stem}.partial.mp4"

    def state(self, stem: str, settings_fingerprint: str) -> State:
        """What is there for `stem`.

        finished: video and sidecar agree, same settings. other_settings: finished with another fingerprint.
        partial: files of it are there, but no finished video. new: none (hidden temporary files do not
        count), or `overwrite` is on.
        """
        if self.overwrite:
            return "new"
        video, record = self.video_path(stem), self.record(stem)
        complete = video.is_file() and record is not None and record.get("status") == "complete"
        if complete and record.get("bytes") == video.stat().st_size:
            return "finished" if record.get("fingerprint") == settings_fingerprint else "other_settings"
        leftovers = (video, self.sidecar_path(stem), self.partial_path(stem))
        return "partial" if any(path.exists() for path in leftovers) else "new"

    def record(self, stem: str) -> dict | None:
        """The sidecar of a finished video; None if it is missing or damaged."""
        try:
            record = json.loads(self.sidecar_path(stem).read_bytes())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def start(self, stem: str) -> None:
        """Clear unfinished videos that dead runs left of `stem`.

        A finished video, or the part of one that was kept, stays until its successor replaces it.

        Raises: BeingWrittenError if another process is writing this video.
        """
        remove_stale(self.video_path(stem))

    def finish(self, stem: str, record: Mapping) -> None:
        """Declare the video, already under its final name, finished. `record` needs "fingerprint"."""
        if "fingerprint" not in record:
            raise ValueError(f"{stem}: the record lacks 'fingerprint', so no later run could know this video. Add it")
        self._write(self.sidecar_path(stem), "complete", self.video_path(stem), record)
        for path in (self.partial_path(stem), self.partial_path(stem).with_suffix(".json")):
            path.unlink(missing_ok=True)

    def partial(self, stem: str, record: Mapping) -> None:
        """Record an interrupted video that was kept as `<stem>.partial.mp4`; it is redone next time."""
        path = self.partial_path(stem)
        self._write(path.with_suffix(".json"), "partial", path, record)

    def fail(self, stem: str, record: Mapping) -> None:
        """Note a failed video in the manifest; `record` should say why under "error"."""
        self._append({"status": "failed", "video": self.video_path(stem).name, **_jsonable(record)})

    def _write(self, sidecar: Path, status: str, video: Path, record: Mapping) -> None:
        full = {"status": status, "video": video.name, "bytes": video.stat().st_size, **_jsonable(record)}
        text = json.dumps(full, indent=2, ensure_ascii=False) + "\n"
        remedy = "Make room and start the same command again: a video without its record is made anew"
        with _told(OSError, f"{sidecar} cannot be written", remedy):
            write_atomically(sidecar, text.encode("utf-8"))
        self._append(full)

    def _append(self, record: dict) -> None:
        """Add one line to the manifest: the scalars of `record`, since the sidecar has the rest."""
        scalars = {k: v for k, v in record.items() if v is None or isinstance(v, (str, int, float))}
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        manifest = self.folder / MANIFEST
        remedy = "Make it a file with room to grow; videos and records beside it are untouched"
        with _told(ManifestError, f"{manifest} cannot be added to", remedy):
            append_json_line(manifest, {"time": now, **scalars})


def check_writable(folder: Path, flag: str = "--output_folder") -> None:
    """Raise OSError, which names `flag`, unless a file can be made in `folder`, or in what there is of its path.

    No file stays.
    """
    with _told(OSError, UNWRITABLE.format(flag, folder), FOLDER_REMEDY):
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if there.is_file():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
        probe = there / ".writable.txt"
        write_atomically(probe, b"")
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(kind: type[OSError], what: str, remedy: str) -> Iterator[None]:
    """An OSError within becomes a `kind` that says which file it was about, and what to do."""
    try:
        yield
    except OSError as error:
        raise kind(error.errno, f"{what}: {error.strerror or error}. {remedy}") from error


def differences(record: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    """What a finished video's record has other than the video asked for, in words: `key old -> new`."""
    later = [[part["time"], part["prompt"]] for part in record.get("later_prompts") or ()] or None
    text = record.get("extended_prompt") or record.get("prompt")
    new = {"later": None, **json.loads(json.dumps(identity))}
    old = {**record, "text": text, "later": later, "source": identity["source"]}
    old, new = _flat({key: old.get(key) for key in new}), _flat(new)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    told = [
        f"{key.removeprefix('settings.').removeprefix('config.')} {_short(old.get(key))} -> {_short(new.get(key))}"
        for key in keys[:SHOWN_SETTINGS]
    ]
    more = [f"{len(keys) - SHOWN_SETTINGS} more"] if len(keys) > SHOWN_SETTINGS else []
    return ", ".join(told + more) or "another image or video to continue"  # records hold its name, not its bytes


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, under dotted keys."""
    if not isinstance(values, Mapping):
        return {prefix: values}
    inner = (_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in values.items())
    return {key: value for flat in inner for key, value in flat.items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS - 3] + "..."


def reason(error: Exception) -> str:
    """Why something failed, for people: errors of bad input and of the system speak for themselves."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    if isinstance(error, OSError | ValueError):
        return str(error)
    first_line, _, _ = str(error).partition("\n")  # torch adds its own call stack
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in place)
    return f"{type(error).__name__}: {first_line}{where}"


def append_json_line(path: Path, record: Mapping) -> None:
    """Add one JSON line with one O_APPEND write, so that lines of several processes never mix.

    If a killed process left a torn last line, the new one begins on a line of its own.
    Raises: OSError, also when the disk takes only part of the line.
    """
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(f"{path}: only {written} of {len(line)} bytes could be added. Is the disk full?")
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict]:
    """Records of a .jsonl written by `append_json_line`; torn lines are skipped. A missing file is empty."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            logger.warning("%s: line %d is torn and was skipped", path, number)
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _jsonable(value: object, where: str = "record") -> object:
    """Plain JSON values: paths as text, nan and infinity as text (JSON has no such numbers).

    Raises: TypeError naming the place of a value of another kind.
    """
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{where} is {type(value).__name__}, which a JSON record cannot hold. Convert it first")
