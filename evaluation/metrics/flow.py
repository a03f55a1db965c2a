"""How much moves: dynamic degree by VBench's rule, with OpenCV's DIS optical flow in place of RAFT."""
from __future__ import annotations

import numpy as np
from PIL import Image

from evaluation.metrics.protocol import Frame, Metric, TooShortError, Value, VideoInfo
from evaluation.metrics.series import clips, means
from utils.config import ConfigError

SAMPLES_PER_S = 8.0
SIDE = 256            # VBench's threshold is stated for this shorter side
THRESHOLD_PX = 6.0    # there
TOP_SHARE = 0.05      # of the pixels, whose mean speed counts
MOVING_PAIRS = 4      # of 16 sampled frames


class Flow(Metric):
    """`flow`: mean of the fastest 5 % of the pixels' motion from one sampled frame to the next, in pixels at a
    shorter side of 256. `dynamic_degree`: 1 if that exceeds 6 px in a quarter of the pairs; of the whole video,
    and of 2 s clips, averaged.

    Source: VBench, dynamic degree (EVALUATION: 8 samples a second; count >= round(4 N / 16)). DIS flow is not RAFT:
        compare with other numbers of this protocol only.
    """

    name = "flow"
    reports = ("flow", "dynamic_degree")
    shares = ("dynamic_degree",)
    gives = ("flow@second", "flow@whole", "dynamic_degree@clip2s", "dynamic_degree@whole")
    protocol = "VBench's rule with OpenCV DIS flow (not RAFT) at a shorter side of 256, 8 samples a second"

    def __init__(self):
        try:
            import cv2
        except ImportError as error:
            raise ConfigError(
                "The metric flow needs OpenCV: pip install opencv-python-headless. Or leave it out of --metrics."
            ) from error
        self.cv2 = cv2

    def start(self, video: VideoInfo) -> FlowReader:
        return FlowReader(video, self.cv2)


class FlowReader:
    def __init__(self, video: VideoInfo, cv2):
        self.flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self.fps = video.fps
        self.every = max(1, round(video.fps / SAMPLES_PER_S))
        scale = SIDE / min(video.height, video.width)
        self.size = (round(video.width * scale), round(video.height * scale))
        self.before: np.ndarray | None = None
        self.speeds: list[float] = []  # of each pair of sampled frames

    def add(self, frame: Frame) -> None:
        if frame.index % self.every:
            return
        now = np.asarray(frame.image.convert("L").resize(self.size, Image.Resampling.BILINEAR))
        if self.before is not None:
            self.speeds.append(top_speed(self.flow.calc(self.before, now, None)))
        self.before = now

    def values(self) -> list[Value]:
        if not self.speeds:
            raise TooShortError("motion needs two frames that are an eighth of a second apart")
        samples_per_s = self.fps / self.every
        found = [
            Value("flow", "whole", None, float(np.mean(self.speeds))),
            Value("dynamic_degree", "whole", None, float(is_dynamic(self.speeds))),
        ]
        found += [Value("flow", "second", start, value) for start, value in means(self.speeds, samples_per_s, 1.0)]
        verdicts = []
        for start, stop in clips(len(self.speeds) + 1, samples_per_s):  # in sampled frames
            verdicts.append(float(is_dynamic(self.speeds[start:stop - 1])) if stop - start > 1 else 0.0)
        return [*found, Value("dynamic_degree", "clip2s", None, float(np.mean(verdicts)))]


def top_speed(flow: np.ndarray) -> float:
    """Mean length of the longest TOP_SHARE of the vectors. Shapes: [H, W, 2]."""
    length = np.hypot(flow[..., 0], flow[..., 1]).ravel()
    count = max(1, int(TOP_SHARE * length.size))
    return float(np.partition(length, length.size - count)[-count:].mean())


def is_dynamic(speeds: list[float]) -> bool:
    """VBench's verdict on consecutive pairs of sampled frames; of a few, one at least must move."""
    frames = len(speeds) + 1
    return sum(speed > THRESHOLD_PX for speed in speeds) >= max(1, round(MOVING_PAIRS * frames / 16))
