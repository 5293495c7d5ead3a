"""A base in four bits: the sixteen levels, two in a byte, blocks and scales, the product, and adapters beside it."""

import copy

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F

import lora
from extras import four_bit
from extras.four_bit import FourBit
from lora import LoRAConfig
from model import GPT, ModelConfig

# As printed in the paper's appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
CONFIG = ModelConfig(vocab_size=19, block_size=16, n_embd=24, n_head=4, n_kv_head=2, n_layer=2, n_hidden=40)


@pytest.fixture
def model():
    """A small model; 24 x 40 and 12 x 24 weights are no whole number of blocks."""
    torch.manual_seed(3)
    return GPT(CONFIG)


def test_the_levels_are_the_published_ones():
    """The sixteen levels are those of the paper: quantiles of a normal distribution at equal steps of probability."""
    found = four_bit.levels()
    apart = (found - torch.tensor(NF4)).abs().max().item()
    assert found.shape == (16,) and apart < 1e-6, f"the levels are {apart:.1e} beside the published ones"
    outer = torch.special.ndtri(torch.tensor(1 - (1 / 30 + 1 / 32) / 2, dtype=torch.float64))
    steps = torch.special.ndtr(found.double() * outer).diff()
    assert torch.allclose(steps[:7], steps[0].expand(7), atol=1e-6), "the levels below 0 are no quantiles"
    assert torch.allclose(steps[7:], steps[-1].expand(8), atol=1e-6), "the levels above 0 are no quantiles"


def test_two_codes_share_a_byte():
    """Codes 1, 2, 3, 4 become the bytes 0x12 and 0x34, and each of the 256 bytes gives its two levels back."""
    codes = torch.tensor([[1, 2, 3, 4], [15, 0, 0, 15]], dtype=torch.uint8)
    packed = four_bit.pack(codes)
    assert packed.dtype == torch.uint8 and packed.tolist() == [[0x12, 0x34], [0xF0, 0x0F]], "not the first one on top"
    table = four_bit.pairs(torch.float32, torch.device("cpu"))
    for byte in range(256):
        assert table[byte].tolist() == pytest.approx([NF4[byte // 16], NF4[byte % 16]], abs=1e-6), f"byte {byte:#x}"


def test_the_nearest_level_is_taken():
    """Each number gets the level with the smallest distance to it, found by trying all sixteen."""
    x = torch.linspace(-1.2, 1.2, 1201)
    tried = (x.double()[:, None] - torch.tensor(NF4, dtype=torch.float64)).abs()
    found = four_bit.nearest(x)
    distance = tried.gather(1, found.long()[:, None])[:, 0]
    assert found.dtype == torch.uint8 and torch.allclose(distance, tried.amin(1), atol=1e-6), "not the nearest level"


def test_rounding_by_hand():
    """Two blocks whose largest weights are 2 and 4: the levels are multiplied by these, and 0 stays 0."""
    weight = torch.zeros(2, 64)
    weight[0, :4] = torch.tensor([-2.0, 2.0, 0.5, -0.05])  # -1, 1, 0.25 and -0.025 of the largest
    weight[1, 60:] = torch.tensor([-4.0, 3.3, 0.0, -1.2])  # -1, 0.825 and -0.3 of the largest
    expected = torch.zeros(2, 64)
    expected[0, :4] = 2 * torch.tensor([NF4[0], NF4[15], NF4[10], NF4[7]])
    expected[1, 60:] = 4 * torch.tensor([NF4[0], NF4[14], NF4[7], NF4[4]])
    found = FourBit(weight).weight
    assert torch.allclose(found, expected, atol=1e-6), "a block is not rounded to levels times its own largest weight"


def test_the_error_is_bounded_and_below_that_of_even_levels():
    """Each weight moves to the nearest of its sixteen values, and on the whole by less than with even levels."""
    torch.manual_seed(0)
    rows = 0.02 * (1 + torch.rand(310, 1))  # 310 rows of 67: blocks go across rows, and the last one is short
    weight = rows * torch.randn(310, 67)
    flat = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = flat.abs().amax(1)
    scale = four_bit.FourBit(weight).scales(len(flat))[:, 0]
    assert len(flat) > 256, "not more than one group of scales"
    off = (scale - largest).abs().max() / largest.max()
    assert off < 1 / 127, f"double quantisation moved a scale by {off:.3f} of the largest"
    found = FourBit(weight).weight
    assert found.shape == weight.shape and found.dtype == torch.float32
    moved = F.pad((found - weight).flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs()
    tried = (flat[..., None] - scale[:, None, None] * torch.tensor(NF4)).abs()  # [S, 64, 16]
    assert torch.allclose(moved, tried.amin(-1), atol=1e-7), "not the nearest level times the scale that is stored"
    even = torch.linspace(-1, 1, 16)
    code = (flat[..., None] / largest[:, None, None] - even).abs().argmin(-1)
    evenly = (even[code] * largest[:, None] - flat).square().mean().sqrt()
    ours = (found - weight).square().mean().sqrt()
    assert ours < 0.95 * evenly, f"NF4 errs by {ours:.2e}, sixteen even levels by {evenly:.2e}"


def test_zeros_and_bytes():
    """A matrix of zeros stays one, a single large block does not spoil others, and a weight takes 4.127 bits."""
    assert not FourBit(torch.zeros(5, 64)).weight.any(), "a block of zeros is no longer zero"
    weight = torch.randn(256, 64) * 0.01
    weight[7] = 0
    found = FourBit(weight).weight
    assert found.isfinite().all() and not found[7].any()
    layer = FourBit(torch.randn(512, 128))
    bits = 8 * four_bit.nbytes(layer) / (512 * 128)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3), f"{bits:.3f} bits a weight"
    assert not list(layer.parameters()), "frozen weights must not be parameters: an optimiser would take them"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_product_and_its_gradient(precision):
    """Output and gradient to the input are those of F.linear with the rounded weights, of which none is kept."""
    torch.manual_seed(1)
    layer = FourBit(torch.randn(11, 70))
    x, kept = torch.randn(2, 3, 70), []
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            y = layer(mine)
        expected = F.linear(theirs, layer.weight)
    assert y.dtype == expected.dtype, f"{y.dtype} where a float layer gives {expected.dtype}"
    grad = torch.randn(2, 3, 11).to(y.dtype)
    y.backward(grad)
    expected.backward(grad)
    near = {"rtol": 1e-5, "atol": 1e-5} if precision == "float32" else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(y, expected, **near, msg="not the product with the rounded weights")
    torch.testing.assert_close(mine.grad, theirs.grad, **near, msg="not the gradient of that product")
    assert 11 * 70 not in kept, "the float matrix is kept for the backward pass: nothing is saved"


def test_the_matrices_of_the_blocks_are_replaced(model):
    """Seven matrices of each block are in four bits; embedding, head and norms are untouched; the model gets small."""
    full, before = four_bit.nbytes(model), copy.deepcopy(model.state_dict())
    assert four_bit.four_bit(model) is model
    found = [name for name, layer in model.named_modules() if isinstance(layer, FourBit)]
    assert len(found) == 2 * 7 and all(name.startswith("blocks.") for name in found)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), f"{name} changed"
    assert four_bit.nbytes(model) < 0.4 * full
    some = four_bit.four_bit(GPT(CONFIG), ("query",))
    assert sum(isinstance(layer, FourBit) for layer in some.modules()) == 2, "`targets` names one matrix of each block"


def test_adapters_learn_over_a_base_in_four_bits(model):
    """Beside a base in four bits, adapters have the gradient that they have beside floats of the same values."""
    torch.manual_seed(4)
    four_bit.four_bit(model)
    base = four_bit.dequantise(copy.deepcopy(model))  # ordinary layers
    x, y = torch.randint(19, (2, 3, 16)).unbind()
    with torch.no_grad():
        alone = model(x)
    for one in (model, base):
        torch.manual_seed(5)
        lora.add(one, LoRAConfig(rank=3, alpha=7.0))
    assert torch.equal(model(x), alone), "adapters that begin with B = 0 change the base"
    grads = []
    for one in (model, base):
        torch.manual_seed(6)
        for layer in lora.adapters(one).values():
            layer.b.data.normal_(std=0.1)
        F.cross_entropy(one(x).flatten(0, 1), y.flatten()).backward()
        grads.append({name: p.grad for name, p in one.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 2 * 14, "more or less than the adapters is trained"
    for name, grad in grads[0].items():
        assert grad.any(), f"{name} has no gradient: it does not pass through the layers above"
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6, msg=f"{name}: another gradient")


def test_merging_needs_floats(model):
    """A sum has no place in four bits, so `merge` refuses it; after `dequantise` it gives the scores that it must."""
    torch.manual_seed(7)
    lora.add(four_bit.four_bit(model), LoRAConfig(rank=2, alpha=5.0))
    for layer in lora.adapters(model).values():
        layer.b.data.normal_(std=0.1)
    x = torch.randint(19, (3, 16))
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(BadInput, match="four bits"):
            lora.merge(model)
        torch.testing.assert_close(model(x), expected, msg="a merge that was refused changed the model")
        merged = lora.merge(four_bit.dequantise(model))
        assert not lora.adapters(merged) and not any(isinstance(layer, FourBit) for layer in merged.modules())
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5, msg="merging lost what was learned")
