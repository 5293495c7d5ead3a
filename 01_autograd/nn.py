"""Networks out of the two engines: a neuron, a layer, a stack of layers; first in scalars, then in arrays.

    Neuron, Layer, MLP   made of `Value`s: every weight is an object one can point at
    Linear, TensorMLP    the same functions with a layer's weights in one `Tensor`: what torch.nn does

Both kinds answer to `parameters()` and `zero_grad()`, so one training loop serves both.
"""

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from engine import Value, dot
from tensor import Tensor

ACTIVATIONS = ("tanh", "relu", "sigmoid")


class Module:
    """Something with parameters."""

    def parameters(self) -> list:
        """Every trainable leaf, each once: layer by layer, neuron by neuron, weights before the bias."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Forgets the gradients of the last step: `backward` adds to them and never replaces them."""
        for parameter in self.parameters():
            parameter.zero_grad()


class Neuron(Module):
    """activation(w1 x1 + ... + wn xn + b): weighs the evidence, adds its own bias, squashes.

    n_in weights and the bias start uniform in +-1 / sqrt(n_in), so that the sum neither grows nor shrinks with n_in.
    `activation` None gives the bare sum, a logit.
    """

    def __init__(self, n_in: int, activation: str | None, rng: random.Random) -> None:
        if n_in < 1:
            raise ValueError(f"a neuron needs at least 1 input, got {n_in}")
        check_activation(activation)
        bound = n_in**-0.5
        self.weights = [Value(rng.uniform(-bound, bound), label=f"w{i + 1}") for i in range(n_in)]
        self.bias = Value(rng.uniform(-bound, bound), label="b")
        self.activation = activation

    def __call__(self, xs: Sequence[Value | float]) -> Value:
        total = dot(self.weights, xs) + self.bias
        return getattr(total, self.activation)() if self.activation else total

    def parameters(self) -> list[Value]:
        return [*self.weights, self.bias]


class Layer(Module):
    """n_out neurons that all read the same n_in inputs."""

    def __init__(self, n_in: int, n_out: int, activation: str | None, rng: random.Random) -> None:
        self.neurons = [Neuron(n_in, activation, rng) for _ in range(n_out)]

    def __call__(self, xs: Sequence[Value | float]) -> list[Value]:
        return [neuron(xs) for neuron in self.neurons]

    def parameters(self) -> list[Value]:
        return [parameter for neuron in self.neurons for parameter in neuron.parameters()]


class MLP(Module):
    """Layers one after another, `sizes` = (inputs, hidden, ..., outputs); the last layer gives bare logits.

    >>> mlp = MLP((2, 4, 1), "tanh", random.Random(0))
    >>> len(mlp.parameters()), len(mlp([0.5, -1.0]))  # (2 + 1) * 4 + (4 + 1) * 1 parameters, 1 output
    (17, 1)
    """

    def __init__(self, sizes: Sequence[int], activation: str | None, rng: random.Random) -> None:
        check_sizes(sizes)
        last = len(sizes) - 2
        self.layers = [
            Layer(n_in, n_out, activation if i < last else None, rng)
            for i, (n_in, n_out) in enumerate(pairwise(sizes))
        ]

    def __call__(self, xs: Sequence[Value | float]) -> list[Value]:
        for layer in self.layers:
            xs = layer(xs)
        return xs

    def parameters(self) -> list[Value]:
        return [parameter for layer in self.layers for parameter in layer.parameters()]


class Linear(Module):
    """A layer without its activation: x @ weight.T + bias, [..., n_in] -> [..., n_out].

    Row i of `weight` [n_out, n_in] holds neuron i's weights, as in torch.nn.Linear; the same initial range too.
    """

    def __init__(self, n_in: int, n_out: int, rng: np.random.Generator) -> None:
        check_sizes((n_in, n_out))
        bound = n_in**-0.5
        self.weight = Tensor(rng.uniform(-bound, bound, (n_out, n_in)), label="weight")
        self.bias = Tensor(rng.uniform(-bound, bound, n_out), label="bias")

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight.transpose(0, 1) + self.bias

    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]


class TensorMLP(Module):
    """`MLP` for a whole batch at once: [batch, sizes[0]] -> [batch, sizes[-1]]."""

    def __init__(self, sizes: Sequence[int], activation: str | None, rng: np.random.Generator) -> None:
        check_sizes(sizes)
        check_activation(activation)
        self.layers = [Linear(n_in, n_out, rng) for n_in, n_out in pairwise(sizes)]
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x)
            x = getattr(x, self.activation)() if self.activation else x
        return self.layers[-1](x)

    def parameters(self) -> list[Tensor]:
        return [parameter for layer in self.layers for parameter in layer.parameters()]


def check_sizes(sizes: Sequence[int]) -> None:
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes are (inputs, ..., outputs), each at least 1: got {tuple(sizes)}")


def check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}: choose from {', '.join(ACTIVATIONS)}, or None for a bare sum")
