"""What one step of training does, against numbers worked out on paper: losses, rates, averages, guidance."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, make_tiny, policy_of
from pytest import approx
from torch import Tensor, nn
from torch.testing import assert_close

from pipeline.sampler import FewStepSampler
from training.data import LatentClips, normalise, statistics
from training.loop import Ema, learning_rate
from training.matching import DistributionMatching
from training.memory import RolloutMemory, Rotation, dense
from training.optim import Optimizers
from training.rollout import self_rollout
from training.samples import sample_videos
from training.teacher import draw_sigmas
from training.vae import reconstruction_loss

CPU = torch.device("cpu")
LEVELS = torch.tensor([[0.5, 0.25]])  # of two frames


class Answers:
    """A flow that is the prompt's number plus 1 by the teacher, plus 2 by the critic, and sees the clean video."""

    def __init__(self, critic: nn.Module):
        self._critic, self.contexts = critic, []

    def attach(self, model: nn.Module) -> nn.Module:
        return model

    def __call__(self, model: nn.Module, context: Tensor, noisy: Tensor, sigma: Tensor, embeddings: Tensor) -> Tensor:
        self.contexts.append(context)
        number = model.bias + (2 if model is self._critic else 1)
        return torch.zeros_like(noisy) + embeddings[:, :, :, None, None] + number


def two_frames(*values: float) -> Tensor:
    """[1, 2 frames, 2 channels, 1, 1]."""
    return torch.tensor(values, dtype=torch.float32).view(1, 2, 2, 1, 1)


@pytest.fixture
def matching() -> tuple[DistributionMatching, Answers, nn.Module]:
    teacher, critic = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.zeros_(teacher.bias)
    nn.init.zeros_(critic.bias)
    return DistributionMatching(teacher, critic, guidance=3.0, lr=0.1), Answers(critic), critic


def test_distribution_matching_by_hand(matching) -> None:
    """A prompt of 1 and an empty one of 0: the teacher answers 2 and 1, the critic 3. The videos that these mean:

    | frame | noisy    | with prompt | without    | guided   | critic     | distance to guided | pull  |
    | 0     | 2, 2     | 1, 1        | 1.5, 1.5   | 0, 0     | 0.5, 0.5   | 2                  | 0.25  |
    | 1     | 1.5, 2.5 | 1, 2        | 1.25, 2.25 | 0.5, 1.5 | 0.75, 1.75 | 2                  | 0.125 |
    """
    loss_of, flow, _ = matching
    video = two_frames(1, 3, 2, 4).requires_grad_()
    noise, prompt, nothing = two_frames(3, 1, 0, -2), torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    loss = loss_of.loss(flow, video, prompt, nothing, noise, LEVELS)
    loss.backward()
    assert_close(video.grad, two_frames(0.25, 0.25, 0.125, 0.125) / 4)
    assert loss.item() == approx(0.5 * (0.25**2 + 0.125**2) / 2)
    assert len(flow.contexts) == 3 and all(torch.equal(context, video) for context in flow.contexts)


def test_the_critics_loss_by_hand(matching) -> None:
    """It answers 3 where the flow from video to noise is 2, -2, -2, -6; its own weights learn, a quarter of 2 * 20."""
    loss_of, flow, critic = matching
    loss = loss_of.critic_loss(flow, two_frames(1, 3, 2, 4), torch.ones(1, 1, 1), two_frames(3, 1, 0, -2), LEVELS)
    loss.backward()
    assert loss.item() == (1 + 25 + 25 + 81) / 4 and critic.bias.grad.item() == 2 * 20 / 4


def test_rates_warm_up_and_gradients_are_clipped() -> None:
    """A constant gradient moves AdamW by its rate and Muon by its own, each step: k fiftieths of them in step k."""
    module = nn.ModuleDict({"blocks": nn.Linear(4, 4)})
    weight, bias = module["blocks"].weight, module["blocks"].bias
    optimizers = Optimizers(module, lr=0.02, lr_rest=0.1)
    moved = []
    for step in range(60):
        before = optimizers.masters["blocks.weight"].clone(), optimizers.masters["blocks.bias"].clone()
        optimizers.backward(30 * weight.diagonal().sum() + 40 * bias.sum())
        optimizers.step(0.5)
        moved.append([(a - b).norm().item() for a, b in zip(before, (weight, bias), strict=True)])
        if step == 0:  # norms: 60 of the weight's gradient and 80 of the bias's
            first = optimizers.state()["adamw"]["state"][0]["exp_avg"] / (1 - 0.9)
            assert_close(first, torch.full((4,), 0.4))
    for step, (matrix, rest) in enumerate(moved, 1):
        share = min(1.0, step / 50)
        assert rest == approx(0.5 * 0.1 * share * 2, rel=1e-3)  # four numbers, each by the rate
        assert matrix == approx(moved[-1][0] * share, rel=0.03)
    assert moved[-1][0] == approx(0.5 * 0.02 * 0.2 * 4, rel=0.3)  # RMS 0.2 of its rate; 0.7 to 1.2 of that in 5 rounds


def test_learning_rate_by_hand() -> None:
    """A plateau until 60 %, half at 80 %, 2 % at the end; or from 40 % on, half at 70 %."""
    assert [learning_rate(i, 100) for i in (0, 59, 60, 80, 100)] == approx([1, 1, 1, 0.5, 0.02])
    assert [learning_rate(i, 100, decay_from=0.4) for i in (39, 70, 97, 99)] == approx([1, 0.5, 0.05, 0.02])


def test_averages_by_hand() -> None:
    """In step 0 a tenth of the past stays, later what `decay` says; the tensors are those that training changes."""
    live = {"a": torch.tensor([1.0])}
    average = Ema(live, decay=0.75)
    live["a"].fill_(2.0)
    average.update(0)
    assert average.shadow["a"].item() == approx(0.1 * 1 + 0.9 * 2)
    live["a"].fill_(4.0)
    average.update(1000)
    assert average.shadow["a"].item() == approx(0.75 * 1.9 + 0.25 * 4)


def test_levels_are_the_samplers() -> None:
    """Of uniform times, the noise levels of a sampler with the same shift: their quantiles agree."""
    levels = draw_sigmas((100_000,), torch.Generator().manual_seed(0), CPU)
    sampler = FewStepSampler([900, 750, 500, 250, 100], shift=5.0, warp=True)
    quantiles = levels.quantile(torch.tensor([0.9, 0.75, 0.5, 0.25, 0.1]))
    assert_close(quantiles, torch.tensor(sampler.sigmas, dtype=torch.float32), rtol=0, atol=0.01)
    assert levels.min() > 0 and levels.max() <= 1


def test_guidance_goes_beyond_the_prompt() -> None:
    """One pass of one chunk is linear in the flow: at 0 the empty prompt's, at 1 the prompt's, at 3 beyond it."""
    tiny = make_tiny()
    shop = SimpleNamespace(
        device=CPU, geometry=tiny.geometry, architecture=SMALL,
        settings=SimpleNamespace(data=SimpleNamespace(latent_frames=3)),
    )
    sampler = FewStepSampler([1000], shift=5.0, warp=True)
    prompt, nothing = tiny.text(1, batch=2), tiny.text(2)
    with_prompt, without = (
        sample_videos(shop, tiny.model, some, sampler, None, None) for some in (prompt, nothing.expand_as(prompt))
    )
    assert (with_prompt - without).abs().max() > 1e-3
    for guidance in (0.0, 1.0, 3.0):
        guided = sample_videos(shop, tiny.model, prompt, sampler, nothing, guidance)
        assert_close(guided, without + guidance * (with_prompt - without), rtol=0, atol=1e-4)


def test_edges_count_more_by_hand() -> None:
    """A picture that is black, white in its right half, against grey: columns up to two from the edge count double.

    Of 12 columns the edge is after the 6th, so the 4th to 8th are near it; the only differences are those 5 rows of 1.
    """
    true = torch.zeros(1, 3, 1, 5, 12)
    true[..., 6:] = 1
    plain, near = 0.5, 0.5 * 5 / 12
    loss = reconstruction_loss(torch.full_like(true, 0.5), true, edge_weight=1.0, gradient_weight=0.0)
    assert loss.item() == approx(plain + near)
    loss = reconstruction_loss(torch.full_like(true, 0.5), true, edge_weight=0.0, gradient_weight=3.0)
    assert loss.item() == approx(plain + 3 * 1 / 11)


def test_clips_are_normalised_by_their_statistics() -> None:
    """Of channels with other means and deviations, every one has 0 and 1 afterwards; bf16 rounds to 0.4 %."""
    latents = torch.randn(50, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    spread = torch.tensor([0.25, 3.0])[:, None, None]
    clips = LatentClips((latents * spread + 2 * spread).bfloat16(), torch.zeros(50, 4, dtype=torch.long))
    mean, std = statistics(clips)
    assert_close(std, torch.tensor([0.25, 3.0]), rtol=0.02, atol=0)
    assert_close(mean, torch.tensor([0.5, 6.0]), rtol=0.02, atol=0)
    after = statistics(normalise(clips, mean, std))
    assert_close(after[0], torch.zeros(2), rtol=0, atol=0.01)
    assert_close(after[1], torch.ones(2), rtol=0, atol=0.01)


def test_a_rollout_is_what_inference_makes() -> None:
    """From the same noise, chunk by chunk; only a chunk's last pass is differentiated, never that which remembers."""
    tiny = make_tiny()
    policy, source, spans = policy_of({"policy": "full", "window_frames": 9}), tiny.noise(), tiny.geometry.chunks(9)
    noise = torch.stack([torch.cat([source.draw(span, index) for span in spans], dim=1) for index in range(2)])
    expected, sampler, grads = tiny.run(policy, 9), tiny.pipeline(policy).sampler, []
    memory = RolloutMemory(Rotation(tiny.geometry, SMALL.head_dim, CPU), SMALL.num_layers, CPU)
    model = tiny.model.requires_grad_(True)
    for block in model.blocks:
        block.self_attn.backend = block.cross_attn.backend = dense
    model.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    text = model.embed_text(tiny.text())
    video = self_rollout(model, sampler, tiny.geometry, memory, text, noise)
    assert_close(video.detach(), expected, rtol=0, atol=1e-4)
    assert grads == [False, True, False] * 3
