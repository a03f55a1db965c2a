"""The benchmarks' files are checked before anything is measured."""
from __future__ import annotations

from pathlib import Path

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
