"""A small text, a policy with random weights, and a place for what the demos write."""

import random

import pytest
import torch
from torch import nn

import checkpoint
from chat import form, ours, with_tags
from hf import Opened
from model import GPT, ModelConfig
from tokenizer import CharTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHAPE = {"block_size": 104, "n_embd": 16, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "n_hidden": 24}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file with some 400 words, in which the demos find their tasks."""
    pick = random.Random(1)
    known = ["".join(pick.choices(LETTERS, k=pick.randint(3, 8))) for _ in range(400)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(" ".join(known[i:i + 8]) for i in range(0, 400, 8)) * 3, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def policy() -> Opened:
    """A language model that knows the tags, and writes letters and ends of answers by chance."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer(LETTERS + LETTERS.upper() + "0123456789 ',-.:!?\n")
    opened = ours(*with_tags(GPT(ModelConfig(vocab_size=len(tokenizer), **SHAPE)), tokenizer))
    for p in opened.model.parameters():
        nn.init.normal_(p, std=0.3)
    return opened


@pytest.fixture
def out(policy, tmp_path, monkeypatch):
    """Where the runs of this test go; the policy is there, as the run "tiny"."""
    monkeypatch.setenv("STAGES_OUT", str(tmp_path / "out"))
    file = tmp_path / "out" / "tiny" / "model.pt"
    file.parent.mkdir(parents=True)
    past = {"optimizer": {}, "step": 1, "seconds": 0.0, "args": {}}
    checkpoint.save(file, policy.model, policy.tokenizer, **past, **form(policy))
    return tmp_path / "out"


@pytest.fixture
def flags(text, out):
    """What makes any demo of this stage that has a policy run in a second or two."""
    return ["--policy", "tiny", "--corpus", str(text), "--device", "cpu", "--steps", "2", "--seeds", "1",
            "--batch-size", "3", "--pairs", "48", "--test", "18"]  # fmt: skip
