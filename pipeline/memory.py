"""What lives where, and how much memory that takes: known before anything is loaded.

Sizes come from the networks themselves, run on the meta device, where tensors have shapes and no data.
"""
from __future__ import annotations

import dataclasses
import logging
import os
from contextlib import suppress

import torch

from pipeline.build import RunPlan
from pipeline.presets import PRESETS
from pipeline.timeline import forget
from utils.config import ConfigError
from utils.footprint import FastKernels, LiveBytes
from wan.checkpoint import CheckpointError
from wan.fp8 import quantise_layers
from wan.geometry import ChunkSpan
from wan.kv_cache.archive import FIRST_PLACES
from wan.kv_cache.cache import KVCache
from wan.model import CausalWanModel
from wan.rope import phase_dtype
from wan.stream import to_uint8
from wan.text_encoder import count_parameters
from wan.tiny_vae import TinyVAE
from wan.vae import WanVAE

logger = logging.getLogger(__name__)

META = torch.device("meta")
RESERVE = 2**30  # of a GPU, for what no tensor shows: CUDA's context, libraries' work spaces, gaps between blocks
PLENTY = 3       # a device so many times as large as networks and cache needs no closer look
FULL_CHUNKS = 5  # the last before a window is full, the pruning ones after it, and one to spare
ENCODER = "text_encoder"


def estimate_bytes(plan: RunPlan, batch: int) -> dict[str, int]:
    """Memory on the transformer's device by part: what stays, from shapes alone, and the work space of each network.

    All are held at a time but `text_encoder`, which is freed before the others are loaded. Not in it: RESERVE.
    """
    parts = _fixed_bytes(plan, batch) | _transformer_bytes(plan, batch)
    if plan.decoder_device == plan.device:
        parts |= decoder_bytes(plan, batch)
    return parts | encoder_bytes(plan)


def needed_bytes(parts: dict[str, int]) -> int:
    """The most of these `parts` that is held at a time."""
    return max(parts.get(ENCODER, 0), sum(size for name, size in parts.items() if name != ENCODER))


def fit_memory(plan: RunPlan, name: str, batch: int) -> RunPlan:
    """The same run under the preset `name`; `auto` is the fastest that fits the device.

    Raises:
        ConfigError: the preset needs more than the device has, or all do.
    """
    names = list(PRESETS) if name == "auto" else [name]
    there, needs = device_bytes(plan.device), {}
    for preset in names:
        chosen = dataclasses.replace(plan, memory=PRESETS[preset])
        if _has_plenty(chosen, batch, there):
            return chosen
        needs[preset] = _need(chosen, batch)
        if needs[preset] <= there:
            if name == "auto" and chosen.memory.narrow_store:
                logger.warning(
                    "%s has %s: to fit, what is remembered is kept in 8-bit floats, which is approximate (--memory %s)",
                    plan.device, _gib(there), preset,
                )
            return chosen
    needs = {other: needs.get(other) or _need(dataclasses.replace(plan, memory=PRESETS[other]), batch)
             for other in PRESETS}
    sizes = ", ".join(f"--memory {preset} {_gib(size)}" for preset, size in needs.items())
    fitting = [preset for preset, size in needs.items() if size <= there]
    advice = f"Use --memory {fitting[0]}, or lower" if fitting else "Lower"
    tiny = [kind for kind in ("taehv", "lighttae") if getattr(plan.spec, kind) is not None]
    cheaper = f"--decoder {tiny[0]} is approximate and needs far less than the Wan VAE's own; " if tiny else ""
    raise ConfigError(
        f"{plan.geometry.width}x{plan.geometry.height} at --batch_size {batch} does not fit {plan.device}, which has "
        f"{_gib(there)}. Needed: {sizes}. {advice} the size, --batch_size or the frames in kv_cache; "
        f"{'' if plan.tiny_decoder else cheaper}--dry_run on a larger device shows what each part needs."
    )


def device_bytes(device: torch.device) -> int:
    """All memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _need(plan: RunPlan, batch: int) -> int:
    return needed_bytes(estimate_bytes(plan, batch)) + (RESERVE if plan.device.type == "cuda" else 0)


def _has_plenty(plan: RunPlan, batch: int, there: int) -> bool:
    """Whether what stays is so little that work space need not be counted, which takes a second."""
    return PLENTY * (sum(_fixed_bytes(plan, batch).values()) + sum(encoder_bytes(plan).values())) <= there


def _fixed_bytes(plan: RunPlan, batch: int) -> dict[str, int]:
    """Weights and cache, from shapes alone."""
    size, a = plan.dtype.itemsize, plan.architecture
    with META:
        model = CausalWanModel(a).to(plan.dtype)
        if plan.acceleration.fp8:
            quantise_layers(model)
    tensors = [*model.parameters(), *model.buffers()]
    sizes = plan.policy.sizes(plan.geometry)
    shape, values = plan.cache_shape(batch), 2 * a.dim * batch  # of a token's keys and values in a layer
    token = values * size
    stored, seen = (values * (dtype or plan.dtype).itemsize for dtype in (shape.store_dtype, shape.window_dtype))
    windows = 1 if plan.memory.shared_window else a.num_layers
    parts = {
        "transformer": sum(x.nbytes for x in tensors), "kv_store": sizes.capacity_tokens * a.num_layers * stored,
        "kv_window": sizes.window_tokens * windows * seen, "text": a.text_len * a.num_layers * token,
    }
    if sizes.averaged_tokens:
        parts["kv_average"] = sizes.averaged_tokens * a.num_layers * values * phase_dtype(plan.dtype).itemsize
    archive = sizes.archive
    if archive is not None and not (archive.offload and plan.device.type == "cuda"):
        parts["kv_archive"] = (archive.packets or FIRST_PLACES) * archive.grid.tokens * a.num_layers * token
    return parts


def _transformer_bytes(plan: RunPlan, batch: int) -> dict[str, int]:
    """Work space of a pass: one layer, in the loop's own spans until the window has been full and pruned; then what a
    change of prompt computes anew.

    While the window fills the cache runs alone: what it makes and keeps counts, and any pass of the network over a
    fuller window needs as much or more.
    """
    a, g = dataclasses.replace(plan.architecture, num_layers=1), plan.geometry
    shape = dataclasses.replace(plan.cache_shape(batch), layers=1, device=META)
    frames, limit = plan.policy.sizes(g).window_tokens // g.frame_tokens + 3 * g.chunk_frames, plan.policy.max_frames
    looks = plan.loop.looks(g.whole_chunks(frames if limit is None else min(frames, limit)))
    looks = [look for look in looks if limit is None or look.span.stop <= limit]
    quick = len(looks) - FULL_CHUNKS - plan.loop.joint_chunks + 1  # of a joint window the last ones empty it
    with META, torch.inference_mode(), FastKernels(), LiveBytes() as live:
        model = CausalWanModel(a).to(plan.dtype)
        if plan.acceleration.fp8:
            quantise_layers(model)
        cache = KVCache(shape, g, plan.policy, shared_window=plan.memory.shared_window)
        text = model.embed_text(torch.empty(batch, a.text_len, a.text_dim, dtype=plan.dtype))

        def see(span: ChunkSpan, *, lookahead: bool = False, is_quick: bool = False) -> None:
            cache.begin(span, lookahead=lookahead)
            if is_quick:
                size = batch, span.frames * g.frame_tokens, a.num_heads, a.head_dim
                cache.layer(0).extend(*(torch.empty(size, dtype=plan.dtype) for _ in range(3)))
            else:
                noise = torch.empty(batch, span.frames, a.in_dim, g.latent_height, g.latent_width)
                plan.sampler.clean(noise, model(noise, torch.empty(batch, span.frames), text, cache), 0)

        live.restart()
        begin = live.now
        for place, look in enumerate(looks):
            see(look.span, lookahead=look.lookahead, is_quick=place < quick)
            if look.lookahead and look.remembered is not None:
                see(look.remembered, is_quick=place < quick)
            if look.remembered is not None:
                cache.commit()
        for span in cache.spans_again(0, forget(cache, plan.loop.on_switch)):
            see(span)
            cache.commit()
    return {"transformer_work": live.peak - begin}


def decoder_bytes(plan: RunPlan, batch: int) -> dict[str, int]:
    """Weights, past and work space of what makes the pixels, from latents to uint8 frames."""
    g = plan.geometry
    with torch.no_grad(), FastKernels(), LiveBytes() as live:
        if plan.tiny_decoder is None:
            decoder = WanVAE.skeleton(plan.spec.vae, plan.dtype)
        else:
            decoder = TinyVAE.skeleton(plan.architecture.out_dim, plan.dtype)
        plan.acceleration.accelerate_decoder(decoder, plan.decoder_latents)
        stream, weights = decoder.stream(), live.now
        live.restart()
        for _ in range(2):  # of the first chunk less is made
            size = (batch, g.chunk_frames, plan.architecture.out_dim, g.latent_height, g.latent_width)
            to_uint8(stream.decode(torch.empty(size, device=META)))
        past = live.now - weights
    name = plan.decoder_name
    return {name: weights, f"{name}_past": past, f"{name}_work": live.peak - weights - past}


def encoder_bytes(plan: RunPlan) -> dict[str, int]:
    """Size of the text encoder as it is loaded, where it is used on the device and it is clear which its file is."""
    path = plan.spec.text_encoder
    if plan.random_weights or plan.memory.encoder_on_host:
        return {}
    with suppress(CheckpointError):  # a folder of several networks, which only its loader can read
        return {ENCODER: count_parameters(path) * plan.dtype.itemsize}
    return {}


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def words(plan: RunPlan, batch: int) -> str:
    """The estimate as a line."""
    parts = estimate_bytes(plan, batch)
    listed = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items())
    approximate = ", memories in 8-bit floats (approximate)" if plan.memory.narrow_store else ""
    return f"preset {plan.memory.name}{approximate}: {_gib(needed_bytes(parts))} at most, by estimate: {listed}"
