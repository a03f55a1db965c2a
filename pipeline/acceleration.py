"""How the same results are computed faster: which attention kernel, what is compiled, what is recorded as graphs.

It decides the speed, and the pixels up to rounding alone.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from pipeline.chunkwise import ChunkwisePipeline
from pipeline.graphs import GraphedPipeline
from pipeline.sampler import FewStepSampler
from utils.config import ConfigError
from utils.files import user_cache_dir
from wan.backends import AttentionBackend, load_backend
from wan.compiler import Compiler, inductor, keep_compiled, plain
from wan.geometry import VideoGeometry
from wan.kv_cache.cache import KVCache
from wan.kv_cache.layer import CacheShape
from wan.kv_cache.policy import KVPolicy
from wan.model import CausalWanModel
from wan.recorder import CudaRecorder, Recorder
from wan.vae import WanVAE


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """What is asked for; `resolved` says what it is on a device. None: where it works, which is a GPU."""

    attention: str = "auto"       # one of wan.backends.NAMES
    compile: bool | None = None   # torch.compile for what lies between attention kernels
    graphs: bool | None = None    # CUDA graphs for whole chunks
    decoder: bool | None = None   # fused passes of the VAE's decoder, a chunk at a time

    @classmethod
    def eager(cls, attention: str = "auto") -> Acceleration:
        """Plain passes."""
        return cls(attention=attention, compile=False, graphs=False, decoder=False)

    def resolved(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> Acceleration:
        """The same without `auto` and None.

        Raises:
            ConfigError: something that was asked for does not work here.
        """
        try:
            attention, _ = load_backend(self.attention, device, dtype, head_dim)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        on_gpu = device.type == "cuda"
        if self.graphs and not on_gpu:
            raise ConfigError(f"graphs=on needs a CUDA device, not {device}. Leave it at auto.")
        return Acceleration(
            attention=attention, compile=on_gpu and can_compile() if self.compile is None else self.compile,
            graphs=on_gpu if self.graphs is None else self.graphs,
            decoder=on_gpu if self.decoder is None else self.decoder,
        )

    def backend(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
        return load_backend(self.attention, device, dtype, head_dim)[1]

    @property
    def compiler(self) -> Compiler:
        """Who runs the hot functions; what it compiles is kept for the next process."""
        if not self.compile:
            return plain
        keep_compiled(user_cache_dir() / "compiled")
        return inductor

    @property
    def recorder(self) -> Recorder | None:
        """Who records the passes as graphs; None where they run as they are."""
        return CudaRecorder() if self.graphs else None

    def cache(self, shape: CacheShape, geometry: VideoGeometry, policy: KVPolicy) -> KVCache:
        return KVCache(shape, geometry, policy, compiler=self.compiler)

    def pipeline(
        self, model: CausalWanModel, sampler: FewStepSampler, geometry: VideoGeometry, shape: CacheShape,
        policy: KVPolicy,
    ) -> ChunkwisePipeline:
        """The loop over a cache of its own. For loaded weights; the model is accelerated in place."""
        model.accelerate(self.compiler)
        cache = self.cache(shape, geometry, policy)
        if self.graphs:
            return GraphedPipeline(model, sampler, geometry, cache, self.recorder)
        return ChunkwisePipeline(model, sampler, geometry, cache)

    def accelerate_decoder(self, vae: WanVAE, chunk_frames: int) -> WanVAE:
        """The same VAE, whose decoder takes a chunk of latents a call."""
        if self.decoder:
            vae.accelerate(CudaRecorder() if self.graphs else None, part_frames=chunk_frames)
        return vae


MODES: dict[str, Callable[..., Acceleration]] = {  # by what a user calls them
    "auto": Acceleration.eager, "eager": Acceleration.eager, "exact": Acceleration,
}


def can_compile() -> bool:
    """Whether Triton is there, and a C compiler, which it needs to launch its kernels."""
    return find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
