"""Sweeps: what they stand for, going on after a kill, the tidy table, failures."""
from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from small_model import write_small_model, write_small_sweep

from evaluation.__main__ import main
from evaluation.analysers import ChunkLayout, analyse
from evaluation.metrics import catalogue
from evaluation.metrics.measuring import measure
from evaluation.metrics.protocol import CannotMeasureError, Value, VideoInfo
from evaluation.metrics.table import Row, write_csv
from evaluation.metrics.videos import find_videos
from evaluation.metrics.world import WorldMetric
from evaluation.sweep import workers
from evaluation.sweep.make import Maker
from evaluation.sweep.results import TABLE, load, refuse_unknown_metrics
from evaluation.sweep.settings import items_of, load_sweep, variants_of
from evaluation.sweep.workers import labour, prepare
from training.world import render, sample, to_frames
from utils.config import REPOSITORY, ConfigError
from utils.outputs import read_json_lines
from utils.video import VideoWriter, open_video

SWEEPS = sorted((REPOSITORY / "evaluation" / "sweeps").glob("*.yaml"))
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["evaluation.sweep.workers"])
WAIT_S = 60


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture
def write(tmp_path, small):
    """Write a sweep, its defaults changed by keywords, and return its path."""
    return partial(write_small_sweep, tmp_path, small)


def run(path, folder, *arguments):
    """The command line with random weights in this process; returns the exit status."""
    return main(["sweep", str(path), "--output_folder", str(folder), "--device", "cpu", "--random_weights", *arguments])


def finished(folder: Path) -> list[str]:
    """Every video that was ever finished, once for each time that it was made."""
    return [
        f"{manifest.parent.name}/{line['video']}" for manifest in sorted(folder.glob("videos/*/manifest.jsonl"))
        for line in read_json_lines(manifest) if line["status"] == "complete"
    ]


# --- what a sweep stands for ---------------------------------------------------------------------------------

def test_variants_are_methods_by_settings_by_lengths(write):
    methods = {name: {"config": "configs/deep_sink.yaml"} for name in ("a", "b")}
    sweep = load_sweep(write(methods=methods, settings={"s3": ["kv_cache.sink_frames=3"], "s6": []}, seconds=[1, 2]))
    names = [variant.name for variant in variants_of(sweep)]
    assert len(names) == len(set(names)) == 8 and names[:2] == ["a.s3.1s", "a.s3.2s"]
    assert [v.name for v in variants_of(load_sweep(write(methods=methods)))] == ["a", "b"]


def test_prompts_of_a_file_keep_their_numbers(write):
    sweep = load_sweep(write(prompts={"file": "prompts/showcase.txt", "first": 1, "count": 2}))
    lines = (REPOSITORY / "prompts" / "showcase.txt").read_text().splitlines()
    assert [item.prompt for item in items_of(sweep)] == lines[1:3] and items_of(sweep)[0].index == 1


@pytest.mark.parametrize(("changed", "said"), [
    ({"seconds": []}, "must name different lengths over 0"),
    ({"seconds": [1, 1]}, "must name different lengths over 0"),
    ({"seeds": [-1]}, "must name different whole numbers from 0 on"),
    ({"batch_size": 0}, "Ask for 1 or more"),
    ({"methods": {}}, "nothing to make"),
    ({"methods": {"A b": {"config": "configs/full.yaml"}}}, "cannot be a name"),
    ({"methods": {"x": {"config": "configs/missing.yaml"}}}, "method x: "),
    ({"prompts": {}}, "either a file or captions"),
    ({"prompts": {"captions": [{"split": "nope", "count": 1}]}}, "split='nope' is unknown"),
    ({"prompts": {"file": "prompts/showcase.txt", "count": 99999}}, "Lower prompts.first or prompts.count"),
    ({"prompts": {"file": "prompts/none.txt"}}, "no such file"),
    ({"metrics": ["vbenchh"]}, "metric 'vbenchh' is unknown"),
    ({"tables": {"t": {"title": "T", "methods": ["x"]}}}, "'x' is none of this sweep's variants"),
    ({"tables": {"t": {"title": "T", "columns": [{"metric": "drift", "label": "d"}]}}}, "name@granularity"),
    ({"tables": {"t": {"title": "T", "columns": [{"metric": "drifft@whole", "label": "d"}]}}},
     "tables.t: nothing measures 'drifft@whole'. Did you mean drift@whole? Known: aesthetic_quality, "),
    ({"ablations": {"a": {"title": "A", "x": "x", "methods": ["rolling"], "metrics": ["drift@clip2s x"]}}},
     "ablations.a: nothing measures 'drift@clip2s'. Did you mean drift@whole? Known: drift@second, drift@whole; "),
    ({"colour": 1}, "sweep.yaml:2: unknown key colour. Valid keys: seconds, "),
])
def test_a_bad_sweep_is_refused(write, tmp_path, capsys, changed, said):
    assert run(write(**changed), tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_ray_and_workers_go_together(write, tmp_path, capsys):
    assert run(write(), tmp_path / "out", "--ray", "local") == 2
    assert run(write(), tmp_path / "out", "--ray", "local", "--workers", "0") == 2
    error = capsys.readouterr().err
    assert "go together" in error and "--workers 0 is too small" in error


# --- runs -----------------------------------------------------------------------------------------------------

def test_a_killed_worker_changes_nothing(write, tmp_path):
    """Two processes on one folder, one killed once it has made something: the tidy table equals a single run's."""
    methods = {name: {"config": f"configs/{config}.yaml"} for name, config in
               (("rolling", "self_forcing"), ("sink", "deep_sink"))}
    path = write(methods=methods, seconds=[0.5, 0.7], batch_size=1)  # beside others, rounding differs
    assert run(path, tmp_path / "alone") == 0
    crew = [SERVER.Process(target=_run_and_exit, args=(path, tmp_path / "shared", rank)) for rank in range(2)]
    for process in crew:
        process.start()
    end = time.monotonic() + WAIT_S
    while not finished(tmp_path / "shared") and time.monotonic() < end:
        time.sleep(0.005)
    crew[1].kill()
    for process in crew:
        process.join(WAIT_S)
    assert crew[0].exitcode == 0
    made = finished(tmp_path / "shared")
    assert len(made) == len(set(made)) == 12  # nothing lost, nothing twice
    assert (tmp_path / "shared" / TABLE).read_bytes() == (tmp_path / "alone" / TABLE).read_bytes()


def _run_and_exit(path: Path, folder: Path, rank: int) -> None:
    if rank == 0:
        raise SystemExit(run(path, folder))
    sweep = load_sweep(path)
    tasks, measures = prepare(sweep, folder, device="cpu", local_rank=0, random_weights=True)
    labour(sweep, tasks, measures, folder, rank=rank, world_size=2)


def test_a_run_goes_on_and_more_may_join(write, tmp_path, caplog):
    """A second run makes and measures only what a wider sweep adds; metrics that half a second is too short for are
    left out, told in a line, and are neither a failure nor measured again."""
    caplog.set_level("INFO")
    folder = tmp_path / "out"
    assert run(write(prompts={"captions": [{"split": "test", "count": 2}]}, metrics=["basic"]), folder) == 0
    assert {line.split(": ")[1] for line in caplog.messages if line.startswith("left out for 2 of 2 videos: ")} == {
        "drift", "borders", "returns"}
    kept = [path for path in folder.rglob("*") if path.suffix in (".mp4", ".json", ".csv") and path.parent != folder]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert run(write(seeds=[0, 1], metrics=["basic"]), folder) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(finished(folder)) == 6 and len({row.video for row in load(folder).rows}) == 6


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"", b"a,b\n1,2\n", None])
def test_a_damaged_table_of_a_video_is_made_again(write, tmp_path, damage):
    """Letters that are none, nothing, another table, a torn last row: the same rows come back."""
    path, folder = write(prompts={"captions": [{"split": "test", "count": 1}]}), tmp_path / "out"
    assert run(path, folder) == 0
    before = load(folder).rows
    table = next((folder / "rows" / "rolling").glob("*.csv"))
    table.write_bytes(table.read_bytes()[:-30] if damage is None else damage)
    assert run(path, folder) == 0 and load(folder).rows == before


@pytest.mark.parametrize("name", ["sweep.json", "results.csv", "records/rolling.safetensors"])
def test_what_the_report_reads_is_made_again(write, tmp_path, name):
    """Cut short, each file comes back from the same command, and equal."""
    path, folder = write(record={"methods": ["rolling"], "seconds": 0.5}), tmp_path / "out"
    assert run(path, folder) == 0
    before, whole = load(folder), (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-30])
    assert run(path, folder) == 0
    assert load(folder) == before and (folder / name).read_bytes() == whole


def test_only_what_a_table_needs(write, tmp_path, capsys):
    """One table's methods are made now, the others later, and then all are in the results."""
    methods = {name: {"config": "configs/self_forcing.yaml"} for name in ("a", "b")}
    path, out = write(methods=methods, tables={"t": {"title": "T", "methods": ["b"]}}), tmp_path / "out"
    assert run(path, out, "--only", "t") == 0
    assert {row.method for row in load(out).rows} == {"b"}
    assert run(path, out, "--only", "a") == 0
    assert {row.method for row in load(out).rows} == {"a", "b"} and len(finished(out)) == 6
    assert run(path, out, "--only", "nope") == 2
    assert "--only nope: unknown. Name some of: " in capsys.readouterr().err


def test_other_settings_are_refused(write, tmp_path, capsys):
    assert run(write(), tmp_path / "out") == 0
    assert run(write(seconds=[0.7]), tmp_path / "out") == 2
    assert "made with other settings" in capsys.readouterr().err


@pytest.fixture
def picky(monkeypatch):
    """A sweep may name the metric below."""
    monkeypatch.setitem(catalogue.EVERY, "picky", ("", ""))
    make = catalogue._made
    monkeypatch.setattr(catalogue, "_made", lambda name, choices: Picky() if name == "picky" else make(name, choices))


def test_what_another_worker_made_after_all_has_not_failed(write, tmp_path, monkeypatch):
    """This worker cannot make a video, another one can, while this one records: nothing has failed in the end."""
    sweep = load_sweep(write(batch_size=3, metrics=["picture"], record={"methods": ["rolling"], "seconds": 0.5}))
    tasks, metrics = prepare(sweep, tmp_path, device="cpu", local_rank=0, random_weights=True)
    make, watch = Maker._make, workers.record_units

    def fail(*_):
        raise ValueError("not here")

    def meanwhile(*arguments):
        make(Maker(3), tasks[0], tasks[0].jobs)
        return watch(*arguments)

    monkeypatch.setattr(Maker, "_make", fail)
    failed = labour(sweep, tasks, metrics, tmp_path, rank=0, world_size=1)
    assert set(failed.values()) == {"not here", "the video was not made"}
    monkeypatch.setattr(workers, "record_units", meanwhile)
    assert labour(sweep, tasks, metrics, tmp_path, rank=0, world_size=1) == {}


def test_a_bad_video_is_a_row_that_says_so(write, tmp_path, monkeypatch, picky, caplog):
    """The rest goes on, the exit status says that something is missing, and the next run tries again."""
    assert run(write(metrics=["picky"]), tmp_path / "out") == 1
    assert len([line for line in caplog.messages if line.startswith("failed: ") and "not this one" in line]) == 1
    assert sorted(row.error for row in load(tmp_path / "out").rows) == ["", "", "not this one"]
    monkeypatch.setattr(Picky, "refused", "-")
    assert run(write(metrics=["picky"]), tmp_path / "out") == 0
    assert [row.error for row in load(tmp_path / "out").rows] == ["", "", ""]


class Picky:
    """A metric that says 1, and refuses prompts that begin so."""

    refused = "There is a blue square"
    name, reports, gives, protocol = "picky", ("one",), ("one@whole",), "by hand"

    def start(self, video):
        if video.prompt.startswith(self.refused):
            raise CannotMeasureError("not this one")
        return self

    def add(self, frame):
        pass

    def values(self):
        return [Value("one", "whole", None, 1.0)]


def test_prompts_are_those_that_were_written(write, tmp_path, monkeypatch, picky):
    """Two roads to what is known of a video: the sweep's own, and the JSON beside the file. The longer prompt is the
    text encoder's alone."""
    for name, text in (("short", "a cat\na dog\n"), ("long", "a cat in the sun\na dog in the rain\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    prompts = {"file": str(tmp_path / "short.txt"), "extended": str(tmp_path / "long.txt")}
    monkeypatch.setattr(Picky, "refused", "a cat in the sun")
    assert run(write(prompts=prompts, metrics=["picky"]), tmp_path / "out") == 0
    saved = load(tmp_path / "out")
    beside = {video.name: video.prompt for video in find_videos([str(tmp_path / "out" / "videos" / "rolling")])}
    assert {video["video"]: video["prompt"] for video in saved.videos} == beside and set(beside.values()) == {
        "a cat", "a dog"}
    assert {row.video: row.prompt for row in saved.rows} == beside and saved.shown_prompts == ["a cat", "a dog"]


# --- the tidy table -------------------------------------------------------------------------------------------

def test_the_record_says_how_the_numbers_came_about(write, tmp_path):
    assert run(write(seeds=[3]), tmp_path / "out") == 0
    saved = load(tmp_path / "out")
    assert saved.provenance["seeds"] == [3] and len(saved.provenance["prompts_sha256"]) == 64
    assert saved.variants["rolling"]["settings"]["weights"]["transformer"] == "random"
    beside = [json.loads(saved.path_of(video["video"]).with_suffix(".json").read_text()) for video in saved.videos]
    for key in ("model", "device", "versions"):
        assert [saved.provenance[key]] * 3 == [record[key] for record in beside]
    assert saved.variants["rolling"]["settings"]["config"]["kv_cache"]["policy"] == "rolling"
    assert {row.protocol for row in saved.rows} == {WorldMetric.protocol} and {row.seed for row in saved.rows} == {"3"}
    assert len(saved.videos) == 3 and all(saved.path_of(video["video"]).is_file() for video in saved.videos)


def test_a_later_run_elsewhere_relabels_nobody(write, tmp_path):
    """Of two methods, the first one's videos were made on another machine: the record names both."""
    methods = {name: {"config": "configs/self_forcing.yaml"} for name in ("a", "b")}
    path, out = write(methods=methods, metrics=["picture"]), tmp_path / "out"
    assert run(path, out, "--only", "a") == 0
    here = load(out).provenance["device"]
    for file in (out / "videos" / "a").glob("*.json"):
        record = json.loads(file.read_text())
        record["device"], record["versions"]["torch"] = "another machine", "0.0"
        file.write_text(json.dumps(record))
    assert run(path, out, "--only", "b") == 0
    found = load(out).provenance
    assert found["device"] == f"another machine, {here}" and found["versions"]["torch"].startswith("0.0, ")


def test_a_file_shows_what_its_frames_do(tmp_path):
    """Two roads to a rendered clip's numbers: from its frames in memory, and from an H.264 file of them."""
    clip = sample(1, "test")
    frames = to_frames(render([clip.scene])).numpy()[0]
    with VideoWriter(tmp_path / "clip.mp4", fps=16) as writer:
        writer.write(frames)
    with open_video(tmp_path / "clip.mp4") as stream:
        info = VideoInfo("clip", stream.fps, stream.height, stream.width, clip.caption, ChunkLayout())
        rows = measure(stream.frames, info, [WorldMetric()]).values["world"]
    whole = {row.metric: row.value for row in rows if row.granularity == "whole"}
    direct = analyse(frames, clip.said, 16.0, ChunkLayout()).video
    assert whole["world_rate_colour"] == pytest.approx(direct.rate["colour"], abs=0.05)
    assert whole["world_holds_shape"] == 1
    assert whole["world_background_drift"] == pytest.approx(direct.background_drift, abs=0.01)
    assert len([row for row in rows if (row.metric, row.granularity) == ("world_speed", "second")]) == 5


def test_prompts_of_another_world_are_told():
    with pytest.raises(CannotMeasureError, match="no caption of the embedded model's world"):
        WorldMetric().start(VideoInfo("clip", 16.0, 32, 32, "A red panda.", ChunkLayout()))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_here_can_be_read(path, tmp_path):
    """And something gives every number that they show."""
    sweep = load_sweep(path)
    assert variants_of(sweep)
    refuse_unknown_metrics(sweep, tmp_path, catalogue.EVERY)


def test_a_table_of_other_tools_may_be_shown(write, tmp_path):
    """What nothing here measures is known once a table in imported/ holds it."""
    sweep = load_sweep(write(tables={"t": {"title": "T", "columns": [{"metric": "votes@whole", "label": "v"}]}}))
    with pytest.raises(ConfigError, match="nothing measures 'votes@whole'"):
        refuse_unknown_metrics(sweep, tmp_path, ["world"])
    (tmp_path / "imported").mkdir()
    write_csv([Row("a/0.mp4", "a", "p", "0", "votes", "whole", None, 1.0, "people", "")], tmp_path / "imported/v.csv")
    refuse_unknown_metrics(sweep, tmp_path, ["world"])


def test_every_number_has_a_name_that_is_known(write, tmp_path):
    """Two roads to the names that a sweep may show: those of its finished table, and those known before it ran."""
    assert run(write(metrics=["basic", "world"], seconds=[3]), tmp_path / "out") == 0
    measured = {f"{row.metric}@{row.granularity}" for row in load(tmp_path / "out").rows}
    assert len(measured) > 60 and measured <= catalogue.value_names()


def test_ray_workers_share_a_sweep_and_one_is_killed(write, tmp_path):
    """Three tasks on a local cluster, the process of one killed in the middle: as in a single run, nothing twice."""
    pytest.importorskip("ray")
    methods = {name: {"config": f"configs/{config}.yaml"} for name, config in
               (("rolling", "self_forcing"), ("sink", "deep_sink"))}
    path = write(methods=methods, seconds=[0.5, 0.7], batch_size=1)
    assert run(path, tmp_path / "alone") == 0
    folder = tmp_path / "shared"
    driver = subprocess.Popen(
        [sys.executable, "-m", "evaluation", "sweep", str(path), "--output_folder", str(folder), "--device", "cpu",
         "--random_weights", "--ray", "local", "--workers", "3"],
        cwd=REPOSITORY,
    )
    end = time.monotonic() + 2 * WAIT_S
    while not finished(folder) and time.monotonic() < end:
        time.sleep(0.01)
    workers = [pid for pid in descendants(driver.pid) if title(pid).startswith("ray::_ray_task")]
    os.kill(workers[0], signal.SIGKILL)
    assert driver.wait(2 * WAIT_S) == 0
    made = finished(folder)
    assert len(made) == len(set(made)) == 12
    assert (folder / TABLE).read_bytes() == (tmp_path / "alone" / TABLE).read_bytes()


def title(pid: int) -> str:
    """How a process calls itself; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """Processes started by `pid`, and by those."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found
