"""Proxy and gold along training: which runs are made, what the table and the curves say; on a small random policy."""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # little.py

from shared.errors import BadInput

import little
import pytest
import torch

import learn
import ppo
import reward
from chat import open_model, prompt
from demos import goodhart


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of runs with a random policy and a random judge; learning draws no figures."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    little.runs(tmp_path)
    (tmp_path / "text.txt").write_text(little.text(), encoding="utf-8")
    monkeypatch.setattr(learn, "draw", lambda *args: None)
    return tmp_path


@pytest.fixture
def flags(place):
    return ["--policy", "little", "--judge", "judge", "--corpus", str(place / "text.txt"), "--device", "cpu",
            "--records", "30", "--test", "9", "--steps", "3", "--questions", "6", "--minibatch", "4", "--length", "4",
            "--eval-every", "2", "--warmup", "0", "--betas", "3", "0", "--lr", "1e-2", "--free-lr", "2e-2",
            "--shown", "2"]  # fmt: skip


def of(place, name: str, file: str = "summary.json") -> dict:
    return json.loads((place / name / file).read_text("utf-8"))


def look(step, gold, proxy, kl):
    return {"step": step, "gold": gold, "proxy": proxy, "kl": kl, "greedy": gold / 2}


def test_the_curve_and_the_row_worked_out_by_hand():
    """The peak is that of the mean curve and not the mean of peaks; the distance is the root of the mean KL."""
    a = [look(0, 0.2, 0.0, -0.02), look(5, 0.8, 1.0, 1.0), look(9, 0.1, 4.0, 16.0)]
    b = [look(0, 0.3, 0.2, 0.0), look(5, 0.2, 1.4, 3.0), look(9, 0.5, 5.0, 20.0)]
    rows = goodhart.average([a, b])
    assert [row["step"] for row in rows] == [0, 5, 9]
    assert [row["distance"] for row in rows] == pytest.approx([0.0, 2**0.5, 18**0.5]), "the root of the mean KL"
    assert [row["gold"] for row in rows] == pytest.approx([0.25, 0.5, 0.3])
    row = goodhart.row_of(0.05, 1e-3, rows)
    assert (row["beta"], row["lr"], row["at"]) == ("0.05", "0.001", 5), row
    expected = {"gold before": 0.25, "peak": 0.5, "there": 2**0.5, "gold": 0.3, "greedy": 0.15, "proxy before": 0.1,
                "proxy": 4.5, "KL": 18.0}  # fmt: skip
    for name, value in expected.items():
        assert row[name] == pytest.approx(value), f"{name} is {row[name]}, by hand {value}"


def test_a_run_that_went_on_is_one_curve(tmp_path, monkeypatch):
    """Steps of learning are left out, and of two looks at one step, where a run was stopped, one is kept."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path))
    names = ("held_out_sampled", "held_out_reward", "held_out_kl", "held_out_greedy")
    looks = [{"step": step, **{name: step + i for i, name in enumerate(names)}} for step in (0, 4, 4, 6)]
    rows = [*looks[:2], {"step": 5, "reward": 1.0, "kl": 2.0}, *looks[2:]]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    found = goodhart.curve("run")
    assert [row["step"] for row in found] == [0, 4, 6], f"{[row['step'] for row in found]}: looks at steps 0, 4, 4, 6"
    assert found[1] == {"step": 4, "gold": 4, "proxy": 5, "kl": 6, "greedy": 7}, "gold is drawn, proxy is the reward"


def test_what_the_judge_likes(place):
    """Only wrong answers are shown, the first ones, beside the right ones, with the scores that the judge gives."""
    tuned, judge = open_model("little"), reward.load(place / "judge" / "model.pt")
    asked = [{"role": "user", "content": text} for text in ("abc", "Say it twice.", "x")]
    texts = goodhart.rollout(tuned, [[one] for one in asked], 5, temperature=0.0).texts
    golds = [{"role": "assistant", "content": gold} for gold in ("no", texts[1], "yes")]
    records = [{"messages": [one, gold]} for one, gold in zip(asked, golds, strict=True)]
    found = goodhart.liked(judge, tuned, records, 5, 4)
    assert [row["question"] for row in found] == ["abc", "x"], "the second answer is right"
    assert [(row["right"], row["answer"]) for row in found] == [("no", texts[0]), ("yes", texts[2])]
    for row in found:
        for answer, score in ((row["right"], "score"), (row["answer"], "its score")):
            talk = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": answer}]
            ids = prompt(judge, talk, add_generation_prompt=False)
            with torch.no_grad():
                expected = judge.model.head(judge.model.features(torch.tensor([ids])))[0, -1, 0].item()
            assert row[score] == pytest.approx(expected, abs=1e-4), f"{score} of {answer!r}: not what the judge gives"
    assert len(goodhart.liked(judge, tuned, records, 5, 1)) == 1
    assert goodhart.liked(judge, tuned, records[1:2], 5, 3) == [], "with all answers right there is nothing to show"


def test_prices_rates_and_curves(place, flags, capsys):
    """Each price is a run with its own rate; table and curves are those of its looks, and finished runs are kept."""
    assert goodhart.main([*flags, "--seeds", "2"]) is None
    found, printed = of(place, "goodhart"), capsys.readouterr().out
    assert "what the judge likes" in printed and "goodhart-0-0" in printed
    for beta, lr in ((0, 2e-2), (3, 1e-2)):
        for seed in (0, 1):
            config = of(place, f"goodhart-{beta}-{seed}", "config.json")
            assert (config["beta"], config["lr"], config["seed"]) == (beta, lr, seed), "beta, rate or seed of a run"
            assert config["steps"] == 3 and config["minibatch"] == 4 and config["judge"] == "judge", "a flag is lost"
        curve = found["curves"][str(beta)]
        assert [row["step"] for row in curve] == [0, 2, 3], "looks: before, now and then, after"
        last = [of(place, f"goodhart-{beta}-{seed}") for seed in (0, 1)]
        for key, name in (("gold", "sampled"), ("proxy", "reward"), ("kl", "kl"), ("greedy", "greedy")):
            expected = sum(run[name] for run in last) / 2
            assert curve[-1][key] == pytest.approx(expected), f"beta {beta}: the last {key} is not the runs' {name}"
    assert [row["beta"] for row in found["rows"]] == ["0", "3"], "prices are in order, each once"
    assert found["curves"]["0"][0]["kl"] == 0, "before learning the policy is the reference"
    assert (place / "goodhart" / "goodhart.png").stat().st_size > 3000
    made = {file: os.stat(file).st_mtime_ns for file in place.glob("goodhart-*/summary.json")}
    assert len(made) == 4 and goodhart.main(flags) is None
    assert all(os.stat(file).st_mtime_ns == time for file, time in made.items()), "a finished run was made again"
    goodhart.main([*flags, "--gamma", "0.9", "--betas", "3"])
    now = os.stat(place / "goodhart-3-0" / "summary.json").st_mtime_ns
    assert now != made[place / "goodhart-3-0" / "summary.json"], "a run with another gamma is taken for this one"


def test_a_stopped_demo_goes_on(place, flags, monkeypatch):
    """After Ctrl-C 130 is the exit code; the same command then ends the run that was stopped, and makes the others."""
    update, calls = ppo.update, []

    def pressed(*args):
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(ppo, "update", pressed)
    flags += ["--seeds", "2"]
    assert goodhart.main(flags) == 130, "an interrupted demo is not a success"
    assert not (place / "goodhart" / "summary.json").exists() and not (place / "goodhart-3-0").exists()
    before = len(calls)
    assert goodhart.main(flags) is None
    per_step = 2 * 2  # passes, and minibatches of 6 answers
    assert len(calls) - before == (2 + 3 * 3) * per_step, "a step that was done is done again, or one is left out"
    assert [row["step"] for row in goodhart.curve("goodhart-0-0")] == [0, 1, 2, 3], "where it went on, it looked"
    steps = [row["step"] for row in of(place, "goodhart")["curves"]["0"]]
    assert steps == [0, 2, 3], f"looks at steps {steps}: the mean is of those that both seeds have"


@pytest.mark.parametrize(("words", "said"), [
    (["--betas", "-0.1"], "--betas"), (["--betas", "nan"], "--betas"), (["--seeds", "0"], "--seeds"),
    (["--test", "0"], "--test"), (["--shown", "0"], "--shown"), (["--free-lr", "0"], "lr is 0"),
    (["--lr", "nan"], "lr is nan"), (["--minibatch", "0"], "minibatch"),
], ids=str)  # fmt: skip
def test_what_cannot_be_is_refused(words, said, flags, place):
    """Prices, sizes and rates that cannot be are refused in one line, before a run is made."""
    with pytest.raises(BadInput, match=said):
        goodhart.main([*flags, *words])
    assert not list(place.glob("goodhart-*"))
