"""Five ways to better answers, from one policy and with one reward model: what each brings, and what it costs.

    uv run stages run 12 demos/compare.py
    uv run stages run 12 demos/compare.py --seeds 1 --steps 30

- "policy" is what supervised tuning left, and where all others begin.
- "best of 16" draws that many answers from it and gives the one with the highest score. It learns nothing, and pays
  for each answer sixteen times.
- "DPO", "PPO" and "GRPO" are the recipes of dpo.py, ppo.py and grpo.py as they stand.

They are not told the same. Best-of-n and PPO know the reward model alone. DPO has pairs of a right and a wrong answer,
and GRPO a verifier, so both know what is right, for the tasks that they learn from.

`greedy` and `drawn`: the share of right answers to held-out words, the likeliest taken or drawn. `proxy`: the reward
model's score of the drawn ones, in units in which the policy's have mean 0 and spread 1. `KL`: from the policy, nats an
answer; of best-of-n at most ln n - (n - 1) / n, which it is where no two answers are alike. `tax`: by how much the loss
on the base's text rose, nats a character. `seconds`: of learning, with all that a run draws for itself.

All seeds share the policy and the reward model. A seed decides what is drawn and learned in which order, so the spread
behind the ± is that of learning from rewards alone: with another policy or judge, numbers would move by more.

A run that is finished is kept, as out/compare-<way>-<seed>. After Ctrl-C, the same command goes on.

`ways.png`: the shares, and each run by its KL and by its proxy.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import corpus, options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
from matplotlib.figure import Figure

import dpo
import grpo
import ppo
import tasks
from chat import open_model
from hf import Opened
from learn import RLConfig, finish
from preferences import open_policy
from rollout import exact, look, rollout

WAYS = {"DPO": (dpo.main, dpo.DPOConfig()), "PPO": (ppo.main, ppo.PPOConfig()), "GRPO": (grpo.main, grpo.GRPOConfig())}
COLUMNS = {"greedy": "greedy", "drawn": "sampled", "proxy": "reward", "KL": "kl", "tax": "tax", "seconds": "seconds"}
ROWS = 512  # answers that best-of-n draws at once


def proxy(judge: Opened, policy: Opened, args):
    """The reward model as a function of records and answers, in units in which the policy's answers have spread 1."""
    records = tasks.make(tasks.words(corpus.load(args.corpus).text), "train", args.records)
    scale = ppo.scale_of(judge, policy, records, RLConfig())
    return lambda records, drawn: ppo.judged(judge, records, drawn, scale)


def best_of(policy: Opened, records: list[dict], n: int, rewards, seed: int) -> dict:
    """Of n answers to each task the one with the highest reward: the share that is right, the reward, and the KL."""
    generator, right, told = torch.Generator().manual_seed(seed), [], []
    with progress(len(records), f"best of {n}") as bar:
        for start in range(0, len(records), size := max(1, ROWS // n)):
            part = records[start:start + size]
            drawn = rollout(policy, [r["messages"][:-1] for r in part], RLConfig().length, n=n, generator=generator)
            reward = rewards(part, drawn).view(-1, n)  # [tasks, n]
            best = torch.arange(len(part)) * n + reward.argmax(1)
            right += exact(part, drawn.rows(best)).tolist()
            told += reward.max(1).values.tolist()
            bar.update(start + len(part))
    return {"sampled": mean(right), "reward": mean(told), "kl": math.log(n) - (n - 1) / n, "tax": 0.0}


def measured(policy: Opened, rewards, records: list[dict], args) -> dict[str, list[dict]] | None:
    """What each way comes to, for each seed. None: a run was stopped."""
    found, length = {"policy": [], f"best of {args.n}": [], **{way: [] for way in WAYS}}, RLConfig().length
    shared = {"policy": args.policy, "corpus": args.corpus, "records": args.records, "test": args.test}
    shared |= {"eval_every": 10**6}  # looks on the way would count as time
    shared |= {"steps": args.steps} if args.steps else {}
    for seed in range(args.seeds):
        for way, (main, recipe) in WAYS.items():
            name, judge = f"compare-{way.lower()}-{seed}", {"judge": args.judge} if way == "PPO" else {}
            if (told := finish(main, name, vars(recipe) | shared | judge | {"seed": seed}, args)) is None:
                return None
            tuned = replace(policy, model=open_model(name, policy.model.tok_emb.weight.device).model)
            seen = look(tuned, policy.model, records, length, rewards, seed)
            found[way].append(seen | {"tax": told["tax"], "seconds": told["seconds"]})
        found["policy"].append(look(policy, policy.model, records, length, rewards, seed) | {"tax": 0.0})
        found[f"best of {args.n}"].append(best_of(policy, records, args.n, rewards, seed))
    return found


def spread(values: list[float]) -> float:
    """The standard deviation over seeds; 0 for a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def shown(values: list[float], digits: int) -> str:
    """Mean and spread as a person reads them: "0.731 ± 0.012"; of a single seed "0.731", and "-" of none."""
    numbers = [mean(values), *[spread(values)][len(values) == 1:]] if values else []
    return " ± ".join(f"{number:.{digits}f}" for number in numbers) or "-"


def draw(found: dict[str, list[dict]]) -> Figure:
    """Left: shares of right answers. Middle and right: drawn right answers of each run over its KL, and its proxy."""
    fig = Figure(figsize=(11, 3.4), layout="constrained")
    bars, *planes = fig.subplots(1, 3)
    for i, (label, name) in enumerate((("greedy", "greedy"), ("drawn", "sampled"))):
        values = [[told[name] for told in some if name in told] for some in found.values()]
        places = [j for j, some in enumerate(values) if some]
        bars.bar([j + 0.4 * (i - 0.5) for j in places], [mean(values[j]) for j in places], 0.38,
                 yerr=[spread(values[j]) for j in places], capsize=2, label=label)
    bars.set(xticks=range(len(found)), ylabel="right answers to new words", ylim=(0, 1))
    bars.set_xticklabels([way.replace(" of ", "\nof ") for way in found])
    bars.legend(fontsize="small")
    labels = {"kl": "KL from the policy, nats an answer", "reward": "proxy: score by the reward model"}
    for axes, (name, label) in zip(planes, labels.items(), strict=True):
        for way, some in found.items():
            axes.plot([told[name] for told in some], [told["sampled"] for told in some], "o", ms=4, label=way)
        axes.set(xlabel=label, ylabel="drawn answers that are right", ylim=(0, 1))
        axes.grid(alpha=0.3)
    planes[1].legend(fontsize="small")
    return fig


def main(argv: list[str] | None = None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="lazy", help="a tuned model (default: lazy, which is tuned where needed)")
    parser.add_argument("--judge", default="reward", help="a run of reward.py (default: reward, trained where needed)")
    parser.add_argument("--corpus", help="where the tasks' words are from (default: shakespeare)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way (default: 3)")
    parser.add_argument("--n", type=int, default=16, help="answers of which best-of-n gives one (default: 16)")
    parser.add_argument("--steps", type=int, help="of each run that learns (default: those of its recipe)")
    parser.add_argument("--records", type=int, default=4000, help="tasks to learn from (default: 4000)")
    parser.add_argument("--test", type=int, default=180, help="held-out tasks (default: 180)")
    parser.add_argument("--again", action="store_true", help="do not keep what was made before")
    parser.add_argument("--name", default="compare", help="the folder of table and figure (default: compare)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    args = parser.parse_args(argv)
    if min(args.seeds, args.n, args.records, args.test, 1 if args.steps is None else args.steps) < 1:
        raise BadInput("--seeds, --n, --steps, --records and --test must be at least 1")
    device = setup(args.device, 0)
    policy, judge = open_policy(args, device), ppo.open_judge(args, device)
    records = tasks.make(tasks.words(corpus.load(args.corpus).text), "words", args.test)
    with RunLog(__file__, args.name, vars(args)) as log:
        found = measured(policy, proxy(judge, policy, args), records, args)
        if found is None:
            return 130
        rows = []
        for way, some in found.items():
            values = {column: [told[name] for told in some if name in told] for column, name in COLUMNS.items()}
            rows.append({"way": way, **{c: shown(each, 0 if c == "seconds" else 3) for c, each in values.items()}})
        table(f"{args.test} tasks with new words; mean ± spread, seeds: {args.seeds}", rows)
        file = log.figure(draw(found), "ways")
        log.finish(rows=rows, seeds=found)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
