"""Read the results of the official VBench suite into the tidy table.

    python -m evaluation import-vbench outputs/vbench/rolling --output outputs/metrics.csv
"""
from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a folder that export-vbench wrote")
    parser.add_argument(
        "--results", type=Path, nargs="+", help="..._eval_results.json files of one folder (default: FOLDER/results)"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/metrics.csv"), help="the table, a .csv")


def run(options: argparse.Namespace) -> int:
    from evaluation.metrics.table import append
    from evaluation.vbench import read_results
    from utils.config import ConfigError

    if options.results and len(options.folders) > 1:
        raise ConfigError("--results belong to one folder. Import the folders one by one.")
    rows = []
    for folder in options.folders:
        files = options.results or sorted((folder / "results").glob("*_eval_results.json"))
        if not files:
            raise ConfigError(f"{folder}/results holds no ..._eval_results.json. Run evaluation/vbench_suite.sh first.")
        for file in files:
            rows += read_results(file, folder)
    append(options.output, rows)
    failed = sum(bool(row.error) for row in rows)
    logger.info("%d results, %d missing; the table: %s", len(rows), failed, options.output)
    return 1 if failed else 0
