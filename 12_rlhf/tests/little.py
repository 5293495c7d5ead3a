"""Small random policies, questions and answers for the checkpoints of learning from rewards."""

import copy
import math
import random

import torch
from torch import nn

import checkpoint
import reward
from chat import form, ours, prompt, with_tags
from hf import Opened
from model import GPT, ModelConfig
from tokenizer import CharTokenizer

SHAPE = {"block_size": 40, "n_embd": 16, "n_head": 4, "n_kv_head": 2, "n_layer": 2, "n_hidden": 24}


def policy(letters: str = "ab?", seed: int = 0, std: float = 0.4, dtype=torch.float64, **changes) -> Opened:
    """A model of few letters with random weights, so that one answer in some ends early and others do not."""
    torch.manual_seed(seed)
    tokenizer = CharTokenizer(letters)
    found = ours(*with_tags(GPT(ModelConfig(vocab_size=len(tokenizer), **SHAPE | changes)), tokenizer))
    for p in found.model.to(dtype).parameters():
        nn.init.normal_(p, std=std)
    return found


def neighbour(opened: Opened, std: float = 0.1, seed: int = 1):
    """Another model near it."""
    torch.manual_seed(seed)
    found = copy.deepcopy(opened.model)
    with torch.no_grad():
        for p in found.parameters():
            p += std * torch.randn_like(p)
    return found


def critic(opened: Opened, seed: int = 2):
    """A critic with random weights."""
    torch.manual_seed(seed)
    found = reward.judge(opened).model.double()
    for p in found.parameters():
        nn.init.normal_(p, std=0.4)
    return found


RECORDS = [
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": gold}]}
    for asked, gold in (("a", "b"), ("abba?", "bb"), ("bab", "a"), ("aabbabba?", "ab"), ("?", "ba"), ("bb??", "?"))
]
ASKED = [record["messages"][:-1] for record in RECORDS]


def alone(model, opened: Opened, drawn, i: int, temperature: float = 1.0):
    """ln P of every token at each place of answer i, which is read with its question alone: [length, V].

    No padding, no other answers, no cache, and the softmax written out in float64.
    """
    length = int(drawn.mask[i].sum())
    asked = prompt(opened, ASKED[drawn.which[i]])
    ids = asked + drawn.answers[i, :length].tolist()
    scores = model(torch.tensor([ids]))[0, len(asked) - 1:-1].double() / temperature
    return scores - scores.exp().sum(-1, keepdim=True).log()


def chosen(model, opened: Opened, drawn, i: int, temperature: float = 1.0):
    """ln P of the drawn tokens of answer i: [length]."""
    law = alone(model, opened, drawn, i, temperature)
    return law[torch.arange(len(law)), drawn.answers[i, :len(law)]]


def advantages_of(rewards: list[float], guesses: list[float], gamma: float, lam: float) -> list[float]:
    """GAE of one answer as the double sum of its definition: A_t = sum over k of (gamma lam)^k delta_(t + k)."""
    after = [*guesses[1:], 0.0]
    delta = [r + gamma * nxt - now for r, nxt, now in zip(rewards, after, guesses, strict=True)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(len(delta) - t)) for t in range(len(delta))]


def spread_to_one(rows: list[list[float]]) -> list[list[float]]:
    """Numbers of unequal rows with mean 0 and spread 1 over all of them."""
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    spread = math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat))
    return [[(x - mean) / (spread + 1e-6) for x in row] for row in rows]


def gradients(loss, model) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def moved(before: dict, model, lr: float) -> dict[str, torch.Tensor]:
    """The gradient that a step of plain descent took: (before - after) / lr."""
    return {name: (before[name] - p.detach()) / lr for name, p in model.named_parameters()}


def same(found: dict, expected: dict, what: str):
    """Gradients by name are equal."""
    for name, gradient in expected.items():
        gradient = torch.zeros_like(found[name]) if gradient is None else gradient
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-5, atol=1e-8, msg=lambda m, name=name: f"gradient of {name}: {what}\n{m}")


def text(n: int = 2500) -> str:
    """A text with some 200 different words."""
    rng = random.Random(2)
    words = ["".join(rng.choice("aeioudlmnrst") for _ in range(rng.randint(3, 5))) for _ in range(220)]
    found = words[:]
    while sum(map(len, found)) + len(found) < n:
        found.append(rng.choice(words))
    return "\n".join(" ".join(found[i:i + 8]) + "." for i in range(0, len(found), 8))


def runs(folder):
    """A run "little" with a random policy that knows all the letters of the tasks, and a run "judge" beside it."""
    letters = "\n " + "".join(map(chr, range(33, 123)))
    found = policy(letters, std=0.2, dtype=torch.float32, **{"block_size": 96, "n_layer": 1})
    for name in ("little", "judge"):
        (folder / name).mkdir(parents=True)
    checkpoint.save(folder / "little" / "model.pt", found.model, found.tokenizer, **form(found), optimizer={}, step=0,
                    seconds=0.0, args={})
    judge = reward.judge(found)
    nn.init.normal_(judge.model.head.weight, std=1.0)
    reward.save(folder / "judge" / "model.pt", judge)
