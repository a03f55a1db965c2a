"""Exactness against the released code: run what the golden files recorded, and compare.

    python -m evaluation.parity DIR

One JSON line a file: {"file", "max_error", "tolerance", "kept_equal", "ok"}; exit status 1 if one fails,
2 if there is nothing to check. Every configuration is read from the files' headers. All in float32.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.chunkwise import ChunkwisePipeline
from pipeline.sampler import FewStepSampler, schedule
from wan.geometry import ChunkSpan, VideoGeometry
from wan.kv_cache.cache import KVCache
from wan.kv_cache.policy import build_policy
from wan.kv_cache.store import CacheShape
from wan.model import CausalWanModel, WanConfig
from wan.text_encoder import TextEncoder
from wan.vae import WanVAE

TOLERANCE = 1e-5  # absolute, float32; a clean build reaches 3e-6, a wrong epsilon costs 2e-5


@dataclass
class Findings:
    """What a comparison found: the largest error, and whether every count and index agreed."""

    errors: dict[str, float] = field(default_factory=dict)
    equal: dict[str, bool] = field(default_factory=dict)

    def close(self, name: str, ours: Tensor, golden: Tensor) -> None:
        same_shape = ours.shape == golden.shape
        error = (ours.double() - golden.double()).abs().max().item() if same_shape else float("inf")
        self.errors[name] = error if error == error else float("inf")

    def same(self, name: str, ours: list | Tensor, golden: Tensor) -> None:
        self.equal[name] = torch.equal(torch.as_tensor(ours).long(), golden.long())

    def line(self, path: Path) -> dict:
        worst = max(self.errors.values(), default=0.0)
        kept = all(self.equal.values())
        ok = bool(self.errors or self.equal) and kept and worst <= TOLERANCE
        line = {"file": path.name, "max_error": worst, "tolerance": TOLERANCE, "kept_equal": kept, "ok": ok}
        if not ok:
            far = [name for name, error in self.errors.items() if error > TOLERANCE]
            line["differs"] = far + [name for name, equal in self.equal.items() if not equal]
        return line


class Golden:
    """One golden file: tensors, and a header whose values are JSON where they parse as such."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:
            self.header = {key: _parsed(value) for key, value in (file.metadata() or {}).items()}
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def weights(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


@dataclass(frozen=True)
class RecordedNoise:
    """The noise that the golden rollouts used."""

    noise: Tensor    # [B, frames, C, h, w]
    renoise: Tensor  # [chunks, passes - 1, chunk frames, C, h, w]

    def draw(self, chunk: ChunkSpan, index: int) -> Tensor:
        return self.renoise[chunk.index, index - 1].unsqueeze(0) if index else self.noise[:, chunk.start:chunk.stop]


def build(folder: Path, golden: Golden, config: dict, policy: dict, chunk_frames: int) -> ChunkwisePipeline:
    """The pipeline that a golden file ran, in float32 on the CPU."""
    config = {key: value for key, value in config.items() if key != "seed"}
    height, width = config.pop("h"), config.pop("w")
    model = CausalWanModel(WanConfig(**config))
    model.load_state_dict(Golden(folder / f"model_{golden.header['cfg']}.safetensors").weights("model."))
    stride = 8  # golden sizes are latent sizes; any stride cancels out
    geometry = VideoGeometry(
        height=height * stride, width=width * stride, fps=16, chunk_frames=chunk_frames, spatial_stride=stride,
    )
    shape = CacheShape(
        layers=config["num_layers"], heads=config["num_heads"], head_dim=model.config.head_dim,
        batch=1, device=model.device, dtype=model.dtype,
    )
    name = policy.pop("policy")
    cache = KVCache(shape, geometry, build_policy(name, policy))
    sampler = FewStepSampler(
        golden.header.get("denoising_step_list", [1000]), golden.header.get("timestep_shift", 5.0), warp=True,
        context_time=float(golden.header.get("clean_pass_timestep", 0.0)),
    )
    return ChunkwisePipeline(model, sampler, geometry, cache)


def policy_of(kind: dict, window_frames: int, frames: int) -> dict:
    """A golden header's policy in our words; a window of -1 frames keeps all."""
    if window_frames == -1:
        return {"policy": "full", "window_frames": frames}
    window = {"window_frames": window_frames}
    if kind["kind"] == "pc":
        return window | {
            "policy": "participative", "sink_frames": kind["sink"], "budget_frames": kind["budget"],
            "recent_frames": kind["recent"], "topc_max_reuse": kind["reuse"],
        }
    if kind["kind"] == "ds":
        return window | {"policy": "sink", "sink_frames": kind["sink"]}
    if kind["sink"]:
        return window | {"policy": "sink", "sink_frames": kind["sink"], "positions": "original"}
    return window | {"policy": "rolling"}


@dataclass
class Recorder:
    """Watches a rollout from the outside: flows, window lengths, and what each prune kept."""

    pipeline: ChunkwisePipeline
    flows: list[list[Tensor]] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)

    def after_pass(self, model, arguments, flow: Tensor) -> None:
        layers = [self.pipeline.cache.layer(i) for i in range(len(model.blocks))]
        tokens = flow.shape[1] * self.pipeline.geometry.frame_tokens
        if len(self.flows[-1]) == 0 and layers[0].plan.chosen is not None:
            length = layers[0].store.length
            own = torch.arange(length, length + tokens)
            self.events.append({
                "chunk": len(self.flows) - 1, "length": length + tokens,
                "kept": torch.stack([torch.cat([x.plan.retain[0], own]) for x in layers]),
                "top": torch.stack([x.plan.chosen[0] for x in layers]),
            })
        self.flows[-1].append(flow[0])

    def after_first_block(self, block, arguments: tuple, hidden: Tensor) -> None:
        """Runs in the context pass too, which ends at the last layer's keys."""
        memory = arguments[-1]
        self.windows[-1].append(memory.plan.attend.shape[1] + hidden.shape[1] * hidden.shape[2])

    def run(self, embeddings: Tensor, frames: int, noise: RecordedNoise) -> tuple[Tensor, list[int]]:
        """Latents of the whole rollout, and the store's length after each chunk."""
        model, cache, lengths = self.pipeline.model, self.pipeline.cache, []
        commit = cache.commit

        def committed() -> None:
            commit()
            lengths.append(cache.layer(0).store.length)
            self._next_chunk()

        model.register_forward_hook(self.after_pass)
        model.blocks[0].register_forward_hook(self.after_first_block)
        cache.commit = committed  # a chunk is yielded before it is remembered
        self._next_chunk()
        latents = [chunk.latents for chunk in self.pipeline(embeddings, frames, noise, seeds=[0])]
        return torch.cat(latents, dim=1), lengths

    def _next_chunk(self) -> None:
        self.flows.append([])
        self.windows.append([])


def check_rollout(path: Path, golden: Golden) -> Findings:
    """Latents, first and last flow of each chunk, window lengths, kept and chosen indices."""
    header, found = golden.header, Findings()
    policy = policy_of(header["policy"], header["local_attn_size"], header["frames"])
    pipeline = build(path.parent, golden, header["model_config"], policy, header["num_frame_per_block"])
    inputs = Golden(path.parent / header["inputs_file"])
    recorder = Recorder(pipeline)
    noise = RecordedNoise(inputs["noise"], inputs["renoise"])
    latents, lengths = recorder.run(inputs["prompt_embeds"], header["frames"], noise)
    flows = recorder.flows[:len(lengths)]
    last = pipeline.sampler.num_passes - 1
    found.close("latents", latents, golden["latents"])
    found.close("flow_first", torch.stack([f[0] for f in flows]), golden["flow_first"])
    found.close("flow_last", torch.stack([f[last] for f in flows]), golden["flow_last"])
    found.same("window_tokens", recorder.windows[:len(lengths)], golden["window_tokens"])
    found.same("cache_len_tokens", lengths, golden["cache_len_tokens"])
    if "prune_chunk" in golden.tensors:
        events = recorder.events
        found.same("prune_chunk", [e["chunk"] for e in events], golden["prune_chunk"])
        found.same("prune_T", [e["length"] for e in events], golden["prune_T"])
        for name, ours in (("keep_idx", "kept"), ("topc_idx", "top")):
            found.same(name, padded([e[ours] for e in events], golden[name].shape[-1]), golden[name])
    return found


def padded(indices: list[Tensor], width: int) -> Tensor:
    """Indices [layers, n] of each event, stacked and filled up to `width` with -1 as the files are."""
    return torch.stack([F.pad(event, (0, max(0, width - event.shape[-1])), value=-1) for event in indices])


def check_forward(path: Path, golden: Golden) -> Findings:
    """Two chunks through the cache, the first remembered as it was seen."""
    found = Findings()
    frames = golden["x1"].shape[1]
    both_chunks = {"policy": "rolling", "window_frames": 2 * frames}
    pipeline = build(path.parent, golden, golden.header["config"], both_chunks, frames)
    with torch.inference_mode():
        text = pipeline.model.embed_text(golden["prompt_embeds"])
        for number, span in enumerate(pipeline.geometry.chunks(2 * frames), start=1):
            pipeline.cache.begin(span)
            flow = pipeline.model(golden[f"x{number}"], golden[f"t{number}"], text, pipeline.cache)
            pipeline.cache.commit()
            found.close(f"flow{number}", flow, golden[f"flow{number}"])
            sigma = golden.header["sigma"][str(golden[f"t{number}"][0, 0].item())]
            found.close(f"x0_{number}", golden[f"x{number}"].double() - sigma * flow.double(), golden[f"x0_{number}"])
    return found


def check_schedule(path: Path, golden: Golden) -> Findings:
    """The training schedule and the warped timesteps."""
    found = Findings()
    sampler = FewStepSampler(golden.header["denoising_step_list"], golden.header["shift"], warp=True)
    found.close("sigmas", schedule(golden.header["shift"]), golden["sigmas"])
    found.close("warped", torch.tensor(sampler.times) / 1000, golden["warped_denoising_timesteps"] / 1000)
    return found


@contextmanager
def saved(tensors: dict[str, Tensor]) -> Iterator[Path]:
    """A file of these tensors, for what loads files."""
    with TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "weights.safetensors")
        yield Path(folder) / "weights.safetensors"


def check_text(path: Path, golden: Golden) -> Findings:
    """The umT5 encoder, from its original names."""
    found = Findings()
    with saved(golden.weights("sd.")) as file:
        encoder = TextEncoder.load(file, words=None, device="cpu", dtype=torch.float32)
    found.close("out_zero_padded", encoder.encode_ids(golden["ids"], golden["mask"]), golden["out_zero_padded"])
    return found


def check_vae(path: Path, golden: Golden) -> Findings:
    """Encode, decode, and decode in streamed chunks, from the original names. [B, C, T, H, W] in the file."""
    found = Findings()
    statistics = golden["mean"].tolist(), golden["std"].tolist()
    with saved(golden.weights("sd.")) as file:
        vae = WanVAE.load(file, device="cpu", dtype=torch.float32, statistics=statistics)
    found.close("enc_mu_scaled", vae.encode(golden["pixels"].transpose(1, 2)).transpose(1, 2), golden["enc_mu_scaled"])
    latents = golden["z"].transpose(1, 2)
    for name in (name for name in golden.tensors if name.startswith("decoded_")):
        part = latents[:, :int(name.removeprefix("decoded_"))]
        found.close(name, vae.stream().decode(part).transpose(1, 2), golden[name].clamp(-1, 1))
    chunks = sorted(name for name in golden.tensors if name.startswith("cached_chunk"))
    stream = vae.stream()
    for name, part in zip(chunks, latents.split(latents.shape[1] // len(chunks), dim=1), strict=True):
        found.close(name, stream.decode(part).transpose(1, 2), golden[name].clamp(-1, 1))
    return found


CHECKS: dict[str, Callable[[Path, Golden], Findings]] = {
    "rollout_": check_rollout, "forward_": check_forward, "schedule": check_schedule, "t5_": check_text,
    "vae_": check_vae,
}


def main(arguments: list[str] | None = None) -> int:
    """Check a folder; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of golden .safetensors files")
    folder = parser.parse_args(arguments).folder
    files = [
        (path, check) for path in sorted(folder.glob("*.safetensors"))
        for prefix, check in CHECKS.items() if path.name.startswith(prefix)
    ]
    if not files:
        print(f"{folder}: no golden files (rollout_*, forward_*, schedule, t5_*, vae_*).", file=sys.stderr)
        return 2
    failed = 0
    for path, check in files:
        try:
            line = check(path, Golden(path)).line(path)
        except Exception as error:  # a file that cannot be read or run is a failed check, and the rest goes on
            line = {"file": path.name, "max_error": None, "tolerance": TOLERANCE, "kept_equal": False, "ok": False,
                    "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(line), flush=True)
        failed += not line["ok"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
