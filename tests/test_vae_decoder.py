"""The fast decoder of the Wan VAE against the plain passes, stream by stream and replayed."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from test_graphs import TapeRecorder
from test_vae import SHAPES
from torch import Tensor
from torch.testing import assert_close

from wan.stream import StreamDecoder
from wan.vae import WanVAE
from wan.vae_passes import VaePasses


@pytest.mark.parametrize("shape", ["plain", "deep"])
@pytest.mark.parametrize("part_frames", [1, 3])
def test_fast_decoder_equals_the_plain_passes(shape: str, part_frames: int) -> None:
    """Chunks of latents against one at a time, every split; 1e-4: the plain ones double pixels in float32."""
    channels = SHAPES[shape]["z_dim"]
    plain, fast = (WanVAE(small_vae(shape).double()) for _ in range(2))
    plain._passes = VaePasses(plain._model, activate_in_float64)
    fast.accelerate(None, part_frames=part_frames)
    latents = torch.randn(2, 7, channels, 4, 6, generator=torch.Generator().manual_seed(1))
    for split in ([7], [3, 3, 1], [1, 2, 4]):
        ours, theirs = fast.stream(), plain.stream()
        for part in latents.split(split, dim=1):
            assert_close(ours.decode(part), theirs.decode(part), rtol=0, atol=1e-4)


def test_fast_streams_take_turns() -> None:
    """One set of buffers, three videos of two sizes: each gets its own past back, as if it were alone."""
    fast = WanVAE(small_vae("deep"))
    fast.accelerate(None, part_frames=2)
    videos = [torch.randn(1, 6, 3, 4, width, generator=torch.Generator().manual_seed(width)) for width in (6, 5, 6)]
    alone = [torch.cat([part for part in decode_all(fast.stream(), video)], dim=1) for video in videos]
    streams = [fast.stream() for _ in videos]
    turns = [decode_all(stream, video) for stream, video in zip(streams, videos, strict=True)]
    together = [torch.cat(parts, dim=1) for parts in zip(*zip(*turns, strict=True), strict=True)]
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours, theirs)


def test_a_closed_stream_is_not_remembered() -> None:
    """Of a stream that goes on the next one saves the past; of a closed one nothing, and it cannot go on."""
    fast = WanVAE(small_vae("deep"))
    fast.accelerate(None, part_frames=2)
    latents = torch.randn(1, 2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    kept, closed, last = (fast.stream() for _ in range(3))
    for stream in (kept, closed):
        stream.decode(latents)
    closed.close()
    alone = last.decode(latents)
    assert kept._past and not closed._past
    assert torch.equal(alone, fast.stream().decode(latents))
    with pytest.raises(RuntimeError, match="this stream was closed"):
        closed.decode(latents)


def test_fast_decoder_replays_what_it_would_compute() -> None:
    """A tape stands in for CUDA graphs, first chunks included; a result does not change after it was given."""
    eager, replaying = (WanVAE(small_vae("deep")) for _ in range(2))
    recorder = TapeRecorder()
    eager.accelerate(None, part_frames=2)
    replaying.accelerate(recorder, part_frames=2)
    for seed in range(3):
        video = torch.randn(1, 12, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
        ours, theirs = (list(decode_all(vae.stream(), video)) for vae in (replaying, eager))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert recorder.recorded == 2 and recorder.replayed >= 10


def test_other_designs_keep_their_passes() -> None:
    """A decoder that makes patches is not made fast; the VAE still decodes."""
    vae = WanVAE(small_vae("patches"))
    vae.accelerate(None, part_frames=3)
    assert vae.part_frames == 1 and vae.stream().decode(torch.zeros(1, 2, 16, 2, 2)).shape[1] == 5


def small_vae(shape: str) -> AutoencoderKLWan:
    torch.manual_seed(0)
    statistics = {} if SHAPES[shape]["z_dim"] == 16 else {
        name: [value] * SHAPES[shape]["z_dim"] for name, value in (("latents_mean", 0.0), ("latents_std", 1.0))
    }
    return AutoencoderKLWan(**SHAPES[shape], **statistics)


def activate_in_float64(x: Tensor, gamma: Tensor) -> Tensor:
    """`normalise_activate`, which normalises in float32, without that rounding."""
    return F.silu(x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) * x.shape[1] ** 0.5 * gamma.view(-1, 1, 1))


def decode_all(stream: StreamDecoder, video: Tensor) -> Iterator[Tensor]:
    for part in video.split(2, dim=1):
        yield stream.decode(part)
