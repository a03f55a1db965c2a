"""Claims on pieces of work, and the loop that every worker runs: nothing is lost, nothing is done twice.

A claim is an advisory lock on a file of the shared folder. The system drops it when its process ends, however it
ends, so what a killed worker had begun is free again. Results decide what is done; claims only who does it now.
"""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils.files import lock_file
from utils.outputs import reason

logger = logging.getLogger(__name__)

WAIT_S = 0.5  # between looks at what other workers are doing


@dataclass(frozen=True)
class Unit:
    """One piece of work."""

    name: str                       # unique; letters, digits, . _ -
    is_done: Callable[[], bool]
    do: Callable[[], None]
    is_ready: Callable[[], bool] = lambda: True  # whether what it needs is there


class Claims:
    """Locks in one folder, shared by all workers on it, of this machine or of several that mount it."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Whether this worker may do `name`; it is let go at the end, or when the process dies.

        Lock files stay: deleting one would let two workers hold two files of the same name.
        """
        file = lock_file(self._folder / f"{name}.lock")
        try:
            yield file is not None
        finally:
            if file is not None:
                file.close()

    def is_free(self, name: str) -> bool:
        """Whether no worker is at `name`."""
        with self.claim(name) as mine:
            return mine


def work_off(
    units: Sequence[Unit], claims: Claims, *, start: int = 0, meanwhile: Sequence[Unit] = (),
) -> dict[str, str]:
    """Do what is left, until all is done, here or elsewhere; one that fails is not tried again here.

    Args:
        start: where in the list to begin, so that several workers begin apart.
        meanwhile: done while others hold all that is left, as far as it is ready then.
    Returns: why each failed unit failed.
    """
    waiting, failed = [*units[start:], *units[:start]], {}
    spare = list(meanwhile)
    while waiting:
        left = [unit for unit in waiting if not unit.is_done() and not _attempt(unit, claims, failed)]
        if left and len(left) == len(waiting):
            unit = _take_ready(spare)
            if unit is None:
                time.sleep(WAIT_S)
            else:
                _attempt(unit, claims, failed)
        waiting = left
    return failed


def wait_for_others_with(units: Sequence[Unit], claims: Claims) -> None:
    """Wait until each of `units`, which failed here, is done or held by nobody."""
    while any(not unit.is_done() and not claims.is_free(unit.name) for unit in units):
        time.sleep(WAIT_S)


def _take_ready(units: list[Unit]) -> Unit | None:
    """The first of `units` that can be done now and is not; it, and what is done, leave the list."""
    for unit in list(units):
        if unit.is_ready():
            units.remove(unit)
            if not unit.is_done():
                return unit
    return None


def _attempt(unit: Unit, claims: Claims, failed: dict[str, str]) -> bool:
    """Do `unit`, or note in `failed` why it could not be done; False if another worker holds it."""
    with claims.claim(unit.name) as mine:
        if mine and not unit.is_done():  # by the worker that has just let it go
            try:
                unit.do()
            except Exception as error:
                failed[unit.name] = reason(error)
                logger.error("%s failed: %s", unit.name, failed[unit.name],
                             exc_info=logger.isEnabledFor(logging.DEBUG))
        return mine


def start_of(units: Sequence[Unit], rank: int, world_size: int) -> int:
    """Where worker `rank` of `world_size` begins."""
    return rank * len(units) // world_size
