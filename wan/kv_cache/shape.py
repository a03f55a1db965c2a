"""What a cache must know of the network that it serves."""
from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Sizes and numbers of one cache's tensors."""

    layers: int
    heads: int
    head_dim: int
    batch: int
    device: torch.device
    dtype: torch.dtype
    store_dtype: torch.dtype | None = None   # of what is remembered; None: `dtype`
    window_dtype: torch.dtype | None = None  # of what attention reads; None: `dtype`
