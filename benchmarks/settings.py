"""One setting that is measured: from flags to a checked plan of a run with random weights.

Timings do not depend on the weights. Every flag of a setting is a field here, so that `--compare` can change any.
"""
from __future__ import annotations

import re
import shlex
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from pipeline.acceleration import Acceleration
from pipeline.build import EMBEDDED, REAL, RunPlan, plan_run
from pipeline.memory import fit_memory
from pipeline.presets import NAMES as PRESETS
from utils.config import REPOSITORY, ConfigError, load_config
from utils.devices import dtype_name
from wan.backends import NAMES as ATTENTION
from wan.kv_cache.policy import build_policy, policy_fields

SWITCH = {"auto": None, "on": True, "off": False}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides the work that is measured.

    Raises:
        ConfigError: a value that cannot be used.
    """

    policy: str = "deep_forcing"      # a YAML of configs/, without its suffix
    model: str | None = None          # a YAML of configs/models/, or a path; None: the 1.3B on a GPU, else the tiny one
    dtype: str | None = None          # bfloat16 or float32; None: by device
    attention: str = "auto"           # one of ATTENTION
    compile: str = "auto"             # a key of SWITCH: torch.compile; auto is on for a GPU
    graphs: str = "auto"              # a key of SWITCH: CUDA graphs
    decoder: str = "auto"             # a key of SWITCH: the Wan VAE's fast decoder
    overlap: str = "auto"             # a key of SWITCH: frames made beside the transformer, in Engine.stream
    fp8: str = "off"                  # on or off: linear layers, and attention by FA3, in 8-bit floats
    memory: str = "full"              # a preset, or auto for the fastest that fits
    resolution: str | None = None     # HEIGHTxWIDTH in pixels; None: the model's own
    batch: int = 1                    # videos made side by side
    overrides: tuple[str, ...] = ()   # key=value of the config, as in --set; the fields above win

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ConfigError(f"attention={self.attention} is unknown. Known: {', '.join(ATTENTION)}.")
        if self.memory not in PRESETS:
            raise ConfigError(f"memory={self.memory} is unknown. Known: {', '.join(PRESETS)}.")
        if self.fp8 not in ("on", "off"):
            raise ConfigError(f"fp8={self.fp8} is neither on nor off.")
        for name in ("compile", "graphs", "decoder", "overlap"):
            if getattr(self, name) not in SWITCH:
                raise ConfigError(f"{name}={getattr(self, name)} is no switch. Use one of {', '.join(SWITCH)}.")
        if self.resolution is not None and not re.fullmatch(r"\d+x\d+", self.resolution):
            raise ConfigError(
                f"resolution={self.resolution} is no size. Write HEIGHTxWIDTH in pixels, such as 480x832."
            )
        if self.batch < 1:
            raise ConfigError(f"batch={self.batch} is too small. Ask for 1 video or more.")

    def changed(self, text: str) -> Setting:
        """This setting with the `key=value` words of `text`; keys are the fields above, `window`, or the config's.

        Raises:
            ConfigError: a word that is no key=value, or a value that cannot be used.
        """
        own = {field.name for field in fields(self)} - {"overrides"}
        words = shlex.split(text)
        if not words:
            raise ConfigError("--compare needs two settings, such as attention=sdpa or kv_cache.window_frames=15.")
        setting = self
        for word in words:
            key, equals, value = word.partition("=")
            if not equals or not value:
                raise ConfigError(f"{word!r} is no setting. Write key=value, such as kv_cache.window_frames=15.")
            if key == "batch":
                if not value.isdecimal():
                    raise ConfigError(f"{word} is no whole number of videos.")
                setting = replace(setting, batch=int(value))
            elif key in own:
                setting = replace(setting, **{key: value})
            else:
                override = f"kv_cache.window_frames={value}" if key == "window" else word
                setting = replace(setting, overrides=(*setting.overrides, override))
        return setting

    def plan(self, device: torch.device, vae_device: torch.device | None = None) -> RunPlan:
        """The run that `inference.py --random_weights` would make.

        Raises:
            ConfigError: the config does not allow it, or it does not fit the device.
        """
        flags = [] if self.model is None else [f"model={self.model}"]
        if self.dtype is not None:
            flags.append(f"dtype={self.dtype}")
        if self.resolution is not None:
            height, width = self.resolution.split("x")
            flags += [f"height={height}", f"width={width}"]
        path = REPOSITORY / "configs" / f"{self.policy}.yaml"
        if self.policy in policy_fields() and not path.is_file():
            raise ConfigError(
                f"--policy {self.policy}: the flag names a YAML of configs/ here, and this is a cache policy alone. "
                f"Use such a name, or --set kv_cache.policy={self.policy}."
            )
        default = f"model={REAL if device.type == 'cuda' else EMBEDDED}"
        config = load_config(
            path, policy_fields=policy_fields(), build_policy=build_policy,
            overrides=[default, *self.overrides, *flags],
        )
        plan = plan_run(
            config, checkpoint=None, use_ema=False, device=device, random_weights=True,
            acceleration=Acceleration(
                attention=self.attention, compile=SWITCH[self.compile], graphs=SWITCH[self.graphs],
                decoder=SWITCH[self.decoder], overlap=SWITCH[self.overlap], fp8=SWITCH[self.fp8],
            ),
            vae_device=vae_device,
        )
        return fit_memory(plan, self.memory, self.batch)

    def describe(self, plan: RunPlan) -> dict[str, Any]:
        """What was measured, as plain data."""
        g = plan.geometry
        return {
            "config": self.policy, "kv_cache": dict(plan.config.kv_cache), "model": plan.spec.name,
            "weights": "random", "dtype": dtype_name(plan.dtype), "acceleration": asdict(plan.acceleration),
            "memory": plan.memory.name, "batch": self.batch,
            "size": f"{g.width}x{g.height}", "fps": g.fps, "chunk_frames": g.chunk_frames,
            "pipeline": plan.config.pipeline, "chunk_pixel_frames": plan.loop.chunk_pixel_frames,
            "passes": {"denoising": plan.sampler.num_passes // plan.loop.joint_chunks, "context": 1},
        }
