"""The benchmarks' files are checked before anything is measured, and one that cannot be written says what to do."""
from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

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
