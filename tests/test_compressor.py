"""How a chunk becomes a packet: sizes of each branch at full size, files of the trained one, and whole rollouts."""
from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch
from conftest import make_tiny, policy_of
from safetensors.torch import save_file
from test_packforcing import PACK
from torch.testing import assert_close

from pipeline.decoder import OnceDecoder
from pipeline.packets import Packer
from utils.profiling import StageClock
from wan.checkpoint import CheckpointError
from wan.compressor import (
    CHANNELS,
    BranchSizes,
    HighResolutionBranch,
    check_branch,
    encode_small,
    load_branch,
    pool_latents,
    save_branch,
)
from wan.geometry import VideoGeometry
from wan.vae import WanVAE
from weights import TRANSFORMER, make_vae

CPU = torch.device("cpu")
SIZES = BranchSizes(in_dim=4, dim=32, time=2, space=4)


class SizesOnly:
    """Stands for Wan's VAE: what goes in and comes out, by the strides alone."""

    temporal_stride, spatial_stride = 4, 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen = pixels
        batch, frames, _, height, width = pixels.shape
        assert (frames - 1) % 4 == 0 and height % 8 == 0 and width % 8 == 0
        return torch.zeros(batch, 1 + (frames - 1) // 4, 16, height // 8, width // 8)


@pytest.mark.parametrize("chunk_frames, pixel_frames", [(4, 16), (4, 13), (3, 12), (3, 9), (2, 8), (1, 4)])
def test_every_way_gives_one_grid(chunk_frames: int, pixel_frames: int) -> None:
    """HR, LR and pooled latents agree on 182 tokens of a chunk of 3 or 4 at 832x480, 91 of one of 1 or 2."""
    geometry = VideoGeometry(height=480, width=832, fps=16, chunk_frames=chunk_frames)
    grid = geometry.packet_grid(time=2, space=4)
    assert grid.tokens == (182 if chunk_frames > 2 else 91)
    small = (1, grid.frames, 16, 14, 26)
    assert pool_latents(torch.zeros(1, chunk_frames, 16, 60, 104), grid, (2, 2)).shape == small
    pixels = torch.zeros(1, pixel_frames, 3, 480, 832)
    for frames in ("paper", "cover"):
        assert encode_small(pixels, grid, (2, 2), SizesOnly(), frames).shape == small
    branch = HighResolutionBranch(BranchSizes(16, 8, time=2, space=8), (2, 2, 2, 2))
    tokens = branch.initialise(0)(torch.randn(1, chunk_frames, 16, 60, 104), grid)
    assert tokens.shape == (1, grid.frames, 91, 8) and tokens.abs().max() == 0


def test_the_branch_of_the_paper_has_its_size() -> None:
    """13.2 million weights at 1.3B size; and an untrained one adds nothing."""
    with torch.device("meta"):
        branch = HighResolutionBranch(BranchSizes(16, 1536, time=2, space=8), CHANNELS)
    assert sum(p.numel() for p in branch.parameters() if p.ndim > 1) == 13_223_424
    with pytest.raises(ValueError, match="4 stages makes one token of 8 latent rows; 4 are wanted"):
        HighResolutionBranch(BranchSizes(16, 8, time=2, space=4), CHANNELS)


def test_small_pixels_are_means() -> None:
    """What is encoded again: means over 2 frames and 4x4 pixels, of which the encoder's stride leaves five frames."""
    grid = VideoGeometry(height=96, width=160, fps=16, chunk_frames=4).packet_grid(time=2, space=4)
    pixels, vae = torch.rand(2, 16, 3, 96, 160), SizesOnly()
    encode_small(pixels, grid, (2, 2), vae, "paper")
    means = pixels.unflatten(3, (24, 4)).unflatten(5, (40, 4)).mean(dim=(4, 6)).unflatten(1, (8, 2)).mean(dim=2)
    assert_close(vae.seen, means[:, :5])
    encode_small(pixels, grid, (2, 2), vae, "cover")
    assert vae.seen.shape[1] == 5
    assert_close(vae.seen.mean(dim=1)[0, 0, 0, 0], pixels[0, :, 0, :4, :4].mean(), rtol=0, atol=0.05)
    latents = torch.rand(1, 3, 4, 12, 20)
    three = VideoGeometry(height=96, width=160, fps=16, chunk_frames=3).packet_grid(time=2, space=2)
    pooled = pool_latents(latents, three, (2, 2))
    assert_close(pooled[0, 1, :, 0, 0], latents[0, 2, :, :2, :2].mean(dim=(1, 2)))  # the last of three stands alone
    assert_close(pooled[0, 0, :, 0, 0], latents[0, :2, :, :2, :2].mean(dim=(0, 2, 3)))


# --- files ----------------------------------------------------------------------------------------------

def make_branch(seed: int = 0) -> HighResolutionBranch:
    branch = HighResolutionBranch(SIZES, (4, 6, 8)).initialise(seed)
    torch.nn.init.normal_(branch.out.weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    return branch


def test_a_branch_comes_back_from_its_file(tmp_path: Path) -> None:
    """Saved in bf16, the sizes found again from the file alone."""
    branch, path = make_branch(), tmp_path / "compressor" / "model.safetensors"
    save_branch(branch, path)
    loaded = load_branch(path, SIZES, device=CPU, dtype=torch.float32)
    assert loaded.sizes == branch.sizes
    grid = VideoGeometry(height=32, width=48, fps=16, chunk_frames=3).packet_grid(time=2, space=2)
    latents = torch.randn(2, 3, 4, 4, 6)
    assert_close(loaded(latents, grid), branch(latents, grid), rtol=0, atol=0.02)  # bf16 weights, three layers


@pytest.mark.parametrize("change, message", [
    ({"dim": 64}, "another network or reduction: .*dim=32.*wanted .*dim=64"),
    ({"space": 8}, "space=4.*wanted .*space=8.*Set kv_cache.time_reduction and space_reduction"),
    ({"time": 1}, "time=2.*wanted .*time=1"),
])
def test_a_branch_for_something_else_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    """By its header: what it is for, what was asked, what to change."""
    save_branch(make_branch(), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=message):
        check_branch(tmp_path / "b.safetensors", dataclasses.replace(SIZES, **change))


def test_what_is_no_branch_is_refused(tmp_path: Path) -> None:
    """Nothing there, not safetensors, and safetensors of something else."""
    with pytest.raises(CheckpointError, match="is not there. Train one .*compressor=lr, latent_pool or kv_pool"):
        check_branch(tmp_path / "none.safetensors", SIZES)
    (tmp_path / "text.safetensors").write_text("no tensors here")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("text", "other"):
        with pytest.raises(CheckpointError, match="no compressor .*save_branch"):
            check_branch(tmp_path / f"{name}.safetensors", SIZES)


# --- whole rollouts -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> WanVAE:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    make_vae(folder)
    return WanVAE.load(folder, device=CPU, dtype=torch.float32)


def rollout(vae: WanVAE, settings: dict, branch: HighResolutionBranch | None = None, decode=None, frames: int = 24):
    tiny, policy = make_tiny(height=64, width=64, config=TRANSFORMER), policy_of(PACK | settings)
    pipeline = tiny.pipeline(policy)
    grid = policy.sizes(tiny.geometry).archive.grid
    pipeline.packer = Packer(pipeline.model, pipeline.cache, grid, policy.compression, 0.0, vae=vae, branch=branch)
    chunks = pipeline(tiny.text(), frames, tiny.noise(), [0], decode=decode)
    return torch.cat([chunk.latents for chunk in chunks], dim=1)


def test_compressors_differ_and_an_untrained_branch_adds_nothing(vae: WanVAE) -> None:
    """Every variant runs; dual with a fresh branch is LR alone, bit for bit; a trained one is something else."""
    made = {
        (name, stream): rollout(vae, {"compressor": name, "compressed_kv": stream})
        for name in ("latent_pool", "lr") for stream in ("forward", "project")
    }
    made["cover"] = rollout(vae, {"compressor": "lr", "lr_frames": "cover"})
    fresh = rollout(vae, {"compressor": "dual"}, HighResolutionBranch(SIZES, (4, 6, 8)).initialise(0))
    assert torch.equal(fresh, made["lr", "forward"])
    made["dual"] = rollout(vae, {"compressor": "dual"}, make_branch())
    different = list(made.values())
    for i, one in enumerate(different):
        assert one.isfinite().all()
        assert all(not torch.equal(one, other) for other in different[:i])


def test_pixels_are_decoded_once(vae: WanVAE) -> None:
    """The compressor and the viewer share a stream: the same latents as with one of its own, one decode a chunk."""
    tiny_stream, calls = vae.stream(), []

    class Counted:
        def decode(self, latents):
            calls.append(latents)
            return tiny_stream.decode(latents)

    once = OnceDecoder(Counted(), StageClock(CPU))
    shared = rollout(vae, {"compressor": "lr"}, decode=once.decode, frames=18)
    assert torch.equal(shared, rollout(vae, {"compressor": "lr"}, frames=18))
    assert len(calls) == 6
    last = once.decode(calls[-1])
    assert len(calls) == 6 and last.shape[1] == 12


def test_a_clock_forgets_what_it_has_added_up() -> None:
    """However many chunks: an hour of them leaves no more behind than one."""
    clock = StageClock(CPU)
    for _ in range(1000):
        with clock.stage("dit"), clock.stage("vae"):
            pass
    assert not clock._marks and set(clock.totals_ms()) == {"dit", "vae"}


def test_a_stage_inside_another_counts_once() -> None:
    """Decoding inside the transformer's stage is the decoder's time."""
    clock = StageClock(CPU)
    with clock.stage("dit"):
        time.sleep(0.02)
        with clock.stage("vae"):
            time.sleep(0.05)
    totals = clock.totals_ms()
    assert totals["vae"] >= 50 and 20 <= totals["dit"] < 50
