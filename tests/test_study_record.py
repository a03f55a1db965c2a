"""The record of a study that several runs fill at once."""
from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from evaluation.study.results import Results
from utils.config import ConfigError

STUDY = {"captions": [{"split": "test"}], "references": [], "methods": {}}
RUNS = 6


def settings(name, **changed):
    return {name: {"pixel_frames": 9, "seed": 0, "config": "one"} | changed}


def record(folder):
    return json.loads((folder / "study.json").read_text())


def at_once(work):
    """What `work(index)` returns in RUNS threads that start together; errors are returned."""
    barrier = Barrier(RUNS)

    def started(index):
        barrier.wait()
        try:
            return work(index)
        except ConfigError as error:
            return error

    with ThreadPoolExecutor(RUNS) as pool:
        return list(pool.map(started, range(RUNS)))


def test_two_runs_keep_one_record(tmp_path):
    """Both methods and both notes stay, whoever writes last; so a third run cannot make rows of either otherwise."""
    first, second = (Results(tmp_path, STUDY, settings(name)) for name in ("a", "b"))
    for seconds in (1, 2):
        second.note_run({"run": "second", "seconds": seconds})
        first.note_run({"run": "first", "seconds": seconds})
    assert record(tmp_path)["methods"] == settings("a") | settings("b")
    assert record(tmp_path)["runs"] == [{"run": "second", "seconds": 2}, {"run": "first", "seconds": 2}]
    for name in ("a", "b"):
        with pytest.raises(ConfigError, match=f'{name} was made with config="one", and it is "two" now'):
            Results(tmp_path, STUDY, settings(name, config="two"))
    assert record(tmp_path)["methods"] == settings("a") | settings("b")


def test_runs_that_start_together_lose_nothing(tmp_path):
    def work(index):
        results = Results(tmp_path, STUDY, settings(f"method_{index}"))
        for note in range(5):
            results.note_run({"run": index, "note": note})

    assert at_once(work) == [None] * RUNS
    assert sorted(record(tmp_path)["methods"]) == [f"method_{index}" for index in range(RUNS)]
    assert sorted((run["run"], run["note"]) for run in record(tmp_path)["runs"]) == [(i, 4) for i in range(RUNS)]


def test_of_contradicting_runs_that_start_together_one_goes_on(tmp_path):
    made = at_once(lambda index: Results(tmp_path, STUDY, settings("a", config=index)))
    assert sum(isinstance(found, Results) for found in made) == 1
    refused = [str(found) for found in made if isinstance(found, ConfigError)]
    assert len(refused) == RUNS - 1 and all("Choose another --output_folder" in said for said in refused)


def test_a_later_study_is_kept(tmp_path):
    """Of two studies of one folder the later one says what reports show, though the first run still takes notes."""
    first = Results(tmp_path, STUDY, settings("a"))
    Results(tmp_path, STUDY | {"methods": {"b": {}}}, settings("b"))
    first.note_run({"run": "first"})
    assert record(tmp_path)["study"]["methods"] == {"b": {}}
