"""Where the golden files are silent: everything against a float64 reference that keeps all tokens in a list.

The reference (reference.py) shares no code with the project. Both run in float64, so they agree to the
last digits, and every kept token must be the same one.
"""
from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import SMALL, Tiny, make_tiny, policy_of
from reference import ReferenceModel, reference_rollout
from torch.testing import assert_close

from pipeline.sampler import FewStepSampler

BASE = {
    "policy": "participative", "window_frames": 12, "sink_frames": 4, "budget_frames": 9, "recent_frames": 4,
    "positions": "released", "votes": "both", "topc_max_reuse": 7,
}
SINK = {"policy": "sink", "window_frames": 12, "sink_frames": 5, "positions": "released"}


class Given:
    """Noise drawn ahead, so that both sides see the same; renoise is numbered by generated chunk."""

    def __init__(self, noise: torch.Tensor, prefilled_chunks: int, prefilled_frames: int):
        self.noise, self.chunks, self.frames = noise, prefilled_chunks, prefilled_frames

    def draw(self, chunk, index: int) -> torch.Tensor:
        if index == 0:
            return self.noise[:, chunk.start - self.frames:chunk.stop - self.frames]
        return self.fresh(chunk.index - self.chunks, index - 1, chunk.frames)

    def fresh(self, chunk_index: int, step: int, frames: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * chunk_index + step)
        shape = (self.noise.shape[0], frames, *self.noise.shape[2:])
        return torch.randn(shape, generator=generator, dtype=torch.float64)


def ours(tiny: Tiny, policy: dict, text, noise: Given, frames: int, initial, context_noise: float):
    """Latents, and per chunk the window's tokens and each layer's kept slots."""
    pipeline = tiny.pipeline(policy_of(policy), batch=len(text))
    pipeline.sampler = FewStepSampler([1000, 500], shift=5.0, warp=True, context_time=context_noise)
    layers = [pipeline.cache.layer(i) for i in range(SMALL.num_layers)]
    commit, plans = pipeline.cache.commit, []

    def watch() -> None:
        plans.append([(layer.plan, layer.store.length) for layer in layers])
        commit()

    pipeline.cache.commit = watch
    chunks = list(pipeline(text, frames, noise, seeds=[0] * len(text), initial_latent=initial))
    windows, kept = [], []
    for chunk, plans_of_layers in zip(chunks, plans, strict=True):
        tokens = chunk.span.frames * tiny.geometry.frame_tokens
        windows.append(plans_of_layers[0][0].attend.shape[1] + tokens)
        kept.append([
            [[*plan.retain[b].tolist(), *range(length, length + tokens)] for b in range(len(text))]
            for plan, length in plans_of_layers
        ])
    return torch.cat([chunk.latents for chunk in chunks], dim=1), windows, kept


def assert_agreement(
    policy: dict, *, chunk_frames: int = 3, batch: int = 1, frames: int = 30, given: int = 0, lone: bool = False,
    context_noise: float = 0,
):
    """Run both and compare latents, windows and kept tokens; returns the reference's rollout."""
    tiny = make_tiny(chunk_frames, dtype=torch.float64, independent_first_frame=lone)
    geometry = tiny.geometry
    frames = geometry.whole_chunks(frames, prefilled=given)
    generator = torch.Generator().manual_seed(11)
    shape = (SMALL.in_dim, geometry.latent_height, geometry.latent_width)
    text = torch.randn(batch, SMALL.text_len, SMALL.text_dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch, frames - given, *shape, generator=generator, dtype=torch.float64)
    initial = torch.randn(batch, given, *shape, generator=generator, dtype=torch.float64) if given else None
    spans = geometry.chunks(frames, prefilled=given)
    source = Given(noise, spans[0].index, given)
    reference = reference_rollout(
        ReferenceModel(tiny.model.state_dict(), dataclasses.asdict(SMALL)), prompt_embeds=text, noise=noise,
        renoise=lambda chunk, step: source.fresh(chunk, step, spans[chunk].frames), policy=policy,
        chunk_frames=chunk_frames, independent_first_frame=lone, initial_latent=initial, steps=(1000, 500),
        context_noise=context_noise,
    )
    latents, windows, kept = ours(tiny, policy, text, source, frames, initial, context_noise)
    assert windows == reference.window_tokens
    for chunk, expected in reference.kept:
        assert kept[chunk] == [[list(map(int, sample)) for sample in layer] for layer in expected]
    # float64 throughout; the reference sums over queries one by one, we sum them first. The schedule table is float32.
    assert_close(latents, reference.latents, rtol=0, atol=1e-9)
    return reference


@pytest.mark.parametrize("votes", ["both", "past", "denoising"])
@pytest.mark.parametrize("positions", ["released", "unified", "contiguous", "original"])
def test_positions_and_votes(positions: str, votes: str) -> None:
    """Every layout with every electorate, over several prunes."""
    reference = assert_agreement(BASE | {"positions": positions, "votes": votes})
    assert len(reference.topc) >= 3


@pytest.mark.parametrize("positions", ["released", "unified", "contiguous", "original"])
@pytest.mark.parametrize("sink_frames", [0, 1, 5, 9])
def test_sinks(sink_frames: int, positions: str) -> None:
    """From no sink to a sink that leaves room for the chunk alone."""
    assert_agreement(SINK | {"sink_frames": sink_frames, "positions": positions})


@pytest.mark.parametrize("chunk_frames, given, lone", [(3, 0, False), (1, 0, False), (2, 0, True), (3, 4, False)])
@pytest.mark.parametrize("decay", [0.7, 0.999])
def test_averaged_sinks(decay: float, chunk_frames: int, given: int, lone: bool) -> None:
    """What leaves is averaged into the sink before the chunk looks; where a first chunk is shorter, fewer frames."""
    policy = {"policy": "sink", "window_frames": 9, "sink_frames": chunk_frames, "positions": "contiguous"}
    run = {"chunk_frames": chunk_frames, "given": given, "lone": lone, "frames": 24}
    averaged = assert_agreement(policy | {"sink_decay": decay}, **run)
    still = assert_agreement(policy, **run)
    before = 7 if given else 9  # whole chunks that fit the window: nothing has left yet
    assert torch.equal(averaged.latents[:, :before], still.latents[:, :before])
    assert (averaged.latents - still.latents)[:, before:].abs().amax(dim=(0, 2, 3, 4)).min() > 1e-3 * (1 - decay)


@pytest.mark.parametrize("policy", [BASE, SINK, {"policy": "rolling", "window_frames": 12}], ids=lambda p: p["policy"])
@pytest.mark.parametrize("chunk_frames", [1, 2, 4])
def test_chunk_sizes(policy: dict, chunk_frames: int) -> None:
    """Chunks of 1, 2 and 4; with chunks of 1 the past votes span three chunks."""
    assert_agreement(policy, chunk_frames=chunk_frames, frames=24)


@pytest.mark.parametrize("chunk_frames", [1, 2])
def test_past_votes_span_several_chunks(chunk_frames: int) -> None:
    """Where a chunk is shorter than what is recent, older chunks vote with the queries of their context pass."""
    policy = BASE | {"votes": "past", "recent_frames": 5, "budget_frames": 10}
    assert_agreement(policy, chunk_frames=chunk_frames, frames=24)


def test_batches() -> None:
    """Samples with their own text and noise keep their own tokens."""
    reference = assert_agreement(BASE, batch=2)
    assert any(layer[0] != layer[1] for _, event in reference.topc for layer in event)


@pytest.mark.parametrize("limit", [0, 1])
def test_shortage_of_eligible_tokens(limit: int) -> None:
    """When too few tokens may be chosen, refused ones fill up, oldest first; a limit of 0 refuses none."""
    crowded = BASE | {"sink_frames": 2, "budget_frames": 11, "topc_max_reuse": limit}
    reference = assert_agreement(crowded, frames=36)
    short = [len(top) for _, event in reference.topc for layer in event for top in layer]
    assert set(short) == {5 * make_tiny().geometry.frame_tokens}
    if limit:
        assert max(token.uses for layer in reference.tokens for sample in layer for token in sample) > limit


@pytest.mark.parametrize("policy", [BASE, SINK], ids=lambda p: p["policy"])
@pytest.mark.parametrize("chunk_frames", [2, 3])
def test_independent_first_frame(policy: dict, chunk_frames: int) -> None:
    """Chunks of 1, n, n, ..."""
    assert_agreement(policy, chunk_frames=chunk_frames, lone=True)


@pytest.mark.parametrize("lone", [False, True])
@pytest.mark.parametrize("given", [1, 3, 5, 14])
def test_image_and_video_continuation(given: int, lone: bool) -> None:
    """Given latents enter by context passes and are then like any other memory; 14 frames already roll the window."""
    assert_agreement(BASE, given=given, lone=lone)


def test_given_latents_are_clean_whatever_the_context_noise() -> None:
    """What was generated is remembered at the timestep of `context_noise`, what was given at 0."""
    assert_agreement(BASE, given=9, context_noise=100)
