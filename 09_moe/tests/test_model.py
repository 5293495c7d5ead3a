"""Checkpoints of the model: against torch and transformers, complex numbers, loops in float64, published sizes."""

import math

from shared.errors import BadInput

import naive
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as trunk
from model import (
    GPT,
    Block,
    CausalSelfAttention,
    FeedForward,
    Look,
    ModelConfig,
    RMSNorm,
    attention,
    attention_weights,
    hidden,
    rope_table,
    rotate,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # in float64, where only the order of the sums differs
NEAR = {"rtol": 1e-4, "atol": 1e-5}  # norms and angles are worked out in float32, whatever the weights are


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**changes) -> ModelConfig:
    """A shape in which no two sizes are equal, so that a mixed-up axis cannot pass unseen."""
    shape = {"vocab_size": 11, "block_size": 7, "n_embd": 12, "n_head": 6, "n_kv_head": 2, "head_dim": 4, "n_layer": 2}
    return ModelConfig(**shape | {"n_hidden": 20} | changes)


def scramble(module):
    """Move every weight off its start, scales of 1 included; in float64."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def table(T, config):
    """The angles of positions 0 ... T - 1."""
    return rope_table(torch.arange(T), config)


def copy_attention(ours, theirs):
    """The weights of our attention into torch's, which keeps query, key and value in one matrix."""
    theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]).data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())


def rms(x, weight, eps):
    """RMSNorm by its formula."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def turn(x, base=10_000.0):
    """RoPE by complex numbers: channels i and i + D / 2 are a + ib, times e^(i t base^(-2i / D)) at position t."""
    T, D = x.shape[-2:]
    speed = torch.tensor([base ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * speed  # [T, D / 2]
    turned = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


def attention_by_hand(attn, x, config, positions=True):
    """Attention head by head and position by position, from the weights of `attn`: [B, T, C] -> [B, T, C]."""
    D, heads = config.head_dim, []
    for h in range(config.n_head):
        shared = h // (config.n_head // config.n_kv_head)  # the key-value head that head h reads
        own, read = slice(h * D, (h + 1) * D), slice(shared * D, (shared + 1) * D)
        q, k, v = x @ attn.query.weight[own].T, x @ attn.key.weight[read].T, x @ attn.value.weight[read].T  # [B, T, D]
        if config.qk_norm:
            q, k = (rms(q, attn.query_norm.weight, config.norm_eps), rms(k, attn.key_norm.weight, config.norm_eps))
        if positions:
            q, k = turn(q, config.rope_base), turn(k, config.rope_base)
        rows = []
        for t in range(x.shape[1]):
            scores = (k[:, :t + 1] @ q[:, t, :, None]) / math.sqrt(D)  # [B, t + 1, 1]
            rows.append((scores.softmax(dim=1) * v[:, :t + 1]).sum(dim=1))
        heads.append(torch.stack(rows, dim=1))
    return torch.cat(heads, dim=-1) @ attn.proj.weight.T


def swiglu(ffn, x):
    """The feed-forward layer by its formula."""
    gate = x @ ffn.gate.weight.T
    return (gate / (1 + torch.exp(-gate)) * (x @ ffn.fc.weight.T)) @ ffn.proj.weight.T


def block_by_hand(block, x, config, positions=True):
    """A whole block by its formulas: [B, T, C] -> [B, T, C]."""
    x = x + attention_by_hand(block.attn, rms(x, block.norm1.weight, config.norm_eps), config, positions)
    return x + swiglu(block.ffn, rms(x, block.norm2.weight, config.norm_eps))


def future_mask(T):
    return torch.ones(T, T, dtype=torch.bool).triu(1)


def assert_same(ours, theirs, sources: dict, tolerance: dict, what: str):
    """Two results agree, and so do their gradients with respect to each of `sources`."""
    torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda m: f"{what}\n{m}")
    slope = torch.randn_like(ours)
    grads = (torch.autograd.grad(out, list(sources.values()), slope) for out in (ours, theirs))
    for name, a, b in zip(sources, *grads, strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, name=name: f"the gradient of {name} is wrong\n{m}")


def test_every_part_is_registered():
    """All layers of all blocks are among the model's parameters: a plain list hides them from optimiser and device."""
    names = {name for name, _ in GPT(small()).named_parameters()}
    layers = ["norm1", "norm2", *(f"attn.{name}" for name in ("query", "key", "value", "proj"))]
    layers += ["attn.query_norm", "attn.key_norm", "ffn.gate", "ffn.fc", "ffn.proj"]
    for part in ["tok_emb", *(f"blocks.{i}.{layer}" for i in range(2) for layer in layers), "norm"]:
        assert f"{part}.weight" in names, f"{part} is no parameter of the model: keep modules in an nn.ModuleList"


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
        attention(q[None, None], k[None, None], v[None, None])[0, 0], out, **CLOSE,
        msg=lambda m: "the output is each row's weights times the values\n" + m,
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


@pytest.mark.parametrize("n_kv_head", [1, 2, 6])
def test_attention_is_torchs(n_kv_head):
    """Attention and its gradients equal torch's scaled_dot_product_attention, however many heads share a key."""
    q, k, v = (torch.randn(3, heads, 5, 4, dtype=torch.float64, requires_grad=True) for heads in (6, *2 * [n_kv_head]))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_same(
        attention(q, k, v), theirs, {"q": q, "k": k, "v": v}, CLOSE,
        "causal softmax(q k^T / sqrt(D)) v, in which neighbouring heads of queries read the same keys and values",
    )


def test_neighbouring_heads_share():
    """Of six heads of queries and two of keys and values, heads 0 to 2 read the first and heads 3 to 5 the second."""
    q, k = torch.randn(3, 6, 5, 4), torch.randn(3, 2, 5, 4)
    v = torch.tensor([1.0, 2.0])[None, :, None, None].expand(3, 2, 5, 4)  # an average of equal values is that value
    read = attention(q, k, v)[:, :, :, 0]
    torch.testing.assert_close(
        read, torch.tensor([1.0, 1, 1, 2, 2, 2])[None, :, None].expand(3, 6, 5),
        msg=lambda m: f"a head reads another head's values: repeat each one H / K times (0 0 0 1 1 1), not all in turn "
        f"(0 1 0 1 0 1): open weights are stored that way\n{m}",
    )


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
    config = small(n_head=3, n_kv_head=3, qk_norm=False)  # as many heads of keys as of queries
    ours = scramble(CausalSelfAttention(config))
    theirs = nn.MultiheadAttention(config.n_embd, config.n_head, bias=False, batch_first=True, dtype=torch.float64)
    copy_attention(ours, theirs)
    x = torch.randn(2, 5, config.n_embd, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1 = ours(x1)
    y2, _ = theirs(x2, x2, x2, attn_mask=future_mask(5), need_weights=False)
    torch.testing.assert_close(
        y1, y2, **CLOSE,
        msg=lambda m: "split in heads [B, H, T, D], attend, merge to [B, T, H D], project; scale by the head's D\n" + m,
    )
    slope = torch.randn_like(y1)
    y1.backward(slope)
    y2.backward(slope)
    torch.testing.assert_close(x1.grad, x2.grad, **CLOSE, msg=lambda m: "the gradient of the input is wrong\n" + m)
    weights = zip(("query", "key", "value"), theirs.in_proj_weight.grad.chunk(3), strict=True)
    for name, grad in [*weights, ("proj", theirs.out_proj.weight.grad)]:
        torch.testing.assert_close(
            getattr(ours, name).weight.grad, grad, **CLOSE,
            msg=lambda m, name=name: f"the gradient of {name} is wrong\n{m}",
        )


@pytest.mark.parametrize("change", [{}, {"qk_norm": False}, {"n_kv_head": 1}, {"head_dim": 2, "rope_base": 9}], ids=str)
def test_heads_are_independent(change):
    """Many heads at once equal one head after the other, each on its own slice of channels, side by side."""
    config = small(**change)
    attn = scramble(CausalSelfAttention(config))
    x = torch.randn(3, 5, config.n_embd, dtype=torch.float64)
    torch.testing.assert_close(
        attn(x, Look(table(5, config))), attention_by_hand(attn, x, config), **NEAR,
        msg=lambda m: "each head: its own D channels, the keys and values of its group, queries and keys normed over "
        f"the D channels, then turned by their position, values as they are; a softmax over the past\n{m}",
    )


def test_split_and_merge_are_inverse():
    """Splitting into heads gives head h the channels hD to (h + 1)D, and merging puts them back."""
    attn = CausalSelfAttention(small())
    x = torch.randn(2, 5, 24)
    heads = attn.split_heads(x)
    assert heads.shape == (2, 6, 5, 4), "[B, T, H D] -> [B, H, T, D]: the heads stand before the positions"
    assert torch.equal(heads[1, 2, 3], x[1, 3, 8:12]), "head 2 of 6 holds channels 8 to 12 of each position"
    assert torch.equal(attn.merge_heads(heads), x), "merge undoes split: [B, H, T, D] -> [B, T, H, D] -> [B, T, H D]"
    assert attn.split_heads(x[..., :8]).shape == (2, 2, 5, 4), "8 channels of keys are 2 heads of 4"


def test_queries_and_keys_are_normed_before_they_are_turned():
    """QK-norm takes the length out of each head's queries and keys, scales their channels, and comes before RoPE."""
    config = small()
    attn = scramble(CausalSelfAttention(config))
    x, rope = torch.randn(3, 5, config.n_embd, dtype=torch.float64), table(5, config)
    before = attn(x, Look(rope))
    torch.testing.assert_close(
        before, attention_by_hand(attn, x, config), **NEAR,
        msg=lambda m: "norm over the channels of each head, with its learned scales, then turn: turned first, a pair's "
        f"two scales would be mixed up\n{m}",
    )
    with torch.no_grad():
        attn.query.weight[4:8] *= 50  # head 1 alone
        attn.key.weight[:4] *= 50
    torch.testing.assert_close(
        attn(x, Look(rope)), before, **NEAR,
        msg=lambda m: f"large weights make large scores: queries and keys are not normed, or not head by head\n{m}",
    )


def test_a_text_moved_on_is_read_alike():
    """Attention at positions 100 to 104 gives what it gives at 0 to 4: only differences of positions count."""
    config = small()
    attn = scramble(CausalSelfAttention(config))
    x, (cos, sin) = torch.randn(3, 5, config.n_embd, dtype=torch.float64), table(105, config)
    torch.testing.assert_close(
        attn(x, Look((cos[100:], sin[100:]))), attn(x, Look((cos[:5], sin[:5]))), rtol=1e-3, atol=1e-3,
        msg=lambda m: f"where a text stands changes how it is read: queries and keys are turned in two layouts\n{m}",
    )


def test_values_carry_no_position():
    """Positions turn queries and keys only: in a text of one word said five times every position reads the same."""
    config = small()
    attn = scramble(CausalSelfAttention(config))
    word = torch.randn(3, 1, config.n_embd, dtype=torch.float64)
    out = attn(word.expand(3, 5, config.n_embd), Look(table(5, config)))
    torch.testing.assert_close(
        out, out[:, :1].expand_as(out), **CLOSE,
        msg=lambda m: f"an average of five equal values is that value, wherever it stands: values are not turned\n{m}",
    )


def test_feed_forward_is_swiglu():
    """The feed-forward layer equals proj(gate / (1 + e^-gate) * fc), position by position."""
    config = small()
    ours = scramble(FeedForward(config))
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    sources = {"the input": x} | dict(ours.named_parameters())
    assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == {
        "gate.weight": (20, 12), "fc.weight": (20, 12), "proj.weight": (12, 20)
    }, "three matrices without biases: C -> F twice, F -> C once"
    assert_same(ours(x), swiglu(ours, x), sources, CLOSE, "silu of the gate, times fc, then proj")
    alone = torch.stack([ours(x[:, t]) for t in range(5)], dim=1)
    torch.testing.assert_close(
        ours(x), alone, **CLOSE, msg=lambda m: "positions go through one by one: only attention mixes them\n" + m
    )


@pytest.mark.parametrize("C", [128, 192, 576])
def test_three_matrices_cost_what_two_did(C):
    """By default the three matrices of SwiGLU have as many weights as two of C x 4C: 8 C^2, to one in a hundred."""
    count = sum(p.numel() for p in FeedForward(ModelConfig(vocab_size=11, n_embd=C)).parameters())
    assert count == pytest.approx(8 * C * C, rel=0.01), (
        f"{count:,} weights are {count / C**2:.2f} C^2: of three matrices each may have two thirds of 4 C units"
    )
    assert ModelConfig(vocab_size=11, n_embd=C, n_hidden=100).n_hidden == 100, "a width that is given is used"


def test_block_is_its_formula():
    """A block equals its formulas worked out head by head in float64: outputs and gradients."""
    config = small(norm_eps=0.1)  # so large that a norm without it, or with another, is seen
    block = scramble(Block(config))
    x = torch.randn(3, 5, config.n_embd, dtype=torch.float64, requires_grad=True)
    assert_same(
        block(x, Look(table(5, config))), block_by_hand(block, x, config),
        {"the input": x} | dict(block.named_parameters()), NEAR,
        "x = x + attn(norm1(x)), then x = x + ffn(norm2(x)), all norms with the config's eps",
    )


def test_blocks_leave_a_straight_path():
    """Blocks whose branches have nothing to say pass their input on unchanged, however large it is."""
    x, block = 3 * torch.randn(2, 5, 12), Block(small())
    for layer in (block.attn.proj, block.ffn.proj):
        nn.init.zeros_(layer.weight)
    assert torch.equal(block(x), x), "a norm stands on the path from input to output: it belongs inside the branches"


@pytest.mark.parametrize("tied", [True, False])
def test_model_is_embedding_blocks_norm_head(tied):
    """The whole model equals one worked out in float64: embedding, blocks, every second without positions, norm, head.
    """
    config = small(n_layer=3, nope_every=2, norm_eps=0.1, tied=tied)
    model = scramble(GPT(config))
    idx = torch.randint(config.vocab_size, (2, 5))
    x = F.embedding(idx, model.tok_emb.weight)
    for block, positions in zip(model.blocks, (True, False, True), strict=True):
        x = block_by_hand(block, x, config, positions)
    x = rms(x, model.norm.weight, config.norm_eps)
    expected = F.linear(x, model.tok_emb.weight if tied else model.head.weight)
    assert expected.shape == (2, 5, 11), "one score for each of the V tokens at each position"
    torch.testing.assert_close(
        model(idx), expected, **NEAR,
        msg=lambda m: "tok_emb(idx), every block in turn, a last norm, times the embedding or a head of its own\n" + m,
    )


def test_the_last_norm_stands_before_the_head():
    """Ten times the stream gives the same scores: a norm stands between the blocks and the head."""
    model = scramble(GPT(small()))
    idx = torch.randint(11, (2, 5))
    before = model(idx)
    model.blocks[-1].register_forward_hook(lambda module, args, output: 10 * output)
    torch.testing.assert_close(
        model(idx), before, **NEAR,
        msg=lambda m: f"the scores grew with the stream, which every block adds to: the final norm is missing\n{m}",
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
            model(idx[:, :t]), whole[:, :t], **NEAR,
            msg=lambda m, t=t:
            f"the first {t} positions depend on how much text follows: mask or positions are off\n{m}",
        )


def test_sequences_of_a_batch_are_apart():
    """What one sequence of a batch says does not touch another's scores."""
    model = scramble(GPT(small()))
    idx = torch.randint(11, (3, 6))
    alone = torch.cat([model(row[None]) for row in idx])
    torch.testing.assert_close(
        model(idx), alone, **NEAR, msg=lambda m: "the batch axis was mixed with heads or positions\n" + m
    )


def test_without_positions_the_past_is_a_bag():
    """Without position information one layer of attention cannot tell in which order the past was said."""
    idx = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    shuffled = torch.tensor([[9, 1, 5, 3, 1, 4, 2]])  # the last token, which asks, stays
    model = scramble(GPT(small(n_layer=1)))
    gap = (model(idx)[0, -1] - model(shuffled)[0, -1]).abs().max().item()
    assert gap > 1e-3, "the past was reordered and the model did not notice: queries and keys are not turned"
    model = scramble(GPT(small(n_layer=1, nope_every=1)))
    gap = (model(idx)[0, -1] - model(shuffled)[0, -1]).abs().max().item()
    assert gap < 1e-5, (
        f"scores moved by {gap:.1e}: attention without positions is a weighted sum of the past: no order"
    )
    # The mask itself tells early from late, once there is a second layer to notice: position 1 has averaged one
    # token, position 5 five.
    model = scramble(GPT(small(n_layer=2, nope_every=1)))
    gap = (model(idx)[0, -1] - model(shuffled)[0, -1]).abs().max().item()
    assert gap > 1e-3, "two causal layers see order even without positions: is the mask there?"


@pytest.mark.parametrize(("every", "without"), [(0, []), (4, [4, 8]), (3, [3, 6]), (1, [1, 2, 3, 4, 5, 6, 7, 8])])
def test_each_kth_layer_has_no_positions(every, without, monkeypatch):
    """With nope_every = 4 layers 4, 8, 12 ..., counted from 1, turn nothing (SmolLM3); with 0 every layer turns."""
    model, layer, turned = GPT(small(n_layer=8, nope_every=every)), [], set()
    for i, block in enumerate(model.blocks, 1):
        block.register_forward_pre_hook(lambda module, args, i=i: layer.append(i))

    def watch(x, *table):
        turned.add(layer[-1])
        return x

    monkeypatch.setattr(trunk, "rotate", watch)
    model(torch.randint(11, (2, 5)))
    found = sorted({*range(1, 9)} - turned)
    assert found == without, f"nope_every = {every}: of 8 layers {found} have no positions, not {without}"


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
    """Weights start as N(0, gain^2 / fan_in): gain 1, times 1 / sqrt(2L) where they feed the stream; scales at 1."""
    model = GPT(ModelConfig(vocab_size=200, block_size=200, n_embd=60, n_head=3, head_dim=40, n_layer=3, tied=False))
    z = torch.linspace(-12, 12, 100_001, dtype=torch.float64)  # the size of silu(z) for a standard normal z
    silu = torch.trapezoid((z / (1 + torch.exp(-z))) ** 2 * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi), z).sqrt()
    gains = {f"blocks.1.attn.{name}": 1.0 for name in ("query", "key", "value")}
    gains |= {"blocks.0.ffn.gate": 1.0, "blocks.0.ffn.fc": 1.0}
    gains |= {"blocks.1.attn.proj": 1 / math.sqrt(6), "blocks.2.ffn.proj": 1 / silu.item() / math.sqrt(6)}  # 2L = 6
    for name, gain in gains.items():
        layer = model.get_submodule(name)
        std, expected = layer.weight.std().item(), gain / math.sqrt(layer.in_features)
        assert std == pytest.approx(expected, rel=0.05), (
            f"{name} starts with spread {std:.4f}, not {gain:.3g} / sqrt({layer.in_features}) = {expected:.4f}"
        )
        assert layer.bias is None, f"{name}: no layer has a bias"
    for name in ("tok_emb.weight", "head.weight"):
        std = model.get_parameter(name).std().item()
        assert std == pytest.approx(60**-0.5, rel=0.05), (
            f"{name} starts with spread {std:.3f}, not 1 / sqrt(60): a token has the same vector in and out"
        )
    for name, scale in model.named_parameters():
        assert "norm" not in name or (scale == (0.1 if name == "norm.weight" else 1)).all(), (
            f"{name} starts at {scale[0]:g}: scales start at 1, the last norm's at 0.1, so that first scores are small"
        )


@pytest.mark.parametrize("n_layer", [1, 12])
def test_signals_keep_their_size_at_the_start(n_layer):
    """Each of the 2L branches starts with an output of about 1 / sqrt(2L), of which the stream sums 2L."""
    model = GPT(ModelConfig(vocab_size=65, n_layer=n_layer, n_embd=64, n_head=2))
    outputs = []
    for block in model.blocks:
        for branch in (block.attn, block.ffn):
            branch.register_forward_hook(lambda module, args, output: outputs.append(output.std().item()))
    model(torch.randint(65, (4, 64)))
    assert len(outputs) == 2 * n_layer, "every block attends once and thinks once"
    low, high = (factor / math.sqrt(2 * n_layer) for factor in (0.1, 1.5))
    assert all(low < std < high for std in outputs), (
        f"branches start with deviations of {min(outputs):.2f} to {max(outputs):.2f}, not {low:.2f} to {high:.2f}: "
        "scale weights by 1 / fan_in, and those that feed the stream by 1 / sqrt(2L) more"
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_parameters_are_counted(tied, qk_norm):
    """The number of parameters is the one worked out from the shapes."""
    C, V, L, H, K, D, N = 12, 11, 2, 6, 2, 4, 20
    attn = C * H * D + 2 * C * K * D + H * D * C  # query, key and value, projection, none with a bias
    ffn = 3 * C * N
    norms = 2 * C + 2 * D * qk_norm  # a scale each, no shift; those of queries and keys are shared by all heads
    expected = V * C * (1 if tied else 2) + L * (attn + ffn + norms) + C
    count = sum(p.numel() for p in GPT(small(tied=tied, qk_norm=qk_norm)).parameters())
    assert count == expected, (
        f"{count} parameters, not {expected}: keys and values have K heads, a tied output layer has none of its own"
    )


def test_too_long_a_text_is_refused():
    """More tokens than block_size are refused by name; block_size itself and a single token are fine."""
    model = GPT(small())
    for T in (1, 7):
        assert model(torch.zeros(2, T, dtype=torch.long)).shape == (2, T, 11), "any length up to block_size works"
    with pytest.raises(BadInput, match="block_size"):
        model(torch.zeros(2, 8, dtype=torch.long))
    scores = GPT(small(window=4))(torch.zeros(2, 30, dtype=torch.long))
    assert scores.shape == (2, 30, 11), "through a window a text may be of any length: no distance is longer than it"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_head": 5, "n_kv_head": 5, "head_dim": None}, "n_head"),
        ({"n_head": 0}, "n_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"block_size": -1}, "block_size"),
        ({"n_kv_head": 4}, "n_kv_head"),
        ({"n_kv_head": 0}, "n_kv_head"),
        ({"n_kv_head": 12}, "n_kv_head"),
        ({"head_dim": 3}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"n_head": 4, "head_dim": None}, "head_dim"),  # 12 / 4 channels do not pair
        ({"n_hidden": 0}, "n_hidden"),
        ({"rope_base": 0.0}, "rope_base"),
        ({"rope_base": math.nan}, "rope_base"),
        ({"rope_factor": -1.0}, "rope_factor"),
        ({"rope_low": 4.0, "rope_high": 4.0}, "rope_low"),
        ({"rope_original": 0}, "rope_original"),
        ({"nope_every": -1}, "nope_every"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"window": 0}, "window"),
        ({"window": -3}, "window"),
        ({"n_sink": -1}, "n_sink"),
        ({"window": 2, "n_sink": 3}, "n_sink is 3.*window of 2"),
        ({"n_sink": 4}, "n_sink is 4.*window of 3"),  # the window is what the sinks leave of block_size
        ({"window": 8}, "window 8 are more than block_size 7"),
        ({"window": 5, "n_sink": 3}, "n_sink 3 and window 5 are more than block_size 7"),
    ],
)
def test_impossible_shapes_are_refused(wrong, message):
    """A shape that cannot be built is refused at once, with the reason."""
    with pytest.raises(BadInput, match=message):
        small(**wrong)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def fused(q, k, v, *more):
    """Attention as a GPU takes it."""
    return attention(*(part.as_subclass(Elsewhere) for part in (q, k, v)), *more).as_subclass(torch.Tensor)


def test_the_fast_path_gives_the_same(monkeypatch):
    """On a GPU attention takes the fused kernel, and that gives what the two products written out give."""
    q, k, v = (torch.randn(3, heads, 5, 4, dtype=torch.float64) for heads in (6, 2, 2))
    written_out = attention(q, k, v)
    monkeypatch.setattr(trunk, "attention_weights", lambda *args: pytest.fail("the T x T weights were stored"))
    torch.testing.assert_close(
        fused(q, k, v), written_out, **CLOSE,
        msg=lambda m: "the paths differ: is the fused one causal, scaled alike, and told that heads share?\n" + m,
    )


def test_the_fast_path_is_told_what_is_hidden(monkeypatch):
    """With fewer queries than keys the fused kernel gets the mask: its own causal one is aligned at the top left."""
    q, k, v = (torch.randn(3, heads, length, 4, dtype=torch.float64) for heads, length in ((6, 2), (2, 5), (2, 5)))
    mask = torch.rand(3, 1, 2, 5) < 0.5
    mask[..., 0] = False
    far, sink = torch.randn_like(q), torch.tensor([True, False, False, True, False])[None, None, None]
    learning = q.clone().requires_grad_()  # where a gradient is wanted, a CPU takes the products written out
    expected, with_sinks = attention(learning, k, v, mask).detach(), attention(q, k, v, mask, far, sink)
    found = fused(q, k, v, mask, far, sink)
    torch.testing.assert_close(
        found, with_sinks, **CLOSE, msg=lambda m: f"the fused kernel has one query for all keys: sinks need two\n{m}"
    )
    monkeypatch.setattr(trunk, "attention_weights", lambda *args: pytest.fail("the T x S weights were stored"))
    for where, kernel in (("a GPU", fused), ("a CPU that only reads", attention)):
        torch.testing.assert_close(
            kernel(q, k, v, mask), expected, **CLOSE,
            msg=lambda m, where=where: (
                f"on {where}: torch's mask says what is seen, ours what is hidden, and not causal as well\n{m}"
            ),
        )


@pytest.mark.parametrize("T", [1, 3])
def test_the_fused_kernels_answer_may_lie_otherwise(T, monkeypatch):
    """On a GPU the fused kernel's answer has heads and positions swapped in memory, and is still read rightly."""
    q, k, v = (torch.randn(3, heads, length, 4, dtype=torch.float64) for heads, length in ((6, T), (2, 5), (2, 5)))
    mask, kernel = torch.arange(5) > torch.tensor([0, 2, 4])[:, None, None, None], F.scaled_dot_product_attention
    expected = kernel(q, k, v, ~mask, enable_gqa=True)

    def swapped(*args, **how):
        return kernel(*args, **how).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", swapped)
    torch.testing.assert_close(
        fused(q, k, v, mask.expand(3, 1, T, 5)), expected, **CLOSE,
        msg=lambda m: f"its numbers are taken in the order of memory: reshape, which copies where it must\n{m}",
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
    assert other.head.weight is other.tok_emb.weight, "loading weights parted the output layer from the embedding"
    assert torch.equal(other.head.weight, model.head.weight), "the shared weight was not loaded"


def test_an_untied_head_is_its_own():
    """With tied=False the output layer is a weight of its own, trained apart from the embedding."""
    model = GPT(small(tied=False))
    model(torch.randint(3, (2, 5))).square().sum().backward()  # tokens 3 to 10 do not come
    assert model.head.weight is not model.tok_emb.weight, "tied=False was not heard"
    assert not torch.equal(model.head.weight, model.tok_emb.weight), "they start as two, not as copies of one"
    assert not model.tok_emb.weight.grad[3:].any(), "the vector of a token that does not come was moved by the head"
    assert model.head.weight.grad[3:].any(), "every token is scored at each position: all rows of the head learn"
    other = GPT(small(tied=False))
    other.load_state_dict(model.state_dict())
    idx = torch.randint(11, (2, 5))
    assert torch.equal(other(idx), model(idx)), "after saving and loading it is another model"


def test_both_uses_of_the_embedding_are_trained():
    """The tied weight's gradient is the sum of two: as the table that is looked up, and as the output layer."""
    model = scramble(GPT(small()))
    idx = torch.randint(11, (2, 5))
    # The same model with two copies of the weight, each of which gets a gradient of its own.
    table, head = (model.tok_emb.weight.detach().clone().requires_grad_() for _ in range(2))
    x = F.embedding(idx, table)
    for block in model.blocks:
        x = block(x, Look(rope_table(torch.arange(5), model.config)))
    expected = F.linear(model.norm(x), head)
    slope = torch.randn_like(expected)
    expected.backward(slope)
    model.zero_grad()
    model(idx).backward(slope)
    torch.testing.assert_close(
        model.tok_emb.weight.grad, table.grad + head.grad, **CLOSE,
        msg=lambda m: "one of the two uses of the shared weight passes no gradient\n" + m,
    )


def test_the_stream_keeps_its_size_at_any_depth():
    """What all blocks together add to the stream at the start is as large with 24 blocks as with 2."""
    added = []
    for n_layer in (2, 24):
        model = GPT(ModelConfig(vocab_size=65, block_size=16, n_embd=64, n_head=2, n_layer=n_layer))
        ends = []
        model.blocks[0].register_forward_pre_hook(lambda module, args, ends=ends: ends.append(args[0]))
        model.blocks[-1].register_forward_hook(lambda module, args, output, ends=ends: ends.append(output))
        model(torch.randint(65, (8, 16)))
        added.append((ends[1] - ends[0]).std().item())
    assert added[1] == pytest.approx(added[0], rel=0.3), (
        f"2 blocks add {added[0]:.3f}, 24 blocks {added[1]:.3f}: unscaled they would add sqrt(12) = 3.5 times as much"
    )


# What the models' publishers say, in their files of weights and in the shapes of their config.json.
PUBLISHED = {
    "Qwen3-0.6B": (596_049_920, {
        "vocab_size": 151_936, "n_embd": 1024, "n_head": 16, "n_kv_head": 8, "head_dim": 128, "n_layer": 28,
        "n_hidden": 3072, "qk_norm": True, "tied": True,
    }),
    "Llama 3 8B": (8_030_261_248, {
        "vocab_size": 128_256, "n_embd": 4096, "n_head": 32, "n_kv_head": 8, "n_layer": 32, "n_hidden": 14_336,
        "qk_norm": False, "tied": False,
    }),
    "SmolLM2-135M": (134_515_008, {
        "vocab_size": 49_152, "n_embd": 576, "n_head": 9, "n_kv_head": 3, "n_layer": 30, "n_hidden": 1536,
        "qk_norm": False, "tied": True,
    }),
    "SmolLM3-3B": (3_075_098_624, {
        "vocab_size": 128_256, "n_embd": 2048, "n_head": 16, "n_kv_head": 4, "n_layer": 36, "n_hidden": 11_008,
        "qk_norm": False, "tied": True, "nope_every": 4,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_open_models_have_their_published_size(name, monkeypatch):
    """In the shape of an open model the model has exactly the parameters that its publisher counts."""
    expected, shape = PUBLISHED[name]
    monkeypatch.setattr(nn.init, "normal_", lambda p, *args, **how: p)  # for which torch would import half of itself
    with torch.device("meta"):  # shapes without memory
        count = sum(p.numel() for p in GPT(ModelConfig(**shape)).parameters())
    assert count == expected, f"{name} has {expected:,} parameters, and {count:,} in our shape: whose are the others?"


def test_bfloat16_is_close_to_float32():
    """Under autocast to bfloat16 scores and gradient are within 4 % of what they are in float32."""
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
        assert 0 < error < 0.04, f"the {what} are off by {100 * error:.2f} %: 8 bits of precision cost well below 4 %"
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters()), "weights stay in float32"


def test_a_bfloat16_model_stays_bfloat16():
    """A model whose weights are bfloat16, as open weights are, gives bfloat16 scores, within 5 % of the exact ones."""
    model = GPT(ModelConfig(vocab_size=65, block_size=32, n_embd=64, n_head=2)).eval()
    idx = torch.randint(65, (4, 32))
    exact = model(idx)
    rough = model.bfloat16()(idx)
    assert rough.dtype == torch.bfloat16, f"scores in {rough.dtype}: a norm or the angles made the whole stream wider"
    error = ((rough.float() - exact).norm() / exact.norm()).item()
    assert 0 < error < 0.05, f"the scores are off by {100 * error:.2f} %: 8 bits of precision cost well below 5 %"


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rmsnorm_is_torchs(size):
    """RMSNorm and its gradients equal torch's nn.RMSNorm, for inputs of any size."""
    ours, theirs = RMSNorm(12, eps=1e-5), nn.RMSNorm(12, eps=1e-5, dtype=torch.float64)
    assert (ours.weight == 1).all(), "the scale starts at 1"
    nn.init.normal_(ours.weight)
    theirs.weight.data = ours.weight.data.double()
    x1 = (size * (torch.randn(3, 5, 12) + 0.5)).requires_grad_()  # with a mean that is not 0
    x2 = x1.detach().double().requires_grad_()
    y1, y2 = ours(x1), theirs(x2)
    slope = torch.randn_like(y1)
    y1.backward(slope)
    y2.backward(slope.double())
    found = {"output": (y1, y2), "gradient of x": (x1.grad, x2.grad)}
    found |= {"gradient of the scale": (ours.weight.grad, theirs.weight.grad)}
    for what, (a, b) in found.items():
        torch.testing.assert_close(
            a.double(), b, rtol=1e-4, atol=1e-5 / (size if what == "gradient of x" else 1),
            msg=lambda m, what=what: f"the {what} is wrong: x / sqrt(mean(x^2) + eps), times the scale\n{m}",
        )


def test_rmsnorm_by_hand():
    """RMSNorm divides by the root of the mean square, and takes no mean away."""
    norm = RMSNorm(4, eps=1e-12)
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0], [5.0, 5.0, 5.0, 5.0]])  # mean squares 25 / 4 and 25
    expected = torch.tensor([[1.2, 1.6, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(
        norm(x), expected,
        msg=lambda m: f"[3, 4, 0, 0] / 2.5, and [5, 5, 5, 5] / 5: with the mean taken away nothing would be left\n{m}",
    )


def test_eps_stands_inside_the_root():
    """x / sqrt(mean(x^2) + eps): a vector of size sqrt(eps) is halved in power, one of zeros has a finite gradient."""
    norm = RMSNorm(4, eps=1e-6)
    x = torch.full((4,), 1e-3)
    torch.testing.assert_close(
        norm(x), torch.full((4,), 0.5**0.5),
        msg=lambda m: f"1e-3 / sqrt(1e-6 + 1e-6) is 0.707; with eps outside the root it is 0.999\n{m}",
    )
    zeros = torch.zeros(4, requires_grad=True)
    out = norm(zeros)
    out.sum().backward()
    assert not out.any(), "zeros stay zeros"
    torch.testing.assert_close(
        zeros.grad, torch.full((4,), 1000.0),
        msg=lambda m: f"around 0 the norm is x / sqrt(eps): a root of 0 has no gradient\n{m}",
    )


def test_rmsnorm_squares_in_float32():
    """A bfloat16 vector is normed as if in float64 and rounded once."""
    x = (3 * torch.randn(16, 64)).bfloat16()
    exact = rms(x.double(), 1.0, 1e-6).bfloat16()
    out = RMSNorm(64).bfloat16()(x)
    assert out.dtype == torch.bfloat16, f"a bfloat16 vector comes out as {out.dtype}"
    off = (out != exact).float().mean().item()
    assert off < 0.01, f"{100 * off:.0f} % of the numbers are rounded more than once: square and sum in float32"


@pytest.mark.parametrize("base", [10_000.0, 500.0])
def test_rope_turns_pairs_like_complex_numbers(base):
    """Channels i and i + D / 2 at position t are multiplied, as one complex number, by e^(i t base^(-2i / D))."""
    config = small(head_dim=8, rope_base=base)
    x = torch.randn(2, 3, 700, 8, dtype=torch.float64)
    out = rotate(x, *table(700, config))
    torch.testing.assert_close(
        out, turn(x, base), rtol=1e-3, atol=1e-3,  # an angle of 700 is known to 5e-5 in float32
        msg=lambda m: f"pair i turns by base^(-2i / D) radians a position, {base:g} being the base, from a towards b: "
        f"(a cos - b sin, b cos + a sin), with the angles in float32\n{m}",
    )
    torch.testing.assert_close(
        out.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5,
        msg=lambda m: f"turning changed a vector's length: the sine has its sign in one of the two places\n{m}",
    )
    assert torch.equal(out[:, :, 0], x[:, :, 0]), "position 0 is not turned"


def test_rope_by_hand():
    """With D = 4 and base 10,000 pair 0 turns by 1 radian a position and pair 1 by 1 / 100."""
    cos, sin = table(3, small())
    assert cos.shape == sin.shape == (3, 2), "[T, D / 2]: one angle for each position and pair"
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.01], [2.0, 0.02]])
    for name, found, expected in (("cosines", cos, angles.cos()), ("sines", sin, angles.sin())):
        torch.testing.assert_close(found, expected, msg=lambda m, name=name: f"wrong {name}: t * base^(-2i / D)\n{m}")
    x = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    expected = torch.tensor([
        [1, 0, 0, 0], [math.cos(1), 0, math.sin(1), 0], [0, math.cos(0.02), 0, math.sin(0.02)],
    ])  # fmt: skip
    torch.testing.assert_close(
        rotate(x, cos, sin), expected, msg=lambda m: f"channel 0 is paired with channel 2, and 1 with 3\n{m}"
    )
    for dtype in (torch.bfloat16, torch.float64):
        turned = rotate(x.to(dtype), cos, sin)
        assert turned.dtype == dtype, f"{dtype} comes out as {turned.dtype}: the angles' type is not that of the result"


def test_scores_depend_on_differences_of_positions():
    """Moved on together, a query and a key keep their score; moved apart, they do not."""
    config, q, k = small(head_dim=8), torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    q, k = (rotate(x.expand(200, 8), *table(200, config)) for x in (q, k))  # the same vector at each of 200 positions
    scores = q @ k.T  # [200, 200]
    for distance in (-7, 0, 1, 30):
        along = scores.diagonal(distance)
        assert (along - along[0]).abs().max() < 1e-4, (
            f"scores at a distance of {distance} run from {along.min():.4f} to {along.max():.4f}: queries and keys are "
            "turned in the same way, by angles that grow evenly with the position"
        )
    assert scores[0].std() > 0.1, "the score of a query and a key is the same at every distance: nothing is turned"


@pytest.fixture(scope="module")
def llama():
    """Llama's code in `transformers`, imported once: that takes seconds."""
    return pytest.importorskip("transformers.models.llama.modeling_llama", reason="transformers is not installed")


PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA_31 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
OURS = {"rope_base": 500_000.0, "rope_factor": 8.0, "rope_low": 1.0, "rope_high": 4.0, "rope_original": 8192}


@pytest.mark.parametrize(("theirs", "ours"), [(PLAIN, {}), (LLAMA_31, OURS)], ids=["plain", "Llama 3.1"])
def test_rope_is_transformers(theirs, ours, llama):
    """Queries and keys are turned as `transformers` turns them, with Llama 3.1's scaling and without."""
    rotary = llama.LlamaRotaryEmbedding(llama.LlamaConfig(head_dim=128, rope_parameters=theirs))
    q, k = torch.randn(1, 6, 3000, 128), torch.randn(1, 2, 3000, 128)
    cos, sin = rotary(q, torch.arange(3000)[None])
    rope = table(3000, small(head_dim=128, **ours))
    for found, expected in zip(
        (rotate(q, *rope), rotate(k, *rope)), llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=5e-3,  # an angle of 3,000 is known to 2e-4 in float32
            msg=lambda m: f"weights trained with these angles would meet others\n{m}",
        )


def test_slow_pairs_are_slowed_down():
    """Of Llama 3.1's 64 pairs 29 keep their speed, 29 turn 8 times slower, and the 6 between are slowed in part."""
    plain, scaled = (
        torch.atan2(*reversed([part[1].double() for part in table(2, small(head_dim=128, **shape))]))
        for shape in ({"rope_base": 500_000.0}, OURS)
    )  # the angles at position 1: [D / 2] each
    slower = plain / scaled
    # A turn of pair i takes 2 pi 500000^(i / 64) positions: below 8192 / 4 for i < 28.2, above 8192 for i > 34.98.
    torch.testing.assert_close(
        slower[:29], torch.ones(29, dtype=torch.float64), rtol=1e-5, atol=0,
        msg=lambda m: f"pairs with 4 turns or more in 8,192 positions keep their speed\n{m}",
    )
    torch.testing.assert_close(
        slower[35:], torch.full((29,), 8.0, dtype=torch.float64), rtol=1e-5, atol=0,
        msg=lambda m: f"pairs with less than one turn in 8,192 positions are slowed by the whole factor\n{m}",
    )
    between = slower[29:35]
    assert ((1 < between) & (between < 8)).all() and (between.diff() > 0).all(), (
        f"pairs with 1 to 4 turns are slowed in part, the slower ones more: {between.tolist()}"
    )


def interleaved(x):
    """RoPE as the paper writes it: channels 2i and 2i + 1 are one complex number."""
    T, D = x.shape[-2:]
    speed = torch.tensor([10_000.0 ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * speed
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def test_two_layouts_differ_by_the_order_of_channels():
    """With even channels first, then odd ones, pairs of neighbours are pairs of halves; mixed, they are wrong."""
    config = small(head_dim=8)
    q, k = torch.randn(2, 6, 8, dtype=torch.float64)  # each [T, D]
    order, rope = [0, 2, 4, 6, 1, 3, 5, 7], table(6, config)
    torch.testing.assert_close(
        rotate(q[:, order], *rope), interleaved(q)[:, order], **NEAR,
        msg=lambda m: f"reordered channels, turned as halves, are the paper's neighbours, turned and reordered\n{m}",
    )
    scores = interleaved(q) @ interleaved(k).T
    torch.testing.assert_close(
        rotate(q[:, order], *rope) @ rotate(k[:, order], *rope).T, scores, **NEAR,
        msg=lambda m: f"a dot product does not ask for the order of channels, if both sides have the same\n{m}",
    )
    mixed = rotate(q, *rope) @ interleaved(k).T
    assert (mixed - scores).abs().max() > 0.1, "queries and keys in different layouts do not give the same scores"


def test_hidden_is_what_the_rules_say():
    """For any queries and keys, in any order: a key is seen at most window - 1 positions back, or if it is a sink."""
    for window, n_sink in ((1, 0), (1, 1), (2, 1), (3, 0), (3, 2), (4, 4), (8, 0), (None, 0), (None, 2)):
        config = small(block_size=8, window=window, n_sink=n_sink)
        t = torch.stack([torch.randperm(12) - 1 for _ in range(3)])  # [3, 12], -1 ... 10
        s = torch.stack([torch.randperm(14) for _ in range(3)])[:, :9] - 2  # [3, 9], some negative: empty slots
        found = hidden(t, s, config)
        assert found.shape == (3, 1, 12, 9), "[B, 1, T, S]: the same for all heads"
        for b, i, j in torch.cartesian_prod(torch.arange(3), torch.arange(12), torch.arange(9)).tolist():
            query, key = int(t[b, i]), int(s[b, j])
            if query >= 0:
                assert bool(found[b, 0, i, j]) == (key not in naive.sight(query, config)), (
                    f"window {window}, {n_sink} sinks: of {query} and {key}, the wrong is hidden: a position sees the "
                    "newest `window`, itself included, and the sinks, but no padding and no empty slot"
                )
        assert not found[:, 0][t < 0].any(), "padding that sees nothing is a softmax over nothing, which is nan"


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("n_kv_head", [1, 2, 6])
def test_attention_with_a_mask_is_torchs(n_kv_head, T):
    """With fewer queries than keys and a mask for each text, attention and its gradients equal torch's."""
    q, k, v = (
        torch.randn(3, heads, length, 4, dtype=torch.float64, requires_grad=True)
        for heads, length in ((6, T), (n_kv_head, 5), (n_kv_head, 5))
    )
    mask = torch.rand(3, 1, T, 5) < 0.5
    mask[..., 2] = False  # all see something
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=~mask, enable_gqa=True)
    assert_same(
        attention(q, k, v, mask), theirs, {"q": q, "k": k, "v": v}, CLOSE,
        "each text has a mask of its own, which all its heads share; neighbouring heads of queries read the same keys",
    )


def test_sinks_meet_other_queries():
    """The scores of keys that are sinks are those of `far`, all others those of q; one softmax runs over both."""
    q, far, k = (torch.randn(2, heads, length, 4, dtype=torch.float64) for heads, length in ((6, 3), (6, 3), (2, 5)))
    v = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5)  # so that the output is the weights
    sink = torch.tensor([[True, False, True, False, False], [False, False, False, True, False]])
    mask = torch.zeros(2, 1, 3, 5, dtype=torch.bool)
    mask[1, 0, 2, 3:] = True
    out = attention(q, k, v, mask, far, sink[:, None, None])
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(3)).tolist():
        scores = [
            -math.inf if mask[b, 0, t, s] else ((far if sink[b, s] else q)[b, h, t] @ k[b, h // 3, s]).item() / 2
            for s in range(5)
        ]
        torch.testing.assert_close(
            out[b, h, t], torch.tensor(scores, dtype=torch.float64).softmax(0), **CLOSE,
            msg=lambda m, b=b, h=h, t=t: f"text {b}, head {h}, query {t}: a sink does not meet its own query\n{m}",
        )


def test_angles_of_any_positions():
    """Positions in any order, another one for each text, each get the angles of their own number."""
    cos, sin = rope_table(torch.tensor([[5, 0, 300], [-1, 2, 2]]), small())
    assert cos.shape == sin.shape == (2, 3, 2), "[..., T, D / 2]: one angle for each position and pair"
    angles = torch.tensor([[[5, 0.05], [0, 0], [300, 3.0]], [[-1, -0.01], [2, 0.02], [2, 0.02]]])
    for name, found, expected in (("cosines", cos, angles.cos()), ("sines", sin, angles.sin())):
        torch.testing.assert_close(
            found, expected, atol=1e-4, rtol=0,
            msg=lambda m, name=name: f"wrong {name}: the place in the batch is no position\n{m}",
        )


WINDOWS = [
    {"window": 3},
    {"window": 1},
    {"window": 3, "n_sink": 2},
    {"window": 2, "n_sink": 2, "n_layer": 3, "nope_every": 2},
    {"window": 4, "n_sink": 1, "qk_norm": False, "tied": False, "n_kv_head": 1},
    {"window": 4, "n_sink": 1, "n_kv_head": 6},
]


@pytest.mark.parametrize("change", WINDOWS, ids=str)
def test_a_window_is_each_query_looking_for_itself(change, monkeypatch):
    """Through a window, with sinks and without, scores and gradient are those of queries worked out one by one."""
    monkeypatch.setattr(trunk, "rope_table", naive.angles)
    model = scramble(GPT(small(**change)))
    idx = torch.randint(11, (2, 16))
    expected = torch.stack([naive.logits(model, row) for row in idx])
    assert_same(
        model(idx), expected, dict(model.named_parameters()), CLOSE,
        "each position sees the newest `window`, itself included, and the sinks: those as if just outside the window",
    )


def test_information_travels_one_window_a_layer():
    """Changing one token changes the scores of L (window - 1) positions after it, and with sinks in sight, of all."""
    idx = torch.randint(11, (2, 20))
    for n_sink, t, expected in ((0, 5, range(5, 12)), (1, 5, range(5, 12)), (1, 0, range(20))):
        model = scramble(GPT(small(window=4, n_sink=n_sink, n_layer=2)))  # 2 layers x 3 positions
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        differs = (model(changed) - model(idx)).abs().amax(dim=(0, 2)) > 1e-9
        assert differs.nonzero().flatten().tolist() == [*expected], (
            f"{n_sink} sinks: token {t} changed positions {differs.nonzero().flatten().tolist()}, not "
            f"{expected.start} to {expected.stop - 1}: a window of 4 reaches 3 back, and each layer reaches on"
        )


@pytest.mark.parametrize("last", [1, 3, 7])
def test_only_the_last_scores_are_worked_out(last):
    """With `last`, the scores of that many positions come, equal to the end of all, and the head sees no others."""
    model, seen = scramble(GPT(small())), []
    idx = torch.randint(11, (2, 7))
    whole = model(idx)
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    found = model(idx, last=last)
    assert found.shape == (2, last, 11), f"{last} positions were asked for"
    torch.testing.assert_close(found, whole[:, -last:], **CLOSE, msg=lambda m: f"they are not the last ones\n{m}")
    assert seen == [last], "the head, which costs most with a large vocabulary, worked on positions nobody asked for"
