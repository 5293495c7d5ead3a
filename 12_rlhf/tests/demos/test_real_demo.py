"""DPO on a real model: what is held out and learned, what the table says, what is kept; on a small random model."""

import json
import math
import signal

from shared.errors import BadInput

import pytest
import torch
from torch import nn

import checkpoint
import lora
from chat import form, open_model, ours, prompt, with_tags
from demos import real
from model import GPT, ModelConfig
from preferences import read_pairs, split_by_prompt
from tokenizer import CharTokenizer

QUICK = ["--model", "small", "--steps", "6", "--batch-size", "5", "--lr", "0.02", "--warmup", "0", "--length", "5",
         "--rank", "3", "--precision", "float32", "--beta", "0.3", "--shown", "3"]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of runs with a small model in it, and a file of 62 pairs for 51 questions; one is too long."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "runs"))
    torch.manual_seed(0)
    tokenizer = CharTokenizer("abcdefghijklmnop .?-")
    shape = {"block_size": 48, "n_embd": 16, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "n_hidden": 24}
    opened = ours(*with_tags(GPT(ModelConfig(vocab_size=len(tokenizer), **shape)), tokenizer))
    for p in opened.model.parameters():
        nn.init.normal_(p, std=0.3)
    (tmp_path / "runs" / "small").mkdir(parents=True)
    file = tmp_path / "runs" / "small" / "model.pt"
    checkpoint.save(file, opened.model, opened.tokenizer, **form(opened), optimizer={}, step=1, seconds=0.0, args={})
    asked = ["abcde"[i % 5] * (1 + i // 5) for i in range(50)]
    pairs = [{"instruction": text, "chosen": "ok" + "." * (i % 4), "rejected": "no " + "abc"[:i % 3] + "."}
             for i, text in enumerate(asked)]
    pairs += [{**pair, "rejected": "nn" + pair["chosen"]} for pair in pairs[::5]]  # a question with two pairs
    pairs.append({"instruction": "a", "chosen": "ok", "rejected": "ok"})  # nothing to learn from
    pairs.append({"instruction": "o" * 60, "chosen": "a", "rejected": "b"})  # longer than the context of 48
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    return tmp_path


def summary(place, name="real") -> dict:
    return json.loads((place / "runs" / name / "summary.json").read_text("utf-8"))


def ln_p(model, opened, pair) -> list[float]:
    """ln P of the chosen and the rejected answer with its end, each read alone, in float64."""
    found = []
    for side in ("chosen", "rejected"):
        asked = prompt(opened, pair["prompt"])
        answer = [*opened.tokenizer.encode(pair[side][0]["content"]), opened.tokenizer.special["<|end|>"]]
        with torch.no_grad():
            scores = model(torch.tensor([asked + answer]))[0, len(asked) - 1:-1].double()
        law = scores - scores.exp().sum(-1, keepdim=True).log()
        found.append(law[torch.arange(len(answer)), answer].sum().item())
    return found


def test_each_pair_is_learned_once_before_one_is_learned_again():
    """Steps take whole batches; no pair comes a second time before all have come once, and the seed decides."""
    plan = real.passes(13, real.Recipe(steps=5, batch_size=4))
    assert [len(places) for places in plan] == [4] * 5, "a step has a batch that is not full"
    flat = [i for places in plan for i in places]
    assert sorted(flat[:13]) == list(range(13)), f"{flat[:13]}: the first 13 of 20 places are not the 13 pairs"
    assert len({*flat[13:]}) == 7 and flat[:13] != list(range(13)), "the second pass, or no order at random"
    assert plan != real.passes(13, real.Recipe(steps=5, batch_size=4, seed=2)), "the seed does not change the order"
    with pytest.raises(BadInput, match="3 pairs do not fill a batch of 4"):
        real.passes(3, real.Recipe(batch_size=4))


def test_the_table_worked_out_by_hand():
    """A reward is beta ln (P / P_ref): changes count, not probabilities; the margin has beta; ties are half right."""
    before = torch.tensor([[-10.0, -12.0], [-10.0, -5.0], [-8.0, -20.0], [-3.0, -3.5]])
    now = torch.tensor([[-11.0, -12.5], [-9.0, -8.0], [-12.0, -30.0], [-4.0, -4.5]])
    # chosen moves by -1, 1, -4, -1; rejected by -0.5, -3, -10, -1: right are the 2nd and 3rd, and half of the 4th
    row = real.exam(now, before, 0.5)
    assert row["right"] == pytest.approx(2.5 / 4), f"{row['right']}: where the chosen answer's ln P rose more"
    assert row["margin"] == pytest.approx(0.5 * (-0.5 + 4 + 6 + 0) / 4), f"{row['margin']}: the reward is beta times it"
    assert row["likelier"] == pytest.approx(3 / 4), "in the second pair the rejected answer is still the likelier one"
    assert (row["chosen"], row["rejected"]) == (pytest.approx(-9.0), pytest.approx(-13.75)), "means of ln P of answers"
    assert row["low"] < row["right"] < row["high"], "the interval does not hold the share"
    start = real.exam(before, before, 0.5)
    assert start["right"] == 0.5 and start["margin"] == 0, "policy = reference: no pair is preferred"


def test_before_and_after_are_those_of_the_base_and_of_the_adapter(place, capsys):
    """The numbers are those of the base and of base plus saved adapter on held-out pairs; what is cut is said."""
    assert not real.main(["--data", str(place / "pairs.json"), *QUICK])
    printed, found = capsys.readouterr().out, summary(place)
    assert "twice the same answer" in printed and "longer than the model's context" in printed, "left out unseen"
    training, held_out = split_by_prompt(read_pairs(place / "pairs.json"), seed=0)
    held_out = [pair for pair in held_out if len(pair["prompt"][0]["content"]) < 40]
    opened = open_model("small")
    base = torch.tensor([ln_p(opened.model, opened, pair) for pair in held_out])
    folder = place / "runs" / "real" / "adapter"
    tuned = lora.load_adapter(open_model("small").model, folder)
    after = torch.tensor([ln_p(tuned, opened, pair) for pair in held_out])
    moved = after - base
    first, last = found["rows"]
    for row, values, name in ((first, base, "before"), (last, after, "after")):
        for i, side in enumerate(("chosen", "rejected")):
            told = row[side]
            assert told == pytest.approx(values[:, i].mean().item(), abs=1e-3), f"{name}: ln P of the {side} answers"
    assert first["right"] == 0.5 and last["right"] == pytest.approx((moved[:, 0] > moved[:, 1]).float().mean().item())
    assert last["margin"] == pytest.approx(0.3 * (moved[:, 0] - moved[:, 1]).mean().item(), abs=1e-3), "the margin"
    assert found["moved"] == pytest.approx(moved.mean(0).tolist(), abs=1e-3), "displacement is the mean change of ln P"
    assert last["margin"] > 0.1 and last["right"] > 0.6, f"{last}: nothing was learned"
    assert len(lora.adapters(tuned)) == 14 and str(folder) in printed
    assert (place / "runs" / "real" / "displacement.png").stat().st_size > 3000
    sizes = [[len(pair[side][0]["content"]) for side in ("chosen", "rejected")] for pair in training]
    longer = sum((a > b) + 0.5 * (a == b) for a, b in sizes) / len(sizes) >= 0.5
    told = [[len(pair[side][0]["content"]) for side in ("chosen", "rejected")] for pair in held_out]
    share = sum((a > b) + 0.5 * (a == b) for a, b in told) / len(told)
    assert found["ruler"] == pytest.approx(share if longer else 1 - share), "the ruler is for the held-out pairs"
    steps = [json.loads(line) for line in (place / "runs" / "real" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4), "at the first step the model is its own reference"
    for row, pair in zip(found["answers"], held_out, strict=False):
        assert row["question"] == pair["prompt"][-1]["content"] and {"before", "after"} < row.keys()


def test_held_out_pairs_are_not_learned(place, monkeypatch):
    """No step sees a question that is held out, and the held-out questions are the same for every seed."""
    seen, step = [], real.dpo_step

    def watched(run, rows, before, places, at):
        seen.append({tuple(rows[i][0].ids[:rows[i][0].learned.index(True)]) for i in places})
        return step(run, rows, before, places, at)

    monkeypatch.setattr(real, "dpo_step", watched)
    for seed in ("1", "2"):
        real.main(["--data", str(place / "pairs.json"), *QUICK, "--seed", seed, "--name", f"s{seed}"])
    opened = open_model("small")
    held_out = split_by_prompt(read_pairs(place / "pairs.json"), seed=0)[1]
    asked = {tuple(prompt(opened, pair["prompt"])) for pair in held_out}
    assert asked and not asked & set().union(*seen), "a held-out question is among those that are learned"
    a, b = summary(place, "s1")["rows"], summary(place, "s2")["rows"]
    assert a[0] == b[0] and a[1] != b[1], "the seed changes what is measured, or nothing"


def test_an_interrupt_keeps_the_adapter(place, monkeypatch, capsys):
    """After Ctrl-C the step is finished, the adapter of the steps so far is saved, and 130 is the exit code."""
    step, calls = real.dpo_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(real, "dpo_step", interrupted)
    assert real.main(["--data", str(place / "pairs.json"), *QUICK]) == 130, "an interrupted run is not a success"
    assert len(calls) == 3 and "stopped at step 3" in capsys.readouterr().out
    tuned = lora.load_adapter(open_model("small").model, place / "runs" / "real" / "adapter")
    assert all(layer.b.any() for layer in lora.adapters(tuned).values()), "what was learned is lost"
    assert len((place / "runs" / "real" / "metrics.jsonl").read_text("utf-8").splitlines()) == 3, "numbers are lost"
    assert not (place / "runs" / "real" / "summary.json").exists(), "a run that was stopped has a summary"


def test_what_is_missing_is_named(place, monkeypatch):
    """Without --data the published pairs are asked for; what cannot be is refused before anything is tuned."""
    monkeypatch.setattr(real.corpus, "records", lambda name: {"preferences": place / "pairs.json"}[name])
    with pytest.raises(BadInput, match="other.jsonl"):
        real.main([*QUICK, "--data", "other.jsonl"])
    for flag, value, said in (
        ("--steps", "0", "steps"), ("--rank", "0", "rank"), ("--alpha", "-1", "alpha"), ("--shown", "0", "--shown"),
        ("--length", "0", "length"), ("--lr", "0", "lr"), ("--batch-size", "99", "do not fill"),
        ("--beta", "0", "beta"), ("--model", "other.gguf", "other.gguf"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=said):
            real.main([*QUICK, flag, value])
    assert not (place / "runs" / "real" / "adapter").exists()
