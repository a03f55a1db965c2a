"""The analysers, where the truth is known: on rendered clips, whole and deliberately damaged."""
from __future__ import annotations

import json
import tracemalloc
from collections import deque
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from evaluation.analysers import PROPERTIES, analyse, chance, curves, damage, judge, observe, segment
from evaluation.analysers.behind import LEVELS, colour_distance, look_behind
from evaluation.analysers.motion import MotionWindows
from evaluation.analysers.segment import _connected, grown, inner_edge
from evaluation.analysers.selfcheck import (
    DAMAGES,
    damage_clips,
    draw,
    held_out_clips,
    main,
    shares,
    shuffled,
    with_backdrop_gain,
)
from evaluation.study.scores import is_frozen, read, row_of, speed_ratio
from training.world import Clip, ObjectTruth, Truth, World, sample, to_frames
from training.world.render import render
from training.world.scene import WaveBatch

CLIPS = 40
LENGTH = 121


@pytest.fixture(scope="module")
def watched():
    """Held-out clips with what was seen of them; every other one blurred, noisy and compressed."""
    clips = held_out_clips(CLIPS, first_seed=400)
    frames = [draw(clip.scene) for clip in clips]
    return clips, [observe(damage.as_generated(f, index) if index % 2 else f) for index, f in enumerate(frames)]


@pytest.fixture(scope="module")
def subject():
    """One clip of a single travelling shape, and its frames."""
    clip = damage_clips(1)[0]
    return clip, draw(clip.scene, LENGTH)


def test_what_is_there_is_seen(watched):
    """Rendered truth is read right: at most one video in forty may miss a property."""
    clips, seen = watched
    share = shares(seen, clips, list(range(CLIPS)))
    for name in PROPERTIES:
        assert share[name] >= 1 - 1 / CLIPS, (name, share[name])


def test_other_captions_do_not_fit(watched):
    """Every other video judged by a caption fits as often as chance says: two roads to one number, per property."""
    clips, seen = watched
    truths = [clip.truth for clip in clips]
    expected = chance(truths, truths)
    turns = [shares(seen, clips, [(index + by) % CLIPS for index in range(CLIPS)]) for by in range(1, CLIPS, 4)]
    for name in PROPERTIES:
        assert np.mean([turn[name] for turn in turns]) == pytest.approx(expected[name], abs=0.05), name


def test_shuffling_leaves_no_video_its_caption():
    for count in (2, 3, 40):
        assert all(index != moved for index, moved in enumerate(shuffled(count)))
        assert sorted(shuffled(count)) == list(range(count))


def test_chance_by_hand():
    """Three scenes, counted on fingers: of six mismatched pairs two share a colour, none a motion."""
    truths = [
        Truth((ObjectTruth("star", "red"),), "spin", "navy", "plain"),
        Truth((ObjectTruth("ring", "red"),), "drift", "navy", "noise"),
        Truth((ObjectTruth("star", "blue"),) * 2, "pulse", "teal", "noise"),
    ]
    found = chance(truths, truths)
    assert found == pytest.approx({
        "colour": 2 / 6, "shape": 1 / 6, "pair": 0, "count": 2 / 6, "background": 2 / 6, "pattern": 2 / 6, "motion": 0,
    })


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed_in_proportion(name, subject):
    """The matching number grows with every step of a damage, and clearly from none to the most."""
    clip, frames = subject
    strengths, number, apply = DAMAGES[name]
    values = [number(analyse(apply(clip, frames, strength), clip.truth)) for strength in strengths]
    assert values == sorted(values) and len(set(values)) == len(values), values
    first, last = abs(values[1] - values[0]), abs(values[-1] - values[0])
    assert last > 1.5 * first > 0


@pytest.mark.parametrize("name, untouched", [
    ("hue ramp, degrees", ("shape", "count", "motion")),
    ("background tint ramp", ("colour", "shape", "pair", "count", "motion")),
    ("blur, sigma", ("colour", "shape", "count", "background", "motion")),
    ("freeze, share", ("colour", "shape", "pair", "count", "background", "pattern")),
    ("duplicate, share", ("colour", "shape", "pair", "background", "pattern")),
    ("jump cuts", ("colour", "shape", "pair", "count", "background", "pattern")),
    ("loop backs", ("colour", "shape", "pair", "count", "background", "pattern")),
    ("shape swap, share", ("colour", "count", "background", "pattern", "motion")),
    ("chunk flicker, levels", ("colour", "shape", "pair", "count", "background", "motion")),
])
def test_damage_leaves_the_rest_alone(name, untouched, subject):
    """Middling damage of one kind costs the other properties next to nothing."""
    clip, frames = subject
    strengths, _, apply = DAMAGES[name]
    rate = analyse(apply(clip, frames, strengths[1]), clip.truth).video.rate
    for other in untouched:
        assert rate[other] >= 0.95, (other, rate[other])


def test_speed_is_that_of_the_scene(watched):
    """Pixels a second from the picture agree with the waves that drew it, camera aside."""
    clips, seen = watched
    for clip, one in zip(clips, seen, strict=True):
        if clip.truth.motion not in ("orbit", "zigzag", "drift"):
            continue
        seconds = torch.arange(81, dtype=torch.float64) / 16
        x = WaveBatch.of([body.x for body in clip.scene.bodies], "cpu").at(seconds)
        y = WaveBatch.of([body.y for body in clip.scene.bodies], "cpu").at(seconds)
        true = torch.hypot(x.diff(), y.diff()).mean().item() * 16
        assert judge(one, clip.truth).video.speed == pytest.approx(true, rel=0.12, abs=2.0), clip.caption


def test_a_whole_video_stays_whole(subject):
    """A rendered half minute neither drifts nor freezes nor leaps, and its curves are the means of its frames."""
    clip, _ = subject
    analysis = analyse(draw(clip.scene, 481), clip.truth)
    video = analysis.video
    assert video.background_drift < 0.006 and video.colour_error < 0.04 and abs(video.flicker) < 0.002
    assert (video.jumps, video.rollbacks, video.duplicates, video.survival) == (0, 0, 0.0, 1.0)
    assert video.sharpness_ratio == pytest.approx(1, abs=0.06)
    assert speed_ratio([row_of(clip, analysis)]) == pytest.approx(1, abs=0.15)
    series = curves(analysis)
    assert len(series["speed"]) == 30
    assert series["step"][7] == pytest.approx(np.nanmean(analysis.frames.step[7 * 16:8 * 16]))
    assert analysis.between(7, 8)["step"] == series["step"][7]


@pytest.mark.parametrize("total, frames, stride", [(1, 1, 1), (40, 40, 16), (41, 8, 3), (100, 9, 4), (321, 81, 16)])
def test_a_frame_is_judged_by_the_nearest_window(total, frames, stride):
    """Against every distance; where two are as near, the earlier window."""
    start = np.arange(0, total - frames + 1, stride)
    windows = MotionWindows(start, frames, np.zeros((len(start), 1), int))
    distance = np.abs(np.arange(total)[:, None] - (start + frames / 2))
    assert windows.nearest(total).tolist() == distance.argmin(1).tolist()


def test_windows_of_an_hour_cost_what_its_frames_do():
    """57,600 frames and 3,595 windows: a table of both is 1.6 GB."""
    windows = MotionWindows(np.arange(0, 57_520, 16), 81, np.zeros((3595, 1), int))
    tracemalloc.start()
    try:
        windows.nearest(57_600)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_free_colours_should_stay_what_they_were():
    """No name to hold them against: the first seconds are the truth, and a colour half way to another name is wrong."""
    clip = next(clip for clip in (sample(seed, "free") for seed in range(50)) if len(clip.scene.bodies) == 1)
    frames = draw(clip.scene, LENGTH)
    kept = analyse(frames, clip.said).video
    assert kept.rate["colour"] == kept.rate["background"] == 1
    body = clip.scene.bodies[0]
    other = replace(clip.scene, bodies=(replace(body, rgb=body.rgb[1:] + body.rgb[:1]),))
    turned = analyse(damage.switch(frames, draw(with_backdrop_gain(other, 0.4), LENGTH), 0.3), clip.said).frames
    for right in (turned.colour, turned.background):
        assert right[:60].all() and not right[-1]


def test_a_frozen_video_is_called_frozen(subject):
    clip, frames = subject
    assert is_frozen([read(damage.freeze(frames, 0.5), clip)]) and not is_frozen([read(frames, clip)])


def test_nothing_there_is_nothing_right():
    """Grey frames hold no shape; what is unsaid stays None, and all of it can be written as JSON."""
    truth = Truth((ObjectTruth("star", "red"),), background="gray")
    analysis = analyse(np.full((40, 96, 160, 3), 115, np.uint8), truth)
    assert analysis.video.holds == {
        "colour": False, "shape": False, "pair": False, "count": False, "background": True, "pattern": None,
        "motion": None,
    }
    assert analysis.video.survival == 0
    row = row_of(Clip(0, "test", "", truth, truth, None), analysis)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["video"]["speed"] is None and row["said"]["pattern"] is None and row["pixel_frames"] == 40


def test_a_bright_background_is_no_subject():
    """Where the background turned into a subject's colour, the subject is still found and the background is wrong."""
    frames = np.zeros((20, 96, 160, 3), np.uint8)
    frames[:] = (30, 214, 237)
    frames[:, 30:60, 40:70] = (230, 33, 36)
    video = analyse(frames, Truth((ObjectTruth("square", "red"),), background="teal")).video
    assert video.rate == {
        "colour": 1, "shape": 1, "pair": 1, "count": 1, "background": 0, "pattern": None, "motion": None,
    }


def test_touching_shapes_of_two_colours_are_two():
    frames = np.full((3, 96, 160, 3), 40, np.uint8)
    frames[:, 30:60, 40:70] = (230, 33, 36)
    frames[:, 30:60, 70:100] = (38, 84, 250)
    truth = Truth((ObjectTruth("square", "red"), ObjectTruth("square", "blue")))
    assert analyse(frames, truth).video.rate["count"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_components_equal_a_flood_fill(seed):
    """Runs united row by row give the components that walking from pixel to pixel gives."""
    mask = np.random.default_rng(seed).random((3, 17, 23)) < 0.55
    found = _connected(mask)
    places = [tuple(map(int, place)) for place in zip(*np.unravel_index(found.at, mask.shape), strict=True)]
    ours = {}
    for component, place in zip(found.spread(np.arange(len(found.area))), places, strict=True):
        ours.setdefault(component, set()).add(place)
    assert [{place[0] for place in group} for group in ours.values()] == [{frame} for frame in found.frame]
    assert [len(group) for group in ours.values()] == found.area.tolist()
    edge = [sum(y in (0, 16) or x in (0, 22) for _, y, x in group) for group in ours.values()]
    assert edge == found.touches.tolist()
    left = {tuple(map(int, place)) for place in np.argwhere(mask)}
    theirs = []
    while left:
        queue, group = deque([left.pop()]), set()
        while queue:
            t, y, x = queue.popleft()
            group.add((t, y, x))
            for place in ((t, y + 1, x), (t, y - 1, x), (t, y, x + 1), (t, y, x - 1)):
                if place in left:
                    left.remove(place)
                    queue.append(place)
        theirs.append(frozenset(group))
    assert {frozenset(group) for group in ours.values()} == set(theirs)


def test_growing_is_dilation_and_edges_are_its_complement():
    """A grown mask is what max-pooling gives; a mask without its inner edge is its erosion."""
    mask = np.random.default_rng(0).random((2, 20, 30)) < 0.05
    pooled = torch.nn.functional.max_pool2d(torch.from_numpy(mask).float()[:, None], 5, 1, 2)[:, 0] > 0
    assert np.array_equal(grown(mask, 2), pooled.numpy())
    wide = grown(mask, 2)
    cross = torch.tensor([[0., 1, 0], [1, 1, 1], [0, 1, 0]])[None, None]
    padded = torch.nn.functional.pad(torch.from_numpy(wide).float()[:, None], (1, 1, 1, 1), value=1)
    eroded = torch.nn.functional.conv2d(padded, cross)[:, 0] == 5
    assert np.array_equal(wide & ~inner_edge(wide), eroded.numpy())


def test_colour_distance_is_the_sorted_difference():
    """From histograms or by sorting all pixels: one number. Sliding a texture costs nothing."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, LEVELS, (2, 500, 3))
    def histogram(values):
        return np.stack([np.bincount(values[:, channel], minlength=LEVELS) for channel in range(3)])

    assert colour_distance(histogram(a), histogram(b)) == pytest.approx(
        np.abs(np.sort(a, 0) - np.sort(b, 0)).mean() / 255
    )
    assert colour_distance(histogram(a), histogram(np.roll(a, 77, 0))) == 0
    assert colour_distance(histogram(a // 2), histogram(a // 2 + 20)) == pytest.approx(20 / 255)


def test_blocks_are_only_a_way_to_save_memory(subject, monkeypatch):
    """Seven frames at a time show what all show: float32 rounds a little otherwise, and where that takes a frequency
    over the rim of a peak, the peak's share of the energy changes by what this frequency holds."""
    frames = damage.as_generated(subject[1][:40])
    whole = asdict(observe(frames))
    monkeypatch.setattr(segment, "BLOCK_FRAMES", 7)
    parts = asdict(observe(frames))
    for ours, theirs in zip([whole, *_groups(whole)], [parts, *_groups(parts)], strict=True):
        for name, values in ours.items():
            if not isinstance(values, dict):
                atol = 0.05 if name == "energy" else 1e-6
                np.testing.assert_allclose(theirs[name], values, rtol=1e-5, atol=atol, err_msg=name)


def _groups(observation):
    return [observation[name] for name in ("tracks", "behind", "motion")]


@pytest.mark.parametrize("size", [(96, 160), (94, 158)])
def test_a_mirrored_background_has_the_same_pattern(size):
    """Slanted stripes on a ramp, with noise, and their mirror images: half of a picture's frequencies tell the rest."""
    ys, xs = np.mgrid[:size[0], :size[1]]
    stripes = 110 + 30 * np.sign(np.sin(0.31 * xs + 0.17 * ys)) + 0.1 * ys
    noisy = stripes[..., None] + np.random.default_rng(2).normal(0, 6, (*size, 3))
    frames = damage._bytes(np.stack([noisy, noisy[:, ::-1], noisy[::-1]]))
    energy = look_behind(frames, np.ones(frames.shape[:3], bool)).energy
    np.testing.assert_allclose(energy[1:], energy[[0, 0]], rtol=1e-5, atol=0.01)  # a frequency on a peak's rim
    assert energy[0, 2] > 0.8 > 0.3 > energy[0, 3]


def test_the_analysers_follow_the_frame_size():
    """At another size everything is read as at the usual one."""
    world = World(height=144, width=240)
    for seed in (401, 404, 409):
        clip = sample(seed, "test", world)
        frames = to_frames(render([clip.scene], world=world, num_frames=81))[0].numpy()
        assert all(analyse(frames, clip.truth).video.holds.values()), clip.caption


@pytest.mark.parametrize("frames", [
    np.zeros((4, 8, 8, 3), np.float32), np.zeros((4, 3, 8, 8), np.uint8), np.zeros((1, 8, 8, 3), np.uint8),
])
def test_wrong_frames_are_refused(frames):
    with pytest.raises(ValueError, match="uint8"):
        observe(frames)


def test_a_window_outside_the_video_is_refused(subject):
    clip, frames = subject
    with pytest.raises(ValueError, match="no frame between"):
        analyse(frames[:40], clip.truth).between(55, 60)


@pytest.mark.parametrize("flags", [["--clips", "0"], ["--clips", "1"], ["--threads", "0"]])
def test_selfcheck_refuses_numbers_that_show_nothing(flags, capsys):
    """No clips give no shares, and a single one cannot be shuffled."""
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2 and f"{' '.join(flags)} is too small" in capsys.readouterr().err
