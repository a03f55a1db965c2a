"""From a checked config to what runs: everything decided before a weight is read, then the networks.

Nothing below this file sees a config object.
"""
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline.acceleration import Acceleration
from pipeline.chunkwise import ChunkwisePipeline
from pipeline.decoder import TinyDecoder, choose_decoder
from pipeline.loops import Loop, make_loop
from pipeline.packets import Packer, TrainedBranch, choose_branch
from pipeline.presets import FULL, MemoryPreset
from pipeline.sampler import FewStepSampler
from utils.config import Config, ConfigError, ModelSpec, load_model_spec
from utils.devices import choose_dtype, dtype_name
from utils.hashing import content_hash
from wan.backends import AttentionBackend, load_backend
from wan.checkpoint import CheckpointError, check_transformer
from wan.compressor import HighResolutionBranch, check_branch
from wan.fp8 import FP8
from wan.geometry import VideoGeometry
from wan.kv_cache.cache import KVCache
from wan.kv_cache.policy import KVPolicy, build_policy
from wan.kv_cache.store import CacheShape
from wan.lora import check_lora
from wan.model import CausalWanModel, WanConfig
from wan.prompt_tokens import load_tokenizer
from wan.text_encoder import check_text_encoder
from wan.vae import WanVAE, check_vae

logger = logging.getLogger(__name__)

REAL, EMBEDDED = "wan2.1_t2v_1.3b", "tiny"
EAGER = Acceleration.eager()


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run, decided and checked: what is computed, where, and from which files."""

    config: Config
    spec: ModelSpec
    architecture: WanConfig
    geometry: VideoGeometry
    policy: KVPolicy
    sampler: FewStepSampler
    loop: Loop
    device: torch.device
    decoder_device: torch.device  # where latents become pixels, and the source's pixels latents
    dtype: torch.dtype
    use_ema: bool  # only where the checkpoint has something to choose from
    random_weights: bool  # seeded noise instead of files, for benchmarks
    tiny_decoder: TinyDecoder | None  # None: the VAE decodes
    branch: TrainedBranch | None      # of a compressor that was trained
    acceleration: Acceleration
    memory: MemoryPreset = FULL

    @property
    def decoder_latents(self) -> int:
        """Latent frames that a fast decoder takes a call."""
        return self.memory.decoder_latents or self.geometry.chunk_frames

    @property
    def decodes_aside(self) -> bool:
        """Frames are made while the transformer goes on; not where it needs their pixels."""
        return not self.loop.needs_pixels and (self.acceleration.overlap or self.decoder_device != self.device)

    @property
    def decoder_name(self) -> str:
        """As a record and --decoder call it."""
        return "wan" if self.tiny_decoder is None else self.tiny_decoder.kind

    def cache_shape(self, batch: int) -> CacheShape:
        a = self.architecture
        return CacheShape(
            layers=a.num_layers, heads=a.num_heads, head_dim=a.head_dim, batch=batch,
            device=self.device, dtype=self.dtype,
            store_dtype=FP8 if self.memory.narrow_store else None,
            window_dtype=FP8 if self.acceleration.fp8_attention else None,
        )

    @property
    def attention_backend(self) -> AttentionBackend:
        return load_backend(self.acceleration.attention, self.device, self.dtype, self.architecture.head_dim)[1]

    def pipeline(
        self, model: CausalWanModel, batch: int, load_vae: Callable[[], WanVAE], branch: HighResolutionBranch | None,
    ) -> ChunkwisePipeline:
        """The loop over an empty cache for `batch` videos.

        Args:
            model: with finished weights, in place, after `acceleration.prepare`.
            load_vae: for loops and compressors that read or make pixels; called when one does.
            branch: of a trained compressor, where the policy needs one.
        """
        shape = self.cache_shape(batch)
        cache = KVCache(
            shape, self.geometry, self.policy, compiler=self.acceleration.cache_compiler(shape),
            shared_window=self.memory.shared_window,
        )
        pipeline = self.loop.pipeline(
            model, cache, encode=lambda pixels: load_vae().encode(pixels),
            recorder=self.acceleration.recorder(self.device),
        )
        compression = self.policy.compression
        if compression is not None and not compression.is_pooled:
            pipeline.packer = Packer(
                model, cache, self.policy.sizes(self.geometry).archive.grid, compression, self.sampler.context_time,
                vae=load_vae() if compression.reads_pixels else None, branch=branch,
            )
        return pipeline

    @cached_property
    def weights(self) -> dict[str, str]:
        """Content hash of each part's files; large files are hashed once and remembered."""
        spec = self.spec
        more = {} if self.tiny_decoder is None else {self.tiny_decoder.kind: self.tiny_decoder.path}
        more |= {} if self.branch is None else {"compressor": self.branch.path}
        if self.random_weights:
            return dict.fromkeys(["transformer", "text_encoder", "vae", *more], "random")
        parts = {
            "transformer": spec.checkpoint, "text_encoder": spec.text_encoder, "tokenizer": spec.tokenizer,
            "vae": spec.vae, **more, **({} if spec.lora is None else {"lora": spec.lora}),
        }
        return {part: content_hash(path) for part, path in parts.items()}

    def settings(self) -> dict[str, Any]:
        """What decides the pixels besides prompt, seed and length; plain data."""
        config = {key: value for key, value in self.config.resolved().items() if key != "model"}
        chosen = {"height": self.geometry.height, "width": self.geometry.width, "dtype": dtype_name(self.dtype)}
        return {
            "config": config | chosen, "transformer": dataclasses.asdict(self.architecture), "fps": self.geometry.fps,
            "use_ema": self.use_ema, "weights": self.weights,
            **({} if self.spec.lora is None else {"lora_alpha": self.spec.lora_alpha}),
            **({"fp8": True} if self.acceleration.fp8 else {}),
            **({"fp8_store": True} if self.memory.narrow_store else {}),
        }


def plan_run(
    config: Config, *, checkpoint: Path | None, use_ema: bool, device: torch.device, random_weights: bool,
    decoder: str = "wan", decoder_path: Path | None = None, acceleration: Acceleration = EAGER,
    lora: Path | None = None, lora_alpha: float | None = None,
    vae_device: torch.device | None = None,
) -> RunPlan:
    """Decide and check everything that needs no weights.

    Args:
        checkpoint: transformer weights that replace the model's own; None for those.
        device: from `choose_device`.
        use_ema: of a checkpoint that has averaged weights, those; the model's own checkpoint may ask for them as well.
        lora: merged into the transformer, scaled by `lora_alpha` over its rank (None: 1); without it the model's own,
            if the checkpoint is not replaced.
        decoder: one of pipeline.decoder.NAMES; `wan` is the VAE's own.
        decoder_path: weights of a tiny decoder that replace those that the model names.
        acceleration: as asked for.
        vae_device: from `choose_vae_device`; None: `device`.
    Raises:
        ConfigError: a model or size that cannot be used, or files that are missing, with the command that gets them.
        wan.checkpoint.CheckpointError: a checkpoint that is damaged or belongs to another network.
    """
    if lora_alpha is not None and (lora is None or not lora_alpha > 0):
        raise ConfigError(f"--lora_alpha {lora_alpha:g} scales --lora_path: give both, and a number above 0.")
    spec = choose_model(config, checkpoint, random_weights)
    if lora is not None:
        spec = dataclasses.replace(spec, lora=Path(lora), lora_alpha=lora_alpha)
    try:
        architecture = WanConfig(**spec.transformer)
        geometry = VideoGeometry(
            height=config.height or spec.height, width=config.width or spec.width, fps=spec.fps,
            chunk_frames=config.num_frame_per_block, independent_first_frame=config.independent_first_frame,
            patch=architecture.patch_size[1:], spatial_stride=spec.spatial_stride,
            temporal_stride=spec.temporal_stride,
        )
        settings = dict(config.kv_cache)
        policy = build_policy(settings.pop("policy"), settings)
        sampler = FewStepSampler(
            config.denoising_step_list, config.timestep_shift, config.warp_denoising_step, config.context_noise,
        )
        loop = make_loop(
            config.pipeline, geometry=geometry, policy=policy, sampler=sampler, on_switch=config.on_switch,
            overlap_frames=config.overlap_frames,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    dtype = choose_dtype(config.dtype, device)
    plan = RunPlan(
        config=config, spec=spec, architecture=architecture, geometry=geometry, policy=policy, sampler=sampler,
        loop=loop, device=device, decoder_device=vae_device or device, dtype=dtype,
        use_ema=use_ema or spec.use_ema, random_weights=random_weights,
        tiny_decoder=choose_decoder(spec, decoder, decoder_path, random_weights),
        branch=choose_branch(policy, geometry, architecture, spec),
        acceleration=acceleration.resolved(device, dtype, architecture.head_dim),
    )
    chosen = False if random_weights else check_files(plan, named=checkpoint is not None)
    return dataclasses.replace(plan, use_ema=plan.use_ema and chosen)


def choose_model(config: Config, checkpoint: Path | None, random_weights: bool) -> ModelSpec:
    """The config's model; `auto` is its base_model if that one's checkpoint is there or named, else the tiny one."""
    if config.model != "auto":
        spec = load_model_spec(config.model)
    else:
        spec = load_model_spec(config.base_model)
        embedded = load_model_spec(EMBEDDED)
        if not (random_weights or checkpoint or spec.checkpoint.exists()):
            if not embedded.checkpoint.exists():
                raise ConfigError(
                    f"no weights: {spec.checkpoint} is not there, nor is the embedded model "
                    f"({embedded.checkpoint}). Get them with: {spec.download}"
                )
            logger.info(
                "no checkpoint at %s: using the embedded tiny model. The real one: %s", spec.checkpoint, spec.download
            )
            spec = embedded
        elif checkpoint:
            logger.info("--checkpoint_path without --set model=... is taken for the model %s", config.base_model)
    if checkpoint is None:
        return spec
    # What goes with the model's own checkpoint does not go with another.
    return dataclasses.replace(spec, checkpoint=Path(checkpoint), use_ema=False, lora=None, lora_alpha=None)


def check_files(plan: RunPlan, *, named: bool) -> bool:
    """Every file is there and fits the model; headers only, so that a wrong file costs seconds.

    Args:
        named: the checkpoint was given with --checkpoint_path.
    Returns: whether use_ema chooses anything in the checkpoint.
    Raises:
        ConfigError: a file is missing.
        CheckpointError: a file is damaged, or belongs to another model.
    """
    spec, a = plan.spec, plan.architecture
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in CausalWanModel(a).state_dict().items()}
    with _advice(spec, "checkpoint", spec.checkpoint, other_model=named and plan.config.model == "auto"):
        chosen = check_transformer(spec.checkpoint, expected, use_ema=plan.use_ema)
    with _advice(spec, "text encoder", spec.text_encoder):
        check_text_encoder(spec.text_encoder, a.text_dim)
    with _advice(spec, "tokenizer", spec.tokenizer):
        load_tokenizer(spec.tokenizer)
    with _advice(spec, "VAE", spec.vae):
        check_vae(
            spec.vae, latent_channels=a.out_dim, temporal_stride=spec.temporal_stride,
            spatial_stride=spec.spatial_stride,
        )
    if spec.lora is not None:
        with _advice(spec, "LoRA", spec.lora):
            check_lora(spec.lora, expected)
    if plan.tiny_decoder is not None:
        plan.tiny_decoder.check(a.out_dim)
    if plan.branch is not None:
        check_branch(plan.branch.path, plan.branch.sizes)
    return chosen


@contextmanager
def _advice(spec: ModelSpec, part: str, path: Path, *, other_model: bool = False) -> Iterator[None]:
    """What a file's errors lack: how to get it, and that the weights may be another model's."""
    if not path.exists():
        raise ConfigError(f"{part} {path} is not there. Correct its path, or get the model's own with: {spec.download}")
    try:
        yield
    except CheckpointError as error:
        gap = "\n" if "\n" in str(error) else " "
        hint = f" For weights of the embedded model add --set model={EMBEDDED}." if other_model else ""
        raise CheckpointError(
            f"{error}{gap}It was read as the {part} of the model {spec.name}, whose own comes with: "
            f"{spec.download}.{hint}"
        ) from error
