"""The loop that every stage shares: resume, clock, checkpoints, progress, losses."""
from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from training.parallel import is_main, largest, rank
from training.parts import save_shards
from utils.files import write_atomically

SNAPSHOTS = "snapshots"  # in a stage's state: {step: {name: tensor}}
logger = logging.getLogger(__name__)


class Stage(Protocol):
    """One stage of a recipe: what to save, and what one step does."""

    name: str
    steps: int

    def state(self) -> dict[str, Any]:
        """Everything that a later process needs to go on: tensors, numbers, dicts of these."""

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""

    def step(self, index: int) -> dict[str, Tensor]:
        """One update; returns losses as scalars on the device."""


class Ema:
    """Float32 running average of named tensors."""

    def __init__(self, tensors: dict[str, Tensor], decay: float):
        self.decay, self._tensors = decay, tensors
        self.shadow = {name: t.detach().float().clone() for name, t in tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in; early steps count more, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), [t.detach() for t in self._tensors.values()], 1 - decay)


def copy_tensors(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    """Overwrite `target` with `source`, name by name; both must have the same names."""
    if target.keys() != source.keys():
        raise ValueError(
            f"saved state does not fit: {sorted(target.keys() ^ source.keys())[:8]}. Use another --folder."
        )
    with torch.no_grad():
        for name, value in source.items():
            target[name].copy_(value)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write training state atomically; of several processes, which all hold the same, the first does."""
    if not is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as buffer:
        torch.save(state, buffer)
        write_atomically(path, buffer.getvalue())


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read training state; tensors and plain data only."""
    return torch.load(path, map_location=device, weights_only=True)


def weights_in(state: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The live tensors of weights, averages and snapshots in a stage's state, by path; optimisers' are left out."""
    found = {}
    for key, value in state.items():
        if key in ("masters", "ema"):
            found |= {f"{prefix}{key}.{name}": tensor for name, tensor in value.items()}
        elif key == SNAPSHOTS:
            found |= {f"{prefix}{key}.{step}.{name}": t for step, one in value.items() for name, t in one.items()}
        elif isinstance(value, dict):
            found |= weights_in(value, f"{prefix}{key}.")
    return found


def pack(state: dict[str, Any], step: int, name: str, folder: Path) -> None:
    """Write weights, averages and snapshots of a stage in bf16, in small files: all that has to travel."""
    save_shards(weights_in(state), folder, lambda index, _: f"{name}-{index}.safetensors", {"step": str(step)})


def unpack(paths: list[Path], stage: Stage) -> int:
    """Take over what `pack` wrote, with a fresh optimiser; returns the step it was written at."""
    state, step, packed = stage.state(), 0, {}
    for path in paths:
        packed |= load_file(path)
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
    for key, tensor in packed.items():
        if key.startswith(f"{SNAPSHOTS}."):
            _, at, name = key.split(".", 2)
            state[SNAPSHOTS].setdefault(at, {})[name] = tensor
    copy_tensors(weights_in(state), packed)
    stage.load(state)  # masters are in place: write them to the networks
    return step


def run_stage(
    stage: Stage, folder: Path, *, device: torch.device, seconds: float | None, checkpoint_seconds: float,
    log_every: int,
) -> bool:
    """Run a stage from where it stands until its last step or until `seconds` are over; returns whether it is done.

    State goes to `folder/<stage>.pt`, losses to `folder/<stage>.jsonl`. Where there is no state but files that
    `pack` wrote, weights and averages go on from there. Under torchrun the first process alone writes.
    """
    path = folder / f"{stage.name}.pt"
    first = 0
    if path.exists():
        saved = load_state(path, device)
        stage.load(saved["stage"])
        first = saved["step"]
        logger.info("%s: going on at step %d of %d", stage.name, first, stage.steps)
    elif packed := sorted(folder.glob(f"{stage.name}-*.safetensors")):
        first = unpack(packed, stage)
        logger.info("%s: going on at step %d of %d, with a fresh optimiser", stage.name, first, stage.steps)
    begin = saved_at = time.monotonic()
    with (
        (folder / f"{stage.name}.jsonl" if is_main() else Path(os.devnull)).open("a") as log,
        tqdm(total=stage.steps, initial=first, desc=stage.name, mininterval=5, disable=not is_main()) as bar,
    ):
        window: dict[str, list[Tensor]] = defaultdict(list)
        index = first
        while index < stage.steps:
            for name, value in stage.step(index).items():
                window[name].append(value.detach())
            index += 1
            if index % log_every == 0 or index == stage.steps:
                means = {name: torch.stack(values).float().mean().item() for name, values in window.items()}
                window.clear()
                log.write(json.dumps({"step": index, "seconds": round(time.monotonic() - begin, 1), **means}) + "\n")
                log.flush()
                bar.update(index - bar.n)
                bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
                now = largest(time.monotonic() - begin, device) + begin  # all processes end together
                if seconds is not None and now - begin > seconds:
                    break
                if now - saved_at > checkpoint_seconds:
                    save_state(path, {"stage": stage.state(), "step": index})
                    saved_at = now
    save_state(path, {"stage": stage.state(), "step": index})
    return index >= stage.steps


def step_seed(seed: int, stage: str, index: int) -> int:
    """The seed of one step's random numbers, so that a resumed run draws what an unbroken one would.

    Each process of a launch draws its own.
    """
    text = f"{seed}/{stage}/{index}" + (f"/{rank()}" if rank() else "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def learning_rate(index: int, steps: int, decay_from: float = 0.6) -> float:
    """Factor on the learning rate: a plateau, then a linear fall to 2 % at the end."""
    progress = index / steps
    return 1.0 if progress < decay_from else max(0.02, (1 - progress) / (1 - decay_from))
