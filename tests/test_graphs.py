"""Replayed passes leave what the passes themselves would have left, on the device and on the host.

A recorder for the CPU stands in for CUDA graphs: it records every operation with its tensors and numbers, and a
replay repeats them on the same tensors. A number that should have been part of a graph's key shows at once.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import EVERY_POLICY, Tiny, make_tiny, policy_of
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.chunkwise import ChunkwisePipeline
from pipeline.loops import make_loop
from pipeline.noise import SampleSeed
from pipeline.sampler import FewStepSampler
from wan import compiler
from wan.compiler import inductor
from wan.kv_cache.cache import KVCache
from wan.kv_cache.policy import KVPolicy

FRAMES = 30
SEEDS = (SampleSeed(1), SampleSeed(2))


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


def storages(values) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, Tensor)}


class TapeRecorder:
    """What CudaRecorder is on a GPU; recording happens to run the function, so the first replay is over already."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        with _Tape() as tape:
            function()
        pending = [True]

        def replay() -> None:
            if pending:
                pending.clear()
                return
            self.replayed += 1
            for operation, args, kwargs, result in tape.calls:
                inputs = storages((args, kwargs))
                for old, new in zip(tree_leaves(result), tree_leaves(operation(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and not storages(old) & inputs:
                        old.copy_(new)

        return replay


def graphed(tiny: Tiny, policy: KVPolicy, batch: int = 2) -> tuple[ChunkwisePipeline, TapeRecorder]:
    plain, tape = tiny.pipeline(policy, batch), TapeRecorder()
    fast = ChunkwisePipeline(plain.model, plain.sampler, plain.geometry, plain.cache, recorder=tape)
    return tiny.with_packer(fast, policy), tape


def host_state(cache: KVCache) -> list[tuple]:
    layers = [cache.layer(i) for i in range(2)]
    return [
        (cache.seen_frames, x.state.length, x.state.known_frames, x.plan is None, x._moment is None) for x in layers
    ]


def test_replayed_chunks_equal_eager_ones(policy: KVPolicy) -> None:
    """Latents, what is remembered by then and the host's state, chunk by chunk, bit for bit; three videos, so that
    even beginnings replay.
    """
    tiny = make_tiny()
    (fast, tape), eager = graphed(tiny, policy), tiny.pipeline(policy, 2)
    for video in range(3):
        runs = [
            pipeline(tiny.text(video, 2), FRAMES, tiny.noise(*SEEDS), [s.key() for s in SEEDS])
            for pipeline in (fast, eager)
        ]
        for ours, plain in zip(*runs, strict=True):
            assert ours.span == plain.span and torch.equal(ours.latents, plain.latents)
            assert host_state(fast.cache) == host_state(eager.cache)
            for index in range(2):
                stores = [pipeline.cache.layer(index).store for pipeline in (fast, eager)]
                for mine, its in zip(*(store._columns() for store in stores), strict=True):
                    assert torch.equal(mine[:, :stores[1].length], its[:, :stores[1].length])
        assert host_state(fast.cache) == host_state(eager.cache) and fast.cache.seen_frames == FRAMES
    assert tape.replayed >= tape.recorded > 2


def test_replays_come_and_go_from_common_states(policy: KVPolicy) -> None:
    """Each chunk begins from another pipeline's memory, its own left behind half-done; what was chosen is known."""
    tiny = make_tiny()
    (fast, tape), eager = graphed(tiny, policy), tiny.pipeline(policy, 2)
    text, noise = eager.model.embed_text(tiny.text(1, 2)), tiny.noise(*SEEDS)
    for _ in range(3):
        eager.cache.reset([1, 2])
        for span in tiny.geometry.chunks(FRAMES):
            fast.cache.copy_memory_of(eager.cache)
            latents = eager.denoise(span, text, noise)
            assert torch.equal(fast.denoise(span, text, noise), latents)
            assert torch.equal(fast.denoise(span, text, noise), latents)
            for index in range(2):
                mine, its = (pipeline.cache.layer(index).plan for pipeline in (fast, eager))
                assert torch.equal(mine.retain, its.retain) and torch.equal(mine.attend, its.attend)
                assert (mine.chosen is None) == (its.chosen is None)
                assert mine.chosen is None or torch.equal(mine.chosen, its.chosen)
            eager.remember(latents, text)
    assert tape.replayed > 10


def test_given_frames_and_other_chunks_have_graphs_of_their_own() -> None:
    """A context pass that plans differs from one that follows denoising, and a first frame alone from a chunk."""
    policy = policy_of(EVERY_POLICY["deep_forcing"])
    tiny = make_tiny(independent_first_frame=True)
    (fast, _), eager = graphed(tiny, policy, 1), tiny.pipeline(policy, 1)
    for given in (None, torch.randn(1, 4, 3, 4, 6), None, torch.randn(1, 4, 3, 4, 6), None, torch.randn(1, 4, 3, 4, 6)):
        ours, plain = (
            tiny.run(policy, 31, pipeline=pipeline, initial_latent=given) for pipeline in (fast, eager)
        )
        assert torch.equal(ours, plain)


def test_sources_of_several_windows_and_videos_without_one_take_turns(policy: KVPolicy) -> None:
    """A given chunk is planned by its context pass, a generated one by its first denoising pass: what follows them is
    alike, and reads the plan where its own chunk left it.
    """
    if policy.max_frames is not None:
        policy = policy_of({"policy": "full", "window_frames": 45})
    tiny = make_tiny()
    (fast, _), eager = graphed(tiny, policy, 1), tiny.pipeline(policy, 1)
    for video, frames in enumerate((30, 0, 18)):
        given = torch.randn(1, frames, 3, 4, 6, generator=torch.Generator().manual_seed(video)) if frames else None
        ours, plain = (tiny.run(policy, 45, pipeline=pipeline, initial_latent=given) for pipeline in (fast, eager))
        assert torch.equal(ours, plain), f"video {video}, which continues {frames} latent frames"


class GoneRecorder:
    """Replays by running again, after a look at what the recording read from outside: a graph keeps addresses alone."""

    def __init__(self) -> None:
        self.kept: list[torch.UntypedStorage] = []  # the pool: what was made while recording stays
        self.replayed = self.gone = 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        with _Tape() as tape:
            function()
        made, outside = {x._cdata for x in self.kept}, []
        for operation, args, kwargs, result in tape.calls:
            read = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            written = [x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor)]
            if operation is torch.ops.aten.lift_fresh.default:  # a number becomes a tensor
                read = []
            outside += [weakref.ref(x) for x in read if x._cdata not in made]
            fresh = [x for x in written if x._cdata not in {x._cdata for x in read}]
            made |= {x._cdata for x in fresh}
            self.kept += fresh
        pending = [True]

        def replay() -> None:
            if pending:
                pending.clear()
                return
            self.replayed += 1
            self.gone += any(seen() is None for seen in outside)
            function()

        return replay


def test_recorded_work_reads_only_what_stays(policy: KVPolicy) -> None:
    """Memory, inputs at fixed addresses, what other recordings made: never what a pass outside of them left behind."""
    if policy.max_frames is not None:
        policy = policy_of({"policy": "full", "window_frames": 42})
    tiny, recorder = make_tiny(), GoneRecorder()
    plain = tiny.pipeline(policy, 1)
    fast = ChunkwisePipeline(plain.model, plain.sampler, plain.geometry, plain.cache, recorder=recorder)
    fast = tiny.with_packer(fast, policy)
    for given in (torch.randn(1, 18, 3, 4, 6), None, None):
        tiny.run(policy, 42, pipeline=fast, initial_latent=given)
    assert recorder.replayed and not recorder.gone


@pytest.mark.parametrize("name, settings", [
    ("rolling_forcing", EVERY_POLICY["anchored"]), ("causvid_overlap", {"policy": "full", "window_frames": 12}),
])
def test_other_loops_are_replayed_as_well(name: str, settings: dict) -> None:
    """Joint windows and clips, bit for bit; two videos, of which the second replays beginnings, too."""
    tiny, policy, tape = make_tiny(), policy_of(settings), TapeRecorder()
    sampler = FewStepSampler([1000, 500], shift=5.0, warp=True)
    loop = make_loop(name, geometry=tiny.geometry, policy=policy, sampler=sampler, on_switch="keep", overlap_frames=3)
    made = []
    for recorder in (None, tape):
        pipeline = loop.pipeline(tiny.model, tiny.cache(policy, 2), lambda pixels: pixels[..., :4, :6] / 2, recorder)
        for video in range(2):
            chunks = pipeline(
                tiny.text(video, 2), FRAMES, tiny.noise(*SEEDS), [s.key() for s in SEEDS],
                decode=lambda latents: latents.repeat_interleave(4, dim=1),
            )
            made.append(torch.cat([chunk.latents for chunk in chunks], dim=1))
    assert torch.equal(torch.stack(made[2:]), torch.stack(made[:2]))
    assert tape.recorded > 4 and tape.replayed > 4


def test_a_shared_window_equals_one_for_each_layer(policy: KVPolicy) -> None:
    """Filled again at every pass, from a store that did not change: the same bits."""
    tiny = make_tiny()
    plain = tiny.pipeline(policy)
    shape = plain.cache.layer(0).store
    cache = KVCache(tiny.cache_shape(1), tiny.geometry, policy, shared_window=True)
    shared = tiny.with_packer(ChunkwisePipeline(plain.model, plain.sampler, plain.geometry, cache), policy)
    assert cache.layer(0).window is cache.layer(1).window and shape.capacity == cache.layer(0).store.capacity
    assert torch.equal(tiny.run(policy, FRAMES, pipeline=shared), tiny.run(policy, FRAMES))


def test_joined_projections_keep_names_and_values() -> None:
    """One product of three; the parameters are views of it, so a load goes through to it."""
    tiny = make_tiny(dtype=torch.float64)
    attention, x = tiny.model.blocks[0].self_attn, torch.randn(2, 5, 32, dtype=torch.float64)
    before, names = attention.project(x), list(tiny.model.state_dict())
    values = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    attention.join()
    for ours, apart in zip(attention.project(x), before, strict=True):
        assert_close(ours, apart, rtol=0, atol=1e-12)
    assert list(tiny.model.state_dict()) == names
    assert all(torch.equal(value, values[name]) for name, value in tiny.model.state_dict().items())
    tiny.model.load_state_dict({name: value * 2 for name, value in values.items()})
    assert_close(attention.project(x)[2], 2 * before[2], rtol=0, atol=1e-12)


def test_compiled_passes_equal_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole, without a break, and run as traced; all layers, chunks and prompts share a few graphs."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    compiler.compiled.cache_clear()
    torch._dynamo.reset()
    policy, tiny = policy_of(EVERY_POLICY["deep_forcing"]), make_tiny()
    plain = tiny.run(policy, FRAMES)
    torch._dynamo.utils.counters.clear()
    tiny.model.accelerate(inductor)
    pipeline = tiny.pipeline(policy)
    cache = KVCache(tiny.cache_shape(1), tiny.geometry, policy, compiler=inductor)
    traced = ChunkwisePipeline(pipeline.model, pipeline.sampler, pipeline.geometry, cache)
    assert_close(tiny.run(policy, FRAMES, pipeline=traced), plain, rtol=0, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    tiny.run(policy, FRAMES, text=1, pipeline=traced)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs <= 13
    compiler.compiled.cache_clear()
