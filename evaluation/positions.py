"""Where each method puts what it remembers: a picture and a table, drawn from the plans that its YAML really makes.

    python -m evaluation.positions          writes docs/positions.png and the table of docs/positions.md

No network runs. Each policy plans on a small cache with random keys, so which tokens a method picks by content means
nothing here; where it puts them does. Needs matplotlib, the optional extra `evaluation`.
"""
from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pipeline.build import plan_run
from pipeline.loops import Loop
from utils.config import REPOSITORY, ConfigError, load_config
from utils.figures import saved_figure
from utils.files import write_atomically
from wan.kv_cache.layer import LayerCache
from wan.kv_cache.policy import build_policy, policy_fields

METHODS = {  # title -> YAML of configs/
    "Self Forcing": "self_forcing", "LongLive": "longlive", "Rolling Forcing": "rolling_forcing", "CausVid": "causvid",
    "Deep Sink": "deep_sink", "Deep Forcing": "deep_forcing", "PackForcing": "packforcing_4",
    "PackForcing, squeezed": "packforcing",
}
KINDS = {"chosen": "tab:purple", "sink": "tab:red", "recent": "tab:blue", "in the making": "tab:green"}
SECONDS, SIDE = 60, 8          # length drawn; tokens of a frame, along each side
MOMENTS = (4, 15, 50)          # seconds, in the table
PAGE, PICTURE = REPOSITORY / "docs" / "positions.md", REPOSITORY / "docs" / "positions.png"
TABLE = ("<!-- table -->\n", "<!-- end of table -->\n")


@dataclass(frozen=True)
class Sight:
    """What one span sees: latent frames between it and the span's first frame in window time, by kind."""

    second: float                       # of the video, at which the span begins
    distance: dict[str, list[float]]    # kind -> distinct window times, the span's first frame being 0
    true_sink: int | None               # the first sink frame's distance in the video


def loop_of(name: str, *overrides: str) -> Loop:
    """The loop that a YAML of configs/ and `overrides` mean, for the embedded model's sizes."""
    config = load_config(
        REPOSITORY / "configs" / f"{name}.yaml", policy_fields=policy_fields(), build_policy=build_policy,
        overrides=["model=tiny", *overrides],
    )
    plan = plan_run(config, checkpoint=None, use_ema=False, device=torch.device("cpu"), random_weights=True)
    return plan.loop


def sights(loop: Loop, seconds: float) -> Iterator[Sight]:
    """Every denoised span of a video of `seconds`."""
    g = loop.geometry
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    frames = loop.latent_frames(g.pixel_frames_of_seconds(seconds), given_frames=0)
    for look, layer in loop.walk(frames, side=SIDE, draw=draw):
        plan = layer.plan
        distance = {kind: [] for kind in KINDS}
        place = [at - plan.query_position for at in plan.position[0].tolist()]
        for kind, at in zip(kinds(loop, layer), place, strict=True):
            distance[kind].append(at)
        packets = vars(plan).get("packet_position")  # of policies that compress
        if packets is not None:
            distance["chosen"] += [at - plan.query_position for at in packets[0].flatten().tolist()]
        distance["in the making"] = list(range(look.span.frames))
        second = max(0, g.pixel_frames(look.begins + look.span.start)) / g.fps
        has_sink = bool(distance["sink"])
        yield Sight(
            second, {kind: sorted(set(places)) for kind, places in distance.items()},
            -look.span.start if has_sink else None,
        )


def kinds(loop: Loop, layer: LayerCache) -> Iterator[str]:
    """Of each attended token: a first frame that is kept for ever, one chosen by content, or a recent one."""
    view = layer.view()
    has_forgotten = view.seen_frames > view.num_frames
    fields = vars(loop.policy)
    sink_frames = fields.get("sink_frames", fields.get("anchor_frames", 0))
    top_frames = fields["budget_frames"] - sink_frames - fields["recent_frames"] if "budget_frames" in fields else 0
    sink = sink_frames * view.frame_tokens
    attended, past = layer.plan.attend[0].tolist(), layer.plan.attend.shape[1]
    pruned = "budget_frames" in fields and (has_forgotten or layer.plan.chosen is not None)
    top = sink + (top_frames * view.frame_tokens if pruned else 0)
    for place in range(past):
        yield "sink" if attended[place] < sink else "chosen" if place < top else "recent"


def span_of(places: list[float]) -> str:
    """`-21 .. -12`, one number, or a dash."""
    if not places:
        return "-"
    low, high = (f"{math.floor(at) if at < 0 else math.ceil(at)}" for at in (places[0], places[-1]))
    return low if low == high else f"{low} .. {high}"


def table(seen: dict[str, list[Sight]]) -> str:
    """Markdown: of each method at each moment, where everything is."""
    lines = ["| method | at | sink | truly at | chosen | recent |", "| --- | --- | --- | --- | --- | --- |"]
    for name, row in seen.items():
        for moment in MOMENTS:
            sight = [sight for sight in row if sight.second <= moment][-1]
            true = "-" if sight.true_sink is None else str(sight.true_sink)
            places = [span_of(sight.distance[kind]) for kind in ("sink", "chosen", "recent")]
            lines.append(f"| {name} | {moment} s | {places[0]} | {true} | {places[1]} | {places[2]} |")
    return "\n".join(lines) + "\n"


def draw(seen: dict[str, list[Sight]], path: Path) -> None:
    """Write the picture: one panel a method, time of the video downwards, window time across.

    Raises: ConfigError if matplotlib is not installed.
    """
    columns = math.ceil(len(seen) / 2)
    with saved_figure(path, (4.2 * columns, 9), dpi=80) as figure:
        panels = figure.subplots(2, columns, sharex=True, sharey=True).flat
        for axes, (name, row) in zip(panels, seen.items(), strict=False):
            for kind, colour in KINDS.items():
                points = [(at, sight.second) for sight in row for at in sight.distance[kind]]
                if points:
                    size = 5 if kind == "chosen" else 3
                    axes.scatter(*zip(*points, strict=True), s=size, color=colour, label=kind, linewidths=0)
            true = [(sight.true_sink, sight.second) for sight in row if sight.true_sink is not None]
            if true:
                born = "where the sink was born"
                axes.plot(*zip(*true, strict=True), ":", color="tab:red", linewidth=0.8, label=born)
            axes.set_title(name)
            axes.set_xscale("symlog", linthresh=30, linscale=2)
            axes.set_xlim(-260, 18)
            axes.set_xticks([-200, -50, -21, -10, 0, 15], ["-200", "-50", "-21", "-10", "0", "15"])
            axes.set_ylim(SECONDS, 0)
            axes.axvline(-18, color="0.8", linewidth=0.8, zorder=0)
            axes.grid(alpha=0.2)
        for axes in figure.axes[len(seen):]:
            axes.set_axis_off()
        figure.supxlabel("window time in latent frames; 0: first frame in the making (linear to 30, then logarithmic)")
        figure.supylabel("seconds of the video")
        labels = {
            label: handle for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(labels.values(), labels, loc="outside upper center", ncols=5, markerscale=4)


def with_table(page: str, text: str) -> str:
    """`page` with `text` between its two marks."""
    before, _, rest = page.partition(TABLE[0])
    _, _, after = rest.partition(TABLE[1])
    return before + TABLE[0] + text + TABLE[1] + after


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    there = {title: name for title, name in METHODS.items() if (REPOSITORY / "configs" / f"{name}.yaml").is_file()}
    seen = {title: list(sights(loop_of(name), SECONDS)) for title, name in there.items()}
    try:
        draw(seen, PICTURE)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_atomically(PAGE, with_table(PAGE.read_text(encoding="utf-8"), table(seen)).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
