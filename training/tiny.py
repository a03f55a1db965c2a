"""The recipe of the embedded model, stage by stage; every stage resumes.

    python -m training.tiny vae     --folder runs/tiny                 # 1: the autoencoder
    python -m training.tiny teacher --folder runs/tiny --seconds 400   # 2: the causal teacher, 400 s at a time
    python -m training.tiny student --folder runs/tiny                 # 3: the few-step student
    python -m training.tiny export  --folder runs/tiny --output weights/tiny
    python -m training.tiny compressor --folder runs/tiny --output weights/tiny  # PackForcing's, for what was exported
    python -m training.tiny all     --folder runs/tiny --output weights/tiny  # all of these but the compressor

Under `torchrun --nproc_per_node=N -m training.tiny ...` N processes share a stage, each with batches of its own.
A folder holds the full state of every stage. To go on elsewhere, `pack --output other` writes weights, averages and
snapshots alone, in small files: a stage that finds them in its folder goes on from there with a fresh optimiser.
"""
from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import sys
from pathlib import Path

import torch

from pipeline.sampler import FewStepSampler
from training.compressor import CompressorStage, make_branch
from training.loop import load_state, pack, run_stage
from training.memory import dense
from training.parallel import is_main, together
from training.parts import export_text, export_transformer, export_vae
from training.samples import SHEET_CLIPS, choose, write_sheet
from training.settings import Settings
from training.sheets import contact_sheet
from training.student import StudentStage
from training.teacher import TeacherForcedFlow, TeacherStage
from training.vae import VaeStage, working_dtype
from training.workshop import Workshop, averaged, averaged_teacher
from training.world import render, sample, to_frames
from utils.config import ConfigError
from utils.devices import choose_device
from utils.launch import read_launch
from utils.yaml_files import load_structured
from wan.checkpoint import load_transformer
from wan.compressor import save_branch
from wan.model import CausalWanModel
from wan.vae import WanVAE

logger = logging.getLogger(__name__)

STAGES = ("vae", "teacher", "student")  # of the embedded model; the compressor is one more, for PackForcing alone
STEPS, SHIFT = (1000, 750, 500, 250), 5.0  # the student's passes, as configs/base.yaml samples them


def train_vae(shop: Workshop, seconds: float | None) -> bool:
    if shop.settings.vae.path is not None:
        logger.info("vae: %s is used as it is", shop.settings.vae.path)
        return True
    stage = VaeStage(shop.settings, shop.architecture.in_dim, shop.device)
    done = run(shop, stage, seconds)
    drawn = [sample(i, "test") for i in range(SHEET_CLIPS)]
    true = render([clip.scene for clip in drawn], num_frames=81, device=shop.device)
    vae = WanVAE(shop.vae())
    ours = vae.stream().decode(vae.encode(true))
    error = (true - ours).square().mean(dim=(0, 2, 3, 4))
    logger.info(
        "held-out PSNR of %d streamed frames: %.2f dB; of the last one: %.2f dB",
        len(error), *(-10 * torch.log10(e / 4) for e in (error.mean(), error[-1])),
    )
    pairs = torch.cat([true, ours], dim=4)
    contact_sheet(list(to_frames(pairs).cpu()), [clip.caption for clip in drawn], 3, shop.folder / "vae.png")
    return done


def train_teacher(shop: Workshop, seconds: float | None) -> bool:
    clips, openings = shop.clips()
    stage = TeacherStage(shop.settings, shop.architecture, shop.geometry, shop.captions(), clips, openings, shop.device)
    done = run(shop, stage, seconds)
    model, captions = averaged_teacher(shop)
    write_sheet(
        shop, model, captions, FewStepSampler([1000 - 50 * i for i in range(20)], SHIFT, warp=True), guidance=2.0,
        name="teacher",
    )
    return done


def train_student(shop: Workshop, seconds: float | None) -> bool:
    clips, openings = shop.clips()
    teacher, captions = averaged_teacher(shop)
    sampler = FewStepSampler(STEPS, SHIFT, warp=True)
    stage = StudentStage(shop.settings, teacher, shop.geometry, sampler, captions, clips, openings, shop.device)
    done = run(shop, stage, seconds)
    if stage.snapshots:
        averaged(stage.model, stage.snapshots[choose(shop, stage, captions, sampler)])
    write_sheet(shop, stage.model, captions, sampler, guidance=None, name="student")
    return done


def train_compressor(shop: Workshop, seconds: float | None, output: Path) -> bool:
    """Student, autoencoder and statistics are the exported ones; the teacher is that of the folder."""
    s, spec = shop.settings.compressor, shop.spec
    dtype = working_dtype(shop.device)
    teacher, captions = averaged_teacher(shop)
    student = CausalWanModel(shop.architecture, dense)
    load_transformer(student, spec.checkpoint, use_ema=True, device=shop.device, dtype=dtype)
    texts = [sample(seed).caption for seed in range(s.captions)]
    with torch.no_grad():
        embeddings, nothing = (
            torch.cat([captions(ids) for ids in captions.tokens(some).to(shop.device).split(256)])
            for some in (texts, [""])
        )
    stage = CompressorStage(
        s, shop.settings.seed, student=student, branch=make_branch(s, shop.architecture, shop.settings.seed),
        teacher=teacher, critic=copy.deepcopy(teacher),
        flow=TeacherForcedFlow(shop.geometry, shop.architecture, s.latent_frames, shop.device),
        vae=WanVAE.load(spec.vae, device=shop.device, dtype=dtype), embeddings=embeddings, nothing=nothing,
        geometry=shop.geometry, sampler=FewStepSampler(STEPS, SHIFT, warp=True), device=shop.device,
    )
    done = run(shop, stage, seconds)
    if is_main():
        path = output / "compressor" / "model.safetensors"
        save_branch(averaged(stage.branch, stage.weights("branch")), path)
        if s.joint:
            export_transformer(stage.weights("model"), output / "compressor" / "transformer")
        logger.info("wrote %s", path.parent)
    return done


def run(shop: Workshop, stage, seconds: float | None) -> bool:
    s = shop.settings
    return run_stage(
        stage, shop.folder, device=shop.device, seconds=seconds, checkpoint_seconds=s.checkpoint_seconds,
        log_every=s.log_every,
    )


def export(shop: Workshop, which: str, output: Path) -> None:
    """Write the four parts as inference loads them."""
    _, captions = averaged_teacher(shop)
    ema = shop.chosen() if which == "student" else shop.averages(which)
    export_transformer(
        {name.removeprefix("model."): value for name, value in ema.items() if "captions." not in name},
        output / "transformer",
    )
    export_vae(shop.vae(), *shop.statistics(), output / "vae")
    export_text(captions, output / "text_encoder", output / "tokenizer")
    logger.info("wrote %s (%.1f MB)", output, sum(f.stat().st_size for f in output.rglob("*") if f.is_file()) / 1e6)


def run_command(options: argparse.Namespace, device: torch.device) -> bool:
    """Do what the command line says; returns whether it is done."""
    if options.seconds is not None and not options.seconds > 0:
        raise ConfigError(f"--seconds {options.seconds} is no time to train. Ask for more than 0.")
    if options.stage == "pack" and options.output is None:
        raise ConfigError("pack needs --output: a folder for the files that travel.")
    settings = load_structured(options.config, Settings, options.set)
    shop = Workshop(settings, options.folder, device)
    output = options.output or Path("weights/tiny")
    if is_main():
        (options.folder / "settings.json").write_text(json.dumps(dataclasses.asdict(settings), indent=1) + "\n")
    if options.stage == "pack":
        for path in sorted(options.folder.glob("*.pt")):
            if path.stem in (*STAGES, "compressor"):
                saved = load_state(path, torch.device("cpu"))
                pack(saved["stage"], saved["step"], path.stem, output)
        return True
    if options.stage == "export":
        export(shop, options.which, output)
        return True
    if options.stage == "compressor":
        return train_compressor(shop, options.seconds, output)
    train = {"vae": train_vae, "teacher": train_teacher, "student": train_student}
    done = True
    for stage in STAGES if options.stage == "all" else (options.stage,):
        done = done and train[stage](shop, options.seconds)
    if done and options.stage == "all":
        export(shop, "student", output)
    return done


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "compressor", "all", "pack", "export"))
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny"), help="state of all stages")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("tiny.yaml"))
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as teacher.steps=100",
    )
    parser.add_argument("--seconds", type=float, help="stop after so long; the next call goes on")
    parser.add_argument("--which", choices=("teacher", "student"), default="student", help="export: whose transformer")
    parser.add_argument("--output", type=Path, help="where to (but for pack: weights/tiny)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        launch = read_launch()
        device = choose_device(options.device, launch.local_rank)
        with together(launch, device):
            done = run_command(options, device)
    except (ValueError, OSError) as error:  # every error class of this project is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    logger.info("%s %s", options.stage, "is done" if done else "stopped for now; the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
