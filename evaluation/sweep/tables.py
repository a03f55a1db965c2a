"""Tables in the papers' layouts, as Markdown, LaTeX and HTML: ours with intervals, the papers' own marked as quoted."""
from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.study.statistics import Interval
from evaluation.sweep.numbers import MetricName, Numbers
from evaluation.sweep.quoted import read_quoted
from evaluation.sweep.results import Saved
from evaluation.sweep.settings import Column, Table
from utils.files import write_atomically

NOTHING, MARK = "–", "quoted"
LATEX = {"\\": r"\textbackslash{}", **{c: f"\\{c}" for c in "&%$#_{}"}, "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", "–": "--"}
HEADLINES = (  # of a sweep that names no table; at least one for every metric
    Column("drift@whole", "drift, Delta E", "lower"),
    Column("world_background_drift@whole", "background drift", "lower", digits=4),
    Column("world_rate_colour@whole", "colour right, %", "higher", 100, 1),
    Column("clip_score@whole", "CLIP score", "higher"),
    Column("aesthetic_quality@whole", "aesthetic", "higher", 100),
    Column("subject_consistency@whole", "subject", "higher", 100),
    Column("background_consistency@whole", "background", "higher", 100),
    Column("visual_stability@whole", "visual stability", "higher"),
    Column("frozen@whole", "frozen, %", "lower", 100, 1),
    Column("repetition@whole", "seen before, %", "none", 100, 1),  # periodic motion is, too
    Column("dynamic_degree@whole", "dynamic, %", "higher", 100, 1),
    Column("temporal_flickering@whole", "without flicker", "none", 100),  # a still picture has none
    Column("border_flicker@whole", "step at borders", "lower"),
    Column("shot_cuts@whole", "cuts", "lower"),
    Column("brisque@whole", "BRISQUE", "lower", digits=1),
    Column("brightness_drift@first_last_15pct", "brightness drift", "lower", digits=3),
)
MOST_HEADLINES = 5


@dataclass(frozen=True)
class Cell:
    """A number as it is shown: its value, the interval if it is ours (and how many videos, if fewer than the line's),
    whether it is the best of ours."""

    text: str
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Line:
    name: str
    cells: list[Cell]
    quoted: bool = False


@dataclass(frozen=True)
class Grid:
    """A table before it has a format."""

    title: str
    head: list[str]
    lines: list[Line]
    notes: list[str]


def make_grid(table: Mapping[str, Any], saved: Saved, numbers: Numbers) -> Grid:
    """One table of a sweep; columns that no line has a number for stay, so that what is missing is seen."""
    columns, methods = table["columns"], table["methods"] or list(saved.variants)
    names = [(MetricName.parse(column["metric"]), column["protocol"]) for column in columns]
    found = [[numbers.mean(method, *name) for name in names] for method in methods]
    videos = [[len(numbers.per_video(method, *name)) for name in names] for method in methods]
    counts = [max(line, default=0) for line in videos]
    best = [
        _best([line[i] for line in found], [numbers.prompts(method, *name) for method in methods], column)
        for i, (column, name) in enumerate(zip(columns, names, strict=True))
    ]
    lines = [
        Line(method, [Cell(str(counts[row])), *(
            _cell(found[row][i], column, row in best[i], None if own == counts[row] else own)
            for i, (column, own) in enumerate(zip(columns, videos[row], strict=True))
        )])
        for row, method in enumerate(methods)
    ]
    notes = [
        "Means over prompts, each over its videos, with 95 % intervals, Wilson's for shares, else Student's; n: fewer "
        "videos than the line says; bold: the best of ours, of those over the most prompts, the same ones."
    ]
    if table["quoted"]:
        source, printed = read_quoted(table["quoted"])
        lines += [
            Line(name, [Cell(""), *(
                Cell(f"{row[c['metric']]:.{c['digits']}f}") if c["metric"] in row else Cell(NOTHING) for c in columns
            )], quoted=True)
            for name, row in printed.items()
        ]
        notes.append(f"Rows marked {MARK} are not ours: {source}, as printed.")
    for column, name in zip(columns, names, strict=True):
        said = numbers.protocol(methods, *name)
        notes.append(f"{column['label']}: {column['metric']}, {said or 'not measured in this sweep'}.")
    return Grid(table["title"], ["method", "videos", *(_headed(column) for column in columns)], lines, notes)


def headline_table(methods: Sequence[str], numbers: Numbers) -> dict[str, dict[str, Any]]:
    """A table of all methods and the first few of HEADLINES that were measured, each by one protocol; or none."""
    known = [
        column for column in HEADLINES if len(numbers.protocols(methods, MetricName.parse(column.metric))) == 1
    ]
    return {"methods": asdict(Table("Methods", columns=known[:MOST_HEADLINES]))} if known else {}


def write_tables(saved: Saved, numbers: Numbers, folder: Path) -> dict[str, Grid]:
    """Write every table of the sweep as .md, .tex and .html; one of headline numbers if the sweep names none."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = saved.sweep["tables"] or headline_table([*saved.variants], numbers)
    grids = {name: make_grid(table, saved, numbers) for name, table in tables.items()}
    for name, grid in grids.items():
        for suffix, text in ((".md", markdown(grid)), (".tex", latex(grid)), (".html", to_html(grid))):
            write_atomically(folder / f"{name}{suffix}", text.encode())
    return grids


def markdown(grid: Grid) -> str:
    def cell(cell: Cell) -> str:
        return " ".join(filter(None, [f"**{cell.text}**" if cell.best else cell.text, cell.interval]))

    rows = [grid.head, ["---"] * len(grid.head)]
    rows += [
        [f"*{line.name}* ({MARK})" if line.quoted else line.name, *map(cell, line.cells)] for line in grid.lines
    ]
    table = "\n".join("| " + " | ".join(text.replace("|", r"\|") for text in row) + " |" for row in rows)
    return f"## {grid.title}\n\n{table}\n\n" + "\n".join(f"* {note}" for note in grid.notes) + "\n"


def latex(grid: Grid) -> str:
    """A booktabs tabular inside a table."""
    def cell(cell: Cell) -> str:
        text = rf"\textbf{{{_tex(cell.text)}}}" if cell.best else _tex(cell.text)
        return rf"{text} {{\scriptsize {_tex(cell.interval)}}}" if cell.interval else text

    def row(line: Line) -> str:
        name = rf"\textit{{{_tex(line.name)}}} ({MARK})" if line.quoted else _tex(line.name)
        return " & ".join([name, *map(cell, line.cells)]) + r" \\"

    ours = [row(line) for line in grid.lines if not line.quoted]
    theirs = [row(line) for line in grid.lines if line.quoted]
    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{_tex(grid.title)}. {_tex(' '.join(grid.notes))}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(grid.head) - 1)}}}", r"\toprule",
        " & ".join(map(_tex, grid.head)) + r" \\", r"\midrule", *ours, *([r"\midrule", *theirs] if theirs else []),
        r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])


def to_html(grid: Grid) -> str:
    """A fragment: the table in a figure, its notes below."""
    def cell(cell: Cell) -> str:
        text = f"<b>{html.escape(cell.text)}</b>" if cell.best else html.escape(cell.text)
        return f"<td>{text}" + (f" <small>{html.escape(cell.interval)}</small>" if cell.interval else "") + "</td>"

    def row(line: Line) -> str:
        mark = f" <small>{MARK}</small>" if line.quoted else ""
        kind = f' class="{MARK}"' if line.quoted else ""
        return f"<tr{kind}><th>{html.escape(line.name)}{mark}</th>{''.join(map(cell, line.cells))}</tr>"

    head = "".join(f"<th>{html.escape(text)}</th>" for text in grid.head)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in grid.notes)
    return (
        f"<figure><figcaption>{html.escape(grid.title)}</figcaption><div class=\"wide\"><table><thead><tr>{head}</tr>"
        f"</thead><tbody>{''.join(map(row, grid.lines))}</tbody></table></div>"
        f"<ul class=\"notes\">{notes}</ul></figure>\n"
    )


def _headed(column: Mapping[str, Any]) -> str:
    arrow = {"lower": " ↓", "higher": " ↑", "none": ""}[column["better"]]
    return column["label"] + arrow


def _cell(value: Interval | None, column: Mapping[str, Any], best: bool, few: int | None) -> Cell:
    """`few`: of how many videos, if that is to be said."""
    if value is None:
        return Cell(NOTHING)
    mean, low, high = (f"{column['scale'] * x:.{column['digits']}f}" for x in (value.value, value.low, value.high))
    interval = "" if math.isnan(value.low) else f"[{low}, {high}]"
    return Cell(mean, " ".join(filter(None, [interval, "" if few is None else f"n={few}"])), best)


def _best(values: Sequence[Interval | None], prompts: Sequence[set[str]], column: Mapping[str, Any]) -> set[int]:
    """Which lines are best as they are shown, of those over the largest set of prompts; none where that means nothing,
    or all are alike."""
    most = max(prompts, key=len, default=set())
    known = {
        i: round(column["scale"] * value.value, column["digits"])
        for i, (value, own) in enumerate(zip(values, prompts, strict=True)) if value and own == most
    }
    if column["better"] == "none" or len(set(known.values())) < 2:
        return set()
    best = (min if column["better"] == "lower" else max)(known.values())
    return {i for i, value in known.items() if value == best}


def _tex(text: str) -> str:
    text = "".join(LATEX.get(character, character) for character in text)
    return text.replace("↓", r"$\downarrow$").replace("↑", r"$\uparrow$")
