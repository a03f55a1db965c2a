"""On a GPU: packets in host memory, compressing beside replayed passes, training in graphs. Skipped without one."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressor_stage import network
from conftest import make_tiny, policy_of
from test_packforcing import PACK
from torch.testing import assert_close

from pipeline.chunkwise import ChunkwisePipeline
from pipeline.packets import Packer
from pipeline.sampler import FewStepSampler
from training.compressor import CompressorStage, make_branch
from training.settings import CompressorSettings
from training.teacher import TeacherForcedFlow
from wan.kv_cache.archive import host_memory
from wan.recorder import CudaRecorder
from wan.vae import WanVAE
from weights import TRANSFORMER, make_vae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    make_vae(folder)
    return folder


def test_host_memory_is_addressed_by_the_device() -> None:
    """Written and gathered by kernels, without a wait, and none of it is the device's own memory."""
    before = torch.cuda.memory_allocated()
    shelf = host_memory((2, 8, 64, 64), torch.bfloat16, CUDA)
    assert shelf.is_cuda and shelf.dtype == torch.bfloat16 and torch.cuda.memory_allocated() == before
    rows, where = torch.randn(2, 1, 64, 64, device=CUDA, dtype=torch.bfloat16), torch.tensor([5], device=CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        shelf.index_copy_(1, where, rows)
        back = shelf.index_select(1, where)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(back, rows)
    assert shelf.abs().sum(dim=(2, 3)).nonzero().tolist() == [[0, 5], [1, 5]]


@pytest.mark.parametrize("compressor", ["latent_pool", "lr"])
def test_packets_beside_replayed_passes(vae: Path, compressor: str) -> None:
    """Two videos, archive in host memory: replayed passes give what plain ones give; kernels may be chosen anew."""
    tiny = make_tiny(height=64, width=64, config=TRANSFORMER)
    tiny.model.to(CUDA)
    policy = policy_of(PACK | {"compressor": compressor, "offload": True})
    plain, base = tiny.pipeline(policy), tiny.pipeline(policy)
    pipelines = [plain, ChunkwisePipeline(base.model, base.sampler, base.geometry, base.cache, recorder=CudaRecorder())]
    decoder, made = WanVAE.load(vae, device=CUDA, dtype=torch.float32), []
    for pipeline in pipelines:
        grid = policy.sizes(tiny.geometry).archive.grid
        pipeline.packer = Packer(pipeline.model, pipeline.cache, grid, policy.compression, 0.0, vae=decoder)
        made.append([tiny.run(policy, 36, text=video, pipeline=pipeline) for video in range(2)])
    for ours, expected in zip(made[1], made[0], strict=True):
        assert_close(ours, expected, rtol=0, atol=1e-3)


def test_the_compressor_trains_in_graphs(vae: Path) -> None:
    """Every exit of a rollout is recorded and replayed; losses are finite and weights move."""
    s = CompressorSettings(steps=12, batch=2, latent_frames=15, channels=[8, 16, 32], critic_updates=1)
    geometry = make_tiny(height=64, width=64).geometry
    networks = [network(seed).to(CUDA, torch.bfloat16) for seed in (7, 8, 9)]
    stage = CompressorStage(
        s, 0, student=networks[0], teacher=networks[1], critic=networks[2], branch=make_branch(s, TRANSFORMER, 0),
        flow=TeacherForcedFlow(geometry, TRANSFORMER, s.latent_frames, CUDA),
        vae=WanVAE.load(vae, device=CUDA, dtype=torch.bfloat16),
        embeddings=torch.randn(4, TRANSFORMER.text_len, TRANSFORMER.text_dim, dtype=torch.bfloat16),
        nothing=torch.zeros(1, TRANSFORMER.text_len, TRANSFORMER.text_dim, dtype=torch.bfloat16), geometry=geometry,
        sampler=FewStepSampler([1000, 500], shift=5.0, warp=True), device=CUDA,
    )
    for index in range(s.steps):
        assert all(value.isfinite() for value in stage.step(index).values())
    assert stage.branch.out.weight.abs().max() > 0
