"""Checkpoints of GPT-2's model: against torch's own modules in float64, loops, counted parameters and statistics."""

import itertools
import math

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as trunk
from model import GPT, Block, CausalSelfAttention, FeedForward, LayerNorm, ModelConfig, attention, attention_weights
from train import PRESETS

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # in float64, where only the order of the sums differs


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**changes) -> ModelConfig:
    """A shape in which no two sizes are equal, so that a mixed-up axis cannot pass unseen."""
    return ModelConfig(**{"vocab_size": 11, "block_size": 7, "n_embd": 12, "n_head": 3, "n_layer": 2} | changes)


def scramble(module):
    """Move every weight off its start, biases of 0 and scales of 1 included; in float64."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def copy_attention(ours, theirs):
    """The weights of our attention into torch's, which keeps query, key and value in one matrix as well."""
    theirs.in_proj_weight.data = ours.qkv.weight.data
    theirs.in_proj_bias.data = ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())


def copy_block(ours, theirs):
    """The weights of our block into torch's nn.TransformerEncoderLayer."""
    copy_attention(ours.attn, theirs.self_attn)
    theirs.norm1.load_state_dict(ours.norm1.state_dict())
    theirs.norm2.load_state_dict(ours.norm2.state_dict())
    theirs.linear1.load_state_dict(ours.ffn.fc.state_dict())
    theirs.linear2.load_state_dict(ours.ffn.proj.state_dict())


def torch_block(config):
    return nn.TransformerEncoderLayer(
        config.n_embd, config.n_head, 4 * config.n_embd, dropout=0.0, activation="gelu", batch_first=True,
        norm_first=True, dtype=torch.float64,
    )


def future_mask(T):
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def attention_grads(ours, theirs):
    """Triples (name, our gradient, torch's) for the weights of attention."""
    yield "qkv.weight", ours.qkv.weight.grad, theirs.in_proj_weight.grad
    yield "qkv.bias", ours.qkv.bias.grad, theirs.in_proj_bias.grad
    yield "proj.weight", ours.proj.weight.grad, theirs.out_proj.weight.grad
    yield "proj.bias", ours.proj.bias.grad, theirs.out_proj.bias.grad


def test_layer_norm_is_its_formula():
    """LayerNorm takes each position's mean and variance over the channels, then scales and shifts: the formula."""
    norm = scramble(LayerNorm(12))
    x = (3 + 2 * torch.randn(2, 5, 12, dtype=torch.float64)).requires_grad_()
    mean = x.sum(-1, keepdim=True) / 12
    variance = (x - mean).square().sum(-1, keepdim=True) / 12  # over C, not C - 1
    expected = (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(
        norm(x), expected, **CLOSE, msg=lambda m: "(x - mean) / sqrt(variance + eps) * weight + bias\n" + m
    )
    slope = torch.randn_like(expected)
    inputs = [x, norm.weight, norm.bias]
    for name, a, b in zip(
        ("x", "weight", "bias"), torch.autograd.grad(norm(x), inputs, slope),
        torch.autograd.grad(expected, inputs, slope), strict=True,
    ):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, name=name: f"the gradient of {name} is wrong\n{m}")
    fresh = LayerNorm(12)(1000 + x.detach().float())
    assert fresh.mean(-1).abs().max() < 1e-3 and (fresh.std(-1, correction=0) - 1).abs().max() < 1e-3, (
        "a fresh norm gives mean 0 and variance 1, far from 0 as well"
    )


def test_attention_by_hand_on_three_tokens():
    """Attention on three tokens gives the numbers worked out by hand."""
    a, b = math.log(3), math.log(2)
    q = torch.tensor([[0, 5, 5, 0], [a, 0, 7, 0], [0, b, 0, 0]], dtype=torch.float64)
    k = torch.tensor([[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]], dtype=torch.float64)
    v = torch.tensor([[4, 0, 0, 8], [0, 4, 0, 0], [0, 0, 8, 0]], dtype=torch.float64)
    # q k^T           = [[0, 10, 10], [2 ln 3, 0, 14], [0, 2 ln 2, 0]]
    # / sqrt(4)       = [[0,  5,  5], [  ln 3, 0,  7], [0,   ln 2, 0]]
    # without future  = [[0], [ln 3, 0], [0, ln 2, 0]]; e to that = [[1], [3, 1], [1, 2, 1]]; each row by its sum:
    weights = torch.tensor([[1, 0, 0], [3 / 4, 1 / 4, 0], [1 / 4, 1 / 2, 1 / 4]], dtype=torch.float64)
    out = torch.tensor([[4, 0, 0, 8], [3, 1, 0, 6], [1, 2, 2, 2]], dtype=torch.float64)
    torch.testing.assert_close(
        attention_weights(q, k), weights, **CLOSE,
        msg=lambda m: "weights are softmax over the past of q k^T / sqrt(D), with D = 4 channels here\n" + m,
    )
    torch.testing.assert_close(
        attention(q, k, v), out, **CLOSE, msg=lambda m: "the output is each row's weights times the values\n" + m
    )


def test_weights_are_a_distribution_over_the_past():
    """Each position's attention weights sum to 1, and none lies on the future."""
    q, k = torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4)  # B = 2, H = 3, T = 6, D = 4
    weights = attention_weights(q, k)
    assert weights.shape == (2, 3, 6, 6), "one weight for each pair of positions, in each head of each sequence"
    assert (weights[..., future_mask(6)] == 0).all(), "weight lies on the future: mask with -inf, before the softmax"
    torch.testing.assert_close(
        weights.sum(-1), torch.ones(2, 3, 6),
        msg=lambda m: "each query's weights sum to 1: softmax runs over the keys (the last axis), after the mask\n" + m,
    )
    assert (weights[..., ~future_mask(6)] > 0).all(), "every position of the past, and the position itself, can be seen"


def test_attention_is_torchs():
    """Attention and its gradients equal torch's scaled_dot_product_attention."""
    inputs = [torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours = attention(*inputs)
    theirs = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda m: "causal softmax(q k^T / sqrt(D)) v\n" + m)
    slope = torch.randn_like(ours)
    grads = (torch.autograd.grad(out, inputs, slope) for out in (ours, theirs))
    for name, a, b in zip("qkv", *grads, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, name=name: f"the gradient of {name} is wrong\n{m}")


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def test_the_fast_path_gives_the_same(monkeypatch):
    """On a GPU attention takes the fused kernel, and that gives what the two products written out give."""
    q, k, v = (torch.randn(2, 3, 6, 4, dtype=torch.float64) for _ in range(3))
    written_out = attention(q, k, v)
    monkeypatch.setattr(trunk, "attention_weights", lambda q, k: pytest.fail("the T x T weights were stored"))
    fused = attention(*(part.as_subclass(Elsewhere) for part in (q, k, v))).as_subclass(torch.Tensor)
    torch.testing.assert_close(
        fused, written_out, **CLOSE, msg=lambda m: "the paths differ: is the fused one causal, and scaled alike?\n" + m
    )


def test_scaling_keeps_attention_soft():
    """Attention over 256 channels is as soft as over 4: the scores are divided by sqrt(D)."""
    softness = []
    for D in (4, 256):
        weights = attention_weights(torch.randn(500, 16, D), torch.randn(500, 16, D))[:, -1]  # over 16 positions
        softness.append(torch.special.entr(weights).sum(-1).mean().item())  # entropy, at most ln 16 = 2.77
    assert softness[1] == pytest.approx(softness[0], abs=0.1), (
        f"entropy {softness[0]:.2f} with D = 4 but {softness[1]:.2f} with D = 256: scores grow with the width"
    )


@pytest.mark.parametrize("n_head", [1, 3, 4])
def test_causal_self_attention_is_torchs(n_head):
    """Attention in heads equals torch's nn.MultiheadAttention with a causal mask: outputs and gradients."""
    config = small(n_head=n_head)
    ours = scramble(CausalSelfAttention(config))
    theirs = nn.MultiheadAttention(config.n_embd, n_head, batch_first=True, dtype=torch.float64)
    copy_attention(ours, theirs)
    x = torch.randn(2, 5, config.n_embd, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1 = ours(x1)
    y2, _ = theirs(x2, x2, x2, attn_mask=future_mask(5), need_weights=False)
    torch.testing.assert_close(
        y1, y2, **CLOSE,
        msg=lambda m: "split into heads [B, H, T, D], attend, merge to [B, T, C], project; scale by the head's D\n" + m,
    )
    slope = torch.randn_like(y1)
    y1.backward(slope)
    y2.backward(slope)
    torch.testing.assert_close(x1.grad, x2.grad, **CLOSE, msg=lambda m: "the gradient of the input is wrong\n" + m)
    for name, a, b in attention_grads(ours, theirs):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, name=name: f"the gradient of {name} is wrong\n{m}")


def test_one_product_is_three():
    """The fused product gives queries, keys and values, in this order, as three products would, head by head."""
    config = small()
    attn = scramble(CausalSelfAttention(config))
    x = torch.randn(2, 5, config.n_embd, dtype=torch.float64)
    C, D = config.n_embd, config.n_embd // config.n_head
    query, key, value = (
        F.linear(x, attn.qkv.weight[i * C:(i + 1) * C], attn.qkv.bias[i * C:(i + 1) * C]) for i in range(3)
    )  # each [B, T, C]
    heads = []
    for h in range(config.n_head):
        q, k, v = (part[..., h * D:(h + 1) * D] for part in (query, key, value))  # each [B, T, D]
        out = torch.zeros_like(v)
        for b, t in itertools.product(range(2), range(5)):
            scores = torch.stack([q[b, t] @ k[b, s] / math.sqrt(D) for s in range(t + 1)])
            out[b, t] = sum(weight * v[b, s] for s, weight in enumerate(scores.softmax(0)))
        heads.append(out)
    expected = attn.proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(
        attn(x), expected, **CLOSE,
        msg=lambda m: "rows 0 to C of qkv are the queries', C to 2C the keys', the rest the values'; each head has D "
        "neighbouring channels of each\n" + m,
    )


def test_split_and_merge_are_inverse():
    """Splitting into heads gives head h the channels hD to (h + 1)D, and merging puts them back."""
    attn = CausalSelfAttention(small())
    x = torch.randn(2, 5, 12)
    heads = attn.split(x)
    assert heads.shape == (2, 3, 5, 4), "[B, T, C] -> [B, H, T, D]: the heads stand before the positions"
    assert torch.equal(heads[1, 2, 3], x[1, 3, 8:12]), "head 2 of 3 holds channels 8 to 12 of each position"
    assert torch.equal(attn.merge(heads), x), "merge undoes split: [B, H, T, D] -> [B, T, H, D] -> [B, T, C]"


def test_feed_forward_is_two_layers_with_gelu():
    """The feed-forward layer equals torch's Linear, GELU, Linear, four times as wide inside."""
    config = small()
    ours = scramble(FeedForward(config))
    theirs = nn.Sequential(nn.Linear(12, 48), nn.GELU(), nn.Linear(48, 12)).double()
    theirs[0].load_state_dict(ours.fc.state_dict())
    theirs[2].load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE, msg=lambda m: "C -> 4C, exact GELU, 4C -> C\n" + m)
    alone = torch.stack([ours(x[:, t]) for t in range(5)], dim=1)
    torch.testing.assert_close(
        ours(x), alone, **CLOSE, msg=lambda m: "positions go through one by one: only attention mixes them\n" + m
    )


def test_block_is_torchs():
    """A block equals torch's nn.TransformerEncoderLayer with the norms first: outputs and gradients."""
    config = small()
    ours, theirs = scramble(Block(config)), torch_block(config)
    copy_block(ours, theirs)
    x = torch.randn(2, 5, config.n_embd, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = ours(x1), theirs(x2, src_mask=future_mask(5), is_causal=True)
    torch.testing.assert_close(
        y1, y2, **CLOSE, msg=lambda m: f"x = x + attn(norm1(x)), then x = x + ffn(norm2(x))\n{m}"
    )
    slope = torch.randn_like(y1)
    y1.backward(slope)
    y2.backward(slope)
    pairs = [("the input", x1.grad, x2.grad), *attention_grads(ours.attn, theirs.self_attn)]
    for name, a, b in (
        ("norm1", ours.norm1, theirs.norm1), ("norm2", ours.norm2, theirs.norm2),
        ("ffn.fc", ours.ffn.fc, theirs.linear1), ("ffn.proj", ours.ffn.proj, theirs.linear2),
    ):
        pairs += [(f"{name}.weight", a.weight.grad, b.weight.grad), (f"{name}.bias", a.bias.grad, b.bias.grad)]
    for name, a, b in pairs:
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m, name=name: f"the gradient of {name} is wrong\n{m}")


def test_model_is_embedding_blocks_norm_head():
    """The whole model equals one made of torch's parts: token plus position, blocks, norm, the embedding again."""
    config = small()
    model = scramble(GPT(config))
    idx = torch.randint(config.vocab_size, (2, 5))
    table = model.tok_emb.weight.detach().clone().requires_grad_()
    x = F.embedding(idx, table) + model.pos_emb.detach()[torch.arange(5)]
    for block in model.blocks:
        theirs = torch_block(config)
        copy_block(block, theirs)
        x = theirs(x, src_mask=future_mask(5), is_causal=True)
    x = F.layer_norm(x, (config.n_embd,), model.norm.weight, model.norm.bias)
    expected = x @ table.T
    logits = model(idx)
    assert expected.shape == (2, 5, 11), "one score for each of the V tokens at each position"
    torch.testing.assert_close(
        logits, expected, **CLOSE,
        msg=lambda m: "tok_emb(idx) + pos_emb[t], every block in turn, a last norm, times the embedding\n" + m,
    )
    slope = torch.randn_like(expected)
    logits.backward(slope)
    expected.backward(slope)
    torch.testing.assert_close(
        model.tok_emb.weight.grad, table.grad, **CLOSE,
        msg=lambda m: "the tied weight is used twice: its gradient is the sum of both uses\n" + m,
    )


def test_the_head_is_the_embedding():
    """Token embedding and output layer are one and the same weight, also after saving and loading."""
    model = GPT(small())
    assert model.head.weight is model.tok_emb.weight, "two copies that start equal drift apart with the first step"
    assert model.head.bias is None, "the output layer has no bias, as the embedding has none"
    names = [name for name, p in model.named_parameters() if p is model.head.weight]
    assert names == ["tok_emb.weight"], "the optimiser must see the weight once"
    other = GPT(small())
    other.load_state_dict(model.state_dict())
    assert other.head.weight is other.tok_emb.weight and torch.equal(other.head.weight, model.head.weight)


def test_no_position_sees_the_future():
    """Changing one token changes no earlier position's scores, and changes its own and every later one."""
    model = scramble(GPT(small()))
    idx = torch.randint(11, (2, 7))
    before = model(idx)
    for t in range(7):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        differs = (model(changed) - before).abs().amax(dim=(0, 2)) > 1e-9  # [T]
        for s in range(t):
            assert not differs[s], f"position {s} changed when token {t} changed: attention sees the future"
        for s in range(t, 7):
            assert differs[s], f"position {s} did not change when token {t} changed: the past is hidden"


def test_a_prefix_is_scored_alike():
    """A text's first tokens get the same scores whether or not more text follows: one pass is T predictions."""
    model = scramble(GPT(small()))
    idx = torch.randint(11, (2, 7))
    whole = model(idx)
    for t in range(1, 8):
        torch.testing.assert_close(
            model(idx[:, :t]), whole[:, :t], **CLOSE,
            msg=lambda m, t=t:
            f"the first {t} positions depend on how much text follows: mask or positions are off\n{m}",
        )


def test_sequences_of_a_batch_are_apart():
    """What one sequence of a batch says does not touch another's scores."""
    model = scramble(GPT(small()))
    idx = torch.randint(11, (3, 6))
    alone = torch.cat([model(row[None]) for row in idx])
    torch.testing.assert_close(
        model(idx), alone, **CLOSE, msg=lambda m: "the batch axis was mixed with heads or positions\n" + m
    )


def test_positions_are_learned():
    """Each position has a trained vector of its own, and the first T of them take part in a text of T tokens."""
    model = GPT(small())
    assert model.pos_emb.shape == (7, 12), "one vector of C channels for each position"
    assert "pos_emb" in dict(model.named_parameters()), "a learned table must reach the optimiser"
    model(torch.randint(11, (2, 5))).square().sum().backward()
    used = model.pos_emb.grad.abs().sum(1) > 0
    assert used.tolist() == [True] * 5 + [False] * 2, "positions 0 to 4 took part, 5 and 6 did not"


@pytest.mark.parametrize("n_layer", [1, 6])
def test_starts_without_opinion(n_layer):
    """At the start every token is about equally likely: with GPT-2's spread of 0.02 the loss is near ln V."""
    model = GPT(ModelConfig(vocab_size=65, n_layer=n_layer, init_std=0.02))
    idx = torch.randint(65, (8, 65))
    loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(65), abs=0.1), (
        f"the first loss is {loss:.3f}, not ln 65 = {math.log(65):.3f}: the model starts with strong opinions"
    )
    default = GPT(ModelConfig(vocab_size=65, n_layer=n_layer))
    loss = F.cross_entropy(default(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()).item()
    assert loss < math.log(65) + 1, f"and with the default spread {loss:.3f}, less than 1 above ln 65"


@pytest.mark.parametrize("init_std", [0.02, None])
def test_first_weights_have_their_spread(init_std):
    """Matrices start as N(0, init_std^2) or N(0, 1/C), those that feed the stream smaller by sqrt(2L); biases at 0."""
    L = 8
    model = GPT(ModelConfig(vocab_size=200, block_size=64, n_embd=64, n_head=4, n_layer=L, init_std=init_std))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            constant = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (p == constant).all(), f"{name} starts at {constant}: norms do nothing at first, biases neither"
            continue
        std = init_std or 64**-0.5
        std = std / math.sqrt(2 * L) if name.endswith("proj.weight") else std
        assert p.std().item() == pytest.approx(std, rel=0.05), (
            f"{name} starts with spread {p.std().item():.4f}, not {std:.4f}: the outputs of attention and feed-forward "
            "are scaled by 1 / sqrt(2L), and nothing else is"
        )
        slack = 5 * std / math.sqrt(p.numel())
        assert abs(p.mean().item()) < slack, f"{name} has mean {p.mean().item():.5f}, not 0"
        assert (p.abs() > 2 * std).float().mean().item() == pytest.approx(0.0455, abs=0.01), f"{name} is not normal"


def test_the_stream_keeps_its_size_at_any_depth():
    """What all blocks together add to the stream at the start is as large with 24 blocks as with 2."""
    added = []
    for n_layer in (2, 24):
        model = GPT(ModelConfig(vocab_size=65, block_size=16, n_embd=64, n_head=2, n_layer=n_layer, init_std=0.125))
        ends = []
        model.blocks[0].register_forward_pre_hook(lambda module, args, ends=ends: ends.append(args[0]))
        model.blocks[-1].register_forward_hook(lambda module, args, output, ends=ends: ends.append(output))
        model(torch.randint(65, (8, 16)))
        added.append((ends[1] - ends[0]).std().item())
    assert added[1] == pytest.approx(added[0], rel=0.3), (
        f"2 blocks add {added[0]:.3f}, 24 blocks {added[1]:.3f}: unscaled they would add sqrt(12) = 3.5 times as much"
    )


def test_parameters_are_counted(monkeypatch):
    """The number of parameters is the one worked out from the shapes, and GPT-2 small has its 124,439,808."""
    C, V, T, L = 12, 11, 7, 2
    attn = 3 * C * C + 3 * C + C * C + C  # query, key and value in one; projection
    ffn = C * 4 * C + 4 * C + 4 * C * C + C
    norms = 2 * 2 * C  # two norms of a scale and a shift
    expected = V * C + T * C + L * (attn + ffn + norms) + 2 * C
    count = sum(p.numel() for p in GPT(small()).parameters())
    assert count == expected, f"{count} parameters, not {expected}: the head has none of its own"
    preset = {key: value for key, value in PRESETS["gpt2"].items() if key in ModelConfig.__dataclass_fields__}
    monkeypatch.setattr(nn.init, "normal_", lambda p, **how: p)  # only the shapes are wanted,
    with torch.device("meta"):  # and no memory
        model = GPT(ModelConfig(**preset))
    count = sum(p.numel() for p in model.parameters())
    assert count == 124_439_808, f"{count:,} parameters: the preset gpt2 is not GPT-2's smallest model"


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_statistics(p):
    """In training each dropout zeroes a share p of what passes and enlarges the rest by 1 / (1 - p)."""
    model = GPT(ModelConfig(vocab_size=11, block_size=32, n_embd=32, n_head=2, n_layer=2, dropout=p))
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda module, args, out, name=name: seen.append((name, args[0], out)))
    model(torch.randint(11, (32, 32)))
    assert len(seen) == 5, "one after the embedding, one after each attention and each feed-forward: 1 + 2 L"
    for name, before, after in seen:
        share = (after == 0).float().mean().item()
        assert share == pytest.approx(p, abs=0.02), f"{name} zeroes a share of {share:.3f}, not {p}"
        kept = after != 0
        torch.testing.assert_close(
            after[kept], before[kept] / (1 - p),
            msg=lambda m, name=name: f"{name}: what stays grows by 1 / (1 - p), so that the mean stays the same\n{m}",
        )


def test_dropout_is_off_in_evaluation():
    """In evaluation nothing is dropped: scores repeat, and equal those of the same model without dropout."""
    model = GPT(small(dropout=0.5))
    idx = torch.randint(11, (2, 7))
    assert not torch.equal(model(idx), model(idx)), "in training two passes drop different units"
    model.eval()
    plain = GPT(small())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(idx), model(idx)), "in evaluation there is nothing random"
    assert torch.equal(model(idx), plain(idx)), "and nothing is scaled"


def test_bfloat16_is_close_to_float32():
    """Under autocast to bfloat16 scores and gradient are within 2 % of what they are in float32."""
    model = GPT(ModelConfig(vocab_size=65, block_size=32, n_embd=64, n_head=2))
    idx = torch.randint(65, (4, 33))
    found = {}
    for bfloat16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(idx[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), idx[:, 1:].flatten()).backward()
        found[bfloat16] = logits.float(), torch.cat([p.grad.flatten() for p in model.parameters()])
    for what, exact, rough in zip(("scores", "gradient"), found[False], found[True], strict=True):
        error = ((rough - exact).norm() / exact.norm()).item()
        assert 0 < error < 0.02, f"the {what} are off by {100 * error:.2f} %: 8 bits of precision cost well below 2 %"
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters()), "weights stay in float32"


def test_too_long_a_text_is_refused():
    """More tokens than block_size are refused by name; block_size itself and a single token are fine."""
    model = GPT(small())
    for T in (1, 7):
        assert model(torch.zeros(2, T, dtype=torch.long)).shape == (2, T, 11), "any length up to block_size works"
    with pytest.raises(BadInput, match="8 tokens do not fit into block_size 7"):
        model(torch.zeros(2, 8, dtype=torch.long))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_head": 5}, "n_embd 12 does not split into n_head 5"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"block_size": -1}, "block_size is -1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": math.nan}, "dropout is nan"),
        ({"init_std": 0.0}, "init_std is 0.0"),
        ({"init_std": math.nan}, "init_std is nan"),
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(wrong, message):
    """A shape that cannot be built is refused at once, with the reason."""
    with pytest.raises(BadInput, match=message):
        small(**wrong)
