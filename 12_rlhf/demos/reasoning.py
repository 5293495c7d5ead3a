"""Thinking on paper: a model that writes its steps down is right where one that answers at once has to guess.

    uv run stages run 12 demos/reasoning.py
    uv run stages run 12 demos/reasoning.py --seed 2 --device cuda --name two

The task is to follow pointers. A question is one text of 15 letters, here with spaces between its parts:

    Fe Bd Cb Af Ec Da  ?b3        from f one goes to e, from b to d, ...; where is one three steps after b?

All six symbols lie on one cycle. So the answer is never the symbol asked about, a guess among the other five is right
once in five times, and a chain that is a step too short or too long is never right by luck. The cycles of the test are
none of those trained on. All models have two layers and are trained from nothing.

1. Direct: the answer is "=f". All steps have to be made inside the two layers.
2. Scratchpad: the answer is the chain, with the number of steps that are left: "d2a1f0=f". Each step is one look-up.
   Wei et al., "Chain-of-Thought Prompting" (2022).
3. Budget forcing: a chain is cut short by an "=" in place of its next symbol, or goes on because a "W" ("Wait") takes
   the place of its "=". In one demonstration of five a W interrupts the chain, which then goes on, or repeats its last
   place where it was at its end. No demonstration has two. `hasty` was tuned further, on demonstrations of which nearly
   half stop too early. Muennighoff et al., "s1: Simple test-time scaling" (2025).
4. Self-consistency: the answer that most of k drawn chains come to. `any` is the share of questions to which at least
   one of the k is right, which only a verifier could pick. Wang et al., "Self-Consistency" (2022).
5. RLVR: GRPO (grpo.py), with a reward that looks at nothing but the symbol behind the "=". The policy, as in 4, is that
   of 2 at the time when the share of right ones among its drawn answers first reached `--early`. `chain right` is the
   share of the right answers whose chain has all steps and no wrong one.
"""

import copy
import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
from matplotlib.figure import Figure

from demos.small import END, fit, imitation, record, rolled, small, write
from grpo import GRPOConfig, grpo_step
from hf import Opened
from rollout import Rollout

SYMBOLS = "abcdef"
LETTERS = SYMBOLS + SYMBOLS.upper() + "012345?=W" + END
LENGTH = 32  # most letters of an answer: five places of two letters, and some that a W makes it say again


@dataclass
class Scale:
    """How large everything is. Raises BadInput for a size that cannot be."""

    steps: int = 300  # of tuning on demonstrations with a scratchpad
    direct_steps: int = 600  # of tuning on answers alone
    batch_size: int = 64  # demonstrations of a step
    longest: int = 5  # most steps of a question
    early: float = 0.75  # share of right drawn answers at which the policy for 4 and 5 is taken
    hasty_steps: int = 100  # of further tuning on demonstrations that stop too early
    votes: int = 32  # drawn answers to each question, for self-consistency
    rl_steps: int = 100  # times that the policy draws answers and learns from their rewards
    questions: int = 32  # of such a step
    group: int = 8  # answers to each
    rl_lr: float = 1e-3  # learning rate of reinforcement learning
    n_embd: int = 64  # channels
    n_layer: int = 2  # blocks
    test: int = 300  # held-out questions

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 < value < math.inf:  # so that nan is refused as well
                raise BadInput(f"--{name.replace('_', '-')} {value}: it must be above 0, and finite")
        if not 2 <= self.longest <= 5:
            raise BadInput(f"--longest {self.longest}: after 6 steps one is where one began, so it must be from 2 to 5")
        if self.early > 1:
            raise BadInput(f"--early {self.early}: it is a share, at most 1")


# --- the task


def cycles() -> tuple[list, list]:
    """All cycles through the six symbols -> (those to learn from, every fifth to test with)."""
    found = [(SYMBOLS[0], *rest) for rest in itertools.permutations(SYMBOLS[1:])]
    random.Random(0).shuffle(found)
    return found[len(found) // 5:], found[:len(found) // 5]


def make(known: list, count: int, longest: int, pick: random.Random) -> list[dict]:
    """`count` questions about these cycles, with the places that one comes through."""
    records = []
    for _ in range(count):
        cycle, at, n = pick.choice(known), pick.randrange(6), pick.randint(1, longest)
        # A symbol stands in two pairs. The capital tells where it is the first: a model takes long to find that out.
        pairs = [cycle[i].upper() + cycle[(i + 1) % 6] for i in pick.sample(range(6), 6)]
        path = "".join(cycle[(at + i) % 6] for i in range(1, n + 1))
        records.append(record(f"{''.join(pairs)}?{cycle[at]}{n}", path[-1], path=path))
    return records


def chain(path: str, pick: random.Random, wait: float = 0.2, hasty: float = 0.0) -> str:
    """The demonstration for a path, "daf" -> "d2a1f0=f."; a share `wait` has a W, and `hasty` of the rest stop early.

    With a W: "d2Wa1f0=f.", or behind the last place, "d2a1f0Wf0=f.". Too early: "d2a1=a.".
    """
    places = [symbol + str(len(path) - i) for i, symbol in enumerate(path, 1)]
    if pick.random() < wait:
        i = pick.randint(1, len(places))
        places[i:] = ["W", *(places[i:] or places[-1:])]
    elif len(places) > 1 and pick.random() < hasty:
        places = places[:pick.randrange(1, len(places))]
    return "".join(places) + "=" + places[-1][0] + END


def final(text: str) -> str:
    """What an answer comes to: what stands behind its last "="."""
    return text.rpartition("=")[2]


def right(records: list[dict], drawn: Rollout) -> torch.Tensor:
    """The verifier: 1 for an answer that has an end and comes to the right symbol, by whatever way. [B]"""
    golds = [records[i]["messages"][-1]["content"] for i in drawn.which]
    return torch.tensor([float(over and "=" in text and final(text) == gold)
                         for text, gold, over in zip(drawn.texts, golds, drawn.ended, strict=True)])


def seen(text: str) -> str:
    """The places of a chain; one that is said again counts once: "d2a1Wf0Wf0=f" -> "daf"."""
    return "".join(symbol for symbol, _ in itertools.groupby(x for x in text.partition("=")[0] if x in SYMBOLS))


# --- learning to think, and thinking more or less


def tune(opened: Opened, known: list, scale: Scale, steps: int, seed: int, show: Callable, **how):
    """Supervised tuning on demonstrations; `show(path, pick)` writes one."""

    def loss_of(step):
        pick = random.Random(f"{seed} {step}")
        records = make(known, scale.batch_size, scale.longest, pick)
        texts = [show(r["path"], pick) for r in records]
        return imitation(opened, rolled(opened, records, texts, [[True] * len(text) for text in texts]))

    fit(opened.model, steps, loss_of, "tuning", **how)


def cut(places: int) -> Callable:
    """Budget forcing downwards: in place of any further place, the answer has to be given."""
    more = SYMBOLS + "W"
    return lambda text, letter: "=" if letter in more and "=" not in text and len(seen(text)) >= places else None


def waits(count: int) -> Callable:
    """Budget forcing upwards: the first `count` times that the chain is to end, it is told to go on."""
    return lambda text, letter: "W" if letter == "=" and text.count("W") < count else None


def share(opened: Opened, records: list[dict], temperature: float = 1.0, **how) -> float:
    """The share of right answers, drawn at a temperature."""
    return right(records, write(opened, records, LENGTH, temperature, **how)).mean().item()


def by_steps(opened: Opened, records: list[dict], longest: int) -> dict:
    """The share of right likeliest answers, by the number of steps that are asked for."""
    good = right(records, write(opened, records, LENGTH, 0.0)).tolist()
    parts = {n: [x for x, r in zip(good, records, strict=True) if len(r["path"]) == n] for n in range(1, longest + 1)}
    return {f"steps: {n}": mean(part) if part else None for n, part in parts.items()} | {"all": mean(good)}


def vote(records: list[dict], drawn: Rollout, n: int, k: int) -> tuple[float, float]:
    """Of n answers to each question, k at a time: how often most of them are right, and how often at least one is.

    Of symbols that are named equally often, the one named first counts.
    """
    said, most, some = [final(text) for text in drawn.texts], [], []
    for i, r in enumerate(records):
        for start in range(i * n, (i + 1) * n - k + 1, k):
            part, gold = said[start:start + k], r["messages"][-1]["content"]
            most.append(float(Counter(part).most_common(1)[0][0] == gold))
            some.append(float(gold in part))
    return mean(most), mean(some)


def reinforce(policy: Opened, known: list, longest: int, config: GRPOConfig, log: RunLog) -> list[float]:
    """GRPO on the policy, with the final answer as all that counts -> the share of right drawn answers of each step."""
    reference, rewards = copy.deepcopy(policy.model).requires_grad_(False), []
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    with progress(config.steps, "rewards") as bar:
        for step in range(config.steps):
            records = make(known, config.questions, longest, random.Random(f"rewards {config.seed} {step}"))
            told = grpo_step(policy, reference, records, config, optimizer, step, right)
            log.metrics(step + 1, **told)
            rewards.append(told["reward"])
            bar.update(step + 1, right=told["reward"])
    return rewards


def standing(name: str, opened: Opened, records: list[dict], seed: int) -> dict:
    """How far a policy has come: a row of the last table."""
    drawn = write(opened, records, LENGTH, seed=seed, n=4)
    good = right(records, drawn).tolist()
    chains = [float(seen(text) == records[i]["path"])
              for text, i, yes in zip(drawn.texts, drawn.which, good, strict=True) if yes]
    return {"policy": name, "drawn": mean(good), "likeliest": share(opened, records, 0.0),
            "chain right": mean(chains) if chains else None, "letters": drawn.mask.sum(1).float().mean().item()}


# --- the run


def figure(steps: list, budget: list, votes: list, rewards: list) -> Figure:
    """A panel for each table; of the last, the rewards over time."""
    panels = {
        "steps asked for": [(row["model"], [name[-1] for name in row][1:-1], [*row.values()][1:-1]) for row in steps],
        "budget": [(name, [r["budget"] for r in budget], [r[name] for r in budget]) for name in ("careful", "hasty")],
        "drawn answers": [(label, [str(r["k"]) for r in votes], [r[name] for r in votes])
                          for name, label in (("most", "the answer of most"), ("any", "any of them"))],
        "steps of GRPO": [("drawn", range(1, len(rewards) + 1), rewards)],
    }
    fig = Figure(figsize=(8, 5.6), layout="constrained")
    for axes, (title, lines) in zip(fig.subplots(2, 2, sharey=True).flat, panels.items(), strict=True):
        for name, x, y in lines:
            axes.plot(x, [math.nan if value is None else value for value in y],
                      marker="." if len(y) < 50 else None, label=name)
        axes.set(xlabel=title, ylim=(-0.03, 1.03))
        axes.tick_params(axis="x", labelsize=9, rotation=45 if title == "budget" else 0)
        axes.legend(fontsize=9)
    fig.supylabel("share of right answers")
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--name", default="reasoning", help="the run's folder under out/ (default: reasoning)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, Scale)
    args = parser.parse_args(argv)
    scale, seed, device = options.build(Scale, args), args.seed, setup(args.device, args.seed)
    config = GRPOConfig(steps=scale.rl_steps, questions=scale.questions, group=scale.group, lr=scale.rl_lr,
                        length=LENGTH, seed=seed)
    known, unseen = cycles()
    tests, early = make(unseen, scale.test, scale.longest, random.Random("test")), {}
    for r in tests[:3]:
        say(f"for example: {r['messages'][0]['content']} {chain(r['path'], random.Random(r['path']))}")

    def watch(step):  # an early state of the policy is kept
        if not early and step % 2 == 0 and share(careful, tests) >= scale.early:
            early.update(step=step, model=copy.deepcopy(careful.model))

    with RunLog(__file__, args.name, vars(args)) as log:
        direct, careful = (small(LETTERS, scale, seed, device) for _ in range(2))
        tune(direct, known, scale, scale.direct_steps, seed, lambda path, pick: "=" + path[-1] + END)
        tune(careful, known, scale, scale.steps, seed, chain, after=watch)
        steps = [{"model": name} | by_steps(opened, tests, scale.longest)
                 for name, opened in (("direct", direct), ("scratchpad", careful))]
        table("1, 2. Right answers, the likeliest ones; a guess: 0.2", steps)

        hasty = replace(careful, model=copy.deepcopy(careful.model))
        tune(hasty, known, scale, scale.hasty_steps, seed + 1, lambda path, pick: chain(path, pick, hasty=0.5), lr=0.3)
        ways = {f"cut at {n}": cut(n) for n in range(scale.longest)} | {"free": None}
        ways |= {f"wait {n}": waits(n) for n in range(1, 4)}
        budget = [{"budget": name, "careful": share(careful, tests, meddle=way),
                   "hasty": share(hasty, tests, meddle=way)} for name, way in ways.items()]
        table("3. Budget forcing, drawn answers", budget)

        policy = replace(careful, model=early.get("model") or copy.deepcopy(careful.model))
        drawn = write(policy, tests, LENGTH, n=scale.votes, seed=seed)
        sizes = [2**i for i in range(scale.votes.bit_length())]
        votes = [{"k": k} | dict(zip(("most", "any"), vote(tests, drawn, scale.votes, k), strict=True)) for k in sizes]
        table(f"4. Votes, policy of step {early.get('step', scale.steps)}", votes)

        before = standing("stopped early", policy, tests, seed + 1)
        rewards = reinforce(policy, known, scale.longest, config, log)
        rl = [before, standing("and GRPO", policy, tests, seed + 1), standing("not stopped", careful, tests, seed + 1)]
        table("5. Rewards for the final answer alone", rl)
        file = log.figure(figure(steps, budget, votes, rewards), "reasoning")
        log.finish(steps=steps, budget=budget, votes=votes, rl=rl, stopped=early.get("step"))
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
