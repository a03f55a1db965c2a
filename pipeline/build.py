"""From a checked config to what runs: everything decided before a weight is read, then the networks.

Nothing below this file sees a config object.
"""
from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import wan.kv_cache.policies  # noqa: F401  (registers every policy)
from pipeline.acceleration import Acceleration
from pipeline.decoder import TinyDecoder, choose_decoder
from pipeline.packets import TrainedBranch, choose_branch
from pipeline.sampler import FewStepSampler
from utils.config import Config, ConfigError, ModelSpec, load_model_spec
from utils.hashing import fingerprint, sha256_file
from wan.backends import AttentionBackend
from wan.checkpoint import CheckpointError, check_transformer, weight_files
from wan.geometry import VideoGeometry
from wan.kv_cache.archive import FIRST_PLACES
from wan.kv_cache.cache import CacheShape, KVCache
from wan.kv_cache.policy import KVPolicy, build_policy
from wan.model import CausalWanModel, WanConfig

logger = logging.getLogger(__name__)

REAL, EMBEDDED = "wan2.1_t2v_1.3b", "tiny"
AS_FAST_AS_POSSIBLE = Acceleration()
PREVIEW_CHUNKS = 24
MOST_PIXEL_FRAMES = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run, decided and checked: what is computed, where, and from which files."""

    config: Config
    spec: ModelSpec
    architecture: WanConfig
    geometry: VideoGeometry
    policy: KVPolicy
    sampler: FewStepSampler
    device: torch.device
    dtype: torch.dtype
    use_ema: bool
    random_weights: bool  # seeded noise instead of files, for benchmarks
    tiny_decoder: TinyDecoder | None = None  # None: the VAE decodes
    branch: TrainedBranch | None = None      # of a compressor that was trained
    acceleration: Acceleration = Acceleration.eager()

    @property
    def decoder_name(self) -> str:
        """As a record and --decoder call it."""
        return "wan" if self.tiny_decoder is None else self.tiny_decoder.kind

    def cache_shape(self, batch: int) -> CacheShape:
        a = self.architecture
        return CacheShape(
            layers=a.num_layers, heads=a.num_heads, head_dim=a.head_dim, batch=batch,
            device=self.device, dtype=self.dtype,
        )

    @property
    def attention_backend(self) -> AttentionBackend:
        return self.acceleration.backend(self.device, self.dtype, self.architecture.head_dim)

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
            "vae": spec.vae, **more,
        }
        return {part: content_hash(path) for part, path in parts.items()}

    def settings(self) -> dict[str, Any]:
        """What decides the pixels besides prompt, seed and length; plain data."""
        config = {key: value for key, value in self.config.resolved().items() if key != "model"}
        chosen = {"height": self.geometry.height, "width": self.geometry.width, "dtype": dtype_name(self.dtype)}
        return {
            "config": config | chosen, "transformer": dataclasses.asdict(self.architecture), "fps": self.geometry.fps,
            "use_ema": self.use_ema, "weights": self.weights,
        }


def plan_run(
    config: Config, *, checkpoint: Path | None, use_ema: bool, device: torch.device, random_weights: bool,
    decoder: str = "wan", decoder_path: Path | None = None, acceleration: Acceleration = AS_FAST_AS_POSSIBLE,
) -> RunPlan:
    """Decide and check everything that needs no weights.

    Args:
        checkpoint: transformer weights that replace the model's own; None for those.
        device: from `choose_device`.
        decoder: one of pipeline.decoder.NAMES; `wan` is the VAE's own.
        decoder_path: weights of a tiny decoder that replace those that the model names.
        acceleration: as asked for.
    Raises:
        ConfigError: a model or size that cannot be used, or files that are missing, with the command that gets them.
        wan.checkpoint.CheckpointError: a checkpoint that is damaged or belongs to another network.
    """
    spec = choose_model(config.model, checkpoint, random_weights)
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
        policy.sizes(geometry)
        sampler = FewStepSampler(
            config.denoising_step_list, config.timestep_shift, config.warp_denoising_step, config.context_noise,
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    dtype = choose_dtype(config.dtype, device)
    plan = RunPlan(
        config=config, spec=spec, architecture=architecture, geometry=geometry, policy=policy, sampler=sampler,
        device=device, dtype=dtype, use_ema=use_ema, random_weights=random_weights,
        tiny_decoder=choose_decoder(spec, decoder, decoder_path, random_weights),
        branch=choose_branch(policy, geometry, architecture, spec),
        acceleration=acceleration.resolved(device, dtype, architecture.head_dim),
    )
    if not random_weights:
        check_files(plan)
    return plan


def choose_model(name: str, checkpoint: Path | None, random_weights: bool) -> ModelSpec:
    """The model that `name` means; `auto` is the 1.3B model if its checkpoint is there or named, else the tiny one."""
    if name != "auto":
        spec = load_model_spec(name)
    else:
        spec = load_model_spec(REAL)
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
    return spec if checkpoint is None else dataclasses.replace(spec, checkpoint=Path(checkpoint))


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is a GPU if there is one; without a number it is that of this process (`local_rank`).

    Raises:
        ConfigError: a GPU was asked for and none is usable, or the name is none of torch's.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name} is no device. Use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name} is not supported. Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= count:
            raise ConfigError(
                f"--device {name}: this process sees {count} CUDA devices (torch {torch.__version__}). "
                "Check nvidia-smi and that torch was installed with CUDA, or use --device cpu with the tiny model."
            )
        torch.cuda.set_device(device)
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; by default bfloat16 on a GPU, float32 on a CPU."""
    name = name or ("bfloat16" if device.type == "cuda" else "float32")
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def dtype_name(dtype: torch.dtype) -> str:
    """As a config writes it."""
    return str(dtype).removeprefix("torch.")


def check_files(plan: RunPlan) -> None:
    """Every file is there and the transformer's tensors fit; headers only, so that a wrong file costs seconds."""
    spec = plan.spec
    parts = {
        "checkpoint": spec.checkpoint, "text encoder": spec.text_encoder, "tokenizer": spec.tokenizer, "VAE": spec.vae,
    }
    for part, path in parts.items():
        if not path.exists():
            raise ConfigError(f"{part} {path} is not there. Get it with: {spec.download}")
    if plan.tiny_decoder is not None:
        plan.tiny_decoder.check(plan.architecture.out_dim)
    if plan.branch is not None:
        plan.branch.check()
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in CausalWanModel(plan.architecture).state_dict().items()}
    check_transformer(spec.checkpoint, expected, use_ema=plan.use_ema)


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder under their names."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return fingerprint({file.relative_to(path).as_posix(): sha256_file(file) for file in files})


# --- length -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Length:
    """How long a video becomes."""

    pixel_frames: int   # what the file is cut to
    asked_frames: int   # fewest latent frames that hold them
    latent_frames: int  # whole chunks, given frames included

    @property
    def notice(self) -> str | None:
        """One line if more is computed than was asked for."""
        if self.latent_frames == self.asked_frames:
            return None
        return (
            f"{self.asked_frames} latent frames are rounded up to {self.latent_frames}, whole chunks; "
            f"the file is cut to {self.pixel_frames} pixel frames"
        )


def asked_pixel_frames(plan: RunPlan, *, latent_frames: int, seconds: float | None) -> int:
    """The length asked for, in pixel frames; `seconds` goes before `latent_frames`.

    Raises:
        ConfigError: nothing, no number, or more than a video file can count.
    """
    g = plan.geometry
    if seconds is None:
        flag, amount = f"--num_output_frames {latent_frames}", latent_frames * g.temporal_stride
    else:
        flag, amount = f"--seconds {seconds}", seconds * g.fps
    if not 0 < amount <= MOST_PIXEL_FRAMES:
        raise ConfigError(
            f"{flag} is no length that a video can have. Ask for more than 0, and at most "
            f"{MOST_PIXEL_FRAMES // g.fps} seconds: an mp4 counts its frames in 32 bits."
        )
    return g.pixel_frames(latent_frames) if seconds is None else g.pixel_frames_of_seconds(seconds)


def video_length(plan: RunPlan, pixel_frames: int, *, given_frames: int) -> Length:
    """The length of a video that begins with `given_frames` latent frames, rounded up to whole chunks.

    Raises:
        ConfigError: nothing is left to generate, or it is longer than the policy can go.
    """
    g, limit = plan.geometry, plan.policy.max_frames
    asked = g.latent_frames(pixel_frames)
    if asked <= given_frames:
        raise ConfigError(
            f"the length asked for is {asked} latent frames, and {given_frames} are given: nothing is left to "
            "generate. Ask for more with --num_output_frames or --seconds."
        )
    whole = g.whole_chunks(asked, prefilled=given_frames)
    if limit is not None and whole > limit:
        raise ConfigError(
            f"the video needs {whole} latent frames, but kv_cache.policy=full keeps every frame and has a window of "
            f"{limit} (local_attn_size: -1 is defined up to the length of a training clip). Choose a policy that "
            "forgets, such as --policy rolling or configs/deep_forcing.yaml, or pay for the memory with "
            f"--set kv_cache.policy=full --set kv_cache.window_frames={whole}."
        )
    return Length(pixel_frames, asked, whole)


# --- what a run will do -------------------------------------------------------------------------------

def preview_windows(plan: RunPlan, length: Length) -> Iterator[float]:
    """Frames' worth of tokens that attention sees in each chunk, by running the real policy on tiny frames.

    A frame is one token, or as many as one compressed token stands for; window sizes are those of the real frames.
    """
    g, archive = plan.geometry, plan.policy.sizes(plan.geometry).archive
    side = 1 if archive is None else archive.grid.space
    unit = dataclasses.replace(
        g, height=side * g.spatial_stride * g.patch[0], width=side * g.spatial_stride * g.patch[1],
    )
    shape = CacheShape(layers=1, heads=1, head_dim=12, batch=1, device=torch.device("cpu"), dtype=torch.float32)
    cache = KVCache(shape, unit, plan.policy)
    for span in unit.chunks(length.latent_frames):
        cache.begin(span)
        token = torch.ones(1, span.frames * unit.frame_tokens, 1, 12)
        cache.layer(0).extend(token, token, token)
        seen = cache.layer(0).plan
        frames = seen.attend.shape[1] // unit.frame_tokens + span.frames
        packets = 0 if seen.packets is None else seen.packets.shape[1]
        yield frames + packets * archive.grid.tokens / g.frame_tokens if packets else frames
        cache.commit()


def estimate_bytes(plan: RunPlan, batch: int) -> dict[str, int]:
    """Memory of transformer and cache, from shapes alone."""
    size = plan.dtype.itemsize
    with torch.device("meta"):
        parameters = sum(p.numel() for p in CausalWanModel(plan.architecture).parameters())
    sizes = plan.policy.sizes(plan.geometry)
    token = 2 * plan.architecture.dim * plan.architecture.num_layers * size * batch  # keys and values of all layers
    parts = {
        "transformer": parameters * size, "kv_store": sizes.capacity_tokens * token,
        "kv_window": sizes.window_tokens * token,
    }
    if sizes.archive is not None and not (sizes.archive.offload and plan.device.type == "cuda"):
        parts["kv_archive"] = (sizes.archive.packets or FIRST_PLACES) * sizes.archive.grid.tokens * token
    return parts


def file_bytes(plan: RunPlan) -> dict[str, int]:
    """Size of the other networks' files, where it is clear which those are."""
    parts: dict[str, int] = {}
    if plan.random_weights:
        return parts
    networks = {"text_encoder (freed before generation)": plan.spec.text_encoder}
    if plan.tiny_decoder is None:
        networks["vae"] = plan.spec.vae
    else:
        networks |= {plan.tiny_decoder.kind: plan.tiny_decoder.path, "vae (loaded to encode a source)": plan.spec.vae}
    for name, path in networks.items():
        with suppress(CheckpointError):  # a folder of several networks, which only the loader of this one can read
            files = [path] if path.is_file() else weight_files(path, subfolder=path.name)
            parts[name] = sum(file.stat().st_size for file in files)
    return parts


def check_memory(plan: RunPlan, batch: int) -> None:
    """Raise ConfigError if transformer and cache alone need more memory than the device has."""
    need = sum(estimate_bytes(plan, batch).values())
    if plan.device.type == "cuda":
        there = torch.cuda.get_device_properties(plan.device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > there:
        raise ConfigError(
            f"{plan.geometry.width}x{plan.geometry.height} at --batch_size {batch} needs {need / 2**30:,.1f} GiB "
            f"for transformer and cache, and {plan.device} has {there / 2**30:,.1f} GiB. "
            "Lower the size, --batch_size or kv_cache.window_frames; --dry_run shows what each part needs."
        )


def describe(plan: RunPlan, length: Length, batch: int) -> str:
    """The resolved plan in words, for --dry_run."""
    g, sizes = plan.geometry, plan.policy.sizes(plan.geometry)
    windows = list(islice(preview_windows(plan, length), PREVIEW_CHUNKS + 1))
    shown = ", ".join(f"{frames:g}" for frames in windows[:PREVIEW_CHUNKS])
    shown += ", ..." if len(windows) > PREVIEW_CHUNKS else ""
    times = ", ".join(f"{time:g}" for time in plan.sampler.times)
    parts = estimate_bytes(plan, batch) | file_bytes(plan)
    memory = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items())
    weights = "random weights" if plan.random_weights else plan.spec.checkpoint
    seconds = length.pixel_frames / g.fps
    lines = [
        f"model     {plan.spec.name}, {weights}, {dtype_name(plan.dtype)} on {plan.device}",
        f"video     {g.width}x{g.height} at {g.fps} FPS, {length.pixel_frames} pixel frames = {seconds:.2f} s, "
        f"{length.latent_frames} latent frames of {g.frame_tokens} tokens",
        f"sampling  chunks of {g.chunk_frames}; timesteps {times}; context pass at {plan.sampler.context_time:g}",
        f"decoder   {plan.decoder_name}{'' if plan.tiny_decoder is None else ', approximate'}",
        f"policy    {plan.policy}",
        f"speed     attention by {plan.acceleration.attention}, "
        f"{'compiled' if plan.acceleration.compile else 'not compiled'}, "
        f"{'CUDA graphs' if plan.acceleration.graphs else 'no CUDA graphs'}",
        f"window    {shown} frames, chunk by chunk; at most {sizes.window_tokens} tokens attended, "
        f"{sizes.capacity_tokens} stored",
        f"memory    {memory}; the VAE's work space comes on top",
    ]
    if length.notice:
        lines.insert(2, f"          {length.notice}")
    return "\n".join(lines)
