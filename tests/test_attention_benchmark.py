"""The benchmark of attention alone: which kernels, over which windows, and that its errors are errors."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

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


def test_a_kernel_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    """A result that is no number has no error; the times are written all the same."""

    def broken(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return torch.full_like(query, torch.nan)

    monkeypatch.setattr("benchmarks.attention.load_backend", lambda *_: ("sdpa", broken))
    path = tmp_path / "attention.json"
    assert main(["attention", "--model", "tiny", "--device", "cpu", "--output", str(path)]) == 0
    assert [line["relative_error"] for line in json.loads(path.read_text())["kernels"]] == [None, None]
    assert [row.split()[-1] for row in capsys.readouterr().out.splitlines() if row.startswith("sdpa")] == ["-", "-"]
