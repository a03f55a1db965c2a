"""Run the command line, in this process or in one of its own, and look at what lies in the output folder.

A process of its own starts in milliseconds: a fork server imports the program once and has run nothing.
"""
from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import inference
from utils.video import read_video

PROMPTS = ["a red circle bounces slowly", "the blue square spins", "green star on a dark background"]
PRUNED = ["--num_output_frames", "30"]  # longer than the default window of 21, so every run prunes
WAIT_S = 60.0


@dataclass(frozen=True)
class CommandLine:
    """`inference.py` with the small model, writing below `folder`."""

    model: Path   # the model's YAML
    folder: Path

    def arguments(self, *arguments: object, out: str = "videos") -> list[str]:
        """What stands after `inference.py`."""
        ours = ["--set", f"model={self.model}", "--device", "cpu"]
        return [*ours, *map(str, arguments), "--output_folder", str(self.folder / out)]

    def __call__(self, *arguments: object, out: str = "videos") -> int:
        """Run in this process; returns the exit status."""
        return inference.main(self.arguments(*arguments, out=out))

    def start(self, *arguments: object, out: str = "videos", largest_file: int | None = None,
              environment: Mapping[str, str] | None = None) -> BaseProcess:
        """Run in a process of its own; its output goes to `<out>.log`, or with a rank to `<out>.<rank>.log`."""
        environment = dict(environment or {})
        log = ".".join([out, *filter(None, [environment.get("RANK")]), "log"])
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload([__name__])
        process = server.Process(
            target=_run, args=(self.arguments(*arguments, out=out), self.folder / log, largest_file, environment)
        )
        process.start()
        return process

    def fresh(self, *arguments: object, out: str, **options) -> int:
        """Run in a process of its own and wait; returns the exit status."""
        return ended(self.start(*arguments, out=out, **options))

    def prompts(self, *lines: str, name: str = "prompts.txt") -> Path:
        """A prompt file of these lines."""
        path = self.folder / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path


def _run(arguments: list[str], log: Path, largest_file: int | None, environment: Mapping[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(inference.main(arguments))


def ended(process: BaseProcess) -> int:
    """The exit status of a process, once it has ended."""
    process.join(WAIT_S)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"the run did not end within {WAIT_S} s")
    return process.exitcode


def wait_until(there: Callable[[], object], process: BaseProcess) -> None:
    """Return as soon as `there` is true, while `process` still runs."""
    end = time.monotonic() + WAIT_S
    while not there():
        if not process.is_alive() or time.monotonic() > end:
            raise AssertionError(f"the run ended ({process.exitcode}) or hung before the moment to catch it")
        time.sleep(0.002)


# --- what lies in the folder ----------------------------------------------------------------------------

def videos(folder: Path) -> dict[str, bytes]:
    """Finished-looking videos by stem."""
    return {file.stem: file.read_bytes() for file in sorted(folder.glob("*.mp4")) if ".partial" not in file.name
            and not file.name.startswith(".")}


def record(folder: Path, stem: str) -> dict:
    """The sidecar of a video."""
    return json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))


def manifest(folder: Path) -> list[dict]:
    """The lines of the manifest."""
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def hidden(folder: Path) -> list[str]:
    """Temporary files, and whatever else nobody should find there."""
    return sorted(file.name for file in folder.iterdir() if file.name.startswith("."))


def is_whole(folder: Path, count: int) -> bool:
    """`count` videos, each with a sidecar that vouches for it, and nothing besides."""
    files = {file.name for file in folder.iterdir()} - {"manifest.jsonl"}
    stems = videos(folder)
    vouched = all(
        record(folder, stem)["status"] == "complete" and record(folder, stem)["bytes"] == len(data)
        and len(read_video(folder / f"{stem}.mp4")) == record(folder, stem)["pixel_frames"]
        for stem, data in stems.items()
    )
    expected = {f"{stem}{suffix}" for stem in stems for suffix in (".mp4", ".json")}
    return len(stems) == count and vouched and files == expected
