"""On a GPU: frames made beside the transformer equal frames made between its chunks. Skipped without one."""
from __future__ import annotations

import pytest
import torch

from benchmarks.settings import Setting
from pipeline.engine import Engine, VideoRequest
from pipeline.noise import SampleSeed
from utils.profiling import StageClock

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROMPTS = ["a red circle", "a blue square", "a green star"]


def engine(graphs: str, overlap: str, vae_device: int = 0) -> Engine:
    setting = Setting(model="tiny", attention="sdpa", compile="off", graphs=graphs, decoder=graphs, overlap=overlap)
    made = Engine(setting.plan(torch.device("cuda", 0), torch.device("cuda", vae_device)))
    made.prepare(PROMPTS)
    return made


def videos(made: Engine) -> list[torch.Tensor]:
    result = []
    for text in PROMPTS:
        chunks = list(made.stream([VideoRequest(text, SampleSeed(3))], 36))
        result += [torch.cat([c.latents.cpu() for c in chunks], dim=1), torch.cat([c.frames for c in chunks], dim=1)]
    return result


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_frames_made_aside_are_the_same(graphs: str) -> None:
    """Latents and uint8 frames of three videos, bit for bit; the second and third are replayed."""
    between, aside = engine(graphs, "off"), engine(graphs, "on")
    assert aside._lane.is_aside and not between._lane.is_aside
    assert all(torch.equal(a, b) for a, b in zip(videos(aside), videos(between), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("graphs", ["off", "on"])
def test_frames_made_on_another_device_are_the_same(graphs: str) -> None:
    """Two devices of one kind: the same kernels, the same bits."""
    assert all(torch.equal(a, b) for a, b in zip(
        videos(engine(graphs, "off", vae_device=1)), videos(engine(graphs, "off")), strict=True,
    ))


def test_no_chunk_waits_for_the_device_but_where_frames_are_taken() -> None:
    """Sync debug mode "error" after the first chunk; waiting for an event is no such synchronisation."""
    made, clock = engine("on", "on"), StageClock(torch.device("cuda", 0))
    videos(made)
    chunks = made.stream([VideoRequest(PROMPTS[0], SampleSeed(3))], 36, clock)
    seen = [next(chunks).frames]
    assert seen[0].is_pinned()
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen += [chunk.frames for chunk in chunks]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.cat(seen, dim=1), videos(made)[1])
    assert min(clock.totals_ms()[name] for name in ("dit", "vae")) > 0


def test_values_that_are_no_numbers_are_not_handed_out() -> None:
    """The decoder breaks after the first chunk: nothing more is out."""
    made = engine("off", "on")
    chunks = made.stream([VideoRequest(PROMPTS[0], SampleSeed(3))], 36)
    next(chunks)
    made._decoder._mean.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the decoder made frames of latent frames 3..5"):
        next(chunks)
