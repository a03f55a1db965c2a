"""The life of the cache: begin -> extend (every pass, every layer) -> commit.

It owns stores, windows and votes, asks the policy once per chunk and layer, and is the only caller of
temporal rotation. Passes stage beyond the memory; only `commit` changes it, so a chunk that is aborted
or done again with other noise or another prompt leaves no trace.

B batch, L chunk tokens, H heads, D head dim.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import wan.kv_cache.policies  # noqa: F401  (registers every policy)
from wan.geometry import ChunkSpan, PacketGrid, VideoGeometry
from wan.kv_cache.archive import Archive
from wan.kv_cache.policy import CacheSizes, CacheView, KVPolicy, PacketView, Plan, Votes
from wan.kv_cache.store import KVStore
from wan.kv_cache.votes import QueryVotes
from wan.kv_cache.window import Window, WindowBuffer
from wan.rope import Phase, rotate_space, space_phase, time_phase


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What the cache must know of the network."""

    layers: int
    heads: int
    head_dim: int
    batch: int
    device: torch.device
    dtype: torch.dtype


@dataclass
class _Moment:
    """What all layers share during one chunk."""

    chunk: ChunkSpan
    start: Tensor        # [] int64 chunk.start, on the device
    chunk_index: Tensor  # [] int64 chunk.index, on the device
    seen_frames: int
    seeds: Tensor
    space: Phase
    packet: _PacketRotation | None
    time: dict[int, Phase] = field(default_factory=dict)

    def query_phase(self, query_position: int, frame_tokens: int, head_dim: int, dtype: torch.dtype) -> Phase:
        """Temporal rotation of the chunk's tokens; layers that agree on the position share it."""
        if query_position not in self.time:
            frames = torch.arange(query_position, query_position + self.chunk.frames, device=self.seeds.device)
            self.time[query_position] = time_phase(frames.repeat_interleave(frame_tokens), head_dim, dtype)
        return self.time[query_position]


@dataclass(frozen=True)
class _PacketRotation:
    """Where the tokens of a packet sit; the same for every layer and chunk."""

    grid: PacketGrid
    space: Phase
    centres: Tensor  # [T] float64, in latent frames from the chunk's first

    @classmethod
    def of(cls, grid: PacketGrid, shape: CacheShape) -> _PacketRotation:
        space = space_phase(grid.rows, grid.columns, shape.head_dim, shape.dtype, shape.device, covers=grid.space)
        return cls(grid, space, torch.tensor(grid.centres, device=shape.device, dtype=torch.float64))

    @property
    def frame_tokens(self) -> int:
        return self.grid.rows * self.grid.columns

    def rotate(self, x: Tensor) -> Tensor:
        """Height and width RoPE of a packet's [B, P, H, D]."""
        return rotate_space(x.unflatten(1, (self.grid.frames, self.frame_tokens)), self.space).flatten(1, 2)

    def pool(self, x: Tensor) -> Tensor:
        """Means [B, P, H, D] over what each packet token covers of a chunk [B, F, rows, columns, H, D]."""
        covers, grid = self.grid.space, self.grid
        x = x[:, :, :grid.rows * covers, :grid.columns * covers]
        x = x.unflatten(3, (grid.columns, covers)).unflatten(2, (grid.rows, covers)).mean(dim=(3, 5))
        return torch.stack([part.mean(dim=1) for part in x.split(grid.time, dim=1)], dim=1).flatten(1, 3)


class LayerCache:
    """One layer's memory. Attention calls `extend` and knows nothing else of the cache."""

    def __init__(self, layer: int, shape: CacheShape, sizes: CacheSizes, geometry: VideoGeometry, policy: KVPolicy):
        common = (shape.heads, shape.head_dim, shape.device, shape.dtype)
        self.store = KVStore(shape.batch, sizes.capacity_tokens, *common)
        self.window = WindowBuffer(shape.batch, sizes.window_tokens, *common)
        past_voters = sizes.vote_frames - geometry.chunk_frames
        self.votes = QueryVotes(shape.batch, past_voters, *common) if sizes.vote_frames else None
        self.archive = Archive(shape.batch, sizes.archive, *common) if sizes.archive else None
        self.plan: Plan | None = None
        self._rows = geometry.rows
        self._most_frames = sizes.capacity_tokens // geometry.frame_tokens + 1
        self._layer, self._shape, self._frame_tokens, self._policy = layer, shape, geometry.frame_tokens, policy
        self._moment: _Moment | None = None

    def begin(self, moment: _Moment) -> None:
        """Start a chunk, or start it again."""
        self._moment, self.plan = moment, None
        if self.archive is not None:
            self.archive.drop()

    def extend(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        """Show attention the remembered tokens and, behind them, this pass's own.

        Shapes: query, keys, values [B, L, H, D], normalised, without RoPE; L is whole frames.
        The first call of a chunk asks the policy; every call overwrites what the last one staged.
        """
        if self._moment is None:
            raise RuntimeError("no chunk has begun: call KVCache.begin(chunk) before the model's forward.")
        frames = (self._moment.chunk.frames, self._frame_tokens)
        query, keys = (rotate_space(x.unflatten(1, frames), self._moment.space) for x in (query, keys))
        if self.votes is not None:
            self.votes.stage(query)
        query, keys = query.flatten(1, 2), keys.flatten(1, 2)
        self.store.stage(keys, values)
        if self.plan is None:
            self.plan = self._checked_plan()
            self.window.load(self.store, self.plan, self.archive)
        phase = self._moment.query_phase(
            self.plan.query_position, self._frame_tokens, self._shape.head_dim, self._shape.dtype
        )
        return self.window.extend(query, keys, values, phase)

    def extend_packet(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        """Stage the chunk's packet, and show attention what the chunk remembered and, behind it, the packet itself.

        Shapes: query, keys, values [B, P, H, D], normalised, without RoPE. After the chunk's last pass.
        """
        packet = self._moment.packet
        query, keys = packet.rotate(query), packet.rotate(keys)
        self.archive.stage(keys, values)
        position = (self.plan.query_position + packet.centres).repeat_interleave(packet.frame_tokens)
        return self.window.extend(query, keys, values, time_phase(position, self._shape.head_dim, self._shape.dtype))

    def stage_packet(self, keys: Tensor, values: Tensor) -> None:
        """Stage the chunk's packet; as in `extend_packet`, but nothing is attended to."""
        self.archive.stage(self._moment.packet.rotate(keys), values)

    def view(self) -> CacheView:
        """What the policy may see now."""
        chunk, length = self._moment.chunk, self.store.length
        return CacheView(
            layer=self._layer, chunk_index=self._moment.chunk_index, start=self._moment.start,
            chunk_frames=chunk.frames, seen_frames=min(self._moment.seen_frames, self._most_frames), length=length,
            frame_tokens=self._frame_tokens,
            seeds=self._moment.seeds, origin=self.store.origin[:, :length], uses=self.store.uses[:, :length],
            scorer=self._score, packets=None if self.archive is None else self._packet_view(),
        )

    def _packet_view(self) -> PacketView:
        packet, archive = self._moment.packet, self.archive
        return PacketView(
            archive.known, archive.start, packet.centres, self._moment.chunk.frames == packet.grid.chunk_frames,
            self._affinity,
        )

    def commit(self) -> None:
        """Turn what the last pass staged into memory."""
        born = self._moment.start + torch.arange(self._moment.chunk.frames, device=self.store.origin.device)
        if self.plan.archive:
            if not self.archive.is_staged:
                self._pool_packet()
            self.archive.commit(self._moment.start)
        self.store.commit(
            retain=self.plan.retain, chosen=self.plan.chosen, origin=born.repeat_interleave(self._frame_tokens)
        )
        if self.votes is not None:
            self.votes.commit()
        self._moment, self.plan = None, None

    def reset(self) -> None:
        """Forget everything."""
        self.store.reset()
        if self.archive is not None:
            self.archive.reset()
        if self.votes is not None:
            self.votes.reset()
        self._moment, self.plan = None, None

    def copy_memory_of(self, other: LayerCache) -> None:
        """Take over the committed memory of `other`."""
        self.reset()
        self.store.copy_from(other.store)
        if self.archive is not None:
            self.archive.copy_from(other.archive)
        if self.votes is not None:
            self.votes.copy_from(other.votes)

    def _score(self, lo: int, hi: int, votes: Votes) -> Tensor:
        return self.votes.score(self.store.keys[:, lo:hi], self.store.origin[:, lo:hi], self._moment.start, votes)

    def _affinity(self, share: float) -> Tensor:
        """Query-key products [B, M] of the chunk's queries and each packet's keys, summed over both.

        The double sum factorises: keys of one packet frame share a temporal phase, as queries of a frame do, so
        their sums are all it needs.
        Source: PackForcing, arXiv:2603.25730, appendix G; without its sampling of queries.
        """
        archive, centres = self.archive, self._moment.packet.centres
        there = archive.start.where(archive.start < self._moment.start, self._moment.start)
        origin = (there - self._moment.start).unsqueeze(1) + centres
        scores = self.votes.score(
            archive.sums.flatten(1, 2), origin.flatten().unsqueeze(0), torch.zeros_like(self._moment.start),
            "denoising", max(1, int(self._shape.heads * share)),
        )
        return scores.unflatten(1, (archive.places, -1)).sum(dim=2)

    def _pool_packet(self) -> None:
        """Stage the means of the chunk's own keys and values, at the centres of what they cover."""
        chunk, packet = self._moment.chunk, self._moment.packet
        keys, values = self.store.staged(chunk.frames * self._frame_tokens)
        in_frames, wide = (chunk.frames, self._frame_tokens), self._moment.space.cos.dtype
        free = rotate_space(keys.to(wide).unflatten(1, in_frames), self._moment.space.inverse)
        keys, values = (
            packet.pool(x.unflatten(2, (self._rows, -1))) for x in (free, values.to(wide).unflatten(1, in_frames))
        )
        self.archive.stage(packet.rotate(keys), values)

    def _checked_plan(self) -> Plan:
        plan = self._policy.plan(self.view())
        shown = 0 if plan.packets is None else plan.packets.shape[1] * self.archive.grid.tokens
        attended = plan.attend.shape[1] + shown + self._moment.chunk.frames * self._frame_tokens
        if attended > self.window.tokens or plan.attend.shape != plan.position.shape:
            raise ValueError(
                f"{type(self._policy).__name__} plans {attended} tokens (positions for {plan.position.shape[1]} of the "
                f"past), but asked for a window of {self.window.tokens}. Its sizes() and plan() disagree."
            )
        return plan


class KVCache:
    """Memory of all layers for one batch of videos."""

    def __init__(self, shape: CacheShape, geometry: VideoGeometry, policy: KVPolicy):
        sizes = policy.sizes(geometry)
        self._layers = [LayerCache(i, shape, sizes, geometry, policy) for i in range(shape.layers)]
        self._space = space_phase(geometry.rows, geometry.columns, shape.head_dim, shape.dtype, shape.device)
        self._packet = _PacketRotation.of(sizes.archive.grid, shape) if sizes.archive else None
        self._seeds = torch.zeros(shape.batch, device=shape.device, dtype=torch.int64)
        self._start = torch.zeros((), device=shape.device, dtype=torch.int64)
        self._chunk_index = torch.zeros_like(self._start)
        self._chunk: ChunkSpan | None = None
        self.seen_frames = 0

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]

    @property
    def archives(self) -> bool:
        """Whether the chunk in the making leaves a packet; known after its first pass."""
        return all(layer.plan is not None and layer.plan.archive for layer in self._layers)

    @property
    def packets(self) -> PacketMemory:
        """The memory that the chunk's packet reads and is written to."""
        return PacketMemory(self)

    def nbytes(self) -> dict[str, int]:
        """Bytes of keys and values of all layers: what the chunk in the making attends to, its copies, the archive.

        `attended`: sink, packets and recent frames where they are stored; `window`: the rotated copies, with room for
        the chunk itself; `archive`: all packets that there is room for, seen or not.
        """
        store = self._layers[0].store
        token = store.keys[:, :1].nbytes + store.values[:, :1].nbytes
        return {
            "attended": token * sum(layer.window.past for layer in self._layers),
            "window": sum(layer.window.nbytes for layer in self._layers),
            "archive": sum(layer.archive.nbytes for layer in self._layers if layer.archive is not None),
        }

    def reset(self, seeds: Sequence[int]) -> None:
        """Forget everything; what follows equals a fresh process. `seeds`: one int per sample."""
        if len(seeds) != len(self._seeds):
            raise ValueError(f"{len(seeds)} seeds for a cache of batch {len(self._seeds)}; give one per sample.")
        self._seeds.copy_(torch.tensor(list(seeds), dtype=torch.int64))
        self._chunk, self.seen_frames = None, 0
        for layer in self._layers:
            layer.reset()

    def copy_memory_of(self, other: KVCache) -> None:
        """Take over what `other` remembers, so that both go on from one state; shapes agree, dtypes need not."""
        self._seeds.copy_(other._seeds)
        self._chunk, self.seen_frames = None, other.seen_frames
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine.copy_memory_of(theirs)

    def begin(self, chunk: ChunkSpan) -> None:
        """Start a chunk. Beginning again before `commit` drops what was staged."""
        self._chunk = chunk
        self._start.fill_(chunk.start)
        self._chunk_index.fill_(chunk.index)
        moment = _Moment(
            chunk=chunk, start=self._start, chunk_index=self._chunk_index, seen_frames=self.seen_frames,
            seeds=self._seeds, space=self._space, packet=self._packet,
        )
        for layer in self._layers:
            layer.begin(moment)

    def commit(self) -> None:
        """Remember the chunk as its last pass left it: all layers or none.

        Raises:
            RuntimeError: no chunk was begun, or a layer has not seen it.
        """
        if self._chunk is None or any(layer.plan is None for layer in self._layers):
            raise RuntimeError("commit needs a chunk that every layer has seen: begin(chunk), forward, commit().")
        for layer in self._layers:
            layer.commit()
        self.seen_frames += self._chunk.frames
        self._chunk = None


@dataclass(frozen=True)
class PacketMemory:
    """A KVCache as a chunk's packet sees it, layer by layer."""

    cache: KVCache

    def layer(self, index: int) -> PacketLayer:
        return PacketLayer(self.cache.layer(index))


@dataclass(frozen=True)
class PacketLayer:
    """One layer of it."""

    cache: LayerCache

    def extend(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        return self.cache.extend_packet(query, keys, values)

    def stage(self, keys: Tensor, values: Tensor) -> None:
        self.cache.stage_packet(keys, values)
