"""The Triton twin of wan/stacking.py: one read of every value, one write of each of its copies."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.stacking import Sum

TILE = 1024  # values a program holds at a time, in one warp


@triton.jit
def _activated(value, scale, inside):
    value = tl.where(inside, value, 0.0)
    norm = tl.sqrt(tl.sum(value * value, axis=1))[:, None]
    value = value / tl.maximum(norm, 1e-12) * scale
    return value * tl.sigmoid(value)


@triton.jit
def _activate_kernel(
    x, bias, shortcut, gamma, out, rows, root,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHORTCUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < C)
    place = row * C + column
    value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=column < C, other=0).to(tl.float32)
    if HAS_SHORTCUT:
        value += tl.load(shortcut + place, mask=inside, other=0).to(tl.float32)
    scale = tl.load(gamma + column, mask=column < C, other=0).to(tl.float32) * root
    tl.store(out + place, _activated(value, scale, inside).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _stack_kernel(
    x, bias, shortcut, gamma, past, stacked, settled, frames, pixels, root,
    C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHORTCUT: tl.constexpr, NORM: tl.constexpr, SETTLE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    clip = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < pixels) & (column < C)
    frame = pixels.to(tl.int64) * C
    place = row * C + column
    spot = row * (3 * C) + column
    past += clip * 2 * frame + place
    x += clip * frames * frame + place
    shortcut += clip * frames * frame + place
    settled += clip * frames * frame + place
    stacked += clip * frames * 3 * frame + spot
    offset = tl.load(bias + column, mask=column < C, other=0).to(tl.float32) if HAS_BIAS else 0.0
    scale = tl.load(gamma + column, mask=column < C, other=0).to(tl.float32) * root if NORM else 0.0
    oldest = tl.load(past, mask=inside, other=0)
    older = tl.load(past + frame, mask=inside, other=0)
    for t in range(frames):
        value = tl.load(x + t * frame, mask=inside, other=0).to(tl.float32)
        if HAS_BIAS:
            value += offset
        if HAS_SHORTCUT:
            value += tl.load(shortcut + t * frame, mask=inside, other=0).to(tl.float32)
        if SETTLE:
            tl.store(settled + t * frame, value.to(settled.dtype.element_ty), mask=inside)
        if NORM:
            value = _activated(value, scale, inside)
        newest = value.to(stacked.dtype.element_ty)
        here = stacked + t * 3 * frame
        tl.store(here, oldest, mask=inside)
        tl.store(here + C, older, mask=inside)
        tl.store(here + 2 * C, newest, mask=inside)
        oldest = older
        older = newest
    tl.store(past, oldest, mask=inside)
    tl.store(past + frame, older, mask=inside)


@triton.jit
def _spread_kernel(
    x, bias, shortcut, out, rows, height, width,
    TIMES: tl.constexpr, C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHORTCUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    copy = tl.program_id(1)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < C)
    place = row * (TIMES * C) + copy * C + column
    value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + copy * C + column, mask=column < C, other=0).to(tl.float32)
    if HAS_SHORTCUT:
        value += tl.load(shortcut + place, mask=inside, other=0).to(tl.float32)
    result = value.to(out.dtype.element_ty)
    frame = row // (height * width)
    line = row // width % height
    first = (((frame * TIMES + copy) * height + line) * 4 * width + row % width * 2) * C + column
    below = first + 2 * width * C
    tl.store(out + first, result, mask=inside)
    tl.store(out + first + C, result, mask=inside)
    tl.store(out + below, result, mask=inside)
    tl.store(out + below + C, result, mask=inside)


def activate(value: Sum, gamma: Tensor) -> Tensor:
    """As wan.stacking.activate; tensors are contiguous."""
    x, out = value.x, torch.empty_like(value.x)
    channels = x.shape[-1]
    _check(x, value.bias, value.shortcut, gamma)
    columns, pixels = triton.next_power_of_2(channels), x.numel() // channels
    rows = max(1, TILE // columns)
    _activate_kernel[triton.cdiv(pixels, rows),](
        x, x if value.bias is None else value.bias, x if value.shortcut is None else value.shortcut, gamma, out,
        pixels, channels**0.5, C=channels, HAS_BIAS=value.bias is not None,
        HAS_SHORTCUT=value.shortcut is not None, ROWS=rows, COLUMNS=columns, num_warps=1,
    )
    return out


def spread(value: Sum, times: int) -> Tensor:
    """As wan.stacking.spread; tensors are contiguous."""
    x = value.x
    clips, frames, height, width, channels = x.shape
    _check(x, value.bias, value.shortcut)
    share = channels // times
    out = x.new_empty(clips, frames * times, 2 * height, 2 * width, share)
    columns = triton.next_power_of_2(share)
    rows, pixels = max(1, TILE // columns), clips * frames * height * width
    _spread_kernel[triton.cdiv(pixels, rows), times](
        x, x if value.bias is None else value.bias, x if value.shortcut is None else value.shortcut, out,
        pixels, height, width, TIMES=times, C=share, HAS_BIAS=value.bias is not None,
        HAS_SHORTCUT=value.shortcut is not None, ROWS=rows, COLUMNS=columns, num_warps=1,
    )
    return out


def _check(*tensors: Tensor | None) -> None:
    given = [x for x in tensors if x is not None]
    if not all(x.is_contiguous() for x in given):
        raise ValueError(f"stacking kernels need contiguous tensors, got strides {[x.stride() for x in given]}.")


def stack(value: Sum, gamma: Tensor | None, past: Tensor, keep: bool = True) -> tuple[Tensor, Tensor | None]:
    """As wan.stacking.stack; tensors are contiguous."""
    x = value.x
    clips, frames, height, width, channels = x.shape
    _check(x, past, value.bias, value.shortcut, gamma)
    stacked = x.new_empty(clips, frames, height, width, 3 * channels)
    columns = triton.next_power_of_2(channels)
    rows, pixels = max(1, TILE // columns), height * width
    _stack_kernel[triton.cdiv(pixels, rows), clips](
        x, x if value.bias is None else value.bias, x if value.shortcut is None else value.shortcut,
        x if gamma is None else gamma, past, stacked, x,  # each value is read before it is settled in place
        frames, pixels, channels**0.5,
        C=channels, HAS_BIAS=value.bias is not None, HAS_SHORTCUT=value.shortcut is not None,
        NORM=gamma is not None, SETTLE=keep and not value.is_settled, ROWS=rows, COLUMNS=columns, num_warps=1,
    )
    return stacked, x if keep else None
