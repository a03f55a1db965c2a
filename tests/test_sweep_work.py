"""Work that is shared: claims on pieces of it, a killed worker, one that must wait."""
from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.sweep.work import Claims, Unit, start_of, wait_for_others_with, work_off
from evaluation.sweep.workers import resources_of_task
from utils.config import REPOSITORY

FORK = multiprocessing.get_context("fork")         # for workers that call no library with threads of its own
WAIT_S = 60


def units_in(folder: Path, count: int, work_s: float = 0.02) -> list[Unit]:
    """Units that note who began and who ended them."""
    def do(name: str) -> None:
        with (folder / "log").open("a") as log:
            log.write(f"{name} {os.getpid()}\n")
        time.sleep(work_s)
        (folder / name).touch()

    return [Unit(f"u{i}", (folder / f"u{i}").exists, lambda i=i: do(f"u{i}")) for i in range(count)]


def test_workers_share_and_a_killed_one_costs_only_what_it_held(tmp_path):
    """Four workers, one killed in the middle of a unit: that unit alone is begun twice, all are done."""
    count, workers = 24, 4
    units = units_in(tmp_path, count)
    def labour(rank: int) -> None:
        mine = list(units)
        if rank == 1:  # begins with u6, and never ends it
            def hang() -> None:
                (tmp_path / "held").touch()
                time.sleep(WAIT_S)
            mine[6] = Unit("u6", units[6].is_done, hang)
        work_off(mine, Claims(tmp_path / "claims"), start=start_of(units, rank, workers))

    crew = [FORK.Process(target=labour, args=(rank,)) for rank in range(workers)]
    for process in crew:
        process.start()
    end = time.monotonic() + WAIT_S
    while not (tmp_path / "held").exists() and time.monotonic() < end:
        time.sleep(0.01)
    crew[1].kill()
    for process in crew:
        process.join(WAIT_S)
    assert [process.exitcode for process in crew] == [0, -signal.SIGKILL, 0, 0]
    begun = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(begun) == sorted(unit.name for unit in units)  # u6 by whoever took over, all others once
    assert len({line.split()[1] for line in (tmp_path / "log").read_text().splitlines()}) > 1


def test_a_failed_unit_is_told_and_the_rest_goes_on(tmp_path):
    def fail() -> None:
        raise ValueError("this one cannot")

    units = units_in(tmp_path, 3, work_s=0)
    units[1] = Unit("u1", units[1].is_done, fail)
    assert work_off(units, Claims(tmp_path / "claims")) == {"u1": "this one cannot"}
    assert (tmp_path / "u0").exists() and (tmp_path / "u2").exists()


def test_a_worker_that_must_wait_does_what_is_ready(tmp_path):
    """While another holds the last unit, what needs only the first is done; what needs the last comes after it."""
    units, later = units_in(tmp_path, 2, work_s=0), units_in(tmp_path / "later", 2, work_s=0)
    (tmp_path / "later").mkdir()
    spare = [replace(unit, name=f"s{i}", is_ready=units[i].is_done) for i, unit in enumerate(later)]
    claims, done = Claims(tmp_path / "claims"), []

    def held() -> bool:
        """Whether u1, which another worker holds, is done: by the time that something else was."""
        done.append([unit.is_done() for unit in spare])
        return any(done[-1])

    with claims.claim("u1"):
        assert work_off([units[0], replace(units[1], is_done=held)], claims, meanwhile=spare) == {}
    assert done[-1] == [True, False] and not spare[1].is_ready()


def test_a_claim_is_one_at_a_time_and_ends_with_its_block(tmp_path):
    claims = Claims(tmp_path)
    with claims.claim("x") as mine, claims.claim("x") as other, claims.claim("y") as elsewhere:
        assert (mine, other, elsewhere) == (True, False, True)
    with claims.claim("x") as again:
        assert again


def test_what_failed_here_is_waited_for_while_another_is_at_it(tmp_path):
    """Until it is done, or let go undone; what nobody holds is not waited for."""
    claims, looks = Claims(tmp_path), []

    def done_at_third_look() -> bool:
        looks.append(None)
        return len(looks) > 2

    held, free = (Unit(name, done_at_third_look, lambda: None) for name in ("held", "free"))
    with claims.claim("held"):
        wait_for_others_with([held], claims)
    assert len(looks) == 3
    looks.clear()
    wait_for_others_with([free], claims)
    assert len(looks) == 1


@pytest.mark.parametrize(("device", "cluster", "gpus"), [
    ("auto", {"CPU": 8.0}, 0), ("auto", {"CPU": 8.0, "GPU": 2.0}, 1), ("cpu", {"GPU": 2.0}, 0), ("cuda", {}, 1),
])
def test_a_task_asks_for_a_gpu_only_where_there_are_some(device, cluster, gpus):
    assert resources_of_task(device, cluster).get("num_gpus", 0) == gpus


@pytest.mark.parametrize(("units", "workers"), [(7, 3), (3, 7), (8, 8), (0, 2)])
def test_workers_begin_apart(units, workers):
    starts = [start_of([None] * units, rank, workers) for rank in range(workers)]
    assert starts == sorted(starts) and all(0 <= start < max(1, units) for start in starts)
    assert len(set(starts)) == max(1, min(units, workers))


@pytest.mark.parametrize("threads", [None, "1"])
def test_the_scripts_start_a_worker_for_every_processor(tmp_path, threads):
    """Whatever number of threads each is allowed; a stub in Python's place says how it was called."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 0 || echo "$@"\n')
    stub.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "WORKERS")}
    environment |= {"PYTHON": str(stub)} | ({"OMP_NUM_THREADS": threads} if threads else {})
    script = REPOSITORY / "evaluation" / "reproduce" / "tiny.sh"
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True)
    assert f"--nproc_per_node={len(os.sched_getaffinity(0))} " in done.stdout
