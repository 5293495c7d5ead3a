"""Checkpoints that this model is GPT-2: the same weights in `transformers`' GPT2LMHeadModel give the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from demos.open_gpt2 import convert
from model import GPT, ModelConfig, attention
from train import PRESETS

CLOSE = {"rtol": 0.0, "atol": 2e-5}  # in float32, where the order of sums costs 2e-6; the exact GELU costs 6e-4


@pytest.fixture(scope="module")
def transformers():
    """The library to compare with. Its import takes seconds, and only these checkpoints need it."""
    import transformers

    assert transformers.GPT2LMHeadModel, "the part that takes the seconds"
    return transformers


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(dropout: float = 0.0) -> ModelConfig:
    """A shape in which no two sizes are equal: V = 23, T = 13, C = 20 in H = 5 heads of D = 4, 3 layers."""
    return ModelConfig(vocab_size=23, block_size=13, n_embd=20, n_head=5, n_layer=3, dropout=dropout)


def theirs_of(transformers, config: ModelConfig, **changes):
    """A GPT-2 of `transformers` with every weight, scale and bias away from its start."""
    p = config.dropout
    about = transformers.GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_head=config.n_head,
        n_layer=config.n_layer, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0, **changes,
    )
    model = transformers.GPT2LMHeadModel(about)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def pair(transformers, dropout: float = 0.0):
    """(ours, theirs) with the same weights."""
    config = small(dropout)
    theirs = theirs_of(transformers, config)
    ours = GPT(config)
    ours.load_state_dict(convert(theirs.state_dict(), config))
    return ours, theirs


def tokens(T: int, B: int = 2):
    return torch.randint(23, (B, T))


def close(ours, theirs, why: str):
    torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda m: f"{why}\n{m}")


def test_one_fused_matrix_is_three_layers(transformers):
    """GPT-2's c_attn, one [in, out] matrix three times as wide, is our query, key and value, in this order."""
    ours, theirs = pair(transformers)
    x = torch.randn(2, 6, 20)
    for block, other in zip(ours.blocks, theirs.transformer.h, strict=True):
        parts = other.attn.c_attn(x).split(20, dim=-1)  # [B, T, 3C] -> 3 of [B, T, C]
        for name, part in zip(("query", "key", "value"), parts, strict=True):
            layer = getattr(block.attn, name)
            found = [key for key, value in zip(("query", "key", "value"), parts, strict=True)
                     if torch.allclose(layer(x), value, atol=1e-4)]
            close(layer(x), part, f"our {name} is GPT-2's {found[0]}: c_attn holds query, key, value in this order"
                  if found else "no stretch of c_attn: its outputs are split, not its inputs; weights lie [in, out]")


def test_matrices_are_transposed(transformers):
    """GPT-2's "Conv1D" layers keep weights [in, out], ours [out, in]; a square matrix loads either way round."""
    ours, theirs = pair(transformers)
    for block, other in zip(ours.blocks, theirs.transformer.h, strict=True):
        for name, layer, conv in (
            ("attn.proj", block.attn.proj, other.attn.c_proj), ("ffn.fc", block.ffn.fc, other.mlp.c_fc),
            ("ffn.proj", block.ffn.proj, other.mlp.c_proj),
        ):
            x = torch.randn(6, layer.in_features)
            close(layer(x), conv(x), f"{name}: GPT-2's weight is stored [in, out], that of nn.Linear [out, in]")


def test_the_norm_has_gpt2s_eps(transformers):
    """LayerNorm adds 1e-5 to the variance, which shows where the channels hardly differ."""
    ours, theirs = pair(transformers)
    x = 0.003 * torch.randn(2, 6, 20)  # variance 9e-6
    close(
        ours.norm(x), theirs.transformer.ln_f(x),
        "1e-5 stands under the square root, beside the variance: with 1e-12 the result is 1.4 times as large",
    )


def test_the_gelu_is_the_one_with_tanh(transformers):
    """The feed-forward uses GPT-2's GELU, which is worked out with tanh, not the exact one."""
    ours, theirs = pair(transformers)
    x = torch.randn(64, 20)
    found, expected = ours.blocks[0].ffn(x), theirs.transformer.h[0].mlp(x)
    fc, proj = theirs.transformer.h[0].mlp.c_fc, theirs.transformer.h[0].mlp.c_proj
    exact = proj(F.gelu(fc(x)))
    assert (exact - expected).abs().max() > 10 * CLOSE["atol"], "this input does not tell the two apart"
    assert not torch.allclose(found, exact, **CLOSE), (
        "this is the exact GELU: GPT-2 was trained with the formula with tanh, up to 0.0005 off"
    )
    close(found, expected, "the feed-forward is proj(GELU(fc(x))), its GELU worked out with tanh")


@pytest.mark.parametrize("T", [1, 2, 7, 13])
def test_logits_are_those_of_gpt2(transformers, T):
    """The same weights and tokens give the logits of GPT2LMHeadModel, at lengths from 1 to block_size."""
    ours, theirs = pair(transformers)
    ours.eval(), theirs.eval()
    idx = tokens(T)
    with torch.no_grad():
        close(
            ours(idx), theirs(idx).logits,
            "embedding + positions 0, 1, ...; norms inside the branches; scores / sqrt(D), D the channels of a head; "
            "GELU with tanh; a last norm; the head is the embedding: one of these differs from GPT-2",
        )


def test_the_exact_gelu_would_be_noticed(transformers):
    """In the whole model too, the exact GELU moves the logits by far more than what is allowed."""
    ours, theirs = pair(transformers)
    other = theirs_of(transformers, small(), activation_function="gelu")
    other.load_state_dict(theirs.state_dict())
    idx = tokens(13)
    with torch.no_grad():
        moved = (other.eval()(idx).logits - theirs.eval()(idx).logits).abs().max().item()
    assert moved > 10 * CLOSE["atol"], f"the exact GELU moves the logits by {moved:.5f}: choose larger weights"


def test_gradients_are_those_of_gpt2(transformers):
    """The gradient of the same loss is GPT-2's too, for every parameter."""
    ours, theirs = pair(transformers)
    idx = tokens(13)
    for logits in (ours(idx[:, :-1]), theirs(idx[:, :-1]).logits):
        F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    expected = convert({name: p.grad for name, p in theirs.named_parameters()}, small())
    for name, p in ours.named_parameters():
        assert p.grad is not None, f"{name} gets no gradient"
        close(p.grad, expected[name], f"the gradient of {name} differs; that of a tied weight is the sum of both uses")


def test_the_parameters_are_counted_as_gpt2s(transformers):
    """Ours has as many parameters as GPT-2: the head has none of its own, attention's layers have biases."""
    ours, theirs = pair(transformers)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert counts[0] == counts[1], f"{counts[0]} parameters, GPT-2 has {counts[1]}: is the head tied to the embedding?"


def test_the_preset_is_the_smallest_gpt2(transformers):
    """The preset gpt2 has the sizes and the dropout of the smallest published model, 124,439,808 parameters."""
    published = transformers.GPT2Config()  # its defaults are that model's
    preset = PRESETS["gpt2"]
    for name, theirs in (
        ("vocab_size", "vocab_size"), ("block_size", "n_positions"), ("n_embd", "n_embd"), ("n_head", "n_head"),
        ("n_layer", "n_layer"), ("dropout", "resid_pdrop"), ("dropout", "attn_pdrop"), ("dropout", "embd_pdrop"),
    ):
        expected = getattr(published, theirs)
        assert preset[name] == expected, f"{name} is {preset[name]}, but GPT-2's {theirs} is {expected}"
    with torch.device("meta"):  # shapes without memory
        theirs = transformers.GPT2LMHeadModel(published)
    assert sum(p.numel() for p in theirs.parameters()) == 124_439_808


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_attention_weights_are_dropped(p):
    """In training a share p of the attention weights becomes 0 and the rest grow by 1 / (1 - p); rows are apart."""
    T = 12
    q, k = torch.randn(40, 5, T, 4), torch.randn(40, 5, T, 4)
    v = torch.eye(T).expand(40, 5, T, T)  # these values hand the weights through: the output is [B, H, T, T]
    plain, dropped = attention(q, k, v), attention(q, k, v, dropout=p)
    past = torch.ones(T, T, dtype=torch.bool).tril().expand_as(plain)
    assert not dropped[~past].any(), "dropout must not bring back the future"
    share = (dropped[past] == 0).float().mean().item()
    assert share == pytest.approx(p, abs=0.02), (
        f"a share of {share:.3f} of the attention weights is dropped, not {p}: GPT-2 drops them after the softmax"
    )
    kept = past & (dropped != 0)
    close(
        dropped[kept], plain[kept] / (1 - p),
        "a weight that stays grows by 1 / (1 - p). Scores dropped before the softmax, or weights made to sum to 1 "
        "again, would change the others in another way",
    )
    first, second = dropped[:, 0, -1] == 0, dropped[:, 1, -1] == 0
    assert not torch.equal(first, second), "each head drops weights of its own"


def dropouts(monkeypatch, model, idx):
    """Run the model with a dropout that repeats: logits, and (shape, share) of each tensor that had units dropped.

    The n-th dropout of a pass draws its mask from the n-th seed, so two models that drop in the same places drop the
    same units.
    """
    seen = []

    def dropout(x, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return x
        seen.append((tuple(x.shape), p))
        mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(len(seen))) >= p
        return x * mask / (1 - p)

    with monkeypatch.context() as patch:
        patch.setattr(F, "dropout", dropout)
        output = model(idx)
    return getattr(output, "logits", output), seen


def test_dropout_is_where_gpt2_has_it(transformers, monkeypatch):
    """GPT-2 drops after the embedding, and in each block attention weights and the outputs of both branches."""
    ours, theirs = pair(transformers, dropout=0.3)
    idx = tokens(7)
    logits, places = dropouts(monkeypatch, ours, idx)
    expected, their_places = dropouts(monkeypatch, theirs.train(), idx)
    stream, weights = ((2, 7, 20), 0.3), ((2, 5, 7, 7), 0.3)  # [B, T, C] and [B, H, T, T]
    assert their_places == [stream] + 3 * [weights, stream, stream]
    assert weights in places, "no attention weights [B, H, T, T] are dropped"
    assert places == their_places, "in order: the embedding; in each block weights, attention's output, feed-forward's"
    close(logits, expected, "the same units are dropped and the logits differ: something else is dropped than in GPT-2")


def test_evaluation_drops_nothing(transformers, monkeypatch):
    """In evaluation nothing is dropped, attention weights included: the logits are GPT-2's with any dropout."""
    ours, theirs = pair(transformers, dropout=0.3)
    idx = tokens(7)
    logits, places = dropouts(monkeypatch, ours.eval(), idx)
    assert not places, f"in evaluation dropout was at work on {places[0][0]}: only training drops"
    close(logits, theirs.eval()(idx).logits, "in evaluation dropout scales nothing either")
    assert torch.equal(ours(idx), ours(idx)), "in evaluation the same tokens give the same logits, every time"
