"""Studies of the embedded model: make and score the videos, write the tables, lay the videos side by side.

    python -m evaluation.study run evaluation/studies/drift_60s.yaml --output_folder outputs/drift_60s
    python -m evaluation.study report outputs/drift_60s outputs/drift_300s
    python -m evaluation.study sheet outputs/drift_60s --methods rolling deep_sink_10

Exit status: 0 done, 1 a sheet lacks frames (listed), 2 bad input, 130 interrupted; finished batches are kept, and the
same command goes on.
"""
from __future__ import annotations

import argparse
import logging
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from evaluation.study.plots import draw_curves
from evaluation.study.readers import spare_processors
from evaluation.study.report import write_report
from evaluation.study.results import load
from evaluation.study.run import run_study
from evaluation.study.settings import load_study
from evaluation.study.sheet import draw_sheet
from utils.config import ConfigError
from utils.devices import choose_device
from utils.files import write_atomically
from utils.outputs import reason

logger = logging.getLogger("evaluation.study")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rooms = parser.add_subparsers(dest="task", required=True)
    run = rooms.add_parser("run", help="make and score the videos that are missing")
    run.add_argument("study", type=Path, help="a YAML of evaluation/studies/")
    run.add_argument("--output_folder", type=Path, help="where rows go (default: outputs/<name of the study>)")
    run.add_argument("--methods", nargs="+", help="only these methods and references")
    run.add_argument("--count", type=int, help="only the first so many captions of each set")
    run.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="such as batch_size=4")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    run.add_argument(
        "--workers", type=int,
        help="processes that score finished videos; 0: this one "
        "(default: beside a GPU all processors but one; without a GPU none, since making takes them all)",
    )
    run.add_argument("--random_weights", action="store_true", help="seeded random networks, to try a study out")
    report = rooms.add_parser("report", help="tables to stdout and report.md, curves to curves.png")
    report.add_argument("folders", type=Path, nargs="+", metavar="folder")
    report.add_argument("--no_curves", action="store_true", help="do without the PNG, which needs matplotlib")
    sheet = rooms.add_parser("sheet", help="kept moments of the first captions, one row a method, to sheet.png")
    sheet.add_argument("folder", type=Path)
    sheet.add_argument("--methods", nargs="+", help="only these, in this order")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    study = load_study(options.study, options.set)
    for name in options.methods or ():
        if name not in study.names:
            raise ConfigError(f"--methods {name}: not in {options.study}. It has: {', '.join(study.names)}.")
    for flag, value, least in (("count", options.count, 1), ("workers", options.workers, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{flag} {value} is too small. Ask for {least} or more.")
    folder = options.output_folder or Path("outputs") / options.study.stem
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output_folder {folder} is a file. Choose another.")
    device, workers = choose_device(options.device), options.workers
    if workers is None:
        workers = spare_processors() if device.type == "cuda" else 0
    run_study(
        study, folder, device=device, workers=workers,
        random_weights=options.random_weights, methods=options.methods, count=options.count,
    )
    logger.info("all rows are in %s", folder)
    return 0


def report(options: argparse.Namespace) -> int:
    for folder in options.folders:
        saved = load(folder)
        text = write_report(saved)
        write_atomically(folder / "report.md", text.encode())
        print(text)
        if options.no_curves:
            continue
        try:
            draw_curves(saved, folder / "curves.png")
        except ConfigError as error:
            logger.warning("%s; or ask for --no_curves", error)
    return 0


def sheet(options: argparse.Namespace) -> int:
    path = options.folder / "sheet.png"
    missing = draw_sheet(load(options.folder), path, options.methods)
    logger.info("wrote %s", path)
    if missing:
        said = "; ".join(f"{name} ({', '.join(captions)})" for name, captions in missing.items())
        logger.error("without kept frames, not run or lost: %s", said)
    return 1 if missing else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input is an error on stderr and exit status 2."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return {"run": run, "report": report, "sheet": sheet}[options.task](options)
    except BrokenProcessPool as error:
        print(f"error: {error} If memory ran out, lower --workers or --set batch_size=...", file=sys.stderr)
        return 2
    except (ValueError, OSError, ArithmeticError, torch.OutOfMemoryError) as error:
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished batches are kept, and the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
