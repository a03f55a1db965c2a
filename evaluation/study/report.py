"""From rows to Markdown tables: what is right, what drifts, and which method drifts less than which."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from evaluation.analysers import PROPERTIES
from evaluation.analysers.judge import HOLDS, REFERENCE_SECONDS
from evaluation.study.compare import FROZEN_MARK, SIGNIFICANT, compare, drift
from evaluation.study.results import Saved
from evaluation.study.scores import FROZEN, is_frozen, mean_known, speed_ratio
from evaluation.study.statistics import Interval, bootstrap_mean, wilson

NOTHING = "–"


@dataclass(frozen=True)
class Group:
    """Rows that make one line of a table."""

    name: str
    rows: list[dict]


def write_report(saved: Saved) -> str:
    """All tables of one folder, as Markdown."""
    study, groups = saved.study, groups_of(saved)
    long = study["seconds"] > REFERENCE_SECONDS
    parts = [
        f"# {saved.folder.name}: {study['seconds']:g} s, model {study['model']}, noise seed {study['seed']}",
        "Shares with Wilson's 95 % interval, means with that of a percentile bootstrap (over captions, seeded). "
        "Only what a caption says is judged. "
        f"A property holds for a video if it is right in {HOLDS:.0%} of its frames.",
        "## Videos in which a property holds, %", property_table(groups, held),
    ]
    if long:
        parts += [f"## The same in the last {REFERENCE_SECONDS:g} s, %", property_table(groups, held_at_the_end)]
    parts += ["## Frames in which a property is right, mean over videos, %", rate_table(groups)]
    parts += ["## Drift and flow" if long else "## Flow", flow_table(groups, long)]
    if long:
        parts += _comparisons(saved)
    missing = [name for name in [*study["references"], *study["methods"]] if name not in saved.rows]
    if missing:
        parts += [f"Without rows, not run or lost: {', '.join(missing)}."]
    return "\n\n".join(parts) + "\n"


def groups_of(saved: Saved) -> list[Group]:
    """One group a method; where the captions are of several splits, one a method and split."""
    splits = list(dict.fromkeys(row["split"] for rows in saved.rows.values() for row in rows))
    if len(splits) == 1:
        return [Group(name, rows) for name, rows in saved.rows.items()]
    every = [
        Group(f"{name}, {split}", [row for row in rows if row["split"] == split])
        for split in splits for name, rows in saved.rows.items()
    ]
    return [group for group in every if group.rows]


# --- one number of one row ----------------------------------------------------------------------------------

def held(row: dict, name: str) -> bool | None:
    """Whether a property holds over the whole video."""
    return row["video"]["holds"][name]


def held_at_the_end(row: dict, name: str) -> bool | None:
    """Whether it holds over the last five seconds."""
    rate = row["windows"]["last"][name]
    return None if rate is None else rate >= HOLDS


# --- tables -------------------------------------------------------------------------------------------------

def property_table(groups: Sequence[Group], right: Callable[[dict, str], bool | None]) -> str:
    """Share of videos for which `right` says yes."""
    return _table(["method", "videos", *PROPERTIES], [
        [group.name, str(len(group.rows)), *(_share(right(row, name) for row in group.rows) for name in PROPERTIES)]
        for group in groups
    ])


def rate_table(groups: Sequence[Group]) -> str:
    """Mean share of frames."""
    return _table(["method", "videos", *PROPERTIES], [
        [group.name, str(len(group.rows)), *(
            _number(mean_known(row["video"]["rate"][name] for row in group.rows), ".1f", 100) for name in PROPERTIES
        )]
        for group in groups
    ])


def flow_table(groups: Sequence[Group], long: bool) -> str:
    """Everything that is no property; drift, ratios and standstill only where a video is `long` enough to have them."""
    columns: dict[str, Callable[[list[dict]], str]] = {}
    if long:
        columns["drift, last 5 s"] = _drift_cell
        columns["subject colour error, last 5 s"] = lambda rows: _mean(rows, "colour_error", ".4f")
    columns["duplicates a frame"] = lambda rows: _mean(rows, "duplicates", ".3f")
    columns["jumps a video"] = lambda rows: _mean(rows, "jumps", ".2f")
    columns["rollbacks a video"] = lambda rows: _mean(rows, "rollbacks", ".2f")
    columns["flicker"] = lambda rows: _mean(rows, "flicker", ".5f")
    if long:
        columns["sharpness, last / first 5 s"] = lambda rows: _mean(rows, "sharpness_ratio", ".3f")
        columns["speed, last / first 5 s"] = _speed_cell
        columns["frozen videos, %"] = lambda rows: _share(is_frozen([row]) for row in rows)
    if any("psnr" in row for group in groups for row in group.rows):
        columns["PSNR, dB"] = lambda rows: _number(mean_known(row.get("psnr") for row in rows), ".2f")
        columns["PSNR of the last frame, dB"] = lambda rows: _number(
            mean_known(row.get("psnr_last_frame") for row in rows), ".2f",
        )
    return _table(["method", "videos", *columns], [
        [group.name, str(len(group.rows)), *(cell(group.rows) for cell in columns.values())] for group in groups
    ])


def _comparisons(saved: Saved) -> list[str]:
    rows, parts = saved.rows, []
    for base in saved.study["against"]:
        if base in rows:
            lines = [_compared(name, base, saved) for name in rows if name != base]
            parts += [f"## Drift against {base}, caption by caption", _comparison_table(lines)]
    links = [pair for chain in saved.study["chains"] for pair in zip(chain[1:], chain, strict=False)]
    links = [(less, more) for less, more in dict.fromkeys(links) if less in rows and more in rows]
    if links:
        lines = [_compared(less, more, saved, f"{less} against {more}") for less, more in links]
        parts += ["## Links of the chains: does each drift less than the one before?", _comparison_table(lines)]
    if parts:
        parts.append(
            "Ratios under 1 mean less drift. Their intervals are percentile bootstraps over captions, too narrow where "
            "these are few; p is that of an exact two-sided sign test over captions, ties dropped, not corrected for "
            "the number of comparisons. A difference is said where the interval leaves out 1 and p is under "
            f"{SIGNIFICANT:g}, which takes at least six captions. "
            f"A method is {FROZEN_MARK} if its mean speed in the last five seconds is under {FROZEN:.0%} of that in "
            "the first, shapes that vanished standing still: it does not count as free of drift."
        )
    return parts


def _compared(name: str, base: str, saved: Saved, label: str | None = None) -> list[str]:
    found = compare(saved.rows[name], saved.rows[base])
    if found is None:
        return [label or name, "0", *[NOTHING] * 4]
    less = f"{found.lower} of {found.lower + found.higher}"
    return [label or name, str(found.videos), _interval(found.ratio, ".3f"), less, _p(found.p), found.verdict]


def _comparison_table(lines: list[list[str]]) -> str:
    return _table(["method", "videos", "ratio of mean drift", "drifts less on", "p", "verdict"], lines)


# --- cells --------------------------------------------------------------------------------------------------

def _drift_cell(rows: list[dict]) -> str:
    known = [value for value in map(drift, rows) if value is not None]
    if not known:
        return NOTHING
    return _interval(bootstrap_mean(known), ".4f") + (f" ({FROZEN_MARK})" if is_frozen(rows) else "")


def _speed_cell(rows: list[dict]) -> str:
    return _number(speed_ratio(rows), ".3f") + (f" ({FROZEN_MARK})" if is_frozen(rows) else "")


def _mean(rows: list[dict], name: str, form: str) -> str:
    return _number(mean_known(row["video"][name] for row in rows), form)


def _share(values: Iterable[bool | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    share = wilson(sum(known), len(known))
    return f"{100 * share.value:.1f} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _interval(found: Interval, form: str) -> str:
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return NOTHING if value is None or math.isnan(value) else f"{scale * value:{form}}"


def _p(value: float) -> str:
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
