"""What a policy writes, and how likely it was: the data of reinforcement learning, which the model makes itself.

Supervised tuning is shown answers. Here the model draws them from its own distribution, is told how good they were, and
makes the good ones likelier. So two numbers must belong to the same law: the probability with which a token was drawn,
and the one that is trained on. Temperature 1 and all tokens allowed is the simplest such law; with another temperature,
the scores are divided by it in both places. Answers are drawn in float32, whatever the precision of training: with
bfloat16 the two laws differ, but by no more than what rounding does.

Shapes: B answers of at most A tokens, each after a prompt of at most P.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.errors import BadInput

import torch

from chat import prompt, said
from hf import Opened
from preferences import quality
from sample import SampleConfig, evaluation, sample


@dataclass
class Rollout:
    """Answers to prompts. All prompts end at place P, so that the answers stand in the same columns."""

    ids: torch.Tensor  # [B, P + A], prompts padded on the left, answers on the right
    pad: torch.Tensor  # [B], places before each prompt
    mask: torch.Tensor  # [B, A], True for the tokens that the policy drew, the one that ends the answer included
    texts: list[str]  # B answers, without the token that ends them
    ended: list[bool]  # B, whether the answer has an end, or was cut off after A tokens
    which: list[int] = field(default_factory=list)  # B, the prompt that each answers, counted from 0

    @property
    def answers(self):
        """The drawn tokens: [B, A]."""
        return self.ids[:, -self.mask.shape[1]:]

    def rows(self, places) -> "Rollout":
        """The same of some answers only, by their places, a list or a tensor of numbers; `which` stays what it was."""
        places = [int(i) for i in places]
        lists = ([whole[i] for i in places] for whole in (self.texts, self.ended, self.which))
        return Rollout(self.ids[places], self.pad[places], self.mask[places], *lists)


@torch.no_grad()
def rollout(opened: Opened, asked: list[list[dict]], length: int, temperature: float = 1.0, n: int = 1, generator=None):
    """Draw `n` answers of at most `length` tokens to each conversation of `asked`, all in one batch -> Rollout.

    Answers to one prompt stand next to each other; A is `length`, also where all of them end before. Raises BadInput
    where prompt and answer do not fit into the context, which tells both sizes and the context's.
    """
    device = opened.model.tok_emb.weight.device
    encoded = [ids for messages in asked for ids in [prompt(opened, messages)] * n]
    P = max(map(len, encoded))
    P = max(P, min(-(-P // 16) * 16, opened.model.config.block_size - length))  # few shapes: each is prepared once
    if P + length > opened.model.config.block_size:
        raise BadInput(f"a prompt of {P} and an answer of {length} tokens: the model's context has "
                       f"{opened.model.config.block_size}")
    pad = torch.tensor([P - len(ids) for ids in encoded], device=device)
    context = torch.tensor([[0] * (P - len(ids)) + ids for ids in encoded], device=device)
    config = SampleConfig(temperature)
    drawn = sample(opened.model, context, length, config, generator, pad, opened.ends)  # [B, at most A], -1 behind ends
    answers = torch.full((len(encoded), length), -1)
    answers[:, :drawn.shape[1]] = drawn
    mask = answers >= 0
    ends = torch.isin(answers, torch.tensor(sorted(opened.ends)))
    texts = [said(opened, row[keep].tolist()) for row, keep in zip(answers, mask & ~ends, strict=True)]
    ids = torch.cat([context, answers.clamp(min=0).to(device)], dim=1)
    which = [i for i in range(len(asked)) for _ in range(n)]
    return Rollout(ids, pad, mask.to(device), texts, ends.any(1).tolist(), which)


def log_probs(model, drawn: Rollout, temperature: float = 1.0, precision: str = "float32"):
    """ln P of each drawn token and the entropy of the law that it was drawn from, nats: [B, A] x 2, 0 outside the mask.

    Scores are divided by the temperature, as they were for drawing. At temperature 0 nothing is drawn, and a law that
    has one possible answer has nothing to learn from it. In evaluation mode, as for drawing: with dropout, the ratio of
    a policy to itself would not be 1. Scores of less than float32 become float32, others stay as they are. Raises
    BadInput for a temperature that is not above 0.
    """
    if temperature <= 0:
        raise BadInput(f"temperature {temperature}: to learn from what was drawn, it must be above 0")
    A = drawn.mask.shape[1]
    with evaluation(model), torch.autocast(drawn.ids.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(drawn.ids[:, :-1], pad=drawn.pad, last=A)  # [B, A, V]: the place before a token scores it
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    law = logits.log_softmax(-1)
    chosen = law.gather(-1, drawn.answers[..., None])[..., 0]
    entropy = -(law.exp() * law).sum(-1)
    return chosen * drawn.mask, entropy * drawn.mask


def masked_mean(x, mask):
    """The mean of x over the places that the mask has; 0 where it has none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def exact(records: list[dict], drawn: Rollout) -> torch.Tensor:
    """The verifier: 1 for an answer that is right to the last letter and has an end, else 0. [B]"""
    golds = [records[i]["messages"][-1]["content"] for i in drawn.which]
    right = [text == gold and over for text, gold, over in zip(drawn.texts, golds, drawn.ended, strict=True)]
    return torch.tensor(right, dtype=torch.float32)


def partly(records: list[dict], drawn: Rollout) -> torch.Tensor:
    """How good each answer is by the hidden scorer, from 0 to 1: a reward with steps on the way. [B]"""
    golds = [records[i]["messages"][-1]["content"] for i in drawn.which]
    return torch.tensor([quality(text, gold) for text, gold in zip(drawn.texts, golds, strict=True)])


@torch.no_grad()
def look(opened: Opened, reference, records: list[dict], length: int, rewards: Callable | None = None, seed: int = 0):
    """How far a policy has come, on records that it does not learn from -> numbers by name.

    `greedy` and `sampled`: the share of right answers, the likeliest taken or drawn. `kl`: the KL divergence from the
    reference, nats per answer, from the drawn answers. `reward`: the mean of what `rewards(records, drawn)` gives them.
    """
    asked = [record["messages"][:-1] for record in records]
    generator = torch.Generator().manual_seed(seed)
    with evaluation(opened.model), evaluation(reference):
        drawn = rollout(opened, asked, length, generator=generator)
        likeliest = rollout(opened, asked, length, temperature=0.0)
        ours, theirs = (log_probs(model, drawn)[0].sum(1) for model in (opened.model, reference))
    told = {"greedy": exact(records, likeliest), "sampled": exact(records, drawn), "kl": ours - theirs}
    told["length"] = drawn.mask.sum(1).float()
    if rewards is not None:
        told["reward"] = rewards(records, drawn)
    return {name: values.mean().item() for name, values in told.items()}


def draws(records: list[dict], n: int, seed: int, start: int = 0):
    """`n` records for each step without end, from step `start` on; each step has random numbers of its own.

    Raises BadInput where there are not as many.
    """
    if n > len(records):
        raise BadInput(f"a step takes {n} of {len(records)} records: use more of them, or fewer in a step")
    for step in itertools.count(start):
        yield random.Random(f"{seed} {step}").sample(records, n)
