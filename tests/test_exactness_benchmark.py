"""The benchmark of exactness: what is compared with what, from which memory, and what is said of it."""
from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from pytest import approx
from small_model import write_small_model

from benchmarks.__main__ import main
from benchmarks.exactness import EXACT, Differences, compare_latents, difference, is_compared
from benchmarks.settings import Setting
from benchmarks.subject import Subject

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_small_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def setting(model: str) -> Setting:
    """One token a frame."""
    return Setting(model=model, resolution="16x16")


def test_both_start_from_the_references_memory_and_noise(setting: Setting) -> None:
    """A pipeline with the same weights makes the same bits in every chunk, and bfloat16 differs by its rounding."""
    setting = replace(setting, dtype="bfloat16")
    others = {"candidate": setting, EXACT: replace(setting, dtype="float32")}
    subjects = {name: Subject(s, s.plan(CPU)) for name, s in others.items()}
    pairs = compare_latents(Subject(setting, setting.plan(CPU)), subjects, seconds=10, every=1)
    same, ours = pairs["candidate against reference"], pairs[f"reference against {EXACT}"]
    assert len(same.chunks) == 14 and same.relative_error_max == 0
    assert [chunk.top_c_overlap for chunk in same.chunks if chunk.top_c_overlap is not None] == [1.0] * 4
    assert 1e-4 < ours.relative_error_median <= ours.relative_error_max < 0.1 and ours.all_finite
    assert pairs[f"candidate against {EXACT}"] == ours


def test_errors_grow_when_running_free_only(setting: Setting) -> None:
    """In the first chunk both agree; later ones see another memory only if each keeps its own."""
    setting = replace(setting, dtype="bfloat16")
    exact = replace(setting, dtype="float32")
    runs = [
        compare_latents(Subject(setting, setting.plan(CPU)), {EXACT: Subject(exact, exact.plan(CPU))}, seconds=5,
                        every=1, free_running=free)[f"reference against {EXACT}"].chunks for free in (False, True)
    ]
    assert runs[0][0] == runs[1][0] and runs[0][3] != runs[1][3]


@torch.inference_mode()
def chosen_by_their_values(subject: Subject, frames: int) -> dict[int, set[int]]:
    """Tokens that the only layer chooses, by chunk: a token is known by its values, which the store never changes."""
    subject.start(frames)
    layer, born, found = subject.pipeline.cache.layer(0), [], {}
    for span in subject.plan.geometry.chunks(frames):
        latents = subject.pipeline.denoise(span, subject.text, subject.noise)
        if layer.plan.chosen is not None:
            chosen = layer.store.values[0, layer.plan.chosen[0]]
            same = (chosen[:, None] == torch.cat(born)).flatten(2).all(dim=2)
            assert (same.sum(dim=1) == 1).all()
            found[span.index] = set(same.int().argmax(dim=1).tolist())
        subject.pipeline.remember(latents, subject.text)
        new = span.frames * subject.plan.geometry.frame_tokens
        born.append(layer.store.values[0, layer.store.length - new:layer.store.length].clone())
    return found


def test_tokens_alike_are_the_same_tokens(setting: Setting) -> None:
    """Memories that have forgotten different tokens differ slot by slot: what counts is which token was chosen."""
    pair = [setting.changed(f"resolution=64x64 kv_cache.votes={votes}") for votes in ("both", "denoising")]
    ours, theirs = (chosen_by_their_values(Subject(s, s.plan(CPU)), 42) for s in pair)
    reference, candidate = (Subject(s, s.plan(CPU)) for s in pair)
    chunks = compare_latents(
        reference, {"candidate": candidate}, seconds=10, every=1, free_running=True,
    )["candidate against reference"].chunks
    wanted = {index: len(ours[index] & theirs[index]) / len(ours[index]) for index in ours}
    assert {c.chunk: c.top_c_overlap for c in chunks if c.top_c_overlap is not None} == approx(wanted)
    assert len(wanted) == 4 and min(wanted.values()) < max(wanted.values())


def test_an_error_that_is_no_number_is_told(tmp_path, model: str, monkeypatch, capsys) -> None:
    """Latents that are not finite have no error: the others' count, and JSON and table say that not all are finite."""
    good, bad = torch.ones(2, 3), torch.tensor([[1.0, torch.nan, 1.0], [1.0, torch.inf, 1.0]])
    chunks = [difference(0, good, bad, None), difference(1, bad, good, None), difference(2, 1.5 * good, good, None)]
    pair = Differences.of(chunks)
    assert [c.relative_error for c in chunks] == [c.max_error for c in chunks] == [None, None, 0.5]
    assert [c.finite for c in chunks] == [False, False, True]
    assert (pair.relative_error_median, pair.relative_error_max, pair.all_finite) == (0.5, 0.5, False)
    none = Differences.of(chunks[:2])
    assert (none.relative_error_median, none.relative_error_max, none.all_finite) == (None, None, False)
    pairs = {"reference against float32": pair, "candidate against float32": none}
    monkeypatch.setattr("benchmarks.__main__.compare_latents", lambda *args, **options: pairs)
    monkeypatch.setattr("benchmarks.__main__.draw", drawn := Mock())
    path = tmp_path / "result.json"
    flags = ["--model", model, "--device", "cpu", "--output", str(path)]
    assert main(["exactness", *flags, "--compare", "dtype=bfloat16", "attention=sdpa"]) == 0
    result = json.loads(path.read_text())
    written = result["differences"]["reference against float32"]
    assert [c["relative_error"] for c in written["chunks"]] == [None, None, 0.5] and not written["all_finite"]
    assert "candidate_error_over_reference_error" not in result
    first, second = (line for line in capsys.readouterr().out.splitlines() if " against float32 " in line)
    assert first.split()[-5:] == ["3", "5.00e-01", "5.00e-01", "-", "no"] and second.split()[-5:] == [*"2---", "no"]
    assert drawn.call_args.args[0][0].lines["reference against float32"] == ([0.75 * 2], [50])


def test_compared_chunks() -> None:
    """Of ten the first and the last; of one, all."""
    assert [i for i in range(21) if is_compared(i, 10)] == [0, 9, 10, 19, 20]
    assert all(is_compared(i, 1) for i in range(5))
