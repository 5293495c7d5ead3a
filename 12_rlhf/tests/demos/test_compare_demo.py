"""Five ways side by side: what is kept and made, what best-of-n gives, what is measured; on a small random policy."""

import json
import math
import os
import signal
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # little.py

from shared.errors import BadInput

import little
import pytest
import torch

import dpo
import grpo
import learn
import ppo
import reward
import tasks
from chat import open_model
from demos import compare
from preferences import corrupted
from rollout import rollout

SMALL = {"steps": 2, "length": 4, "lr": 1e-2, "warmup": 0}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of runs with a random policy and a random judge, and small recipes; learning draws no figures."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    little.runs(tmp_path)
    (tmp_path / "text.txt").write_text(little.text(), encoding="utf-8")
    step = grpo.grpo_step  # a random policy is never right: here it is paid for letters that are late in the alphabet
    monkeypatch.setattr(grpo, "grpo_step", lambda *args: step(*args, rewards=lambda _, d: d.answers.float().mean(1)))
    monkeypatch.setattr(dpo, "own_pairs", lambda policy, records, temperature, seed: corrupted(records, seed=seed))
    monkeypatch.setattr(learn, "draw", lambda *args: None)
    recipes = {"DPO": dpo.DPOConfig(batch_size=3, **SMALL), "PPO": ppo.PPOConfig(questions=6, minibatch=4, **SMALL),
               "GRPO": grpo.GRPOConfig(questions=3, group=4, **SMALL)}  # fmt: skip
    monkeypatch.setattr(compare, "WAYS", {way: (compare.WAYS[way][0], recipes[way]) for way in recipes})
    return tmp_path


@pytest.fixture
def flags(place):
    return ["--policy", "little", "--judge", "judge", "--corpus", str(place / "text.txt"), "--device", "cpu",
            "--records", "30", "--test", "9", "--n", "3"]  # fmt: skip


def summary(place, name="compare") -> dict:
    return json.loads((place / name / "summary.json").read_text("utf-8"))


def letters(records, drawn):
    """A reward: how many different letters an answer has, and a bit for the letter that it begins with."""
    return torch.tensor([len(set(text)) + ord((text or " ")[0]) / 1000 for text in drawn.texts])


@pytest.mark.parametrize("rows", [512, 8], ids=["at once", "in parts"])
def test_best_of_n_gives_the_answer_with_the_highest_reward(rows, monkeypatch):
    """Of each task's n answers the one with the highest reward counts, right or wrong; and no other task's."""
    policy, seen = little.policy(seed=2, std=0.3), []

    def watched(opened, asked, *args, **more):
        seen.append((asked, rollout(opened, asked, *args, **more)))
        return seen[-1][1]

    monkeypatch.setattr(compare, "rollout", watched)
    monkeypatch.setattr(compare, "ROWS", rows)
    found, best = compare.best_of(policy, little.RECORDS, 3, letters, seed=4), []
    for questions, drawn in seen:
        told = list(zip(drawn.texts, drawn.ended, drawn.which, letters(questions, drawn).tolist(), strict=True))
        best += [max((each for each in told if each[2] == i), key=lambda each: each[3]) for i in range(len(questions))]
        assert len(told) == 3 * len(questions), f"{len(told)} answers to {len(questions)} tasks, not 3 to each"
    assert [one for questions, _ in seen for one in questions] == little.ASKED, "each task is asked once, in order"
    assert len(seen) == (1 if rows == 512 else 3), "in parts of 2 tasks, where 8 rows hold 6 answers"
    assert found["reward"] == pytest.approx(sum(each[3] for each in best) / 6), "the highest reward of a task's own"
    # Now the right answers are those that were chosen, but for one task.
    golds = [text + "a" if i == 2 else text for i, (text, *_) in enumerate(best)]
    records = [{"messages": [*asked, {"role": "assistant", "content": gold}]}
               for asked, gold in zip(little.ASKED, golds, strict=True)]
    expected = sum(over for i, (_, over, *_) in enumerate(best) if i != 2) / 6
    share = compare.best_of(policy, records, 3, letters, seed=4)["sampled"]
    assert share == pytest.approx(expected) and expected > 0.3, f"{share} are right, of the chosen ones {expected}"


def test_the_kl_divergence_of_best_of_n():
    """Of n answers that are all different, the best has the rank u with density n u^(n - 1): its mean logarithm."""
    policy = little.policy(std=0.3)
    for n in (1, 2, 5):
        u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        density = n * u ** (n - 1)
        expected = (density * density.log()).mean().item()
        found = compare.best_of(policy, little.RECORDS[:2], n, letters, 0)["kl"]
        assert found == pytest.approx(expected, abs=1e-4), f"best of {n}: {found:.4f} nats, integrated {expected:.4f}"


def test_the_judge_in_units_of_the_policys_own_answers(place, monkeypatch):
    """Among the policy's answers to tasks that are learned from, the proxy has mean 0 and spread 1."""
    def ended(*args, **more):  # a random policy hardly ever ends an answer, and the price of that is another matter
        return replace(rollout(*args, **more), ended=[True] * 40)

    monkeypatch.setattr(ppo, "rollout", ended)
    policy, judge = open_model("little"), reward.load(place / "judge" / "model.pt")
    args = Namespace(corpus=str(place / "text.txt"), records=40)
    rewards = compare.proxy(judge, policy, args)
    records = tasks.make(tasks.words(little.text()), "train", 40)
    drawn = ended(policy, [r["messages"][:-1] for r in records], 24, generator=torch.Generator().manual_seed(9))
    told = rewards(records, drawn)
    assert told.mean().abs() < 0.5 and 0.6 < told.std() < 1.5, f"mean {told.mean():.2f}, spread {told.std():.2f}"
    talks = [[*records[i]["messages"][:-1], {"role": "assistant", "content": drawn.texts[i]}] for i in (3, 17)]
    raw = reward.scores(judge, talks)
    assert (told[3] - told[17]).sign() == (raw[0] - raw[1]).sign(), "the order of the scores has changed"


def test_all_ways_are_measured_alike_and_kept(place, flags, capsys):
    """Each run is measured as its own summary says, on the held-out tasks; a second call makes nothing again."""
    assert compare.main([*flags, "--seeds", "2"]) is None
    found, printed = summary(place), capsys.readouterr().out
    ways = ["policy", "best of 3", "DPO", "PPO", "GRPO"]
    assert [row["way"] for row in found["rows"]] == list(found["seeds"]) == ways and "mean ± spread" in printed
    assert {len(some) for some in found["seeds"].values()} == {2}, "a seed is missing"
    assert all(told["kl"] == 0 and told["tax"] == 0 for told in found["seeds"]["policy"]), "the policy against itself"
    for way in ways[2:]:
        runs = [summary(place, f"compare-{way.lower()}-{seed}") for seed in (0, 1)]
        assert [run["seed"] for run in runs] == [0, 1] and runs[0]["steps"] == 2, f"{way}: the seed or the steps"
        for told, run in zip(found["seeds"][way], runs, strict=True):
            assert (told["tax"], told["seconds"]) == (run["tax"], run["seconds"]), f"{way}: not what its run says"
            assert abs(told["kl"]) > 1e-4, f"{way}: the policy is measured in place of the run"
        assert found["seeds"][way][0] != found["seeds"][way][1], f"{way}: two seeds are one"
        config = json.loads((place / f"compare-{way.lower()}-0" / "config.json").read_text("utf-8"))
        assert config["policy"] == "little" and config["length"] == 4 and config.get("judge", "judge") == "judge"
    row = found["rows"][3]
    mean = sum(told["kl"] for told in found["seeds"]["PPO"]) / 2
    spread = abs(found["seeds"]["PPO"][0]["kl"] - found["seeds"]["PPO"][1]["kl"]) / math.sqrt(2)
    assert row["KL"] == f"{mean:.3f} ± {spread:.3f}", f"{row['KL']}: {mean} and {spread} over two seeds"
    assert found["rows"][1]["greedy"] == "-", "best-of-n has no likeliest answer"
    assert (place / "compare" / "ways.png").stat().st_size > 3000
    made = {file: os.stat(file).st_mtime_ns for file in place.glob("compare-*/summary.json")}
    assert len(made) == 6 and compare.main([*flags, "--seeds", "1"]) is None
    assert all(os.stat(file).st_mtime_ns == time for file, time in made.items()), "a finished run was made again"
    one = summary(place)
    assert one["rows"][2]["KL"] == f"{one['seeds']['DPO'][0]['kl']:.3f}", "a single seed has no spread"
    assert one["seeds"]["DPO"][0] == found["seeds"]["DPO"][0], "the same run is measured otherwise"


def test_an_interrupt_is_passed_on(place, flags, monkeypatch):
    """After Ctrl-C in one of the runs, no other is begun, 130 is the exit code, and there is no table."""
    update, calls = dpo.update, []

    def pressed(*args):
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(dpo, "update", pressed)
    assert compare.main([*flags, "--seeds", "1"]) == 130, "an interrupted comparison is not a success"
    assert not (place / "compare" / "summary.json").exists() and not (place / "compare-ppo-0").exists()
    assert (place / "compare-dpo-0" / "model.pt").is_file(), "what was learned is lost"


@pytest.mark.parametrize("flag", ["--seeds", "--n", "--steps", "--records", "--test"])
def test_sizes_that_cannot_be(flag, flags):
    """Sizes below 1 are refused in one line."""
    with pytest.raises(BadInput, match="at least 1"):
        compare.main([*flags, flag, "0"])
