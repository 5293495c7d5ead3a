"""A neural language model: embed the last few characters, mix them in a hidden layer, score the next one.

Unlike counting:

- a context is a point in a space, not a key in a table, so what is learned of one context helps the ones near it;
- the number of parameters does not grow with the number of contexts that occur;
- the parts are `nn.Module`s: they know their own parameters, and they nest.

Shapes: B examples in a batch, T = block_size characters of context, C = n_embd numbers per character, V characters.
"""

from dataclasses import dataclass
from typing import Literal

from shared.errors import BadInput

import torch
from torch import nn

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "none": nn.Identity}


@dataclass
class ModelConfig:
    """The model's shape. Raises BadInput for a shape that cannot be built."""

    vocab_size: int
    block_size: int = 8  # characters of context
    n_embd: int = 24  # numbers that describe one character
    n_hidden: int = 512  # units of the hidden layer
    activation: Literal["tanh", "relu", "gelu", "none"] = "relu"  # "none" leaves one linear map, however many layers

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_embd", "n_hidden"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.activation not in ACTIVATIONS:
            raise BadInput(f"activation {self.activation!r}: choose from {', '.join(ACTIVATIONS)}")


class MLP(nn.Module):
    """Characters [B, T] -> scores of the next one [B, V].

    The head starts with a tenth of torch's weights and with biases of 0, so that the first loss is about ln V.
    Bengio, Ducharme, Vincent & Jauvin, "A Neural Probabilistic Language Model" (2003), without its direct connections.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.hidden = nn.Linear(config.block_size * config.n_embd, config.n_hidden)
        self.activation = ACTIVATIONS[config.activation]()
        self.head = nn.Linear(config.n_hidden, config.vocab_size)
        # Small scores at the start: every character is about equally likely and the loss starts at ln V. Large random
        # scores are confident mistakes, which the first steps would have to unlearn.
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.zero_()

    def forward(self, idx):
        x = self.tok_emb(idx).flatten(1)  # [B, T, C] -> [B, T * C]: each place in the window keeps its own weights
        x = self.activation(self.hidden(x))  # [B, n_hidden]
        return self.head(x)  # [B, V]
