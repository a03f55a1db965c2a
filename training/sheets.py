"""Contact sheets: one row a video, one column a moment."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

TEXT_HEIGHT = 12


def contact_sheet(videos: Sequence[Tensor], captions: Sequence[str], columns: int, path: Path) -> None:
    """Write a PNG of `columns` moments of each video, evenly spaced, its caption above.

    Shapes: each video uint8 [T, H, W, 3] on the CPU.
    """
    height, width = videos[0].shape[1:3]
    sheet = Image.new("RGB", (columns * width, len(videos) * (height + TEXT_HEIGHT)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        top = row * (height + TEXT_HEIGHT)
        pen.text((2, top), caption, fill="black")
        for column, frame in enumerate(torch.linspace(0, len(video) - 1, columns).round().long().tolist()):
            sheet.paste(Image.fromarray(video[frame].numpy()), (column * width, top + TEXT_HEIGHT))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
