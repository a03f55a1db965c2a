"""Every method of configs/ through one command line: same files, same records, same resume."""
from __future__ import annotations

import torch
from conftest import ROOT

from end_to_end.runs import PROMPTS, CommandLine, is_whole, record, videos
from inference import make_plan, parse_arguments
from pipeline.engine import Engine, VideoRequest
from pipeline.noise import SampleSeed
from utils.launch import Launch
from wan.stream import to_uint8

CLIPS = ["--config_path", "configs/causvid.yaml"]
JOINT = ["--config_path", "configs/rolling_forcing.yaml"]
LARGER = ["--set", "height=64", "width=64"]  # room for every method's tokens


def test_every_method_makes_a_video_and_resumes(cli: CommandLine, caplog) -> None:
    """Each YAML of configs/ makes a whole video with its record; the same command again finds it finished."""
    methods = sorted((ROOT / "configs").glob("*.yaml"))
    for path in methods:
        command = ["--config_path", path, "--prompt", PROMPTS[0], "--num_output_frames", 9, *LARGER]
        assert cli(*command, out=path.stem) == 0
        assert is_whole(cli.folder / path.stem, 1)
        [stem] = videos(cli.folder / path.stem)
        made = record(cli.folder / path.stem, stem)
        assert made["settings"]["config"]["kv_cache"]["policy"] and made["pixel_frames"] == 33
        caplog.clear()
        assert cli(*command, out=path.stem) == 0
        assert "1 of 1 videos are finished already" in caplog.text
    assert len(methods) >= 9


def test_joint_and_overlapping_videos_are_the_same_everywhere(cli: CommandLine) -> None:
    """A prompt of a list equals the prompt alone, for the loops that keep more than a cache between chunks."""
    for name, flags in (("joint", [*JOINT, "--num_output_frames", 24]), ("clips", [*CLIPS, "--seconds", 5.2])):
        assert cli("--data_path", cli.prompts(*PROMPTS[:2]), *flags, out=f"{name}_list") == 0
        assert cli("--prompt", PROMPTS[1], *flags, out=f"{name}_alone") == 0
        [(stem, alone)] = videos(cli.folder / f"{name}_alone").items()
        assert videos(cli.folder / f"{name}_list")[stem] == alone


def test_clips_are_decoded_whole_and_cut(cli: CommandLine) -> None:
    """Shown is each clip decoded in one go without its last nine frames; the first of the nine begins the next clip."""
    plan = make_plan(parse_arguments(cli.arguments(*CLIPS, "--seconds", 7)), Launch(0, 1, 0))
    frames = plan.loop.latent_frames(112, given_frames=0)
    engine = Engine(plan)
    engine.prepare(PROMPTS[:1])
    chunks = list(engine.stream([VideoRequest(PROMPTS[0], SampleSeed(3))], frames))
    shown = torch.cat([chunk.frames for chunk in chunks], dim=1)
    first = torch.cat([chunk.latents for chunk in chunks[:7]], dim=1)
    second = torch.cat([chunk.latents for chunk in chunks[7:]], dim=1)
    vae = engine._wan_vae()
    whole = vae.stream().decode(first)
    assert torch.equal(shown[:, :72], to_uint8(whole[:, :72]))
    assert torch.equal(shown[:, 72:], to_uint8(vae.stream().decode(second)))
    assert [chunk.given for chunk in chunks].index(True) == 7
    assert torch.equal(second[:, :1], vae.encode(whole[:, -9:-8]))
    assert torch.equal(second[:, 1:3], first[:, -2:])


def test_what_a_loop_cannot_do_is_refused(cli: CommandLine, capsys) -> None:
    """One line, before weights."""
    for flags, words in (
        (["--set", "pipeline=rolling"], "pipeline='rolling' is not allowed. Allowed: chunkwise, rolling_forcing or"),
        (["--set", "pipeline=rolling_forcing"], "pipeline=rolling_forcing denoises 12 frames jointly"),
        (["--set", "pipeline=causvid_overlap"], "kv_cache.policy=full"),
        (["--set", "on_switch=forget"], "on_switch='forget' is not allowed"),
        ([*CLIPS, "--set", "overlap_frames=2"], "overlap_frames=2 of clips of 21"),
        ([*CLIPS, "--i2v", "--data_path", ROOT / "weights/tiny/samples.jpg"], "cannot continue an image or a video"),
    ):
        assert cli("--prompt", PROMPTS[0], *flags) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said
