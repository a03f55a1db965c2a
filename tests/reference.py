"""A slow float64 reference: the causal Wan DiT, and chunk-wise generation under every cache policy.

It exists to be compared with, so it shares nothing with the code it checks and knows no shortcut. Every remembered
token is one record in a Python list per layer, with its key as it was before any rotation. RoPE is applied from
scratch, to the token's (time, row, col), each time it is attended or scored. Samples of a batch run one by one.

F frames, C channels, h x w latent rows and columns, n new tokens, N attended tokens, H heads, D head dim.
Times, frames and positions are in latent frames.
Source: Wan2.1 (the network), Self Forcing arXiv:2506.08009 (the loop), Deep Forcing arXiv:2512.05081 (policies).
"""
import math

import torch
from torch.nn.functional import gelu, silu, softmax

PATCH = 2                # rows and columns per token; a token is one frame deep
ROPE_THETA = 10000.0
SCHEDULE_STEPS = 1000
LAYOUTS = ("released", "unified", "contiguous", "original")
VOTES = ("both", "past", "denoising")


# --- the network -----------------------------------------------------------------------------------------

def rotate(x, time, row, col):
    """3D RoPE of x [n, H, D] (float64) at time, row, col, each [n]; channels are time, then height, then width."""
    dim = x.shape[-1]
    spatial = 2 * (dim // 6)
    turned, start = [], 0
    for position, width in ((time, dim - 2 * spatial), (row, spatial), (col, spatial)):
        rate = ROPE_THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = (position.double()[:, None] * rate)[:, None, :]
        even, odd = x[..., start:start + width:2], x[..., start + 1:start + width:2]
        pair = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        turned.append(torch.stack(pair, -1).flatten(-2))
        start += width
    return torch.cat(turned, -1)


def attention(q, k, v):
    """Dense attention: q [n, H, D], k and v [N, H, D] -> [n, H, D]."""
    weight = softmax(torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1]), -1)
    return torch.einsum("hnm,mhd->nhd", weight, v)


def token_grid(num_frames, rows, cols):
    """(frame, row, col) of every token, each [num_frames * rows * cols]: frame slowest, col fastest."""
    axes = (torch.arange(num_frames), torch.arange(rows), torch.arange(cols))
    return tuple(axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))


class ReferenceModel:
    """The causal Wan DiT of one state dict (original Wan names, no prefix), in float64."""

    def __init__(self, state_dict, config, eps=1e-6):
        self.weights = {name: tensor.double() for name, tensor in state_dict.items()}
        self.dim, self.heads, self.layers = config["dim"], config["num_heads"], config["num_layers"]
        self.freq_dim, self.text_len, self.channels = config["freq_dim"], config["text_len"], config["out_dim"]
        self.eps = eps

    def linear(self, name, x):
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def layer_norm(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def rms_norm(self, name, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weights[name + ".weight"]

    def split(self, x):
        return x.unflatten(-1, (self.heads, self.dim // self.heads))

    def text(self, prompt_embeds):
        """prompt_embeds [L, text_dim], L <= text_len -> [text_len, dim]; padding rows are embedded too."""
        padding = prompt_embeds.new_zeros(self.text_len - prompt_embeds.shape[0], prompt_embeds.shape[1])
        x = torch.cat((prompt_embeds, padding)).double()
        return self.linear("text_embedding.2", gelu(self.linear("text_embedding.0", x), approximate="tanh"))

    def time(self, t):
        """t [F] -> the embedding e [F, dim] and its projection e0 [F, 6, dim]."""
        half = self.freq_dim // 2
        angle = t.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        e = silu(self.linear("time_embedding.0", torch.cat((angle.cos(), angle.sin()), -1)))
        e = self.linear("time_embedding.2", e)
        return e, self.linear("time_projection.1", silu(e)).unflatten(-1, (6, self.dim))

    def patchify(self, x):
        """x [F, C, h, w] -> tokens [n, dim]: one dot product per patch."""
        f, c, h, w = x.shape
        patch = x.double().reshape(f, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
        weight = self.weights["patch_embedding.weight"].flatten(1)
        return patch.reshape(-1, c * PATCH * PATCH) @ weight.T + self.weights["patch_embedding.bias"]

    def block(self, layer, x, e0, text, attend):
        """One layer on x [n, dim]; e0 [n, 6, dim]; attend(layer, q, k, v), each [n, H, D] unrotated -> [n, H, D]."""
        name = f"blocks.{layer}."
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.weights[name + "modulation"] + e0).unbind(1)
        y = self.layer_norm(x) * (1 + scale1) + shift1
        q = self.split(self.rms_norm(name + "self_attn.norm_q", self.linear(name + "self_attn.q", y)))
        k = self.split(self.rms_norm(name + "self_attn.norm_k", self.linear(name + "self_attn.k", y)))
        v = self.split(self.linear(name + "self_attn.v", y))
        x = x + gate1 * self.linear(name + "self_attn.o", attend(layer, q, k, v).flatten(-2))
        y = self.layer_norm(x) * self.weights[name + "norm3.weight"] + self.weights[name + "norm3.bias"]
        q = self.split(self.rms_norm(name + "cross_attn.norm_q", self.linear(name + "cross_attn.q", y)))
        k = self.split(self.rms_norm(name + "cross_attn.norm_k", self.linear(name + "cross_attn.k", text)))
        v = self.split(self.linear(name + "cross_attn.v", text))
        x = x + self.linear(name + "cross_attn.o", attention(q, k, v).flatten(-2))
        y = self.layer_norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.linear(name + "ffn.2", gelu(self.linear(name + "ffn.0", y), approximate="tanh"))

    def forward(self, x, t, text, attend):
        """Flow [F, C, h, w] of x [F, C, h, w] at timesteps t [F], given text(...) [text_len, dim]."""
        f, _, h, w = x.shape
        per_frame = (h // PATCH) * (w // PATCH)
        e, e0 = self.time(t)
        e, e0 = e.repeat_interleave(per_frame, 0), e0.repeat_interleave(per_frame, 0)
        tokens = self.patchify(x)
        for layer in range(self.layers):
            tokens = self.block(layer, tokens, e0, text, attend)
        shift, scale = (self.weights["head.modulation"] + e[:, None]).unbind(1)
        y = self.linear("head.head", self.layer_norm(tokens) * (1 + scale) + shift)
        y = y.reshape(f, h // PATCH, w // PATCH, PATCH, PATCH, self.channels)     # channel last inside a patch
        return y.permute(0, 5, 1, 3, 2, 4).reshape(f, self.channels, h, w)


# --- the schedule ----------------------------------------------------------------------------------------

class Schedule:
    """Flow-matching table of 1,000 noise levels (float32); sigma of a timestep is its nearest entry."""

    def __init__(self, shift):
        u = torch.linspace(1, 0, SCHEDULE_STEPS + 1)[:-1]
        self.sigmas = shift * u / (1 + (shift - 1) * u)
        self.timesteps = 1000 * self.sigmas

    def sigma(self, t):
        return self.sigmas[(self.timesteps.double() - t).abs().argmin()].double()

    def passes(self, steps, warp):
        """Timesteps of the denoising passes; `warp` reads each step as an index from the end of the table."""
        if not warp:
            return [float(step) for step in steps]
        table = self.timesteps.tolist() + [0.0]
        return [table[SCHEDULE_STEPS - step] for step in steps]


# --- the cache -------------------------------------------------------------------------------------------

class Token:
    """One token: key, value and query [H, D] of the pass that made it (query and key normalised, not rotated),
    the frame it was born in, its place in that frame, and how often it was chosen as top-C."""

    def __init__(self, key, value, query, frame, row, col):
        self.key, self.value, self.query = key, value, query
        self.frame, self.row, self.col = frame, row, col
        self.uses = 0


def rotated(tokens, rows, times):
    """`rows` (one [H, D] tensor per token) rotated to `times` and the tokens' rows and columns: [N, H, D]."""
    place = torch.tensor([(token.row, token.col) for token in tokens])
    return rotate(torch.stack(rows), torch.tensor(times), place[:, 0], place[:, 1])


def participation(candidates, voters):
    """Score of each candidate: sum over voters and heads of q . k / (sqrt(D) H), all at their true frames."""
    heads, dim = candidates[0].key.shape
    keys = rotated(candidates, [token.key for token in candidates], [token.frame for token in candidates])
    score = torch.zeros(len(candidates), dtype=torch.float64)
    for voter in voters:
        query = rotated([voter], [voter.query], [voter.frame])
        score += (query * keys).sum((1, 2))
    return score / (math.sqrt(dim) * heads)


def choose(score, uses, count, limit):
    """Indices of the `count` best, ascending; ties by store order; used-up ones only where others run out."""
    order = sorted(range(len(uses)), key=lambda j: -float(score[j]))              # sorted() is stable
    refused = [j for j in range(len(uses)) if limit and uses[j] >= limit]
    eligible = [j for j in order if j not in refused]
    return sorted((eligible + refused)[:count])


class Memory:
    """What one sample remembers: a list of tokens per layer in store order, and the policy that forgets."""

    def __init__(self, policy, num_layers, rows, cols):
        kind = policy["policy"]
        self.kind, self.frame_tokens, self.rows, self.cols = kind, rows * cols, rows, cols
        self.window = math.inf if kind == "full" else policy["window_frames"]
        self.sink = policy["sink_frames"] if kind in ("sink", "participative") else 0
        self.positions = policy["positions"] if kind in ("sink", "participative") else "original"
        self.decay = policy.get("sink_decay", 1.0)   # of the sink, when frames that leave are averaged into it
        self.recent, self.budget, self.votes, self.limit = 0, 0, "both", 0
        if kind == "participative":
            self.recent, self.budget = policy["recent_frames"], policy["budget_frames"]
            self.votes, self.limit = policy["votes"], policy["topc_max_reuse"]
        if kind not in ("full", "rolling", "sink", "participative") or \
                self.positions not in LAYOUTS or self.votes not in VOTES:
            raise ValueError(f"the reference does not know this policy: {policy}")
        self.tokens = [[] for _ in range(num_layers)]
        self.topc = [0] * num_layers                 # tokens in the block that the latest event chose
        self.seen, self.chunk = 0, -1                # frames remembered or forgotten; index of this chunk
        self.kept, self.chosen, self.scores = {}, {}, {}            # chunk -> one entry per layer
        self.window_tokens, self.times, self.query_positions = [], [], []      # one entry per chunk

    def begin(self, frames):
        """Open the next chunk, of `frames` frames. Its first pass may forget; later ones see the same past."""
        if self.kind == "participative" and self.recent < frames:
            raise ValueError(f"recent_frames={self.recent} is less than a chunk of {frames} frames")
        self.chunk += 1
        self.frames, self.first, self.commit = frames, True, False
        self.window_tokens.append(set())
        self.query_positions.append(set())
        self.times.append([None] * len(self.tokens))

    def attend(self, layer, q, k, v):
        """Self-attention of the chunk's n new tokens over the past and themselves; q, k, v [n, H, D]."""
        grid = zip(*(axis.tolist() for axis in token_grid(self.frames, self.rows, self.cols)), strict=True)
        new = [Token(k[i], v[i], q[i], self.seen + f, row, col) for i, (f, row, col) in enumerate(grid)]
        if self.first and len(self.tokens[layer]) + len(new) > self.window * self.frame_tokens:
            self.forget(layer, new)
        past = self.tokens[layer]
        times, start = self.layout(layer, past)
        self.window_tokens[-1].add(len(past) + len(new))
        self.query_positions[-1].add(start)
        self.times[-1][layer] = times
        now = [start + token.frame - self.seen for token in new]
        keys = rotated(past + new, [token.key for token in past + new], times + now)
        values = torch.stack([token.value for token in past + new])
        if self.commit:
            self.tokens[layer] = past + new
        return attention(rotated(new, [token.query for token in new], now), keys, values)

    def forget(self, layer, new):
        """Drop what the policy does not keep of concat(past, new); the new tokens always stay."""
        past, every = self.tokens[layer], self.tokens[layer] + new
        sink = self.sink * self.frame_tokens
        if self.kind == "participative":
            middle = self.prune(layer, every, sink, len(every) - self.recent * self.frame_tokens)
            tail = self.recent * self.frame_tokens
        else:
            middle, tail = [], self.window * self.frame_tokens - sink
        kept = [*range(sink), *middle, *range(len(every) - tail, len(every))]
        leaving = [token for j, token in enumerate(every) if j not in kept and self.decay < 1]
        for token, old in zip(every, leaving, strict=False):    # a sink's with what leaves: by rank, row and column
            pairs = (token.key, old.key), (token.value, old.value)
            token.key, token.value = (self.decay * mine + (1 - self.decay) * its for mine, its in pairs)
        self.tokens[layer] = [every[j] for j in kept if j < len(past)]
        self.kept.setdefault(self.chunk, []).append(kept)

    def prune(self, layer, every, low, high):
        """Top-C of the candidates every[low:high], as ascending indices into `every`."""
        candidates, recent = every[low:high], every[high:]
        voters = [token for token in recent if self.votes == "both"
                  or (token.frame < self.seen) == (self.votes == "past")]
        score = participation(candidates, voters)
        count = (self.budget - self.sink - self.recent) * self.frame_tokens
        top = [low + j for j in choose(score, [token.uses for token in candidates], count, self.limit)]
        for j in top:
            every[j].uses += 1
        self.topc[layer] = count
        padded = torch.full((len(every),), -math.inf, dtype=torch.float64)
        padded[low:high] = score
        self.chosen.setdefault(self.chunk, []).append(top)
        self.scores.setdefault(self.chunk, []).append(padded)
        return top

    def layout(self, layer, past):
        """Window time of every past token, and of the chunk's first frame."""
        if len(past) == self.seen * self.frame_tokens:                           # nothing forgotten yet
            return [token.frame for token in past], self.seen
        query = min(self.seen, len(past) // self.frame_tokens + self.frames)
        times = [query - (self.seen - token.frame) for token in past]
        if self.positions == "original":
            return times, query
        sink, block = self.sink * self.frame_tokens, self.topc[layer]
        edge = (times + [query])[sink + block]                                   # where the tail begins
        if self.positions in ("unified", "contiguous"):
            edge -= block // self.frame_tokens
            for i in range(block):
                times[sink + i] = edge + i // self.frame_tokens
        base = edge - self.sink if self.positions == "contiguous" else 0
        for i in range(sink):
            times[i] = base + i // self.frame_tokens
        return times, query


# --- generation ------------------------------------------------------------------------------------------

class Rollout:
    """latents [B, F0 + F, C, h, w]; flow_first and flow_last: per generated chunk [B, frames, C, h, w], the
    flow of the first and the last denoising pass; window_tokens and query_positions: per chunk an int;
    times: per chunk [layer][sample] -> window time of each past token; kept, topc, scores: per event
    (chunk_index, [layer][sample] -> indices into concat(cache before, new tokens), or scores over it, -inf
    outside the candidates); tokens: [layer][sample] -> the records that are left. `window_tokens`, `times`
    and every chunk_index count the prefilled chunks (`prefilled_chunks` of them) as well."""

    def __init__(self, parts, prefilled_chunks):
        memories = [memory for memory, _, _, _ in parts]
        self.latents = torch.stack([latents for _, latents, _, _ in parts])
        self.flow_first = [torch.stack(flows) for flows in zip(*(first for _, _, first, _ in parts), strict=True)]
        self.flow_last = [torch.stack(flows) for flows in zip(*(last for _, _, _, last in parts), strict=True)]
        self.prefilled_chunks = prefilled_chunks
        self.window_tokens = [only(*seen) for seen in zip(*(m.window_tokens for m in memories), strict=True)]
        self.query_positions = [only(*seen) for seen in zip(*(m.query_positions for m in memories), strict=True)]
        self.times = [transpose(chunk) for chunk in zip(*(m.times for m in memories), strict=True)]
        self.kept = [(c, transpose([m.kept[c] for m in memories])) for c in memories[0].kept]
        self.topc = [(c, transpose([m.chosen[c] for m in memories])) for c in memories[0].chosen]
        self.scores = [(c, transpose([m.scores[c] for m in memories])) for c in memories[0].scores]
        self.tokens = transpose([m.tokens for m in memories])


def only(*seen):
    """The one value that every pass, layer and sample agrees on."""
    values = set().union(*seen)
    if len(values) != 1:
        raise ValueError(f"passes, layers or samples of one chunk disagree: {sorted(values)}")
    return values.pop()


def transpose(nested):
    """[sample][layer] -> [layer][sample]."""
    return [list(row) for row in zip(*nested, strict=True)]


def chunk_sizes(num_frames, chunk_frames, *, lone_first, remainder_first):
    """Frames per chunk: 1 if `lone_first`, then the remainder (where allowed), then whole chunks."""
    lone = [1] if lone_first and num_frames else []
    whole, rest = divmod(num_frames - len(lone), chunk_frames)
    if rest and not remainder_first:
        raise ValueError(f"{num_frames} frames do not split into chunks of {chunk_frames} (lone first: {lone_first})")
    return lone + ([rest] if rest else []) + [chunk_frames] * whole


def run_sample(model, memory, text, noise, initial, renoise, prefill, chunks, schedule, timesteps, context_time):
    """One sample: (memory, latents [F0 + F, C, h, w], first flows, last flows)."""
    def run(x, t):
        flow = model.forward(x, torch.full((len(x),), t, dtype=torch.float64), text, memory.attend)
        memory.first = False
        return flow

    def remember(x, t):
        memory.commit = True
        run(x, t)
        memory.seen += len(x)

    done, flow_first, flow_last = [], [], []
    for x in initial.split(prefill) if prefill else ():
        memory.begin(len(x))
        remember(x, 0.0)
        done.append(x)
    for index, x in enumerate(noise.split(chunks)):
        memory.begin(len(x))
        flows = []
        for step, t in enumerate(timesteps):
            flows.append(run(x, t))
            x0 = x - schedule.sigma(t) * flows[-1]
            if step + 1 < len(timesteps):
                sigma = schedule.sigma(timesteps[step + 1])
                x = (1 - sigma) * x0 + sigma * renoise(index, step)
        remember(x0, context_time)
        done.append(x0)
        flow_first.append(flows[0])
        flow_last.append(flows[-1])
    return memory, torch.cat(done), flow_first, flow_last


def reference_rollout(model, *, prompt_embeds, noise, renoise, policy, chunk_frames=3, independent_first_frame=False,
                      initial_latent=None, steps=(1000, 750, 500, 250), warp=True, shift=5.0, context_noise=0.0):
    """Generate chunk by chunk and return a Rollout.

    Shapes: prompt_embeds [B, L, text_dim]; noise [B, F, C, h, w]; initial_latent [B, F0, C, h, w] or None.
    renoise(chunk_index, step) -> [B, chunk, C, h, w]: the noise added after denoising pass `step` of a generated
        chunk (prefilled ones not counted); asked once for each pair.
    policy: {"policy": full | rolling | sink | participative} and the keys that it reads: window_frames (all but full);
        sink_frames, positions (sink, participative); sink_decay (sink, 1 if left out); recent_frames, budget_frames,
        votes, topc_max_reuse (participative). Other keys are ignored.
    A prefilled chunk has one pass, its context pass: it forgets there, and those queries vote.
    Raises: ValueError when the frames do not split into chunks, or the policy is unknown; KeyError for a missing key.
    """
    schedule = Schedule(shift)
    lone_prefill = independent_first_frame and initial_latent is not None
    prefill = [] if initial_latent is None else chunk_sizes(
        initial_latent.shape[1], chunk_frames, lone_first=lone_prefill, remainder_first=True)
    chunks = chunk_sizes(noise.shape[1], chunk_frames, remainder_first=False,
                         lone_first=independent_first_frame and not prefill)
    drawn, parts = {}, []
    for b in range(noise.shape[0]):
        def draw(index, step, b=b):
            if (index, step) not in drawn:
                drawn[index, step] = renoise(index, step)
            return drawn[index, step][b].double()
        memory = Memory(policy, model.layers, noise.shape[3] // PATCH, noise.shape[4] // PATCH)
        parts.append(run_sample(
            model, memory, model.text(prompt_embeds[b]), noise[b].double(),
            initial_latent[b].double() if prefill else None, draw, prefill, chunks, schedule,
            schedule.passes(steps, warp), float(context_noise)))
    return Rollout(parts, len(prefill))
