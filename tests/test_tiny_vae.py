"""Laws of the tiny decoder: the published layout and no other, and streams that equal the whole clip.

The reference below decodes a whole clip frame by frame, as plainly as the published description allows; it shares
no code with wan/tiny_vae.py.
"""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from end_to_end.runs import PROMPTS, CommandLine, is_whole, manifest, record, videos
from PIL import Image
from safetensors.torch import save_file
from test_vae import WAN_MEAN, WAN_STD
from torch import Tensor
from torch.testing import assert_close

import pipeline.engine
from utils.download import FILES, ON_GITHUB, source_of_repo
from utils.download_sources import GitHub
from utils.hashing import sha256_file
from utils.video import read_video
from wan.checkpoint import CheckpointError
from wan.tiny_vae import TinyVAE, check_tiny_vae
from wan.vae import WanVAE
from weights import make_model, make_vae

State = dict[str, Tensor]

SHORT = ["--prompt", PROMPTS[0], "--num_output_frames", 6]


def block(name: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for number, inside in ((0, 2 * width), (2, width), (4, width)):
        shapes |= {f"{name}.conv.{number}.weight": (width, inside, 3, 3), f"{name}.conv.{number}.bias": (width,)}
    return shapes


def layout(channels: int = 16) -> dict[str, tuple[int, ...]]:
    """Every tensor of taew2_1.pth, with its shape; 11.3 million numbers at 16 latent channels."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.0.weight": (64, 3, 3, 3), "encoder.0.bias": (64,),
        "encoder.2.conv.weight": (64, 128, 1, 1), "encoder.3.weight": (64, 64, 3, 3),
        "encoder.7.conv.weight": (64, 128, 1, 1), "encoder.8.weight": (64, 64, 3, 3),
        "encoder.12.conv.weight": (64, 64, 1, 1), "encoder.13.weight": (64, 64, 3, 3),
        "encoder.17.weight": (channels, 64, 3, 3), "encoder.17.bias": (channels,),
        "decoder.1.weight": (256, channels, 3, 3), "decoder.1.bias": (256,),
        "decoder.7.conv.weight": (256, 256, 1, 1), "decoder.8.weight": (128, 256, 3, 3),
        "decoder.13.conv.weight": (256, 128, 1, 1), "decoder.14.weight": (64, 128, 3, 3),
        "decoder.19.conv.weight": (128, 64, 1, 1), "decoder.20.weight": (64, 64, 3, 3),
        "decoder.22.weight": (3, 64, 3, 3), "decoder.22.bias": (3,),
    }
    for number in (4, 5, 6, 9, 10, 11, 14, 15, 16):
        shapes |= block(f"encoder.{number}", 64)
    for first, width in ((3, 256), (9, 128), (15, 64)):
        for number in range(first, first + 3):
            shapes |= block(f"decoder.{number}", width)
    return shapes


def random_state(channels: int = 16, seed: int = 0) -> State:
    """Random weights under the published names; most pixels fall between black and white."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in layout(channels).items():
        values = torch.randn(shape, generator=generator)
        state[name] = values * 0.1 if len(shape) == 1 else values / values[0].numel() ** 0.5
        if name.endswith(".conv.4.weight"):
            state[name] *= 0.3
    state["decoder.22.weight"] *= 0.2
    state["decoder.22.bias"] += 0.5
    return state


@pytest.fixture(scope="module")
def narrow() -> State:
    return random_state(channels=4)


def made(state: State, folder: Path, dtype: torch.dtype = torch.float32) -> TinyVAE:
    torch.save(state, folder / "taew2_1.pth")
    return TinyVAE.load(folder / "taew2_1.pth", device="cpu", dtype=dtype)


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the second road ----------------------------------------------------------------------------------------

def reference(state: State, latents: Tensor) -> Tensor:
    """Pixels [1 + 4 (F - 1), 3, H, W] in [-1, 1] of one clip's latents [F, C, h, w], stage by stage."""
    w = {name.removeprefix("decoder."): value.to(latents.dtype) for name, value in state.items()}
    frames = [3 * (latent / 3).tanh() for latent in latents]
    frames = [F.conv2d(x, w["1.weight"], w["1.bias"], padding=1).relu() for x in frames]
    for first, split in ((3, 1), (9, 2), (15, 2)):
        for number in range(first, first + 3):
            result = []
            for now, x in enumerate(frames):
                y = torch.cat([x, frames[now - 1] if now else torch.zeros_like(x)])
                for conv in (0, 2, 4):
                    y = F.conv2d(y, w[f"{number}.conv.{conv}.weight"], w[f"{number}.conv.{conv}.bias"], padding=1)
                    y = y if conv == 4 else y.relu()
                result.append((x + y).relu())
            frames = result
        grown = []
        for x in frames:
            large = x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
            grown += F.conv2d(large, w[f"{first + 4}.conv.weight"]).chunk(split)
        frames = [F.conv2d(x, w[f"{first + 5}.weight"], padding=1) for x in grown]
    pixels = [F.conv2d(x.relu(), w["22.weight"], w["22.bias"], padding=1) for x in frames]
    return 2 * torch.stack(pixels[3:]).clamp(0, 1) - 1


def test_streams_equal_the_whole_clip(narrow: State, tmp_path: Path) -> None:
    """Two clips of an odd size, in float64, in one call and in two: the plain whole-clip reference to 1e-9."""
    vae = made(narrow, tmp_path, torch.float64)
    latents = noise(2, 3, 4, 3, 5, dtype=torch.float64)
    expected = torch.stack([reference(narrow, clip) for clip in latents])
    assert expected.abs().lt(1).double().mean() > 0.5  # clamping must not be all that is compared
    for split in ([3], [1, 2]):
        stream = vae.stream()
        pixels = torch.cat([stream.decode(part) for part in latents.split(split, dim=1)], dim=1)
        assert pixels.shape == (2, 9, 3, 24, 40)
        assert_close(pixels, expected, rtol=0, atol=1e-9)


def test_lighttae_reads_raw_latents(tmp_path: Path) -> None:
    """The same file as `lighttae` gives what the reference makes of latents times std plus mean."""
    state = random_state()
    save_file(state, tmp_path / "lighttaew2_1.safetensors")
    vae = TinyVAE.load(tmp_path / "lighttaew2_1.safetensors", kind="lighttae", device="cpu", dtype=torch.float64)
    latents = noise(1, 2, 16, 2, 2, dtype=torch.float64)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (WAN_MEAN, WAN_STD))
    assert_close(vae.stream().decode(latents)[0], reference(state, latents[0] * std + mean), rtol=0, atol=1e-9)


# --- streams ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", [[6], [1] * 6, [1, 3, 2]])
def test_any_split_gives_the_same_pixels_and_wans_counts(split: list[int], narrow: State, tmp_path: Path) -> None:
    """Bit for bit; each call gives as many frames as the Wan VAE's stream, of the same kind."""
    vae = made(narrow, tmp_path)
    make_vae(tmp_path / "wan")
    wan = WanVAE.load(tmp_path / "wan", device="cpu", dtype=torch.float32)
    latents = noise(1, 6, 4, 2, 3)
    ours, theirs, parts = vae.stream(), wan.stream(), []
    for part in latents.split(split, dim=1):
        parts.append(ours.decode(part))
        pixels = theirs.decode(part)
        assert parts[-1].shape == pixels.shape and parts[-1].dtype == pixels.dtype == torch.float32
    whole = torch.cat(parts, dim=1)
    assert torch.equal(whole, vae.stream().decode(latents)) and whole.shape == (1, 21, 3, 16, 24)
    assert whole.min() >= -1 and whole.max() <= 1


def test_batches_equal_singles_and_streams_do_not_touch(narrow: State, tmp_path: Path) -> None:
    """Three clips together, and the same three in turns through streams of their own."""
    vae = made(narrow, tmp_path)
    latents = noise(3, 3, 4, 4, 2)
    together, streams = vae.stream().decode(latents), [vae.stream() for _ in latents]
    turns = [[stream.decode(clip[None, f:f + 1]) for stream, clip in zip(streams, latents, strict=True)]
             for f in range(3)]
    alone = torch.stack([torch.cat(parts, dim=1)[0] for parts in zip(*turns, strict=True)])
    assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_stream_holds_a_fixed_amount(narrow: State, tmp_path: Path) -> None:
    """After 2 and after 12 latent frames a stream keeps as many values: one frame for each of the nine blocks."""
    stream, sizes = made(narrow, tmp_path).stream(), []
    for frame in noise(1, 12, 4, 2, 2).requires_grad_().split(1, dim=1):
        assert not stream.decode(frame).requires_grad
        sizes.append(sum(value.untyped_storage().nbytes() for value in stream._past.values()))
    assert len(stream._past) == 9
    assert set(sizes) == {3 * 4 * (256 * 2 * 2 + 128 * 4 * 4 + 64 * 8 * 8)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype: torch.dtype, narrow: State, tmp_path: Path) -> None:
    """Half-precision weights return float32 pixels near those of float32 weights."""
    latents = noise(1, 2, 4, 3, 3)
    exact, rough = (made(narrow, tmp_path, kind).stream().decode(latents) for kind in (torch.float32, dtype))
    assert rough.dtype == torch.float32 and 0 < (exact - rough).abs().mean() < 0.02


def test_unfit_latents_are_refused(narrow: State, tmp_path: Path) -> None:
    """Another number of channels, no frame, or a change of size."""
    stream = made(narrow, tmp_path).stream()
    with pytest.raises(ValueError, match=r"expected \[batch, frames, 4, height, width\]"):
        stream.decode(noise(1, 1, 16, 2, 2))
    stream.decode(noise(1, 1, 4, 2, 2))
    with pytest.raises(ValueError, match="Start a new stream"):
        stream.decode(noise(1, 1, 4, 2, 3))


# --- files --------------------------------------------------------------------------------------------------

def test_published_files_load(tmp_path: Path) -> None:
    """taew2_1's names and shapes, as a .pth of halves or as safetensors: loaded, and the same decoder."""
    state = {name: value.half() for name, value in random_state().items()}
    torch.save(state, tmp_path / "taew2_1.pth")
    save_file(state, tmp_path / "taew2_1.safetensors")
    assert 22.5e6 < (tmp_path / "taew2_1.safetensors").stat().st_size < 22.8e6  # the published file: 22.7 MB
    frames = []
    for name in ("taew2_1.pth", "taew2_1.safetensors"):
        check_tiny_vae(tmp_path / name, 16)
        vae = TinyVAE.load(tmp_path / name, device="cpu", dtype=torch.float32)
        assert (vae.latent_channels, vae.spatial_stride, vae.temporal_stride) == (16, 8, 4)
        frames.append(vae.stream().decode(noise(1, 1, 16, 2, 2)))
    assert torch.equal(*frames) and frames[0].shape == (1, 1, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("decoder.9.conv.2.bias"), r"missing \(1\): decoder.9.conv.2.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), r"unexpected \(1\): extra"),
        (lambda s: s.update({"decoder.22.weight": torch.zeros(12, 64, 3, 3)}),
         r"decoder.22.weight is \[12, 64, 3, 3\], the model has \[3, 64, 3, 3\]"),
        (lambda s: s.update({"decoder.7.conv.weight": torch.zeros(512, 256, 1, 1)}), "decoder.7.conv.weight is"),
        (lambda s: s.update({"decoder.3.conv.0.bias": torch.zeros(256, dtype=torch.int8)}), "not plain float"),
        (lambda s: s.pop("decoder.1.weight"), "no tiny decoder of Wan 2.1 latents"),
    ],
)
def test_other_layouts_are_refused(change, words: str, narrow: State, tmp_path: Path) -> None:
    """What is missing, unexpected or misshapen is named, and nothing is loaded."""
    state = dict(narrow)
    change(state)
    with pytest.raises(CheckpointError, match=words):
        made(state, tmp_path)


def test_other_channels_are_refused(narrow: State, tmp_path: Path) -> None:
    """A file for other latents than the transformer's; and raw latents of which no statistics are known."""
    torch.save(narrow, tmp_path / "taew2_1.pth")
    with pytest.raises(CheckpointError, match=r"decoder.1.weight is \[256, 4, 3, 3\], the model has \[256, 16, 3, 3\]"):
        check_tiny_vae(tmp_path / "taew2_1.pth", 16)
    with pytest.raises(CheckpointError, match="16 channels, but it has 4"):
        TinyVAE.load(tmp_path / "taew2_1.pth", kind="lighttae", device="cpu", dtype=torch.float32)


def test_random_weights_are_seeded() -> None:
    """The same seed gives the same decoder, another seed another."""
    first, same, other = (
        TinyVAE.random(3, device="cpu", dtype=torch.float32, seed=seed).stream().decode(noise(1, 1, 3, 2, 2))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_the_download_is_pinned() -> None:
    """taew2_1.pth comes from GitHub, with size and hash, to where the real model's YAML looks for it."""
    [file] = [file for file in FILES if file.group == "taehv"]
    assert isinstance(source_of_repo(file.repo), GitHub) and file.repo in ON_GITHUB
    assert file.pinned.size_bytes and len(file.pinned.sha256) == 64
    assert f"\ntaehv: {file.target} " in (ROOT / "configs" / "models" / "wan2.1_t2v_1.3b.yaml").read_text()


# --- the command line ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cli(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    return CommandLine(model, tmp_path)


def never(*_: object, **__: object) -> None:
    raise AssertionError("a network was loaded that is not needed")


def test_video_from_the_tiny_decoder(cli: CommandLine, narrow: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """A video of the length asked for, without the Wan VAE in memory; the record names decoder and hash."""
    file = cli.folder / "taew2_1.pth"
    torch.save(narrow, file)
    assert cli(*SHORT, out="wan") == 0
    monkeypatch.setattr(pipeline.engine.WanVAE, "load", never)
    assert cli(*SHORT, "--decoder", "taehv", "--decoder_path", file) == 0
    folder = cli.folder / "videos"
    assert is_whole(folder, 1)
    [stem] = videos(folder)
    about, usual = record(folder, stem), record(cli.folder / "wan", stem)
    assert about["decoder"] == manifest(folder)[0]["decoder"] == "taehv" and usual["decoder"] == "wan"
    assert about["settings"]["weights"] == usual["settings"]["weights"] | {"taehv": sha256_file(file)}
    assert about["fingerprint"] != usual["fingerprint"]
    pixels = read_video(folder / f"{stem}.mp4")
    assert pixels.shape == (21, 32, 48, 3) and pixels.std() > 1


def test_image_begins_a_video_of_the_tiny_decoder(cli: CommandLine, narrow: State) -> None:
    """--i2v: the Wan VAE encodes, the tiny decoder decodes; another image begins another video."""
    torch.save(narrow, cli.folder / "mine.pth")
    shown = []
    for out, level in (("dark", 0), ("light", 255)):
        Image.fromarray(np.full((40, 60, 3), level, np.uint8)).save(cli.folder / "image.png")
        flags = ["--i2v", "--data_path", cli.folder / "image.png"]
        assert cli(*SHORT, *flags, "--decoder", "taehv", "--decoder_path", cli.folder / "mine.pth", out=out) == 0
        [video] = videos(cli.folder / out)
        shown.append(read_video(cli.folder / out / f"{video}.mp4"))
    assert len(shown[0]) == len(shown[1]) == 21 and not np.array_equal(shown[0][0], shown[1][0])


def test_random_weights_and_dry_run(cli: CommandLine, capsys: pytest.CaptureFixture) -> None:
    """--random_weights needs no file of a decoder either; --dry_run names the decoder."""
    assert cli(*SHORT, "--decoder", "lighttae", "--random_weights") == 0
    [stem] = videos(cli.folder / "videos")
    assert record(cli.folder / "videos", stem)["settings"]["weights"]["lighttae"] == "random"
    assert cli(*SHORT, "--decoder", "taehv", "--random_weights", "--dry_run") == 0
    assert "decoder   taehv, approximate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--decoder", "taehv", "--decoder_path", "nowhere/x.pth"],
         ["nowhere/x.pth is not there", "python -m utils.download --only taehv", "--decoder_path"]),
        (["--decoder", "lighttae", "--decoder_path", "nowhere/x.pth"], ["huggingface.co/lightx2v/Autoencoders"]),
        (["--decoder", "taehv"], ["none was made for the latents of the model"]),
        (["--decoder_path", "x.pth"], ["--decoder_path x.pth is for a tiny decoder"]),
        (["--decoder", "taehv", "--decoder_path", "lighttaew2_1.pth"], ["a lighttae. Use --decoder lighttae"]),
        (["--decoder", "lighttae", "--decoder_path", "taew2_1.pth"], ["a taehv. Use --decoder taehv"]),
        (["--decoder", "taehv", "--decoder_path", "wide.pth"], ["decoder.1.weight is [256, 16, 3, 3], the model has"]),
        (["--decoder", "taehv", "--decoder_path", "page.pth"], ["web page"]),
    ],
)
def test_bad_decoders_are_refused_before_anything_loads(
    flags: list[str], words: list[str], cli: CommandLine, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Status 2 and an error that says what to do."""
    if "wide.pth" in flags:
        torch.save(random_state(), cli.folder / "wide.pth")
    (cli.folder / "page.pth").write_text("<!DOCTYPE html>")
    for owner, name in ((pipeline.engine, "load_transformer"), (pipeline.engine.TextEncoder, "load"),
                        (pipeline.engine.WanVAE, "load"), (TinyVAE, "load")):
        monkeypatch.setattr(owner, name, never)
    flags = [str(cli.folder / flag) if flag in ("wide.pth", "page.pth") else flag for flag in flags]
    assert cli(*SHORT, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and all(word in said for word in words), said
    assert not (cli.folder / "videos").exists()


def test_a_model_of_other_strides_is_refused(cli: CommandLine, model: Path, capsys: pytest.CaptureFixture) -> None:
    """Eight pixels a latent row and four frames a latent frame are built into the layout."""
    other = CommandLine(cli.folder / "other.yaml", cli.folder)
    other.model.write_text(f"extends: {os.path.relpath(model, cli.folder)}\nspatial_stride: 16\nwidth: 64\n")
    assert other("--prompt", PROMPTS[0], "--decoder", "taehv") == 2
    assert "the model other has 4 and 16. Use --decoder wan" in capsys.readouterr().err
