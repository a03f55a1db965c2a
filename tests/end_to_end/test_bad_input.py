"""What cannot work is refused at once: status 2, one clear error, nothing loaded, nothing left behind."""
from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import pipeline.engine
from end_to_end.runs import PROMPTS, CommandLine, is_whole, manifest, record, videos
from wan.model import CausalWanModel, randomize
from weights import TRANSFORMER

PROMPT = ["--prompt", PROMPTS[0]]
SHORT = ["--num_output_frames", 3]
BASE = f"extends: {ROOT / 'configs' / 'base.yaml'}\n"


def never(*_: object, **__: object) -> None:
    raise AssertionError("a network was loaded before the input was found to be bad")


@pytest.fixture
def refused(cli: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys):
    """Run, expect a refusal, return what stands on stderr."""
    for owner, name in ((pipeline.engine, "load_transformer"), (pipeline.engine.TextEncoder, "load"),
                        (pipeline.engine.WanVAE, "load"), (pipeline.engine.WanVAE, "random")):
        monkeypatch.setattr(owner, name, never)

    def run(*arguments: object, out: str = "videos") -> str:
        before = sorted(cli.folder.rglob("*"))
        try:
            status = cli(*arguments, out=out)
        except SystemExit as stop:  # argparse ends the process itself
            status = stop.code
        said = capsys.readouterr().err
        assert status == 2
        assert said.startswith("error: ") and said.count("error: ") == 1 and "Traceback" not in said
        assert sorted(cli.folder.rglob("*")) == before
        return said

    return run


def expect(said: str, *words: str) -> None:
    """One line that has all of `words`."""
    assert said.count("\n") == 1
    for word in words:
        assert word in said, f"{word!r} is not in {said!r}"


# --- flags, config, length ----------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "flags, words",
    [
        (["--set", "context_nois=1"], ["unknown key context_nois", "Did you mean context_noise?"]),
        (["--set", "kv_cache.sink_framez=3"], ["kv_cache.sink_framez", "Did you mean sink_frames?"]),
        (["--set", "kv_cache.sink_frames=14"], ["need 18 frames", "exceeds budget_frames=16", "Lower sink_frames"]),
        (["--set", "kv_cache.window_frames=99999999999"], ["window_frames=99999999999", "outside"]),
        (["--set", "sink_frames"], ["--set sink_frames", "write key=value"]),
        (["--set", "height=33"], ["height=33", "multiple of 16", "Use 32"]),
        (["--set", "height=160000"], ["at most 16384"]),
        (["--set", "height=16000", "width=16000"], ["16000x16000", "GiB", "Lower the size"]),
        (["--set", "denoising_step_list=[500,1000]"], ["denoising_step_list=[500, 1000]", "fall strictly"]),
        (["--set", "model=tinyy"], ["tinyy", "Did you mean tiny?"]),
        (["--num_output_frames", 0], ["--num_output_frames 0 is no length", "more than 0"]),
        (["--num_output_frames", 10**30], ["is no length", "at most"]),
        (["--num_output_frames", "three"], ["--num_output_frames", "'three'"]),
        (["--seconds", 0], ["--seconds 0.0 is no length", "more than 0"]),
        (["--seconds", "nan"], ["--seconds nan is no length"]),
        (["--seconds", "1e308"], ["--seconds 1e+308 is no length"]),
        (["--seconds", 5, *SHORT], ["--num_output_frames", "not allowed with", "--seconds"]),
        (["--policy", "deep_sink"], ["--policy deep_sink", "Use --config_path configs/deep_sink.yaml"]),
        (["--policy", "particpative"], ["'particpative' is unknown", "Did you mean participative?"]),
        (["--policy", "rolling", "--Budget", 16], ["--Budget 16", "policy rolling does not have", "Drop --Budget"]),
        (["--Budget", 12, "--Recent", 4], ["need 14 frames", "exceeds budget_frames=12"]),
        (["--Budget", 3, "--Recent", 10], ["budget_frames=3 is outside 10..21", "recent frames"]),
        (["--set", "kv_cache.sink_frames=-1"], ["sink_frames=-1 is outside 0..12"]),
        (["--device", "nonsense"], ["--device nonsense", "Use auto, cpu, cuda or cuda:N"]),
        (["--device", "meta"], ["--device meta", "Use auto, cpu, cuda or cuda:N"]),
        (["--device", "cuda:99"], ["--device cuda:99", "CUDA devices", "nvidia-smi"]),
        (["--num_samples", 0], ["--num_samples", "'0'", "at least 1"]),
        (["--num_samples", 10**8], ["100000000 videos", "at most 100000", "fewer samples"]),
        (["--batch_size", 1.5], ["--batch_size", "'1.5'", "whole number"]),
        (["--seed", -1], ["--seed", "'-1'", "at least 0"]),
        (["--sed", 1], ["--sed", "--help"]),
        (["--config_path", "configs/deep_forcin.yaml"], ["deep_forcin.yaml: no such file", "deep_forcing.yaml"]),
        (["--config_path", "deep_sink"], ["deep_sink: no such file", "Did you mean", "configs/deep_sink.yaml?"]),
        (["--prompts", "x"], ["unrecognized arguments: --prompts", "Did you mean --prompt?"]),
        (["--set", "kv_cache.sink_frames=1.5"], ["error: --set kv_cache.sink_frames=1.5: ", "int is wanted"]),
        (["--config_path", "configs"], ["configs: is a folder", "Give one of its .yaml files"]),
        (["--config_path", "configs/self_forcing_dmd/self_forcing_dmd_sink14.yaml"],
         ["sink_size=14 and --Recent 4 need 18 frames", "exceeds --Budget 16", "--is_ds_only 1"]),
        (["--config_path", "configs/full.yaml", "--num_output_frames", 22],
         ["needs 24 latent frames", "local_attn_size: -1", "further than 21", "--policy rolling"]),
        (["--i2v"], ["--prompt has no image or video", "--data_path x.png"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "",
)
def test_flags(refused, flags: list, words: list):
    """Each says what was given, why it cannot work, and what to do."""
    expect(refused(*PROMPT, *flags), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(refused):
    """--device cuda on a machine without one is refused, not silently run on the CPU."""
    expect(refused(*PROMPT, "--device", "cuda"), "--device cuda", "0 CUDA devices", "--device cpu")


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["bad.yaml: is empty", "lines of `key: value`"]),
        ("- 1\n", ["bad.yaml: holds a list"]),
        ("a: [1\nb: 2\n", ["bad.yaml:2: not valid YAML"]),
        (BASE + "height: 32\nheight: 64\n", [":3: not valid YAML", "duplicate key height"]),
        (BASE + "num_frames_per_block: 1\n", [":2: unknown key", "Did you mean num_frame_per_block?"]),
        (BASE + "num_frame_per_block: true\n", [":2: num_frame_per_block=True is not allowed"]),
        (BASE + f"height: {'[' * 200}{']' * 200}\n", ["bad.yaml: cannot be read", "nested too deeply"]),
        (BASE + "height: ${nowhere}\n", [":2: height='${nowhere}' has no value", "write the value itself"]),
        (BASE + "height: !!python/object/apply:os.system ['touch pwned']\n", [":2: not valid YAML"]),
        (BASE + "model_kwargs: {local_attn_size: -1}\n", ["needs 24 latent frames", "local_attn_size: -1"]),
        ("extends: bad.yaml\n", ["circle"]),
        ("extends: nowhere.yaml\n", ["nowhere.yaml: no such file", "extends it"]),
    ],
)
def test_config_files(cli: CommandLine, refused, text: str, words: list):
    """Odd YAML is refused with file and line."""
    path = cli.folder / "bad.yaml"
    path.write_text(text)
    expect(refused(*PROMPT, "--config_path", path, "--num_output_frames", 24), *words)
    assert not (ROOT / "pwned").exists()


# --- prompts --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.txt", b"", ["is empty", "one prompt a line"]),
        ("blank.txt", b"\n  \r\n", ["is empty"]),
        ("binary.txt", bytes(range(256)), ["binary file"]),
        ("latin.txt", "un caf\u00e9".encode("latin-1"), ["line 1 is not UTF-8", "Save the file as UTF-8"]),
        ("wide.txt", "a cat".encode("utf-16"), ["UTF-16", "Save it as UTF-8"]),
        ("key.jsonl", b'{"promt": "a cat"}', ["line 1: unknown key 'promt'", "Did you mean 'prompt'?"]),
        ("half.jsonl", b'{"prompt": "a \\udcff"}', ["line 1: is not valid Unicode"]),
        ("gone.jsonl", b'{"prompt": "a cat", "image": "cat.png"}', ["names cat.png", "--i2v"]),
    ],
)
def test_prompt_files(cli: CommandLine, refused, name: str, content: bytes, words: list):
    """A prompt file that is none is refused with the file's name and the remedy."""
    (cli.folder / name).write_bytes(content)
    expect(refused("--data_path", cli.folder / name, *SHORT), name, *words)


def test_prompts_that_are_not_there(cli: CommandLine, refused):
    """A missing file names its neighbours; a missing extended line, both files; an empty prompt, itself."""
    file = cli.prompts(*PROMPTS[:2])
    expect(refused("--data_path", cli.folder / "promts.txt"), "promts.txt: no such file", "prompts.txt")
    longer = cli.prompts(PROMPTS[0], name="longer.txt")
    expect(refused("--data_path", file, "--extended_prompt_path", longer), "has 2 lines", "longer.txt has 1")
    expect(refused("--data_path", file, *PROMPT), "--prompt and --data_path", "Give one")
    expect(refused("--prompt", "  "), "--prompt is empty")
    expect(refused("--prompt", "half \udcff"), "--prompt: is not valid Unicode")


def test_long_prompt_is_warned_about_and_made(cli: CommandLine, caplog):
    """A prompt past the text length is cut, a line says how much is lost, and the video is there."""
    assert cli("--prompt", "a red circle " * 40, *SHORT) == 0
    assert is_whole(cli.folder / "videos", 1)
    [warning] = [line for line in caplog.messages if "longer than the 24" in line]
    assert "prompt of 121 tokens" in warning and "last 97 are lost" in warning


# --- weights --------------------------------------------------------------------------------------------------

class Payload:
    """Unpickled carelessly, this makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def damaged(kind: str, model: Path, folder: Path) -> Path:
    """A checkpoint that is wrong in the way that `kind` names."""
    good = model.parent / "transformer" / "diffusion_pytorch_model.safetensors"
    path = folder / ("weights.pt" if "pt" in kind else "weights.safetensors")
    tensors = load_file(good)
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:-64])
    elif kind == "truncated pt":
        torch.save({"generator": tensors}, path)
        path.write_bytes(path.read_bytes()[:-5000])
    elif kind == "other size":
        other = CausalWanModel(dataclasses.replace(TRANSFORMER, dim=64, num_layers=1))
        randomize(other, seed=0)
        save_file(other.state_dict(), path)
    elif kind == "incomplete":
        save_file({name: value for name, value in tensors.items() if "head" not in name}, path)
    elif kind in ("pickled code pt", "old pickled code pt"):
        content = {"generator": tensors, "note": Payload(folder / "pwned")}
        torch.save(content, path, _use_new_zipfile_serialization=kind.startswith("pickled"))
    elif kind == "other group pt":
        torch.save({"generator_ema": tensors, "critic": tensors}, path)
    elif kind == "web page pt":
        path.write_text("<!DOCTYPE html><title>Sign in</title>")
    elif kind == "empty pt":
        path.touch()
    return path


@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", ["is not there", "Correct its path", "python -m utils.download"]),
        ("truncated", ["cannot be read", "cut off or damaged", "python -m utils.download"]),
        ("truncated pt", ["cannot be read", "cut off or damaged"]),
        ("other size", ["does not fit", "dim 64, 1 layers", "asks for dim 32, 2 layers"]),
        ("incomplete", ["does not fit", "missing (3): head.modulation"]),
        ("pickled code pt", ["refused", "io.open", "could run any program"]),
        ("old pickled code pt", ["refused", "io.open", "could run any program"]),
        ("other group pt", ["has no generator", "critic, generator_ema", "Run with --use_ema"]),
        ("web page pt", ["web page"]),
        ("empty pt", ["is empty"]),
    ],
)
def test_checkpoints(cli: CommandLine, model: Path, refused, kind: str, words: list):
    """A checkpoint that is not the model is refused by its header; what it may have pickled never runs."""
    path = damaged(kind, model, cli.folder)
    said = refused(*PROMPT, *SHORT, "--checkpoint_path", path)
    for word in (path.name, *words):
        assert word in said, f"{word!r} is not in {said!r}"
    assert not (cli.folder / "pwned").exists()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "transformer"])
def test_missing_parts(cli: CommandLine, model: Path, refused, part: str):
    """Every network's files are looked for first, and the error names the command that gets them."""
    lacking = cli.folder / "lacking.yaml"
    lacking.write_text(model.read_text().replace(str(model.parent / part), str(cli.folder / "nowhere")))
    expect(refused(*PROMPT, *SHORT, "--set", f"model={lacking}"), "nowhere", "python -m utils.download")


@pytest.mark.parametrize(
    "part, file, words",
    [
        ("vae", "diffusion_pytorch_model.safetensors", ["cut off or damaged", "as the VAE of"]),
        ("vae", "config.json", ["config.json: cannot be read", "as the VAE of"]),
        ("text_encoder", "model.safetensors", ["cut off or damaged", "as the text encoder of"]),
        ("tokenizer", "tokenizer.json", ["tokenizer there cannot be read", "as the tokenizer of"]),
    ],
)
def test_damaged_parts(cli: CommandLine, model: Path, refused, part: str, file: str, words: list):
    """A file of any network that was cut off is refused before the others load, and the remedy is the model's own."""
    copy = cli.folder / part
    shutil.copytree(model.parent / part, copy)
    (copy / file).write_bytes((copy / file).read_bytes()[:-9])
    spec = cli.folder / "damaged.yaml"
    text = model.read_text().replace(str(model.parent / part), str(copy))
    spec.write_text(text.replace("python -m utils.download", "git checkout weights/tiny"))
    expect(refused(*PROMPT, *SHORT, "--set", f"model={spec}"), str(copy), "git checkout weights/tiny", *words)


def test_strides_must_be_the_vaes(cli: CommandLine, model: Path, refused):
    """A model's YAML of other strides than its VAE would make videos of another size and length."""
    spec = cli.folder / "strides.yaml"
    spec.write_text(model.read_text().replace("temporal_stride: 4", "temporal_stride: 2"))
    expect(refused(*PROMPT, *SHORT, "--set", f"model={spec}"), "VAE has temporal_stride 4", "YAML says 2")


def test_a_checkpoint_is_taken_for_the_large_model(cli: CommandLine, model: Path, refused):
    """--checkpoint_path alone means the 1.3B model; where that does not fit, the error names the other way."""
    said = refused(*PROMPT, *SHORT, "--checkpoint_path", model.parent / "transformer", "--set", "model=auto")
    assert "does not fit" in said and "--set model=tiny" in said and "wan2.1_t2v_1.3b" in said


def test_values_that_are_no_numbers(cli: CommandLine, model: Path):
    """A checkpoint of nan passes every check of names and shapes: the video fails and is not kept."""
    tensors = load_file(model.parent / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors["patch_embedding.weight"].fill_(float("nan"))
    save_file(tensors, cli.folder / "nan.safetensors")
    assert cli(*PROMPT, *SHORT, "--checkpoint_path", cli.folder / "nan.safetensors") == 1
    assert videos(cli.folder / "videos") == {}
    assert "not finite" in manifest(cli.folder / "videos")[0]["error"]


# --- output folder, environment, the process itself -----------------------------------------------------------

def test_output_that_cannot_be_written(cli: CommandLine, refused):
    """A file in the way, or a folder that nobody can make."""
    (cli.folder / "file").write_text("mine")
    for out in ("file", "file/below"):
        expect(refused(*PROMPT, *SHORT, out=out), f"--output_folder {cli.folder / out} cannot be written to", "Choose",
               f"{cli.folder / 'file'} is a file")
        expect(refused(*PROMPT, *SHORT, "--dry_run", out=out), f"{cli.folder / 'file'} is a file")
    assert (cli.folder / "file").read_text() == "mine"


def test_symlinked_output_folder(cli: CommandLine):
    """A link to a folder is that folder; a link in the place of a video is replaced, never followed."""
    (cli.folder / "real").mkdir()
    (cli.folder / "videos").symlink_to(cli.folder / "real")
    precious = cli.folder / "precious.mp4"
    precious.write_text("precious")
    (cli.folder / "real" / "0000-0.mp4").symlink_to(precious)
    assert cli(*PROMPT, *SHORT, "--save_with_index") == 0
    assert is_whole(cli.folder / "real", 1) and record(cli.folder / "real", "0000-0")["prompt"] == PROMPTS[0]
    assert precious.read_text() == "precious"


def test_half_a_launch(refused, monkeypatch: pytest.MonkeyPatch):
    """RANK without WORLD_SIZE would make every process do everything."""
    monkeypatch.setenv("RANK", "0")
    expect(refused(*PROMPT, *SHORT), "RANK=0 but not WORLD_SIZE", "torchrun")


def test_process_ends_with_one_line(cli: CommandLine, tmp_path: Path):
    """The program itself, started elsewhere: status 2, nothing but the error on stderr."""
    arguments = cli.arguments(*PROMPT, "--set", "context_nois=1")
    command = [sys.executable, str(ROOT / "inference.py"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout) == (2, "")
    expect(result.stderr, "error: --set context_nois=1: unknown key")


def test_the_scripts_take_paths_as_their_caller_means_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Started elsewhere, a script finds a relative --data_path in the caller's folder, not in the repository."""
    (tmp_path / "mine.txt").touch()
    monkeypatch.setenv("PYTHON", sys.executable)
    command = ["bash", str(ROOT / "DS_inference.sh"), "--data_path", "mine.txt"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and "error: mine.txt: the file is empty" in result.stderr


def test_interrupt_while_modules_load(tmp_path: Path):
    """Ctrl-C in the first seconds ends the program by that signal, without a trace."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "inference.py"), "--help"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        while "torch" not in run.stderr.readline():
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        assert "Traceback" not in run.stderr.read() and run.wait() == -signal.SIGINT
