"""The float64 reference against the published code's own numbers, and against positions worked out by hand.

`golden/` holds short rollouts of the released code on tiny random models (float32). A rollout's beginning does
not depend on its length, so the first 30 to 36 frames are compared.
"""
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from reference import Memory, ReferenceModel, Schedule, attention, choose, chunk_sizes, reference_rollout, rotate
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"
CLOSE = dict(rtol=0, atol=1e-5)       # float32 against float64; a wrong eps already costs 2e-5
RELEASED = dict(window_frames=21, sink_frames=10, positions="released")
SINK = dict(RELEASED, policy="sink")
PARTICIPATIVE = dict(RELEASED, policy="participative", recent_frames=4, budget_frames=16, votes="both",
                     topc_max_reuse=7)


@cache
def golden(name):
    """(tensors, header) of one golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}, dict(file.metadata())


@cache
def tiny(cfg):
    tensors, header = golden(f"model_{cfg}")
    return ReferenceModel({name.removeprefix("model."): t for name, t in tensors.items()}, json.loads(header["config"]))


def rollout(cfg, policy, frames, *, given=None):
    """The golden inputs of `cfg` up to `frames`; `given` [1, F0, ...] replaces the first F0 generated frames."""
    tensors, _ = golden(f"inputs_{cfg}")
    skip = 0 if given is None else given.shape[1]
    return reference_rollout(
        tiny(cfg), prompt_embeds=tensors["prompt_embeds"], noise=tensors["noise"][:, skip:frames], policy=policy,
        renoise=lambda chunk, step: tensors["renoise"][chunk + skip // 3, step][None], initial_latent=given)


GOLDEN_RUNS = [
    ("sf_fifo_A", dict(policy="rolling", window_frames=21), 30),
    ("sf_naive_sink3_A", dict(policy="sink", window_frames=21, sink_frames=3, positions="original"), 30),
    ("ds_sink10_B", SINK, 30),
    ("pc_s10_b16_r4_reuse2_B", dict(PARTICIPATIVE, topc_max_reuse=2), 36),
]


@cache
def golden_run(name):
    """(rollout, golden tensors, generated chunks) of one row of GOLDEN_RUNS."""
    policy, frames = next((policy, frames) for row, policy, frames in GOLDEN_RUNS if row == name)
    return rollout(name[-1], policy, frames), golden(f"rollout_{name}")[0], frames // 3


@pytest.mark.parametrize("name", [name for name, _, _ in GOLDEN_RUNS])
def test_rollout_equals_the_released_code(name):
    """Every policy reproduces the released latents, flows and window sizes."""
    mine, theirs, chunks = golden_run(name)
    torch.testing.assert_close(mine.latents, theirs["latents"][:, :3 * chunks].double(), **CLOSE)
    torch.testing.assert_close(torch.cat(mine.flow_first), theirs["flow_first"][:chunks].double(), **CLOSE)
    torch.testing.assert_close(torch.cat(mine.flow_last), theirs["flow_last"][:chunks].double(), **CLOSE)
    assert [[n] * 5 for n in mine.window_tokens] == theirs["window_tokens"][:chunks].tolist()


@pytest.mark.parametrize("name", ["ds_sink10_B", "pc_s10_b16_r4_reuse2_B"])
def test_window_clock_equals_the_released_sink_base(name):
    """The absolute frame at which the released code puts its sinks is s - query_position."""
    mine, theirs, chunks = golden_run(name)
    base = [3 * index - position for index, position in enumerate(mine.query_positions)]
    expected = theirs["sink_base"][:chunks].tolist()
    assert max(expected) > 0
    assert base == [max(frame, 0) for frame in expected]       # -1 there: sinks have not moved yet


def test_selection_equals_the_released_code():
    """Scores agree before refusal; kept and top-C indices agree exactly, refusals included."""
    mine, theirs, chunks = golden_run("pc_s10_b16_r4_reuse2_B")
    events = [chunk for chunk in theirs["prune_chunk"].tolist() if chunk < chunks]
    assert events == [7, 9, 11]
    assert [chunk for chunk, _ in mine.kept] == [chunk for chunk, _ in mine.topc] == events
    for event, (kept, topc, scores) in enumerate(zip(mine.kept, mine.topc, mine.scores, strict=True)):
        for layer in range(tiny("B").layers):
            assert kept[1][layer] == [theirs["keep_idx"][event, layer].tolist()]
            assert topc[1][layer] == [theirs["topc_idx"][event, layer].tolist()]
            expected = theirs["scores"][event, layer, :theirs["prune_T"][event]].double()
            spread = expected[expected.isfinite()].std().item()
            torch.testing.assert_close(scores[1][layer][0], expected, rtol=0, atol=1e-5 * spread)


def test_the_golden_selection_depends_on_refusal():
    """Without a reuse limit the third event chooses otherwise, and the first two do not."""
    free = rollout("B", dict(PARTICIPATIVE, topc_max_reuse=0), 36)
    limited, _, _ = golden_run("pc_s10_b16_r4_reuse2_B")
    assert [a == b for a, b in zip(free.kept, limited.kept, strict=True)] == [True, True, False]


def test_schedule_equals_the_released_table():
    """The table is float32 and exact; a step of 500 is 833.3333129882812, not 833.33."""
    theirs, _ = golden("schedule")
    schedule = Schedule(5.0)
    assert torch.equal(schedule.sigmas, theirs["sigmas"]) and torch.equal(schedule.timesteps, theirs["timesteps"])
    assert schedule.passes((1000, 750, 500, 250), True) == theirs["warped_denoising_timesteps"].tolist()
    assert schedule.passes((1000, 757, 522), False) == [1000.0, 757.0, 522.0]


@pytest.mark.parametrize("cfg", ["A", "B"])
def test_forward_equals_the_released_code(cfg):
    """Two chunks through the network: every recorded intermediate, the flow, and x0."""
    theirs = {name: t.double() for name, t in golden(f"forward_{cfg}")[0].items()}
    model, mine, past = tiny(cfg), {}, [[] for _ in range(tiny(cfg).layers)]
    text = model.text(theirs["prompt_embeds"][0])
    mine["context"], mine["patch_embed1"] = text[None], model.patchify(theirs["x1"][0])[None]
    mine["time_proj1"] = model.time(theirs["t1"][0])[1].flatten(1)
    for chunk, first in ((1, 0), (2, 3)):
        x, t = theirs[f"x{chunk}"][0], theirs[f"t{chunk}"][0]
        seen = {}

        def attend(layer, q, k, v, x=x, first=first, seen=seen):
            rows, cols = x.shape[2] // 2, x.shape[3] // 2
            index = torch.arange(len(q))
            place = first + index // (rows * cols), index // cols % rows, index % cols
            past[layer].append((rotate(k, *place), v))
            keys, values = (torch.cat(parts) for parts in zip(*past[layer], strict=True))
            seen[layer] = attention(rotate(q, *place), keys, values)
            return seen[layer]

        flow = model.forward(x, t, text, attend)
        mine[f"flow{chunk}"] = flow[None]
        mine[f"x0_{chunk}"] = (x - Schedule(5.0).sigma(t[0]) * flow)[None]
        mine[f"l0_k_roped_chunk{chunk}"] = past[0][-1][0][None]
        e0 = model.time(t)[1].repeat_interleave(len(seen[0]) // len(x), 0)
        replay = model.block(0, model.patchify(x), e0, text, lambda layer, q, k, v, seen=seen: seen[layer])
        mine[f"block0_out{chunk}"] = replay[None]
        if chunk == 1:
            mine["l0_v_chunk1"] = past[0][-1][1][None]
            mine["block0_selfattn_out1"] = model.linear("blocks.0.self_attn.o", seen[0].flatten(-2))[None]
    for name in sorted(set(theirs) - {"prompt_embeds", "x1", "x2", "t1", "t2"}):
        torch.testing.assert_close(mine[name], theirs[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_rotation_is_relative_on_each_axis():
    """Moving query and key alike, on any axis and to negative times, leaves their products as they are."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 2, 20, dtype=torch.float64)
    place = torch.randint(-9, 9, (2, 3, 7))
    product = (rotate(q, *place[0]) * rotate(k, *place[1])).sum(-1)
    moved = place + torch.tensor([-1000, 3, 5])[:, None]
    torch.testing.assert_close((rotate(q, *moved[0]) * rotate(k, *moved[1])).sum(-1), product, rtol=0, atol=1e-10)
    for axis in range(3):
        turned = place[1].clone()
        turned[axis] += 1
        assert ((rotate(q, *place[0]) * rotate(k, *turned)).sum(-1) - product).abs().max() > 1e-3


# --- the cache alone: one layer, two tokens a frame, random queries, keys and values ---------------------

def drive(policy, sizes):
    """Memory after chunks of `sizes` frames: one noisy pass and one context pass each."""
    draw = torch.Generator().manual_seed(3)
    memory = Memory(policy, 1, 1, 2)
    for frames in sizes:
        memory.begin(frames)
        for memory.commit in (False, True):
            qkv = torch.randn(3, 2 * frames, 2, 12, dtype=torch.float64, generator=draw)
            memory.attend(0, *qkv)
            memory.first = False
        memory.seen += frames
    return memory


def frames_in_window(policy, sizes):
    return [tokens // 2 for (tokens,) in drive(policy, sizes).window_tokens]


@pytest.mark.parametrize(("policy", "chunk", "expected"), [
    (SINK, 3, [21, 21, 21, 21, 21, 21, 21]),
    (PARTICIPATIVE, 3, [21, 16, 19, 16, 19, 16, 19]),
    (dict(PARTICIPATIVE, budget_frames=18), 3, [21, 18, 21, 18, 21, 18, 21]),
    (dict(PARTICIPATIVE, budget_frames=15), 3, [21, 15, 18, 21, 15, 18, 21]),
    (PARTICIPATIVE, 2, [20, 16, 18, 20, 16, 18, 20]),
    (PARTICIPATIVE, 1, [21, 16, 17, 18, 19, 20, 21, 16]),
    (dict(policy="full"), 3, [21, 24, 27]),
    (dict(policy="rolling", window_frames=21), 2, [20, 21, 21]),
])
def test_window_follows_the_published_table(policy, chunk, expected):
    """From the last chunk that still fits: the window rolls, or is pruned to the budget and grows again."""
    before = 21 // chunk - 1
    assert frames_in_window(policy, [chunk] * (before + len(expected)))[before:] == expected


def first_of_frame(times):
    """One window time per frame; both tokens of a frame must share it."""
    assert times[0::2] == times[1::2]
    return times[0::2]


def span(start, stop):
    return list(range(start, stop))


@pytest.mark.parametrize(("positions", "sizes", "sink", "tail", "query"), [
    ("released", [3] * 8, span(0, 10), span(13, 21), 21),          # one chunk of gap: 10, 11, 12 stay empty
    ("unified", [3] * 8, span(0, 10), span(13, 21), 21),
    ("contiguous", [3] * 8, span(3, 13), span(13, 21), 21),
    ("original", [3] * 8, span(0, 10), span(13, 21), 21),          # s = 21: still the true frames
    ("original", [3] * 9, span(-3, 7), span(13, 21), 21),
    ("released", [3] * 12, span(0, 10), span(13, 21), 21),         # the gap is frozen
    ("contiguous", [3] * 12, span(3, 13), span(13, 21), 21),
    ("released", [2] * 11, span(0, 10), span(11, 20), 20),         # s = 20: 20 + 2 > 21, frame 10 goes
    ("released", [2] * 12, span(0, 10), span(12, 21), 21),         # then one chunk of gap: 10, 11
    ("released", [1] * 30, span(0, 10), span(11, 21), 21),
    ("released", [1] + [3] * 7, span(0, 10), span(11, 19), 19),    # s = 19: still the true frames
    ("contiguous", [1] + [3] * 7, span(1, 11), span(11, 19), 19),
])
def test_sink_positions(positions, sizes, sink, tail, query):
    """Window times of sink and tail in the last chunk, worked out by hand for S = 10, window 21."""
    memory = drive(dict(SINK, positions=positions), sizes)
    assert first_of_frame(memory.times[-1][0]) == sink + tail
    assert memory.query_positions[-1] == {query}


@pytest.mark.parametrize("positions", ["released", "unified", "contiguous", "original"])
def test_everything_is_at_its_true_position_until_something_is_forgotten(positions):
    """Seven chunks of 3 fit in 21 frames, so no layout has moved anything."""
    for policy in (SINK, PARTICIPATIVE):
        memory = drive(dict(policy, positions=positions), [3] * 7)
        for chunk in range(7):
            assert first_of_frame(memory.times[chunk][0]) == span(0, 3 * chunk)
            assert memory.query_positions[chunk] == {3 * chunk}


@pytest.mark.parametrize(("chunks", "tail", "query", "birth"), [
    (8, [15], 16, 5),                     # s = 21, an event: recent is frame 20 and the chunk
    (9, [15, 16, 17, 18], 19, 5),         # s = 24, no event: the block stays that of chunk 7
    (10, [15], 16, 11),                   # s = 27, the next event
])
@pytest.mark.parametrize("positions", ["released", "unified", "contiguous", "original"])
def test_participative_positions(positions, chunks, tail, query, birth):
    """Window times for S = 10, B = 16, R = 4 in each layout; a token born in frame o sits at o - birth."""
    memory = drive(dict(PARTICIPATIVE, positions=positions), [3] * chunks)
    times = memory.times[-1][0]
    block = [token.frame - birth for token in memory.tokens[0][20:24]]
    sink = {"contiguous": span(3, 13), "original": span(-birth, 10 - birth)}.get(positions, span(0, 10))
    assert first_of_frame(times[:20]) == sink
    assert times[20:24] == ([13, 13, 14, 14] if positions in ("unified", "contiguous") else block)
    assert first_of_frame(times[24:]) == tail
    assert memory.query_positions[-1] == {query}


def test_votes_add_up():
    """Scores are normalised alike, so the past's and the chunk's own votes sum to those of both."""
    score = {votes: drive(dict(PARTICIPATIVE, votes=votes), [3] * 8).scores[7][0]
             for votes in ("both", "past", "denoising")}
    assert score["past"][20:40].abs().min() > 0 and score["denoising"][20:40].abs().min() > 0
    torch.testing.assert_close(score["past"] + score["denoising"], score["both"], rtol=0, atol=1e-12)
    only_chunk = dict(PARTICIPATIVE, recent_frames=3)              # no past frame is left to vote
    score = {votes: drive(dict(only_chunk, votes=votes), [3] * 8).scores[7][0] for votes in ("past", "denoising")}
    assert score["past"][20:42].abs().max() == 0 and score["denoising"][20:42].abs().min() > 0


def test_ties_and_shortage_follow_store_order():
    """Equal scores go to the earlier slot; used-up tokens only fill what the others leave open."""
    score = torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])
    assert choose(score, [0, 0, 0, 0, 0], 2, 7) == [1, 2]
    assert choose(score, [0, 7, 6, 0, 0], 2, 7) == [2, 4]
    assert choose(score, [1, 9, 9, 0, 9], 3, 0) == [1, 2, 4]
    assert choose(score, [1, 1, 1, 0, 1], 3, 1) == [0, 1, 3]


def test_refused_tokens_keep_the_number_of_survivors():
    """Limit 1, an event every chunk: all 6 fresh tokens are chosen, and the first 2 of 8 used-up ones."""
    memory = drive(dict(PARTICIPATIVE, window_frames=18, budget_frames=18, topc_max_reuse=1), [3] * 8)
    assert list(memory.chosen) == [6, 7]
    assert memory.chosen[7][0] == [20, 21, *range(28, 34)]
    assert [len(kept[0]) for kept in memory.kept.values()] == [36, 36]


# --- prefill and batches ---------------------------------------------------------------------------------

def test_chunk_sizes():
    """Prefill puts the remainder first, after the lone first frame; generation allows no remainder."""
    assert chunk_sizes(8, 3, lone_first=False, remainder_first=True) == [2, 3, 3]
    assert chunk_sizes(9, 3, lone_first=True, remainder_first=True) == [1, 2, 3, 3]
    assert chunk_sizes(7, 3, lone_first=True, remainder_first=False) == [1, 3, 3]
    with pytest.raises(ValueError, match="8 frames do not split into chunks of 3"):
        chunk_sizes(8, 3, lone_first=False, remainder_first=False)


@pytest.mark.parametrize(("given", "lone", "frames"), [
    (0, False, [3, 6]), (0, True, [1, 4, 7]), (5, False, [2, 5, 8, 11]), (6, True, [1, 3, 6, 9, 12]),
])
def test_chunks_of_a_rollout(given, lone, frames):
    """Frames in the window after each chunk, prefilled ones first; only a video's first frame is ever alone."""
    tensors, _ = golden("inputs_B")
    noise, alone = tensors["noise"], lone and not given
    mine = reference_rollout(
        tiny("B"), prompt_embeds=tensors["prompt_embeds"], noise=noise[:, :7 if alone else 6],
        renoise=lambda chunk, step: tensors["renoise"][chunk, step][None, :1 if alone and chunk == 0 else 3],
        policy=PARTICIPATIVE, independent_first_frame=lone, initial_latent=noise[:, 80:80 + given] if given else None)
    assert [tokens // 15 for tokens in mine.window_tokens] == frames
    assert mine.latents.shape[1] == frames[-1]


@pytest.mark.parametrize(("policy", "given"), [(SINK, 24), (PARTICIPATIVE, 21)])
def test_a_prefilled_beginning_goes_on_as_if_generated(policy, given):
    """Past a window that rolled, or right before an event in which the prefilled frames vote."""
    whole = rollout("B", policy, 27)
    parts = rollout("B", policy, 27, given=whole.latents[:, :given])
    assert parts.prefilled_chunks == given // 3
    assert torch.equal(parts.latents, whole.latents)
    assert parts.kept == whole.kept and parts.window_tokens == whole.window_tokens and parts.times == whole.times


def test_samples_of_a_batch_do_not_meet():
    """Each sample of a batch equals its own run, kept tokens included; re-noise is asked for once."""
    tensors, _ = golden("inputs_B")
    noise = torch.cat((tensors["noise"][:, :24], tensors["noise"][:, 30:54]))
    asked = []

    def renoise(chunk, step, rows=slice(None)):
        asked.append((chunk, step))
        return tensors["renoise"][[chunk, chunk + 10], step][rows]

    prompt = torch.cat((tensors["prompt_embeds"], -tensors["prompt_embeds"]))
    both = reference_rollout(tiny("B"), prompt_embeds=prompt, noise=noise, renoise=renoise, policy=PARTICIPATIVE)
    assert sorted(asked) == [(chunk, step) for chunk in range(8) for step in range(3)]
    for b in range(2):
        alone = reference_rollout(tiny("B"), prompt_embeds=prompt[b:b + 1], noise=noise[b:b + 1], policy=PARTICIPATIVE,
                                  renoise=lambda chunk, step, b=b: renoise(chunk, step, slice(b, b + 1)))
        assert torch.equal(alone.latents[0], both.latents[b])
        assert [kept[0] for kept in alone.kept[0][1]] == [kept[b] for kept in both.kept[0][1]]
    swapped = reference_rollout(tiny("B"), prompt_embeds=prompt.flip(0), noise=noise[:, :3], renoise=renoise,
                                policy=PARTICIPATIVE)
    assert not torch.allclose(swapped.latents, both.latents[:, :3], rtol=0, atol=1e-3)
    assert both.kept[0][1][0][0] != both.kept[0][1][0][1]
