"""TransNetV2's convolutions for inference: the package's weights and answers, in three quarters of the time on a CPU.

The network's 3-D convolutions are either 1 x 3 x 3, over each frame, or 3 x 1 x 1, over time at one place. Here both
are 2-D ones, over (height, width) and over (time, place), for which torch has the faster code. Channels lie innermost,
and the batch normalisation, which at inference is a scale and a shift, is part of the weights.

B clips, T frames, C channels; F filters of each of four dilations; images are [B * T, C, H, W], channels last.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DILATIONS = (1, 2, 4, 8)  # frames from tap to tap of the four branches


class Stack(nn.Module):
    """Takes the place of a StackedDDCNNV2 of the package: two blocks of four branches, a shortcut, and pooling."""

    def __init__(self, stack: nn.Module):
        super().__init__()
        self.first, self.second = (_Block(block) for block in stack.DDCNN)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [B, C, T, H, W] -> [B, 4 F, T, H // 2, W // 2]."""
        clips, images = len(x), x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        first = self.first(images, clips).relu_()
        summed = self.second(first, clips).relu_().add_(first)
        return F.avg_pool2d(summed, 2).unflatten(0, (clips, -1)).transpose(1, 2)


class _Block:
    """A DilatedDCNNV2 with its normalisation, before the activation."""

    def __init__(self, block: nn.Module):
        scale = block.bn.weight / (block.bn.running_var + block.bn.eps).sqrt()
        shift = block.bn.bias - scale * block.bn.running_mean
        self.branches = []
        for dilation, gain, bias in zip(DILATIONS, scale.chunk(4), shift.chunk(4), strict=True):
            space, time = (layer.weight.detach() for layer in block.get_submodule(f"Conv3D_{dilation}").layers)
            space, time = space[:, :, 0], time[..., 0] * gain.detach().view(-1, 1, 1, 1)
            space, time = (weight.contiguous(memory_format=torch.channels_last) for weight in (space, time))
            self.branches.append((dilation, space, time, bias.detach()))

    def __call__(self, images: Tensor, clips: int) -> Tensor:
        frames, _, height, width = images.shape
        joined = images.new_empty(frames, height, width, sum(len(bias) for *_, bias in self.branches))
        for part, (dilation, space, time, bias) in zip(joined.chunk(4, dim=-1), self.branches, strict=True):
            seen = F.conv2d(images, space, padding=1).permute(0, 2, 3, 1)
            seen = seen.reshape(clips, frames // clips, height * width, -1).permute(0, 3, 1, 2)  # [B, 2 F, T, H * W]
            seen = F.conv2d(seen, time, bias, padding=(dilation, 0), dilation=(dilation, 1)).permute(0, 2, 3, 1)
            part.copy_(seen.reshape(part.shape))  # at once: to keep the four and join them wants more fresh memory
        return joined.permute(0, 3, 1, 2)
