"""One page a sweep: players that keep step, curves under them, tables, figures, settings.

`index.html` lies in the sweep's folder and needs nothing but what is in there: no server, no build, no other host.
"""
from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.sweep.numbers import Numbers
from evaluation.sweep.results import Saved
from evaluation.sweep.tables import Grid, to_html
from utils.files import write_atomically

PAGE = "index.html"
PALETTE = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#e07b39", "#44aa99", "#999933", "#882255",
    "#7f7f7f", "#5e4fa2",
)
DIGITS = 5
HEADLINE = "drift"  # the curve that is seen first


def write_page(saved: Saved, numbers: Numbers, grids: Mapping[str, Grid], figures: Mapping[str, Path]) -> Path:
    """Write the page. `figures` are titles and files inside the sweep's folder."""
    here = Path(__file__).parent
    data = json.dumps(_data(saved, numbers), separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    title = f"{saved.folder.resolve().name}: {len(saved.variants)} methods, {len(saved.videos)} videos"
    drawn = "".join(
        f'<figure><figcaption>{html.escape(name)}</figcaption><img loading="lazy" alt="{html.escape(name)}" '
        f'src="{html.escape(path.relative_to(saved.folder).as_posix())}"></figure>'
        for name, path in figures.items()
    )
    path = saved.folder / PAGE
    write_atomically(path, TEMPLATE.format(
        title=html.escape(title), css=(here / "page.css").read_text(), js=(here / "page.js").read_text(), data=data,
        model=html.escape(f"model {saved.provenance['model']}, seeds {saved.provenance['seeds']}, "
                          f"made on {saved.provenance['device']}"),
        tables=_part("Tables", "".join(map(to_html, grids.values()))), figures=_part("Figures", drawn),
        settings=_settings(saved),
    ).encode())
    return path


def _data(saved: Saved, numbers: Numbers) -> dict[str, Any]:
    """What the page's script needs: only what is shown."""
    shown = saved.shown_prompts
    metrics = sorted(numbers.metrics_over_time("second"), key=lambda metric: metric != HEADLINE)
    videos: dict[str, dict[int, Any]] = {}
    for video in saved.videos:
        mine = videos.setdefault(video["method"], {})
        if video["prompt"] in shown and shown.index(video["prompt"]) not in mine:  # the first seed
            curves = {}
            for metric in metrics:
                curve = numbers.curves(video["method"], metric, "second").get(video["video"])
                if curve:
                    curves[metric] = {"mean": by_second([*curve], [*curve.values()])}
            file = saved.path_of(video["video"]).relative_to(saved.folder).as_posix()
            mine[shown.index(video["prompt"])] = {"file": file, "curves": curves}
    means = {
        metric: {
            method: {name: by_second(curve.start_s, getattr(curve, name)) for name in ("mean", "low", "high")}
            for method in saved.variants
            if (curve := numbers.curve(method, metric, "second")) is not None
        } for metric in metrics
    }
    colours = [PALETTE[index % len(PALETTE)] for index in range(len(saved.variants))]
    return {
        "methods": [{"name": name, "colour": colour} for name, colour in zip(saved.variants, colours, strict=True)],
        "prompts": shown, "metrics": metrics, "videos": videos, "means": means,
    }


def by_second(start_s: Sequence[float], values: Sequence[float]) -> list[float | None]:
    """One value a second from 0 on, in the page's digits; None where nothing is known."""
    known = {round(start): value for start, value in zip(start_s, values, strict=True) if math.isfinite(value)}
    return [
        float(f"{known[second]:.{DIGITS}g}") if second in known else None for second in range(round(max(start_s)) + 1)
    ]


def _part(heading: str, content: str) -> str:
    """Nothing if there is nothing to show."""
    return f"<h2>{heading}</h2>\n{content}\n" if content else ""


def _settings(saved: Saved) -> str:
    """Provenance, and what decides the pixels of every method, to unfold."""
    def block(name: str, value: Any) -> str:
        text = html.escape(json.dumps(value, indent=1, ensure_ascii=False))
        return f"<details><summary>{html.escape(name)}</summary><pre>{text}</pre></details>"

    errors = [f"<li>{html.escape(row.video)}: {html.escape(row.error)}</li>" for row in saved.rows if row.failed]
    missing = f'<h2>Missing</h2><ul>{"".join(errors)}</ul>' if errors else ""
    variants = "".join(map(block, saved.variants, saved.variants.values()))
    return missing + block("provenance", saved.provenance) + variants


TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<h1>{title}</h1>
<p>{model}. Space plays, arrows step by a second, a click on a curve goes there.</p>
<div id="bar">
<button id="play">Play</button>
<input id="seek" type="range" min="0" step="0.01" value="0" aria-label="time">
<span id="clock"></span>
<select id="rate" aria-label="speed"><option>0.5</option><option selected>1</option><option>2</option>
<option>4</option></select>
<select id="prompt" aria-label="prompt"></select>
<select id="metric" aria-label="metric"></select>
<select id="whose" aria-label="curves of"><option value="mean">all videos</option>
<option value="one">this prompt</option></select>
<label><input id="every" type="checkbox"> every metric</label>
</div>
<div id="methods"></div>
<div id="players"></div>
<div id="curves"></div>
{tables}{figures}<h2>Settings</h2>
{settings}
<script type="application/json" id="data">{data}</script>
<script>
{js}</script>
</body>
</html>
"""
