"""What a chunk looks like to the network once it is compressed: few tokens at the DiT's input, a packet.

Three ways lead there. Two need no training: the chunk's pixels, pooled and encoded again (LR), or its latents, pooled.
The third adds to LR what a trained branch sees at full resolution (HR).

B batch, F latent frames, T packet frames, C latent channels, h x w latent rows and columns; sizes: wan/geometry.py.
Source: PackForcing, arXiv:2603.25730, figure 2d. Open there and chosen here: kernels of 3, in time only in the first
stage; SiLU after each stage; a last projection that starts at zero, so that an untrained branch changes nothing.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wan.checkpoint import CheckpointError, load_strictly
from wan.geometry import PacketGrid
from wan.vae import WanVAE

CHANNELS = (32, 128, 512, 2048)  # of the stages at 1.3B size


@dataclass(frozen=True)
class BranchSizes:
    """What the HR branch must fit. Its first stage takes `time` frames to one, later ones halve rows and columns."""

    in_dim: int  # latent channels
    dim: int     # channels of a token
    time: int    # latent frames that a token stands for
    space: int   # rows, and columns, of latents that it stands for, a power of two


class HighResolutionBranch(nn.Module):
    """Strided 3-D convolutions over a chunk's clean latents, one stage for each of `channels`.

    Raises:
        ValueError: so many stages do not give the reduction.
    """

    def __init__(self, sizes: BranchSizes, channels: Sequence[int]):
        super().__init__()
        if 2 ** (len(channels) - 1) != sizes.space:
            raise ValueError(
                f"an HR branch of {len(channels)} stages makes one token of {2 ** (len(channels) - 1)} latent rows; "
                f"{sizes.space} are wanted. Use a power of two, and one stage more than it has factors."
            )
        self.sizes = sizes
        first = nn.Conv3d(sizes.in_dim, channels[0], 3, stride=(sizes.time, 1, 1), padding=1)
        later = [
            nn.Conv3d(narrow, wide, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
            for narrow, wide in pairwise(channels)
        ]
        self.stages = nn.ModuleList([first, *later])
        self.out = nn.Conv3d(channels[-1], sizes.dim, 1)

    def forward(self, latents: Tensor, grid: PacketGrid) -> Tensor:
        """[B, F, C, h, w] -> [B, T, rows * columns, dim]; what the grid does not cover is cut off."""
        x = latents.to(self.out.weight.dtype).transpose(1, 2)
        for stage in self.stages:
            x = F.silu(stage(x))
        return self.out(x[..., :grid.rows, :grid.columns]).flatten(3).permute(0, 2, 3, 1)

    @torch.no_grad()
    def initialise(self, seed: int) -> HighResolutionBranch:
        """Seeded fresh weights; the output is zero."""
        generator = torch.Generator().manual_seed(seed)
        for stage in self.stages:
            scale = (2 / stage.weight[0].numel()) ** 0.5
            stage.weight.copy_(scale * torch.randn(stage.weight.shape, generator=generator))
            stage.bias.zero_()
        self.out.weight.zero_()
        self.out.bias.zero_()
        return self


def random_branch(sizes: BranchSizes, seed: int) -> HighResolutionBranch:
    """Seeded random weights in the paper's widths, for benchmarks; never a fallback for missing ones."""
    branch = HighResolutionBranch(sizes, CHANNELS[:sizes.space.bit_length()]).initialise(seed)
    nn.init.normal_(branch.out.weight, std=branch.out.in_channels**-0.5, generator=torch.Generator().manual_seed(seed))
    return branch.eval().requires_grad_(False)


# --- without training -----------------------------------------------------------------------------------

def pool_latents(latents: Tensor, grid: PacketGrid, patch: Sequence[int]) -> Tensor:
    """Means [B, T, C, rows * patch, columns * patch] of latents [B, F, C, h, w]."""
    pooled = F.avg_pool2d(latents.flatten(0, 1), grid.space).unflatten(0, latents.shape[:2])
    in_time = torch.stack([part.mean(dim=1) for part in pooled.split(grid.time, dim=1)], dim=1)
    return in_time[..., :grid.rows * patch[0], :grid.columns * patch[1]]


def encode_small(
    pixels: Tensor, grid: PacketGrid, patch: Sequence[int], vae: WanVAE, frames: Literal["paper", "cover"],
) -> Tensor:
    """Latents [B, T, C, rows * patch, columns * patch] of a chunk's pixels, shrunk and encoded as a video of its own.

    Shapes: pixels [B, pixel frames, 3, H, W] in [-1, 1], as a stream decodes the chunk.
    Args: frames: `paper` pools `grid.time` pixel frames to one and drops those that the causal encoder, which takes
        1 + s (T - 1), has no use for; `cover` pools all of them into so many. Too few for `paper` are covered too.
    """
    count, unit = 1 + vae.temporal_stride * (grid.frames - 1), vae.spatial_stride
    x = F.avg_pool3d(pixels.transpose(1, 2), (1, grid.space, grid.space))
    x = x[..., :x.shape[-2] // unit * unit, :x.shape[-1] // unit * unit]
    if frames == "paper" and x.shape[2] // grid.time >= count:
        x = F.avg_pool3d(x, (grid.time, 1, 1))[:, :, :count]
    else:
        x = F.adaptive_avg_pool3d(x, (count, *x.shape[-2:]))
    return vae.encode(x.transpose(1, 2))[..., :grid.rows * patch[0], :grid.columns * patch[1]]


# --- files ----------------------------------------------------------------------------------------------

def save_branch(branch: HighResolutionBranch, path: Path) -> None:
    """Write the branch as safetensors; its metadata say what it reduces by."""
    tensors = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in branch.named_parameters()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"time": str(branch.sizes.time), "space": str(branch.sizes.space)})


def check_branch(path: Path, sizes: BranchSizes) -> tuple[int, ...]:
    """The widths of the stages of the branch at `path`, by its header alone.

    Raises:
        CheckpointError: no such file, no compressor, or one for another network or reduction.
    """
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            metadata = file.metadata() or {}
        in_dim, dim = shapes["stages.0.weight"][1], shapes["out.weight"][0]
        channels = tuple(shapes[f"stages.{i}.weight"][0] for i in range(sum(".weight" in name for name in shapes) - 1))
        found = BranchSizes(in_dim, dim, int(metadata["time"]), int(metadata["space"]))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"compressor {path} is not there. Train one (python -m training.tiny compressor), or choose one that needs "
            "no training: --set kv_cache.compressor=lr, latent_pool or kv_pool."
        ) from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: no compressor ({error}). Give a .safetensors that `save_branch` of wan/compressor.py wrote."
        ) from error
    if found != sizes:
        raise CheckpointError(
            f"{path}: a compressor for another network or reduction: {found}, wanted {sizes}. Set "
            "kv_cache.time_reduction and space_reduction (times a token's latent rows) to what it was trained for."
        )
    return channels


def load_branch(path: Path, sizes: BranchSizes, *, device: torch.device, dtype: torch.dtype) -> HighResolutionBranch:
    """The trained branch at `path`.

    Raises:
        CheckpointError: as `check_branch`, or tensors that do not fit.
    """
    channels = check_branch(path, sizes)
    with torch.device("meta"):
        branch = HighResolutionBranch(sizes, channels)
    load_strictly(branch, load_file(path), source=path, device=device, dtype=dtype)
    return branch.eval().requires_grad_(False)
