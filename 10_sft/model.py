"""The model of today's open weights: dense, or with mixtures of experts in place of the feed-forwards.

Unlike a dense model:

- a layer has many feed-forwards ("experts"), and a router that chooses a few of them for each position;
- so it holds many parameters and uses few of them: what a token costs is one number, what the model knows another.

Shapes: B sequences in a batch, T new positions, S positions that can be looked at, C = n_embd channels, H query heads
and K key-value heads of D channels, F = n_hidden units of the feed-forward, V tokens.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

from shared.errors import BadInput

import torch
import torch.nn.functional as F
from torch import nn

from look import CAUSAL, Look, hidden
from moe import Mixture, MixtureConfig


@dataclass
class ModelConfig(MixtureConfig):
    """The model's shape. Raises BadInput for a shape that cannot be built."""

    vocab_size: int
    block_size: int = 128  # positions the model can look back over
    n_embd: int = 128  # channels of each position's vector
    n_head: int = 2  # heads of queries
    n_kv_head: int = 1  # heads of keys and values, each shared by n_head / n_kv_head heads of queries; 1 is multi-query
    head_dim: int | None = None  # channels of a head; none is n_embd / n_head (in Qwen3-0.6B it is 128, twice that)
    n_layer: int = 4  # blocks: each one attends once and thinks once
    window: int | None = None  # newest positions that one looks at, itself included; none is all that block_size allows
    n_sink: int = 0  # first positions that all look at, outside of the window: what holds a long text together
    n_hidden: int | None = None  # units of the feed-forward; none is 8/3 n_embd: three matrices for the price of two
    qk_norm: bool = True  # norm queries and keys, so that scores cannot grow without bound (Qwen3)
    tied: bool = True  # the token embedding is also the output layer; large models have one of each
    rope_base: float = 10_000.0  # the slowest pair of channels turns once in about 2 pi rope_base positions
    rope_factor: float = 1.0  # how many times slower slow pairs turn, for contexts longer than the one trained on first
    rope_low: float = 1.0  # pairs with fewer turns than this over rope_original positions are slowed down
    rope_high: float = 4.0  # pairs with more turns than this are left alone, those between are slowed in part
    rope_original: int = 8192  # positions that the model was first trained on
    nope_every: int = 0  # 4: every fourth layer has no positions ("NoPE", SmolLM3); 0: all layers have them
    norm_eps: float = 1e-6  # keeps the norm of a vector of zeros finite

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_embd", "n_head", "n_kv_head", "n_layer"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise BadInput(f"n_embd {self.n_embd} does not split into n_head {self.n_head} equal heads: "
                           "choose an n_head that divides n_embd, or give head_dim")
        self.head_dim = self.n_embd // self.n_head if self.head_dim is None else self.head_dim
        if self.head_dim < 2 or self.head_dim % 2:
            raise BadInput(f"head_dim is {self.head_dim}: RoPE turns pairs of channels, so it must be even")
        if self.n_head % self.n_kv_head:
            raise BadInput(f"n_head {self.n_head} is no multiple of n_kv_head {self.n_kv_head}: "
                           "each head of keys serves equally many heads of queries")
        if self.n_hidden is None:
            self.n_hidden = math.ceil(self.n_embd / 3) * 8  # a multiple of 8 is quicker to multiply with
        if self.n_hidden < 1:
            raise BadInput(f"n_hidden is {self.n_hidden}: it must be at least 1")
        super().__post_init__()
        for name in ("rope_base", "rope_factor", "rope_original", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:  # so that nan is refused as well
                raise BadInput(f"{name} is {getattr(self, name)}: it must be above 0, and finite")
        if not 0 < self.rope_low < self.rope_high < math.inf:
            raise BadInput(f"rope_low {self.rope_low} and rope_high {self.rope_high}: the first must be the lower")
        if self.nope_every < 0:
            raise BadInput(f"nope_every is {self.nope_every}: it must be 0 or more")
        if self.window is not None and self.window < 1:
            raise BadInput(f"window is {self.window}: a position sees at least itself, so it must be 1 or more")
        if not 0 <= self.n_sink <= self.span:
            raise BadInput(f"n_sink is {self.n_sink}: it must be 0 or more, and no more than the window of {self.span}")
        if self.n_sink + self.span > self.block_size:
            raise BadInput(f"n_sink {self.n_sink} and window {self.span} are more than block_size {self.block_size}: "
                           "the model was not made for distances that long")

    @property
    def span(self) -> int:
        """Positions of the window, itself included."""
        return self.block_size - self.n_sink if self.window is None else self.window


class RMSNorm(nn.Module):
    """Every position's vector gets a root mean square of 1, then a learned scale: [..., C] -> [..., C].

    LayerNorm without the mean and without the shift, worked out in float32 or better and then given the type of x.
    Zhang & Sennrich, "Root Mean Square Layer Normalization" (2019).
    """

    def __init__(self, n_channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_channels))
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # a sum of squares needs more than bfloat16's 8 bits
        scale = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)  # [..., 1]
        return (wide * scale).type_as(x) * self.weight


def variance_scaling_(layer: nn.Linear, gain: float = 1.0):
    """Start `layer` so that its output has gain^2 times its input's variance: weights ~ N(0, gain^2 / fan_in).

    A sum of fan_in terms has fan_in times the variance of one. With the wrong scale the signal grows or shrinks by the
    same factor in every layer. Glorot & Bengio (2010); He et al. (2015).
    """
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))


def rope_table(positions, config: ModelConfig):
    """Cosine and sine of the angle by which `positions` [..., T] turn each pair of channels.

    [..., T] -> [..., T, D / 2] x 2, float32.

    Pair i turns by base^(-2i / D) radians from one position to the next: the first pair by 1, the last hardly at all.
    With a factor above 1, Llama 3.1's rule slows down the pairs that turn less than a few times over the positions
    first trained on, so that angles at later positions are angles that were seen. A pair with n turns over these has
    its speed multiplied by s + (1 - s) / factor, where s = (n - low) / (high - low), held between 0 and 1.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    speed = config.rope_base ** (-pairs / config.head_dim)  # [D / 2], radians per position
    turns = speed * config.rope_original / (2 * math.pi)
    keep = ((turns - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)  # 1: left alone, 0: slowed
    speed = speed * (keep + (1 - keep) / config.rope_factor)
    angles = positions.float()[..., None] * speed  # [..., T, D / 2]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair of channels of `x` [..., T, D] by its position's angle.

    The dot product of two turned vectors depends on the difference of their positions and on nothing else about them.
    cos and sin are float32; the result has the type of x, which may be narrower or wider.
    Channel i is paired with i + D / 2, as open weights are stored; the paper pairs 2i with 2i + 1.
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), equation 34.
    """
    a, b = x.chunk(2, dim=-1)  # [..., T, D / 2] x 2
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


def attention_weights(q, k, hidden=None, far=None, sink=None):
    """How much each position attends to each: softmax(q k^T / sqrt(D)), [..., T, D] and [..., S, D] -> [..., T, S].

    A row sums to 1 and is 0 where `hidden`: a position that saw the token it has to predict would have nothing to
    learn. Without `hidden`, T = S and the future is hidden. The keys that are a `sink` meet the queries `far`.
    """
    T, D = q.shape[-2:]
    # A dot product of D terms has variance D. Unscaled, softmax would pick one winner and pass no gradient to the rest.
    scores = (q * D**-0.5) @ k.transpose(-2, -1)  # [..., T, S]
    if far is not None:
        scores = torch.where(sink, (far * D**-0.5) @ k.transpose(-2, -1), scores)
    if hidden is None:
        hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return F.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)


def attention(q, k, v, hidden=None, far=None, sink=None):
    """Each position's average of the values, weighted by how well its query fits their keys.

    q [B, H, T, D], k and v [B, K, S, D] -> [B, H, T, D]. Query heads 0 ... H / K - 1 read key-value head 0, and so on.
    Vaswani et al., "Attention Is All You Need" (2017), equation 1.
    One fused kernel never stores the T x S weights. It serves where it is quicker: on a GPU, and on a CPU with a mask
    and no gradient. It cannot serve with sinks, which meet other queries than the rest. Its `is_causal` takes query 0
    for position 0, which is wrong as soon as there are more keys than queries: with a cache, it has to be told what is
    hidden.
    """
    if q.is_cuda and hidden is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    fused = hidden is not None and far is None and (q.is_cuda or not q.requires_grad)
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    if hidden is None:
        hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)[None, None]
    # The queries that share a head stand below one another: the cache is read once, where a copy of it for each query
    # head would cost more than the product.
    rows, far = (x if x is None else x.reshape(len(x), -1, group * T, x.shape[-1]) for x in (q, far))  # [B, K, G T, D]
    hidden = hidden.repeat(1, 1, group, 1)  # [B, 1, G T, S]
    if fused:
        mixed = F.scaled_dot_product_attention(rows, k, v, ~hidden)
    else:
        mixed = attention_weights(rows, k, hidden, far, sink) @ v
    return mixed.reshape(len(q), -1, T, v.shape[-1])  # [B, H, T, D]


class CausalSelfAttention(nn.Module):
    """Attention in H heads of queries side by side, which share K heads of keys and values.

    [B, T, C] -> q [B, H, T, D], k and v [B, K, T, D] -> heads' outputs [B, H, T, D] -> concatenated [B, T, H D]
    -> projected [B, T, C]. All four layers start with `variance_scaling_`.
    Ainslie et al., "GQA" (2023); with K = 1: Shazeer (2019).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        n_query, n_key = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.query = nn.Linear(config.n_embd, n_query, bias=False)  # what a position looks for
        self.key = nn.Linear(config.n_embd, n_key, bias=False)  # what it can be found by
        self.value = nn.Linear(config.n_embd, n_key, bias=False)  # what it hands over when found
        self.proj = nn.Linear(n_query, config.n_embd, bias=False)  # mixes what the heads brought
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        for layer in (self.query, self.key, self.value, self.proj):
            variance_scaling_(layer)

    def forward(self, x, look=CAUSAL, keep=None):
        q, k, v = (self.split_heads(layer(x)) for layer in (self.query, self.key, self.value))
        q, k = self.query_norm(q), self.key_norm(k)  # over the channels of each head
        # At a sink all look from the end of the window: no distance is longer than those the model was trained on.
        far = None if look.far is None else rotate(q, *look.far)
        if look.rope is not None:  # values carry no position: they are averaged, not compared
            q, k = rotate(q, *look.rope), rotate(k, *look.rope)
        if keep is not None:
            k, v = keep(k, v)  # [B, K, S, D] x 2: the new ones and all that were kept
        return self.proj(self.merge_heads(attention(q, k, v, look.hidden, far, look.sink)))

    def split_heads(self, x):
        """[B, T, H D] -> [B, H, T, D]. The heads become part of the batch, so one matrix product serves them all."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def merge_heads(self, x):
        """[B, H, T, D] -> [B, T, H D], the heads side by side. Without the transpose, positions would be mixed up."""
        return x.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """F units, each opened or closed by a gate, for each position on its own: [..., C] -> [..., F] -> [..., C].

    SwiGLU: proj(silu(gate(x)) * fc(x)), silu(z) = z / (1 + e^-z). Shazeer, "GLU Variants Improve Transformer" (2020).
    """

    def __init__(self, config: ModelConfig, n_hidden: int | None = None):
        super().__init__()
        n_hidden = config.n_hidden if n_hidden is None else n_hidden
        self.gate = nn.Linear(config.n_embd, n_hidden, bias=False)
        self.fc = nn.Linear(config.n_embd, n_hidden, bias=False)
        self.proj = nn.Linear(n_hidden, config.n_embd, bias=False)
        variance_scaling_(self.gate)
        variance_scaling_(self.fc)
        variance_scaling_(self.proj, gain=1.68)  # E[silu(z)^2] = 1 / 1.68^2 for a standard normal z

    def forward(self, x):
        return self.proj(F.silu(self.gate(x)) * self.fc(x))


class Block(nn.Module):
    """Attend, then think; both as additions to what came in: [B, T, C] -> [B, T, C].

    Each norm stands inside its branch ("pre-norm"), so that a straight path is left from input to output.
    Xiong et al., "On Layer Normalization in the Transformer Architecture" (2020).
    """

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        self.norm1 = RMSNorm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.norm2 = RMSNorm(config.n_embd, config.norm_eps)
        self.ffn = Mixture(config, FeedForward) if config.mixed(layer) else FeedForward(config)

    def forward(self, x, look=CAUSAL, keep=None):
        x = x + self.attn(self.norm1(x), look, keep)
        h = self.norm2(x)
        x = x + (self.ffn(h, look.real) if isinstance(self.ffn, Mixture) else self.ffn(h))
        return x


class GPT(nn.Module):
    """Tokens [B, T] -> scores [B, T, V]: position t scores every candidate for token t + 1.

    At the start the tokens' vectors have a spread of 1 / sqrt(C), what each branch adds is divided by sqrt(2 n_layer),
    and the last norm's scale is 0.1, so that the first loss is about ln V.
    Yang et al., "Qwen3 Technical Report" (2025). Without QK-norm: Grattafiori et al., "The Llama 3 Herd of Models"
    (2024).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.tok_emb.weight, std=config.n_embd**-0.5)  # Adam turns small vectors faster
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        # The stream sums 2 * n_layer of these outputs: shrunk like this, the sum keeps its size at any depth.
        for name, p in self.blocks.named_parameters():
            if name.endswith(("proj.weight", "ffn.proj")):
                p.data /= math.sqrt(2 * config.n_layer)
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        variance_scaling_(self.head)
        if config.tied:
            self.head.weight = self.tok_emb.weight  # tokens that are used alike get vectors and scores alike
        # Small scores at the start: every character is about equally likely and the loss starts at ln V. Large random
        # scores are confident mistakes, which the first steps would have to unlearn.
        nn.init.constant_(self.norm.weight, 0.1)

    def forward(self, idx, cache=None, pad=None, last=None, look=None):
        """Scores of the tokens idx [B, T], which go on from those in `cache`, and from none without one.

        pad [B]: how many of a row's T tokens are padding, on its left. last: score the last ones only, [B, last, V].
        look: where the tokens stand and what they may look at, where it is not one text in each row.
        Raises BadInput for more tokens than can be looked at.
        """
        return self.head(self.features(idx, cache, pad, last, look))  # [B, T, V]

    def features(self, idx, cache=None, pad=None, last=None, look=None):
        """What the head reads, [B, T, C], of the same tokens: other heads can read it as well."""
        T = idx.shape[1]
        if T > self.config.block_size and cache is None and look is None and self.config.window is None:
            raise BadInput(f"{T} tokens do not fit into block_size {self.config.block_size}: keep the last ones only")
        x = self.tok_emb(idx)  # [B, T, C]
        look = self.look(T, cache, pad, idx.device) if look is None else look
        for i, block in enumerate(self.blocks, 1):
            # A layer without positions looks equally well at any distance.
            placeless = self.config.nope_every and i % self.config.nope_every == 0
            keep = None if cache is None else partial(cache.update, i - 1)
            x = block(x, replace(look, rope=None, far=None) if placeless else look, keep)
        return self.norm(x if last is None else x[:, -last:])

    def look(self, T: int, cache=None, pad=None, device=None) -> Look:
        """Where the next T positions stand and what they may look at."""
        config = self.config
        positions = torch.arange(T, device=device)[None]  # [1, T]
        if pad is not None:
            positions = positions - pad[:, None]  # [B, T], below 0 for padding
        if cache is not None:
            positions, places = cache.advance(positions)  # [B, T], [B, S]
        elif pad is None and T <= config.span:  # nothing but the future is hidden
            return Look(self.rope(positions[:, None]))
        else:
            places = positions
        look = Look(self.rope(positions[:, None]), hidden(positions, places, config), real=positions >= 0)
        if config.n_sink == 0:
            return look
        far = positions.clamp(max=config.span + config.n_sink - 1)  # [B, T]: as if the window began behind the sinks
        return replace(look, far=self.rope(far[:, None]), sink=(places < config.n_sink)[:, None, None])

    def rope(self, positions):
        """The angles of positions [..., T]: [..., T, D / 2] x 2."""
        return rope_table(positions, self.config)
