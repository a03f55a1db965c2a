"""On a GPU: the benchmarks' clock and memory are the device's, and no pass waits for the host. Skipped without one."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run(folder: Path, *flags: str) -> dict:
    path = folder / "result.json"
    assert main([*flags, "--model", "tiny", "--device", "cuda", "--output", str(path)]) == 0
    return json.loads(path.read_text())


def test_speed_on_the_device(tmp_path: Path) -> None:
    """Events, peaks and versions of the device; the stages add up to the chunk."""
    result = run(tmp_path, "speed")
    assert "cuda" in result["environment"]["versions"]
    for speed in result["measured"].values():
        assert speed["memory"]["of"] == "device"
        assert 0 < speed["memory"]["peak_allocated_gib"] <= speed["memory"]["peak_reserved_gib"]
        assert sum(speed["stage_ms"].values()) == pytest.approx(speed["chunk_ms"]["mean"])


def test_endurance_lets_no_pass_wait(tmp_path: Path) -> None:
    """A host synchronisation inside a pass would have been an error; memory is the same at the end."""
    result = run(tmp_path, "endurance", "--seconds", "60")["endurance"]
    assert result["all_finite"] and result["host_syncs_in_passes"] == 0
    assert result["final_allocated_gib"] == pytest.approx(result["early_allocated_gib"], rel=0.01)
