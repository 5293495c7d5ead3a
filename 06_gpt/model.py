"""GPT-2's model: the transformer with what it takes to train it well and fast.

Unlike the plain transformer before it:

- the token embedding is also the output layer, and weights start smaller where they feed the residual stream;
- GELU, dropout for long runs, and attention takes the fast path of the device it runs on.

Shapes: B sequences in a batch, T positions, C = n_embd channels, H heads of D = C / H channels, V tokens.
"""

import math
from dataclasses import dataclass

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
    dropout: float = 0.0  # share of activations zeroed in training; pays once the text is read many times over

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_embd", "n_head", "n_layer"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_embd % self.n_head:
            raise BadInput(f"n_embd {self.n_embd} does not split into n_head {self.n_head} equal heads: "
                           "choose an n_head that divides n_embd")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout is {self.dropout}: it must be at least 0 and below 1")


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


def attention(q, k, v, dropout: float = 0.0):
    """Each position's average of the values, weighted by how well its query fits their keys: [..., T, D] x 3 -> same.

    Vaswani et al., "Attention Is All You Need" (2017), equation 1, with the causal mask.
    On a GPU one fused kernel never stores the T x T weights; on a CPU, in bfloat16 and at this length, two plain
    products are faster.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    return F.dropout(attention_weights(q, k), dropout) @ v


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
        self.dropout = nn.Dropout(config.dropout)
        for layer in (self.query, self.key, self.value, self.proj):
            variance_scaling_(layer)

    def forward(self, x):
        q, k, v = (self.split_heads(layer(x)) for layer in (self.query, self.key, self.value))  # each [B, H, T, D]
        heads = attention(q, k, v, self.dropout.p if self.training else 0.0)
        return self.dropout(self.proj(self.merge_heads(heads)))

    def split_heads(self, x):
        """[B, T, C] -> [B, H, T, D]. The heads become part of the batch, so one matrix product serves them all."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def merge_heads(self, x):
        """[B, H, T, D] -> [B, T, C], the heads side by side. Without the transpose, positions would be mixed up."""
        return x.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """Two layers with a non-linearity between them, for each position on its own: [..., C] -> [..., 4C] -> [..., C].

    Both start with `variance_scaling_`, the second with gain sqrt(2), since GELU passes on about half of the power.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        variance_scaling_(self.fc)
        variance_scaling_(self.proj, gain=math.sqrt(2))  # GELU leaves 0.43 of a standard normal number's mean square

    def forward(self, x):
        # GELU (Hendrycks & Gimpel 2016): a ReLU with a soft corner, worked out with tanh as GPT-2 does.
        return self.dropout(self.proj(F.gelu(self.fc(x), approximate="tanh")))


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

    Raises BadInput for more than block_size tokens. At the start vectors have a spread of 1 / sqrt(C), what
    each branch adds is divided by sqrt(2 n_layer), and the last norm's scale is 0.1, for a first loss of about ln V.
    Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.tok_emb.weight, std=config.n_embd**-0.5)  # Adam turns small vectors faster
        self.pos_emb = nn.Parameter(torch.randn(config.block_size, config.n_embd) * config.n_embd**-0.5)  # [T, C]
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # The stream sums 2 * n_layer of these outputs: shrunk like this, the sum keeps its size at any depth.
        for block in self.blocks:
            block.attn.proj.weight.data /= math.sqrt(2 * config.n_layer)
            block.ffn.proj.weight.data /= math.sqrt(2 * config.n_layer)
        self.norm = LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.tok_emb.weight  # tokens that are used alike get vectors and scores alike
        # Small scores at the start: every character is about equally likely and the loss starts at ln V. Large random
        # scores are confident mistakes, which the first steps would have to unlearn.
        nn.init.constant_(self.norm.weight, 0.1)

    def forward(self, idx):
        T = idx.shape[1]
        if T > self.config.block_size:
            raise BadInput(f"{T} tokens do not fit into block_size {self.config.block_size}: keep the last ones only")
        x = self.dropout(self.tok_emb(idx) + self.pos_emb[:T])  # [B, T, C]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # [B, T, V]
