"""How the same results are computed faster: which attention kernel, what is compiled, what is recorded as graphs.

It decides the speed, and the pixels up to rounding alone.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TypeVar

import torch

from utils.config import ConfigError
from utils.files import user_cache_dir
from wan.backends import FP8_BACKENDS, load_backend
from wan.compiler import Compiler, inductor, keep_compiled, plain
from wan.fp8 import LEAST_CAPABILITY, quantise_layers
from wan.kv_cache.store import CacheShape
from wan.model import CausalWanModel
from wan.recorder import CudaRecorder, Recorder
from wan.tiny_vae import TinyVAE
from wan.vae import WanVAE

Decoder = TypeVar("Decoder", WanVAE, TinyVAE)


@dataclass(frozen=True, kw_only=True)
class Acceleration:
    """What is asked for; `resolved` says what it is on a device. None: where it works, which is a GPU."""

    attention: str = "auto"       # one of wan.backends.NAMES
    compile: bool | None = None   # torch.compile for what lies between attention kernels
    graphs: bool | None = None    # CUDA graphs for whole chunks
    decoder: bool | None = None   # fused passes of the VAE's decoder, a chunk at a time
    overlap: bool | None = None   # frames of a chunk are made while the transformer works on the next
    fp8: bool = False             # linear layers, and attention where a kernel can, in 8-bit floats: approximate

    @classmethod
    def eager(cls, attention: str = "auto") -> Acceleration:
        """Plain passes."""
        return cls(attention=attention, compile=False, graphs=False, decoder=False, overlap=False)

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
        if self.fp8:
            _check_fp8(device, dtype)
        for name in ("graphs", "overlap"):
            if getattr(self, name) and not on_gpu:
                raise ConfigError(f"{name}=on needs a CUDA device, not {device}. Leave it at auto.")
        return Acceleration(
            attention=attention, compile=on_gpu and can_compile() if self.compile is None else self.compile,
            graphs=on_gpu if self.graphs is None else self.graphs,
            decoder=on_gpu if self.decoder is None else self.decoder,
            overlap=on_gpu if self.overlap is None else self.overlap, fp8=self.fp8,
        )

    @property
    def fp8_attention(self) -> bool:
        return self.fp8 and self.attention in FP8_BACKENDS

    @property
    def compiler(self) -> Compiler:
        """Who runs the hot functions; what it compiles is kept for the next process."""
        if not self.compile:
            return plain
        keep_compiled(user_cache_dir() / "compiled")
        return inductor

    def recorder(self, device: torch.device) -> Recorder | None:
        """Who records the passes of a device as graphs; None where they run as they are."""
        return CudaRecorder(device) if self.graphs and device.type == "cuda" else None

    def cache_compiler(self, shape: CacheShape) -> Compiler:
        """The same for the cache, whose memories may be in 8-bit floats."""
        narrow = shape.store_dtype is not None or shape.window_dtype is not None
        return plain if narrow and not _compiles_fp8(shape.device) else self.compiler

    def prepare(self, model: CausalWanModel) -> None:
        """Accelerate the model in place."""
        if self.fp8:
            quantise_layers(model)
        model.accelerate(self.compiler)

    def accelerate_decoder(self, decoder: Decoder, latents: int) -> Decoder:
        """The same decoder, which takes so many latent frames a call."""
        if self.decoder and isinstance(decoder, TinyVAE):
            decoder.part_frames = latents  # its kernels are few and large then: nothing to record
        elif self.decoder:
            decoder.accelerate(self.recorder(decoder.device), part_frames=latents)
        return decoder


MODES: dict[str, Callable[..., Acceleration]] = {  # by what a user calls them
    "exact": Acceleration, "eager": Acceleration.eager,
    "fp8": partial(Acceleration, fp8=True),
}


def _compiles_fp8(device: torch.device) -> bool:
    """Whether compiled kernels can read and write 8-bit floats; torch's own can everywhere."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def _check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError where layers in 8-bit floats cannot run; a processor runs them, slowly."""
    if dtype != torch.bfloat16:
        gpu = "" if device.type == "cuda" else " and is slower than exact without a GPU"
        raise ConfigError(f"fp8 needs bfloat16, not {dtype}{gpu}. Add --set dtype=bfloat16, or leave fp8 out.")
    if not _compiles_fp8(device):
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise ConfigError(
            f"fp8 needs a GPU of compute capability {least} or newer, and {device} is an older one. Leave fp8 out."
        )


def can_compile() -> bool:
    """Whether Triton is there, and a C compiler, which it needs to launch its kernels."""
    return find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
