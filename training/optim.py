"""Optimisers: Muon for the matrices, AdamW for everything else, on float32 masters of the module's weights."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.loop import copy_tensors
from training.parallel import average

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration, five steps of it
MOMENTUM = 0.95
WARM_UP = 50  # steps over which rates ramp up whenever an optimiser begins without its past


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with singular values around one, by Newton-Schulz in bf16; [N, A, B] -> [N, A, B]."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """Nesterov momentum whose update is orthogonalised; all matrices of one shape in one batched product.

    A convolution's kernel counts as a matrix of output channels by everything else. Steps are as long as
    AdamW's (RMS 0.2 of the rate), so that one rate suits both.

    Source: Muon, Jordan et al. 2024; the length of a step: arXiv:2502.16982, section 2.2.
    """

    def __init__(self, matrices: dict[str, Tensor]):
        self._matrices = matrices
        self.momentum = {name: torch.zeros_like(m) for name, m in matrices.items()}
        groups: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, matrix in matrices.items():
            groups[matrix.flatten(1).shape].append(name)
        self._groups = list(groups.items())

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the matrices' gradients; every matrix must have one."""
        if not self._matrices:
            return
        grads = [m.grad for m in self._matrices.values()]
        buffers = list(self.momentum.values())
        torch._foreach_lerp_(buffers, grads, 1 - MOMENTUM)
        ahead = dict(zip(self._matrices, torch._foreach_lerp(grads, buffers, MOMENTUM), strict=True))
        for (rows, columns), names in self._groups:
            update = orthogonalise(torch.stack([ahead[name].flatten(1) for name in names])).float()
            length = 0.2 * max(rows, columns) ** 0.5
            parts = [part.view_as(self._matrices[name]) for part, name in zip(update, names, strict=True)]
            torch._foreach_add_([self._matrices[name] for name in names], parts, alpha=-lr * length)


def in_blocks(name: str, parameter: Tensor) -> bool:
    """The matrices of a transformer's blocks."""
    return parameter.ndim == 2 and "blocks." in name


def kernels(name: str, parameter: Tensor) -> bool:
    """The convolutions inside an autoencoder, not those that meet pixels or latents."""
    edge = any(part in name for part in ("conv_in", "conv_out", "quant_conv"))
    return parameter.ndim >= 4 and parameter[0].numel() > 1 and not edge


class Optimizers:
    """What updates a module: Muon where `is_matrix` says so, AdamW elsewhere.

    The module itself may be bf16: gradients are raised to float32, masters updated, weights rounded once.
    """

    def __init__(
        self, module: nn.Module, *, lr: float, lr_rest: float, betas: tuple[float, float] = (0.9, 0.95),
        is_matrix: Callable[[str, Tensor], bool] = in_blocks,
    ):
        self._parameters = dict(module.named_parameters())
        self.masters = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        self._lr, self._lr_rest = lr, lr_rest
        self._muon = Muon({name: m for name, m in self.masters.items() if is_matrix(name, m)})
        rest = [m for name, m in self.masters.items() if name not in self._muon.momentum]
        self._adamw = torch.optim.AdamW(rest, lr=lr_rest, betas=betas, weight_decay=0.0, fused=True)
        self._taken = 0

    def backward(self, loss: Tensor) -> None:
        """Differentiate by every parameter; one that does not take part has no gradient: zero."""
        parameters = list(self._parameters.values())
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        torch._foreach_copy_([master.grad for master in self.masters.values()], grads)

    @torch.no_grad()
    def step(self, factor: float, max_norm: float = 1.0) -> None:
        """Average the gradients over processes, clip them, update with the rates times `factor`, write back."""
        average([master.grad for master in self.masters.values()])
        nn.utils.clip_grad_norm_(list(self.masters.values()), max_norm, foreach=True)
        self._taken += 1
        factor *= min(1.0, self._taken / WARM_UP)
        self._muon.step(self._lr * factor)
        for group in self._adamw.param_groups:
            group["lr"] = self._lr_rest * factor
        self._adamw.step()
        self._write_back()

    def state(self) -> dict[str, Any]:
        return {
            "masters": self.masters, "muon": self._muon.momentum, "adamw": self._adamw.state_dict(),
            "taken": self._taken,
        }

    def load(self, state: dict[str, Any]) -> None:
        copy_tensors(self.masters, state["masters"])
        copy_tensors(self._muon.momentum, state["muon"])
        self._adamw.load_state_dict(state["adamw"])
        self._taken = state["taken"]
        self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        torch._foreach_copy_(list(self._parameters.values()), list(self.masters.values()))
