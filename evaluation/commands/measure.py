"""Measure folders of videos, ours or anyone's, into one tidy table.

    python -m evaluation measure videos/deep_forcing rolling=videos/self_forcing --output results/metrics.csv

Each folder is a method. Videos that are measured already are skipped; a bad video costs a line in the table and
exit status 1, the rest goes on. With pyarrow, a .parquet copy lies beside the .csv.
"""
from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from evaluation.metrics.catalogue import BASIC, FREE, PAPERS

    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder of videos, or METHOD=FOLDER")
    parser.add_argument(
        "--metrics", nargs="+", default=["basic"], metavar="NAME",
        help=f"basic ({', '.join(BASIC)}); free (also {', '.join(FREE[len(BASIC):])}: no download, but optional "
        f"packages); papers ({', '.join(PAPERS)}: downloaded weights); visual_stability (with --vlm); "
        "world (the embedded model's videos against their captions); or any of these by name (default: basic)",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/metrics.csv"), help="the table, a .csv")
    parser.add_argument(
        "--prompts", type=Path, help="prompts of videos without a JSON: .json by name, .txt or .jsonl by number",
    )
    parser.add_argument(
        "--chunk_frames", type=int, nargs=2, metavar=("FIRST", "LATER"),
        help="pixel frames of the first and of every later chunk, of videos without a JSON (Self Forcing: 9 12)",
    )
    parser.add_argument("--weights", type=Path, default=Path("."), help="the --folder of `python -m utils.download`")
    parser.add_argument("--device", default="auto", help="of metrics that are networks: auto, cpu, cuda or cuda:N")
    parser.add_argument("--vlm", default="", metavar="MODULE:FUNCTION", help="the model that visual_stability asks")
    parser.add_argument("--workers", type=int, default=1, help="videos measured side by side, each a process")


def run(options: argparse.Namespace) -> int:
    from evaluation.analysers.stability import ChunkLayout
    from evaluation.metrics.measuring import measure_videos
    from evaluation.metrics.protocol import Choices
    from evaluation.metrics.table import read_table, write_parquet
    from evaluation.metrics.videos import find_videos
    from utils.config import ConfigError
    from utils.devices import choose_device
    from utils.outputs import check_writable

    if min([options.workers, *(options.chunk_frames or ())]) < 1:
        raise ConfigError("--workers and --chunk_frames count from 1 on. Ask for 1 or more of each.")
    table = options.output
    if table.is_dir() or table.suffix != ".csv":
        why, folder = ("is a folder", table) if table.is_dir() else ("is no .csv", table.parent)
        raise ConfigError(f"--output {table} {why}. Name the table itself, such as {folder / 'metrics.csv'}.")
    check_writable(table.parent, "--output")
    chunks = None if options.chunk_frames is None else ChunkLayout(*options.chunk_frames)
    videos = find_videos(options.folders, prompts=options.prompts, chunks=chunks)
    choices = Choices(str(choose_device(options.device)), options.weights, options.vlm)
    failed = measure_videos(videos, options.metrics, choices, options.output, workers=options.workers)
    write_parquet(read_table(options.output), options.output.with_suffix(".parquet"))
    logger.info("%d videos, %d with errors; the table: %s", len(videos), failed, options.output)
    return 1 if failed else 0
