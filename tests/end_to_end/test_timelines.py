"""Prompts that change in mid-video, through the command line: every method, every treatment of the cache, resume."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import pipeline.engine
from end_to_end.runs import PROMPTS, CommandLine, is_whole, record, videos
from utils.video import read_video

LENGTH = ["--num_output_frames", 27]
METHODS = sorted((ROOT / "configs").glob("*.yaml"))


def timeline(cli: CommandLine, *moments: tuple[float, str], name: str = "story.jsonl") -> Path:
    return cli.prompts(*(json.dumps({"time": time, "prompt": prompt}) for time, prompt in moments), name=name)


def frames(cli: CommandLine, out: str) -> np.ndarray:
    [stem] = videos(cli.folder / out)
    return read_video(cli.folder / out / f"{stem}.mp4")


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_every_method_follows_a_timeline(cli: CommandLine, path: Path) -> None:
    """Shown is the first prompt up to the moment, and the later one, recorded, afterwards; again: finished."""
    length = 21 if path.stem in ("full", "base") else 27
    sets = ["--set", "on_switch=recache", "height=64", "width=64"]  # room for every method's tokens
    command = ["--config_path", path, "--num_output_frames", length, *sets]
    assert cli("--data_path", timeline(cli, (0, PROMPTS[0]), (3, PROMPTS[1])), *command) == 0
    assert cli("--prompt", PROMPTS[0], *command, out="one") == 0
    assert is_whole(cli.folder / "videos", 1)
    [stem] = videos(cli.folder / "videos")
    about = record(cli.folder / "videos", stem)
    assert about["later_prompts"] == [{"time": 3.0, "prompt": PROMPTS[1]}]
    ours, plain = frames(cli, "videos"), frames(cli, "one")
    joint = about["settings"]["config"]["pipeline"] == "rolling_forcing"
    before = 8 if joint else 45  # the joint window of that moment holds all of the chunks before as well
    differs = np.abs(ours.astype(int) - plain.astype(int)).max(axis=(1, 2, 3))
    assert ours.shape == plain.shape and differs[before + 12:].max() > 0
    same = differs[:before - 8]  # a video encoder looks a few frames ahead
    assert same.size == 0 or np.median(same) <= 2
    made = (cli.folder / "videos" / f"{stem}.mp4").stat().st_mtime_ns
    assert cli("--data_path", cli.folder / "story.jsonl", *command) == 0
    assert (cli.folder / "videos" / f"{stem}.mp4").stat().st_mtime_ns == made


def test_the_treatment_and_the_prompts_are_part_of_a_video(cli: CommandLine, capsys) -> None:
    """Another later prompt is another name; the same name with another treatment or prompt is refused."""
    story = timeline(cli, (0, PROMPTS[0]), (3, PROMPTS[1]))
    other = timeline(cli, (0, PROMPTS[0]), (3, PROMPTS[2]), name="other.jsonl")
    assert cli("--data_path", story, *LENGTH) == cli("--data_path", other, *LENGTH) == 0
    assert is_whole(cli.folder / "videos", 2)
    assert cli("--data_path", story, *LENGTH, "--set", "on_switch=reset_sink") == 2
    assert "made with other settings" in capsys.readouterr().err
    assert cli("--data_path", story, *LENGTH, "--save_with_index", out="index") == 0
    assert cli("--data_path", other, *LENGTH, "--save_with_index", out="index") == 2


def test_videos_of_one_batch_change_together(cli: CommandLine) -> None:
    """Timelines with other moments than their neighbours' make a batch of their own; nothing is mixed up."""
    moments = [[(0, 0), (3, 1)], [(0, 1), (3, 2)], [(0, 2), (4, 0)], [(0, 0)]]
    lines = [
        json.dumps({"timeline": [{"time": time, "prompt": PROMPTS[prompt]} for time, prompt in video]})
        for video in moments
    ]
    flags = [*LENGTH, "--set", "on_switch=recache"]
    assert cli("--data_path", cli.prompts(*lines, name="v.jsonl"), *flags, "--batch_size", 4) == 0
    assert is_whole(cli.folder / "videos", 4)
    assert cli("--data_path", cli.prompts(lines[2], name="w.jsonl"), *flags, out="alone") == 0
    [(stem, alone)] = videos(cli.folder / "alone").items()
    assert videos(cli.folder / "videos")[stem] == alone


@pytest.mark.parametrize("method, moment, words", [
    ("rolling_forcing", 5, "5 chunks jointly, with the prompt of the newest: a later one may show up to 3 s early"),
    ("rolling_forcing", 3, "a later one may show up to 3 s early, that of 3 s from the beginning on"),
    ("deep_forcing", 3, None),
])
def test_a_joint_window_shows_a_prompt_early_and_says_so(cli: CommandLine, caplog, method, moment, words) -> None:
    """One line before anything is made, where a pipeline has such a window and a video has a later prompt."""
    caplog.set_level("INFO")
    story, plain = timeline(cli, (0, PROMPTS[0]), (moment, PROMPTS[1])), ["--prompt", PROMPTS[0]]
    flags = ["--config_path", ROOT / "configs" / f"{method}.yaml", "--num_output_frames", 27, "--dry_run"]
    assert cli("--data_path", story, *flags) == 0
    said = [line for line in caplog.messages if "jointly" in line]
    assert len(said) == bool(words) and all(words in line for line in said)
    caplog.clear()
    assert cli(*plain, *flags) == 0 and "jointly" not in caplog.text


@pytest.mark.parametrize("moments, words", [
    ([(0, "a"), (90, "b")], "begins at 90 s, and no chunk of this video"),
    ([(0, "a"), (3.1, "b"), (3.2, "c")], "begins in the same chunk"),
    ([(1, "a")], "a video begins at 0"),
])
def test_bad_timelines_are_refused_before_weights(cli: CommandLine, monkeypatch, capsys, moments, words) -> None:
    """One line on stderr, status 2, nothing loaded."""
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(pipeline.engine, "load_transformer", never)
    monkeypatch.setattr(pipeline.engine.TextEncoder, "load", never)
    assert cli("--data_path", timeline(cli, *moments), *LENGTH) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
