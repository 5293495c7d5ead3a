"""The figures show what the models say: coverage and losses by order, and the two bigrams."""

import json
import random

from shared.errors import BadInput

import pytest
import torch

from demos import figures
from model import ModelConfig, NGram
from tokenizer import CharTokenizer


def test_the_share_of_contexts_seen():
    """A context counts as seen if the training text has it, at any length."""
    x = torch.tensor([[0, 1], [1, 2], [2, 0]])
    model = NGram(ModelConfig(vocab_size=3, block_size=2)).fit(x, torch.tensor([2, 0, 1]))
    assert figures.seen(model, torch.tensor([[0, 1], [1, 0], [2, 0], [2, 2]])) == 0.5
    short = NGram(ModelConfig(vocab_size=3, block_size=1)).fit(x[:2], torch.tensor([2, 0]))
    assert figures.seen(short, torch.tensor([[0, 1], [1, 0], [2, 0], [2, 2]])) == 0.5, "of 1, 0, 0, 2 the text has 1, 2"


def test_the_picture_of_a_bigram_has_a_row_per_context():
    """In the picture a row is a context and its colours are the probabilities of what comes next."""
    model = NGram(ModelConfig(vocab_size=3, block_size=1, add_k=1e-9))
    model.fit(torch.tensor([[0], [0], [1], [2]]), torch.tensor([1, 2, 2, 2]))
    ax = figures.draw_bigrams({"counted": model}, CharTokenizer("abc"), torch.tensor([0, 2])).axes[0]
    drawn = ax.images[0].get_array().flatten().tolist()
    assert drawn == pytest.approx([0, 0.5, 0, 1], abs=1e-6), "rows and columns swapped, or another character's"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "c"]


def test_the_demo_draws_both_figures(tmp_path, monkeypatch, capsys):
    """The run writes two figures and a record in which the training loss falls with the order and coverage too."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    file = tmp_path / "text.txt"
    file.write_text(" ".join(random.Random(0).choices("the cat and a dog sat on mats then".split(), k=1500)), "utf-8")
    figures.main(["--corpus", str(file), "--max-order", "5", "--steps", "20", "--shown", "12"])
    folder = tmp_path / "out" / "figures"
    for name in ("bigram", "orders"):
        png = (folder / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) < 100_000
    rows = json.loads((folder / "summary.json").read_text("utf-8"))["orders"]
    assert [row["order"] for row in rows] == [1, 2, 3, 4, 5]
    losses, coverage = [row["add-k, train"] for row in rows], [row["seen"] for row in rows]
    assert losses == sorted(losses, reverse=True), "with more context the training text is better known by heart"
    assert coverage == sorted(coverage, reverse=True) and coverage[0] == 1, "longer contexts are seen more rarely"
    assert "total variation" in capsys.readouterr().out


@pytest.mark.parametrize("args", [["--max-order", "1"], ["--steps", "0"], ["--shown", "0"], ["--corpus", "nowhere"]])
def test_bad_arguments_are_refused(args):
    """What cannot be drawn is refused with the reason."""
    with pytest.raises(BadInput, match="must be at least|no corpus or file"):
        figures.main(args)
