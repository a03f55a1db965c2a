"""Compressed chunks of one layer: packets of few tokens, kept while there is room and shown by choice.

The archive knows packets, not policy. A packet is staged while its chunk is made; `commit` writes it over the
oldest one once all places are taken. What decides shapes is host numbers, what grows for ever is a tensor.
Keys are time-free, at the centres of what they cover.

B batch, M places, P packet tokens, T packet frames, H heads, D head dim.
"""
from __future__ import annotations

import torch
from torch import Tensor

from wan.geometry import PacketGrid
from wan.kv_cache.policy import ArchiveSizes
from wan.rope import phase_dtype

EMPTY = torch.iinfo(torch.int64).max  # the start of a packet that is not there
FIRST_PLACES = 64                     # of an archive without limit; doubled whenever they are taken


class Archive:
    """Places for packets, in the order in which they were written, over and over."""

    keys: Tensor    # [B, M, P, H, D], time-free; in host memory if offloaded, though the device addresses it
    values: Tensor  # [B, M, P, H, D], beside the keys
    sums: Tensor    # [B, M, T, H, D] float32, keys summed over each packet frame: all that choosing reads
    start: Tensor   # [M] int64, first latent frame of the packet's chunk; EMPTY where there is none
    known: int      # packets written, counted up to `sizes.counted`
    is_staged: bool

    def __init__(
        self, batch: int, sizes: ArchiveSizes, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype,
    ):
        self.grid: PacketGrid = sizes.grid
        self._sizes, self._offload = sizes, sizes.offload and device.type == "cuda"
        places, grid = sizes.packets or FIRST_PLACES, sizes.grid
        self._staged = torch.zeros(2, batch, grid.tokens, heads, head_dim, device=device, dtype=dtype)
        shape = (batch, places, grid.tokens, heads, head_dim)
        self.keys, self.values = self._places(shape), self._places(shape)
        self.sums = torch.zeros(
            batch, places, grid.frames, heads, head_dim, device=device, dtype=phase_dtype(dtype),
        )
        self.start = torch.full((places,), EMPTY, device=device)
        self._count = torch.zeros((), device=device, dtype=torch.int64)
        self.reset()

    @property
    def places(self) -> int:
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Of all places, taken or not."""
        return self.keys.nbytes + self.values.nbytes + self.sums.nbytes

    def reset(self) -> None:
        """Forget everything; places that were added stay."""
        self._count.zero_()
        self.start.fill_(EMPTY)
        self._written, self.known, self.is_staged = 0, 0, False

    def copy_from(self, other: Archive) -> None:
        """Take over another archive's packets."""
        while self.places < other.places:
            self._grow()
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values), (self.sums, other.sums)):
            mine[:, :other.places].copy_(theirs)
        self.start[:other.places].copy_(other.start)
        self._count.copy_(other._count)
        self._written, self.known, self.is_staged = other._written, other.known, False

    def stage(self, keys: Tensor, values: Tensor) -> None:
        """Take the chunk's packet, keys and values [B, P, H, D]; a later call overwrites an earlier one."""
        self._staged[0].copy_(keys)
        self._staged[1].copy_(values)
        self.is_staged = True

    def drop(self) -> None:
        """What is staged belongs to a chunk that is made again."""
        self.is_staged = False

    def commit(self, start: Tensor) -> None:
        """Turn what is staged into memory. `start` []: the chunk's first latent frame."""
        if not self._sizes.packets and self._written == self.places:
            self._grow()
        place = (self._count % self.places).view(1)
        sums = self._staged[0].unflatten(1, (self.grid.frames, -1)).sum(dim=2, dtype=self.sums.dtype)
        for column, packet in zip((self.keys, self.values, self.sums), (*self._staged, sums), strict=True):
            column.index_copy_(1, place, packet.unsqueeze(1))
        self.start.index_copy_(0, place, start.view(1))
        self._count += 1
        self._written, self.is_staged = min(self._written + 1, self.places), False
        self.known = min(self.known + 1, self._sizes.counted)

    def _grow(self) -> None:
        """Twice the places."""
        self.keys, self.values = self._doubled(self.keys), self._doubled(self.values)
        self.sums = torch.cat([self.sums, torch.zeros_like(self.sums)], dim=1)
        self.start = torch.cat([self.start, torch.full_like(self.start, EMPTY)])

    def _doubled(self, old: Tensor) -> Tensor:
        new = self._places((old.shape[0], 2 * old.shape[1], *old.shape[2:]))
        new[:, :old.shape[1]].copy_(old)
        return new

    def _places(self, shape: tuple[int, ...]) -> Tensor:
        like = self._staged
        if self._offload:
            return host_memory(shape, like.dtype, like.device)
        return torch.zeros(shape, device=like.device, dtype=like.dtype)


class _Pinned:
    """Page-locked host memory that a CUDA device reads and writes at the same address."""

    def __init__(self, nbytes: int):
        self._memory = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (self._memory.data_ptr(), False), "version": 3,
        }


def host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in host memory as a tensor of a CUDA `device`: kernels reach it over the bus, with no copy and no wait."""
    count = torch.Size(shape).numel()
    return torch.as_tensor(_Pinned(count * dtype.itemsize), device=device).view(dtype).view(shape)
