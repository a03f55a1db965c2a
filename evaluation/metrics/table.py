"""The tidy table: one row per (video, metric, granularity, start_s, protocol), as CSV, or as Parquet with pyarrow.

A row has a value or an error, never both. An error that begins with LEFT_OUT is no failure: the metric says nothing of
such a video. Rows are added together, under a lock that readers share, so any number of processes may share a table
and none sees half of what another adds. Of a process that is killed then, whole rows stay; a torn one does not count.
"""
from __future__ import annotations

import contextlib
import csv
import logging
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from utils.files import move_into_place, temp_path

try:  # POSIX only; without it two processes must not share a table
    import fcntl
except ImportError:
    fcntl = None

logger = logging.getLogger(__name__)

DIGITS = 9
LEFT_OUT = "left out: "
TAIL_BYTES = 1 << 16  # longer than any last line


@dataclass(frozen=True, slots=True)
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
    no more once the same metric of the same video has values after it. A torn last row of a table that rows are added
    to is left out, with a warning.
    Raises: ValueError if the file is no such table, or is Parquet and pyarrow is not installed.
    """
    path = Path(path)
    if not path.exists():
        return []
    if path.suffix == ".parquet":
        return _latest(_read_parquet(path))
    with _locked(path, alone=False):
        return _latest(_read_csv(path, growing=_lock_file(path).exists()))


def read_ends(path: Path) -> list[Row]:
    """The first and the last row of a CSV, in half the time that all rows take; a missing file is empty.

    Raises: ValueError if the file is no such table.
    """
    _, *lines = _lines(path) if path.exists() else [()]
    return [_row(path, number, texts) for number, _, texts in (lines[:1] + lines[-1:])]


def append(
    path: Path, rows: Sequence[Row], *, outdated: Callable[[Sequence[Row]], Collection[Row]] | None = None,
) -> None:
    """Add rows to a CSV. What `outdated` picks from the rows of the table, as they are then, goes first.

    Raises: OSError; the old table then still stands. ValueError for a path that is not .csv, or another file there.
    """
    path = Path(path)
    if path.suffix != ".csv":
        raise ValueError(f"{path}: rows are added to a .csv. Choose such a name (a .parquet copy is made with pyarrow)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, alone=True):
        if not path.exists():
            write_csv(rows, path)
            return
        _mend(path)
        before = _latest(_read_csv(path)) if outdated else []
        gone = set(outdated(before)) if outdated else ()
        if gone:
            write_csv([*(row for row in before if row not in gone), *rows], path)
        else:
            _add(path, rows)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write a whole table, atomically; what was there goes."""
    with _new_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(COLUMNS)
        lines.writerows(map(_texts, rows))


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
    with _new_file(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
    return True


def rounded(number: float) -> float:
    """The number as a table holds it."""
    return float(_text(number))


def _latest(records: Iterable[Row]) -> list[Row]:
    rows: dict[tuple, Row] = {}
    for row in records:
        key = (row.video, row.metric, row.granularity, row.start_s, row.protocol)
        if not row.error:
            rows.pop((row.video, row.metric, "", None, row.protocol), None)
        rows.pop(key, None)
        rows[key] = row
    return list(rows.values())


def _read_csv(path: Path, *, growing: bool = False) -> Iterator[Row]:
    return (_row(path, number, texts) for number, _, texts in _lines(path, growing=growing) if number > 1)


def _lines(path: Path, *, growing: bool = False) -> Iterator[tuple[int, int, list[str]]]:
    """Of every row, with that of the columns' names: its number, how many bytes end with it, its texts.

    Args: growing, rows are added to it: a torn last one is left out.
    """
    end, line, torn = 0, b"", False

    def decoded(file: Iterable[bytes]) -> Iterator[str]:
        nonlocal end, line
        for line in file:
            end += len(line)
            yield line.decode(errors="strict" if line.endswith(b"\n") else "replace")

    with path.open("rb") as file:
        lines = csv.reader(decoded(file), strict=True)
        try:
            names = next(lines, [])
            if tuple(names) != COLUMNS:
                raise ValueError(
                    f"not a table of metrics. Its first line must be: {','.join(COLUMNS)}, and it is: "
                    f"{','.join(names)[:80]!r}. Choose another name, or move that file away"
                )
            yield 1, end, names
            for number, texts in enumerate(lines, 2):
                torn = growing and not line.endswith(b"\n") and not _is_row(texts)
                if not torn:
                    yield number, end, texts
        except csv.Error as error:
            torn = growing and str(error) == "unexpected end of data"  # within quotes
            if not torn:
                raise ValueError(f"{path}: {error}") from error
        except ValueError as error:  # letters that are none, too
            raise ValueError(f"{path}: {error}") from error
    if torn:
        logger.warning("%s: its last row is torn, as by a process that was killed, and does not count", path)


def _row(path: Path, number: int, texts: list[str]) -> Row:
    if len(texts) != len(COLUMNS):
        raise ValueError(f"{path}, row {number}: {len(texts)} columns instead of {len(COLUMNS)}. Is it whole?")
    *head, start_s, value, protocol, why = map(sys.intern, texts)  # most say the same as the row before
    try:
        return Row(*head, _number(start_s), _number(value), protocol, why)
    except ValueError as error:
        raise ValueError(f"{path}, row {number}: {error}") from error


def _is_row(texts: list[str]) -> bool:
    try:
        _row(Path(), 0, texts)
    except ValueError:
        return False
    return True


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
    return ["" if item is None else _text(item) if isinstance(item, float) else item for item in items]


def _text(number: float) -> str:
    return f"{number:.{DIGITS}g}"


def _add(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows behind the others, or none of them; the lock is held."""
    size = path.stat().st_size
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(map(_texts, rows))
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        os.truncate(path, size)
        _name(error, path)
        raise


def _mend(path: Path) -> None:
    """Cut off a torn last row, or end one that lacks no more than its end; the lock is held.

    Raises: ValueError if the file is no such table.
    """
    next(_lines(path))
    with path.open("r+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        tail = file.read()
        last = tail[:-1].rpartition(b"\n")[2].decode(errors="replace")
        if tail.endswith(b"\n") and _is_row(next(csv.reader([last]))):
            return
        *_, (_, end, _) = _lines(path, growing=True)  # the last row may have several lines
        file.truncate(end)
        file.seek(end - 1)
        if file.read() != b"\n":
            file.write(b"\n")


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` once it is written."""
    temporary = temp_path(path)
    try:
        yield temporary
        move_into_place(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise


def _name(error: BaseException, path: Path) -> None:
    """Say which file it is, which a full disk does not."""
    if isinstance(error, OSError) and error.errno and error.filename is None:
        error.filename = str(path)


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def _locked(path: Path, *, alone: bool) -> Iterator[None]:
    """Alone with this table, or with others that read it, among processes that take the same lock."""
    lock = _lock_file(path)
    if fcntl is None or not (alone or lock.exists()):  # what was never added to is only ever replaced
        yield
        return
    with lock.open("ab" if alone else "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
