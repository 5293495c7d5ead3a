"""Noise: labels are wrong in the share that is said, and where annotators agree or not is worked out rightly."""

import argparse
import json
import random
from difflib import SequenceMatcher

from shared.errors import BadInput

import pytest
import torch

from demos import ablation, noise
from demos.ablation import Scale, World

SCALE = Scale(steps=1, seeds=1, batch_size=4, pairs=80, test=36)


@pytest.fixture
def world(text, out, policy):
    """A world in which the policy's answers are right, nearly right, much too long or short, by chance."""
    made = World(policy, argparse.Namespace(policy="tiny", corpus=str(text), device="cpu"), SCALE, 1)
    rng = random.Random(5)

    def told(record):
        gold = record["messages"][1]["content"]
        return [rng.choice((gold, gold + "xyz", gold[1:] or "q", gold[::-1], "zz", gold + "k")) for _ in range(4)]

    made.drawn, made.drawn_test = [told(r) for r in made.records[:20]], [told(r) for r in made.test]
    return made


def goodness(text: str, right: str) -> float:
    """What the careful annotator goes by."""
    return 1.0 if text == right else SequenceMatcher(None, text, right).ratio() / 2


def test_where_the_annotators_agree(world):
    """Both sides are ordered as the careful one does; the brief one agrees on one side and on no pair of the other."""
    gold = {str(r["messages"][:1]): r["messages"][1]["content"] for r in world.test}
    sides = noise.divided(world)
    assert all(sides) and sum(map(len, sides)) == sum(len({*texts}) > 1 for texts in world.drawn_test)
    seen = set()
    for side, agree in zip(sides, (True, False), strict=True):
        for each in side:
            right = gold[str(each["prompt"])]
            better, worse = each["chosen"][0]["content"], each["rejected"][0]["content"]
            good = [goodness(text, right) for text in (better, worse)]
            assert good[0] >= good[1], f"the careful one prefers {worse!r} to {better!r}, where {right!r} is right"
            if len(better) != len(worse):
                assert (len(better) < len(worse)) == agree, "the brief one prefers the shorter answer"
            else:
                assert agree or good[0] == good[1], "of equally long answers the brief one prefers the better one"
            seen.add((agree, len(better) - len(worse) < 0))
    assert {(True, True), (False, False)} <= seen


def test_a_share_of_the_labels_is_wrong(world, monkeypatch):
    """Of 40 pairs 10 are turned round with noise 0.25, none is lost, and those of the test are as they were."""
    learned, held_out = [], json.dumps(world.held_out)
    learn = ablation.learn

    def watched(policy, pairs, config, tick):
        learned.append(pairs)
        return learn(policy, pairs, config, tick)

    monkeypatch.setattr(ablation, "learn", watched)
    run = noise.noisy(world, 40, 0.25, SCALE, lambda *_: None)
    before = world.pairs()[:40]
    assert len(learned[0]) == 40
    turned = [new["chosen"] == old["rejected"] and new["rejected"] == old["chosen"] and new["prompt"] == old["prompt"]
              for new, old in zip(learned[0], before, strict=True)]
    assert sum(turned) == 10, "not a quarter of the labels is wrong"
    assert [new for new, was in zip(learned[0], turned, strict=True) if not was] == [
        old for old, was in zip(before, turned, strict=True) if not was]
    assert json.dumps(world.held_out) == held_out, "the labels of the test are wrong as well"
    assert 0.5 <= run["sure"] <= 1 and 0 <= run["right"]["mean"] <= 1


def test_groups_are_asked_in_turn(world, monkeypatch):
    """Every pair of "careful" has the better answer first; of the groups with a brief one a half or a third has not."""
    learned, learn = {}, ablation.learn
    gold = {str(r["messages"][:1]): r["messages"][1]["content"] for r in world.records}
    for group in noise.GROUPS:

        def watched(policy, pairs, config, tick, g=group):
            learned[g] = pairs
            return learn(policy, pairs, config, tick)

        monkeypatch.setattr(ablation, "learn", watched)
        run = noise.asked(world, group, SCALE, lambda *_: None)
        assert run["pairs"] == len(learned[group]) and 0 <= run["agreed"] <= 1 and 0 <= run["careful"] <= 1

    def good(each, side):
        text, right = each[side][0]["content"], gold[str(each["prompt"])]
        return goodness(text, right)

    worse = {g: [good(each, "chosen") < good(each, "rejected") for each in pairs] for g, pairs in learned.items()}
    assert not any(worse["careful"]), "the careful annotator prefers a worse answer"
    every = {"two careful, one brief": 3, "one careful, one brief": 2}
    for group, turn in every.items():
        places = {i % turn for i, was in enumerate(worse[group]) if was}
        assert places == {turn - 1}, f"{group}: the brief one is not asked in turn"


def test_how_sure(policy, monkeypatch):
    """Differences of +2 and -2 are both a certainty of sigmoid(2) = 0.881; one of 0 is 0.5."""
    monkeypatch.setattr(noise.reward, "score_pairs", lambda *_: (torch.tensor([3.0, 0, 1]), torch.tensor([1.0, 2, 1])))
    assert noise.certainty(policy, []) == pytest.approx((2 * 0.8807971 + 0.5) / 3)


def test_the_demo_runs(flags, out, capsys):
    """Two tables and a figure; numbers of pairs and shares of wrong labels are each tried; nonsense is refused."""
    argv = [*flags, "--test", "36", "--noise", "0.4", "0"]
    noise.main(argv)
    summary = json.loads((out / "noise" / "summary.json").read_text("utf-8"))
    assert [(row["pairs"], row["noise"]) for row in summary["rows"]] == [(3, 0), (12, 0), (48, 0), (48, 0.4)]
    assert [row["annotators"] for row in summary["annotators"]] == list(noise.GROUPS)
    for row in summary["rows"] + summary["annotators"]:
        assert all(0 <= value <= 1 for name, value in row.items() if isinstance(value, float)), row
    assert (out / "noise" / "noise.png").stat().st_size > 5000 and "two careful" in capsys.readouterr().out
    for flag, value, said in (("--noise", "1.5", "--noise"), ("--pairs", "40", "sixteenth"), ("--policy", "no", "no")):
        with pytest.raises(BadInput, match=said):
            noise.main([*argv, flag, value])
