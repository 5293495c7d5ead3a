"""GRPO: several answers to one question, and each is compared with the others. No critic, and a checker as the reward.

    uv run python grpo.py                           # the policy "lazy" learns to be right
    uv run python grpo.py --kl k3 --beta 0.1 --name k3
    uv run python grpo.py --baseline rloo --name rloo

Beside PPO it leaves out the critic: how good an answer could be expected to be, the mean of its group tells. With a
checker that knows what is right there is no reward model either ("RLVR", rewards that can be verified). A step:

1. draw a group of answers to each question; 2. check them; 3. advantage = reward - the group's mean, divided by its
spread; 4. make answers with an advantage above 0 likelier, and the others less likely.

Shao et al., "DeepSeekMath" (2024); Liu et al., "Understanding R1-Zero-Like Training" (Dr. GRPO, 2025); Ahmadian et al.,
"Back to Basics" (RLOO, 2024).
"""

import math
from dataclasses import dataclass
from typing import Literal

from shared import options
from shared.errors import BadInput
from shared.program import run_program

import torch

from hf import Opened
from learn import RLConfig, arguments, begin, generator, learn, update
from ppo import clipped, kl_terms
from rollout import draws, exact, log_probs, masked_mean, rollout


@dataclass
class GRPOConfig(RLConfig):
    """The recipe. Raises BadInput for one that cannot run."""

    steps: int = 90  # times that answers are drawn and learned from
    questions: int = 16  # of a step
    group: int = 8  # answers to each question
    epochs: int = 1  # passes over the answers of a step
    clip_ratio: float = 0.2  # how far the probability of a token may move in a step before it stops counting
    baseline: Literal["grpo", "dr-grpo", "rloo"] = "grpo"  # what an answer's reward is compared with
    kl: Literal["none", "k2", "k3"] = "none"  # the pull towards the reference, as a part of the loss
    beta: float = 0.05  # its weight

    def __post_init__(self):
        super().__post_init__()
        if self.group < 2:
            raise BadInput(f"group is {self.group}: an answer is compared with others, so it must be at least 2")
        if self.questions < 1 or self.epochs < 1:
            raise BadInput("questions and epochs must be at least 1")
        if not self.clip_ratio > 0 or not 0 <= self.beta < math.inf:
            raise BadInput(f"clip_ratio {self.clip_ratio} and beta {self.beta}: above 0, and 0 or more")


def advantages(rewards, baseline: str = "grpo"):
    """How much better each answer is than the others to its question: rewards [questions, group] -> the same shape.

    grpo: minus the group's mean, divided by its standard deviation. dr-grpo: minus the mean alone, for the division
    makes all groups count alike, and so questions that are nearly always right, or nearly never, for more than they do
    in the mean reward. rloo: minus the mean of the *other* answers, which an answer's own reward has no part in.
    The deviation is the one with n - 1; 1e-6 is added to it. A group whose answers are all equally good says nothing:
    exactly 0, and not 0 / 0.
    """
    rewards = rewards - rewards[:, :1]  # equal ones are exactly 0 now: the mean of eight times 0.35 is not quite 0.35
    centred = rewards - rewards.mean(1, keepdim=True)
    if baseline == "dr-grpo":
        return centred
    if baseline == "rloo":
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)
    return centred / (rewards.std(1, keepdim=True) + 1e-6)


def grpo_loss(new, old, reference, advantage, mask, config: GRPOConfig):
    """The loss of drawn answers -> (loss, share of tokens whose ratio is clipped).

    ln P of their tokens [B, A] under the policy now, when it drew them, and under the reference; advantage [B].
    GRPO averages over the tokens of each answer, then over answers, so that a token of a long wrong answer counts less
    than one of a short one. Dr. GRPO and RLOO divide the sum over all tokens by one constant instead, B times
    `config.length`. A ratio is clipped where it is further than `clip_ratio` from 1.
    """
    ratio = (new - old).exp()
    gain = clipped(ratio, advantage[:, None], config.clip_ratio)
    if config.kl != "none":
        gain = gain - config.beta * kl_terms(new, reference, config.kl)
    share = masked_mean((ratio - 1).abs() > config.clip_ratio, mask)
    if config.baseline == "grpo":
        each = (gain * mask).sum(1) / mask.sum(1).clamp(min=1)  # [B]
        return -each.mean(), share
    return -(gain * mask).sum() / (len(mask) * config.length), share


def grpo_step(policy: Opened, reference, records: list[dict], config: GRPOConfig, optimizer, step: int, rewards=exact):
    """One step: draw, check, learn -> numbers by name. `rewards(records, drawn)` gives each answer its reward, [B].

    Without a pull towards the reference, groups whose answers are all equally good teach nothing and are left out. With
    one they stay in: they are pulled as well. The loss is a mean over what is learned from, and `entropy`, `clipped`
    and `kl` are of these answers alone.
    """
    model, asked = policy.model, [record["messages"][:-1] for record in records]
    drawn = rollout(policy, asked, config.length, config.temperature, config.group, generator(config, step))
    reward = rewards(records, drawn)
    advantage = advantages(reward.view(-1, config.group), config.baseline)
    useful = (advantage.abs() > 1e-4).any(1)  # the groups whose answers differ in reward
    told = {"reward": reward.mean().item(), "length": drawn.mask.sum(1).float().mean().item(),
            "ended": sum(drawn.ended) / len(drawn.ended), "useful": useful.float().mean().item()}
    learned = useful if config.kl == "none" else torch.ones_like(useful)
    places = learned.repeat_interleave(config.group).nonzero()[:, 0]
    if not len(places):
        return told
    part, advantage = drawn.rows(places), advantage.flatten()[places].to(drawn.ids.device)
    with torch.no_grad():
        old, entropy = log_probs(model, part, config.temperature, config.precision)
        theirs = log_probs(reference, part, config.temperature, config.precision)[0]
    for _ in range(config.epochs):
        new, _ = log_probs(model, part, config.temperature, config.precision)
        loss, share = grpo_loss(new, old, theirs, advantage, part.mask, config)
        loss.backward()
        told["gradient"] = update(model, optimizer, config, step)
    told |= {"entropy": masked_mean(entropy, part.mask).item(), "clipped": share.item(),
             "kl": (old - theirs).sum(1).mean().item()}
    return told


def main(argv=None):
    args, saved = arguments(argv, GRPOConfig, __doc__, "grpo")
    run = begin(args, options.build(GRPOConfig, args), saved)
    stream = draws(run.records, run.config.questions, run.config.seed, run.step)
    return learn(run, __file__, lambda step: grpo_step(
        run.policy, run.reference, next(stream), run.config, run.optimizer, step), exact)


if __name__ == "__main__":
    run_program(main)
