"""The encoder-decoder of the demo: cross-attention against torch, and what the decoder may see."""

import json

from shared.errors import BadInput

import pytest
import torch
from torch import nn

from demos import cross_attention
from demos.cross_attention import CrossAttention, DecoderBlock, EncoderBlock, Seq2Seq
from model import ModelConfig

CONFIG = ModelConfig(vocab_size=27, block_size=16, n_embd=12, n_head=3, n_layer=2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_cross_attention_is_torchs():
    """Cross-attention equals torch's nn.MultiheadAttention with queries here and keys and values from the memory."""
    ours = CrossAttention(CONFIG).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]).data
    theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]).data
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    expected, weights = theirs(x, memory, memory, average_attn_weights=False)
    torch.testing.assert_close(ours(x, memory), expected, msg=lambda m: f"no mask; rows query, columns answer\n{m}")
    torch.testing.assert_close(ours.weights, weights)


def test_an_encoder_block_is_torchs():
    """The encoder's block is nn.TransformerEncoderLayer without a mask: it sees past and future."""
    ours = EncoderBlock(CONFIG).double()
    theirs = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "relu", batch_first=True, norm_first=True, dtype=torch.float64)
    attn = ours.attn
    theirs.self_attn.in_proj_weight.data = torch.cat([attn.query.weight, attn.key.weight, attn.value.weight]).data
    theirs.self_attn.out_proj.load_state_dict(attn.proj.state_dict())
    theirs.linear1.load_state_dict(ours.ffn.fc.state_dict())
    theirs.linear2.load_state_dict(ours.ffn.proj.state_dict())
    x = torch.randn(2, 5, 12).double()
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_decoder_sees_its_past_and_the_whole_source():
    """A target letter changes no earlier score; a source letter changes every score, unless one vector hides it."""
    model = Seq2Seq(CONFIG).double()
    nn.init.normal_(model.head.weight)
    source, target = torch.randint(26, (1, 6)), torch.randint(26, (1, 6))
    before = model(source, target)
    for t in range(6):
        changed = target.clone()
        changed[0, t] = (changed[0, t] + 1) % 26
        differs = (model(source, changed) - before).abs().amax(dim=(0, 2)) > 1e-9
        assert differs.tolist() == [s >= t for s in range(6)], "the decoder must not read what it has yet to write"
        changed = source.clone()
        changed[0, t] = (changed[0, t] + 1) % 26
        assert ((model(changed, target) - before).abs().amax(dim=(0, 2)) > 1e-9).all(), f"source letter {t} is not seen"
    assert Seq2Seq(CONFIG, one_vector=True).encode(source).shape == (1, 1, 12), "one vector for the whole source"
    assert model.encode(source).shape == (1, 6, 12), "one vector for each letter"
    block = DecoderBlock(CONFIG)
    assert block(torch.randn(2, 5, 12), torch.randn(2, 7, 12)).shape == (2, 5, 12)


def test_translate_feeds_back_what_it_wrote():
    """Greedy decoding writes letter t + 1 from the source and the t letters written before."""
    model = Seq2Seq(CONFIG)
    nn.init.normal_(model.head.weight)
    source = torch.randint(26, (3, 6))
    written = cross_attention.translate(model, source)
    assert written.shape == (3, 6) and written.max() < 26, "letters only, never the start sign"
    scores = model(source, cross_attention.shifted(written))  # all at once, given what was written
    assert torch.equal(scores[..., :26].argmax(-1), written), "each letter is the likeliest after those before it"
    assert cross_attention.shifted(torch.tensor([[4, 5, 6]])).tolist() == [[26, 4, 5]]


def test_the_tasks():
    """Reverse and sort do what they are called."""
    source = torch.tensor([[3, 1, 2]])
    assert cross_attention.TASKS["reverse"](source).tolist() == [[2, 1, 3]]
    assert cross_attention.TASKS["sort"](source).tolist() == [[1, 2, 3]]


def test_the_demo_runs(out, capsys):
    """Both models are trained and scored at every length, and the map is drawn."""
    cross_attention.main(["--steps", "3", "--task", "sort"])
    shares = json.loads((out / "cross_attention" / "summary.json").read_text("utf-8"))["shares"]
    assert set(shares) == {"attention", "one vector"}
    assert all(set(by_length) == {str(n) for n in range(4, 17)} for by_length in shares.values())
    assert (out / "cross_attention" / "cross_attention.png").stat().st_size > 5000
    assert "where each letter came from" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--steps is 0"):
        cross_attention.main(["--steps", "0"])
