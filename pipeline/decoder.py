"""Which decoder makes the pixels: the VAE's own, or a tiny one in its place that is faster and approximate."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.config import ConfigError, ModelSpec
from utils.profiling import StageClock
from wan.stream import StreamDecoder
from wan.tiny_vae import TinyKind, TinyVAE, check_tiny_vae

SOURCES: dict[TinyKind, str] = {
    "taehv": "python -m utils.download --only taehv (taew2_1.pth of https://github.com/madebyollin/taehv)",
    "lighttae": "https://huggingface.co/lightx2v/Autoencoders, file lighttaew2_1.safetensors",
}
NAMES = ("wan", *SOURCES)


@dataclass(frozen=True)
class TinyDecoder:
    """A tiny decoder in the place of the VAE's own."""

    kind: TinyKind
    path: Path | None  # None: random weights

    def check(self, latent_channels: int) -> None:
        """The file is there and its tensors fit; headers only.

        Raises:
            ConfigError: no such file.
            wan.checkpoint.CheckpointError: a damaged file, or one of another layout.
        """
        if not self.path.exists():
            raise ConfigError(
                f"{self.kind} decoder {self.path} is not there. Get it with: {SOURCES[self.kind]}. "
                "Put it there, or say where it is with --decoder_path."
            )
        check_tiny_vae(self.path, latent_channels)


def choose_decoder(spec: ModelSpec, name: str, path: Path | None, random_weights: bool) -> TinyDecoder | None:
    """The tiny decoder that `name` means, from `path` or from where the model says; None is the VAE's own, `wan`.

    Raises:
        ConfigError: an unknown name, a file that is named otherwise, or a model that no tiny decoder was made for.
    """
    if name not in NAMES:
        raise ConfigError(f"--decoder {name} is unknown. Known: {', '.join(NAMES)}.")
    if name == "wan":
        if path is not None:
            raise ConfigError(f"--decoder_path {path} is for a tiny decoder. Add --decoder {' or '.join(SOURCES)}.")
        return None
    strides, made_for = (spec.temporal_stride, spec.spatial_stride), (TinyVAE.temporal_stride, TinyVAE.spatial_stride)
    if strides != made_for:
        raise ConfigError(
            f"--decoder {name} makes {made_for[0]} pixel frames of a latent frame and {made_for[1]} pixels of a latent "
            f"row; the model {spec.name} has {strides[0]} and {strides[1]}. Use --decoder wan."
        )
    if random_weights:
        return TinyDecoder(name, None)
    path = {"taehv": spec.taehv, "lighttae": spec.lighttae}[name] if path is None else Path(path)
    if path is None:
        raise ConfigError(
            f"--decoder {name}: none was made for the latents of the model {spec.name}. Use --decoder wan, or give the "
            "file of one that was with --decoder_path."
        )
    published = {"taew": "taehv", "lighttaew": "lighttae"}.get(path.name.partition("2_1")[0], name)
    if published != name:  # the tensors look alike, and the wrong latents make grey frames
        raise ConfigError(f"--decoder_path {path} is, by its name, a {published}. Use --decoder {published}.")
    return TinyDecoder(name, path)


class OnceDecoder:
    """A stream whose chunks may be asked for twice, by whoever compresses them and by whoever shows them."""

    def __init__(self, stream: StreamDecoder, clock: StageClock):
        self._stream, self._clock = stream, clock
        self._latents = self._pixels = None  # of the newest chunk

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of the next chunk, or again of the last one."""
        if self._latents is not latents:
            with self._clock.stage("vae"), torch.inference_mode(False):  # its buffers serve callers outside of it too
                self._pixels = self._stream.decode(latents)
            self._latents = latents
        return self._pixels
