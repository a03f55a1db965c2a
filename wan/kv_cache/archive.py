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
from wan.kv_cache.policy import ArchiveSizes, PacketView, Plan
from wan.kv_cache.store import CacheShape
from wan.kv_cache.votes import QueryVotes
from wan.rope import FrameTurns, Turn, phase_dtype, turn

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
    is_on_host: bool  # keys and values are in host memory

    def __init__(self, shape: CacheShape, sizes: ArchiveSizes, turns: FrameTurns):
        device, grid, places = shape.device, sizes.grid, sizes.packets or FIRST_PLACES
        self.grid, self.turns, self._space = grid, turns, turns.space(grid.frames)
        self._sizes, self.is_on_host = sizes, sizes.offload and device.type == "cuda"
        heads = (shape.heads, shape.head_dim)
        self._staged = torch.zeros(2, shape.batch, grid.tokens, *heads, device=device, dtype=shape.dtype)
        self.keys, self.values = (self._places((shape.batch, places, grid.tokens, *heads)) for _ in range(2))
        self.sums = torch.zeros(
            shape.batch, places, grid.frames, *heads, device=device, dtype=phase_dtype(shape.dtype),
        )
        self.start = torch.full((places,), EMPTY, device=device)
        self._count = torch.zeros((), device=device, dtype=torch.int64)
        self.reset()

    @property
    def places(self) -> int:
        return self.keys.shape[1]

    def reset(self) -> None:
        """Forget everything; places that were added stay."""
        self._count.zero_()
        self.start.fill_(EMPTY)
        self.known, self.is_staged = 0, False

    def copy_from(self, other: Archive) -> None:
        """Take over another archive's packets."""
        self.make_room(other.places)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values), (self.sums, other.sums)):
            mine[:, :other.places].copy_(theirs)
        self.start[:other.places].copy_(other.start)
        self._count.copy_(other._count)
        self.known, self.is_staged = other.known, False

    def make_room(self, packets: int) -> None:
        """Let there be places for so many packets, unless their number is limited. Between chunks: addresses change."""
        while not self._sizes.packets and self.places < packets:
            with torch.inference_mode(False):  # the next video's reset may write to them outside of it
                self.keys, self.values = self._doubled(self.keys), self._doubled(self.values)
                self.sums = torch.cat([self.sums, torch.zeros_like(self.sums)], dim=1)
                self.start = torch.cat([self.start, torch.full_like(self.start, EMPTY)])

    def stage(self, keys: Tensor, values: Tensor) -> None:
        """Take the chunk's packet, keys without RoPE and values [B, P, H, D], in place of any before."""
        self._staged[0].copy_(turn(keys, self._space))
        self._staged[1].copy_(values)
        self.is_staged = True

    def pool(self, keys: Tensor, values: Tensor, rows: int, space: Turn) -> None:
        """Stage the means of a whole chunk's keys, height and width turned by `space`, and values [B, L, H, D]."""
        wide, in_rows = space.cos.dtype, (self.grid.chunk_frames, rows, -1)
        free = turn(keys.to(wide), Turn(space.cos, -space.sin))
        self.stage(*(_means(x.unflatten(1, in_rows), self.grid) for x in (free, values.to(wide))))

    def forget_newest(self, packets: int) -> None:
        """Forget the packets written last, as if their chunks had never been."""
        packets = min(packets, self.known)
        places = (self._count - 1 - torch.arange(packets, device=self.start.device)) % self.places
        self.start.index_fill_(0, places, EMPTY)
        self._count -= packets
        self.known -= packets

    def commit(self, start: Tensor) -> None:
        """Turn what is staged into memory. `start` []: the chunk's first latent frame."""
        place = (self._count % self.places).view(1)
        sums = self._staged[0].unflatten(1, (self.grid.frames, -1)).sum(dim=2, dtype=self.sums.dtype)
        for column, packet in zip((self.keys, self.values, self.sums), (*self._staged, sums), strict=True):
            column.index_copy_(1, place, packet.unsqueeze(1))
        self.start.index_copy_(0, place, start.view(1))
        self._count += 1
        self.known, self.is_staged = min(self.known + 1, self._sizes.counted), False

    def view(self, start: Tensor, votes: QueryVotes) -> PacketView:
        """What a policy may see while a chunk, which begins with latent frame `start` [], asks with `votes`."""
        return PacketView(self.known, self.start, self.turns.centres, lambda share: self.affinity(votes, start, share))

    def affinity(self, votes: QueryVotes, start: Tensor, share: float) -> Tensor:
        """Query-key products [B, M] of the chunk's queries and each packet's keys, summed over both, mean over heads.

        The double sum factorises: keys of one packet frame share a temporal phase, as queries of a frame do, so
        their sums are all it needs. `share` of the heads count, the first ones.
        Source: PackForcing, arXiv:2603.25730, appendix G; without its sampling of queries.
        """
        begin = (torch.minimum(self.start, start) - start).unsqueeze(1) + self.turns.centres
        scores = votes.score(
            self.sums.flatten(1, 2), begin.flatten().unsqueeze(0), torch.zeros_like(start), "denoising",
            max(1, int(self.sums.shape[3] * share)),
        )
        return scores.unflatten(1, (self.places, -1)).sum(dim=2)

    def tokens_of(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Slots [B, K P] in the flattened archive of the packets that `plan` shows, and their window time."""
        tokens = self.grid.tokens
        slots = plan.packets.unsqueeze(2) * tokens + torch.arange(tokens, device=plan.packets.device)
        position = plan.packet_position.flatten(1, 2).repeat_interleave(tokens // self.grid.frames, dim=1)
        return slots.flatten(1, 2), position

    def _doubled(self, old: Tensor) -> Tensor:
        new = self._places((old.shape[0], 2 * old.shape[1], *old.shape[2:]))
        new[:, :old.shape[1]].copy_(old)
        return new

    def _places(self, shape: tuple[int, ...]) -> Tensor:
        like = self._staged
        if self.is_on_host:
            return host_memory(shape, like.dtype, like.device)
        return torch.zeros(shape, device=like.device, dtype=like.dtype)


def _means(x: Tensor, grid: PacketGrid) -> Tensor:
    """Means [B, P, H, D] over what each packet token covers of a chunk [B, F, rows, columns, H, D]."""
    x = x[:, :, :grid.rows * grid.space, :grid.columns * grid.space]
    x = x.unflatten(3, (grid.columns, grid.space)).unflatten(2, (grid.rows, grid.space)).mean(dim=(3, 5))
    return torch.stack([part.mean(dim=1) for part in x.split(grid.time, dim=1)], dim=1).flatten(1, 3)


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
