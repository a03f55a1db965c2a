"""Rotary positions, against complex arithmetic written out."""
from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from wan.rope import axis_channels, both_turns, space_turn, time_turn, turn


def by_hand(vector: torch.Tensor, position: tuple[float, float, float]) -> list[float]:
    """Rotate one head's channels with Python's math: pairs (2i, 2i+1), each axis its own frequencies."""
    out, begin = [], 0
    for where, channels in zip(position, axis_channels(len(vector)), strict=True):
        for i in range(channels // 2):
            a, b = vector[begin + 2 * i].item(), vector[begin + 2 * i + 1].item()
            angle = where * 10_000 ** (-2 * i / channels)
            out += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        begin += channels
    return out


@pytest.mark.parametrize(("head_dim", "shares"), [(128, (44, 42, 42)), (48, (16, 16, 16)), (32, (12, 10, 10))])
def test_channel_shares(head_dim: int, shares: tuple[int, int, int]) -> None:
    """time, height, width = d - 4 (d // 6), 2 (d // 6), 2 (d // 6)."""
    assert axis_channels(head_dim) == shares


@pytest.mark.parametrize("frame", [0, 5, -17, 12_345])
def test_space_then_time_equals_all_at_once(frame: int) -> None:
    """Rotating space at write and time at window build is Wan's 3D RoPE."""
    rows, columns, heads, dim = 2, 3, 2, 32
    x = torch.randn(1, rows * columns, heads, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    space = space_turn(rows, columns, dim, x.dtype, x.device)
    time = time_turn(torch.full((rows * columns,), frame), dim, x.dtype)
    turned = turn(x, space)
    turned[..., :axis_channels(dim)[0]] = turn(turned[..., :axis_channels(dim)[0]], time)
    assert torch.equal(turned, turn(x, both_turns(torch.tensor([frame]), space)))
    for token in range(rows * columns):
        for head in range(heads):
            expected = by_hand(x[0, token, head], (frame, token // columns, token % columns))
            assert_close(turned[0, token, head], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_far_positions_stay_exact() -> None:
    """Angles are float64: a day of video away, float32 products still hold to one rounding."""
    x = torch.randn(1, 1, 1, axis_channels(128)[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position = torch.tensor([[345_600]])
    exact = turn(x, time_turn(position, 128, torch.float64))
    rounded = turn(x.float(), time_turn(position, 128, torch.float32))
    assert_close(rounded.double(), exact, rtol=0, atol=5e-7)


def test_bfloat16_is_rounded_once() -> None:
    """The rotated bf16 key is the float64 result rounded to bf16, up to the last place of float32 products."""
    x = torch.randn(1, 64, 2, axis_channels(128)[0], generator=torch.Generator().manual_seed(0)).bfloat16()
    position = torch.arange(64)
    exact = turn(x.double(), time_turn(position, 128, torch.float64))
    ours = turn(x, time_turn(position, 128, torch.bfloat16))
    assert ours.dtype is torch.bfloat16
    wrong = (ours != exact.bfloat16()).float().mean().item()
    assert wrong < 1e-3  # only values that lie on a rounding boundary


def test_time_and_space_leave_each_other_alone() -> None:
    """Time turns the temporal channels and nothing else, space all others."""
    x, share = torch.randn(1, 4, 2, 32), axis_channels(32)[0]
    space = space_turn(2, 2, 32, x.dtype, x.device)
    in_space, moved = turn(x, space), turn(x, both_turns(torch.arange(4), space))
    assert torch.equal(in_space[..., :share], x[..., :share])
    assert not torch.equal(in_space[:, 1:, :, share:], x[:, 1:, :, share:])
    assert torch.equal(moved[..., share:], in_space[..., share:])
    assert not torch.equal(moved[:, 1:, :, :share], x[:, 1:, :, :share])
