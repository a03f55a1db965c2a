"""What is made of a sweep's tidy table: means, intervals, curves, and tables beside those that papers print."""
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.metrics.catalogue import EVERY, share_names, value_names
from evaluation.metrics.table import Row
from evaluation.study.statistics import wilson
from evaluation.sweep.figures import draw_ablation
from evaluation.sweep.numbers import MetricName, Numbers
from evaluation.sweep.quoted import QUOTED, Quoted, read_quoted
from evaluation.sweep.results import Saved
from evaluation.sweep.tables import HEADLINES, latex, make_grid, markdown, to_html, write_tables
from utils.config import ConfigError
from utils.yaml_files import load_structured


def row(method: str, video: int, metric: str, granularity: str, start_s: float | None, value: float) -> Row:
    return Row(f"{method}/{video}.mp4", method, f"prompt {video}", "0", metric, granularity, start_s, value, "by hand")


# --- the table of a sweep that names none ---------------------------------------------------------------------

def test_headlines_are_numbers_that_a_metric_gives():
    """Each by a name that is known, and one at least for every metric."""
    shown = {column.metric for column in HEADLINES}
    assert shown <= value_names()
    assert all(shown & value_names([name]) for name in EVERY)


def test_headlines_are_those_that_were_measured(tmp_path):
    """Drift first; what nothing measured, or two protocols did, is no column; without numbers there is no table."""
    rows = [row(m, 0, name, "whole", None, 0.5) for m in "ab" for name in ("frozen", "dynamic_degree", "drift")]
    rows.append(replace(rows[1], protocol="VBench-Long"))
    saved = Saved(tmp_path, {"tables": {}}, {"a": {}, "b": {}}, [], {}, rows)
    grid = write_tables(saved, Numbers(rows), tmp_path)["methods"]
    assert grid.head == ["method", "videos", "drift, Delta E ↓", "frozen, % ↓"]
    assert [line.name for line in grid.lines] == ["a", "b"] and (tmp_path / "methods.md").is_file()
    assert write_tables(saved, Numbers([]), tmp_path) == {}


# --- numbers --------------------------------------------------------------------------------------------------

@pytest.fixture
def numbers() -> Numbers:
    """Two methods, two videos each, one number a video and two windows."""
    rows = [row(m, v, "drift", "whole", None, x) for m, v, x in
            (("a", 0, 1.0), ("a", 1, 3.0), ("b", 0, 5.0), ("b", 1, 9.0))]
    rows += [row("a", v, "clip_score", "window10s", start, x) for v, start, x in
             ((0, 0.0, 30.0), (0, 10.0, 32.0), (1, 0.0, 34.0), (1, 10.0, 36.0))]
    return Numbers(rows)


def test_means_by_hand(numbers):
    assert numbers.mean("a", MetricName.parse("drift@whole")).value == 2
    assert numbers.mean("b", MetricName.parse("drift@whole")).value == 7
    assert numbers.mean("a", MetricName.parse("drift@clip2s")) is None
    found = numbers.mean("a", MetricName.parse("drift@whole"))
    assert (found.low, found.high) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)  # Student's t: 12.706


def test_windows_alone_and_averaged(numbers):
    """Two roads to the mean over windows: from each video's mean, and from each window's mean."""
    every = numbers.mean("a", MetricName.parse("clip_score@window10s")).value
    parts = [numbers.mean("a", MetricName.parse(f"clip_score@window10s:{start}")).value for start in (0, 10)]
    assert parts == [32, 34] and every == sum(parts) / 2
    curve = numbers.curve("a", "clip_score", "window10s")
    assert curve.start_s == [0, 10] and curve.mean == parts
    assert numbers.metrics_over_time("window10s") == ["clip_score"] and numbers.metrics_over_time("second") == []


def test_protocols_are_never_mixed(numbers):
    """Two roads to one name: refused until the column says which it means."""
    both = Numbers([row("a", 0, "d", "whole", None, 1.0),
                    Row("a/0.mp4", "a", "", "0", "d", "whole", None, 5.0, "VBench-Long")])
    name = MetricName.parse("d@whole")
    with pytest.raises(ConfigError, match="2 protocols .VBench-Long; by hand."):
        both.mean("a", name)
    assert both.mean("a", name, "VBench").value == 5 and both.mean("a", name, "hand").value == 1
    assert both.protocol(["a"], name, "VBench") == "VBench-Long"


def test_methods_of_different_protocols_are_never_set_side_by_side(tmp_path):
    """Each by one judge, another one: refused until the column says which it means."""
    rows = [row("a", 0, "drift", "whole", None, 1.0), replace(row("b", 0, "drift", "whole", None, 5.0), protocol="x")]
    table = {"title": "T", "methods": [], "columns": [COLUMN], "quoted": None}
    with pytest.raises(ConfigError, match="drift@whole of a, b was measured by 2 protocols .by hand; x."):
        make_grid(table, saved_of(tmp_path), Numbers(rows))
    grid = make_grid(table | {"columns": [COLUMN | {"protocol": "hand"}]}, saved_of(tmp_path), Numbers(rows))
    assert [line.cells[1].text for line in grid.lines] == ["10.0", "–"]
    assert make_grid(table | {"methods": ["b"]}, saved_of(tmp_path), Numbers(rows)).notes[-1].endswith(", x.")
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="drift@whole of a, b was measured by 2 protocols"):
        draw_ablation(saved_of(tmp_path), Numbers(rows), "sink_frames", ["a", "b"], ["drift@whole"], tmp_path / "x.png")


def seeds_of(prompts: int, seeds: int, metric: str, value) -> list[Row]:
    """value(prompt) of every seed, whole and of its only second."""
    return [
        Row(f"a/{i}-s{seed}.mp4", "a", f"prompt {i}", str(seed), metric, granularity, start, value(i), "by hand")
        for i in range(prompts) for seed in range(seeds) for granularity, start in (("whole", None), ("second", 0.0))
    ]


def test_more_seeds_of_a_prompt_are_no_more_prompts():
    """Two roads to one interval: one seed of each prompt, and five that all say the same."""
    few, many = (Numbers(seeds_of(6, seeds, "drift", float)) for seeds in (1, 5))
    name = MetricName.parse("drift@whole")
    assert few.mean("a", name) == many.mean("a", name) and few.mean("a", name).value == 2.5
    assert few.curve("a", "drift", "second") == many.curve("a", "drift", "second")
    assert len(many.per_video("a", name)) == 30


def test_prompts_weigh_alike_and_an_unknown_one_is_its_videos(numbers):
    """A prompt with three seeds counts once; without prompts every video counts."""
    rows = [Row(f"a/{v}.mp4", "a", prompt, "0", "d", "whole", None, x, "p")
            for v, (prompt, x) in enumerate([("p", 1.0), ("p", 2.0), ("p", 3.0), ("q", 6.0)])]
    assert Numbers(rows).mean("a", MetricName.parse("d@whole")).value == 4
    nameless = [Row(r.video, "a", "", "0", "d", "whole", None, r.value, "p") for r in rows]
    assert Numbers(nameless).mean("a", MetricName.parse("d@whole")).value == 3


@pytest.mark.parametrize("metric", ["dynamic_degree", "repetition", "frozen", "world_holds_colour"])
def test_no_share_is_known_for_certain(metric):
    """None of eight videos: Wilson's interval begins at 0 and is wider than nothing."""
    found = Numbers(seeds_of(8, 1, metric, lambda prompt: 0.0)).mean("a", MetricName.parse(f"{metric}@whole"))
    assert (found.value, found.low, found.high) == (0, 0, wilson(0, 8).high) and found.high > 0.3


def test_shares_are_named_by_their_metrics():
    assert {"frozen", "world_survival", "world_colour", "world_rate_pair"} < share_names()
    assert not share_names() & {"drift", "brightness", "flow", "rollbacks", "world_jumps", "temporal_flickering"}
    assert "clipped" not in share_names()  # of pixels: no frame has it or has it not


# --- tables ---------------------------------------------------------------------------------------------------

COLUMN = {"metric": "drift@whole", "label": "Drift_1 & <more>", "better": "lower", "scale": 10.0, "digits": 1,
          "protocol": ""}


def saved_of(tmp_path: Path, **sweep) -> Saved:
    defaults = {"tables": {}, "ablations": {}, "record": {"methods": []}, "shown": 4}
    variants = {name: {"settings": {"config": {"kv_cache": {"sink_frames": 1}}}} for name in "ab"}
    return Saved(tmp_path, defaults | sweep, variants, [], {}, [])


def test_a_table_marks_the_best_of_ours_and_what_is_quoted(tmp_path, numbers):
    columns = [COLUMN, {"metric": "dynamic_degree@clip2s", "label": "Dyn", "better": "none", "scale": 100, "digits": 2,
                         "protocol": ""}]
    table = {"title": "T", "methods": [], "columns": columns, "quoted": "deep_forcing_table1"}
    grid = make_grid(table, saved_of(tmp_path), numbers)
    ours, quoted = [line for line in grid.lines if not line.quoted], [line for line in grid.lines if line.quoted]
    assert [line.cells[1].text for line in ours] == ["20.0", "70.0"]
    assert [line.cells[1].best for line in ours] == [True, False] and not any(line.cells[2].best for line in quoted)
    assert [line.name for line in quoted][-1] == "Deep Forcing" and quoted[-1].cells[2].text == "57.19"
    assert quoted[-1].cells[1].text == "–"
    text = markdown(grid)
    assert "**20.0** [-107.1, 147.1]" in text and "| *Deep Forcing* (quoted) |  | – | 57.19 |" in text
    assert "arXiv:2512.05081" in text and "not measured in this sweep" in text


def test_only_means_over_the_same_prompts_compete(tmp_path):
    """A line of fewer prompts, or of others, may be lower than all: bold is the best over the largest set."""
    values = {"full": [5.0] * 6, "other": [4.0] * 6, "few": [1.0]}
    rows = [row(method, v, "drift", "whole", None, x) for method, some in values.items() for v, x in enumerate(some)]
    rows += [replace(row("elsewhere", v, "drift", "whole", None, 2.0), prompt=f"another {v}") for v in range(6)]
    table = {"title": "T", "columns": [COLUMN], "quoted": None}

    def bold(*methods: str) -> list[str]:
        grid = make_grid(table | {"methods": methods}, saved_of(tmp_path), Numbers(rows))
        return [line.name for line in grid.lines if line.cells[1].best]

    assert bold("few", "full", "other", "elsewhere") == ["other"] and bold("full", "few") == []


def test_a_cell_of_fewer_videos_says_so_and_is_never_the_best(tmp_path):
    """Three of four videos have a score, the best of all: its n is shown, and another line's is bold."""
    rows = [row(m, v, "drift", "whole", None, 1.0 + v) for m in "ab" for v in range(4)]
    rows += [row("a", v, "score", "whole", None, 9.0 + v) for v in range(3)]
    rows += [row("b", v, "score", "whole", None, float(v)) for v in range(4)]
    rows += [row("c", v, "drift", "whole", None, 9.0) for v in range(4)]
    score = COLUMN | {"metric": "score@whole", "better": "higher", "scale": 1.0}
    table = {"title": "T", "methods": ["a", "b", "c"], "columns": [COLUMN, score], "quoted": None}
    grid = make_grid(table, saved_of(tmp_path), Numbers(rows))
    assert [line.cells[0].text for line in grid.lines] == ["4", "4", "4"]
    assert [line.cells[2].best for line in grid.lines] == [False, False, False]  # one alone is whole: no contest
    assert "10.0 [7.5, 12.5] n=3 |" in markdown(grid) and r"10.0 {\scriptsize [7.5, 12.5] n=3}" in latex(grid)
    assert "10.0 <small>[7.5, 12.5] n=3</small>" in to_html(grid) and markdown(grid).count("n=") == 1
    grid = make_grid(table, saved_of(tmp_path), Numbers([*rows, *(row("c", v, "score", "whole", None, 0.5)
                                                                   for v in range(4))]))
    assert [line.cells[2].best for line in grid.lines] == [False, True, False] and "**1.5** [" in markdown(grid)


def test_other_granularities_are_never_set_beside_each_other(tmp_path, numbers):
    column = {"metric": "dynamic_degree@whole", "label": "Dyn", "better": "none", "scale": 1, "digits": 2,
              "protocol": ""}
    table = {"title": "T", "methods": ["a"], "columns": [column], "quoted": "deep_forcing_table1"}
    assert {line.cells[1].text for line in make_grid(table, saved_of(tmp_path), numbers).lines} == {"–"}


def test_names_are_escaped(tmp_path, numbers):
    grid = make_grid({"title": "A & B_c", "methods": [], "columns": [COLUMN], "quoted": None}, saved_of(tmp_path),
                     numbers)
    assert r"Drift\_1 \& <more> $\downarrow$" in latex(grid) and r"\caption{A \& B\_c." in latex(grid)
    assert "Drift_1 &amp; &lt;more&gt; ↓" in to_html(grid) and "<more>" not in to_html(grid)
    assert latex(grid).count(r"\\") == 3 and latex(grid).count(" & ") == 2 * 3


def test_a_bar_in_a_label_is_no_border(tmp_path, numbers):
    """Every row of the Markdown has as many borders as columns, and one more."""
    table = {"title": "T", "methods": [], "columns": [COLUMN | {"label": "|a - b|"}], "quoted": None}
    rows = [line for line in markdown(make_grid(table, saved_of(tmp_path), numbers)).splitlines() if line[:1] == "|"]
    assert len(rows) == 4 and {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {4}
    assert r"\|a - b\| ↓" in rows[0]


def test_quoted_tables_are_whole():
    """As many numbers as columns; PackForcing's overall CLIP scores are the means of their windows, but for one row
    whose note says so."""
    names = load_structured(QUOTED, Quoted).tables
    assert len(names) == 5
    for name in names:
        source, rows = read_quoted(name)
        assert "arXiv" in source and all(rows.values())
    for method, values in read_quoted("packforcing_table2")[1].items():
        *windows, overall = values.values()
        assert (abs(sum(windows) / 6 - overall) < 0.011) == (method != "Deep Forcing")
    with pytest.raises(ConfigError, match="'nope' is unknown"):
        read_quoted("nope")
