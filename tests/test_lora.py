"""A LoRA merged while the base is loaded, in the layouts that LoRAs come in, and the errors of those that are none."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from wan.checkpoint import CheckpointError, load_transformer
from wan.lora import check_lora, read_lora
from wan.model import CausalWanModel, randomize

State = dict[str, Tensor]
EXPECTED = {name: value.shape for name, value in CausalWanModel(SMALL).state_dict().items()}
TARGETS = [f"{part}.{leaf}" for part in ("self_attn", "cross_attn") for leaf in "qkvo"] + ["ffn.0", "ffn.2"]
RANK = 4


def published(rank: int = RANK) -> State:
    """LongLive's layers under PEFT's names: every linear layer of every block."""
    generator = torch.Generator().manual_seed(2)
    state = {}
    for block in range(SMALL.num_layers):
        for target in TARGETS:
            outputs, inputs = EXPECTED[f"blocks.{block}.{target}.weight"]
            name = f"base_model.model.blocks.{block}.{target}"
            state[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
            state[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    return state


def as_pt(folder: Path, content: object) -> Path:
    torch.save(content, folder / "lora.pt")
    return folder / "lora.pt"


def as_tensors(folder: Path, state: State) -> Path:
    save_file(state, folder / "adapter_model.safetensors")
    return folder / "adapter_model.safetensors"


def renamed(state: State, old: str, new: str) -> State:
    return {name.replace(old, new): value for name, value in state.items()}


LAYOUTS: dict[str, Callable[[Path, State], Path]] = {
    "published": lambda folder, state: as_pt(
        folder, {"generator_lora": state, "critic_lora": {"x": torch.ones(1)}, "step": 3000},
    ),
    "bare": as_pt,
    "bare safetensors": as_tensors,
    "folder": lambda folder, state: as_tensors(folder, state).parent,
    "adapter's name": lambda folder, state: as_pt(folder, {
        "generator_lora": renamed(renamed(state, "lora_A.", "lora_A.default."), "lora_B.", "lora_B.default."),
    }),
    "fsdp": lambda folder, state: as_pt(folder, renamed(state, ".blocks.", "._fsdp_wrapped_module.blocks.")),
    "wrapped twice": lambda folder, state: as_pt(folder, renamed(state, ".model.", ".model.model.")),
}


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, State]:
    """LongLive's base layout: group `generator`, names with `model.`."""
    model = CausalWanModel(SMALL)
    randomize(model, seed=5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "base").mkdir()
    torch.save({"generator": {f"model.{name}": value for name, value in state.items()}}, tmp_path / "base" / "base.pt")
    return tmp_path / "base" / "base.pt", state


def loaded(path: Path, lora: Path, *, alpha: float | None = None, dtype: torch.dtype = torch.float32) -> State:
    check_lora(lora, EXPECTED)
    with torch.device("meta"):
        model = CausalWanModel(SMALL)
    change = read_lora(lora, alpha=alpha).merged
    load_transformer(model, path, use_ema=False, device="cpu", dtype=dtype, change=change)
    return model.state_dict()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_merged(layout: str, base: tuple[Path, State], tmp_path: Path) -> None:
    """W + B A for all ten linear layers of each block, worked out in float64; every other tensor bit for bit."""
    path, state = base
    merged, parts = loaded(path, LAYOUTS[layout](tmp_path, published())), published()
    changed = [name for name in state if not torch.equal(merged[name], state[name])]
    assert sorted(changed) == sorted(
        f"blocks.{block}.{target}.weight" for block in range(SMALL.num_layers) for target in TARGETS
    )
    for name in changed:
        layer = "base_model.model." + name.removesuffix(".weight")
        product = parts[f"{layer}.lora_B.weight"].double() @ parts[f"{layer}.lora_A.weight"].double()
        assert_close(merged[name].double(), state[name].double() + product, rtol=0, atol=1e-5)


def test_a_merged_layer_is_the_base_and_its_branch(base: tuple[Path, State], tmp_path: Path) -> None:
    """Two roads to one output: the merged weight, and the base beside A then B; alpha / rank scales."""
    path, state = base
    parts, name = published(), "blocks.1.ffn.0"
    lora = as_pt(tmp_path, {"generator_lora": parts})
    x = torch.randn(5, SMALL.dim, generator=torch.Generator().manual_seed(1))
    down, up = (parts[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    branch = nn.functional.linear(nn.functional.linear(x, down), up)
    for alpha, scale in ((None, 1.0), (RANK, 1.0), (2 * RANK, 2.0)):
        weight = loaded(path, lora, alpha=alpha)[f"{name}.weight"]
        expected = nn.functional.linear(x, state[f"{name}.weight"]) + scale * branch
        assert_close(nn.functional.linear(x, weight), expected, rtol=1e-4, atol=1e-4)


def test_the_sum_is_rounded_once(base: tuple[Path, State], tmp_path: Path) -> None:
    """In bfloat16 the merged weight is the float32 sum, rounded; the base is not rounded before."""
    path, _ = base
    lora = as_pt(tmp_path, published())
    exact, rounded = loaded(path, lora), loaded(path, lora, dtype=torch.bfloat16)
    assert all(torch.equal(rounded[name], exact[name].to(torch.bfloat16)) for name in exact)


def change_one(name: str, value: Tensor) -> Callable[[State], State]:
    return lambda state: {**state, f"base_model.model.blocks.0.{name}.weight": value}


@pytest.mark.parametrize("change, words", [
    (lambda state: {"model": {"x": torch.ones(1)}}, "holds no LoRA: no generator_lora"),
    (lambda state: {"critic_lora": state}, "holds no LoRA: no generator_lora"),
    (lambda state: renamed(state, "lora_", ""), "no name ends in lora_A.weight"),
    (lambda state: {name: v for name, v in state.items() if "0.ffn.0.lora_B" not in name},
     "only half of the LoRA of blocks.0.ffn.0.weight"),
    (change_one("ffn.0.lora_A", torch.ones(3, 32)), "two halves of blocks.0.ffn.0.weight have different ranks"),
    (change_one("ffn.0.lora_A", torch.ones(RANK, 31)), "blocks.0.ffn.0.weight is 48 x 31, the model has 48 x 32"),
    (lambda state: renamed(state, "blocks.1.", "blocks.29."), r"not in the model \(10\): blocks.29.self_attn.q.weight"),
])
def test_what_does_not_fit_is_said(change: Callable, words: str, tmp_path: Path) -> None:
    """Found by reading names and shapes alone, before any weights are."""
    with pytest.raises(CheckpointError, match=words):
        check_lora(as_pt(tmp_path, change(published())), EXPECTED)


def test_files_that_are_not_there_or_broken(tmp_path: Path) -> None:
    """As for any checkpoint."""
    with pytest.raises(CheckpointError, match="does not exist"):
        check_lora(tmp_path / "lora.pt", EXPECTED)
    (tmp_path / "lora.pt").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="is a web page"):
        check_lora(tmp_path / "lora.pt", EXPECTED)
