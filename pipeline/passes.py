"""Runs passes over the cache, where there is a recorder as CUDA graphs: no launch costs, the same results.

The passes of a chunk are decided by few host numbers (`KVCache.shapes`), which repeat once a window has filled, and
by those before it in the same chunk: these left the plan, and where it lies. What is met for the first time runs as
always; the second time it is recorded, and replayed from then on. Inputs are copied to fixed addresses first; what the
host knows of the cache is set afterwards as the passes themselves would have.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import chain

import torch
from torch import Tensor

from wan.kv_cache.cache import CacheState, KVCache
from wan.model import TextContext
from wan.recorder import Recorder, Replays


class PassRunner:
    """Calls functions of tensors and a text that work on the cache."""

    def __init__(self, cache: KVCache, recorder: Recorder | None):
        """Args: `recorder` makes the graphs; None: everything runs as it is."""
        self._cache, self._replays = cache, None if recorder is None else Replays(recorder)
        self._text: TextContext | None = None     # at fixed addresses
        self._text_is: TextContext | None = None  # whose copy that is
        self._last: Hashable = None  # the key of the newest passes

    def __call__(
        self, name: Hashable, passes: Callable[..., Tensor | None], inputs: Sequence[Tensor], text: TextContext,
    ) -> Tensor | None:
        """passes(*inputs, text=text).

        Args: name: stands for the function and all that it depends on besides shapes and the cache.
        """
        if self._replays is None:
            return passes(*inputs, text=text)
        names = [(name, place, x.shape) for place, x in enumerate(inputs)]
        places, text = list(map(self._replays.place, names, inputs)), self._settled_text(text)

        def work() -> tuple[Tensor | None, CacheState]:
            return passes(*places, text=text), self._cache.state

        self._last = (*names, name, *self._cache.shapes(), self._last if self._cache.is_planned else None)
        result, state = self._replays(self._last, work)
        self._cache.follow(state)
        return None if result is None else result.clone()

    def _settled_text(self, text: TextContext) -> TextContext:
        if self._text is None:
            self._text = tuple((keys.clone(), values.clone()) for keys, values in text)
        elif text is not self._text_is:
            torch._foreach_copy_(list(chain(*self._text)), list(chain(*text)))
        self._text_is = text
        return self._text
