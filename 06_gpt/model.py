"""GPT-2's model: the transformer with what it takes to train it well and fast.

Unlike the plain transformer before it:

- weights start as in GPT-2: normals of one size, and smaller ones where they feed the residual stream;
- the token embedding is also the output layer (weight tying);
- dropout, for runs long enough to learn the text by heart;
- queries, keys and values come from one fused product, and attention takes the fast path of the device it runs on.

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
    n_head: int = 2  # attention heads, each on its own n_embd / n_head channels; few wide ones are faster on a CPU
    n_layer: int = 4  # blocks: each one attends once and thinks once
    dropout: float = 0.0  # share of activations zeroed in training; pays once the text is read many times over
    init_std: float | None = None  # spread of the first weights; none: 1 / sqrt(n_embd)

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_embd", "n_head", "n_layer"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_embd % self.n_head:
            raise BadInput(f"n_embd {self.n_embd} does not split into n_head {self.n_head} equal heads: "
                           "choose an n_head that divides n_embd")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        if self.init_std is None:
            self.init_std = self.n_embd**-0.5
        if not self.init_std > 0:
            raise BadInput(f"init_std is {self.init_std}: it must be above 0, or every unit learns the same")


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


def attention_weights(q, k):
    """How much each position attends to each: softmax(q k^T / sqrt(D)) over the past, [..., T, D] x 2 -> [..., T, T].

    Row t sums to 1 and is 0 after t: a position that saw the token it has to predict would have nothing to learn.
    """
    T, D = q.shape[-2:]
    # A dot product of D terms has variance D. Unscaled, softmax would pick one winner and pass no gradient to the rest.
    scores = (q * D**-0.5) @ k.transpose(-2, -1)  # [..., T, T]
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return F.softmax(scores.masked_fill(future, -math.inf), dim=-1)


def attention(q, k, v):
    """Each position's average of the values, weighted by how well its query fits their keys: [..., T, D] x 3 -> same.

    Vaswani et al., "Attention Is All You Need" (2017), equation 1, with the causal mask. On a GPU one fused kernel does
    it without ever storing the T x T weights; on a CPU, in bfloat16 and at this length, two plain products are faster.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention_weights(q, k) @ v


class CausalSelfAttention(nn.Module):
    """Attention in H heads side by side, each on its own D = C / H channels.

    [B, T, C] -> q, k, v [B, H, T, D] -> heads' outputs [B, H, T, D] -> concatenated [B, T, C] -> projected [B, T, C]
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.proj = nn.Linear(config.n_embd, config.n_embd)  # mixes what the heads brought
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, dim=-1))  # each [B, H, T, D]
        return self.dropout(self.proj(self.merge(attention(q, k, v))))

    def split(self, x):
        """[B, T, C] -> [B, H, T, D]. The heads become part of the batch, so one matrix product serves them all."""
        B, T, C = x.shape
        return x.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)

    def merge(self, x):
        """[B, H, T, D] -> [B, T, C], the heads side by side. Without the transpose, positions would be mixed up."""
        return x.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """Two layers with a non-linearity between them, for each position on its own: [..., C] -> [..., 4C] -> [..., C].

    GELU is x times the chance that a standard normal is below x: a ReLU with a soft corner. Hendrycks & Gimpel (2016).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.proj(F.gelu(self.fc(x))))


class Block(nn.Module):
    """Attend, then think; both as additions to what came in: [B, T, C] -> [B, T, C]."""

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

    Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2, 2019).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(config.block_size, config.n_embd))  # [T, C]
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.tok_emb.weight  # tokens that are used alike get vectors and scores alike
        self.init_weights()

    def init_weights(self):
        """Matrices ~ N(0, init_std^2), smaller ones where they feed the residual stream; biases 0, norms' scales 1."""
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                # The stream sums 2 * n_layer of these outputs: shrunk like this, the sum keeps its size at any depth.
                shrink = math.sqrt(2 * self.config.n_layer) if name.endswith("proj.weight") else 1
                nn.init.normal_(p, std=self.config.init_std / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx):
        T = idx.shape[1]
        if T > self.config.block_size:
            raise BadInput(f"{T} tokens do not fit into block_size {self.config.block_size}: keep the last ones only")
        x = self.dropout(self.tok_emb(idx) + self.pos_emb[:T])  # [B, T, C]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # [B, T, V]
