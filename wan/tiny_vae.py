"""Latents -> pixels with TAEHV: a decoder some 25 times cheaper than Wan's own, and approximate.

It is causal, and all that it remembers is what each block saw one frame before: a stream decodes a few latent frames
at a time, in memory that does not grow with the video. Encoding stays with the Wan VAE.

Two files have this layout. They differ in the latents that they read, and nothing in them says which:
    taehv     taew2_1.pth or .safetensors of github.com/madebyollin/taehv: normalised, as the transformer makes them
    lighttae  lighttaew2_1.pth or .safetensors of huggingface.co/lightx2v/Autoencoders: raw, as the Wan VAE makes them

B batch, F latent frames, C latent channels; images are [B * frames, channels, height, width].

Source: madebyollin/taehv (README: "does not use any latent scales / shifts", pixels in [0, 1]; taehv.py: layout,
    `frames_to_trim`); LightX2V's and NVIDIA FlashDreams' loaders of LightTAE (raw latents).
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from einops import rearrange
from torch import Tensor, nn

from wan.checkpoint import CheckpointError, check_fit, load_strictly, read_tensors
from wan.stacking import Sum, load_kernels
from wan.stream import Past, VideoDecoder, load_random

TinyKind = Literal["taehv", "lighttae"]

BOUND = 3.0  # latents are softly held within it
STAGES = ((256, 128, 1), (128, 64, 2), (64, 64, 2))  # channels, channels after it, frames made of one


class TinyVAE(VideoDecoder):
    """A tiny decoder in the place of the Wan VAE's; the same streams, frame counts and value range."""

    temporal_stride = 4   # pixel frames a latent frame spans; the first latent frame spans one
    spatial_stride = 8    # pixels a latent spans along height, and along width

    def __init__(
        self, decoder: nn.Sequential, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,),
    ) -> None:
        """`mean` and `std`, one value or one a channel, make normalised latents raw, for a decoder that reads those."""
        self._decoder = decoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        first = decoder[1].weight
        self.device, self.dtype = first.device, first.dtype
        self._wide = torch.promote_types(self.dtype, torch.float32)
        self._mean, self._std = (
            torch.tensor(values, device=self.device, dtype=self._wide).view(-1, 1, 1) for values in (mean, std)
        )

    @property
    def latent_channels(self) -> int:
        return self._decoder[1].in_channels

    @classmethod
    def load(
        cls, path: Path, *, device: torch.device | str, dtype: torch.dtype, kind: TinyKind = "taehv",
    ) -> TinyVAE:
        """Load a published file, or the one in a folder.

        Raises:
            CheckpointError: missing, damaged or unsafe file, tensors of another layout, or raw latents of another
                number of channels than Wan 2.1's.
        """
        tensors = _read_decoder(path)
        if "decoder.1.weight" not in tensors or tensors["decoder.1.weight"].ndim != 4:
            raise CheckpointError(
                f"{path}: no tiny decoder of Wan 2.1 latents (there is no convolution decoder.1.weight). "
                "Give taew2_1 or lighttaew2_1, .pth or .safetensors, as published."
            )
        channels = tensors["decoder.1.weight"].shape[1]
        network = _network(channels)
        load_strictly(network, tensors, source=path, device=device, dtype=dtype)
        if kind == "taehv":
            return cls(network["decoder"])
        with torch.device("meta"):
            wan = AutoencoderKLWan.from_config({}).config  # the statistics of Wan 2.1
        if channels != wan.z_dim:
            raise CheckpointError(
                f"{path}: as lighttae it reads raw latents of Wan 2.1's {wan.z_dim} channels, but it has {channels}. "
                "Give lighttaew2_1 as published; a decoder of normalised latents is a taehv."
            )
        return cls(network["decoder"], wan.latents_mean, wan.latents_std)

    @classmethod
    def random(cls, latent_channels: int, *, device: torch.device | str, dtype: torch.dtype, seed: int) -> TinyVAE:
        """Seeded random weights, as `load_random` makes them."""
        decoder = _network(latent_channels)["decoder"]
        load_random(decoder, seed, device=device, dtype=dtype)
        return cls(decoder)

    @classmethod
    def skeleton(cls, latent_channels: int, dtype: torch.dtype) -> TinyVAE:
        """On the meta device: shapes without data."""
        return cls(_network(latent_channels)["decoder"].to(dtype))

    def decode_part(self, latent: Tensor, past: Past) -> Tensor:
        """[B, C, F, h, w] normalised -> pixels [B, 3, T, H, W] in [-1, 1]; `past` is advanced.

        The first latent frame makes four images as the others do, but stands for one pixel frame: the last.
        Returns: float32; of a float64 decoder, float64.
        """
        z = latent.transpose(1, 2).flatten(0, 1).to(self.device, self._wide) * self._std + self._mean
        x = (torch.tanh(z / BOUND) * BOUND).to(self.dtype, memory_format=torch.channels_last)
        first = not past
        for layer in self._decoder:
            x = layer(x, len(latent), past) if isinstance(layer, _Block) else layer(x)
        pixels = rearrange(x, "(b t) c h w -> b c t h w", b=len(latent))
        pixels = pixels[:, :, self.temporal_stride - 1:] if first else pixels
        return pixels.to(self._wide).clamp(0, 1) * 2 - 1


def check_tiny_vae(path: Path, latent_channels: int) -> None:
    """Compare names and shapes of a published file with the layout, without reading its weights.

    Raises:
        CheckpointError: as `TinyVAE.load`, or a file for another number of latent channels.
    """
    expected = {name: value.shape for name, value in _network(latent_channels).named_parameters()}
    check_fit(path, _read_decoder(path), expected)


def _read_decoder(path: Path) -> dict[str, Tensor]:
    """The tensors at `path` but for the encoder's, which every published file has and nobody runs."""
    tensors = read_tensors(path, subfolder="taehv")
    return {name: value for name, value in tensors.items() if not name.startswith("encoder.")}


# -- the network, module by module under the published names --------------------------------------


class _Block(nn.Module):
    """A residual block that also sees its own input of the frame before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width),
        )

    def forward(self, x: Tensor, clips: int, past: Past) -> Tensor:
        video = x.unflatten(0, (clips, -1))
        last = past[self] if self in past else torch.zeros_like(video[:, :1])
        past[self] = video[:, -1:].clone()
        before = torch.cat([last, video[:, :-1]], dim=1).flatten(0, 1)
        return F.relu(self.conv(torch.cat([x, before], dim=1)) + x)


class _Grow(nn.Module):
    """Each image becomes `frames` images in a row, twice as high and wide, in one pass over memory.

    The convolution looks at single pixels, so it may run before they are doubled, at a quarter of the cost.
    """

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(width, width * frames, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        images = self.conv(x).permute(0, 2, 3, 1).contiguous().unsqueeze(1)  # [N, 1, h, w, t c]
        return load_kernels(x.device).spread(Sum(images), self.frames).flatten(0, 1).permute(0, 3, 1, 2)


def _conv(before: int, after: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=bias)


def _network(latent_channels: int) -> nn.ModuleDict:
    """The decoder, under its name, on meta."""
    with torch.device("meta"):
        layers: list[nn.Module] = [nn.Identity(), _conv(latent_channels, STAGES[0][0]), nn.ReLU()]
        for width, after, frames in STAGES:  # Identity: what the names count as a layer, and is done elsewhere
            layers += [*(_Block(width) for _ in range(3)), nn.Identity(), _Grow(width, frames)]
            layers += [_conv(width, after, bias=False)]
        layers += [nn.ReLU(), _conv(STAGES[-1][1], 3)]
        return nn.ModuleDict({"decoder": nn.Sequential(*layers)})
