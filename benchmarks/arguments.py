"""The command line of the benchmarks."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cycles import LEAST_CYCLES
from benchmarks.decoders import COUNTED
from benchmarks.settings import ATTENTION, PRESETS, SWITCH, Setting

LENGTHS = (5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
WINDOWS = (9, 12, 15, 18, 21, 24, 27, 30)


def parse_arguments(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Flags, checked as far as one flag can be checked alone."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    speed = _task(tasks, "speed", "time of a chunk, first frames, memory")
    _add_measure(speed)
    _add_length(speed)
    _add_compare(speed, "two settings that take turns, cycle by cycle")

    stream = _task(tasks, "stream", "the engine's own stream, of any pipeline: frames a second as a consumer sees them")
    _add_measure(stream, without=("dit",))
    _add_length(stream)
    stream.add_argument("--video", type=Path, metavar="FILE", help="write the measured video to this .mp4 meanwhile")
    _add_plot(stream)

    sweep = _task(tasks, "sweep", "speed over length and window size, with a plot")
    _add_measure(sweep)
    sweep.add_argument("--over", nargs="+", choices=("length", "window"), default=["length", "window"])
    sweep.add_argument("--lengths", type=float, nargs="+", default=LENGTHS, metavar="SECONDS")
    sweep.add_argument("--windows", type=int, nargs="+", default=WINDOWS, metavar="FRAMES")
    sweep.add_argument("--cycles", type=int, default=LEAST_CYCLES, help="for each window (default %(default)s)")
    _add_plot(sweep)

    exactness = _task(tasks, "exactness", "error of the latents from a common state, against a float32 twin")
    exactness.add_argument("--seconds", type=float, default=60.0, help="length of the video (default %(default)s)")
    exactness.add_argument("--every", type=int, default=10, help="compare 2 of so many chunks; 1: all (default 10)")
    exactness.add_argument(
        "--free_running", action="store_true",
        help="each setting remembers what it made itself; two of --compare are held against each other alone",
    )
    _add_plot(exactness)
    _add_compare(exactness, "a reference, and what must compute the same")

    endurance = _task(tasks, "endurance", "ten minutes of the transformer: speed and memory at the end, host waits")
    endurance.add_argument("--seconds", type=float, default=600.0, help="length of the video (default %(default)s)")

    memory = _task(tasks, "memory", "what remembering costs: choosing, windows, compressing; bytes")
    memory.add_argument("--seconds", type=float, default=120.0, help="length of the video (default %(default)s)")

    _task(tasks, "attention", "one layer's attention: time and error of every kernel that is there")
    return parser.parse_args(arguments)


def setting_of(options: argparse.Namespace) -> Setting:
    """The setting that the flags name.

    Raises:
        ConfigError: a value that cannot be used.
    """
    window = [] if options.window is None else [f"kv_cache.window_frames={options.window}"]
    return Setting(
        policy=options.policy, model=options.model, dtype=options.dtype, attention=options.attention,
        compile=options.compile, graphs=options.graphs, decoder=options.decoder, overlap=options.overlap,
        fp8=options.fp8, memory=options.memory,
        resolution=options.resolution, batch=options.batch, overrides=(*window, *options.set),
    )


def _task(tasks: argparse._SubParsersAction, name: str, words: str) -> argparse.ArgumentParser:
    parser = tasks.add_parser(name, help=words, description=words)
    add = parser.add_argument
    add("--policy", default="deep_forcing", help="a YAML of configs/, without its suffix (default %(default)s)")
    add("--window", type=int, help="latent frames of the window: short for --set kv_cache.window_frames=...")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override a key of the config")
    add("--model", help="a YAML of configs/models/, without its suffix (default: the 1.3B on a GPU, else tiny)")
    add("--dtype", help="bfloat16 or float32 (default: bfloat16 on a GPU, else float32)")
    add("--compile", default="auto", help=f"torch.compile: {', '.join(SWITCH)} (default %(default)s)")
    add("--graphs", default="auto", help=f"CUDA graphs: {', '.join(SWITCH)} (default %(default)s)")
    add("--decoder", default="auto", help=f"the Wan VAE's fast decoder: {', '.join(SWITCH)} (default %(default)s)")
    add("--overlap", default="auto", help=f"decoding beside the transformer: {', '.join(SWITCH)} (default %(default)s)")
    add("--fp8", choices=("on", "off"), default="off", help="8-bit layers and attention (default %(default)s)")
    add("--memory", default="full", help=f"{', '.join(PRESETS)}: what lives where (default %(default)s)")
    add("--attention", default="auto", help=f"kernel: {', '.join(ATTENTION)} (default %(default)s)")
    add("--resolution", metavar="HxW", help="height x width in pixels, such as 480x832 (default: the model's own)")
    add("--batch", type=int, default=1, help="videos made side by side (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--output", type=Path, default=Path(f"outputs/benchmarks/{name}.json"), help="JSON (default %(default)s)")
    add("--revision", help="what the JSON says of the code, in place of what git tells")
    return parser


def _add_measure(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    known = {name: counted.words for name, counted in COUNTED.items() if name not in without}
    words = "; ".join(f"{name}: {what}" for name, what in known.items())
    parser.add_argument("--measure", nargs="+", choices=known, default=list(known), help=f"{words} (default: all)")


def _add_length(parser: argparse.ArgumentParser) -> None:
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--cycles", type=int, help=f"prune cycles to measure, at least {LEAST_CYCLES} (the default)")
    length.add_argument("--seconds", type=float, help="length of the video whose whole cycles are measured")
    parser.add_argument("--latencies", type=int, default=5, help="times to time first frames (default %(default)s)")


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", type=Path, help="PNG (default: beside --output)")


def _add_compare(parser: argparse.ArgumentParser, words: str) -> None:
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"),
        help=f"{words}; each is key=value, or several in quotes: flags above by name, or keys of the config",
    )
