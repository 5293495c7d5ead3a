"""Checkpoints of ternary and binary layers: by hand, in whole numbers, with the gradient that makes them trainable."""

import itertools

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from extras import bitnet
from extras.bitnet import BinaryLinear, TernaryLinear, binary, eight_bits, nbytes, pack, replace, ternary, unpack
from model import GPT, ModelConfig
from train import TrainConfig, make_optimizer

KINDS = {"ternary": TernaryLinear, "binary": BinaryLinear}


def tiny() -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(vocab_size=31, block_size=16, n_embd=24, n_head=4, n_kv_head=2, n_layer=2, n_hidden=40))


def made(kind: str, bias: bool = False):
    """A layer whose norm and whose weights' mean are not what they start as."""
    torch.manual_seed(1)
    layer = KINDS[kind](32, 12, bias)
    nn.init.normal_(layer.weight, mean=0.3, std=0.5)
    nn.init.normal_(layer.norm.weight, mean=1.0, std=0.2)
    return layer


def whole(layer, x):
    """What the layer is to give, token by token in float64 and with sums of whole numbers."""
    weight, out = layer.weight.detach().double(), []
    size = weight.abs().mean()
    if isinstance(layer, BinaryLinear):
        signs = torch.where(weight > weight.mean(), 1, -1)
    else:
        signs = (weight > size / 2).long() - (weight < -size / 2).long()
    for token in x.detach().double().view(-1, x.shape[-1]):
        token = token / (token.square().mean() + layer.norm.eps).sqrt() * layer.norm.weight.detach().double()
        step = token.abs().max() / 127
        q = (token / step).round().long()
        out.append((signs * q).sum(1) * step * size)
    return torch.stack(out).view(*x.shape[:-1], -1) + (0 if layer.bias is None else layer.bias.detach().double())


def test_rounding_worked_by_hand():
    """Weights 4, -2, 0.5 and -1.5: the scale is 2, the ternary digits are 1 -1 0 -1, the binary ones 1 -1 1 -1."""
    weight = torch.tensor([[4, -2], [0.5, -1.5]])
    signs, scale = ternary(weight)
    assert scale == 2, "the scale is the mean of the weights' sizes"
    assert signs.tolist() == [[1, -1], [0, -1]], "each weight becomes the nearest of -1, 0 and 1 times the scale"
    signs, scale = binary(weight)
    assert scale == 2 and signs.tolist() == [[1, -1], [1, -1]]
    signs, _ = binary(torch.tensor([[5.0, 3, 4], [4, 4, 4]]))
    assert signs.tolist() == [[1, -1, -1], [-1, -1, -1]], "signs are those of weights less their mean, and never 0"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_sums_of_whole_numbers(kind, bias):
    """The output is a sum of whole numbers with signs, scaled at the end by the token's scale and the matrix's."""
    layer = made(kind, bias)
    x = torch.randn(3, 5, 32) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    apart = (layer(x).double() - whole(layer, x)).abs().max().item()
    assert apart < 1e-4, f"{apart:.1e} from the sum of whole numbers: norm, rounding or a scale is another"


def test_each_token_has_its_own_scale():
    """A token with one huge channel changes no other token: the eight bits of activations are scaled token by token."""
    layer, x = made("ternary"), torch.randn(1, 4, 32)
    before = layer(x)
    x[0, 2] = 0
    x[0, 2, 7] = 50  # after the norm it is larger than anything in the other tokens
    rest = [0, 1, 3]
    apart = (layer(x)[0, rest] - before[0, rest]).abs().max().item()
    assert apart < 1e-5, f"other tokens changed by {apart:.1e}: activations share one scale"
    q, step = eight_bits(torch.tensor([[1.0, -4.0], [0.1, 0.2], [0.0, 0.0]]))
    assert q.tolist() == [[32, -127], [64, 127], [0, 0]] and step.shape == (3, 1)
    q, _ = eight_bits(torch.randn(200, 64).bfloat16())
    assert q.abs().max() == 127, "eight bits end at 127"


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_passes_straight_through(kind):
    """Gradients are those of a plain product of the rounded input and weights, as if nothing had been rounded."""
    layer, x = made(kind), torch.randn(6, 32, requires_grad=True)
    y = layer(x)
    slope = torch.randn_like(y)
    y.backward(slope)
    normed = layer.norm(x.detach())
    q, step = eight_bits(normed)
    expected = slope.T @ (q * step)
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0, "no gradient: rounding has no slope"
    assert (layer.weight.grad - expected).abs().max() < 1e-4, "the weights' gradient did not pass straight through"
    signs, scale = layer.round(layer.weight.detach())
    again = x.detach().clone().requires_grad_()
    layer.norm(again).backward(slope @ (signs * scale))
    assert (x.grad - again.grad).abs().max() < 1e-4, "the input's gradient did not pass straight through"


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_it_can_hold(kind):
    """Trained on the outputs of such a layer, another one gets near: steps add up until an entry crosses a stair."""
    teacher, student = made(kind), made(kind)
    nn.init.normal_(student.weight, std=0.5)
    x = torch.randn(256, 32)
    with torch.no_grad():
        target = teacher(x)
    losses = []
    for _ in range(150):
        loss = F.mse_loss(student(x), target)
        losses.append(loss.item())
        [slope] = torch.autograd.grad(loss, [student.weight])
        student.weight.data -= slope
    assert losses[-1] < 0.2 * losses[0], f"the error went from {losses[0]:.2f} to {losses[-1]:.2f} only"


def test_five_digits_share_a_byte():
    """All 243 runs of five digits get bytes of their own and come back; 1, -1, 0, 0, 1 is 200; seven take two bytes."""
    runs = torch.tensor(list(itertools.product((-1, 0, 1), repeat=5)))
    packed = pack(runs)
    assert packed.dtype == torch.uint8 and len(set(packed.tolist())) == 243, "two runs share a byte"
    assert torch.equal(unpack(packed, (243, 5)).long(), runs), "unpacking is not the way back"
    assert pack(torch.tensor([1, -1, 0, 0, 1])).tolist() == [200], "2 + 0 + 9 + 27 + 162, the first digit the lowest"
    signs, _ = ternary(torch.randn(7, 9))
    assert len(pack(signs)) == 13 and torch.equal(unpack(pack(signs), (7, 9)), signs.to(torch.int8))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_replaced_and_nothing_else(kind):
    """All seven layers of each block are replaced and keep their weights; embedding and head stay. Muon trains them."""
    model, plain = tiny(), tiny()
    assert replace(model, kind) is model and type(model.head) is nn.Linear
    found = [name for name, layer in model.named_modules() if isinstance(layer, KINDS[kind])]
    assert len(found) == 2 * 7 and all(type(model.get_submodule(name)) is KINDS[kind] for name in found)
    for name in found:
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight), "weights were lost"
    muon = {id(p) for group in make_optimizer(model, TrainConfig()).optimizers["muon"].param_groups
            for p in group["params"]}
    assert muon == {id(model.get_submodule(name).weight) for name in found}, "Muon trains the matrices, norms not"
    with pytest.raises(BadInput, match="quaternary"):
        replace(model, "quaternary")


@pytest.mark.parametrize("kind, per_byte", [("ternary", 5), ("binary", 8)])
def test_bytes_per_weight(kind, per_byte):
    """A ternary weight takes 8 / 5 = 1.6 bits and a binary one 1; norms, embedding and scales take what they took."""
    matrices = [24 * 24, 12 * 24, 12 * 24, 24 * 24, 40 * 24, 40 * 24, 24 * 40]
    norms = 24 * 4 + 24 * 2 + 40 + 2 * 24 + 2 * 6  # in the layers: six of 24 channels and one of 40
    packed = sum(-(-n // per_byte) + 4 for n in matrices)
    expected = 2 * packed + 4 * (2 * norms + 24 + 31 * 24)
    assert nbytes(replace(tiny(), kind)) == expected, f"not {per_byte} weights in a byte, or a scale forgotten"


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_afterwards_changes_weights_only(kind):
    """A model rounded after its training has plain layers with two or three different weights in each matrix."""
    model = bitnet.round_weights(tiny(), kind)
    plain = tiny()
    for block, exact in zip(model.blocks, plain.blocks, strict=True):
        assert type(block.ffn.gate) is nn.Linear
        weight, size = block.ffn.gate.weight, exact.ffn.gate.weight.abs().mean()
        assert len(weight.unique()) == {"ternary": 3, "binary": 2}[kind]
        assert weight.abs().max().item() == pytest.approx(size.item(), rel=1e-5), "the scale is the weights' mean size"
    assert torch.equal(model.head.weight, plain.head.weight), "the head is not inside the blocks"
