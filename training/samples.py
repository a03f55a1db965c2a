"""Videos of a network in training: contact sheets, and the choice of the snapshot that is exported."""
from __future__ import annotations

import json
import logging

import torch
from torch import Tensor

from evaluation.study.readers import score, spare_processors
from pipeline.sampler import FewStepSampler
from training.memory import RolloutMemory, Rotation
from training.parts import CaptionEncoder
from training.sheets import contact_sheet
from training.student import StudentStage
from training.workshop import Workshop, averaged
from training.world import sample
from wan.model import CausalWanModel
from wan.stream import to_uint8

logger = logging.getLogger(__name__)

CHOICE, CHOICE_SEED = ("colour", "shape", "count", "background", "motion"), 20_000
SHEET_CLIPS, SHEET_COLUMNS = 10, 6


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
