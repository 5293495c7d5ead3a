"""Checkpoints of the deep MLP: norms against torch in float64, signals and gradients by their size, refusals."""

import math

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import MLP, NORMS, BatchNorm, Block, FeedForward, LayerNorm, ModelConfig, variance_scaling_

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # in float64, where only the order of the sums differs
EPS = 0.03  # large beside the variances below, so that its place in the formula shows


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def uneven(*shape):
    """Values whose mean and spread differ from channel to channel and from example to example; in float64."""
    channels, rows = torch.linspace(-2, 3, shape[-1]), torch.linspace(0.2, 1.5, shape[0])
    x = torch.randn(shape) * 0.3 * rows.view(-1, *[1] * (len(shape) - 1)) * (1 + channels.abs()) + channels
    return x.double()


def scramble(module):
    """Move every weight off its start, biases of 0 and scales of 1 included; in float64."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def gradients(layer, x, weights):
    """Of a weighted sum of the layer's outputs, by input and parameters: a plain sum's would be 0 through a norm."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad((y * weights).sum(), [x, layer.weight, layer.bias])


def pair_of_batch_norms(n_hidden, momentum=0.3):
    ours = scramble(BatchNorm(n_hidden, eps=EPS, momentum=momentum))
    theirs = nn.BatchNorm1d(n_hidden, eps=EPS, momentum=momentum).double()
    theirs.load_state_dict(ours.state_dict(), strict=False)  # torch counts its batches as well
    return ours, theirs


def pair_of_layer_norms(n_hidden):
    ours = scramble(LayerNorm(n_hidden, eps=EPS))
    theirs = nn.LayerNorm(n_hidden, eps=EPS).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def flat(x):
    return x.flatten(0, -2)


def same(ours, theirs, idea):
    error = (ours.reshape(theirs.shape) - theirs).abs().max().item()
    assert torch.allclose(ours.reshape(theirs.shape), theirs, **CLOSE), f"{idea} (off by up to {error:.2g})"


def test_every_part_is_registered():
    """All layers of all blocks are among the model's parameters: a plain list hides them from optimiser and device."""
    names = {name for name, _ in MLP(small()).named_parameters()}
    parts = ["tok_emb", "hidden", *(f"blocks.{i}.{part}" for i in range(2) for part in ("norm", "ffn.fc", "ffn.proj"))]
    for part in [*parts, "norm", "head"]:
        assert f"{part}.weight" in names, f"{part} is no parameter of the model: keep modules in an nn.ModuleList"


# Batch norm


def test_batch_norm_by_hand():
    """BatchNorm gives each column mean 0 and variance 1: [[1, 10], [3, 30]] becomes [[-1, -1], [1, 1]]."""
    norm = BatchNorm(2, eps=0.0)
    y = norm(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    assert torch.allclose(y, torch.tensor([[-1.0, -1.0], [1.0, 1.0]])), (
        f"got {y.tolist()}: batch norm works down the columns (channels), not along the rows, and divides by n"
    )
    assert torch.allclose(norm.running_mean, torch.tensor([0.2, 2.0])), (
        f"the running mean is {norm.running_mean.tolist()}: nine tenths of the old 0, a tenth of the batch's [2, 20]"
    )
    assert torch.allclose(norm.running_var, torch.tensor([1.1, 20.9])), (
        f"the running variance is {norm.running_var.tolist()}: nine tenths of the old 1 and a tenth of the batch's "
        "unbiased [2, 200], which divides by n - 1"
    )


@pytest.mark.parametrize("shape", [(6, 5), (5, 5), (4, 3, 5), (2, 6, 6)], ids=str)
def test_batch_norm_trains_like_torch(shape):
    """In training BatchNorm equals torch's, values and gradients, for [B, H] and for [B, T, H]."""
    ours, theirs = pair_of_batch_norms(shape[-1])
    x, weights = uneven(*shape), torch.randn(shape).double()
    y, grads = gradients(ours, x, weights)
    expected, expected_grads = gradients(theirs, flat(x), flat(weights))
    same(y, expected, "batch norm's values: over all axes but the last, eps inside the root, weight and bias")
    for name, grad, other in zip(("input", "weight", "bias"), grads, expected_grads, strict=True):
        same(grad, other, f"the gradient of the {name}: it also flows through the batch's mean and variance")


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5)], ids=str)
def test_running_statistics_follow_torch(shape):
    """After several batches the running mean and variance equal torch's, and evaluation uses them unchanged."""
    ours, theirs = pair_of_batch_norms(shape[-1])
    for i in range(4):
        x = uneven(*shape) * (i + 1) - i
        ours(x), theirs(flat(x))
    same(ours.running_mean, theirs.running_mean, "the running mean: new = (1 - momentum) old + momentum batch")
    same(
        ours.running_var, theirs.running_var,
        "the running variance averages the unbiased variance, n / (n - 1) times the batch's, n values in a channel",
    )
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    ours.eval(), theirs.eval()
    x, weights = uneven(*shape), torch.randn(shape).double()
    y, grads = gradients(ours, x, weights)
    expected, expected_grads = gradients(theirs, flat(x), flat(weights))
    same(y, expected, "evaluation does not use the running statistics")
    for name, grad, other in zip(("input", "weight", "bias"), grads, expected_grads, strict=True):
        same(grad, other, f"the gradient of the {name} in evaluation: there mean and variance are constants")
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, before[name]), f"{name} moved in evaluation: looking at the test changed the model"


def test_running_statistics_are_saved_but_not_trained():
    """Running statistics are state, not parameters: saved with the model, but without gradients."""
    norm = BatchNorm(3)
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}, (
        "a model loaded from disk needs the running statistics: make them buffers"
    )
    assert {name for name, _ in norm.named_parameters()} == {"weight", "bias"}, "the optimiser must not move statistics"
    x = torch.randn(4, 3, requires_grad=True)
    for _ in range(2):
        norm(x)
    for name, buffer in norm.named_buffers():
        assert not buffer.requires_grad, (
            f"{name} holds on to the graphs of all past batches: memory grows, and the second backward fails"
        )


def test_a_large_mean_does_not_drown_the_variance():
    """Around a mean of 10,000 both norms see a spread of 1: the variance is of (x - mean), not E[x^2] - mean^2."""
    x = 10_000 + torch.randn(64, 64)
    for norm, axis in ((BatchNorm(64), 0), (LayerNorm(64), 1)):
        exact = x.double()
        exact = (exact - exact.mean(axis, keepdim=True)) / exact.std(axis, correction=0, keepdim=True)
        error = (norm(x) - exact).abs().max()
        assert error < 0.1, f"{type(norm).__name__} is off by {error:.2g}: two numbers near 10^8 were subtracted"


def test_batch_norm_refuses_a_batch_of_one():
    """One value has no variance: BatchNorm refuses to train on it and says what to do; evaluation of one is fine."""
    norm = BatchNorm(3)
    with pytest.raises(BadInput, match="at least 2 values per channel.*larger batch_size"):
        norm(torch.randn(1, 3))
    assert norm(torch.randn(1, 2, 3)).isfinite().all(), "one sequence of two positions has two values per channel"
    assert norm.eval()(torch.randn(1, 3)).isfinite().all(), "evaluation needs no batch"


# Layer norm


def test_layer_norm_by_hand():
    """LayerNorm gives each row mean 0 and variance 1: [[1, 3], [10, 30]] becomes [[-1, 1], [-1, 1]]."""
    y = LayerNorm(2, eps=0.0)(torch.tensor([[1.0, 3.0], [10.0, 30.0]]))
    assert torch.allclose(y, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])), (
        f"got {y.tolist()}: layer norm works along the row of one example, not down the columns, and divides by n"
    )


@pytest.mark.parametrize("shape", [(7, 5), (5, 5), (4, 3, 5), (2, 6, 6)], ids=str)
def test_layer_norm_equals_torch(shape):
    """LayerNorm equals torch's, values and gradients, whatever stands before the last axis, in both modes."""
    ours, theirs = pair_of_layer_norms(shape[-1])
    x, weights = uneven(*shape), torch.randn(shape).double()
    expected, expected_grads = gradients(theirs, x, weights)
    for mode in (True, False):
        y, grads = gradients(ours.train(mode), x, weights)
        same(y, expected, "layer norm's values: mean over the last axis, variance over n, eps inside the root")
        for name, grad, other in zip(("input", "weight", "bias"), grads, expected_grads, strict=True):
            same(grad, other, f"the gradient of the {name}: it also flows through the mean and the variance")


# Neighbours


@pytest.mark.parametrize("norm", NORMS)
def test_evaluation_does_not_depend_on_the_neighbours(norm):
    """In evaluation an example gets the same answer alone, in a batch, and in another order, with every norm."""
    model = scramble(MLP(small(norm=norm)))
    idx = torch.randint(11, (8, 5))
    for _ in range(3):
        model(idx)  # running statistics leave their start
    model.eval()
    together = model(idx)
    alone = torch.cat([model(row[None]) for row in idx])
    assert torch.allclose(together, alone, **CLOSE), (
        f"{norm}: an example's scores changed with the batch it came in: evaluation must use the running statistics"
    )
    assert torch.allclose(model(idx.flip(0)).flip(0), together, **CLOSE), f"{norm}: the order of the batch counts"


def test_only_batch_norm_couples_the_examples_of_a_batch():
    """In training a BatchNorm model's answer depends on the neighbours; a LayerNorm model's does not."""
    idx = torch.randint(11, (8, 5))
    other = torch.cat([idx[:1], torch.randint(11, (7, 5))])
    moved = {}
    for norm in NORMS:
        model = scramble(MLP(small(norm=norm)))
        moved[norm] = (model(idx)[0] - model(other)[0]).abs().max().item()
    assert moved["batch"] > 0.1, "batch norm in training must use the batch's own statistics"
    assert moved["layer"] < 1e-9 and moved["none"] < 1e-9, f"the first example's scores moved: {moved}"


# Initialisation


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2), 0.1])
def test_variance_scaling_sets_the_spread_of_the_output(gain):
    """A scaled layer's output has gain^2 times the input's variance, however many inputs and outputs it has."""
    for fan_in, fan_out in ((400, 100), (100, 400)):
        layer = nn.Linear(fan_in, fan_out)
        variance_scaling_(layer, gain)
        x = 3 * torch.randn(500, fan_in)
        ratio = layer(x).var() / x.var()
        assert abs(ratio / gain**2 - 1) < 0.1, (
            f"{fan_in} -> {fan_out}: the variance grew {ratio:.3g} times, not {gain**2:.3g}: std = gain / sqrt(fan_in)"
        )
        assert not layer.bias.any(), "biases start at 0"


@pytest.mark.parametrize(("scale", "factor"), [(1.0, 1.0), (1 / math.sqrt(2), 2.0**-20), (math.sqrt(2), 2.0**20)])
def test_the_right_gain_carries_a_signal_through_twenty_layers(scale, factor):
    """Twenty pairs of layers keep the mean square of their input; a gain off by sqrt(2) per pair costs a million."""
    x = torch.randn(64, 256)
    y = x
    with torch.no_grad():
        for _ in range(20):
            pair = FeedForward(small(n_hidden=256))
            pair.proj.weight.mul_(scale)
            y = pair(y)
    ratio = (y.square().mean() / x.square().mean()).item()
    assert factor / 4 < ratio < factor * 4, (
        f"the power changed {ratio:.2g} times over 20 blocks, expected about {factor:.2g}: ReLU halves it, and a "
        "gain of sqrt(2) gives it back"
    )


def test_every_layer_starts_at_its_scale():
    """Each layer but the embedding is variance-scaled: gain 1, sqrt(2) after a ReLU, 0.1 for the head; biases at 0."""
    model = MLP(small(vocab_size=200, block_size=20, n_embd=20, n_hidden=200))
    gains = {"hidden": 1.0, "blocks.0.ffn.fc": 1.0, "blocks.1.ffn.proj": math.sqrt(2), "head": 0.1}
    for name, gain in gains.items():
        layer = model.get_submodule(name)
        std, expected = layer.weight.std().item(), gain / math.sqrt(layer.in_features)
        assert std == pytest.approx(expected, rel=0.05), (
            f"{name} starts with spread {std:.4f}, not {gain:.3g} / sqrt({layer.in_features}) = {expected:.4f}"
        )
        assert not layer.bias.any(), f"{name}: biases start at 0"


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_initial_loss_is_near_ln_v(norm, residual):
    """Before training every character is about equally likely: the loss is near ln 65 = 4.17, with every norm."""
    losses = []
    for _ in range(3):
        model = MLP(ModelConfig(vocab_size=65, norm=norm, residual=residual))
        idx, y = torch.randint(65, (512, model.config.block_size)), torch.randint(65, (512,))
        losses.append(F.cross_entropy(model(idx), y).item())
    loss = sum(losses) / 3
    assert abs(loss - math.log(65)) < 0.15, f"the loss starts at {loss:.2f}: large scores are confident mistakes"


# Blocks and the model


def small(**changes) -> ModelConfig:
    """A shape in which no two sizes are equal, so that a mixed-up axis cannot pass unseen."""
    return ModelConfig(**{"vocab_size": 11, "block_size": 5, "n_embd": 3, "n_hidden": 8, "n_layer": 2} | changes)


def by_torch(model, idx):
    """The same network written with torch's functions and this model's weights, in training."""
    w, config = dict(model.named_parameters()), model.config

    def norm(x, name):
        if config.norm == "none":
            return x
        scale = {"weight": w[f"{name}.weight"], "bias": w[f"{name}.bias"], "eps": 1e-5}
        if config.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], **scale)
        return F.batch_norm(x, None, None, training=True, **scale)

    x = F.embedding(idx, w["tok_emb.weight"]).reshape(len(idx), -1)
    x = F.linear(x, w["hidden.weight"], w["hidden.bias"])
    for i in range(config.n_layer):
        y = norm(x, f"blocks.{i}.norm")
        y = F.relu(F.linear(y, w[f"blocks.{i}.ffn.fc.weight"], w[f"blocks.{i}.ffn.fc.bias"]))
        y = F.linear(y, w[f"blocks.{i}.ffn.proj.weight"], w[f"blocks.{i}.ffn.proj.bias"])
        x = x + y if config.residual else y
    return F.linear(norm(x, "norm"), w["head.weight"], w["head.bias"])


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_the_model_equals_one_written_with_torchs_functions(norm, residual):
    """The whole model equals one written with torch's own functions, scores and gradients, for every norm."""
    model = scramble(MLP(small(norm=norm, residual=residual)))
    idx, weights = torch.randint(11, (6, 5)), torch.randn(6, 11).double()
    ours, theirs = model(idx), by_torch(model, idx)
    same(ours, theirs, "the scores: norm, then the two layers, then add; one last norm before the head")
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad((ours * weights).sum(), parameters)
    others = torch.autograd.grad((theirs * weights).sum(), parameters)
    for name, grad, other in zip(names, grads, others, strict=True):
        same(grad, other, f"the gradient of {name}")


def test_a_residual_block_that_has_nothing_to_say_passes_its_input_on():
    """With its last layer at zero a residual block is the identity; a block without residual forgets its input."""
    x = torch.randn(4, 8)
    for residual, expected in ((True, x), (False, torch.zeros(4, 8))):
        block = Block(small(residual=residual))
        nn.init.zeros_(block.ffn.proj.weight)
        assert torch.equal(block(x), expected), f"residual={residual}: a block adds to its input, or replaces it"


def first_gradient(n_layer, scale=1.0, **changes):
    """Size of the first layer's gradient at the start, the blocks' weights multiplied by `scale`."""
    torch.manual_seed(1)
    model = MLP(small(vocab_size=65, n_embd=16, n_hidden=96, n_layer=n_layer, **changes))
    with torch.no_grad():
        for block in model.blocks:
            block.ffn.fc.weight.mul_(scale)
            block.ffn.proj.weight.mul_(scale)
    idx, y = torch.randint(65, (64, 5)), torch.randint(65, (64,))
    F.cross_entropy(model(idx), y).backward()
    return model.hidden.weight.grad.norm().item()


@pytest.mark.parametrize("scale", [0.7, 1.0, 1.4])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_norm_and_residual_carry_the_gradient_to_the_first_layer(norm, scale):
    """With norm and residual the first gradient is about the same below 2 blocks and 32, even with a wrong gain."""
    ratio = first_gradient(32, scale, norm=norm) / first_gradient(2, scale, norm=norm)
    assert 1 / 3 < ratio < 3, (
        f"{norm} norm, weights x {scale}: 30 more blocks changed the first gradient {ratio:.2g} times: the sum "
        "hands it down unchanged if the norm stands inside the branch"
    )


def test_a_plain_stack_loses_or_blows_up_the_gradient():
    """Without norm and residual a gain 30 % off makes the first gradient vanish or explode; the right gain keeps it."""
    plain = {"norm": "none", "residual": False}
    ratio = {scale: first_gradient(32, scale, **plain) / first_gradient(2, scale, **plain) for scale in (0.7, 1.0, 1.4)}
    assert ratio[0.7] < 1e-6, f"0.7 twice a block for 30 blocks is 5e-10, the gradient changed {ratio[0.7]:.2g} times"
    assert ratio[1.4] > 1e6, f"1.4 twice a block for 30 blocks is 6e8, the gradient changed {ratio[1.4]:.2g} times"
    assert 0.2 < ratio[1.0] < 5, f"with the right gain a plain stack keeps its gradient, not {ratio[1.0]:.2g} times"


def test_batch_norm_alone_makes_the_gradient_explode():
    """BatchNorm without residuals multiplies the gradient by about sqrt(pi / (pi - 1)) = 1.21 per block."""
    ratio = first_gradient(36, norm="batch", residual=False) / first_gradient(6, norm="batch", residual=False)
    assert 50 < ratio < 2000, f"30 blocks changed the gradient {ratio:.3g} times (Yang et al. 2019 derive 312)"


def test_parameters_by_the_formula():
    """The model has V C + (T C + 1) H + L (2 H^2 + 4 H) + 2 H + (H + 1) V parameters with a norm."""
    V, T, C, H, L = 11, 5, 3, 8, 2
    params = V * C + (T * C + 1) * H + L * (2 * H * H + 2 * H + 2 * H) + 2 * H + (H + 1) * V
    for norm, removed in (("layer", 0), ("batch", 0), ("none", 2 * H * (L + 1))):
        count = sum(p.numel() for p in MLP(small(norm=norm)).parameters())
        assert count == params - removed, f"{norm}: {count} parameters, expected {params - removed}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"block_size": 0}, "block_size"),
        ({"n_embd": -1}, "n_embd"),
        ({"n_hidden": 0}, "n_hidden"),
        ({"n_layer": 0}, "n_layer"),
        ({"norm": "group"}, "group"),
    ],
)
def test_nonsense_shapes_are_refused(changes, message):
    """A shape that cannot be built is refused, with the reason."""
    with pytest.raises(BadInput, match=message):
        small(**changes)
