"""DPO: learning from preferences without a reward model, and without drawing answers while it learns.

    uv run python dpo.py                                  # pairs of the policy's own answers, labelled by the verifier
    uv run python dpo.py --data my/pairs.jsonl --name mine
    uv run python dpo.py --loss ipo --beta 0.1 --name ipo

The best policy for a reward r that stays near a reference is known: P(y) = P_reference(y) exp(r(y) / beta) / Z. Read
the other way round, a policy *is* a reward model: r(y) = beta ln (P(y) / P_reference(y)) + a constant of the prompt,
which a comparison of two answers to it does not see. So the reward model's loss can be put on the policy itself:

    -ln sigmoid(beta [(ln P(chosen) - ln P_ref(chosen)) - (ln P(rejected) - ln P_ref(rejected))])

Rafailov et al., "Direct Preference Optimization" (2023), equation 7. IPO: Azar et al. (2023), equation 17.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from shared import options
from shared.console import progress
from shared.errors import BadInput
from shared.program import run_program

import torch
import torch.nn.functional as F

from chat import conversation, prompt
from data import Example, apart, collate
from hf import Opened
from learn import RLConfig, Run, arguments, begin, learn, update
from preferences import against_gold, both, draw_answers, read_pairs
from rollout import draws
from sample import evaluation


@dataclass
class DPOConfig(RLConfig):
    """The recipe. Raises BadInput for one that cannot run."""

    steps: int = 60  # optimiser steps; more of them make both answers unlikely
    batch_size: int = 64  # pairs of a step
    beta: float = 0.3  # how near to the reference: what one nat of ln (P / P_reference) is worth as a reward
    loss: Literal["dpo", "ipo"] = "dpo"  # ipo stops at a difference of 1 / (2 beta), where dpo never has enough
    lr: float = 3e-5  # learning rate of AdamW
    temperature: float = 1.0  # of drawing the answers of which pairs are made
    eval_every: int = 20  # steps between looks at held-out tasks

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1 or not 0 < self.beta < math.inf:
            raise BadInput(f"batch_size is {self.batch_size} and beta {self.beta}: at least 1, and above 0 and finite")


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float, kind: str = "dpo"):
    """The loss of each pair: ln P of whole answers under the policy and the reference, [N] x 4 -> [N].

    ln P of an answer is a sum over its tokens. With the mean, a long answer's probability would count for less. With d
    the difference in the brackets above, ipo is (d - 1 / (2 beta))^2.
    """
    difference = (chosen - ref_chosen) - (rejected - ref_rejected)
    if kind == "ipo":
        return (difference - 1 / (2 * beta)).square()
    return -F.logsigmoid(beta * difference)


def answer_log_probs(model, examples: list[Example], precision: str = "float32"):
    """ln P of the learned tokens of each conversation, summed: [N], nats. Without dropout: the reference has none.

    Only these are scored: with a large vocabulary, scores of the others would cost more than the rest of the model.
    """
    batch = collate(examples).to(next(model.parameters()).device)
    learned = batch.learned  # [N, T]
    # Padding on the right is seen by nothing before it, but may reach beyond the context.
    look = None if batch.x.shape[1] <= model.config.block_size else apart(model, batch)
    with evaluation(model), torch.autocast(batch.x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        h = model.features(batch.x, look=look)  # [N, T, C]
        logits = model.head(h[learned])  # [M, V], M learned tokens
    each = -F.cross_entropy(logits.float(), batch.y[learned], reduction="none")  # [M]
    return each.new_zeros(len(examples)).index_add(0, learned.nonzero()[:, 0], each)


def encode(opened: Opened, pairs: list[dict]) -> list[tuple[Example, Example]]:
    """Pairs as tokens, the chosen conversation first. Only the last answer is learned: earlier ones are the prompt's.

    Raises BadInput for a pair that is longer than the model's context.
    """
    rows, room = [], opened.model.config.block_size
    for i, each in enumerate(pairs):
        rows.append(tuple(conversation(opened, talk) for talk in both(each)))
        earlier = len(prompt(opened, each["prompt"]))
        for example in rows[-1]:
            example.learned[:earlier] = [False] * earlier
            if (length := len(example.ids)) > room:
                raise BadInput(f"pair {i + 1} has {length} tokens, and the model's context {room}: leave it out")
    return rows


def reference_log_probs(reference, rows: list[tuple[Example, Example]], precision: str, size: int = 64):
    """ln P of both answers of each pair under the reference: [N, 2]. It never changes, so this is done once."""
    flat = [example for two in rows for example in two]
    order = sorted(range(len(flat)), key=lambda i: len(flat[i].ids))  # neighbours of equal length need little padding
    found = torch.empty(len(flat))
    with torch.no_grad(), progress(len(flat), "the reference reads") as bar:
        for start in range(0, len(order), size):
            part = order[start:start + size]
            found[part] = answer_log_probs(reference, [flat[i] for i in part], precision).cpu()
            bar.update(start + len(part))
    return found.view(-1, 2)


def dpo_step(run: Run, rows, before, places: list[int], step: int) -> dict:
    """One step on the pairs at `places`, with the reference's ln P `before` [N, 2] -> numbers by name.

    `chosen` and `rejected`: by how much ln P of the answers has changed since the beginning. Both may fall: the loss
    asks for a difference alone.
    """
    config, model = run.config, run.policy.model
    now = answer_log_probs(model, [each for i in places for each in rows[i]], config.precision).view(-1, 2)  # [N, 2]
    then = before[places].to(now)
    loss = dpo_loss(now[:, 0], now[:, 1], then[:, 0], then[:, 1], config.beta, config.loss).mean()
    loss.backward()
    norm = update(model, run.optimizer, config, step)
    moved = (now.detach() - then).mean(0)
    right = ((now - then)[:, 0] > (now - then)[:, 1]).float().mean()
    return {"loss": loss.item(), "right_pairs": right.item(), "chosen": moved[0].item(), "rejected": moved[1].item(),
            "gradient": norm}


def own_pairs(policy: Opened, records: list[dict], temperature: float, seed: int) -> list[dict]:
    """A right and a wrong answer to each task, both the policy's own, where it wrote both among four.

    An answer that it would hardly ever give can be made likelier by much, and nearly nothing is learned by it.
    """
    drawn = draw_answers(policy, records, 4, temperature, seed)
    able = [i for i, record in enumerate(records) if record["messages"][-1]["content"] in drawn[i]]
    return against_gold([drawn[i] for i in able], [records[i] for i in able])


def main(argv=None):
    def add(parser):
        parser.add_argument("--data", help="a file of pairs (default: right and wrong answers of the policy)")

    args, saved = arguments(argv, DPOConfig, __doc__, "dpo", add)
    given = None if args.data is None else read_pairs(args.data)  # a bad record is said first
    run = begin(args, options.build(DPOConfig, args), saved)
    config = run.config
    first = replace(run.policy, model=run.reference)
    rows = encode(run.policy, given or own_pairs(first, run.records, config.temperature, config.seed))
    if len(rows) < config.batch_size:
        raise BadInput(f"{len(rows)} pairs do not fill a batch of {config.batch_size}: use more, or a smaller batch")
    before = reference_log_probs(run.reference, rows, config.precision)
    stream = draws(list(range(len(rows))), config.batch_size, config.seed, run.step)
    return learn(run, __file__, lambda step: dpo_step(run, rows, before, next(stream), step))


if __name__ == "__main__":
    run_program(main)
