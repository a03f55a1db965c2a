"""Lay videos out as the official VBench suite expects them.

    python -m evaluation export-vbench videos/deep_forcing rolling=videos/self_forcing --output outputs/vbench
    bash evaluation/vbench_suite.sh outputs/vbench/rolling            # on a machine with a GPU and a connection
    python -m evaluation import-vbench outputs/vbench/rolling --output outputs/metrics.csv
"""
from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder of videos, or METHOD=FOLDER")
    parser.add_argument("--output", type=Path, required=True, help="where one folder a method goes")
    parser.add_argument(
        "--prompts", type=Path, help="prompts of videos without a JSON: .json by name, .txt or .jsonl by number",
    )


def run(options: argparse.Namespace) -> int:
    from evaluation.metrics.videos import find_videos
    from evaluation.vbench import export

    for method, folder in export(find_videos(options.folders, prompts=options.prompts), options.output).items():
        logger.info("%s: %s. Rate it with: bash evaluation/vbench_suite.sh '%s'", method, folder, folder)
    return 0
