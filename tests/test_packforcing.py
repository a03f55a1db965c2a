"""PackForcing's memory: which block is where, what is chosen, at what position; against brute force and by hand."""
from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import SMALL, make_tiny, policy_of
from reference import rotate, token_grid
from test_graphs import graphed
from torch.testing import assert_close

from benchmarks.memory import kv_bytes
from utils.config import REPOSITORY, load_config
from wan.geometry import ChunkSpan, VideoGeometry
from wan.kv_cache.archive import FIRST_PLACES
from wan.kv_cache.cache import KVCache
from wan.kv_cache.policy import build_policy, policy_fields
from wan.kv_cache.store import CacheShape

CPU = torch.device("cpu")
HEADS, DIM = 4, 12
PACK = {
    "policy": "packforcing", "sink_frames": 3, "recent_frames": 3, "top_chunks": 2, "archive_chunks": 5,
    "space_reduction": 2, "compressor": "kv_pool",
}


def geometry_of(chunk_frames: int = 3, height: int = 64, width: int = 96) -> VideoGeometry:
    return VideoGeometry(height=height, width=width, fps=16, chunk_frames=chunk_frames)


def drive(settings: dict, geometry: VideoGeometry, chunks: int, *, batch: int = 2, dtype=torch.float64):
    """Random chunks through one layer; yields (layer, view, plan, window, tokens of all chunks) at each first pass."""
    shape = CacheShape(layers=1, heads=HEADS, head_dim=DIM, batch=batch, device=CPU, dtype=dtype)
    cache, made = KVCache(shape, geometry, policy_of(settings)), []
    cache.reset(list(range(batch)))
    generator = torch.Generator().manual_seed(1)
    for index in range(chunks):
        frames = geometry.chunk_frames
        cache.begin(ChunkSpan(index=index, start=index * frames, frames=frames))
        made.append(torch.randn(
            3, batch, frames * geometry.frame_tokens, HEADS, DIM, generator=generator, dtype=dtype,
        ))
        layer = cache.layer(0)
        window = layer.extend(*made[-1])
        yield layer, layer.view(), layer.plan, window, made
        cache.commit()


# --- brute force ----------------------------------------------------------------------------------------

def brute_packet(keys, values, geometry, time, space, start):
    """(keys without RoPE, values, time, row, column) of a chunk [n, H, D]: a loop over what each token covers."""
    frame, row, column = token_grid(geometry.chunk_frames, geometry.rows, geometry.columns)
    packed = []
    for t in range(0, geometry.chunk_frames, time):
        for r in range(geometry.rows // space):
            for c in range(geometry.columns // space):
                inside = (
                    (frame >= t) & (frame < t + time) & (row // space == r) & (column // space == c)
                ).nonzero().flatten()
                packed.append((
                    keys[inside].mean(dim=0), values[inside].mean(dim=0), start + frame[inside].double().mean(),
                    row[inside].double().mean(), column[inside].double().mean(),
                ))
    return [torch.stack([torch.as_tensor(x) for x in column]) for column in zip(*packed, strict=True)]


def brute_affinity(query, packet, geometry, start, heads):
    """The double sum over query and key tokens, each rotated at its true position."""
    frame, row, column = token_grid(geometry.chunk_frames, geometry.rows, geometry.columns)
    query = rotate(query, start + frame, row, column)[:, :heads]
    keys = rotate(packet[0], *packet[2:])[:, :heads]
    return sum(
        (query[i, h] @ keys[j, h]) for i in range(len(query)) for j in range(len(keys)) for h in range(heads)
    ) / (DIM**0.5 * heads)


@pytest.mark.parametrize("chunk_frames, score_heads", [(3, "half"), (4, "all")])
def test_selection_equals_brute_force(chunk_frames: int, score_heads: str) -> None:
    """Scores equal the double sum within float64 rounding, and the packets shown are the best, oldest first."""
    geometry = geometry_of(chunk_frames, 32, 64)
    settings = PACK | {"sink_frames": chunk_frames, "recent_frames": chunk_frames, "score_heads": score_heads}
    heads = HEADS if score_heads == "all" else HEADS // 2
    compared = 0
    for _, view, plan, _, made in drive(settings, geometry, 8):
        mids = [c for c in range(1, len(made) - 2) if c >= len(made) - 1 - 5]  # five places, the oldest make room
        if plan.packets is None:
            assert not mids
            continue
        scores = view.packets.affinity(1.0 if score_heads == "all" else 0.5)
        for sample in range(2):
            expected = {}
            for c in mids:
                packet = brute_packet(made[c][1, sample], made[c][2, sample], geometry, 2, 2, c * chunk_frames)
                expected[c] = brute_affinity(made[-1][0, sample], packet, geometry, view.start, heads)
                place = (view.packets.start == c * chunk_frames).nonzero().squeeze()
                assert_close(scores[sample, place], expected[c], rtol=1e-10, atol=1e-10)
            best = sorted(sorted(expected, key=lambda c: -expected[c])[:2])
            shown = view.packets.start[plan.packets[sample]] // chunk_frames
            assert shown.tolist() == best
            compared += len(mids) > 2
    assert compared >= 4


def test_the_window_holds_what_the_plan_says() -> None:
    """Keys and values of shown packets are means of what they cover, rotated once to centre and window time."""
    geometry = geometry_of(3, 64, 64)
    for _, view, plan, window, made in drive(PACK, geometry, 9, batch=1):
        if plan.packets is None:
            continue
        shift = plan.query_position - int(view.start)
        tokens = 0
        for rank, start in enumerate(view.packets.start[plan.packets[0]].tolist()):
            c = start // 3
            packet = brute_packet(made[c][1, 0], made[c][2, 0], geometry, 2, 2, start)
            moved = packet[2] - start + plan.packet_position[0, rank, 0] - view.packets.centres[0]
            begin = plan.attend.shape[1] + tokens
            tokens += len(packet[0])
            assert_close(window.keys[0, begin:begin + len(packet[0])], rotate(packet[0], moved, *packet[3:]))
            assert_close(window.values[0, begin:begin + len(packet[0])], packet[1])
            later = sum(c < other < len(made) - 2 for other in range(len(made))) - (plan.packets.shape[1] - 1 - rank)
            assert moved[0] - shift == packet[2][0] + 3 * later  # up by a chunk for each later one that is not shown


# --- by hand --------------------------------------------------------------------------------------------

def test_right_packing_is_figure_2c() -> None:
    """Blocks S0 S1 M2..M7 R8 and the current 9, of which M2 and M6 are not shown: the figure's table of positions."""
    figure = {"S0": 2, "S1": 3, "M3": 4, "M4": 5, "M5": 6, "M7": 7, "R8": 8, "R9": 9}
    settings = PACK | {
        "sink_frames": 2, "recent_frames": 1, "top_chunks": 4, "archive_chunks": 8, "time_reduction": 1,
    }
    *_, (_, view, _, _, _) = drive(settings, geometry_of(1), 10, batch=1)
    wanted = torch.tensor([3, 4, 5, 7])
    asked = dataclasses.replace(
        view.packets, affinity=lambda share: torch.isin(view.packets.start, wanted).double().unsqueeze(0),
    )
    plan = policy_of(settings).plan(dataclasses.replace(view, packets=asked))
    shift = int(view.start) - plan.query_position
    stored = plan.position[0, ::view.frame_tokens] + shift
    begins = (plan.packet_position[0, :, 0] + shift).tolist()
    packets = {f"M{m}": begin for m, begin in zip(wanted.tolist(), begins, strict=True)}
    ours = {"S0": stored[0], "S1": stored[1], **packets, "R8": stored[2], "R9": plan.query_position + shift}
    assert {name: int(position) for name, position in ours.items()} == figure


def test_shifting_by_hand() -> None:
    """Which chunk is sink, recent, in the archive and forgotten after each step: sink 2, recent 2, room for 4."""
    table = {  # chunk: (full-size chunks before it, packets that may be seen)
        0: ([], []), 1: ([0], []), 2: ([0, 1], []), 3: ([0, 1, 2], []), 4: ([0, 1, 2, 3], []),
        5: ([0, 1, 3, 4], [2]), 6: ([0, 1, 4, 5], [2, 3]), 7: ([0, 1, 5, 6], [3, 4]), 8: ([0, 1, 6, 7], [4, 5]),
        9: ([0, 1, 7, 8], [5, 6]),
    }
    settings = PACK | {"sink_frames": 6, "recent_frames": 6, "top_chunks": 2, "archive_chunks": 4}
    for chunk, (_, view, plan, _, _) in enumerate(drive(settings, geometry_of(), 10)):
        full = torch.take_along_dim(view.origin, plan.attend, dim=1)[0, ::3 * view.frame_tokens] // 3
        shown = [] if plan.packets is None else (view.packets.start[plan.packets[0]] // 3).tolist()
        assert (full.tolist(), shown) == table[chunk]
        assert plan.archive == (chunk >= 2)


def test_a_packet_that_was_not_seen_is_seen_again() -> None:
    """Selection forgets nothing: with room for all, every chunk past the sink is shown at some time again."""
    came_back, before = set(), {}
    for chunk, (_, view, plan, _, _) in enumerate(drive(PACK | {"archive_chunks": 0}, geometry_of(), 40, batch=1)):
        for c in (view.packets.start[plan.packets[0]] // 3).tolist() if plan.packets is not None else []:
            if chunk - before.get(c, chunk) > 1:
                came_back.add(c)
            before[c] = chunk
    assert len(came_back) > 10


def test_an_odd_first_chunk_leaves_no_packet() -> None:
    """Given frames that are no whole chunk: no packet of another size, and positions stay closed."""
    tiny = make_tiny()
    given = torch.randn(1, 4, SMALL.in_dim, tiny.geometry.latent_height, tiny.geometry.latent_width)
    pipeline = tiny.pipeline(policy_of(PACK | {"sink_frames": 0, "space_reduction": 2}))
    latents = tiny.run(policy_of(PACK), 22, pipeline=pipeline, initial_latent=given)
    archive = pipeline.cache.layer(0).archive
    assert latents.isfinite().all()
    assert sorted(s for s in archive.start.tolist() if s < 100) == [7, 10, 13, 16, 19]


def test_without_packets_it_is_a_sink_without_a_gap() -> None:
    """No packet shown is Deep Sink with contiguous positions, within float32 rounding: angles of other origins."""
    tiny = make_tiny()
    packless = tiny.run(policy_of(PACK | {"sink_frames": 6, "top_chunks": 0}), 30)
    sink = tiny.run(policy_of(
        {"policy": "sink", "window_frames": 12, "sink_frames": 6, "positions": "contiguous"},
    ), 30)
    assert_close(packless, sink, rtol=0, atol=1e-4)


# --- sizes ----------------------------------------------------------------------------------------------

def paper() -> tuple[dict, VideoGeometry]:
    """The paper's sizes: a policy and 832x480 in chunks of 4."""
    config = load_config(
        REPOSITORY / "configs" / "packforcing_4.yaml", policy_fields=policy_fields(), build_policy=build_policy,
    )
    return dict(config.kv_cache), geometry_of(config.num_frame_per_block, 480, 832)


def test_attention_context_and_bytes_are_the_papers() -> None:
    """27,872 tokens of context for ever, and 3.99 GB of keys and values attended to; shapes alone, on no device."""
    settings, geometry = paper()
    policy = policy_of(settings)
    sizes = policy.sizes(geometry)
    assert (sizes.archive.grid.tokens, sizes.window_tokens) == (182, 27_872)
    layers = 30
    shape = CacheShape(
        layers=1, heads=12, head_dim=128, batch=1, device=torch.device("meta"), dtype=torch.bfloat16,
    )
    cache, seen = KVCache(shape, geometry, policy), []
    token = torch.empty(1, 4 * geometry.frame_tokens, 12, 128, device="meta", dtype=torch.bfloat16)
    for span in geometry.chunks(4 * 24):
        cache.begin(span)
        seen.append(cache.layer(0).extend(token, token, token).keys.shape[1])
        nbytes = kv_bytes([cache.layer(0)])
        cache.commit()
    assert seen[:4] == [6240, 12480, 18720, 24960] and seen[4] == 24960 + 182
    assert set(seen[19:]) == {27_872}
    kv = 2 * 1536 * 2 * layers
    assert layers * nbytes["attended"] == (27_872 - 6_240) * kv
    assert layers * nbytes["attended"] == pytest.approx(3.99e9, rel=0.01)
    assert layers * nbytes["window"] == 27_872 * kv
    sums = 128 * 2 * 1536 * 4 * layers
    assert layers * nbytes["archive"] == 128 * 182 * kv + sums


def test_an_archive_without_limit_grows_and_shows_the_same() -> None:
    """Doubling its places, again and again, changes nothing that is seen."""
    geometry, chunks = geometry_of(1, 32, 32), FIRST_PLACES + 12
    settings = PACK | {"sink_frames": 1, "recent_frames": 1, "time_reduction": 1}
    places = []
    for (ours, _, _, window, _), (_, _, _, limited, _) in zip(
        drive(settings | {"archive_chunks": 0}, geometry, chunks),
        drive(settings | {"archive_chunks": 2 * chunks}, geometry, chunks), strict=True,
    ):
        assert torch.equal(window.keys, limited.keys) and torch.equal(window.values, limited.values)
        places.append(ours.archive.places)
    assert (places[0], places[-1]) == (FIRST_PLACES, 2 * FIRST_PLACES)


def test_places_that_were_added_serve_the_next_video(monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive that grew while a video was made is reset with the rest."""
    monkeypatch.setattr("wan.kv_cache.archive.FIRST_PLACES", 2)
    tiny, policy = make_tiny(), policy_of(PACK | {"archive_chunks": 0})
    used = tiny.pipeline(policy)
    tiny.run(policy, 30, text=1, pipeline=used)
    assert used.cache.layer(0).archive.places == 16
    assert torch.equal(tiny.run(policy, 30, text=2, pipeline=used), tiny.run(policy, 30, text=2))


@pytest.mark.parametrize("span, step", [("block", 3.0), ("tokens", 2.0), ("squeeze", 1.5)])
def test_packets_take_the_time_they_are_given(span: str, step: float) -> None:
    """Window time from one packet to the next, and none is later than the recent frames or earlier than the sink."""
    settings = PACK | {"mid_span": span, "squeeze_frames": 12}
    *_, (_, view, plan, _, _) = drive(settings, geometry_of(), 9, batch=1)
    begin = plan.packet_position[0, :, 0]
    assert (begin[1] - begin[0]).item() == pytest.approx(step)
    assert plan.position[0, 3 * view.frame_tokens - 1] < begin[0]
    assert plan.packet_position.max() < plan.query_position - 3
    if span == "squeeze":
        assert plan.query_position + 3 <= 12


@pytest.mark.parametrize("settings, message", [
    ({"recent_frames": 4}, "recent_frames=4 must be whole chunks of 3 frames.* Use 3"),
    ({"archive_chunks": 2}, "Raise it to at least 3, or to 0"),
    ({"space_reduction": 9}, "space_reduction of 1 to 4"),
    ({"sink_frames": -1}, "sink_frames=-1"),
    ({"sink_frames": 5}, "sink_frames=5 must be whole chunks of 3 frames.* Use 6"),
    ({"positions": "original", "mid_span": "squeeze"}, "mid_span=squeeze has no effect with positions=original"),
    ({"mid_span": "squeeze", "squeeze_frames": 9}, "alone span 9"),
])
def test_sizes_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    """Before anything is allocated, with the numbers to change."""
    with pytest.raises(ValueError, match=message):
        policy_of(PACK | settings).sizes(geometry_of())


# --- the second stream ----------------------------------------------------------------------------------

@pytest.mark.parametrize("stream", ["forward", "project"])
def test_packets_do_not_touch_the_chunk(stream: str) -> None:
    """The chunk's own memory is what it would be without a packet, bit for bit; the packet is in every layer."""
    tiny, settings = make_tiny(height=64), PACK | {"compressor": "latent_pool", "compressed_kv": stream}
    policy = policy_of(settings)
    plain, packed = tiny.pipeline(policy), tiny.pipeline(policy)
    plain.packer = None
    a, b = (tiny.run(policy, 9, pipeline=p) for p in (plain, packed))
    assert torch.equal(a, b)  # the fourth chunk is the first to see a packet
    for index in range(SMALL.num_layers):
        ours, theirs = (p.cache.layer(index) for p in (packed, plain))
        assert torch.equal(ours.store.keys[:, :ours.store.length], theirs.store.keys[:, :theirs.store.length])
        assert ours.archive.known == 2 and (ours.archive.keys[:, :3] - theirs.archive.keys[:, :3]).abs().max() > 0.01
    assert not torch.equal(tiny.run(policy, 30, pipeline=packed), tiny.run(policy, 30, pipeline=plain))


def test_packets_beside_replayed_passes() -> None:
    """What compresses runs between a replayed context pass and the commit: bit for bit as with plain passes."""
    tiny, policy = make_tiny(height=64), policy_of(PACK | {"compressor": "latent_pool"})
    (fast, tape), eager = graphed(tiny, policy, batch=1), tiny.pipeline(policy)
    for video in range(2):
        ours, plain = (tiny.run(policy, 36, text=video, pipeline=pipeline) for pipeline in (fast, eager))
        assert torch.equal(ours, plain)
    assert tape.replayed > 4
