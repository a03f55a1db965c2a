"""Which process of how many this is, from the environment that torchrun sets, and ending together."""
from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

logger = logging.getLogger(__name__)

LONGEST_CONNECT = timedelta(seconds=60)
LONGEST_WAIT = timedelta(days=30)  # a list of long videos may keep the other processes busy for days


@dataclass(frozen=True)
class Launch:
    """rank of world_size processes in all; local_rank picks the GPU of this machine."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; none of them set means a single process.

    Raises: ValueError if only some are set, or they are no integers or out of range.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: environment[name] for name in names if name in environment}
    if not given:
        return Launch(rank=0, world_size=1, local_rank=0)
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    if len(given) != len(names):
        raise ValueError(
            f"the environment sets {shown} but not {', '.join(n for n in names if n not in given)}. "
            "Start with `torchrun --nproc_per_node=N inference.py ...`, or unset them for one process"
        )
    try:
        rank, world_size, local_rank = (int(given[name]) for name in names)
    except ValueError as error:
        raise ValueError(f"{shown}: these must be integers. Start with torchrun, or unset them") from error
    if not (world_size >= 1 and 0 <= rank < world_size and 0 <= local_rank <= rank):
        raise ValueError(
            f"{shown}: must satisfy 0 <= LOCAL_RANK <= RANK < WORLD_SIZE. Start with torchrun, or unset them"
        )
    return Launch(rank=rank, world_size=world_size, local_rank=local_rank)


def wait_for_others(launch: Launch, *, failed: bool) -> None:
    """Say that this process is done; one that `failed` returns only when all the others are done too.

    torchrun stops every process as soon as one ends with a failure, so that one must not end early.
    """
    if launch.world_size == 1 or not dist.is_torchelastic_launched():
        return
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=LONGEST_CONNECT))
        store.set(f"done/{launch.rank}", "")
        if failed:
            store.wait([f"done/{rank}" for rank in range(launch.world_size)], LONGEST_WAIT)
    except dist.DistError as error:
        logger.warning("the other processes cannot be reached (%s); if some still run, torchrun may stop them", error)
