"""The benchmarks' files and flags are checked before anything is measured; a file that cannot be written says why."""
from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks import metrics
from benchmarks.__main__ import main


@pytest.mark.parametrize("flag, name, said", [
    ("--output", "folder", "is a folder"), ("--output", "file/b.json", "cannot be written"),
    ("--video", "folder.mp4", "is a folder"), ("--video", "file/x.mp4", "cannot be written"),
    ("--video", "x.avi", "must end in .mp4"), ("--video", "x.mp4", "Name one decoder"),
])
def test_a_file_that_cannot_be_made_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, name: str, said: str,
) -> None:
    for folder in ("folder", "folder.mp4"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").touch()
    output = [] if flag == "--output" else ["--output", str(tmp_path / "r.json")]
    assert main(["stream", "--model", "tiny", "--device", "cpu", flag, str(tmp_path / name), *output]) == 2
    error = capsys.readouterr().err
    assert said in error and flag in error and "Traceback" not in error and error.count("\n") == 1


def test_a_full_disk_names_the_flag_of_this_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    """What to do is said in flags that the command has; no part of the video stays."""
    monkeypatch.setattr("utils.video._Encoder.add", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    video = tmp_path / "v" / "long.mp4"
    flags = ["--model", "tiny", "--resolution", "16x16", "--device", "cpu", "--measure", "wan_vae", "--latencies", "1"]
    assert main(["stream", *flags, "--video", str(video), "--output", str(tmp_path / "r.json")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: {video}: could not write") and "No space left" in said and "MiB free there" in said
    assert "name a --video on another" in said and "--output_folder" not in said and not list(video.parent.iterdir())


@pytest.mark.parametrize("flags, said", [
    ("--metrics pictur", "metric 'pictur' is unknown. Did you mean picture?"),
    ("--workers 0 --metrics picture", "--workers 0 is too small. Ask for 1 or more"),
    ("--metrics picture --video none.mp4", "no such video: none.mp4"),
    ("--metrics picture --video .", "no such video: ."),
])
def test_bad_flags_of_the_metrics_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, said: str,
) -> None:
    """Before a video is made for it."""
    monkeypatch.setattr(metrics, "make_video", Mock(side_effect=AssertionError))
    assert metrics.main(flags.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {said}") and captured.err.count("\n") == 1 and not captured.out


def test_no_place_for_the_metrics_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    """No temporary folder, and a full disk under it: each is one line that says what to do."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert metrics.main(["--metrics", "picture"]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("utils.video._Encoder.add", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert metrics.main(["--metrics", "picture"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "No space left" in said and "set TMPDIR" in said and said.count("\n") == 1


def test_a_metric_that_cannot_be_measured_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    """No zero stands for a metric that gave no value."""
    for name, value in (("SECONDS", 3), ("HEIGHT", 48), ("WIDTH", 64)):
        monkeypatch.setattr(metrics, name, value)
    metrics.make_video(tmp_path / "v.mp4")
    assert metrics.main(["--metrics", "drift", "world", "--video", str(tmp_path / "v.mp4")]) == 2
    captured = capsys.readouterr()
    assert "\ndrift" in captured.out and "\nworld" not in captured.out
    assert "world: the prompt is no caption" in captured.err and "Leave it out of --metrics" in captured.err
