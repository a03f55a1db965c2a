"""The tidy table: what is written comes back, whoever else writes and wherever a process is killed."""
from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from evaluation.metrics.table import COLUMNS, Row, append, read_ends, read_table, write_csv, write_parquet

ROW = Row("m/a.mp4", "m", "a cat", "1", "brightness", "second", 0.0, 0.5, "luma")


def test_a_table_comes_back_as_it_went(tmp_path):
    """CSV keeps commas, quotes, line breaks, umlauts and empty fields; Parquet says the same."""
    path = tmp_path / "t.csv"
    rows = [ROW, replace(ROW, prompt='a "cat",\nna\u00efve', start_s=None, granularity="whole", value=-1e-7),
            replace(ROW, metric="flow", granularity="", start_s=None, value=None, error="too short, by far")]
    append(path, rows[:1])
    append(path, rows[1:])
    assert read_table(path) == rows and path.read_text().splitlines()[0] == ",".join(COLUMNS)
    if write_parquet(rows, tmp_path / "t.parquet"):
        assert read_table(tmp_path / "t.parquet") == rows


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_ends_of_a_table(tmp_path, count: int) -> None:
    """The first and the last of all rows, whatever lies between."""
    rows = [replace(ROW, start_s=float(second), prompt='says "a,\nb"') for second in range(count)]
    assert read_ends(tmp_path / "t.csv") == []
    write_csv(rows, tmp_path / "t.csv")
    assert read_ends(tmp_path / "t.csv") == read_table(tmp_path / "t.csv")[:1] + read_table(tmp_path / "t.csv")[-1:]
    (tmp_path / "t.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="not a table of metrics"):
        read_ends(tmp_path / "t.csv")


def test_the_last_row_counts(tmp_path):
    """A value measured again replaces the old one, and an error that was overcome is forgotten."""
    path = tmp_path / "t.csv"
    error = replace(ROW, granularity="", start_s=None, value=None, error="no")
    append(path, [error, replace(ROW, value=0.25)])
    append(path, [ROW])
    assert read_table(path) == [ROW]
    append(path, [replace(ROW, value=0.75)], outdated=lambda rows: rows)
    assert [row.value for row in read_table(path)] == [0.75] and path.read_text().count("\n") == 2


def test_a_row_holds_a_number_or_a_reason():
    """NaN, neither, and both are refused."""
    for value, error in ((float("nan"), ""), (None, ""), (1.0, "but")):
        with pytest.raises(ValueError, match="finite number"):
            replace(ROW, value=value, error=error)


def test_writers_side_by_side_lose_nothing(tmp_path):
    """Eight threads add to one table."""
    path = tmp_path / "t.csv"

    def work(writer: int) -> None:
        for number in range(5):
            append(path, [replace(ROW, video=f"m/{writer}-{number}.mp4")])

    jobs = [threading.Thread(target=work, args=(writer,)) for writer in range(8)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(read_table(path)) == 40


@pytest.mark.parametrize("text", ["a cat", 'says "a, b"\nand more \u00ef'])
def test_a_torn_row_costs_itself_alone(tmp_path, text):
    """Killed after any byte of the last row: the rows before it are read, and what is added next stands behind them."""
    path, whole = tmp_path / "t.csv", [replace(ROW, prompt=text), replace(ROW, start_s=1.0, prompt=text)]
    append(path, whole[:1])
    first = path.stat().st_size
    append(path, whole[1:])
    data = path.read_bytes()
    for size in range(first, len(data) + 1):
        path.write_bytes(data[:size])
        kept = whole if size >= len(data) - 1 else whole[:1]  # less its line end alone, a row is whole
        assert read_table(path) == kept, data[first:size]
        append(path, [replace(ROW, start_s=2.0)])
        assert read_table(path) == [*kept, replace(ROW, start_s=2.0)], data[first:size]


def test_rows_are_added_and_not_written_anew(tmp_path):
    """Adding leaves the file in place; only rows that go need a new one. What fails on the way leaves the old table."""
    path = tmp_path / "t.csv"
    append(path, [ROW])
    before, number = path.read_bytes(), path.stat().st_ino
    append(path, [replace(ROW, start_s=1.0)], outdated=lambda rows: [])
    assert path.stat().st_ino == number and path.read_bytes().startswith(before) and len(read_table(path)) == 2
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        append(path, [replace(ROW, start_s=2.0), replace(ROW, prompt="half a letter: \ud800")])
    assert path.read_bytes() == before
    append(path, [replace(ROW, start_s=2.0)], outdated=lambda rows: rows[:1])
    assert [row.start_s for row in read_table(path)] == [1.0, 2.0]


def test_nothing_is_added_to_another_file(tmp_path):
    """Its first line is told, and it stays as it was."""
    path = tmp_path / "t.csv"
    path.write_text("name,score\na,1\n")
    with pytest.raises(ValueError, match=r"first line must be: video,.* it is: 'name,score'\. Choose another"):
        append(path, [ROW])
    assert path.read_text() == "name,score\na,1\n"


def test_a_damaged_table_is_refused(tmp_path):
    """The file and the row are named."""
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="first line must be"):
        read_table(path)
    append(tmp_path / "u.csv", [ROW])
    with (tmp_path / "u.csv").open("a") as file:
        file.write("torn,row\n")
    with pytest.raises(ValueError, match="row 3: 2 columns"):
        read_table(tmp_path / "u.csv")
