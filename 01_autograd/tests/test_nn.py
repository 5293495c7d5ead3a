"""The networks against torch.nn with the same weights, and their first numbers against what they promise."""

import doctest
import random
from itertools import pairwise

import numpy as np
import pytest
import torch

import nn
from nn import MLP, Layer, Linear, Neuron, TensorMLP
from tensor import Tensor

SIZES = (3, 5, 4, 2)
TORCH = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU, "sigmoid": torch.nn.Sigmoid, None: torch.nn.Identity}


def torch_mlp(sizes, activation, weights) -> torch.nn.Sequential:
    """torch's own MLP; `weights` has a (weight [out, in], bias [out]) for each layer."""
    layers = []
    for n_in, n_out in pairwise(sizes):
        layers += [torch.nn.Linear(n_in, n_out, dtype=torch.float64), TORCH[activation]()]
    model = torch.nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for linear, (weight, bias) in zip(model[::2], weights, strict=True):
            linear.weight.copy_(torch.tensor(weight, dtype=torch.float64))
            linear.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return model


def scalar_weights(mlp: MLP) -> list:
    return [
        ([[w.data for w in n.weights] for n in layer.neurons], [n.bias.data for n in layer.neurons])
        for layer in mlp.layers
    ]


def test_a_neuron_is_a_weighted_sum_a_bias_and_a_squashing():
    """A neuron computes activation(w . x + b): a hand-worked one, and its gradients."""
    neuron = Neuron(2, "relu", random.Random(0))
    for parameter, number in zip(neuron.parameters(), (2.0, -1.0, 0.5), strict=True):
        parameter.data = number
    out = neuron([3.0, 4.0])
    out.backward()
    assert out.data == 2.5, "2 * 3 - 1 * 4 + 0.5"
    assert [p.grad for p in neuron.parameters()] == [3.0, 4.0, 1.0], "the slopes are the inputs, and 1 for the bias"
    assert neuron([0.0, 4.0]).data == 0.0, "-3.5 is cut off by relu"
    neuron.activation = None
    assert neuron([0.0, 4.0]).data == -3.5, "without activation the neuron gives the bare sum"


@pytest.mark.parametrize("activation", TORCH)
def test_the_scalar_mlp_is_torchs(activation):
    """The MLP of scalars has torch.nn's outputs and gradients for the same weights."""
    mlp = MLP(SIZES, activation, random.Random(3))
    theirs = torch_mlp(SIZES, activation, scalar_weights(mlp))
    points = np.random.default_rng(0).normal(size=(4, 3))
    ours = [mlp(point.tolist()) for point in points]
    expected = theirs(torch.tensor(points))
    for row, torchs in zip(ours, expected.tolist(), strict=True):
        assert [v.data for v in row] == pytest.approx(torchs, rel=1e-12), (
            f"{activation}: torch's layers of the same weights give other outputs: does each layer read what the layer "
            "before it gave, and are all but the last squashed?"
        )
    sum(a * a - b for a, b in ours).backward()
    (expected[:, 0] ** 2 - expected[:, 1]).sum().backward()
    for layer, linear in zip(mlp.layers, theirs[::2], strict=True):
        assert [[w.grad for w in n.weights] for n in layer.neurons] == [
            pytest.approx(row, rel=1e-10, abs=1e-12) for row in linear.weight.grad.tolist()
        ], "each weight's gradient, summed over the batch"
        assert [n.bias.grad for n in layer.neurons] == pytest.approx(linear.bias.grad.tolist(), rel=1e-10, abs=1e-12), (
            "each neuron has a bias of its own, and its gradient is summed over the batch"
        )


@pytest.mark.parametrize("activation", TORCH)
def test_the_tensor_mlp_is_torchs(activation):
    """The MLP of arrays has torch.nn's outputs and gradients for the same weights, on a batch at once."""
    mlp = TensorMLP(SIZES, activation, np.random.default_rng(3))
    theirs = torch_mlp(SIZES, activation, [(linear.weight.data, linear.bias.data) for linear in mlp.layers])
    points = np.random.default_rng(0).normal(size=(7, 3))
    ours, expected = mlp(Tensor(points)), theirs(torch.tensor(points))
    wrong = f"{activation}: torch's layers of the same weights give other outputs: are all but the last squashed?"
    np.testing.assert_allclose(ours.data, expected.detach().numpy(), rtol=1e-12, err_msg=wrong)
    (ours[:, 0] ** 2 - ours[:, 1]).sum().backward()
    (expected[:, 0] ** 2 - expected[:, 1]).sum().backward()
    for mine, torchs in zip(mlp.parameters(), theirs.parameters(), strict=True):
        assert mine.shape == tuple(torchs.shape), "the layout of torch.nn.Linear: weight [out, in], bias [out]"
        wrong = f"{mine.label} {mine.shape}: not torch's gradient"
        np.testing.assert_allclose(mine.grad, torchs.grad.numpy(), rtol=1e-10, atol=1e-12, err_msg=wrong)


def test_parameters_are_all_there_and_all_matter():
    """parameters() lists each weight and bias once, and every one of them moves the output."""
    mlp = MLP(SIZES, "tanh", random.Random(5))
    parameters = mlp.parameters()
    expected = (3 + 1) * 5 + (5 + 1) * 4 + (4 + 1) * 2  # a neuron has a weight for each input, and a bias
    distinct = len({id(p) for p in parameters})
    assert distinct == len(parameters), f"{len(parameters)} entries but {distinct} parameters: neurons are shared"
    assert len(parameters) == expected, f"{len(parameters)} parameters, not {expected}: weights or biases are missing"
    a, b = mlp([0.3, -0.8, 1.2])
    (a + b).backward()
    assert all(p.grad != 0.0 for p in parameters), "a parameter without a gradient is not part of the network"
    mlp.zero_grad()
    assert all(p.grad == 0.0 for p in parameters), "after zero_grad a parameter still has the gradient of before"
    arrays = TensorMLP(SIZES, "tanh", np.random.default_rng(5))
    size = sum(p.data.size for p in arrays.parameters())
    assert size == expected, f"{size} numbers, not {expected}: the array MLP has other parameters than the scalar one"
    arrays(Tensor(np.ones((2, 3)))).sum().backward()
    dead = [f"{p.label} {p.shape}" for p in arrays.parameters() if not np.all(p.grad != 0.0)]
    assert not dead, f"without a gradient, and so no part of the network: {dead}"
    arrays.layers[0].weight.grad[:] = np.nan
    arrays.zero_grad()
    assert all(np.all(p.grad == 0.0) for p in arrays.parameters()), "zero_grad must forget a nan, too"


def test_the_last_layer_gives_bare_logits():
    """Hidden layers squash, the last layer does not: its outputs are logits and may be of any size."""
    mlp = MLP((2, 3, 2), "sigmoid", random.Random(0))
    activations = [[n.activation for n in layer.neurons] for layer in mlp.layers]
    assert activations == [["sigmoid"] * 3, [None] * 2], f"hidden layers squash, the last one does not: {activations}"
    for parameter in mlp.parameters():
        parameter.data = -1.0
    assert mlp([0.0, 0.0])[0].data < 0.0, "a sigmoid on the last layer can never say no"


def test_initial_weights_are_seeded_and_spread_as_promised():
    """The same seed gives the same network; weights are uniform in +-1 / sqrt(n_in), torch's own default range."""

    def draw(seed):
        return [p.data for p in MLP(SIZES, "tanh", random.Random(seed)).parameters()]

    assert draw(1) == draw(1) and draw(1) != draw(2), "the seed decides, and nothing else"
    first, again, other = (TensorMLP((3, 3, 3), "tanh", np.random.default_rng(seed)) for seed in (1, 1, 2))
    weights = [p.data.tolist() for p in first.parameters()]
    assert weights == [p.data.tolist() for p in again.parameters()], "arrays: the same seed gave another network"
    assert weights != [p.data.tolist() for p in other.parameters()], "arrays: every seed gives the same network"
    assert weights[0] != weights[2], "two layers begin with the same weights: each draws its own from the generator"
    n_in = 16
    neurons = Layer(n_in, 2000, None, random.Random(0)).neurons
    linear = Linear(n_in, 2000, np.random.default_rng(0))
    for weights in (
        np.array([w.data for n in neurons for w in n.weights]),
        np.array([n.bias.data for n in neurons]),
        linear.weight.data,
        linear.bias.data,
    ):
        bound = n_in**-0.5
        assert abs(weights).max() <= bound and abs(weights).max() > 0.99 * bound, "the range is +-1 / sqrt(n_in)"
        assert weights.std() == pytest.approx(bound / 3**0.5, rel=0.03), "uniform: standard deviation bound / sqrt(3)"
        assert abs(weights.mean()) < 0.05 * bound, "weights must not lean to one side"


def test_impossible_networks_are_refused():
    """A network without inputs, without layers or with an unknown activation says what is allowed."""
    rng, generator = random.Random(0), np.random.default_rng(0)
    actions = [
        (lambda kind=kind, sizes=sizes, source=source: kind(sizes, "tanh", source), "at least 1", f"sizes {sizes}")
        for sizes in ((2,), (2, 0, 1), ())
        for kind, source in ((MLP, rng), (TensorMLP, generator))
    ]
    actions += [
        (lambda: Neuron(0, "tanh", rng), "at least 1", "a neuron with 0 inputs"),
        (lambda: Linear(0, 3, generator), "at least 1", "a layer with 0 inputs"),
        (lambda: MLP((2, 2, 1), "data", rng), "tanh, relu, sigmoid", "the activation 'data', which is no activation"),
        (lambda: TensorMLP((2, 2, 1), "swish", generator), "tanh, relu, sigmoid", "the activation 'swish'"),
        (lambda: Neuron(2, "tanh", rng)([1.0, 2.0, 3.0]), "length", "3 inputs to a neuron with 2 weights"),
    ]
    for action, word, what in actions:
        with pytest.raises(ValueError, match=word):
            action()
            pytest.fail(f"not refused: {what}")


def test_the_example_in_the_docstring_is_true():
    """The worked example in nn.py prints what it says."""
    failed, tried = doctest.testmod(nn)
    assert tried >= 2 and failed == 0, "the example in nn.py's docstring is wrong"
