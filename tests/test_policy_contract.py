"""The laws that every cache policy keeps. A new policy joins by one line in conftest.EVERY_POLICY."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import EVERY_POLICY, Tiny, make_tiny, policy_of
from torch.testing import assert_close

from pipeline.noise import SampleSeed
from wan.geometry import ChunkSpan
from wan.kv_cache.cache import KVCache
from wan.kv_cache.policy import KVPolicy, policy_fields
from wan.kv_cache.store import CacheShape

FRAMES = 30  # ten chunks: windows of 12 frames roll or prune several times


def walk(
    policy: KVPolicy, *, chunks: int = 10, chunk_frames: int = 3, first_frame: int = 0, seed: int = 3, batch: int = 2,
):
    """Drive a one-layer cache with random q, k, v; yield (layer, view, plan, window) after each chunk's first pass."""
    tiny = make_tiny(chunk_frames=chunk_frames)
    shape = CacheShape(layers=1, heads=2, head_dim=12, batch=batch, device=torch.device("cpu"), dtype=torch.float64)
    cache = KVCache(shape, tiny.geometry, policy)
    cache.reset(list(range(batch)))
    generator = torch.Generator().manual_seed(seed)
    for index in range(chunks):
        cache.begin(ChunkSpan(index=index, start=first_frame + index * chunk_frames, frames=chunk_frames))
        tokens = chunk_frames * tiny.geometry.frame_tokens
        layer = cache.layer(0)
        q, k, v = torch.randn(3, batch, tokens, 2, 12, generator=generator, dtype=torch.float64)
        window = layer.extend(q, k, v)
        yield layer, layer.view(), layer.plan, window
        layer.extend(q + 1, k, v)
        cache.commit()


def test_plan_is_pure(policy: KVPolicy) -> None:
    """Asked twice with the same view, a policy answers the same, and leaves the store as it was."""
    for layer, view, plan, _ in walk(policy):
        before = layer.store.keys.clone()
        again = policy.plan(view)
        assert torch.equal(again.attend, plan.attend) and torch.equal(again.position, plan.position)
        assert again.query_position == plan.query_position
        assert torch.equal(layer.store.keys, before)


def test_slots_are_sorted_unique_and_in_range(policy: KVPolicy) -> None:
    """Retained slots ascend strictly and exist; attended ones are among them."""
    for layer, _, plan, _ in walk(policy):
        for sample in range(plan.retain.shape[0]):
            retain = plan.retain[sample].tolist()
            assert retain == sorted(set(retain)) and retain[:plan.still] == list(range(plan.still))
            assert not retain or retain[0] >= 0 and retain[-1] < layer.store.length
            assert set(plan.attend[sample].tolist()) <= set(retain)


def test_the_shapes_of_a_stream_repeat(policy: KVPolicy) -> None:
    """Once the window has filled, the host numbers that decide shapes run through one short cycle for ever."""
    if policy.max_frames is not None:
        return
    numbers = [
        (view.length, plan.attend.shape[1], plan.retain.shape[1], plan.query_position, view.seen_frames,
         view.packets and view.packets.known, plan.packets is not None and plan.packets.shape[1])
        for _, view, plan, _ in walk(policy, chunks=60)
    ]
    assert set(numbers[20:40]) == set(numbers[40:])
    assert len(set(numbers[40:])) <= 12


def test_window_and_capacity_are_never_exceeded(policy: KVPolicy) -> None:
    """What sizes() promised before allocation holds for every chunk."""
    geometry = make_tiny().geometry
    sizes = policy.sizes(geometry)
    for layer, _, _, window in walk(policy):
        assert window.keys.shape[1] <= sizes.window_tokens
        assert layer.store.length + window.query.shape[1] <= sizes.capacity_tokens == layer.store.capacity


def test_positions_before_forgetting_are_true(policy: KVPolicy) -> None:
    """Until something is forgotten every token sits at the frame that it was born in."""
    seen = 0
    for _, view, plan, _ in walk(policy):
        if plan.retain.shape[1] == view.seen_frames * view.frame_tokens:
            origin = torch.take_along_dim(view.origin.long(), plan.attend, dim=1)
            assert torch.equal(plan.position, origin)
            assert plan.query_position == view.start
            seen += 1
    assert seen >= 3


SINKS = {  # frames of those policies that keep their first ones for ever
    name: settings[key] for name, settings in EVERY_POLICY.items() for key in ("sink_frames", "anchor_frames")
    if key in settings
}


@pytest.mark.parametrize("name", SINKS)
def test_sinks_are_always_attended(name: str) -> None:
    """A policy sees all tokens of its first frames in every chunk; an anchor is kept, and seen when looking ahead."""
    policy, most = policy_of(EVERY_POLICY[name]), 0
    for _, view, plan, _ in walk(policy):
        wanted = min(SINKS[name], view.num_frames) * view.frame_tokens
        sink = torch.arange(wanted).expand(2, -1)
        assert torch.equal(plan.retain[:, :wanted], sink)
        seen = policy.plan(replace(view, lookahead=True)) if "anchor_frames" in EVERY_POLICY[name] else plan
        assert torch.equal(seen.attend[:, :wanted], sink)
        most = max(most, wanted)
    assert most == SINKS[name] * view.frame_tokens > 0


def test_the_tail_is_whole_and_newest(policy: KVPolicy) -> None:
    """What a new prompt may forget: frames in a row that end with the newest, each whole, none of them a sink."""
    sinks = getattr(policy, "sink_frames", getattr(policy, "anchor_frames", 0))
    for _, view, _, _ in walk(policy):
        tail = policy.tail_frames(view.num_frames, view.has_forgotten, view.chunk_frames)
        assert 0 <= tail <= max(0, view.num_frames - sinks)
        kept = view.origin[:, view.length - tail * view.frame_tokens:].unflatten(1, (tail, view.frame_tokens))
        assert torch.equal(kept, (view.start - torch.arange(tail, 0, -1)).view(1, -1, 1).expand_as(kept).int())


def test_the_newest_frame_is_always_attended(policy: KVPolicy) -> None:
    """Chunks join seamlessly because each sees the frame before it."""
    for _, view, plan, _ in walk(policy):
        if view.num_frames:
            newest = torch.arange(view.length - view.frame_tokens, view.length).expand(2, -1)
            assert torch.equal(plan.attend[:, -view.frame_tokens:], newest)


def test_moving_every_origin_changes_nothing(policy: KVPolicy) -> None:
    """RoPE is relative: a stream that began 1,000 frames later shows attention the same window."""
    for (_, _, plan, window), (_, _, moved_plan, moved) in zip(
        walk(policy), walk(policy, first_frame=1000), strict=True,
    ):
        assert torch.equal(plan.attend, moved_plan.attend)
        scores = torch.einsum("blhd,bshd->bhls", window.query, window.keys)
        moved_scores = torch.einsum("blhd,bshd->bhls", moved.query, moved.keys)
        assert_close(scores, moved_scores, rtol=1e-9, atol=1e-9)


def test_second_prompt_equals_a_fresh_process(policy: KVPolicy, tiny: Tiny) -> None:
    """Reset is complete: nothing of prompt A is visible in prompt B, bit for bit."""
    used = tiny.pipeline(policy)
    tiny.run(policy, FRAMES, text=1, seeds=(SampleSeed(9),), pipeline=used)
    again = tiny.run(policy, FRAMES, text=2, pipeline=used)
    assert torch.equal(again, tiny.run(policy, FRAMES, text=2))


def test_a_longer_video_begins_with_the_shorter_one(policy: KVPolicy, tiny: Tiny) -> None:
    """Length is asked for, never felt: the first frames do not depend on how many follow."""
    assert torch.equal(tiny.run(policy, FRAMES)[:, :18], tiny.run(policy, 18))


def test_samples_of_a_batch_do_not_see_each_other(policy: KVPolicy) -> None:
    """A batch of two equals two batches of one; 1e-5: matrix products round differently by batch size."""
    tiny = make_tiny()
    seeds = (SampleSeed(1, 0), SampleSeed(1, 1))
    together = tiny.run(policy, FRAMES, seeds=seeds)
    alone = torch.cat([tiny.run(policy, FRAMES, seeds=(seed,)) for seed in seeds])
    assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_an_aborted_chunk_leaves_no_trace(policy: KVPolicy, tiny: Tiny) -> None:
    """A chunk broken off in any pass and redone with another seed and prompt equals one never begun."""
    straight = tiny.run(policy, FRAMES)
    pipeline = tiny.pipeline(policy)
    noise, other = tiny.noise(), tiny.noise(SampleSeed(77))
    pipeline.cache.reset([SampleSeed(0).key()])
    text, wrong = pipeline.model.embed_text(tiny.text(0)), pipeline.model.embed_text(tiny.text(5))
    parts = []
    for span in tiny.geometry.chunks(FRAMES):
        rejected = pipeline.denoise(span, wrong, other)
        pipeline.model.remember(rejected, torch.zeros(1, 3), wrong, pipeline.cache)  # not committed
        parts.append(pipeline.denoise(span, text, noise))
        pipeline.remember(parts[-1], text)
    assert torch.equal(torch.cat(parts, dim=1), straight)


def test_every_registered_policy_is_under_contract() -> None:
    """No policy escapes this file."""
    assert {settings["policy"] for settings in EVERY_POLICY.values()} == set(policy_fields())
