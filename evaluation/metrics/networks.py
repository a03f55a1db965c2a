"""Networks that turn frames, or a text, into features: CLIP and DINO through transformers, from downloaded files.

Pictures are prepared as VBench does: the shorter side to 224 without antialiasing; CLIP takes the centre square,
DINO the whole picture. B frames, D features.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.metrics.protocol import Choices
from utils.config import ConfigError
from utils.download import FILES

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEXT_TOKENS = 77
BATCH = 16


def need_files(group: str, weights: Path) -> Path:
    """The folder that holds the files of a download group. Raises ConfigError if one is missing."""
    targets = [weights / file.target for file in FILES if file.group == group]
    missing = [path for path in targets if not path.is_file()]
    if missing:
        raise ConfigError(
            f"no {missing[0]}. Get the weights with: python -m utils.download --only {group}"
            f"{'' if weights == Path('.') else f' --folder {weights}'}"
        )
    return targets[0].parent


class ClipImages:
    """CLIP's image features, of length 1."""

    def __init__(self, folder: Path, device: str):
        self.model = _clip(folder, device)
        self.device = device
        self.side = self.model.config.vision_config.image_size

    @torch.inference_mode()
    def __call__(self, frames: Sequence[np.ndarray]) -> Tensor:
        """Shapes: uint8 [H, W, 3] each -> float32 [B, D]."""
        pictures = prepare(frames, self.side, "bicubic", CLIP_MEAN, CLIP_STD, square=True)
        model = self.model
        pooled = model.vision_model(pixel_values=pictures.to(self.device)).pooler_output
        return F.normalize(model.visual_projection(pooled), dim=-1).cpu()


class ClipImagesAndText(ClipImages):
    """CLIP's features of pictures and of texts."""

    def __init__(self, folder: Path, device: str):
        from tokenizers import Tokenizer

        super().__init__(folder, device)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(min(TEXT_TOKENS, self.model.config.text_config.max_position_embeddings))

    @torch.inference_mode()
    def text(self, prompt: str) -> Tensor:
        """Features [D] of a prompt, cut after 77 tokens."""
        ids = torch.tensor([self.tokenizer.encode(prompt).ids], device=self.device)
        pooled = self.model.text_model(input_ids=ids).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)[0].cpu()


class DinoImages:
    """DINO's class token, of length 1."""

    def __init__(self, folder: Path, device: str):
        from transformers import ViTModel

        self.model = ViTModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
        self.model.eval().to(device)
        self.device = device
        self.side = self.model.config.image_size

    @torch.inference_mode()
    def __call__(self, frames: Sequence[np.ndarray]) -> Tensor:
        """Shapes: uint8 [H, W, 3] each -> float32 [B, D]."""
        pictures = prepare(frames, self.side, "bilinear", IMAGENET_MEAN, IMAGENET_STD, square=False)
        seen = self.model(pixel_values=pictures.to(self.device), interpolate_pos_encoding=True)
        return F.normalize(seen.last_hidden_state[:, 0], dim=-1).cpu()


class AestheticHead:
    """The LAION linear head on CLIP ViT-L/14: a rating of about 1 to 10, as VBench divides by 10."""

    def __init__(self, images: ClipImages, path: Path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.images = images
        self.head = nn.Linear(state["weight"].shape[1], 1)
        self.head.load_state_dict(state)

    @torch.inference_mode()
    def __call__(self, frames: Sequence[np.ndarray]) -> Tensor:
        """Shapes: uint8 [H, W, 3] each -> float32 [B], rating / 10."""
        return self.head(self.images(frames))[:, 0] / 10


def prepare(
    frames: Sequence[np.ndarray], side: int, mode: str, mean: Sequence[float], std: Sequence[float], *, square: bool,
) -> Tensor:
    """Resize so that the shorter side is `side`, cut the centre square out if asked, normalise. [B, 3, h, w]."""
    pictures = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float()
    height, width = pictures.shape[2:]
    scale = side / min(height, width)
    size = (side, int(width * scale)) if height <= width else (int(height * scale), side)
    pictures = F.interpolate(pictures, size=size, mode=mode, align_corners=False).round().clamp(0, 255) / 255
    if square:
        top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
        pictures = pictures[:, :, top:top + side, left:left + side]
    return (pictures - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def clip_b32(choices: Choices) -> ClipImagesAndText:
    return ClipImagesAndText(need_files("clip", choices.weights), choices.device)


def dino(choices: Choices) -> DinoImages:
    return DinoImages(need_files("dino", choices.weights), choices.device)


def aesthetic(choices: Choices) -> AestheticHead:
    folder = need_files("aesthetic", choices.weights)
    head = next(choices.weights / file.target for file in FILES if file.target.endswith("_linear.pth"))
    return AestheticHead(ClipImages(folder, choices.device), head)


class Batches:
    """Frames gathered so that a network sees several at a time."""

    def __init__(self, network, size: int = BATCH):
        self.network, self.size = network, size
        self.waiting: list[np.ndarray] = []

    def add(self, rgb: np.ndarray) -> Iterator[Tensor]:
        """Answers for earlier frames, one each, when a batch is full."""
        self.waiting.append(rgb)
        if len(self.waiting) == self.size:
            yield from self.rest()

    def rest(self) -> Iterator[Tensor]:
        """Answers for the frames that wait."""
        if self.waiting:
            answers = self.network(self.waiting)
            self.waiting = []
            yield from answers


def _clip(folder: Path, device: str):
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
