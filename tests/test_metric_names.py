"""What metrics say that they give, held against what they do give."""
from __future__ import annotations

import numpy as np
import pytest

from evaluation.analysers import ChunkLayout
from evaluation.metrics.catalogue import METRICS, make_metrics, value_names
from evaluation.metrics.measuring import measure
from evaluation.metrics.protocol import Choices, VideoInfo
from training.world import render, sample, to_frames
from utils.config import ConfigError

FPS = 16


@pytest.fixture(scope="module")
def clips() -> list[tuple[str, np.ndarray]]:
    """Captions and frames of ten seconds that say all there is to say, each five seconds and again."""
    found = [sample(seed, "test") for seed in range(4)]
    return [(clip.caption, np.tile(to_frames(render([clip.scene])).numpy()[0], (2, 1, 1, 1))) for clip in found]


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_gives_what_it_says(clips, name):
    """Two roads to the names: those declared, and those of the values of a few videos of ten seconds."""
    try:
        metric, = make_metrics([name], Choices())
    except ConfigError as error:
        pytest.skip(str(error))
    found = set()
    for caption, frames in clips if name == "world" else clips[:1]:
        measured = measure(frames, VideoInfo("clip", FPS, *frames.shape[1:3], caption, ChunkLayout()), [metric])
        assert not measured.errors
        found |= {f"{value.metric}@{value.granularity}" for value in measured.values[name]}
    assert found == value_names([name])
