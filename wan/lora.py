"""A LoRA on disk -> changes of linear layers, merged into the base weights while these are loaded.

Read as PEFT saves it, alone or under `generator_lora` of a training checkpoint: for each layer `lora_A.weight`
[rank, in] and `lora_B.weight` [out, rank], under the layer's name with any of the wrappers that wan/names.py knows.
A merged layer costs nothing at inference, and the sum is rounded once.

Source: LoRA, arXiv:2106.09685; LongLive, arXiv:2509.22622, publishes its second training stage so.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wan.checkpoint import CheckpointError, listed, read_tensors
from wan.names import strip_wrappers

GROUP = "generator_lora"
_NAME = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(\.[^.]+)?\.weight")  # PEFT adds the adapter's name, `default`


@dataclass(frozen=True)
class LoRA:
    """Low-rank changes: layer's weight name -> (A [rank, in], B [out, rank]); the change is alpha / rank B A."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    alpha: float | None  # None: the rank

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """`weight` [out, in] with its change, float32; any other tensor as it is."""
        if name not in self.pairs:
            return weight
        down, up = (part.float() for part in self.pairs[name])
        scale = 1.0 if self.alpha is None else self.alpha / len(down)
        return torch.addmm(weight.float(), up, down, alpha=scale)


def read_lora(path: Path, *, alpha: float | None = None, meta: bool = False) -> LoRA:
    """Read a LoRA.

    Args:
        path: a file, or a folder with one.
        alpha: what the change is scaled by, over the rank; None is the rank itself, a scale of 1.
        meta: headers alone; the tensors have no data.
    Raises:
        CheckpointError: missing or damaged file, no LoRA in it, or a layer with half of one.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in read_tensors(path, subfolder="lora", groups=(GROUP,), meta=meta).items():
        if match := _NAME.fullmatch(name):
            parts.setdefault(_layer(match["layer"]), {})[match["part"]] = value
    half = [name for name, pair in parts.items() if len(pair) != 2]
    if not parts or half:
        what = f"only half of the LoRA of {half[0]}" if half else f"no LoRA: no {GROUP}, no name ends in lora_A.weight"
        raise CheckpointError(
            f"{path}: holds {what}. A LoRA has lora_A.weight and lora_B.weight for each layer that it changes; "
            "a whole model goes to --checkpoint_path."
        )
    bent = [
        name for name, pair in parts.items()
        if pair["A"].ndim != 2 or pair["B"].ndim != 2 or pair["A"].shape[0] != pair["B"].shape[1]
    ]
    if bent:
        raise CheckpointError(
            f"{path}: the two halves of {bent[0]} have different ranks. The file is damaged; download it again."
        )
    return LoRA({name: (pair["A"], pair["B"]) for name, pair in parts.items()}, alpha)


def check_lora(path: Path, expected: Mapping[str, torch.Size]) -> None:
    """Compare a LoRA's layers with the model's `expected` shapes without reading its values.

    Raises:
        CheckpointError: as `read_lora`, or layers that the model does not have or that have another size there.
    """
    found = read_lora(path, meta=True).pairs
    unknown = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {up.shape[0]} x {down.shape[1]}, the model has {' x '.join(map(str, expected[name]))}"
        for name, (down, up) in found.items()
        if name in expected and (up.shape[0], down.shape[1]) != tuple(expected[name])
    ]
    if lines := listed((("not in the model", unknown), ("another size", misshapen))):
        raise CheckpointError("\n".join([
            f"{path}: this LoRA does not fit the model:", *lines,
            "Give the LoRA that belongs to this base checkpoint, or leave --lora_path out.",
        ]))


def _layer(name: str) -> str:
    """PEFT's name of a layer -> the original Wan name of its weight."""
    name = name.removeprefix("base_model.")
    while (stripped := strip_wrappers(name)) != name:
        name = stripped
    return f"{name}.weight"
