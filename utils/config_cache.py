"""Which cache policy a config and its flags mean: the `kv_cache` group, and the older keys that stand for one.

Knows the names that upstream's configs and commands use, and routes fields; what a field may hold is the policy's
own business.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config_schema import SCALAR, WINDOW, ConfigError, Layer, nearest, refuse_unknown, whole

log = logging.getLogger(__name__)

METHOD_FOLDER = Path(__file__).resolve().parent.parent / "configs"
UPSTREAM_CLIP_FRAMES = 21  # latent frames of a training clip, where the config does not say
CLIP_KEYS = ("num_training_frames", "image_or_video_shape")
BUDGET_FRAMES, RECENT_FRAMES = 16, 4  # what the released command takes without --Budget and --Recent

PolicyFields = Mapping[str, AbstractSet[str]]  # policy -> its YAML keys


@dataclass(frozen=True, kw_only=True)
class CacheFlags:
    """The command-line flags that change the cache; None is not given."""

    policy: str | None     # --policy
    is_ds_only: bool       # --is_ds_only: Deep Sink without Participative Compression
    budget: int | None     # --Budget, latent frames
    recent: int | None     # --Recent, latent frames


def cache_group(given: Layer, sets: Sequence[Layer], flags: CacheFlags, policy_fields: PolicyFields) -> dict[str, Any]:
    """The `kv_cache` group that holds for the run: that of the config, then flags, then --set.

    Args:
        given: the merged config, without the `kv_cache` part of --set.
        sets: one layer for each --set.
    Raises:
        ConfigError: a policy or field that does not exist, or settings that contradict each other.
    """
    legacy = not given.group("kv_cache")
    if legacy:
        group = _legacy_group(given)
    else:
        group = _own_group(given, policy_fields)
        _refuse_contradiction(given, group)
    if flags.policy is not None:
        _refuse_method(flags.policy, policy_fields)
        group = _switch(group, flags.policy, policy_fields, f"--policy {flags.policy}")
    if flags.is_ds_only:
        group = _without_compression(group, given.name)
    group = _with_budget(group, given.name, flags, policy_fields, lenient=legacy and flags.policy is None)
    group = _with_sets(group, sets, policy_fields)
    if legacy:
        _check_released_budget(group, given.name)
    return group


def clip_keys_in_use(given: Layer, group: Mapping[str, Any]) -> Sequence[str]:
    """Which keys about the training clip took part in choosing `group`."""
    return CLIP_KEYS if not given.group("kv_cache") and group["policy"] == "full" else ()


def _legacy_group(given: Layer) -> dict[str, Any]:
    """What upstream's `model_kwargs: {local_attn_size, sink_size}` stand for.

    local_attn_size -1 or absent: `full`, as long as a training clip. Else sink_size 0 or absent: `rolling`.
    Else `participative` with the released budget; `--is_ds_only 1` makes it Deep Sink alone.
    """
    kwargs = given.group("model_kwargs")
    window_at, sink_at = given.at("model_kwargs.local_attn_size"), given.at("model_kwargs.sink_size")
    window = WINDOW.check("model_kwargs.local_attn_size", kwargs.get("local_attn_size", -1), window_at)
    sink = whole(0).check("model_kwargs.sink_size", kwargs.get("sink_size", 0), sink_at)
    if sink and "local_attn_size" not in kwargs:
        raise ConfigError(
            f"{sink_at}: model_kwargs.sink_size={sink} has no window to sink in. "
            "Add model_kwargs.local_attn_size in latent frames, such as 21."
        )
    if window == -1:
        if sink:
            log.info("%s: sink_size %s changes nothing: local_attn_size -1 keeps every frame", sink_at, sink)
        return {"policy": "full", "window_frames": _clip_frames(given)}
    if sink == 0:
        return {"policy": "rolling", "window_frames": window}
    return {
        "policy": "participative", "window_frames": window, "sink_frames": sink,
        "budget_frames": BUDGET_FRAMES, "recent_frames": RECENT_FRAMES,
    }


def _clip_frames(given: Layer) -> int:
    """Latent frames of a training clip: what `local_attn_size: -1` was made for."""
    frames_key, shape_key = CLIP_KEYS
    shape = given.values.get(shape_key)
    if frames_key in given.values:
        return whole(1).check(frames_key, given.values[frames_key], given.at(frames_key))
    if isinstance(shape, list) and len(shape) > 1:  # [batch, frames, channels, rows, columns]
        return whole(1).check(f"{shape_key}[1]", shape[1], given.at(shape_key))
    return UPSTREAM_CLIP_FRAMES


def _own_group(given: Layer, policy_fields: PolicyFields) -> dict[str, Any]:
    group = given.group("kv_cache")
    if "policy" not in group:
        raise ConfigError(
            f"{given.at('kv_cache')}: kv_cache lacks policy. Add one of: {', '.join(sorted(policy_fields))}."
        )
    fields = {key: value for key, value in group.items() if key != "policy"}
    _check_policy(group["policy"], policy_fields, given.at("kv_cache.policy"))
    for key, value in fields.items():
        _check_field(group["policy"], key, value, policy_fields, given)
    return {"policy": group["policy"], **fields}


def _refuse_contradiction(given: Layer, group: Mapping[str, Any]) -> None:
    """Raise ConfigError if upstream's keys stand beside a `kv_cache` group and say something else."""
    kwargs = given.group("model_kwargs")
    window, sink = group.get("window_frames", kwargs.get("local_attn_size")), group.get("sink_frames", 0)
    if kwargs.get("local_attn_size") == -1 and group["policy"] == "full":
        window = -1
    for old, new, value in (("local_attn_size", "window_frames", window), ("sink_size", "sink_frames", sink)):
        if old in kwargs and kwargs[old] != value:
            raise ConfigError(
                f"{given.at(f'model_kwargs.{old}')}: model_kwargs.{old}={kwargs[old]!r} contradicts "
                f"kv_cache.{new}={value!r} ({given.at('kv_cache')}). "
                f"Leave model_kwargs.{old} out and set kv_cache.{new}."
            )


def _switch(group: Mapping[str, Any], policy: Any, policy_fields: PolicyFields, where: str) -> dict[str, Any]:
    """Another policy, with those fields of `group` that it has as well."""
    _check_policy(policy, policy_fields, where)
    return {"policy": policy, **{key: value for key, value in group.items() if key in policy_fields[policy]}}


def _without_compression(group: dict[str, Any], name: str) -> dict[str, Any]:
    """Deep Sink alone, with the window and the sink of `group`."""
    if group["policy"] == "participative":
        kept = {key: group[key] for key in ("window_frames", "sink_frames", "positions") if key in group}
        return {"policy": "sink", **kept}
    if group["policy"] != "sink":
        log.info("--is_ds_only 1 changes nothing: policy %s of %s has no sink", group["policy"], name)
    return group


def _with_budget(
    group: dict[str, Any], name: str, flags: CacheFlags, policy_fields: PolicyFields, *, lenient: bool
) -> dict[str, Any]:
    """`group` with --Budget and --Recent; `lenient` lets them stand idle, as the released command does."""
    policy = group["policy"]
    for flag, key, frames in (("--Budget", "budget_frames", flags.budget), ("--Recent", "recent_frames", flags.recent)):
        if frames is None:
            continue
        if key in policy_fields[policy]:
            group = {**group, key: frames}
        elif lenient:
            log.info("%s %s changes nothing: policy %s of %s has no %s", flag, frames, policy, name, key)
        else:
            raise ConfigError(
                f"{name}: {flag} {frames} sets kv_cache.{key}, which policy {policy} does not have. "
                f"Drop {flag}, or use policy participative{' without --is_ds_only' if flags.is_ds_only else ''}."
            )
    return group


def _with_sets(group: dict[str, Any], sets: Sequence[Layer], policy_fields: PolicyFields) -> dict[str, Any]:
    """`group` after `--set kv_cache...`; a policy named there replaces the group's, as --policy does."""
    new = {key: (value, layer) for layer in sets for key, value in layer.group("kv_cache").items()}
    if "policy" in new:
        policy, layer = new.pop("policy")
        group = _switch(group, policy, policy_fields, layer.at("kv_cache.policy"))
    for key, (value, layer) in new.items():
        _check_field(group["policy"], key, value, policy_fields, layer)
        group = {**group, key: value}
    return group


def _refuse_method(policy: str, policy_fields: PolicyFields) -> None:
    """Raise ConfigError if --policy names a YAML of configs/, and no policy."""
    if policy not in policy_fields and policy in [file.stem for file in METHOD_FOLDER.glob("*.yaml")]:
        raise ConfigError(
            f"--policy {policy}: is a method, not a cache policy. Use --config_path configs/{policy}.yaml, or one of: "
            f"{', '.join(sorted(policy_fields))}."
        )


def _check_policy(policy: Any, policy_fields: PolicyFields, where: str) -> None:
    if not isinstance(policy, str) or policy not in policy_fields:
        raise ConfigError(
            f"{where}: cache policy {policy!r} is unknown.{nearest(str(policy), policy_fields)} "
            f"Known: {', '.join(sorted(policy_fields))}."
        )


def _check_field(policy: str, key: Any, value: Any, policy_fields: PolicyFields, layer: Layer) -> None:
    known = sorted(policy_fields[policy])
    refuse_unknown([key], known, layer.at, prefix="kv_cache.", explained=f"the fields of policy {policy}")
    SCALAR.check(f"kv_cache.{key}", value, layer.at(f"kv_cache.{key}"))


def _check_released_budget(group: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError, in the words of the released command, if sink, recent, budget and window do not fit."""
    sizes = [group.get(f"{key}_frames") for key in ("window", "sink", "budget", "recent")]
    if group["policy"] != "participative" or not all(map(whole(0).accepts, sizes)):
        return  # the policy itself says what is missing
    window, sink, budget, recent = sizes
    need = sink + recent
    if budget > window:
        raise ConfigError(
            f"{name}: --Budget {budget} exceeds local_attn_size={window}. "
            f"Pass --Budget {window} or less, or --is_ds_only 1 for Deep Sink alone, which needs no budget."
        )
    if need > budget:
        ways = ["--is_ds_only 1 (Deep Sink alone, which needs no budget)"]
        if need <= window:
            ways.append(f"--Budget {need} to {window} ({need} leaves no top-C)")
        if budget > recent:
            ways.append(f"--set model_kwargs.sink_size={budget - recent} (or less)")
        raise ConfigError(
            f"{name}: sink_size={sink} and --Recent {recent} need {need} frames, which exceeds --Budget {budget}. "
            f"Pass {', or '.join(ways)}."
        )
