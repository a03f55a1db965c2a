"""Prompts that change in the middle of a video, and what becomes of the memory then.

`keep`: nothing; only what is generated next reads the new prompt.
`recache`: the keys and values of the newest frames are computed anew with the new prompt; sinks stay.
`flush_recent`: the newest frames are forgotten; sinks stay.
`reset_sink`: everything is forgotten, and the newest frames, as many as a window holds, are remembered with the new
    prompt; the first of them are the sinks from now on.

Which frames are newest, and which sinks, the cache policy says (KVPolicy.tail_frames). Where chunks leave packets,
those of the newest frames go with them, and are made anew chunk by chunk; older packets stay.
Source: LongLive, arXiv:2509.22622, KV re-cache; `recache` is its global sink, `reset_sink` its run without.

B batch, F latent frames, C latent channels, T text tokens.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.packets import Packer
from utils.timelines import TimelineError
from wan.geometry import ChunkSpan, VideoGeometry
from wan.kv_cache.cache import KVCache
from wan.model import CausalWanModel, TextContext

OnSwitch = Literal["keep", "recache", "flush_recent", "reset_sink"]


@dataclass(frozen=True)
class PromptSwitch:
    """A prompt that follows another."""

    frame: int          # the first chunk that begins at this latent frame, or later, shows it
    embeddings: Tensor  # [B, T, text_dim]


class PromptTrack:
    """The prompt of the moment during one rollout, and the newest latents for as long as a switch may need them."""

    def __init__(
        self, model: CausalWanModel, cache: KVCache, see_clean: Callable[[Tensor, TextContext], None],
        embeddings: Tensor, switches: Sequence[PromptSwitch], on_switch: OnSwitch, packer: Packer | None,
    ):
        """Args: `see_clean` is the context pass, at time 0, of a chunk that has begun, short of its commit."""
        self._model, self._cache, self._see_clean, self._on_switch = model, cache, see_clean, on_switch
        self._packer = packer
        self._left = deque(switches)
        self._newest: Tensor | None = None  # [B, F, C, h, w], what the memory was made of
        self._stop = 0                      # one past its last latent frame
        self._begins = 0                    # frame of the video that chunks are counted from
        self._packed: dict[int, Tensor] = {}  # first frame of a chunk -> what its packet was made of, without a prompt
        self.text = self._embed(embeddings)

    def text_at(self, frame: int) -> TextContext:
        """The prompt of the chunk that begins at latent frame `frame`; a switch that is due happens now."""
        due = None
        while self._left and self._left[0].frame <= self._begins + frame:
            due = self._left.popleft()
        if due is not None:
            self.text = self._embed(due.embeddings)
            self._change_memory()
        return self.text

    def note(self, span: ChunkSpan, latents: Tensor) -> None:
        """The clean latents [B, F, C, h, w] of `span` have become memory."""
        if self._left and self._on_switch in ("recache", "reset_sink"):
            known = latents if self._newest is None else torch.cat([self._newest, latents], dim=1)
            self._newest, self._stop = known[:, -self._cache.most_frames:], span.stop
            self._packed = {start: x for start, x in self._packed.items() if start >= span.stop - known.shape[1]}
            if self._packer is not None and self._packer.newest is not None:
                self._packed[span.start] = self._packer.newest

    def restart(self, begins: int) -> None:
        """The memory was emptied, and the video's frame `begins` is counted as 0."""
        self._newest, self._packed, self._begins = None, {}, begins

    @torch.inference_mode()
    def _embed(self, embeddings: Tensor) -> TextContext:
        return self._model.embed_text(embeddings)

    @torch.inference_mode()
    def _change_memory(self) -> None:
        frames = min(forget(self._cache, self._on_switch), 0 if self._newest is None else self._newest.shape[1])
        spans = self._cache.spans_again(self._stop - frames, frames)
        if not spans:
            return
        for span, x in zip(spans, self._newest[:, -frames:].split([s.frames for s in spans], dim=1), strict=True):
            self._cache.begin(span)
            self._see_clean(x, self.text)
            if self._packer is not None and self._cache.archives:
                self._packer.write(self._packed[span.start], self.text)
            self._cache.commit()


def forget(cache: KVCache, on_switch: OnSwitch) -> int:
    """What of the memory a change of prompt costs; returns how many of the newest frames are remembered again, if there
    are so many.
    """
    if on_switch == "reset_sink":
        cache.forget_all()
        return cache.most_frames
    frames = 0 if on_switch == "keep" else cache.forget_newest()
    return frames if on_switch == "recache" else 0


def switch_frames(
    geometry: VideoGeometry, times: Sequence[float], starts: Sequence[int], pixel_frames: int,
) -> list[int]:
    """The latent frame of each of `times` (seconds), for a video whose generated chunks begin at `starts`.

    Raises:
        TimelineError: a moment after the last chunk has begun, or two prompts for one chunk.
    """
    seconds, frames, chunks = pixel_frames / geometry.fps, [], {0}  # the first chunk shows the first prompt
    starts = [start for start in starts if geometry.pixel_frames(start) < pixel_frames]  # others are cut off whole
    for time in times:
        frame = geometry.frame_at(time)
        start = next((start for start in starts if start >= frame), None)
        if time >= seconds or start is None:
            raise TimelineError(
                f"a prompt begins at {time:g} s, and no chunk of this video of {seconds:g} s begins then or later: the "
                f"last one does at {geometry.pixel_frames(starts[-1]) / geometry.fps:g} s, and a chunk shows one "
                "prompt. Lower the time to that, or ask for a longer video with --seconds."
            )
        if start in chunks:
            raise TimelineError(
                f"the prompt at {time:g} s begins in the same chunk as the one before it. A chunk shows one prompt: "
                f"leave {geometry.pixel_frames(geometry.chunk_frames, first=False) / geometry.fps:g} s or more between."
            )
        frames.append(frame)
        chunks.add(start)
    return frames
