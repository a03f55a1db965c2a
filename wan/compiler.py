"""Who runs the hot functions: plain torch, what torch.compile makes of them, or a kernel written by hand.

A `Compiler` turns a function into one that computes the same faster. It is handed in from outside, so that nothing
below knows whether it is compiled, and the plain twin of every compiled function is the function itself.
"""
from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable)
_BY_HAND: dict[Callable, str] = {}  # functions, and the module of their kernel
SHAPES = 64  # variants of one function: first chunks, odd chunks and caches of several sizes in one process


class Compiler(Protocol):
    """Makes a function fast. `dynamic`: it will see many lengths, so sizes must not be baked in."""

    def __call__(self, function: Function, *, dynamic: bool = False) -> Function: ...


def plain(function: Function, *, dynamic: bool = False) -> Function:
    """The function itself."""
    return function


def by_hand(module: str) -> Callable[[Function], Function]:
    """Mark a function of tensors: `module` has a Triton kernel of the same name that computes the same faster."""

    def mark(function: Function) -> Function:
        _BY_HAND[function] = module
        return function

    return mark


def inductor(function: Function, *, dynamic: bool = False) -> Function:
    """The kernel written by hand on a GPU, else torch.compile: one graph without breaks.

    Shared by all who compile the same function.
    """
    return with_kernel(function, dynamic) if function in _BY_HAND else compiled(function, dynamic)


@cache
def with_kernel(function: Function, dynamic: bool) -> Function:
    """The kernel for tensors on a GPU, and what torch.compile makes of the function for others.

    Kernels compute in float32, which is not enough for float64.
    """

    def run(first: Tensor, *others: Any) -> Any:
        if not first.is_cuda or first.dtype == torch.float64:
            return compiled(function, dynamic)(first, *others)
        return getattr(import_module(_BY_HAND[function]), function.__name__)(first, *others)

    return run


@cache
def compiled(function: Function, dynamic: bool) -> Function:
    """What torch.compile makes of it; sizes that change are found out by themselves, and only those.

    Reductions are not chosen by a race, which would make two runs round differently.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    import_module("wan.whole_rows").prefer_whole_rows()  # only now: the compiler takes seconds to import
    return torch.compile(function, fullgraph=True, dynamic=None if dynamic else False, options={"deterministic": True})


def keep_compiled(folder: Path) -> None:
    """Keep compiled kernels in `folder`, so that the next process need not compile; the user's own choice wins."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
