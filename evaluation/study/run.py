"""Make the videos of a study batch by batch, score each batch while the next one is made, keep its rows."""
from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from evaluation.study.readers import Readers
from evaluation.study.results import Results
from evaluation.study.settings import Study, clips_of
from evaluation.study.sheet import keep_moments
from evaluation.study.sources import Made, Source, chunk_layout, make_sources, world_of
from training.world import Clip
from utils.versions import installed_versions

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Waiting:
    """A batch that is being scored; its frames stay alive until its rows are written."""

    method: str
    made: Made
    rows: list[Future[dict]]


@dataclass
class Times:
    """Wall time of one method in this run, seconds."""

    videos: int = 0
    making_s: float = 0.0
    waiting_s: float = 0.0   # for scores, while nothing was made


def run_study(
    study: Study, folder: Path, *, device: torch.device, workers: int, random_weights: bool = False,
    methods: Sequence[str] | None = None, count: int | None = None,
) -> None:
    """Make and score what is missing in `folder`.

    Args:
        methods: only these; None is all.
        count: only the first so many captions of each set; None is all.
    Raises:
        ConfigError: the study cannot be run, or the folder holds another one.
    """
    sources = make_sources(study, device=device, random_weights=random_weights)
    sources = {name: source for name, source in sources.items() if methods is None or name in methods}
    results = Results(folder, asdict(study), {name: source.settings() for name, source in sources.items()})
    clips = clips_of(study, world_of(next(iter(sources.values())).plan), count)
    run = _Run(study, results, clips, _note(device, study.batch_size, workers))
    with Readers(workers) as readers:
        for name, source in sources.items():
            run.make(name, source, readers)
        run.collect()


class _Run:
    """One run: what waits for its scores, and how long everything took."""

    def __init__(self, study: Study, results: Results, clips: Sequence[Clip], note: dict[str, Any]):
        self._study, self._results, self._clips, self._note = study, results, clips, note
        self._times: dict[str, Times] = {}
        self._waiting: Waiting | None = None

    def make(self, name: str, source: Source, readers: Readers) -> None:
        """Make every video of one method that is missing."""
        done = self._results.done(name)
        left = [clip for clip in self._clips if (clip.split, clip.seed) not in done]
        if len(left) < len(self._clips):
            logger.info("%s: %d of %d videos are there already", name, len(self._clips) - len(left), len(self._clips))
        size = self._study.batch_size
        batches = [left[start:start + size] for start in range(0, len(left), size)]
        if not batches:
            return
        shown = self._clips[:self._study.sheet_captions]
        plan, times = source.plan, self._times.setdefault(name, Times())
        began = time.perf_counter()
        for batch, made in zip(batches, source.videos(batches), strict=True):
            times.making_s += time.perf_counter() - began
            self.collect()
            for clip, frames in zip(batch, made.frames, strict=True):
                if clip in shown:
                    keep_moments(self._results.folder, name, clip, frames, self._study.sheet_seconds, plan.geometry.fps)
            layout = chunk_layout(plan)
            rows = [
                readers.read(frames, clip, plan.geometry.fps, layout)
                for frames, clip in zip(made.frames, batch, strict=True)
            ]
            self._waiting = Waiting(name, made, rows)
            began = time.perf_counter()

    def collect(self) -> None:
        """Wait for the batch that is being scored, if there is one, and keep its rows."""
        if self._waiting is None:
            return
        waiting, self._waiting = self._waiting, None
        began = time.perf_counter()
        rows = [future.result() | extra for future, extra in zip(waiting.rows, waiting.made.extra, strict=True)]
        self._results.append(waiting.method, rows)
        times = self._times[waiting.method]
        times.videos += len(rows)
        times.waiting_s += time.perf_counter() - began
        self._results.note_run(self._note | {
            "seconds": {name: {key: round(value, 1) for key, value in asdict(t).items()}
                        for name, t in self._times.items()},
        })
        logger.info(
            "%s: %d videos, %.1f s to make, %.1f s waiting for scores",
            waiting.method, times.videos, times.making_s, times.waiting_s,
        )


def _note(device: torch.device, batch_size: int, workers: int) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "versions": installed_versions(PACKAGES), "batch_size": batch_size, "workers": workers,
    }
