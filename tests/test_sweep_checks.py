"""What is refused, or told, before a sweep makes anything; and what the scripts of the papers' tables ask for."""
from __future__ import annotations

import argparse
import os
import re
import subprocess
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_model import write_small_model, write_small_sweep

from evaluation.__main__ import main
from evaluation.commands import sweep as command
from evaluation.metrics.catalogue import BASIC
from evaluation.sweep import work, workers
from evaluation.sweep.make import Maker
from evaluation.sweep.results import TABLE, collect, load, refuse_unknown_metrics
from evaluation.sweep.settings import load_sweep
from evaluation.sweep.work import Claims
from evaluation.sweep.workers import prepare
from utils.config import REPOSITORY, ConfigError

SCRIPTS = sorted((REPOSITORY / "evaluation" / "reproduce").glob("[!c]*.sh"))  # all but common.sh
TABLES = {"t": {"title": "T", "columns": [{"metric": "frozen@whole", "label": "f"}]}}


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


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# --- before anything is made ----------------------------------------------------------------------------------

def test_a_table_that_its_metrics_cannot_fill_is_refused(write, tmp_path, capsys):
    """Unless --only leaves it out; what the suite may give later is no reason."""
    tables = TABLES | {"u": {"title": "U", "columns": [{"metric": "imaging_quality@whole", "label": "i"}]}}
    path = write(tables=tables, prompts={"captions": [{"split": "test", "count": 1}]})
    for only in ((), ("--only", "t", "rolling")):
        assert run(path, tmp_path / "out", *only) == 2
        said = capsys.readouterr().err
        assert "tables.t: frozen@whole is not measured. Add frozen to metrics" in said
        assert "'metrics=[world, frozen]'" in said and not files(tmp_path / "out")
    assert run(path, tmp_path / "out", "--only", "u", "--dry_run") == 0
    assert run(path, tmp_path / "out", "--dry_run", "--set", "metrics=[basic]") == 0


@pytest.mark.parametrize(("changed", "said"), [
    ({"tables": {"t": {"title": "T", "columns": [{"metric": "frozen@whole", "label": "f", "digits": -1}]}}},
     "tables.t: digits=-1 is too small. Ask for 0 or more."),
    ({"tables": TABLES, "ablations": {"t": {"title": "A", "x": "x", "methods": ["rolling"], "metrics": []}}},
     "'t' is the name of 2 of methods, tables, ablations and record: --only could mean each."),
    ({"tables": {"rolling": TABLES["t"]}}, "'rolling' is the name of 2 of"),
    ({"tables": {"record": TABLES["t"]}}, "'record' is the name of 2 of"),
])
def test_what_cannot_be_shown_is_refused_when_it_is_read(write, changed, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_sweep(write(**changed))


def test_a_judge_is_asked_for_before_anything_is_made(write, tmp_path, capsys, monkeypatch):
    """And may be named by --vlm as well as by the sweep."""
    path = write(metrics=["visual_stability"])
    assert run(path, tmp_path / "out", "--dry_run") == 2
    assert "needs --vlm MODULE:FUNCTION" in capsys.readouterr().err
    (tmp_path / "judge_of_mine.py").write_text("def ask(frames, question):\n    return 'Score: 1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(path, tmp_path / "out", "--dry_run", "--vlm", "judge_of_mine:ask") == 0
    assert not files(tmp_path / "out")


def test_a_dry_run_says_what_is_left_and_does_nothing(write, tmp_path, caplog):
    caplog.set_level("INFO")
    path, out = write(metrics=["picture"], record={"methods": ["rolling"], "seconds": 0.5}), tmp_path / "out"
    assert run(path, out, "--dry_run") == 0 and not files(out)
    assert caplog.messages[-1].endswith("of 3 videos, 3 are to be made and 3 to be measured; 1 to be recorded")
    assert run(path, out) == 0
    before = files(out)
    assert run(path, out, "--dry_run", "--set", "metrics=[picture, frozen]") == 0 and files(out) == before
    assert caplog.messages[-1].endswith("of 3 videos, 0 are to be made and 3 to be measured; 0 to be recorded")
    assert run(path, out, "--dry_run", "--only", "nope") == 2 and files(out) == before


@pytest.mark.parametrize("config", ["deep_forcing", "packforcing"])
def test_a_length_at_which_nothing_is_forgotten_is_told(write, tmp_path, caplog, config):
    """Two roads to whether a memory forgets: said at the start, and the same pixels as with all that was seen."""
    methods = {"all": {"config": "configs/full.yaml"}, "some": {"config": f"configs/{config}.yaml"}}
    seen_frames = 15 if config == "packforcing" else 21  # sink, recent frames and chunk; one window
    for frames, told in ((seen_frames, True), (seen_frames + 3, False)):
        caplog.clear()
        path = write(
            methods=methods, seconds=[(4 * frames - 3) / 16], metrics=["picture"],
            prompts={"captions": [{"split": "test", "count": 1}]},
        )
        out = tmp_path / str(frames)
        assert run(path, out, "--set", "methods.all.set=[kv_cache.window_frames=30]") == 0
        said = [line for line in caplog.messages if line.startswith("all, some: these videos are so short")]
        rows = load(out).rows
        values = [[(row.prompt, row.metric, row.value) for row in rows if row.method == name] for name in methods]
        assert len(said) == told and (values[0] == values[1]) == told


def test_numbers_stay_when_others_are_measured(write, tmp_path):
    """Two roads to one table: metric by metric in one folder, and both at once."""
    path = write(metrics=["picture", "frozen"], prompts={"captions": [{"split": "test", "count": 1}]})
    assert run(path, tmp_path / "both") == 0
    for name in ("frozen", "picture"):
        assert run(path, tmp_path / "out", "--set", f"metrics=[{name}]") == 0
    assert (tmp_path / "out" / TABLE).read_bytes() == (tmp_path / "both" / TABLE).read_bytes()
    assert {"frozen", "brightness"} <= {row.metric for row in load(tmp_path / "out").rows}


def test_what_another_worker_is_repairing_is_waited_for(write, tmp_path, monkeypatch):
    """This worker cannot make a video, another one is at it: it is measured, and in the table, before this one ends."""
    sweep = load_sweep(write(batch_size=3, metrics=["picture"]))
    tasks, metrics = prepare(sweep, tmp_path, device="cpu", local_rank=0, random_weights=True)
    make, watch, held = Maker._make, workers.record_units, ExitStack()

    def fail(*_):
        raise ValueError("not here")

    def meanwhile(*arguments):
        assert held.enter_context(Claims(tmp_path / workers.CLAIMS).claim("make.rolling.0"))
        return watch(*arguments)

    def repair(seconds):
        with held:
            make(Maker(3), tasks[0], tasks[0].jobs)

    monkeypatch.setattr(work, "time", SimpleNamespace(sleep=repair))
    monkeypatch.setattr(Maker, "_make", fail)
    monkeypatch.setattr(workers, "record_units", meanwhile)
    assert workers.labour(sweep, tasks, metrics, tmp_path, rank=0, world_size=1) == {}
    assert not any(row.error for row in collect(sweep, tasks, metrics, tmp_path))


# --- the scripts ----------------------------------------------------------------------------------------------

def called(script: Path, folder: Path, *arguments: str, status: int = 0) -> tuple[int, list[list[str]]]:
    """Its exit status, and how it calls Python; a stub in Python's place ends with `status`."""
    stub = folder / "python"
    stub.write_text(f"""#!/bin/sh
[ "$1" = -c ] && echo 0 && exit
printf '%s\\n' "$@" END >> {folder}/log
exit {status}
""")
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", script, *arguments], env=os.environ | {"PYTHON": str(stub)}, capture_output=True, text=True,
        check=False,
    )
    calls = (folder / "log").read_text().split("END\n")[:-1]
    return done.returncode, [call.splitlines() for call in calls if call.startswith("-m\n")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_measures_what_its_tables_show(script, tmp_path):
    """It checks, works, and reports; nothing that it is for is left unmeasured."""
    status, (check, work, report) = called(script, tmp_path)
    arguments = check[check.index("sweep") + 1:]
    assert status == 0 and arguments[-1] == "--dry_run" and work[work.index("sweep") + 1:] == arguments[:-1]
    assert report[2] == "report"
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args(arguments)
    sweep = load_sweep(options.sweep, options.set)
    measured = {part for name in sweep.metrics for part in (BASIC if name == "basic" else (name,))}
    refuse_unknown_metrics(sweep, tmp_path, measured, options.only)


def test_a_script_ends_with_bad_input_before_it_works(tmp_path):
    """With the status that says so, and neither work nor report."""
    status, calls = called(SCRIPTS[0], tmp_path, "--only", "nope", status=2)
    assert status == 2 and len(calls) == 1 and calls[0][-1] == "--dry_run"
