"""What the stages of the tiny model's recipe share: settings, sizes, data, and the networks made so far."""
from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor

from training.data import LatentClips, make_clips, normalise, statistics
from training.loop import SNAPSHOTS, load_state, save_state
from training.memory import dense
from training.parts import CaptionEncoder, architecture_of, make_text_encoder, make_tokenizer, make_vae
from training.settings import Settings
from training.vae import working_dtype
from training.world import spellings, words
from utils.config import ConfigError, load_model_spec
from utils.hashing import fingerprint
from wan.geometry import VideoGeometry
from wan.model import CausalWanModel
from wan.vae import WanVAE

logger = logging.getLogger(__name__)


class Workshop:
    """What the stages share: settings, sizes, the networks made so far."""

    def __init__(self, settings: Settings, folder: Path, device: torch.device):
        self.settings, self.folder, self.device = settings, folder, device
        self.spec = load_model_spec(settings.model)
        self.architecture = architecture_of(self.spec)
        self.geometry = VideoGeometry(
            height=self.spec.height, width=self.spec.width, fps=self.spec.fps, chunk_frames=settings.chunk_frames,
            spatial_stride=self.spec.spatial_stride, temporal_stride=self.spec.temporal_stride,
        )
        if settings.vae.path is not None and not Path(settings.vae.path).is_dir():
            raise ConfigError(
                f"vae.path={settings.vae.path!r} is not a folder. Give one with an AutoencoderKLWan in it, such as "
                "weights/tiny/vae, or null to train one."
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
        snapshots = load_state(self.folder / "student.pt", self.device)["stage"][SNAPSHOTS]
        return snapshots[json.loads(path.read_text())["best"]]

    def vae(self) -> AutoencoderKLWan:
        """The trained autoencoder, with raw latents."""
        if self.settings.vae.path is not None:
            vae = AutoencoderKLWan.from_pretrained(self.settings.vae.path).to(self.device)
            return vae.eval().requires_grad_(False)
        vae = make_vae(self.settings.vae, self.architecture.in_dim).to(self.device)
        return averaged(vae, self.averages("vae")).eval().requires_grad_(False)

    def captions(self) -> CaptionEncoder:
        """A fresh text encoder with its tokenizer."""
        tokenizer = make_tokenizer(words(), spellings())
        torch.manual_seed(self.settings.seed)
        encoder = make_text_encoder(self.settings.text, self.architecture.text_dim, tokenizer.get_vocab_size())
        return CaptionEncoder(tokenizer, encoder, self.architecture.text_len)

    def clips(self) -> tuple[LatentClips, LatentClips]:
        """Normalised latents of whole clips and of openings; kept in the folder for settings and autoencoder alike.

        Raises:
            ConfigError: clips that are no whole chunks.
        """
        path, frames, chunk = self.folder / "latents.pt", self.settings.data.latent_frames, self.geometry.chunk_frames
        if frames % chunk:
            raise ConfigError(
                f"data.latent_frames={frames} must be whole chunks of chunk_frames={chunk}. "
                f"Use {frames - frames % chunk or chunk}."
            )
        vae = self.vae()
        made_of = fingerprint({
            "data": dataclasses.asdict(self.settings.data), "chunk_frames": chunk, "seed": self.settings.seed,
            "vae": hash_weights(vae),
        })
        if path.exists():
            if self._latents().get("made_of") == made_of:
                saved = load_state(path, self.device)
                return LatentClips(**saved["clips"]), LatentClips(**saved["openings"])
            logger.info("%s: made by other settings or another autoencoder, and made anew", path)
        vae, captions, s = vae.to(working_dtype(self.device)), self.captions(), self.settings.data
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
            "made_of": made_of, "mean": mean, "std": std,
            "clips": dataclasses.asdict(clips), "openings": dataclasses.asdict(openings),
        })
        return clips, openings

    def statistics(self) -> tuple[list[float], list[float]]:
        saved = self._latents()
        return saved["mean"].tolist(), saved["std"].tolist()

    def _latents(self) -> dict[str, Any]:
        """What `clips` kept; tensors are read from the disk when they are used."""
        return torch.load(self.folder / "latents.pt", map_location="cpu", weights_only=True, mmap=True)

    def decoder(self) -> WanVAE:
        """The autoencoder as inference uses it."""
        vae = self.vae()
        mean, std = self.statistics()
        vae.register_to_config(latents_mean=mean, latents_std=std)
        return WanVAE(vae)


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


def hash_weights(module: torch.nn.Module) -> str:
    """Hex SHA-256 of all parameters, by name."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
