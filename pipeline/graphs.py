"""The chunk-wise loop with its passes replayed as CUDA graphs: no launch costs, the same results.

The passes of a chunk are decided by few host numbers (`KVCache.shapes`), which repeat once a window has filled. What
is met for the first time runs as always; the second time it is recorded, and replayed from then on. Inputs are copied
to fixed addresses first; what the host knows of the cache is set afterwards as the passes themselves would have.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from pipeline.chunkwise import ChunkwisePipeline
from pipeline.noise import NoiseSource
from pipeline.sampler import FewStepSampler
from pipeline.timeline import OnSwitch
from wan.geometry import ChunkSpan, VideoGeometry
from wan.kv_cache.cache import KVCache
from wan.kv_cache.layer import LayerState
from wan.model import CausalWanModel, TextContext
from wan.recorder import Recorder, Replay


class GraphedPipeline(ChunkwisePipeline):
    """A ChunkwisePipeline that records and replays."""

    def __init__(
        self, model: CausalWanModel, sampler: FewStepSampler, geometry: VideoGeometry, cache: KVCache,
        recorder: Recorder, on_switch: OnSwitch = "keep",
    ):
        super().__init__(model, sampler, geometry, cache, on_switch=on_switch)
        self._record = recorder
        self._met: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[Replay, list[LayerState]]] = {}  # and states of the cache, afterwards
        self._places: dict[Hashable, Tensor] = {}     # inputs and results, by name and shape
        self._text: TextContext | None = None         # at fixed addresses
        self._text_is: TextContext | None = None      # whose copy that is
        self._noise = _NoiseAhead(sampler.num_passes)

    @torch.inference_mode()
    def denoise(self, span: ChunkSpan, text: TextContext, noise: NoiseSource) -> Tensor:
        """As ChunkwisePipeline's; the noise of the chunk after this one is drawn while the device works."""
        self.cache.begin(span)
        text, draws = self._settled_text(text), self._noise.take(noise, span)
        draws = [self._place(("noise", index), new).copy_(new) for index, new in enumerate(draws)]
        result = self._place("result", draws[0])

        def passes() -> None:
            result.copy_(self._denoise(draws.__getitem__, text))

        self._run(("denoise", *self.cache.shapes()), passes, committed=False)
        self._noise.prepare(noise, replace(span, index=span.index + 1, start=span.stop))
        return result.clone()

    @torch.inference_mode()
    def remember(self, latents: Tensor, text: TextContext) -> None:
        given, text, clean = latents, self._settled_text(text), self._place("clean", latents).copy_(latents)
        if self.packer is None:
            whole = partial(ChunkwisePipeline.remember, self, clean, text)
            self._run(("remember", *self.cache.shapes()), whole, committed=True)
            return
        self._run(("see clean", *self.cache.shapes()), lambda: self._see_clean(clean, text), committed=False)
        tokens = self.packer.compress(given)  # decodes and encodes: what it remembers is not the cache's
        packet = None if tokens is None else self._place("packet", tokens).copy_(tokens)

        def passes() -> None:
            if packet is not None:
                self.packer.write(packet, text)
            self.cache.commit()

        self._run(("commit", packet is None, *self.cache.shapes()), passes, committed=True)

    def _run(self, key: Hashable, passes: Callable[[], None], *, committed: bool) -> None:
        """Do what `passes` does, in the fastest way that is known for `key`."""
        if key not in self._met:
            self._met.add(key)
            passes()
        elif key not in self._recorded:
            self._noise.wait()
            replay = self._record(passes)
            self._recorded[key] = replay, self.cache.states
            replay()  # on the host, recording has done it
        else:
            replay, states = self._recorded[key]
            replay()
            self.cache.replayed(states, committed=committed)

    def _place(self, name: Hashable, like: Tensor) -> Tensor:
        """A tensor like this one, at an address that graphs know."""
        key = (name, like.shape, like.dtype)
        if key not in self._places:
            self._places[key] = torch.empty_like(like, device=self.model.device)
        return self._places[key]

    def _settled_text(self, text: TextContext) -> TextContext:
        if self._text is None:
            self._text = tuple((keys.clone(), values.clone()) for keys, values in text)
        elif text is not self._text_is:
            torch._foreach_copy_(list(chain(*self._text)), list(chain(*text)))
        self._text_is = text
        return self._text


class _NoiseAhead:
    """Draws the next chunk's noise in a thread: drawing takes the host longer than a replay leaves it idle."""

    def __init__(self, passes: int):
        self._passes = passes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._next: tuple[NoiseSource, ChunkSpan, Future[list[Tensor]]] | None = None

    def take(self, noise: NoiseSource, span: ChunkSpan) -> list[Tensor]:
        """The noise of every pass of `span`."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] is noise and ahead[1] == span:
            return ahead[2].result()
        return self._draw(noise, span)

    def prepare(self, noise: NoiseSource, span: ChunkSpan) -> None:
        """Begin to draw what is probably asked for next."""
        self._next = noise, span, self._thread.submit(self._draw, noise, span)

    def wait(self) -> None:
        """Return when no drawing is going on: it allocates, which would disturb a recording."""
        if self._next is not None:
            self._next[2].result()

    def _draw(self, noise: NoiseSource, span: ChunkSpan) -> list[Tensor]:
        return [noise.draw(span, index) for index in range(self._passes)]
