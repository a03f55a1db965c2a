"""Steps of teacher and student: what is learned from, what moves, what stays, what decides a step."""
from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import SMALL, make_tiny
from pytest import approx
from torch import Tensor
from torch.testing import assert_close

from pipeline.sampler import FewStepSampler
from training.data import LatentClips
from training.loop import pack, run_stage
from training.parts import CaptionEncoder, make_text_encoder, make_tokenizer
from training.settings import DataSettings, Settings, StudentSettings, TeacherSettings, TextSettings
from training.student import StudentStage
from training.teacher import TeacherStage
from training.workshop import Workshop
from wan.model import CausalWanModel, randomize

CPU = torch.device("cpu")
FRAMES, CHUNK, LEVEL = 6, 3, 3.0  # latents of openings are 3 and what follows is -3: what is to be learned can be said
WORDS = ("a", "red", "circle", "bounces", "blue")
CAPTION = "a red circle"          # of every clip; "blue" is in none


def captions() -> CaptionEncoder:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(WORDS)
    sizes = TextSettings(layers=1, heads=2, ffn_dim=16)
    return CaptionEncoder(
        tokenizer, make_text_encoder(sizes, SMALL.text_dim, tokenizer.get_vocab_size()), SMALL.text_len,
    )


def clips(text: CaptionEncoder, frames: int, caption: str = CAPTION) -> LatentClips:
    g = make_tiny().geometry
    latents = torch.full((4, frames, SMALL.in_dim, g.latent_height, g.latent_width), LEVEL, dtype=torch.bfloat16)
    latents[:, CHUNK:] = -LEVEL
    return LatentClips(latents, text.tokens([caption] * 4))


def teacher_stage(**settings) -> TeacherStage:
    common = {"steps": 30, "batch": 8, "first_chunk_steps": 2, "first_chunk_batch": 16, "first_chunk_share": 8}
    text = captions()
    return TeacherStage(
        Settings(data=DataSettings(latent_frames=FRAMES), teacher=TeacherSettings(**common | settings)),
        SMALL, make_tiny().geometry, text, clips(text, FRAMES), clips(text, CHUNK), CPU,
    )


def student_stage(caption: str = CAPTION, **settings) -> StudentStage:
    common = {
        "steps": 4, "batch": 2, "first_chunk_share": 2, "critic_updates": 1, "snapshot_every": 2, "lr": 1e-3,
    }
    teacher, text = CausalWanModel(SMALL), captions()
    randomize(teacher, seed=7)
    return StudentStage(
        Settings(data=DataSettings(latent_frames=FRAMES), student=StudentSettings(**common | settings)),
        teacher, make_tiny().geometry, FewStepSampler([1000, 500], shift=5.0, warp=True), text,
        clips(text, FRAMES, caption), clips(text, CHUNK, caption), CPU,
    )


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(before[name], p)}


def test_a_fresh_teacher_says_no_flow_at_all() -> None:
    """So its loss is the mean square of noise - 3, which is 10; 16 openings are 13,824 numbers: 6.2 / sqrt(13,824)
    is 0.053, allowed is six times as much.
    """
    losses = teacher_stage().step(0)
    assert set(losses) == {"opening"} and losses["opening"].item() == approx(1 + LEVEL**2, abs=0.32)


def test_openings_first_and_then_clips_with_openings_beside() -> None:
    stage = teacher_stage()
    assert [set(stage.step(index)) for index in range(4)] == 2 * [{"opening"}] + 2 * [{"clip", "opening"}]
    assert stage.steps == 2 + 30


def test_a_teacher_learns_what_every_clip_shows() -> None:
    """30 steps on clips that are alike: a flow that knows them leaves less than half of the 10 it began with. One
    that knows openings alone takes 3 for what follows and leaves more.
    """
    stage = teacher_stage(lr=0.02, lr_rest=0.02)
    losses = [stage.step(index) for index in range(stage.steps)]
    for name in ("clip", "opening"):
        assert sum(loss[name].item() for loss in losses[-5:]) / 5 < 5


@pytest.mark.parametrize(("drop", "read"), [(0.0, True), (1.0, False)])
def test_dropped_captions_teach_no_words(drop: float, read: bool) -> None:
    """Words of the captions get embeddings of their own if they are read, other words never; the end of a text is
    in the empty one too. The second step is the first whose flow depends on words: a fresh head says nothing.
    """
    stage = teacher_stage(caption_drop=drop)
    before = weights(stage.captions)["encoder.shared.weight"]
    for index in range(4):
        stage.step(index)
    rows = (before != stage.captions.encoder.shared.weight).any(dim=1)
    ids = stage.captions.tokens([CAPTION, "blue", ""])
    assert rows[ids[0, :3]].tolist() == 3 * [read]
    assert not rows[ids[1, 0]] and rows[ids[2, 0]]


def test_a_step_is_decided_by_its_number() -> None:
    """Two stages make the same step to the bit, whatever else was drawn; the next number draws anew."""
    first, second = teacher_stage(), teacher_stage()
    torch.rand(5)
    ours, theirs = first.step(0)["opening"], second.step(0)["opening"]
    assert ours == theirs and not moved(weights(first.model), second.model)
    assert teacher_stage().step(1)["opening"] != ours


def test_a_student_that_its_teacher_would_not_change_does_not_move() -> None:
    """Teacher and critic begin as one network, and where the caption is empty guidance adds nothing: they agree to
    the bit, so nothing pulls, and the critic alone learns. With a caption the guided teacher asks for more.
    """
    still, pulled = student_stage(caption=""), student_stage()
    before, critic = weights(still.model), copy.deepcopy(still.state()["critic"]["masters"])
    losses = still.step(0)
    assert losses["matching"] == losses["opening"] == 0 and not moved(before, still.model)
    assert losses["critic"] > 0 and losses["critic_opening"] > 0
    assert any(not torch.equal(critic[name], master) for name, master in still.state()["critic"]["masters"].items())
    losses = pulled.step(0)
    assert losses["matching"] > 0 and losses["opening"] > 0 and losses["matching"] != losses["opening"]
    assert moved(before, pulled.model)


def test_a_student_reads_captions_as_the_teacher_learned_to() -> None:
    stage = student_stage()
    text = stage._captions
    before = weights(text)
    stage.step(0)
    assert not moved(before, text) and not any(p.requires_grad for p in text.parameters())


def test_snapshots_are_averages_kept_every_so_many_steps() -> None:
    stage, averages = student_stage(), {}
    for index in range(4):
        stage.step(index)
        averages[str(index + 1)] = {name: t.clone() for name, t in stage.ema.shadow.items()}
    assert list(stage.snapshots) == ["2", "4"]
    for number, snapshot in stage.snapshots.items():
        for name, kept in snapshot.items():
            assert kept.dtype == torch.bfloat16
            assert_close(kept.float(), averages[number][name], rtol=2**-8, atol=0)  # bf16 keeps 8 bits


@pytest.mark.parametrize(("every", "kept"), [(3, ["3", "4"]), (9, ["4"])])
def test_the_last_step_can_always_be_chosen(every: int, kept: list[str]) -> None:
    stage = student_stage(snapshot_every=every)
    for index in range(stage.steps):
        stage.step(index)
    assert list(stage.snapshots) == kept


def test_a_student_goes_on_from_its_state() -> None:
    """Two steps, kept, and two by another stage that took it over: the bits of four."""
    straight, broken, resumed = student_stage(), student_stage(), student_stage()
    for index in range(4):
        straight.step(index)
    for index in range(2):
        broken.step(index)
    resumed.load(copy.deepcopy(broken.state()))
    for index in range(2, 4):
        resumed.step(index)
    assert not moved(weights(straight.model), resumed.model)
    for name, average in straight.ema.shadow.items():
        assert torch.equal(average, resumed.ema.shadow[name])
    assert list(resumed.snapshots) == list(straight.snapshots)


def test_a_packed_student_can_still_be_chosen_from(tmp_path: Path) -> None:
    """Packed at its last step: elsewhere the stage is done at once, and every snapshot is there, bit for bit."""
    stage, elsewhere = student_stage(), student_stage()
    for index in range(4):
        stage.step(index)
    pack(stage.state(), 4, "student", tmp_path)
    common = {"device": CPU, "seconds": None, "checkpoint_seconds": 1e9, "log_every": 1}
    assert run_stage(elsewhere, tmp_path, **common)
    assert (tmp_path / "student.jsonl").read_text() == ""
    (tmp_path / "choice.json").write_text('{"best": "2"}')
    chosen = Workshop(Settings(), tmp_path, CPU).chosen()
    for snapshot in (elsewhere.snapshots["2"], chosen):
        assert snapshot.keys() == stage.snapshots["2"].keys()
        assert all(torch.equal(tensor, stage.snapshots["2"][name]) for name, tensor in snapshot.items())
    assert list(elsewhere.snapshots) == ["2", "4"]
