"""Checkpoints of the reference demo: a model read from a folder is scored as any other is, in nats per character."""

import json
import math

from shared.errors import BadInput

import pytest
import torch

from demos.reference import main
from hf import export
from model import GPT, ModelConfig
from tokenizer import train_tokenizer

TEXT = "the cat sat on the mat, the dog sat on the log; " * 40 + "é" * 30


@pytest.fixture
def folder(tmp_path):
    """A small model of 300 byte pairs, as a folder that `hf.load` opens, and a text."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("bpe", TEXT, 300)
    model = GPT(ModelConfig(vocab_size=len(tokenizer), block_size=16, n_embd=12, n_head=2, n_layer=1))
    torch.nn.init.normal_(model.norm.weight)
    export(model, tokenizer, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path, model, tokenizer


def test_the_loss_is_that_of_the_windows_one_by_one(folder, monkeypatch):
    """Nats per character: the sum over all tokens but the first, in windows, divided by the characters they spell."""
    tmp_path, model, tokenizer = folder
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    where = ["--model", str(tmp_path / "model"), "--corpus", str(tmp_path / "text.txt")]
    main([*where, "--window", "5", "--dtype", "float32"])
    [summary] = [json.loads(file.read_text("utf-8")) for file in (tmp_path / "out").rglob("summary.json")]
    val = TEXT[int(0.9 * len(TEXT)):]
    ids, total = tokenizer.encode(val), 0.0
    for i in range(0, len(ids) - 1, 5):
        x, y = ids[i:i + 5], ids[i + 1:i + 6]
        logits = model(torch.tensor([x[:len(y)]]))[0].double()
        total -= sum(torch.log_softmax(row, 0)[target].item() for row, target in zip(logits, y, strict=True))
    chars = len(val) - len(tokenizer.decode(ids[:1]))
    assert summary["val_loss"] == pytest.approx(total / chars, rel=1e-4), "not the nats of all tokens but the first"
    bpb = total / chars / math.log(2) * len(val) / len(val.encode("utf-8"))
    assert summary["val_bpb"] == pytest.approx(bpb, rel=1e-4), "bits per byte count é as one byte"
    assert summary["seconds"] is None and summary["reading"] > 0, "the ladder's seconds are those of training"


@pytest.mark.parametrize("words", [["--window", "0"], ["--window", "17"], ["--model", "nowhere.gguf"]])
def test_bad_input_is_one_line(folder, words):
    """A window that the model does not take and a model that is not there are one clear line."""
    given = ["--model", str(folder[0] / "model"), "--corpus", str(folder[0] / "text.txt")]
    with pytest.raises(BadInput, match=words[1]):
        main(given + words)
