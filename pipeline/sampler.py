"""Few-step sampling of a flow-matching model: which timesteps, and how to go from one to the next."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TABLE_STEPS = 1000  # the training schedule; timesteps are 1000 sigma


def schedule(shift: float) -> Tensor:
    """Sigmas [1000], float32, falling from 1: shift u / (1 + (shift - 1) u), u = 1, 0.999, ... 0.001.

    Source: Wan2.1's flow-match scheduler, as Self Forcing (arXiv:2506.08009) uses it.
    """
    u = torch.linspace(1, 0, TABLE_STEPS + 1)[:-1]
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class FewStepSampler:
    """Denoise in a few passes, with fresh noise between them.

    `steps`: 1000 is pure noise, falling. `warp`: read each step through the shifted schedule.
    `context_time`: timestep of the context pass, 0 for clean.
    `times`, `sigmas`: one per pass; host floats, so no pass reads the device.
    """

    steps: Sequence[float]
    shift: float
    warp: bool
    context_time: float = 0.0
    times: tuple[float, ...] = field(init=False)
    sigmas: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        sigmas = schedule(self.shift)
        table = sigmas * TABLE_STEPS
        times = torch.tensor([float(step) for step in self.steps])
        if self.warp:
            if any(step != int(step) for step in self.steps):
                raise ValueError(
                    f"denoising_step_list={list(self.steps)}: warped steps index a table and must be whole numbers. "
                    "Round them, or set warp_denoising_step: false."
                )
            times = torch.cat([table, table.new_zeros(1)])[[TABLE_STEPS - int(step) for step in self.steps]]
        nearest = (table[None] - times[:, None]).abs().argmin(dim=1)
        object.__setattr__(self, "times", tuple(times.tolist()))
        object.__setattr__(self, "sigmas", tuple(sigmas[nearest].tolist()))

    @property
    def num_passes(self) -> int:
        return len(self.times)

    def clean(self, x: Tensor, flow: Tensor, index: int) -> Tensor:
        """The x0 that the flow of pass `index` points to; computed in float64, returned in x's dtype."""
        return (x.double() - self.sigmas[index] * flow.double()).to(x.dtype)

    def renoise(self, x0: Tensor, noise: Tensor, index: int) -> Tensor:
        """Input of pass `index`: x0 with fresh noise at that pass's level."""
        sigma = self.sigmas[index]
        return (1 - sigma) * x0 + sigma * noise
