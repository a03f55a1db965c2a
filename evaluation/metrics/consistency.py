"""Subject consistency (DINO) and background consistency (CLIP), by VBench's rule, of whole videos and of 2 s clips.

The papers differ in the granularity (PackForcing: whole videos; Deep Forcing: 2 s clips), and so do the numbers,
by ten points and more. Compare within one granularity only.

Source: VBench, arXiv:2311.17982; VBench-Long for the clips, without its scene split and without its fast branch.
"""
from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics.networks import Batches, clip_b32, dino
from evaluation.metrics.protocol import Choices, Frame, Metric, TooShortError, Value, VideoInfo
from evaluation.metrics.series import CLIP_S


class Consistency(Metric):
    """Mean over frames of (max(0, cosine to the one before) + max(0, cosine to the first)) / 2."""

    gives = ("{name}@clip2s", "{name}@whole")

    def __init__(self, name: str, network, protocol: str):
        self.name, self.reports, self.protocol, self.network = name, (name,), protocol, network

    def start(self, video: VideoInfo) -> ConsistencyReader:
        return ConsistencyReader(self.name, self.network, video)


def subject(choices: Choices) -> Consistency:
    return Consistency("subject_consistency", dino(choices), "VBench's rule, DINO ViT-B/16 in transformers")


def background(choices: Choices) -> Consistency:
    protocol = "VBench's rule, CLIP ViT-B/32 in transformers"
    return Consistency("background_consistency", clip_b32(choices), protocol)


class ConsistencyReader:
    """Keeps the features of one clip only."""

    def __init__(self, name: str, network, video: VideoInfo):
        self.name = name
        self.batches = Batches(network)
        self.clip_frames = max(2, round(CLIP_S * video.fps))
        self.recent: deque[Tensor] = deque(maxlen=self.clip_frames)
        self.first: Tensor | None = None
        self.count, self.total = 0, 0.0
        self.clips: list[float] = []

    def add(self, frame: Frame) -> None:
        for feature in self.batches.add(frame.rgb):
            self._take(feature)

    def values(self) -> list[Value]:
        for feature in self.batches.rest():
            self._take(feature)
        if self.count < 2:
            raise TooShortError("consistency needs two frames or more")
        if self.count % self.clip_frames:  # the last clip is extended backwards to its full length
            self.clips.append(consistency(torch.stack(list(self.recent))))
        return [
            Value(self.name, "whole", None, self.total / (self.count - 1)),
            Value(self.name, "clip2s", None, float(np.mean(self.clips))),
        ]

    def _take(self, feature: Tensor) -> None:
        if self.first is None:
            self.first = feature
        else:
            self.total += likeness(feature, self.recent[-1], self.first)
        self.recent.append(feature)
        self.count += 1
        if self.count % self.clip_frames == 0:
            self.clips.append(consistency(torch.stack(list(self.recent))))


def likeness(feature: Tensor, before: Tensor, first: Tensor) -> float:
    """One frame's share. Shapes: [D] each, of length 1."""
    return (max(0.0, float(feature @ before)) + max(0.0, float(feature @ first))) / 2


def consistency(features: Tensor) -> float:
    """The rule for one clip. Shapes: [T, D], rows of length 1, T >= 2."""
    return float(np.mean([likeness(features[t], features[t - 1], features[0]) for t in range(1, len(features))]))
