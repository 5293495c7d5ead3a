"""The demo of long contexts counts what it says it counts, by hand and against passes over the whole text."""

import json
import math
import string

from shared.errors import BadInput

import pytest
import torch

from demos import yarn
from hf import Opened
from model import GPT, ModelConfig
from tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def opened():
    """A random model that knows printable characters and was made for 300 of them."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer(string.printable)
    model = GPT(ModelConfig(vocab_size=len(tokenizer), block_size=300, n_embd=24, n_head=6, n_kv_head=2, n_layer=2))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Opened(model, tokenizer)


def losses_by_hand(model, ids):
    """Minus the log-probability of each token but the first, each from a pass of its own over all before it."""
    model.eval()
    with torch.no_grad():
        return [-model(torch.tensor([ids[:t]]))[0, -1].log_softmax(0)[ids[t]].item() for t in range(1, len(ids))]


def test_losses_of_a_text_in_pieces_are_those_of_the_whole(opened):
    """Read 5 tokens at a time through the cache, 38 tokens cost what they cost in passes over everything before them.

    Another cache that was filled already is gone on with.
    """
    ids = torch.randint(100, (38,), generator=torch.Generator().manual_seed(1)).tolist()
    expected, done = losses_by_hand(opened.model, ids), []
    found = yarn.nats(opened.model, ids, 5, tick=done.append).tolist()
    assert found == pytest.approx(expected, abs=1e-4), "a token's loss is not that of its successor, or forgets a piece"
    assert done == [5, 10, 15, 20, 25, 30, 35, 37], "progress counts other tokens"
    cache = yarn.Cache(opened.model, most=5)
    parts = [yarn.nats(opened.model, part, 5, cache).tolist() for part in (ids[:21], ids[20:])]
    assert sum(parts, []) == pytest.approx(expected, abs=1e-4), "the second part does not know the first"


def test_perplexity_by_stretches_by_hand():
    """e to the mean loss of each stretch; the last may be shorter."""
    found = yarn.perplexities(torch.tensor([1.0, 3.0, 5.0, 1.0, 2.0]).log(), 2)
    expected = {"to 2": math.sqrt(3), "to 4": math.sqrt(5), "to 5": 2.0}
    assert found == pytest.approx(expected), "a perplexity is e to the mean loss, not the mean of e to the loss"


def test_the_key_stands_where_it_should(opened):
    """Depth 0 puts the key first and 1 last, before the question; the text is less than one filler too short."""
    unit = len(yarn.FILLER)
    for depth in (0.0, 0.25, 0.5, 1.0):
        ids = yarn.hide(opened.tokenizer, 1200, depth, "40917")
        text = opened.tokenizer.decode(ids)
        times = text.count(yarn.FILLER)
        assert 1200 - unit < len(ids) <= 1200, f"{len(ids)} tokens instead of 1,200"
        assert text.index("The pass key") == round(depth * times) * unit, f"depth {depth}: the key stands elsewhere"
        assert text.count("40917") == 2 and text.endswith(" The pass key is"), "no key, or the question is not the end"
    with pytest.raises(BadInput, match="at least"):
        yarn.hide(opened.tokenizer, 100, 0.5, "40917")


def test_the_answer_is_the_likeliest_token_each_time(opened):
    """Six tokens, each the likeliest in a pass over all before it, whatever the pieces that the text was read in."""
    model, ids = opened.model.eval(), [3, 1, 4, 1, 5, 9, 2, 6, 5]
    expected = list(ids)
    with torch.no_grad():
        for _ in range(6):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    for chunk in (1, 4, 9):
        found = yarn.answer(model, ids, 6, chunk)
        assert found == expected[9:], f"pieces of {chunk}: not what the model would say"


def test_a_key_counts_when_all_its_digits_are_right(opened, monkeypatch):
    """A reader that finds the key is right at all depths, one that gets the last digit wrong at none."""
    decode = opened.tokenizer.decode

    def perfect(model, ids, length, chunk, tick):
        return opened.tokenizer.encode(decode(ids).partition("The pass key is")[2][:length])

    monkeypatch.setattr(yarn, "answer", perfect)
    found = yarn.passkeys(None, opened.tokenizer, 600, [0.0, 0.5, 1.0], 8, None)
    assert found == {0.0: True, 0.5: True, 1.0: True}, "a right answer is not counted"
    off = {"0": "1"} | {digit: "0" for digit in "123456789"}
    monkeypatch.setattr(yarn, "answer", lambda *args: [
        *(right := perfect(*args))[:-1], *opened.tokenizer.encode(off[decode(right)[-1]])
    ])  # fmt: skip
    assert not any(yarn.passkeys(None, opened.tokenizer, 600, [0.0, 1.0], 8, None).values()), "four digits are not five"


def test_the_demo_runs(opened, text, out, monkeypatch, capsys):
    """Each kind of angles reads the text and looks for the keys; what does not fit is refused before the reading."""
    monkeypatch.setattr(yarn, "load", lambda name, dtype: opened)
    words = ["--corpus", str(text), "--step", "100", "--chunk", "64", "--depths", "0", "0.5"]
    yarn.main([*words, "--tokens", "450", "--lengths", "280", "420"])
    summary = json.loads((out / "yarn" / "summary.json").read_text("utf-8"))
    assert [row["angles"] for row in summary["rows"]] == ["plain", "interpolation 2x", "yarn 2x"]
    assert all(len(curve) == 29 for curve in summary["curves"].values()) and summary["trained"] == 300
    _, ids = yarn.text_of(str(text), opened.tokenizer, 450)
    assert opened.tokenizer.decode(ids) == text.read_text("utf-8")[10_800:11_250], "not the validation text"
    plain = math.exp(sum(losses_by_hand(opened.model, ids[:101])) / 100)
    assert summary["rows"][0]["to 100"] == pytest.approx(plain, rel=1e-4), "not the perplexity of the first 100"
    assert len({row["to 449"] for row in summary["rows"]}) == 3, "the kinds of angles read alike"
    shown = capsys.readouterr().out
    assert f"{plain:.3f}" in shown and "0 of 2" in shown and (out / "yarn" / "yarn.png").stat().st_size > 5000
    for flags, names in (
        (["--tokens", "601"], "room for 600"), (["--lengths", "595"], "room for 600"),
        (["--tokens", "1"], "--tokens 1"), (["--lengths", "90"], "--lengths 90"),
        (["--depths", "1.5"], "1.5"), (["--chunk", "0"], "--chunk 0"),
        (["--factor", "0.9", "--tokens", "100", "--lengths"], "0.9"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=names):
            yarn.main([*words, "--tokens", "450", "--lengths", "400", *flags])
    with pytest.raises(BadInput, match="1200 tokens, not 1201"):
        yarn.text_of(str(text), opened.tokenizer, 1201)
