"""Speed of the metrics: seconds of processor time, and of waiting, for a second of video.

    python -m benchmarks.metrics                             all metrics without a download, 480x832, two processes
    python -m benchmarks.metrics --video film.mp4 --metrics picture drift --workers 1

Each metric is timed alone, with the decoding that all share; the last line is the whole through `measure_videos`:
`--workers` copies of the video side by side, the median of some runs.
"""
from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from evaluation.analysers.stability import ChunkLayout
from evaluation.metrics.catalogue import make_metrics
from evaluation.metrics.measuring import measure, measure_videos
from evaluation.metrics.protocol import Choices, VideoInfo
from evaluation.metrics.videos import Video
from utils.config import ConfigError
from utils.outputs import reason
from utils.video import VideoWriter, open_video

SECONDS, FPS, HEIGHT, WIDTH = 15, 16, 480, 832
REPEATS = 3
PROMPT = "a prompt"  # how long a metric takes does not depend on it
REMEDY = "Make room there, set TMPDIR to a folder on another disk, or give a video with --video"


def make_video(path: Path) -> None:
    """Smooth waves with grain that move: about as much work for a decoder as generated video."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    grain = rng.normal(0, 6, (HEIGHT, 2 * WIDTH, 3)).astype(np.float32)
    with VideoWriter(path, fps=FPS, remedy=REMEDY) as writer:
        for t in range(SECONDS * FPS):
            wave = np.stack([np.sin(x / (40 + 9 * c) + t / 7) + np.cos(y / (55 - 8 * c) - t / 9) for c in range(3)], -1)
            frame = 128 + 45 * wave + grain[:, 2 * t % WIDTH:2 * t % WIDTH + WIDTH]
            writer.write(np.clip(frame, 0, 255).astype(np.uint8)[None])


def time_alone(path: Path, names: list[str]) -> tuple[float, float]:
    """Seconds of video, and of one processor's time, for these metrics in this process.

    Raises: ConfigError for a metric that cannot be measured on this video.
    """
    metrics = make_metrics(names, Choices())
    start = time.process_time()
    with open_video(path) as stream:
        info = VideoInfo(path.name, stream.fps, stream.height, stream.width, PROMPT, ChunkLayout())
        measured = measure(stream.frames, info, metrics)
    for name, why in measured.errors.items():
        raise ConfigError(f"{path}: {name}: {why.rstrip('.')}. Leave it out of --metrics.")
    return measured.num_frames / stream.fps, time.process_time() - start


def time_together(path: Path, names: list[str], workers: int) -> float:
    """Seconds of waiting for twice `workers` copies of the video, start of the processes left out; a median.

    Raises: ConfigError for a video that is so short that nothing but the start is seen.
    """
    def run(copies: int) -> float:
        videos = [Video(path, f"copy{number}", PROMPT, "", ChunkLayout()) for number in range(copies)]
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            measure_videos(videos, names, Choices(), Path(folder) / "copies.csv", workers=workers)
            return time.perf_counter() - start

    waits = [run(3 * workers) - run(workers) for _ in range(REPEATS)]
    median = statistics.median(waits)
    if max(waits) - min(waits) > median:
        raise ConfigError(
            f"{path} is too short to be timed: {2 * workers} copies more took {min(waits):.2f} to {max(waits):.2f} s "
            "longer. Give a longer one with --video, or let nothing else run."
        )
    return median


def print_times(path: Path, names: list[str], workers: int) -> None:
    """One line for decoding, one a metric, one for all of them in `workers` processes."""
    seconds, decoding = time_alone(path, [])
    print(f"{path.name}: {seconds:.1f} s of video; processor seconds for a second of video")
    print(f"{'decoding alone':24}{decoding / seconds:8.3f}")
    for name in names:
        print(f"{name:24}{(time_alone(path, [name])[1] - decoding) / seconds:8.3f}")
    waited = time_together(path, names, workers)
    print(f"all, {workers} processes: {2 * workers * seconds / waited:.1f} times real time")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input is an error on stderr and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--video", type=Path, help="a video (default: one that is made for this)")
    parser.add_argument(
        "--metrics", nargs="+", default=["free"], metavar="NAME",
        help="as `python -m evaluation measure` takes them (default: free, those that can be had here)",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, and copies, side by side (default 2)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        if options.workers < 1:
            raise ConfigError(f"--workers {options.workers} is too small. Ask for 1 or more.")
        names = [metric.name for metric in make_metrics(options.metrics, Choices())]
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(BrokenPipeError):
            path = options.video
            if path is None:
                path = Path(folder) / "waves.mp4"
                make_video(path)
            print_times(path, names, options.workers)
    except (OSError, ValueError) as error:
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
