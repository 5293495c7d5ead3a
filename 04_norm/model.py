"""A deep neural language model, with what lets a gradient through many layers.

Unlike the one-hidden-layer model before it:

- weights start with a variance that keeps signals the same size from layer to layer;
- a norm (batch or layer) puts each block's input back on a known scale;
- each block adds to its input instead of replacing it, so that the gradient has a straight way down.

Shapes: B examples in a batch, T = block_size characters of context, C = n_embd numbers per character,
H = n_hidden units, V characters. In the norms C is the number of channels that they are given: H here.
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
    block_size: int = 8  # characters of context
    n_embd: int = 24  # numbers that describe one character
    n_hidden: int = 256  # units of the hidden layers
    n_layer: int = 2  # blocks, of two layers each
    norm: Literal["layer", "batch", "none"] = "layer"  # what puts each block's input back on scale
    residual: bool = True  # blocks add to their input; without, they replace it

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_embd", "n_hidden", "n_layer"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.norm not in NORMS:
            raise BadInput(f"norm {self.norm!r}: choose from {', '.join(NORMS)}")


class BatchNorm(nn.Module):
    """Every channel gets mean 0 and variance 1 over the batch, then a learned scale and shift.

    [B, C] or [B, T, C] -> the same shape; all axes but the last count as the batch. In training the statistics are the
    batch's own, and running averages of them are kept; in evaluation the running averages are used, so that an
    example's answer does not depend on its neighbours. Ioffe & Szegedy, "Batch Normalization" (2015).
    """

    def __init__(self, n_channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_channels))
        self.bias = nn.Parameter(torch.zeros(n_channels))
        # Buffers: saved and moved with the model, but not trained.
        self.register_buffer("running_mean", torch.zeros(n_channels))
        self.register_buffer("running_var", torch.ones(n_channels))
        self.eps = eps
        self.momentum = momentum

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training:
            n = x.numel() // x.shape[-1]  # values per channel
            if n < 2:
                raise BadInput("batch norm needs at least 2 values per channel in training: use a larger batch_size")
            axes = tuple(range(x.ndim - 1))
            mean, var = x.mean(axes), x.var(axes, correction=0)
            with torch.no_grad():
                # subtle: a batch is scaled by its own variance, sum / n; the whole text's is estimated by sum / (n - 1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


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
        mean = x.mean(-1, keepdim=True)
        var = x.var(-1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


NORMS = {"layer": LayerNorm, "batch": BatchNorm, "none": lambda n_hidden: nn.Identity()}


def variance_scaling_(layer: nn.Linear, gain: float = 1.0):
    """Start `layer` so that its output has gain^2 times its input's variance: weights ~ N(0, gain^2 / fan_in), bias 0.

    A sum of fan_in terms has fan_in times the variance of one. With the wrong scale the signal grows or shrinks by the
    same factor in every layer. Glorot & Bengio (2010); He et al. (2015).
    """
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
    nn.init.zeros_(layer.bias)


class FeedForward(nn.Module):
    """Two layers with a non-linearity between them: [..., H] -> [..., H]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc = nn.Linear(config.n_hidden, config.n_hidden)
        self.proj = nn.Linear(config.n_hidden, config.n_hidden)
        variance_scaling_(self.fc)
        variance_scaling_(self.proj, gain=math.sqrt(2))  # ReLU zeroes half of its input, and with it half the power

    def forward(self, x):
        return self.proj(F.relu(self.fc(x)))


class Block(nn.Module):
    """Normalise, think, add to what came in: [B, H] -> [B, H]. He et al., "Deep Residual Learning" (2016)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.residual = config.residual
        self.norm = NORMS[config.norm](config.n_hidden)
        self.ffn = FeedForward(config)

    def forward(self, x):
        y = self.ffn(self.norm(x))
        return x + y if self.residual else y


class MLP(nn.Module):
    """Characters [B, T] -> scores of the next one [B, V], through a stack of blocks."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.hidden = nn.Linear(config.block_size * config.n_embd, config.n_hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = NORMS[config.norm](config.n_hidden)
        self.head = nn.Linear(config.n_hidden, config.vocab_size)
        variance_scaling_(self.hidden)
        # Small scores at the start: every character is about equally likely and the loss starts at ln V. Large random
        # scores are confident mistakes, which the first steps would have to unlearn.
        variance_scaling_(self.head, gain=0.1)

    def forward(self, idx):
        x = self.tok_emb(idx).flatten(1)  # [B, T, C] -> [B, T * C]: each place in the window keeps its own weights
        x = self.hidden(x)  # [B, H]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # [B, V]
