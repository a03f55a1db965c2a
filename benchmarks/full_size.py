"""The 1.3B model at full size with random weights: does it hold for ten minutes, and how exact is bf16?

    python -m benchmarks.full_size endurance --policy deep_forcing --seconds 600 --output endurance.json
    python -m benchmarks.full_size exactness --policy deep_forcing --seconds 60  --output exactness.json

endurance: the transformer alone (4 denoising passes + 1 context pass a chunk), with every device-to-host
    synchronisation inside a pass an error. A prune cycle is the chunks from one prune to the next; its time
    is their mean. Compared: the first minute of steady cycles and the last.
exactness: on every tenth chunk and the one before it (one prunes, the other does not), the bf16 model and a
    float32 twin start from one memory and one noise.
Timings do not depend on the weights. Results are one JSON with GPU, versions and command.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import wan.kv_cache.policies  # noqa: F401  (registers every policy)
from pipeline.build import RunPlan, plan_run
from pipeline.chunkwise import ChunkwisePipeline
from pipeline.noise import SampleSeed, SeededNoise
from utils.config import REPOSITORY, load_config
from wan.geometry import ChunkSpan
from wan.kv_cache.cache import KVCache
from wan.kv_cache.policy import build_policy, policy_fields
from wan.model import CausalWanModel, TextContext, randomize

COMPARED = (0, 9)  # of every ten chunks


def make_plan(policy: str, model: str, device: torch.device, dtype: str) -> RunPlan:
    """The run that `inference.py --random_weights` would make."""
    config = load_config(
        REPOSITORY / "configs" / f"{policy}.yaml", policy_fields=policy_fields(), build_policy=build_policy,
        overrides=[f"model={model}", f"dtype={dtype}"],
    )
    return plan_run(config, checkpoint=None, use_ema=False, device=device, random_weights=True)


def make_pipeline(plan: RunPlan) -> ChunkwisePipeline:
    """The transformer with seeded random weights, equal in every dtype up to rounding, and an empty cache."""
    with torch.device(plan.device):
        model = CausalWanModel(plan.architecture)
    randomize(model, seed=0)
    cache = KVCache(plan.cache_shape(1), plan.geometry, plan.policy)
    return ChunkwisePipeline(model.to(plan.dtype).requires_grad_(False), plan.sampler, plan.geometry, cache)


def start(plan: RunPlan, pipeline: ChunkwisePipeline) -> tuple[TextContext, SeededNoise]:
    """A seeded prompt embedding and the noise of sample 0."""
    a, g = plan.architecture, plan.geometry
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(1, a.text_len, a.text_dim, generator=generator)
    embeddings[:, a.text_len // 4:] = 0
    pipeline.cache.reset([0])
    with torch.inference_mode():
        text = pipeline.model.embed_text(embeddings)
    return text, SeededNoise([SampleSeed(0)], (a.in_dim, g.latent_height, g.latent_width), plan.device)


def spans(plan: RunPlan, seconds: float) -> list[ChunkSpan]:
    g = plan.geometry
    return list(g.chunks(g.whole_chunks(g.latent_frames(g.pixel_frames_of_seconds(seconds)))))


@contextmanager
def no_host_sync(device: torch.device) -> Iterator[None]:
    """Any device-to-host synchronisation inside is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def endurance(plan: RunPlan, seconds: float) -> dict:
    """Time of every chunk, memory, finiteness."""
    pipeline = make_pipeline(plan)
    text, noise = start(plan, pipeline)
    chunks = spans(plan, seconds)
    times_ms, windows, allocated, finite = [], [], [], torch.ones((), dtype=torch.bool, device=plan.device)
    torch.cuda.reset_peak_memory_stats()
    for span in chunks:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with no_host_sync(plan.device):
            begin.record()
            latents = pipeline.denoise(span, text, noise)
            windows.append((pipeline.cache.layer(0).plan.attend.shape[1]) // plan.geometry.frame_tokens + span.frames)
            pipeline.remember(span, latents, text)
            end.record()
            finite &= latents.isfinite().all()
        end.synchronize()
        times_ms.append(begin.elapsed_time(end))
        allocated.append(torch.cuda.memory_allocated())
    return summarise(plan, times_ms, windows) | {
        "all_finite": bool(finite), "host_syncs_in_passes": 0,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "allocated_gib_after_chunk_40": allocated[min(40, len(allocated) - 1)] / 2**30,
        "allocated_gib_at_the_end": allocated[-1] / 2**30,
        "chunk_ms": [round(t, 1) for t in times_ms],
    }


def summarise(plan: RunPlan, times_ms: list[float], windows: list[int]) -> dict:
    """Cycle times of the first and the last steady minute, and time per window length."""
    full = next(i for i, frames in enumerate(windows[1:], 1) if frames <= windows[i - 1])  # first roll or prune
    prunes = [i for i in range(full, len(windows)) if windows[i] <= windows[i - 1]]
    cycles = [(b, statistics.mean(times_ms[a:b])) for a, b in zip(prunes[2:], prunes[3:])]  # two cycles of warm-up
    minute = 60 * plan.geometry.fps / (plan.geometry.chunk_frames * plan.geometry.temporal_stride)
    first = [t for b, t in cycles if b <= prunes[2] + minute]
    last = [t for b, t in cycles if b > len(times_ms) - minute]
    lengths = sorted(set(windows[full:]))
    steady = range(prunes[2], len(times_ms))
    return {
        "chunks": len(times_ms), "cycles": len(cycles),
        "cycle_ms_median": statistics.median(t for _, t in cycles),
        "cycle_ms_quartiles": statistics.quantiles([t for _, t in cycles], n=4),
        "first_minute_ms": statistics.median(first), "last_minute_ms": statistics.median(last),
        "last_over_first": statistics.median(last) / statistics.median(first),
        "ms_by_window_frames": {n: statistics.median(times_ms[i] for i in steady if windows[i] == n) for n in lengths},
    }


def exactness(plan: RunPlan, twin_plan: RunPlan, seconds: float) -> dict:
    """Relative error of bf16 latents against float32, chunk by chunk from a common state."""
    ours, twin = make_pipeline(plan), make_pipeline(twin_plan)
    text, noise = start(plan, ours)
    exact_text, _ = start(twin_plan, twin)
    rows = []
    for span in spans(plan, seconds):
        compared = span.index % 10 in COMPARED
        if compared:
            twin.cache.copy_memory_of(ours.cache)
            exact = twin.denoise(span, exact_text, noise)
        latents = ours.denoise(span, text, noise)
        if compared:
            error = (latents.double() - exact.double()).norm() / exact.double().norm()
            pairs = [
                (ours.cache.layer(i).plan.chosen, twin.cache.layer(i).plan.chosen)
                for i in range(plan.architecture.num_layers)
            ]
            overlap = [torch.isin(a, b).float().mean().item() for a, b in pairs if a is not None]
            rows.append({
                "chunk": span.index, "relative_error": error.item(), "max_error": (latents - exact).abs().max().item(),
                "finite": bool(exact.isfinite().all() and latents.isfinite().all()),
                "top_c_overlap": statistics.mean(overlap) if overlap else None,
            })
        ours.remember(span, latents, text)
    return {"chunks": rows, "relative_error_median": statistics.median(r["relative_error"] for r in rows),
            "relative_error_max": max(r["relative_error"] for r in rows)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("endurance", "exactness"))
    parser.add_argument("--policy", default="deep_forcing", help="a YAML of configs/, without its suffix")
    parser.add_argument("--model", default="wan2.1_t2v_1.3b", help="a YAML of configs/models/, without its suffix")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: these benchmarks need a CUDA device.", file=sys.stderr)
        return 2
    device, begin = torch.device("cuda", 0), time.perf_counter()
    plan = make_plan(options.policy, options.model, device, "bfloat16")
    if options.what == "endurance":
        result = endurance(plan, options.seconds)
    else:
        result = exactness(plan, make_plan(options.policy, options.model, device, "float32"), options.seconds)
    result = {
        "what": options.what, "policy": plan.settings()["config"]["kv_cache"], "seconds": options.seconds,
        "counted": "transformer: 4 denoising passes + 1 context pass a chunk",
        "gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "cuda": torch.version.cuda,
        "dtype": "bfloat16", "size": f"{plan.geometry.width}x{plan.geometry.height}",
        "wall_s": time.perf_counter() - begin,
        "command": " ".join(["python -m benchmarks.full_size", *sys.argv[1:]]), **result,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "chunk_ms"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
