"""Published checkpoints that share the architecture: small files in their exact layouts, through the command line."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

from end_to_end.runs import PROMPTS, CommandLine, record, videos
from utils.config import load_model_spec
from utils.download import FILES, GROUPS, REVISIONS
from wan.model import CausalWanModel, randomize
from weights import TRANSFORMER

MODELS = ROOT / "configs" / "models"
SHORT = ["--prompt", PROMPTS[0], "--num_output_frames", 3]


def state(seed: int) -> dict:
    model = CausalWanModel(TRANSFORMER)
    randomize(model, seed=seed)
    return {f"model.{name}": value.clone() for name, value in model.state_dict().items()}


def wrapped(tensors: dict) -> dict:
    return {name.replace("model.", "model._fsdp_wrapped_module.", 1): value for name, value in tensors.items()}


def lora(rank: int = 3) -> dict:
    generator, parts = torch.Generator().manual_seed(4), {}
    for name, value in state(0).items():
        if name.startswith("model.blocks.") and name.endswith(".weight") and value.ndim == 2:
            layer = f"base_model.{name.removesuffix('.weight')}"
            parts[f"{layer}.lora_A.weight"] = 0.1 * torch.randn(rank, value.shape[1], generator=generator)
            parts[f"{layer}.lora_B.weight"] = 0.1 * torch.randn(value.shape[0], rank, generator=generator)
    return parts


EXTRA = {"critic": {"x": torch.ones(1)}, "step": 3}
LAYOUTS: dict[str, Callable[[], object]] = {  # the one that counts has seed 1, any other one seed 2
    "longlive": lambda: {"generator": state(1)},
    "rolling_forcing": lambda: {"generator": state(2), "generator_ema": wrapped(state(1)), **EXTRA},
    "causvid": lambda: {"generator": state(1), **EXTRA},
    "causal_forcing": lambda: {"generator": wrapped(state(1)), "generator_ema": state(2)},
    "causal_forcing_framewise": lambda: {"generator": state(2), "generator_ema": wrapped(state(1))},
    "causal_forcing_longvideo": lambda: {"generator": state(2), "generator_ema": wrapped(state(1))},
    "reward_forcing": lambda: state(1),
    "infinite_forcing": lambda: {"generator_ema": state(1)},
}


def published(name: str) -> dict:
    """What a model's YAML in configs/ says beside the architecture."""
    return yaml.safe_load((MODELS / f"{name}.yaml").read_text())


def small(cli: CommandLine, name: str, content: object) -> Path:
    """The model's YAML with the small model in place of the 1.3B one, and its checkpoint."""
    keys = {key: value for key, value in published(name).items() if key in ("use_ema", "lora_alpha")}
    torch.save(content, cli.folder / f"{name}.pt")
    if "lora" in published(name):
        torch.save({"generator_lora": lora(), "critic_lora": {}, "step": 1}, cli.folder / "lora.pt")
        keys |= {"lora": str(cli.folder / "lora.pt"), "lora_alpha": 3}
    path = cli.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"extends": str(cli.model), "checkpoint": str(cli.folder / f"{name}.pt"), **keys}))
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_in_its_published_layout_is_used(cli: CommandLine, name: str) -> None:
    """The method's own YAML with its own layout makes the video of the weights that count, and of no other."""
    config = ["--config_path", f"configs/{name}.yaml", *SHORT, "--set", "model=auto"]
    torch.save(state(1), cli.folder / "plain.pt")
    for base, out in ((small(cli, name, LAYOUTS[name]()), "there"), (cli.folder / "plain.yaml", "plain")):
        if out == "plain":
            base.write_text(yaml.safe_dump({
                "extends": str(cli.model), "checkpoint": str(cli.folder / "plain.pt"),
                **{key: value for key, value in yaml.safe_load((cli.folder / f"{name}.yaml").read_text()).items()
                   if key.startswith("lora")},
            }))
        assert cli(*config, f"base_model={base}", out=out) == 0
    assert videos(cli.folder / "there") == videos(cli.folder / "plain")
    [stem] = videos(cli.folder / "there")
    about = record(cli.folder / "there", stem)
    assert (about["model"], about["lora"] is not None) == (name, name == "longlive")
    assert ("lora" in about["settings"]["weights"]) == (name == "longlive")


def test_a_lora_changes_the_video_and_its_fingerprint(cli: CommandLine, capsys) -> None:
    """With and without --lora_path are two videos; one does not pass for the other."""
    torch.save(lora(), cli.folder / "lora.pt")
    assert cli(*SHORT, out="without") == 0
    assert cli(*SHORT, "--lora_path", cli.folder / "lora.pt", out="with") == 0
    assert videos(cli.folder / "with") != videos(cli.folder / "without")
    assert cli(*SHORT, "--lora_path", cli.folder / "lora.pt", "--lora_alpha", 6, out="twice") == 0
    assert videos(cli.folder / "twice") != videos(cli.folder / "with")
    assert cli(*SHORT, "--lora_path", cli.folder / "lora.pt", "--lora_alpha", 6, out="with") == 2
    assert cli(*SHORT, "--lora_alpha", 6, out="never") == 2
    assert "give both" in capsys.readouterr().err
    assert cli(*SHORT, "--lora_path", cli.folder / "lora.pt", out="without") == 2
    assert "made with other settings" in capsys.readouterr().err
    for path, words in ((cli.folder / "no.pt", "LoRA"), (cli.model.parent / "transformer", "no LoRA")):
        assert cli(*SHORT, "--lora_path", path, out="never") == 2
        assert words in capsys.readouterr().err


def test_a_missing_checkpoint_names_its_own_download(cli: CommandLine, capsys) -> None:
    """By name: refused with the command. As `auto`: the embedded model, and the command in one line."""
    assert cli(*SHORT, "--config_path", "configs/longlive.yaml", "--set", "model=longlive") == 2
    assert "python -m utils.download --only longlive text vae" in capsys.readouterr().err


def test_every_published_checkpoint_has_config_model_and_download() -> None:
    """One YAML a method, one a model, and every file that the model names is fetched to where it is looked for."""
    fetched = {file.target: file for file in FILES}
    for name in LAYOUTS:
        method, spec = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()), load_model_spec(name)
        assert method["base_model"] == name
        for path in filter(None, (spec.checkpoint, spec.lora)):
            file = fetched[path.relative_to(ROOT).as_posix()]
            assert file.group in spec.download.split() and file.group in GROUPS and file.repo in REVISIONS
        assert spec.transformer == load_model_spec("wan2.1_t2v_1.3b").transformer
    assert {path.stem for path in MODELS.glob("*.yaml")} == {*LAYOUTS, "tiny", "wan2.1_t2v_1.3b"}
