"""On a GPU: a watched rollout is the same rollout, and its record that of the CPU. Skipped without one."""
from __future__ import annotations

import pytest
import torch
from conftest import EVERY_POLICY, make_tiny, policy_of
from torch.testing import assert_close

from evaluation.sweep.record import Watcher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def rollout(device: str, watch: bool):
    """Latents and, if watched, the record of a Deep Forcing rollout over several prunes."""
    tiny = make_tiny()
    tiny.model.to(device)
    watcher = Watcher(tiny.pipeline(policy_of(EVERY_POLICY["deep_forcing"])), [0, 1])
    latents = []

    def run() -> None:
        for chunk in watcher.pipeline(tiny.text().to(device), 30, tiny.noise(), [0]):
            latents.append(chunk.latents)
            if watch:
                watcher.next_chunk(chunk.span.frames)

    if watch:
        with watcher.watching():
            run()
    else:
        run()
    return torch.cat(latents, 1), watcher


def test_watching_changes_no_bit() -> None:
    assert torch.equal(rollout("cuda", watch=True)[0], rollout("cuda", watch=False)[0])


def test_the_record_is_that_of_the_cpu() -> None:
    """float32 on both; 1e-4: sums are ordered differently. Choices may turn at ties alone, so nearly all agree."""
    gpu, cpu = (rollout(device, watch=True)[1].tensors() for device in ("cuda", "cpu"))
    assert_close(gpu["attention"].sum(-1), torch.ones(gpu["attention"].shape[:-1]))
    assert_close(gpu["attention"][0], cpu["attention"][0], rtol=0, atol=1e-4)
    assert (gpu["chosen"] == cpu["chosen"]).float().mean() > 0.95
