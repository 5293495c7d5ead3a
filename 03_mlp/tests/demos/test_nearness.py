"""The counts of the demo are right, and so is its book-keeping of what was seen."""

import json
import math
from collections import Counter

from shared.errors import BadInput

import pytest
import torch

from checkpoint import load, save
from data import windows
from demos import nearness
from model import MLP, ModelConfig
from tokenizer import CharTokenizer


def slowly(text: list[int], contexts, targets, V: int, longest: int) -> list[float]:
    """Modified Kneser-Ney by dictionaries, Chen & Goodman (1998), eq. 22 to 26, shorter orders by continuations."""
    tables = {longest + 1: Counter(tuple(text[i - longest:i + 1]) for i in range(longest, len(text)))}
    for n in range(longest, 0, -1):
        tables[n] = Counter(gram[1:] for gram in tables[n + 1])  # distinct characters before it
    answers = []
    for context, target in zip(contexts, targets, strict=True):
        p = 1 / V
        for n in range(1, longest + 2):
            here, table = tuple(context[len(context) - n + 1:]), tables[n]
            times = Counter(table.values())
            if all(times[i] for i in (1, 2, 3, 4)):
                Y = times[1] / (times[1] + 2 * times[2])
                D = [0] + [max(i - (i + 1) * Y * times[i + 1] / times[i], 0) for i in (1, 2, 3)]
            else:
                D = [0, 0.5, 1, 1.5]
            after = {gram[-1]: count for gram, count in table.items() if gram[:-1] == here}
            total = sum(after.values())
            if total:
                freed = sum(D[min(count, 3)] for count in after.values())
                count = after.get(target, 0)
                p = (count - D[min(count, 3)] + freed * p) / total
        answers.append(p)
    return answers


def test_counting_against_dictionaries():
    """The counts are Kneser-Ney's, as dictionaries give them, and the probabilities of all characters sum to one."""
    torch.manual_seed(0)
    # Uneven letters, so that n-grams occur once, twice, three and four times; token 4 is never trained on.
    train, val = torch.multinomial(torch.tensor([8.0, 4, 2, 1]), 300, replacement=True), torch.randint(5, (40,))
    (x, y), (val_x, val_y) = windows(train, 3), windows(val, 3)
    p = nearness.kneser_ney(x, y, val_x, val_y, 5)
    expected = slowly(train.tolist(), val_x.tolist(), val_y.tolist(), 5, 3)
    assert p.tolist() == pytest.approx(expected, abs=1e-12), "not what dictionaries give"
    whole = sum(nearness.kneser_ney(x, y, val_x, torch.full_like(val_y, token), 5) for token in range(5))
    assert torch.allclose(whole, torch.ones_like(whole)), "P(. | x) must sum to one"


def test_familiarity_against_sets():
    """What is known of a context is its longest end that occurs in a training context; contexts are counted once."""
    torch.manual_seed(0)
    x, val_x = windows(torch.randint(4, (60,)), 3)[0], windows(torch.randint(5, (40,)), 3)[0]
    known, distinct = nearness.familiarity(x, val_x, 5)
    contexts = {tuple(row) for row in x.tolist()}
    assert distinct == [len({row[3 - k:] for row in contexts}) for k in range(4)], "contexts counted twice"
    for i, row in enumerate(val_x.tolist()):
        longest = max(k for k in range(4) if tuple(row[3 - k:]) in {other[3 - k:] for other in contexts})
        assert known[i] == longest, "the longest part of the context that occurs, counted from its end"


def test_the_demo_compares_both(text, trained, out, capsys):
    """Both losses are means over the whole validation text: the shares of the rows weigh them back to the total."""
    nearness.main(["--corpus", str(text), "--run", "tiny"])
    summary = json.loads((out / "nearness" / "summary.json").read_text("utf-8"))
    for name in ("counts", "network", "mean of both"):
        weighed = sum(row["share"] * row[name] for row in summary["rows"])
        assert weighed == pytest.approx(summary[name], abs=1e-6), f"{name}: the rows do not add up to the total"
    model, tokenizer = load(trained / "model.pt")
    val = torch.tensor(tokenizer.encode(text.read_text("utf-8")[10_800:]))
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


def test_too_many_characters_are_refused(out, tmp_path):
    """A text with so many different characters that a piece does not fit into 64 bits is refused, not counted wrong."""
    chars = "".join(chr(0x4E00 + i) for i in range(235))  # 234 ** 8 fits into 63 bits, 235 ** 8 does not
    text = tmp_path / "signs.txt"
    text.write_text(chars * 2, encoding="utf-8")
    (out / "signs").mkdir(parents=True)
    save(out / "signs" / "model.pt", MLP(ModelConfig(len(chars), n_hidden=1)), CharTokenizer(chars))
    with pytest.raises(BadInput, match="234 at the most"):
        nearness.main(["--corpus", str(text), "--run", "signs"])
    assert not (out / "nearness").exists(), "what is refused leaves no folder"


def test_the_least_known_contexts_are_one_case():
    """Few contexts are hardly known at all: they are counted together until they are a tenth of the text."""
    known = torch.tensor([1, 2, 2, 2] + [4] * 5 + [8] * 31)  # 2.5 % and 10 % up to 1 and up to 2
    masks = nearness.cases(known)
    assert {name: mask.sum().item() for name, mask in masks.items()} == {"up to 2": 4, "4": 5, "8 or more": 31}
    assert sum(masks.values()).tolist() == [1] * len(known), "each character belongs to one case"
