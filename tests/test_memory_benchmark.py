"""The benchmark of what remembering costs: every part is there, bytes are the cache's own, nothing is disturbed."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks.__main__ import main


@pytest.mark.parametrize("compressor", ["latent_pool", "lr"])
def test_parts_shares_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str], compressor: str) -> None:
    """A network of two small layers, chunks of three: 4 tokens a frame, packets of 2."""
    vae = {"_class_name": "AutoencoderKLWan", "base_dim": 4, "num_res_blocks": 1}  # random weights need no more
    (tmp_path / "config.json").write_text(json.dumps(vae))
    model = tmp_path / "small.yaml"
    model.write_text(
        f"extends: {ROOT / 'configs/models/tiny.yaml'}\nheight: 32\nwidth: 32\nvae: {tmp_path}\n"
        "transformer: {dim: 32, ffn_dim: 32, num_heads: 2, num_layers: 2, freq_dim: 16, text_dim: 8, text_len: 4}\n"
    )
    assert main([
        "memory", "--policy", "packforcing", "--model", str(model), "--device", "cpu", "--seconds", "18",
        "--output", str(tmp_path / "memory.json"), "--set", "kv_cache.space_reduction=2", "kv_cache.top_chunks=3",
        f"kv_cache.compressor={compressor}",
    ]) == 0
    cost = json.loads((tmp_path / "memory.json").read_text())["memory"]
    assert cost["part_ms"].keys() == {"selection", "window", "gather", "packet"}
    assert cost["share"].keys() == {"selection", "window", "rotation", "packet"}
    token = 2 * 32 * 4 * 2  # keys and values, float32, two layers
    assert cost["context_tokens"][-1] == (9 + 3 + 3) * 4 + 3 * 2
    assert cost["nbytes"]["attended"] == (cost["context_tokens"][-1] - 3 * 4) * token
    assert cost["nbytes"]["window"] == cost["context_tokens"][-1] * token
    assert cost["nbytes"]["archive"] == 128 * (2 * token + 2 * 2 * 32 * 4)
    shown = capsys.readouterr().out
    assert all(line in shown for line in ("attended: sink", "window: their rotated", "archive: all packets"))
