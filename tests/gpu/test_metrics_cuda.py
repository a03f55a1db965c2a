"""Metrics that are networks, on a GPU: the numbers of the CPU."""
from __future__ import annotations

import pytest
import torch
from test_metric_networks import frames, weights  # noqa: F401  fixtures

from evaluation.metrics.catalogue import PAPERS, make_metrics
from evaluation.metrics.measuring import measure
from evaluation.metrics.protocol import Choices, VideoInfo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_gpu_gives_the_same_numbers(frames, weights):  # noqa: F811
    """Small random networks in float32: within 1e-3 of the CPU (TF32 is not used unless asked for)."""
    info = VideoInfo("test", 4.0, *frames.shape[1:3], "a red circle")
    cpu, gpu = (
        measure(frames, info, make_metrics(PAPERS, Choices(device, weights))) for device in ("cpu", "cuda")
    )
    assert not cpu.errors and not gpu.errors
    for name, values in cpu.values.items():
        expected = [value.value for value in values]
        assert [value.value for value in gpu.values[name]] == pytest.approx(expected, rel=1e-3, abs=1e-2)
