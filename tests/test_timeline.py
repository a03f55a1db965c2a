"""Laws of prompts that change in mid-video: when, for which frames, and what the memory holds afterwards."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import EVERY_POLICY, SMALL, Tiny, make_tiny, policy_of
from reference import ReferenceModel, Schedule, attention, rotate, token_grid
from torch.testing import assert_close

from pipeline.noise import SampleSeed
from pipeline.timeline import PromptSwitch, switch_frames
from utils.prompts import PromptError, load_prompts
from utils.timelines import TimelineError
from wan.geometry import ChunkSpan
from wan.kv_cache.cache import KVCache
from wan.kv_cache.policy import KVPolicy

SWITCHES = ("keep", "recache", "flush_recent", "reset_sink")
LONGLIVE = {"policy": "sink", "window_frames": 12, "sink_frames": 3, "positions": "original"}
FRAMES = 30


def roll(tiny: Tiny, policy: KVPolicy, on_switch: str, frames: int = FRAMES, *, at=(), texts=(5,), batch: int = 1,
         noise=None, pipeline=None) -> torch.Tensor:
    """Latents of a rollout whose prompt becomes texts[i] at frame at[i]."""
    seeds = [SampleSeed(0, sample) for sample in range(batch)]
    pipeline = pipeline or tiny.pipeline(policy, batch)
    pipeline.on_switch = on_switch
    switches = [PromptSwitch(frame, tiny.text(text, batch)) for frame, text in zip(at, texts, strict=False)]
    chunks = pipeline(
        tiny.text(0, batch), frames, noise or tiny.noise(*seeds), [seed.key() for seed in seeds], switches=switches,
    )
    return torch.cat([chunk.latents for chunk in chunks], dim=1)


# --- what is generated -------------------------------------------------------------------------------------

@pytest.mark.parametrize("on_switch", SWITCHES)
def test_nothing_changes_before_the_switch_and_everything_after(policy: KVPolicy, tiny: Tiny, on_switch: str) -> None:
    """The new prompt begins with the first chunk that starts at the moment or later: frame 16 is chunk 18."""
    plain, switched = roll(tiny, policy, on_switch), roll(tiny, policy, on_switch, at=(16,))
    assert torch.equal(plain[:, :18], switched[:, :18])
    assert (plain[:, 18:] - switched[:, 18:]).abs().amax(dim=(0, 2, 3, 4)).min() > 1e-4
    assert switched.isfinite().all()


@pytest.mark.parametrize("on_switch", SWITCHES)
def test_a_switch_leaves_no_trace_in_the_next_video(policy: KVPolicy, tiny: Tiny, on_switch: str) -> None:
    """Reset is complete after a timeline as well, bit for bit."""
    used = tiny.pipeline(policy)
    roll(tiny, policy, on_switch, at=(7, 20), texts=(3, 4), pipeline=used)
    again = roll(tiny, policy, on_switch, at=(16,), pipeline=used)
    assert torch.equal(again, roll(tiny, policy, on_switch, at=(16,)))


def test_the_four_ways_differ(policy: KVPolicy, tiny: Tiny) -> None:
    """After a switch in the middle of a long video each treatment of the memory gives another one, whatever the policy.

    Where a chunk sees no sink (an anchor is for joint windows), recache keeps nothing that reset_sink does not.
    """
    has_sink = "sink_frames" in vars(policy)
    made = {way: roll(tiny, policy, way, 21, at=(16,))[:, 18:] for way in SWITCHES}
    for i, one in enumerate(SWITCHES):
        for other in SWITCHES[:i]:
            same = (one, other) == ("reset_sink", "recache") and not has_sink
            assert ((made[one] - made[other]).abs().max() < 1e-4) == same, (one, other)


def test_keep_equals_a_loop_that_changes_the_text(tiny: Tiny) -> None:
    """Two roads: a timeline, and passes that are given the other text from frame 12 on."""
    policy = policy_of(EVERY_POLICY["deep_forcing"])
    pipeline, noise = tiny.pipeline(policy), tiny.noise()
    pipeline.cache.reset([SampleSeed(0).key()])
    parts = []
    for span in tiny.geometry.chunks(FRAMES):
        text = pipeline.model.embed_text(tiny.text(5 if span.start >= 12 else 0))
        parts.append(pipeline.denoise(span, text, noise))
        pipeline.remember(parts[-1], text)
    assert torch.equal(torch.cat(parts, dim=1), roll(tiny, policy, "keep", at=(12,)))


def test_samples_of_a_batch_change_their_own_prompts(tiny: Tiny) -> None:
    """A batch of two with different later prompts equals two batches of one; 1e-5 as in the contract."""
    policy, seeds = policy_of(LONGLIVE), [SampleSeed(0, 0), SampleSeed(0, 1)]
    later = torch.cat([tiny.text(5), tiny.text(6)])
    pipeline = tiny.pipeline(policy, 2)
    pipeline.on_switch = "recache"
    chunks = pipeline(tiny.text(0, 2), FRAMES, tiny.noise(*seeds), [0, 0], switches=[PromptSwitch(15, later)])
    together = torch.cat([chunk.latents for chunk in chunks], dim=1)
    for sample, seed in enumerate(seeds):
        alone = roll(tiny, policy, "recache", at=(15,), texts=(5 + sample,), noise=tiny.noise(seed))
        assert_close(together[sample:sample + 1], alone, rtol=0, atol=1e-5)


# --- what is remembered ------------------------------------------------------------------------------------

def memory_around(tiny: Tiny, policy: KVPolicy, on_switch: str, chunks: int) -> tuple[list, list, int]:
    """(keys, origin) of every layer before and after a switch that follows `chunks` chunks, and the tail's frames."""
    pipeline, noise = tiny.pipeline(policy), tiny.noise()
    pipeline.on_switch = on_switch
    pipeline.cache.reset([0])
    track = pipeline.prompt_track(tiny.text(0), [PromptSwitch(3 * chunks, tiny.text(5))])
    for index in range(chunks):
        span = ChunkSpan(index, 3 * index, 3)
        latents = pipeline.denoise(span, track.text_at(span.start), noise)
        pipeline.remember(latents, track.text)
        track.note(span, latents)

    def look() -> list:
        stores = [pipeline.cache.layer(i).store for i in range(SMALL.num_layers)]
        return [(s.keys[0, :s.length].clone(), s.origin[0, :s.length].clone()) for s in stores]

    before, cache = look(), pipeline.cache
    frames = len(before[0][1]) // tiny.geometry.frame_tokens
    tail = policy.tail_frames(frames, cache.seen_frames > frames, 3)
    track.text_at(3 * chunks)
    return before, look(), tail


def window_times(cache: KVCache, span: ChunkSpan) -> dict[int, int]:
    """Latent frame -> its window time, of what `span` sees and of itself, for tokens in their frames' order."""
    cache.begin(span)
    tokens = span.frames * make_tiny().geometry.frame_tokens
    for index in range(SMALL.num_layers):
        cache.layer(index).extend(*(torch.ones(1, tokens, SMALL.num_heads, SMALL.head_dim) for _ in range(3)))
    layer = cache.layer(0)
    seen = zip(layer.store.origin[0, layer.plan.attend[0]].tolist(), layer.plan.position[0].tolist(), strict=True)
    return dict(seen) | {span.start + i: layer.plan.query_position + i for i in range(span.frames)}


@pytest.mark.parametrize("chunks", range(4, 12))
@pytest.mark.parametrize("name", ["rolling", "naive_sink", "deep_sink", "deep_sink_contiguous", "deep_forcing"])
def test_frames_computed_anew_stand_where_they_stood(tiny: Tiny, name: str, chunks: int) -> None:
    """Computed jointly, each frame is as far from the sinks and from the others as a chunk would have seen it; after a
    prune these are other distances, but never wider ones.
    """
    policy = policy_of(EVERY_POLICY[name])
    cache = tiny.cache(policy)
    for index in range(chunks):
        before = window_times(cache, ChunkSpan(index, 3 * index, 3))
        cache.commit()
    again = cache.spans_again(3 * chunks - (frames := cache.forget_newest()), frames)
    after = window_times(cache, again[0])
    assert len(again) == 1 and frames >= 3
    known = sorted(before.keys() & after.keys())
    assert known[-3:] == [3 * chunks - 3, 3 * chunks - 2, 3 * chunks - 1]
    places = [[times[frame] - times[known[-1]] for frame in known] for times in (before, after)]
    assert name == "deep_forcing" or places[0] == places[1]
    assert name == "naive_sink" or max(after.values()) - min(after.values()) < policy.window_frames + 3


@pytest.mark.parametrize("chunks", [1, 3, 4, 9])
@pytest.mark.parametrize("on_switch", SWITCHES)
def test_what_is_remembered_after_a_switch(policy: KVPolicy, tiny: Tiny, on_switch: str, chunks: int) -> None:
    """Sinks and compressed tokens stay as they were unless reset; the tail is kept, computed anew, or forgotten."""
    before, after, tail = memory_around(tiny, policy, on_switch, chunks)
    tokens, seen = tiny.geometry.frame_tokens, 3 * chunks
    for layer, ((keys, origin), (new_keys, new_origin)) in enumerate(zip(before, after, strict=True)):
        edge = len(origin) - tail * tokens
        newest = torch.arange(seen - tail, seen, dtype=torch.int32).repeat_interleave(tokens)
        assert torch.equal(origin[edge:], newest)  # the tail is whole frames, in order, up to the newest
        if on_switch == "reset_sink":
            sizes = policy.sizes(tiny.geometry)
            window = min(seen, min(sizes.window_tokens, sizes.capacity_tokens - 3 * tokens) // tokens)
            assert torch.equal(new_origin, torch.arange(seen - window, seen).int().repeat_interleave(tokens))
            continue
        kept = edge if on_switch == "flush_recent" else len(origin)
        assert torch.equal(new_origin, origin[:kept])
        untouched = len(origin) if on_switch == "keep" else edge
        assert torch.equal(new_keys[:untouched], keys[:untouched])
        if on_switch == "recache" and tail:
            changed = (new_keys[edge:] - keys[edge:]).abs().max()
            assert changed > 1e-5 if layer else changed >= 0  # the first layer's keys have not read the text yet


class LongLive:
    """LongLive's cache and re-cache in float64, from their description: true positions, frames by name."""

    def __init__(self, tiny: Tiny, sink: int, window: int):
        self.model = ReferenceModel(tiny.model.state_dict(), dataclasses.asdict(SMALL))
        _, self.row, self.col = token_grid(1, tiny.geometry.rows, tiny.geometry.columns)
        self.sink, self.window = sink, window
        self.slots = [{} for _ in range(SMALL.num_layers)]  # frame -> (key, value), in order of the slots

    def turn(self, x, frame):
        return rotate(x, torch.full((len(x),), frame), self.row, self.col)

    def run(self, x, t, text, start, own, protected=()):
        """Frames start .. attend to the slots and to those of their own frames that `own` names; returns the flow.

        What they leave behind replaces the slots of `own`, except `protected` ones, whose old keys are attended to.
        """
        left = []

        def attend(layer, q, k, v):
            q, k, v = (part.split(len(self.row)) for part in (q, k, v))
            new = {start + i: (key, value) for i, (key, value) in enumerate(zip(k, v, strict=True)) if start + i in own}
            new |= {frame: self.slots[layer][frame] for frame in protected}
            seen = self.slots[layer] | new
            left.append(new)
            keys = torch.cat([self.turn(key, frame) for frame, (key, _) in seen.items()])
            query = torch.cat([self.turn(part, start + i) for i, part in enumerate(q)])
            return attention(query, keys, torch.cat([value for _, value in seen.values()]))

        return self.model.forward(x, torch.full((len(x),), t, dtype=torch.float64), text, attend), left

    def roll(self, start, frames):
        """Make room for `frames` new ones: the first `sink` slots are pinned, the oldest others go."""
        for slots in self.slots:
            pinned = list(slots)[:self.sink]
            while len(slots) + frames > self.window:
                del slots[next(frame for frame in slots if frame not in pinned)]


def longlive_reference(tiny: Tiny, texts, noise, switch: int, frames: int, *, global_sink: bool) -> torch.Tensor:
    cache, schedule = LongLive(tiny, 3, 12), Schedule(5.0)
    times, clean = schedule.passes([1000, 500], True), []
    text = cache.model.text(texts[0][0])
    for span in tiny.geometry.chunks(frames):
        own = range(span.start, span.stop)
        if span.start == switch:
            text, t = cache.model.text(texts[1][0]), span.start
            if not global_sink:
                cache.slots = [{} for _ in cache.slots]
            n = min(12, t)
            own_again = range(t - n, t) if not global_sink else range(max(3, t - 9), t)
            pinned = range(min(3, t)) if global_sink else ()
            for slots in cache.slots:
                for frame in [frame for frame in slots if frame not in pinned]:
                    del slots[frame]
            _, left = cache.run(torch.cat(clean)[-n:], 0.0, text, t - n, own_again, pinned)
            for slots, new in zip(cache.slots, left, strict=True):
                slots |= new
        cache.roll(span.start, span.frames)
        x = noise.draw(span, 0)[0]
        for step, time in enumerate(times):
            flow, _ = cache.run(x, time, text, span.start, own)
            x0 = x - schedule.sigma(time) * flow
            if step + 1 < len(times):
                sigma = schedule.sigma(times[step + 1])
                x = (1 - sigma) * x0 + sigma * noise.draw(span, step + 1)[0]
        _, left = cache.run(x0, 0.0, text, span.start, own)
        for slots, new in zip(cache.slots, left, strict=True):
            slots |= new
        clean.append(x0)
    return torch.cat(clean)


class Draws:
    """float64 noise, so that both sides go on from the same numbers."""

    def __init__(self, tiny: Tiny):
        self._noise = tiny.noise()

    def draw(self, chunk: ChunkSpan, index: int) -> torch.Tensor:
        return self._noise.draw(chunk, index).double()


@pytest.mark.parametrize("switch", [3, 9, 12, 18])
@pytest.mark.parametrize("on_switch", ["recache", "reset_sink"])
def test_recache_is_longlives(on_switch: str, switch: int) -> None:
    """A switch before the window is full and after, with the sink kept and without; every chunk that follows."""
    tiny = make_tiny(dtype=torch.float64)
    ours = roll(tiny, policy_of(LONGLIVE), on_switch, 27, at=(switch,), noise=Draws(tiny))
    expected = longlive_reference(
        tiny, (tiny.text(0), tiny.text(5)), Draws(tiny), switch, 27, global_sink=on_switch == "recache",
    )
    assert_close(ours[0], expected, rtol=0, atol=1e-9)


# --- moments -----------------------------------------------------------------------------------------------

def test_moments_become_the_frames_that_show_them() -> None:
    """16 pixel frames a second, 4 a latent frame: 2.5 s is pixel frame 40, in latent frame 10."""
    g = make_tiny().geometry
    starts = [span.start for span in g.chunks(30)]
    assert switch_frames(g, [2.5, 5.0], starts, g.pixel_frames(30)) == [10, 20]
    assert [g.frame_at(t) for t in (0, 1 / 16, 4 / 16, 5 / 16)] == [0, 1, 1, 2]


@pytest.mark.parametrize("times, words", [
    ([7.4], "begins at 7.4 s, and no chunk of this video of 7.3125 s"),
    ([7.2], "no chunk of this video .* the last one does at 6.5625 s, .* Lower the time to that"),
    ([6.8], "no chunk of this video"),
    ([0.01], "prompt at 0.01 s begins in the same chunk"),
    ([2.5, 2.6], "prompt at 2.6 s begins in the same chunk .* leave 0.75 s"),
])
def test_moments_that_no_chunk_can_show_are_refused(times: list, words: str) -> None:
    """After the end, in the last chunk after its start, or two in one chunk, of which the first may be the first."""
    g = make_tiny().geometry
    starts = [span.start for span in g.chunks(30)]
    with pytest.raises(TimelineError, match=words):
        switch_frames(g, times, starts, g.pixel_frames(30))


def test_the_last_moment_that_is_named_is_taken() -> None:
    """It is when the last chunk that the file shows begins; chunks that are cut off whole show no prompt."""
    g = make_tiny().geometry
    starts = [span.start for span in g.chunks(30)]
    assert switch_frames(g, [6.5625], starts, g.pixel_frames(30)) == [27]
    shorter = g.pixel_frames(27)  # the file ends where the chunk from frame 27 on begins
    with pytest.raises(TimelineError, match="the last one does at 5.8125 s"):
        switch_frames(g, [6.1], starts, shorter)
    assert switch_frames(g, [5.8125], starts, shorter) == [24]


# --- files -------------------------------------------------------------------------------------------------

def load(path: Path, text: str, **options):
    path.write_text(text)
    return load_prompts(prompt=None, data_path=path, extended_prompt_path=options.get("extended"), i2v=False)


ENTRIES = '{"time": 0, "prompt": "a  cat"}', '{"time": 5, "prompt": "a dog"}', '{"time": 7.5, "prompt": "both"}'


def test_all_ways_to_write_a_timeline_give_the_same(tmp_path: Path) -> None:
    """A .jsonl of moments, a .jsonl of videos, a .yaml of moments, a .yaml of videos."""
    expected = ("a cat", ((5.0, "a dog"), (7.5, "both")))
    listed = f"[{', '.join(ENTRIES)}]"
    ways = {
        "a.jsonl": "\n\n".join(ENTRIES), "b.jsonl": f'{{"timeline": {listed}}}\n', "c.yaml": listed,
        "d.yml": "\n".join(f"- {entry}" for entry in ENTRIES), "e.yaml": f"- {listed}\n",
    }
    for name, text in ways.items():
        [item] = load(tmp_path / name, text)
        assert (item.prompt, item.later) == expected
        assert item.texts == ("a cat", "a dog", "both")


def test_timelines_and_prompts_mix_and_repeats_are_told_apart(tmp_path: Path) -> None:
    """One file may hold both; videos that differ in a later prompt alone are two videos."""
    other = ENTRIES[1].replace("dog", "cow")
    lines = ['{"prompt": "a cat"}', *(f'{{"timeline": [{ENTRIES[0]}, {second}]}}' for second in (ENTRIES[1], other))]
    items = load(tmp_path / "p.jsonl", "\n".join([*lines, lines[1]]))
    assert [item.later for item in items] == [(), ((5.0, "a dog"),), ((5.0, "a cow"),)]


@pytest.mark.parametrize("text, words", [
    ('{"time": 1, "prompt": "a"}', "first time is 1, and a video begins at 0"),
    ('{"time": 1, "prompt": "a"}\n{"time": 0, "prompt": "b"}', "time 0 follows 1. Put the prompts in order"),
    ('{"time": 0, "prompt": "a", "time": 2}', "line 1: 'time' stands there twice"),
    ('{"prompt": "a", "prompt": "b"}', "line 1: 'prompt' stands there twice"),
    ('{"timeline": [{"time": 0, "prompt": "a", "prompt": "b"}]}', "line 1: 'prompt' stands there twice"),
    ('{"time": 0, "prompt": "a"}\n{"time": 0, "prompt": "b"}', "time 0 follows 0"),
    ('{"time": 0, "prompt": "a"}\n{"time": "5", "prompt": "b"}', "prompt 2: time is '5', and a number"),
    ('{"time": 0, "prompt": "a"}\n{"time": NaN, "prompt": "b"}', "prompt 2: time is nan"),
    ('{"time": 0, "prompt": "a"}\n{"time": -1, "prompt": "b"}', "prompt 2: time is -1"),
    ('{"time": 0, "prompt": " "}', "prompt is ' ', and text is wanted"),
    ('{"time": 0}', "has no 'prompt'"),
    ('{"time": 0, "promt": "a"}', "unknown key 'promt'. Did you mean 'prompt'?"),
    ('{"time": 0, "prompt": "a"}\n{"prompt": "b"}', "prompt 2: has no 'time'"),
    ('{"prompt": "b"}\n{"time": 0, "prompt": "a"}', "line 2: unknown key 'time'"),
    ('{"timeline": []}', "line 1: a timeline is a list"),
    ('{"timeline": [{"time": 0, "prompt": "a"}], "prompt": "b"}', "has a timeline and a prompt"),
    ('{"timeline": ["a"]}', "prompt 1 is 'a', and {time, prompt} is wanted"),
])
def test_bad_timelines_say_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    """Each names the place, what is there, and what is wanted."""
    with pytest.raises(PromptError) as error:
        load(tmp_path / "t.jsonl", text)
    assert words in str(error.value) and "t.jsonl" in str(error.value)


def test_bad_yaml_timelines_say_what_is_wrong(tmp_path: Path) -> None:
    """The same for .yaml; a broken one is named with its line, and extended prompts do not go with timelines."""
    wanted, deep = "a timeline is a list", ("[" * 3000, "nested too deeply")
    twice = "- {time: 0, prompt: a}\n- {time: 5, prompt: b,\n   prompt: c}", "t.yaml:3: .*duplicate key prompt"
    for text, words in (("a: 1", wanted), ("[1", "t.yaml:1: not valid YAML"), ("", wanted), deep, twice):
        with pytest.raises(ValueError, match=words):
            load(tmp_path / "t.yaml", text)
    (tmp_path / "long.txt").write_text("long\n")
    with pytest.raises(PromptError, match="used as it stands"):
        load(tmp_path / "u.yaml", f"[{ENTRIES[0]}, {ENTRIES[1]}]", extended=tmp_path / "long.txt")
