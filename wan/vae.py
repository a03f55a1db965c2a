"""Pixels <-> latents, one latent frame at a time, with diffusers' AutoencoderKLWan.

Encoding and decoding are causal in time, so both run frame by frame over what each layer remembers; memory
does not grow with the video. A decoder's past belongs to its StreamDecoder, never to the VAE.

B batch, T pixel frames, F latent frames, C latent channels, s temporal stride.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor

from wan.checkpoint import CheckpointError, NetworkFiles, check_fit, load_strictly
from wan.names import strip_wrappers
from wan.recorder import Recorder
from wan.stacking import load_kernels
from wan.stream import Past, VideoDecoder, load_random
from wan.vae_decoder import FastDecoder
from wan.vae_passes import VaePasses

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of latents, one value a channel

FILES = NetworkFiles(
    kind="VAE", subfolder="vae", mark=("_class_name", "AutoencoderKLWan"), original="decoder.conv1.weight",
    patterns=("*VAE*.pth", "*VAE*.safetensors"),
)


class WanVAE(VideoDecoder):
    """Encoder and decoder with their latent normalisation."""

    def __init__(self, model: AutoencoderKLWan) -> None:
        self._model = model.eval().requires_grad_(False)
        config = model.config
        shape = (1, config.z_dim, 1, 1, 1)
        self._mean = torch.tensor(config.latents_mean, device=self.device).view(shape)
        self._std = torch.tensor(config.latents_std, device=self.device).view(shape)
        self._passes = VaePasses(self._model)
        self._fast: FastDecoder | None = None

    @classmethod
    def load(
        cls, path: Path, *, device: torch.device | str, dtype: torch.dtype, statistics: Statistics | None = None,
    ) -> WanVAE:
        """Load a VAE.

        Args:
            path: `Wan2.1_VAE.pth` or another file with original names, a folder that holds one, a diffusers
                folder (config.json beside its weights), or a repository with `vae/`.
            statistics: in place of the files' own, or of Wan 2.1's where these bring none; needed for original files
                other than Wan 2.1's 16 channels.
        Raises:
            CheckpointError: missing, damaged or unsafe file, weights that do not fit, or statistics of another length.
        """
        config, tensors = _read_vae(path)
        if statistics is not None:
            config = {**config, **dict(zip(("latents_mean", "latents_std"), map(list, statistics), strict=True))}
        model = _skeleton(config, source=path)
        load_strictly(model, tensors, source=path, device=device, dtype=dtype)
        return cls(model)

    @classmethod
    def random(cls, path: Path, *, device: torch.device | str, dtype: torch.dtype, seed: int) -> WanVAE:
        """A VAE of seeded random weights, as `load_random` makes them.

        Its architecture is that of `path` (a config.json is enough), or Wan 2.1's if nothing is there.
        """
        model = _skeleton_of(path)
        load_random(model, seed, device=device, dtype=dtype)
        return cls(model)

    @classmethod
    def skeleton(cls, path: Path, dtype: torch.dtype) -> WanVAE:
        """A VAE on the meta device, of the same architecture as `random`'s: shapes without data."""
        return cls(torch.nn.Module.to(_skeleton_of(path), dtype))

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def latent_channels(self) -> int:
        return self._model.config.z_dim

    @property
    def spatial_stride(self) -> int:
        """Pixels a latent spans along height, and along width."""
        return _strides(self._model)[1]

    @property
    def temporal_stride(self) -> int:
        """s: pixel frames a latent frame spans; the first latent frame spans one."""
        return _strides(self._model)[0]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode a video or, with T = 1, an image.

        Args:
            pixels: [B, T, 3, H, W] in [-1, 1], T = 1 + s k, on any device.
        Returns: normalised latents [B, 1 + k, C, h, w], float32, on the VAE's device; the mean of the
            posterior, so that the same pixels always give the same latents.
        Raises:
            ValueError: a frame count or size that the strides do not divide.
        """
        self._check_pixels(pixels)
        past, stride = Past(), self.temporal_stride
        parts = pixels.transpose(1, 2).split([1] + [stride] * ((pixels.shape[1] - 1) // stride), dim=2)
        means = torch.cat([self._passes.encode(part.to(self.device, self.dtype), past)[0] for part in parts], dim=2)
        return ((means.float() - self._mean) / self._std).transpose(1, 2).contiguous()

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.ndim != 5 or pixels.shape[2] != 3:
            raise ValueError(f"pixels are {list(pixels.shape)}; expected [batch, frames, 3, height, width].")
        frames, height, width = pixels.shape[1], *pixels.shape[3:]
        stride = self.temporal_stride
        if not frames:
            raise ValueError("a video without frames cannot be encoded; give at least one pixel frame.")
        if extra := (frames - 1) % stride:
            keep = frames - extra
            raise ValueError(
                f"{frames} pixel frames cannot be encoded: the first latent frame holds 1 and each later one {stride}, "
                f"so their number must be 1 + {stride} k. Cut the video to {keep} frames, or repeat its last "
                f"frame up to {keep + stride}."
            )
        unit = self.spatial_stride
        if height % unit or width % unit:
            raise ValueError(
                f"pixels of {height}x{width} cannot be encoded: height and width must be multiples of {unit}. "
                f"Crop or resize to {max(unit, height - height % unit)}x{max(unit, width - width % unit)}."
            )

    def accelerate(self, recorder: Recorder | None, *, part_frames: int) -> None:
        """Decode `part_frames` latents a call, by fused kernels, and replay what `recorder` records.

        Equal to the plain passes up to rounding. A decoder of another design than Wan 2.1's, whose last convolution
        makes the pixels themselves, stays as it is.
        """
        if not self._model.config.patch_size:
            self._fast = FastDecoder(self._model, load_kernels(self.device), recorder)
            self.part_frames = part_frames

    def decode_part(self, latents: Tensor, past: Past) -> Tensor:
        """[B, C, F, h, w] normalised -> pixels [B, 3, T, H, W]; `past` is advanced."""
        z = (latents.to(self.device, torch.float32) * self._std + self._mean).to(self.dtype)
        if self._fast is None:
            return self._passes.decode(z, past).float().clamp(-1, 1)
        return self._fast(z, past).permute(0, 4, 1, 2, 3).float().clamp(-1, 1)


# -- weights -----------------------------------------------------------------------------------


def check_vae(path: Path, *, latent_channels: int, temporal_stride: int, spatial_stride: int) -> None:
    """Compare a VAE's files with what the transformer and its videos need, without reading the weights.

    Raises:
        CheckpointError: as `WanVAE.load`, or a VAE of other channels or strides.
    """
    config, tensors = _read_vae(path, meta=True)
    model = _skeleton(config, source=path)
    check_fit(path, tensors, {name: parameter.shape for name, parameter in model.named_parameters()})
    found, wanted = (model.config.z_dim, *_strides(model)), (latent_channels, temporal_stride, spatial_stride)
    for name, here, there in zip(("latent channels", "temporal_stride", "spatial_stride"), found, wanted, strict=True):
        if here != there:
            raise CheckpointError(
                f"{path}: this VAE has {name} {here}, and the model's YAML says {there}. "
                "Give the VAE that belongs to the model, or correct the YAML."
            )


def _strides(model: AutoencoderKLWan) -> tuple[int, int]:
    """Pixel frames in a latent frame, and pixels in a latent row or column."""
    steps = len(model.config.dim_mult) - 1
    return 2 ** sum(model.config.temperal_downsample[:steps]), (model.config.patch_size or 1) * 2**steps


def _skeleton(config: Mapping[str, Any], *, source: Path) -> AutoencoderKLWan:
    """The VAE that `config` describes, on meta. Raises: CheckpointError, if it describes none that can work."""
    if config.get("is_residual"):
        raise CheckpointError(
            f"{source}: a VAE of Wan 2.2's wider design (is_residual), which is not supported. Give one of Wan 2.1's."
        )
    try:
        with torch.device("meta"):
            model = AutoencoderKLWan.from_config(dict(config))
    except Exception as error:  # diffusers checks no value: a wrong one can fail anywhere inside
        raise CheckpointError(
            f"{source}: its config.json describes no VAE ({type(error).__name__}: {error}). Download it again."
        ) from error
    channels = model.config.z_dim
    for name, values in (("mean", model.config.latents_mean), ("std", model.config.latents_std)):
        if not isinstance(values, list | tuple) or len(values) != channels:
            count = f"{len(values)} values" if isinstance(values, list | tuple) else f"no values, but {values!r}"
            raise CheckpointError(
                f"{source}: the VAE has {channels} latent channels, but the {name} to normalise them by has {count} "
                "(Wan 2.1's, where a file brings none). Give statistics= with one value a channel."
            )
        for value in values:
            number = isinstance(value, int | float) and math.isfinite(value)
            if not number or (name == "std" and value <= 0):
                raise CheckpointError(
                    f"{source}: latents_{name} has the value {value!r}; latents cannot be normalised by it. "
                    f"Allowed: finite numbers{' above 0' if name == 'std' else ''}. Download its config.json again."
                )
    return model


def _from_original(tensors: Mapping[str, Tensor], *, source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Original Wan names -> Wan 2.1's configuration in the widths that the shapes tell, and diffusers' names.

    Raises:
        CheckpointError: these are not the tensors of a VAE of this design.
    """
    tensors = {strip_wrappers(name): value for name, value in tensors.items()}
    try:
        config = {"base_dim": tensors["encoder.conv1.weight"].shape[0], "z_dim": tensors["conv2.weight"].shape[0]}
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{source}: not a Wan 2.1 VAE with original names ({error}). Give Wan2.1_VAE.pth, or a diffusers folder "
            "with its config.json."
        ) from error
    return config, convert_wan_vae_to_diffusers(tensors)


def _read_vae(path: Path, *, meta: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, tensors = FILES.read(path, meta=meta)
    return _from_original(tensors, source=path) if config is None else (config, tensors)


def _skeleton_of(path: Path) -> AutoencoderKLWan:
    """The VAE at `path`, on meta; Wan 2.1's if nothing is there."""
    found = FILES.find_config(path)
    return _skeleton(found[1] if found else _read_vae(path, meta=True)[0] if path.exists() else {}, source=path)
