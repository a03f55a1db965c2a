"""Lengths and sizes: pixels, latent frames, tokens, chunks."""
from __future__ import annotations

import pytest

from wan.geometry import VideoGeometry


def geometry(**changes) -> VideoGeometry:
    return VideoGeometry(**({"height": 480, "width": 832, "fps": 16, "chunk_frames": 3} | changes))


def test_frame_tokens_of_the_papers() -> None:
    """480x832 gives 30 x 52 patches: the papers' 1,560 tokens a frame."""
    assert (geometry().rows, geometry().columns, geometry().frame_tokens) == (30, 52, 1560)


@pytest.mark.parametrize("pixel_frames", range(1, 60))
def test_latent_frames_are_the_fewest_that_cover(pixel_frames: int) -> None:
    """Enough latent frames to decode the length asked for, and one fewer would not do."""
    g = geometry()
    latent = g.latent_frames(pixel_frames)
    assert g.pixel_frames(latent) >= pixel_frames > g.pixel_frames(latent - 1)


@pytest.mark.parametrize(("seconds", "latent", "whole"), [(5, 21, 21), (60, 241, 243), (0.01, 1, 3), (256, 1025, 1026)])
def test_seconds(seconds: float, latent: int, whole: int) -> None:
    """latents = ceil((16 s - 1) / 4) + 1, rounded up to whole chunks."""
    g = geometry()
    assert g.latent_frames(g.pixel_frames_of_seconds(seconds)) == latent
    assert g.whole_chunks(latent) == whole


@pytest.mark.parametrize("chunk_frames", [1, 2, 3, 5])
@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("given", [0, 1, 2, 3, 7])
def test_chunks_tile_the_video(chunk_frames: int, independent: bool, given: int) -> None:
    """Given and generated chunks follow each other without gap, and indices count on."""
    g = geometry(chunk_frames=chunk_frames, independent_first_frame=independent)
    frames = g.whole_chunks(given + 11, prefilled=given)
    spans = [*g.prefill_chunks(given), *g.chunks(frames, prefilled=given)]
    assert [s.index for s in spans] == list(range(len(spans)))
    assert [s.start for s in spans] == [0] + [s.stop for s in spans[:-1]]
    assert spans[-1].stop == frames >= given + 11
    generated = [s for s in spans if s.start >= given]
    assert all(s.frames == chunk_frames for s in generated[independent and not given:])
    assert generated[0].frames == (1 if independent and not given else chunk_frames)


def test_bad_sizes_are_refused() -> None:
    """A size that patches do not cover names the next one that they do."""
    with pytest.raises(ValueError, match=r"height=470 .*multiple of 16.*Use 464"):
        geometry(height=470)
    with pytest.raises(ValueError, match="width=1600000000 is more than .* at most 16384"):
        geometry(width=1_600_000_000)
    with pytest.raises(ValueError, match="at least one latent frame"):
        geometry(chunk_frames=0)
    with pytest.raises(ValueError, match="the next length that is: 21"):
        geometry().chunks(20)
    with pytest.raises(ValueError, match="next length that is: 3"):
        geometry().chunks(0)
