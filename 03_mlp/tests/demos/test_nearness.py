"""The counts of the demo are right, and so is its book-keeping of what was seen."""

import json
import math
from collections import Counter

import pytest
import torch
from data import windows
from demos import nearness
from sample import load
from shared.errors import BadInput


def slowly(text: list[int], context: tuple, target: int, V: int) -> float:
    """Witten & Bell by dictionaries: P = (count + kinds P_shorter) / (total + kinds), from no context upwards."""
    span = len(context)
    p = 1 / V
    for k in range(span + 1):
        here = context[span - k:]
        after = Counter(text[i] for i in range(span, len(text)) if tuple(text[i - k:i]) == here)
        total, kinds = sum(after.values()), len(after)
        if total:
            p = (after[target] + kinds * p) / (total + kinds)
    return p


def test_counting_against_dictionaries():
    """Interpolated counts are those that dictionaries give, and the probabilities of all characters sum to one."""
    torch.manual_seed(0)
    train, val = torch.randint(4, (300,)), torch.randint(5, (40,))  # token 4 is never trained on
    (x, y), (val_x, val_y) = windows(train, 3), windows(val, 3)
    p, known, distinct = nearness.counting(x, y, val_x, val_y, 5)
    for i in range(len(val_y)):
        expected = slowly(train.tolist(), tuple(val_x[i].tolist()), val_y[i].item(), 5)
        assert p[i].item() == pytest.approx(expected, abs=1e-12), f"example {i}"
    whole = sum(nearness.counting(x, y, val_x, torch.full_like(val_y, token), 5)[0] for token in range(5))
    assert torch.allclose(whole, torch.ones_like(whole)), "P(. | x) must sum to one"
    contexts = {tuple(row) for row in x.tolist()}
    assert distinct == [len({row[3 - k:] for row in contexts}) for k in range(4)], "contexts counted twice"
    for i, row in enumerate(val_x.tolist()):
        longest = max(k for k in range(4) if k == 0 or tuple(row[3 - k:]) in {other[3 - k:] for other in contexts})
        assert known[i] == longest, "the longest part of the context that occurs, counted from its end"


def test_the_demo_compares_both(text, trained, out, capsys):
    """Both losses are means over the whole validation text: the shares of the rows weigh them back to the total."""
    nearness.main(["--corpus", str(text), "--run", "tiny"])
    summary = json.loads((out / "nearness" / "summary.json").read_text("utf-8"))
    for name in ("counts", "network", "mean of both"):
        weighed = sum(row["share"] * row[name] for row in summary["rows"])
        assert weighed == pytest.approx(summary[name], abs=1e-6), f"{name}: the rows do not add up to the total"
    model, vocab = load(trained / "model.pt")
    val = vocab.encode(text.read_text("utf-8")[10_800:])
    slow = []
    for i in range(8, len(val)):
        scores = model(val[None, i - 4:i])[0].double()
        slow.append((torch.logsumexp(scores, 0) - scores[val[i]]).item())
    assert summary["network"] == pytest.approx(math.fsum(slow) / len(slow), abs=1e-6), "the network's own loss"
    assert (out / "nearness" / "nearness.png").stat().st_size > 5000
    assert "mean of both" in capsys.readouterr().out


def test_another_text_is_refused(trained, tmp_path):
    """A run is compared on the text it was trained on, or not at all."""
    other = tmp_path / "other.txt"
    other.write_text("WHAT IS THIS? " * 50, encoding="utf-8")
    with pytest.raises(BadInput, match="trained on another text"):
        nearness.main(["--corpus", str(other), "--run", "tiny"])
    with pytest.raises(BadInput, match="no checkpoint"):
        nearness.main(["--run", "absent"])
