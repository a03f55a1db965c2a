"""Triton twins of what reads and writes keys and values: each is read once, whole tokens at a time."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from wan.rope import Turn

TOKENS, HEADS, STEPS = 2, 4, 10  # a program holds so many tokens of so many heads at a time, for so many steps
WARPS = 4


@triton.jit
def _turned(x, cos, sin):
    """x [T, H, D] turned by cos and sin [T, 1, D]: x * cos + (x, pairs swapped) * sin."""
    first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
    swapped = tl.reshape(tl.join(second, first), x.shape)
    return x * cos + swapped * sin


@triton.jit
def _stage_and_show_kernel(
    query, keys, values, space_cos, space_sin, by_cos, by_sin, stored_keys, stored_values, seen_keys, seen_values,
    shown, sums, query_clip, query_token, keys_clip, keys_token, values_clip, values_token, stored_clip, seen_clip,
    frame_tokens, frames, tiles,
    ALL: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    STEPS: tl.constexpr, VOTES: tl.constexpr,
):
    tile, group, both = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    frame, clip = both % frames, (both // frames).to(tl.int64)
    head = group * HEADS + tl.arange(0, HEADS)[None, :, None]
    channel = tl.arange(0, WIDTH)[None, None, :]
    here = (head < ALL) & (channel < DIM)
    column = head * DIM + channel
    total = tl.zeros([HEADS, WIDTH], dtype=tl.float32)
    for step in range(STEPS):
        within = (tile * STEPS + step) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
        token = (frame * frame_tokens + within).to(tl.int64)
        known = (within < frame_tokens) & (channel < DIM)
        inside = (within < frame_tokens) & here
        row = token * DIM + channel
        place = token * (ALL * DIM) + column
        key = tl.load(keys + clip * keys_clip + token * keys_token + column, mask=inside, other=0)
        value = tl.load(values + clip * values_clip + token * values_token + column, mask=inside, other=0)
        asked = tl.load(query + clip * query_clip + token * query_token + column, mask=inside, other=0)
        cos, sin = tl.load(by_cos + row, mask=known, other=0), tl.load(by_sin + row, mask=known, other=0)
        key = key.to(tl.float32)
        result = _turned(asked.to(tl.float32), cos, sin).to(shown.dtype.element_ty)
        tl.store(shown + clip * frames * frame_tokens * (ALL * DIM) + place, result, mask=inside)
        result = _turned(key, cos, sin).to(seen_keys.dtype.element_ty)
        tl.store(seen_keys + clip * seen_clip + place, result, mask=inside)
        tl.store(seen_values + clip * seen_clip + place, value.to(seen_values.dtype.element_ty), mask=inside)
        cos, sin = tl.load(space_cos + row, mask=known, other=0), tl.load(space_sin + row, mask=known, other=0)
        result = _turned(key, cos, sin).to(stored_keys.dtype.element_ty)
        tl.store(stored_keys + clip * stored_clip + place, result, mask=inside)
        tl.store(stored_values + clip * stored_clip + place, value.to(stored_values.dtype.element_ty), mask=inside)
        if VOTES:
            total += tl.sum(_turned(asked.to(tl.float32), cos, sin).to(asked.dtype).to(tl.float32), axis=0)
    if VOTES:
        heads, channels = group * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        at = ((clip * frames + frame) * tiles + tile) * (ALL * DIM) + heads * DIM + channels
        tl.store(sums + at, total, mask=(heads < ALL) & (channels < DIM))


def stage_and_show(
    query: Tensor, keys: Tensor, values: Tensor, space: Turn, by: Turn, stored: tuple[Tensor, Tensor],
    seen: tuple[Tensor, Tensor], voting_frames: int,
) -> tuple[Tensor | None, Tensor]:
    """As wan.kv_cache.layer.stage_and_show; heads and channels of every tensor are contiguous, rotations float32."""
    clips, tokens, heads, dim = query.shape
    _check_contiguous(query, keys, values, *stored, *seen)
    frames = voting_frames or 1
    frame_tokens = tokens // frames
    tiles = triton.cdiv(frame_tokens, TOKENS * STEPS)
    shown = torch.empty(query.shape, device=query.device, dtype=seen[0].dtype)
    sums = torch.empty(clips, frames, tiles if voting_frames else 0, heads, dim, device=query.device)
    _stage_and_show_kernel[tiles, triton.cdiv(heads, HEADS), clips * frames](
        query, keys, values, space.cos, space.sin, by.cos, by.sin, *stored, *seen, shown, sums,
        *query.stride()[:2], *keys.stride()[:2], *values.stride()[:2], stored[0].stride(0), seen[0].stride(0),
        frame_tokens, frames, tiles, ALL=heads, DIM=dim, WIDTH=triton.next_power_of_2(dim), TOKENS=TOKENS,
        HEADS=HEADS, STEPS=STEPS, VOTES=voting_frames > 0, num_warps=WARPS,
    )
    return sums.sum(dim=2) if voting_frames else None, shown


@triton.jit
def _gather_turned_kernel(
    keys, values, slots, by_cos, by_sin, seen_keys, seen_values, keys_clip, slots_clip, by_clip, seen_clip,
    ALL: tl.constexpr, DIM: tl.constexpr, TIME: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):
    token, clip = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, channel = tl.arange(0, HEADS)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    column, inside = head * DIM + channel, (head < ALL) & (channel < DIM)
    source = clip * keys_clip + tl.load(slots + clip * slots_clip + token) * (ALL * DIM) + column
    target = clip * seen_clip + token * (ALL * DIM) + column
    key = tl.load(keys + source, mask=inside).to(tl.float32)
    if TIME > 0:
        row, turns = clip * by_clip + token * TIME + channel, channel < TIME
        cos, sin = tl.load(by_cos + row, mask=turns, other=1), tl.load(by_sin + row, mask=turns, other=0)
        key = _turned(key, cos, sin)
    tl.store(seen_keys + target, key.to(seen_keys.dtype.element_ty), mask=inside)
    value = tl.load(values + source, mask=inside).to(tl.float32)
    tl.store(seen_values + target, value.to(seen_values.dtype.element_ty), mask=inside)


def gather_turned(
    keys: Tensor, values: Tensor, slots: Tensor, by: Turn, window_keys: Tensor, window_values: Tensor,
) -> None:
    """As wan.kv_cache.window.gather_turned; heads and channels of every tensor are contiguous, rotations float32."""
    clips, tokens = slots.shape
    heads, dim = keys.shape[2:]
    _check_contiguous(keys, values, window_keys, window_values)
    cos, sin = (x.expand(clips, -1, -1, -1).contiguous() for x in (by.cos, by.sin))
    _gather_turned_kernel[tokens, clips](
        keys, values, slots.contiguous(), cos, sin, window_keys, window_values, keys.stride(0), tokens, cos.stride(0),
        window_keys.stride(0), ALL=heads, DIM=dim, TIME=cos.shape[-1], HEADS=triton.next_power_of_2(heads),
        WIDTH=triton.next_power_of_2(dim), num_warps=WARPS,
    )


def _check_contiguous(*tensors: Tensor) -> None:
    for x in tensors:
        heads, dim = x.shape[2:]
        if x.stride()[2:] != (dim, 1):
            raise ValueError(f"tokens must be {heads} x {dim} contiguous values, got strides {x.stride()}.")
