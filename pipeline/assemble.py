"""From a resolved plan and a loaded network to the loop that runs it."""
from __future__ import annotations

from collections.abc import Callable

from pipeline.build import RunPlan
from pipeline.chunkwise import ChunkwisePipeline
from pipeline.packets import make_packer
from wan.compressor import HighResolutionBranch
from wan.model import CausalWanModel
from wan.vae import WanVAE


def assemble(
    plan: RunPlan, model: CausalWanModel, batch: int, load_vae: Callable[[], WanVAE],
    branch: HighResolutionBranch | None,
) -> ChunkwisePipeline:
    """The plan's loop over an empty cache for `batch` videos.

    Args:
        model: with finished weights, in place, after `plan.acceleration.prepare`.
        load_vae: for loops and compressors that read or make pixels; called when one does.
        branch: of a trained compressor, where the policy needs one.
    """
    speed = plan.acceleration
    cache = speed.cache(
        plan.cache_shape(batch), plan.geometry, plan.policy, shared_window=plan.memory.shared_window,
    )
    pipeline = plan.loop.pipeline(
        model, cache, encode=lambda pixels: load_vae().encode(pixels), recorder=speed.recorder(plan.device),
    )
    pipeline.packer = make_packer(
        model, cache, plan.geometry, plan.policy, plan.sampler.context_time, load_vae, branch,
    )
    return pipeline
