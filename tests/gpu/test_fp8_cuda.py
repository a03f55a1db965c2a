"""On a GPU: 8-bit linear layers equal their twins, and compiled graphs of them themselves. Skipped without one."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, make_tiny, policy_of
from test_fp8 import twin
from torch.testing import assert_close

from pipeline.chunkwise import ChunkwisePipeline
from wan.backends import installed, load_backend, sdpa
from wan.compiler import inductor
from wan.fp8 import LEAST_CAPABILITY, Fp8Linear, gelu_quantise, quantise, quantise_layers
from wan.kv_cache.cache import KVCache
from wan.recorder import CudaRecorder

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < LEAST_CAPABILITY,
    reason="needs a CUDA device that multiplies 8-bit floats",
)


@pytest.mark.parametrize("channels", [(1536, 4608), (1536, 8960), (8960, 1536)])
def test_kernel_equals_its_twin(channels: tuple[int, int]) -> None:
    """At the large model's sizes; 2 %: sums are kept in fewer bits on the way, a tenth of it is bf16's own rounding."""
    generator = torch.Generator("cuda").manual_seed(0)
    inside, outside = channels
    x, weight, bias = (
        torch.randn(*shape, device="cuda", generator=generator).bfloat16()
        for shape in ((1, 300, inside), (outside, inside), (outside,))
    )
    layer = Fp8Linear(weight, bias)
    ours, expected = layer(x).float(), twin(layer, x).float()
    assert (ours - expected).norm() / expected.norm() < 0.02
    compiled = torch.compile(layer, fullgraph=True)(x).float()
    assert (compiled - expected).norm() / expected.norm() < 0.02


def test_gelu_kernel_equals_its_twin() -> None:
    """Scales to float32 rounding; values a step of 1/8 apart at most, and that rarely: where rounding is a near tie."""
    generator = torch.Generator("cuda").manual_seed(0)
    product, bias = (
        torch.randn(*shape, device="cuda", generator=generator).bfloat16() for shape in ((300, 8960), (8960,))
    )
    rows, columns = (0.1 + torch.rand(*shape, device="cuda", generator=generator) for shape in ((300, 1), (1, 8960)))
    product *= 5
    ours, scale = gelu_quantise(product, rows, columns, bias)
    theirs, same = quantise(F.gelu(product.float() * (rows * columns) + bias, approximate="tanh"))
    assert ours.dtype == theirs.dtype
    assert_close(scale, same, rtol=1e-5, atol=0)
    assert_close(ours.float(), theirs.float(), rtol=0.126, atol=2.0**-9)
    assert (ours.float() != theirs.float()).float().mean() < 1e-3


def test_compiled_graphs_of_it_equal_compiled_passes_bit_for_bit() -> None:
    """As for exact layers."""
    policy = policy_of({"policy": "rolling", "window_frames": 6})
    tiny = make_tiny(config=replace(SMALL, dim=64, ffn_dim=96), dtype=torch.bfloat16)
    quantise_layers(tiny.model.to("cuda"))
    tiny.model.accelerate(inductor)
    caches = [KVCache(tiny.cache_shape(1), tiny.geometry, policy, compiler=inductor) for _ in range(2)]
    sampler = tiny.pipeline(policy).sampler
    fast = ChunkwisePipeline(tiny.model, sampler, tiny.geometry, caches[0], recorder=CudaRecorder())
    plain = ChunkwisePipeline(tiny.model, sampler, tiny.geometry, caches[1])
    for _ in range(3):
        ours, theirs = (tiny.run(policy, 12, pipeline=pipeline) for pipeline in (fast, plain))
        assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.skipif("fa3" not in installed(), reason="needs fa3-fwd")
@pytest.mark.parametrize("seen", [24_960, 32_760])
def test_attention_in_8_bits_stays_near_exact_attention_of_the_same_bits(seen: int) -> None:
    """8 %: 5 to 6 are measured; sums over all keys at once, the kernel's own choice, would cost 11 to 13."""
    generator, cuda = torch.Generator("cuda").manual_seed(0), torch.device("cuda")
    query, keys, values = (
        torch.randn(1, tokens, 12, 128, device=cuda, generator=generator).to(torch.float8_e4m3fn)
        for tokens in (4680, seen, seen)
    )
    values = (values.float() + 0.3).to(torch.float8_e4m3fn)  # so that the mean, which attention keeps, is not nothing
    ours = load_backend("fa3", cuda, torch.bfloat16, 128)[1](query, keys, values)[:, :256].float()
    exact = sdpa(query[:, :256].float(), keys.float(), values.float())
    assert (ours - exact).norm() / exact.norm() < 0.08
