"""Small random policies and reward models, conversations and pairs for the checkpoints of reward models."""

import random

import torch
from torch import nn

import checkpoint
import reward
from chat import form, ours, with_tags
from hf import Opened
from model import GPT, ModelConfig
from preferences import pair
from tokenizer import CharTokenizer

# A context that is no multiple of 16, as padding is.
SHAPE = {"block_size": 40, "n_embd": 16, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "n_hidden": 24}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?!'-"


def policy(dtype=torch.float64, **changes) -> Opened:
    """A language model that knows the tags of a conversation, with weights far from their start."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer(LETTERS)
    found = ours(*with_tags(GPT(ModelConfig(vocab_size=len(tokenizer), **SHAPE | changes)), tokenizer))
    for p in found.model.to(dtype).parameters():
        nn.init.normal_(p, std=0.4)
    return found


def judge(both_ways: bool = False, dtype=torch.float64, **changes) -> Opened:
    """A reward model with weights far from their start, in evaluation mode."""
    found = reward.judge(policy(**changes), both_ways)
    torch.manual_seed(1)
    for p in found.model.to(dtype).eval().parameters():
        nn.init.normal_(p, std=0.4)
    return found


def talk(asked: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


# Of 7 to 39 tokens, one with several turns.
TALKS = [
    talk("reverse it", "ti"), talk("a", "bb"), talk("say which is more of 12 and 7.", "12"), talk("hm?", "Z"),
    [{"role": "system", "content": "Be."}, *talk("who", "me"), *talk("why so", "no idea")], talk("copy love", "lov"),
    talk("x", "a longer answer than the question"),
]  # fmt: skip


def pairs(n: int = 9, seed: int = 3) -> list[dict]:
    """Pairs of answers of different lengths."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices(LETTERS[:26], k=rng.randint(1, 9))) for _ in range(3 * n)]
    return [pair(talk(texts[i], "-")[:1], texts[i + 1], texts[i + 2]) for i in range(0, 3 * n, 3)]


def write(folder, name: str, opened: Opened):
    """The run `name` of a policy, as sft.py leaves it."""
    (folder / name).mkdir(parents=True)
    past = {"optimizer": {}, "step": 3, "seconds": 1.0, "args": {}}
    checkpoint.save(folder / name / "model.pt", opened.model, opened.tokenizer, **past, **form(opened))
    (folder / name / "summary.json").write_text("{}", encoding="utf-8")


def corpus(n: int = 60) -> str:
    """A text with n times 5 different words."""
    rng = random.Random(2)
    known = ["".join(rng.choices("aeioudlmnrst", k=rng.randint(4, 7))) for _ in range(5 * n)]
    return "\n".join(" ".join(known[i:i + 5]) for i in range(0, 5 * n, 5)) + "\n"
