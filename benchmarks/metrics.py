"""Speed of the metrics: seconds of processor time, and of waiting, for a second of video.

    python -m benchmarks.metrics                             all metrics without a download, 480x832, two processes
    python -m benchmarks.metrics --video film.mp4 --metrics picture drift --workers 1

Each metric is timed alone, with the decoding that all share; the last line is the whole through `measure_videos`:
`--workers` copies of the video side by side.
"""
from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from evaluation.analysers.stability import ChunkLayout
from evaluation.metrics.catalogue import FREE, make_metrics
from evaluation.metrics.measuring import measure, measure_videos
from evaluation.metrics.protocol import Choices, VideoInfo
from evaluation.metrics.videos import Video
from utils.config import ConfigError
from utils.video import VideoWriter, open_video

SECONDS, FPS, HEIGHT, WIDTH = 15, 16, 480, 832


def make_video(path: Path) -> None:
    """Smooth waves with grain that move: about as much work for a decoder as generated video."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    grain = rng.normal(0, 6, (HEIGHT, 2 * WIDTH, 3)).astype(np.float32)
    with VideoWriter(path, fps=FPS) as writer:
        for t in range(SECONDS * FPS):
            wave = np.stack([np.sin(x / (40 + 9 * c) + t / 7) + np.cos(y / (55 - 8 * c) - t / 9) for c in range(3)], -1)
            frame = 128 + 45 * wave + grain[:, 2 * t % WIDTH:2 * t % WIDTH + WIDTH]
            writer.write(np.clip(frame, 0, 255).astype(np.uint8)[None])


def time_alone(path: Path, names: list[str]) -> tuple[float, float]:
    """Seconds of video, and of one processor's time, for these metrics in this process."""
    metrics = make_metrics(names, Choices())
    start = time.process_time()
    with open_video(path) as stream:
        info = VideoInfo(path.name, stream.fps, stream.height, stream.width, None, ChunkLayout())
        measured = measure(stream.frames, info, metrics)
    return measured.num_frames / stream.fps, time.process_time() - start


def time_together(path: Path, names: list[str], workers: int) -> float:
    """Seconds of waiting for `workers` copies of the video side by side, start of the processes left out."""
    with tempfile.TemporaryDirectory() as folder:
        def run(copies: int) -> float:
            videos = [Video(path, f"copy{number}", None, "", ChunkLayout()) for number in range(copies)]
            start = time.perf_counter()
            measure_videos(videos, names, Choices(), Path(folder) / f"{copies}.csv", workers=workers)
            return time.perf_counter() - start
        return run(3 * workers) - run(workers)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="a video (default: one that is made for this)")
    parser.add_argument("--metrics", nargs="+", default=list(FREE))
    parser.add_argument("--workers", type=int, default=2, help="processes, and copies, side by side (default 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(BrokenPipeError):
        path = options.video
        if path is None:
            path = Path(folder) / "waves.mp4"
            make_video(path)
        try:
            seconds, decoding = time_alone(path, [])
            print(f"{path.name}: {seconds:.1f} s of video; processor seconds for a second of video")
            print(f"{'decoding alone':24}{decoding / seconds:8.3f}")
            for name in options.metrics:
                print(f"{name:24}{(time_alone(path, [name])[1] - decoding) / seconds:8.3f}")
            waited = time_together(path, options.metrics, options.workers)
        except (ConfigError, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"all, {options.workers} processes: {2 * options.workers * seconds / waited:.1f} times real time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
