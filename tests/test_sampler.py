"""Timesteps, sigmas, and the noise that chunks start from."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from pipeline.noise import SampleSeed, SeededNoise
from pipeline.sampler import FewStepSampler, schedule
from wan.geometry import ChunkSpan

GOLDEN = Path(__file__).parent / "golden"


def test_schedule_equals_the_released_one() -> None:
    """Bit for bit: a float64 table would give 833.33 where the model was trained on 833.3333129882812."""
    golden = load_file(GOLDEN / "schedule.safetensors")
    sampler = FewStepSampler([1000, 750, 500, 250], shift=5.0, warp=True)
    assert torch.equal(schedule(5.0), golden["sigmas"])
    assert sampler.times == tuple(golden["warped_denoising_timesteps"].tolist())


@pytest.mark.parametrize(
    ("steps", "shift", "warp", "times"),
    [
        ([1000, 800, 600, 400, 200], 5.0, True, [1000, 952.38, 882.35, 769.23, 555.56]),  # Rolling Forcing
        ([1000, 750, 500, 250], 8.0, True, [1000, 960, 888.89, 727.27]),                  # CausVid, four steps
        ([1000, 757, 522], 8.0, False, [1000, 757, 522]),                                 # CausVid, three steps
    ],
)
def test_published_timesteps(steps: list[int], shift: float, warp: bool, times: list[float]) -> None:
    """The timesteps that the papers of this family print."""
    assert_close(
        torch.tensor(FewStepSampler(steps, shift, warp).times), torch.tensor([float(t) for t in times]),
        rtol=0, atol=6e-3,
    )


def test_one_exact_step_recovers_the_clean_latent() -> None:
    """If the flow is noise minus clean, every pass points to the clean latent itself."""
    sampler = FewStepSampler([1000, 750, 500, 250], shift=5.0, warp=True)
    clean, noise = torch.randn(2, 1, 3, 4, 6, 8, dtype=torch.float64)
    for index in range(sampler.num_passes):
        x = sampler.renoise(clean, noise, index)
        assert_close(sampler.clean(x, noise - clean, index), clean, rtol=0, atol=1e-12)


def test_fractional_warped_step_is_refused() -> None:
    """Warped steps index a table."""
    with pytest.raises(ValueError, match="whole numbers"):
        FewStepSampler([1000, 0.5], shift=5.0, warp=True)


def test_noise_depends_on_seed_sample_and_chunk_alone() -> None:
    """Neither the batch nor the order of draws matters; every draw differs from every other."""
    chunk, later = ChunkSpan(0, 0, 3), ChunkSpan(1, 3, 3)
    shape, cpu = (4, 6, 10), torch.device("cpu")
    together = SeededNoise([SampleSeed(1, 0), SampleSeed(1, 1), SampleSeed(2, 0)], shape, cpu)
    draws = []
    for row, seed in enumerate(together.seeds):
        alone = SeededNoise([seed], shape, cpu)
        assert torch.equal(together.draw(later, 2)[row], alone.draw(later, 2)[0])
        draws += [alone.draw(chunk, 0), alone.draw(chunk, 1), alone.draw(chunk, 2), alone.draw(later, 0)]
    flat = torch.cat(draws).flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 5 / flat.shape[1] ** 0.5  # five standard deviations of independent draws
    assert abs(flat.mean()) < 0.02 and abs(flat.std() - 1) < 0.02
