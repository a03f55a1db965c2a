"""The training room computes what inference computes: same flows, same windows, same autoencoder."""
from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
import torch
from conftest import SMALL, make_tiny, policy_of
from safetensors.torch import load_file
from torch.testing import assert_close

from training.loop import learning_rate, load_state, pack, run_stage, save_state
from training.memory import RolloutMemory, Rotation, dense
from training.optim import Muon, Optimizers
from training.parts import CaptionEncoder, export_transformer, make_text_encoder, make_tokenizer, make_vae
from training.settings import DataSettings, Settings, TextSettings, VaeSettings
from training.teacher import OpeningFlow, TeacherForcedFlow
from training.vae import VaeStage
from training.workshop import Workshop
from training.world import sample, spellings, words
from training.world.wording import written
from utils.config import REPOSITORY, ConfigError
from wan.vae import WanVAE
from wan.vae_passes import VaePasses

FRAMES = 9
CPU = torch.device("cpu")
FULL = {"policy": "full", "window_frames": FRAMES}


def inputs(tiny, batch: int = 2):
    generator = torch.Generator().manual_seed(5)
    shape = (batch, FRAMES, SMALL.in_dim, tiny.geometry.latent_height, tiny.geometry.latent_width)
    clean, noise = torch.randn(2, *shape, generator=generator)
    return clean, noise, torch.randn(batch, SMALL.text_len, SMALL.text_dim, generator=generator)


@pytest.mark.parametrize("chunk_frames", [1, 3])
def test_teacher_forcing_equals_inference(chunk_frames: int) -> None:
    """All chunks at once under the mask give the KV cache's flow, chunk by chunk; float32 sums differ in order."""
    tiny = make_tiny(chunk_frames)
    clean, noise, embeddings = inputs(tiny)
    chunks = FRAMES // chunk_frames
    sigma = torch.linspace(0.2, 0.9, chunks).repeat_interleave(chunk_frames).expand(2, -1)
    noisy = (1 - sigma[..., None, None, None]) * clean + sigma[..., None, None, None] * noise
    pipeline = tiny.pipeline(policy_of(FULL), batch=2)
    pipeline.cache.reset([0, 1])
    text, flows = pipeline.model.embed_text(embeddings), []
    for span in tiny.geometry.chunks(FRAMES):
        pipeline.cache.begin(span)
        part = slice(span.start, span.stop)
        flows.append(pipeline.model(noisy[:, part], 1000 * sigma[:, part], text, pipeline.cache))
        pipeline.remember(clean[:, part], text)
    at_once = TeacherForcedFlow(tiny.geometry, SMALL, FRAMES, CPU)
    model = at_once.attach(make_tiny(chunk_frames).model)
    ours = at_once(model, clean, noisy, sigma, embeddings)
    assert_close(ours, torch.cat(flows, dim=1), rtol=0, atol=2e-5)


def test_an_opening_alone_equals_the_first_chunk() -> None:
    """Nothing is before the first chunk, so the short road of openings gives its flow in a whole clip."""
    tiny = make_tiny()
    clean, noise, embeddings = inputs(tiny)
    sigma = torch.linspace(0.3, 0.9, 3).repeat_interleave(3).expand(2, -1)
    flows = []
    for flow, frames in ((TeacherForcedFlow(tiny.geometry, SMALL, FRAMES, CPU), FRAMES),
                         (OpeningFlow(tiny.geometry, SMALL, CPU), 3)):
        model = flow.attach(make_tiny().model)
        flows.append(flow(model, clean[:, :frames], noise[:, :frames], sigma[:, :frames], embeddings))
    assert_close(flows[1], flows[0][:, :3], rtol=0, atol=2e-5)


def test_clips_of_broken_chunks_are_refused(tmp_path: Path) -> None:
    """Before anything is drawn; the compressor's own clips are checked by its stage."""
    with pytest.raises(ConfigError, match="data.latent_frames=21 must be whole chunks of chunk_frames=4. Use 20"):
        Workshop(Settings(chunk_frames=4), tmp_path, CPU).clips()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("changed", ["clips", "latent_frames", "chunk_frames", "seed", "vae"])
def test_clips_are_kept_for_the_settings_that_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changed: str,
) -> None:
    """The same settings and autoencoder find what they made; any other make what a fresh folder would."""
    sizes = VaeSettings(base_dim=8)
    caplog.set_level("INFO")

    def shop(folder: str, *, other: bool) -> Workshop:
        data = DataSettings(clips=1, openings=1, latent_frames=6)
        settings = Settings(vae=sizes, data=data, chunk_frames=3)
        if other and changed != "vae":
            value = {"clips": 2, "latent_frames": 9}.get(changed, 1)
            setattr(data if changed in vars(data) else settings, changed, value)
        torch.manual_seed(int(other and changed == "vae"))
        vae = make_vae(sizes, 16)
        (tmp_path / folder).mkdir(exist_ok=True)
        save_state(tmp_path / folder / "vae.pt", {"stage": {"ema": dict(vae.named_parameters())}})
        return Workshop(settings, tmp_path / folder, CPU)

    made = shop("a", other=False).clips()
    with monkeypatch.context() as patch:
        patch.setattr("training.workshop.make_clips", None)  # kept ones are read, not made
        kept = shop("a", other=False).clips()
    assert all(torch.equal(ours.latents, same.latents) for ours, same in zip(made, kept, strict=True))
    assert "latents.pt" not in caplog.text
    remade, fresh = shop("a", other=True).clips(), shop("b", other=True).clips()
    for ours, theirs in zip(remade, fresh, strict=True):
        assert torch.equal(ours.latents, theirs.latents) and torch.equal(ours.ids, theirs.ids)
    assert caplog.text.count("latents.pt") == 1


def test_rollout_memory_equals_the_cache() -> None:
    """The appended windows that gradients pass through show attention what the KV cache shows it."""
    tiny = make_tiny()
    clean, noise, embeddings = inputs(tiny)
    pipeline = tiny.pipeline(policy_of(FULL), batch=2)
    pipeline.cache.reset([0, 1])
    memory = RolloutMemory(Rotation(tiny.geometry, SMALL.head_dim, CPU), SMALL.num_layers, CPU)
    text, t = pipeline.model.embed_text(embeddings), torch.full((2, 3), 750.0)
    for span in tiny.geometry.chunks(FRAMES):
        part = slice(span.start, span.stop)
        pipeline.cache.begin(span)
        memory.begin(span)
        flow = pipeline.model(noise[:, part], t, text, pipeline.cache)
        assert_close(pipeline.model(noise[:, part], t, text, memory), flow, rtol=0, atol=2e-5)
        pipeline.remember(clean[:, part], text)
        pipeline.model(clean[:, part], 0 * t, text, memory)
        memory.commit()


def test_gradient_stays_in_the_chunk() -> None:
    """A rollout's memory carries no gradient into earlier chunks, and the current chunk's does reach the weights."""
    tiny = make_tiny()
    model = tiny.model.requires_grad_(True)
    for block in model.blocks:
        block.self_attn.backend = block.cross_attn.backend = dense
    memory = RolloutMemory(Rotation(tiny.geometry, SMALL.head_dim, CPU), SMALL.num_layers, CPU)
    clean, _, embeddings = inputs(tiny)
    clean.requires_grad_(True)
    text, t = model.embed_text(embeddings), torch.zeros(2, 3)
    for span in tiny.geometry.chunks(FRAMES):
        memory.begin(span)
        flow = model(clean[:, span.start:span.stop], t, text, memory)
        memory.commit()
    flow.square().sum().backward()
    assert clean.grad[:, :6].abs().max() == 0
    assert clean.grad[:, 6:].abs().min(dim=1).values.max() > 0
    assert model.blocks[0].self_attn.k.weight.grad.abs().max() > 0


def test_the_parallel_autoencoder_equals_the_streaming_one() -> None:
    """Whole clips at once, as trained, against frame by frame with caches, as used."""
    torch.manual_seed(0)
    vae = make_vae(VaeSettings(base_dim=8), 16).eval()
    with torch.no_grad():  # a fresh one is an image autoencoder with silent branches: wake them
        for parameter in vae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * max(1, parameter[0].numel()) ** -0.5)
    streaming = WanVAE(vae)
    pixels = torch.rand(2, 17, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        mean, _ = VaePasses(vae).encode(pixels.transpose(1, 2))
        decoded = VaePasses(vae).decode(mean).transpose(1, 2)
    assert_close(mean.transpose(1, 2), streaming.encode(pixels), rtol=0, atol=1e-5)
    assert_close(decoded.clamp(-1, 1), streaming.stream().decode(mean.transpose(1, 2)), rtol=0, atol=2e-5)


def test_muon_equals_the_library_one() -> None:
    """Batched by shape, against torch's, which takes one matrix after the other."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (8, 12), "b": (8, 12), "c": (12, 5)}
    ours = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    theirs = [torch.nn.Parameter(m.clone()) for m in ours.values()]
    muon, library = Muon(ours), torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for mine, other in zip(ours.values(), theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        muon.step(0.01)
        library.step()
    for mine, other in zip(ours.values(), theirs, strict=True):
        assert_close(mine, other.detach(), rtol=0, atol=2e-3)  # both iterate in bf16; an update's RMS is 2e-3 a step


def test_captions_are_whole_words() -> None:
    """Every caption of the world is known to the tokenizer, fits the text length, and batching does not change it."""
    tokenizer = make_tokenizer(words())
    encoder = CaptionEncoder(
        tokenizer,
        make_text_encoder(TextSettings(layers=1, heads=2, ffn_dim=16), 16, tokenizer.get_vocab_size()),
        32,
    )
    captions = [sample(seed).caption for seed in range(200)]
    ids = encoder.tokens(captions)
    assert (ids != tokenizer.token_to_id("<unk>")).all()
    ends = (ids == tokenizer.token_to_id("</s>")).sum(dim=1)
    assert (ends == 1).all()
    with torch.no_grad():
        together = encoder.eval()(ids[:4])
        assert_close(together[2:3], encoder(ids[2:3]), rtol=0, atol=1e-5)


def test_other_words_are_read_as_the_grammar_writes_them() -> None:
    """Synonyms become trained words, fillers nothing; what the grammar writes stays; the shipped file does the same."""
    tokenizer, trained = make_tokenizer(words(), spellings()), set(written())
    for seed in range(1000):
        for split in ("train", "test", "free"):
            caption = sample(seed, split).caption
            assert tokenizer.normalizer.normalize_str(caption) == caption.lower()
            assert set(re.findall("[a-z]+", caption.lower())) <= trained
    for word in words():
        assert set(tokenizer.normalizer.normalize_str(word).split()) <= trained, word
    for said, meant in {
        "A tiny disc twirls quickly on a blue wall.": "a small circle spins on a dark blue background .",
        "We see a pair of violet boxes gliding over a grainy forest green field":
            "two purple squares drifting a cloudy dark green background",
        "One huge turquoise donut, looping on a dark gray scene with checks":
            "a large cyan ring , orbiting on a charcoal background with checkerboard",
        "Three red dots on a green striped backdrop": "three red circles on a dark green striped backdrop",
    }.items():
        assert tokenizer.encode(said).tokens[:-1] == meant.split()
    shipped = json.loads((REPOSITORY / "weights/tiny/tokenizer/tokenizer.json").read_text())
    assert shipped == json.loads(tokenizer.to_str())


def test_a_fresh_text_encoder_reads_in_order() -> None:
    """By the library's own distances: heads prefer the word before, the word after, all before, nothing."""
    attention = make_text_encoder(TextSettings(), 128, 40).encoder.block[1].layer[0].SelfAttention
    bias = attention.compute_bias(7, 7)[0].detach()  # [heads, asking, asked]
    middle = torch.arange(1, 6)
    assert torch.equal(bias[0].argmax(1)[middle], middle - 1)
    assert torch.equal(bias[1].argmax(1)[middle], middle + 1)
    assert torch.equal(bias[2] == 0, torch.ones(7, 7).tril().bool())
    assert torch.equal(bias[3], torch.zeros(7, 7))


class Count:
    """A stage that fits one number; its state is its weights."""

    name = "count"

    def __init__(self, steps: int):
        torch.manual_seed(0)
        self.steps = steps
        self.module = torch.nn.Linear(3, 1)
        self.optimizers = Optimizers(self.module, lr=0.0, lr_rest=0.05)

    def state(self) -> dict:
        return {"optimizers": self.optimizers.state()}

    def load(self, state: dict) -> None:
        self.optimizers.load(state["optimizers"])

    def step(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(index))
        loss = (self.module(x) - x.sum(dim=1, keepdim=True)).square().mean()
        self.optimizers.backward(loss)
        self.optimizers.step(learning_rate(index, self.steps))
        return {"loss": loss}


def test_a_stage_resumes_exactly(tmp_path) -> None:
    """Stopped and gone on equals never stopped, optimiser included."""
    common = {"device": CPU, "checkpoint_seconds": 1e9, "log_every": 5}
    straight = Count(30)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert run_stage(straight, tmp_path / "a", seconds=None, **common)
    assert not run_stage(Count(30), tmp_path / "b", seconds=0.0, **common)  # stops after the first log
    resumed = Count(30)
    assert run_stage(resumed, tmp_path / "b", seconds=None, **common)
    for a, b in zip(straight.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b)


def small_vae_stage(monkeypatch: pytest.MonkeyPatch, steps: int) -> VaeStage:
    monkeypatch.setattr("training.vae.POOL_CLIPS", 8)
    sizes = VaeSettings(steps=steps, image_steps=steps, image_batch=4, base_dim=8)
    return VaeStage(Settings(vae=sizes), 16, CPU)


def losses_in(folder: Path) -> list[float]:
    return [json.loads(line)["loss_image"] for line in (folder / "vae.jsonl").read_text().splitlines()]


def test_packed_weights_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and averages in bf16 with a fresh optimiser: the next losses are within 5 % of unbroken training.

    Both runs see the same clips and noise, so the loss differs by rounding and by what the optimiser forgot.
    """
    steps, broken = 90, 70
    common = {"device": CPU, "checkpoint_seconds": 1e9, "log_every": 10}
    folders = {name: tmp_path / name for name in ("straight", "first", "packed")}
    for folder in folders.values():
        folder.mkdir()
    run_stage(small_vae_stage(monkeypatch, steps), folders["straight"], seconds=None, **common)
    first = small_vae_stage(monkeypatch, steps)
    for index in range(broken):
        first.step(index)
    pack(first.state(), broken, "vae", folders["packed"])
    second = small_vae_stage(monkeypatch, steps)
    assert run_stage(second, folders["packed"], seconds=None, **common)
    for name, average in second.ema.shadow.items():
        assert average.dtype == torch.float32, name
    straight, resumed = losses_in(folders["straight"])[broken // 10:], losses_in(folders["packed"])
    assert len(straight) == len(resumed) == (steps - broken) // 10
    for ours, unbroken in zip(resumed, straight, strict=True):
        assert abs(ours / unbroken - 1) < 0.05


def test_packed_weights_of_another_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that does not fit names what differs, and nothing is trained."""
    stage = small_vae_stage(monkeypatch, 10)
    pack({"ema": {"alien": torch.zeros(2)}}, 5, "vae", tmp_path)
    with pytest.raises(ValueError, match="alien"):
        run_stage(stage, tmp_path, device=CPU, seconds=None, checkpoint_seconds=1e9, log_every=1)


def test_a_full_disk_leaves_the_last_state(tmp_path: Path) -> None:
    """The error names the file, which stays as it was; nothing else lies beside it."""
    path = tmp_path / "vae.pt"
    save_state(path, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(path))):
            save_state(path, {"step": 2, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_state(path, CPU) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_shards_are_small_and_hold_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers fit into a shard; what is larger has one of its own, and none is empty."""
    monkeypatch.setattr("training.parts.SHARD_BYTES", 4)
    tensors = {name: torch.full((size,), float(size)) for name, size in {"a": 3, "b": 1, "c": 1, "d": 2}.items()}
    export_transformer(tensors, tmp_path)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    held = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert sorted(map(sorted, held.values())) == [["a"], ["b", "c"], ["d"]]
    assert index["metadata"]["total_size"] == 2 * (3 + 1 + 1 + 2)
    for name, tensor in tensors.items():
        assert torch.equal(held[index["weight_map"][name]][name], tensor.bfloat16())
