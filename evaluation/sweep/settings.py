"""What a sweep is, as a typed YAML: evaluation/sweeps/*.yaml hold the values."""
from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.study.settings import NAME, CaptionSet, Method
from evaluation.sweep.quoted import read_quoted
from training.world import Clip, World, sample
from utils.config import REPOSITORY, ConfigError
from utils.prompts import PromptItem, load_prompts
from utils.yaml_files import load_structured

METRIC = re.compile(r"[a-z0-9_]+@[a-z0-9_]+(:[0-9.]+)?")  # name@granularity, and :start of a window


@dataclass
class Prompts:
    """What to show: lines of a file, or captions of the embedded model's world; one of the two."""

    file: str | None = None                             # .txt or .jsonl, relative to the repository
    extended: str | None = None                         # longer prompts, line by line
    first: int = 0                                      # of the file's prompts
    count: int | None = None                            # None: all from there on
    captions: list[CaptionSet] = field(default_factory=list)


@dataclass
class Column:
    """One number of a table."""

    metric: str                                         # name@granularity
    label: str
    better: str = "none"                                # lower | higher | none: which end is set in bold
    scale: float = 1.0
    digits: int = 2
    protocol: str = ""                                  # part of the protocol meant, where there are several


@dataclass
class Table:
    """Variants as rows, metrics as columns."""

    title: str
    methods: list[str] = field(default_factory=list)    # empty: all
    columns: list[Column] = field(default_factory=list)
    quoted: str | None = None                           # a table of evaluation/sweep/quoted.yaml, set beside ours


@dataclass
class Ablation:
    """One setting of the cache on the x axis, metrics on the y axes."""

    title: str
    x: str                                              # a key of the method's kv_cache group, such as sink_frames
    methods: list[str]
    metrics: list[str]                                  # name@granularity, or `name@granularity part of the protocol`


@dataclass
class Recording:
    """What is watched, on the first prompt of the named methods; nothing without methods."""

    methods: list[str] = field(default_factory=list)
    seconds: float = 15.0
    layers: list[int] = field(default_factory=list)     # whose attention is kept; empty: first, middle and last


@dataclass
class Sweep:
    """Every method under every setting meets every prompt with every seed at every length."""

    seconds: list[float]
    prompts: Prompts
    methods: dict[str, Method]
    settings: dict[str, list[str]] = field(default_factory=dict)  # name: key=value overrides; empty: the methods as is
    seeds: list[int] = field(default_factory=lambda: [0])
    model: str = "auto"                                 # a file stem in configs/models, or a path
    checkpoint: str | None = None                       # transformer weights in place of the model's own
    use_ema: bool = False
    batch_size: int = 1                                 # videos made side by side
    metrics: list[str] = field(default_factory=list)    # as --metrics of `python -m evaluation measure`
    vlm: str = ""                                       # MODULE:FUNCTION that visual_stability asks
    tables: dict[str, Table] = field(default_factory=dict)  # empty: one of headline numbers, see tables.py
    ablations: dict[str, Ablation] = field(default_factory=dict)
    record: Recording = field(default_factory=Recording)
    shown: int = 4                                      # prompts on the page and in the grids


@dataclass(frozen=True)
class Variant:
    """One line of the tables: a method under a setting at a length."""

    name: str
    method: Method
    overrides: tuple[str, ...]
    seconds: float


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read and check the sweep at `path`; `overrides` are key=value.

    Raises:
        ConfigError: a key, type or value that cannot be used.
    """
    sweep = load_structured(path, Sweep, overrides)
    wrong = _first_fault(sweep)
    if wrong is not None:
        raise ConfigError(f"{path}: {wrong}")
    return sweep


def variants_of(sweep: Sweep) -> list[Variant]:
    """Methods x settings x lengths; a name says only what varies."""
    settings = sweep.settings or {"": []}
    found = []
    for (name, method), (setting, overrides), seconds in itertools.product(
        sweep.methods.items(), settings.items(), sweep.seconds,
    ):
        full = f"{name}.{setting}" if setting else name
        full = f"{full}.{seconds:g}s" if len(sweep.seconds) > 1 else full
        found.append(Variant(full, method, tuple(overrides), seconds))
    return found


def chosen_of(sweep: Sweep, only: Sequence[str]) -> tuple[set[str], set[str]]:
    """Variants to make and measure, and those to watch, for some tables, ablations, variants or `record`; empty: all.

    Raises: ConfigError for a name that is none of these.
    """
    every = {variant.name for variant in variants_of(sweep)}
    if not only:
        return every, set(sweep.record.methods)
    groups = {name: {name} for name in every}
    groups |= {name: set(ablation.methods) for name, ablation in sweep.ablations.items()}
    groups |= {name: set(table.methods) or every for name, table in sweep.tables.items()}
    groups["record"] = set(sweep.record.methods)
    for name in only:
        if name not in groups:
            raise ConfigError(f"--only {name}: unknown. Name some of: {', '.join(groups)}.")
    return set().union(*(groups[name] for name in only)), groups["record"] if "record" in only else set()


def items_of(sweep: Sweep) -> list[PromptItem]:
    """The prompts, numbered as in their file, or as captions come.

    Raises: utils.prompts.PromptError if the file cannot be read.
    """
    prompts = sweep.prompts
    if prompts.captions:
        return [PromptItem(index, clip.caption, None, None) for index, clip in enumerate(clips_of(sweep))]
    items = load_prompts(
        prompt=None, data_path=REPOSITORY / prompts.file, i2v=False,
        extended_prompt_path=None if prompts.extended is None else REPOSITORY / prompts.extended,
    )
    stop = None if prompts.count is None else prompts.first + prompts.count
    chosen = items[prompts.first:stop]
    if not chosen or (stop is not None and stop > len(items)):
        raise ConfigError(
            f"{prompts.file} holds {len(items)} prompts, and prompts {prompts.first} to {stop} are asked for. "
            "Lower prompts.first or prompts.count."
        )
    return chosen


def clips_of(sweep: Sweep) -> list[Clip]:
    """The clips that the captions describe, in the size of the embedded model; empty for prompts of a file."""
    found = {}
    for part in sweep.prompts.captions:
        for seed in part.seeds:
            clip = sample(seed, part.split, World())
            found.setdefault(clip.caption, clip)  # two scenes may share a caption, and make one video
    return list(found.values())


def metrics_shown(sweep: Sweep) -> list[tuple[str, str]]:
    """(table or ablation, metric) of every number that is shown."""
    columns = [(f"tables.{name}", column.metric) for name, table in sweep.tables.items() for column in table.columns]
    return columns + [
        (f"ablations.{name}", metric.partition(" ")[0])
        for name, ablation in sweep.ablations.items() for metric in ablation.metrics
    ]


def _first_fault(sweep: Sweep) -> str | None:
    """What is wrong, and what to do; None if nothing is."""
    if not sweep.seconds or min(sweep.seconds) <= 0 or len(set(sweep.seconds)) < len(sweep.seconds):
        return f"seconds={sweep.seconds} must name different lengths over 0, such as [30, 60]."
    if not sweep.seeds or min(sweep.seeds) < 0 or len(set(sweep.seeds)) < len(sweep.seeds):
        return f"seeds={sweep.seeds} must name different whole numbers from 0 on, such as [0]."
    if sweep.batch_size < 1:
        return f"batch_size={sweep.batch_size} is too small. Ask for 1 or more."
    if not sweep.methods:
        return "methods is empty: nothing to make. Add a method, such as rolling: {config: configs/self_forcing.yaml}."
    for kind, names in (("methods", sweep.methods), ("settings", sweep.settings)):
        for name in names:
            if not NAME.fullmatch(name):
                return f"{kind}: {name!r} cannot be a name. Use lower-case letters, digits and _."
    return _prompt_fault(sweep.prompts) or _output_fault(sweep)


def _prompt_fault(prompts: Prompts) -> str | None:
    if bool(prompts.file) == bool(prompts.captions):
        return "prompts needs either a file or captions, such as {captions: [{split: test, count: 4}]}."
    if prompts.first < 0 or (prompts.count is not None and prompts.count < 1):
        return f"prompts: first={prompts.first}, count={prompts.count} names no prompt. Ask for at least one from 0 on."
    for part in prompts.captions:
        wrong = part.fault()
        if wrong is not None:
            return f"prompts.captions: {wrong}"
    return None


def _output_fault(sweep: Sweep) -> str | None:
    known = {variant.name for variant in variants_of(sweep)}
    named = [(f"tables.{name}", table.methods) for name, table in sweep.tables.items()]
    named += [(f"ablations.{name}", ablation.methods) for name, ablation in sweep.ablations.items()]
    for where, methods in [*named, ("record", sweep.record.methods)]:
        for name in methods:
            if name not in known:
                return f"{where}: {name!r} is none of this sweep's variants. Known: {', '.join(sorted(known))}."
    for where, metric in metrics_shown(sweep):
        if not METRIC.fullmatch(metric):
            return f"{where}: {metric!r} names no metric. Write name@granularity, such as background_drift@whole."
    names = Counter([*known, *sweep.ablations, *sweep.tables, "record"])
    for name, count in names.items():
        if count > 1:
            return f"{name!r} is the name of {count} of methods, tables, ablations and record: --only could mean each."
    for name, table in sweep.tables.items():
        if table.quoted is not None:
            read_quoted(table.quoted)
        for column in table.columns:
            if column.better not in ("lower", "higher", "none"):
                return f"tables.{name}: better={column.better!r} is unknown. Use lower, higher or none."
            if column.digits < 0:
                return f"tables.{name}: digits={column.digits} is too small. Ask for 0 or more."
    return None
