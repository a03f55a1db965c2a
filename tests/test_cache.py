"""The cache's life: staging, committing, forgetting; any length in flat memory."""
from __future__ import annotations

import resource
from dataclasses import replace

import pytest
import torch
from conftest import EVERY_POLICY, Tiny, make_tiny, policy_of
from test_policy_contract import walk
from torch.testing import assert_close

from wan.fp8 import FP8, MOST
from wan.geometry import ChunkSpan
from wan.kv_cache.cache import KVCache
from wan.kv_cache.policy import build_policy
from wan.kv_cache.store import CacheShape, KVStore, take
from wan.rope import time_turn, turn


def test_store_keeps_exactly_what_it_is_told() -> None:
    """Retain, with some that stay where they are and without, and append, against a list of tokens per sample."""
    generator = torch.Generator().manual_seed(0)
    store = KVStore(
        CacheShape(layers=1, heads=1, head_dim=4, batch=2, device=torch.device("cpu"), dtype=torch.float64), 40,
    )
    lists: list[list[tuple]] = [[], []]
    for step in range(12):
        keys, values = torch.randn(2, 2, 7, 1, 4, generator=generator, dtype=torch.float64)
        for slots, new in zip(store.slots(7), (keys, values), strict=True):
            slots.copy_(new)
        kept = min(store.length, 20)
        still = 3 if step % 2 else 0
        others = [torch.randperm(store.length - still, generator=generator)[:kept - still].sort() for _ in range(2)]
        retain = torch.stack([torch.cat([torch.arange(still), still + slots.values]) for slots in others])
        chosen = retain[:, 1:4] if kept > 4 else None
        for sample in range(2):
            tokens = lists[sample]
            if chosen is not None:
                for slot in chosen[sample].tolist():
                    key, value, origin, uses = tokens[slot]
                    tokens[slot] = (key, value, origin, uses + 1)
            lists[sample] = [tokens[slot] for slot in retain[sample].tolist()]
            lists[sample] += [(keys[sample, i], values[sample, i], step, 0) for i in range(7)]
        store.commit(retain=retain, chosen=chosen, origin=torch.full((7,), step, dtype=torch.int32), still=still)
        for sample in range(2):
            assert store.length == len(lists[sample])
            for slot, (key, value, origin, uses) in enumerate(lists[sample]):
                assert torch.equal(store.keys[sample, slot], key) and torch.equal(store.values[sample, slot], value)
                assert (store.origin[sample, slot], store.uses[sample, slot]) == (origin, uses)


def test_take_equals_indexing() -> None:
    """Each sample reads its own slots."""
    buffer, slots = torch.randn(3, 9, 2, 4), torch.tensor([[0, 8], [3, 4], [2, 2]])
    assert torch.equal(take(buffer, slots), torch.stack([buffer[b, slots[b]] for b in range(3)]))


def averaged_cache(dtype: torch.dtype, decay: float, chunk: torch.Tensor, chunks: int) -> KVCache:
    """A sink of zeros into which `chunk` [B, L, H, D] is averaged by `chunks` - 3 chunks that leave a window of 9."""
    tiny = make_tiny()
    policy = policy_of({"policy": "sink", "window_frames": 9, "sink_frames": 3, "sink_decay": decay})
    shape = CacheShape(layers=1, heads=2, head_dim=12, batch=1, device=torch.device("cpu"), dtype=dtype)
    cache = KVCache(shape, tiny.geometry, policy)
    for span in tiny.geometry.chunks(3 * chunks):
        cache.begin(span)
        new = chunk if span.index else torch.zeros_like(chunk)
        cache.layer(0).extend(new, new, new)
        cache.commit()
    return cache


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_averages_grow_by_what_each_chunk_adds(dtype: torch.dtype, tolerance: float) -> None:
    """After n equal chunks the sink is 1 - 0.999^n of them, in half precision too, where each adds less than rounding.

    4e-3 is one rounding of what the store shows; rounded at every step the sum would stop at half of it.
    """
    tokens = 3 * make_tiny().geometry.frame_tokens
    chunk, gone = torch.ones(1, tokens, 2, 12, dtype=dtype), 1200
    cache = averaged_cache(dtype, 0.999, chunk, gone + 3)
    expected = torch.full_like(chunk, 1 - 0.999**gone, dtype=torch.float64)
    assert_close(cache.layer(0).store.values[:, :tokens].double(), expected, rtol=tolerance, atol=0)
    rounded = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(gone):
        rounded = 0.999 * rounded + (1 - 0.999) * torch.ones_like(rounded)
    assert rounded < 0.8 * expected.flatten()[0]  # what this is for


def test_what_is_averaged_is_shown_and_kept_alike() -> None:
    """The window shows a chunk the very average that its commit will keep, and only the commit keeps it."""
    tokens = 3 * make_tiny().geometry.frame_tokens
    cache = averaged_cache(torch.float64, 0.5, torch.randn(1, tokens, 2, 12, dtype=torch.float64), 3)
    layer, (q, k, v) = cache.layer(0), torch.randn(3, 1, tokens, 2, 12, dtype=torch.float64)
    before = layer.store.values[:, :2 * tokens].clone()
    cache.begin(ChunkSpan(3, 9, 3))
    shown = layer.extend(q, k, v).values[:, :tokens].clone()
    assert torch.equal(layer.store.values[:, :2 * tokens], before)
    assert_close(shown, before[:, :tokens].lerp(before[:, tokens:], 0.5), rtol=0, atol=1e-15)
    cache.commit()
    assert torch.equal(layer.store.values[:, :tokens], shown)


def test_window_keys_are_rotated_from_the_stored_master() -> None:
    """Rotation never accumulates: after 400 chunks a sink's window key is its birth key, turned once."""
    born = None
    for step in walk(policy_of(EVERY_POLICY["deep_sink_contiguous"]), chunks=400):
        layer, view, plan, window = step
        born = layer.store.keys[:, :view.frame_tokens * 3].clone() if born is None else born
    sinks = born.shape[1]
    assert view.start == 1197 and torch.equal(layer.store.keys[:, :sinks], born)
    by = time_turn(plan.position[:, :sinks], born.shape[-1], born.dtype)
    time = by.cos.shape[-1]
    turned = torch.cat([turn(born[..., :time], by), born[..., time:]], dim=-1)
    assert plan.position[0, 0] == 3 and torch.equal(window.keys[:, :sinks], turned)


def test_ten_thousand_chunks_in_flat_memory() -> None:
    """Any length: the cache of one layer, random tokens, memory after 10,000 chunks as after 500."""
    geometry = make_tiny(height=16, width=32).geometry
    shape = CacheShape(layers=1, heads=1, head_dim=12, batch=1, device=torch.device("cpu"), dtype=torch.float32)
    cache = KVCache(shape, geometry, policy_of(EVERY_POLICY["deep_forcing"]))
    cache.reset([0])
    tokens = torch.randn(3, 1, 3 * geometry.frame_tokens, 1, 12)
    lengths = set()
    for index in range(10_000):
        cache.begin(ChunkSpan(index=index, start=3 * index, frames=3))
        window = cache.layer(0).extend(*tokens)
        cache.commit()
        if index == 500:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if index > 500:
            lengths.add(cache.layer(0).store.length)
    assert window.keys.isfinite().all()
    assert lengths == {9 * geometry.frame_tokens, 12 * geometry.frame_tokens}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000  # KiB


def test_commit_needs_a_whole_chunk(tiny: Tiny) -> None:
    """No memory is made of a chunk that some layer has not seen."""
    cache = tiny.cache(policy_of(EVERY_POLICY["rolling"]))
    cache.reset([0])
    with pytest.raises(RuntimeError, match="every layer has seen"):
        cache.commit()
    cache.begin(ChunkSpan(0, 0, 3))
    with pytest.raises(RuntimeError, match="every layer has seen"):
        cache.commit()
    with pytest.raises(ValueError, match="2 seeds for a cache of batch 1"):
        cache.reset([0, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "sinc"}, "Did you mean sink"),
        ({"policy": "sink", "window_frames": 12, "sink_framez": 3}, "Did you mean sink_frames"),
        ({"policy": "sink", "window_frames": 12}, "lacks sink_frames"),
        ({"policy": "sink", "window_frames": 12.0, "sink_frames": 3}, "is a float; int is wanted"),
        ({"policy": "sink", "window_frames": 12, "sink_frames": True}, "is a bool"),
        ({"policy": "sink", "window_frames": 12, "sink_frames": 3, "positions": "close"}, "not one of released"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    """What, got, why, what to do; before anything is allocated."""
    settings = dict(settings)
    with pytest.raises(ValueError, match=message):
        build_policy(settings.pop("policy"), settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "sink", "window_frames": 12, "sink_frames": 10}, "outside 0..9"),
        ({"policy": "sink", "window_frames": 12, "sink_frames": 3, "sink_decay": 0}, "sink_decay=0 is not above 0"),
        ({"policy": "sink", "window_frames": 12, "sink_frames": 4, "sink_decay": 0.9},
         "3 leave with every chunk, but sink_frames=4. Set sink_frames: 3, or sink_decay: 1"),
        ({"policy": "sink", "window_frames": 2, "sink_frames": 0}, "outside 3.."),
        ({"policy": "participative", "window_frames": 21, "sink_frames": 14, "budget_frames": 16, "recent_frames": 4},
         "need 18 frames, which exceeds budget_frames=16"),
        ({"policy": "participative", "window_frames": 21, "sink_frames": 10, "budget_frames": 22, "recent_frames": 4},
         "budget_frames=22 is outside"),
        ({"policy": "participative", "window_frames": 21, "sink_frames": 10, "budget_frames": 16, "recent_frames": 2},
         "recent_frames=2 is outside 3..21"),
        ({"policy": "participative", "window_frames": 21, "sink_frames": -1, "budget_frames": 16, "recent_frames": 4},
         "sink_frames=-1"),
        ({"policy": "participative", "window_frames": 21, "sink_frames": 10, "budget_frames": 16, "recent_frames": 3,
          "votes": "past"}, "no voters"),
        ({"policy": "participative", "window_frames": 21, "sink_frames": 10, "budget_frames": 16, "recent_frames": 4,
          "topc_max_reuse": -1}, "topc_max_reuse=-1"),
        ({"policy": "rolling", "window_frames": 1}, "window_frames=1"),
        ({"policy": "full", "window_frames": 0}, "window_frames=0"),
    ],
)
def test_sizes_are_checked_against_each_other(settings: dict, message: str) -> None:
    """Sizes that do not fit are refused with the numbers to change."""
    with pytest.raises(ValueError, match=message):
        policy_of(settings).sizes(make_tiny().geometry)


@pytest.mark.parametrize("sink_frames", range(0, 19))
def test_every_sink_size_runs(sink_frames: int) -> None:
    """Sinks of 0 to window - chunk, with whatever positions; the window is full and never overfull."""
    for positions in ("released", "contiguous", "original"):
        policy = policy_of({"policy": "sink", "window_frames": 21, "sink_frames": sink_frames, "positions": positions})
        for _, view, _, window in walk(policy, chunks=9):
            assert window.keys.shape[1] == min(view.start + 3, 21) * view.frame_tokens


def test_equal_budget_leaves_no_top() -> None:
    """sink + recent = budget is Deep Sink that prunes in steps: no token is chosen."""
    policy = policy_of({
        "policy": "participative", "window_frames": 12, "sink_frames": 5, "budget_frames": 9, "recent_frames": 4,
    })
    frames = [window.keys.shape[1] // view.frame_tokens for _, view, _, window in walk(policy)]
    assert frames == [3, 6, 9, 12, 9, 12, 9, 12, 9, 12]


def test_random_choice_is_a_function_of_seed_layer_chunk_and_slot() -> None:
    """Appendix D's baseline: no two layers, chunks or seeds choose alike, and each choice is uniform."""
    policy = policy_of(EVERY_POLICY["deep_forcing_random"])
    chosen = [plan.chosen for _, _, plan, _ in walk(policy, chunks=30) if plan.chosen is not None]
    assert not torch.equal(chosen[0][0], chosen[0][1])
    assert not torch.equal(chosen[0], chosen[1])
    share = torch.stack(chosen).flatten()
    lowest, highest = 4 * 6, (12 - 1) * 6  # candidates lie between sink and the one recent past frame
    assert share.min() >= lowest and share.max() < highest
    middle = (lowest + highest) / 2
    spread = (highest - lowest) / 12**0.5 / len(share) ** 0.5
    assert abs(share.double().mean() - middle) < 5 * spread


def test_narrow_memories_and_windows_round_once() -> None:
    """Keys and values in 8-bit floats: a window made of a narrow store is what rounding the store's tokens alone gives,
    what attention reads of a narrow window is the wide one rounded, and what is too large becomes the largest.
    """
    tiny = make_tiny(dtype=torch.float32)
    wide = tiny.cache_shape(1)
    shapes = {"wide": wide, "store": replace(wide, store_dtype=FP8), "window": replace(wide, window_dtype=FP8)}
    policy = policy_of({"policy": "rolling", "window_frames": 6})
    caches = {name: KVCache(shape, tiny.geometry, policy) for name, shape in shapes.items()}
    size = (1, tiny.geometry.chunk_frames * tiny.geometry.frame_tokens, wide.heads, wide.head_dim)
    generator = torch.Generator().manual_seed(0)
    windows = {}
    for span in tiny.geometry.chunks(6):
        new = [200 * torch.randn(size, generator=generator) for _ in range(3)]
        for name, cache in caches.items():
            cache.begin(span)
            for layer in range(wide.layers):
                windows[name] = cache.layer(layer).extend(*new)
            cache.commit()
    seen, narrow = windows["wide"], windows["window"]
    assert narrow.query.dtype == narrow.keys.dtype == narrow.values.dtype == FP8
    for ours, theirs in ((narrow.query, seen.query), (narrow.keys, seen.keys), (narrow.values, seen.values)):
        assert_close(ours.float(), theirs.clamp(-MOST, MOST).to(FP8).float(), rtol=0, atol=0)
    past = size[1]
    stored = caches["wide"].layer(0).store
    assert_close(
        windows["store"].values[:, :past], stored.values[:, :past].clamp(-MOST, MOST).to(FP8).float(), rtol=0, atol=0,
    )
    assert torch.equal(windows["store"].values[:, past:], seen.values[:, past:])
    assert (seen.keys.abs() > MOST).any()
