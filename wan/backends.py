"""Kernels of dense attention behind one protocol, and which of them suits a device.

B batch, L query tokens, S seen tokens, H heads, D head dim.
"""
from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from math import ceil
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TILE = 128         # query tokens of one head that an FA3 program takes at a time
SPLIT_KEYS = 8192  # from here on it pays to split the keys of the queries that do not fill a wave of programs
MOST_PARTS = 8     # into so many; more add up longer than they save
NARROW_KEYS = 16384  # most keys that 8-bit sums run over: they keep few bits, so long ones lose more than they save
# Each that refuses a shape or dtype leaves it to the next.
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]


class AttentionBackend(Protocol):
    """Dense attention without a mask, scaled by 1 / sqrt(D)."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query [B, L, H, D], keys and values [B, S, H, D] -> [B, L, H, D]."""


def sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """torch's scaled dot-product attention, by the kernel it prefers; works on every device and dtype."""
    query, keys, values = (x.transpose(1, 2) for x in (query, keys, values))
    return F.scaled_dot_product_attention(query, keys, values).transpose(1, 2)


def cudnn(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same, by cuDNN where it can: the fastest of torch's kernels on Hopper."""
    _settle_torchs_choice(query.device)
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        return sdpa(query, keys, values)


@cache
def _settle_torchs_choice(device: torch.device) -> None:
    """Have torch put its kernels in its own order, which it does at its first call on a GPU, and once.

    That order would end with our context if ours were the first call, and the VAE's attention would round differently
    in a process that has read its prompts' embeddings from disk than in one whose text encoder came first.
    """
    F.scaled_dot_product_attention(*[torch.zeros(1, 1, 1, 8, device=device, dtype=torch.bfloat16)] * 3)


@cache
def divide(tokens: int, pairs: int, processors: int) -> tuple[int, int]:
    """How to keep a GPU busy to the end: so many query tokens in one call, the others with their keys in so many parts.

    A wave is a tile of queries for each multiprocessor. A last wave of few tiles takes as long as a full one; with the
    keys in parts, each a program of its own, it is several short ones. Pure.
    Args: pairs: clips times heads.
    """
    tiles = ceil(tokens / TILE)

    def waves(choice: tuple[int, int]) -> float:
        whole, parts = choice
        return ceil(whole * pairs / processors) + ceil((tiles - whole) * pairs * parts / processors) / parts

    whole, parts = min(product(range(tiles, -1, -1), range(1, MOST_PARTS + 1)), key=waves)
    return min(whole * TILE, tokens), parts


def _load_fa3() -> AttentionBackend:
    own = find_spec("fa3_fwd_interface") is not None
    import_module("fa3_fwd_interface" if own else "flash_attn_interface")  # registers the operator
    kernel = getattr(torch.ops.fa3_fwd if own else torch.ops.flash_attn_3, "fwd", None)
    if kernel is None:
        raise ValueError("attention=fa3: flash_attn_interface is too old. pip install fa3-fwd, or choose cudnn.")

    def fa3(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        clips, tokens, heads, dim = query.shape
        whole, parts = tokens, 1
        if query.dtype.itemsize == 1:
            whole, parts = 0, ceil(keys.shape[1] / NARROW_KEYS)
        elif keys.shape[1] >= SPLIT_KEYS:
            whole, parts = divide(tokens, clips * heads, processors_of(query.device))
        out = torch.empty(query.shape, device=query.device, dtype=torch.bfloat16)
        for some, splits in ((slice(whole), 1), (slice(whole, None), parts)):
            if len(range(tokens)[some]):
                kernel(query[:, some], keys, values, out=out[:, some], softmax_scale=dim**-0.5, num_splits=splits)
        return out

    return fa3


@cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _load_fa4() -> AttentionBackend:
    kernel = import_module("flash_attn.cute").flash_attn_func

    def fa4(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return kernel(query, keys, values)[0]  # beside it: the log of the softmax's sums

    return fa4


_LOADERS: dict[str, Callable[[], AttentionBackend]] = {
    "fa3": _load_fa3, "fa4": _load_fa4, "flash": lambda: import_module("flash_attn").flash_attn_func,
    "cudnn": lambda: cudnn, "sdpa": lambda: sdpa,
}
_PACKAGES = {  # modules, one of which must be there -> what installs them
    "fa3": (("fa3_fwd_interface", "flash_attn_interface"), "pip install fa3-fwd"),
    "fa4": (("flash_attn.cute",), "pip install flash-attn-4"),
    "flash": (("flash_attn",), "pip install flash-attn"),
}
NAMES = ("auto", *_LOADERS)
FP8_BACKENDS = frozenset({"fa3"})  # that take queries, keys and values in 8-bit floats as well, and return bfloat16


def installed() -> frozenset[str]:
    """Backends whose packages are there."""
    return frozenset(name for name in _LOADERS if _is_there(name))


def pick(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, there: Collection[str]) -> str:
    """The fastest of the backends that are `there`. Pure.

    Args: capability: of the CUDA device; None for any other device.
    """
    if capability is None:
        return "sdpa"
    if dtype == torch.bfloat16 and head_dim % 8 == 0 and head_dim <= 256:
        own = {9: "fa3", 10: "fa4"}.get(capability[0])
        if own in there:
            return own
        if capability[0] == 8 and "flash" in there:
            return "flash"
    return "cudnn" if capability[0] >= 9 else "sdpa"


def load_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, AttentionBackend]:
    """The backend that `name` means, and its name: for `auto` the fastest that is there.

    Raises:
        ValueError: an unknown name, or one whose package, device or dtype is missing.
    """
    if name not in NAMES:
        raise ValueError(f"attention={name} is unknown. Known: {', '.join(NAMES)}.")
    if name == "auto":
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        name = pick(capability, dtype, head_dim, installed())
    elif name in _PACKAGES:
        if device.type != "cuda" or dtype != torch.bfloat16:
            raise ValueError(f"attention={name} needs a GPU and bfloat16, not {device.type} and {dtype}. Choose auto.")
        if not _is_there(name):
            raise ValueError(f"attention={name} is not installed. Get it with: {_PACKAGES[name][1]}, or choose auto.")
    return name, _LOADERS[name]()


def _is_there(name: str) -> bool:
    if name not in _PACKAGES:
        return True
    for module in _PACKAGES[name][0]:
        package, _, _ = module.partition(".")
        if find_spec(package) and find_spec(module):
            return True
    return False
