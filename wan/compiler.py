"""Who runs the hot functions: plain torch, or what torch.compile makes of them. The functions are the same.

A `Compiler` turns a function into one that computes the same faster. It is handed in from outside, so that nothing
below knows whether it is compiled, and the plain twin of every compiled function is the function itself.
"""
from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Protocol, TypeVar

import torch

Function = TypeVar("Function", bound=Callable)
SHAPES = 64  # variants of one function: first chunks, odd chunks and caches of several sizes in one process


class Compiler(Protocol):
    """Makes a function fast. `dynamic`: it will see many lengths, so sizes must not be baked in."""

    def __call__(self, function: Function, *, dynamic: bool = False) -> Function: ...


def plain(function: Function, *, dynamic: bool = False) -> Function:
    """The function itself."""
    return function


def inductor(function: Function, *, dynamic: bool = False) -> Function:
    """torch.compile: one graph without breaks, shared by all who compile the same function."""
    return compiled(function, dynamic)


@cache
def compiled(function: Function, dynamic: bool) -> Function:
    """What torch.compile makes of it; sizes that change are found out by themselves, and only those."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    return torch.compile(function, fullgraph=True, dynamic=None if dynamic else False)


def keep_compiled(folder: Path) -> None:
    """Keep compiled kernels in `folder`, so that the next process need not compile; the user's own choice wins."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
