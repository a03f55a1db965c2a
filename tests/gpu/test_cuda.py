"""On a GPU: no host synchronisation inside the passes, and bf16 near its float32 twin. Skipped without one."""
from __future__ import annotations

import pytest
import torch
from conftest import EVERY_POLICY, make_tiny, policy_of
from torch.testing import assert_close

from pipeline.noise import SampleSeed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(dtype: torch.dtype):
    tiny = make_tiny(dtype=dtype)
    tiny.model.to("cuda")
    return tiny


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_no_host_sync_in_the_passes(name: str) -> None:
    """Sync debug mode "error" over whole chunks, filling, rolling and pruning."""
    tiny = on_gpu(torch.bfloat16)
    pipeline = tiny.pipeline(policy_of(EVERY_POLICY[name]))
    text, noise = pipeline.model.embed_text(tiny.text()), tiny.noise()
    pipeline.cache.reset([0])
    seen = []
    for span in tiny.geometry.chunks(30):
        torch.cuda.set_sync_debug_mode("error")
        try:
            latents = pipeline.denoise(span, text, noise)
            pipeline.remember(latents, text)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen.append(latents)
    assert torch.cat(seen, dim=1).isfinite().all()


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_gpu_equals_cpu(name: str) -> None:
    """float32 on both; 1e-4: sums are ordered differently, and a rollout of ten chunks carries it on."""
    policy = policy_of(EVERY_POLICY[name])
    cpu = make_tiny().run(policy, 30, seeds=(SampleSeed(1), SampleSeed(2)))
    gpu = on_gpu(torch.float32).run(policy, 30, seeds=(SampleSeed(1), SampleSeed(2))).cpu()
    assert_close(gpu, cpu, rtol=0, atol=1e-4)


def test_second_prompt_equals_a_fresh_process_on_gpu() -> None:
    """Bit for bit on the GPU as well."""
    policy, tiny = policy_of(EVERY_POLICY["deep_forcing"]), on_gpu(torch.bfloat16)
    used = tiny.pipeline(policy)
    tiny.run(policy, 30, text=1, seeds=(SampleSeed(9),), pipeline=used)
    assert torch.equal(tiny.run(policy, 30, text=2, pipeline=used), tiny.run(policy, 30, text=2))
