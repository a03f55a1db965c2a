"""AutoencoderKLWan over any number of frames at a time: diffusers' modules and weights, passes of our own.

Every layer works on all frames of all clips as one batch of images; a causal 3-D convolution is a 2-D one over
each frame stacked with the two before it. That is a handful of large kernels where frame-by-frame passes take
hundreds of small ones, and gradients flow through it. A stream remembers the last frames that each layer saw.

B clips, C channels, T pixel frames, F latent frames, s temporal stride; images are [B * frames, C, H, W].
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanMidBlock, WanResample, WanResidualBlock
from einops import rearrange
from torch import Tensor, nn

from wan.stream import Past


def normalise_activate(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over channels, then SiLU; in the order of operations, and so with the roundings, of the authors.

    Shapes: x [N, C, H, W], gamma C numbers.
    """
    return F.silu(F.normalize(x.float(), dim=1).to(x.dtype) * x.shape[1] ** 0.5 * gamma.view(-1, 1, 1))


class VaePasses:
    """Encoder and decoder passes; latents here are raw, as the network makes them.

    With `past`, empty at first, a video may come in parts of any length; without, it is whole. Equal to
    the one-frame-at-a-time passes of the authors and of diffusers up to rounding.

    Args: activate: `normalise_activate`, or something faster that computes the same.
    """

    def __init__(self, model: AutoencoderKLWan, activate: Callable[[Tensor, Tensor], Tensor] = normalise_activate):
        self._model, self._activate, self._patch = model, activate, model.config.patch_size or 1

    def encode(self, pixels: Tensor, past: Past | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance [B, C, F, h, w] of pixels [B, 3, T, H, W] in [-1, 1], in the model's dtype.

        T is 1 + s (F - 1) in the first part, s F in later ones.
        """
        encoder, clips = self._model.encoder, len(pixels)
        x = rearrange(pixels, "b c t (h q) (w r) -> (b t) (c r q) h w", q=self._patch, r=self._patch)
        x = _conv(encoder.conv_in, x.contiguous(memory_format=torch.channels_last), clips, past)
        for layer in encoder.down_blocks:
            run = _resample if isinstance(layer, WanResample) else self._residual
            x = run(layer, x, clips, past)
        x = self._activate(self._middle(encoder.mid_block, x, clips, past), encoder.norm_out.gamma)
        x = _conv(self._model.quant_conv, _conv(encoder.conv_out, x, clips, past), clips)
        mean, log_variance = rearrange(x, "(b t) c h w -> b c t h w", b=clips).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor, past: Past | None = None) -> Tensor:
        """Pixels [B, 3, T, H, W], not clamped, of latents [B, C, F, h, w] in the model's dtype; T as in `encode`."""
        decoder, clips = self._model.decoder, len(latents)
        x = rearrange(latents, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        x = _conv(self._model.post_quant_conv, x, clips)
        x = _conv(decoder.conv_in, x, clips, past)
        x = self._middle(decoder.mid_block, x, clips, past)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._residual(resnet, x, clips, past)
            if block.upsamplers:
                x = _resample(block.upsamplers[0], x, clips, past)
        x = _conv(decoder.conv_out, self._activate(x, decoder.norm_out.gamma), clips, past)
        return rearrange(x, "(b t) (c r q) h w -> b c t (h q) (w r)", b=clips, q=self._patch, r=self._patch)

    def _residual(self, block: WanResidualBlock, x: Tensor, clips: int, past: Past | None) -> Tensor:
        h = x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x, clips)
        x = _conv(block.conv1, self._activate(x, block.norm1.gamma), clips, past)
        return h + _conv(block.conv2, self._activate(x, block.norm2.gamma), clips, past)

    def _middle(self, block: WanMidBlock, x: Tensor, clips: int, past: Past | None) -> Tensor:
        x = self._residual(block.resnets[0], x, clips, past)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            x = self._residual(resnet, attention(x.unsqueeze(2)).squeeze(2), clips, past)
        return x.contiguous(memory_format=torch.channels_last)


def _conv(conv: nn.Conv3d, x: Tensor, clips: int, past: Past | None = None) -> Tensor:
    """A causal convolution that keeps the number of frames; frames before the first are zero."""
    taps, padding = conv.weight.shape[2], conv.weight.shape[3] // 2
    if taps == 1:
        return F.conv2d(x, conv.weight[:, :, 0], conv.bias, padding=padding)
    video = x.permute(0, 2, 3, 1).unflatten(0, (clips, -1))
    frames, known = video.shape[1], 0
    if past is not None:
        if conv in past:
            known = past[conv].shape[1]
            video = torch.cat([past[conv], video], dim=1)
        past[conv] = video[:, 1 - taps:].clone()
    taps = min(taps, known + frames)  # older taps would only meet zeros
    seen = [_from(video, known - back, frames) for back in range(taps - 1, -1, -1)]
    stacked = torch.cat(seen, dim=-1).flatten(0, 1).permute(0, 3, 1, 2)
    weight = conv.weight[:, :, -taps:].transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    return F.conv2d(stacked, weight, conv.bias, padding=padding)


def _from(video: Tensor, start: int, frames: int) -> Tensor:
    """`frames` frames of [B, frames, H, W, C] from `start` on; zeros where that is before the first."""
    part = video[:, max(start, 0):start + frames]
    return F.pad(part, (0, 0) * 3 + (-start, 0)) if start < 0 else part


def _resample(layer: WanResample, x: Tensor, clips: int, past: Past | None) -> Tensor:
    """The first frame stands alone in time; the others are doubled, or joined in pairs with the one before."""
    first = past is None or layer not in past
    if layer.mode == "upsample3d":
        x = x.unflatten(0, (clips, -1))
        alone, others = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
        if others.shape[1]:
            pairs = _conv(layer.time_conv, others.flatten(0, 1), clips, past)
            pairs = rearrange(pairs, "(b t) (n c) h w -> b (t n) c h w", b=clips, n=2)
            x = torch.cat([alone, pairs], dim=1)
        if past is not None:
            past[layer] = x.new_empty(0)  # the first frame is over
        x = x.flatten(0, 1)
    x = layer.resample(x)
    if layer.mode == "downsample3d":
        x = x.unflatten(0, (clips, -1))
        joined = x if first else torch.cat([past[layer], x], dim=1)
        if past is not None:
            past[layer] = x[:, -1:].clone()
        halves = [x[:, :1]] if first else []
        if joined.shape[1] > 1:
            threes = torch.cat([joined[:, 0:-2:2], joined[:, 1:-1:2], joined[:, 2::2]], dim=2).flatten(0, 1)
            weight = layer.time_conv.weight.transpose(1, 2).flatten(1, 2)
            halves.append(F.conv2d(threes, weight, layer.time_conv.bias).unflatten(0, (clips, -1)))
        x = torch.cat(halves, dim=1).flatten(0, 1)
    return x.contiguous(memory_format=torch.channels_last)
