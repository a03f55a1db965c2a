"""The tidy table: one row per (video, metric, granularity, start_s), as CSV, or as Parquet with pyarrow.

A row has a value or an error, never both. An error that begins with LEFT_OUT is no failure: the metric says nothing of
such a video. Rows of one (video, metric) are added together, under a lock and with one rename, so any number of
processes may share a table and none sees half of it.
"""
from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from utils.files import write_atomically

try:  # POSIX only; without it two processes must not share a table
    import fcntl
except ImportError:
    fcntl = None

DIGITS = 9
LEFT_OUT = "left out: "


@dataclass(frozen=True)
class Row:
    """One number and what it is of; its fields are the table's columns."""

    video: str             # method/file name
    method: str
    prompt: str            # empty where it is not known
    seed: str              # of the sample too where there are several, `<seed>-<sample>`; empty where not known
    metric: str
    granularity: str       # see protocol.Granularity; empty in a row of an error
    start_s: float | None  # where the window begins; None: the whole video
    value: float | None    # None in a row of an error
    protocol: str          # how the number was made; numbers of different protocols are not comparable
    error: str = ""        # why there is no value

    def __post_init__(self) -> None:
        if (self.value is None) != bool(self.error) or (self.value is not None and not math.isfinite(self.value)):
            raise ValueError(
                f"{self.video}, {self.metric}: value={self.value} with error={self.error!r}. "
                "A row holds a finite number, or says why it has none"
            )

    @property
    def failed(self) -> bool:
        """Whether there should be a value; not so if the metric is left out."""
        return bool(self.error) and not self.left_out

    @property
    def left_out(self) -> bool:
        return self.error.startswith(LEFT_OUT)


COLUMNS = tuple(field.name for field in fields(Row))


def read_table(path: Path) -> list[Row]:
    """All rows in order; a missing file is empty.

    Of rows that say the same (video, metric, granularity, start_s, protocol) the last one counts, and an error
    no more once the same metric of the same video has values after it.
    Raises: ValueError if the file is no such table, or is Parquet and pyarrow is not installed.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    rows: dict[tuple, Row] = {}
    for row in records:
        key = (row.video, row.metric, row.granularity, row.start_s, row.protocol)
        if not row.error:
            rows.pop((row.video, row.metric, "", None, row.protocol), None)
        rows.pop(key, None)
        rows[key] = row
    return list(rows.values())


def read_ends(path: Path) -> list[Row]:
    """The first and the last row of a CSV, in half the time that all rows take; a missing file is empty.

    Raises: ValueError if the file is no such table.
    """
    lines = list(_lines(path)) if path.exists() else []
    return [_row(path, number, line) for number, line in (lines[:1] + lines[-1:])]


def append(path: Path, rows: Sequence[Row], *, replacing: Collection[str] = ()) -> None:
    """Add rows to a CSV, atomically; all earlier rows of the videos in `replacing` go first.

    Raises: OSError; the old table then still stands. ValueError for a path that is not .csv.
    """
    path = Path(path)
    if path.suffix != ".csv":
        raise ValueError(f"{path}: rows are added to a .csv. Choose such a name (a .parquet copy is made with pyarrow)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        before = path.read_bytes() if path.exists() else _csv([COLUMNS])
        if replacing:
            before = _csv([COLUMNS, *(_texts(row) for row in read_table(path) if row.video not in replacing)])
        write_atomically(path, before + _csv([_texts(row) for row in rows]))


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write a whole table, atomically; what was there goes."""
    write_atomically(path, _csv([COLUMNS, *map(_texts, rows)]))


def write_parquet(rows: Sequence[Row], path: Path) -> bool:
    """Write the rows as Parquet, atomically; False if pyarrow is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return False
    numbers = {"start_s", "value"}
    columns = {
        name: pyarrow.array([getattr(row, name) for row in rows], pyarrow.float64() if name in numbers else
                            pyarrow.string())
        for name in COLUMNS
    }
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    write_atomically(path, buffer.getvalue())
    return True


def _read_csv(path: Path) -> Iterator[Row]:
    return (_row(path, number, line) for number, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The texts of every row, and its number."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        try:
            if tuple(next(lines, ())) != COLUMNS:
                raise ValueError(f"not a table of metrics. Its first line must be: {','.join(COLUMNS)}")
            yield from enumerate(lines, 2)
        except (ValueError, csv.Error) as error:  # letters that are none are a ValueError, too
            raise ValueError(f"{path}: {error}") from error


def _row(path: Path, number: int, line: list[str]) -> Row:
    if len(line) != len(COLUMNS):
        raise ValueError(f"{path}, row {number}: {len(line)} columns instead of {len(COLUMNS)}. Is it whole?")
    *texts, start_s, value, protocol, why = line
    try:
        return Row(*texts, _number(start_s), _number(value), protocol, why)
    except ValueError as error:
        raise ValueError(f"{path}, row {number}: {error}") from error


def _number(text: str) -> float | None:
    return float(text) if text else None


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow), or read the .csv") from error
    for record in pyarrow.parquet.read_table(path).to_pylist():
        yield Row(**record)


def _texts(row: Row) -> list[str]:
    items = (getattr(row, name) for name in COLUMNS)  # astuple would copy each, which takes longer than all else
    return ["" if item is None else f"{item:.{DIGITS}g}" if isinstance(item, float) else item for item in items]


def _csv(lines: Sequence[Sequence[str]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue().encode()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with this table, among processes that take the same lock."""
    if fcntl is None:
        yield
        return
    with path.with_name(f".{path.name}.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
