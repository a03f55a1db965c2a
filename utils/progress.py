"""Progress of one video: a bar on a terminal, plain log lines elsewhere."""
from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0
LABEL_CHARACTERS = 24  # of the label on a terminal, so that the figures fit into 80 columns
USUAL_SIZE = os.terminal_size((80, 24))


class VideoProgress:
    """Chunk i of n, seconds of video made, FPS and time left.

    Use as a context manager and call `update` after every chunk. FPS counts pixel frames per second of wall
    time since the start. On a terminal this is a bar; otherwise one log line at the start, about every
    `interval_s` seconds, and at the end.

    Args: label, shown in front; num_chunks of the whole video; fps of the file, which turns pixel frames
        into seconds of video; stream and clock can be replaced in tests.
    """

    def __init__(
        self,
        label: str,
        *,
        num_chunks: int,
        fps: float,
        stream: TextIO | None = None,
        interval_s: float = LOG_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.label = label
        self.num_chunks = num_chunks
        self.fps = fps
        self.interval_s = interval_s
        self._clock = clock
        self._stream = sys.stderr if stream is None else stream
        self._bar: tqdm | None = None
        self._chunks = self._pixel_frames = 0
        self._start = self._logged = clock()

    def __enter__(self) -> VideoProgress:
        self._start = self._logged = self._clock()
        if self._stream.isatty():
            label = self.label
            sized = _says_its_size(self._stream)
            self._bar = tqdm(
                total=self.num_chunks,
                desc=label if len(label) <= LABEL_CHARACTERS else label[:LABEL_CHARACTERS - 3] + "...",
                unit="chunk",
                file=self._stream,
                ncols=None if sized else USUAL_SIZE.columns,
                nrows=None if sized else USUAL_SIZE.lines,
                dynamic_ncols=sized,
                mininterval=0,
                bar_format="chunk {n_fmt}/{total_fmt}{postfix} {bar} {desc}",  # a narrow terminal cuts from the right
            )
            self._bar.set_postfix_str("starting")
        else:
            logger.info("%s: start, %d chunks", self.label, self.num_chunks)
        return self

    def update(self, pixel_frames: int) -> None:
        """One more chunk is done, with so many pixel frames."""
        self._chunks += 1
        self._pixel_frames += pixel_frames
        if self._bar is not None:
            self._bar.set_postfix_str(self.figures(), refresh=False)
            self._bar.update(1)
        elif self._clock() - self._logged >= self.interval_s and self._chunks < self.num_chunks:
            self._logged = self._clock()
            logger.info("%s: chunk %d/%d, %s", self.label, self._chunks, self.num_chunks, self.figures())

    def figures(self) -> str:
        """For example `12.3 s of video, 15.8 FPS, 0:48 left`."""
        elapsed = self._clock() - self._start
        parts = [f"{self._pixel_frames / self.fps:.1f} s of video"]
        if elapsed > 0 and self._chunks:
            parts.append(f"{self._pixel_frames / elapsed:.1f} FPS")
            left = elapsed / self._chunks * (self.num_chunks - self._chunks)
            parts.append(f"{tqdm.format_interval(left)} left")
        return ", ".join(parts)

    def __exit__(self, kind, error, trace) -> None:
        if self._bar is not None:
            self._bar.close()
            return
        elapsed = self._clock() - self._start
        logger.info(
            "%s: %s at chunk %d/%d, %.1f s of video in %.1f s, %.1f FPS",
            self.label,
            "done" if kind is None else "stopped",
            self._chunks,
            self.num_chunks,
            self._pixel_frames / self.fps,
            elapsed,
            self._pixel_frames / elapsed if elapsed > 0 else 0.0,
        )


def _says_its_size(terminal: TextIO) -> bool:
    """False for one of 0 columns, as some containers and serial lines report; a bar for that would be empty."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns > 0
    except (OSError, ValueError):  # not a real one; tqdm has its own ways
        return True
