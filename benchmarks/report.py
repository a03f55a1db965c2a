"""Results for people and for files: tables, and one JSON with where and how it was measured."""
from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention import KernelSpeed
from benchmarks.exactness import Differences
from benchmarks.memory import MemoryCost, kv_lines
from benchmarks.speed import Comparison
from benchmarks.summary import Speed, Spread
from benchmarks.sweep import LengthPoint, WindowSweep
from utils.config import REPOSITORY
from utils.files import write_atomically
from utils.versions import installed_versions

PACKAGES = ("diffusers", "triton", "flash-attn", "fa3-fwd", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "numpy")


@dataclass(frozen=True)
class Environment:
    """Where a number comes from."""

    device: str
    versions: dict[str, str]  # of what is installed
    threads: int              # of torch, on the host
    revision: str | None      # of the repository, `-dirty` if files differ from it; None: no repository


def environment(device: torch.device, revision: str | None) -> Environment:
    """Args: revision: what to say in place of what git tells."""
    versions = {"torch": torch.__version__}
    if device.type == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    versions |= installed_versions(PACKAGES)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine()
    return Environment(name, versions, torch.get_num_threads(), revision or git_revision())


def git_revision(folder: Path = REPOSITORY) -> str | None:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write `result`, dataclasses and all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, default=_plain, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no place in a JSON.")


# --- tables -------------------------------------------------------------------------------------------

def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as need be, the first to the left, the others to the right; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in ruled
    )


def speed_table(lines: Mapping[str, Speed]) -> str:
    """One row a line, and below what its chunks are made of."""
    below = []
    for name, speed in lines.items():
        stages = ", ".join(f"{stage} {ms:.1f}" for stage, ms in speed.stage_ms.items())
        windows = ", ".join(f"{frames}: {ms:.1f}" for frames, ms in speed.ms_by_window_frames.items())
        below += [
            f"{name}: {speed.counted}; {speed.cycles} prune cycles of {speed.chunks} chunks",
            f"  stages, ms: {stages}; by frames in the window, ms: {windows}",
        ]
    return "\n".join([_speed_rows(lines), *below])


def _speed_rows(lines: Mapping[str, Speed]) -> str:
    head = ("", "ms a chunk (quartiles)", "p95 chunk", "FPS", "first frames ms", "peak GiB (reserved)")
    return table([head, *(_speed_row(name, speed) for name, speed in lines.items())])


def _speed_row(name: str, speed: Speed) -> tuple[str, ...]:
    memory = speed.memory
    reserved = "" if memory.peak_reserved_gib is None else f" ({memory.peak_reserved_gib:.2f})"
    first = "-" if speed.first_frames_ms is None else f"{_middle(speed.first_frames_ms)} for {speed.first_pixel_frames}"
    return (
        name, _middle(speed.cycle_ms), f"{speed.chunk_ms.p95:.1f}", f"{speed.fps:.2f}", first,
        f"{memory.peak_allocated_gib:.2f}{reserved}",
    )


def comparison_table(names: Sequence[str], lines: Mapping[str, Comparison]) -> str:
    """Both settings line by line, and the ratio of neighbouring cycles' times a pixel frame."""
    names = [f"{letter} {name}" for letter, name in zip("AB", names, strict=True)]
    both = {}
    for counted, pair in lines.items():
        both |= {f"{counted}, {names[0]}": pair.first, f"{counted}, {names[1]}": pair.second}
    ratios = [
        f"{counted}: a pixel frame of {names[1]} takes {_middle(pair.second_over_first, 4)} times as long as one of "
        f"{names[0]}; "
        f"{pair.second_over_first.count} pairs of cycles, from {pair.second_over_first.least:.4f} "
        f"to {pair.second_over_first.most:.4f}"
        for counted, pair in lines.items()
    ]
    return "\n".join([speed_table(both), *ratios])


def _middle(spread: Spread, digits: int = 1) -> str:
    return f"{spread.median:.{digits}f} ({spread.lower_quartile:.{digits}f}, {spread.upper_quartile:.{digits}f})"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.2e}"


def length_table(lines: Mapping[str, Sequence[LengthPoint]]) -> str:
    rows = [("", "seconds", "chunks", "made in s", "FPS", "ms a chunk", "allocated GiB")]
    for name, points in lines.items():
        rows += [
            (name, f"{p.seconds:g}", str(p.chunks), f"{p.total_s:.1f}", f"{p.fps:.2f}",
             "-" if p.cycle_ms is None else f"{p.cycle_ms:.1f}",
             "-" if p.allocated_gib is None else f"{p.allocated_gib:.2f}")
            for p in points
        ]
    return table(rows)


def window_table(lines: Mapping[str, WindowSweep]) -> str:
    speeds = {
        f"{name}, window {point.window_frames}": point.speed for name, sweep in lines.items() for point in sweep.points
    }
    refused = {frames: why for sweep in lines.values() for frames, why in sweep.refused.items()}
    return "\n".join([_speed_rows(speeds), *(f"window {frames} left out: {why}" for frames, why in refused.items())])


def memory_table(cost: MemoryCost) -> str:
    """Time of each part, then keys and values."""
    rows = [("", "ms a chunk (quartiles)", "share of a chunk")]
    rows.append(("chunk", _middle(cost.chunk_ms), "-"))
    for name, ms in cost.part_ms.items():
        share = f"{100 * cost.share[name]:.3f} %" if name in cost.share else "-"
        rows.append((name, _middle(ms, 3), share))
    rows.append(("rotation", "window less gather", f"{100 * cost.share['rotation']:.3f} %"))
    return "\n".join([
        table(rows), f"at most {max(cost.context_tokens):,} tokens of context, {cost.context_tokens[-1]:,} at the end",
        f"last minute over first: {cost.last_over_first:.4f}", *kv_lines(cost),
    ])


def attention_table(lines: Sequence[KernelSpeed]) -> str:
    """A row a kernel and window."""
    rows = [("kernel", "frames seen", "queries x keys", "ms a call (quartiles)", "TFLOP/s", "error")]
    for line in lines:
        rows.append((
            line.kernel, f"{line.window_frames:g}", f"{line.query_tokens:,} x {line.key_tokens:,}",
            _middle(line.call_ms, 3), f"{line.tflops:.3g}", _error(line.relative_error),
        ))
    return table(rows)


def difference_table(pairs: Mapping[str, Differences]) -> str:
    rows = [("", "chunks", "median error", "worst error", "top-C alike", "finite")]
    for name, pair in pairs.items():
        alike = [chunk.top_c_overlap for chunk in pair.chunks if chunk.top_c_overlap is not None]
        errors = pair.relative_error_median, pair.relative_error_max
        rows.append((
            name, str(len(pair.chunks)), *map(_error, errors),
            f"{sum(alike) / len(alike):.4f}" if alike else "-", "yes" if pair.all_finite else "no",
        ))
    return table(rows)
