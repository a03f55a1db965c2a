"""Tables that papers print, to be set beside ours: quoted.yaml holds them."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from utils.config import ConfigError

QUOTED = Path(__file__).with_name("quoted.yaml")


def read_quoted(name: str) -> Mapping[str, Any]:
    """A paper's table: its `source`, and its `rows` of column -> number as printed.

    Raises: ConfigError for a name that is not there.
    """
    tables = yaml.safe_load(QUOTED.read_text(encoding="utf-8"))
    if name not in tables:
        raise ConfigError(f"quoted: {name!r} is unknown. Use one of: {', '.join(tables)}.")
    table = tables[name]
    rows = {row: dict(zip(table["columns"], values, strict=True)) for row, values in table["rows"].items()}
    return {"source": table["source"], "rows": rows}
