"""What self-attention sees while training: the same windows as in inference, in a form that gradients pass through.

Training clips fit the window, so nothing is ever forgotten and every frame keeps its true position.
B batch, F frames, L = F * frame_tokens, H heads, D head dim.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from wan.geometry import ChunkSpan, PacketGrid, VideoGeometry
from wan.kv_cache.window import Window
from wan.rope import Turn, both_turns, space_turn, turn


def dense(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention backend of training: torch's choice of kernel, with gradients."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, keys, values))).transpose(1, 2)


class Rotation:
    """Space and time RoPE of whole frames."""

    def __init__(self, geometry: VideoGeometry, head_dim: int, device: torch.device):
        self._space = space_turn(geometry.rows, geometry.columns, head_dim, torch.float32, device)

    def of(self, frames: Tensor) -> Turn:
        """Rotation of every token of `frames` [F]."""
        return both_turns(frames, self._space.repeated(len(frames)))


class WholeClip:
    """Memory of a clip that is seen at once, at given positions; every layer shares it and nothing is remembered.

    Teacher forcing lays a clean and a noisy copy side by side, [clean F frames | noisy F frames]:
    `ChunkCausalAttention` knows who sees whom.
    """

    def __init__(self, rotation: Rotation, positions: Tensor):
        self._by = rotation.of(positions)

    def layer(self, index: int) -> WholeClip:
        return self

    def extend(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        return Window(turn(query, self._by), turn(keys, self._by), values)


class ChunkCausalAttention:
    """A noisy chunk sees the clean chunks before it and itself; a clean chunk sees the same, with its clean self.

    An attention backend for the layout of teacher forcing: block-sparse on a GPU, masked elsewhere.
    """

    def __init__(self, chunk_tokens: int, tokens: int, device: torch.device):
        half = tokens // 2

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            asking, asked = query % half // chunk_tokens, key % half // chunk_tokens
            same_copy = (query < half) == (key < half)
            return (key < half) & (asked < asking) | same_copy & (asked == asking)

        if device.type == "cuda":
            self._blocks = create_block_mask(sees, None, None, tokens, tokens, device=device)
        else:
            place = torch.arange(tokens)
            self._blocks, self._mask = None, sees(place, place, place[:, None], place[None])

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        query, keys, values = (x.transpose(1, 2) for x in (query, keys, values))
        if self._blocks is not None:
            return flex_attention(query, keys, values, block_mask=self._blocks).transpose(1, 2)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=self._mask).transpose(1, 2)


class RolloutMemory:
    """Memory of a rollout: remembered keys and values without gradient, the current chunk's with.

    `begin` and `commit` as in wan/kv_cache/cache.py; appends instead of overwriting buffers, so that the
    graph of an earlier pass survives later ones.
    """

    def __init__(self, rotation: Rotation, layers: int, device: torch.device):
        self._rotation, self._device = rotation, device
        self._layers = [RolloutLayer() for _ in range(layers)]

    def begin(self, chunk: ChunkSpan) -> None:
        by = self._rotation.of(torch.arange(chunk.start, chunk.stop, device=self._device))
        for layer in self._layers:
            layer.by = by

    def layer(self, index: int) -> RolloutLayer:
        return self._layers[index]

    def commit(self) -> None:
        """What the last pass staged becomes memory."""
        for layer in self._layers:
            layer.commit()


class RolloutLayer:
    """One layer of a rollout's memory."""

    def __init__(self) -> None:
        self._past: tuple[Tensor, ...] = ()
        self._staged: tuple[Tensor, ...] = ()
        self.by: Turn | None = None

    def extend(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        keys = turn(keys, self.by)
        self._staged = (keys.detach(), values.detach())
        if self._past:
            keys, values = (torch.cat([past, new], dim=1) for past, new in zip(self._past, (keys, values), strict=True))
        return Window(turn(query, self.by), keys, values)

    def commit(self) -> None:
        if self._past:
            self._staged = tuple(
                torch.cat([past, new], dim=1) for past, new in zip(self._past, self._staged, strict=True)
            )
        self._past = self._staged


class PackedRollout:
    """Memory of a rollout in three partitions: sink, packets of the chunks between, recent chunks.

    As RolloutMemory, but what PackForcing shows while no packet is left out. Full-size keys and values carry no
    gradient; a packet's do, into every later chunk that sees it, so that a compressor can learn from them.
    """

    def __init__(
        self, rotation: Rotation, packet: PacketRotation, layers: int, device: torch.device, *, sink_chunks: int,
        recent_chunks: int,
    ):
        self._rotation, self._packet, self._device, self._sink = rotation, packet, device, sink_chunks
        self._layers = [PackedLayer(sink_chunks, recent_chunks) for _ in range(layers)]
        self._made = 0

    def begin(self, chunk: ChunkSpan) -> None:
        by = self._rotation.of(torch.arange(chunk.start, chunk.stop, device=self._device))
        packet_by = self._packet.of(chunk.start)
        for layer in self._layers:
            layer.by, layer.packet_by = by, packet_by

    def layer(self, index: int) -> PackedLayer:
        return self._layers[index]

    @property
    def archives(self) -> bool:
        """Whether the chunk leaves a packet."""
        return self._made >= self._sink

    def commit(self) -> None:
        """What the last pass staged becomes memory."""
        for layer in self._layers:
            layer.commit()
        self._made += 1


class PacketRotation:
    """Space and time RoPE of packets, at the centres of what their tokens cover."""

    def __init__(self, grid: PacketGrid, head_dim: int, device: torch.device):
        self._space = space_turn(grid.rows, grid.columns, head_dim, torch.float32, device, covers=grid.space)
        self._centres = torch.tensor(grid.centres, device=device, dtype=torch.float64)

    def of(self, start: int) -> Turn:
        """Rotation of every token of the packet of a chunk that begins with latent frame `start`."""
        return both_turns(start + self._centres, self._space.repeated(len(self._centres)))


class PackedLayer:
    """One layer of it."""

    def __init__(self, sink: int, recent: int):
        self._sink, self._recent = sink, recent
        self._full: list[tuple[Tensor, Tensor]] = []
        self._packets: list[tuple[Tensor, Tensor]] = []  # of the chunks from the sink's end on
        self._staged: tuple[Tensor, Tensor] | None = None
        self.by: Turn | None = None
        self.packet_by: Turn | None = None

    def _past(self) -> list[tuple[Tensor, Tensor]]:
        made = len(self._full)
        recent = max(self._sink, made - self._recent)
        return [*self._full[:self._sink], *self._packets[:recent - self._sink], *self._full[recent:]]

    def extend(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        keys = turn(keys, self.by)
        self._staged = (keys.detach(), values.detach())
        return Window(turn(query, self.by), *map(_joined, zip(*self._past(), (keys, values), strict=True)))

    def extend_packet(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        keys = turn(keys, self.packet_by)
        past = [(k.detach(), v.detach()) for k, v in self._past()]
        self._packets.append((keys, values))
        return Window(turn(query, self.packet_by), *map(_joined, zip(*past, (keys, values), strict=True)))

    def stage_packet(self, keys: Tensor, values: Tensor) -> None:
        self._packets.append((turn(keys, self.packet_by), values))

    def commit(self) -> None:
        self._full.append(self._staged)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(parts, dim=1)
