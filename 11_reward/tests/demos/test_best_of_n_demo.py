"""Best of n: the mean over all subsets, the divergence, who learns from what, and what is chosen from."""

import argparse
import itertools
import json
import math
import random

from shared.errors import BadInput

import pytest
import torch

from demos import best_of_n
from demos.ablation import Scale
from demos.best_of_n import Sizes, Written, best_of

SCALE = Scale(steps=2, seeds=1, batch_size=4, pairs=44, test=18)


@pytest.fixture
def world(text, out, policy):
    return Written(policy, argparse.Namespace(policy="tiny", corpus=str(text), device="cpu"), SCALE, 1, Sizes(5, 9))


def test_the_mean_is_over_all_subsets():
    """For each n from 1 to 7, every subset of n of 7 answers is listed and the best by score is taken."""
    rng = torch.Generator().manual_seed(0)
    scores, values = torch.randn(3, 7, generator=rng), torch.rand(3, 7, generator=rng)
    for n in range(1, 8):
        chosen = [values[row, max(some, key=lambda i: scores[row, i])]
                  for row in range(3) for some in itertools.combinations(range(7), n)]
        assert best_of(n, scores, values) == pytest.approx(torch.stack(chosen).mean().item(), abs=1e-6), \
            f"n = {n}: not the mean over all subsets of n answers"
    assert best_of(1, scores, values) == pytest.approx(values.mean().item()), "one of one is any of them"
    assert best_of(7, scores, values) == pytest.approx(values[range(3), scores.argmax(1)].mean().item())
    curve = [best_of(n, scores, scores) for n in range(1, 8)]
    assert curve == sorted(curve), "the best score of more answers is lower"


def test_the_divergence():
    """For n = 4, the density of the best is 4 u^3 in the quantile u: the integral of 4 u^3 ln(4 u^3) is the KL."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = 4 * u**3
    assert best_of_n.divergence(4) == pytest.approx((density * density.log()).mean().item(), abs=1e-6)
    assert best_of_n.divergence(1) == 0, "one answer that is not chosen is the policy itself"


def test_who_learns_from_what(world):
    """The few pairs are some of all; deletions are right answers against the same without a letter."""
    every = world.training("good")
    assert len(every) == 44 and "sampled" in {each["kind"] for each in every}
    assert world.training("few pairs") == every[:9], "the weak judge has other pairs, or more"
    short = world.training("deletions")
    assert all(len(p["chosen"][0]["content"]) == len(p["rejected"][0]["content"]) + 1 for p in short) and short


def test_answers_and_their_scores(world, policy, monkeypatch):
    """Each of the n answers has its own score, equal ones the same; gold is exactly the right text."""
    assert len(world.answers) == 18 and {len(texts) for texts in world.answers} == {5}
    assert len({text for texts in world.answers for text in texts}) > 45, "answers are drawn, not the likeliest taken"
    rng = random.Random(2)
    right = [record["messages"][1]["content"] for record in world.test]
    world.answers = [[rng.choice((gold, gold + " ", gold[::-1] + "z", gold.swapcase() + "-")) for _ in range(5)]
                     for gold in right]
    asked = []

    def scores(opened, talks):
        asked.extend(talks)
        return torch.tensor([len(talk[0]["content"]) + 100.0 * sum(map(ord, talk[-1]["content"])) for talk in talks])

    monkeypatch.setattr(best_of_n.reward, "scores", scores)
    found = world.scores(policy)
    for i, texts in enumerate(world.answers):
        question = world.test[i]["messages"][0]["content"]
        assert found[i].tolist() == [len(question) + 100.0 * sum(map(ord, text)) for text in texts], "a wrong score"
        assert world.gold[i].tolist() == [float(text == right[i]) for text in texts], "gold is not the exact match"
    assert len(asked) == sum(len({*texts}) for texts in world.answers), "equal answers are scored more than once"
    assert 0 < world.gold.mean() < 1


def test_the_demo_runs(flags, out, capsys):
    """A row for each power of two, proxies that rise from 0, a figure; runs are made once; nonsense is refused."""
    argv = [*flags, "--most", "6", "--few", "5"]
    best_of_n.main(argv)
    summary = json.loads((out / "best_of_n" / "summary.json").read_text("utf-8"))
    rows = summary["rows"]
    assert [row["n"] for row in rows] == [1, 2, 4] and [row["KL"] for row in rows][:2] == [0, math.log(2) - 0.5]
    for judge in best_of_n.JUDGES:
        proxy = [row[f"{judge}: proxy"] for row in rows]
        assert proxy[0] == pytest.approx(0, abs=1e-4) and proxy == sorted(proxy), "the proxy is not from the mean score"
        assert all(0 <= row[f"{judge}: gold"] <= row["any right"] <= 1 for row in rows), "better than the best there is"
        assert 0 <= summary["pairs"][judge] <= 1
    [kept] = (out / "best_of_n").glob("runs-*.json")
    before = kept.read_bytes()
    best_of_n.main(argv)
    assert kept.read_bytes() == before and (out / "best_of_n" / "best_of_n.png").stat().st_size > 5000
    assert "gold is highest" in capsys.readouterr().out
    for flag, value in (("--most", "0"), ("--few", "2"), ("--few", "49"), ("--policy", "nowhere")):
        with pytest.raises(BadInput):
            best_of_n.main([*argv, flag, value])
