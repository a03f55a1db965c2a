"""AutoencoderKLWan over a whole clip at once: what its frame-by-frame caches compute, without the loop.

Every layer works on all frames of all clips as one batch of images; a causal 3-D convolution is a 2-D one over
each frame stacked with the two before it. That is a handful of large kernels instead of hundreds of small ones,
and 2-D convolutions of few channels run far faster. Equal to the streaming passes of wan/vae.py up to rounding
(tests/test_training.py).

B clips, C channels, T = 1 + 4k pixel frames, F = 1 + k latent frames; images are [B * T, C, H, W].
"""
from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanMidBlock, WanResample, WanResidualBlock
from einops import rearrange
from torch import Tensor, nn


def encode_clip(vae: AutoencoderKLWan, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance [B, C, F, h, w] of the latents of `pixels` [B, 3, T, H, W] in [-1, 1]."""
    patch, encoder, clips = vae.config.patch_size or 1, vae.encoder, len(pixels)
    x = rearrange(pixels, "b c t (h q) (w r) -> (b t) (c r q) h w", q=patch, r=patch)
    x = _conv(encoder.conv_in, x.contiguous(memory_format=torch.channels_last), clips)
    for layer in encoder.down_blocks:
        x = _resample(layer, x, clips) if isinstance(layer, WanResample) else _residual(layer, x, clips)
    x = _conv(encoder.conv_out, _activation()(_middle(encoder.mid_block, x, clips), encoder.norm_out.gamma), clips)
    x = rearrange(_conv(vae.quant_conv, x, clips), "(b t) c h w -> b c t h w", b=clips)
    mean, log_variance = x.chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode_clip(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Pixels [B, 3, T, H, W], not clamped, of raw latents [B, C, F, h, w]."""
    patch, decoder, clips = vae.config.patch_size or 1, vae.decoder, len(latents)
    x = rearrange(latents, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
    x = _middle(decoder.mid_block, _conv(decoder.conv_in, _conv(vae.post_quant_conv, x, clips), clips), clips)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _residual(resnet, x, clips)
        for upsampler in block.upsamplers or ():
            x = _resample(upsampler, x, clips)
    x = _conv(decoder.conv_out, _activation()(x, decoder.norm_out.gamma), clips)
    return rearrange(x, "(b t) (c r q) h w -> b c t (h q) (w r)", b=clips, q=patch, r=patch)


def _conv(conv: nn.Conv3d, x: Tensor, clips: int) -> Tensor:
    """A causal convolution that keeps the number of frames; missing frames before the first are zero."""
    taps, padding = conv.weight.shape[2], conv.weight.shape[3] // 2
    taps = min(taps, len(x) // clips)  # older taps than there are frames would only meet zeros
    weight = conv.weight[:, :, -taps:].transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    return F.conv2d(_with_past(x, clips, taps) if taps > 1 else x, weight, conv.bias, padding=padding)


def _with_past(x: Tensor, clips: int, taps: int) -> Tensor:
    """Every image stacked with the taps - 1 before it in its clip, oldest first: [B * T, taps * C, H, W]."""
    video = x.permute(0, 2, 3, 1).unflatten(0, (clips, -1))
    shifted = [F.pad(video[:, :video.shape[1] - back], (0, 0) * 3 + (back, 0)) for back in range(taps - 1, 0, -1)]
    return torch.cat([*shifted, video], dim=-1).flatten(0, 1).permute(0, 3, 1, 2)


def _normalise_activate(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over channels, then SiLU."""
    scale = x.shape[1] ** 0.5
    return F.silu(F.normalize(x.float(), dim=1).to(x.dtype) * scale * gamma.view(-1, 1, 1))


@cache
def _activation():
    """The norm with its activation, fused where there is a GPU."""
    return torch.compile(_normalise_activate, dynamic=True) if torch.cuda.is_available() else _normalise_activate


def _residual(block: WanResidualBlock, x: Tensor, clips: int) -> Tensor:
    h = x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x, clips)
    x = _conv(block.conv1, _activation()(x, block.norm1.gamma), clips)
    return h + _conv(block.conv2, _activation()(x, block.norm2.gamma), clips)


def _middle(block: WanMidBlock, x: Tensor, clips: int) -> Tensor:
    x = _residual(block.resnets[0], x, clips)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _residual(resnet, attention(x.unsqueeze(2)).squeeze(2), clips)
    return x.contiguous(memory_format=torch.channels_last)


def _resample(layer: WanResample, x: Tensor, clips: int) -> Tensor:
    """The first frame stands alone in time; the others are doubled, or joined in pairs with the one before."""
    frames = len(x) // clips
    if layer.mode == "upsample3d" and frames > 1:
        x = rearrange(x, "(b t) c h w -> b t c h w", b=clips)
        pairs = _conv(layer.time_conv, x[:, 1:].flatten(0, 1), clips)
        pairs = rearrange(pairs, "(b t) (n c) h w -> b (t n) c h w", b=clips, n=2)
        x = torch.cat([x[:, :1], pairs], dim=1).flatten(0, 1)
    x = layer.resample(x)
    if layer.mode == "downsample3d" and frames > 1:
        x = rearrange(x, "(b t) c h w -> b t c h w", b=clips)
        threes = torch.cat([x[:, 0:-2:2], x[:, 1:-1:2], x[:, 2::2]], dim=2).flatten(0, 1)
        weight = layer.time_conv.weight.transpose(1, 2).flatten(1, 2)
        halved = F.conv2d(threes, weight, layer.time_conv.bias).unflatten(0, (clips, -1))
        x = torch.cat([x[:, :1], halved], dim=1).flatten(0, 1)
    return x.contiguous(memory_format=torch.channels_last)
