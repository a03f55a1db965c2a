"""The other loops and prompt switches on a GPU: no host synchronisation in the passes, and the CPU's numbers."""
from __future__ import annotations

import pytest
import torch
from conftest import EVERY_POLICY, make_tiny, policy_of
from torch.testing import assert_close

from pipeline.rolling_forcing import RollingForcingPipeline
from pipeline.sampler import FewStepSampler
from pipeline.timeline import PromptSwitch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def rolling_forcing(device: str, dtype: torch.dtype = torch.float32):
    tiny = make_tiny(dtype=dtype)
    tiny.model.to(device)
    sampler = FewStepSampler([1000, 800, 600, 400, 200], shift=5.0, warp=True)
    cache = tiny.cache(policy_of({"policy": "anchored", "window_frames": 21, "anchor_frames": 3}))
    return tiny, RollingForcingPipeline(tiny.model, sampler, tiny.geometry, cache)


def latents(tiny, pipeline, frames: int = 30, on_switch: str = "keep", at=()) -> torch.Tensor:
    """[1, frames, C, h, w] of a rollout that changes its prompt at the frames `at`, without a host sync."""
    pipeline.on_switch = on_switch
    switches = [PromptSwitch(frame, tiny.text(5).to(tiny.model.device)) for frame in at]
    text, noise = tiny.text().to(tiny.model.device), tiny.noise()
    chunks, made = pipeline(text, frames, noise, seeds=[0], switches=switches), []
    made.append(next(chunks).latents)  # the first one fills tables that are made once
    torch.cuda.set_sync_debug_mode("error" if tiny.model.device.type == "cuda" else "default")
    try:
        made += [chunk.latents for chunk in chunks]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return torch.cat(made, dim=1).cpu()


def test_joint_denoising_on_a_gpu() -> None:
    """No host sync once the first chunk is out; 1e-4 from the CPU in float32, as for the policies."""
    assert latents(*rolling_forcing("cuda", torch.bfloat16)).isfinite().all()
    assert_close(latents(*rolling_forcing("cuda")), latents(*rolling_forcing("cpu")), rtol=0, atol=1e-4)


@pytest.mark.parametrize("on_switch", ["keep", "recache", "flush_recent", "reset_sink"])
@pytest.mark.parametrize("name", EVERY_POLICY)
def test_prompt_switches_on_a_gpu(name: str, on_switch: str) -> None:
    """A switch in mid-video reads nothing back from the device, and gives the CPU's video."""
    made = []
    for device in ("cuda", "cpu"):
        tiny = make_tiny()
        tiny.model.to(device)
        made.append(latents(tiny, tiny.pipeline(policy_of(EVERY_POLICY[name])), on_switch=on_switch, at=(16,)))
    assert_close(*made, rtol=0, atol=1e-4)
