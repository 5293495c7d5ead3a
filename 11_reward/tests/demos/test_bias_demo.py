"""The biased set: what is learned from, how length is found out, and what stands in the table."""

import argparse
import json
import random

from shared.errors import BadInput

import pytest
import torch

from demos import bias
from demos.ablation import Scale, World
from preferences import KINDS, pair

SCALE = Scale(steps=2, seeds=1, batch_size=4, pairs=110, test=36)


@pytest.fixture
def world(text, out, policy):
    return World(policy, argparse.Namespace(policy="tiny", corpus=str(text), device="cpu"), SCALE, 0)


def test_the_sets_differ_in_kinds_alone(world):
    """Equally many pairs; in the first all rejected answers are shorter, in the second half of them."""
    made = bias.pairs(world)
    assert len({len(some) for some in made.values()}) == 1, "more pairs may be why a set is better"
    kinds = [{each["kind"] for each in some} for some in made.values()]
    assert kinds == [{"delete"}, {"delete", "insert"}, {*KINDS}]
    shorter = [[len(each["rejected"][0]["content"]) < len(each["chosen"][0]["content"]) for each in some]
               for some in made.values()]
    assert all(shorter[0]) and 0.35 < sum(shorter[1]) / len(shorter[1]) < 0.65, "the cure is balance"


def test_letters_too_many_and_too_few():
    """So many letters come or go, and those that were there keep their order."""
    rng = random.Random(0)

    def inside(small, large):
        letters = iter(large)
        return all(letter in letters for letter in small)

    for change in range(-3, 4):
        text = bias.resized("advice", change, rng)
        assert len(text) == 6 + change and inside(min(text, "advice", key=len), max(text, "advice", key=len)), text
    assert bias.resized("advice", 0, rng) == "advice", "the right answer itself is at 0"
    assert len({bias.resized("advice", 2, rng) for _ in range(9)}) > 1, "always the same place"


def test_a_ruler_and_a_judge_are_told_apart(world, monkeypatch):
    """A model that counts letters has `longer` 1 and a straight line; one that counts mistakes has 0 and a peak."""
    gold = {str(r["messages"][:1]): r["messages"][1]["content"] for r in world.test}

    def counts(talk):
        return float(len(talk[-1]["content"]))

    def judges(talk):
        return -abs(len(talk[-1]["content"]) - len(gold[str(talk[:1])]))

    asked = {kind: [pair(r["messages"][:1], r["messages"][1]["content"], wrong(r["messages"][1]["content"]))
                    for r in world.test[:20]]
             for kind, wrong in (("delete", lambda text: text[1:]), ("insert", lambda text: text + "x"))}
    for score, longer, line in ((counts, 1, range(-3, 4)), (judges, 0, (-3, -2, -1, 0, -1, -2, -3)),
                                (lambda talk: -counts(talk), -1, range(3, -4, -1))):
        monkeypatch.setattr(bias.reward, "scores",
                            lambda opened, talks, s=score: torch.tensor([float(s(talk)) for talk in talks]))
        monkeypatch.setattr(bias.reward, "score_pairs", lambda opened, pairs, s=score: tuple(
            torch.tensor([float(s(each["prompt"] + each[side])) for each in pairs]) for side in ("chosen", "rejected")))
        assert bias.longer(world.policy, asked) == pytest.approx(longer, abs=1e-6), "how much length counts"
        if score is not judges:  # which scores all right answers alike: they have no spread
            curve = bias.by_length(world.policy, world.test, 0)
            right = torch.tensor([len(text) for text in gold.values() if len(text) > 3]).float()
            expected = torch.tensor([float(x) for x in line]) / right.std()
            assert curve == pytest.approx(expected.tolist(), abs=1e-4), "the line over the length of answers"


def test_the_demo_runs(flags, out, capsys):
    """A row for each model and for the ruler beside it, and a figure; nonsense is refused."""
    bias.main([*flags, "--seeds", "2"])
    rows = json.loads((out / "bias" / "summary.json").read_text("utf-8"))["rows"]
    assert [row["learned from"] for row in rows] == [name for name in bias.SETS for _ in range(2)]
    assert [row["judge"] for row in rows[:2]] == ["model", "always the longer"]
    for row in rows:
        assert all(0 <= row[kind] <= 1 for kind in KINDS), row
    assert rows[1]["delete"] == 1 and rows[1]["insert"] == 0, "what a ruler gets is not beside the model"
    assert (out / "bias" / "bias.png").stat().st_size > 5000 and "insertions" in capsys.readouterr().out
    with pytest.raises(BadInput, match="batch"):
        bias.main([*flags, "--batch-size", "48"])  # of 48 tasks, some have one letter, which cannot be deleted
