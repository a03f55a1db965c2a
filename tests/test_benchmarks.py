"""Benchmarks: what is counted, in turns, and what the JSON says. Times come from a clock that the tests wind."""
from __future__ import annotations

import ast
import json
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from statistics import median
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT
from pytest import approx

from benchmarks.__main__ import main
from benchmarks.cycles import Cycle, Schedule, prune_cycles, schedule_of_cycles, schedule_of_seconds
from benchmarks.endurance import endure, first_and_last_minute
from benchmarks.plots import Panel, draw
from benchmarks.report import comparison_table
from benchmarks.settings import Setting
from benchmarks.speed import compare, measure
from benchmarks.subject import Made, Subject
from benchmarks.summary import Spread
from benchmarks.sweep import sweep_lengths
from utils.config import ConfigError

CPU = torch.device("cpu")
FILLING = [3, 6, 9, 12, 15, 18, 21]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with fewer and smaller layers, at one token a frame."""
    path = tmp_path_factory.mktemp("model") / "smallest.yaml"
    vae = {"_class_name": "AutoencoderKLWan", "base_dim": 4, "num_res_blocks": 1}  # random weights need no more
    (path.parent / "config.json").write_text(json.dumps(vae))
    path.write_text(
        f"extends: {ROOT / 'configs/models/tiny.yaml'}\nheight: 16\nwidth: 16\nvae: {path.parent}\n"
        "transformer: {dim: 32, ffn_dim: 32, num_heads: 2, num_layers: 2, freq_dim: 16, text_dim: 8, text_len: 4}\n"
    )
    return str(path)


@pytest.fixture
def setting(model: str) -> Setting:
    return Setting(model=model)


class WoundClock:
    """Time is what `advance` was told; every mark is now."""

    def __init__(self) -> None:
        self.now_ms = 0.0

    def advance(self, ms: float) -> None:
        self.now_ms += ms

    def mark(self) -> float:
        return self.now_ms

    def wait(self, mark: float) -> None:
        assert mark <= self.now_ms

    def ms(self, begin: float, end: float) -> float:
        return end - begin


class Scripted:
    """A subject that computes nothing: the chunk that sees n frames takes n ms, times `slower`, times the drift."""

    def __init__(self, setting: Setting, schedule: Schedule, log: list[str], name: str, *, slower: float = 1.0,
                 drift: float = 0.0):
        self.setting, self.plan = setting, setting.plan(CPU)
        self._schedule, self._log, self._name, self._slower, self._drift = schedule, log, name, slower, drift
        self._index = 0

    def count(self, counted: str) -> None:
        self._log.append(f"{self._name} counts {counted}")

    def start(self, latent_frames: int) -> None:
        self._index = 0

    def first_frames(self, clock: WoundClock) -> tuple[float, int]:
        return 7.0 + len(self._log), 9

    def warm_up(self, schedule: Schedule, clock: WoundClock) -> None:
        self._log.append(f"{self._name} warms up")

    def advance(self, clock: WoundClock, guard: Any = None) -> Made:
        ms = self._schedule.windows[self._index] * self._slower * (1 + self._drift * len(self._log))
        self._log.append(self._name)
        self._index += 1
        return Made(torch.zeros(1), {"denoise": 0.8 * ms, "context": 0.2 * ms})


# --- cycles -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("changes", "windows", "cycle"), [
    ("policy=deep_forcing", [*FILLING, 16, 19, 16, 19, 16, 19], 2),            # 16 + 3 fit 21, 19 + 3 do not
    ("policy=deep_forcing window=24", [*FILLING, 24, 16, 19, 22, 16, 19, 22], 3),
    ("policy=deep_forcing window=18", [*FILLING[:-1], 16, 16, 16], 1),
    ("policy=self_forcing", [*FILLING, 21, 21, 21], 1),
    ("policy=deep_sink window=20", [*FILLING[:-1], 20, 20, 20, 20], 1),
    ("policy=framewise window=21", [*range(1, 22), 16, 17, 18, 19, 20, 21, 16], 6),
])
def test_cycles_are_those_counted_by_hand(setting: Setting, changes: str, windows: list[int], cycle: int) -> None:
    """The schedule, known before anything runs, against windows and cycle lengths worked out on paper."""
    schedule = schedule_of_cycles(setting.changed(changes).plan(CPU), 12)
    assert list(schedule.windows[:len(windows)]) == windows
    assert [c.chunks for c in schedule.cycles] == [cycle] * 12
    assert all(a.stop == b.start for a, b in pairwise(schedule.cycles))
    assert schedule.cycles[-1].stop == len(schedule.windows)
    assert set(schedule.windows[schedule.steady.start:]) <= set(schedule.windows[:schedule.warm_up])


def test_warm_up_holds_the_filling_and_whole_cycles(setting: Setting) -> None:
    """Deep Forcing fills in 7 chunks; two cycles of two follow, then what is measured."""
    schedule = schedule_of_cycles(setting.plan(CPU), 12)
    assert schedule.warm_up == schedule.cycles[0].start == 7 + 2 * 2
    assert schedule.latent_frames == 3 * (7 + 2 * (2 + 12))


def test_cycles_of_a_length_in_seconds(setting: Setting) -> None:
    """A minute is 960 pixel frames: 81 chunks, of which 37 whole pairs follow the filling; two of them warm up."""
    schedule = schedule_of_seconds(setting.plan(CPU), 60)
    assert len(schedule.windows) == 81 and len(schedule.cycles) == (81 - 7 - 1) // 2 - 2
    assert prune_cycles([3, 6, 6, 4, 5, 6, 4]) == [Cycle(2, 3), Cycle(3, 6)]


def test_schedule_is_what_the_model_sees(setting: Setting) -> None:
    """The windows of the preview against those that attention's own plan attends to."""
    plan = setting.plan(CPU)
    schedule, subject, seen = schedule_of_cycles(plan, 12), Subject(setting, plan), []
    subject.start(schedule.latent_frames)
    remember = subject.pipeline.remember

    def note(latents, text) -> None:
        seen.append(subject.pipeline.cache.layer(0).past_tokens // plan.geometry.frame_tokens + latents.shape[1])
        remember(latents, text)

    subject.pipeline.remember = note
    for _ in schedule.windows:
        subject.advance(WoundClock())
    assert tuple(seen) == schedule.windows


# --- speed, by a wound clock --------------------------------------------------------------------------

def test_numbers_of_a_known_video(setting: Setting) -> None:
    """A chunk takes as many milliseconds as it sees frames: every number is known."""
    schedule = schedule_of_cycles(setting.plan(CPU), 12)
    speed = measure(Scripted(setting, schedule, [], "a"), "dit", schedule, WoundClock(), latencies=3)
    assert (speed.cycles, speed.chunks) == (12, 24)
    assert speed.cycle_ms.median == speed.cycle_ms.least == approx(17.5) and speed.chunk_ms.p95 == approx(19)
    assert speed.ms_by_window_frames == {16: approx(16), 19: approx(19)}
    assert speed.stage_ms == {"denoise": approx(14), "context": approx(3.5)}
    assert speed.fps == approx(12 / 0.0175)
    assert speed.first_pixel_frames == 9 and speed.first_frames_ms.count == 3
    assert speed.every_chunk_ms == tuple(map(float, schedule.windows)) and speed.window_frames == schedule.windows


def test_a_setting_equals_itself_whatever_drifts(setting: Setting) -> None:
    """Times that grow by half over the run: the ratio of a setting with itself stays around 1, within 2 %."""
    schedule, log = schedule_of_cycles(setting.plan(CPU), 12), []
    pair = tuple(Scripted(setting, schedule, log, name, drift=0.01) for name in "ab")
    result = compare(pair, "dit", (schedule, schedule), WoundClock(), latencies=1)
    drift = result.first.every_chunk_ms[-1] / result.first.every_chunk_ms[len(schedule.windows) - 24 + 1]
    ratio = result.second_over_first
    assert drift > 1.3 and ratio.count == 12
    assert ratio.lower_quartile < 1 < ratio.upper_quartile and ratio.median == approx(1, abs=0.02)


def test_two_settings_take_turns_and_their_ratio_is_found(setting: Setting) -> None:
    """Twice the time per frame, cycles of two against cycles of one: 2 * 21 / 17.5, in turns of whole cycles."""
    rolling = setting.changed("policy=self_forcing")
    schedules = schedule_of_cycles(setting.plan(CPU), 12), schedule_of_cycles(rolling.plan(CPU), 13)
    log: list[str] = []
    pair = Scripted(setting, schedules[0], log, "a"), Scripted(rolling, schedules[1], log, "b", slower=2)
    result = compare(pair, "dit", schedules, WoundClock(), latencies=1)
    ratio = result.second_over_first
    assert (ratio.count, ratio.least, ratio.most) == (12, approx(2.4), approx(2.4))
    assert log[:4] == ["a counts dit", "b counts dit", "a warms up", "b warms up"]
    assert "".join(log[4:]).endswith("aab" + "baa" + "aab" + "baa")
    assert (result.first.chunks, result.second.chunks) == (24, 12)


@pytest.mark.parametrize(("batch", "slower", "expected"), [(1, 2, 2), (2, 2, 1), (2, 1.5, 0.75), (4, 1, 0.25)])
def test_what_is_compared_is_a_pixel_frame(setting: Setting, batch: int, slower: float, expected: float) -> None:
    """Chunks of several videos show several times as many: the ratio is that of the speeds in FPS."""
    schedule, log = schedule_of_cycles(setting.plan(CPU), 12), []
    several = Scripted(replace(setting, batch=batch), schedule, log, "b", slower=slower)
    result = compare((Scripted(setting, schedule, log, "a"), several), "dit", (schedule, schedule), WoundClock(), 1)
    assert result.second_over_first.median == approx(expected) == result.first.fps / result.second.fps
    assert f"a pixel frame of B b takes {expected:.4f}" in comparison_table("ab", {"dit": result})


def test_both_videos_of_a_batch_count(setting: Setting) -> None:
    """Chunks of 16 and 19 ms that show 12 frames of each video; a longer video is timed by its last 12 cycles."""
    two = replace(setting, batch=2)
    schedule = schedule_of_cycles(two.plan(CPU), 12)
    assert measure(Scripted(two, schedule, [], "a"), "dit", schedule, WoundClock(), 0).fps == approx(2000 * 12 / 17.5)
    schedule = schedule_of_seconds(two.plan(CPU), 60)
    subject = Scripted(two, schedule, [], "a", drift=0.01)
    points = sweep_lengths(subject, "dit", [60, 30], WoundClock())
    every = [ms * (1 + 0.01 * (2 + i)) for i, ms in enumerate(schedule.windows)]  # two lines are logged before
    for point, seconds in zip(points, (30, 60), strict=True):
        assert point.total_s == approx(sum(every[:point.chunks]) / 1000)
        assert point.fps * point.total_s == approx(2 * (12 * point.chunks - 3)) and point.seconds == seconds
        last = [c for c in schedule.cycles if c.stop <= point.chunks][-12:]
        assert point.cycle_ms == approx(median(sum(every[c.start:c.stop]) / c.chunks for c in last))
    assert len([c for c in schedule.cycles if c.stop <= points[1].chunks]) > 12


def test_latents_that_are_not_finite_are_told(setting: Setting) -> None:
    """One bad chunk of a whole video is enough; and its last minute is set against the first, not the reverse."""
    schedule = schedule_of_seconds(setting.plan(CPU), 180)

    class Bad(Scripted):
        def advance(self, clock: WoundClock, guard: Any = None) -> Made:
            made = super().advance(clock)
            return replace(made, latents=torch.full((1,), torch.nan)) if self._index == 30 else made

    good, bad = (
        endure(kind(setting, schedule, [], "a", drift=0.01), schedule, WoundClock()) for kind in (Scripted, Bad)
    )
    assert good.all_finite and not bad.all_finite
    assert bad.last_over_first == approx(bad.last_minute_ms / bad.first_minute_ms) and bad.last_over_first > 1


def test_spread_of_known_numbers() -> None:
    """Five numbers by hand, and one number, which is every quantile of itself."""
    spread = Spread.of([1.0, 2.0, 3.0, 4.0, 10.0])
    assert (spread.lower_quartile, spread.median, spread.upper_quartile, spread.mean) == (2, 3, 4, 4)
    assert spread.median <= spread.p95 <= spread.most == 10
    assert set(asdict(Spread.of([5.0])).values()) == {1, 5.0}


def test_first_and_last_minute(setting: Setting) -> None:
    """80 chunks are a minute: of a video that slows down, the medians of the first and the last 80 steady ones."""
    plan = setting.changed("policy=self_forcing").plan(CPU)
    schedule, subject = schedule_of_seconds(plan, 180), Scripted(setting, schedule_of_cycles(plan, 12), [], "a")
    stages = [{"denoise": float(i)} for i in range(len(schedule.windows))]
    first, last = first_and_last_minute(subject.plan, schedule, stages)
    assert first == schedule.steady.start + 39.5 and last == schedule.steady.stop - 40.5


# --- the command --------------------------------------------------------------------------------------

def run(tmp_path: Any, *flags: str) -> dict[str, Any]:
    path = tmp_path / "result.json"
    assert main([*flags, "--device", "cpu", "--output", str(path)]) == 0
    return json.loads(path.read_text())


def test_speed_json(tmp_path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every field is there, and they agree with each other."""
    result = run(tmp_path, "speed", "--model", model, "--latencies", "2")
    assert {"what", "command", "environment", "setting", "measured", "wall_s"} == set(result)
    assert set(result["environment"]) == {"device", "versions", "threads", "revision"}
    assert result["command"].startswith("python -m benchmarks speed --model ")
    assert result["setting"]["size"] == "16x16" and result["setting"]["kv_cache"]["window_frames"] == 21
    assert list(result["measured"]) == ["dit", "wan_vae", "tiny_vae"]
    for name, speed in result["measured"].items():
        stages = ["denoise", "context"] + ([] if name == "dit" else ["decode", "copy"])
        assert list(speed["stage_ms"]) == stages
        assert sum(speed["stage_ms"].values()) == approx(speed["chunk_ms"]["mean"])
        for spread in (speed["cycle_ms"], speed["chunk_ms"]):
            values = [spread[key] for key in ("least", "lower_quartile", "median", "upper_quartile", "p95", "most")]
            assert values == sorted(values) and values[0] > 0
        assert (speed["cycles"], speed["chunks"]) == (12, 24) and set(speed["ms_by_window_frames"]) == {"16", "19"}
        assert speed["fps"] == approx(12_000 / speed["cycle_ms"]["median"])
        assert speed["chunk_ms"]["mean"] == approx(speed["cycle_ms"]["mean"])
        assert len(speed["every_chunk_ms"]) == len(speed["window_frames"]) == 35
        assert speed["memory"]["of"] == "process" and speed["memory"]["peak_allocated_gib"] > 0
        assert speed["first_pixel_frames"] == (None if name == "dit" else 9)
        assert (speed["first_frames_ms"] is None) == (name == "dit")
    assert "tiny_vae" in capsys.readouterr().out


def test_compare_json(tmp_path, model: str) -> None:
    """Both settings and the ratio of their cycles."""
    result = run(
        tmp_path, "speed", "--model", model, "--policy", "deep_sink", "--measure", "dit", "--batch", "2",
        "--compare", "kv_cache.window_frames=21", "window=15 kv_cache.sink_frames=6",
    )
    assert [s["kv_cache"]["window_frames"] for s in result["settings"]] == [21, 15]
    assert [s["kv_cache"]["sink_frames"] for s in result["settings"]] == [10, 6]
    assert [s["batch"] for s in result["settings"]] == [2, 2]
    pair = result["measured"]["dit"]
    assert (pair["first"]["cycles"], pair["first"]["chunks"], pair["second_over_first"]["count"]) == (12, 12, 12)
    assert list(pair["second"]["ms_by_window_frames"]) == ["15"]


def test_sweep_json_and_plot(tmp_path, model: str, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Lengths share one run, windows that the policy refuses are named, and a missing plotter stops nothing."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(
        tmp_path, "sweep", "--model", model, "--measure", "dit", "--lengths", "30", "5", "--windows", "12", "21",
    )
    short, long = result["lengths"]["dit"]
    assert (short["seconds"], short["chunks"], short["cycle_ms"]) == (5, 7, None)
    assert (long["seconds"], long["chunks"]) == (30, 41) and long["total_s"] > short["total_s"] > 0
    windows = result["windows"]["dit"]
    assert [point["window_frames"] for point in windows["points"]] == [21]
    assert "budget_frames" in windows["refused"]["12"]
    assert "pip install" in caplog.text and not (tmp_path / "result.png").exists()


def test_plot_draws_every_line(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What matplotlib is asked to draw, by a stand-in for it."""
    axes, figure = Mock(), Mock()
    figure.subplots.return_value.flat = [axes]
    monkeypatch.setitem(sys.modules, "matplotlib", Mock())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", Mock(Figure=Mock(return_value=figure)))
    lines = {"dit": ([1, 2], [3, 4]), "wan_vae": ([1], [9])}
    draw([Panel("title", "x", "y", lines, logarithmic_x=True)], tmp_path / "plot.png")
    drawn = {call.kwargs["label"]: call.args[:2] for call in axes.plot.call_args_list}
    assert drawn == lines and axes.set_xscale.called
    figure.savefig.assert_called_once_with(tmp_path / "plot.png", dpi=110)


def test_exactness_and_endurance_json(tmp_path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other two tasks, as short as they may be; errors are drawn in % over the seconds of the video."""
    monkeypatch.setattr("benchmarks.__main__.draw", drawn := Mock())
    result = run(
        tmp_path, "exactness", "--model", model, "--dtype", "bfloat16", "--seconds", "3", "--every", "5",
        "--compare", "attention=sdpa", "dtype=float32",
    )
    assert result["common_state"] and result["candidate_error_over_reference_error"] == 0
    assert [s["dtype"] for s in result["settings"].values()] == ["bfloat16", "float32", "float32"]
    chunks, line = (x["reference against float32"] for x in (result["differences"], drawn.call_args.args[0][0].lines))
    assert line == ([0, 0.75 * 4], [approx(100 * c["relative_error"]) for c in chunks["chunks"]])
    result = run(tmp_path, "endurance", "--model", model, "--policy", "self_forcing", "--seconds", "20")["endurance"]
    assert result["all_finite"] and result["host_syncs_in_passes"] is None
    assert result["last_over_first"] == approx(result["last_minute_ms"] / result["first_minute_ms"])
    assert result["speed"]["cycles"] == len(result["speed"]["every_chunk_ms"]) - 7 - 4 - 1


@pytest.mark.parametrize(("flags", "message"), [
    ("speed --policy full", "never forgets"),
    ("speed --policy deep_forcin", "Did you mean deep_forcing"),
    ("speed --policy participative", "--set kv_cache.policy=participative"),
    ("speed --policy rolling_forcing", "Choose a config whose pipeline is chunkwise"),
    ("speed --attention flush", "attention=flush is unknown. Known: auto, fa3"),
    ("speed --resolution 480", "HEIGHTxWIDTH"), ("speed --resolution 15x16", "height=15"),
    ("speed --cycles 11", "at least 12"), ("speed --seconds 10", "Ask for 2"),
    ("speed --latencies 0", "--latencies 0"), ("speed --batch 0", "batch=0"),
    ("speed --window 12", "budget_frames"), ("sweep --output x.png --plot x.png", "--output 'x.png' must end in .json"),
    ("speed --set kv_cache.windo=3", "kv_cache.windo"),
    ("speed --compare attention=sdpa attention", "'attention' is no setting"),
    ("speed --compare batch=two batch=1", "no whole number"),
    ("speed --device tpu", "--device tpu"),
    ("sweep --over window --windows 3", "no window of 3 frames fits"), ("sweep --lengths 5", "Ask for"),
    ("exactness", "float32 is what errors are measured against"),
    ("exactness --every 0", "--every 0"), ("exactness --plot x.foo", "must end in .png"),
    ("exactness --compare window=21 window=24", "Add --free_running"),
    ("exactness --compare batch=1 batch=2", "one model, size, chunk and batch"),
])
def test_bad_flags_are_refused(flags: str, message: str, tmp_path, model: str, capsys) -> None:
    """One line on stderr that says what to do, exit status 2, no file."""
    path = tmp_path / "result.json"
    words = flags.split()
    device = [] if "--device" in words else ["--device", "cpu"]
    assert main([words[0], "--output", str(path), *words[1:], "--model", model, *device]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error and not path.exists()


def test_a_later_key_wins_over_the_flags(setting: Setting) -> None:
    """`changed` overrides what was there, the config's keys as well as the fields."""
    base = replace(setting, dtype="bfloat16", overrides=("dtype=bfloat16", "kv_cache.window_frames=24"))
    changed = base.changed("dtype=float32 window=27 batch=3 resolution=32x48")
    plan = changed.plan(CPU)
    assert plan.dtype == torch.float32 and plan.policy.window_frames == 27 and changed.batch == 3
    assert (plan.geometry.height, plan.geometry.width) == (32, 48)
    with pytest.raises(ConfigError, match="--compare needs two settings"):
        base.changed(" ")


def test_video_files_are_not_needed() -> None:
    """Machines without the video codecs can measure: `python -m benchmarks` imports nothing that needs them."""
    seen: set[str] = set()
    todo = ["benchmarks.__main__"]
    while todo:
        module = todo.pop()
        base = ROOT / module.replace(".", "/")
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if module in seen or not file.exists():
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    assert "wan.kv_cache.cache" in seen and "utils.video" not in seen
