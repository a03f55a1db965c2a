"""PackForcing when the prompt changes: what goes with the newest chunks, what is made anew, what stays."""
from __future__ import annotations

import pytest
import torch
from conftest import make_tiny, policy_of
from test_packforcing import PACK

from pipeline.chunkwise import ChunkwisePipeline
from pipeline.timeline import PromptSwitch
from wan.geometry import ChunkSpan
from wan.kv_cache.archive import EMPTY
from wan.kv_cache.policies.packforcing import PackForcing


def switching(settings: dict, on_switch: str):
    """A pipeline with its compressor, and the same once more."""
    tiny, policy = make_tiny(height=64, dtype=torch.float64), policy_of(settings)
    pipelines = [tiny.pipeline(policy) for _ in range(2)]
    for pipeline in pipelines:
        pipeline.on_switch = on_switch
    return tiny, policy, *pipelines


def archived(pipeline: ChunkwisePipeline, layer: int = 1) -> dict[int, torch.Tensor]:
    """First frame -> keys of its packet."""
    archive = pipeline.cache.layer(layer).archive
    return {
        start: archive.keys[0, place].clone() for place, start in enumerate(archive.start.tolist()) if start != EMPTY
    }


def assert_seen_once(pipeline: ChunkwisePipeline, policy: PackForcing) -> None:
    """The chunk in the making sees as many packets as there may be, and no frame both whole and in a packet."""
    layer = pipeline.cache.layer(0)
    full = layer.store.origin[0, layer.plan.attend[0, ::pipeline.geometry.frame_tokens]].tolist()
    shown = [] if layer.plan.packets is None else layer.archive.start[layer.plan.packets[0]].tolist()
    compressed = [start for start in archived(pipeline) if start not in full[policy.sink_frames:]]
    assert len(set(shown)) == len(shown) == min(policy.top_chunks, len(compressed)) and set(shown) <= set(compressed)
    assert not {start + i for start in shown for i in range(3)} & set(full)


SWITCHED = {
    "one recent chunk": PACK, "two, a larger sink": PACK | {"sink_frames": 6, "recent_frames": 6},
    "the least archive": PACK | {"archive_chunks": 3}, "a stream": PACK | {"compressor": "latent_pool"},
    "projected": PACK | {"compressor": "latent_pool", "compressed_kv": "project", "archive_chunks": 0},
}


@pytest.mark.parametrize("on_switch", ["recache", "flush_recent", "reset_sink"])
@pytest.mark.parametrize("settings", SWITCHED.values(), ids=SWITCHED)
@pytest.mark.parametrize("chunks", [3, 9])
def test_a_new_prompt_takes_packets_with_their_chunks(settings: dict, on_switch: str, chunks: int) -> None:
    """The newest frames' packets go as they go and are made anew as they are, older ones stay: as if a pipeline had
    forgotten those chunks and remembered them once more. Then the chunks that follow, frame by frame.
    """
    tiny, policy, ours, other = switching(settings, on_switch)
    noise, texts, made = tiny.noise(), [other.model.embed_text(tiny.text(seed)) for seed in (0, 5)], []
    switch = PromptSwitch(3 * chunks, tiny.text(5))
    tracks = [pipeline.prompt_track(tiny.text(0), [switch]) for pipeline in (ours, other)]
    for span in tiny.geometry.chunks(3 * chunks):
        for pipeline, track in zip((ours, other), tracks, strict=True):
            latents = pipeline.denoise(span, texts[0], noise)
            pipeline.remember(latents, texts[0])
            track.note(span, latents)
        made.append(latents)
    before, remembered = archived(ours), ours.cache.layer(0).store.length // tiny.geometry.frame_tokens
    tracks[0].text_at(3 * chunks)
    tail = policy.tail_frames(remembered, True, 3)
    old = {start for start in before if start < 3 * chunks - tail}
    if on_switch == "reset_sink":
        other.cache.forget_all()
        tail, old = min(3 * chunks, other.cache.most_frames), set()
    else:
        assert tail == remembered - min(policy.sink_frames, remembered) and other.cache.forget_newest() == tail
    if on_switch == "flush_recent":
        assert set(archived(ours)) == old
    else:
        sizes, latents = [tail % 3] * (tail % 3 > 0) + [3] * (tail // 3), torch.cat(made, dim=1)[:, -tail:]
        for index, x in enumerate(latents.split(sizes, dim=1) if tail else ()):
            span = ChunkSpan(0, 3 * chunks - tail + sum(sizes[:index]), sizes[index])
            other.cache.begin(span)
            other.model.remember(x, torch.zeros(x.shape[:2]), texts[1], other.cache)
            assert_seen_once(other, policy)
            if other.packer is not None:
                other.packer.remember(x, texts[1])
            other.cache.commit()
    after = archived(ours)
    assert all(torch.equal(after[start], before[start]) for start in old)
    if on_switch == "recache":
        assert set(after) == set(before)
        same = all(torch.equal(after[start], before[start]) for start in set(before) - old)
        assert same == (policy.compressed_kv == "project")  # which reads no prompt
    for span in [ChunkSpan(index, 3 * index, 3) for index in range(chunks, chunks + 5)]:
        a, b = (pipeline.denoise(span, texts[1], noise) for pipeline in (ours, other))
        assert torch.equal(a, b)
        assert_seen_once(ours, policy)
        for pipeline in (ours, other):
            pipeline.remember(a, texts[1])


@pytest.mark.parametrize("given", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("sink_frames", [0, 3, 6])
def test_no_frame_is_lost_after_given_ones(given: int, sink_frames: int) -> None:
    """After an image or a clip chunks begin between the sink's multiples: still each frame is whole or in a packet."""
    policy = policy_of(PACK | {"sink_frames": sink_frames, "recent_frames": 6, "archive_chunks": 0})
    tiny = make_tiny(height=64)
    pipeline, odd = tiny.pipeline(policy), given % 3
    clip = torch.randn(1, given, 3, 8, 6)
    for frames in range(given + 3, given + 25, 3):
        tiny.run(policy, frames, pipeline=pipeline, initial_latent=clip)
        store = pipeline.cache.layer(0).store
        whole = set(store.origin[0, :store.length].tolist())
        packed = {start + i for start in archived(pipeline) for i in range(3)}
        lost = set(range(frames)) - whole - packed
        assert lost == set() or (sink_frames == 0 and lost == set(range(odd)))  # no sink, and no whole chunk
