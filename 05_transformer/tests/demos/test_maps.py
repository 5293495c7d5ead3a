"""The maps are the weights that the model uses, and the table says what they show."""

import json

from shared.errors import BadInput

import pytest
import torch
from torch import nn

import train
from demos import maps
from model import GPT, ModelConfig


def test_the_maps_are_the_weights_in_use():
    """Each map equals the weights that torch's nn.MultiheadAttention reports on the same input."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=11, block_size=7, n_embd=12, n_head=3, n_layer=2)).double()
    idx = torch.randint(11, (2, 5))
    found = maps.attention_maps(model, idx)
    assert found.shape == (2, 2, 3, 5, 5), "[L, B, H, T, T]"
    x = model.tok_emb(idx) + model.pos_emb[:5]
    for layer, block in enumerate(model.blocks):
        theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
        ours = block.attn
        theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]).data
        theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]).data
        y, future = block.norm1(x), torch.ones(5, 5, dtype=torch.bool).triu(1)
        _, expected = theirs(y, y, y, attn_mask=future, average_attn_weights=False)
        torch.testing.assert_close(found[layer], expected, msg=lambda m, layer=layer: f"layer {layer}\n{m}")
        x = block(x)
    assert not model.blocks[0].attn._forward_hooks and model.training, "the model is handed back as it came"
    maps.attention_maps(model.eval(), idx)
    assert not model.training, "the model is handed back as it came, in evaluation mode too"


def test_word_starts_by_hand():
    """The break that counts is the last one before a position, not the position itself."""
    text = "ab, cd e"
    breaks = torch.tensor([[not char.isalpha() for char in text]])
    assert maps.word_starts(breaks).tolist() == [[0, 0, 0, 2, 3, 3, 3, 6]]


def test_the_table_says_what_a_head_does():
    """Heads on the character before, on the position itself, on the word's start and on everything are told apart."""
    T, breaks = 8, torch.tensor([[False, False, True, False, False, False, True, False]])
    before = torch.diag(torch.ones(T - 1), -1)  # row t looks at t - 1
    before[0, 0] = 1
    start = torch.eye(T)[[0, 0, 0, 2, 2, 2, 2, 6]]
    even = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    rows = maps.habits(torch.stack([before, torch.eye(T), start, even])[None, None], breaks)
    assert [row["layer.head"] for row in rows] == ["0.0", "0.1", "0.2", "0.3"]
    last, itself, word, spread = rows
    assert last["chars back"] == last["1 back"] == last["spread over"] == 1 and last["itself"] == last["2 back"] == 0
    assert itself["itself"] == 1 and itself["chars back"] == 0
    # Rows 4 to 7 look back at 2, 2, 2 and 6.
    assert word["before word"] == 1 and word["first letter"] == 0 and word["chars back"] == (2 + 3 + 4 + 1) / 4
    # They look evenly over 5 to 8 positions, half that far back on average; each place has 1/5 to 1/8 of the weight.
    assert spread["spread over"] == pytest.approx((5 + 6 + 7 + 8) / 4, abs=1e-3)
    assert spread["chars back"] == pytest.approx((4 + 5 + 6 + 7) / 8, abs=1e-3)
    for name in ("itself", "1 back", "2 back", "first letter", "before word"):
        assert spread[name] == pytest.approx((1 / 5 + 1 / 6 + 1 / 7 + 1 / 8) / 4, abs=1e-3), name


def test_the_demo_runs(text, out, capsys):
    """Every head of a trained run gets its row and its picture; what cannot be drawn is refused."""
    with pytest.raises(BadInput, match="train first"):
        maps.main([])
    flags = ["--steps", "5", "--block-size", "16", "--n-embd", "8", "--n-head", "2", "--n-layer", "2"]
    train.main(["--corpus", str(text), "--device", "cpu", *flags])
    maps.main(["--text", "the cat sat"])
    summary = json.loads((out / "maps" / "summary.json").read_text("utf-8"))
    assert [row["layer.head"] for row in summary["heads"]] == ["0.0", "0.1", "1.0", "1.1"]
    assert (out / "maps" / "maps.png").stat().st_size > 5000
    assert "'the cat sat': maps drawn" in capsys.readouterr().out
    maps.main([])
    drawn = json.loads((out / "maps" / "summary.json").read_text("utf-8"))["text"]
    assert drawn in text.read_text("utf-8")[-600:], "without --text the line comes from the validation text"
    for words, message in (
        (["--text", "a" * 17], "17 characters: the model looks at 1 to 16"), (["--text", ""], "0 characters"),
        (["--text", "xyz"], "'x' is not among"), (["--windows", "0"], "--windows is 0"),
        (["--run", "absent"], "no checkpoint"),
    ):
        with pytest.raises(BadInput, match=message):
            maps.main(words)
