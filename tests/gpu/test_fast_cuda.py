"""On a GPU: what makes it fast computes the same. Skipped without one."""
from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY_POLICY, make_tiny, policy_of
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.testing import assert_close

from pipeline.chunkwise import ChunkwisePipeline
from pipeline.noise import SampleSeed
from wan import stacking
from wan.backends import installed, load_backend, sdpa
from wan.compiler import Compiler, inductor, plain
from wan.kv_cache.cache import KVCache
from wan.kv_cache.layer import stage_and_show
from wan.kv_cache.window import gather_turned
from wan.model import linear_gelu
from wan.recorder import CudaRecorder
from wan.rope import Turn
from wan.vae import WanVAE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FRAMES = 30
CUDA = torch.device("cuda")
ROOT = Path(__file__).parents[2]


def pair(name: str, compiler: Compiler, dtype: torch.dtype = torch.bfloat16):
    """A pipeline that replays and one that does not, of the same kernels, and what both run on."""
    tiny = make_tiny(dtype=dtype)
    tiny.model.to(CUDA).accelerate(compiler)
    caches = [
        KVCache(tiny.cache_shape(1), tiny.geometry, policy_of(EVERY_POLICY[name]), compiler=compiler) for _ in range(2)
    ]
    common = tiny.pipeline(policy_of(EVERY_POLICY[name]))
    parts = (common.model, common.sampler, common.geometry)
    pipelines = ChunkwisePipeline(*parts, caches[0], recorder=CudaRecorder()), ChunkwisePipeline(*parts, caches[1])
    return tiny, *(tiny.with_packer(pipeline, policy_of(EVERY_POLICY[name])) for pipeline in pipelines)


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_graphs_equal_eager_bit_for_bit(name: str) -> None:
    """Three videos: filling, first and second sight of a graph, and replays of all."""
    tiny, fast, eager = pair(name, plain)
    policy = policy_of(EVERY_POLICY[name])
    for seed in range(3):
        ours, theirs = (
            tiny.run(policy, FRAMES, seeds=(SampleSeed(seed),), text=seed, pipeline=pipeline)
            for pipeline in (fast, eager)
        )
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", sorted(EVERY_POLICY.keys() - {"full"}))
def test_graphs_continue_sources_of_several_windows(name: str) -> None:
    """A given chunk is planned by its context pass, a generated one by denoising; both kinds of video take turns."""
    tiny, fast, eager = pair(name, plain)
    for seed, frames in enumerate((30, 12, 0, 18, 30)):
        given = torch.randn(1, frames, 3, 4, 6, generator=torch.Generator().manual_seed(seed)) if frames else None
        ours, theirs = (
            tiny.run(policy_of(EVERY_POLICY[name]), 45, pipeline=pipeline, initial_latent=given)
            for pipeline in (fast, eager)
        )
        assert torch.equal(ours, theirs)


def test_replays_do_not_wait_for_the_device() -> None:
    """Sync debug mode "error" over a whole video of replays."""
    tiny, fast, _ = pair("deep_forcing", plain)
    policy, text, noise = policy_of(EVERY_POLICY["deep_forcing"]), fast.model.embed_text(tiny.text()), tiny.noise()
    for _ in range(2):
        tiny.run(policy, FRAMES, pipeline=fast)
    fast.cache.reset([0])
    for span in tiny.geometry.chunks(FRAMES):
        torch.cuda.set_sync_debug_mode("error")
        try:
            latents = fast.denoise(span, text, noise)
            fast.remember(latents, text)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert latents.isfinite().all()


@pytest.mark.parametrize("name", sorted(installed()))
def test_attention_kernels_agree(name: str) -> None:
    """bf16 at the large model's head size, with few keys and with many; 2e-2: values are about 1, rounded to 8 bits."""
    generator = torch.Generator(CUDA).manual_seed(0)
    try:
        backend = load_backend(name, CUDA, torch.bfloat16, 128)[1]
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    for clips, queries, heads, seen in ((1, 300, 3, 300), (1, 300, 3, 9000), (2, 1560, 12, 9000)):
        query, keys, values = (
            torch.randn(clips, n, heads, 128, device=CUDA, dtype=torch.bfloat16, generator=generator)
            for n in (queries, seen, seen)
        )
        expected = sdpa(query.float(), keys.float(), values.float())
        assert_close(backend(query, keys, values).float(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("channels", [20, 96, 384])
@pytest.mark.parametrize("full", [False, True])
def test_stacking_kernels_equal_their_plain_twins(channels: int, full: bool) -> None:
    """float32, so that only the order of sums differs."""
    triton = stacking.load_kernels(CUDA)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=CUDA, generator=generator)

    generator = torch.Generator(CUDA).manual_seed(channels)
    size = (2, 3, 6, 10)
    value = stacking.Sum(random(*size, channels))
    if full:
        value = stacking.Sum(value.x, random(channels), random(*size, channels))
    gamma = random(channels) if full else None
    pasts = [random(2, 2, 6, 10, channels)]
    pasts.append(pasts[0].clone())
    expected = stacking.stack(value, gamma, pasts[1])
    own = stacking.Sum(value.x.clone(), value.bias, value.shortcut)  # the kernel settles in place
    for ours, theirs in zip(triton.stack(own, gamma, pasts[0]), expected, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert_close(*pasts, rtol=0, atol=1e-5)
    for times in (1, 2):
        assert_close(triton.spread(value, times), stacking.spread(value, times), rtol=0, atol=1e-6)


def test_fast_decoder_equals_plain_passes_and_its_graphs_itself() -> None:
    """bf16: within three times the plain passes' own distance from float32; graphs bit for bit."""
    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=32, num_res_blocks=1).to(CUDA)
    exact, slow, fast, graphs = (WanVAE(AutoencoderKLWan.from_config(model.config).to(CUDA)) for _ in range(4))
    for vae in (exact, slow, fast, graphs):
        vae._model.load_state_dict(model.state_dict())
        vae._model.to(torch.float32 if vae is exact else torch.bfloat16)
    fast.accelerate(None, part_frames=3)
    graphs.accelerate(CudaRecorder(), part_frames=3)
    for seed in range(3):
        latents = torch.randn(1, 12, 16, 8, 12, generator=torch.Generator().manual_seed(seed)).to(CUDA)
        made = []
        for vae in (exact, slow, fast, graphs):
            stream = vae.stream()
            made.append(torch.cat([stream.decode(part) for part in latents.split(3, dim=1)], dim=1))
        assert torch.equal(made[2], made[3])
        error, own = ((x - made[0]).norm() / made[0].norm() for x in (made[2], made[1]))
        assert error < 3 * own + 1e-3, (error.item(), own.item())


def test_compiled_graphs_equal_compiled_eager_bit_for_bit() -> None:
    """The same with what torch.compile makes."""
    tiny, fast, eager = pair("deep_forcing", inductor)
    policy = policy_of(EVERY_POLICY["deep_forcing"])
    for _ in range(3):
        assert torch.equal(*(tiny.run(policy, FRAMES, pipeline=pipeline) for pipeline in (fast, eager)))


def test_compiled_passes_equal_plain_ones() -> None:
    """float32; 1e-4: sums are ordered differently, and a rollout of ten chunks carries it on."""
    policy = policy_of(EVERY_POLICY["deep_forcing"])
    tiny, fast, _ = pair("deep_forcing", inductor, torch.float32)
    other = make_tiny()
    other.model.to(CUDA)
    assert_close(tiny.run(policy, FRAMES, pipeline=fast), other.run(policy, FRAMES), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("clips", "frames", "frame_tokens", "heads", "dim"), [(1, 3, 1560, 12, 128), (2, 2, 7, 3, 12)])
def test_staging_kernel_equals_plain(
    clips: int, frames: int, frame_tokens: int, heads: int, dim: int, dtype: torch.dtype,
) -> None:
    """Whole tiles and ragged ones, with votes and without. A step of the dtype apart at most: products may be fused."""
    staging_triton = import_module("wan.kv_cache.staging_triton")  # Triton is there where CUDA is
    generator, tokens = torch.Generator(CUDA).manual_seed(0), frames * frame_tokens

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=CUDA)

    joint = random(clips, tokens, 3, heads, dim).bfloat16()
    query, keys, values = joint[:, :, 0].contiguous(), joint[:, :, 1].contiguous(), joint[:, :, 2]
    space, by = (Turn(*(random(tokens, 1, dim) for _ in range(2))) for _ in range(2))
    for voting in (frames, 0):
        results = []
        for function in (stage_and_show, staging_triton.stage_and_show):
            stored = torch.zeros(2, clips, tokens + 5, heads, dim, device=CUDA, dtype=torch.bfloat16)
            seen = torch.zeros(2, clips, tokens + 9, heads, dim, device=CUDA).to(dtype)
            places = (tuple(stored[:, :, 2:2 + tokens]), tuple(seen[:, :, 4:4 + tokens]))
            sums, shown = function(query, keys, values, space, by, *places, voting)
            assert (sums is None) is (voting == 0) and shown.dtype == dtype
            results.append((stored.float(), seen.float(), shown.float(), *([] if sums is None else [sums])))
        step = torch.finfo(dtype).eps
        for ours, theirs, rtol in zip(*results, (2.0**-7, step, step, 2.0**-7), strict=False):
            assert_close(ours, theirs, rtol=rtol, atol=2.0**-6 * theirs.abs().max().item() * rtol)


@pytest.mark.parametrize(("stored", "seen"), [("bfloat16",) * 2, ("float32", "bfloat16"), ("float8_e4m3fn",) * 2])
@pytest.mark.parametrize(("clips", "heads", "dim", "time"), [
    (1, 12, 128, 44), (2, 3, 12, 4), (1, 12, 128, 0), (2, 3, 12, 0),
])
def test_gathering_kernel_equals_plain(clips: int, heads: int, dim: int, time: int, stored: str, seen: str) -> None:
    """Values bit for bit, and keys that are not turned; others a step of the dtype apart at most, since products may
    be fused. Nothing else is written."""
    staging_triton = import_module("wan.kv_cache.staging_triton")  # Triton is there where CUDA is
    generator, tokens = torch.Generator(CUDA).manual_seed(0), 77

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=CUDA)

    keys, values = random(2, clips, 200, heads, dim).to(getattr(torch, stored))
    slots = torch.stack([torch.randperm(200, generator=generator, device=CUDA)[:tokens] for _ in range(clips)])
    by = Turn(*(random(clips, tokens, 1, time) if time else random(1, 1, 1, 0) for _ in range(2)))
    windows = []
    for function in (gather_turned, staging_triton.gather_turned):
        window = torch.zeros(2, clips, tokens + 9, heads, dim, device=CUDA).to(getattr(torch, seen))
        function(keys, values, slots, by, *window[:, :, 4:4 + tokens])
        windows.append(window.float())
    ours, theirs = windows
    assert torch.equal(ours[1], theirs[1]) and (time or torch.equal(ours[0], theirs[0]))
    step = torch.finfo(getattr(torch, seen)).eps
    assert_close(ours[0], theirs[0], rtol=step, atol=2.0**-6 * theirs[0].abs().max().item() * step)


def test_linear_and_gelu_in_one_kernel_are_nearer_to_float32() -> None:
    """One rounding instead of two."""
    generator = torch.Generator(CUDA).manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, device=CUDA, generator=generator).bfloat16()
        for shape in ((2, 300, 256), (512, 256), (512,))
    )
    weight *= 256**-0.5
    exact = F.gelu(F.linear(x.float(), weight.float(), bias.float()), approximate="tanh")
    one, two = linear_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias), approximate="tanh")
    assert one.shape == two.shape and one.dtype == two.dtype
    assert (one - exact).norm() < (two - exact).norm() < 0.01 * exact.norm()


def test_torch_prefers_the_same_kernels_whoever_called_it_first() -> None:
    """In processes of their own: torch orders its kernels once, at its first call."""
    program = (
        "import sys, torch; from wan.backends import cudnn, sdpa; "
        "x = torch.ones(1, 2, 1, 64, device='cuda', dtype=torch.bfloat16); "
        "locals()[sys.argv[1]](x, x, x); sdpa(x, x, x); print(torch._C._get_sdp_priority_order())"
    )
    orders = {
        subprocess.run([sys.executable, "-c", program, first], cwd=ROOT, capture_output=True, check=True).stdout
        for first in ("cudnn", "sdpa")
    }
    assert len(orders) == 1
