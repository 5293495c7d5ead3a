"""The comparison of pre-norm and post-norm measures what it says."""

import json
import math
from collections import Counter

from shared.errors import BadInput

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from demos import norm_position
from demos.norm_position import PostNormBlock
from model import ModelConfig

PARTS = {  # where torch's block has the layers of ours
    "norm1": "norm1", "norm2": "norm2", "ffn.fc": "linear1", "ffn.proj": "linear2", "attn.proj": "self_attn.out_proj",
}
FUTURE = torch.ones(7, 7, dtype=torch.bool).triu(1)


def scramble(module):
    """Weights, scales and shifts that no start has, in float64: a wrong norm cannot hide behind ones and zeros."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def torchs(block, C: int, n_head: int):
    """torch's own post-norm block with the weights of ours."""
    theirs = nn.TransformerEncoderLayer(
        C, n_head, 4 * C, dropout=0.0, activation="relu", batch_first=True, norm_first=False, dtype=torch.float64,
    )
    for ours, other in PARTS.items():
        theirs.get_submodule(other).load_state_dict(block.get_submodule(ours).state_dict())
    layers = (block.attn.query, block.attn.key, block.attn.value)  # torch keeps the three in one matrix
    theirs.self_attn.in_proj_weight.data = torch.cat([layer.weight for layer in layers]).data
    theirs.self_attn.in_proj_bias.data = torch.cat([layer.bias for layer in layers]).data
    return theirs


def test_the_post_norm_block_is_torchs():
    """A post-norm block equals torch's nn.TransformerEncoderLayer(norm_first=False): outputs and gradients."""
    torch.manual_seed(0)
    ours = scramble(PostNormBlock(ModelConfig(vocab_size=11, block_size=7, n_embd=12, n_head=3)))
    theirs = torchs(ours, 12, 3)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = ours(x1), theirs(x2, src_mask=FUTURE, is_causal=True)
    order = "x = norm1(x + attn(x)), then x = norm2(x + ffn(x)): the norm comes after the addition"
    torch.testing.assert_close(y1, y2, msg=lambda m: f"post-norm is {order}\n{m}")
    slope = torch.randn_like(y1)
    y1.backward(slope)
    y2.backward(slope)
    pairs = {"the input": (x1.grad, x2.grad)}
    for mine, other in PARTS.items():
        for name in ("weight", "bias"):
            a, b = (getattr(m.get_submodule(part), name) for m, part in ((ours, mine), (theirs, other)))
            pairs[f"{mine}.{name}"] = a.grad, b.grad
    for i, mine in enumerate(("query", "key", "value")):
        layer = getattr(ours.attn, mine)
        pairs[f"{mine}.weight"] = layer.weight.grad, theirs.self_attn.in_proj_weight.grad.chunk(3)[i]
        pairs[f"{mine}.bias"] = layer.bias.grad, theirs.self_attn.in_proj_bias.grad.chunk(3)[i]
    for name, (a, b) in pairs.items():
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"the gradient of {name} is wrong\n{m}")


def test_the_post_norm_model_is_a_stack_of_torchs_blocks():
    """A model built for "post" equals embeddings, torch's post-norm blocks, norm and head; one for "pre" does not."""
    idx = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))
    for norm in ("post", "pre"):
        model = scramble(norm_position.build(norm, 3, 11, seed=0))
        x = model.tok_emb(idx) + model.pos_emb[:7]
        for block in model.blocks:
            x = torchs(block, 32, 2)(x, src_mask=FUTURE, is_causal=True)
        equal = torch.allclose(model.head(model.norm(x)), model(idx))
        assert equal == (norm == "post"), f"the {norm}-norm model is {'' if equal else 'not '}made of post-norm blocks"


def test_only_pre_norm_leaves_a_straight_path():
    """Pre-norm blocks that have nothing to say pass their input on unchanged; post-norm blocks do not."""
    x = 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for norm in ("pre", "post"):
        [block] = norm_position.build(norm, 1, 20, seed=0).blocks
        for layer in (block.attn.proj, block.ffn.proj):
            nn.init.zeros_(layer.weight)
        assert torch.equal(block(x), x) == (norm == "pre"), f"{norm}-norm: the norms stand in the wrong place"


def test_both_kinds_start_from_the_same_weights():
    """With one seed pre-norm and post-norm models differ in nothing but the place of the norms."""
    pre, post = (norm_position.build(norm, 2, 20, seed=3).state_dict() for norm in ("pre", "post"))
    assert pre.keys() == post.keys() and all(torch.equal(pre[name], post[name]) for name in pre)


def test_the_unigram_loss_is_the_entropy_of_the_frequencies():
    """Knowing only how frequent each character is costs the entropy of the frequencies."""
    data = torch.tensor([0, 0, 0, 0, 1, 1, 2, 4])
    expected = -sum(n / 8 * math.log(n / 8) for n in Counter(data.tolist()).values())
    assert norm_position.unigram(data) == pytest.approx(expected)


def test_one_step_moves_a_post_norm_stack_further():
    """One step of Adam moves the output of eight post-norm blocks further than that of eight pre-norm blocks."""
    x, y = torch.randint(20, (2, 8, 16), generator=torch.Generator().manual_seed(0))
    moves = {norm: norm_position.first_step(norm, 8, x, y, 20, seed=0)[1] for norm in ("pre", "post")}
    assert moves["post"] > 1.3 * moves["pre"], moves

    gradient, move = norm_position.first_step("pre", 2, x, y, 20, seed=0)
    model = norm_position.build("pre", 2, 20, seed=0)  # once more, with the step written out
    seen = []
    model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    grads = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for p, grad in zip(model.parameters(), grads, strict=True):
            p -= 1e-3 * grad / (grad.abs() + 1e-8)
    model(x)
    assert move == pytest.approx((seen[1] - seen[0]).pow(2).mean().item() ** 0.5, rel=1e-3)
    last = dict(zip(dict(model.named_parameters()), grads, strict=True))["blocks.1.ffn.proj.weight"]
    assert gradient == pytest.approx(last.norm().item(), rel=1e-4)


def test_the_rate_warms_up_and_falls():
    """The first step of a warm-up of 10 moves weights by a tenth of the rate, a start without by the whole rate."""
    data = torch.randint(20, (4000,), generator=torch.Generator().manual_seed(0))
    for warmup, share in ((0, 1.0), (10, 0.1)):
        model = norm_position.build("pre", 1, 20, seed=0)
        before = model.head.bias.detach().clone()
        next(norm_position.fit(model, data, 100, 0.01, warmup, seed=0))
        moved = (model.head.bias - before).abs().max().item()
        assert moved == pytest.approx(0.01 * share, rel=1e-3), f"warm-up {warmup}: Adam's first step is the rate itself"


def test_smoothing_is_a_running_mean():
    """Each value is averaged with those before it, at most `width` in all."""
    assert norm_position.smooth([1.0, 3.0, 5.0, 7.0], width=2) == [1.0, 2.0, 4.0, 6.0]


def test_the_demo_runs(text, out, capsys):
    """Both norms are trained at every rate, with and without warm-up."""
    norm_position.main(["--corpus", str(text), "--steps", "20", "--seeds", "1", "--n-layer", "2"])
    summary = json.loads((out / "norm_position" / "summary.json").read_text("utf-8"))
    cells = {(row["norm"], row["warm-up"], row["lr"]) for row in summary["rows"]}
    rates = ("0.001", "0.003", "0.01")
    assert cells == {(norm, warmup, lr) for norm in ("pre", "post") for warmup in (0, 6) for lr in rates}
    assert (out / "norm_position" / "norm_position.png").stat().st_size > 5000
    assert "stuck" in capsys.readouterr().out
    with pytest.raises(BadInput, match="at least 20 steps"):
        norm_position.main(["--corpus", str(text), "--steps", "19"])
