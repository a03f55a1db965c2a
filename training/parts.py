"""The three networks of the tiny model, made, embedded and exported in the layouts that inference loads."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from training.memory import dense
from training.settings import TextSettings, VaeSettings
from utils.config import ModelSpec
from wan.model import CausalWanModel, WanConfig, randomize

SHARD_BYTES = 12 * 2**20
LOG_VARIANCE = -5.0  # of a fresh autoencoder's latents
BIAS_NEVER = -8.0
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def make_vae(settings: VaeSettings, latent_channels: int) -> AutoencoderKLWan:
    """AutoencoderKLWan with a half-resolution patch stage; stride 4x8x8.

    It starts as an image autoencoder applied to every frame: only the newest tap of each temporal kernel is
    set, temporal resampling picks or repeats a frame, residual branches are silent.
    """
    vae = AutoencoderKLWan(
        base_dim=settings.base_dim, z_dim=latent_channels, dim_mult=[1, 2, 4], num_res_blocks=settings.num_res_blocks,
        temperal_downsample=[True, True], in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=8, scale_factor_temporal=4,
        latents_mean=[0.0] * latent_channels, latents_std=[1.0] * latent_channels,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                taps = module.weight.shape[2] if isinstance(module, nn.Conv3d) else 1
                nn.init.normal_(module.weight, std=(module.weight[0].numel() / taps) ** -0.5)
                nn.init.zeros_(module.bias)
                if taps > 1:
                    module.weight[:, :, :-1] = 0
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                module.conv2.weight.zero_()
            elif isinstance(module, WanAttentionBlock):
                module.proj.weight.zero_()
            elif isinstance(module, WanResample) and module.mode.endswith("3d"):
                identity = torch.eye(module.dim).repeat(module.time_conv.out_channels // module.dim, 1)
                module.time_conv.weight.zero_()
                module.time_conv.weight[:, :, -1, 0, 0] = identity
        vae.quant_conv.weight[latent_channels:] = 0  # log-variances: little noise from the start
        vae.quant_conv.bias[latent_channels:] = LOG_VARIANCE
    return vae


def make_transformer(architecture: WanConfig, seed: int) -> CausalWanModel:
    """A fresh causal DiT; the output starts at zero, so that the first flow is the mean flow."""
    model = CausalWanModel(architecture, dense)
    randomize(model, seed)
    with torch.no_grad():
        for block in model.blocks:
            block.modulation.normal_(0.0, 0.02)
            for name in ("self_attn.o", "cross_attn.o", "ffn.2"):
                block.get_submodule(name).weight.mul_((2 * architecture.num_layers) ** -0.5)
        model.head.head.weight.zero_()
        model.head.head.bias.zero_()
    return model


def make_tokenizer(words: Sequence[str], spellings: Sequence[tuple[str, str]] = ()) -> Tokenizer:
    """Whole lower-case words and punctuation marks; `spellings` (regular expression, text) are put right before."""
    vocabulary = {word: i for i, word in enumerate([PAD, END, UNKNOWN, ".", ",", "-", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Lowercase(), *(normalizers.Replace(Regex(said), meant) for said, meant in spellings),
    ])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])],
    )
    return tokenizer


def make_text_encoder(settings: TextSettings, text_dim: int, vocabulary: int) -> UMT5EncoderModel:
    """A small umT5 encoder whose heads look, in turn, at the word before, the word after, all before, anywhere.

    Words have no other order than the bias of their distance. Begun at nearly zero, it is learned slowly, and with
    it which colour is whose and which shape comes first; so it begins as slopes do in ALiBi (arXiv:2108.12409).
    """
    config = UMT5Config(
        vocab_size=vocabulary, d_model=text_dim, d_kv=text_dim // settings.heads, d_ff=settings.ffn_dim,
        num_layers=settings.layers, num_heads=settings.heads, dropout_rate=0.0, feed_forward_proj="gated-gelu",
    )
    encoder = UMT5EncoderModel(config)
    half = config.relative_attention_num_buckets // 2  # distances 0, 1, 2 ... to words before; then to words after
    nearer = -torch.arange(half, dtype=torch.float32)
    never = torch.full((half,), BIAS_NEVER)
    nearest = torch.cat([never[:1], nearer[1:]])       # the word itself left out
    looks = [
        torch.cat(parts) for parts in ((nearest, never), (never, nearest), (nearer * 0, never), (nearer * 0, never * 0))
    ]
    with torch.no_grad():
        for block in encoder.encoder.block:
            bias = block.layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]
            bias.copy_(torch.stack([looks[head % len(looks)] for head in range(settings.heads)], dim=1))
    return encoder


class CaptionEncoder(nn.Module):
    """Tokenizer and encoder for batches of captions, as wan/text_encoder.py does for one prompt at a time."""

    def __init__(self, tokenizer: Tokenizer, encoder: UMT5EncoderModel, text_len: int):
        super().__init__()
        self.encoder, self._tokenizer, self._text_len = encoder, tokenizer, text_len

    def tokens(self, captions: list[str]) -> Tensor:
        """Ids [B, T] on the CPU, zero-padded."""
        ids = torch.zeros(len(captions), self._text_len, dtype=torch.long)
        for row, encoding in zip(ids, self._tokenizer.encode_batch(captions), strict=True):
            kept = encoding.ids[:self._text_len]
            row[:len(kept)] = torch.tensor(kept)
        return ids

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [B, T, text_dim], zero past each caption's end."""
        mask = ids != 0
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask.unsqueeze(-1)


def save_shards(
    tensors: Mapping[str, Tensor], folder: Path, name_of: Callable[[int, int], str],
    metadata: dict[str, str] | None = None,
) -> dict[str, str]:
    """Write tensors as bf16 safetensors, in shards small enough for a repository.

    Args: name_of: of a file, by its index and how many there are.
    Returns: the file of every tensor.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for key, tensor in tensors.items():
        tensor = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][key] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    names = [name_of(index, len(shards)) for index in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata=metadata)
    return {key: name for name, shard in zip(names, shards, strict=True) for key in shard}


def export_transformer(state: dict[str, Tensor], folder: Path) -> None:
    """bf16 safetensors under the original names, with their index."""
    files = save_shards(
        state, folder, lambda index, count: f"diffusion_pytorch_model-{index + 1:05d}-of-{count:05d}.safetensors",
    )
    total = sum(tensor.numel() for tensor in state.values()) * torch.bfloat16.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def export_vae(vae: AutoencoderKLWan, mean: list[float], std: list[float], folder: Path) -> None:
    """A diffusers folder with the latents' statistics in its config, fp16."""
    vae.register_to_config(latents_mean=mean, latents_std=std, _name_or_path="")  # where it came from is no setting
    vae.half().save_pretrained(folder)
    vae.float()


def export_text(encoder: CaptionEncoder, text_encoder: Path, tokenizer: Path) -> None:
    """A Hugging Face folder and a tokenizer.json."""
    tokenizer.mkdir(parents=True, exist_ok=True)
    encoder.encoder.to(torch.bfloat16).save_pretrained(text_encoder)
    encoder.encoder.float()
    encoder._tokenizer.save(str(tokenizer / "tokenizer.json"))


def architecture_of(spec: ModelSpec) -> WanConfig:
    return WanConfig(**spec.transformer)
