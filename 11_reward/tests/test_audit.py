"""Checkpoints of the audit: each check against numbers worked by hand, and against judges that are known to be bad."""

import json
import math
import random

from shared.errors import BadInput

import judges
import numpy as np
import pytest
import torch
from judges import TALKS, talk

import audit as script
import preferences
import reward
import tasks
from audit import (
    CHANGES,
    calibration,
    calibration_error,
    changed,
    coin,
    length_rule,
    main,
    padding_error,
    potential_terms,
    sensitivity,
    shaping,
)
from preferences import pair
from reward import RewardConfig, RewardModel

ASKED = talk("a", "-")[:1]


def sized(*sizes: tuple[int, int]) -> list[dict]:
    """Pairs whose better and worse answer have these many letters."""
    return [pair(ASKED, "x" * a, "y" * b) for a, b in sizes]


def test_a_ruler_by_hand():
    """The ruler takes what is more frequent in training, longer or shorter answers, and equal ones are half right."""
    longer, shorter = sized((5, 3), (4, 2), (1, 2)), sized((1, 2), (3, 3), (2, 4))
    test = sized((3, 2), (7, 1), (2, 2), (1, 6))  # two longer, one equal, one shorter
    assert length_rule(longer, test) == ("longer", 0.625), "in training the longer answer is better in 2 of 3 pairs"
    assert length_rule(shorter, test) == ("shorter", 0.375), "in training the shorter one is better: 1.5 of 4 in test"
    asked = [{**each, "prompt": talk("a very long question " * (i + 1), "-")[:1]} for i, each in enumerate(test)]
    assert length_rule(longer, asked) == ("longer", 0.625), "the prompt is measured as well"


def test_a_set_of_deletions_teaches_length():
    """On deletions alone the ruler is right in every pair; on insertions it is then always wrong: a bias is seen."""
    records = [{"messages": talk("a", word)} for word in ("love", "some", "word", "winter", "fields")]
    deletions, insertions, swaps = (preferences.corrupted(records, (kind,)) for kind in ("delete", "insert", "swap"))
    assert length_rule(deletions, deletions) == ("longer", 1.0), "whoever prefers longer answers is always right here"
    assert length_rule(deletions, insertions) == ("longer", 0.0), "what it likes is wrong here"
    assert length_rule(insertions, insertions) == ("shorter", 1.0), "a set that teaches short answers goes unnoticed"
    assert length_rule(deletions + insertions, swaps)[1] == 0.5, "where lengths are equal a ruler knows nothing"


@pytest.mark.parametrize(("n", "bins"), [(40, 8), (43, 8), (7, 3), (5, 8)])
def test_calibration_is_counted(n, bins):
    """Rows of equally many pairs, the least sure first: the mean of sigmoid(|difference|), and the share ranked right.
    """
    torch.manual_seed(n)
    chosen, rejected = torch.randn(n) * 2, torch.randn(n) * 2
    chosen[3] = rejected[3]  # a tie: half sure, and half right
    rows = calibration(chosen, rejected, bins)
    d = (chosen - rejected).double().numpy()
    order, size = np.argsort(np.abs(d)), math.ceil(n / bins)
    parts = [order[i:i + size] for i in range(0, n, size)]
    assert [row["pairs"] for row in rows] == [len(part) for part in parts], "rows of other sizes"
    for row, part in zip(rows, parts, strict=True):
        sure = np.mean([1 / (1 + math.exp(-abs(x))) for x in d[part]])
        right = np.mean([1.0 if x > 0 else 0.5 if x == 0 else 0.0 for x in d[part]])
        assert row["sure"] == pytest.approx(sure, rel=1e-5), "how sure is the model? sigmoid of the difference's size"
        assert row["right"] == pytest.approx(right), "how often is it right?"
        assert row["low"] <= row["right"] <= row["high"], "the interval is of another row"
    assert [row["sure"] for row in rows] == sorted(row["sure"] for row in rows), "the least sure come first"
    far = sum(len(part) * abs(row["sure"] - row["right"]) for row, part in zip(rows, parts, strict=True)) / n
    assert calibration_error(rows) == pytest.approx(far), "the mean distance weighs each row by its pairs"


def test_honest_and_boastful_judges():
    """Labels drawn with the judge's own probabilities: it is calibrated; scores five times as large are not."""
    torch.manual_seed(0)
    d = torch.randn(20_000) * 1.5
    sign = torch.where(torch.rand(20_000) < d.abs().sigmoid(), 1.0, -1.0)
    honest = d.abs() * sign
    assert calibration_error(calibration(honest, torch.zeros_like(d))) < 0.015, "sure and right are the same here"
    assert calibration_error(calibration(5 * honest, torch.zeros_like(d))) > 0.15, "a boast goes unnoticed"


def test_calibration_error_by_hand():
    """Naeini's error: 0.1 in 30 pairs and 0.4 in 10 make (3 + 4) / 40."""
    rows = [{"pairs": 30, "sure": 0.7, "right": 0.8}, {"pairs": 10, "sure": 0.9, "right": 0.5}]
    assert calibration_error(rows) == pytest.approx(0.175), "weighted by pairs, whichever is higher"


def test_answers_are_changed_on_the_named_sides():
    """A change reaches the answers of the named sides, and nothing else of the pairs."""
    made = [pair(talk("say b", "-")[:1], "good", "bad", kind="swap")]
    [found] = changed(made, str.upper)
    assert found == pair(talk("say b", "-")[:1], "GOOD", "BAD", kind="swap"), "the prompt is changed, or a side is not"
    [found] = changed(made, lambda text: text + ".", ("rejected",))
    assert found == pair(talk("say b", "-")[:1], "good", "bad.", kind="swap"), "another side than was named"
    assert made[0]["chosen"][0]["content"] == "good", "the pairs that were given are changed"
    done = {name: change("so") for name, change in CHANGES.items()}
    assert done == {"upper case": "SO", "a full stop": "so.", "'indeed'": "so indeed", "said twice": "so so"}


def by_rule(rule):
    """In place of `reward.score_pairs`: scores by a rule on the text of the answer."""
    def score_pairs(opened, made):
        return tuple(torch.tensor([float(rule(each[side][0]["content"])) for each in made])
                     for side in ("chosen", "rejected"))  # fmt: skip

    return score_pairs


def test_sensitivity_by_hand(monkeypatch):
    """For each change: how far scores move, the pairs still ranked right, and what it buys the worse answer of them."""
    made = [pair(ASKED, "abcdef", "abc"), pair(ASKED, "ab", "a"), pair(ASKED, "abcd", "abcdefg")]
    monkeypatch.setattr(reward, "score_pairs", by_rule(len))  # a judge that is a ruler: right in two of three
    rows = {row["change"]: row for row in sensitivity(None, made)}
    assert [*rows] == ["none", *CHANGES], "a change is missing"
    lengths = np.array([6, 2, 4, 3, 1, 7.0])
    spread = lengths.std(ddof=1)
    right = {"none": (0, 2 / 3, 0), "upper case": (0, 2 / 3, 0), "a full stop": (1 / spread, 2 / 3, 0)}
    # One letter more makes "a" as long as "ab": no pair is bought. " indeed" is 7 letters: both are.
    right |= {"'indeed'": (7 / spread, 2 / 3, 1), "said twice": ((lengths + 1).mean() / spread, 2 / 3, 1)}
    for name, (moved, kept, bought) in right.items():
        row = rows[name]
        assert row["moved"] == pytest.approx(moved, rel=1e-5), f"{name}: how far scores move, in units of their spread"
        assert row["right"] == pytest.approx(kept), f"{name}: the share ranked right where both answers are changed"
        assert row["bought"] == pytest.approx(bought), f"{name}: of pairs ranked right, the worse answer is changed"

    monkeypatch.setattr(reward, "score_pairs", by_rule(lambda text: -len(text) if "." in text else text.count("b")))
    rows = {row["change"]: row for row in sensitivity(None, made)}
    stop = rows["a full stop"]
    assert stop["right"] == pytest.approx(1 / 3) and stop["bought"] == 0, "here a full stop costs, and buys nothing"
    assert rows["none"]["right"] == pytest.approx((0.5 + 1 + 0.5) / 3), "a tie is half right, and cannot be bought"
    monkeypatch.setattr(reward, "score_pairs", by_rule(lambda text: -len(text.strip("."))))
    rows = {row["change"]: row for row in sensitivity(None, made[:2])}
    assert rows["a full stop"]["bought"] == 0, "of no pair that is ranked right, none is bought"


def test_padding_that_is_read_is_found():
    """The padding check is silent for an honest judge, and loud for one that reads the last column."""
    opened, made = judges.judge(), judges.pairs(5)
    assert padding_error(opened, made) < 1e-5, "padding moves a score of an honest judge"
    opened.model.train()
    assert padding_error(opened, made) < 1e-5 and opened.model.training, "the mode is not as it was found"

    class Careless(RewardModel):
        def forward(self, ids, lengths):
            return super().forward(ids, torch.full_like(lengths, ids.shape[1]))

    opened.model.__class__ = Careless
    assert padding_error(opened, made) > 0.01, "a judge that reads the padding goes unnoticed"


def nonsense(n: int, seed: int) -> list[dict]:
    """Pairs of two random answers, of which none is better."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(3 * n)]
    return [pair(talk(texts[i], "-")[:1], texts[i + 1], texts[i + 2]) for i in range(0, 3 * n, 3)]


def test_coins_teach_nothing(monkeypatch):
    """Half of the labels are turned before a fresh judge learns them, and it is then right in half of the pairs."""
    policy, seen, real = judges.policy(dtype=torch.float32), [], reward.fit

    def watch(model, rows, config):
        seen.append((model.head.weight.abs().max().item(), rows, config))
        return real(model, rows, config)

    monkeypatch.setattr(reward, "fit", watch)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    training, config = nonsense(48, 1), RewardConfig(steps=6, batch_size=16, warmup=0, lr=0.01, both_ways=True)
    right = coin(policy, training, nonsense(150, 2), config)
    assert 0.38 < right < 0.62, f"trained on coins, a judge ranks {right:.2f} of the pairs right"
    [(head, rows, told)] = seen
    assert head == 0 and told is config, "it does not begin anew, or learns by another recipe"
    true = reward.encode(policy, [t for each in training for t in preferences.both(each)])
    turned = [(a, b) != two for a, b, two in zip(true[0::2], true[1::2], rows, strict=True)]
    assert sum(turned) == 24, f"{sum(turned)} of 48 labels are the wrong way round: no fair coin"
    assert all(torch.equal(t, before[n]) for n, t in policy.model.state_dict().items()), "the policy was trained"


def test_coins_do_not_undo_the_noise(monkeypatch):
    """Where a quarter of the pairs is the wrong way round, coins leave a half of them so: they are another draw."""
    policy, seen, training = judges.policy(dtype=torch.float32), [], nonsense(400, 1)
    monkeypatch.setattr(reward, "fit", lambda model, rows, config: seen.append(rows) or iter(()))
    config = RewardConfig(steps=1)
    coin(policy, preferences.flip(training, 0.25, config.seed), nonsense(2, 2), config)
    true = reward.encode(policy, [t for each in training for t in preferences.both(each)])
    wrong = sum((a, b) != two for a, b, two in zip(true[0::2], true[1::2], seen[0], strict=True)) / 400
    assert 0.42 < wrong < 0.58, f"{wrong:.0%} of the labels are wrong: the coins turn the same pairs as the noise did"


@pytest.mark.parametrize("kind", [{}, {"window": 5}, {"nope_every": 2}], ids=str)
def test_potentials_telescope(kind):
    """A term for each token of the answer: the score after it less that before; their sum is 0 less the prompt's."""
    opened = judges.judge(**kind)
    for conversation in TALKS:
        [ids] = reward.encode(opened, [conversation])
        asked = conversation[:-1]
        start = ids.index(opened.tokenizer.special["<|assistant|>"], -len(conversation[-1]["content"]) - 2) + 1
        with torch.no_grad():  # each beginning of the text alone
            heads = [opened.model(torch.tensor([ids[:i]]), torch.tensor([i])).item() for i in range(start, len(ids))]
        heads.append(0.0)  # once the answer is over
        terms = potential_terms(opened, conversation)
        letters = len(conversation[-1]["content"])
        assert len(terms) == len(ids) - start == letters + 1, "a term for each token of the answer, its end included"
        assert np.allclose(terms, np.diff(heads), atol=1e-9), f"{asked}: not potential(after) - potential(before)"
        assert terms.sum().item() == pytest.approx(-heads[0], abs=1e-9), "the sum depends on more than the prompt"


def test_what_keeps_the_order_and_what_does_not():
    """A term of the prompt and a potential keep the order of every pair; a bonus for length does not."""
    opened, made = judges.judge(), judges.pairs(40)
    rows = {row["added"]: row["order kept"] for row in shaping(opened, made)}
    assert rows["a term of the prompt"] == 1, "what both answers get changes their order"
    assert rows["a potential"] == 1, "a potential that is 0 at the end changes an order"
    chosen, rejected = reward.score_pairs(opened, made)
    letters = torch.tensor([[len(each[side][0]["content"]) for side in ("chosen", "rejected")] for each in made])
    more = 3 * chosen.std() * (letters[:, 0] - letters[:, 1])
    kept = ((chosen - rejected + more > 0) == (chosen > rejected)).float().mean().item()
    assert rows["a bonus for each letter"] == pytest.approx(kept) and kept < 0.9, "three spreads for each letter"


def test_shaping_adds_something():
    """What keeps every order is no term of 0: prompts have different scores, and potentials different sums."""
    opened, made = judges.judge(), judges.pairs(12)
    asked = reward.scores(opened, [each["prompt"] for each in made])
    sums = torch.tensor([potential_terms(opened, each["prompt"] + each["chosen"]).sum().item() for each in made])
    other = torch.tensor([potential_terms(opened, each["prompt"] + each["rejected"]).sum().item() for each in made])
    assert asked.std() > 0.05 and sums.std() > 0.05, "nothing is added"
    assert (sums - other).abs().max() < 1e-9, "two answers to one prompt get different sums"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function: a judge trained for a few steps on a file, then the audit of it -> the folder of the audit."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("STAGES_FROM", str(tmp_path))
    judges.write(tmp_path / "out", "tiny", judges.policy(dtype=torch.float32, block_size=72))
    made = [pair(talk(a, "-")[:1], f"{a}{b}a", f"{b}{a}oo") for a in "bcdfghjkvwxyz" for b in "lmnpqrst"]
    (tmp_path / "pairs.jsonl").write_text(tasks.dumps(made), encoding="utf-8")
    monkeypatch.setattr(reward, "draw", lambda *args: None)
    reward.main(["--policy", "tiny", "--device", "cpu", "--data", "pairs.jsonl", "--steps", "10", "--batch-size", "8",
                 "--warmup", "1", "--lr", "0.02", "--name", "mine"])  # fmt: skip

    def audit(*words):
        assert main(["--device", "cpu", "--name", "mine", "--steps", "2", "--count", "5", *words]) is None
        return tmp_path / "out" / "mine-audit"

    return audit


def test_the_script_audits_a_run(run, capsys):
    """`audit.py` opens a run and the pairs it was trained on, makes all six checks and writes what it found."""
    folder = run("--noise", "0.25")
    summary, said = json.loads((folder / "summary.json").read_text("utf-8")), " ".join(capsys.readouterr().out.split())
    [row] = summary["pairs"]
    opened = reward.load(folder.with_name("mine") / "model.pt")
    test = preferences.split_by_prompt(preferences.read_pairs("pairs.jsonl"), seed=1337)[1]
    chosen, rejected = reward.score_pairs(opened, test)
    assert row["right"] == pytest.approx(reward.accuracy(chosen, rejected)), "of other pairs, or another judge"
    assert row["low"] <= row["right"] <= row["high"] and row["ceiling"] == 0.75, "a quarter of the labels is wrong"
    flipped = reward.accuracy(*reward.score_pairs(opened, preferences.flip(test, 0.25)))
    assert row["of noisy labels"] == pytest.approx(flipped), "of labels of which a quarter is wrong"
    assert row["always the shorter"] == 1.0, "in this set the shorter answer is always the better, and it is not said"
    assert 0 <= summary["coins"] <= 1, "what coins teach is not told"
    error = calibration_error(calibration(chosen, rejected))
    assert summary["calibration_error"] == pytest.approx(error, rel=1e-5), "of other pairs than the held-out ones"
    assert [each["change"] for each in summary["changes"]] == ["none", *CHANGES], "a change was not tried"
    kept = {each["added"]: each["order kept"] for each in summary["shaping"]}
    assert kept["a potential"] == kept["a term of the prompt"] == 1, "what may be added changes an order"
    turned = f"{1 - reward.accuracy(chosen, rejected):.3f}, where it was {reward.accuracy(chosen, rejected):.3f}"
    assert f"with every pair the wrong way round: {turned}" in said, "swapped pairs have to flip the result"
    assert "padding moves a score by at most" in said and (folder / "audit.png").is_file(), "a check is missing"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--noise", "0.6"], "from 0 to 0.5"), (["--noise", "-0.1"], "from 0 to 0.5"), (["--steps", "0"], "at least 1"),
        (["--count", "0"], "at least 1"), (["--name", "nowhere"], "nowhere"), (["--name", "tiny"], "no reward model"),
    ],
    ids=str,
)  # fmt: skip
def test_the_script_refuses_bad_input(words, message, tmp_path, monkeypatch):
    """A wrong value, a run that is not there and one that is no judge are refused in one line."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    judges.write(tmp_path, "tiny", judges.policy(dtype=torch.float32))
    with pytest.raises(BadInput, match=message) as refused:
        main(["--device", "cpu", *words])
    assert "\n" not in str(refused.value), "one line"
    assert not list(tmp_path.glob("*-audit")), "the record of an audit that was refused is left behind"


def test_the_figure_is_drawn_from_the_rows():
    """The figure shows how sure and how right, and for each change what it buys."""
    seen = []

    class Log:
        def figure(self, figure, name):
            seen.append((figure, name))

    found = [{"sure": 0.6, "right": 0.5, "low": 0.3, "high": 0.7}, {"sure": 0.9, "right": 0.8, "low": 0.7, "high": 1.0}]
    moved = [{"change": "none", "bought": 0.0}, {"change": "a full stop", "bought": 0.25}]
    script.draw(found, moved, Log())
    [(figure, name)] = seen
    left, right = figure.axes
    points = left.containers[0].lines[0].get_xydata().tolist()
    assert name == "audit" and points == [[0.6, 0.5], [0.9, 0.8]], "other points than how sure and how right"
    assert [bar.get_width() for bar in right.patches] == [0.25], "the row without a change is no change"
