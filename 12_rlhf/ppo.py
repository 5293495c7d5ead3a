"""PPO: the policy learns from the scores of a reward model, and is held near the model that it was.

    uv run python ppo.py                                  # needs a reward model, which is trained where there is none
    uv run python ppo.py --beta 0 --lr 1e-3 --name free   # not held: the score rises, and the answers get worse
    uv run python ppo.py --kl-target 2 --name adaptive    # beta follows the KL divergence

Beside REINFORCE, which makes an answer likelier by how good it was, PPO has three parts:

- a critic, a second network that guesses at each token how good the answer will be. What counts is how much better it
  became than guessed, token by token (advantages by GAE). It begins as the reward model, whose scores are not in the
  units of the rewards, (score - mean) / spread: its first guesses are off by a constant and a factor. Advantages are
  normalised, which mostly forgives that, and `value_clip` lets the critic correct it slowly;
- several passes over the same answers, and a clip, beyond which a token's probability gains nothing by moving further;
- a price for each token on how far it is from the reference: r_t = -beta (ln P(token) - ln P_reference(token)).

Schulman et al., "Proximal Policy Optimization Algorithms" (2017); for language models: Stiennon et al., "Learning to
summarize from human feedback" (2020), and Ouyang et al., "Training language models to follow instructions" (2022).
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

from shared import options
from shared.console import say
from shared.device import setup
from shared.errors import BadInput
from shared.program import command, run_program
from shared.runlog import run_folder

import torch

import reward
from hf import Opened
from learn import RLConfig, Run, arguments, begin, generator, learn, update
from rollout import Rollout, draws, exact, log_probs, masked_mean, rollout


@dataclass
class PPOConfig(RLConfig):
    """The recipe. Raises BadInput for one that cannot run."""

    steps: int = 30  # times that answers are drawn and learned from
    questions: int = 64  # of a step, each with one answer
    epochs: int = 2  # passes over the answers of a step
    minibatch: int = 32  # answers to a step of the optimiser
    clip_ratio: float = 0.2  # how far the probability of a token may move in a step before it stops counting
    value_lr: float = 1e-3  # learning rate of the critic
    value_clip: float = 0.2  # how far a guess may move in a step before it stops counting
    gamma: float = 1.0  # worth of a reward that comes one token later; an answer is short, so nothing is lost
    lam: float = 0.95  # 1: advantages from rewards alone, without bias and noisy; 0: from the critic's next guess alone
    beta: float = 0.2  # price of the KL divergence from the reference, for each nat
    kl_target: float | None = None  # the KL divergence, nats an answer, that beta is moved to reach; none: beta stays
    entropy: float = 0.0  # weight of a bonus for undecided laws

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.gamma <= 1 or not 0 <= self.lam <= 1:
            raise BadInput(f"gamma {self.gamma} and lam {self.lam}: both must be from 0 to 1")
        if self.minibatch < 1 or self.epochs < 1 or self.questions < 1:
            raise BadInput("questions, epochs and minibatch must be at least 1")
        for name in ("clip_ratio", "value_lr", "value_clip", "kl_target"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be above 0, and finite")
        for name in ("beta", "entropy"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be 0 or more, and finite")
        if self.beta == 0 and self.kl_target is not None:
            raise BadInput(f"beta is 0 and kl_target {self.kl_target}: beta is moved by shares of itself and stays 0")


def clipped(ratio, advantage, clip: float):
    """min(r A, clip(r, 1 - e, 1 + e) A): no more is gained by moving a probability further than by the share e.

    Schulman et al., "Proximal Policy Optimization Algorithms" (2017), equation 7.
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def kl_terms(new, reference, kind: str):
    """The pull towards the reference at each token: ln P of policy and reference, [...] x 2 -> [...].

    With d = ln P_reference - ln P: k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d. For drawn tokens, k1 and k3 have the KL
    divergence from the reference as their mean, k2 nearly. As a part of a *loss* what counts is the gradient, and there
    it is the other way round. The mean gradient of k1 is 0: it does nothing. That of k2 is the gradient of KL(policy,
    reference). That of k3 is the gradient of KL(reference, policy): another pull, to another place. All of this is for
    whole answers; summed token by token, a pull does not see what an early token does to the KL of later ones.
    Schulman, "Approximating KL Divergence" (2020).
    """
    d = reference - new
    return {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - 1 - d}[kind]


def values(critic, drawn: Rollout, precision: str = "float32"):
    """The critic's guess before each drawn token of how good the answer will be: [B, A], 0 outside the mask."""
    with torch.autocast(drawn.ids.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        guess = critic.head(critic.features(drawn.ids[:, :-1], pad=drawn.pad, last=drawn.mask.shape[1]))[..., 0]
    return guess.to(torch.promote_types(guess.dtype, torch.float32)) * drawn.mask


def token_rewards(score, old, reference, mask, beta: float):
    """What each token earns: minus beta (ln P - ln P_reference), and the last one the answer's score [B]. [B, A]

    The price is a number here, and has no gradient: it is part of the reward, as k1.
    """
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True) - 1  # [B, A]: one in each row
    return (-beta * (old - reference) + last * score[:, None]) * mask


def gae(rewards, guesses, mask, gamma: float, lam: float):
    """Generalised advantage estimation: rewards and guesses [B, A] -> advantages [B, A], and the returns [B, A].

        delta_t = r_t + gamma V_(t+1) - V_t        A_t = delta_t + gamma lam A_(t+1)        return_t = A_t + V_t

    Behind the last token nothing comes: V and A are 0 there, and so are both results. Schulman et al. (2016),
    equation 16.
    """
    advantages, later = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    ahead = torch.zeros_like(later)  # V of the next token
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * ahead - guesses[:, t]
        later = (delta + gamma * lam * later) * mask[:, t]
        advantages[:, t] = later
        ahead = guesses[:, t] * mask[:, t]
    return advantages, (advantages + guesses) * mask


def normalise(x, mask):
    """x with mean 0 and spread 1 over the mask, 0 outside: a step is then as long whatever the size of the rewards.

    The spread is the root of the mean squared distance from the mean, plus 1e-6.
    """
    mean = masked_mean(x, mask)
    spread = masked_mean((x - mean).square(), mask).sqrt()
    return (x - mean) / (spread + 1e-6) * mask


def value_loss(guess, old, returns, mask, clip: float):
    """Half the squared error of a guess, or of the guess clipped to old +- clip, whichever is larger; the mean.

    The clip is on the guess's own change, and has nothing to do with the policy's ratio.
    """
    near = old + (guess - old).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((guess - returns).square(), (near - returns).square()), mask)


def explained(guess, returns, mask) -> float:
    """The share of the returns' variance that the critic guesses: 1 for all of it, 0 or less if it guesses nothing.

    1 - variance of (returns - guess) / variance of the returns: a guess that is always too high by 3 loses nothing.
    """
    error, mean = returns - guess, masked_mean(returns, mask)
    left = masked_mean((error - masked_mean(error, mask)).square(), mask)
    return (1 - left / masked_mean((returns - mean).square(), mask).clamp(min=1e-8)).item()


def adapt(beta: float, kl: float, target: float) -> float:
    """A higher price where the policy is further away than wanted, and a lower one where it is nearer.

    beta (1 + 0.1 e), where e = kl / target - 1, held between -0.2 and 0.2. Ziegler et al., "Fine-Tuning Language Models
    from Human Preferences" (2019), section 2.2.
    """
    return beta * (1 + 0.1 * max(-0.2, min(0.2, kl / target - 1)))


def scored(judge: Opened, records: list[dict], drawn: Rollout):
    """The reward model's score of each answer: [B]."""
    talks = [[*records[i]["messages"][:-1], {"role": "assistant", "content": text}]
             for i, text in zip(drawn.which, drawn.texts, strict=True)]
    return reward.scores(judge, talks)


def judged(judge: Opened, records: list[dict], drawn: Rollout, scale: tuple[float, float]):
    """The score of each answer, minus a mean, divided by a spread: [B]. An answer without an end loses 1."""
    ended = torch.tensor(drawn.ended, dtype=torch.float32)
    return (scored(judge, records, drawn) - scale[0]) / scale[1] - (1 - ended)


def ppo_step(run: Run, critic, beta: float, records: list[dict], rewards, step: int) -> dict:
    """One step: draw, score, guess, learn -> numbers by name."""
    config, model, device = run.config, run.policy.model, next(run.policy.model.parameters()).device
    asked = [record["messages"][:-1] for record in records]
    drawn = rollout(run.policy, asked, config.length, config.temperature, generator=generator(config, step))
    score = rewards(records, drawn).to(device)
    law = config.temperature, config.precision
    with torch.no_grad():  # all of this belongs to the policy that drew: what changes below must not reach it
        old, entropy = log_probs(model, drawn, *law)
        theirs = log_probs(run.reference, drawn, *law)[0]
        guess = values(critic, drawn, config.precision)
        earned = token_rewards(score, old, theirs, drawn.mask, beta)
        advantage, returns = gae(earned, guess, drawn.mask, config.gamma, config.lam)
        advantage = normalise(advantage, drawn.mask)
    order = torch.Generator().manual_seed(step)
    for _ in range(config.epochs):
        for places in torch.randperm(len(drawn.texts), generator=order).split(config.minibatch):
            part, mask = drawn.rows(places), drawn.mask[places]
            new, undecided = log_probs(model, part, *law)
            ratio = (new - old[places]).exp()
            loss = -masked_mean(clipped(ratio, advantage[places], config.clip_ratio), mask)
            loss = loss - config.entropy * masked_mean(undecided, mask)
            (loss + value_loss(values(critic, part, config.precision), guess[places], returns[places], mask,
                               config.value_clip)).backward()
            value_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), config.clip).item()
            if not math.isfinite(value_norm):
                raise BadInput(f"the critic's gradient is {value_norm} at step {step + 1}: lower --value-lr, "
                               f"{config.value_lr:g}")
            norm = update(model, run.optimizer, config, step)
    return {
        "reward": score.mean().item(), "right": exact(records, drawn).mean().item(),
        "kl": (old - theirs).sum(1).mean().item(), "entropy": masked_mean(entropy, drawn.mask).item(),
        "clipped": masked_mean((ratio - 1).abs() > config.clip_ratio, mask).item(), "loss": loss.item(),
        "explained": explained(guess, returns, drawn.mask), "length": drawn.mask.sum(1).float().mean().item(),
        "ended": sum(drawn.ended) / len(drawn.ended), "gradient": norm, "beta": beta,
    }  # fmt: skip


def open_judge(args, device) -> Opened:
    """The reward model of the run `args.judge`. The run "reward" is trained where there is none that was finished."""
    folder = run_folder(__file__, args.judge)
    if args.judge == "reward" and not (folder / "summary.json").is_file():
        flags = ["--policy", args.policy, "--device", args.device, *(["--corpus", args.corpus] if args.corpus else [])]
        say("first a reward model: " + command(Path(__file__).parent.name, "reward.py", *flags))
        reward.main(flags)
    return reward.load(folder / "model.pt", device)


def scale_of(judge: Opened, policy: Opened, records: list[dict], config: RLConfig) -> tuple[float, float]:
    """Mean and spread of the scores of what a policy answers: so that rewards begin around 0, and are of size 1."""
    records = records[:256]
    asked = [record["messages"][:-1] for record in records]
    drawn = rollout(policy, asked, config.length, config.temperature, generator=generator(config, 0))
    scores = scored(judge, records, drawn)
    return scores.mean().item(), scores.std().item()


def main(argv=None):
    def add(parser):
        parser.add_argument("--judge", default="reward", help="a run of reward.py (default: reward)")

    args, saved = arguments(argv, PPOConfig, __doc__, "ppo", add)
    config = options.build(PPOConfig, args)
    judge = open_judge(args, setup(args.device, args.seed))  # first: its training is no part of the run's seconds
    run = begin(args, config, saved)
    if judge.tokenizer.state() != run.policy.tokenizer.state():  # the critic, a copy of it, reads the policy's tokens
        raise BadInput(f"the judge {args.judge} has another tokenizer than the policy {args.policy}: train a judge for "
                       f"it, with reward.py --policy {args.policy} --name NAME, and say --judge NAME")
    state = run.saved or {"beta": config.beta, "scale": scale_of(judge, run.policy, run.records, config)}
    critic = copy.deepcopy(judge.model)
    if run.saved:
        critic.load_state_dict(state["critic"])
    run.optimizer.add_param_group({"params": list(critic.parameters()), "lr": config.value_lr})
    beta, scale = state["beta"], tuple(state["scale"])
    stream = draws(run.records, config.questions, config.seed, run.step)

    def rewards(records, drawn):
        return judged(judge, records, drawn, scale)

    def one(step: int) -> dict:
        nonlocal beta
        told = ppo_step(run, critic, beta, next(stream), rewards, step)
        if config.kl_target is not None:
            beta = adapt(beta, told["kl"], config.kl_target)
        return told

    def more() -> dict:
        return {"critic": critic.state_dict(), "beta": beta, "scale": list(scale)}

    return learn(run, __file__, one, rewards, more)


if __name__ == "__main__":
    run_program(main)
