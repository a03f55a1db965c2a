"""The benchmark of the engine's stream: any pipeline, by chunks as they are handed out."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import approx
from small_model import write_small_model

from benchmarks.__main__ import main
from benchmarks.cycles import schedule_of_cycles, schedule_of_seconds
from benchmarks.settings import Setting
from pipeline.engine import Engine, VideoRequest
from pipeline.noise import SampleSeed
from utils.config import ConfigError
from utils.video import read_video
from wan.kv_cache.window import Window, WindowBuffer

CPU = torch.device("cpu")
FILLING = [3, 6, 9, 12, 15, 18, 21]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_small_model(tmp_path_factory.mktemp("model")))


def plan_of(model: str, changes: str) -> Any:
    return Setting(model=model, resolution="16x16").changed(changes).plan(CPU)


def run(tmp_path: Path, model: str, *flags: str) -> dict[str, Any]:
    path = tmp_path / "result.json"
    common = ("--model", model, "--resolution", "16x16", "--device", "cpu", "--output", str(path))
    assert main(["stream", *flags, *common]) == 0
    return json.loads(path.read_text())


# --- schedules ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("changes", "windows", "cycle"), [
    ("policy=rolling_forcing", [15, 18, 21, 21, 21], 1),                     # five chunks jointly, and memory
    ("policy=rolling_forcing window=27", [15, 18, 21, 24, 27, 27], 1),
    ("policy=causvid", [*FILLING, *FILLING, *FILLING, 3], 7),                # later clips begin with a given chunk
    ("policy=causvid overlap_frames=6", [*FILLING, *FILLING, *FILLING, 3], 7),
])
def test_cycles_are_those_counted_by_hand(model: str, changes: str, windows: list[int], cycle: int) -> None:
    """Each chunk that is handed out, and what it sees when it is finished."""
    schedule = schedule_of_cycles(plan_of(model, changes), 12)
    assert list(schedule.windows[:len(windows)]) == windows
    assert [c.chunks for c in schedule.cycles] == [cycle] * 12
    assert schedule.cycles[0].start == schedule.warm_up and schedule.cycles[-1].stop == len(schedule.windows)


def test_a_joint_window_warms_up_until_the_clean_pass_sees_all(model: str) -> None:
    """Memory holds what the clean pass sees, 18 frames, before the seventh chunk; then four warm up."""
    schedule = schedule_of_cycles(plan_of(model, "policy=rolling_forcing"), 12)
    assert (schedule.warm_up, schedule.warm_up_frames) == (7 + 4, 3 * (7 + 4))
    assert (len(schedule.windows), schedule.latent_frames) == (11 + 12, 3 * (11 + 12))


def test_a_joint_window_stays_full_to_the_end(model: str) -> None:
    """A video that ends is measured as one that goes on: its last chunks are not those of a window that empties."""
    plan = plan_of(model, "policy=rolling_forcing window=30")
    long, short = (schedule_of_seconds(plan, seconds).windows for seconds in (40, 21))
    assert len(short) == 29 and short == long[:len(short)]


def test_schedules_of_clips(model: str) -> None:
    """Clips of 21 latent frames that share 3, of 72 pixel frames each: a minute is 13 of them and a third."""
    plan = plan_of(model, "policy=causvid")
    schedule = schedule_of_cycles(plan, 12)
    assert (schedule.warm_up, schedule.warm_up_frames) == (2 * 7, 21 + 18)
    assert (len(schedule.windows), schedule.latent_frames) == (14 * 7, 21 + 13 * 18)
    with pytest.raises(ConfigError, match="60 s hold 12 prune cycles.* Ask for 64 s or more"):
        schedule_of_seconds(plan, 60)
    assert schedule_of_seconds(plan, 64).cycles == schedule.cycles


@pytest.mark.parametrize(("policy", "finishing"), [("rolling_forcing", -2), ("causvid", -1), ("deep_forcing", -1)])
def test_schedule_is_what_attention_sees(
    model: str, monkeypatch: pytest.MonkeyPatch, policy: str, finishing: int,
) -> None:
    """One layer, a token a frame; a joint window's chunk is handed out after its clean pass, others before theirs."""
    plan, seen, window = plan_of(model, f"policy={policy}"), [], WindowBuffer.seen

    def note(buffer: WindowBuffer, query: torch.Tensor, tokens: int) -> Window:
        seen.append(tokens)
        return window(buffer, query, tokens)

    monkeypatch.setattr(WindowBuffer, "seen", note)
    engine = Engine(plan)
    engine.prepare(["a prompt"])
    chunks = engine.stream([VideoRequest("a prompt", SampleSeed(0))], 21 + 4 * 18)
    for _, expected in zip(chunks, schedule_of_cycles(plan, 12).windows[:20], strict=False):
        assert seen[finishing] == expected


# --- the command --------------------------------------------------------------------------------------

def test_stream_json(tmp_path: Path, model: str) -> None:
    """Times between finished chunks, whose frames, 9 and then 12 each, are kept; no decoder, no stream."""
    flags = ("--latencies", "2", "--video", str(tmp_path / "new" / "long.mp4"))
    assert pytest.raises(SystemExit, run, tmp_path, model, *flags, "--measure", "dit")
    assert main(["stream", *flags]) == 2  # which one?
    for counted in ("wan_vae", "tiny_vae"):
        line = run(tmp_path, model, *flags, "--measure", counted)["streamed"][counted]
        speed = line["speed"]
        assert speed["stage_ms"] == {"between": approx(speed["chunk_ms"]["mean"])} and speed["cycles"] == 12
        assert (speed["first_pixel_frames"], speed["first_frames_ms"]["count"]) == (9, 2)
        assert line["last_over_first"] == approx(line["last_minute_ms"] / line["first_minute_ms"])
        assert len(read_video(tmp_path / "new/long.mp4")) == 9 + 12 * (len(speed["every_chunk_ms"]) - 1)


@pytest.mark.parametrize(("policy", "chunks", "cycle", "frames", "passes"), [
    ("rolling_forcing", 11 + 12, 1, 9 + 22 * 12, 1), ("causvid", (2 + 12) * 7, 7, (2 + 12) * 72, 3),
])
def test_every_pipeline_streams(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str],
    policy: str, chunks: int, cycle: int, frames: int, passes: int,
) -> None:
    """Every chunk that is handed out is timed, in cycles of one or of a clip's seven; FPS count the frames shown."""
    result = run(
        tmp_path, model, "--policy", policy, "--latencies", "1", "--measure", "wan_vae",
        "--video", str(tmp_path / "long.mp4"),
    )
    speed = result["streamed"]["wan_vae"]["speed"]
    assert len(speed["every_chunk_ms"]) == len(speed["window_frames"]) == chunks
    assert (speed["cycles"], speed["chunks"], speed["first_pixel_frames"]) == (12, 12 * cycle, 9)
    assert len(read_video(tmp_path / "long.mp4")) == frames
    assert speed["fps"] == approx(1000 * (12 if cycle == 1 else 72 / 7) / speed["cycle_ms"]["median"])
    assert list(speed["ms_by_window_frames"]) == (["21"] if cycle == 1 else [str(n) for n in FILLING])
    assert speed["memory"]["peak_allocated_gib"] > 0
    assert result["setting"]["passes"] == {"denoising": passes, "context": 1}
    assert f"12 prune cycles of {12 * cycle} chunks" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    ("speed --policy rolling_forcing", "rolling_forcing: its pipeline is rolling_forcing"),
    ("speed --compare policy=causvid window=21", "causvid: its pipeline is causvid_overlap"),
    ("memory --policy causvid", "the task stream"), ("sweep --policy rolling_forcing", "the task stream"),
    ("endurance --policy rolling_forcing", "the task stream"),
    ("exactness --policy causvid --dtype bfloat16", "the task stream"),
    ("stream --policy full", "never forgets"), ("stream --policy causvid --seconds 30", "Ask for 64 s"),
])
def test_what_cannot_be_measured_is_refused(flags: str, message: str, tmp_path: Path, model: str, capsys) -> None:
    """Tasks that take the passes of a chunk apart refuse other pipelines and name the one that does not."""
    path = tmp_path / "result.json"
    task, *rest = flags.split()
    assert main([task, "--output", str(path), "--model", model, "--resolution", "16x16", "--device", "cpu", *rest]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error and not path.exists()
