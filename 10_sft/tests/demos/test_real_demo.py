"""A real model with adapters: which records are held out, what is measured, what is kept; on a small model."""

import json
import signal

from shared.errors import BadInput

import pytest
import torch
from torch import nn

import checkpoint
import hf
import lora
from chat import conversation, form, open_model, ours, with_tags
from data import read_records
from demos import real
from model import GPT, ModelConfig
from sample import SampleConfig
from tokenizer import CharTokenizer

QUICK = ["--model", "small", "--steps", "5", "--batch-size", "6", "--lr", "0.02", "--length", "5", "--rank", "3"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of runs with a small model in it, and a file of 41 records of different lengths."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "runs"))
    torch.manual_seed(0)
    tokenizer = CharTokenizer("abcdefghijklmnop .?-")
    shape = {"block_size": 48, "n_embd": 16, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "n_hidden": 24}
    opened = ours(*with_tags(GPT(ModelConfig(vocab_size=len(tokenizer), **shape)), tokenizer))
    for p in opened.model.parameters():
        nn.init.normal_(p, std=0.4)  # so that it has opinions to lose
    (tmp_path / "runs" / "small").mkdir(parents=True)
    file = tmp_path / "runs" / "small" / "model.pt"
    checkpoint.save(file, opened.model, opened.tokenizer, **form(opened), optimizer={}, step=1, seconds=0.0, args={})
    questions = ["abcd"[i % 4] * (1 + i // 4) for i in range(40)]
    records = [{"instruction": asked, "output": asked[:3] + " ok" * (len(asked) % 3)} for asked in questions]
    records.append({"instruction": "ABC".lower() * 15, "output": "a"})  # longer than the context of 48
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
    return tmp_path


def summary(place, name="real") -> dict:
    return json.loads((place / "runs" / name / "summary.json").read_text("utf-8"))


def loss(model, opened, records) -> float:
    """-ln P of the answers' tokens, one conversation at a time, in float64, and their mean."""
    found = []
    for record in records:
        example = conversation(opened, record["messages"])
        with torch.no_grad():
            scores = model(torch.tensor([example.ids]))[0].double()
        found += [torch.logsumexp(scores[t - 1], -1) - scores[t - 1, example.ids[t]]
                  for t in range(1, len(example.ids)) if example.learned[t]]
    return torch.stack(found).mean().item()


def test_what_is_held_out_is_not_learned():
    """A tenth is held out, the same each time and at random; a question that comes twice is not on both sides."""
    records = [{"messages": [{"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": str(i)}]}
               for i in range(50)]
    again = {"messages": [{"role": "user", "content": "question 7"}, {"role": "assistant", "content": "seven"}]}
    learn, held_out = real.divide([*records, again])
    assert real.divide([*records, again])[1] == held_out, "runs with different seeds are not measured on the same"
    assert len(held_out) == 5 and len(learn) == 45 and again not in learn + held_out, "a question counts twice"
    assert sorted(r["messages"][1]["content"] for r in learn + held_out) == sorted(map(str, range(50)))
    assert held_out not in (records[:5], records[-5:]), "the file's order may have a meaning: choose at random"
    assert {len(part) for part in real.divide(records[:3])} == {1, 2}, "of few records, one is held out all the same"
    with pytest.raises(BadInput, match="one question"):
        real.divide([records[7], again])


def test_before_and_after_are_measured_and_the_adapter_opens(place, capsys):
    """The losses are those of the base and of base plus saved adapter, worked out apart; nothing is cut unseen."""
    file = place / "records.json"
    assert not real.main(["--data", str(file), *QUICK, "--shown", "3"])
    printed, found = capsys.readouterr().out, summary(place)
    assert "1 of " in printed and "are left out" in printed, "a conversation that does not fit is left out unseen"
    held_out = [r for r in real.divide(read_records(file))[1] if len(r["messages"][0]["content"]) < 45]
    opened = open_model("small")
    assert found["before"] == pytest.approx(loss(opened.model, opened, held_out), abs=1e-4), "`before` is not the base"
    folder = place / "runs" / "real" / "adapter"
    tuned = lora.load_adapter(open_model("small").model, folder)
    assert found["after"] == pytest.approx(loss(tuned, opened, held_out), abs=1e-4), "`after` is not what was saved"
    assert found["after"] < found["before"] - 0.1 and f"{found['after']:.4f}" in printed
    assert len(lora.adapters(tuned)) == 2 * 7, "not all matrices of the blocks have an adapter"
    assert found["trained"] == sum(layer.a.numel() + layer.b.numel() for layer in lora.adapters(tuned).values())
    about = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert about["r"] == 3 and about["lora_alpha"] == 16 and str(folder) in printed
    assert (place / "runs" / "real" / "loss.png").stat().st_size > 3000
    for row, record in zip(found["rows"], held_out, strict=False):
        asked = record["messages"][:-1]
        assert row["question"] == asked[-1]["content"] and row["right"] == record["messages"][-1]["content"]
        for column, model in (("before", opened.model), ("after", tuned)):
            theirs = hf.Opened(model, opened.tokenizer, opened.template, opened.names, ends=opened.ends)
            pieces = list(hf.write(theirs, hf.chat(theirs, asked), 5, SampleConfig(temperature=0.0)))
            text = "".join("?" if piece in theirs.tokenizer.special else piece for piece in pieces)
            assert row[column].removesuffix(" ...") == text.strip(), f"{column}: not what the model answers"
            assert row[column].endswith(" ...") == (len(pieces) > 5), "an answer that was cut does not say so"


def test_seeds_and_the_base_in_four_bits(place, capsys):
    """Another seed learns otherwise from the same start; with --four-bit the base is rounded before it is measured."""
    common = ["--data", str(place / "records.json"), *QUICK, "--shown", "1"]
    for name, more in (("a", ["--seed", "1"]), ("b", ["--seed", "2"]), ("four", ["--seed", "1", "--four-bit"])):
        real.main([*common, "--name", name, *more])
    a, b, four = (summary(place, name) for name in ("a", "b", "four"))
    assert a["before"] == b["before"] and a["after"] != b["after"], "the seed changes what is measured, or nothing"
    assert four["before"] != a["before"] and four["bytes"] < a["bytes"], "the base is not in four bits"
    assert four["after"] < four["before"] and "in place of" in capsys.readouterr().out


def test_an_interrupt_keeps_the_adapter(place, monkeypatch, capsys):
    """After Ctrl-C the step is finished, the adapter of the steps so far is saved, and 130 is the exit code."""
    gradient, calls = real.sft.gradient, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return gradient(*args)

    monkeypatch.setattr(real.sft, "gradient", interrupted)
    assert real.main(["--data", str(place / "records.json"), *QUICK]) == 130, "an interrupted run is not a success"
    assert len(calls) == 3 and "stopped at step 3" in capsys.readouterr().out
    tuned = lora.load_adapter(open_model("small").model, place / "runs" / "real" / "adapter")
    assert all(layer.b.any() for layer in lora.adapters(tuned).values()), "what was learned is lost"
    assert len((place / "runs" / "real" / "metrics.jsonl").read_text("utf-8").splitlines()) == 3, "losses are lost"
    assert not (place / "runs" / "real" / "summary.json").exists(), "a run that was stopped has a summary"


def test_what_is_missing_is_named(place, monkeypatch):
    """Without --data the published records are asked for; what cannot be is refused before anything is tuned."""
    monkeypatch.setattr(real.corpus, "records", lambda name: {"instructions": place / "records.json"}[name])
    with pytest.raises(BadInput, match="other.jsonl"):
        real.main([*QUICK, "--data", str(place / "other.jsonl")])
    for flag, value, said in (
        ("--steps", "0", "steps"), ("--rank", "0", "rank"), ("--alpha", "-1", "alpha"), ("--shown", "0", "--shown"),
        ("--length", "0", "--length"), ("--lr", "0", "lr"), ("--batch-size", "99", "do not fill"),
        ("--model", "other.gguf", "other.gguf"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=said):
            real.main([*QUICK, flag, value])
    assert not (place / "runs" / "real" / "adapter").exists()
