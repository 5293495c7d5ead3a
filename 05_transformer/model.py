"""A transformer: positions that look at one another, in a stack of blocks, predicting the next token at every position.

Unlike the deep network before it:

- the window is not flattened: every position keeps its own vector, and one pass predicts T next tokens, not one;
- positions exchange information by attention, whose weights are computed from the text itself;
- what a position is (its token) and where it is (its place) are both added into its vector.

Shapes: B sequences in a batch, T positions, C = n_embd channels, H heads of D = C / H channels, V tokens.
"""

import math
from dataclasses import dataclass
from typing import Literal

from shared.errors import BadInput

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class ModelConfig:
    """The model's shape. Raises BadInput for a shape that cannot be built."""

    vocab_size: int
    block_size: int = 64  # positions the model can look back over
    n_embd: int = 64  # channels of each position's vector
    n_head: int = 2  # attention heads, each on its own n_embd / n_head channels
    n_layer: int = 4  # blocks: each one attends once and thinks once
    positions: Literal["learned", "sinusoidal"] = "learned"  # how a position tells where it is

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_embd", "n_head", "n_layer"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_embd % self.n_head:
            raise BadInput(f"n_embd {self.n_embd} does not split into n_head {self.n_head} equal heads: "
                           "choose an n_head that divides n_embd")
        if self.positions not in ("learned", "sinusoidal"):
            raise BadInput(f"positions {self.positions!r}: choose learned or sinusoidal")
        if self.positions == "sinusoidal" and self.n_embd % 2:
            raise BadInput(f"n_embd {self.n_embd} is odd: sinusoidal positions need pairs of channels")


class LayerNorm(nn.Module):
    """Every position gets mean 0 and variance 1 over its channels, then a learned scale and shift.

    [..., C] -> [..., C]. No statistics are shared between examples, so training and evaluation are the same.
    Ba, Kiros & Hinton, "Layer Normalization" (2016).
    """

    def __init__(self, n_channels: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_channels))
        self.bias = nn.Parameter(torch.zeros(n_channels))
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)  # the same formula in one kernel


def variance_scaling_(layer: nn.Linear, gain: float = 1.0):
    """Start `layer` so that its output has gain^2 times its input's variance: weights ~ N(0, gain^2 / fan_in), bias 0.

    A sum of fan_in terms has fan_in times the variance of one. With the wrong scale the signal grows or shrinks by the
    same factor in every layer. Glorot & Bengio (2010); He et al. (2015).
    """
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
    nn.init.zeros_(layer.bias)


def sinusoidal_positions(block_size: int, n_embd: int):
    """One fixed vector per position, made of waves from fast to slow -> [block_size, n_embd].

    Channels 2i and 2i + 1 hold sin and cos of position / 10000^(2i / n_embd): a shift by k positions is one rotation,
    the same wherever it starts. Vaswani et al. (2017), section 3.5.
    """
    position = torch.arange(block_size)[:, None]  # [T, 1]
    rate = 10000 ** (-torch.arange(0, n_embd, 2) / n_embd)  # [C / 2]
    angle = position * rate  # [T, C / 2]
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # [T, C / 2, 2] -> [T, C], sin and cos in turn


def attention_weights(q, k):
    """How much each position attends to each: softmax(q k^T / sqrt(D)) over the past, [..., T, D] x 2 -> [..., T, T].

    Row t sums to 1 and is 0 after t: a position that saw the token it has to predict would have nothing to learn. The
    mask is made on the device of q.
    """
    T, D = q.shape[-2:]
    # A dot product of D terms has variance D. Unscaled, softmax would pick one winner and pass no gradient to the rest.
    scores = (q * D**-0.5) @ k.transpose(-2, -1)  # [..., T, T]
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return F.softmax(scores.masked_fill(future, -math.inf), dim=-1)


def attention(q, k, v):
    """Each position's average of the values, weighted by how well its query fits their keys: [..., T, D] x 3 -> same.

    Vaswani et al., "Attention Is All You Need" (2017), equation 1, with the causal mask.
    """
    return attention_weights(q, k) @ v


class CausalSelfAttention(nn.Module):
    """Attention in H heads side by side, each on its own D = C / H channels.

    [B, T, C] -> q, k, v [B, H, T, D] -> heads' outputs [B, H, T, D] -> concatenated [B, T, C] -> projected [B, T, C]
    All four layers start with `variance_scaling_`.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        self.query = nn.Linear(config.n_embd, config.n_embd)  # what a position looks for
        self.key = nn.Linear(config.n_embd, config.n_embd)  # what it can be found by
        self.value = nn.Linear(config.n_embd, config.n_embd)  # what it hands over when found
        self.proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads brought
        for layer in (self.query, self.key, self.value, self.proj):
            variance_scaling_(layer)

    def forward(self, x):
        q, k, v = (self.split_heads(layer(x)) for layer in (self.query, self.key, self.value))  # each [B, H, T, D]
        return self.proj(self.merge_heads(attention(q, k, v)))

    def split_heads(self, x):
        """[B, T, C] -> [B, H, T, D]. The heads become part of the batch, so one matrix product serves them all."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def merge_heads(self, x):
        """[B, H, T, D] -> [B, T, C], the heads side by side. Without the transpose, positions would be mixed up."""
        return x.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """Two layers with a non-linearity between them, for each position on its own: [..., C] -> [..., 4C] -> [..., C].

    Both start with `variance_scaling_`, the second with gain sqrt(2), since half of the units are silent.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)
        variance_scaling_(self.fc)
        variance_scaling_(self.proj, gain=math.sqrt(2))  # half of the units are silent, and with them half the power

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)))


class Block(nn.Module):
    """Attend, then think; both as additions to what came in: [B, T, C] -> [B, T, C].

    Each norm stands inside its branch ("pre-norm"), so that a straight path is left from input to output.
    Xiong et al., "On Layer Normalization in the Transformer Architecture" (2020).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.norm2 = LayerNorm(config.n_embd)
        self.ffn = FeedForward(config)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        x = x + self.ffn(self.norm2(x))
        return x


class GPT(nn.Module):
    """Tokens [B, T] -> scores [B, T, V]: position t scores every candidate for token t + 1.

    Raises BadInput for more than block_size tokens. At the start tokens and positions have a spread of 1 / sqrt(C), and
    the head a gain of 0.1, so that the first loss is about ln V.
    Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.tok_emb.weight, std=config.n_embd**-0.5)  # Adam turns small vectors faster
        if config.positions == "learned":
            self.pos_emb = nn.Parameter(torch.randn(config.block_size, config.n_embd) * config.n_embd**-0.5)  # [T, C]
        else:
            table = sinusoidal_positions(config.block_size, config.n_embd)
            self.register_buffer("pos_emb", table * config.n_embd**-0.5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        # Small scores at the start: every character is about equally likely and the loss starts at ln V. Large random
        # scores are confident mistakes, which the first steps would have to unlearn.
        variance_scaling_(self.head, gain=0.1)

    def forward(self, idx):
        T = idx.shape[1]
        if T > self.config.block_size:
            raise BadInput(f"{T} tokens do not fit into block_size {self.config.block_size}: keep the last ones only")
        x = self.tok_emb(idx) + self.pos_emb[:T]  # [B, T, C]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # [B, T, V]
