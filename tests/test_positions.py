"""The page on positions says what the plans do."""
from __future__ import annotations

import pytest

from evaluation.positions import METHODS, MOMENTS, PAGE, PICTURE, SECONDS, Sight, loop_of, sights, table, with_table
from utils.config import REPOSITORY

THERE = {title: name for title, name in METHODS.items() if (REPOSITORY / "configs" / f"{name}.yaml").is_file()}


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Sight]]:
    return {title: list(sights(loop_of(name), SECONDS)) for title, name in THERE.items()}


def late(row: list[Sight]) -> list[Sight]:
    return [sight for sight in row if 10 <= sight.second <= MOMENTS[-1]]


def test_the_page_has_the_table_of_the_plans(seen: dict) -> None:
    """Every row of the page is what the plans give now; the picture lies beside it."""
    page = PAGE.read_text(encoding="utf-8")
    assert all(line in page for line in table(seen).splitlines())
    assert with_table(page, table(seen)).count("| method |") == 1
    assert PICTURE.stat().st_size > 10_000 and f"({PICTURE.name})" in page


def test_what_the_page_says_of_each_method(seen: dict) -> None:
    """The sentences of the page, as numbers."""
    assert {tuple(s.distance["recent"]) for s in late(seen["Self Forcing"])} == {tuple(range(-18, 0))}
    for sight in late(seen["LongLive"]):
        assert sight.distance["sink"] == [sight.true_sink + i for i in range(3)]
    assert {tuple(s.distance["sink"]) for s in late(seen["Rolling Forcing"])} == {(-6, -5, -4)}
    assert {len(s.distance["in the making"]) for s in late(seen["Rolling Forcing"])} == {15}
    assert {tuple(s.distance["sink"]) for s in late(seen["Deep Sink"])} == {tuple(range(-21, -11))}
    assert {tuple(s.distance["recent"]) for s in late(seen["Deep Sink"])} == {tuple(range(-8, 0))}
    assert {s.distance["sink"][0] for s in late(seen["Deep Forcing"])} == {-16, -19}
    assert min(s.distance["chosen"][0] for s in seen["Deep Forcing"] if s.distance["chosen"]) < -19
    sinks = [s.distance["sink"][0] for s in seen["PackForcing"] if s.distance["sink"]]
    assert sinks == sorted(sinks, reverse=True) and sinks[-1] == min(sinks) == -(8 + 16 * 4 + 4)
    for sight in late(seen["PackForcing"]):  # dense: no hole of a whole frame between sink, packets and recent chunk
        places = [at for kind in ("sink", "chosen", "recent") for at in sight.distance[kind]]
        assert max(b - a for a, b in zip(places, places[1:], strict=False)) <= 2 and places[-4:] == [-4, -3, -2, -1]
    squeezed = seen["PackForcing, squeezed"]
    assert min(sight.distance["sink"][0] for sight in squeezed if sight.distance["sink"]) == -18
    clips = {s.second for s in seen["CausVid"] if s.distance["recent"] == [-3, -2, -1]}
    assert {round(b - a, 4) for a, b in zip(sorted(clips)[1:], sorted(clips)[2:], strict=False)} == {4.5}


def test_every_moment_of_a_video_is_seen(seen: dict) -> None:
    """Spans begin in order and reach the end."""
    for row in seen.values():
        seconds = [sight.second for sight in row]
        assert seconds == sorted(seconds) and seconds[0] == 0 and seconds[-1] > SECONDS - 2
