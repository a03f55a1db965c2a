"""Linear layers in 8-bit floats: how far they are from exact ones, and that only the declared layers change."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import SMALL, make_tiny, policy_of
from torch import Tensor
from torch.testing import assert_close

from benchmarks.exactness import EXACT, REFERENCE, compare_latents
from benchmarks.settings import Setting
from benchmarks.subject import Subject
from pipeline import memory
from pipeline.acceleration import Acceleration
from utils.config import ConfigError
from wan.fp8 import FP8, LAYERS, MOST, Fp8Linear, quantise, quantise_layers

CPU = torch.device("cpu")
WIDE = replace(SMALL, dim=64, ffn_dim=96)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def twin(layer: Fp8Linear, x: Tensor) -> Tensor:
    """What the layer computes, by a float32 product of the rounded numbers."""
    values, scale = quantise(x.flatten(0, -2))
    product = (values.float() * scale) @ (layer.weight.float() * layer.scale.t()).t() + layer.bias.float()
    return product.to(x.dtype).unflatten(0, x.shape[:-1])


def test_quantised_rows_are_near_and_stand_alone() -> None:
    """Three bits of mantissa: within 1/16 of each value, or half the least step of the row's scale. Rows of zeros stay
    zeros, a row's scale is its own, and powers of two change nothing but scales.
    """
    x = random(40, 64) * torch.logspace(-6, 6, 40).unsqueeze(1)
    x[7] = 0
    values, scale = quantise(x)
    assert values.dtype == FP8 and scale.shape == (40, 1)
    error = (values.float() * scale - x).abs()
    assert (error <= x.abs() / 16 + scale * 2.0**-10).all()
    assert (values.float().abs().amax(dim=1)[x.abs().amax(dim=1) > 0] == MOST).all() and not values[7].float().any()
    others = x.clone()
    others[3] *= 1e9
    assert torch.equal(quantise(others)[0][4:].float(), values[4:].float())
    doubled, twice = quantise(8 * x)
    assert torch.equal(doubled.float(), values.float()) and torch.equal(twice[8:], 8 * scale[8:])


def test_a_layer_equals_its_twin_and_is_near_the_exact_one() -> None:
    """The kernel against a float32 product of the same rounded numbers, to bf16 rounding of sums of 64; against exact:
    two independent errors of some 2.6 % each.
    """
    x, weight, bias = random(2, 30, 64).bfloat16(), random(48, 64, seed=1).bfloat16(), random(48, seed=2).bfloat16()
    layer = Fp8Linear(weight, bias)
    ours = layer(x)
    assert ours.dtype == torch.bfloat16 and ours.shape == (2, 30, 48)
    assert_close(ours, twin(layer, x), rtol=2.0**-7, atol=2.0**-7 * 8)
    exact = x.float() @ weight.float().t() + bias.float()
    error = (ours.float() - exact).norm() / exact.norm()
    assert 0.01 < error < 0.05
    with pytest.raises(ValueError, match="multiples of 16"):
        Fp8Linear(weight[:40], bias[:40])
    with pytest.raises(ValueError, match="float32"):
        Fp8Linear(weight.float(), bias)


def test_declared_layers_change_and_no_others() -> None:
    """Names, types, once and again; q, k and v are gone, so that nothing is held twice."""
    model = make_tiny(config=WIDE, dtype=torch.bfloat16).model
    before = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    size = sum(p.nbytes for p in model.blocks.parameters())
    quantise_layers(model)
    quantise_layers(model)
    Acceleration.eager().prepare(model)
    eight = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert eight == {f"blocks.{i}.{name}" for i in range(2) for name in LAYERS}
    after = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    joined = {f"blocks.{i}.self_attn.{name}" for i in range(2) for name in "qkv"}
    assert after == before - eight - joined
    assert sum(x.nbytes for x in [*model.blocks.parameters(), *model.blocks.buffers()]) < 0.7 * size


def test_a_block_is_one_graph_for_a_compiler() -> None:
    """Quantising breaks no graph, so that a compiler can fuse it with what made the activations."""
    tiny = make_tiny(config=WIDE, dtype=torch.bfloat16)
    policy = policy_of({"policy": "rolling", "window_frames": 6})
    quantise_layers(tiny.model)
    plain = tiny.run(policy, 6)

    def traced(function, *, dynamic: bool = False):
        return torch.compile(function, fullgraph=True, backend="eager")

    tiny.model.accelerate(traced)
    assert torch.equal(tiny.run(policy, 6), plain)


def test_error_is_reported_chunk_by_chunk_from_a_common_state() -> None:
    """The tiny model in bf16: 8-bit layers are further from float32 than bf16 is, and not far."""
    base = Setting(
        policy="self_forcing", model="tiny", dtype="bfloat16", resolution="32x32",
        overrides=("kv_cache.window_frames=6", "denoising_step_list=[1000,500]"),
    )
    settings = {REFERENCE: base, "fp8": replace(base, fp8="on"), EXACT: replace(base, dtype="float32")}
    subjects = {name: Subject(setting, setting.plan(CPU)) for name, setting in settings.items()}
    assert subjects["fp8"].plan.settings() == subjects[REFERENCE].plan.settings() | {"fp8": True}
    rows = compare_latents(subjects.pop(REFERENCE), subjects, seconds=1.0, every=1)
    rough, fine = (rows[f"{name} against {EXACT}"] for name in ("fp8", REFERENCE))
    assert rough.all_finite and len(rough.chunks) == len(fine.chunks) > 1
    assert 2 * fine.relative_error_median < rough.relative_error_median < 0.2


def test_less_memory_by_estimate() -> None:
    """The 1.3B model: most of its weights take half."""
    plan = Setting(model="wan2.1_t2v_1.3b", dtype="bfloat16").plan(CPU)
    eight = replace(plan, acceleration=replace(plan.acceleration, fp8=True))
    sizes = [memory._fixed_bytes(p, 1)["transformer"] for p in (plan, eight)]
    assert 0.5 < sizes[1] / sizes[0] < 0.6


def test_refused_where_it_cannot_be() -> None:
    """float32 is no dtype for it."""
    with pytest.raises(ConfigError, match="fp8 needs bfloat16.* leave fp8 out"):
        Setting(model="tiny", fp8="on").plan(CPU)
