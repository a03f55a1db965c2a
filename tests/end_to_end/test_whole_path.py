"""From prompts to files: what is asked for is what lies in the folder."""
from __future__ import annotations

import json
import re

import av
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from end_to_end.runs import PROMPTS, CommandLine, is_whole, manifest, record, videos
from utils.video import VideoWriter, fit_to, read_video

RELEASED = ["--data_path", "prompts/MovieGenVideoBench_txt/line_0010.txt", "--use_ema", "--num_output_frames", 24]


def only(cli: CommandLine, out: str = "videos") -> tuple[dict, np.ndarray]:
    """Sidecar and pixel frames of the one video that was made."""
    assert is_whole(cli.folder / out, 1)
    [stem] = videos(cli.folder / out)
    return record(cli.folder / out, stem), read_video(cli.folder / out / f"{stem}.mp4")


@pytest.mark.parametrize("height, width", [(32, 48), (64, 32)])
@pytest.mark.parametrize("chunk, frames", [(1, 4), (2, 4), (3, 6), (5, 5)])
def test_prompt_file_to_video(cli: CommandLine, height: int, width: int, chunk: int, frames: int):
    """Size, rate and number of frames are those asked for, in the file as in its record."""
    sizes = [f"num_frame_per_block={chunk}", f"height={height}", f"width={width}", "kv_cache.recent_frames=5"]
    assert cli("--data_path", cli.prompts(PROMPTS[0]), "--num_output_frames", frames, "--set", *sizes) == 0
    about, pixels = only(cli)
    assert pixels.shape == (4 * frames - 3, height, width, 3)
    assert pixels.std() > 1  # a picture, not a flat field
    assert (about["pixel_frames"], about["latent_frames"]) == (4 * frames - 3, frames)
    assert about["seconds"] == (4 * frames - 3) / 16
    with av.open(str(cli.folder / "videos" / about["video"])) as container:
        [stream] = container.streams.video
        assert stream.codec.name == "h264" and stream.pix_fmt == "yuv420p" and stream.average_rate == 16


def test_record_says_how_it_was_made(cli: CommandLine, model):
    """Prompt, seed, every setting, weights, versions, timings and memory stand beside the video and in the manifest."""
    assert cli("--prompt", PROMPTS[0], "--num_output_frames", 3, "--seed", 7, "--policy", "rolling") == 0
    about, _ = only(cli)
    assert about["status"] == "complete" and about["prompt"] == PROMPTS[0] and about["seed"] == 7
    assert about["settings"]["config"]["kv_cache"] == {"policy": "rolling", "window_frames": 21}
    assert about["settings"]["config"]["height"] == 32 and about["settings"]["transformer"]["dim"] == 32
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in about["settings"]["weights"].values())
    assert about["checkpoint"] == str(model.parent / "transformer")
    assert set(about["stage_ms"]) == {"dit", "vae"} and min(about["stage_ms"].values()) > 0
    assert about["peak_memory_bytes"] > 2**20 and {"python", "torch", "diffusers"} <= set(about["versions"])
    [line] = manifest(cli.folder / "videos")
    assert all(line[key] == about[key] for key in ("video", "status", "fingerprint", "prompt", "seed"))


@pytest.mark.parametrize(
    "length, pixel_frames, latent_frames",
    [
        (["--num_output_frames", 3], 9, 3), (["--num_output_frames", 4], 13, 6), (["--num_output_frames", 1], 1, 3),
        (["--seconds", 1], 16, 6), (["--seconds", 0.01], 1, 3), (["--seconds", 2.0625], 33, 9),
    ],
)
def test_length(cli: CommandLine, caplog, length: list, pixel_frames: int, latent_frames: int):
    """Whole chunks are generated, the file is cut to what was asked for, and one line says so, once."""
    caplog.set_level("INFO")
    assert cli("--data_path", cli.prompts(*PROMPTS[:2]), *length) == 0
    for stem in videos(cli.folder / "videos"):
        about = record(cli.folder / "videos", stem)
        assert (about["pixel_frames"], about["latent_frames"]) == (pixel_frames, latent_frames)
        assert len(read_video(cli.folder / "videos" / f"{stem}.mp4")) == pixel_frames
    notices = [line for line in caplog.messages if "rounded up" in line]
    asked = -(-(pixel_frames - 1) // 4) + 1
    assert len(notices) == (asked != latent_frames)
    assert all(f"{asked} latent frames are rounded up to {latent_frames}" in line for line in notices)


def test_same_length_in_other_words_is_the_same_video(cli: CommandLine):
    """9 pixel frames are 3 latent frames: a run that asks in seconds finds the video finished."""
    assert cli("--prompt", PROMPTS[0], "--num_output_frames", 3) == 0
    assert cli("--prompt", PROMPTS[0], "--seconds", 9 / 16) == 0
    assert len(manifest(cli.folder / "videos")) == 1


def test_independent_first_frame(cli: CommandLine):
    """Chunks of 1, 3, 3 latent frames: 7 need no rounding."""
    assert cli("--prompt", PROMPTS[0], "--num_output_frames", 7, "--set", "independent_first_frame=true") == 0
    about, pixels = only(cli)
    assert about["latent_frames"] == 7 and len(pixels) == 25


def test_samples_and_batches(cli: CommandLine):
    """Every sample of every prompt is a video of its own; a batch of two agrees with singles up to encoding."""
    options = ["--data_path", cli.prompts(*PROMPTS), "--num_samples", 2, "--num_output_frames", 6]
    assert cli(*options, out="singles") == 0
    assert cli(*options, "--batch_size", 4, out="batches") == 0
    assert is_whole(cli.folder / "singles", 6) and is_whole(cli.folder / "batches", 6)
    assert len(set(videos(cli.folder / "singles").values())) == 6
    assert videos(cli.folder / "singles").keys() == videos(cli.folder / "batches").keys()
    for stem in videos(cli.folder / "singles"):
        one, two = (read_video(cli.folder / out / f"{stem}.mp4").astype(int) for out in ("singles", "batches"))
        assert np.abs(one - two).mean() < 1


def test_names_by_index_and_by_prompt(cli: CommandLine):
    """By line number (blank lines count), or by the words of the prompt; repeats are made once."""
    file = cli.prompts("", PROMPTS[0], PROMPTS[1], PROMPTS[0])
    assert cli("--data_path", file, "--num_output_frames", 3, "--save_with_index", "--num_samples", 2, out="index") == 0
    assert list(videos(cli.folder / "index")) == ["0001-0", "0001-1", "0002-0", "0002-1"]
    assert cli("--data_path", file, "--num_output_frames", 3, "--seed", 5, out="words") == 0
    assert [re.sub("-[0-9a-f]{8}-", "-#-", stem) for stem in videos(cli.folder / "words")] == [
        "a-red-circle-bounces-slowly-#-s5-0", "the-blue-square-spins-#-s5-0",
    ]


def test_extended_prompts(cli: CommandLine):
    """The longer text is shown, the short one names the file."""
    short, long = cli.prompts("circle", name="short.txt"), cli.prompts(PROMPTS[0], name="long.txt")
    assert cli("--data_path", short, "--extended_prompt_path", long, "--num_output_frames", 3) == 0
    about, extended = only(cli)
    assert about["video"].startswith("circle-") and about["extended_prompt"] == PROMPTS[0]
    assert cli("--prompt", PROMPTS[0], "--num_output_frames", 3, out="direct") == 0
    assert np.array_equal(extended, only(cli, "direct")[1])


def test_weird_prompts(cli: CommandLine):
    """Whatever is in a prompt, its file has a plain name, and every prompt has a file of its own."""
    weird = [
        "🔥🦊", "日本語の猫", 'quotes " and \' and `', "../../etc/passwd", "C:\\con\\nul.txt", "a\x07bell\x1b[31m",
        "%s %d {} $HOME",
        "-" * 300, "naïve café", "NAIVE CAFE", "a <b>tag</b> &amp; more", "x" * 10_000, "word " * 3_000,
    ]
    assert cli("--data_path", cli.prompts(*weird), "--num_output_frames", 3) == 0
    assert is_whole(cli.folder / "videos", len(weird))
    assert all(re.fullmatch("[a-z0-9-]{1,90}", stem) for stem in videos(cli.folder / "videos"))
    kept = {record(cli.folder / "videos", stem)["prompt"] for stem in videos(cli.folder / "videos")}
    assert kept == {text.strip() for text in weird}


def test_image_begins_the_video(cli: CommandLine):
    """--i2v: the first frame is the image, cut to shape, and it counts towards the length."""
    picture = np.zeros((50, 120, 3), np.uint8)
    picture[:, 60:] = 255
    Image.fromarray(picture).save(cli.folder / "half.png")
    options = ["--i2v", "--data_path", cli.folder / "half.png", "--num_output_frames", 7]
    assert cli("--prompt", PROMPTS[0], *options) == 0
    assert cli("--prompt", PROMPTS[0], *options, "--dry_run") == 0
    about, pixels = only(cli)
    assert about["source"] == str(cli.folder / "half.png") and about["latent_frames"] == 7 and len(pixels) == 25
    assert cli("--prompt", PROMPTS[0], *options, "--set", "independent_first_frame=true", out="apart") == 0
    assert np.array_equal(only(cli, "apart")[1][0], pixels[0])
    assert cli("--prompt", PROMPTS[1], *options, out="other") == 0
    assert np.array_equal(only(cli, "other")[1][0], pixels[0])
    assert not np.array_equal(only(cli, "other")[1][-1], pixels[-1])


def test_video_goes_on(cli: CommandLine):
    """--i2v with a clip at another size and rate: its frames come first, then new ones; twice is the same."""
    with VideoWriter(cli.folder / "clip.mp4", fps=8) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (7, 40, 40, 3), dtype=np.uint8))
    line = json.dumps({"prompt": PROMPTS[0], "video": "clip.mp4"})
    options = ["--i2v", "--data_path", cli.prompts(line, name="list.jsonl"), "--num_output_frames", 10]
    assert cli(*options) == 0 and cli(*options, out="again") == 0
    about, pixels = only(cli)
    assert about["latent_frames"] == 10 and len(pixels) == 37  # 14 ticks at 16 FPS keep 13: 4 given, 2 chunks
    assert videos(cli.folder / "videos") == videos(cli.folder / "again")
    clip = fit_to(read_video(cli.folder / "clip.mp4", fps=16), 32, 48)
    assert len(clip) == 14


def test_clip_longer_than_the_video_is_named(cli: CommandLine, caplog):
    """Nothing is left to generate: that video fails with the reason."""
    with VideoWriter(cli.folder / "clip.mp4", fps=16) as writer:
        writer.write(np.zeros((60, 32, 48, 3), np.uint8))
    clip = cli.folder / "clip.mp4"
    assert cli("--i2v", "--prompt", PROMPTS[0], "--data_path", clip, "--num_output_frames", 6) == 1
    assert "nothing is left to generate" in caplog.text and videos(cli.folder / "videos") == {}


# --- commands of others -----------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "config, flags, policy",
    [
        ("self_forcing_dmd.yaml", [], {"policy": "rolling"}),
        ("self_forcing_dmd_sink10.yaml", ["--is_ds_only", 1], {"policy": "sink", "sink_frames": 10}),
        ("self_forcing_dmd_sink13.yaml", ["--is_ds_only", 1], {"policy": "sink", "sink_frames": 13}),
        ("self_forcing_dmd_sink14.yaml", ["--is_ds_only", 1], {"policy": "sink", "sink_frames": 14}),
        ("self_forcing_dmd_sink10.yaml", ["--Budget", 16, "--Recent", 4],
         {"policy": "participative", "sink_frames": 10, "budget_frames": 16, "recent_frames": 4}),
    ],
)
def test_released_commands(cli: CommandLine, config: str, flags: list, policy: dict):
    """The released README's commands run as they stand and mean the method that they meant there."""
    assert cli("--config_path", f"configs/self_forcing_dmd/{config}", *RELEASED, *flags) == 0
    about, pixels = only(cli)
    group = about["settings"]["config"]["kv_cache"]
    assert group["window_frames"] == 21 and {key: group[key] for key in policy} == policy
    assert len(pixels) == 93 and about["settings"]["use_ema"] is False  # these weights have nothing to choose from


def test_dry_run_prints_and_writes_nothing(cli: CommandLine, capsys):
    """--dry_run shows windows, memory and length."""
    before = sorted(cli.folder.iterdir())
    assert cli("--prompt", PROMPTS[0], "--num_output_frames", 29, "--dry_run") == 0
    said = capsys.readouterr().out
    for words in (
        "48x32 at 16 FPS, 113 pixel frames = 7.06 s, 30 latent frames", "29 latent frames are rounded up to 30",
        "3, 6, 9, 12, 15, 18, 21, 16, 19, 16 frames", "ParticipativeCompression", "MiB", "1 x 1 samples",
    ):
        assert words in said
    assert sorted(cli.folder.iterdir()) == before


def test_dry_run_warns_of_prompts_as_the_run_does(cli: CommandLine, caplog):
    """What the model cannot read of a prompt is told without loading it, each prompt once."""
    command = ["--prompt", "a red circle " * 200, "--num_samples", 2, "--num_output_frames", 3]
    warnings = []
    for flags in (["--dry_run"], []):
        caplog.clear()
        assert cli(*command, *flags) == 0
        warnings.append([line for line in caplog.messages if "longer than" in line])
    assert warnings[0] == warnings[1] and len(warnings[0]) == 1


def test_random_weights(cli: CommandLine, model):
    """--random_weights needs no weight file, and says in the record that there was none."""
    spec = model.read_text().replace(str(model.parent / "transformer"), "nowhere/transformer")
    bare = CommandLine(cli.folder / "bare.yaml", cli.folder)
    bare.model.write_text(spec)
    assert bare("--prompt", PROMPTS[0], "--num_output_frames", 3, "--random_weights") == 0
    about, pixels = only(cli)
    assert set(about["settings"]["weights"].values()) == {"random"} and len(pixels) == 9


def test_default_prompts_are_the_models_own(cli: CommandLine, model, caplog):
    """Without a prompt the model shows its own, and a line says which file that is."""
    caplog.set_level("INFO")
    assert cli("--num_output_frames", 3) == 0
    lines = {line for line in (ROOT / "prompts" / "tiny.txt").read_text().splitlines() if line}
    assert {line["prompt"] for line in manifest(cli.folder / "videos")} == lines
    assert "prompts/tiny.txt" in caplog.text
