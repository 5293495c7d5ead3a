"""Each variant leaves out one idea of Kneser-Ney and nothing else, and stays a probability."""

import json
import random
from collections import Counter

from shared.errors import BadInput

import pytest
import torch

from demos import smoothing
from model import KneserNey, ModelConfig

V = 6


def examples():
    rng = random.Random(0)
    text = [rng.choice([0, 1, 2])]
    for _ in range(600):
        text.append(rng.choices(range(V), weights=[text[-1] == i or i < 3 for i in range(V)])[0])
    rows = torch.tensor(text).unfold(0, 3, 1)
    return rows[:, :-1], rows[:, -1]


@pytest.mark.parametrize("name", list(smoothing.VARIANTS))
def test_every_variant_is_a_probability(name):
    """Whatever is left out of Kneser-Ney, what is taken from the counts is given back: probabilities sum to one."""
    model = smoothing.VARIANTS[name](ModelConfig(vocab_size=V, block_size=2)).fit(*examples())
    contexts = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    assert torch.allclose(model.probs(contexts).sum(1), torch.ones(V * V, dtype=torch.double), atol=1e-12)


def test_raw_counts_count_occurrences():
    """Without continuation counts a shorter context counts how often, not after how many different tokens."""
    x, y = examples()
    levels = smoothing.RawCounts(ModelConfig(vocab_size=V, block_size=2)).fit(x, y).levels
    pairs = Counter(zip(x[:, 1].tolist(), y.tolist(), strict=True))
    totals = Counter(a for a, _ in pairs.elements())
    assert dict(zip(levels[1].contexts.tolist(), levels[1].totals.tolist(), strict=True)) == totals
    top = KneserNey(ModelConfig(vocab_size=V, block_size=2)).fit(x, y).levels[2]
    assert torch.equal(levels[2].kept, top.kept), "the longest context counts occurrences with and without the idea"


def test_one_discount_takes_the_same_from_all():
    """With one discount, n1 / (n1 + 2 n2), every count loses that, and a context frees it once per different token."""
    model = smoothing.OneDiscount(ModelConfig(vocab_size=V, block_size=1))
    # contexts 0, 1, 2 with counts (1, 1, 2), (1, 5), (2): n1 = 3, n2 = 2, so the discount is 3/7
    keys, counts = torch.tensor([0, 1, 2, 6, 7, 12]), torch.tensor([1, 1, 2, 1, 5, 2])
    level = model.level(keys, counts)
    assert level.kept.tolist() == pytest.approx([count - 3 / 7 for count in (1, 1, 2, 1, 5, 2)])
    assert level.freed.tolist() == pytest.approx([9 / 7, 6 / 7, 3 / 7]) and level.totals.tolist() == [4, 6, 2]


def test_the_demo_compares_the_variants(tmp_path, monkeypatch, capsys):
    """The run prints a table, draws a figure, and leaves a record."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    file = tmp_path / "text.txt"
    file.write_text(" ".join(random.Random(0).choices("the cat and a dog sat on mats then".split(), k=1500)), "utf-8")
    smoothing.main(["--corpus", str(file), "--max-order", "3"])
    rows = json.loads((tmp_path / "out" / "smoothing" / "summary.json").read_text("utf-8"))["orders"]
    assert [row["order"] for row in rows] == [2, 3] and all(set(row) == {"order", *smoothing.VARIANTS} for row in rows)
    assert (tmp_path / "out" / "smoothing" / "smoothing.png").read_bytes().startswith(b"\x89PNG")
    assert f"{rows[1]['add-k']:.3f}" in capsys.readouterr().out
    with pytest.raises(BadInput, match="max_order is 1"):
        smoothing.main(["--max-order", "1"])
