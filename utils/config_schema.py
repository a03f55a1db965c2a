"""What single values of a config may be, and which upstream keys only matter for training.

Knows no files, no YAML and no cache policy; utils/config.py calls these checks.
"""
from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any


class ConfigError(ValueError):
    """A config cannot be used; the message names file, key, what was found and what is allowed."""


@dataclass(frozen=True)
class Layer:
    """The settings of one file, of one --set, or of several merged, and where each comes from."""

    name: str                  # file, or `--set key=value`
    values: dict[Any, Any]     # plain data
    where: Mapping[str, str]   # dotted key -> `file:line`, or `--set key=value`

    def at(self, key: str) -> str:
        """Where `key` was set, for messages."""
        return self.where.get(key, self.name)

    def group(self, key: str) -> dict[Any, Any]:
        """The keys of a group; empty if it is not there."""
        return self.values.get(key, {})


@dataclass(frozen=True)
class Rule:
    """What one key accepts."""

    allowed: str                                              # in words, for the error message
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] = field(default=lambda value: value)

    def or_null(self, meaning: str) -> Rule:
        """The same rule, with null allowed as well."""
        return Rule(
            f"{self.allowed}, or null ({meaning})",
            lambda value: value is None or self.accepts(value),
            lambda value: None if value is None else self.convert(value),
        )

    def check(self, key: str, value: Any, where: str) -> Any:
        """`value` as the program uses it.

        Raises:
            ConfigError: the value is not allowed.
        """
        if not self.accepts(value):
            raise ConfigError(f"{where}: {key}={value!r} is not allowed. Allowed: {self.allowed}.")
        return self.convert(value)


def is_number(value: Any) -> bool:
    """A finite int or float; True and False are not numbers here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def whole(least: int) -> Rule:
    return Rule(f"a whole number, at least {least}", lambda value: type(value) is int and value >= least)


def _are_steps(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value or not all(map(is_number, value)):
        return False
    return value[0] <= 1000 and value[-1] > 0 and all(a > b for a, b in itertools.pairwise(value))


LOOPS = ("chunkwise", "rolling_forcing", "causvid_overlap")        # pipeline/loops.py
SWITCHES = ("keep", "recache", "flush_recent", "reset_sink")        # pipeline/timeline.py
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("some text", lambda value: isinstance(value, str) and bool(value.strip()))
POSITIVE = Rule("a number above 0", lambda value: is_number(value) and value > 0, float)
NOISE = Rule("a number from 0 to below 1000", lambda value: is_number(value) and 0 <= value < 1000)
DTYPE = Rule("bfloat16 or float32", lambda value: value in ("bfloat16", "float32"))
STEPS = Rule(
    "a list of numbers that fall strictly from at most 1000 and stay above 0, such as [1000, 750, 500, 250] "
    "(a final 0 is the end of the schedule, not a step: leave it out)",
    _are_steps,
    lambda value: tuple(int(step) if step == int(step) else step for step in value),
)
PATCH = Rule(
    "three whole numbers of at least 1: frames, rows, columns, such as [1, 2, 2]",
    lambda value: isinstance(value, (list, tuple)) and len(value) == 3 and all(map(whole(1).accepts, value)),
    tuple,
)
WINDOW = Rule(
    "-1 (every frame) or a number of latent frames, at least 1",
    lambda value: type(value) is int and (value == -1 or value >= 1),
)
SCALAR = Rule(
    "one number, word, true, false or null",
    lambda value: value is None or isinstance(value, (bool, int, float, str)),
)


LOOP = Rule("chunkwise, rolling_forcing or causvid_overlap", lambda value: value in LOOPS)
ON_SWITCH = Rule("keep, recache, flush_recent or reset_sink", lambda value: value in SWITCHES)


def setting(rule: Rule, default: Any = MISSING) -> Any:
    """A dataclass field that is a YAML key, checked by `rule`; without a default the key is required."""
    return field(default=default, metadata={"rule": rule})


def rules_of(schema: type) -> dict[str, Rule]:
    """The YAML keys of a dataclass made of `setting` fields."""
    return {f.name: f.metadata["rule"] for f in fields(schema) if "rule" in f.metadata}


def checked(schema: type, values: Mapping[str, Any], where: Callable[[str], str], prefix: str = "") -> dict[str, Any]:
    """Constructor arguments of `schema`: the keys of `values` that it knows, each checked.

    Args:
        where: says which file and line set a dotted key.
        prefix: what stands before the keys in messages, such as `transformer.`.
    Raises:
        ConfigError: a value is not allowed, or a required key is missing.
    """
    required = [f.name for f in fields(schema) if "rule" in f.metadata and f.default is MISSING]
    missing = [prefix + name for name in required if name not in values]
    if missing:
        pronoun = "it" if len(missing) == 1 else "them"
        raise ConfigError(f"{where(prefix.rstrip('.'))}: lacks {', '.join(missing)}. Add {pronoun}.")
    return {
        name: rule.check(prefix + name, values[name], where(prefix + name))
        for name, rule in rules_of(schema).items()
        if name in values
    }


def refuse_open(layer: Layer) -> None:
    """Raise ConfigError for `???`, which would quietly leave a base's value in place."""
    inner = {
        f"{group}.{key}": value
        for group, values in layer.values.items() if isinstance(values, Mapping) for key, value in values.items()
    }
    for key, value in {**layer.values, **inner}.items():
        if value == "???" and not is_training_key(key):
            raise ConfigError(f"{layer.at(key)}: {key} has no value, only ???. Give it one, or leave the key out.")


def refuse_unknown(
    keys: Iterable[Any], known: Iterable[str], where: Callable[[str], str], *, prefix: str = "", explained: str
) -> None:
    """Raise ConfigError for the first of `keys` that is not `known`, with the nearest match and all valid keys.

    Args:
        explained: where a reader finds what the valid keys mean.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            raise ConfigError(
                f"{where(f'{prefix}{key}')}: unknown key {prefix}{key}.{nearest(str(key), known)} "
                f"Valid keys: {', '.join(known)} ({explained})."
            )


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean x?` with the known word that is most like `word`, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {match[0]}?" if match else ""


# Keys of the Self Forcing family's configs that steer training, its data and its logs, or that are command-line
# options here. They are named in one notice and change nothing.
TRAINING_KEYS = frozenset([
    "batch_size", "beta1", "beta1_critic", "beta2", "beta2_critic", "causal", "cfg_prob", "ckpt_step",
    "concat_time_embeddings", "data_path", "denoising_loss_type", "dfake_gen_update_ratio",
    "discriminator_lr_multiplier", "distillation_loss", "distribution_loss", "ema_start_step", "ema_weight",
    "eval_first_n", "fake_guidance_scale", "fake_name", "fake_score_fsdp_wrap_strategy", "gan_d_weight",
    "gan_g_weight", "gc_interval", "generator_ckpt", "generator_fsdp_wrap_strategy", "generator_name",
    "gradient_checkpointing", "guidance_scale", "i2v", "image_or_video_shape", "last_step_only", "load_raw_video",
    "log_iters", "logdir", "lr", "lr_critic", "max_iters", "max_step", "min_step", "mixed_precision",
    "negative_prompt", "no_save", "no_visualize", "num_class", "num_frames", "num_samples", "num_train_timestep",
    "num_training_frames", "prompt_name", "prompt_path", "r1_sigma", "r1_weight", "r2_sigma", "r2_weight",
    "real_guidance_scale", "real_name", "real_score_fsdp_wrap_strategy", "relativistic_discriminator",
    "same_step_across_blocks", "seed", "sharding_strategy", "sid_alpha", "text_encoder_cpu_offload",
    "text_encoder_fsdp_wrap_strategy", "total_batch_size", "trainer", "ts_schedule", "ts_schedule_max",
    "weight_decay",
])
TRAINING_PREFIX = "wandb_"


def is_training_key(key: Any) -> bool:
    return key in TRAINING_KEYS or str(key).startswith(TRAINING_PREFIX)
