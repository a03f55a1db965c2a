"""What a KV-cache policy is: which tokens a chunk sees, and at what window time.

A policy is a frozen dataclass whose fields are its YAML keys, with one pure function `plan`. It sees a
`CacheView` and returns a `Plan` of integer tensors; it owns no buffers, no trigonometry and no state.

B batch, R retained, A attended, C chosen slots; K shown packets of T frames, M places of the archive.
"""
from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from utils.config_schema import nearest
from wan.geometry import PacketGrid, VideoGeometry

Positions = Literal["released", "unified", "contiguous", "original"]
Votes = Literal["both", "past", "denoising"]
Compressor = Literal["kv_pool", "latent_pool", "lr", "dual"]


@dataclass(frozen=True)
class ArchiveSizes:
    """Room for compressed chunks."""

    grid: PacketGrid
    packets: int   # most packets kept, the oldest make room; 0: all of them
    counted: int   # so many packets are told apart by number; more look like this many
    offload: bool  # keep them in host memory


@dataclass(frozen=True)
class CacheSizes:
    """What a policy needs allocated."""

    window_tokens: int    # most tokens attention sees, the chunk included
    capacity_tokens: int  # most tokens the store holds, the staged chunk included
    vote_frames: int = 0  # newest frames whose queries vote, the chunk included
    archive: ArchiveSizes | None = None  # None: nothing is compressed
    averaged_tokens: int = 0  # so many of the first slots are averages, of full precision

    @classmethod
    def of_window(
        cls, geometry: VideoGeometry, window_frames: int, *, vote_frames: int = 0, hidden_frames: int = 0,
        averaged_frames: int = 0,
    ) -> CacheSizes:
        """Sizes of a policy that remembers at most one window and `hidden_frames`, plus the chunk in the making.

        Raises:
            ValueError: a window that no chunk fits.
        """
        chunk = geometry.chunk_frames
        check_range("window_frames", window_frames, chunk, 1 << 20, "at least one chunk must fit")
        return cls(
            window_tokens=window_frames * geometry.frame_tokens,
            capacity_tokens=(window_frames + hidden_frames + chunk) * geometry.frame_tokens,
            vote_frames=vote_frames,
            averaged_tokens=averaged_frames * geometry.frame_tokens,
        )


@dataclass(frozen=True)
class PacketView:
    """Read-only: compressed chunks of one layer."""

    known: int                          # how many there are, counted up to `ArchiveSizes.counted`
    start: Tensor                       # [M] int64, first latent frame of each; the greatest int64 where there is none
    centres: Tensor                     # [T] float64, of the packet frames, in latent frames from the chunk's first
    affinity: Callable[[float], Tensor]  # share of the heads, the first ones -> [B, M] summed query-key products


@dataclass(frozen=True, kw_only=True)
class CacheView:
    """Read-only: all that a policy may know of one layer, at the first pass of a chunk.

    What grows for ever is a tensor; host numbers are bounded, so that the shapes of a stream repeat.
    """

    layer: int
    chunk_index: Tensor   # [] int64
    start: Tensor         # [] int64, latent frame that the span in the making begins with
    span_frames: int      # its frames: a chunk, as a rule; more if several are denoised or remembered jointly
    chunk_frames: int     # of a whole chunk of this video
    seen_frames: int      # latent frames ever remembered, counted up to one more than the store can hold
    length: int           # slots in use
    frame_tokens: int
    seeds: Tensor         # [B] int64, one per sample
    origin: Tensor        # [B, length] int32
    uses: Tensor          # [B, length] int32
    participation: Callable[[int, int, Votes], Tensor]  # slots from lo to hi -> [B, hi - lo] fused query-key scores
    lookahead: bool = False  # the span is only looked at, noisy, and will not be remembered (joint windows)
    packets: PacketView | None = None  # None: the policy has no archive

    @property
    def num_frames(self) -> int:
        """Remembered tokens, counted in frames."""
        return self.length // self.frame_tokens

    @property
    def has_forgotten(self) -> bool:
        return self.seen_frames > self.num_frames

    def span(self, start_frame: int, stop_frame: int) -> Tensor:
        """Slots [B, n] of the frames' worth of tokens from `start_frame` to `stop_frame`, in store order."""
        slots = torch.arange(start_frame * self.frame_tokens, stop_frame * self.frame_tokens, device=self.origin.device)
        return slots.expand(self.origin.shape[0], -1)

    def first(self, frames: int) -> Tensor:
        """Slots of the first `frames` frames' worth of tokens."""
        return self.span(0, frames)

    def last(self, frames: int) -> Tensor:
        """Slots of the newest `frames` frames' worth of tokens."""
        return self.span(self.num_frames - frames, self.num_frames)

    def random(self, lo: int, hi: int) -> Tensor:
        """Scores [B, hi - lo] that depend on seed, layer, chunk and slot alone, so that plans stay pure."""
        slot = torch.arange(lo, hi, device=self.seeds.device)
        x = self.seeds.unsqueeze(1) * 0x1000003 + slot + (self.chunk_index * 0x10001 + self.layer) * 0x5851F42D
        for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):  # SplitMix64's finaliser, as signed integers
            x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * multiplier
        return ((x >> 11) & 0xFFFFFFFFFFFFF).to(torch.float64)


@dataclass(frozen=True)
class Plan:
    """What a policy decides, once per chunk and layer."""

    retain: Tensor               # [B, R] store slots that survive, ascending
    attend: Tensor               # [B, A] store slots that this chunk sees; a subset of retain
    position: Tensor             # [B, A] window time of each attended token, in latent frames; may be negative
    query_position: int          # window time of the chunk's first frame
    still: int = 0               # the first so many of `retain` are slots 0, 1, ... and stay where they are
    chosen: Tensor | None = None  # [B, C] slots whose use counter rises by one
    packets: Tensor | None = None          # [B, K] places of the archive that this chunk sees, besides `attend`
    packet_position: Tensor | None = None  # [B, K, T] window time of each of their frames, in latent frames
    archive: bool = False                  # the chunk's packet goes to the archive
    same_times: bool = False               # positions, though not tokens, are those of every layer
    absorbed: Tensor | None = None  # [B, n] slots that leave, each averaged into one of the first n, which stay
    decay: float = 1.0              # what an average keeps of itself when a slot is averaged in

    def past_tokens(self, packet_tokens: int) -> int:
        """Tokens that the chunk sees besides its own, if a packet is `packet_tokens`."""
        return self.attend.shape[1] + (0 if self.packets is None else self.packets.shape[1] * packet_tokens)

    @classmethod
    def of(
        cls, view: CacheView, *, sink: Tensor, tail: Tensor, positions: Positions,
        top: Tensor | None = None, chosen: Tensor | None = None,
    ) -> Plan:
        """Keep and see sink (the first slots), top-C and tail, in this order, at the positions that `positions` names.

        The chunk starts at min(frames seen, frames kept + one chunk); `tail` is the newest frames.
        `released`: sink at 0, 1, ...; all else as far before the chunk as it was born.
        `unified`: as released, but top-C in store order, whole frames, ending where the tail begins.
        `contiguous`: as unified, and the sink ends where top-C (or the tail) begins.
        `original`: everything as far before the chunk as it was born.
        Several chunks that are remembered jointly are placed as one after the other would be.

        Raises: ValueError for other `positions`.

        Source: Deep Forcing, arXiv:2512.05081, section 3; `released` is the authors' code.
        """
        if positions not in get_args(Positions):
            raise ValueError(f"positions={positions!r} is not one of {', '.join(get_args(Positions))}.")
        top = sink[:, :0] if top is None else top
        slots = torch.cat([sink, top, tail], dim=1)
        kept, top_frames, tail_frames = (n.shape[1] // view.frame_tokens for n in (slots, top, tail))
        query_position = min(view.seen_frames, kept + view.chunk_frames)
        position = query_position - view.start + torch.take_along_dim(view.origin, slots, dim=1).long()
        sinks, tops = sink.shape[1], sink.shape[1] + top.shape[1]
        step = torch.arange(tops, device=slots.device) // view.frame_tokens
        top_begins = query_position - tail_frames - top_frames
        if positions in ("unified", "contiguous"):
            position[:, sinks:tops] = top_begins + step[:tops - sinks]
        if positions != "original":
            sink_begins = top_begins - sinks // view.frame_tokens if positions == "contiguous" else 0
            position[:, :sinks] = sink_begins + step[:sinks]
        return cls(
            retain=slots, attend=slots, position=position, query_position=query_position, still=sinks, chosen=chosen,
        )


@dataclass(frozen=True)
class Compression:
    """What a chunk's packet is made of; none of it concerns the cache."""

    compressor: Compressor
    compressed_kv: Literal["forward", "project"]  # h~ runs through the network, or each layer projects it
    lr_frames: Literal["paper", "cover"]
    compressor_weights: str                       # file of a trained compressor; empty: the model's own

    @property
    def reads_pixels(self) -> bool:
        return self.compressor in ("lr", "dual")

    @property
    def is_trained(self) -> bool:
        return self.compressor == "dual"

    @property
    def is_pooled(self) -> bool:
        """By the cache itself, of a chunk's own keys and values: no network sees the packet."""
        return self.compressor == "kv_pool"


class KVPolicy(ABC):
    """Base of every policy; subclasses are frozen dataclasses registered by name."""

    @abstractmethod
    def sizes(self, geometry: VideoGeometry) -> CacheSizes:
        """Capacity and window, before any allocation.

        Raises:
            ValueError: the fields do not fit each other or the chunk.
        """

    @abstractmethod
    def plan(self, view: CacheView) -> Plan:
        """Decide for one chunk and layer. Pure: same view, same plan; no host sync."""

    def tail_frames(self, num_frames: int, has_forgotten: bool, chunk_frames: int) -> int:
        """How many of the newest of `num_frames` remembered frames are whole, in order and no sinks.

        A change of prompt may compute them anew or drop them; 0, the default, is none.
        Args: has_forgotten: more frames were seen than are remembered. chunk_frames: of a whole chunk.
        """
        return 0

    @property
    def compression(self) -> Compression | None:
        """How chunks become packets; None: nothing is compressed."""
        return None

    @property
    def max_frames(self) -> int | None:
        """The longest video in latent frames; None is any length."""
        return None

    @property
    def notice(self) -> str | None:
        """One line if the fields, though they fit, come to something that their names do not say."""
        return None


class PolicyClash(ValueError):
    """Two policies have one name."""


_REGISTRY: dict[str, type[KVPolicy]] = {}


def register(name: str) -> Callable[[type[KVPolicy]], type[KVPolicy]]:
    """Make a policy known to YAML as `kv_cache.policy: name`."""

    def add(policy: type[KVPolicy]) -> type[KVPolicy]:
        if name in _REGISTRY:
            raise PolicyClash(
                f"KV policy {name!r} is registered twice: {_REGISTRY[name].__module__} and {policy.__module__}."
            )
        _REGISTRY[name] = policy
        return policy

    return add


def _policies() -> Mapping[str, type[KVPolicy]]:
    """By name, those of every file in wan/kv_cache/policies/."""
    importlib.import_module("wan.kv_cache.policies")
    return _REGISTRY


def policy_fields() -> Mapping[str, frozenset[str]]:
    """The YAML keys of every policy."""
    return {name: frozenset(f.name for f in fields(policy)) for name, policy in _policies().items()}


def build_policy(name: str, settings: Mapping[str, Any]) -> KVPolicy:
    """The policy `name` with the YAML's `settings`.

    Raises:
        ValueError: unknown policy or key (with the nearest match), missing key, wrong type.
    """
    policies = _policies()
    if name not in policies:
        known = ", ".join(sorted(policies))
        raise ValueError(f"kv_cache.policy={name!r} is unknown.{nearest(name, policies)} Known: {known}.")
    policy = policies[name]
    known = {f.name: f for f in fields(policy)}
    for key in settings:
        if key not in known:
            keys = ", ".join(known)
            raise ValueError(f"unknown key kv_cache.{key} for policy {name}.{nearest(key, known)} Known: {keys}.")
    missing = [key for key, f in known.items() if f.default is MISSING and key not in settings]
    if missing:
        raise ValueError(
            f"kv_cache of policy {name} lacks {', '.join(missing)}. "
            f"Add it to the YAML or with --set kv_cache.{missing[0]}=..."
        )
    hints = get_type_hints(policy)
    for key, value in settings.items():
        _check_type(f"kv_cache.{key}", value, hints[key])
    return policy(**settings)


def _check_type(key: str, value: Any, expected: Any) -> None:
    if get_origin(expected) is Literal:
        if value not in get_args(expected):
            raise ValueError(f"{key}={value!r} is not one of {', '.join(map(str, get_args(expected)))}.")
    elif type(value) is not expected and (expected, type(value)) != (float, int):
        raise ValueError(f"{key}={value!r} is a {type(value).__name__}; {expected.__name__} is wanted.")


def check_range(key: str, value: int, low: int, high: int, reason: str) -> None:
    """Raise ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"kv_cache.{key}={value} is outside {low}..{high}: {reason}.")
