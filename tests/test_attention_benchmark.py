"""The benchmark of attention alone: which kernels, over which windows, and that its errors are errors."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main


@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 0, 1e-6), ("bfloat16", 1e-4, 1e-2)])
def test_every_window_of_a_cycle(tmp_path: Path, dtype: str, least: float, most: float) -> None:
    """Deep Forcing shows 16 and 19 frames; float32 is exact up to the order of sums, bfloat16 off by its rounding."""
    path = tmp_path / "attention.json"
    assert main(["attention", "--model", "tiny", "--device", "cpu", "--dtype", dtype, "--output", str(path)]) == 0
    lines = json.loads(path.read_text())["kernels"]
    assert [(line["kernel"], line["window_frames"], line["key_tokens"]) for line in lines] == [
        ("sdpa", 16, 960), ("sdpa", 19, 1140),
    ]
    for line in lines:
        assert least <= line["relative_error"] < most and line["query_tokens"] == 180
        assert line["tflops"] == pytest.approx(4 * 180 * line["key_tokens"] * 256 / line["call_ms"]["median"] / 1e9)
