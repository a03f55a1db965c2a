"""What a run will be, before anything loads: what its attention sees, and all of it in words."""
from __future__ import annotations

from itertools import islice

from pipeline import memory
from pipeline.build import RunPlan
from pipeline.loops import Length
from utils.devices import dtype_name

PREVIEW_CHUNKS = 24


def describe(plan: RunPlan, length: Length, batch: int) -> str:
    """The resolved plan in words, for --dry_run."""
    g, sizes = plan.geometry, plan.policy.sizes(plan.geometry)
    windows = list(islice(plan.loop.windows(length.latent_frames, length.given_frames), PREVIEW_CHUNKS + 1))
    shown = ", ".join(f"{frames:g}" for frames in windows[:PREVIEW_CHUNKS])
    shown += ", ..." if len(windows) > PREVIEW_CHUNKS else ""
    times = ", ".join(f"{time:g}" for time in plan.sampler.times)
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
        f"{'CUDA graphs' if plan.acceleration.graphs else 'no CUDA graphs'}, "
        f"{'8-bit layers (approximate), ' if plan.acceleration.fp8 else ''}decoding on {plan.decoder_device} "
        f"{'beside the transformer' if plan.decodes_aside else 'between its chunks'}",
        f"window    {shown} frames, chunk by chunk; at most {sizes.window_tokens} tokens attended, "
        f"{sizes.capacity_tokens} stored",
        f"memory    {memory.words(plan, batch)}",
    ]
    if length.notice:
        lines.insert(2, f"          {length.notice}")
    return "\n".join(lines)
