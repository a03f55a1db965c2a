"""On a GPU: the training room's fast roads give what its plain ones give. Skipped without one."""
from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from training.graphs import Graphs
from training.memory import ChunkCausalAttention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_replayed_step_equals_a_plain_one() -> None:
    """Captured once, replayed with other inputs: the function's own results, and what it wrote elsewhere."""
    device, weight = torch.device("cuda"), torch.randn(8, 8, device="cuda", requires_grad=True)
    graphs, gradient = Graphs(device), torch.zeros(8, 8, device="cuda")

    def step(x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = (x @ weight).square().mean()
        gradient.copy_(torch.autograd.grad(loss, weight)[0])
        return {"loss": loss}

    for seed in range(4):
        x = torch.randn(5, 8, device=device, generator=torch.Generator(device).manual_seed(seed))
        replayed = graphs("step", step, x)["loss"]
        written = gradient.clone()
        assert_close(replayed, step(x)["loss"].detach())
        assert_close(written, gradient)


def test_block_sparse_attention_equals_the_masked_one() -> None:
    """The layout of teacher forcing, in float32: forward and gradients."""
    chunk, tokens = 12, 72
    query, keys, values = (torch.randn(2, tokens, 2, 32, requires_grad=True) for _ in range(3))
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        inputs = [x.detach().to(device).requires_grad_() for x in (query, keys, values)]
        attend = ChunkCausalAttention(chunk, tokens, device)
        attend = torch.compile(attend) if device.type == "cuda" else attend
        out = attend(*inputs)
        out.square().sum().backward()
        results.append([out.detach().cpu(), *(x.grad.cpu() for x in inputs)])
    for ours, plain in zip(*results, strict=True):
        assert_close(ours, plain, rtol=0, atol=2e-2)  # the kernel may multiply in tf32
