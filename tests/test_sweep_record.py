"""Recordings of a sweep: watching changes nothing, and what was chosen is what the reference chooses."""
from __future__ import annotations

import torch
from conftest import SMALL, policy_of
from reference import ReferenceModel, reference_rollout
from test_against_reference import BASE, Given

from evaluation.sweep.record import Recorded, Watcher
from evaluation.sweep.recorded import frequency, jaccard_distances


def watched(tiny, policy, frames=30, layers=(0, 1)):
    """A rollout with and without a watcher on it."""
    pipeline, noise, seeds = tiny.pipeline(policy), tiny.noise(), [0]
    plain = torch.cat([c.latents for c in pipeline(tiny.text(), frames, noise, seeds)], 1)
    kernels = [block.self_attn.backend for block in tiny.model.blocks]
    watcher, latents = Watcher(pipeline, layers), []
    with watcher.watching():
        for chunk in pipeline(tiny.text(), frames, tiny.noise(), seeds):
            watcher.next_chunk(chunk.span.frames)
            latents.append(chunk.latents)
    assert [block.self_attn.backend for block in tiny.model.blocks] == kernels
    assert not tiny.model._forward_hooks
    return watcher, plain, torch.cat(latents, 1)


def test_watching_changes_no_bit_and_shares_are_whole(tiny, policy):
    """For every policy: same latents, nothing left behind, each query's attention sums to one over what it may see."""
    watcher, plain, seen = watched(tiny, policy)
    assert torch.equal(plain, seen)
    attention = watcher.tensors()["attention"]
    assert attention.shape == (10, 2, SMALL.num_heads, 30)
    torch.testing.assert_close(attention.sum(-1), torch.ones(10, 2, SMALL.num_heads))
    if policy == policy_of({"policy": "rolling", "window_frames": 12}):  # 9 frames of past, 3 of its own
        assert (attention[-1, ..., :18] == 0).all() and (attention[-1, ..., 18:] > 0).all()
    if policy.compression is not None:  # chunks are shown whole or not at all
        for layer, chosen in enumerate(watcher.tensors()["chosen"][-1]):
            shown = [attention[-1, layer, :, start:start + 3] for start in chosen.tolist() if start >= 0]
            assert len(shown) >= 2 and all((share > 0).all() for share in shown)
        assert watcher.event_chunks[-1] == 9


def test_chosen_tokens_are_those_of_the_reference(tiny):
    """Two roads to which tokens are left: our indices, followed from chunk to chunk, and the reference's records."""
    frames, geometry = 24, tiny.geometry
    tiny.model.double()
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(1, SMALL.text_len, SMALL.text_dim, generator=generator, dtype=torch.float64)
    shape = (1, frames, SMALL.in_dim, geometry.latent_height, geometry.latent_width)
    source = Given(torch.randn(shape, generator=generator, dtype=torch.float64), 0, 0)
    config = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
    reference = reference_rollout(
        ReferenceModel(tiny.model.state_dict(), config), prompt_embeds=text, noise=source.noise, policy=BASE,
        renoise=lambda chunk, step: source.fresh(chunk, step, 3), steps=(1000, 500),
    )
    watcher = Watcher(tiny.pipeline(policy_of(BASE)), [0])
    with watcher.watching():
        for chunk in watcher.pipeline(text, frames, source, [0]):
            watcher.next_chunk(chunk.span.frames)
    for ours, (theirs,) in zip(watcher._tokens, reference.tokens, strict=True):
        places = [(t.frame * geometry.rows + t.row) * geometry.columns + t.col for t in theirs]
        assert ours.tolist() == [int(place) for place in places]
    assert watcher.event_chunks == [chunk for chunk, _ in reference.topc]
    assert set(watcher.chosen[-1][0].tolist()) <= set(range(frames * geometry.frame_tokens))


def test_jaccard_by_hand():
    chosen = torch.tensor([[[1, 2], [1, 2]], [[2, 3], [1, 2]], [[4, 5], [2, 1]]])  # [events, layers, C]
    torch.testing.assert_close(jaccard_distances(chosen), torch.tensor([[2 / 3, 0.0], [1.0, 0.0]]))


def test_frequency_by_hand():
    """Eight choices of two layers, among tokens of three frames of 2 x 2."""
    chosen = torch.tensor([[[0, 4], [3, 8]], [[7, 3], [4, 5]]])  # [events, layers, C]
    recorded = Recorded(torch.zeros(0), [0, 1], chosen, [1, 2], {"rows": 2, "columns": 2})
    torch.testing.assert_close(frequency(recorded), torch.tensor([[4 / 8, 1 / 8], [0.0, 3 / 8]]))
