"""A real model as a judge: what heads read, the one optimum, what LoRA trains, which pairs are held out."""

import json
import re
from dataclasses import replace

from shared.errors import BadInput

import pytest
import torch
from torch import nn

import lora
import reward
from chat import prompt
from demos import real
from demos.real import Real
from preferences import both, pair, read_pairs

QUICK = ["--model", "tiny", "--device", "cpu", "--steps", "4", "--batch-size", "5", "--lr", "0.02", "--rank", "3"]


@pytest.fixture
def file(tmp_path):
    """40 pairs of 20 prompts in the form of preferences.json: polite answers are chosen."""
    told = []
    for i in range(40):
        asked = "abcde"[i % 5] * (1 + i % 20 // 5)
        answer = f"it is {asked}" + " of course" * (i % 3 == 0)
        told.append({"instruction": asked, "input": "", "output": "-", "chosen": f"{answer}, please" + "x" * (i > 19),
                     "rejected": f"{answer}, " + ("oaf", "you silly goose")[i % 2]})
    (tmp_path / "preferences.json").write_text(json.dumps(told), encoding="utf-8")
    return tmp_path / "preferences.json"


@pytest.fixture
def judge(policy):
    """A reward model with a head that is not zero."""
    opened = reward.judge(policy)
    torch.manual_seed(1)
    nn.init.normal_(opened.model.head.weight)
    return opened


def test_what_heads_read(judge, file):
    """Each answer read alone, without padding: the last token, the same of a layer, and the mean over the answer."""
    pairs, model = read_pairs(file)[:7], judge.model
    found = real.features(judge, pairs, 1, size=4)
    assert list(found) == ["last token", "last token of layer 1", "mean of layer 1"]
    for i, each in enumerate(pairs):
        for j, talk in enumerate(both(each)):
            [ids] = reward.encode(judge, [talk])
            start = len(prompt(judge, talk[:-1]))
            with torch.no_grad():
                x = model.blocks[0](model.tok_emb(torch.tensor([ids])), model.look(len(ids)))
                h = model.features(torch.tensor([ids]))
            for name, wanted in (("last token", h[0, -1]), ("last token of layer 1", x[0, -1]),
                                 ("mean of layer 1", x[0, start:].mean(0))):
                gap = (found[name][i, j] - wanted).norm() / wanted.norm()
                assert gap < 0.03, f"{name}: not what the model has there"  # bfloat16 has 8 bits
    assert not model.blocks[0]._forward_hooks, "the hook is left in the model"


def test_the_head_is_the_one_optimum():
    """At the optimum the gradient, worked out by hand, is 0; scaling the features changes no order."""
    torch.manual_seed(3)
    x = torch.randn(30, 6, dtype=torch.float64) * 5 + torch.tensor([2.0, 0, -1, 0, 0, 0])
    for penalty in (0.05, 1.0):
        w = real.linear_head(x, penalty)
        scaled = x / (x**2).mean() ** 0.5
        slope = -(scaled * (1 / (1 + (scaled @ w).exp()))[:, None]).mean(0) + penalty * w
        assert slope.abs().max() < 1e-6, "not the optimum of the loss of Bradley and Terry with its penalty"
        assert torch.allclose(real.linear_head(100 * x, penalty), w, atol=1e-5), "the unit of features has a say"
    assert w[0] > 0 > w[2] and real.linear_head(x, 0.05).norm() > w.norm()


def test_lora_trains_adapters_and_head_alone(policy, file):
    """Whatever is frozen stays as it is, all adapters move, and the pairs that are learned from come apart."""
    opened, pairs = real.with_adapters(reward.judge(policy), lora.LoRAConfig(rank=3, alpha=5.0)), read_pairs(file)
    before = {name: p.clone() for name, p in opened.model.named_parameters()}
    ticks = []
    losses = real.tune(opened, pairs, Real(steps=25, batch_size=6, lr=0.02).recipe(), lambda *t: ticks.append(t))
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.5, "nothing is learned"
    assert ticks == list(enumerate(losses, 1))
    assert all(p.grad is None for p in opened.model.parameters()), "a step goes on with the gradients of earlier ones"
    moved = {name for name, p in opened.model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in opened.model.named_parameters() if p.requires_grad}
    assert moved == trained and "head.weight" in trained, f"frozen and moved, or not moved: {moved ^ trained}"
    assert len(trained) == 1 + 2 * 2 * 7 and all(name.endswith((".a", ".b", "head.weight")) for name in trained)
    assert reward.accuracy(*reward.score_pairs(opened, pairs)) > 0.8, "it is the rejected answers that score higher"


def test_every_pair_is_learned_from(policy, monkeypatch, file):
    """In a pass no pair comes twice; chosen and rejected are told apart; the seed gives the order."""
    pairs, seen, pad = read_pairs(file)[:12], [], reward.pad_right
    monkeypatch.setattr(real.reward, "pad_right", lambda rows, device: seen[-1].extend(rows) or pad(rows, device))
    for seed in (1, 1, 2):
        seen.append([])
        opened = real.with_adapters(reward.judge(policy), lora.LoRAConfig())
        real.tune(opened, pairs, replace(Real(steps=3, batch_size=4).recipe(), seed=seed), lambda *_: None)
    rows = reward.encode(opened, [talk for each in pairs for talk in both(each)])
    wanted = sorted(zip(rows[0::2], rows[1::2], strict=True))
    for batch in seen:
        assert sorted(zip(batch[0::2], batch[1::2], strict=True)) == wanted, "a pair was missed, or turned round"
    assert seen[0] == seen[1] != seen[2], "the order does not come from the seed"


def test_no_prompt_is_on_both_sides(file):
    """Of 20 prompts with two pairs each, 4 are tested on; another seed tests on others."""
    pairs = read_pairs(file)
    learn, held = real.split(pairs, 0.2, 0)
    assert sorted(learn + held) == list(range(40)) and len(held) == 8, "a pair is missing, or on both sides"
    prompts = [{str(pairs[i]["prompt"]) for i in part} for part in (learn, held)]
    assert not prompts[0] & prompts[1], "a prompt is learned from and tested on"
    assert real.split(pairs, 0.2, 1)[1] != held == real.split(pairs, 0.2, 0)[1]
    again = pair(pairs[0]["prompt"], "a", "b")
    with pytest.raises(BadInput, match="one prompt"):
        real.split([pairs[0], again], 0.2, 0)


def test_the_demo_runs(out, file, capsys):
    """A row for the ruler, three linear heads and LoRA, measured on the same held-out pairs; a figure."""
    real.main(["--data", str(file), *QUICK, "--layer", "1"])
    printed, rows = capsys.readouterr().out, json.loads((out / "real" / "summary.json").read_text("utf-8"))["rows"]
    judges = [row["judge"] for row in rows]
    assert judges == [judges[0], *(f"linear head, {name}" for name in (
        "last token", "last token of layer 1", "mean of layer 1")), "LoRA"] and judges[0].startswith("always the ")
    for row in rows:
        assert 0 <= row["low"] <= row["right"] <= row["high"] <= 1 and row["right"] * 8 == int(row["right"] * 8), row
    assert [row["trained"] for row in rows[:4]] == [0, 16, 16, 16] and rows[4]["trained"] > 16
    assert rows[4]["all splits"] is None and rows[1]["spread"] is not None and "32 pairs to train on, 8" in printed
    assert (out / "real" / "real.png").stat().st_size > 5000
    assert len((out / "real" / "metrics.jsonl").read_text("utf-8").splitlines()) == 4
    real.main(["--data", str(file), *QUICK, "--pairs", "20", "--seeds", "1", "--name", "less"])
    [row] = [r for r in json.loads((out / "less" / "summary.json").read_text("utf-8"))["rows"] if "mean" in r["judge"]]
    assert row["spread"] is None and row["judge"].endswith("layer 1"), "of two layers, the one at two fifths"


def test_what_is_missing_is_named(out, file, monkeypatch):
    """Without --data the published pairs are asked for; what cannot be is refused."""
    monkeypatch.setattr(real.corpus, "records", lambda name: {"preferences": file}[name])
    with pytest.raises(BadInput, match="other.jsonl"):
        real.main([*QUICK, "--data", str(out / "other.jsonl")])
    for flag, value, said in (
        ("--steps", "0", "steps"), ("--rank", "0", "rank"), ("--pairs", "0", "--pairs 0"), ("--seeds", "0", "--seeds"),
        ("--held-out", "1", "--held-out"), ("--penalty", "0", "--penalty"), ("--layer", "3", "layers 1 to 2"),
        ("--batch-size", "99", "do not fill"), ("--model", "other.gguf", "other.gguf"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=re.escape(said)):
            real.main([*QUICK, flag, value])
    assert not (out / "real" / "summary.json").exists()
