"""The batch is held against one text after the other, and what differs is reported."""

import json

from shared.errors import BadInput

import pytest
import torch
from torch import nn

from checkpoint import save
from demos import batching
from model import GPT, ModelConfig
from tokenizer import CharTokenizer


def tiny() -> GPT:
    torch.manual_seed(0)
    sizes = {"block_size": 20, "n_embd": 24, "n_head": 6, "n_kv_head": 2, "n_layer": 3}
    model = GPT(ModelConfig(vocab_size=29, **sizes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model.eval()


def test_each_text_of_a_batch_is_the_one_written_alone(monkeypatch):
    """Texts that are equal are counted: all of a sound batch, and not all when padding may be looked at."""
    model = tiny()
    prompts = batching.mixed_prompts(model, 5, 13)
    assert [len(ids) for ids in prompts] == [1, 4, 7, 10, 13], "lengths at equal distances"
    with torch.no_grad():  # one text by hand, without a cache
        text = list(prompts[1])
        for _ in range(6):
            text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    sample, written = batching.sample, []

    def spy(*args, **more):
        written.append(sample(*args, **more))
        return written[-1]

    monkeypatch.setattr(batching, "sample", spy)
    found = batching.compare(model, prompts, 6)
    assert written[-1].shape == (5, 6) and written[-1][1].tolist() == text[4:], "not the likeliest tokens"
    assert found["equal"] == found["texts"] == 5 and found["distinct"] > 2, f"{found}: the padding was seen"
    assert found["times as fast"] == pytest.approx(found["at once"] / found["one by one"])

    def seen(prompts, device):
        ids, pad = pad_left(prompts, device)
        return ids, torch.zeros_like(pad)

    pad_left = batching.pad_left
    monkeypatch.setattr(batching, "pad_left", seen)
    assert 1 <= batching.compare(model, prompts, 6)["equal"] < 5, "what differs is not reported"


def test_the_demo_runs(out, capsys):
    """The whole demo on a run of train.py, with prompts longer than it was trained on."""
    tokenizer = CharTokenizer("".join(map(chr, range(60, 89))))
    (out / "default").mkdir(parents=True)
    save(out / "default" / "model.pt", tiny(), tokenizer, optimizer={}, args={}, step=1, seconds=1.0)
    batching.main(["--texts", "3", "--longest", "30", "--length", "4"])
    summary = json.loads((out / "batching" / "summary.json").read_text("utf-8"))
    assert summary["texts"] == summary["equal"] == 3 and summary["measured"] == "default, float32"
    assert summary["one by one"] > 0 and "prompts of 1 to 30 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--texts", "--longest", "--length"])
def test_bad_flags_are_refused(out, flag):
    """At least one text, one token of a prompt and one token to write."""
    with pytest.raises(BadInput, match=f"{flag} 0"):
        batching.main([flag, "0"])
