"""A small model as an agent: it writes a call, a program runs it and writes the result, and the model goes on.

    uv run stages run 12 demos/tools.py
    uv run stages run 12 demos/tools.py --seeds 1 --wrong 0.4 --name worse

The task is to add two numbers of six digits. For a small model this is hard, for a calculator it is not:

    123456+654321?          the question
    777777.                 a direct answer
    [123456+654321=         a call. Here the program stops the model, computes, and writes
    777777]                 the result. The model reads it, and goes on with
    777777.                 the answer

To call, the model has to copy two numbers, and to answer, one. That is learned sooner than adding, which some seeds
begin to learn in twice the steps (`--steps 500`). Models are trained from nothing, and tested on new sums.

1. Supervised tuning on direct answers, or on demonstrations with calls. What the tool writes is read and not learned:
   the mask has the model's own letters alone. `unmasked` learns all letters of the same demonstrations. Schick et al.,
   "Toolformer" (2023).
   `exact`: right answers; `digits`: digits that are right at their place; both of the likeliest answers. `own loss` and
   `tool loss`: nats per letter on new demonstrations, of the letters that the model writes and of those that the tool
   writes. `made up`: how often a model whose tool is switched off writes a result of its own into its call, and goes on
   with it.
2. Rewards: a policy that was tuned on poor demonstrations (`--rare` of them answer directly, `--wrong` of them have a
   mistake in the call) draws answers, and those that are right get a reward of 1 (GRPO). It is shown no better call,
   and the reward does not ask for one. `right` is the share of right drawn answers, `calls` of those with a call, `good
   calls` of those with a call of the question's numbers. `on the way`: right ones among those drawn for learning, the
   mean of all steps.
3. The trap: the same with a loss that counts the tool's letters too, as if the policy had drawn them. It is then
   rewarded and blamed for what it did not do. `tool` is the share of the gradient's length that comes from these
   letters. They are the least likely ones of all, so that much of each step is theirs, and what is to be learned comes
   later.
"""

import copy
import random
import re
import sys
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
from grpo import GRPOConfig, advantages, grpo_loss
from hf import Opened
from learn import update
from rollout import Rollout, log_probs, masked_mean

LETTERS = "0123456789+=[]?" + END
LENGTH = 34  # most letters of an answer: a call of 15, its result of 8, the sum of 7 and the end make 31


@dataclass
class Scale:
    """How large everything is. Raises BadInput for a size that cannot be."""

    steps: int = 250  # of supervised tuning
    batch_size: int = 64  # demonstrations of a step
    rare: float = 0.5  # share of poor demonstrations that answer directly
    wrong: float = 0.2  # share of them that have one wrong digit in the call
    rl_steps: int = 60  # times that a policy draws answers and learns from their rewards
    questions: int = 16  # of such a step
    group: int = 8  # answers to each
    rl_lr: float = 1e-3  # learning rate of reinforcement learning
    seeds: int = 2  # runs of reinforcement learning of each kind
    n_embd: int = 64  # channels
    n_layer: int = 2  # blocks
    test: int = 200  # new sums

    def __post_init__(self):
        for name in ("steps", "batch_size", "rl_steps", "questions", "seeds", "n_embd", "n_layer", "test"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be at least 1")
        if min(self.rare, self.wrong) < 0 or not self.rare + self.wrong <= 1:
            raise BadInput(f"--rare {self.rare} --wrong {self.wrong}: they must be shares of one whole")


# --- the task and the tool


def make(count: int, pick: random.Random) -> list[dict]:
    """`count` questions, with their two numbers."""
    pairs = [(pick.randrange(100_000, 1_000_000), pick.randrange(100_000, 1_000_000)) for _ in range(count)]
    return [record(f"{a}+{b}?", str(a + b), pair=(a, b)) for a, b in pairs]


def calculator(text: str, letter: str) -> str | None:
    """The tool, for `write`: behind "[2+3" the drawn "=" becomes "=5]", and behind what is no sum "=?]".

    A sum may be wrong for the question: the tool does not know the question.
    """
    if letter != "=" or text.rfind("[") <= text.rfind("]"):
        return None
    call = re.fullmatch(r"(\d+)\+(\d+)", text[text.rfind("[") + 1:])
    return f"={sum(map(int, call.groups()))}]" if call else "=?]"


def demonstration(r: dict, pick: random.Random, rare: float = 0.0, wrong: float = 0.0) -> tuple[str, list[bool]]:
    """An answer, and which of its letters the model is to learn: those of the tool are not.

    A share `rare` answers directly, in a share `wrong` one digit of the call is wrong, and so is then what follows.
    """
    call, gold = "{}+{}".format(*r["pair"]), r["messages"][-1]["content"]
    kind = pick.random()
    if kind < rare:
        return gold + END, [True] * (len(gold) + 1)
    if kind < rare + wrong:
        place = pick.choice([i for i, letter in enumerate(call) if letter != "+"])
        call = call[:place] + pick.choice("123456789".replace(call[place], "")) + call[place + 1:]
    begin = "[" + call
    told = calculator(begin, "=")[1:]
    answer = told[:-1] + END
    return begin + "=" + told + answer, [True] * (len(begin) + 1) + [False] * len(told) + [True] * len(answer)


def right(records: list[dict], drawn: Rollout) -> torch.Tensor:
    """The verifier: 1 for an answer that has an end and in which the sum stands behind the last call, if any. [B]"""
    golds = [records[i]["messages"][-1]["content"] for i in drawn.which]
    return torch.tensor([float(over and text.rpartition("]")[2] == gold)
                         for text, gold, over in zip(drawn.texts, golds, drawn.ended, strict=True)])


def everything(drawn: Rollout) -> torch.Tensor:
    """The wrong mask: all letters that stand there, those of the tool as well. [B, A]"""
    lengths = [len(text) + over for text, over in zip(drawn.texts, drawn.ended, strict=True)]
    places = torch.arange(drawn.mask.shape[1], device=drawn.mask.device)
    return places < torch.tensor(lengths, device=drawn.mask.device)[:, None]


# --- learning


def shown(opened: Opened, records: list[dict], pick: random.Random, how: Callable, masked: bool = True) -> Rollout:
    """Demonstrations for these questions."""
    texts, marks = zip(*(how(r, pick) for r in records), strict=True)
    drawn = rolled(opened, records, texts, marks)
    return drawn if masked else replace(drawn, mask=everything(drawn))


def tuned(how: Callable, scale: Scale, seed: int, device, title: str, masked: bool = True) -> Opened:
    """A new model, tuned on demonstrations."""
    opened = small(LETTERS, scale, seed, device)

    def loss_of(step):
        pick = random.Random(f"{seed} {step}")
        return imitation(opened, shown(opened, make(scale.batch_size, pick), pick, how, masked))

    fit(opened.model, scale.steps, loss_of, title)
    return opened


def learn(policy: Opened, drawn: Rollout, reward, config: GRPOConfig, optimizer, step: int, masked: bool) -> dict:
    """A step of GRPO on drawn answers. They are used once, so that the ratio is 1, and its gradient that of ln P."""
    advantage = advantages(reward.view(-1, config.group), config.baseline).flatten().to(drawn.ids.device)
    if advantage.abs().max() < 1e-4:  # all groups are of one mind
        return {}
    own, weights, told = drawn.mask, list(policy.model.parameters()), {}
    if not masked:
        drawn = replace(drawn, mask=everything(drawn))
    new = log_probs(policy.model, drawn)[0]

    def loss(new):
        return grpo_loss(new, new.detach(), new.detach(), advantage, drawn.mask, config)[0]

    if not masked:  # for the record: the same loss, in which the tool's letters alone have a gradient, and the others
        parts = [torch.autograd.grad(loss(torch.where(own == mine, new, new.detach())), weights, retain_graph=True)
                 for mine in (True, False)]
        lengths = [sum(g.square().sum().item() for g in part) ** 0.5 for part in parts]
        told["tool"] = lengths[1] / sum(lengths)
    loss(new).backward()
    return told | {"gradient": update(policy.model, optimizer, config, step)}


def reinforce(policy: Opened, config: GRPOConfig, masked: bool, log: RunLog) -> list[dict]:
    """GRPO with the calculator at hand -> numbers of each step."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    rows = []
    with progress(config.steps, f"rewards, {'masked' if masked else 'unmasked'}") as bar:
        for step in range(config.steps):
            records = make(config.questions, random.Random(f"rewards {config.seed} {step}"))
            drawn = write(policy, records, LENGTH, seed=config.seed * 100_003 + step, n=config.group, meddle=calculator)
            reward = right(records, drawn)
            told = {"right": reward.mean().item(), "calls": mean(float("[" in text) for text in drawn.texts)}
            rows.append(told | learn(policy, drawn, reward, config, optimizer, step, masked))
            log.metrics(step + 1, masked=masked, run=config.seed, **rows[-1])
            bar.update(step + 1, right=told["right"])
    return rows


# --- what was learned


def exam(opened: Opened, records: list[dict]) -> dict:
    """The columns of the first table, for the likeliest answers to new sums."""
    drawn = write(opened, records, LENGTH, 0.0, meddle=calculator)
    pairs = [(text.rpartition("]")[2], r["messages"][-1]["content"])
             for text, r in zip(drawn.texts, records, strict=True)]
    alone = write(opened, records, LENGTH, 0.0)
    made_up = [float(over and re.search(r"=\d+]\d+$", text) is not None)
               for text, over in zip(alone.texts, alone.ended, strict=True)]
    given = shown(opened, records, random.Random(0), demonstration)
    with torch.no_grad():
        nats = -log_probs(opened.model, replace(given, mask=everything(given)))[0]
    return {"exact": right(records, drawn).mean().item(),
            "digits": mean(float(text[i:i + 1] == digit) for text, gold in pairs for i, digit in enumerate(gold)),
            "own loss": masked_mean(nats, given.mask).item(),
            "tool loss": masked_mean(nats, everything(given) & ~given.mask).item(), "made up": mean(made_up)}


def behaviour(opened: Opened, records: list[dict]) -> dict:
    """The columns of the second table, for drawn answers to new sums."""
    drawn = write(opened, records, LENGTH, seed=1, n=4, meddle=calculator)
    called = [float("[" in text) for text in drawn.texts]
    good = [float("[{}+{}=".format(*records[i]["pair"]) in text)
            for i, text in zip(drawn.which, drawn.texts, strict=True)]
    likeliest = right(records, write(opened, records, LENGTH, 0.0, meddle=calculator))
    return {"right": right(records, drawn).mean().item(), "likeliest": likeliest.mean().item(),
            "calls": mean(called), "good calls": mean(good)}


def figure(runs: dict[str, list[list[dict]]]) -> Figure:
    """Right answers and calls by step, a line for each run; and the tool's share of the gradient."""
    fig = Figure(figsize=(10, 3), layout="constrained")
    panels = fig.subplots(1, 3)
    titles = ("right answers, drawn", "answers with a call", "the tool's share of the gradient")
    for axes, name, title in zip(panels, ("right", "calls", "tool"), titles, strict=True):
        for color, (kind, seeds) in zip(("C0", "C3"), runs.items(), strict=True):
            for i, rows in enumerate(seeds):
                found = [(step, row[name]) for step, row in enumerate(rows, 1) if name in row]
                if found:
                    axes.plot(*zip(*found, strict=True), color=color, lw=1, label=None if i else kind)
        axes.set(title=title, xlabel="step", ylim=(-0.03, 1.03))
    panels[0].legend()
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--name", default="tools", help="the run's folder under out/ (default: tools)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--seed", type=int, default=1337)
    options.add(parser, Scale)
    args = parser.parse_args(argv)
    scale, seed, device = options.build(Scale, args), args.seed, setup(args.device, args.seed)
    config = GRPOConfig(steps=scale.rl_steps, questions=scale.questions, group=scale.group, lr=scale.rl_lr,
                        length=LENGTH)
    tests = make(scale.test, random.Random("test"))

    def poor(r, pick):
        return demonstration(r, pick, scale.rare, scale.wrong)

    with RunLog(__file__, args.name, vars(args)) as log:
        direct = tuned(lambda r, pick: demonstration(r, pick, rare=1.0), scale, seed, device, "direct")
        able, careless = (tuned(demonstration, scale, seed, device, "with the tool", mask) for mask in (True, False))
        sft = [{"tuned on": name} | exam(opened, tests) for name, opened in (
            ("direct answers", direct), ("calls", able), ("calls, unmasked", careless))]
        for name in ("tool loss", "own loss", "made up"):
            sft[0][name] = None  # it has seen no call
        table("1. Supervised tuning", sft)
        start = tuned(poor, scale, seed, device, "poor demonstrations")
        for text in write(start, tests[:5], LENGTH, meddle=calculator).texts:
            say(f"  drawn after poor demonstrations: {text}")
        rl, runs = [{"policy": "poor demonstrations"} | behaviour(start, tests)], {}
        for kind, masked in (("masked", True), ("unmasked", False)):
            runs[kind], ends = [], []
            for i in range(scale.seeds):
                policy = replace(start, model=copy.deepcopy(start.model))
                runs[kind].append(reinforce(policy, replace(config, seed=seed + i), masked, log))
                ends.append(behaviour(policy, tests))
            shares = [row["tool"] for rows in runs[kind] for row in rows if "tool" in row]
            rl.append({"policy": f"rewards, {kind}"} | {key: mean(end[key] for end in ends) for key in ends[0]}
                      | {"on the way": mean(row["right"] for rows in runs[kind] for row in rows),
                         "tool": mean(shares) if shares else None})
        table(f"2, 3. {scale.rl_steps} steps of rewards; seeds: {scale.seeds}", rl)
        file = log.figure(figure(runs), "tools")
        log.finish(sft=sft, rl=rl)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
