"""Linear layers in 8-bit floats: faster on GPUs that multiply them, and approximate.

Each row of activations (a token) and each row of weights (an output channel) has a scale of its own, so that one
large value costs the others of its row alone. Quantising is plain elementwise work behind one maximum, which a
compiler fuses into whatever made the activations.

M tokens, K channels in, N channels out.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from wan.model import Block, CausalWanModel

FP8 = torch.float8_e4m3fn
MOST = torch.finfo(FP8).max
UNIT = 16  # what the kernels want K and N to be multiples of
LEAST_CAPABILITY = (8, 9)  # of a CUDA device: the first with such kernels
# Of each block. The rest (embeddings, modulation, head, the text's keys and values) is little work.
LAYERS = ("self_attn.joint", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> values [M, K] in 8-bit floats and scales [M, 1] float32; their product is x, rounded."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * MOST) / MOST
    return (wide / scale).clamp(-MOST, MOST).to(FP8), scale


class Fp8Linear(nn.Module):
    """A linear layer in the place of one with `weight` [N, K] and `bias` [N], for bfloat16 activations.

    Raises:
        ValueError: sizes or a dtype that the kernels do not take.
    """

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        if weight.shape[0] % UNIT or weight.shape[1] % UNIT or weight.dtype != torch.bfloat16:
            raise ValueError(
                f"8-bit layers need bfloat16 weights and multiples of {UNIT} channels, got {weight.dtype} "
                f"{list(weight.shape)}. Use --acceleration exact for this model."
            )
        values, scale = quantise(weight.detach())
        self.register_buffer("weight", values, persistent=False)
        self.register_buffer("scale", scale.t().contiguous(), persistent=False)  # [1, N]
        self.register_buffer("bias", bias.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        values, scale = quantise(x.flatten(0, -2))
        out = torch._scaled_mm(
            values, self.weight.t(), scale_a=scale, scale_b=self.scale, bias=self.bias, out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return out.unflatten(0, x.shape[:-1])

    def twin(self, x: Tensor) -> Tensor:
        """The same by a float32 product of the rounded numbers."""
        values, scale = quantise(x.flatten(0, -2))
        product = (values.float() * scale) @ (self.weight.float() * self.scale.t()).t() + self.bias.float()
        return product.to(x.dtype).unflatten(0, x.shape[:-1])


def quantise_layers(model: CausalWanModel) -> None:
    """Put 8-bit layers in the place of LAYERS in every block; done once, for finished weights in their place."""
    for block in model.blocks:
        _quantise(block)


def _quantise(block: Block) -> None:
    if isinstance(block.self_attn.joint, Fp8Linear):
        return
    block.self_attn.join()
    for name in LAYERS:
        parent, _, own = name.rpartition(".")
        linear = block.get_submodule(name)
        setattr(block.get_submodule(parent), own, Fp8Linear(linear.weight, linear.bias))
    block.self_attn.part()
