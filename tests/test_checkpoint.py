"""Every layout that weights come in gives the same model; everything else gives a clear error and no model."""
from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from conftest import EVERY_POLICY, SMALL, make_tiny, policy_of
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from wan.checkpoint import CheckpointError, check_transformer, load_transformer, read_transformer
from wan.geometry import ChunkSpan
from wan.model import CausalWanModel, WanConfig

NAME = "diffusion_pytorch_model.safetensors"
EXPECTED = {name: value.shape for name, value in CausalWanModel(SMALL).state_dict().items()}
State = dict[str, Tensor]


def random_state(seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in EXPECTED.items()}


def to_diffusers(state: State) -> State:
    """The names of the diffusers release, written out the other way round than the loader reads them."""
    fixed = {
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "head.modulation": "scale_shift_table", "head.head": "proj_out", ".modulation": ".scale_shift_table",
        ".norm3.": ".norm2.", ".ffn.0.": ".ffn.net.0.proj.", ".ffn.2.": ".ffn.net.2.",
        ".self_attn.": ".attn1.", ".cross_attn.": ".attn2.",
        ".o.": ".to_out.0.", ".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.",
    }
    renamed = {}
    for name, value in state.items():
        for old, new in fixed.items():
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def write_shards(folder: Path, state: State) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    where = {}
    for number in (1, 2):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        part = dict(list(state.items())[number - 1 :: 2])
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = folder / f"{NAME}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def inside(infix: str, state: State) -> State:
    """A wrapper in the middle of the name, as FSDP of the blocks leaves it."""
    return {"model." + name.replace("blocks.", f"blocks.{infix}"): value for name, value in state.items()}


def as_tensors(folder: Path, state: State) -> Path:
    save_file(state, folder / NAME)
    return folder / NAME


def as_pt(folder: Path, content: object, **options: bool) -> Path:
    torch.save(content, folder / "model.pt", **options)
    return folder / "model.pt"


LAYOUTS: dict[str, Callable[[Path, State], Path]] = {
    "original file": as_tensors,
    "original folder": lambda folder, state: as_tensors(folder, state).parent,
    "diffusers file": lambda folder, state: as_tensors(folder, to_diffusers(state)),
    "diffusers shards": lambda folder, state: write_shards(folder, to_diffusers(state)).parent,
    "diffusers repository": (
        lambda folder, state: write_shards(folder / "transformer", to_diffusers(state)).parent.parent
    ),
    "index json": lambda folder, state: write_shards(folder, state),
    "prefixed safetensors": lambda folder, state: as_tensors(folder, prefixed("model.", state)),
    "wrapped diffusers pt": (
        lambda folder, state: as_pt(folder, {"state_dict": prefixed("module.", to_diffusers(state))})
    ),
    "grouped safetensors": lambda folder, state: as_tensors(folder, prefixed("generator.model.", state)),
    "generator": lambda folder, state: as_pt(
        folder, {"generator": prefixed("model.", state), "critic": {"x": torch.ones(1)}, "step": 3},
    ),
    "generator of a folder": lambda folder, state: as_pt(folder, {"generator": prefixed("model.", state)}).parent,
    "model": lambda folder, state: as_pt(folder, {"model": state}),
    "state_dict": lambda folder, state: as_pt(folder, {"state_dict": prefixed("model.", state), "epoch": 1}),
    "bare": lambda folder, state: as_pt(folder, prefixed("model.", state)),
    "bare parameters": lambda folder, state: as_pt(
        folder, {name: torch.nn.Parameter(value) for name, value in state.items()},
    ),
    "fsdp": lambda folder, state: as_pt(folder, {"generator": prefixed("model._fsdp_wrapped_module.", state)}),
    "fsdp inside": lambda folder, state: as_pt(folder, {"generator": inside("_fsdp_wrapped_module.", state)}),
    "checkpointed": lambda folder, state: as_pt(folder, inside("_checkpoint_wrapped_module.", state)),
    "compiled ddp": lambda folder, state: as_pt(folder, prefixed("module._orig_mod.model.", state)),
    "legacy pickle": lambda folder, state: as_pt(
        folder, {"generator": prefixed("model.", state)}, _use_new_zipfile_serialization=False,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(layout: str, tmp_path: Path) -> None:
    """Written in any layout and read back: the original names, every value unchanged; so too in a meta model."""
    state = random_state()
    path = LAYOUTS[layout](tmp_path, state)
    read, _ = read_transformer(path, use_ema=False)
    assert set(read) == set(state)
    assert all(torch.equal(read[name], state[name]) for name in state)
    check_transformer(path, EXPECTED, use_ema=False)
    with torch.device("meta"):
        model = CausalWanModel(SMALL)
    load_transformer(model, path, use_ema=False, device="cpu", dtype=torch.float32)
    assert all(torch.equal(value, state[name]) and value.requires_grad for name, value in model.named_parameters())


def test_a_header_may_look_like_a_pickle(tmp_path: Path) -> None:
    """Safetensors whose first byte, a part of the header's length, is the byte that pickles begin with."""
    state = random_state()
    for padding in range(0, 257, 8):
        save_file(state, tmp_path / NAME, {"padding": "x" * padding})
        if (tmp_path / NAME).read_bytes()[0] == 0x80:
            break
    assert (tmp_path / NAME).read_bytes()[0] == 0x80
    assert torch.equal(read_transformer(tmp_path, use_ema=False)[0]["head.modulation"], state["head.modulation"])


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("meta", [True, False])
def test_weights_are_cast_once(source: torch.dtype, target: torch.dtype, meta: bool, tmp_path: Path) -> None:
    """A loaded weight is the stored one rounded to the asked dtype, whatever the model held before."""
    state = random_state(dtype=source)
    with torch.device("meta" if meta else "cpu"):
        model = CausalWanModel(SMALL)
    load_transformer(model, as_pt(tmp_path, state), use_ema=False, device="cpu", dtype=target)
    assert all(torch.equal(value, state[name].to(target)) for name, value in model.state_dict().items())


def test_diffusers_names_mean_the_same_network(tmp_path: Path) -> None:
    """One chunk without a past is diffusers' own bidirectional Wan: same file, same flow."""
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        patch_size=SMALL.patch_size, num_attention_heads=SMALL.num_heads, attention_head_dim=SMALL.head_dim,
        in_channels=SMALL.in_dim,
        out_channels=SMALL.out_dim, text_dim=SMALL.text_dim, freq_dim=SMALL.freq_dim, ffn_dim=SMALL.ffn_dim,
        num_layers=SMALL.num_layers, rope_max_seq_len=32,
    )
    for parameter in theirs.parameters():  # norms and tables too, so that no two may be exchanged
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    tiny = make_tiny()
    load_transformer(tiny.model, tmp_path, use_ema=False, device="cpu", dtype=torch.float32)
    cache = tiny.cache(policy_of(EVERY_POLICY["rolling"]))
    cache.reset([0])
    cache.begin(ChunkSpan(index=0, start=0, frames=3))
    x = torch.randn(1, 3, SMALL.in_dim, tiny.geometry.latent_height, tiny.geometry.latent_width)
    with torch.no_grad():
        ours = tiny.model(x, torch.full((1, 3), 750.0), tiny.model.embed_text(tiny.text()), cache)
        expected = theirs(x.transpose(1, 2), torch.tensor([750.0]), tiny.text()).sample.transpose(1, 2)
    assert_close(ours, expected, rtol=0, atol=1e-4)


def test_ema_chooses_between_two_models(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """use_ema takes generator_ema, its absence generator; the log says which."""
    plain, ema = random_state(1), random_state(2)
    path = as_pt(
        tmp_path,
        {"generator": prefixed("model.", plain), "generator_ema": prefixed("model._fsdp_wrapped_module.", ema)},
    )
    with caplog.at_level(logging.INFO):
        for use_ema, state, group in ((False, plain, "generator"), (True, ema, "generator_ema")):
            read, _ = read_transformer(path, use_ema=use_ema)
            assert all(torch.equal(read[name], state[name]) for name in state)
            assert caplog.messages[-1].endswith(f"using {group}")


@pytest.mark.parametrize(("group", "use_ema", "remedy"), [
    ("generator", True, "without --use_ema"), ("generator_ema", False, "with --use_ema"),
])
def test_a_missing_group_is_named(group: str, use_ema: bool, remedy: str, tmp_path: Path) -> None:
    """What is not there is never replaced silently; the error names what is there and the flag to change."""
    path = as_pt(tmp_path, {group: random_state(), "critic": {"x": torch.ones(1)}})
    with pytest.raises(CheckpointError, match=f"holds critic, {group}.*{remedy}"):
        check_transformer(path, EXPECTED, use_ema=use_ema)


@pytest.mark.parametrize("layout", ["model", "state_dict", "bare", "original file"])
def test_one_model_needs_no_choice(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file with one model is taken with and without use_ema, and the log says that nothing was chosen."""
    path = LAYOUTS[layout](tmp_path, random_state())
    with caplog.at_level(logging.INFO):
        for use_ema in (True, False):
            assert not check_transformer(path, EXPECTED, use_ema=use_ema)
            assert f"use_ema={use_ema} chooses nothing here" in caplog.text


def test_a_difference_is_listed(tmp_path: Path) -> None:
    """Missing, unexpected and misshapen tensors, the first 8 of each with counts; the model stays as it was."""
    state = random_state()
    for name in [name for name in state if name.startswith("blocks.0.")][:10]:
        del state[name]
    state["extra.weight"] = torch.ones(2)
    state["head.modulation"] = torch.ones(1, 2, 7)
    path = as_pt(tmp_path, {"generator": state})
    model = make_tiny().model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for attempt in (
        lambda: check_transformer(path, EXPECTED, use_ema=False),
        lambda: load_transformer(model, path, use_ema=False, device="cpu", dtype=torch.float32),
    ):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        lines = str(caught.value).splitlines()
        assert lines[1].startswith("  missing (10): blocks.0.") and lines[1].endswith(", and 2 more")
        assert lines[1].count("blocks.0.") == 8
        assert lines[2] == "  unexpected (1): extra.weight"
        assert lines[3] == "  another shape (1): head.modulation is [1, 2, 7], the model has [1, 2, 32]"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def meta_state(config: WanConfig) -> Mapping[str, Tensor]:
    with torch.device("meta"):
        return CausalWanModel(config).state_dict()


def test_another_model_size_is_recognised(tmp_path: Path) -> None:
    """A file of a wider and deeper model says its size and the one asked for."""
    sizes = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
    wide = {
        name: torch.zeros(value.shape)
        for name, value in meta_state(WanConfig(**(sizes | {"dim": 48, "num_layers": 3}))).items()
    }
    message = "of dim 48, 3 layers, 3 input channels; the configuration asks for dim 32, 2 layers, 3"
    with pytest.raises(CheckpointError, match=message):
        check_transformer(as_tensors(tmp_path, wide), EXPECTED, use_ema=False)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"token_embedding.weight": torch.ones(2, 2)}, "holds a text encoder, not the transformer"),
        ({"decoder.conv1.weight": torch.ones(2)}, "holds a VAE, not the transformer"),
        ({"blocks.0.ffn.0.lora_A.weight": torch.ones(2)}, "holds a LoRA"),
        (random_state() | {"head.modulation": torch.ones(1, 2, 32, dtype=torch.int8)},
         "not plain float .*head.modulation is torch.int8"),
        ({"x.weight": torch.ones(1), "module.x.weight": torch.zeros(1)}, "1 tensors occur twice.*x.weight"),
        ({"generator_lora": {"a": torch.ones(1)}}, "holds generator_lora.*LoRA alone is not a model"),
        ([torch.ones(1)], "holds a list, not named tensors"), ({1: torch.ones(1)}, "holds a dict, not named tensors"),
    ],
    ids=str.split("text vae lora int8 twice lora_group list numbers"),
)
def test_wrong_contents_are_explained(state: object, message: str, tmp_path: Path) -> None:
    """A readable file that is not this transformer says what it is."""
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        check_transformer(as_pt(tmp_path, state), EXPECTED, use_ema=False)


class Payload:
    """What a hostile file holds: a call made while unpickling."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
def test_pickled_code_is_refused(writer: str, tmp_path: Path) -> None:
    """A file that would run something is refused by name, and nothing runs."""
    content = {"generator": random_state(), "extra": Payload(tmp_path / "was_here")}
    if writer == "pickle":
        (tmp_path / "model.pt").write_bytes(pickle.dumps(content, protocol=2))
    else:
        as_pt(tmp_path, content, _use_new_zipfile_serialization=writer == "zip")
    for read in (read_transformer, lambda path, use_ema: check_transformer(path, EXPECTED, use_ema=use_ema)):
        with pytest.raises(CheckpointError, match="refused. It holds more than tensors"):
            read(tmp_path / "model.pt", use_ema=False)
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("layout", ["original file", "generator", "legacy pickle"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_cut_files_are_recognised(layout: str, share: float, tmp_path: Path) -> None:
    """A file cut anywhere says so at the cheap check, before any weight is used."""
    path = LAYOUTS[layout](tmp_path, random_state())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        check_transformer(path, EXPECTED, use_ema=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "web page"),
        (b"Entry not found", "is no checkpoint: it begins with b'Entry not fo'"),
        (b"PK\x03\x04 and then nothing of the kind", "cut off or damaged"),
        (b"\x80\x02 and then nothing of the kind", "cut off or damaged|refused"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{ not the json of ", "cut off or damaged"),
    ],
    ids=str.split("empty lfs html text zip pickle safetensors"),
)
def test_files_that_are_no_checkpoints(content: bytes, message: str, tmp_path: Path) -> None:
    """What failed downloads leave behind is told apart."""
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        check_transformer(tmp_path / "model.pt", EXPECTED, use_ema=False)


def test_missing_files_are_named(tmp_path: Path) -> None:
    """No path, no weights in a folder, too many, a shard short: each says which, and the command to run."""
    with pytest.raises(CheckpointError, match="nowhere.pt does not exist"):
        check_transformer(tmp_path / "nowhere.pt", EXPECTED, use_ema=False)
    with pytest.raises(CheckpointError, match="found no weight file"):
        check_transformer(tmp_path, EXPECTED, use_ema=False)
    for name in ("a.pt", "b.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(CheckpointError, match="found a.pt, b.pt. Give the file itself"):
        check_transformer(tmp_path, EXPECTED, use_ema=False)
    index = write_shards(tmp_path / "shards", random_state())
    (index.parent / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards are missing .*00002-of-00002"):
        check_transformer(index.parent, EXPECTED, use_ema=False)
    numbers, none = '{"weight_map": {"a": 1, "b": "c"}}', '{"weight_map": {}}'
    for text, message in (
        ("{", "cannot be read"), ("[]", "holds a list"), (numbers, "not a shard index"), (none, "lists no tensor"),
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=f"index.json: {message}"):
            check_transformer(index.parent, EXPECTED, use_ema=False)


def test_loaded_weights_outlive_their_file(tmp_path: Path) -> None:
    """A model does not read from the file after loading: emptying the file changes no weight."""
    state = random_state()
    path = as_tensors(tmp_path, state)
    model = CausalWanModel(SMALL)
    load_transformer(model, path, use_ema=False, device="cpu", dtype=torch.float32)
    path.write_bytes(b"")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_nothing_is_left_without_a_value(tmp_path: Path) -> None:
    """A buffer that no file can fill is an error, not a meta tensor met in the first pass."""
    with torch.device("meta"):
        model = CausalWanModel(SMALL)
        model.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(CheckpointError, match="table stayed without a value"):
        load_transformer(model, as_pt(tmp_path, random_state()), use_ema=False, device="cpu", dtype=torch.float32)
