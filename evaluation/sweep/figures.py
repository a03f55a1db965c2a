"""Figures of a sweep as PNG: every metric over time, ablations over one setting, grids of frames. Needs matplotlib."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evaluation.study.plots import draw_band
from evaluation.sweep.numbers import MetricName, Numbers
from evaluation.sweep.results import Saved
from training.sheets import contact_sheet
from utils.config import ConfigError
from utils.figures import saved_figure
from utils.video import open_video

logger = logging.getLogger(__name__)

MOMENTS = 7        # of a grid, evenly spaced, the first and last frame included
OVER_TIME = ("second", "window10s")
WINDOW_S = {"second": 1.0, "window10s": 10.0}


def draw_figures(saved: Saved, numbers: Numbers, folder: Path) -> dict[str, Path]:
    """Every figure that the tidy table and the videos allow: title -> file."""
    drawn = {}
    for name, ablation in saved.sweep["ablations"].items():
        path = drawn[ablation["title"]] = folder / f"ablation_{name}.png"
        draw_ablation(saved, numbers, ablation["x"], ablation["methods"], ablation["metrics"], path)
    for granularity in OVER_TIME:
        for metric in numbers.metrics_over_time(granularity):
            path = drawn[f"{metric}, {granularity}"] = folder / f"{granularity}_{metric}.png"
            draw_over_time(saved, numbers, metric, granularity, path)
    return drawn | draw_grids(saved, folder)


def draw_over_time(saved: Saved, numbers: Numbers, metric: str, granularity: str, path: Path) -> None:
    """One line a method with its 95 % band over the prompts."""
    with saved_figure(path, (8, 4.2)) as figure:
        axes = figure.subplots()
        for index, method in enumerate(saved.variants):
            curve = numbers.curve(method, metric, granularity)
            if curve is None:
                continue
            moments = np.array(curve.start_s) + WINDOW_S[granularity] / 2
            draw_band(axes, index, method, moments, (curve.mean, curve.low, curve.high))
        axes.set(title=f"{metric} ({granularity})", xlabel="seconds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", ncols=2)


def draw_ablation(
    saved: Saved, numbers: Numbers, key: str, methods: Sequence[str], metrics: Sequence[str], path: Path,
) -> None:
    """Metrics over one setting of the cache, with 95 % intervals.

    Raises: ConfigError if a method's cache has no such setting, or a metric was measured by several protocols.
    """
    methods = [method for method in methods if method in saved.variants]
    places = [_setting(saved, method, key) for method in methods]
    order = np.argsort(places, kind="stable")
    with saved_figure(path, (5 * len(metrics), 3.8)) as figure:
        for axes, text in zip(np.atleast_1d(figure.subplots(1, len(metrics))), metrics, strict=True):
            name, _, protocol = text.partition(" ")
            numbers.protocol(methods, MetricName.parse(name), protocol)
            known = [(places[i], numbers.mean(methods[i], MetricName.parse(name), protocol)) for i in order]
            known = [(x, mean) for x, mean in known if mean is not None]
            if known:
                values = np.array([[x, mean.value, mean.value - mean.low, mean.high - mean.value] for x, mean in known])
                axes.errorbar(values[:, 0], values[:, 1], values[:, 2:].clip(0).T, marker="o", capsize=3)
            axes.set(title=text, xlabel=key)
            axes.grid(alpha=0.3)


def draw_grids(saved: Saved, folder: Path) -> dict[str, Path]:
    """For each shown prompt one picture: a row a method, moments from left to right."""
    drawn = {}
    for index, prompt in enumerate(saved.shown_prompts):
        first = {}
        for video in saved.videos:
            file = saved.path_of(video["video"])
            if video["prompt"] == prompt and file.exists():
                first.setdefault(video["method"], file)
        if not first:
            logger.warning("no video is left of %r. Run the sweep again to have them in the figures.", prompt)
            continue
        rows = {
            method: moments_of(path, MOMENTS, saved.variants[method]["pixel_frames"]) for method, path in first.items()
        }
        path = drawn[f"Grid: {prompt}"] = folder / f"grid_{index:02d}.png"
        texts = [f"{method}: {prompt}" if method == next(iter(rows)) else method for method in rows]
        contact_sheet([*rows.values()], texts, MOMENTS, path)
    return drawn


def moments_of(path: Path, count: int, total: int) -> torch.Tensor:
    """Evenly spaced frames of a file of `total`, uint8 [count, H, W, 3]."""
    wanted = np.linspace(0, total - 1, count).round().astype(int)
    return torch.from_numpy(np.stack(frames_at(path, wanted.tolist())))


def frames_at(path: Path, indices: Sequence[int]) -> list[np.ndarray]:
    """Frames of a file by number, each uint8 [H, W, 3], the last one for those past its end; decoded as a stream."""
    kept = {}
    with open_video(path) as stream:
        for index, frame in enumerate(stream.frames):
            if index in indices:
                kept[index] = frame
            if index >= max(indices):
                break
    return [kept.get(index, frame) for index in indices]


def _setting(saved: Saved, method: str, key: str) -> float:
    cache = saved.variants[method]["settings"]["config"]["kv_cache"]
    if key not in cache and key == "sink_frames" and cache["policy"] == "rolling":
        return 0.0  # a rolling window is a sink window without a sink
    if not isinstance(cache.get(key), int | float):
        raise ConfigError(f"ablations: kv_cache.{key} of {method} is {cache.get(key)!r}, no number. Leave it out.")
    return float(cache[key])
