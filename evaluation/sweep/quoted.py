"""Tables that papers print, to be set beside ours: quoted.yaml holds them."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from utils.config import ConfigError
from utils.yaml_files import load_structured

QUOTED = Path(__file__).with_name("quoted.yaml")


@dataclass
class PaperTable:
    """One table as printed."""

    source: str                    # paper, table, protocol
    columns: list[str]             # as ours are called
    rows: dict[str, list[float]]   # method -> a number a column


@dataclass
class Quoted:
    """All of them."""

    tables: dict[str, PaperTable]


def read_quoted(name: str) -> tuple[str, dict[str, dict[str, float]]]:
    """A paper's table: its source, and its rows, method -> column -> number as printed.

    Raises: ConfigError for a name that is not there.
    """
    tables = load_structured(QUOTED, Quoted).tables
    if name not in tables:
        raise ConfigError(f"quoted: {name!r} is unknown. Use one of: {', '.join(tables)}.")
    table = tables[name]
    return table.source, {
        row: dict(zip(table.columns, values, strict=True)) for row, values in table.rows.items()
    }
