"""Speed, memory and error, with random weights: timings do not depend on them.

    python -m benchmarks speed --policy deep_forcing --output speed.json
    python -m benchmarks stream --measure wan_vae --seconds 600 --video long.mp4
    python -m benchmarks stream --policy rolling_forcing --measure tiny_vae
    python -m benchmarks speed --policy deep_sink --compare kv_cache.window_frames=21 kv_cache.window_frames=15
    python -m benchmarks sweep --policy self_forcing --measure dit --lengths 5 60 600
    python -m benchmarks exactness --seconds 60
    python -m benchmarks endurance --seconds 600
    python -m benchmarks memory --policy packforcing_4 --seconds 120
    python -m benchmarks attention

The unit of steady time is a prune cycle: the chunks from one prune to the next, or a clip of a video that is made of
clips. A warm-up video runs through every window length first. `stream` measures every config that forgets; the other
tasks take the passes of a chunk apart, which the chunkwise pipeline alone allows. Each task prints a table and writes a
JSON with device, versions, revision and command.
Exit status: 0 done, 2 bad input, 130 interrupted.
"""
from __future__ import annotations

import argparse
import logging
import shlex
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import parse_arguments, setting_of
from benchmarks.attention import measure_attention
from benchmarks.clock import clock_of
from benchmarks.cycles import LEAST_CYCLES, Schedule, chunk_seconds, schedule_of_cycles, schedule_of_seconds
from benchmarks.endurance import endure
from benchmarks.exactness import EXACT, REFERENCE, compare_latents
from benchmarks.memory import measure_memory
from benchmarks.plots import Panel, draw
from benchmarks.report import (
    attention_table,
    comparison_table,
    difference_table,
    environment,
    length_table,
    memory_table,
    speed_table,
    window_table,
    write_json,
)
from benchmarks.settings import Setting
from benchmarks.speed import compare, measure
from benchmarks.subject import Subject, refuse_other_pipelines
from benchmarks.summary import cycle_means
from benchmarks.sweep import sweep_lengths, sweep_windows
from pipeline.build import RunPlan
from utils.config import ConfigError
from utils.devices import choose_device
from utils.outputs import check_writable, reason

logger = logging.getLogger("benchmarks")

Result = tuple[str, dict[str, Any]]  # what is printed, what is written


def run_speed(options: argparse.Namespace, base: Setting, device: torch.device) -> Result:
    if options.latencies < 1:
        raise ConfigError(f"--latencies {options.latencies} is too small. Ask for 1 or more.")
    settings = [base.changed(text) for text in options.compare] if options.compare else [base]
    plans = [setting.plan(device) for setting in settings]
    schedules = [_schedule(options, plan) for plan in plans]
    subjects = [Subject(setting, plan) for setting, plan in zip(settings, plans, strict=True)]
    described = [setting.describe(plan) for setting, plan in zip(settings, plans, strict=True)]
    clock, lines = clock_of(device), {}
    for counted in options.measure:
        logger.info("%s: %d chunks each, after a warm-up", counted, len(schedules[0].windows))
        if options.compare:
            lines[counted] = compare(tuple(subjects), counted, tuple(schedules), clock, options.latencies)
        else:
            lines[counted] = measure(subjects[0], counted, schedules[0], clock, options.latencies)
    if options.compare:
        return comparison_table(options.compare, lines), {
            "compared": options.compare, "settings": described, "measured": lines,
        }
    return speed_table(lines), {"setting": described[0], "measured": lines}


def run_stream(options: argparse.Namespace, base: Setting, device: torch.device) -> Result:
    if options.latencies < 1:
        raise ConfigError(f"--latencies {options.latencies} is too small. Ask for 1 or more.")
    if options.video is not None:
        _check_file("--video", options.video, ".mp4")
        if len(options.measure) > 1:
            raise ConfigError(f"--video {options.video} holds one video. Name one decoder with --measure.")
        options.video.parent.mkdir(parents=True, exist_ok=True)
    plan = base.plan(device)
    schedule, lines = _schedule(options, plan), {}
    measure_stream = import_module("benchmarks.stream").measure_stream  # needs video codecs, which nothing else does
    for counted in options.measure:
        logger.info("%s: %d chunks, after a warm-up", counted, len(schedule.windows))
        lines[counted] = measure_stream(plan, counted, base.batch, schedule, options.latencies, options.video)
    words = [f"a chunk shows {plan.loop.chunk_pixel_frames:.4g} pixel frames"]
    words += [
        f"{name}: first minute {line.first_minute_ms:.1f} ms, last {line.last_minute_ms:.1f} ms a chunk: "
        f"{line.last_over_first:.4f}" for name, line in lines.items()
    ]
    ends = [chunk_seconds(plan) * cycle.stop for cycle in schedule.cycles]
    curves = {name: (ends, cycle_means(schedule, line.speed.every_chunk_ms)) for name, line in lines.items()}
    _draw(options, [Panel("as the engine streams them", "seconds of video", "ms a chunk", curves)])
    table = speed_table({name: line.speed for name, line in lines.items()})
    return "\n".join([table, *words]), {"setting": base.describe(plan), "streamed": lines}


def run_sweep(options: argparse.Namespace, base: Setting, device: torch.device) -> Result:
    clock, plan, tables, panels = clock_of(device), base.plan(device), [], []
    result: dict[str, Any] = {"setting": base.describe(plan)}
    if "length" in options.over:
        schedule_of_seconds(plan, max(options.lengths))  # refuse before anything is built
        subject = Subject(base, plan)
        lengths = {name: sweep_lengths(subject, name, options.lengths, clock) for name in options.measure}
        del subject
        result["lengths"] = lengths
        tables.append(length_table(lengths))
        lines = {name: ([p.seconds for p in points if p.cycle_ms], [p.cycle_ms for p in points if p.cycle_ms])
                 for name, points in lengths.items()}
        panels.append(Panel("after so long a video", "seconds of video", "ms a chunk", lines, logarithmic_x=True))
    if "window" in options.over:
        windows = {
            name: sweep_windows(base, device, name, options.windows, options.cycles, clock) for name in options.measure
        }
        result["windows"] = windows
        tables.append(window_table(windows))
        lines = {name: ([p.window_frames for p in sweep.points], [p.speed.cycle_ms.median for p in sweep.points])
                 for name, sweep in windows.items()}
        panels.append(Panel("with a window of this size", "latent frames", "ms a chunk", lines))
    _draw(options, panels)
    return "\n\n".join(tables), result


def run_exactness(options: argparse.Namespace, base: Setting, device: torch.device) -> Result:
    if options.every < 1:
        raise ConfigError(f"--every {options.every} is too small. Ask for 1, all chunks, or more.")
    first, *rest = [base.changed(text) for text in options.compare] if options.compare else [base]
    plan = first.plan(device)
    others = dict(zip(["candidate"], rest, strict=False))
    alone = options.free_running and bool(rest)  # a float32 chunk takes ten times as long, and it would make them all
    if plan.dtype != torch.float32 and not alone:
        others[EXACT] = replace(first, dtype="float32")
    if not others:
        raise ConfigError("float32 is what errors are measured against. Use --dtype bfloat16, or --compare A B.")
    plans = {name: setting.plan(device) for name, setting in others.items()}
    for other in plans.values():
        _refuse_other_videos(plan, other, first.batch, rest, free_running=options.free_running)
    subjects = {name: Subject(others[name], plans[name]) for name in others}
    pairs = compare_latents(
        Subject(first, plan), subjects, seconds=options.seconds, every=options.every,
        free_running=options.free_running,
    )
    result: dict[str, Any] = {
        "settings": {REFERENCE: first.describe(plan)} | {n: others[n].describe(plans[n]) for n in others},
        "seconds": options.seconds, "common_state": not options.free_running, "differences": pairs,
    }
    ours, theirs = (pairs.get(f"{name} against {EXACT}") for name in (REFERENCE, "candidate"))
    table = difference_table(pairs)
    lines = {}
    for name, pair in pairs.items():
        drawn = [(c.chunk, c.relative_error) for c in pair.chunks if c.relative_error is not None]
        lines[name] = [chunk_seconds(plan) * chunk for chunk, _ in drawn], [100 * error for _, error in drawn]
    title = "each from its own memory" if options.free_running else "each chunk from one memory"
    _draw(options, [Panel(title, "seconds of video", "error of the latents, %", lines)])
    if ours and theirs and ours.relative_error_median and theirs.relative_error_median is not None:
        result["candidate_error_over_reference_error"] = theirs.relative_error_median / ours.relative_error_median
        table += f"\nthe candidate's median error is {result['candidate_error_over_reference_error']:.3f} times " \
                 "the reference's"
    return table, result


def run_endurance(options: argparse.Namespace, base: Setting, device: torch.device) -> Result:
    plan = base.plan(device)
    schedule = schedule_of_seconds(plan, options.seconds)
    endurance = endure(Subject(base, plan), schedule, clock_of(device))
    words = [
        speed_table({"dit": endurance.speed}),
        f"first minute {endurance.first_minute_ms:.1f} ms, last {endurance.last_minute_ms:.1f} ms a chunk: "
        f"{endurance.last_over_first:.4f}; all finite: {endurance.all_finite}",
    ]
    return "\n".join(words), {"setting": base.describe(plan), "seconds": options.seconds, "endurance": endurance}


def run_memory(options: argparse.Namespace, base: Setting, device: torch.device) -> Result:
    plan = base.plan(device)
    cost = measure_memory(Subject(base, plan), schedule_of_seconds(plan, options.seconds), clock_of(device))
    return memory_table(cost), {"setting": base.describe(plan), "seconds": options.seconds, "memory": cost}


def run_attention(options: argparse.Namespace, base: Setting, device: torch.device) -> Result:
    plan = base.plan(device)
    refuse_other_pipelines(base, plan)
    lines = measure_attention(plan, schedule_of_cycles(plan, LEAST_CYCLES), clock_of(device))
    return attention_table(lines), {"setting": base.describe(plan), "kernels": lines}


def _schedule(options: argparse.Namespace, plan: RunPlan) -> Schedule:
    if options.seconds is not None:
        return schedule_of_seconds(plan, options.seconds)
    return schedule_of_cycles(plan, LEAST_CYCLES if options.cycles is None else options.cycles)


def _refuse_other_videos(
    plan: RunPlan, other: RunPlan, batch: int, rest: list[Setting], *, free_running: bool,
) -> None:
    """Raise ConfigError unless both make the same chunks of the same video, from memories of one shape."""
    same = plan.geometry == other.geometry and plan.architecture == other.architecture
    if not same or any(setting.batch != batch for setting in rest):
        raise ConfigError("--compare: latents can be compared for one model, size, chunk and batch only.")
    if plan.policy != other.policy and not free_running:
        raise ConfigError("--compare: two cache policies cannot start from one memory. Add --free_running.")


def _draw(options: argparse.Namespace, panels: list[Panel]) -> None:
    """Panels beside the JSON, or where --plot says; without matplotlib a line that says so."""
    plot = options.plot or options.output.with_suffix(".png")
    try:
        plot.parent.mkdir(parents=True, exist_ok=True)
        draw(panels, plot)
        logger.info("wrote %s", plot)
    except (ConfigError, OSError) as error:  # the numbers are worth more than their picture
        logger.warning("no plot: %s", reason(error))


def _check_file(flag: str, path: Path, suffix: str) -> None:
    """Before hours are spent: the file can be made, and is no other flag's. Raises: ConfigError, OSError."""
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder. Name a file in it.")
    if path.suffix != suffix:
        raise ConfigError(f"{flag} {str(path)!r} must end in {suffix}. Rename it.")
    check_writable(path.parent, flag)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input is an error on stderr and exit status 2."""
    options = parse_arguments(__doc__, arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    tasks = {"speed": run_speed, "stream": run_stream, "sweep": run_sweep, "exactness": run_exactness,
             "endurance": run_endurance, "memory": run_memory, "attention": run_attention}
    begin = time.perf_counter()
    try:
        _check_file("--output", options.output, ".json")
        if getattr(options, "plot", None) is not None:
            _check_file("--plot", options.plot, ".png")
        device = choose_device(options.device)
        text, result = tasks[options.task](options, setting_of(options), device)
        command = shlex.join(["python", "-m", "benchmarks", *(sys.argv[1:] if arguments is None else arguments)])
        where = environment(device, options.revision)
        about = {"what": options.task, "command": command, "environment": where}
        write_json(options.output, about | result | {"wall_s": time.perf_counter() - begin})
    except (ValueError, OSError, torch.OutOfMemoryError) as error:  # every error class of this project is a ValueError
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    print(f"{where.device}; {versions}; revision {where.revision}\n\n{text}")
    logger.info("wrote %s", options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
