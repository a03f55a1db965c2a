"""Chunks become frames while the transformer makes the next chunk.

On a GPU the decoder has a lane of its own, a stream beside the transformer's or on another device, and frames reach
the host through pinned memory: nothing waits but the one who takes the frames. Elsewhere work is done when it begins.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.chunkwise import Chunk
from pipeline.decoder import OnceDecoder
from utils.profiling import StageClock
from wan.geometry import ChunkSpan
from wan.stream import to_uint8


@dataclass(frozen=True)
class FrameChunk:
    """Finished frames of a batch of videos."""

    span: ChunkSpan
    latents: Tensor  # [B, F, C, h, w] float32, on the device
    frames: Tensor   # uint8 [B, T, H, W, 3], on the host
    given: bool      # reconstructed from the source, not generated


@dataclass(frozen=True)
class Decoding:
    """A chunk whose frames are being made."""

    chunk: Chunk
    frames: Tensor                 # as in FrameChunk, valid once `done`
    finite: Tensor                 # [2] bool on the host, valid once `done`: the latents, the decoder's pixels
    done: torch.cuda.Event | None  # None: already

    def finished(self) -> FrameChunk:
        """Wait for the frames.

        Raises:
            FloatingPointError: the networks made something that is no number.
        """
        if self.done is not None:
            self.done.synchronize()
        span, (good_latents, good_pixels) = self.chunk.span, self.finite.tolist()
        if not good_latents:
            raise FloatingPointError(
                f"latent frames {span.start}..{span.stop - 1} hold values that are not finite. "
                "The checkpoint is damaged, or does not suit this config or dtype (--set dtype=float32)."
            )
        if not good_pixels:
            raise FloatingPointError(
                f"the decoder made frames of latent frames {span.start}..{span.stop - 1} that are not "
                "finite, though the latents are. The decoder's weights are damaged, or do not suit this dtype "
                "(--set dtype=float32)."
            )
        return FrameChunk(span, self.chunk.latents, self.frames, self.chunk.given)


class DecoderLane:
    """Where frames are made, of one decoder: its streams share buffers, so they share the lane.

    Args:
        home: the transformer's device.
        away: the decoder's.
        aside: beside the transformer, in place of between its chunks; CUDA devices only.
    """

    def __init__(self, home: torch.device, away: torch.device, *, aside: bool):
        devices = dict.fromkeys((home, away)) if aside else ()  # the decoder's is last, so that it is the current one
        # Before the transformer wherever both are ready: a viewer waits for frames, nobody for the next latents.
        self._streams = [torch.cuda.Stream(device, priority=-1) for device in devices]

    @property
    def is_aside(self) -> bool:
        return bool(self._streams)

    def begin(self, chunk: Chunk, decoder: OnceDecoder, clock: StageClock) -> Decoding:
        """Queue all work from latents to frames on the host, after what is queued for the transformer now."""
        with self._entered(chunk.latents), clock.stage("vae"):
            pixels = decoder.decode(chunk.latents)
            good_latents = chunk.latents.isfinite().all().to(pixels.device, non_blocking=True)
            finite = to_host(torch.stack([good_latents, pixels.isfinite().all()]))
            frames = to_host(to_uint8(pixels[:, :chunk.shown_frames]))
            done = _mark(pixels.device)
        return Decoding(chunk, frames, finite, done)

    @contextmanager
    def _entered(self, latents: Tensor) -> Iterator[None]:
        with ExitStack() as stack:
            if self._streams:
                with torch.inference_mode():  # latents were made in it
                    latents.record_stream(self._streams[0])  # its memory is not given away while it may be read here
                for stream in self._streams:
                    stream.wait_stream(torch.cuda.current_stream(stream.device))
                    stack.enter_context(torch.cuda.stream(stream))
            yield


def to_host(x: Tensor) -> Tensor:
    """`x` in host memory; from a GPU it has arrived only once work queued so far is done, and the host goes on."""
    if x.device.type != "cuda":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _mark(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # the waiting thread sleeps, so that encoding has the processor
    event.record(torch.cuda.current_stream(device))
    return event


def handed_out(begun: Iterator[Decoding], *, behind: bool) -> Iterator[FrameChunk]:
    """Finish what has begun, in order.

    Args:
        behind: each but the first is waited for only when the next has begun, which keeps a device busy. A failure
            of the next is raised after what is good was handed out.
    """
    waiting, first = None, True
    while True:
        try:
            latest = next(begun, None)
        except Exception:
            if waiting is not None:
                yield waiting.finished()
            raise
        if waiting is not None:
            yield waiting.finished()
        if latest is None:
            return
        waiting = latest if behind and not first else None
        if waiting is None:
            yield latest.finished()
        first = False
