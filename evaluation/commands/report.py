"""Tables, figures and a page from the numbers of a sweep.

    python -m evaluation report outputs/tiny

Writes tables/ (Markdown, LaTeX, HTML), figures/ (PNG; they need matplotlib) and index.html, a page that plays the
videos side by side and works from the folder, without a server.
"""
from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a sweep's output folder")
    parser.add_argument("--no_figures", action="store_true", help="do without the PNG files, which need matplotlib")


def run(options: argparse.Namespace) -> int:
    from evaluation.sweep.figures import draw_figures
    from evaluation.sweep.numbers import Numbers
    from evaluation.sweep.page import write_page
    from evaluation.sweep.recorded import draw_recorded
    from evaluation.sweep.results import load
    from evaluation.sweep.tables import markdown, write_tables
    from utils.config import ConfigError
    from utils.figures import NoMatplotlibError
    from utils.outputs import check_writable

    for folder in options.folders:
        saved = load(folder)
        for part in ("tables",) if options.no_figures else ("tables", "figures"):
            check_writable(folder / part, "the report's folder")
        numbers = Numbers(saved.rows)
        grids = write_tables(saved, numbers, folder / "tables")
        for grid in grids.values():
            print(markdown(grid))
        figures = {}
        if not options.no_figures:
            try:
                figures = draw_figures(saved, numbers, folder / "figures") | draw_recorded(saved, folder / "figures")
            except NoMatplotlibError as error:
                raise ConfigError(f"{error}; or do without the figures: --no_figures") from error
        logger.info("wrote %s", write_page(saved, numbers, grids, figures))
    return 0
