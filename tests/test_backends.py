"""Which attention kernel is chosen, by capability, dtype, head size and what is installed; no device is asked."""
from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from wan import backends
from wan.backends import MOST_PARTS, NAMES, TILE, divide, installed, load_backend, pick, sdpa

BF16, FP32 = torch.bfloat16, torch.float32
ALL = frozenset(NAMES) - {"auto"}
TORCH = frozenset({"cudnn", "sdpa"})
CHOICES = [  # capability, dtype, head size, there -> the fastest
    (None, BF16, 128, ALL, "sdpa"),        # no CUDA device
    ((9, 0), BF16, 128, ALL, "fa3"),       # Hopper, its own kernel
    ((9, 0), BF16, 128, TORCH, "cudnn"),
    ((9, 0), BF16, 128, TORCH | {"fa4", "flash"}, "cudnn"),  # cuDNN is faster there than flash-attn 2
    ((10, 0), BF16, 128, ALL, "fa4"),      # Blackwell, its own
    ((10, 3), BF16, 128, ALL, "fa4"),
    ((10, 0), BF16, 128, TORCH | {"fa3"}, "cudnn"),          # another generation's kernel does not run
    ((12, 0), BF16, 128, ALL, "cudnn"),    # a generation with no kernel of its own
    ((8, 0), BF16, 128, ALL, "flash"),     # Ampere
    ((8, 9), BF16, 128, TORCH | {"flash"}, "flash"),         # Ada
    ((8, 0), BF16, 128, TORCH, "sdpa"),    # torch's own choice is flash attention there
    ((7, 5), BF16, 128, ALL, "sdpa"),      # older than bfloat16 kernels
    ((9, 0), FP32, 128, ALL, "cudnn"),     # the packages take bfloat16 alone
    ((8, 0), FP32, 128, ALL, "sdpa"),
    ((9, 0), BF16, 256, ALL, "fa3"),       # the largest head they take
    ((9, 0), BF16, 264, ALL, "cudnn"),
    ((9, 0), BF16, 12, ALL, "cudnn"),      # heads come in multiples of 8
    ((8, 0), BF16, 12, ALL, "sdpa"),
]


@pytest.mark.parametrize(("capability", "dtype", "head_dim", "there", "expected"), CHOICES)
def test_the_fastest_of_what_is_there(capability, dtype, head_dim, there, expected) -> None:
    """One row a case; what is picked is there."""
    assert pick(capability, dtype, head_dim, there) == expected
    assert expected in there


@pytest.mark.parametrize("capability", [None, (7, 5), (8, 0), (9, 0), (10, 0), (11, 0)])
def test_what_is_picked_can_be_had_on_every_machine(capability) -> None:
    """Without any package the pick is one of torch's own, for every dtype and head size."""
    for dtype in (BF16, FP32):
        for head_dim in (8, 12, 128, 512):
            assert pick(capability, dtype, head_dim, TORCH) in TORCH <= installed()


def test_what_torch_prefers_does_not_depend_on_who_called_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its first call on a GPU torch orders its kernels, once: acted here, since a processor has no such order."""
    kernel, before = F.scaled_dot_product_attention, torch._C._get_sdp_priority_order()
    x = torch.ones(1, 2, 1, 8)

    def order_after(*calls) -> list[int]:
        met = []

        def acted(query, keys, values):
            if not met:
                torch._C._set_sdp_priority_order(before[::-1])
            met.append(query)
            return kernel(query, keys, values)

        monkeypatch.setattr(F, "scaled_dot_product_attention", acted)
        torch._C._set_sdp_priority_order(before)
        backends._settle_torchs_choice.cache_clear()
        for call in calls:
            call(x, x, x)
        return torch._C._get_sdp_priority_order()

    try:
        assert order_after(backends.cudnn) == order_after(sdpa) == order_after(sdpa, backends.cudnn) == before[::-1]
    finally:
        torch._C._set_sdp_priority_order(before)


def test_names_are_checked() -> None:
    """auto on a processor is torch's own; an unknown name, and a package that is missing, say what to do."""
    assert load_backend("auto", torch.device("cpu"), BF16, 128) == ("sdpa", sdpa)
    with pytest.raises(ValueError, match="attention=fast is unknown. Known: auto, "):
        load_backend("fast", torch.device("cpu"), BF16, 128)
    for name in ALL - TORCH:
        with pytest.raises(ValueError, match="not installed. Get it with|needs a GPU and bfloat16"):
            load_backend(name, torch.device("cpu"), BF16, 128)


@pytest.mark.parametrize(("tokens", "pairs", "processors", "expected"), [
    (4680, 12, 132, (33 * TILE, 8)),  # 444 tiles: three waves, and 48 tiles in 8 parts each, three waves of an eighth
    (1560, 12, 132, (11 * TILE, 5)),  # 156: one, and 24 in 5 parts, 120 of 132 at once
    (33 * TILE, 12, 132, (33 * TILE, 1)),  # nothing left
    (300, 3, 132, (0, 8)),            # 9 tiles fill no wave: 72 parts
    (4680, 12, 1, (4680, 1)),         # one multiprocessor is always busy
])
def test_what_fills_no_wave_is_split(tokens, pairs, processors, expected) -> None:
    """Counted by hand."""
    assert divide(tokens, pairs, processors) == expected


def test_dividing_never_takes_more_waves() -> None:
    """Whatever the sizes: tiles stay whole, and both calls together take no more waves than one."""
    for tokens in range(1, 9000, 371):
        for pairs in (1, 3, 12, 24, 130, 384):
            for processors in (1, 46, 114, 132, 148):
                whole, parts = divide(tokens, pairs, processors)
                assert 0 <= whole <= tokens and (whole % TILE == 0 or whole == tokens) and 1 <= parts <= MOST_PARTS
                first, tiles = (-(-n // TILE) * pairs for n in (whole, tokens))
                once = -(-tiles // processors)
                assert -(-first // processors) + -(-(tiles - first) * parts // processors) / parts <= once


@pytest.mark.parametrize(("dtype", "seen", "expected"), [
    (BF16, 4680, [(4680, 1)]),                 # too few keys to be worth it
    (BF16, 24_960, [(4224, 1), (456, 8)]),     # whole waves, and the rest in parts
    (torch.float8_e4m3fn, 4680, [(4680, 1)]),
    (torch.float8_e4m3fn, 24_960, [(4680, 2)]),  # 8-bit sums over 16,384 keys at most, for every query
    (torch.float8_e4m3fn, 32_769, [(4680, 3)]),
])
def test_how_fa3_is_called(monkeypatch: pytest.MonkeyPatch, dtype, seen, expected) -> None:
    """Queries and parts of each call, of the paper's sizes on 132 multiprocessors; a stand-in notes them."""
    calls = []

    def kernel(query, keys, values, *, out, softmax_scale, num_splits) -> None:
        assert out.dtype == BF16 and out.shape == query.shape and softmax_scale == 128**-0.5
        calls.append((query.shape[1], num_splits))

    module = ModuleType("fa3_fwd_interface")
    module.__spec__ = ModuleSpec("fa3_fwd_interface", None)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)
    monkeypatch.setattr(torch.ops, "fa3_fwd", SimpleNamespace(fwd=kernel), raising=False)
    monkeypatch.setattr(backends, "processors_of", lambda device: 132)
    query, keys = (torch.empty(1, tokens, 12, 128, dtype=dtype, device="meta") for tokens in (4680, seen))
    backends._load_fa3()(query, keys, keys)
    assert calls == expected
