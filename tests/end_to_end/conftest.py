"""The small model, and a command line that uses it."""
from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from end_to_end.runs import CommandLine
from weights import make_model


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, caches of our own, started from the repository; child processes inherit all of it.

    Also Ctrl-C that works: a suite that a script runs in the background inherits it ignored, and so would the runs.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.chdir(ROOT)
        yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a small random model."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cli(model: Path, tmp_path: Path) -> CommandLine:
    """The command line, writing into an empty folder."""
    return CommandLine(model, tmp_path)
