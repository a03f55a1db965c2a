"""The commands export-vbench and import-vbench: names that VBench reads back, and its results as rows."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.__main__ import main
from evaluation.metrics.table import read_table
from evaluation.metrics.videos import find_videos
from evaluation.vbench import INDEX, NAME_BYTES, PROMPTS, export, read_results, vbench_stem
from utils.config import ConfigError


def exported(tmp_path: Path, prompts: list[str]):
    for number, prompt in enumerate(prompts):
        video = tmp_path / "in" / f"{number}.mp4"
        video.parent.mkdir(exist_ok=True)
        video.write_bytes(bytes([number]) * 10)
        video.with_suffix(".json").write_text(json.dumps({"prompt": prompt, "seed": 5}))
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
