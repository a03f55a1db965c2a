"""One command for the papers' numbers: `python -m evaluation COMMAND ...`.

Every module of `evaluation/commands` is a command and registers itself by being there: its name is the command's
(`export_vbench.py` is `export-vbench`), its docstring the help, `add_arguments(parser)` its options and
`run(options)` its work, returning the exit status: 0 done, 1 something failed and the rest went on, 2 bad input.
"""
from __future__ import annotations

import argparse
import importlib
import logging
import pkgutil
import sys
from collections.abc import Sequence

from evaluation import commands
from utils.outputs import reason


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; bad input is an error on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m evaluation", description="Measure videos, compare methods.")
    rooms = parser.add_subparsers(dest="command", required=True)
    for found in pkgutil.iter_modules(commands.__path__):
        module = importlib.import_module(f"{commands.__name__}.{found.name}")
        room = rooms.add_parser(
            found.name.replace("_", "-"), help=module.__doc__.partition("\n")[0], description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(room)
        room.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
