"""A prompt gives the same video, byte for byte, wherever and beside whatever it is made."""
from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from PIL import Image

from end_to_end.runs import PROMPTS, PRUNED, CommandLine, is_whole, manifest, videos
from inference import make_plan, parse_arguments
from pipeline.engine import Engine, VideoRequest
from pipeline.noise import SampleSeed
from utils.launch import Launch, wait_for_others

GEOMETRIES = {
    "wide": [],
    "tall_frame_by_frame": ["--config_path", "configs/framewise.yaml", "--set", "height=64", "width=32"],
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_list_equals_single_and_fresh_process(cli: CommandLine, geometry: str):
    """The second prompt of a list equals the same prompt alone, here and in a fresh process."""
    options = [*PRUNED, *GEOMETRIES[geometry]]
    assert cli("--data_path", cli.prompts(*PROMPTS), *options, out="list") == 0
    assert cli("--prompt", PROMPTS[1], *options, out="single") == 0
    assert cli.fresh("--prompt", PROMPTS[1], *options, out="fresh") == 0
    together = videos(cli.folder / "list")
    [(stem, alone)] = videos(cli.folder / "single").items()
    assert len(set(together.values())) == len(PROMPTS)
    assert together[stem] == alone
    assert videos(cli.folder / "fresh") == {stem: alone}


def test_two_ranks_equal_one_process(cli: CommandLine):
    """torchrun: none lost, none repeated, the same bytes; one failed video costs no other one."""
    Image.new("RGB", (60, 40), "red").save(cli.folder / "red.png")
    (cli.folder / "broken.png").write_bytes(b"no image")
    sources = ["red", "red", "broken", "red"]
    lines = [json.dumps({"prompt": f"{PROMPTS[0]} {i}", "image": f"{source}.png"}) for i, source in enumerate(sources)]
    options = ["--i2v", "--data_path", cli.prompts(*lines, name="prompts.jsonl"), "--num_output_frames", 31]
    assert cli(*options, out="one") == 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(ROOT / "inference.py"), *cli.arguments(*options, out="two")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1, result.stderr
    assert is_whole(cli.folder / "two", 3)
    assert videos(cli.folder / "two") == videos(cli.folder / "one")
    for out in ("one", "two"):
        told = sorted((line["prompt"][-1], line["status"]) for line in manifest(cli.folder / out))
        assert told == [(str(i), "failed" if s == "broken" else "complete") for i, s in enumerate(sources)]


def test_failed_rank_waits_for_the_others(monkeypatch: pytest.MonkeyPatch):
    """torchrun stops everything when one process ends with a failure, so that process must end last."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "RANK": 0, "WORLD_SIZE": 2,
        "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    waiting = threading.Thread(target=wait_for_others, args=(Launch(0, 2, 0),), kwargs={"failed": True}, daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    wait_for_others(Launch(1, 2, 1), failed=False)
    waiting.join(20)
    assert not waiting.is_alive()


@pytest.mark.parametrize("ranks", [3, 5])
def test_ranks_share_unevenly(cli: CommandLine, ranks: int):
    """Samples are shared out as prompts are; a rank without work ends well."""
    options = ["--data_path", cli.prompts(*PROMPTS[:2]), "--num_samples", 2, "--num_output_frames", 3]
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        assert cli.fresh(*options, environment=place, out="shared") == 0
    assert cli(*options, out="one") == 0
    assert videos(cli.folder / "shared") == videos(cli.folder / "one")
    assert len(manifest(cli.folder / "shared")) == 4


def test_resumed_equals_whole(cli: CommandLine):
    """A list made in two goes equals one made in one, and what was finished is not made again."""
    assert cli("--data_path", cli.prompts(*PROMPTS), *PRUNED, out="whole") == 0
    assert cli("--data_path", cli.prompts(*PROMPTS[:2], name="first.txt"), *PRUNED, out="parts") == 0
    before = {file: file.stat().st_mtime_ns for file in (cli.folder / "parts").glob("*.mp4")}
    assert cli("--data_path", cli.prompts(*PROMPTS), *PRUNED, out="parts") == 0
    assert videos(cli.folder / "parts") == videos(cli.folder / "whole")
    assert all(file.stat().st_mtime_ns == made for file, made in before.items())
    assert len(manifest(cli.folder / "parts")) == len(PROMPTS)


# --- latents ----------------------------------------------------------------------------------------------

def latents(engine: Engine, prompts: list[str], frames: int, seeds: list[SampleSeed] | None = None) -> torch.Tensor:
    """[B, frames, C, h, w] of a batch."""
    seeds = seeds or [SampleSeed(1)] * len(prompts)
    requests = [VideoRequest(text, seed) for text, seed in zip(prompts, seeds, strict=True)]
    return torch.cat([chunk.latents for chunk in engine.stream(requests, frames)], dim=1)


def engine_of(cli: CommandLine, *arguments: str) -> Engine:
    options = parse_arguments(cli.arguments(*arguments))
    engine = Engine(make_plan(options, Launch(0, 1, 0)))
    engine.prepare(PROMPTS)
    return engine


def test_latents_know_nothing_of_their_neighbours(cli: CommandLine):
    """Alone, after others, and at any place of a batch: the same latents; another sample gives others."""
    a, b, c = PROMPTS
    engine = engine_of(cli)
    latents(engine, [a], 30)
    alone = latents(engine, [b], 30)
    assert torch.equal(alone, latents(engine_of(cli), [b], 30))
    pair = latents(engine, [a, b], 30)
    assert torch.equal(pair[1:], latents(engine, [c, b], 30)[1:])
    assert torch.equal(pair[1:], latents(engine, [b, a], 30)[:1])
    assert (pair[1:] - alone).abs().max() < 1e-5
    assert (latents(engine, [b], 30, [SampleSeed(1, sample=1)]) - alone).abs().max() > 0.1


def test_longer_video_begins_with_the_shorter(cli: CommandLine):
    """Length is no input of the first frames."""
    engine = engine_of(cli)
    assert torch.equal(latents(engine, PROMPTS[:1], 33)[:, :24], latents(engine, PROMPTS[:1], 24))


def test_stream_left_early_leaves_no_trace(cli: CommandLine):
    """A video abandoned in the middle is invisible to the next one."""
    engine = engine_of(cli)
    next(engine.stream([VideoRequest(PROMPTS[0], SampleSeed(9))], 30))
    assert torch.equal(latents(engine, PROMPTS[1:2], 24), latents(engine_of(cli), PROMPTS[1:2], 24))
