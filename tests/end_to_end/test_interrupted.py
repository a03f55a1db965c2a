"""Killed, stopped, failed, repeated: what is finished stays, the rest is redone, nothing looks like what it is not."""
from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pipeline.engine
import pipeline.render
import utils.outputs
import utils.video
from end_to_end.runs import PROMPTS, PRUNED, CommandLine, ended, hidden, is_whole, manifest, record, videos, wait_until
from utils.files import BeingWrittenError
from utils.interrupt import StopRequest
from utils.progress import VideoProgress
from utils.video import VideoWriter, read_video

LONG = ["--num_output_frames", "600"]  # seconds of work even for the small model


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Name -> when it was written, and what it holds."""
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


# --- finished, partial, other settings --------------------------------------------------------------------

def test_finished_videos_are_skipped(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, caplog):
    """The same command again loads nothing and changes nothing."""
    caplog.set_level("INFO")
    options = ["--data_path", cli.prompts(*PROMPTS[:2]), "--num_output_frames", 3]
    assert cli(*options) == 0
    before = contents(cli.folder / "videos")
    monkeypatch.setattr(pipeline.engine.Engine, "prepare", lambda *_: pytest.fail("networks were loaded"))
    assert cli(*options) == 0
    assert contents(cli.folder / "videos") == before
    assert "2 of 2 videos are finished already and are skipped" in caplog.messages


@pytest.mark.parametrize("damage", ["sidecar gone", "sidecar cut off", "video cut off", "video gone", "says partial"])
def test_partial_videos_are_redone(cli: CommandLine, damage: str):
    """Whatever the video and its record do not agree on is made again, and only that."""
    options = ["--data_path", cli.prompts(*PROMPTS[:2]), "--num_output_frames", 3]
    assert cli(*options) == 0
    folder = cli.folder / "videos"
    (stem, video), (other, _) = videos(folder).items()
    untouched, sidecar, path = contents(folder)[f"{other}.mp4"], folder / f"{stem}.json", folder / f"{stem}.mp4"
    text = sidecar.read_text()
    {"sidecar gone": sidecar.unlink, "video gone": path.unlink,
     "sidecar cut off": lambda: sidecar.write_text(text[:100]), "video cut off": lambda: path.write_bytes(video[:-1]),
     "says partial": lambda: sidecar.write_text(text.replace('"complete"', '"partial"'))}[damage]()
    assert cli(*options) == 0
    assert is_whole(folder, 2) and videos(folder)[stem] == video
    assert contents(folder)[f"{other}.mp4"] == untouched


@pytest.mark.parametrize(
    "change, told",
    [
        (["--policy", "rolling"], "kv_cache.budget_frames 16 -> None"),
        (["--num_output_frames", 6], "pixel_frames 9 -> 21"),
        (["--set", "context_noise=1"], "context_noise 0 -> 1"),
    ],
)
def test_other_settings_are_refused(cli: CommandLine, capsys, change: list, told: str):
    """A finished video of the same name but other settings is neither skipped nor replaced, unless with --overwrite."""
    options = ["--prompt", PROMPTS[0], "--num_output_frames", 3]
    assert cli(*options) == 0
    before = contents(cli.folder / "videos")
    assert cli(*options, *change) == 2
    said = capsys.readouterr().err
    assert "made with other settings" in said and told in said and "--overwrite" in said and "--output_folder" in said
    assert contents(cli.folder / "videos") == before
    assert cli(*options, *change, "--overwrite") == 0
    assert is_whole(cli.folder / "videos", 1)
    first, second = manifest(cli.folder / "videos")
    assert first["video"] == second["video"] and first["fingerprint"] != second["fingerprint"]


@pytest.mark.parametrize("owner, moment", [(pipeline.engine.Engine, "prepare"), (VideoProgress, "update")])
def test_a_video_that_another_run_made_meanwhile_is_not_replaced(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, owner: type, moment: str,
):
    """While this run loads, or writes, a video of the same name and other settings is finished: that one stays."""
    options, original = ["--prompt", PROMPTS[0], "--num_output_frames", 3], getattr(owner, moment)
    folder = cli.folder / "videos"
    assert cli(*options, "--policy", "rolling", out="other") == 0

    def late(*arguments: object) -> None:
        shutil.copytree(cli.folder / "other", folder, dirs_exist_ok=True)
        original(*arguments)

    monkeypatch.setattr(owner, moment, late)
    assert cli(*options) == 1
    [stem] = videos(folder)
    assert is_whole(folder, 1) and record(folder, stem)["settings"]["config"]["kv_cache"]["policy"] == "rolling"
    assert "made with other settings" in manifest(folder)[-1]["error"]


def test_overwrite_redoes_and_keeps_the_old_until_then(cli: CommandLine, monkeypatch: pytest.MonkeyPatch):
    """--overwrite makes everything again; if that fails, what was there is still there."""
    options = ["--prompt", PROMPTS[0], "--num_output_frames", 3]
    assert cli(*options) == 0
    before = contents(cli.folder / "videos")
    assert cli(*options, "--overwrite") == 0
    after = contents(cli.folder / "videos")
    assert all(after[name] > before[name] for name in before)
    assert videos(cli.folder / "videos").values() and len(manifest(cli.folder / "videos")) == 2
    monkeypatch.setattr(VideoWriter, "write", disk_full)
    assert cli(*options, "--overwrite") == 1
    assert {n: c for n, c in contents(cli.folder / "videos").items() if n != "manifest.jsonl"} == {
        n: c for n, c in after.items() if n != "manifest.jsonl"}


# --- killed and stopped -----------------------------------------------------------------------------------

def test_killed_run_goes_on(cli: CommandLine):
    """kill -9 in the second video: the first is finished, nothing else looks so; the next run makes just the rest."""
    options = ["--data_path", cli.prompts(*PROMPTS), "--num_output_frames", 90]
    folder = cli.folder / "videos"
    process = cli.start(*options)
    wait_until(lambda: (folder / "manifest.jsonl").exists() and list(folder.glob(".*.tmp.mp4")), process)
    os.kill(process.pid, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    assert len(hidden(folder)) == 1  # the video that was being written
    [stem] = videos(folder)
    assert record(folder, stem)["status"] == "complete" and len(list(folder.glob("*.json"))) == 1
    first = contents(folder)[f"{stem}.mp4"]
    assert cli(*options) == 0
    assert is_whole(folder, 3) and contents(folder)[f"{stem}.mp4"] == first
    assert sorted(line["prompt"] for line in manifest(folder)) == sorted(PROMPTS)
    assert cli(*options, out="whole") == 0
    assert videos(folder) == videos(cli.folder / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_run_keeps_what_was_made(cli: CommandLine, number: signal.Signals):
    """Ctrl-C ends the run at a chunk with status 130; a partial video and its record stay until the next run."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("this signal is ignored here, as under nohup, and so it is by the run")
    options = ["--data_path", cli.prompts(*PROMPTS[:2]), "--save_with_index"]
    folder = cli.folder / "videos"
    process = cli.start(*options, *LONG)
    wait_until(lambda: list(folder.glob(".0000-0.*.mp4")), process)
    os.kill(process.pid, number)
    assert ended(process) == 130
    assert {file.name for file in folder.iterdir()} == {"0000-0.partial.mp4", "0000-0.partial.json", "manifest.jsonl"}
    about, pixels = record(folder, "0000-0.partial"), read_video(folder / "0000-0.partial.mp4")
    assert about["status"] == "partial" and len(pixels) == about["pixel_frames"] < 2397
    assert (len(pixels) - 9) % 12 == 0  # whole chunks
    assert [line["status"] for line in manifest(folder)] == ["partial"]
    assert "kept what was made" in (cli.folder / "videos.log").read_text()
    assert cli(*options, "--num_output_frames", 6) == 0
    assert is_whole(folder, 2)


def test_stopped_in_a_batch_then_resumed(cli: CommandLine, monkeypatch: pytest.MonkeyPatch):
    """Every video of the batch is kept as partial, later ones are not begun, and the next run makes all of them."""
    options = ["--data_path", cli.prompts(*PROMPTS), *PRUNED, "--batch_size", 2]
    assert cli(*options, out="whole") == 0
    folder = cli.folder / "videos"
    with monkeypatch.context() as patch:
        patch.setattr(VideoProgress, "update", lambda *_: signal.raise_signal(signal.SIGINT))
        assert cli(*options) == 130
    partial = sorted(file.name for file in folder.glob("*.partial.mp4"))
    assert len(partial) == 2 and videos(folder) == {} and hidden(folder) == []
    assert cli(*options) == 0
    assert is_whole(folder, 3) and videos(folder) == videos(cli.folder / "whole")


def test_hang_ups_never_insist_and_may_be_ignored():
    """A closing terminal sends several: the partial video is kept all the same. Under nohup none is noticed."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_use_ema_is_a_setting_only_where_it_chooses(cli: CommandLine, model: Path, caplog):
    """Weights without groups give the same video with and without it, so a finished one is skipped."""
    caplog.set_level("INFO")
    options = ["--prompt", PROMPTS[0], "--num_output_frames", 3]
    assert cli(*options) == 0 and cli(*options, "--use_ema") == 0
    assert "1 of 1 videos are finished already and are skipped" in caplog.messages
    tensors = load_file(model.parent / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.save({"generator": tensors, "generator_ema": tensors}, cli.folder / "both.pt")
    options += ["--checkpoint_path", cli.folder / "both.pt"]
    assert cli(*options, out="both") == 0 and cli(*options, "--use_ema", out="both") == 2


def test_second_interrupt_stops_at_once(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys):
    """Who presses Ctrl-C twice waits for nothing: status 130, no half video, no temporary file."""
    twice = [signal.SIGINT, signal.SIGINT]
    monkeypatch.setattr(VideoProgress, "update", lambda *_: [signal.raise_signal(number) for number in twice])
    assert cli("--prompt", PROMPTS[0], "--num_output_frames", 6) == 130
    assert list((cli.folder / "videos").iterdir()) == []
    assert "finished videos are kept" in capsys.readouterr().err


# --- failures ---------------------------------------------------------------------------------------------

def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_leftovers_under_other_names_go_too(cli: CommandLine):
    """What a killed run left of a video that is never made again goes with the next run; work in progress stays."""
    folder = cli.folder / "videos"
    folder.mkdir()
    for name, age_s in (("old", 3600), ("new", 0), ("held", 3600)):
        file = folder / f".{name}-s1-0.0123abcd.tmp.mp4"
        file.touch()
        os.utime(file, (time.time() - age_s,) * 2)
    with (folder / ".held-s1-0.0123abcd.tmp.mp4").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cli("--prompt", PROMPTS[0], "--num_output_frames", 3) == 0
    assert hidden(folder) == [".held-s1-0.0123abcd.tmp.mp4", ".new-s1-0.0123abcd.tmp.mp4"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_failure_costs_one_video(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, caplog, batch_size: int):
    """The encoder of one video finds the disk full: the others are made, the failure is listed, a rerun makes it."""
    options = ["--data_path", cli.prompts(*PROMPTS), "--num_output_frames", 9, "--save_with_index"]
    options += ["--batch_size", batch_size]
    folder, add = cli.folder / "videos", utils.video._Encoder.add
    full = lambda encoder, frame: (  # noqa: E731
        disk_full() if "0001-0" in encoder.container.name else add(encoder, frame)
    )
    with monkeypatch.context() as patch:
        patch.setattr(utils.video._Encoder, "add", full)
        assert cli(*options) == 1
    assert is_whole(folder, 2) and list(videos(folder)) == ["0000-0", "0002-0"]
    [failure] = [line for line in manifest(folder) if line["status"] == "failed"]
    assert failure["video"] == "0001-0.mp4" and failure["prompt"] == PROMPTS[1] and "No space left" in failure["error"]
    assert any(line.startswith("failed: 0001-0: ") and "No space left" in line for line in caplog.messages)
    assert cli(*options) == 0
    assert is_whole(folder, 3)


def test_batch_that_does_not_fit_is_made_one_by_one(cli: CommandLine, monkeypatch: pytest.MonkeyPatch):
    """Out of memory at a batch of three: its videos are made alone, and come out as if asked for so."""
    options, stream = ["--data_path", cli.prompts(*PROMPTS), "--num_output_frames", 6], pipeline.engine.Engine.stream

    def small(engine: pipeline.engine.Engine, requests: list, *arguments: object):
        if len(requests) > 1:
            raise torch.OutOfMemoryError("no room")
        return stream(engine, requests, *arguments)

    monkeypatch.setattr(pipeline.engine.Engine, "stream", small)
    assert cli(*options, "--batch_size", 3) == 0 and cli(*options, out="single") == 0
    assert is_whole(cli.folder / "videos", 3) and videos(cli.folder / "videos") == videos(cli.folder / "single")


def test_failures_of_every_video_are_listed(cli: CommandLine):
    """Files may not grow past 8 KiB: every video fails with the reason, nothing half stays, and a rerun makes them."""
    options = ["--data_path", cli.prompts(*PROMPTS[:2]), *PRUNED]
    assert cli.fresh(*options, out="videos", largest_file=8192) == 1
    folder = cli.folder / "videos"
    assert {file.name for file in folder.iterdir()} == {"manifest.jsonl"}
    assert [line["status"] for line in manifest(folder)] == ["failed"] * 2
    for line in manifest(folder):
        assert "could not write this video" in line["error"] and "File too large" in line["error"]
    assert (cli.folder / "videos.log").read_text().count("\nfailed: ") == 2
    assert cli(*options) == 0
    assert is_whole(folder, 2)


def test_failed_record_leaves_nothing_that_looks_finished(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, caplog,
):
    """The disk fills up between the video and its sidecar: the video does not count, and is redone."""
    with monkeypatch.context() as patch:
        patch.setattr(utils.outputs, "write_atomically", disk_full)
        patch.setattr(utils.outputs.OutputFolder, "__init__", unprobed)
        assert cli("--prompt", PROMPTS[0], "--num_output_frames", 3) == 1
    folder = cli.folder / "videos"
    assert not list(folder.glob("*.json"))
    [line] = manifest(folder)
    assert line["status"] == "failed" and "No space left" in line["error"]
    assert f"{line['video'].removesuffix('.mp4')}.json cannot be written" in line["error"]
    assert "Make room" in line["error"] and f"failed: {line['video'][:-4]}: {line['error']}" in caplog.messages
    assert cli("--prompt", PROMPTS[0], "--num_output_frames", 3) == 0
    assert is_whole(folder, 1)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_manifest_that_takes_no_line_is_told(cli: CommandLine, caplog, batch_size: int):
    """A folder stands in its place: every video is finished, made once, and named once with the reason; status 1."""
    caplog.set_level("INFO")
    folder = cli.folder / "videos"
    (folder / "manifest.jsonl").mkdir(parents=True)
    command = ["--data_path", cli.prompts(*PROMPTS), "--num_output_frames", 3, "--save_with_index"]
    assert cli(*command, "--batch_size", batch_size) == 1
    assert is_whole(folder, 3) and "failed" not in caplog.text and "tried again" not in caplog.text
    assert f"finished 3 of 3 videos in {folder}" in caplog.messages
    said = [line for line in caplog.messages if "manifest.jsonl" in line]
    assert [line.partition("-0: ")[0] for line in said] == [f"not listed: {number:04d}" for number in range(3)]
    assert all("manifest.jsonl cannot be added to: Is a directory" in line and "Errno" not in line for line in said)
    (folder / "manifest.jsonl").rmdir()
    assert cli(*command) == 0 and "3 of 3 videos are finished already" in caplog.text


def unprobed(self: utils.outputs.OutputFolder, folder: Path, *, overwrite: bool) -> None:
    self.folder, self.overwrite = Path(folder), overwrite
    self.folder.mkdir()


def test_waiting_for_another_run_is_said_once(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, caplog):
    """A video that another process is writing is looked at again and again, but the log does not grow with it."""
    caplog.set_level("INFO")
    start, looks = utils.outputs.OutputFolder.start, iter(range(5))

    def busy(folder: utils.outputs.OutputFolder, stem: str) -> None:
        if next(looks, None) is not None:
            raise BeingWrittenError(f"{stem}: another process is writing")
        start(folder, stem)

    monkeypatch.setattr(pipeline.render, "WAIT_S", 0)
    monkeypatch.setattr(utils.outputs.OutputFolder, "start", busy)
    assert cli("--prompt", PROMPTS[0], "--num_output_frames", 3) == 0
    assert sum(": start, " in line for line in caplog.messages) == 1
    assert sum("another process is writing" in line for line in caplog.messages) == 1
    assert is_whole(cli.folder / "videos", 1)


def test_what_another_run_made_is_told(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, caplog):
    """One of two videos is being written elsewhere, and then it is there: the last line tells both."""
    caplog.set_level("INFO")
    command = ["--data_path", cli.prompts(*PROMPTS[:2]), "--num_output_frames", 3, "--save_with_index"]
    start, folder = utils.outputs.OutputFolder.start, cli.folder / "videos"

    def other_run_has_it(output: utils.outputs.OutputFolder, stem: str) -> None:
        if stem == "0000-0":
            monkeypatch.setattr(utils.outputs.OutputFolder, "start", start)
            assert cli("--data_path", cli.prompts(PROMPTS[0], name="one.txt"), *command[2:]) == 0
            raise BeingWrittenError(f"{stem}: another process is writing")
        start(output, stem)

    monkeypatch.setattr(pipeline.render, "WAIT_S", 0)
    monkeypatch.setattr(utils.outputs.OutputFolder, "start", other_run_has_it)
    assert cli(*command) == 0
    assert caplog.messages[-1] == f"finished 1 of 2 videos in {folder}; 1 was made by another run"
    assert is_whole(folder, 2)


def test_two_runs_into_one_folder(cli: CommandLine):
    """Two processes on one list at once: every video is whole in the end, and neither spoils the other's."""
    options = ["--data_path", cli.prompts(*PROMPTS), *PRUNED]
    runs = [cli.start(*options, environment={"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}), cli.start(*options)]
    statuses = [ended(run) for run in runs]
    assert statuses == [0, 0] and is_whole(cli.folder / "videos", 3)
    assert "failed" not in [line["status"] for line in manifest(cli.folder / "videos")]
    assert cli(*options) == 0 and cli(*options, out="alone") == 0
    assert videos(cli.folder / "videos") == videos(cli.folder / "alone")
