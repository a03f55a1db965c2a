"""Figures of what was recorded: attention by age, selections from chunk to chunk, where on the frames they lie."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.sweep.figures import frames_at
from evaluation.sweep.record import Recorded, read_recorded, records_path
from evaluation.sweep.results import Saved
from utils.figures import saved_figure

SHOWN_FRAMES = 6


def draw_recorded(saved: Saved, folder: Path) -> dict[str, Path]:
    """Every figure of every recorded method: title -> file."""
    drawn = {}
    for method in saved.sweep["record"]["methods"]:
        path = records_path(saved.folder, method)
        if not path.exists():
            continue
        recorded = read_recorded(path)
        kinds = {"attention over earlier frames": draw_attention}
        if recorded.chosen is not None:
            kinds["Jaccard distance of consecutive selections"] = draw_jaccard
        if recorded.chosen is not None and recorded.about["chosen_are"] == "tokens":
            kinds["selection frequency over positions"] = draw_frequency
            video = saved.path_of(recorded.about["video"])
            if video.exists():
                kinds["selection on the frames"] = lambda recorded, title, path, video=video: draw_on_frames(
                    recorded, video, title, path)
        for kind, draw in kinds.items():
            title = f"{method}: {kind}"
            drawn[title] = folder / f"{method}_{kind.replace(' ', '_')}.png"
            draw(recorded, title, drawn[title])
    return drawn


def by_age(recorded: Recorded) -> Tensor:
    """Mean share of attention on frames of each age [layers, heads, ages]: age 0 is a chunk's own last frame.

    The mean is over the chunks that are old enough to have frames of that age.
    """
    chunks, _, _, frames = recorded.attention.shape
    size = recorded.about["chunk_frames"]
    first = frames - (chunks - 1) * size  # frames of the first chunk
    total, count = torch.zeros(recorded.attention.shape[1:]), torch.zeros(frames)
    for index, shares in enumerate(recorded.attention):
        end = first + index * size
        total[..., :end] += shares[..., :end].flip(-1)
        count[:end] += 1
    return total / count


def jaccard_distances(chosen: Tensor) -> Tensor:
    """1 - |both| / |either| of each selection and the one before; -1 stands for none.

    Shapes: chosen [events, layers, C] -> [events - 1, layers].
    """
    sets = [[set(layer[layer >= 0].tolist()) for layer in event] for event in chosen]
    return torch.tensor([
        [1 - len(a & b) / max(1, len(a | b)) for a, b in zip(before, after, strict=True)]
        for before, after in zip(sets, sets[1:], strict=False)
    ])


def frequency(recorded: Recorded) -> Tensor:
    """How often each position of a frame is chosen, as a share of all that was chosen [rows, columns]."""
    rows, columns = recorded.about["rows"], recorded.about["columns"]
    places = (recorded.chosen % (rows * columns)).flatten()
    return torch.bincount(places, minlength=rows * columns).reshape(rows, columns) / len(places)


def draw_attention(recorded: Recorded, title: str, path: Path) -> None:
    shares = by_age(recorded)
    with saved_figure(path, (9, 1.2 + 1.6 * len(recorded.layers))) as figure:
        figure.suptitle(title)
        panels = np.atleast_1d(figure.subplots(len(recorded.layers), 1, sharex=True))
        for axes, layer, image in zip(panels, recorded.layers, shares, strict=True):
            shown = axes.imshow(image.clamp(min=1e-6).log10(), aspect="auto", vmin=-4, vmax=0, cmap="magma")
            axes.set(ylabel=f"layer {layer}\nhead")
        panels[-1].set(xlabel="age in latent frames (0: the chunk's newest)")
        figure.colorbar(shown, ax=list(panels), label="log10 of the share of attention")


def draw_jaccard(recorded: Recorded, title: str, path: Path) -> None:
    distances = jaccard_distances(recorded.chosen)
    with saved_figure(path, (8, 3.6)) as figure:
        axes = figure.subplots()
        if len(distances):
            chunks = recorded.event_chunks[1:]
            axes.fill_between(chunks, distances.min(1).values, distances.max(1).values, alpha=0.2, label="all layers")
            axes.plot(chunks, distances.mean(1), marker="o", label="mean over layers")
            axes.legend()
        axes.set(title=title, xlabel="chunk", ylabel="Jaccard distance", ylim=(0, 1))
        axes.grid(alpha=0.3)


def draw_frequency(recorded: Recorded, title: str, path: Path) -> None:
    with saved_figure(path, (7, 4)) as figure:
        axes = figure.subplots()
        shown = axes.imshow(100 * frequency(recorded), cmap="viridis")
        axes.set(title=title, xlabel="column", ylabel="row")
        figure.colorbar(shown, ax=axes, label="% of all chosen tokens")


def draw_on_frames(recorded: Recorded, video: Path, title: str, path: Path) -> None:
    """The last selection, on the frames that most of its tokens come from: brighter where more layers chose."""
    tokens = recorded.about["rows"] * recorded.about["columns"]
    last = recorded.chosen[-1]                                                   # [layers, C]
    counts = torch.bincount((last // tokens).flatten())
    frames = counts.argsort(descending=True)[:SHOWN_FRAMES]
    frames = frames[counts[frames] > 0].sort().values.tolist()
    stride = recorded.about["temporal_stride"]
    pictures = frames_at(video, [frame * stride for frame in frames])
    with saved_figure(path, (3.2 * len(frames), 3)) as figure:
        figure.suptitle(f"{title} (chunk {recorded.event_chunks[-1]})")
        panels = np.atleast_1d(figure.subplots(1, len(frames)))
        for axes, frame, picture in zip(panels, frames, pictures, strict=True):
            places = last[last // tokens == frame] % tokens
            share = torch.bincount(places, minlength=tokens).reshape(recorded.about["rows"], -1) / len(last)
            axes.imshow(picture, extent=(0, 1, 0, 1), aspect=picture.shape[0] / picture.shape[1])
            axes.imshow(share, extent=(0, 1, 0, 1), aspect=picture.shape[0] / picture.shape[1], cmap="hot",
                        alpha=0.25 + 0.5 * share.numpy(), vmin=0, vmax=1)
            axes.set(title=f"latent frame {frame}: {int(counts[frame])}", xticks=[], yticks=[])
