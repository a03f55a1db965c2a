"""The loop that every stage shares: resume, clock, checkpoints, progress, losses."""
from __future__ import annotations

import json
import logging
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.files import temp_path

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
    """Write training state atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temp_path(path)
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read training state; tensors and plain data only."""
    return torch.load(path, map_location=device, weights_only=True)


def run_stage(
    stage: Stage, folder: Path, *, device: torch.device, seconds: float | None, checkpoint_seconds: float,
    log_every: int,
) -> bool:
    """Run a stage from where it stands until its last step or until `seconds` are over; returns whether it is done.

    State goes to `folder/<stage>.pt`, losses to `folder/<stage>.jsonl`.
    """
    path = folder / f"{stage.name}.pt"
    first = 0
    if path.exists():
        saved = load_state(path, device)
        stage.load(saved["stage"])
        first = saved["step"]
        logger.info("%s: going on at step %d of %d", stage.name, first, stage.steps)
    begin = saved_at = time.monotonic()
    with (
        (folder / f"{stage.name}.jsonl").open("a") as log,
        tqdm(total=stage.steps, initial=first, desc=stage.name, mininterval=5) as bar,
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
                now = time.monotonic()
                if seconds is not None and now - begin > seconds:
                    break
                if now - saved_at > checkpoint_seconds:
                    save_state(path, {"stage": stage.state(), "step": index})
                    saved_at = now
    save_state(path, {"stage": stage.state(), "step": index})
    return index >= stage.steps


def learning_rate(index: int, steps: int, warmup: int = 100, decay_from: float = 0.6) -> float:
    """Factor on the learning rate: a short ramp, a plateau, a linear fall to 2 % at the end."""
    if index < warmup:
        return (index + 1) / warmup
    progress = index / steps
    return 1.0 if progress < decay_from else max(0.02, (1 - progress) / (1 - decay_from))


class Optimizers:
    """Muon for the matrices inside the blocks, AdamW for everything else; float32 masters of the module's weights.

    The module itself may be bf16: gradients are raised to float32, masters updated, weights rounded once.
    """

    def __init__(self, module: nn.Module, *, lr: float, lr_rest: float, betas: tuple[float, float] = (0.9, 0.95)):
        self._parameters = dict(module.named_parameters())
        self.masters = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        matrices = [p for name, p in self.masters.items() if p.ndim == 2 and "blocks." in name]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.masters.values() if id(p) not in chosen]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=lr_rest, betas=betas, weight_decay=0.0),
        ]
        if matrices:
            self._optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]

    def step(self, factor: float, max_norm: float = 1.0) -> None:
        """Clip, update, write the weights back, clear the gradients."""
        masters = list(self.masters.values())
        for master, parameter in zip(masters, self._parameters.values(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        nn.utils.clip_grad_norm_(masters, max_norm, foreach=True)
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
        self._write_back()

    def state(self) -> dict[str, Any]:
        return {"masters": self.masters, "optimizers": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load(self, state: dict[str, Any]) -> None:
        copy_tensors(self.masters, state["masters"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        torch._foreach_copy_(list(self._parameters.values()), list(self.masters.values()))
