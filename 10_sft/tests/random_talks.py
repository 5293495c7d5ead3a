"""Small random models, conversations and texts for the checkpoints of fine-tuning."""

import random

import torch
from torch import nn

from chat import ours, with_tags
from data import Example
from hf import Opened
from model import GPT, ModelConfig
from tokenizer import CharTokenizer

SHAPE = {"block_size": 48, "n_embd": 16, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "n_hidden": 24}


def opened(**changes) -> Opened:
    """A float64 model with the tags of a conversation, whose weights are far from their start."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer("abcdefghijklmnopqrstuvwxyz .?")
    model = GPT(ModelConfig(vocab_size=len(tokenizer), **SHAPE | changes))
    found = ours(*with_tags(model, tokenizer))
    for p in found.model.double().parameters():
        nn.init.normal_(p, std=0.4)
    return found


def examples(n: int = 10) -> list[Example]:
    """Conversations of 2 to 39 tokens, with one answer or several; the last one has none."""
    rng = random.Random(3)
    made = []
    for length in [2, 39, 17, 3, *(rng.randint(4, 30) for _ in range(n - 4))]:
        learned, on = [False], False
        for _ in range(length - 1):
            on = rng.random() < 0.4 or on and rng.random() < 0.8
            learned.append(on)
        made.append(Example([rng.randrange(24) for _ in range(length)], learned))
    made[-1].learned = [False] * len(made[-1].ids)
    return made


def text(n: int = 3000) -> str:
    """A text of about n characters, with some 200 different words."""
    rng = random.Random(2)
    words = ["".join(rng.choice("aeioudlmnrst") for _ in range(rng.randint(3, 6))) for _ in range(200)]
    found = words[:]
    while sum(map(len, found)) + len(found) < n:
        found.append(rng.choice(words))
    return "\n".join(" ".join(found[i:i + 8]) + "." for i in range(0, len(found), 8))
