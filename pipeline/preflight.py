"""What a run will be, before anything loads: what its attention sees, what memory it needs, in words."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

import torch

from pipeline.build import RunPlan, dtype_name
from pipeline.loops import Length
from utils.config import ConfigError
from wan.checkpoint import CheckpointError, weight_files
from wan.kv_cache.archive import FIRST_PLACES
from wan.model import CausalWanModel

PREVIEW_CHUNKS = 24


def preview_windows(plan: RunPlan, length: Length) -> Iterator[float]:
    """Frames that attention sees in each chunk, by running the real policy on a cache of one token a frame."""
    yield from plan.loop.windows(length.latent_frames)


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
    files = [plan.spec.checkpoint, *([] if plan.spec.lora is None else [plan.spec.lora])]
    weights = "random weights" if plan.random_weights else " + ".join(map(str, files))
    seconds = length.pixel_frames / g.fps
    lines = [
        f"model     {plan.spec.name}, {weights}, {dtype_name(plan.dtype)} on {plan.device}",
        f"video     {g.width}x{g.height} at {g.fps} FPS, {length.pixel_frames} pixel frames = {seconds:.2f} s, "
        f"{length.latent_frames} latent frames of {g.frame_tokens} tokens",
        f"pipeline  {plan.config.pipeline}; a later prompt of a timeline: {plan.config.on_switch}",
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
