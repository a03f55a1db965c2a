"""The folder of one sweep: `sweep.json` says what was asked and how it was made, `results.csv` holds every number.

The tidy table has one row per (video, metric, granularity, start_s, protocol). It is collected from the rows of all
videos in a fixed order, so the same sweep gives the same file however many workers made it. With pyarrow, also
`results.parquet`. Tables that lie in `imported/` are read beside it.
"""
from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from evaluation.metrics.catalogue import EVERY, value_names
from evaluation.metrics.protocol import Metric
from evaluation.metrics.table import Row, read_table, write_csv, write_parquet
from evaluation.metrics.videos import sidecar
from evaluation.sweep.make import VIDEOS, Task
from evaluation.sweep.measure import read_rows
from evaluation.sweep.settings import Ablation, Column, Recording, Sweep, Table, metrics_shown, variants_of
from evaluation.vbench import DIMENSIONS
from utils.config import REPOSITORY, ConfigError
from utils.config_schema import nearest
from utils.files import lock_file, write_atomically
from utils.hashing import fingerprint, sha256_file

logger = logging.getLogger(__name__)

IMPORTED = "imported"  # tables that other tools wrote of the same videos, such as the official VBench suite
RECORD, TABLE, PARQUET = "sweep.json", "results.csv", "results.parquet"
WAIT_S = 0.2


@dataclass(frozen=True)
class Saved:
    """What a folder holds."""

    folder: Path
    sweep: dict[str, Any]             # the YAML's content
    variants: dict[str, Any]          # what decides the pixels of each, in the order of the tables
    videos: list[dict[str, Any]]      # video, method, prompt, seed of every finished one, as the rows have them
    provenance: dict[str, Any]
    rows: list[Row]                   # the tidy table

    @property
    def shown_prompts(self) -> list[str]:
        """Those on the page and in the grids."""
        return list(dict.fromkeys(video["prompt"] for video in self.videos))[:self.sweep["shown"]]

    def path_of(self, video: str) -> Path:
        """The file of a row's video."""
        return self.folder / VIDEOS / video


def refuse_unknown_metrics(sweep: Sweep, folder: Path, measured: Collection[str], only: Collection[str] = ()) -> None:
    """Raise ConfigError for a shown number that nothing gives: no metric here, no suite, no table in `imported/`.

    Of the tables and ablations that `only` names, or of all if it is empty, nor may one be shown that only a metric
    gives which is not among the `measured`.
    """
    shown = metrics_shown(sweep)
    if not shown:
        return
    other = {f"{name}@{granularity}" for name in DIMENSIONS for granularity in ("clip2s", "whole")}
    for table in (folder / IMPORTED).glob("*.csv"):
        other |= {f"{row.metric}@{row.granularity}" for row in read_table(table)}
    known, given = value_names() | other, value_names(measured) | other
    for where, metric in shown:
        name = metric.partition(":")[0]
        if name in known - given and (not only or where.partition(".")[2] in only):
            need = next(one for one in EVERY if name in value_names([one]))
            raise ConfigError(
                f"{where}: {name} is not measured. Add {need} to metrics, such as --set "
                f"'metrics=[{', '.join([*sweep.metrics, need])}]', or name what else you want with --only."
            )
        if name not in known:
            alike = sorted(one for one in known if one.partition("@")[0] == name.partition("@")[0])
            every = alike or sorted({one.partition("@")[0] for one in known})
            raise ConfigError(
                f"{where}: nothing measures {name!r}.{nearest(name, alike or known)} Known: {', '.join(every)}; and "
                f"whatever the tables in {folder / IMPORTED} hold."
            )


def collect(sweep: Sweep, tasks: Sequence[Task], metrics: Sequence[Metric], folder: Path) -> list[Row]:
    """Write the tidy table and the record; variants without a task keep what is there. Returns the tasks' rows."""
    with alone(folder):
        return _collect(sweep, tasks, metrics, folder)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process collects in this folder."""
    while (lock := lock_file(folder / ".collect.lock")) is None:
        time.sleep(WAIT_S)
    try:
        yield
    finally:
        lock.close()


def _collect(sweep: Sweep, tasks: Sequence[Task], metrics: Sequence[Metric], folder: Path) -> list[Row]:
    place = {variant.name: index for index, variant in enumerate(variants_of(sweep))}
    others = place.keys() - {task.variant.name for task in tasks}
    videos, variants, kept = _collected(folder, others)
    rows = [row for task in tasks for job in task.jobs for row in read_rows(folder, task, job, metrics)]
    every = sorted(kept + rows, key=lambda row: place[row.method])
    write_csv(every, folder / TABLE)
    write_parquet(every, folder / PARQUET)
    videos += [
        {
            "video": f"{task.variant.name}/{job.stem}.mp4", "method": task.variant.name, "prompt": job.item.prompt,
            "seed": str(job.seed.seed),
        }
        for task in tasks for job in task.jobs if task.output.record(job.stem) is not None
    ]
    variants |= {
        task.variant.name: {
            "seconds": task.variant.seconds, "pixel_frames": task.pixel_frames, "fps": task.plan.geometry.fps,
            "settings": task.plan.settings(),
        } for task in tasks
    }
    made = [sidecar(folder / VIDEOS / video["video"]) for video in videos]
    record = {
        "sweep": asdict(sweep), "provenance": _provenance(sweep, tasks, made),
        "videos": sorted(videos, key=lambda video: place[video["method"]]),
        "variants": dict(sorted(variants.items(), key=lambda item: place[item[0]])),
    }
    write_atomically(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    return rows


def _collected(folder: Path, names: Collection[str]) -> tuple[list[dict], dict[str, Any], list[Row]]:
    """Videos, variants and rows of these variants, as an earlier run collected them; nothing of damaged files."""
    try:
        before = json.loads((folder / RECORD).read_bytes())
        return (
            [video for video in before["videos"] if video["method"] in names],
            {name: made for name, made in before["variants"].items() if name in names},
            [row for row in read_table(folder / TABLE) if row.method in names],
        )
    except FileNotFoundError:
        return [], {}, []
    except (ValueError, KeyError, TypeError) as error:
        logger.warning(
            "%s: %s or %s was damaged (%s), both are collected anew. Run the sweep without --only to have every "
            "variant in them.", folder, RECORD, TABLE, error,
        )
        return [], {}, []


def load(folder: Path) -> Saved:
    """Read a folder.

    Raises: ConfigError if no sweep was made there, or its files are damaged.
    """
    for name in (RECORD, TABLE):
        if not (folder / name).exists():
            raise ConfigError(
                f"{folder} has no {name}: no sweep was finished there. "
                "Name a folder that `python -m evaluation sweep` has written."
            )
    try:
        record = json.loads((folder / RECORD).read_bytes())
        missing = _missing(record["sweep"])
        if missing:
            raise ValueError(f"the sweep's {', '.join(missing)} are not in it")
        rows = read_table(folder / TABLE)
        for other in sorted((folder / IMPORTED).glob("*.csv")):
            rows += read_table(other)
        return Saved(folder, record["sweep"], record["variants"], record["videos"], record["provenance"], rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder}: {RECORD} or {TABLE} is damaged ({error}). "
            "Run the same sweep command again: what is made stays, both files are collected anew."
        ) from error


def _missing(sweep: dict[str, Any]) -> list[str]:
    """Keys that a sweep, or a part of it that a report reads, does not have."""
    parts = [("", Sweep, sweep), ("record.", Recording, sweep.get("record", {}))]
    parts += [(f"ablations.{name}.", Ablation, part) for name, part in sweep.get("ablations", {}).items()]
    for name, table in sweep.get("tables", {}).items():
        parts.append((f"tables.{name}.", Table, table))
        parts += [(f"tables.{name}.columns.", Column, column) for column in table.get("columns", ())]
    return [f"{where}{field.name}" for where, kind, part in parts for field in fields(kind) if field.name not in part]


def _provenance(sweep: Sweep, tasks: Sequence[Task], made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a number's reader must know of all videos: prompts and their hash, seeds, and each model, device and version
    that stands in the records beside the videos, `made`. Weights are in the settings of each variant.
    """
    prompts = [job.item.text for job in tasks[0].jobs]
    files = {
        name: sha256_file(REPOSITORY / path)
        for name, path in (("file", sweep.prompts.file), ("extended", sweep.prompts.extended)) if path is not None
    }
    versions = [record.get("versions", {}) for record in made]
    return {
        "prompts_sha256": fingerprint(prompts), "prompt_files_sha256": files, "seeds": sweep.seeds,
        "model": _every("model", made), "device": _every("device", made),
        "versions": {name: _every(name, versions) for name in dict.fromkeys(name for one in versions for name in one)},
    }


def _every(key: str, records: Sequence[dict[str, Any]]) -> str:
    """All that the records have under `key`."""
    return ", ".join(sorted({record[key] for record in records if key in record}))
