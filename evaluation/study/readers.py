"""Processes that score finished videos while the next ones are made."""
from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from evaluation.analysers import ChunkLayout
from evaluation.study.scores import CHUNKS, read, summarise
from training.world import Clip

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def spare_processors() -> int:
    """Processors of this machine that this process may use, one left for itself; at least one."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


class Readers:
    """A pool of `workers` processes of one thread each; with 0 the videos are scored here, at once.

    Processes come from a fork server, which has never touched a GPU.
    """

    def __init__(self, workers: int):
        self._pool: ProcessPoolExecutor | None = None
        if workers > 0:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["evaluation.study.scores"])
            self._pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=kind is not None)

    def read(self, frames: np.ndarray, clip: Clip, fps: float, chunks: ChunkLayout) -> Future[dict]:
        """The row of one video, see scores.read. `frames` must stay as they are until it is there."""
        if self._pool is not None:
            with _single_threaded():
                return self._pool.submit(read, frames, clip, fps, chunks)
        future: Future[dict] = Future()
        future.set_result(read(frames, clip, fps, chunks))
        return future


def score(
    videos: Iterable[tuple[np.ndarray, Clip]], *, fps: float = 16.0, chunks: ChunkLayout = CHUNKS,
    workers: int = 0,
) -> dict:
    """What `summarise` says of (uint8 frames [T, H, W, 3], clip) pairs: the scores that choose a checkpoint."""
    with Readers(workers) as readers:
        waiting = [readers.read(frames, clip, fps, chunks) for frames, clip in videos]
        return summarise(future.result() for future in waiting)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Processes started inside inherit one thread each; numpy reads this as it is imported."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that made this one
    torch.set_num_threads(1)
