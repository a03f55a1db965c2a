"""A policy that somebody writes: what is wrong with it is said, and costs nobody else anything."""
from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import make_tiny

import wan.kv_cache.policies
from benchmarks.settings import Setting
from pipeline.length import check_timelines, video_length
from pipeline.loops import ChunkwiseLoop
from pipeline.sampler import FewStepSampler
from utils.prompts import PromptItem
from wan.geometry import VideoGeometry
from wan.kv_cache.policies.rolling import RollingWindow
from wan.kv_cache.policy import CacheSizes, CacheView, KVPolicy, Plan, build_policy


@dataclass(frozen=True)
class Mine(KVPolicy):
    """The newest nine frames, with something done to the plan."""

    positions: str = "original"
    fault: str = ""

    def sizes(self, geometry: VideoGeometry) -> CacheSizes:
        return CacheSizes.of_window(geometry, 12)

    def plan(self, view: CacheView) -> Plan:
        tail = view.last(min(view.num_frames, 9))
        plan = Plan.of(view, sink=view.first(0), tail=tail, positions=self.positions)
        if self.fault == "code":
            raise KeyError("oh")
        if self.fault == "order":
            return replace(plan, retain=tail.flip(1))
        return replace(plan, retain=tail[:, view.frame_tokens:]) if self.fault == "lost" else plan


def windows(policy: KVPolicy) -> list[float]:
    sampler = FewStepSampler([1000, 500], shift=5.0, warp=True)
    loop = ChunkwiseLoop(geometry=make_tiny().geometry, policy=policy, sampler=sampler, on_switch="keep")
    return list(loop.windows(15))


@pytest.mark.parametrize("policy, words", [
    (Mine(positions="releasd"), "positions='releasd' is not one of released, unified, contiguous, original"),
    (Mine(fault="order"), "Mine plans `retain` out of order"),
    (Mine(fault="code"), r"Mine, at latent frame 0: KeyError: 'oh' \(test_own_policy.py, line"),
    (Mine(fault="lost"), "Mine plans to see slots that it does not keep"),
])
def test_a_wrong_plan_is_told_before_anything_is_loaded(policy: KVPolicy, words: str) -> None:
    """A name that there is not, slots out of order, slots that are seen and not kept; the right plan goes through."""
    assert windows(Mine()) == [3, 6, 9, 12, 12]
    with pytest.raises(ValueError, match=words):
        windows(policy)


@pytest.mark.parametrize("policy, on_switch, is_told", [
    (Mine(), "recache", True), (Mine(), "flush_recent", True), (Mine(), "reset_sink", False), (Mine(), "keep", False),
    (RollingWindow(window_frames=12), "recache", False),
])
def test_a_switch_without_effect_is_told(caplog: pytest.LogCaptureFixture, policy, on_switch, is_told) -> None:
    """Where the policy does not name its newest frames, recache and flush_recent cannot touch any."""
    plan = Setting(policy="self_forcing", model="tiny", overrides=(f"on_switch={on_switch}",)).plan(torch.device("cpu"))
    plan = replace(plan, policy=policy, loop=replace(plan.loop, policy=policy))
    item, length = PromptItem(0, "a", None, None, later=((1.0, "b"),)), video_length(plan, 48, given_frames=0)
    check_timelines(plan, [item], length, given_frames=0)
    assert (f"on_switch={on_switch} changes nothing: policy Mine" in caplog.text) == is_told


@pytest.mark.parametrize("tail", [-1, 4])
def test_a_tail_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, tail: int) -> None:
    """Before anything is forgotten: three frames are remembered."""
    monkeypatch.setattr(Mine, "tail_frames", lambda self, num_frames, has_forgotten, chunk_frames: tail)
    cache = make_tiny().cache(Mine())
    cache.seen_frames, cache.layer(0).store.length = 3, 3 * make_tiny().geometry.frame_tokens
    with pytest.raises(ValueError, match=f"Mine.tail_frames says {tail} of 3 remembered frames"):
        cache.forget_newest()
    assert cache.seen_frames == 3


def test_a_budget_that_leaves_nothing_to_choose_is_told() -> None:
    """Sink and recent frames may be the whole budget: that is Deep Sink in all but name."""
    settings = {"window_frames": 21, "budget_frames": 16, "recent_frames": 4}
    words = [build_policy("participative", settings | {"sink_frames": n}).notice for n in (10, 11, 12)]
    assert words[:2] == [None, None] and "sink_frames=12 and recent_frames=4 are the whole budget" in words[2]


def test_a_broken_file_is_left_out(tmp_path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With its name and the error, and all other policies are there."""
    (tmp_path / "mine.py").write_text("import torc\n")
    (tmp_path / "mine_too.py").write_text("raise ValueError('no')\n")
    monkeypatch.setattr(wan.kv_cache.policies, "__path__", [str(tmp_path), *wan.kv_cache.policies.__path__])
    caplog.set_level(logging.WARNING)
    wan.kv_cache.policies.import_all()
    assert "mine_too.py cannot be imported, so its policy is not there: ValueError: no" in caplog.text
    assert "mine.py cannot be imported, so its policy is not there: ModuleNotFoundError: No module named" in caplog.text
    assert importlib.import_module("wan.kv_cache.policies.sink") and build_policy("rolling", {"window_frames": 3})


def test_two_policies_of_one_name_end_the_run(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one is meant cannot be known, whichever file is read first."""
    (tmp_path / "again.py").write_text(
        "from wan.kv_cache.policy import register\n\n\n@register('rolling')\nclass Again:\n    pass\n"
    )
    monkeypatch.setattr(wan.kv_cache.policies, "__path__", [str(tmp_path), *wan.kv_cache.policies.__path__])
    with pytest.raises(ValueError, match="'rolling' is registered twice: wan.kv_cache.policies.rolling and .*again"):
        wan.kv_cache.policies.import_all()
