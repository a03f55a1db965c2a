"""The Wan VAE's decoder for speed: several latents a call, fixed addresses, few passes over memory.

It computes what `VaePasses.decode` does, with diffusers' weights. Every causal convolution is a 2-D one over stacked
frames, and all that stands between two of them (bias, shortcut, norm, SiLU, stacking) is one kernel. From the step
to the full frame rate on, frames go through the rest in small parts, which keeps the work space small.

B clips, F latent frames, T pixel frames, C channels; activations are [B, T, H, W, C], contiguous.
"""
from __future__ import annotations

import weakref
from types import ModuleType

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock, WanUpBlock
from torch import Tensor, nn

from wan.recorder import Recorder, Replays
from wan.stacking import PAST, Sum
from wan.stream import Past

PART_FRAMES = 1  # frames before the last doubling of the frame rate that go through the rest together


class FastDecoder:
    """Decodes raw latents, one stream at a time fastest; streams may take turns.

    A stream's past is the decoder's own buffers while it is the one being decoded, and copies of them afterwards.
    """

    def __init__(self, model: AutoencoderKLWan, kernels: ModuleType, recorder: Recorder | None):
        self._decoder, self._kernels = model.decoder, kernels
        self._weights = {
            module: _stacked_weight(module, thin=module is self._decoder.conv_out)
            for module in [model.post_quant_conv, *self._decoder.modules()] if isinstance(module, nn.Conv2d | nn.Conv3d)
        }
        self._quant, self._levels = model.post_quant_conv, list(self._decoder.up_blocks)
        doubling = [
            i for i, block in enumerate(self._levels) if block.upsamplers and block.upsamplers[0].mode == "upsample3d"
        ]
        self._last_doubling = doubling[-1] if doubling else 0  # parts begin behind this level's resnets
        self._past: dict[nn.Module, Tensor] = {}
        self._owner: weakref.ref[Past] | None = None
        self._size: tuple[int, ...] | None = None
        self._replays = Replays(recorder)

    def __call__(self, latents: Tensor, past: Past) -> Tensor:
        """The next raw latents [B, C, F, h, w] of a stream, in the model's dtype -> pixels [B, T, H, W, 3]."""
        first = not past
        self._activate(past, (len(latents), *latents.shape[3:]))
        latents = self._replays.place(latents.shape, latents)
        pixels = self._replays((first, latents.shape), lambda: self._decode(latents, first=first))
        past.update(self._past)
        return pixels

    def _activate(self, past: Past, size: tuple[int, ...]) -> None:
        """Put the buffers into the state of this stream, of so many clips, rows and columns."""
        owner = self._owner() if self._owner else None
        if owner is past:
            return
        if owner:
            owner.update({module: buffer.clone() for module, buffer in self._past.items()})
        if size != self._size:  # other buffers, so that what was recorded with these is void
            self._size = size
            self._past.clear()
            self._replays.clear()
        for buffer in self._past.values():
            buffer.zero_()
        for module, saved in past.items():
            past[module] = self._past.setdefault(module, torch.empty_like(saved)).copy_(saved)
        self._owner = weakref.ref(past)

    def _decode(self, latents: Tensor, *, first: bool) -> Tensor:
        """Raw latents [B, C, F, h, w] in the model's dtype -> pixels [B, T, H, W, 3], not clamped.

        `first`: these begin the video, whose first latent frame is one pixel frame.
        """
        x = latents.permute(0, 2, 3, 4, 1).contiguous()
        x = self._conv(self._quant, x, bias=True)
        x, _ = self._causal(self._decoder.conv_in, Sum(x))
        middle = self._decoder.mid_block
        x = self._residual(middle.resnets[0], x)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            x = self._residual(resnet, Sum(self._attend(attention, self._settled(x))))
        for block in self._levels[:self._last_doubling]:
            x = self._upsample(block, self._residuals(block, x), first)
        parts = self._settled(self._residuals(self._levels[self._last_doubling], x)).split(PART_FRAMES, dim=1)
        return torch.cat([
            self._finish(Sum(part.contiguous()), first and index == 0) for index, part in enumerate(parts)
        ], dim=1)

    def _finish(self, x: Sum, first: bool) -> Tensor:
        """From the last doubling of the frame rate on."""
        x = self._upsample(self._levels[self._last_doubling], x, first)
        for block in self._levels[self._last_doubling + 1:]:
            x = self._upsample(block, self._residuals(block, x), first)
        return self._thin(self._decoder.conv_out, x, self._decoder.norm_out.gamma.flatten())

    def _thin(self, conv: nn.Conv3d, x: Sum, gamma: Tensor) -> Tensor:
        """A causal convolution to few channels: each frame for all its taps, then what meets is added up.

        That reads and remembers frames once, not stacked.
        """
        taps = self._conv(conv, self._kernels.activate(x, gamma))
        x.release()
        past = self._past_of(conv, taps)
        known = torch.cat([past, taps], dim=1)
        past.copy_(known[:, -PAST:])
        frames, channels = taps.shape[1], conv.out_channels
        out = conv.bias.float()
        for tap in range(PAST + 1):
            out = out + known[:, tap:tap + frames, ..., tap * channels:(tap + 1) * channels]
        return out.to(taps.dtype)

    def _residuals(self, block: WanUpBlock, x: Sum) -> Sum:
        for resnet in block.resnets:
            x = self._residual(resnet, x)
        return x

    def _residual(self, block: WanResidualBlock, x: Sum) -> Sum:
        """The shortcut and the last bias are added by whatever comes next."""
        inner, settled = self._causal(block.conv1, x, block.norm1.gamma.flatten(), keep=True)
        if not isinstance(block.conv_shortcut, nn.Identity):
            settled = self._conv(block.conv_shortcut, settled, bias=True)
        out, _ = self._causal(block.conv2, inner, block.norm2.gamma.flatten())
        out.shortcut = settled
        return out

    def _attend(self, attention: nn.Module, x: Tensor) -> Tensor:
        """Attention inside each frame, by diffusers' own module."""
        images = x.flatten(0, 1).permute(0, 3, 1, 2).unsqueeze(2)
        return attention(images).squeeze(2).permute(0, 2, 3, 1).contiguous().view(x.shape)

    def _upsample(self, block: WanUpBlock, x: Sum, first: bool) -> Sum:
        """Twice the height and width, and of "upsample3d" the frames, but for a video's very first one."""
        if not block.upsamplers:
            return x
        layer: WanResample = block.upsamplers[0]
        conv, frames = layer.resample[1], []
        if layer.mode != "upsample3d":
            frames.append(self._spread(x, 1))
        else:
            if first:
                settled = self._settled(x)
                frames.append(self._spread(Sum(settled[:, :1].contiguous()), 1))
                x = Sum(settled[:, 1:].contiguous())
            if x.x.shape[1]:
                frames.append(self._spread(self._causal(layer.time_conv, x)[0], 2))
        return Sum(self._conv(conv, frames[0] if len(frames) == 1 else torch.cat(frames, dim=1)), conv.bias)

    def _spread(self, x: Sum, times: int) -> Tensor:
        result = self._kernels.spread(x, times)
        x.release()
        return result

    def _settled(self, x: Sum) -> Tensor:
        result = x.settled()
        x.release()
        return result

    def _causal(
        self, conv: nn.Conv3d, x: Sum, gamma: Tensor | None = None, *, keep: bool = False,
    ) -> tuple[Sum, Tensor | None]:
        """Result and bias, still to be added up, and what x settled to if that is to be kept."""
        stacked, settled = self._kernels.stack(x, gamma, self._past_of(conv, x.x), keep)
        x.release()
        return Sum(self._conv(conv, stacked), conv.bias), settled

    def _past_of(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        if conv not in self._past:
            self._past[conv] = x.new_zeros(x.shape[0], PAST, *x.shape[2:])
        return self._past[conv]

    def _conv(self, conv: nn.Module, x: Tensor, *, bias: bool = False) -> Tensor:
        """A 2-D convolution of every frame [B, T, H, W, C]."""
        weight = self._weights[conv]
        images = x.flatten(0, 1).permute(0, 3, 1, 2)  # channels-last in memory
        out = F.conv2d(images, weight, conv.bias if bias else None, padding=weight.shape[-1] // 2)
        return out.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])


def _stacked_weight(conv: nn.Conv2d | nn.Conv3d, *, thin: bool) -> Tensor:
    """Weights of the 2-D convolution over stacked frames, oldest first, channels-last; the module's become a view.

    `thin`: results of all taps in place of stacked frames, oldest first; a copy.
    """
    weight = conv.weight.detach()
    if thin:
        return weight.movedim(2, 0).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    if weight.ndim == 4:
        stacked = weight.contiguous(memory_format=torch.channels_last)
        conv.weight.data = stacked
        return stacked
    taps = weight.shape[2]
    stacked = weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    conv.weight.data = stacked.unflatten(1, (taps, -1)).transpose(1, 2)
    return stacked
