"""Pixels <-> latents: the released VAE's own numbers, every layout, and streams that equal one call."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from wan.checkpoint import CheckpointError
from wan.stream import to_uint8
from wan.vae import WanVAE, check_vae

GOLDEN = Path(__file__).parent / "golden" / "vae_tiny.safetensors"
State = dict[str, Tensor]
# Small relatives of the diffusers class in use: plain, half-resolution patches, another time stride.
SHAPES = {
    "plain": dict(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        in_channels=3, out_channels=3,
    ),
    "patches": dict(
        base_dim=4, z_dim=16, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[True, True],
        in_channels=12, out_channels=12, patch_size=2,
    ),
    "deep": dict(base_dim=4, z_dim=3, dim_mult=[1, 1, 1, 2], num_res_blocks=1, temperal_downsample=[True, True, True]),
}
STRIDES = {"plain": (2, 2), "patches": (8, 4), "deep": (8, 8)}
WAN_MEAN = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
]
WAN_STD = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
]


@pytest.fixture(scope="module")
def golden() -> State:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def original(golden: State) -> State:
    return {name.removeprefix("sd."): value for name, value in golden.items() if name.startswith("sd.")}


def load_original(path: Path, golden: State, dtype: torch.dtype = torch.float32) -> WanVAE:
    return WanVAE.load(path, device="cpu", dtype=dtype, statistics=(golden["mean"].tolist(), golden["std"].tolist()))


@pytest.fixture
def vae(golden: State, original: State, tmp_path: Path) -> WanVAE:
    torch.save(original, tmp_path / "Wan2.1_VAE.pth")
    return load_original(tmp_path, golden)


def write_diffusers(folder: Path, shape: str) -> AutoencoderKLWan:
    """A random VAE as diffusers itself saves it; returns the model that was saved."""
    torch.manual_seed(3)
    channels = SHAPES[shape]["z_dim"]
    model = AutoencoderKLWan(
        **SHAPES[shape], latents_mean=torch.randn(channels).tolist(),
        latents_std=(torch.rand(channels) + 0.5).tolist(),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1.0 if parameter.ndim < 4 else parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return model.eval()


def frames_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


LAYOUTS: dict[str, Callable[[Path, State], Path]] = {
    "original file": lambda folder, state: torch.save(state, folder / "any.pth") or folder / "any.pth",
    "original folder": lambda folder, state: torch.save(state, folder / "Wan2.1_VAE.pth") or folder,
    "original safetensors": lambda folder, state: (
        save_file(state, folder / "wan_VAE.safetensors") or folder / "wan_VAE.safetensors"
    ),
    "wrapped": lambda folder, state: (
        torch.save({"state_dict": {"model." + name: state[name] for name in state}}, folder / "VAE.pth") or folder
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_original_files_match_the_released_vae(layout: str, golden: State, original: State, tmp_path: Path) -> None:
    """Encoding, decoding in one call and decoding chunk by chunk give the released VAE's own numbers."""
    vae = load_original(LAYOUTS[layout](tmp_path, original), golden)
    assert (vae.latent_channels, vae.spatial_stride, vae.temporal_stride) == (4, 8, 4)
    assert_close(vae.encode(frames_first(golden["pixels"])), frames_first(golden["enc_mu_scaled"]), rtol=0, atol=1e-5)
    z = frames_first(golden["z"])
    assert_close(vae.stream().decode(z[:, :3]), frames_first(golden["decoded_3"]).clamp(-1, 1), rtol=0, atol=1e-5)
    stream = vae.stream()
    for number in range(3):
        expected = frames_first(golden[f"cached_chunk{number}"])
        assert expected.abs().le(1).float().mean() > 0.5  # clamping must not be all that is compared
        assert_close(stream.decode(z[:, 3 * number : 3 * number + 3]), expected.clamp(-1, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["folder", "repository", "file"])
@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_folders_match_diffusers(shape: str, layout: str, tmp_path: Path) -> None:
    """Any configuration: encode and decode equal diffusers' own whole-clip calls, with patches too."""
    folder = tmp_path / "vae" if layout == "repository" else tmp_path
    model = write_diffusers(folder, shape)
    path = {"folder": tmp_path, "repository": tmp_path, "file": folder / "diffusion_pytorch_model.safetensors"}[layout]
    vae = WanVAE.load(path, device="cpu", dtype=torch.float32)
    assert (vae.spatial_stride, vae.temporal_stride) == STRIDES[shape]
    mean = torch.tensor(model.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(model.config.latents_std).view(1, -1, 1, 1, 1)
    pixels = torch.rand(2, 3, 9, 16, 24) * 2 - 1
    with torch.no_grad():
        # diffusers encodes by fours whatever the stride, so only strides of 2 and 4 have a twin there
        latents = (
            model.encode(pixels).latent_dist.mode() if vae.temporal_stride <= 4
            else torch.randn(2, vae.latent_channels, 3, 2, 3)
        )
        decoded = model.decode(latents).sample
    if vae.temporal_stride <= 4:
        assert_close(vae.encode(frames_first(pixels)), frames_first((latents - mean) / std), rtol=0, atol=1e-5)
    assert_close(vae.stream().decode(frames_first((latents - mean) / std)), frames_first(decoded), rtol=0, atol=1e-5)


@pytest.mark.parametrize("split", [[9], [3, 3, 3], [1] * 9, [1, 3, 3, 2], [4, 5]])
def test_any_split_gives_the_same_pixels(split: list[int], vae: WanVAE, golden: State) -> None:
    """Streaming equals one call bit for bit, and the frame counts are 1 + s (n - 1), then s n."""
    z = frames_first(golden["z"])
    whole = vae.stream().decode(z)
    stream = vae.stream()
    parts = [stream.decode(part) for part in z.split(split, dim=1)]
    counts = [4 * frames for frames in split]
    counts[0] -= 3
    assert [part.shape[1] for part in parts] == counts
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert whole.dtype == torch.float32 and whole.shape == (1, 33, 3, 16, 24)


def test_streams_do_not_touch(vae: WanVAE, golden: State) -> None:
    """Two streams in turns, with an encoding in between, give what each gives alone."""
    first = frames_first(golden["z"])[:, :4]
    second = first.flip(1)
    alone = [vae.stream().decode(first), vae.stream().decode(second)]
    streams = [vae.stream(), vae.stream()]
    parts: list[list[Tensor]] = [[], []]
    for frame in range(4):
        for number, latents in enumerate((first, second)):
            parts[number].append(streams[number].decode(latents[:, frame : frame + 1]))
            vae.encode(frames_first(golden["pixels"]))
    assert all(torch.equal(torch.cat(parts[number], dim=1), alone[number]) for number in (0, 1))


def test_encoding_is_causal_and_repeatable(vae: WanVAE, golden: State) -> None:
    """A longer clip's latents begin with the shorter one's, and the same pixels give the same latents."""
    pixels = frames_first(golden["pixels"])
    latents = vae.encode(pixels)
    assert latents.shape == (1, 3, 4, 2, 3) and latents.dtype == torch.float32
    assert torch.equal(vae.encode(pixels[:, :5]), latents[:, :2])
    assert torch.equal(vae.encode(pixels[:, :1]), latents[:, :1])


def test_decoding_holds_a_fixed_amount(vae: WanVAE) -> None:
    """After 5 and after 40 latent frames a stream keeps the same number of values, and no graph."""
    def held() -> int:
        return sum(value.numel() for value in stream._past.values())

    stream, sizes = vae.stream(), {}
    latents = torch.randn(1, 40, 4, 2, 3, requires_grad=True)
    for number, frame in enumerate(latents.split(1, dim=1), 1):
        assert not stream.decode(frame).requires_grad
        sizes[number] = held()
    assert sizes[5] == sizes[40] > 0
    assert not any(value.requires_grad for value in stream._past.values())


def test_half_precision_stays_close(golden: State, original: State, tmp_path: Path) -> None:
    """A bfloat16 VAE returns float32 near the float32 one's pixels and latents."""
    torch.save(original, tmp_path / "VAE.pth")
    exact, rough = (load_original(tmp_path, golden, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.bfloat16
    z = frames_first(golden["z"])
    for whole, half in (
        (exact.stream().decode(z), rough.stream().decode(z)),
        (exact.encode(frames_first(golden["pixels"])), rough.encode(frames_first(golden["pixels"]))),
    ):
        assert half.dtype == torch.float32
        assert 0 < (whole - half).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 3, 16, 24), r"8 pixel frames.*1 \+ 4 k. Cut the video to 5 frames, or repeat its last frame up to 9"),
        ((1, 0, 3, 16, 24), "without frames"),
        ((1, 5, 3, 20, 24), "20x24 cannot be encoded.*multiples of 8. Crop or resize to 16x24"),
        ((1, 3, 5, 16, 24), r"expected \[batch, frames, 3, height, width\]"),
    ],
)
def test_unfit_pixels_are_refused(shape: tuple[int, ...], message: str, vae: WanVAE) -> None:
    """Frame counts and sizes that the strides do not divide say which would do."""
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


def test_unfit_latents_are_refused(vae: WanVAE) -> None:
    """Wrong channels, no frame, or another video in the same stream; a refused call changes nothing."""
    z = torch.randn(1, 3, 4, 2, 3)
    stream = vae.stream()
    first = stream.decode(z[:, :2])
    for bad, message in (
        (z[:, :, :3], "frames, 4, height"), (z[:, :0], "a frame or more"),
        (z.expand(2, -1, -1, -1, -1), "Start a new stream"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.decode(bad)
    assert torch.equal(torch.cat([first, stream.decode(z[:, 2:])], dim=1), vae.stream().decode(z))


def test_a_broken_stream_says_so(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure inside a frame the half-moved cache is never used; a new stream works."""
    stream, z = vae.stream(), torch.randn(1, 1, 4, 2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(vae._model.decoder.up_blocks[1].upsamplers[0].resample, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stream.decode(z)
    with pytest.raises(RuntimeError, match="Start a new one"):
        stream.decode(z)
    assert vae.stream().decode(z).isfinite().all()


def test_uint8_is_rounded_and_saturates() -> None:
    """The nearest of 256 levels, by hand; every level survives the way to pixels and back."""
    values = torch.tensor([-2.0, -1.0, -1 + 0.9 / 127.5, 0.0, 1.0, 1.5])
    pixels = values.view(1, 1, 1, 1, 6).expand(2, 4, 3, 1, 6)
    frames = to_uint8(pixels)
    assert frames.dtype == torch.uint8 and frames.shape == (2, 4, 1, 6, 3) and frames.is_contiguous()
    assert frames[0, 0, 0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3)
    assert torch.equal(to_uint8(levels.movedim(-1, 2).float() / 127.5 - 1), levels)


def test_wan_2_1_has_its_statistics(tmp_path: Path) -> None:
    """16 original channels are Wan 2.1's and need no statistics; any other number must be given them."""
    shape = AutoencoderKLWan(base_dim=4)
    torch.save(to_original(shape.state_dict()), tmp_path / "VAE.pth")
    vae = WanVAE.load(tmp_path / "VAE.pth", device="cpu", dtype=torch.float32)
    assert vae._mean.flatten().tolist() == pytest.approx(WAN_MEAN)
    assert vae._std.flatten().tolist() == pytest.approx(WAN_STD)
    for name, value in shape.state_dict().items():
        assert torch.equal(vae._model.state_dict()[name], value)
    with pytest.raises(CheckpointError, match="16 latent channels, but the mean.*3 values"):
        WanVAE.load(tmp_path / "VAE.pth", device="cpu", dtype=torch.float32, statistics=([0.0] * 3, [1.0] * 3))


def test_random_weights_are_seeded(tmp_path: Path) -> None:
    """A config alone gives the architecture; the same seed the same pixels, another seed others; all finite."""
    model = write_diffusers(tmp_path, "patches")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    one, same, other = (WanVAE.random(tmp_path, device="cpu", dtype=torch.float32, seed=seed) for seed in (1, 1, 2))
    assert set(one._model.state_dict()) == set(model.state_dict())
    z = torch.randn(1, 2, 16, 2, 3)
    pixels = one.stream().decode(z)
    assert torch.equal(pixels, same.stream().decode(z)) and not torch.equal(pixels, other.stream().decode(z))
    assert pixels.isfinite().all() and pixels.std() > 0.05


def to_original(state: State) -> State:
    """diffusers' names back to Wan's, by asking for every original name what it becomes."""
    places = [
        f"{side}.{part}" for side in ("encoder", "decoder")
        for part in ("conv1", "head.0", "head.2", "middle.0", "middle.1", "middle.2")
    ]
    places += [
        "conv1", "conv2",
        *(f"encoder.downsamples.{n}" for n in range(20)), *(f"decoder.upsamples.{n}" for n in range(20)),
    ]
    inner = [
        "", ".residual.0", ".residual.2", ".residual.3", ".residual.6", ".shortcut", ".resample.1", ".time_conv",
        ".norm", ".to_qkv", ".proj",
    ]
    names = {f"{place}{part}.{leaf}" for place in places for part in inner for leaf in ("weight", "bias", "gamma")}
    found = convert_wan_vae_to_diffusers({name: name for name in sorted(names)})
    return {found[name]: value for name, value in state.items()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "cut off or damaged"), ("list", "config.json: holds a list, not an object"),
        ({"latents_std": [1.0] * 15 + [0.0]}, "latents_std has the value 0.0.*above 0"),
        ({"latents_std": [1.0] * 15 + [float("nan")]}, "latents_std has the value nan"),
        ({"latents_mean": ["0"] * 16}, "latents_mean has the value '0'"),
        ({"latents_mean": None}, "the mean to normalise them by has no values, but None"),
        ({"dim_mult": "wide"}, "config.json describes no VAE"), ({"is_residual": True}, "Wan 2.2's wider design"),
        ({"base_dim": 5}, "another shape"),
    ],
    ids=str,
)
def test_headers_tell_a_wrong_vae(damage: str | dict, message: str, tmp_path: Path) -> None:
    """Found before any weight is read; the loader refuses them as well."""
    write_diffusers(tmp_path, "patches")
    file, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    check_vae(tmp_path, latent_channels=16, temporal_stride=4, spatial_stride=8)
    for wrong in ({"latent_channels": 4}, {"temporal_stride": 8}, {"spatial_stride": 16}):
        right = dict(latent_channels=16, temporal_stride=4, spatial_stride=8)
        with pytest.raises(CheckpointError, match=f"the model's YAML says {list(wrong.values())[0]}"):
            check_vae(tmp_path, **right | wrong)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        config.write_text("[]" if damage == "list" else json.dumps(json.loads(config.read_text()) | damage))
    with pytest.raises(CheckpointError, match=message):
        check_vae(tmp_path, latent_channels=16, temporal_stride=4, spatial_stride=8)
    with pytest.raises(CheckpointError, match=message):
        WanVAE.load(tmp_path, device="cpu", dtype=torch.float32)


def test_wrong_files_are_explained(original: State, tmp_path: Path) -> None:
    """No VAE, another model, unknown statistics, a tensor short, a strange config: each says so."""
    def load(path: Path) -> WanVAE:
        return WanVAE.load(path, device="cpu", dtype=torch.float32)

    with pytest.raises(CheckpointError, match="no VAE.*found 0"):
        load(tmp_path)
    torch.save(original, tmp_path / "VAE.pth")
    with pytest.raises(CheckpointError, match="4 latent channels, but the mean to normalise them by has 16 values"):
        load(tmp_path)
    torch.save({"token_embedding.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="not a Wan 2.1 VAE.*encoder.conv1.weight"):
        load(tmp_path / "other.pth")
    short = {name: value for name, value in original.items() if name != "decoder.conv1.bias"}
    torch.save(short, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"missing \(1\): decoder.conv_in.bias"):
        WanVAE.load(tmp_path / "short.pth", device="cpu", dtype=torch.float32, statistics=([0.0] * 4, [1.0] * 4))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(CheckpointError, match="missing|unexpected"):
        load(tmp_path / "other.pth")


def test_a_vae_may_keep_every_frame(tmp_path: Path) -> None:
    """Without strides in time each frame is a latent frame, encoded from those up to it and decoded to one."""
    config = dict(SHAPES["plain"], temperal_downsample=[False] * len(SHAPES["plain"]["temperal_downsample"]))
    AutoencoderKLWan(**config, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).save_config(tmp_path)
    vae = WanVAE.random(tmp_path, device="cpu", dtype=torch.float32, seed=0)
    pixels = torch.rand(1, 5, 3, 16, 24) * 2 - 1
    latents = vae.encode(pixels)
    assert vae.temporal_stride == 1 and latents.shape[1] == 5
    assert_close(vae.encode(pixels[:, :2]), latents[:, :2], rtol=0, atol=1e-5)
    assert vae.stream().decode(latents).shape[1] == 5
