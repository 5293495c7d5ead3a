"""Checkpoints of the model: forward and backward pass written out in numpy, one-hot vectors, algebra."""

import math

from shared.errors import BadInput

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import ACTIVATIONS, MLP, ModelConfig


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**changes) -> ModelConfig:
    """A shape in which no two sizes are equal, so that a mixed-up axis cannot pass unseen."""
    shape = {"vocab_size": 11, "block_size": 3, "n_embd": 4, "n_hidden": 7, "activation": "tanh"}
    return ModelConfig(**shape | changes)


def scrambled(config: ModelConfig) -> MLP:
    """A float64 model with every weight away from its start, biases of 0 included."""
    model = MLP(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def weights(model: MLP) -> list[np.ndarray]:
    """E [V, C], W1 [T C, H], b1 [H], W2 [H, V], b2 [V]: inputs first, as one writes them by hand."""
    E, W1, b1, W2, b2 = (p.detach().numpy() for p in (
        model.tok_emb.weight, model.hidden.weight, model.hidden.bias, model.head.weight, model.head.bias,
    ))
    return [E, W1.T, b1, W2.T, b2]


def by_hand(E, W1, b1, W2, b2, idx):
    """The forward pass of a tanh MLP, one example and one place in the window at a time.

    Returns logits, hidden units, inputs.
    """
    B, T = idx.shape
    C = E.shape[1]
    x = np.zeros((B, T * C))
    for b in range(B):
        for t in range(T):
            x[b, t * C:(t + 1) * C] = E[idx[b, t]]  # the embeddings of a window side by side, oldest first
    h = np.tanh(x @ W1 + b1)
    return h @ W2 + b2, h, x


def test_the_forward_pass():
    """Look up, lay side by side, one hidden layer, one score for each character: as written out in numpy."""
    model = scrambled(small())
    idx = torch.randint(11, (5, 3))
    logits = model(idx)
    assert logits.shape == (5, 11), "one row of V scores for each example"
    expected, _, _ = by_hand(*weights(model), idx.numpy())
    error = np.abs(logits.detach().numpy() - expected).max()
    assert error < 1e-12, f"logits are off by {error:.1e}: look-up, order of flattening, layers or activation differ"


def test_the_gradients():
    """Every gradient of the loss is what backpropagation by hand gives, in float64."""
    model = scrambled(small())
    idx, y = torch.randint(11, (6, 3)), torch.randint(11, (6,))
    idx[1] = idx[0, 0]  # characters that occur more than once: their gradients add up
    F.cross_entropy(model(idx), y).backward()

    E, W1, b1, W2, b2 = weights(model)
    logits, h, x = by_hand(E, W1, b1, W2, b2, idx.numpy())
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    d_logits = (probs - np.eye(11)[y.numpy()]) / 6  # softmax and mean of -ln P in one: (P - 1 at the target) / B
    d_h = d_logits @ W2.T
    d_z = d_h * (1 - h**2)  # tanh
    d_x = d_z @ W1.T
    d_E = np.zeros_like(E)
    for b in range(6):
        for t in range(3):
            d_E[idx[b, t]] += d_x[b, t * 4:(t + 1) * 4]
    expected = {
        "tok_emb.weight": d_E, "hidden.weight": (x.T @ d_z).T, "hidden.bias": d_z.sum(0),
        "head.weight": (h.T @ d_logits).T, "head.bias": d_logits.sum(0),
    }
    for name, p in model.named_parameters():
        error = np.abs(p.grad.numpy() - expected[name]).max()
        assert error < 1e-12, f"the gradient of {name} is off by {error:.1e}"


def test_an_embedding_is_a_matrix_product_with_one_hot_vectors():
    """Looking up row i of the embedding is multiplying by the vector that is 1 at i, else 0, gradient included."""
    model = scrambled(small())
    idx = torch.randint(11, (5, 3))
    one_hot = F.one_hot(idx, 11).double()  # [B, T, V]
    matrix = model.tok_emb.weight.detach().clone().requires_grad_()
    looked_up, product = model.tok_emb(idx), one_hot @ matrix
    assert torch.equal(looked_up, product), "a look-up and the product with a one-hot vector must be the same numbers"
    direction = torch.randn_like(product)
    (looked_up * direction).sum().backward()
    (product * direction).sum().backward()
    assert torch.allclose(model.tok_emb.weight.grad, matrix.grad), "only the rows that were looked up get a gradient"


def test_the_first_loss_is_ln_V():
    """Before training every character is about equally likely: the loss is close to ln V, in the default shape too."""
    for config in (ModelConfig(vocab_size=65), ModelConfig(vocab_size=200, n_hidden=64), small()):
        losses = []
        for seed in range(3):
            torch.manual_seed(seed)
            idx = torch.randint(config.vocab_size, (500, config.block_size))
            y = torch.randint(config.vocab_size, (500,))
            losses.append(F.cross_entropy(MLP(config)(idx), y).item())
        uniform = math.log(config.vocab_size)
        for loss in losses:
            assert abs(loss - uniform) < 0.02, f"first loss {loss:.3f}, ln V {uniform:.3f}: the head starts confident"
        assert len(set(losses)) == 3, "the same scores from every seed: the head starts at 0, no gradient passes down"


def test_each_place_in_the_window_has_its_own_weights():
    """The order of the context counts: "ab" and "ba" get different scores, and so does a change at any place."""
    model = scrambled(small())
    idx = torch.tensor([[1, 2, 3]])
    for other in ([3, 2, 1], [2, 1, 3], [4, 2, 3], [1, 4, 3], [1, 2, 4]):
        moved = (model(idx) - model(torch.tensor([other]))).abs().max()
        assert moved > 1e-3, f"[1, 2, 3] and {other} look the same to the model: places in the window are lost"


def test_examples_do_not_see_one_another():
    """An example's scores do not depend on what else is in its batch."""
    model = scrambled(small())
    idx = torch.randint(11, (8, 3))
    together, alone = model(idx), torch.cat([model(idx[i:i + 1]) for i in range(8)])
    assert torch.allclose(together, alone, atol=1e-12), "rows of the batch are mixed with one another"


@pytest.mark.parametrize("name", ["tanh", "relu", "gelu", "none"])
def test_activations(name):
    """Between the two layers stands the non-linearity that the config names."""
    model = scrambled(small(activation=name))
    idx = torch.randint(11, (20, 3))
    z = model.hidden(model.tok_emb(idx).reshape(20, 12))
    expected = {
        "tanh": (z.exp() - (-z).exp()) / (z.exp() + (-z).exp()),
        "relu": z * (z > 0),
        "gelu": z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
        "none": z,
    }[name]
    assert torch.allclose(model(idx), model.head(expected), atol=1e-12), f"the hidden units do not go through {name}"
    assert set(ACTIVATIONS) == {"tanh", "relu", "gelu", "none"}, "an activation without a checkpoint"


def collapsed(model):
    """One matrix [V, T C] and one bias [V] in place of both layers."""
    matrix = model.head.weight @ model.hidden.weight
    return matrix, model.head.weight @ model.hidden.bias + model.head.bias


def test_two_linear_layers_are_one():
    """Without a non-linearity both layers collapse into one matrix, W2 W1; with one they do not."""
    idx = torch.randint(11, (50, 3))
    for name in ("none", "tanh", "relu", "gelu"):
        model = scrambled(small(activation=name))
        matrix, bias = collapsed(model)
        gap = (model(idx) - (model.tok_emb(idx).reshape(50, 12) @ matrix.T + bias)).abs().max().item()
        if name == "none":
            assert gap < 1e-12, f"a linear map of a linear map is a linear map, but they differ by {gap:.1e}"
        else:
            assert gap > 0.1, f"with {name} the layers still collapse into one: it does nothing"


def test_the_number_of_parameters():
    """V C numbers for the embedding, T C H + H for the hidden layer, H V + V for the head, all of them trained."""
    for config in (small(), ModelConfig(vocab_size=65)):
        V, T, C, H = config.vocab_size, config.block_size, config.n_embd, config.n_hidden
        count = sum(p.numel() for p in MLP(config).parameters() if p.requires_grad)
        assert count == V * C + T * C * H + H + H * V + V, "a layer is missing from parameters(), or one too many"


@pytest.mark.parametrize("name", ["vocab_size", "block_size", "n_embd", "n_hidden"])
def test_sizes_below_one_are_refused(name):
    """A size of 0 or less is refused by name before anything is built."""
    for size in (0, -3):
        with pytest.raises(BadInput, match=name):
            small(**{name: size})
    small(**{name: 1})


def test_an_unknown_activation_is_refused():
    """An activation that does not exist is refused with the list of those that do."""
    with pytest.raises(BadInput, match="swish"):
        small(activation="swish")
