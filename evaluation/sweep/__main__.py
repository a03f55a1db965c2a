"""Sweeps: make and measure videos, then tables, figures and a page from the numbers.

    python -m evaluation.sweep run evaluation/sweeps/tiny.yaml --output_folder outputs/tiny
    python -m evaluation.sweep report outputs/tiny

Exit status: 0 done, 1 some videos or numbers are missing (listed), 2 bad input, 130 interrupted. The same command
goes on where it was stopped; it may run many times at once on one folder, under torchrun, or on Ray.
"""
from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from evaluation.sweep.results import collect
from evaluation.sweep.settings import load_sweep
from evaluation.sweep.workers import labour, labour_on_ray, prepare
from pipeline.build import choose_device
from pipeline.render import reason
from utils.config import ConfigError
from utils.launch import read_launch, wait_for_others

logger = logging.getLogger("evaluation.sweep")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rooms = parser.add_subparsers(dest="task", required=True)
    run = rooms.add_parser("run", help="make and measure what is missing")
    run.add_argument("sweep", type=Path, help="a YAML of evaluation/sweeps/")
    run.add_argument("--output_folder", type=Path, help="where all goes (default: outputs/<name of the sweep>)")
    run.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as batch_size=4")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    run.add_argument("--ray", metavar="ADDRESS", help="work on this Ray cluster: auto, local, or ray://host:port")
    run.add_argument("--workers", type=int, help="tasks on the Ray cluster, one processor or GPU each")
    run.add_argument("--random_weights", action="store_true", help="seeded random networks, to try a sweep out")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    launch, sweep = read_launch(), load_sweep(options.sweep, options.set)
    folder = options.output_folder or Path("outputs") / options.sweep.stem
    if (options.ray is None) != (options.workers is None):
        raise ConfigError("--ray and --workers go together, such as --ray local --workers 4.")
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers} is too small. Ask for 1 or more.")
    common = {"device": options.device, "random_weights": options.random_weights}
    tasks = prepare(sweep, folder, local_rank=launch.local_rank, **common)
    if options.ray is not None:
        failed = labour_on_ray(sweep, folder, address=options.ray, workers=options.workers, **common)
    else:
        failed = labour(sweep, tasks, folder, rank=launch.rank, world_size=launch.world_size)
    if launch.is_main:
        rows = collect(sweep, tasks, folder, device=choose_device(options.device, launch.local_rank))
        failed |= {row["video"]: row["error"] for row in rows if row["error"]}
        logger.info("%d rows are in %s", len(rows), folder)
    for name, why in failed.items():
        logger.error("failed: %s: %s", name, why)
    wait_for_others(launch, failed=bool(failed))
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input is an error on stderr and exit status 2."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return {"run": run}[options.task](options)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
