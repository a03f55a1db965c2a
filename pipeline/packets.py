"""From a finished chunk to its packet in the cache: compress, then let every layer make keys and values of it.

Source: PackForcing, arXiv:2603.25730; `forward` reads "computed concurrently" as a second token stream through the
network at the context pass's timestep, `project` as each layer's own projections of the same tokens.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.config import REPOSITORY, ConfigError, ModelSpec
from wan.compressor import (
    BranchSizes,
    HighResolutionBranch,
    encode_small,
    load_branch,
    pool_latents,
    random_branch,
)
from wan.geometry import PacketGrid, VideoGeometry
from wan.kv_cache.policy import Compression, KVPolicy
from wan.model import CausalWanModel, TextContext, WanConfig
from wan.vae import WanVAE


class PacketCache(Protocol):
    """Memory that keeps packets: a KVCache, or a rollout's memory while training."""

    @property
    def archives(self) -> bool:
        """Whether the chunk in the making leaves a packet."""

    def layer(self, index: int) -> Any:
        """What has `extend_packet` and `stage_packet`, as a LayerCache."""


Decode = Callable[[Tensor], Tensor]  # latents [B, F, C, h, w] -> pixels [B, T, 3, H, W] in [-1, 1], as a stream


class Packer:
    """Writes packets. Frames of the chunk never see them, so its own memory is what it would be without."""

    def __init__(
        self, model: CausalWanModel, cache: PacketCache, grid: PacketGrid, compression: Compression,
        context_time: float, *, vae: WanVAE | None = None, branch: HighResolutionBranch | None = None,
    ):
        self._model, self._cache, self._grid, self._compression = model, cache, grid, compression
        self._time, self._vae, self._branch = context_time, vae, branch
        self._decode: Decode | None = None
        self.newest: Tensor | None = None  # tokens of the chunk that was compressed last, if the cache keeps its packet

    def start(self, decode: Decode | None) -> None:
        """Begin a video. `decode` makes the pixels of its chunks, in order; None: a stream of the VAE's own."""
        self._decode = (decode or self._vae.stream().decode) if self._compression.reads_pixels else None

    def remember(self, latents: Tensor, text: TextContext) -> None:
        """Stage the packet of the chunk whose context pass is over, if the cache keeps it."""
        tokens = self.compress(latents)
        if tokens is not None:
            self.write(tokens, text)

    def compress(self, latents: Tensor) -> Tensor | None:
        """Tokens of the chunk whose context pass is over, as `embed` makes them; None if the cache keeps no packet."""
        pixels = None if self._decode is None else self._decode(latents)
        tokens = self.embed(latents, pixels) if self._cache.archives else None
        self.newest = None if tokens is None else tokens.detach()
        return tokens

    def embed(self, latents: Tensor, pixels: Tensor | None) -> Tensor:
        """Tokens [B, T, rows * columns, dim] at the network's input, of latents [B, F, C, h, w] and their pixels."""
        grid, patch = self._grid, self._model.config.patch_size[1:]
        if pixels is None:
            small = pool_latents(latents, grid, patch)
        else:
            small = encode_small(pixels, grid, patch, self._vae, self._compression.lr_frames)
        tokens = self._model.patchify(small.to(self._model.device, self._model.dtype))
        return tokens if self._branch is None else tokens + self._branch(latents, grid)

    def write(self, tokens: Tensor, text: TextContext) -> None:
        """Stage keys and values of `tokens` in every layer."""
        if self._compression.compressed_kv == "forward":
            t = torch.full(tokens.shape[:2], self._time, device=tokens.device)
            # It attends to what its chunk does, and is staged beside it.
            memory = SimpleNamespace(layer=lambda index: SimpleNamespace(extend=self._cache.layer(index).extend_packet))
            self._model.remember_tokens(tokens, t, text, memory)
            return
        for index, block in enumerate(self._model.blocks):
            self._cache.layer(index).stage_packet(*block.self_attn.project(tokens.flatten(1, 2))[1:])


@dataclass(frozen=True)
class TrainedBranch:
    """The HR branch that a run needs, and where its weights lie."""

    path: Path
    sizes: BranchSizes

    def load(self, *, random: bool, device: torch.device, dtype: torch.dtype) -> HighResolutionBranch:
        """The branch; `random`: of seeded weights in the paper's widths, for benchmarks."""
        if random:
            return random_branch(self.sizes, seed=0).to(device, dtype)
        return load_branch(self.path, self.sizes, device=device, dtype=dtype)


def choose_branch(
    policy: KVPolicy, geometry: VideoGeometry, architecture: WanConfig, spec: ModelSpec,
) -> TrainedBranch | None:
    """The trained branch that the policy's compressor needs, or None.

    Raises:
        ConfigError: neither config nor model names a file.
    """
    compression = policy.compression
    if compression is None or not compression.is_trained:
        return None
    named = compression.compressor_weights
    path = REPOSITORY / Path(named).expanduser() if named else spec.compressor
    if path is None:
        raise ConfigError(
            f"kv_cache.compressor=dual needs a trained compressor, and the model {spec.name} has none. Name a file "
            "with kv_cache.compressor_weights, or set kv_cache.compressor to lr, latent_pool or kv_pool."
        )
    grid = policy.sizes(geometry).archive.grid
    space = grid.space * architecture.patch_size[1]
    return TrainedBranch(path, BranchSizes(architecture.in_dim, architecture.dim, grid.time, space))
