"""Joint denoising and overlapping clips, step by step against references that keep no cache.

Both references know the network of reference.py and nothing else of the project. What a clean chunk left behind is
worked out anew whenever it is looked at, by replaying every context pass from the first chunk on. All in float64.
"""
from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from conftest import EVERY_POLICY, SMALL, Tiny, make_tiny, policy_of
from reference import ReferenceModel, Schedule, attention, rotate, token_grid
from torch.testing import assert_close

from pipeline.causvid import CausVidOverlapPipeline, Clips
from pipeline.loops import make_loop
from pipeline.noise import SampleSeed
from pipeline.rolling_forcing import RollingForcingPipeline
from pipeline.sampler import FewStepSampler
from wan.geometry import ChunkSpan

EXACT = {"rtol": 0, "atol": 1e-9}  # float64; the two sides sum in another order, the schedule table is float32
SEEDS = (SampleSeed(0), SampleSeed(1))
ROLLING_STEPS, CAUSVID_STEPS = [1000, 800, 600, 400, 200], [1000, 757, 522]


class Draws:
    """Noise by (chunk, pass), drawn when first asked for; both sides ask for the same."""

    def __init__(self, tiny: Tiny, batch: int = 1):
        g = tiny.geometry
        self.shape = (batch, g.chunk_frames, SMALL.in_dim, g.latent_height, g.latent_width)

    def at(self, chunk: int, index: int) -> torch.Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(97 * chunk + index), dtype=torch.float64)

    def draw(self, chunk: ChunkSpan, index: int) -> torch.Tensor:
        return self.at(chunk.index, index)


class Slow:
    """The network, and attention over whatever frames are named, each at a position that is named."""

    def __init__(self, tiny: Tiny, text: torch.Tensor):
        self.model = ReferenceModel(tiny.model.state_dict(), dataclasses.asdict(SMALL))
        self.text, self.calls = self.model.text(text[0]), []
        _, self.row, self.col = token_grid(1, tiny.geometry.rows, tiny.geometry.columns)

    def turn(self, frame, position):
        return rotate(frame, torch.full((len(frame),), position), self.row, self.col)

    def forward(self, x, times, past, positions, start, note=True):
        """Flow of frames x [F, C, h, w] that sit at start, start + 1, ...; past: [layer][frame] -> (key, value).

        Returns the flow, and what the frames would leave behind, [layer][frame] -> (key, value).
        """
        left = []

        def attend(layer, q, k, v):
            q, k, v = (part.split(len(self.row)) for part in (q, k, v))
            keys = [self.turn(key, at) for (key, _), at in zip(past[layer], positions, strict=True)]
            keys += [self.turn(key, start + i) for i, key in enumerate(k)]
            left.append(list(zip(k, v, strict=True)))
            query = torch.cat([self.turn(part, start + i) for i, part in enumerate(q)])
            return attention(query, torch.cat(keys), torch.cat([value for _, value in past[layer]] + list(v)))

        times = torch.tensor(times, dtype=torch.float64)
        flow = self.model.forward(x, times, self.text, attend)
        if note:
            self.calls.append((x, times))
        return flow, left

    def remembered(self, chunks, seen):
        """Replay every clean chunk's context pass: [layer][frame]; seen(frames before, in this chunk) -> frames."""
        memory, begins = [[] for _ in range(self.model.layers)], 0
        for x in chunks:
            frames = seen(begins, len(x))
            past = [[layer[f] for f in frames] for layer in memory]
            _, left = self.forward(x, [0.0] * len(x), past, frames, begins, note=False)
            memory = [old + new for old, new in zip(memory, left, strict=True)]
            begins += len(x)
        return memory


def watch(tiny: Tiny) -> list:
    """Every denoising forward of our model from now on: latents [B, F, C, h, w] and timesteps [B, F]."""
    calls = []

    def note(_, arguments: tuple) -> None:
        if arguments[1].min() > 0:  # a context pass is seen in what every later forward makes of it
            calls.append(arguments[:2])

    tiny.model.register_forward_pre_hook(note)
    return calls


def assert_same_calls(ours: list, reference: list) -> None:
    """Every denoising forward saw the same latents at the same timesteps, in the same order."""
    reference = [(x, t) for x, t in reference if t.min() > 0]
    assert len(ours) == len(reference)
    for (x, t), (expected_x, expected_t) in zip(ours, reference, strict=True):
        assert_close(x[0].double(), expected_x, **EXACT)
        assert_close(t[0].double(), expected_t, rtol=0, atol=1e-4)  # ours are float32 numbers of up to 1,000


# --- Rolling Forcing ---------------------------------------------------------------------------------------

def rolling_reference(slow: Slow, draws: Draws, num_chunks: int, chunk: int, window: int, anchor: int) -> list:
    """Final latents of each chunk; levels by place in the window, the anchor just before the working cache."""
    schedule = Schedule(5.0)
    levels = schedule.passes(ROLLING_STEPS, True)
    joint = len(levels)

    def clean_sees(before, frames):  # the last `window` frames of a cache that pins the anchor and rolls the rest
        rolled = range(max(anchor, before + frames - window), before + frames)
        return [f for f in [*range(min(anchor, before)), *rolled][-window:] if f < before]

    noisy, clean = {}, []
    final = [None] * num_chunks
    for w in range(num_chunks + joint - 1):
        first, last = max(0, w - joint + 1), min(num_chunks - 1, w)
        if last == w:
            noisy[w] = draws.at(w, 0)[0]
        times, parts = [], []
        for b in range(first, last + 1):
            times += [levels[w - b]] * chunk
            parts.append(noisy[b])
        start, length = first * chunk, (last - first + 1) * chunk
        memory = slow.remembered(clean, clean_sees)
        working = list(range(max(anchor, start - (window - length - anchor)), start))
        pinned = list(range(min(anchor, start)))
        positions = [start - len(working) - len(pinned) + i for i in pinned] + working
        past = [[layer[f] for f in pinned + working] for layer in memory]
        flow, _ = slow.forward(torch.cat(parts), times, past, positions, start)
        for b in range(first, last + 1):
            place = slice((b - first) * chunk, (b - first + 1) * chunk)
            x0 = noisy[b] - schedule.sigma(levels[w - b]) * flow[place]
            final[b] = x0
            if w - b + 1 < joint:
                sigma = schedule.sigma(levels[w - b + 1])
                noisy[b] = (1 - sigma) * x0 + sigma * draws.at(b, w - b + 1)[0]
        if w - first == joint - 1:
            memory = slow.remembered(clean, clean_sees)
            frames = clean_sees(start, chunk)
            past = [[layer[f] for f in frames] for layer in memory]
            slow.forward(final[first], [0.0] * chunk, past, frames, start)
            clean.append(final[first])
    return final


@pytest.mark.parametrize(
    "num_chunks, chunk, window, anchor",
    [(12, 3, 21, 3), (2, 3, 21, 3), (5, 3, 18, 3), (11, 2, 13, 2), (9, 1, 8, 2)],
    ids=["past the cache", "fewer chunks than levels", "as many", "chunks of 2", "chunks of 1"],
)
def test_rolling_forcing_step_by_step(num_chunks: int, chunk: int, window: int, anchor: int) -> None:
    """Every window's latents, noise levels and attention, ramp-up and tail included; then every chunk."""
    tiny = make_tiny(chunk, dtype=torch.float64)
    draws, text = Draws(tiny), tiny.text()
    policy = policy_of({"policy": "anchored", "window_frames": window, "anchor_frames": anchor})
    sampler = FewStepSampler(ROLLING_STEPS, shift=5.0, warp=True)
    calls = watch(tiny)
    ours = RollingForcingPipeline(tiny.model, sampler, tiny.geometry, tiny.cache(policy))
    chunks = list(ours(text, num_chunks * chunk, draws, seeds=[0]))
    slow = Slow(tiny, text)
    final = rolling_reference(slow, draws, num_chunks, chunk, window, anchor)
    assert [c.span.start for c in chunks] == [b * chunk for b in range(num_chunks)]
    for made, expected in zip(chunks, final, strict=True):
        assert_close(made.latents[0], expected, **EXACT)
    assert_same_calls(calls, slow.calls)


def rolling(tiny: Tiny, batch: int = 1) -> RollingForcingPipeline:
    policy = policy_of({"policy": "anchored", "window_frames": 21, "anchor_frames": 3})
    sampler = FewStepSampler(ROLLING_STEPS, shift=5.0, warp=True)
    return RollingForcingPipeline(tiny.model, sampler, tiny.geometry, tiny.cache(policy, batch))


def test_a_chunk_leaves_the_window_as_soon_as_it_is_clean() -> None:
    """The first chunk costs as many windows as there are levels, each later one a single window."""
    tiny = make_tiny()
    calls, costs = watch(tiny), []
    for _ in rolling(tiny)(tiny.text(), 30, tiny.noise(), seeds=[0]):
        costs.append(len(calls))
        calls.clear()
    assert costs == [5] + [1] * 9


def test_length_reaches_back_by_one_window_alone() -> None:
    """Chunks that were clean before a shorter video's tail began are those of the longer video, bit for bit."""
    tiny = make_tiny()
    short, long = (
        torch.cat([c.latents for c in rolling(tiny)(tiny.text(), n, tiny.noise(), seeds=[0])], dim=1) for n in (24, 36)
    )
    same = 24 - 4 * 3
    assert torch.equal(short[:, :same], long[:, :same])
    assert (short[:, same:] - long[:, same:24]).abs().amax() > 1e-3


def test_a_given_clip_is_continued() -> None:
    """Given frames are memory, and the first window sees them."""
    tiny = make_tiny()
    given = torch.randn(1, 7, SMALL.in_dim, tiny.geometry.latent_height, tiny.geometry.latent_width)
    chunks = list(rolling(tiny)(tiny.text(), 25, tiny.noise(), seeds=[0], initial_latent=given))
    assert [(c.span.start, c.given) for c in chunks] == [(0, True), (1, True), (4, True)] + [
        (7 + 3 * i, False) for i in range(6)
    ]
    other = list(rolling(tiny)(tiny.text(), 25, tiny.noise(), seeds=[0], initial_latent=given + 1))
    assert (chunks[3].latents - other[3].latents).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(1, 3, 3, 4, 6), (2, 3, 4, 4, 6), (2, 3, 3, 4, 8), (2, 3, 3, 8, 6), (2, 3, 4, 6)])
def test_clips_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    """One clip for each video, of the model's own latents; nothing is broadcast."""
    tiny = make_tiny()
    with pytest.raises(ValueError, match=re.escape("expected [2, frames, 3, 4, 6]: one clip for each video")):
        tiny.run(policy_of(EVERY_POLICY["rolling"]), 9, seeds=SEEDS, initial_latent=torch.randn(shape))


def test_a_look_ahead_is_never_remembered() -> None:
    """The memory refuses to keep a window that was only looked at."""
    tiny = make_tiny()
    pipeline = rolling(tiny)
    pipeline.cache.reset([0])
    pipeline.cache.begin(ChunkSpan(0, 0, 15), lookahead=True)
    with pytest.raises(RuntimeError, match="look ahead"):
        pipeline.cache.commit()


def test_a_window_too_small_for_the_steps_is_refused() -> None:
    """The joint window must fit what attention sees."""
    tiny = make_tiny()
    sampler = FewStepSampler(ROLLING_STEPS, shift=5.0, warp=True)
    for settings, words in (
        ({"policy": "anchored", "window_frames": 17, "anchor_frames": 3}, "15 frames jointly .*anchor_frames=3"),
        ({"policy": "participative", "window_frames": 21, "sink_frames": 10, "budget_frames": 16, "recent_frames": 4},
         "15 frames jointly .*recent_frames=4"),
    ):
        with pytest.raises(ValueError, match=words):
            make_loop("rolling_forcing", geometry=tiny.geometry, policy=policy_of(settings), sampler=sampler,
                      on_switch="keep", overlap_frames=3)


# --- CausVid -----------------------------------------------------------------------------------------------

class ToyCodec:
    """A causal stand-in for the VAE: latent frame f shows 1 or 4 pixel frames that depend on it and on frame f - 1."""

    def __init__(self):
        self.before = None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, F, C, h, w] -> [B, T, 3, h, w] in [-1, 1]; goes on where the last call stopped."""
        frames = []
        for x in latents.unbind(1):
            for i in range(1 if self.before is None else 4):
                before = 0 if self.before is None else self.before
                frames.append((x[:, :3] + 0.3 * before + 0.1 * i).tanh())
            self.before = x[:, :3]
        return torch.stack(frames, dim=1)

    @staticmethod
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        """[B, 1, 3, h, w] -> [B, 1, C, h, w]."""
        return 1.5 * pixels.flip(-1)


def causvid_reference(slow: Slow, draws: Draws, rollouts: int, clip: int, overlap: int, chunk: int) -> list:
    """Pixel frames shown: every clip from scratch, its last 4 (o - 1) + 1 frames dropped."""
    schedule = Schedule(8.0)
    shown, start_latents, index = [], [], 0
    for _ in range(rollouts):
        latents = []
        for x in start_latents:
            latents.append(x)
            memory = slow.remembered(latents[:-1], lambda before, _: list(range(before)))
            begins = sum(map(len, latents[:-1]))
            slow.forward(x, [0.0] * len(x), memory, list(range(begins)), begins)
            index += 1
        while sum(map(len, latents)) < clip:
            memory = slow.remembered(latents, lambda before, _: list(range(before)))
            begins = sum(map(len, latents))
            x = draws.at(index, 0)[0]
            for step, t in enumerate(CAUSVID_STEPS):
                flow, _ = slow.forward(x, [float(t)] * chunk, memory, list(range(begins)), begins)
                x0 = x - schedule.sigma(t) * flow
                if step + 1 < len(CAUSVID_STEPS):
                    sigma = schedule.sigma(CAUSVID_STEPS[step + 1])
                    x = (1 - sigma) * x0 + sigma * draws.at(index, step + 1)[0]
            slow.forward(x0, [0.0] * chunk, memory, list(range(begins)), begins)
            latents.append(x0)
            index += 1
        latents = torch.cat(latents)
        video = ToyCodec().decode(latents[None])[0]
        drop = 4 * (overlap - 1) + 1
        shown.append(video[:-drop])
        start_frame = ToyCodec.encode(video[None, -drop:][:, :1])[0]
        start_latents = torch.cat([start_frame, latents[1 - overlap:] if overlap > 1 else latents[:0]]).split(chunk)
    return torch.cat(shown)


def show(pipeline: CausVidOverlapPipeline, text: torch.Tensor, frames: int, draws: Draws) -> tuple[torch.Tensor, list]:
    """Pixel frames [T, 3, h, w] as an engine shows them, and the chunks."""
    codec, decoded, shown, chunks = None, [], [], []
    for chunk in pipeline(text, frames, draws, seeds=[0], decode=lambda latents: decoded[-1]):
        codec = ToyCodec() if chunk.restarts else codec
        decoded.append(codec.decode(chunk.latents))
        shown.append(decoded[-1][0, :chunk.shown_frames])
        chunks.append(chunk)
    return torch.cat(shown), chunks


def causvid(tiny: Tiny, clip: int, overlap: int) -> CausVidOverlapPipeline:
    sampler = FewStepSampler(CAUSVID_STEPS, shift=8.0, warp=False)
    cache = tiny.cache(policy_of({"policy": "full", "window_frames": clip}))
    clips = Clips(tiny.geometry, clip, overlap)
    return CausVidOverlapPipeline(tiny.model, sampler, tiny.geometry, cache, "keep", clips, ToyCodec.encode)


@pytest.mark.parametrize(
    "rollouts, clip, overlap, chunk", [(2, 21, 3, 3), (3, 12, 6, 3), (3, 4, 1, 1)],
    ids=["published", "overlap of two chunks", "chunks of 1"],
)
def test_causvid_step_by_step(rollouts: int, clip: int, overlap: int, chunk: int) -> None:
    """Every forward of every clip, and every pixel frame shown."""
    tiny = make_tiny(chunk, dtype=torch.float64)
    draws, text = Draws(tiny), tiny.text()
    pipeline, calls = causvid(tiny, clip, overlap), watch(tiny)
    frames = clip + (rollouts - 1) * (clip - overlap)
    shown, chunks = show(pipeline, text, frames, draws)
    slow = Slow(tiny, text)
    expected = causvid_reference(slow, draws, rollouts, clip, overlap, chunk)
    assert_same_calls(calls, slow.calls)
    assert_close(shown, expected, **EXACT)
    assert sum(c.given for c in chunks) == (rollouts - 1) * overlap // chunk


def test_three_steps_are_the_published_timesteps() -> None:
    """Unwarped timesteps; the noise level of each is the nearest that shift 8 has, t / 1000 within a step."""
    sampler = FewStepSampler(CAUSVID_STEPS, shift=8.0, warp=False)
    assert sampler.times == (1000.0, 757.0, 522.0)
    assert sampler.sigmas == pytest.approx([1.0, 0.757, 0.522], abs=2.5e-3)
    four = FewStepSampler([1000, 750, 500, 250], shift=8.0, warp=True)
    assert four.times == pytest.approx([1000, 960, 888.89, 727.27], abs=0.01)


def test_clips_show_seventy_two_frames_each() -> None:
    """The published layout: 60 s take 14 clips, 120 s 27; a video is never longer than it must be by a chunk."""
    clips = Clips(make_tiny().geometry, 21, 3)
    assert clips.shown_pixel_frames == 72
    assert [len(clips.lengths(clips.latent_frames(n))) for n in (72, 73, 960, 1920)] == [1, 2, 14, 27]
    for pixel_frames in range(1, 400):
        frames = clips.latent_frames(pixel_frames)
        *before, last = clips.lengths(frames)
        assert 72 * len(before) + min(72, clips.geometry.pixel_frames(last)) >= pixel_frames
        assert frames - clips.geometry.latent_frames(pixel_frames) < 2 * 3
        assert last > 3 or not before


def test_a_shorter_video_is_the_beginning_of_a_longer_one() -> None:
    """Clips are causal: leaving the last one early changes nothing before."""
    tiny = make_tiny(dtype=torch.float64)
    long, _ = show(causvid(tiny, 12, 3), tiny.text(), 30, Draws(tiny))
    short, _ = show(causvid(tiny, 12, 3), tiny.text(), 24, Draws(tiny))
    assert torch.equal(long[:len(short)], short)


def test_a_clips_last_chunk_is_not_remembered() -> None:
    """The next clip begins with an empty memory: a pass in vain. Clips of four and of two chunks, one of them given."""
    tiny = make_tiny()
    pipeline, passes = causvid(tiny, 12, 3), []
    remember = tiny.model.remember
    tiny.model.remember = lambda *args: passes.append(1) or remember(*args)
    show(pipeline, tiny.text(), 15, Draws(tiny))
    assert len(passes) == 3 + 1


def test_chunks_must_be_decoded_as_they_come() -> None:
    """A second clip cannot begin without the first one's pixels."""
    tiny = make_tiny()
    with pytest.raises(RuntimeError, match="decode each chunk as it comes"):
        list(causvid(tiny, 12, 3)(tiny.text(), 24, tiny.noise(), seeds=[0]))


@pytest.mark.parametrize("settings, overlap, words", [
    ({"policy": "rolling", "window_frames": 21}, 3, "kv_cache.policy=full"),
    ({"policy": "full", "window_frames": 21}, 4, "overlap_frames=4 .*whole chunks of 3"),
    ({"policy": "full", "window_frames": 21}, 21, "overlap_frames=21"),
    ({"policy": "full", "window_frames": 20}, 3, "window_frames=20: clips are whole chunks of 3 .*window_frames=18"),
])
def test_clips_that_cannot_be_made_are_refused(settings: dict, overlap: int, words: str) -> None:
    """Policy and overlap are checked before anything is loaded."""
    with pytest.raises(ValueError, match=words):
        make_loop("causvid_overlap", geometry=make_tiny().geometry, policy=policy_of(settings),
                  sampler=FewStepSampler(CAUSVID_STEPS, shift=8.0, warp=False), on_switch="keep",
                  overlap_frames=overlap)
