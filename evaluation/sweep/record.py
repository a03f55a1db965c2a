"""What attention sees and what selection keeps, watched from outside: the pipeline knows nothing of it.

    <folder>/records/<variant>.safetensors
        attention [chunks, layers, heads, frames]: share of a chunk's attention on each latent frame of the video, mean
            over the chunk's queries in its last denoising pass; a frame that is not seen has 0
        chosen [events, all layers, C]: tokens that Participative Compression chose, as frame * frame_tokens + place; or
            packets that PackForcing shows, as the first frame of the chunk that they stand for, filled up with -1
        event_chunks [events]: in which chunk

One video is watched, the first prompt's, alone in its batch.
"""
from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from evaluation.sweep.make import Task
from evaluation.sweep.settings import Recording
from evaluation.sweep.work import Unit
from pipeline.chunkwise import ChunkwisePipeline
from pipeline.engine import Engine
from pipeline.length import asked_pixel_frames, video_length
from pipeline.loops import ChunkwiseLoop
from utils.config import ConfigError
from utils.files import write_atomically
from wan.backends import AttentionBackend

logger = logging.getLogger(__name__)

RECORDS = "records"


@dataclass
class Watcher:
    """Watches one pipeline of batch 1 while `watching` is entered; call `next_chunk` after each of its chunks."""

    pipeline: ChunkwisePipeline
    layers: Sequence[int]
    attention: list[Tensor] = field(default_factory=list)     # of each chunk [layers, heads, frames until its end]
    chosen: list[Tensor] = field(default_factory=list)        # of each event [all layers, C]
    event_chunks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tokens: list[Tensor] = [torch.empty(0, dtype=torch.long)] * len(self.pipeline.model.blocks)
        self._chunk = self._passes = self._start = 0
        self._now: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks and wrapped kernels are there inside alone."""
        model = self.pipeline.model
        kernels = {index: model.blocks[index].self_attn.backend for index in self.layers}
        hook = model.register_forward_hook(self._after_pass)
        for index, kernel in kernels.items():
            model.blocks[index].self_attn.backend = self._watched(index, kernel)
        try:
            yield
        finally:
            hook.remove()
            for index, kernel in kernels.items():
                model.blocks[index].self_attn.backend = kernel

    def next_chunk(self, frames: int) -> None:
        """The chunk of so many latent frames is finished."""
        self.attention.append(torch.stack([self._now[index] for index in self.layers]))
        self._chunk, self._passes, self._start, self._now = self._chunk + 1, 0, self._start + frames, {}

    def _after_pass(self, model: torch.nn.Module, arguments: tuple, flow: Tensor) -> None:
        """Runs after denoising passes. The first one has decided what the chunk's memory will be."""
        self._passes += 1
        if self._passes > 1:
            return
        tokens = self.pipeline.geometry.frame_tokens
        born = torch.arange(self._start * tokens, (self._start + flow.shape[1]) * tokens)
        plans = [self.pipeline.cache.layer(index).plan for index in range(len(self._tokens))]
        chosen = None
        if plans[0].chosen is not None:
            chosen = [known[plan.chosen[0].cpu()] for known, plan in zip(self._tokens, plans, strict=True)]
        elif plans[0].packets is not None and plans[0].packets.shape[1]:
            chosen = [self._packets(index).cpu() for index in range(len(plans))]
        if chosen is not None:
            self.chosen.append(torch.stack(chosen))
            self.event_chunks.append(self._chunk)
        self._tokens = [
            torch.cat([known[plan.retain[0].cpu()], born]) for known, plan in zip(self._tokens, plans, strict=True)
        ]

    def _watched(self, index: int, kernel: AttentionBackend) -> AttentionBackend:
        def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if self._passes == self.pipeline.sampler.num_passes - 1:
                self._now[index] = self._shares(index, query, keys)
            return kernel(query, keys, values)

        return attend

    def _shares(self, index: int, query: Tensor, keys: Tensor) -> Tensor:
        """Shares [heads, frames] of this layer's attention; query [1, L, H, D], keys [1, A + packets + L, H, D].

        A packet's share is spread evenly over the frames that it stands for.
        """
        layer, new = self.pipeline.cache.layer(index), query.shape[1]
        past = layer.store.origin[0, layer.plan.attend[0]].long()
        own = torch.arange(new, device=past.device) // self.pipeline.geometry.frame_tokens + self._start
        packed = keys.shape[1] - len(past) - new  # tokens of packets, between the two
        weight, spread = [torch.ones_like(past)], [past]
        members = torch.arange(keys.shape[1], device=past.device)
        token = [members[:len(past)]]
        if packed:
            starts, length = self._packets(index), layer.archive.grid.chunk_frames
            first = starts.repeat_interleave(packed // len(starts))
            spread.append((first.unsqueeze(1) + torch.arange(length, device=past.device)).flatten())
            token.append(members[len(past):len(past) + packed].repeat_interleave(length))
            weight.append(torch.full_like(spread[-1], length))
        token, frame = torch.cat([*token, members[-new:]]), torch.cat([*spread, own])
        weight = torch.cat([*weight, torch.ones_like(own)])
        shares = []
        for head in range(query.shape[2]):  # one after the other: a map of L x (A + L) is large
            scores = query[0, :, head].float() @ keys[0, :, head].float().T / query.shape[-1] ** 0.5
            mass = scores.softmax(-1).mean(0)
            total = mass.new_zeros(self._start + new // self.pipeline.geometry.frame_tokens)
            shares.append(total.index_add_(0, frame, mass[token] / weight))
        return torch.stack(shares).cpu()

    def _packets(self, index: int) -> Tensor:
        """First frames [K] of the chunks whose packets this layer shows."""
        layer = self.pipeline.cache.layer(index)
        return layer.archive.start[layer.plan.packets[0]]

    def tensors(self) -> dict[str, Tensor]:
        """All that was seen, as the file holds it."""
        frames = max(chunk.shape[-1] for chunk in self.attention)
        padded = [torch.nn.functional.pad(chunk, (0, frames - chunk.shape[-1])) for chunk in self.attention]
        found = {"attention": torch.stack(padded), "event_chunks": torch.tensor(self.event_chunks, dtype=torch.long)}
        if self.chosen:
            most = max(event.shape[1] for event in self.chosen)
            found["chosen"] = torch.stack([
                torch.nn.functional.pad(event, (0, most - event.shape[1]), value=-1) for event in self.chosen
            ])
        return found


@dataclass(frozen=True)
class Recorded:
    """What a file holds."""

    attention: Tensor       # [chunks, layers, heads, frames]
    layers: list[int]
    chosen: Tensor | None   # [events, all layers, C]; None if nothing is ever chosen
    event_chunks: list[int]
    about: dict[str, Any]   # video, rows, columns, temporal_stride, chunk_frames, seconds


def record_units(folder: Path, tasks: Sequence[Task], recording: Recording) -> list[Unit]:
    """One unit a task.

    Raises: ConfigError for a method whose loop is not chunk by chunk: it has no chunk to watch.
    """
    for task in tasks:
        if not isinstance(task.plan.loop, ChunkwiseLoop):
            raise ConfigError(f"record: {task.variant.name} does not go chunk by chunk. Leave it out of its methods.")
    return [
        Unit(
            f"record.{task.variant.name}",
            lambda task=task: _is_recorded(folder, task, recording),
            lambda task=task: _record(folder, task, recording),
        )
        for task in tasks
    ]


def records_path(folder: Path, variant: str) -> Path:
    return folder / RECORDS / f"{variant}.safetensors"


def read_recorded(path: Path) -> Recorded:
    """Raises: ConfigError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        chosen = tensors.get("chosen")
        if chosen is not None and not chosen.numel():  # a budget that leaves no top-C
            chosen = None
        return Recorded(
            tensors["attention"], about.pop("layers"), chosen, tensors["event_chunks"].tolist(), about,
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}). Run the same sweep command again: what it holds is recorded anew."
        ) from error


def _is_recorded(folder: Path, task: Task, recording: Recording) -> bool:
    path = records_path(folder, task.variant.name)
    if not path.exists():
        return False
    try:
        found = read_recorded(path)
    except ConfigError as error:
        logger.warning("%s", error)
        return False
    asked = task.jobs[0].fingerprint, recording.seconds, _layers(task, recording)
    return (found.about["fingerprint"], found.about["seconds"], found.layers) == asked


def _layers(task: Task, recording: Recording) -> list[int]:
    """Those whose attention is kept."""
    last = task.plan.architecture.num_layers - 1
    return recording.layers or sorted({0, (last + 1) // 2, last})


def _record(folder: Path, task: Task, recording: Recording) -> None:
    plan, job = task.plan, task.jobs[0]
    layers = _layers(task, recording)
    engine = Engine(plan)
    engine.prepare(job.item.texts)
    length = video_length(plan, asked_pixel_frames(plan, latent_frames=0, seconds=recording.seconds), given_frames=0)
    watcher = Watcher(engine.pipeline_for(1), layers)
    with watcher.watching():
        for chunk in engine.stream([job.request], length.latent_frames):
            watcher.next_chunk(chunk.span.frames)
    g = plan.geometry
    about = {
        "fingerprint": job.fingerprint, "seconds": recording.seconds, "layers": layers,
        "video": f"{task.variant.name}/{job.stem}.mp4", "rows": g.rows, "columns": g.columns,
        "chosen_are": "tokens" if plan.policy.compression is None else "packets",
        "temporal_stride": g.temporal_stride, "chunk_frames": g.chunk_frames,
    }
    path = records_path(folder, task.variant.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(watcher.tensors(), {"about": json.dumps(about)}))
