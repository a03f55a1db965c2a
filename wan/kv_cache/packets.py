"""A cache as a chunk's packet sees it: the packet attends to what the chunk remembers, and is staged beside it."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from wan.kv_cache.window import Window


class PacketStore(Protocol):
    """One layer that keeps packets; keys and values are [B, P, H, D], normalised, without RoPE."""

    def extend_packet(self, query: Tensor, keys: Tensor, values: Tensor) -> Window: ...

    def stage_packet(self, keys: Tensor, values: Tensor) -> None: ...


class PacketStores(Protocol):
    """All layers: a KVCache, or a rollout's memory while training."""

    def layer(self, index: int) -> PacketStore: ...


@dataclass(frozen=True)
class PacketMemory:
    """The memory of a packet's pass through the network."""

    cache: PacketStores

    def layer(self, index: int) -> PacketLayer:
        return PacketLayer(self.cache.layer(index))


@dataclass(frozen=True)
class PacketLayer:
    """One layer of it."""

    cache: PacketStore

    def extend(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        return self.cache.extend_packet(query, keys, values)

    def stage(self, keys: Tensor, values: Tensor) -> None:
        """Stage the packet; nothing is attended to."""
        self.cache.stage_packet(keys, values)
