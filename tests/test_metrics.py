"""Metrics that need no download: equal to a second road, graded damage moves them, re-encoding does not."""
from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
import pytest

from evaluation.analysers import damage
from evaluation.analysers.stability import ChunkLayout
from evaluation.metrics.catalogue import BASIC, make_metrics
from evaluation.metrics.drift import colour_quantiles, lab
from evaluation.metrics.flow import is_dynamic
from evaluation.metrics.measuring import measure
from evaluation.metrics.picture import MEASURES, gradient, measures
from evaluation.metrics.protocol import Choices, Frame, VideoInfo
from evaluation.metrics.returns import Memory
from evaluation.metrics.series import clips, ends, means, windows
from evaluation.metrics.table import LEFT_OUT
from training.world import render, sample, to_frames
from utils.video import VideoWriter, open_video

FPS = 16.0


def values(frames, *names: str, prompt: str | None = None, fps: float = FPS) -> dict:
    """(metric, granularity, start) -> value."""
    info = VideoInfo("test", fps, *frames[0].shape[:2], prompt, ChunkLayout())
    measured = measure(frames, info, make_metrics(names, Choices()))
    assert not measured.errors, measured.errors
    return {(v.metric, v.granularity, v.start_s): v.value for found in measured.values.values() for v in found}


def errors(frames, *names: str) -> dict[str, str]:
    info = VideoInfo("test", FPS, *frames[0].shape[:2])
    return measure(frames, info, make_metrics(names, Choices())).errors


@pytest.fixture(scope="module")
def moving() -> np.ndarray:
    """12 s of a smooth picture that moves: uint8 [192, 48, 64, 3]."""
    t, y, x = np.meshgrid(np.arange(192), np.arange(48), np.arange(64), indexing="ij")
    speed = t * 0.11
    waves = [np.sin(0.31 * x + speed) + np.cos(0.23 * y - 0.7 * speed), np.sin(0.17 * (x + y) + 0.37 * speed ** 1.3),
             np.cos(0.21 * x - 0.13 * y + speed)]
    return (128 + 45 * np.stack(waves, axis=-1)).clip(0, 255).astype(np.uint8)


# hand-computed cases ------------------------------------------------------------------------------


def test_windows_and_clips():
    """A short rest is left out of windows; the last clip is extended backwards to its full length."""
    assert windows(40, 16, 1.0) == [(0, 16), (16, 32), (32, 40)]
    assert windows(39, 16, 1.0) == [(0, 16), (16, 32)]
    assert windows(5, 16, 1.0) == [(0, 5)]
    assert clips(80, 16) == [(0, 32), (32, 64), (48, 80)]
    assert clips(64, 16) == [(0, 32), (32, 64)]
    assert clips(10, 16) == [(0, 10)]


def test_means_and_ends():
    """Ramp 0..159 at 10 fps: every mean is known, and NaN counts for nothing."""
    ramp = np.arange(160.0)
    assert means(ramp, 10, 10.0) == [(0.0, 49.5), (10.0, 129.5)]
    assert ends(ramp, 10) == {"first_last_15pct": (11.5, 147.5), "first_last_5s": (24.5, 134.5)}
    assert "first_last_5s" not in ends(ramp[:99], 10)
    ramp[::2] = np.nan
    assert means(ramp, 10, 16.0) == [(0.0, 80.0)]


@pytest.mark.parametrize("every", [1, 2, 16])
def test_ends_exist_where_two_samples_do(every):
    """Whatever the length; frames without a value move nothing, and no sample is both ends."""
    for length in range(1, 200):
        series = np.full(length, np.nan)
        series[::every] = np.arange(0, length, every)
        found = ends(series, 16)
        assert ("first_last_15pct" in found) == (length > every), length
        assert all(first < last for first, last in found.values()), length


def test_picture_measures_equal_a_pixel_by_pixel_computation():
    """Brightness, contrast, saturation, clipping over single pixels in Python; the gradient of a known slope."""
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    pixels = [tuple(map(int, pixel)) for pixel in rgb.reshape(-1, 3)]
    luma = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in pixels]
    mean = sum(luma) / len(luma)
    chroma = [s * v for _, s, v in (colorsys.rgb_to_hsv(*pixel) for pixel in pixels)]
    got = dict(zip(MEASURES, measures(Frame(0, rgb)), strict=True))
    assert got["brightness"] == pytest.approx(mean / 255, rel=1e-5)
    assert got["contrast"] == pytest.approx((sum((v - mean) ** 2 for v in luma) / len(luma)) ** 0.5 / 255, rel=1e-5)
    assert got["saturation"] == pytest.approx(sum(chroma) / len(chroma) / 255, rel=1e-6)
    edge = [min(v, 255 - v) for v in luma]
    assert got["clipped"] == pytest.approx(sum(min(1, max(0, (15 - v) / 12)) for v in edge) / len(luma), abs=1e-6)
    y, x = np.mgrid[:9, :9].astype(np.float32)
    assert gradient(3 * x + 4 * y) == pytest.approx(5.0)


def test_lab_and_colour_distance():
    """Known colours in Lab; the distance of two plain pictures is close to their Delta E, and is symmetric."""
    known = {(255, 255, 255): (100, 0, 0), (0, 0, 0): (0, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20)}
    for rgb, expected in known.items():
        assert lab(np.uint8(rgb)) == pytest.approx(expected, abs=0.02)
    one, other = (np.full((8, 8, 3), level, np.uint8) for level in (60, 90))
    delta_e = np.linalg.norm(lab(one[0, 0]) - lab(other[0, 0]))
    distance = 2 * np.abs(colour_quantiles(one) - colour_quantiles(other)).mean()
    assert distance == pytest.approx(delta_e, rel=0.05)  # 16 directions stand for the whole sphere


def test_drift_knows_colours_not_places(moving):
    """Moving every pixel elsewhere is no drift; turning to other colours in the last second is."""
    still = np.repeat(moving[:1], 192, 0)
    rolled = np.stack([np.roll(frame, 3 * (t // 64), axis=1) for t, frame in enumerate(still)])
    assert values(still, "drift")["drift_colour", "whole", None] == pytest.approx(0, abs=1e-9)
    assert values(rolled, "drift")["drift_colour", "whole", None] == pytest.approx(0, abs=1e-9)
    late = still.copy()
    late[-16:] = np.minimum(late[-16:].astype(int) + 40, 255)
    got = values(late, "drift")
    last = got["drift", "second", 11.0]
    assert last > 8 and got["drift", "whole", None] == pytest.approx(last / 5)  # one of the last five seconds


def looks_apart(frames, fps: int = 16) -> list[float]:
    """Drift of a video of whole seconds, by another road: second by second, from all looks at once."""
    seconds, reach = len(frames) // fps, min(5, len(frames) // fps // 2)
    looks = [Frame(0, frame) for frame in frames[::fps // 4]]
    colours = np.reshape([colour_quantiles(look.thumbnail) for look in looks], (seconds, 4, -1)).mean(1)
    details = np.log2(np.reshape([gradient(look.half) for look in looks], (seconds, 4)).mean(1))
    colour = 2 * np.abs(colours[-reach:] - colours[:reach].mean(0)).mean()
    detail = 10 * np.abs(details[-reach:] - details[:reach].mean()).mean()
    return [colour + detail, colour, detail]


@pytest.mark.parametrize("seconds", [5, 12, 30, 60])
def test_drift_of_whole_seconds_is_the_mean_over_seconds(moving, seconds):
    """What tables hold of videos of 5, 12, 30 and 60 s at 16 frames a second."""
    frames = damage.hue_ramp(np.resize(moving, (16 * seconds, *moving.shape[1:])), 60)
    got = values(frames, "drift")
    found = [got[name, "whole", None] for name in ("drift", "drift_colour", "drift_detail")]
    assert found == pytest.approx(looks_apart(frames), rel=1e-9)


@pytest.mark.parametrize(("frames", "reach"), [(81, 2), (193, 5), (197, 5)])
def test_one_frame_more_counts_for_its_share(moving, frames, reach):
    """A last frame like no other moves drift by one look in those of the last seconds, not by a second."""
    plain = np.resize(moving, (frames, *moving.shape[1:]))
    odd, all_odd = plain.copy(), plain[:-1].copy()
    odd[-1] = all_odd[-16 * reach:] = 255 - plain[-1] // 4
    videos = plain[:-1], odd, all_odd
    before, after, most = (values(video, "drift")["drift_colour", "whole", None] for video in videos)
    assert 0 < after - before < most / (4 * reach)


def test_detail_counts_ten_a_halving():
    """A texture of half the contrast has half the gradient: 10 Delta E; twice the contrast, as much."""
    texture = np.indices((64, 64)).sum(0)[..., None] // 4 % 2 * np.ones(3)
    for before, after in ((80, 40), (40, 80), (40, 40)):
        frames = np.repeat([128 + before * texture, 128 + after * texture], 80, 0).astype(np.uint8)
        detail = values(frames, "drift")["drift_detail", "whole", None]
        assert detail == pytest.approx(10 * abs(np.log2(after / before)), abs=1e-3)


@pytest.mark.parametrize(("moving_looks", "looks", "dynamic"), [
    (4, 15, True), (3, 15, False),                    # a clip of 2 s: 16 sampled frames, a quarter of them
    (0, 1, False), (1, 1, True), (0, 15, False),      # what never moves is not dynamic, however short
    (60, 239, True), (59, 239, False),                # 30 s
])
def test_a_quarter_of_the_looks_must_move(moving_looks, looks, dynamic):
    """VBench's rule: as many as round(4 N / 16) of N sampled frames, each by more than 6 px."""
    assert is_dynamic([6.01] * moving_looks + [6.0] * (looks - moving_looks)) is dynamic


def test_a_clip_of_two_seconds_is_looked_at_sixteen_times():
    """At 16 frames a second: 15 looks from one sampled frame to the next, whose top speeds are kept."""
    pytest.importorskip("cv2", reason="opencv-python-headless is an extra")
    reader = make_metrics(["flow"], Choices())[0].start(VideoInfo("test", FPS, 48, 64))
    for index in range(32):
        reader.add(Frame(index, np.zeros((48, 64, 3), np.uint8)))
    assert reader.speeds == [0.0] * 15
    assert {value.value for value in reader.values()} == {0.0}


def test_flicker_borders_and_rests_by_hand():
    """A picture that gets 2 levels brighter at every border: mean step, excess at borders, share of rests."""
    total, layout = 105, ChunkLayout()
    chunk = np.searchsorted(layout.borders(total), np.arange(total), side="right")
    frames = np.broadcast_to((100 + 2 * chunk)[:, None, None, None], (total, 32, 32, 3)).astype(np.uint8)
    got = values(frames, "flicker", "borders", "frozen")
    assert got["temporal_flickering", "whole", None] == pytest.approx(1 - 8 * 2 / 104 / 255, rel=1e-6)
    assert got["border_flicker", "whole", None] == pytest.approx(2)
    assert got["frozen", "whole", None] == 1  # every chunk is a rest of 0.56 s or longer
    assert values(frames[::8], "frozen")["frozen", "whole", None] == 0
    assert Frame(0, np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).cells[0, 0] == pytest.approx([22.5, 23.5, 24.5])


def test_memory_thins_out_evenly():
    """The number kept is bounded, and what is kept spans the whole time."""
    memory = Memory(8)
    for number in range(100):
        memory.add(np.full(3, number, np.float32))
    kept = memory.pictures[:memory.count, 0]
    assert len(kept) <= 8 and kept[0] == 0 and kept[-1] >= 80 and len(set(np.diff(kept))) == 1
    assert memory.nearest(np.full(3, kept[2] + 0.25, np.float32)) == 0.25


def test_a_loop_repeats_and_a_leap_back_is_counted(moving):
    """Three equal stretches repeat two thirds of the time, by two leaps back; the original does neither."""
    looped = values(damage.loop_backs(moving, 2), "returns")
    clean = values(moving, "returns")
    assert looped["repetition", "whole", None] > clean["repetition", "whole", None] + 0.4
    assert looped["rollbacks", "whole", None] == pytest.approx(2 * 60 / 12)
    assert clean["rollbacks", "whole", None] == 0


@pytest.mark.parametrize(("levels", "again"), [(6, 12), (7, 1)])
def test_a_picture_comes_again_if_it_is_nearer_than_0_4_of_the_motion(levels, again):
    """The left half brightens by 4 levels a frame, 8 of the whole picture in a quarter second; after 3 s it begins
    anew, the right half changed: 3 levels of the whole picture are 0.375 of the motion, 3.5 are 0.4375. Of 22 looks
    12 see the second half; the first one there sees the leap, which is motion enough for anything."""
    frames = np.zeros((96, 48, 64, 3), np.uint8)
    frames[:, :, :32] = (4 * (np.arange(96) % 48))[:, None, None, None]
    frames[48:, :, 32:] = levels
    assert values(frames, "returns")["repetition", "whole", None] == again / 22


def test_too_short_is_said():
    """One frame: what needs time says so, and the rest is measured."""
    one = np.zeros((1, 32, 32, 3), np.uint8)
    found = errors(one, "drift", "flicker", "borders", "frozen", "returns", "picture")
    assert set(found) == {"drift", "flicker", "borders", "frozen", "returns"}
    assert "chunk layout" in found["borders"] and "too short" in found["drift"]
    assert {name for name, why in found.items() if not why.startswith(LEFT_OUT)} == {"borders"}


# laws ---------------------------------------------------------------------------------------------

Damage = Callable[[np.ndarray, float], np.ndarray]
GRADED: list[tuple[str, str, str, Damage, list[float], int]] = [  # metric, granularity, what, damage, strengths, sign
    ("picture", "sharpness", "whole", damage.blur, [0, 0.7, 1.5, 3], -1),
    ("flicker", "temporal_flickering", "whole", damage.noise, [0, 4, 10, 25], -1),
    ("drift", "drift", "whole", damage.hue_ramp, [0, 20, 50, 110], 1),
    ("drift", "drift", "whole", lambda f, s: brighten(f, s), [0, 15, 40, 80], 1),
    ("drift", "drift_detail", "whole", lambda f, s: blur_end(f, s), [0, 0.8, 1.6, 3.2], 1),
    ("frozen", "frozen", "whole", damage.freeze, [0, 0.2, 0.5, 0.8], 1),
    ("returns", "repetition", "whole", lambda f, s: damage.loop_backs(f, int(s)), [0, 1, 2], 1),
    ("borders", "border_flicker", "whole", damage.chunk_flicker, [0, 2, 5, 12], 1),
    ("flow", "flow", "whole", lambda f, s: slow(f, int(s)), [1, 2, 4], -1),
]


def brighten(frames: np.ndarray, levels: float) -> np.ndarray:
    ramp = np.linspace(0, levels, len(frames))[:, None, None, None]
    return np.clip(frames + ramp, 0, 255).astype(np.uint8)


def blur_end(frames: np.ndarray, sigma: float) -> np.ndarray:
    half = len(frames) // 2
    return np.concatenate([frames[:half], damage.blur(frames[half:], sigma)])


def slow(frames: np.ndarray, times: int) -> np.ndarray:
    return np.repeat(frames, times, 0)[:len(frames)]


@pytest.fixture(scope="module")
def clip_of_the_world() -> np.ndarray:
    """12 s of the embedded model's world, as a decoder shows it: uint8 [192, 96, 160, 3]."""
    frames = to_frames(render([sample(7).scene], num_frames=192))[0].numpy()
    return damage.noise(frames, 1.0)


@pytest.mark.parametrize(
    ("metric", "name", "granularity", "hurt", "strengths", "sign"), GRADED,
    ids=[f"{case[1]}{number}" for number, case in enumerate(GRADED)],
)
@pytest.mark.parametrize("source", ["moving", "clip_of_the_world"])
def test_graded_damage_moves_the_metric_one_way(source, metric, name, granularity, hurt, strengths, sign, request):
    """More damage, a worse number, step by step."""
    if metric == "flow":
        pytest.importorskip("cv2", reason="opencv-python-headless is an extra")
    frames = request.getfixturevalue(source)
    got = [values(hurt(frames, strength), metric)[name, granularity, None] for strength in strengths]
    steps = sign * np.diff(got)
    assert (steps > 0).all(), got


ENCODED = {  # how far crf 8 may move each number: about twice as far as it did, since encoders differ
    "brightness": 0.01, "contrast": 0.0004, "sharpness": 0.0002, "saturation": 0.008,  # colours are stored at half size
    "brightness_drift": 0.0003, "contrast_drift": 0.0002, "sharpness_drift": 0.0001, "saturation_drift": 0.001,
    "drift": 0.08, "drift_colour": 0.08, "drift_detail": 0.02,  # Delta E; 2 is just seen
    "temporal_flickering": 0.0008, "border_flicker": 0.02,      # the latter in levels of 255
    "clipped": 0, "clipped_drift": 0, "frozen": 0, "repetition": 0, "rollbacks": 0,
}


def test_reencoding_changes_little(moving, tmp_path):
    """High-quality H.264 moves every download-free number of a whole video by less than its bound."""
    with VideoWriter(tmp_path / "again.mp4", fps=16, crf=8) as writer:
        writer.write(moving)
    with open_video(tmp_path / "again.mp4") as video:
        assert (video.fps, video.height, video.width) == (16, 48, 64)
        again = values(list(video.frames), *BASIC)
    before = values(moving, *BASIC)
    assert again.keys() == before.keys() and {metric for metric, _, _ in before} == ENCODED.keys()
    for (metric, granularity, start), value in before.items():
        if granularity != "second":
            assert again[metric, granularity, start] == pytest.approx(value, abs=ENCODED[metric]), (metric, granularity)


def test_memory_does_not_grow_with_the_video(moving):
    """What the readers hold after five times the frames is larger by numbers, never by frames; the pictures that
    `Returns` remembers are bounded above."""
    import pickle

    def held(times: int) -> int:
        info = VideoInfo("test", FPS, 48, 64, None, ChunkLayout())
        readers = [metric.start(info) for metric in make_metrics(BASIC, Choices())]
        for index in range(192 * times):
            frame = Frame(index, moving[index % 192])
            for reader in readers:
                reader.add(frame)
        return len(pickle.dumps([{**vars(r), "memory": None} for r in readers]))

    short, long = held(1), held(5)
    assert (long - short) / (4 * 12) < 6_000  # bytes a second of video, of which 16 frames have 147,456
