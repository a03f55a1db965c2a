"""Weights on disk -> named tensors -> a module. Strict and safe, for every layout that is in use.

Read by content, never by file suffix: safetensors, zip `.pt`, older pickle `.pt`; one file, shards
with an index, a folder, a diffusers repository. Nothing pickled but tensors is ever executed, and a
module never keeps a weight that no file gave it.

Knows names and shapes; does not know what the network computes.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from wan.names import is_diffusers_transformer, strip_wrappers, transformer_from_diffusers

log = logging.getLogger(__name__)

_WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
_GENERATORS = ("generator_ema", "generator")
_SINGLE_GROUPS = ("model", "state_dict")
_SOURCE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LISTED = 8
_MAX_HEADER_BYTES = 2**30


class CheckpointError(ValueError):
    """A weight file is missing, damaged, unsafe, or does not fit the module. The message says which and what to do."""


# -- the transformer ---------------------------------------------------------------------------


def check_transformer(path: Path, expected: Mapping[str, torch.Size], *, use_ema: bool) -> bool:
    """Compare a checkpoint's names and shapes with `expected` without reading its weights.

    Returns: whether `use_ema` chooses anything: the file has groups for it.
    Raises:
        CheckpointError: as `read_transformer`, or with a list of what is missing, unexpected or misshapen.
    """
    tensors, chosen = read_transformer(path, use_ema=use_ema, meta=True)
    check_fit(path, tensors, expected)
    return chosen


def load_transformer(
    model: nn.Module, path: Path, *, use_ema: bool, device: torch.device | str, dtype: torch.dtype,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Give every parameter of `model` its value from `path`, on `device` in `dtype`.

    The model may be on meta. Each tensor is cast and moved once, so that beside the mapped file
    host memory holds about one tensor more than the model itself. `change` may put another tensor in the place of
    one, such as a merged one (wan/lora.py); it is given name and stored value.

    Raises:
        CheckpointError: as `check_transformer`; the model is then left as it was.
    """
    tensors, _ = read_transformer(path, use_ema=use_ema)
    load_strictly(model, tensors, source=path, device=device, dtype=dtype, change=change)


def read_transformer(path: Path, *, use_ema: bool, meta: bool = False) -> tuple[dict[str, Tensor], bool]:
    """Read a transformer of any layout under its original Wan names; also, whether `use_ema` chose among groups.

    Args:
        path: a file, an index json, a folder that holds either, or a repository with `transformer/`.
        use_ema: take `generator_ema` (True) or `generator` (False) of a file that has such groups.
        meta: headers alone; the tensors have no data. Else they are on the CPU, as stored; views of the mapped file,
            except for old non-zip `.pt` files.
    Raises:
        CheckpointError: missing, damaged or unsafe file, or a group that is not there.
    """
    files = weight_files(path, subfolder="transformer")
    named: dict[str, Any] = {}
    chosen = False
    for file in files:
        content = _read_file(file, meta=meta)
        if len(files) == 1:
            content, chosen = _choose_group(file, content, use_ema=use_ema)
        named.update(content)
    tensors = {strip_wrappers(name): value for name, value in named.items() if isinstance(value, Tensor)}
    if len(tensors) < sum(isinstance(value, Tensor) for value in named.values()):
        count = Counter(strip_wrappers(name) for name in named)
        twice = [name for name in count if count[name] > 1]
        raise CheckpointError(
            f"{path}: {len(twice)} tensors occur twice once wrapper prefixes are removed ({_some(twice)}). "
            "It is unclear which is meant; keep one copy of the model in the file."
        )
    if is_diffusers_transformer(tensors):
        tensors = {transformer_from_diffusers(name): value for name, value in tensors.items()}
    return tensors, chosen


def _choose_group(path: Path, content: dict[str, Any], *, use_ema: bool) -> tuple[dict[str, Any], bool]:
    """Pick the model out of a training checkpoint, which may hold several; also, whether `use_ema` had a say."""
    groups = {name: value for name, value in content.items() if isinstance(value, Mapping)}
    for name in _GENERATORS:  # safetensors is flat, so there a group is a prefix
        flat = {key[len(name) + 1 :]: value for key, value in content.items() if key.startswith(name + ".")}
        if flat:
            groups[name] = flat
    asked, other = _GENERATORS if use_ema else _GENERATORS[::-1]
    if asked in groups:
        log.info("%s: using %s", path, asked)
        return dict(groups[asked]), True
    if other in groups:
        remedy = "Run without --use_ema (use_ema=False)" if use_ema else "Run with --use_ema (use_ema=True)"
        raise CheckpointError(
            f"{path}: has no {asked}, which use_ema={use_ema} asks for; it holds {', '.join(sorted(groups))}. "
            f"{remedy} to use {other}."
        )
    for name in _SINGLE_GROUPS:
        if name in groups:
            log.info("%s: using %s, its only weights; use_ema=%s chooses nothing here", path, name, use_ema)
            return dict(groups[name]), False
    if groups and not any(isinstance(value, Tensor) for value in content.values()):
        hint = " A LoRA alone is not a model: give the base checkpoint." if "lora" in " ".join(groups).lower() else ""
        raise CheckpointError(
            f"{path}: holds {', '.join(sorted(groups))}, none of which is a known place for the model "
            f"({', '.join(_GENERATORS + _SINGLE_GROUPS)}, or the tensors themselves).{hint}"
        )
    log.info("%s: plain tensors, its only weights; use_ema=%s chooses nothing here", path, use_ema)
    return content, False


# -- any module --------------------------------------------------------------------------------


@torch.no_grad()
def load_strictly(
    module: nn.Module, tensors: dict[str, Tensor], *, source: Path, device: torch.device | str, dtype: torch.dtype,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Set each parameter of `module` from the tensor of its name; empties `tensors` as it goes.

    Raises:
        CheckpointError: names or shapes differ (nothing is changed then), or a buffer is left on meta.
    """
    parameters = dict(module.named_parameters())
    check_fit(source, tensors, {name: parameter.shape for name, parameter in parameters.items()})
    for name, old in parameters.items():
        # A copy of our own: a parameter that is a view of the mapped file would die with the file.
        stored = tensors.pop(name)
        stored = stored if change is None else change(name, stored)
        value = torch.empty(old.shape, dtype=dtype, device=device).copy_(stored)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=old.requires_grad))
    left = [name for name, value in [*module.named_parameters(), *module.named_buffers()] if value.is_meta]
    if left:
        raise CheckpointError(
            f"{source}: {_some(left)} stayed without a value after loading. The module must not be run."
        )


def read_tensors(
    path: Path, *, subfolder: str, groups: tuple[str, ...] = _SINGLE_GROUPS, meta: bool = False,
) -> dict[str, Tensor]:
    """Read all tensors at `path` (see `weight_files`) under the names in the file; groups are opened.

    With `meta` only headers are read: the tensors have shape and dtype but no data.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path, subfolder=subfolder):
        content = _read_file(file, meta=meta)
        for group in groups:
            if isinstance(content.get(group), Mapping):
                content = dict(content[group])
        tensors |= {name: value for name, value in content.items() if isinstance(value, Tensor)}
    return tensors


def check_fit(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    """Raise CheckpointError with a list of what is missing, unexpected or misshapen in `found`, if anything is."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shared = [name for name in expected if name in found]
    misshapen = [
        f"{name} is {list(found[name].shape)}, the model has {list(expected[name])}"
        for name in shared
        if found[name].shape != expected[name]
    ]
    quantised = [f"{name} is {found[name].dtype}" for name in shared if found[name].dtype not in _SOURCE_DTYPES]
    parts = (
        ("missing", missing), ("unexpected", unexpected), ("another shape", misshapen), ("not plain float", quantised),
    )
    if lines := listed(parts):
        raise CheckpointError("\n".join([f"{path} does not fit the model:", *lines, *_hints(found, expected)]))


def _hints(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> Iterator[str]:
    here, there = _size({name: value.shape for name, value in found.items()}), _size(expected)
    if here and there and here != there:
        yield (
            f"The file holds a transformer of {here}; the configuration asks for {there}. "
            "Use a file and a configuration of one size."
        )
    if any("lora_" in name for name in found):
        yield "The file holds a LoRA. Give its base checkpoint here, and the LoRA with --lora_path."
    if "patch_embedding.weight" in expected and "patch_embedding.weight" not in found:
        kinds = {
            "a text encoder": ("token_embedding.weight", "shared.weight"),
            "a VAE": ("decoder.conv1.weight", "decoder.conv_in.weight"),
        }
        for kind, marks in kinds.items():
            if any(mark in found for mark in marks):
                yield f"The file holds {kind}, not the transformer."


def _size(shapes: Mapping[str, torch.Size]) -> str:
    """Describe the transformer that tensors of these shapes make; empty if they make none."""
    patch = shapes.get("patch_embedding.weight", ())
    if len(patch) < 2:
        return ""
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return f"dim {patch[0]}, {len(layers)} layers, {patch[1]} input channels"


def listed(parts: Iterable[tuple[str, list[str]]]) -> list[str]:
    """A line for each of `parts` (title, names) that has names."""
    return [f"  {title} ({len(names)}): {_some(names)}" for title, names in parts if names]


def _some(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


# -- files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkFiles:
    """How one kind of network lies on disk: in Hugging Face's layout, or under original Wan names."""

    kind: str                   # in words
    subfolder: str              # of a repository
    mark: tuple[str, str]       # the entry of a config.json that tells the kind
    original: str               # a tensor that only files with original names have
    patterns: tuple[str, ...]   # of those files' names

    def find_config(self, path: Path) -> tuple[Path, dict[str, Any]] | None:
        """The folder with this network's config.json that `path` means, and what it says; None if there is none."""
        for home in (path.parent,) if path.is_file() else (path, path / self.subfolder):
            if (home / "config.json").is_file():
                values = read_json(home / "config.json")
                if values.get(self.mark[0]) == self.mark[1]:
                    return home, values
        return None

    def read(self, path: Path, *, meta: bool = False) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """The configuration, or None where tensors have original names; and the tensors, as `read_tensors` does.

        Raises:
            CheckpointError: nothing there, several candidates, or a damaged file.
        """
        if found := self.find_config(path):
            tensors = read_tensors(path if path.is_file() else found[0], subfolder=self.subfolder, meta=meta)
            if self.original not in tensors:  # else original names that happen to lie beside a config
                return found[1], tensors
        if path.is_dir():
            originals = sorted(file for pattern in self.patterns for file in path.glob(pattern))
            if len(originals) != 1:
                raise CheckpointError(
                    f"{path}: no {self.kind}. Looked for one {' or '.join(self.patterns)} (found {len(originals)}) and "
                    f"for a config.json with {self.mark[0]}: {self.mark[1]}, there or in {self.subfolder}/."
                )
            path = originals[0]
        return None, read_tensors(path, subfolder=self.subfolder, meta=meta)


def weight_files(path: Path, *, subfolder: str) -> list[Path]:
    """Find the weight files that `path` means.

    Args:
        path: a weight file, an index json, or a folder with either; `subfolder` of it is looked into too.
    Raises:
        CheckpointError: nothing there, several candidates, or a shard that the index names is missing.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if path.is_file():
        return _shards(path) if path.name.endswith(".index.json") else [path]
    for folder in (path, path / subfolder):
        for name in _WEIGHT_FILES:
            if (folder / f"{name}.index.json").is_file():
                return _shards(folder / f"{name}.index.json")
            if (folder / name).is_file():
                return [folder / name]
    loose = sorted(file for file in path.iterdir() if file.suffix in {".pt", ".pth", ".bin", ".safetensors"})
    if len(loose) == 1 and "-of-" not in loose[0].name:
        return loose
    names = _some([file.name for file in loose]) or "no weight file"
    raise CheckpointError(
        f"{path}: cannot tell which weights to load. Looked there and in {subfolder}/ for {', '.join(_WEIGHT_FILES)} "
        f"or one of them with .index.json; found {names}. Give the file itself."
    )


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(
            f'{index}: not a shard index, which has "weight_map": tensor -> file. Download it again.'
        )
    names = sorted(set(shards.values()))
    if not names:
        raise CheckpointError(f"{index}: lists no tensor, so there is nothing to load. Download it again.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} of {len(names)} shards are missing ({_some(missing)}).")
    return [index.parent / name for name in names]


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file of a model holds. Raises: CheckpointError, if it is none."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}). Download it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: holds a {type(values).__name__}, not an object. Download it again.")
    return values


def _read_file(path: Path, *, meta: bool) -> dict[str, Any]:
    """Read one file's top level; tensors keep shape and dtype but no data when `meta`."""
    kind = _file_kind(path)
    try:
        if kind == "safetensors":
            content = load_file(path)  # mapped: only the header is read until a tensor is used
            return {name: value.to("meta") for name, value in content.items()} if meta else content
        content = torch.load(path, map_location="meta" if meta else "cpu", mmap=kind == "zip", weights_only=True)
    except pickle.UnpicklingError as error:
        if re.search(r"GLOBAL|Unsupported", str(error)) is None:
            raise CheckpointError(_damaged(path, error)) from error
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path}: refused. It holds more than tensors ({blocked[1] if blocked else 'other pickled objects'}), and "
            "loading that could run any program. Use a safetensors release of these weights, or have someone who "
            "trusts the file save its tensors alone."
        ) from error
    except Exception as error:  # a broken file can fail anywhere inside the readers
        raise CheckpointError(_damaged(path, error)) from error
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not named tensors. It is not a model checkpoint."
        )
    return dict(content)


def _damaged(path: Path, error: Exception) -> str:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return (
        f"{path}: cannot be read ({reason}). It has {path.stat().st_size} bytes and is probably cut off or damaged; "
        "compare its size and hash with its source and download it again."
    )


def _file_kind(path: Path) -> str:
    """Tell `safetensors`, `zip` (torch.save) and `pickle` (torch.save before 1.6) apart by the first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}).") from error
    # Safetensors begin with a header length, whose lowest byte may well look like a pickle's first.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _MAX_HEADER_BYTES:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    if not head:
        what = "is empty"
    elif head.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, a note of where the weights are (`git lfs pull` fetches them)"
    elif head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        what = "is a web page, most likely an error or login page saved in place of the download"
    else:
        what = f"is no checkpoint: it begins with {head[:12]!r}"
    raise CheckpointError(f"{path}: {what}.")
