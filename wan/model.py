"""The causal Wan diffusion transformer: embed -> blocks -> head.

It denoises one chunk of latent frames and reads the past through a memory, layer by layer. It knows
neither the cache's policy nor rotary positions. Parameter names are those of Wan2.1's own files.

B batch, F latent frames, C latent channels, L = F * tokens of a frame, T text tokens.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.attention import CrossAttention, SelfAttention
from wan.backends import AttentionBackend, sdpa
from wan.compiler import Compiler, plain
from wan.kv_cache.window import Window


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes of the network; Wan2.1-T2V-1.3B is one set of them (configs/models/).

    Raises:
        ValueError: sizes that cannot be built.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int
    text_dim: int
    text_len: int
    in_dim: int
    out_dim: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2 or self.freq_dim % 2:
            raise ValueError(
                f"transformer.dim={self.dim} must be num_heads={self.num_heads} times an even head size, "
                f"and freq_dim={self.freq_dim} even: rotations and sinusoids come in pairs."
            )
        if self.patch_size[0] != 1:
            raise ValueError(
                f"transformer.patch_size={self.patch_size}: a patch is (1, rows, columns), one latent frame deep."
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


TextContext = tuple[tuple[Tensor, Tensor], ...]  # a prompt as each block reads it: keys and values [B, T, H, D]


class Memory(Protocol):
    """What a layer's self-attention needs of its past: a LayerCache, or anything of this shape."""

    def extend(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        """Normalised [B, L, H, D] without RoPE -> what attention sees."""


class LayeredMemory(Protocol):
    """The past of every layer: a KVCache, or anything of this shape."""

    def layer(self, index: int) -> Memory: ...


def timestep_embedding(t: Tensor, freq_dim: int, dtype: torch.dtype) -> Tensor:
    """Sinusoids [..., freq_dim] of timesteps [...], cosines first; angles in float64."""
    half = freq_dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = t.to(torch.float64).unsqueeze(-1) * 10_000.0**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, F, frame_tokens, C] with shift and scale [B, F, 1, C]."""
    return x * (1 + scale) + shift


@torch.library.custom_op("deep_forcing::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., K] by weight [N, K] and bias [N], then GELU (tanh) -> [..., N].

    On CUDA one kernel, which rounds once where two would twice, and writes and reads [..., N] once less.
    """
    if not x.is_cuda:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True).unflatten(0, x.shape[:-1])


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class MLP(nn.Sequential):
    """Linear, GELU, linear."""

    fused = False  # the first two are one kernel

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__(nn.Linear(inputs, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        first, activation, second = self
        return second(linear_gelu(x, first.weight, first.bias) if self.fused else activation(first(x)))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated per frame.

    What lies between two attention kernels is one function, `_enter`, `_cross` and `_leave`, so that a compiler can
    fuse it; all blocks share what it makes of them.
    """

    def __init__(self, config: WanConfig, backend: AttentionBackend):
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, config.num_heads, eps, backend)
        self.norm3 = nn.LayerNorm(dim, eps=eps)
        self.cross_attn = CrossAttention(dim, config.num_heads, eps, backend)
        self.norm2 = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.ffn = MLP(dim, config.ffn_dim, dim)
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))
        self.compile_parts(plain)

    def compile_parts(self, compiler: Compiler) -> None:
        self._run_enter, self._run_cross, self._run_leave = map(compiler, (Block._enter, Block._cross, Block._leave))

    def forward(self, x: Tensor, modulation: Tensor, text: tuple[Tensor, Tensor], memory: Memory) -> Tensor:
        """x [B, F, frame_tokens, dim], modulation [B, F, 6, dim], text keys and values -> like x."""
        window = self.show(x, modulation, memory)
        attended = self.self_attn.backend(window.query, window.keys, window.values)
        x, query = self._run_cross(self, x, attended, modulation)
        return self._run_leave(self, x, self.cross_attn.backend(query, *text), modulation)

    def show(self, x: Tensor, modulation: Tensor, memory: Memory) -> Window:
        """Hand this layer's query, keys and values to its memory."""
        return memory.extend(*self._run_enter(self, x, modulation))

    def _enter(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shift, scale = self._modulation(modulation)[:2]
        return self.self_attn.project(_modulate(self.norm1(x), shift, scale).flatten(1, 2))

    def _cross(self, x: Tensor, attended: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """What self-attention found [B, L, H, D] joins x; the query to the text [B, L, H, D]."""
        gate = self._modulation(modulation)[2]
        x = x + gate * self.self_attn.o(attended.flatten(2)).unflatten(1, x.shape[1:3])
        return x, self.cross_attn.query(self.norm3(x).flatten(1, 2))

    def _leave(self, x: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """What cross-attention found [B, L, H, D] joins x, and the feed-forward."""
        shift, scale, gate = self._modulation(modulation)[3:]
        x = x + self.cross_attn.o(attended.flatten(2)).unflatten(1, x.shape[1:3])
        return x + gate * self.ffn(_modulate(self.norm2(x), shift, scale))

    def _modulation(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of self-attention, then of the feed-forward; each [B, F, 1, dim]."""
        return (self.modulation + modulation).unsqueeze(2).unbind(3)


class Head(nn.Module):
    """Modulated norm and projection back to patches."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        rows, columns = config.patch_size[1:]
        self.head = nn.Linear(config.dim, rows * columns * config.out_dim)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, F, frame_tokens, dim], embedding [B, F, dim] -> [B, F, frame_tokens, patch * out_dim]."""
        shift, scale = (self.modulation + embedding.unsqueeze(2)).unsqueeze(2).unbind(3)
        return self.head(_modulate(self.norm(x), shift, scale))


class CausalWanModel(nn.Module):
    """Predicts the flow (noise minus clean) of a chunk, given text and memory.

    Weights are uninitialised until loaded; see wan/checkpoint.py and `randomize`.
    Source: Wan2.1 (arXiv:2503.20314), made causal by CausVid and Self Forcing (arXiv:2506.08009).
    """

    def __init__(self, config: WanConfig, backend: AttentionBackend = sdpa):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=config.patch_size, stride=config.patch_size)
        self.text_embedding = MLP(config.text_dim, dim, dim)
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config, backend) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def embed_text(self, embeddings: Tensor) -> TextContext:
        """Prompt embeddings [B, T, text_dim], zero past the prompt's end -> what the blocks read.

        Raises:
            ValueError: not the model's text length or width.
        """
        expected = (self.config.text_len, self.config.text_dim)
        if embeddings.ndim != 3 or tuple(embeddings.shape[1:]) != expected:
            raise ValueError(
                f"prompt embeddings are {tuple(embeddings.shape)}; "
                f"the model needs [batch, {expected[0]}, {expected[1]}]."
            )
        context = self.text_embedding(embeddings.to(self.device, self.dtype))
        return tuple(block.cross_attn.project(context) for block in self.blocks)

    def accelerate(self, compiler: Compiler) -> None:
        """Let `compiler` run the blocks, and if that is not `plain`, make one kernel of q, k and v and one of a linear
        layer and GELU.

        For loaded weights in their final place.
        """
        for block in self.blocks:
            if compiler is not plain:
                block.self_attn.join()
                block.ffn.fused = isinstance(block.ffn[0], nn.Linear)
            block.compile_parts(compiler)

    def forward(self, x: Tensor, t: Tensor, text: TextContext, memory: LayeredMemory) -> Tensor:
        """One pass over a chunk.

        Shapes: x [B, F, C, h, w] noisy latents; t [B, F] timesteps in 0..1000, one per frame.
        Returns: flow [B, F, C, h, w] in the model's dtype.
        """
        embedding, modulation = self._embed_time(t)
        hidden = self._run(self.blocks, self.patchify(x.to(self.dtype)), modulation, text, memory)
        return self._unpatchify(self.head(hidden, embedding), x.shape[-2:])

    def remember(self, x: Tensor, t: Tensor, text: TextContext, memory: LayeredMemory) -> None:
        """One pass for the sake of memory: as `forward`, up to the last layer's keys and values."""
        self.remember_tokens(self.patchify(x.to(self.dtype)), t, text, memory)

    def remember_tokens(self, hidden: Tensor, t: Tensor, text: TextContext, memory: LayeredMemory) -> None:
        """The same for tokens [B, F, n, dim] as `patchify` makes them; n may be any number."""
        modulation = self._embed_time(t)[1]
        hidden = self._run(self.blocks[:-1], hidden, modulation, text, memory)
        self.blocks[-1].show(hidden, modulation, memory.layer(len(self.blocks) - 1))

    def _embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps [B, F] -> embedding [B, F, dim] and the blocks' modulation [B, F, 6, dim]."""
        embedding = self.time_embedding(timestep_embedding(t, self.config.freq_dim, self.dtype))
        return embedding, self.time_projection(embedding).unflatten(-1, (6, -1))

    def _run(
        self, blocks: nn.ModuleList, hidden: Tensor, modulation: Tensor, text: TextContext, memory: LayeredMemory,
    ) -> Tensor:
        for index, block in enumerate(blocks):
            hidden = block(hidden, modulation, text[index], memory.layer(index))
        return hidden

    def patchify(self, x: Tensor) -> Tensor:
        """[B, F, C, h, w] -> [B, F, frame_tokens, dim]; a matrix product does what the convolution would."""
        rows, columns = self.config.patch_size[1:]
        patches = rearrange(x, "b f c (h p) (w q) -> b f (h w) (c p q)", p=rows, q=columns)
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _unpatchify(self, x: Tensor, size: torch.Size) -> Tensor:
        """[B, F, frame_tokens, rows * columns * C] -> [B, F, C, h, w]; channels are last inside a patch."""
        rows, columns = self.config.patch_size[1:]
        return rearrange(x, "b f (h w) (p q c) -> b f c (h p) (w q)", h=size[0] // rows, p=rows, q=columns)


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Seeded random weights of a plausible scale, for benchmarks and tests; never a fallback for missing ones."""
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02, generator=generator)
