"""Every setting that a YAML may hold, and how a file becomes a checked `Config`.

A YAML says only what differs from its base (`extends: base.yaml`, relative to the file). What comes later wins:
base, file, command-line flags, `--set key=value`. Configs of Self Forcing and Deep Forcing load as they are;
utils/config_cache.py says which cache policy their keys mean. Nothing else in the project reads YAML.

This file knows no policy: the registry comes in as `policy_fields` and `build_policy`.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from utils.config_cache import CacheFlags, PolicyFields, cache_group, clip_keys_in_use
from utils.config_schema import (
    DTYPE,
    FLAG,
    LOOP,
    NOISE,
    ON_SWITCH,
    PATCH,
    POSITIVE,
    STEPS,
    TEXT,
    ConfigError,
    Layer,
    Rule,
    checked,
    is_training_key,
    nearest,
    refuse_open,
    refuse_unknown,
    rules_of,
    setting,
    whole,
)
from utils.yaml_files import merge, read_file, read_override

__all__ = ["Config", "ConfigError", "ModelSpec", "load_config", "load_model_spec"]
log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL_FOLDER = REPOSITORY / "configs" / "models"
GROUPS = ("model_kwargs", "kv_cache")  # keys that hold keys; the first is upstream's
UPSTREAM_KEYS = ("timestep_shift", "local_attn_size", "sink_size")  # of model_kwargs
PATH = Rule(
    "a path, relative to the repository or absolute", TEXT.accepts, lambda text: REPOSITORY / Path(text).expanduser(),
)

BuildPolicy = Callable[[str, Mapping[str, Any]], Any]  # (name, fields) -> a dataclass of all fields; ValueError


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of one run. Defaults are Self Forcing's; configs/base.yaml explains each key."""

    denoising_step_list: tuple[float, ...] = setting(STEPS, (1000, 750, 500, 250))  # one pass each, noisiest first
    warp_denoising_step: bool = setting(FLAG, True)          # the steps are nominal: warp them by timestep_shift
    timestep_shift: float = setting(POSITIVE, 5.0)
    context_noise: float = setting(NOISE, 0)                 # timestep of the context pass
    num_frame_per_block: int = setting(whole(1), 3)          # a chunk, in latent frames
    independent_first_frame: bool = setting(FLAG, False)     # chunks of 1, n, n, ... frames
    height: int | None = setting(whole(1).or_null("the model's own"), None)  # pixels
    width: int | None = setting(whole(1).or_null("the model's own"), None)   # pixels
    dtype: str | None = setting(DTYPE.or_null("by device"), None)
    pipeline: str = setting(LOOP, "chunkwise")               # which loop makes the latents: pipeline/loops.py
    overlap_frames: int = setting(whole(1), 3)               # latent frames that clips share; causvid_overlap alone
    on_switch: str = setting(ON_SWITCH, "keep")              # what a new prompt does to the cache: pipeline/timeline.py
    model: str = setting(TEXT, "auto")                       # auto, a file stem in configs/models, or a path
    base_model: str = setting(TEXT, "wan2.1_t2v_1.3b")       # what `auto` means once its checkpoint is in place
    kv_cache: Mapping[str, Any]                              # policy: its name, then every field of that policy

    def resolved(self) -> dict[str, Any]:
        """Every setting as plain data for JSON or YAML, in a stable order; loads back to an equal Config."""
        return _plain(self)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model: the shape of its transformer, the videos that it makes, where its files lie."""

    name: str                                    # stem of the YAML
    transformer: Mapping[str, Any]               # the fields of WanConfig
    height: int = setting(whole(1))              # pixels
    width: int = setting(whole(1))               # pixels
    fps: int = setting(whole(1))                 # pixel frames a second
    temporal_stride: int = setting(whole(1))     # pixel frames in a latent frame
    spatial_stride: int = setting(whole(1))      # pixels in a latent row or column
    train_frames: int = setting(whole(1))        # latent frames of a training clip
    checkpoint: Path = setting(PATH)
    use_ema: bool = setting(FLAG, False)         # take generator_ema of it, as its authors do
    lora: Path | None = setting(PATH.or_null("none"), None)  # merged into the checkpoint while it is loaded
    lora_alpha: float | None = setting(POSITIVE.or_null("the LoRA's rank"), None)  # scales it, over its rank
    text_encoder: Path = setting(PATH)
    tokenizer: Path = setting(PATH)
    vae: Path = setting(PATH)
    taehv: Path | None = setting(PATH.or_null("none was made for its latents"), None)     # decoder in the VAE's place
    lighttae: Path | None = setting(PATH.or_null("none was made for its latents"), None)  # the same, another training
    compressor: Path | None = setting(PATH.or_null("none was trained for it"), None)      # of PackForcing, HR branch
    prompts: Path = setting(PATH)                            # shown when no prompt is given
    understands: str | None = setting(TEXT.or_null("anything"), None)  # what prompts may speak of, told if they do not
    download: str = setting(TEXT)                # the command that fetches what is missing

    def resolved(self) -> dict[str, Any]:
        """Every field as plain data for JSON or YAML, in a stable order."""
        return _plain(self)


@dataclass(frozen=True, kw_only=True)
class _Transformer:
    """The keys of a model's `transformer` group; sizes in channels unless said otherwise."""

    dim: int = setting(whole(1))
    ffn_dim: int = setting(whole(1))
    num_heads: int = setting(whole(1))
    num_layers: int = setting(whole(1))
    freq_dim: int = setting(whole(1))            # of the timestep embedding
    text_dim: int = setting(whole(1))            # of the text encoder's output
    text_len: int = setting(whole(1))            # tokens
    in_dim: int = setting(whole(1))
    out_dim: int = setting(whole(1))
    patch_size: tuple[int, ...] = setting(PATCH)  # latent frames, rows, columns
    eps: float = setting(POSITIVE, 1e-6)         # of every normalisation


def load_config(
    path: str | Path,
    *,
    policy_fields: PolicyFields,
    build_policy: BuildPolicy,
    overrides: Sequence[str] = (),
    policy: str | None = None,
    is_ds_only: bool = False,
    budget: int | None = None,
    recent: int | None = None,
) -> Config:
    """Read, merge, translate and check the config at `path`.

    Args:
        policy_fields: YAML keys of every registered cache policy.
        build_policy: makes a policy, a dataclass of all its fields, or raises ValueError.
        overrides: the `key=value` of each --set; they come last.
        policy: --policy; replaces the policy and keeps the fields that both have.
        is_ds_only, budget, recent: the flags of these names; Deep Sink alone, and latent frames.
    Raises:
        ConfigError: file or flags cannot be used; says file and line, key, value, and what is allowed.
    """
    files = _read_with_bases(Path(path))
    sets = [_normalised(read_override(text)) for text in overrides]
    given = _merge([*files, *map(_without_cache, sets)])
    _check_keys(given, policy_fields)
    flags = CacheFlags(policy=policy, is_ds_only=bool(is_ds_only), budget=budget, recent=recent)
    group = cache_group(given, sets, flags, policy_fields)
    used = clip_keys_in_use(given, group)
    ignored = [str(key) for key in given.values if is_training_key(key) and key not in used]
    for asked in (given.at(key) for key in ignored):
        if asked.startswith("--set "):
            raise ConfigError(f"{asked}: a key of training, which nothing here reads. The seed of a run is --seed.")
    if ignored:
        log.info("%s: ignored training keys: %s", given.name, ", ".join(ignored))
    settings = checked(Config, given.values, given.at)
    name = group.pop("policy")
    try:
        built = build_policy(name, group)
    except ValueError as error:
        raise ConfigError(f"{_culprit(str(error), [given, *sets], flags)}: {error}") from error
    return Config(**settings, kv_cache=MappingProxyType({"policy": name, **asdict(built)}))


def _culprit(message: str, layers: Sequence[Layer], flags: CacheFlags) -> str:
    """Who set the key of the cache that a policy's message begins with: the last of `layers` that did, or a flag."""
    key = message.partition("=")[0]
    flag = {"kv_cache.budget_frames": ("--Budget", flags.budget), "kv_cache.recent_frames": ("--Recent", flags.recent)}
    setters = [layer.where[key] for layer in layers if key in layer.where]
    if key in flag and flag[key][1] is not None and not any(setter.startswith("--set ") for setter in setters):
        return " ".join(map(str, flag[key]))
    return setters[-1] if setters else layers[0].name


def load_model_spec(name_or_path: str | Path) -> ModelSpec:
    """Read and check a model's YAML: a file stem in configs/models, or a path that ends in .yaml.

    Raises:
        ConfigError: no such model, or a key or value that cannot be used.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = sorted(file.stem for file in MODEL_FOLDER.glob("*.yaml"))
        if str(name_or_path) not in known:
            raise ConfigError(
                f"model={str(name_or_path)!r} is unknown.{nearest(str(name_or_path), known)} "
                f"Known: {', '.join(known)}; or give the path of a .yaml file."
            )
        path = MODEL_FOLDER / f"{name_or_path}.yaml"
    given = _merge(_read_with_bases(path))
    explained = "explained in configs/models/wan2.1_t2v_1.3b.yaml"
    refuse_unknown(given.values, ["transformer", *rules_of(ModelSpec)], given.at, explained=explained)
    shape = given.values.get("transformer")
    if not isinstance(shape, Mapping):
        raise ConfigError(
            f"{given.at('transformer')}: lacks the group transformer, with dim, num_heads and so on ({explained})."
        )
    refuse_unknown(shape, rules_of(_Transformer), given.at, prefix="transformer.", explained=explained)
    transformer = _Transformer(**checked(_Transformer, shape, given.at, prefix="transformer."))
    values = checked(ModelSpec, given.values, given.at)
    return ModelSpec(name=path.stem, transformer=MappingProxyType(asdict(transformer)), **values)


def _check_keys(given: Layer, policy_fields: PolicyFields) -> None:
    """Raise ConfigError for unknown keys, and for step lists that leave open what they mean."""
    own = [key for key in given.values if not is_training_key(key)]
    for key in own:
        if key == "sink_size" or any(key in names for names in policy_fields.values()):
            name = "sink_frames" if key == "sink_size" else key
            raise ConfigError(f"{given.at(key)}: {key} is a key of the cache. Set kv_cache.{name}.")
    refuse_unknown(own, [*rules_of(Config), *GROUPS], given.at, explained="explained in configs/base.yaml")
    upstream = "upstream's names; see configs/base.yaml"
    refuse_unknown(given.group("model_kwargs"), UPSTREAM_KEYS, given.at, prefix="model_kwargs.", explained=upstream)
    if "denoising_step_list" not in given.values:
        return
    where, steps = given.at("denoising_step_list"), given.values["denoising_step_list"]
    steps = STEPS.check("denoising_step_list", steps, where)
    if "warp_denoising_step" not in given.values:
        raise ConfigError(
            f"{where}: denoising_step_list is given without warp_denoising_step. Add true if the steps are nominal "
            "(Self Forcing), false if they are the timesteps themselves (CausVid)."
        )
    if given.values["warp_denoising_step"] is True and not all(isinstance(step, int) for step in steps):
        raise ConfigError(
            f"{where}: denoising_step_list={list(steps)} is not allowed with warp_denoising_step: true, where steps "
            "are rows of the schedule. Allowed: whole numbers; or set warp_denoising_step: false."
        )


# --- reading and merging ---------------------------------------------------------------------------------------

def _read_with_bases(path: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The layers of `path`: what it extends, from the first base on, then itself."""
    if path.resolve() in [file.resolve() for file in above]:
        raise ConfigError(f"extends goes in a circle: {' extends '.join(map(str, (*above, path)))}. Drop one of them.")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder. Give one of its .yaml files.")
    if not path.is_file():
        known = [file.name for file in path.parent.glob("*.yaml")]
        user = f", though {above[-1]} extends it" if above else ""
        named = REPOSITORY / "configs" / f"{path.stem}.yaml"
        hint = f" Did you mean {named}?" if named.is_file() else nearest(path.name, known)
        raise ConfigError(f"{path}: no such file{user}.{hint}")
    layer = _normalised(read_file(path))
    if "extends" not in layer.values:
        return [layer]
    base = TEXT.check("extends", layer.values.pop("extends"), layer.at("extends"))
    return [*_read_with_bases(path.parent / base, (*above, path)), layer]


def _normalised(layer: Layer) -> Layer:
    """`layer` without an empty model_kwargs, and with its timestep_shift as timestep_shift."""
    refuse_open(layer)
    values, where = dict(layer.values), dict(layer.where)
    for key in GROUPS:
        may_be_empty = key == "model_kwargs" and not layer.name.startswith("--set ")  # as in files of upstream
        if key in values and not (values[key] and isinstance(values[key], dict)):
            if not may_be_empty or values[key] not in (None, {}):
                raise ConfigError(f"{layer.at(key)}: {key}={values[key]!r} is not allowed. Allowed: a group of keys.")
            del values[key]
    kwargs = dict(values.get("model_kwargs", {}))
    if "timestep_shift" in kwargs:
        shift = kwargs.pop("timestep_shift")
        where["timestep_shift"] = layer.at("model_kwargs.timestep_shift")
        if values.setdefault("timestep_shift", shift) != shift:
            raise ConfigError(
                f"{where['timestep_shift']}: model_kwargs.timestep_shift={shift!r} contradicts "
                f"timestep_shift={values['timestep_shift']!r} of the same file. Drop one of them."
            )
        values["model_kwargs"] = kwargs
    return replace(layer, values=values, where=where)


def _without_cache(layer: Layer) -> Layer:
    return replace(layer, values={key: value for key, value in layer.values.items() if key != "kv_cache"})


def _merge(layers: Iterable[Layer]) -> Layer:
    """One layer out of many, as `merge`; training keys may refer to anything."""
    kept, policy = [], None
    for layer in layers:
        own = layer.group("kv_cache").get("policy")
        if own is not None and own != policy:
            kept = [*map(_without_cache, kept)]  # the fields of the base's policy mean nothing to another one
        kept.append(layer)
        policy = policy if own is None else own
    return merge(kept, leave=is_training_key)


def _plain(value: Any) -> Any:
    """`value` as JSON and YAML know it."""
    if isinstance(value, Config | ModelSpec):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
