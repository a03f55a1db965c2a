"""A model in the embedded one's frame with much smaller networks, to be run with random weights."""
from __future__ import annotations

from pathlib import Path

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
