"""Checkpoints of the transformer: against torch's own modules in float64, loops, and numbers worked out by hand."""

import itertools
import math

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import (
    GPT,
    Block,
    CausalSelfAttention,
    FeedForward,
    LayerNorm,
    ModelConfig,
    attention,
    attention_weights,
    sinusoidal_positions,
)

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
    """The weights of our attention into torch's, which keeps query, key and value in one matrix."""
    theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]).data
    theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]).data
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
        config.n_embd, config.n_head, 4 * config.n_embd, dropout=0.0, activation="relu", batch_first=True,
        norm_first=True, dtype=torch.float64,
    )


def future_mask(T):
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def attention_grads(ours, theirs):
    """Pairs (name, our gradient, torch's) for the weights of attention."""
    weights = theirs.in_proj_weight.grad.chunk(3)
    biases = theirs.in_proj_bias.grad.chunk(3)
    for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        yield f"{name}.weight", getattr(ours, name).weight.grad, weight
        # A bias of the keys adds the same to a whole row of scores, which softmax ignores: its gradient is 0 but for
        # rounding, in both.
        yield f"{name}.bias", getattr(ours, name).bias.grad, bias
    yield "proj.weight", ours.proj.weight.grad, theirs.out_proj.weight.grad
    yield "proj.bias", ours.proj.bias.grad, theirs.out_proj.bias.grad


def test_every_part_is_registered():
    """All layers of all blocks are among the model's parameters: a plain list hides them from optimiser and device."""
    names = {name for name, _ in GPT(small()).named_parameters()}
    layers = ["norm1", "norm2", "attn.query", "attn.key", "attn.value", "attn.proj", "ffn.fc", "ffn.proj"]
    for part in ["tok_emb", *(f"blocks.{i}.{layer}" for i in range(2) for layer in layers), "norm"]:
        assert f"{part}.weight" in names, f"{part} is no parameter of the model: keep modules in an nn.ModuleList"
    assert "pos_emb" in names, "pos_emb is no parameter of the model: wrap it in nn.Parameter"


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
    assert not weights.isnan().any(), "the first position has nothing to look at: every position may see itself"
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


def test_scaling_keeps_attention_soft():
    """Attention over 256 channels is as soft as over 4: the scores are divided by sqrt(D)."""
    softness = []
    for D in (4, 256):
        weights = attention_weights(torch.randn(500, 16, D), torch.randn(500, 16, D))[:, -1]  # over 16 positions
        softness.append(torch.special.entr(weights).sum(-1).mean().item())  # entropy, at most ln 16 = 2.77
    # For scores ~ N(0, 1) the entropy is about ln 16 - 1/2; unscaled scores ~ N(0, 256) leave next to nothing.
    assert softness[0] == pytest.approx(softness[1], abs=0.1), (
        f"entropy {softness[0]:.2f} nats with 4 channels, {softness[1]:.2f} with 256: a dot product's variance "
        "grows with the D channels of a head, so divide by their root"
    )
    assert 2.0 < softness[1] < 2.5, f"entropy {softness[1]:.2f} nats: scores of unit variance give about 2.3"


def test_heads_are_torchs_multihead_attention():
    """Multi-head attention equals torch's nn.MultiheadAttention with the same weights: outputs and gradients."""
    config = small()
    ours = scramble(CausalSelfAttention(config))
    theirs = nn.MultiheadAttention(config.n_embd, config.n_head, batch_first=True, dtype=torch.float64)
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


def test_heads_are_independent():
    """Many heads at once equal one head after the other, each on its own slice of channels, side by side."""
    config = small()
    attn = scramble(CausalSelfAttention(config))
    x = torch.randn(2, 5, config.n_embd, dtype=torch.float64)
    D = config.n_embd // config.n_head
    heads = []
    for h in range(config.n_head):
        own = slice(h * D, (h + 1) * D)
        q, k, v = (
            x @ layer.weight[own].T + layer.bias[own] for layer in (attn.query, attn.key, attn.value)
        )  # each [B, T, D]
        out = torch.zeros_like(v)
        for b, t in itertools.product(range(2), range(5)):
            scores = torch.stack([q[b, t] @ k[b, s] / math.sqrt(D) for s in range(t + 1)])
            out[b, t] = sum(weight * v[b, s] for s, weight in enumerate(scores.softmax(0)))
        heads.append(out)
    expected = attn.proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(
        attn(x), expected, **CLOSE, msg=lambda m: "each head works on D neighbouring channels and on nothing else\n" + m
    )


def test_split_and_merge_are_inverse():
    """Splitting into heads gives head h the channels hD to (h + 1)D, and merging puts them back."""
    attn = CausalSelfAttention(small())
    x = torch.randn(2, 5, 12)
    heads = attn.split_heads(x)
    assert heads.shape == (2, 3, 5, 4), "[B, T, C] -> [B, H, T, D]: the heads stand before the positions"
    assert torch.equal(heads[1, 2, 3], x[1, 3, 8:12]), "head 2 of 3 holds channels 8 to 12 of each position"
    assert torch.equal(attn.merge_heads(heads), x), "merge undoes split: [B, H, T, D] -> [B, T, H, D] -> [B, T, C]"


def test_feed_forward_is_two_layers_with_relu():
    """The feed-forward layer equals torch's Linear, ReLU, Linear, four times as wide inside."""
    config = small()
    ours = scramble(FeedForward(config))
    theirs = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 12)).double()
    theirs[0].load_state_dict(ours.fc.state_dict())
    theirs[2].load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE, msg=lambda m: "C -> 4C, ReLU, 4C -> C\n" + m)
    alone = torch.stack([ours(x[:, t]) for t in range(5)], dim=1)
    torch.testing.assert_close(
        ours(x), alone, **CLOSE, msg=lambda m: "positions go through one by one: only attention mixes them\n" + m
    )


def test_layer_norm_is_torchs():
    """LayerNorm equals torch's: mean 0 and variance 1 over the channels, then a learned scale and shift."""
    ours, theirs = LayerNorm(12).double(), nn.LayerNorm(12).double()
    for p, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.data.copy_(torch.nn.init.normal_(p))
    x = torch.randn(3, 5, 12, dtype=torch.float64) * 3 + 1
    idea = "the variance divides by C, eps stands inside the root, then come scale and shift"
    torch.testing.assert_close(ours(x), theirs(x), msg=lambda m: f"{idea}\n{m}")


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


def test_blocks_leave_a_straight_path():
    """Blocks whose branches have nothing to say pass their input on unchanged, however large it is."""
    x, block = 3 * torch.randn(2, 5, 12), Block(small())
    for layer in (block.attn.proj, block.ffn.proj):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert torch.equal(block(x), x), "a norm stands on the path from input to output: it belongs inside the branches"


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_model_is_embedding_blocks_norm_head(positions):
    """The whole model equals one put together from torch's parts: token plus position, blocks, norm, head."""
    config = small(positions=positions)
    model = scramble(GPT(config))
    idx = torch.randint(config.vocab_size, (2, 5))
    x = F.embedding(idx, model.tok_emb.weight)
    for b, t in itertools.product(range(2), range(5)):
        x[b, t] = x[b, t] + model.pos_emb[t]  # the same vector wherever position t occurs
    for block in model.blocks:
        theirs = torch_block(config)
        copy_block(block, theirs)
        x = theirs(x, src_mask=future_mask(5), is_causal=True)
    x = F.layer_norm(x, (config.n_embd,), model.norm.weight, model.norm.bias)
    expected = F.linear(x, model.head.weight, model.head.bias)
    assert expected.shape == (2, 5, 11), "one score for each of the V tokens at each position"
    torch.testing.assert_close(
        model(idx), expected, **CLOSE,
        msg=lambda m: "tok_emb(idx) + pos_emb[t], every block in turn, a last norm, the head\n" + m,
    )


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


def test_without_positions_the_past_is_a_bag():
    """Without position information one layer of attention cannot tell in which order the past was said."""
    idx = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    shuffled = torch.tensor([[9, 1, 5, 3, 1, 4, 2]])  # the last token, which asks, stays
    model = scramble(GPT(small(n_layer=1)))
    gap = (model(idx)[0, -1] - model(shuffled)[0, -1]).abs().max().item()
    assert gap > 1e-3, "the past was reordered and the model did not notice: positions are not added to the tokens"
    with torch.no_grad():
        model.pos_emb.zero_()
    gap = (model(idx)[0, -1] - model(shuffled)[0, -1]).abs().max().item()
    assert gap < 1e-12, (
        f"scores moved by {gap:.1e}: attention without positions is a weighted sum of the past: no order"
    )
    # The mask itself tells early from late, once there is a second layer to notice: position 1 has averaged one
    # token, position 5 five.
    model = scramble(GPT(small(n_layer=2)))
    with torch.no_grad():
        model.pos_emb.zero_()
    gap = (model(idx)[0, -1] - model(shuffled)[0, -1]).abs().max().item()
    assert gap > 1e-3, "two causal layers see order even without positions: is the mask there?"


def test_sinusoidal_positions_are_the_formula():
    """Sinusoidal positions are sin and cos of position / 10000^(2i / C), in turn."""
    table = sinusoidal_positions(50, 12)
    assert table.shape == (50, 12), "one row of C channels for each position"
    for t, i in itertools.product(range(50), range(6)):
        angle = t / 10000 ** (2 * i / 12)
        assert table[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=2e-5), f"channel {2 * i} is the sine"
        assert table[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=2e-5), f"channel {2 * i + 1} the cosine"


def test_a_shift_is_a_rotation():
    """Moving k positions on turns each pair of sinusoidal channels by one angle, the same wherever it starts."""
    table = sinusoidal_positions(60, 12)
    for i, k in itertools.product(range(6), (1, 7)):
        angle = k / 10000 ** (2 * i / 12)
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        pair = table[:, [2 * i + 1, 2 * i]]  # (cos, sin): a point on the unit circle
        torch.testing.assert_close(
            pair[:-k] @ turn.T, pair[k:], rtol=0, atol=5e-5,
            msg=lambda m, i=i, k=k:
            f"channels {2 * i} and {2 * i + 1} do not turn by a fixed angle over {k} positions\n{m}",
        )
    products = table @ table.T
    assert products[5, 9].item() == pytest.approx(products[40, 44].item(), abs=1e-3), "distance alone decides"
    assert products[5, 5] > products[5, 6] > products[5, 7], "the nearer two positions, the more alike"


def test_learned_positions_are_trained_and_sinusoidal_are_not():
    """Learned positions are parameters, sinusoidal ones are part of the model's state but stay as they are."""
    learned, fixed = GPT(small()), GPT(small(positions="sinusoidal"))
    assert learned.pos_emb.shape == fixed.pos_emb.shape == (7, 12), "one vector of C channels for each position"
    assert "pos_emb" in dict(learned.named_parameters()), "a learned table must reach the optimiser"
    assert "pos_emb" not in dict(fixed.named_parameters()), "the formula's table must not be trained"
    expected = sinusoidal_positions(7, 12) / math.sqrt(12)
    torch.testing.assert_close(
        fixed.pos_emb, expected, msg=lambda m: f"the formula's table, as small as the tokens' vectors\n{m}"
    )
    logits = learned(torch.randint(11, (2, 5)))
    logits.square().sum().backward()
    used = learned.pos_emb.grad.abs().sum(1) > 0
    assert used.tolist() == [True] * 5 + [False] * 2, "positions 0 to 4 took part, 5 and 6 did not"


@pytest.mark.parametrize("n_layer", [1, 6])
def test_starts_without_opinion(n_layer):
    """At the start every token is about equally likely: the loss is near ln V."""
    model = GPT(ModelConfig(vocab_size=65, n_layer=n_layer))
    idx = torch.randint(65, (8, 65))
    loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()).item()
    assert math.isfinite(loss), "the first loss is nan: a row of attention without anything to look at?"
    assert loss == pytest.approx(math.log(65), abs=0.05), (
        f"the first loss is {loss:.3f}, not ln 65 = {math.log(65):.3f}: the model starts with strong opinions"
    )


def test_every_layer_starts_at_its_scale():
    """Weights start as N(0, gain^2 / fan_in): gain 1, sqrt(2) after the ReLU, 0.1 for the head; positions as tokens."""
    model = GPT(ModelConfig(vocab_size=200, block_size=200, n_embd=60, n_head=3, n_layer=2))
    gains = {f"blocks.1.attn.{name}": 1.0 for name in ("query", "key", "value", "proj")}
    gains |= {"blocks.0.ffn.fc": 1.0, "blocks.1.ffn.proj": math.sqrt(2), "head": 0.1}
    for name, gain in gains.items():
        layer = model.get_submodule(name)
        std, expected = layer.weight.std().item(), gain / math.sqrt(layer.in_features)
        assert std == pytest.approx(expected, rel=0.05), (
            f"{name} starts with spread {std:.4f}, not {gain:.3g} / sqrt({layer.in_features}) = {expected:.4f}"
        )
        assert not layer.bias.any(), f"{name}: biases start at 0"
    for name in ("tok_emb.weight", "pos_emb"):
        std = model.get_parameter(name).std().item()
        assert std == pytest.approx(60**-0.5, rel=0.05), (
            f"{name} starts with spread {std:.3f}, not 1 / sqrt(60) = 0.129: tokens and positions are alike"
        )


@pytest.mark.parametrize("n_layer", [1, 12])
def test_signals_keep_their_size_at_the_start(n_layer):
    """Each branch of a pre-norm block starts with an output of about unit variance at most, however deep the stack."""
    model = GPT(ModelConfig(vocab_size=65, n_layer=n_layer, n_embd=64, n_head=2))
    outputs = []
    for block in model.blocks:
        for branch in (block.attn, block.ffn):
            branch.register_forward_hook(lambda module, args, output: outputs.append(output.std().item()))
    model(torch.randint(65, (4, 64)))
    assert len(outputs) == 2 * n_layer, "every block attends once and thinks once"
    assert all(0.1 < std < 1.5 for std in outputs), (
        f"branches start with standard deviations {min(outputs):.2f} to {max(outputs):.2f}: scale weights by 1 / fan_in"
    )


def test_parameters_are_counted():
    """The number of parameters is the one worked out from the shapes."""
    C, V, T, L = 12, 11, 7, 2
    attn = 4 * (C * C + C)  # query, key, value, projection, each with a bias
    ffn = C * 4 * C + 4 * C + 4 * C * C + C
    norms = 2 * 2 * C  # two norms of a scale and a shift
    expected = V * C + T * C + L * (attn + ffn + norms) + 2 * C + C * V + V
    count = sum(p.numel() for p in GPT(small()).parameters())
    assert count == expected, f"{count} parameters, not {expected}: a block has about 12 C^2, a third of it attention"
    without = sum(p.numel() for p in GPT(small(positions="sinusoidal")).parameters())
    assert count - without == T * C, "sinusoidal positions have nothing to learn"


def test_too_long_a_text_is_refused():
    """More tokens than block_size are refused by name; block_size itself and a single token are fine."""
    model = GPT(small())
    for T in (1, 7):
        assert model(torch.zeros(2, T, dtype=torch.long)).shape == (2, T, 11), "any length up to block_size works"
    with pytest.raises(BadInput, match="block_size"):
        model(torch.zeros(2, 8, dtype=torch.long))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_head": 5}, "n_head"),
        ({"n_head": 0}, "n_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"block_size": -1}, "block_size"),
        ({"n_embd": 9, "n_head": 3, "positions": "sinusoidal"}, "n_embd"),
        ({"positions": "none"}, "positions"),
    ],
)
def test_impossible_shapes_are_refused(wrong, message):
    """A shape that cannot be built is refused at once, with the reason."""
    with pytest.raises(BadInput, match=message):
        small(**wrong)
