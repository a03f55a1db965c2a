"""The parity check passes on the recorded files, and notices every kind of difference."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from evaluation.parity import TOLERANCE, main

GOLDEN = Path(__file__).parent / "golden"
PRUNING = "rollout_pc_s10_b16_r4_reuse2_B.safetensors"


def run(folder: Path, capsys: pytest.CaptureFixture) -> tuple[int, dict[str, dict]]:
    """Exit status, and the JSON line of each file."""
    status = main([str(folder)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return status, {line["file"]: line for line in lines}


def copy_with(folder: Path, name: str, changes: dict) -> None:
    """The pruning rollout, its model and its inputs, with tensors of `name` changed."""
    for file in (PRUNING, "model_B.safetensors", "inputs_B.safetensors"):
        shutil.copy(GOLDEN / file, folder / file)
    with safe_open(GOLDEN / name, "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    for key, change in changes.items():
        change(tensors[key])
    save_file(tensors, folder / name, header)


def test_recorded_files_pass(capsys: pytest.CaptureFixture) -> None:
    """Rollouts, forwards, schedule, text encoder and VAE of the released code, within the tolerance."""
    status, lines = run(GOLDEN, capsys)
    assert status == 0
    assert len(lines) == len([f for f in GOLDEN.iterdir() if not f.name.startswith(("inputs_", "model_"))]) >= 9
    for line in lines.values():
        assert line["ok"] and line["kept_equal"] and 0 <= line["max_error"] <= line["tolerance"] == TOLERANCE


@pytest.mark.parametrize(
    ("key", "change", "differs"),
    [
        ("latents", lambda t: t[0, 40].add_(3e-5), "latents"),
        ("flow_last", lambda t: t[7].mul_(1.001), "flow_last"),
        ("keep_idx", lambda t: t[3, 1, 155].add_(1), "keep_idx"),
        ("topc_idx", lambda t: t[2, 0, 4].sub_(1), "topc_idx"),
        ("window_tokens", lambda t: t[9, 2].add_(15), "window_tokens"),
        ("latents", lambda t: t[0, 3].fill_(float("nan")), "latents"),
    ],
)
def test_a_difference_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture, key: str, change, differs: str) -> None:
    """One number off, and the file fails by name; the exit status says so."""
    copy_with(tmp_path, PRUNING, {key: change})
    status, lines = run(tmp_path, capsys)
    assert status == 1
    assert not lines[PRUNING]["ok"] and lines[PRUNING]["differs"] == [differs]


def test_other_weights_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A model whose output is scaled by one part in a thousand does not pass."""
    copy_with(tmp_path, "model_B.safetensors", {"model.head.head.weight": lambda t: t.mul_(1.001)})
    status, lines = run(tmp_path, capsys)
    assert status == 1 and "latents" in lines[PRUNING]["differs"]


def test_a_broken_file_fails_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A truncated file is a failed line; an empty folder is exit status 2."""
    assert main([str(tmp_path)]) == 2
    copy_with(tmp_path, PRUNING, {})
    (tmp_path / "forward_A.safetensors").write_bytes((GOLDEN / "forward_A.safetensors").read_bytes()[:1000])
    status, lines = run(tmp_path, capsys)
    assert status == 1
    assert lines[PRUNING]["ok"] and not lines["forward_A.safetensors"]["ok"] and lines["forward_A.safetensors"]["error"]
