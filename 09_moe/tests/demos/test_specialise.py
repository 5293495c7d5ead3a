"""What experts specialise in: counts and information worked by hand, and a null that finds what is no merit."""

import json

from shared.errors import BadInput

import pytest
import torch

from checkpoint import save
from data import load_data
from demos import specialise
from model import GPT, ModelConfig
from tokenizer import CharTokenizer

SIZES = {"block_size": 16, "n_embd": 24, "n_head": 2, "n_layer": 3, "n_expert": 4, "n_active": 2, "expert_hidden": 8,
         "first_dense": 1}  # fmt: skip


def test_information_is_worked_by_hand():
    """Nothing where both are independent, all where a token has its own expert, and a half where half is known."""
    assert specialise.told(torch.tensor([[5, 0], [0, 5]])) == pytest.approx(1)
    assert specialise.told(torch.tensor([[2, 4], [3, 6]])) == pytest.approx(0, abs=1e-12)
    # Four experts, equally often, 2 bits. A token leaves two of them, 1 bit.
    assert specialise.told(torch.tensor([[3, 3, 0, 0], [0, 0, 3, 3]])) == pytest.approx(0.5)
    assert specialise.told(torch.tensor([[3, 0], [4, 0]])) == 0, "one expert for all: there is nothing to tell"


def test_counts_and_favourites_are_worked_by_hand():
    """Each choice of a position counts for the token that it read; favourites come more often than on the whole."""
    tokens, chosen = torch.tensor([0, 2, 2, 0]), torch.tensor([[0, 1], [2, 1], [2, 0], [0, 1]])
    counts = specialise.joint(tokens, chosen, n_token=3, n_expert=3)
    assert counts.tolist() == [[2, 2, 0], [0, 0, 0], [1, 1, 2]]
    ratio = specialise.lift(counts)
    assert torch.allclose(ratio, torch.tensor([[4 / 3, 4 / 3, 0], [1, 1, 1], [2 / 3, 2 / 3, 2]])), \
        "P(expert | token) / P(expert): 1/2 to 3/8, 1/4 to 3/8, 1/2 to 1/4"
    assert specialise.favourites(counts, ["a", "b", "c"]) == ["a", "a", "c"]
    kinds = [specialise.kind(text) for text in ("e", "t", "Th", " ", "\n", " o", ",", "7", "\n\n")]
    assert kinds == ["vowel", "consonant", "capital", "space", "line end", "vowel", "mark", "other", "line end"]


def test_choices_are_those_of_the_layers():
    """What is counted is what the model does, biases included; a random router sees the same vectors."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(29, **SIZES))
    layer = model.blocks[2].ffn
    layer.bias += torch.tensor([0.0, 5.0, 0.0, 0.0])  # all positions choose expert 1, and another one
    data, seen = torch.randint(29, (16 * 5 + 1,)), []
    layer.route, route = lambda *args: seen.append(route(*args)) or seen[-1], layer.route
    read, after, layers = specialise.watch(model, data, draws=2, rows=2)
    assert read.tolist() == data[:80].tolist() and after.tolist() == data[1:].tolist()
    assert [i for i, *_ in layers] == [2, 3], "the first layer is dense"
    _, own, drawn = layers[1]
    assert torch.equal(own, torch.cat([chosen for chosen, _ in seen])), "other experts than the model's own choice"
    assert len(drawn) == 2 and own.shape == drawn[0].shape == (80, 2)
    assert (own == 1).any(1).all() and not (drawn[0] == 1).any(1).all(), "a random router has no learned biases"
    assert not torch.equal(drawn[0], drawn[1])
    assert model.training and not layer._forward_pre_hooks, "the model is left as it was found"


def test_the_null_shows_what_is_no_merit(text, out, capsys):
    """An untrained model shows as much as random routers and more than shuffled choices; dense runs are refused."""
    data = load_data(str(text))
    for name, more in (("quick", {}), ("dense", {"n_expert": 0})):
        torch.manual_seed(0)
        model = GPT(ModelConfig(len(data.tokenizer), **SIZES | more))
        (out / name).mkdir(parents=True)
        save(out / name / "model.pt", model, data.tokenizer, optimizer={}, args={"corpus": str(text)}, step=1,
             seconds=1.0)
    specialise.main(["--name", "quick", "--draws", "3"])
    summary = json.loads((out / "specialise" / "summary.json").read_text("utf-8"))
    assert [row["layer"] for row in summary["rows"]] == [2, 3] and len(summary["favourites"]["2"]) == 4
    for row in summary["rows"]:
        assert row["read, shuffled"] < 0.05, "choices that were shuffled tell nothing"
        assert row["read, random router"] > 3 * row["read, shuffled"], "equal characters have similar vectors"
        assert row["read"] == pytest.approx(row["read, random router"], abs=0.35), "this router is random itself"
        assert row["read"] > row["next"], "an untrained model knows what it read, and not what comes"
    assert (out / "specialise" / "experts.png").stat().st_size > 5000 and "layer 3" in capsys.readouterr().out
    for words, reason in ((["--name", "dense"], "no experts"), (["--name", "none"], "train first"),
                          (["--draws", "0"], "--draws 0"), (["--name", "quick", "--tokens", "3"], "window")):
        with pytest.raises(BadInput, match=reason):
            specialise.main(words)


def test_a_token_of_another_text_is_refused(text, out):
    """A text with characters that the run's tokenizer lacks is one line."""
    (out / "default").mkdir(parents=True)
    save(out / "default" / "model.pt", GPT(ModelConfig(3, **SIZES)), CharTokenizer("abc"), optimizer={}, args={},
         step=1, seconds=1.0)
    with pytest.raises(BadInput):
        specialise.main(["--corpus", str(text)])
