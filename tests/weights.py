"""Small random weights in the layouts that users have, and a model YAML that points to them."""
from __future__ import annotations

from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import UMT5Config, UMT5EncoderModel

from wan.model import CausalWanModel, WanConfig, randomize

TRANSFORMER = WanConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=16, text_len=24, in_dim=4, out_dim=4,
)
WORDS = [
    "a", "the", "red", "blue", "green", "circle", "square", "star", "bounces", "spins", "on", "dark", "background",
    "slowly", "and", "then",
]


def make_transformer(path: Path) -> None:
    """diffusion_pytorch_model.safetensors under the original names."""
    model = CausalWanModel(TRANSFORMER)
    randomize(model, seed=3)
    path.mkdir(parents=True)
    save_file(model.state_dict(), path / "diffusion_pytorch_model.safetensors")


def make_vae(path: Path) -> None:
    """A diffusers folder: half-resolution patch stage, stride 4x8x8, four latent channels."""
    torch.manual_seed(4)
    AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=8, scale_factor_temporal=4,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 0.8, 1.2, 0.9],
    ).save_pretrained(path)


def make_text_encoder(path: Path) -> None:
    """A Hugging Face folder."""
    torch.manual_seed(5)
    config = UMT5Config(vocab_size=len(WORDS) + 3, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    UMT5EncoderModel(config).save_pretrained(path)


def make_tokenizer(path: Path) -> None:
    """A tokenizer.json of whole words."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    path.mkdir(parents=True)
    tokenizer.save(str(path / "tokenizer.json"))


def make_model(folder: Path) -> Path:
    """All four parts in `folder`; returns the model's YAML."""
    make_transformer(folder / "transformer")
    make_vae(folder / "vae")
    make_text_encoder(folder / "text_encoder")
    make_tokenizer(folder / "tokenizer")
    sizes = {name: getattr(TRANSFORMER, name) for name in TRANSFORMER.__dataclass_fields__}
    spec = {
        "transformer": sizes | {"patch_size": list(TRANSFORMER.patch_size)}, "height": 32, "width": 48, "fps": 16,
        "temporal_stride": 4, "spatial_stride": 8, "train_frames": 21, "download": "python -m utils.download",
        "checkpoint": str(folder / "transformer"), "text_encoder": str(folder / "text_encoder"),
        "tokenizer": str(folder / "tokenizer"), "vae": str(folder / "vae"), "prompts": "prompts/tiny.txt",
    }
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path
