"""A model in the embedded one's frame with much smaller networks, to be run with random weights; sweeps of it."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from training.parts import make_vae
from training.settings import VaeSettings
from utils.config import REPOSITORY


def write_small_model(folder: Path) -> Path:
    """Write the model's YAML, and the VAE config that it names; returns the YAML's path."""
    make_vae(VaeSettings(base_dim=4), 16).save_config(folder / "vae")
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({
        "extends": str(REPOSITORY / "configs" / "models" / "tiny.yaml"), "vae": str(folder / "vae"),
        "transformer": {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 1, "text_dim": 12, "text_len": 8},
    }))
    return path


def write_small_sweep(folder: Path, model: Path, **changed: Any) -> Path:
    """Write a sweep of one method and three captions, changed by keywords; returns its path."""
    sweep = {
        "seconds": [0.5], "model": str(model), "prompts": {"captions": [{"split": "test", "count": 3}]},
        "batch_size": 2, "methods": {"rolling": {"config": "configs/self_forcing.yaml"}}, "metrics": ["world"],
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep | changed))
    return path
