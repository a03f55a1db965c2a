"""The folder of one study: `study.json` says what was asked and how it was made, `<method>.jsonl` hold the rows."""
from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config import ConfigError
from utils.files import lock_file, write_atomically
from utils.outputs import append_json_line, read_json_lines

RECORD, LOCK = "study.json", ".study.lock"
WAIT_S = 0.05
Key = tuple[str, int]  # split and seed of a caption


@dataclass(frozen=True)
class Saved:
    """What a folder holds."""

    folder: Path
    study: dict[str, Any]              # the YAML's content
    rows: dict[str, list[dict]]        # of each method, captions in the study's order; one row a caption


class Results:
    """An output folder that is being filled, by any number of runs of one study at a time.

    Raises: ConfigError if it holds rows that were made otherwise; OSError if it cannot be written to or locked.
    """

    def __init__(self, folder: Path, study: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]):
        """`study` is the YAML's content, `settings` what decides the pixels of each method."""
        self.folder = folder
        self._place: int | None = None  # of this run's note among all
        folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            before = _read(folder) if (folder / RECORD).exists() else {"methods": {}, "runs": []}
            _refuse_other(folder, before["methods"], settings)
            self._save({"study": dict(study), "methods": before["methods"] | settings, "runs": before["runs"]})

    def done(self, method: str) -> set[Key]:
        """Captions whose rows are there."""
        return {key_of(row) for row in read_json_lines(self._path(method))}

    def append(self, method: str, rows: Sequence[dict]) -> None:
        """Add the rows of one batch."""
        for row in rows:
            append_json_line(self._path(method), {"method": method, **row})

    def note_run(self, run: Mapping[str, Any]) -> None:
        """Note how this run went; a later note replaces an earlier one."""
        with self._alone():
            record = _read(self.folder)
            runs = record["runs"]
            if self._place is None:
                self._place = len(runs)
            runs[self._place:self._place + 1] = [dict(run)]
            self._save(record)

    def _path(self, method: str) -> Path:
        return self.folder / f"{method}.jsonl"

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no other run is at the record."""
        while (lock := lock_file(self.folder / LOCK)) is None:
            time.sleep(WAIT_S)
        with lock:
            yield

    def _save(self, record: Mapping[str, Any]) -> None:
        write_atomically(self.folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())


def key_of(row: Mapping[str, Any]) -> Key:
    return row["split"], row["seed"]


def load(folder: Path) -> Saved:
    """Read a folder; methods without rows are left out.

    Raises: ConfigError if no study was made there, or no video is finished.
    """
    record = _read(folder)
    study = record["study"]
    order = [*study["references"], *study["methods"]]
    names = sorted(
        (path.stem for path in folder.glob("*.jsonl")),
        key=lambda name: (_place(name, order), name),
    )
    splits = [part["split"] for part in study["captions"]]
    rows = {}
    for name in names:
        latest = {key_of(row): row for row in read_json_lines(folder / f"{name}.jsonl")}
        if latest:
            rows[name] = sorted(latest.values(), key=lambda row: (_place(row["split"], splits), row["seed"]))
    if not rows:
        raise ConfigError(f"{folder} holds no finished video yet. Let `python -m evaluation.study run` go on first.")
    return Saved(folder, study, rows)


def paired(first: Iterable[dict], second: Iterable[dict]) -> list[tuple[dict, dict]]:
    """Rows of two methods for the same captions."""
    others = {key_of(row): row for row in second}
    return [(row, others[key_of(row)]) for row in first if key_of(row) in others]


def _place(name: str, order: Sequence[str]) -> int:
    """Where `name` stands in `order`; what an earlier version of the study had comes last."""
    return order.index(name) if name in order else len(order)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    try:
        record = json.loads(path.read_bytes())
        if {"study", "methods", "runs"} <= set(record):
            return record
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): no study was made in {folder}. "
            "Name a folder that `python -m evaluation.study run` has written."
        ) from error
    raise ConfigError(f"{path} is not the record of a study. Choose another folder.")


def _refuse_other(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Rows of one method must all be made alike, and all methods' videos be of one length and noise."""
    for name in [name for name in now if name in before]:
        difference = _first_difference(before[name], now[name])
        if difference is not None:
            raise ConfigError(
                f"{folder} holds another study: {name} was made with {difference}. "
                "Choose another --output_folder, or remove this one."
            )
    lengths = {settings["pixel_frames"] for settings in [*before.values(), *now.values()]}
    seeds = {settings["seed"] for settings in [*before.values(), *now.values()] if "seed" in settings}
    for what, found in (("pixel_frames", lengths), ("seed", seeds)):
        if len(found) > 1:
            raise ConfigError(
                f"{folder} holds another study: {what} would be {' and '.join(map(str, sorted(found)))} in one "
                "folder. Choose another --output_folder, or remove this one."
            )


def _first_difference(a: Any, b: Any, where: str = "") -> str | None:
    """`where: a, not b` of the first value that differs."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            found = _first_difference(a.get(key), b.get(key), f"{where}.{key}" if where else str(key))
            if found is not None:
                return found
        return None
    plain_a, plain_b = json.dumps(a), json.dumps(b)  # tuples and lists are one to JSON
    return None if plain_a == plain_b else f"{where}={plain_a}, and it is {plain_b} now"
