"""The recipe of the embedded model, stage by stage; every stage resumes.

    python -m training.tiny vae     --folder runs/tiny                 # 1: the autoencoder
    python -m training.tiny teacher --folder runs/tiny --seconds 400   # 2: the causal teacher, 400 s at a time
    python -m training.tiny student --folder runs/tiny                 # 3: the few-step student
    python -m training.tiny export  --folder runs/tiny --output weights/tiny

A folder holds the full state of every stage. To go on elsewhere, `pack --output other` writes weights and averages
alone, in small files: a stage that finds them in its folder goes on from there with a fresh optimiser.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor

from evaluation.study.readers import score, spare_processors
from pipeline.sampler import FewStepSampler
from training.data import LatentClips, make_clips, normalise, statistics
from training.loop import load_state, pack, run_stage, save_state
from training.memory import RolloutMemory, Rotation, dense
from training.parts import (
    CaptionEncoder,
    architecture_of,
    export_text,
    export_transformer,
    export_vae,
    make_text_encoder,
    make_tokenizer,
    make_vae,
)
from training.settings import Settings
from training.sheets import contact_sheet
from training.student import StudentStage
from training.teacher import TeacherStage
from training.vae import VaeStage, working_dtype
from training.world import render, sample, to_frames, words
from utils.config import ConfigError, load_model_spec, load_structured
from wan.geometry import VideoGeometry
from wan.model import CausalWanModel
from wan.vae import WanVAE, to_uint8

logger = logging.getLogger(__name__)

STAGES = ("vae", "teacher", "student")
CHOICE, CHOICE_SEED = ("colour", "shape", "count", "background", "motion"), 20_000
SHEET_CLIPS, SHEET_COLUMNS = 10, 6
STEPS, SHIFT = (1000, 750, 500, 250), 5.0  # the student's passes, as configs/base.yaml samples them


class Workshop:
    """What the stages share: settings, sizes, the networks made so far."""

    def __init__(self, settings: Settings, folder: Path, device: torch.device):
        self.settings, self.folder, self.device = settings, folder, device
        self.spec = load_model_spec(settings.model)
        self.architecture = architecture_of(self.spec)
        self.geometry = VideoGeometry(
            height=self.spec.height, width=self.spec.width, fps=self.spec.fps, chunk_frames=3,
            spatial_stride=self.spec.spatial_stride, temporal_stride=self.spec.temporal_stride,
        )
        folder.mkdir(parents=True, exist_ok=True)
        torch._dynamo.config.recompile_limit = 64  # a rollout's window has seven lengths, with and without gradients

    def averages(self, name: str) -> dict[str, Tensor]:
        """Weights of an earlier stage's averages, by name.

        Raises:
            ConfigError: it has not run yet.
        """
        path = self.folder / f"{name}.pt"
        if path.exists():
            return load_state(path, self.device)["stage"]["ema"]
        packed = sorted(self.folder.glob(f"{name}-*.safetensors"))
        if not packed:
            raise ConfigError(f"{path} is not there: run `python -m training.tiny {name}` first.")
        tensors = {key: value for file in packed for key, value in load_file(file, str(self.device)).items()}
        return {key.removeprefix("ema."): t.float() for key, t in tensors.items() if key.startswith("ema.")}

    def chosen(self) -> dict[str, Tensor]:
        """The student's snapshot that its stage chose.

        Raises:
            ConfigError: nothing was chosen yet.
        """
        path = self.folder / "choice.json"
        if not path.exists():
            raise ConfigError(f"{path} is not there: run `python -m training.tiny student` first.")
        snapshots = load_state(self.folder / "student.pt", self.device)["stage"]["snapshots"]
        return snapshots[json.loads(path.read_text())["best"]]

    def vae(self) -> AutoencoderKLWan:
        """The trained autoencoder, with raw latents."""
        vae = make_vae(self.settings.vae, self.architecture.in_dim).to(self.device)
        return averaged(vae, self.averages("vae")).eval().requires_grad_(False)

    def captions(self) -> CaptionEncoder:
        """A fresh text encoder with its tokenizer."""
        tokenizer = make_tokenizer(words())
        torch.manual_seed(self.settings.seed)
        encoder = make_text_encoder(self.settings.text, self.architecture.text_dim, tokenizer.get_vocab_size())
        return CaptionEncoder(tokenizer, encoder, self.architecture.text_len)

    def clips(self) -> tuple[LatentClips, LatentClips]:
        """Normalised latents of whole clips and of openings; made once, kept in the folder."""
        path = self.folder / "latents.pt"
        if not path.exists():
            vae, captions, s = self.vae().to(working_dtype(self.device)), self.captions(), self.settings.data
            clips = make_clips(
                vae, captions, first_seed=0, clips=s.clips, latent_frames=s.latent_frames, batch=s.batch,
                device=self.device,
            )
            openings = make_clips(
                vae, captions, first_seed=s.clips, clips=s.openings, latent_frames=self.geometry.chunk_frames,
                batch=s.openings_batch, device=self.device,
            )
            mean, std = statistics(clips)
            clips, openings = normalise(clips, mean, std), normalise(openings, mean, std)
            save_state(path, {
                "mean": mean, "std": std, "clips": dataclasses.asdict(clips), "openings": dataclasses.asdict(openings),
            })
            return clips, openings
        saved = load_state(path, self.device)
        return LatentClips(**saved["clips"]), LatentClips(**saved["openings"])

    def statistics(self) -> tuple[list[float], list[float]]:
        saved = torch.load(self.folder / "latents.pt", map_location="cpu", weights_only=True, mmap=True)
        return saved["mean"].tolist(), saved["std"].tolist()

    def decoder(self) -> WanVAE:
        """The autoencoder as inference uses it."""
        vae = self.vae()
        mean, std = self.statistics()
        vae.register_to_config(latents_mean=mean, latents_std=std)
        return WanVAE(vae)


def train_vae(shop: Workshop, seconds: float | None) -> bool:
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
    clips, _ = shop.clips()
    teacher, captions = averaged_teacher(shop)
    sampler = FewStepSampler(STEPS, SHIFT, warp=True)
    stage = StudentStage(shop.settings, teacher, shop.geometry, sampler, captions, clips, shop.device)
    done = run(shop, stage, seconds)
    if stage.snapshots:
        averaged(stage.model, stage.snapshots[choose(shop, stage, captions, sampler)])
    write_sheet(shop, stage.model, captions, sampler, guidance=None, name="student")
    return done


def choose(shop: Workshop, stage: StudentStage, captions: CaptionEncoder, sampler: FewStepSampler) -> str:
    """The snapshot whose clips show most of what unseen captions ask for, by the analysers; all scores are written."""
    clips = [sample(CHOICE_SEED + i, "test") for i in range(shop.settings.student.choice_captions)]
    with torch.no_grad():
        embeddings = captions(captions.tokens([clip.caption for clip in clips]).to(shop.device))
    scores, decoder = {}, shop.decoder()
    for name, weights in stage.snapshots.items():
        latents = sample_videos(shop, averaged(stage.model, weights), embeddings, sampler, None, None)
        frames = torch.cat([to_uint8(decoder.stream().decode(part)).cpu() for part in latents.split(32)]).numpy()
        rate = score(zip(frames, clips, strict=True), workers=spare_processors())["rate"]
        scores[name] = {"mean": sum(rate[key] for key in CHOICE) / len(CHOICE), **rate}
        logger.info("snapshot %s: %s", name, {key: round(value, 3) for key, value in scores[name].items()})
    best = max(scores, key=lambda name: scores[name]["mean"])
    (shop.folder / "choice.json").write_text(json.dumps({"best": best, "scores": scores}, indent=1) + "\n")
    return best


def run(shop: Workshop, stage, seconds: float | None) -> bool:
    s = shop.settings
    return run_stage(
        stage, shop.folder, device=shop.device, seconds=seconds, checkpoint_seconds=s.checkpoint_seconds,
        log_every=s.log_every,
    )


def averaged_teacher(shop: Workshop) -> tuple[CausalWanModel, CaptionEncoder]:
    """The teacher's running averages."""
    ema = shop.averages("teacher")
    both = torch.nn.ModuleDict({"model": CausalWanModel(shop.architecture, dense), "captions": shop.captions()})
    both = averaged(both.to(shop.device, working_dtype(shop.device)), ema)
    return both["model"], both["captions"].requires_grad_(False)


def averaged(module, ema: dict[str, Tensor]):
    """`module` with its parameters replaced by their averages."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in ema.items():
            parameters[name].copy_(value)
    return module


@torch.no_grad()
def sample_videos(
    shop: Workshop, model: CausalWanModel, embeddings: Tensor, sampler: FewStepSampler, nothing: Tensor | None,
    guidance: float | None,
) -> Tensor:
    """Latents [B, F, C, h, w] of a training-length clip; with `guidance` by an ODE, without by re-noising."""
    generator = torch.Generator(shop.device).manual_seed(1234)
    batch, g = len(embeddings), shop.geometry
    both = embeddings if guidance is None else torch.cat([embeddings, nothing.expand_as(embeddings)])
    text = model.embed_text(both)
    memory = RolloutMemory(
        Rotation(g, shop.architecture.head_dim, shop.device), shop.architecture.num_layers, shop.device,
    )
    copies, parts = len(both) // batch, []
    for span in g.chunks(shop.settings.data.latent_frames):
        memory.begin(span)
        shape = (batch, span.frames, shop.architecture.in_dim, g.latent_height, g.latent_width)
        x = torch.randn(shape, generator=generator, device=shop.device)
        for index in range(sampler.num_passes):
            t = torch.full((copies * batch, span.frames), sampler.times[index], device=shop.device)
            flow = model(x.repeat(copies, 1, 1, 1, 1), t, text, memory).float()
            if guidance is not None:
                conditional, unconditional = flow.chunk(2)
                flow = unconditional + guidance * (conditional - unconditional)
            x0, last = x - sampler.sigmas[index] * flow, index + 1 == sampler.num_passes
            if not last and guidance is None:
                x = sampler.renoise(x0, torch.randn(shape, generator=generator, device=shop.device), index + 1)
            elif not last:
                x = x + (sampler.sigmas[index + 1] - sampler.sigmas[index]) * flow
        model(x0.repeat(copies, 1, 1, 1, 1), torch.zeros(copies * batch, span.frames, device=shop.device), text, memory)
        memory.commit()
        parts.append(x0)
    return torch.cat(parts, dim=1)


def write_sheet(
    shop: Workshop, model: CausalWanModel, captions: CaptionEncoder, sampler: FewStepSampler, guidance: float | None,
    name: str,
) -> None:
    """Ten held-out captions."""
    texts = [sample(i, "test").caption for i in range(SHEET_CLIPS)]
    with torch.no_grad():
        embeddings = captions(captions.tokens(texts).to(shop.device))
        nothing = captions(captions.tokens([""]).to(shop.device))
    latents = sample_videos(shop, model, embeddings, sampler, nothing, guidance)
    frames = to_uint8(shop.decoder().stream().decode(latents)).cpu()
    contact_sheet(list(frames), texts, SHEET_COLUMNS, shop.folder / f"{name}.png")


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "teacher", "student", "pack", "export"))
    parser.add_argument("--folder", type=Path, default=Path("runs/tiny"), help="state of all stages")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("tiny.yaml"))
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as teacher.steps=100",
    )
    parser.add_argument("--seconds", type=float, help="stop after so long; the next call goes on")
    parser.add_argument("--which", choices=("teacher", "student"), default="student", help="export: whose transformer")
    parser.add_argument("--output", type=Path, default=Path("weights/tiny"), help="pack, export: where to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        settings = load_structured(options.config, Settings, options.set)
        shop = Workshop(settings, options.folder, torch.device(options.device))
        (options.folder / "settings.json").write_text(json.dumps(dataclasses.asdict(settings), indent=1) + "\n")
        if options.stage == "pack":
            for path in sorted(options.folder.glob("*.pt")):
                if path.stem in STAGES:
                    saved = load_state(path, torch.device("cpu"))
                    pack(saved["stage"], saved["step"], path.stem, options.output)
            return 0
        if options.stage == "export":
            export(shop, options.which, options.output)
            return 0
        done = {
            "vae": lambda: train_vae(shop, options.seconds),
            "teacher": lambda: train_teacher(shop, options.seconds),
            "student": lambda: train_student(shop, options.seconds),
        }[options.stage]()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logger.info("%s %s", options.stage, "is done" if done else "stopped for now; the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
