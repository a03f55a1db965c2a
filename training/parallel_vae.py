"""AutoencoderKLWan over a whole clip at once: what its frame-by-frame caches compute, without the loop.

diffusers' modules skip temporal resampling when they run without caches; here it is done for all frames
together, so that training and encoding a data set take a handful of large kernels instead of hundreds of
small ones. Equal to the streaming passes of wan/vae.py up to rounding (tests/test_training.py).

B clips, C channels, T = 1 + 4k pixel frames, F = 1 + k latent frames.
"""
from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from einops import rearrange
from torch import Tensor, nn


def _per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """A 2-D module on every frame of [B, C, T, H, W]."""
    frames = x.shape[2]
    return rearrange(module(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", t=frames)


def _resample(layer: WanResample, x: Tensor) -> Tensor:
    """The first frame stands alone in time; the others are doubled, or joined in pairs with the one before."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        pairs = layer.time_conv(x[:, :, 1:])
        x = torch.cat([x[:, :, :1], rearrange(pairs, "b (n c) t h w -> b c (t n) h w", n=2)], dim=2)
    x = _per_frame(layer.resample, x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def encode_clip(vae: AutoencoderKLWan, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [B, C, F, h, w] of the latents of `pixels` [B, 3, T, H, W] in [-1, 1]."""
    patch = vae.config.patch_size or 1
    encoder = vae.encoder
    x = encoder.conv_in(rearrange(pixels, "b c t (h q) (w r) -> b (c r q) t h w", q=patch, r=patch))
    for layer in encoder.down_blocks:
        x = _resample(layer, x) if isinstance(layer, WanResample) else layer(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode_clip(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Pixels [B, 3, T, H, W], not clamped, of raw latents [B, C, F, h, w]."""
    patch = vae.config.patch_size or 1
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        for upsampler in block.upsamplers or ():
            x = _resample(upsampler, x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return rearrange(x, "b (c r q) t h w -> b c t (h q) (w r)", q=patch, r=patch)
