"""A compressor stage of small random networks; run under torchrun it trains and writes what each process holds.

    torchrun --nproc_per_node=2 tests/compressor_stage.py FOLDER
"""
from __future__ import annotations

import sys
from pathlib import Path

import torch
from conftest import make_tiny
from safetensors.torch import save_file

from pipeline.sampler import FewStepSampler
from training import optim
from training.compressor import CompressorStage, make_branch
from training.parallel import rank, together
from training.settings import CompressorSettings
from training.teacher import TeacherForcedFlow
from utils.launch import read_launch
from wan.model import CausalWanModel, randomize
from wan.vae import WanVAE
from weights import TRANSFORMER, make_vae

CPU = torch.device("cpu")


def network(seed: int) -> CausalWanModel:
    model = CausalWanModel(TRANSFORMER)
    randomize(model, seed)
    return model


def make_stage(vae: Path, **settings) -> CompressorStage:
    """15 latent frames of 64x64 pixels in chunks of three: the fourth and fifth chunk see packets."""
    common = {
        "steps": 40, "batch": 2, "latent_frames": 15, "channels": [8, 16, 32], "critic_updates": 1, "lr_branch": 0.01,
    }
    s = CompressorSettings(**common | settings)
    geometry = make_tiny(height=64, width=64).geometry
    generator = torch.Generator().manual_seed(0)
    return CompressorStage(
        s, 0, student=network(7), branch=make_branch(s, TRANSFORMER, 0), teacher=network(8), critic=network(9),
        flow=TeacherForcedFlow(geometry, TRANSFORMER, s.latent_frames, CPU),
        vae=WanVAE.load(vae, device=CPU, dtype=torch.float32),
        embeddings=torch.randn(8, TRANSFORMER.text_len, TRANSFORMER.text_dim, generator=generator),
        nothing=torch.zeros(1, TRANSFORMER.text_len, TRANSFORMER.text_dim), geometry=geometry,
        sampler=FewStepSampler([1000, 500], shift=5.0, warp=True), device=CPU,
    )


def record_gradients(seen: list[list[torch.Tensor]]) -> None:
    """Note the gradients of every update as the optimiser uses them: after they were averaged."""
    average = optim.average

    def averaged(tensors) -> None:
        average(tensors)
        seen.append([t.clone() for t in tensors])

    optim.average = averaged


if __name__ == "__main__":
    folder, launch = Path(sys.argv[1]), read_launch()
    if launch.is_main:
        make_vae(folder / "vae")
    with together(launch, CPU):
        torch.distributed.barrier()
        gradients: list[list[torch.Tensor]] = []
        record_gradients(gradients)
        stage = make_stage(folder / "vae")
        for index in range(2):
            stage.step(index)
        held = {f"first.{i}": g for i, g in enumerate(gradients[0])}
        held |= {f"master.{n}": m for n, m in stage.state()["optimizers"]["masters"].items()}
        held |= {f"critic.{n}": m for n, m in stage.state()["critic"]["masters"].items()}
        save_file(held, folder / f"rank{rank()}.safetensors")
