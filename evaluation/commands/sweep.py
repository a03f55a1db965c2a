"""Make and measure the videos of a sweep: methods x settings x prompts x seeds x lengths.

    python -m evaluation sweep evaluation/sweeps/tiny.yaml --output_folder outputs/tiny

Exit status: 0 done, 1 some videos or numbers are missing (listed), 2 bad input, 130 interrupted. The same command
goes on where it was stopped; it may run many times at once on one folder, under torchrun, or on Ray.
"""
from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sweep", type=Path, help="a YAML of evaluation/sweeps/")
    add("--output_folder", type=Path, help="where all goes (default: outputs/<name of the sweep>)")
    add("--only", nargs="+", default=[], metavar="NAME", help="what these tables, ablations or methods need; or record")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as batch_size=4")
    add("--vlm", metavar="MODULE:FUNCTION", help="the model that visual_stability asks, as --set vlm=MODULE:FUNCTION")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--ray", metavar="ADDRESS", help="work on this Ray cluster: auto, local, or ray://host:port")
    add("--workers", type=int, help="tasks on the Ray cluster, one processor or GPU each")
    add("--dry_run", action="store_true", help="check everything, say how much is left to do, and stop")
    add("--random_weights", action="store_true", help="seeded random networks, to try a sweep out")


def run(options: argparse.Namespace) -> int:
    from evaluation.metrics.measuring import log_left_out
    from evaluation.sweep.make import memories_without_effect
    from evaluation.sweep.measure import unit_name
    from evaluation.sweep.results import collect
    from evaluation.sweep.settings import load_sweep
    from evaluation.sweep.workers import labour, labour_on_ray, outstanding, prepare
    from utils.config import ConfigError
    from utils.launch import read_launch, wait_for_others

    judge = [] if options.vlm is None else [f"vlm={options.vlm}"]
    launch, sweep = read_launch(), load_sweep(options.sweep, [*options.set, *judge])
    folder = options.output_folder or Path("outputs") / options.sweep.stem
    if (options.ray is None) != (options.workers is None):
        raise ConfigError("--ray and --workers go together, such as --ray local --workers 4.")
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers} is too small. Ask for 1 or more.")
    common = {"device": options.device, "random_weights": options.random_weights, "only": options.only}
    tasks, metrics = prepare(sweep, folder, local_rank=launch.local_rank, **common)
    unforgetting = memories_without_effect(tasks)
    if launch.is_main and unforgetting:
        logger.warning(
            "%s: these videos are so short that no memory forgets a frame, so memories make no difference. "
            "Ask for longer ones with seconds.", ", ".join(unforgetting),
        )
    if options.dry_run:
        logger.info("%s: %s", folder, outstanding(sweep, tasks, metrics, folder, options.only))
        return 0
    if options.ray is not None:
        failed = labour_on_ray(sweep, folder, address=options.ray, workers=options.workers, **common)
    else:
        failed = labour(
            sweep, tasks, metrics, folder, rank=launch.rank, world_size=launch.world_size, only=options.only,
        )
    if launch.is_main:
        rows = collect(sweep, tasks, metrics, folder)
        for row in rows:
            if row.failed:  # once, though it failed here as well
                failed.setdefault(unit_name(row.method, Path(row.video).stem), row.error)
        log_left_out(rows, metrics, sum(len(task.jobs) for task in tasks))
        logger.info("%d rows are in %s", len(rows), folder)
    for name, why in failed.items():
        logger.error("failed: %s: %s", name, why)
    wait_for_others(launch, failed=bool(failed))
    return 1 if failed else 0
