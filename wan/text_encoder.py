"""Prompts -> embeddings, and a disk cache of embeddings so that a second run needs no encoder.

The encoder is transformers' UMT5EncoderModel; the weights may have Wan's original names or Hugging
Face's. Each prompt is encoded alone and unpadded, so that its embedding never depends on the
prompts beside it.

T text tokens kept (text_len), D text width.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_bytes
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from utils.files import write_atomically
from wan.checkpoint import CheckpointError, NetworkFiles, check_fit, load_strictly
from wan.names import strip_wrappers, t5_to_transformers
from wan.prompt_tokens import PromptTokens, clean_prompt

log = logging.getLogger(__name__)

FILES = NetworkFiles(
    kind="text encoder", subfolder="text_encoder", mark=("model_type", "umt5"), original="token_embedding.weight",
    patterns=("models_t5*",),
)


class TextEncoder:
    """umT5 encoder, and what turns prompts into its ids."""

    def __init__(self, encoder: UMT5EncoderModel, words: PromptTokens | None) -> None:
        self._encoder = encoder.eval().requires_grad_(False)
        self._words = words

    @classmethod
    def load(
        cls, path: Path, *, words: PromptTokens | None, device: torch.device | str, dtype: torch.dtype,
    ) -> TextEncoder:
        """Load an encoder.

        Args:
            path: `models_t5_*.pth` or another file with original names, a folder that holds one, a Hugging
                Face folder (config.json beside its weights), or a repository with `text_encoder/`.
            words: the tokenizer, and the tokens that a prompt is cut and padded to; without it only `encode_ids` works.
            dtype: float32 or bfloat16.
        Raises:
            CheckpointError: missing, damaged or unsafe files, or weights that do not fit.
            ValueError: a dtype that umT5 overflows in.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"text encoder dtype {dtype}: umT5 overflows in half precision. Use torch.bfloat16 or torch.float32."
            )
        config, tensors = _read_encoder(path)
        encoder = _skeleton(config, source=path)  # on meta: weights come one by one, and are never held twice
        load_strictly(encoder, tensors, source=path, device=device, dtype=dtype)
        return cls(encoder, words)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts.

        Returns: [B, T, D] on the encoder's device and in its dtype; zeros past each prompt's end.
        A prompt of more than T tokens is cut, keeping its end mark; `PromptTokens.warn` says what is lost.
        Raises:
            ValueError: the tokenizer makes ids that the encoder has no embedding for.
            RuntimeError: the encoder was made without a tokenizer.
        """
        if self._words is None:
            raise RuntimeError("this text encoder has no tokenizer. Load it with words=, or call encode_ids.")
        rows = [self._words.ids(prompt) for prompt in prompts]
        ids = torch.zeros(len(rows), self._words.text_len, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[number, : len(row)] = 1
        return self.encode_ids(ids, mask)

    @torch.no_grad()
    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embed token ids [B, L], of which each row uses as many as its `mask` [B, L] has ones, from the left.

        Returns: [B, L, D] as `encode`. Raises: as `encode`.
        """
        weight = self._encoder.shared.weight
        if ids.numel() and int(ids.max()) >= weight.shape[0]:
            raise ValueError(
                f"token id {int(ids.max())} does not suit an encoder of {weight.shape[0]} ids. "
                "Give the tokenizer that belongs to this text encoder."
            )
        embeddings = torch.zeros(*ids.shape, weight.shape[1], device=weight.device, dtype=weight.dtype)
        for row, tokens, used in zip(embeddings, ids.to(weight.device), mask.cpu().sum(dim=1), strict=True):
            if length := int(used):
                row[:length] = self._encoder(input_ids=tokens[None, :length]).last_hidden_state[0]
        return embeddings


# -- weights -----------------------------------------------------------------------------------


def _skeleton(config: Mapping[str, Any], *, source: Path) -> UMT5EncoderModel:
    """The encoder that `config` describes, on meta. Raises: CheckpointError, if it describes none."""
    try:
        with torch.device("meta"):
            encoder = UMT5EncoderModel(UMT5Config.from_dict(dict(config)))
    except Exception as error:  # a wrong value can fail anywhere inside
        raise CheckpointError(
            f"{source}: its config.json describes no umT5 encoder ({type(error).__name__}: {error}). Download it again."
        ) from error
    # Some transformers releases leave these two untied; untied, the second would count as missing.
    encoder.encoder.set_input_embeddings(encoder.shared)
    return encoder


def check_text_encoder(path: Path, text_dim: int) -> None:
    """Compare an encoder's files with what the transformer reads, without reading the weights.

    Raises:
        CheckpointError: as `TextEncoder.load`, or embeddings of another width than `text_dim`.
    """
    config, tensors = _read_encoder(path, meta=True)
    encoder = _skeleton(config, source=path)
    check_fit(path, tensors, {name: parameter.shape for name, parameter in encoder.named_parameters()})
    if encoder.config.d_model != text_dim:
        raise CheckpointError(
            f"{path}: this text encoder makes embeddings of width {encoder.config.d_model}, and the transformer reads "
            f"text_dim={text_dim}. Give the encoder that belongs to the model, or correct the YAML."
        )


def _from_original(tensors: Mapping[str, Tensor], *, source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Original Wan names -> the configuration that the shapes imply, and transformers' names.

    Source: umT5 as Wan2.1 uses it; bucket distance and epsilon leave no trace in the shapes.
    Raises:
        CheckpointError: these are not an umT5 encoder's tensors.
    """
    tensors = {strip_wrappers(name): value for name, value in tensors.items()}
    layers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    try:
        vocabulary, width = tensors["token_embedding.weight"].shape
        buckets, heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape
        config = {
            "vocab_size": vocabulary, "d_model": width, "num_layers": len(layers), "num_heads": heads,
            "d_kv": tensors["blocks.0.attn.q.weight"].shape[0] // heads,
            "d_ff": tensors["blocks.0.ffn.fc1.weight"].shape[0],
            "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128,
            "layer_norm_epsilon": 1e-6, "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False, "use_cache": False,
        }
    except KeyError as error:
        raise CheckpointError(
            f"{source}: not a umT5 encoder with original names ({error} is missing). "
            "Give models_t5_umt5-xxl-enc-bf16.pth, or a Hugging Face folder with its config.json."
        ) from error
    return config, {t5_to_transformers(name): value for name, value in tensors.items()}


def count_parameters(path: Path) -> int:
    """Numbers in the encoder at `path`; headers alone are read."""
    return sum(tensor.numel() for tensor in _read_encoder(path, meta=True)[1].values())


def _read_encoder(path: Path, *, meta: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, tensors = FILES.read(path, meta=meta)
    if config is None:
        return _from_original(tensors, source=path)
    tied = tensors.pop("encoder.embed_tokens.weight", None)  # the second name of the embedding
    if tied is not None:
        tensors.setdefault("shared.weight", tied)
    return config, {  # without the decoder of a full model
        name: value for name, value in tensors.items() if not name.startswith(("decoder.", "lm_head."))
    }


# -- cache -------------------------------------------------------------------------------------


def up_to_its_end(embedding: Tensor) -> Tensor:
    """The rows [t, D] of an embedding [T, D] up to the last that is not zero, at least one; in memory of their own."""
    used = embedding.ne(0).any(dim=1) * torch.arange(1, embedding.shape[0] + 1, device=embedding.device)
    return embedding[: max(1, int(used.max()))].clone()


def filled_up(rows: Tensor, text_len: int) -> Tensor:
    """The embedding [text_len, D] that such rows [t, D] are the beginning of."""
    return torch.cat([rows, rows.new_zeros(text_len - rows.shape[0], rows.shape[1])])


class EmbeddingCache:
    """Prompt embeddings on disk, one file each, named by content.

    Args:
        folder: made when the first embedding is stored.
        encoder_id: whatever fixes the embedding besides the prompt: weights, tokenizer, dtype.
        text_len: T.
    Only rows up to the prompt's end are stored; the zeros after it are added again on reading.
    A file that is damaged or belongs to another prompt counts as absent.
    """

    def __init__(self, folder: Path, encoder_id: str, text_len: int) -> None:
        self._folder = folder
        self._encoder_id = encoder_id
        self._text_len = text_len

    def get(self, prompt: str) -> Tensor | None:
        """The stored embedding [T, D] on the CPU in its stored dtype, or None."""
        identity = self._identity(prompt)
        file = self._file(identity)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as entry:
                rows, about = entry.get_tensor("embedding"), entry.metadata()
            whole = about == {"identity": identity, "sha256": _digest(rows)}
        except (OSError, SafetensorError) as error:
            whole = False
            log.debug("%s: %s", file, error)
        if not whole:
            log.warning("%s is damaged or unreadable; encoding its prompt again", file)
            return None
        return filled_up(rows, self._text_len)

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Store an embedding [T, D], whole or not at all.

        Raises:
            ValueError: not T rows.
            OSError: the folder cannot be written.
        """
        if embedding.ndim != 2 or embedding.shape[0] != self._text_len:
            raise ValueError(
                f"embedding of shape {list(embedding.shape)}: the cache holds [{self._text_len}, width] for one prompt."
            )
        identity = self._identity(prompt)
        rows = up_to_its_end(embedding.detach().cpu())
        self._folder.mkdir(parents=True, exist_ok=True)
        content = save_bytes({"embedding": rows}, {"identity": identity, "sha256": _digest(rows)})
        write_atomically(self._file(identity), content)

    def _identity(self, prompt: str) -> str:
        return json.dumps([clean_prompt(prompt), self._encoder_id, self._text_len])

    def _file(self, identity: str) -> Path:
        return self._folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.safetensors"


def _digest(rows: Tensor) -> str:
    return hashlib.sha256(rows.view(torch.uint8).numpy()).hexdigest()


def embed_prompts(
    prompts: Sequence[str], cache: EmbeddingCache, words: PromptTokens, load_encoder: Callable[[], TextEncoder]
) -> dict[str, Tensor]:
    """Embed every prompt, from the cache where possible; `words` warns of what the model cannot read of it.

    `load_encoder` is called only if an embedding is missing, and the encoder is freed before this returns.
    Returns: prompt -> [t, D] on the CPU, without the zeros that fill it up (see `filled_up`).
    """
    embeddings = {prompt: None if (found := cache.get(prompt)) is None else up_to_its_end(found) for prompt in prompts}
    for prompt in embeddings:
        words.warn(prompt)
    missing = [prompt for prompt, embedding in embeddings.items() if embedding is None]
    if not missing:
        return embeddings
    encoder = load_encoder()
    try:
        for prompt in missing:
            embedding = encoder.encode([prompt])[0].cpu()
            embeddings[prompt] = up_to_its_end(embedding)
            try:
                cache.put(prompt, embedding)
            except OSError as error:  # the cache saves time; without it the run is as good
                log.warning("cannot store a prompt embedding (%s); the next run will encode it again", error)
    finally:
        del encoder
        gc.collect()  # modules hold reference cycles, and the memory is wanted now
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return embeddings
