"""The network's shape, and that nothing in it knows a size."""
from __future__ import annotations

import pytest
import torch
from conftest import EVERY_POLICY, SMALL, make_tiny, policy_of
from torch.testing import assert_close

from wan.model import CausalWanModel, WanConfig, timestep_embedding

WAN_1_3B = WanConfig(
    dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, freq_dim=256, text_dim=4096, text_len=512,
    in_dim=16, out_dim=16,
)


def test_the_1_3b_model_is_wan() -> None:
    """825 tensors, 1,418,996,800 parameters, as in Wan2.1-T2V-1.3B's own file."""
    with torch.device("meta"):
        state = CausalWanModel(WAN_1_3B).state_dict()
    assert len(state) == 825
    assert sum(tensor.numel() for tensor in state.values()) == 1_418_996_800
    assert tuple(state["blocks.29.cross_attn.norm_k.weight"].shape) == (1536,)


@pytest.mark.parametrize("chunk_frames", [1, 2, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(16, 48), (64, 32)])
@pytest.mark.parametrize("name", ["rolling", "deep_sink"])
def test_nothing_hard_codes_a_size(chunk_frames: int, height: int, width: int, name: str) -> None:
    """Two geometries, four chunk sizes: finite latents of the right shape, past the window."""
    tiny = make_tiny(chunk_frames, height, width)
    frames = tiny.geometry.whole_chunks(20)
    latents = tiny.run(policy_of(EVERY_POLICY[name]), frames)
    assert latents.shape == (1, frames, SMALL.in_dim, height // 8, width // 8)
    assert latents.isfinite().all()


def test_patches_equal_the_convolution() -> None:
    """Patch embedding as a matrix product is the Conv3d that its weights belong to; unpatchify is its inverse."""
    model = make_tiny().model
    x = torch.randn(1, 3, SMALL.in_dim, 4, 6)
    expected = model.patch_embedding(x.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)
    assert_close(model.patchify(x), expected, rtol=0, atol=1e-5)
    tokens = x.unflatten(-1, (3, 2)).unflatten(3, (2, 2)).permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(2, 3)
    assert torch.equal(model._unpatchify(tokens, torch.Size((4, 6))), x)


def test_timesteps_are_exact() -> None:
    """Angles in float64: 937.5 and its float32 neighbour differ where the embedding says so, and cosines come first."""
    embedding = timestep_embedding(torch.tensor([[0.0, 937.5]]), 8, torch.float64)
    assert torch.equal(embedding[0, 0], torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float64))
    expected = torch.tensor([937.5 * 10_000 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    assert_close(embedding[0, 1], torch.cat([expected.cos(), expected.sin()]), rtol=0, atol=1e-12)


def test_padding_of_the_prompt_matters() -> None:
    """Cross-attention attends to all text positions, zeros included, as the model was trained."""
    tiny = make_tiny()
    policy = policy_of(EVERY_POLICY["rolling"])
    plain = tiny.run(policy, 3)
    tiny.text = lambda seed, batch: torch.cat([make_tiny().text(0)[:, :-1], torch.zeros(1, 1, SMALL.text_dim)], dim=1)
    assert (tiny.run(policy, 3) - plain).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dim": 33}, "even head size"), ({"freq_dim": 33}, "=33 even"), ({"patch_size": (2, 2, 2)}, "patch_size")],
)
def test_bad_architectures_are_refused(changes: dict, message: str) -> None:
    """Sizes that cannot be built say so."""
    sizes = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        WanConfig(**(sizes | changes))


def test_wrong_text_is_refused() -> None:
    """Embeddings of another encoder do not reach the blocks."""
    with pytest.raises(ValueError, match=r"the model needs \[batch, 5, 12\]"):
        make_tiny().model.embed_text(torch.zeros(1, 5, 13))
