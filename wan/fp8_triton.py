"""The Triton twin of wan.fp8.gelu_quantise: a row is read once and written once."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _gelu_quantise_kernel(
    product, rows, columns, bias, values, scales, smallest, MOST: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < K
    x = tl.load(product + row * K + column, mask=inside, other=0).to(tl.float32)
    x = x * (tl.load(rows + row) * tl.load(columns + column, mask=inside, other=0))
    x += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 sqrt(2 / pi): tanh as a sigmoid
    scale = tl.maximum(tl.max(tl.where(inside, tl.abs(x), 0.0), axis=0), smallest) / MOST
    x = tl.minimum(tl.maximum(x / scale, -MOST), MOST)
    tl.store(values + row * K + column, x.to(values.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def gelu_quantise(product: Tensor, rows: Tensor, columns: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As wan.fp8.gelu_quantise."""
    product, columns = product.contiguous(), columns.contiguous()
    dtype = torch.float8_e4m3fn
    values, scales = torch.empty_like(product, dtype=dtype), torch.empty_like(rows)
    most, width = torch.finfo(dtype).max, triton.next_power_of_2(product.shape[1])
    _gelu_quantise_kernel[len(product),](
        product, rows, columns, bias, values, scales, torch.finfo(torch.float32).tiny * most,
        MOST=most, K=product.shape[1], WIDTH=width, num_warps=min(16, max(1, width // 1024)),
    )
    return values, scales
