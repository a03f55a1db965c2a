"""Training PackForcing's compressor: the memory is that of inference, gradients go where they should, it learns."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressor_stage import CPU, make_stage, network, record_gradients
from conftest import ROOT, make_tiny, policy_of
from safetensors.torch import load_file
from test_compressor import make_branch
from test_packforcing import PACK
from torch.testing import assert_close

import inference
from pipeline.packets import Packer
from training import optim, tiny
from training.loop import pack, weights_in
from training.memory import PackedRollout, PacketRotation, RolloutMemory, Rotation
from training.rollout import self_rollout
from training.settings import Settings
from training.workshop import Workshop
from wan.kv_cache.policy import Compression
from wan.vae import WanVAE
from weights import TRANSFORMER, make_model, make_vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    make_vae(folder)
    return folder


@pytest.mark.parametrize("stream", ["forward", "project"])
def test_a_rollout_remembers_as_the_cache_does(vae: Path, stream: str) -> None:
    """While all packets are seen, PackedRollout shows attention what the KV cache under PackForcing shows it."""
    small = make_tiny(height=64, width=64, config=TRANSFORMER)
    settings = PACK | {
        "recent_frames": 6, "top_chunks": 4, "archive_chunks": 0, "compressor": "dual", "compressed_kv": stream,
    }
    policy, pipeline = policy_of(settings), small.pipeline(policy_of(settings), batch=2)
    grid, decoder = policy.sizes(small.geometry).archive.grid, WanVAE.load(vae, device=CPU, dtype=torch.float32)
    memory = PackedRollout(
        Rotation(small.geometry, TRANSFORMER.head_dim, CPU), PacketRotation(grid, TRANSFORMER.head_dim, CPU),
        TRANSFORMER.num_layers, CPU, sink_chunks=1, recent_chunks=2,
    )
    pipeline.cache.reset([0, 1])
    pipeline.packer, packer = (
        Packer(
            small.model, cache, grid, Compression("dual", stream, "paper", ""), 0.0, vae=decoder, branch=make_branch(),
        )
        for cache in (pipeline.cache, memory)
    )
    pipeline.packer.start(None)
    packer.start(None)
    text = small.model.embed_text(small.text(batch=2))
    clean, noise = torch.randn(2, 2, 21, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.full((2, 3), 750.0)
    for span in small.geometry.chunks(21):
        part = slice(span.start, span.stop)
        pipeline.cache.begin(span)
        memory.begin(span)
        flow = small.model(noise[:, part], t, text, pipeline.cache)
        assert_close(small.model(noise[:, part], t, text, memory), flow, rtol=0, atol=5e-5)
        pipeline.remember(clean[:, part], text)
        small.model(clean[:, part], 0 * t, text, memory)
        packer.remember(clean[:, part], text)
        memory.commit()
    assert pipeline.cache.layer(0).plan is None and pipeline.cache.layer(0).archive.known == 6


def inputs_of(stage) -> tuple[torch.Tensor, ...]:
    """Fixed inputs of one update: embeddings, no prompt, noise of a rollout of two passes, noise, levels."""
    generator, clip = torch.Generator().manual_seed(5), (2, 15, 4, 8, 8)
    return (
        stage._embeddings[:2], stage._nothing.expand(2, -1, -1), torch.randn(2, *clip, generator=generator),
        torch.randn(clip, generator=generator), torch.full((2, 15), 0.5),
    )


@pytest.mark.parametrize("joint", [False, True])
def test_gradients_reach_what_is_trained(vae: Path, joint: bool) -> None:
    """Every weight of the branch once its output is not zero, the network's with `joint` alone; the VAE never."""
    stage = make_stage(vae, joint=joint)
    torch.nn.init.normal_(stage.branch.out.weight, std=0.1)
    stage._update(*inputs_of(stage))
    grads = {name: m.grad.abs().max().item() for name, m in stage.state()["optimizers"]["masters"].items()}
    assert all(g > 0 for name, g in grads.items() if name.startswith("branch."))
    assert any(name.startswith("model.") for name in grads) == joint
    assert not joint or grads["model.blocks.0.self_attn.k.weight"] > 0
    assert not any(p.requires_grad for p in stage._vae._model.parameters())


class Oracle:
    """A teacher that knows the video and a critic that sees it: the noise levels' optimal answers."""

    def __init__(self, teacher: torch.nn.Module, target: torch.Tensor):
        self._teacher, self._target = teacher, target

    def attach(self, model: torch.nn.Module) -> torch.nn.Module:
        return model

    def __call__(self, model, context, noisy, sigma, embeddings) -> torch.Tensor:
        clean = self._target if model is self._teacher else context
        return (noisy - clean) / sigma[..., None, None, None]


def test_the_loss_falls(vae: Path) -> None:
    """Towards a teacher that answers with the full memory's video, the packed rollout comes nearer: to under a half.

    Distribution matching scales its gradient, so its own loss stays near a half; the distance is what must fall.
    """
    stage = make_stage(vae)
    embeddings, nothing, noise, fresh, sigma = inputs_of(stage)
    memory = RolloutMemory(stage._rotation, len(stage.model.blocks), CPU)
    with torch.no_grad():
        text = stage.model.embed_text(embeddings)
        target = self_rollout(stage.model, stage._sampler, stage._geometry, memory, text, noise)
    stage._flow = Oracle(stage._matching._teacher, target)
    distances = []
    for _ in range(21):
        made = stage._update(embeddings, nothing, noise, fresh, sigma)
        stage._optimizers.step(1.0)
        distances.append((made["video"] - target)[:, 9:].square().mean().item())
    assert distances[-1] < 0.5 * distances[0]
    assert_close(made["video"][:, :9], target[:, :9], rtol=0, atol=1e-4)  # the first three chunks see no packet


def test_a_step_moves_everything_that_learns(vae: Path) -> None:
    """Branch, averages and critic; the critic as often as it is asked to, after the branch."""
    stage = make_stage(vae, critic_updates=2)
    torch.nn.init.normal_(stage.branch.out.weight, std=0.1)
    before = {name: value.clone() for name, value in weights_in(stage.state()).items()}
    assert {name.split(".")[0] for name in before} == {"optimizers", "critic", "ema"}
    teacher = stage._matching._teacher.state_dict()
    still = {name: value.clone() for name, value in teacher.items()}
    stage.step(0)
    moved = {name.split(".")[0] for name, value in weights_in(stage.state()).items()
             if not torch.equal(value, before[name])}
    assert moved == {"optimizers", "critic", "ema"}
    assert (stage.state()["optimizers"]["taken"], stage.state()["critic"]["taken"]) == (1, 2)
    assert all(torch.equal(value, still[name]) for name, value in teacher.items())


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun with gloo: both hold the same weights, and the gradient is the mean of both batches'."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
        str(ROOT / "tests" / "compressor_stage.py"), str(tmp_path),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (load_file(tmp_path / f"rank{i}.safetensors") for i in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    alone: list[list[torch.Tensor]] = []
    monkeypatch.setattr(optim, "average", optim.average)  # put back what record_gradients replaces
    record_gradients(alone)
    for rank in (0, 1):
        monkeypatch.setattr("training.loop.rank", lambda rank=rank: rank)
        stage = make_stage(tmp_path / "vae", critic_updates=0)
        stage.step(0)
    for i, (a, b) in enumerate(zip(*alone, strict=True)):
        assert_close(first[f"first.{i}"], (a + b) / 2, rtol=1e-4, atol=1e-7)
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(*alone, strict=True))


def test_a_clip_without_packets_is_refused(vae: Path) -> None:
    """Before anything runs."""
    with pytest.raises(ValueError, match="too short for any packet to be seen. Use at least 12"):
        make_stage(vae, latent_frames=9)
    with pytest.raises(ValueError, match="compressor.sink_frames=4 must be whole chunks of 3"):
        make_stage(vae, sink_frames=4)


@pytest.mark.parametrize(("chunk", "frames", "config"), [(3, 12, "packforcing"), (4, 20, "packforcing_4")])
def test_from_training_to_a_video(tmp_path: Path, chunk: int, frames: int, config: str) -> None:
    """The stage by its command line, resumed, then the file it wrote in a run of inference.py."""
    model, folder = make_model(tmp_path / "model"), tmp_path / "run"
    settings = Settings(model=str(model), chunk_frames=chunk)
    shop = Workshop(settings, folder, CPU)
    both = torch.nn.ModuleDict({"model": network(4), "captions": shop.captions()})
    pack({"ema": dict(both.named_parameters())}, 1, "teacher", folder)
    command = [
        "compressor", "--folder", str(folder), "--output", str(tmp_path), "--device", "cpu", "--set", f"model={model}",
        f"chunk_frames={chunk}", f"compressor.sink_frames={chunk}", f"compressor.recent_frames={chunk}",
        "compressor.batch=1", f"compressor.latent_frames={frames}", "compressor.captions=4",
        "compressor.channels=[4,6,8]", "compressor.critic_updates=1", "log_every=1",
    ]
    assert tiny.main([*command, "compressor.steps=1"]) == 0
    assert tiny.main([*command, "compressor.steps=2"]) == 0  # goes on where the first ended
    losses = [json.loads(line) for line in (folder / "compressor.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == [1, 2] and all(line["critic"] > 0 for line in losses)
    arguments = [
        "--config_path", str(ROOT / "configs" / f"{config}.yaml"), "--prompt", "a red circle", "--device", "cpu",
        "--num_output_frames", "24", "--output_folder", str(tmp_path / "videos"), "--set", f"model={model}",
        "kv_cache.compressor=dual", f"kv_cache.compressor_weights={tmp_path / 'compressor' / 'model.safetensors'}",
    ]
    assert inference.main([*arguments, "kv_cache.space_reduction=2"]) == 0
    record = json.loads(next((tmp_path / "videos").glob("*.json")).read_text())
    assert record["settings"]["weights"].keys() >= {"transformer", "vae", "compressor"}
    assert inference.main([*arguments, "kv_cache.space_reduction=1", "--overwrite"]) == 2
