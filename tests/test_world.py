"""The embedded model's world: what a seed, a sentence and a scene promise."""
from __future__ import annotations

import colorsys
import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from training.world import (
    SPLITS,
    CaptionError,
    ObjectTruth,
    Truth,
    World,
    parse_caption,
    render,
    sample,
    sentence_is_held_out,
    to_frames,
    words,
)
from training.world.scene import WAVES, Wave, WaveBatch
from training.world.shapes import POLYGONS, RING_HOLE, ROUND, signed_distance
from training.world.vocabulary import COLOURS, HELD_OUT_PAIRS, KINDS, MOTIONS, SIZES

CLIPS = 300


@pytest.fixture(scope="module")
def clips():
    return {split: [sample(seed, split) for seed in range(CLIPS)] for split in SPLITS}


def hue(rgb):
    return colorsys.rgb_to_hsv(*rgb)[0]


def alone(scene, *bodies):
    return replace(scene, bodies=bodies)


def test_a_seed_is_a_clip_in_any_order_and_batch(clips):
    """A clip depends on its split and seed alone, and a scene looks the same in every batch."""
    assert [sample(seed, "test") for seed in reversed(range(20))] == clips["test"][19::-1]
    scenes = [clip.scene for clip in clips["train"][:7]]
    together = render(scenes, num_frames=5)
    for scene, pixels in zip(scenes, together, strict=True):
        torch.testing.assert_close(render([scene], num_frames=5)[0], pixels, rtol=0, atol=1e-5)


def test_a_video_may_be_drawn_from_any_frame_on(clips):
    """Frames 70..79 drawn alone equal frames 70..79 of a longer drawing."""
    scenes = [clip.scene for clip in clips["train"][:3]]
    torch.testing.assert_close(
        render(scenes, start_frame=70, num_frames=10), render(scenes, num_frames=80)[:, 70:], rtol=0, atol=1e-5,
    )


def test_pixels_have_the_promised_shape_and_range(clips):
    pixels = render([clips["train"][0].scene], num_frames=3)
    assert pixels.shape == (1, 3, 3, 96, 160) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    frames = to_frames(pixels)
    assert frames.shape == (1, 3, 96, 160, 3) and frames.dtype == torch.uint8
    torch.testing.assert_close(frames.float() / 127.5 - 1, pixels.permute(0, 1, 3, 4, 2), rtol=0, atol=1 / 127.5)


@pytest.mark.parametrize("seed", [3, 8, 11, 17])
def test_the_frame_size_is_a_parameter(seed):
    """The same seed at twice the size, averaged over 2 x 2 pixels, is the same picture up to its edges."""
    small, large = World(), World(height=192, width=320)
    fine = render([sample(seed, "train", large).scene], world=large, num_frames=2)[0]
    coarse = render([sample(seed, "train", small).scene], world=small, num_frames=2)[0]
    assert (torch.nn.functional.avg_pool2d(fine, 2) - coarse).abs().mean() < 0.012  # narrow stripes are all edges


def test_the_frame_rate_is_a_parameter():
    """At half the rate every frame is every second one of the full rate."""
    fast, slow = World(fps=16), World(fps=8)
    scene = sample(5).scene
    torch.testing.assert_close(
        render([scene], world=slow, num_frames=4), render([scene], world=fast, num_frames=8)[:, ::2], rtol=0, atol=1e-5,
    )


def test_captions_are_never_wrong(clips):
    """Read back, a caption says what was said; what was said is true; and every word is in the vocabulary."""
    known = set(words())
    for clip in (clip for split in SPLITS for clip in clips[split]):
        assert parse_caption(clip.caption) == clip.said
        assert set(re.findall(r"[a-z]+", clip.caption.lower())) <= known
        for name in ("motion", "background", "pattern"):
            assert getattr(clip.said, name) in (None, getattr(clip.truth, name))
        for said, true in zip(clip.said.objects, clip.truth.objects, strict=True):
            assert (said.kind, said.colour) == (true.kind, true.colour) and said.size in (None, true.size)


def test_captions_vary_and_leave_things_out(clips):
    captions = {clip.caption for clip in clips["train"]}
    assert len(captions) > 0.95 * CLIPS
    said = [clip.said for clip in clips["train"]]
    for missing in (
        [one.motion is None for one in said], [one.pattern is None for one in said],
        [one.objects[0].size is None for one in said], [not one.colours for one in said],
        [one.background is None for one in said],
    ):
        assert 0.05 < sum(missing) / CLIPS < 0.6


def test_the_scene_is_what_the_truth_says(clips):
    """Kinds, colours and sizes of the bodies are those of the truth; all are named but colours that have no name."""
    for clip in clips["train"] + clips["free"]:
        def size_of(body):
            return min(SIZES, key=lambda size: abs(SIZES[size] - body.radius))

        def colour_of(body):
            return min(COLOURS, key=lambda name: math.dist(COLOURS[name], body.rgb))

        named = bool(clip.truth.colours)
        drawn = Counter((body.kind, colour_of(body) if named else None, size_of(body)) for body in clip.scene.bodies)
        assert drawn == Counter((item.kind, item.colour, item.size) for item in clip.truth.objects)
        for body in clip.scene.bodies:
            forbidden = [COLOURS[colour] for kind, colour in HELD_OUT_PAIRS if kind == body.kind]
            assert min((abs(hue(rgb) - hue(body.rgb)) for rgb in forbidden), default=1) > 0.02
        assert clip.scene.backdrop.pattern == clip.truth.pattern
        turning = [body.spin != 0 for body in clip.scene.bodies]
        assert all(turning) if clip.truth.motion == "spin" else not any(turning)


def test_shapes_stand_in_the_order_of_the_caption(clips):
    """From left to right; on an orbit, by a third or half of a turn each."""
    for clip in [clip for split in SPLITS for clip in clips[split] if len(clip.scene.bodies) > 1]:
        bodies = clip.scene.bodies
        assert [body.kind for body in bodies] == [item.kind for item in clip.truth.objects]
        if clip.truth.motion == "orbit":
            phases = [body.x.phase - bodies[0].x.phase for body in bodies]
            assert phases == pytest.approx([index / len(bodies) for index in range(len(bodies))])
        else:
            left = [body.center[0] for body in bodies]
            assert left == sorted(left), clip.caption


def test_splits_share_nothing_they_should_not(clips):
    """Held-out pairs and sentences never meet training, by the sets themselves."""
    pairs = {split: {pair for clip in clips[split] for pair in clip.truth.pairs} for split in SPLITS}
    assert not (pairs["train"] | pairs["test"]) & HELD_OUT_PAIRS
    assert all(set(clip.truth.pairs) & HELD_OUT_PAIRS for clip in clips["held_out"])
    assert pairs["held_out"] >= HELD_OUT_PAIRS
    trained = {clip.caption for clip in clips["train"]} | {sample(seed).caption for seed in range(5000, 5600)}
    assert not trained & {clip.caption for clip in clips["test"]}
    assert all(sentence_is_held_out(clip.caption) for clip in clips["test"] + clips["free"])


def test_free_colours_are_free(clips):
    """Where no colour is said, shapes and backgrounds take all hues; elsewhere every colour is said."""
    assert not any(clip.truth.colours or clip.truth.background for clip in clips["free"])
    for clip in clips["test"] + clips["held_out"]:
        assert clip.said.background and sum(clip.said.colours.values()) == len(clip.said.objects)

    def widest_gap(colours):
        hues = sorted(hue(rgb) for rgb in colours)
        return max((b - a) % 1.0 for a, b in zip(hues, hues[1:] + hues[:1], strict=True))

    shapes = [body.rgb for clip in clips["free"] for body in clip.scene.bodies if min(body.rgb) < 0.6]
    lights = [clip.scene.backdrop.light for clip in clips["free"]]
    behind = [rgb for rgb in lights if max(rgb) - min(rgb) > 0.05]
    named = [body.rgb for clip in clips["test"] for body in clip.scene.bodies if min(body.rgb) < 0.6]
    assert widest_gap(shapes) < 0.06 and widest_gap(behind) < 0.12 < widest_gap(named)


@pytest.mark.parametrize("split, shares", [("train", (0.35, 0.37, 0.28)), ("test", (0.65, 0.25, 0.10))])
def test_the_shares_are_as_promised(split, shares):
    """So many scenes have one, two and three shapes, more of the hard ones in training; motions are even."""
    truths = [sample(seed, split).truth for seed in range(2000)]
    counts = Counter(len(truth.objects) for truth in truths)
    for count, share in zip((1, 2, 3), shares, strict=True):
        assert counts[count] / 2000 == pytest.approx(share, abs=0.035)
    motions = Counter(truth.motion for truth in truths)
    for motion in MOTIONS:
        assert motions[motion] / 2000 == pytest.approx(1 / 6, abs=0.035)


def test_shapes_stay_inside_and_apart(clips):
    """At any time no shape touches the frame's outline, and together they cover what they cover one by one."""
    chosen = (
        [clip for clip in clips["train"] if len(clip.scene.bodies) > 1][:14]
        + clips["train"][:10] + clips["held_out"][:6]
    )
    for clip in chosen:
        for start in (0, 37, 800):
            empty = render([alone(clip.scene)], start_frame=start, num_frames=3)
            def covered(scene, start=start, empty=empty):
                return (render([scene], start_frame=start, num_frames=3) - empty).abs().amax(2)[0] > 0.02

            whole = covered(clip.scene)
            single = sum(covered(alone(clip.scene, body)).long() for body in clip.scene.bodies)
            outline = torch.cat([whole[:, 0], whole[:, -1], whole[:, :, 0], whole[:, :, -1]], 1)
            assert not outline.any(), clip.caption
            assert single.max() == 1 and torch.equal(single.bool(), whole), clip.caption


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turn", [0.0, 0.07])
def test_distances_measure_the_area(kind, turn):
    """The pixels with a negative distance fill the area that geometry gives."""
    radius, half = 200.0, 256
    axis = torch.arange(2 * half) - half + 0.5
    distance = signed_distance(
        torch.tensor([KINDS.index(kind)]), torch.tensor(radius).view(1, 1, 1), torch.tensor(turn).view(1, 1, 1),
        axis.view(1, 1, -1), axis.view(1, -1, 1),
    )
    if kind in POLYGONS:
        corners, outer, ratio = POLYGONS[kind]
        area = corners * outer ** 2 * ratio * math.sin(math.pi / corners) * radius ** 2
    else:
        area = math.pi * radius ** 2 * (ROUND[kind] ** 2 - (RING_HOLE ** 2 if kind == "ring" else 0))
    assert (distance < 0).sum().item() == pytest.approx(area, rel=0.01)


@pytest.mark.parametrize("shape", WAVES)
def test_waves_are_periodic_and_bounded(shape):
    """One period later everything is as before, and nothing leaves the amplitude."""
    batch = WaveBatch.of([Wave(shape, 3.0, 0.7, 0.2)], "cpu")
    seconds = torch.linspace(0, 3, 500, dtype=torch.float64)
    values = batch.at(seconds)
    torch.testing.assert_close(batch.at(seconds + 10 / 0.7), values, rtol=0, atol=1e-9)
    assert values.abs().max() <= 3.0 + 1e-9 and (shape == "still") == (values.abs().max() == 0)


def test_motion_never_ages(clips):
    """Speed and spread of the paths are the same in the first minutes as an hour later."""
    bodies = [body for clip in clips["train"] for body in clip.scene.bodies]
    xs, ys = WaveBatch.of([body.x for body in bodies], "cpu"), WaveBatch.of([body.y for body in bodies], "cpu")
    def statistics(start):
        seconds = start + torch.arange(0, 120, 1 / 16, dtype=torch.float64)
        x, y = xs.at(seconds), ys.at(seconds)
        return torch.stack([torch.hypot(x.diff(), y.diff()).mean(), x.std(-1).mean(), y.std(-1).mean()])

    torch.testing.assert_close(statistics(3600.0), statistics(0.0), rtol=0.02, atol=0)


@pytest.mark.parametrize("text, expected", [
    ("Two green stars spin on a navy background.", Truth((ObjectTruth("star", "green"),) * 2, "spin", "navy")),
    ("a pair of Big red discs, hopping; dark  blue stripes",
     Truth((ObjectTruth("circle", "red", "large"),) * 2, "bounce", "navy", "stripes")),
    ("on a checkered grey backdrop, a small cyan ring and two little white squares drift",
     Truth(
         (ObjectTruth("ring", "cyan", "small"), *(ObjectTruth("square", "white", "small"),) * 2),
         "drift", "gray", "checker",
     )),
    ("A purple gradient with an orange triangle",
     Truth((ObjectTruth("triangle", "orange"),), None, "plum", "gradient")),
    ("A circle on a navy background", Truth((ObjectTruth("circle", None),), None, "navy", None)),
    ("Two discs on stripes", Truth((ObjectTruth("circle", None),) * 2, None, None, "stripes")),
    ("On solid teal a small red ring", Truth((ObjectTruth("ring", "red", "small"),), None, "teal", "plain")),
    ("A blue star zig-zags against a plain black background",
     Truth((ObjectTruth("star", "blue"),), "zigzag", "charcoal", "plain")),
])
def test_sentences_of_other_hands_are_read(text, expected):
    assert parse_caption(text) == expected


@pytest.mark.parametrize("text, says", [
    ("A red circel on a navy background", "Did you mean 'circle'"),
    ("A red elephant", "unknown word 'elephant'"),
    ("A plain navy background", "names 0 shapes"),
    ("Two red rings and two white rings", "names 4 shapes"),
    ("Red stars on a navy background", "how many stars"),
    ("A red circle spinning and drifting", "two kinds of motion"),
    ("A navy circle", "that is a background"),
    ("A solid red circle", "that is a background"),
    ("A red circle on a yellow background", "a colour of shapes"),
    ("A red blue circle", "wait for one noun"),
    ("Two red circle", "does not agree"),
])
def test_other_sentences_are_refused_by_name(text, says):
    with pytest.raises(CaptionError, match=says):
        parse_caption(text)


def test_truth_survives_json(clips):
    for clip in clips["train"][:50]:
        data = json.loads(json.dumps(clip.said.to_json()))
        assert data == clip.said.to_json()
        assert Truth(**data | {"objects": tuple(ObjectTruth(**item) for item in data["objects"])}) == clip.said


@pytest.mark.parametrize("call", [
    lambda: sample(1, "validation"), lambda: sample(-1), lambda: World(width=90),
    lambda: render([]), lambda: render([sample(0).scene], num_frames=0), lambda: Truth(()),
    lambda: ObjectTruth("cube", "red"),
])
def test_wrong_calls_say_so(call):
    with pytest.raises(ValueError):
        call()
