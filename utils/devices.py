"""Devices and dtypes by the names that users give them."""
from __future__ import annotations

import torch

from utils.config import ConfigError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is a GPU if there is one; without a number it is that of this process (`local_rank`).

    Raises:
        ConfigError: a GPU was asked for and none is usable, or the name is none of torch's.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = _usable_device("--device", name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def choose_vae_device(name: str, device: torch.device) -> torch.device:
    """Where the VAE works: `auto` is `device`, the transformer's.

    Raises:
        ConfigError: as `choose_device`, or another kind of device than the transformer's.
    """
    if name == "auto":
        return device
    chosen = _usable_device("--vae_device", name, device.index or 0)
    if chosen.type != device.type:
        raise ConfigError(
            f"--vae_device {name} is another kind of device than the transformer's, {device}. "
            f"Use auto or a device such as {'cuda:1' if device.type == 'cuda' else 'cpu'}."
        )
    return chosen


def _usable_device(flag: str, name: str, index: int) -> torch.device:
    """The device `name`, of that index unless it says one."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{flag} {name} is no device. Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{flag} {name} is not supported. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device("cuda", index if device.index is None else device.index)
        if device.index >= count:
            raise ConfigError(
                f"{flag} {name}: this process sees {count} CUDA devices (torch {torch.__version__}). "
                "Check nvidia-smi and that torch was installed with CUDA, or use --device cpu with the tiny model."
            )
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; by default bfloat16 on a GPU, float32 on a CPU."""
    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def dtype_name(dtype: torch.dtype) -> str:
    """As a config writes it."""
    return str(dtype).removeprefix("torch.")
