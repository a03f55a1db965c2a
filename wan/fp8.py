"""Linear layers in 8-bit floats: faster on GPUs that multiply them, and approximate.

Each row of activations (a token) and each row of weights (an output channel) has a scale of its own, so that one
large value costs the others of its row alone. Quantising is plain elementwise work behind one maximum, which a
compiler fuses into whatever made the activations; scaling back is plain elementwise work too, which it fuses into
whatever comes next, so that the kernel in between is the fastest, which knows no rows.

M tokens, K channels in, N channels out.
"""
from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.model import CausalWanModel

FP8 = torch.float8_e4m3fn
MOST = torch.finfo(FP8).max
HAS_TRITON = find_spec("triton") is not None
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
                f"{list(weight.shape)}. Leave fp8 out for this model."
            )
        values, scale = quantise(weight.detach())
        self.register_buffer("weight", values, persistent=False)
        self.register_buffer("scale", scale.t().contiguous(), persistent=False)  # [1, N]
        self.register_buffer("bias", bias.detach().clone(), persistent=False)
        self.register_buffer("one", torch.ones((), device=weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return self.scaled(*quantise(x.flatten(0, -2)), x)

    def product(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """values [M, K] -> [M, N] in `dtype`, still to be multiplied by the scales of both."""
        return torch._scaled_mm(
            values, self.weight.t(), scale_a=self.one, scale_b=self.one, out_dtype=dtype, use_fast_accum=True,
        )

    def scaled(self, values: Tensor, scale: Tensor, like: Tensor) -> Tensor:
        """What `quantise` makes of x [M, K] -> [..., N] in the dtype and leading shape of `like`."""
        out = self.product(values, like.dtype).float() * (scale * self.scale) + self.bias
        return out.to(like.dtype).unflatten(0, like.shape[:-1])


class Fp8MLP(nn.Sequential):
    """Linear, GELU, linear in 8-bit floats: what lies between the products is one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        first, _, second = self
        values, scale = quantise(x.flatten(0, -2))
        return second.scaled(*gelu_quantise(first.product(values, x.dtype), scale, first.scale, first.bias), x)


@torch.library.custom_op("deep_forcing::gelu_quantise", mutates_args=())
def gelu_quantise(product: Tensor, rows: Tensor, columns: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """GELU (tanh) of product [M, K] * rows [M, 1] * columns [1, K] + bias [K], as `quantise` gives it."""
    if product.is_cuda and HAS_TRITON:
        return import_module("wan.fp8_triton").gelu_quantise(product, rows, columns, bias)
    return quantise(F.gelu(product.float() * (rows * columns) + bias, approximate="tanh"))


@gelu_quantise.register_fake
def _(product: Tensor, rows: Tensor, columns: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(product, dtype=FP8), torch.empty_like(rows)


def quantise_layers(model: CausalWanModel) -> None:
    """Put 8-bit layers in the place of LAYERS in every block; done once, for finished weights in their place."""
    for block in model.blocks:
        attention = block.self_attn
        if isinstance(attention.joint, Fp8Linear):
            continue
        attention.join()
        for name in LAYERS:
            parent, _, own = name.rpartition(".")
            linear = block.get_submodule(name)
            setattr(block.get_submodule(parent), own, Fp8Linear(linear.weight, linear.bias))
        block.ffn = Fp8MLP(*block.ffn)
        del attention.q, attention.k, attention.v  # their joint layer is in their place
