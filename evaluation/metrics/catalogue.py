"""All metrics by name. Makers import what they need only when they are called: some need heavy or optional packages."""
from __future__ import annotations

from collections.abc import Callable, Sequence

from evaluation.metrics.protocol import Choices, Metric
from utils.config import ConfigError
from utils.config_schema import nearest


def _picture(choices: Choices) -> Metric:
    from evaluation.metrics.picture import Picture

    return Picture()


def _world(choices: Choices) -> Metric:
    from evaluation.metrics.world import WorldMetric

    return WorldMetric()


MAKERS: dict[str, Callable[[Choices], Metric]] = {
    "picture": _picture,
    "world": _world,
}
FREE = ("picture",)  # what `--metrics free` means: they need no download and no optional package


def make_metrics(names: Sequence[str], choices: Choices) -> list[Metric]:
    """The metrics of these names, ready to measure; `free` stands for all of FREE, `all` for every one.

    Raises:
        ConfigError: an unknown name; weights or an optional package that are missing, and how to get them.
    """
    wanted: dict[str, None] = {}
    for name in names:
        wanted |= dict.fromkeys({"free": FREE, "all": tuple(MAKERS)}.get(name, (name,)))
    for name in wanted:
        if name not in MAKERS:
            raise ConfigError(
                f"--metrics {name}: unknown.{nearest(name, MAKERS)} Known: free, all, {', '.join(MAKERS)}."
            )
    return [MAKERS[name](choices) for name in wanted]
