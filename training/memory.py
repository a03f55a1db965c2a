"""What self-attention sees while training: the same windows as in inference, in a form that gradients pass through.

Training clips fit the window, so nothing is ever forgotten and every frame keeps its true position.
B batch, F frames, L = F * frame_tokens, H heads, D head dim.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.geometry import ChunkSpan, VideoGeometry
from wan.kv_cache.window import Window
from wan.rope import Phase, rotate_space, rotate_time, space_phase, time_phase


@torch.compiler.disable
def dense(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention backend of training: torch's choice of kernel, with gradients."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, keys, values))).transpose(1, 2)


def _rotate(x: Tensor, frame_tokens: int, space: Phase, time: Phase) -> Tensor:
    return rotate_time(rotate_space(x.unflatten(1, (-1, frame_tokens)), space).flatten(1, 2), time)


class Rotation:
    """Space and time RoPE of whole frames."""

    def __init__(self, geometry: VideoGeometry, head_dim: int, device: torch.device):
        self._geometry, self._head_dim = geometry, head_dim
        self._rotate = torch.compile(_rotate, dynamic=False) if device.type == "cuda" else _rotate
        self._space = space_phase(geometry.rows, geometry.columns, head_dim, torch.float32, device)

    def time(self, frames: Tensor) -> Phase:
        """Phase of every token of `frames` [F]."""
        return time_phase(frames.repeat_interleave(self._geometry.frame_tokens), self._head_dim, torch.float32)

    def __call__(self, x: Tensor, time: Phase) -> Tensor:
        """[B, L, H, D] -> rotated."""
        return self._rotate(x, self._geometry.frame_tokens, self._space, time)


class TeacherForcing:
    """Memory of a clean and a noisy copy of each clip side by side: [clean F frames | noisy F frames].

    Every layer shares it. Use with `chunk_causal_attention`, which knows who sees whom.
    """

    def __init__(self, rotation: Rotation, frames: int, device: torch.device):
        self._rotation = rotation
        self._time = rotation.time(torch.arange(frames, device=device).repeat(2))

    def layer(self, index: int) -> TeacherForcing:
        return self

    @torch.compiler.disable
    def extend(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        return Window(self._rotation(query, self._time), self._rotation(keys, self._time), values)


class ChunkCausalAttention:
    """A noisy chunk sees the clean chunks before it and itself; a clean chunk sees the same, with its clean self.

    An attention backend for the layout of `TeacherForcing`: one dense call per chunk, clean and noisy together.
    """

    def __init__(self, chunk_tokens: int):
        self._chunk = chunk_tokens

    @torch.compiler.disable
    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        half = query.shape[1] // 2
        clean, noisy = [], []
        for start in range(0, half, self._chunk):
            own = slice(start, start + self._chunk), slice(half + start, half + start + self._chunk)
            asked = torch.cat([query[:, span] for span in own])
            seen = [torch.cat([torch.cat([x[:, :start], x[:, span]], dim=1) for span in own]) for x in (keys, values)]
            for_clean, for_noisy = dense(asked, *seen).chunk(2)
            clean.append(for_clean)
            noisy.append(for_noisy)
        return torch.cat(clean + noisy, dim=1)


class RolloutMemory:
    """Memory of a rollout: remembered keys and values without gradient, the current chunk's with.

    `begin` and `commit` as in wan/kv_cache/cache.py; appends instead of overwriting buffers, so that the
    graph of an earlier pass survives later ones.
    """

    def __init__(self, rotation: Rotation, layers: int, device: torch.device):
        self._rotation, self._device = rotation, device
        self._layers = [RolloutLayer(rotation) for _ in range(layers)]

    def begin(self, chunk: ChunkSpan) -> None:
        time = self._rotation.time(torch.arange(chunk.start, chunk.stop, device=self._device))
        for layer in self._layers:
            layer.time = time

    def layer(self, index: int) -> RolloutLayer:
        return self._layers[index]

    def commit(self) -> None:
        """What the last pass staged becomes memory."""
        for layer in self._layers:
            layer.commit()


class RolloutLayer:
    """One layer of a rollout's memory."""

    def __init__(self, rotation: Rotation):
        self._rotation = rotation
        self._past: tuple[Tensor, ...] = ()
        self._staged: tuple[Tensor, ...] = ()
        self.time: Phase | None = None

    @torch.compiler.disable
    def extend(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        keys = self._rotation(keys, self.time)
        self._staged = (keys.detach(), values.detach())
        if self._past:
            keys, values = (torch.cat([past, new], dim=1) for past, new in zip(self._past, (keys, values), strict=True))
        return Window(self._rotation(query, self.time), keys, values)

    def commit(self) -> None:
        if self._past:
            self._staged = tuple(
                torch.cat([past, new], dim=1) for past, new in zip(self._past, self._staged, strict=True)
            )
        self._past = self._staged
