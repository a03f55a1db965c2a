"""The benchmark of what remembering costs: every part is there, bytes are the cache's own, nothing is disturbed."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from pytest import approx

from benchmarks.__main__ import main
from benchmarks.clock import HostClock
from benchmarks.memory import MemoryCost, memory_parts
from benchmarks.report import memory_table
from benchmarks.settings import Setting
from benchmarks.subject import Subject
from benchmarks.summary import Spread
from wan.kv_cache.store import take
from wan.rope import axis_channels


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A network of two small layers, 4 tokens a frame."""
    vae = {"_class_name": "AutoencoderKLWan", "base_dim": 4, "num_res_blocks": 1}  # random weights need no more
    (tmp_path / "config.json").write_text(json.dumps(vae))
    path = tmp_path / "small.yaml"
    path.write_text(
        f"extends: {ROOT / 'configs/models/tiny.yaml'}\nheight: 32\nwidth: 32\nvae: {tmp_path}\n"
        "transformer: {dim: 32, ffn_dim: 32, num_heads: 2, num_layers: 2, freq_dim: 16, text_dim: 8, text_len: 4}\n"
    )
    return str(path)


def run(tmp_path: Path, model: str, *settings: str) -> dict:
    """The JSON's numbers for PackForcing with packets of two tokens."""
    assert main([
        "memory", "--policy", "packforcing", "--model", model, "--device", "cpu", "--seconds", "18",
        "--output", str(tmp_path / "memory.json"), "--set", "kv_cache.space_reduction=2", "kv_cache.top_chunks=3",
        *settings,
    ]) == 0
    return json.loads((tmp_path / "memory.json").read_text())["memory"]


@pytest.mark.parametrize("compressor", ["latent_pool", "lr"])
def test_parts_shares_and_bytes(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], compressor: str,
) -> None:
    """Chunks of three: 4 tokens a frame, packets of 2."""
    cost = run(tmp_path, model, f"kv_cache.compressor={compressor}")
    assert cost["part_ms"].keys() == {"selection", "window", "gather", "packet"}
    assert cost["share"].keys() == {"selection", "window", "rotation", "packet"}
    ms = {name: spread["median"] for name, spread in cost["part_ms"].items()}
    ms["rotation"] = ms["window"] - ms["gather"]
    assert {name: share * cost["chunk_ms"]["median"] for name, share in cost["share"].items()} == approx(
        {name: value for name, value in ms.items() if name != "gather"},
    )
    token = 2 * 32 * 4 * 2  # keys and values, float32, two layers
    assert cost["context_tokens"][-1] == (9 + 3 + 3) * 4 + 3 * 2
    assert cost["nbytes"]["attended"] == (cost["context_tokens"][-1] - 3 * 4) * token
    assert cost["nbytes"]["window"] == cost["context_tokens"][-1] * token
    assert cost["nbytes"]["archive"] == 128 * (2 * token + 2 * 2 * 32 * 4)
    assert cost["archive_bytes"] == {"0": cost["nbytes"]["archive"]} and not cost["archive_on_host"]
    shown = capsys.readouterr().out
    assert all(line in shown for line in ("attended: sink", "window: their rotated", "archive: all packets"))
    assert "growths" not in shown and "host memory" not in shown


def test_growth_of_an_archive_without_limit(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four places, twice doubled while the window fills in the warm-up, and once more by chunk 16 of 25."""
    monkeypatch.setattr("wan.kv_cache.archive.FIRST_PLACES", 4)
    monkeypatch.setattr("benchmarks.memory.first_and_last_minute", lambda *_: (2.0, 3.0))
    cost = run(tmp_path, model, "kv_cache.archive_chunks=0", "kv_cache.compressor=kv_pool")
    packet = 2 * (2 * 32 * 4 * 2) + 2 * 2 * 32 * 4
    assert cost["archive_bytes"] == {"0": 16 * packet, "16": 32 * packet}
    assert cost["nbytes"]["archive"] == 32 * packet
    assert cost["last_over_first"] == 1.5
    shown = capsys.readouterr().out
    assert "archive: 0.000 GB at first, 0.000 GB at the end, 2.0 times as much; growths: 1, at chunk 16" in shown


def test_an_offloaded_archive_is_named() -> None:
    """Its keys and values take no device memory, and the table says so."""
    spread = Spread.of([1.0])
    cost = MemoryCost(
        context_tokens=(1,), chunk_ms=spread, last_over_first=1.0, part_ms={}, share={"rotation": 0.0},
        nbytes={"attended": 1, "window": 1, "archive": 5 * 10**9},
        archive_bytes={0: 10**9, 64: 2 * 10**9, 128: 5 * 10**9}, archive_on_host=True, allocated_gib=None,
    )
    shown = memory_table(cost)
    assert "5.000 GB  archive, in host memory but for the sums of its keys: all packets" in shown
    assert "archive: 1.000 GB at first, 5.000 GB at the end, 5.0 times as much; growths: 2, at chunk 64, 128" in shown
    assert "host memory" not in memory_table(replace(cost, archive_on_host=False))


@pytest.mark.parametrize("policy", ["deep_forcing", "packforcing", "reward_forcing", "packforcing original"])
def test_a_gather_is_a_window_whose_keys_are_not_turned(model: str, policy: str) -> None:
    """Of what is attended to, averages included; building the window again gives the same bits as before."""
    name, _, original = policy.partition(" ")
    packed = ["kv_cache.compressor=kv_pool", "kv_cache.space_reduction=2", "kv_cache.top_chunks=3"]
    where_born = ["kv_cache.positions=original", "kv_cache.mid_span=block"] if original else []
    overrides = packed + where_born if name == "packforcing" else []
    setting = Setting(policy=name, model=model, overrides=tuple(overrides))
    subject = Subject(setting, setting.plan(torch.device("cpu")))
    layers = [subject.pipeline.cache.layer(index) for index in range(2)]
    subject.count("dit")
    subject.start(3 * 12)
    for _ in range(11):
        subject.advance(HostClock())
    parts = memory_parts(subject, layers, subject.denoise())
    seen = [[x.clone() for x in layer.window.slots(0, layer.past_tokens)] for layer in layers]
    parts["gather"]()
    for layer, (turned, values) in zip(layers, seen, strict=True):
        plan, time = layer.plan, axis_channels(16)[0]
        stored = [take(x, plan.attend) for x in (layer.store.keys, layer.store.values)]
        if plan.packets is not None:
            slots, _ = layer.archive.tokens_of(plan)
            packets = (take(x.flatten(1, 2), slots) for x in (layer.archive.keys, layer.archive.values))
            stored = [torch.cat(pair, dim=1) for pair in zip(stored, packets, strict=True)]
        if plan.absorbed is not None:
            for mine, average in zip(stored, layer.average.after(layer.store, plan), strict=True):
                mine[:, :average.shape[1]] = average
        keys = layer.window.slots(0, layer.past_tokens)[0]
        assert torch.equal(keys, stored[0]) and torch.equal(values, stored[1])
        assert torch.equal(keys[..., time:], turned[..., time:]) and not torch.equal(keys, turned)
    parts["window"]()
    for layer, before in zip(layers, seen, strict=True):
        assert all(map(torch.equal, layer.window.slots(0, layer.past_tokens), before))
