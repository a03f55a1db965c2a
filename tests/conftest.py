"""What test files share: tiny networks with seeded random weights, ways to run them, and a count of the tests."""
from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipeline.chunkwise import ChunkwisePipeline  # noqa: E402
from pipeline.noise import SampleSeed, SeededNoise  # noqa: E402
from pipeline.packets import Packer  # noqa: E402
from pipeline.sampler import FewStepSampler  # noqa: E402
from wan.geometry import VideoGeometry  # noqa: E402
from wan.kv_cache.cache import KVCache  # noqa: E402
from wan.kv_cache.policy import KVPolicy, build_policy  # noqa: E402
from wan.kv_cache.store import CacheShape  # noqa: E402
from wan.model import CausalWanModel, WanConfig, randomize  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give, and sums keep one order

SMALL = WanConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=12, text_len=5, in_dim=3, out_dim=3,
)

EVERY_POLICY = {
    "full": {"policy": "full", "window_frames": 48},
    "rolling": {"policy": "rolling", "window_frames": 12},
    "anchored": {"policy": "anchored", "window_frames": 12, "anchor_frames": 3},
    "naive_sink": {"policy": "sink", "window_frames": 12, "sink_frames": 3, "positions": "original"},
    "deep_sink": {"policy": "sink", "window_frames": 12, "sink_frames": 6},
    "deep_sink_contiguous": {"policy": "sink", "window_frames": 12, "sink_frames": 6, "positions": "contiguous"},
    "averaged_sink": {
        "policy": "sink", "window_frames": 12, "sink_frames": 3, "positions": "contiguous", "sink_decay": 0.8,
    },
    "deep_forcing": {
        "policy": "participative", "window_frames": 12, "sink_frames": 4, "budget_frames": 9, "recent_frames": 4,
    },
    "deep_forcing_unified": {
        "policy": "participative", "window_frames": 12, "sink_frames": 4, "budget_frames": 9, "recent_frames": 4,
        "positions": "unified", "votes": "denoising", "topc_max_reuse": 1,
    },
    "deep_forcing_random": {
        "policy": "participative", "window_frames": 12, "sink_frames": 4, "budget_frames": 9, "recent_frames": 4,
        "positions": "contiguous", "selection": "random",
    },
    "packforcing": {
        "policy": "packforcing", "sink_frames": 3, "recent_frames": 3, "top_chunks": 2, "archive_chunks": 4,
        "space_reduction": 2, "compressor": "kv_pool",
    },
    "packforcing_newest": {
        "policy": "packforcing", "sink_frames": 6, "recent_frames": 6, "top_chunks": 2, "archive_chunks": 5,
        "space_reduction": 1, "compressor": "kv_pool", "selection": "newest", "positions": "original",
    },
    "packforcing_squeezed": {
        "policy": "packforcing", "sink_frames": 3, "recent_frames": 3, "top_chunks": 3, "archive_chunks": 0,
        "space_reduction": 2, "compressor": "kv_pool", "mid_span": "squeeze", "squeeze_frames": 12, "offload": True,
    },
    "packforcing_stream": {
        "policy": "packforcing", "sink_frames": 3, "recent_frames": 3, "top_chunks": 2, "archive_chunks": 4,
        "space_reduction": 2, "compressor": "latent_pool",
    },
}


def policy_of(settings: dict) -> KVPolicy:
    """A policy from what would stand under kv_cache in a YAML."""
    settings = dict(settings)
    return build_policy(settings.pop("policy"), settings)


@dataclass
class Tiny:
    """A small random network, and everything needed to run it."""

    model: CausalWanModel
    geometry: VideoGeometry

    def cache_shape(self, batch: int = 1) -> CacheShape:
        config = self.model.config
        return CacheShape(
            layers=config.num_layers, heads=config.num_heads, head_dim=config.head_dim, batch=batch,
            device=self.model.device, dtype=self.model.dtype,
        )

    def cache(self, policy: KVPolicy, batch: int = 1) -> KVCache:
        return KVCache(self.cache_shape(batch), self.geometry, policy)

    def pipeline(self, policy: KVPolicy, batch: int = 1) -> ChunkwisePipeline:
        sampler = FewStepSampler([1000, 500], shift=5.0, warp=True)
        pipeline = ChunkwisePipeline(self.model, sampler, self.geometry, self.cache(policy, batch))
        return self.with_packer(pipeline, policy)

    def with_packer(self, pipeline: ChunkwisePipeline, policy: KVPolicy) -> ChunkwisePipeline:
        """What compresses chunks, if the policy asks for more than means of keys and values, put into `pipeline`."""
        if policy.compression is not None and policy.compression.compressor == "latent_pool":
            grid = policy.sizes(self.geometry).archive.grid
            pipeline.packer = Packer(self.model, pipeline.cache, grid, policy.compression, context_time=0.0)
        return pipeline

    def text(self, seed: int = 0, batch: int = 1) -> torch.Tensor:
        config = self.model.config
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(
            1, config.text_len, config.text_dim, generator=generator,
        ).expand(batch, -1, -1).to(self.model.dtype)

    def noise(self, *seeds: SampleSeed) -> SeededNoise:
        shape = (self.model.config.in_dim, self.geometry.latent_height, self.geometry.latent_width)
        return SeededNoise(seeds or (SampleSeed(0),), shape, self.model.device)

    def run(self, policy: KVPolicy, frames: int, *, seeds: tuple[SampleSeed, ...] = (SampleSeed(0),), text: int = 0,
            pipeline: ChunkwisePipeline | None = None, initial_latent: torch.Tensor | None = None) -> torch.Tensor:
        """Latents [B, frames, C, h, w] of a whole rollout."""
        pipeline = pipeline or self.pipeline(policy, len(seeds))
        chunks = pipeline(
            self.text(text, len(seeds)), frames, self.noise(*seeds), [s.key() for s in seeds],
            initial_latent=initial_latent,
        )
        return torch.cat([chunk.latents for chunk in chunks], dim=1)


def make_tiny(chunk_frames: int = 3, height: int = 32, width: int = 48, dtype: torch.dtype = torch.float32,
              config: WanConfig = SMALL, independent_first_frame: bool = False) -> Tiny:
    """A seeded random network; weights do not depend on the geometry."""
    model = CausalWanModel(config)
    randomize(model, seed=7)
    geometry = VideoGeometry(
        height=height, width=width, fps=16, chunk_frames=chunk_frames, independent_first_frame=independent_first_frame,
    )
    return Tiny(model.to(dtype).requires_grad_(False), geometry)


@pytest.fixture
def tiny() -> Tiny:
    return make_tiny()


@pytest.fixture(params=EVERY_POLICY, ids=str)
def policy(request: pytest.FixtureRequest) -> KVPolicy:
    """Every policy runs every law of the contract."""
    return policy_of(EVERY_POLICY[request.param])


# --- a test that never ran is no test ---------------------------------------------------------------------

LEAST_TESTS = 1000


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whoever runs the whole suite runs all of it: every file was found, and about as many tests as there are."""
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("lf"):
        files = sorted((ROOT / "tests").rglob("test_*.py"))
        check_collected(files, {item.path for item in items}, len(items), LEAST_TESTS)


def check_collected(files: Collection[Path], found: Collection[Path], count: int, least: int) -> None:
    """Raise UsageError if one of `files` gave no test, or there are fewer than `least` in all."""
    silent = [file.relative_to(ROOT).as_posix() for file in files if file not in found]
    if silent or count < least:
        raise pytest.UsageError(
            f"collected {count} tests, {least} are expected at least; no test in: {', '.join(silent) or 'none'}"
        )
