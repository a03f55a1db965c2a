"""Tensor names: how other layouts call what the original Wan files call by another name.

Strings only; no tensors, no files. Each function maps one name and returns a name it does not
know unchanged, so that a strict comparison can show it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Left inside names by FSDP, activation checkpointing, torch.compile and DataParallel.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"})

# diffusers WanTransformer3DModel -> original. diffusers calls the affine cross-attention norm norm2.
_TRANSFORMER = (
    (r"condition_embedder\.time_embedder\.linear_1\.", r"time_embedding.0."),
    (r"condition_embedder\.time_embedder\.linear_2\.", r"time_embedding.2."),
    (r"condition_embedder\.text_embedder\.linear_1\.", r"text_embedding.0."),
    (r"condition_embedder\.text_embedder\.linear_2\.", r"text_embedding.2."),
    (r"condition_embedder\.time_proj\.", r"time_projection.1."),
    (r"scale_shift_table$", r"head.modulation"),
    (r"proj_out\.", r"head.head."),
    (r"(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"(blocks\.\d+)\.attn1\.to_out\.0\.", r"\1.self_attn.o."),
    (r"(blocks\.\d+)\.attn1\.(?:to_)?(norm_[qk]|[qkv])\.", r"\1.self_attn.\2."),
    (r"(blocks\.\d+)\.attn2\.to_out\.0\.", r"\1.cross_attn.o."),
    (r"(blocks\.\d+)\.attn2\.(?:to_)?(norm_[qk]|[qkv])\.", r"\1.cross_attn.\2."),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
)

# original Wan umT5 encoder -> transformers UMT5EncoderModel
_T5 = (
    (r"token_embedding\.", r"shared."),
    (r"norm\.", r"encoder.final_layer_norm."),
    (r"blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (r"blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)


def _first_match(table: Iterable[tuple[str, str]], name: str) -> str:
    for pattern, replacement in table:
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            return renamed
    return name


def strip_wrappers(name: str) -> str:
    """Remove wrapper parts anywhere in `name`, then one leading `model.` and one `diffusion_model.`."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    for prefix in ("model", "diffusion_model"):
        if len(parts) > 1 and parts[0] == prefix:
            parts = parts[1:]
    return ".".join(parts)


def is_diffusers_transformer(names: Iterable[str]) -> bool:
    """Whether names (wrappers stripped) follow diffusers' WanTransformer3DModel."""
    return any(name.startswith("condition_embedder.") for name in names)


def transformer_from_diffusers(name: str) -> str:
    """diffusers' WanTransformer3DModel name -> original Wan name."""
    return _first_match(_TRANSFORMER, name)


def t5_to_transformers(name: str) -> str:
    """Original Wan umT5 name -> transformers UMT5EncoderModel name."""
    return _first_match(_T5, name)
