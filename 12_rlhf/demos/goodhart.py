"""The proxy rises, the truth falls: PPO against a reward model, with prices from none to high on leaving the policy.

    uv run stages run 12 demos/goodhart.py
    uv run stages run 12 demos/goodhart.py --betas 0 0.02 0.1 --seeds 3

The reward model is the proxy. What counts is the gold: whether an answer is right, which nobody tells the policy. Both
are measured along training, on tasks with words that are not learned from, for answers that are drawn. "When a measure
becomes a target, it ceases to be a good measure" (Strathern, 1997, on Goodhart).

At first both rise: the reward model has learned something. Then the policy comes to answers unlike those that the
reward model was trained on. Among them are some that it likes and that are wrong, and these are what is found. Gao,
Schulman and Hilton, "Scaling Laws for Reward Model Overoptimization" (2022), draw the two over the square root of the
KL divergence from the policy: a distance, as near the policy the KL grows with the square of a change. A price beta on
the KL ends the way earlier. It does not make the judge better.

With beta 0, the learning rate is `--free-lr`, which is higher, so that the policy goes far in few steps.

Table: `peak` is the highest gold that was seen along the way, `at` its step and `there` its square root of the KL. It
is chosen after the fact, with the right answers known, and with some luck: nobody who has the proxy alone can stop
there. With several seeds, the numbers are those of the mean curve. Second table: what the judge likes; the answers of
the last policy without a price to new tasks, where they are wrong.

A run that is finished is kept, as out/goodhart-<beta>-<seed>. After Ctrl-C, the same command goes on.

`goodhart.png`: gold and proxy over the distance, and over the steps.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import corpus, options
from shared.console import say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog, read_metrics, run_folder

from matplotlib.figure import Figure

import ppo
import reward
import tasks
from chat import open_model
from hf import Opened
from learn import finish
from preferences import open_policy
from rollout import rollout

NAMES = {"gold": "held_out_sampled", "proxy": "held_out_reward", "kl": "held_out_kl", "greedy": "held_out_greedy"}


def curve(name: str) -> list[dict]:
    """What was seen at each look of a run: step, gold, proxy, kl and greedy."""
    rows = [row for row in read_metrics(run_folder(__file__, name)) if "held_out_kl" in row]
    seen = {row["step"]: {"step": row["step"], **{key: row[its] for key, its in NAMES.items()}} for row in rows}
    return list(seen.values())  # a run that went on has looked twice where it was stopped


def average(curves: list[list[dict]]) -> list[dict]:
    """The mean curve of several seeds, and the distance at each look: the square root of the mean KL.

    Only steps at which all have looked: a run that was stopped and went on has looked there as well.
    """
    by_step = [{row["step"]: row for row in rows} for rows in curves]
    shared = [[rows[step] for rows in by_step] for step in by_step[0] if all(step in rows for rows in by_step)]
    rows = [{key: mean(row[key] for row in looks) for key in looks[0]} for looks in shared]
    # Estimated from drawn answers, a KL near 0 may come out below 0.
    return [row | {"step": int(row["step"]), "distance": max(0.0, row["kl"]) ** 0.5} for row in rows]


def row_of(beta: float, lr: float, rows: list[dict]) -> dict:
    """The table's row for one price."""
    first, last, peak = rows[0], rows[-1], max(rows, key=lambda row: row["gold"])
    return {
        "beta": f"{beta:g}", "lr": f"{lr:g}", "gold before": first["gold"], "peak": peak["gold"], "at": peak["step"],
        "there": peak["distance"], "gold": last["gold"], "greedy": last["greedy"], "proxy before": first["proxy"],
        "proxy": last["proxy"], "KL": last["kl"],
    }  # fmt: skip


def liked(judge: Opened, tuned: Opened, records: list[dict], length: int, count: int) -> list[dict]:
    """The first `count` likeliest answers that are wrong, beside the right ones, with the judge's scores of both."""
    drawn = rollout(tuned, [record["messages"][:-1] for record in records], length, temperature=0.0)
    wrong = [(r["messages"], text) for r, text in zip(records, drawn.texts, strict=True)
             if text != r["messages"][-1]["content"]][:count]
    talks = [[*talk[:-1], {"role": "assistant", "content": text}] for talk, text in wrong]
    told = reward.scores(judge, [talk for talk, _ in wrong] + talks).view(2, -1).tolist() if wrong else [[], []]
    return [{"question": talk[-2]["content"], "right": talk[-1]["content"], "score": a, "answer": text, "its score": b}
            for (talk, text), a, b in zip(wrong, *told, strict=True)]


def draw(curves: dict[float, list[dict]]) -> Figure:
    """Gold above and proxy below; over the distance on the left, over the steps on the right."""
    fig = Figure(figsize=(8.4, 5.2), layout="constrained")
    labels = {"gold": "gold: right answers", "proxy": "proxy: score, in spreads", "distance": "square root of the KL",
              "step": "step"}  # fmt: skip
    panels = fig.subplots(2, 2, sharex="col", sharey="row")
    for line, y in zip(panels, ("gold", "proxy"), strict=True):
        for axes, x in zip(line, ("distance", "step"), strict=True):
            for beta, rows in curves.items():
                axes.plot([row[x] for row in rows], [row[y] for row in rows], "o-", ms=3, lw=1, label=f"beta {beta:g}")
            axes.set(xlabel=labels[x] if y == "proxy" else None, ylabel=labels[y] if x == "distance" else None)
            axes.grid(alpha=0.3)
    panels[0][1].legend(fontsize="small")
    return fig


def main(argv: list[str] | None = None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.05, 0.2, 0.5],
                        help="prices of a nat of KL (default: 0 0.05 0.2 0.5)")
    parser.add_argument("--free-lr", type=float, default=1e-3, help="learning rate with beta 0 (default: 0.001)")
    parser.add_argument("--seeds", type=int, default=1, help="runs with each price (default: 1)")
    parser.add_argument("--policy", default="lazy", help="a tuned model (default: lazy, which is tuned where needed)")
    parser.add_argument("--judge", default="reward", help="a run of reward.py (default: reward, trained where needed)")
    parser.add_argument("--corpus", help="where the tasks' words are from (default: shakespeare)")
    parser.add_argument("--records", type=int, default=4000, help="tasks to learn from (default: 4000)")
    parser.add_argument("--test", type=int, default=180, help="held-out tasks of a look (default: 180)")
    parser.add_argument("--shown", type=int, default=6, help="wrong answers in the second table (default: 6)")
    parser.add_argument("--again", action="store_true", help="do not keep what was made before")
    parser.add_argument("--name", default="goodhart", help="the folder of table and figure (default: goodhart)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    options.add(parser, ppo.PPOConfig, ("beta", "kl_target", "seed"))
    parser.set_defaults(eval_every=5)
    args = parser.parse_args(argv)
    betas = sorted(set(args.betas))
    if min(args.seeds, args.records, args.test, args.shown) < 1:
        raise BadInput("--seeds, --records, --test and --shown must be at least 1")
    if not all(0 <= beta < float("inf") for beta in betas):
        raise BadInput("--betas: a price is 0 or more, and finite")
    recipe = options.build(ppo.PPOConfig, args)  # what cannot run is said now
    replace(recipe, lr=args.free_lr)
    device = setup(args.device, recipe.seed)
    policy, judge = open_policy(args, device), ppo.open_judge(args, device)
    shared = {name: value for name, value in vars(recipe).items() if name not in ("beta", "kl_target", "lr", "seed")}
    shared |= {name: getattr(args, name) for name in ("policy", "judge", "corpus", "records", "test")}
    curves, rates = {}, {beta: args.lr if beta else args.free_lr for beta in betas}
    with RunLog(__file__, args.name, vars(args)) as log:
        for beta in betas:
            names = [f"goodhart-{beta:g}-{seed}" for seed in range(args.seeds)]
            for seed, name in enumerate(names):
                if finish(ppo.main, name, shared | {"beta": beta, "lr": rates[beta], "seed": seed}, args) is None:
                    return 130
            curves[beta] = average([curve(name) for name in names])
        rows = [row_of(beta, rates[beta], found) for beta, found in curves.items()]
        table(f"{args.test} tasks with new words, {recipe.steps} steps, seeds: {args.seeds}", rows)
        name = f"goodhart-{betas[0]:g}-0"
        new = tasks.make(tasks.words(corpus.load(args.corpus).text), "words", args.test)
        tuned = replace(policy, model=open_model(name, device).model)
        wrong = liked(judge, tuned, new, recipe.length, args.shown)
        table(f"what the judge likes: wrong answers of {name}", wrong)
        file = log.figure(draw(curves), "goodhart")
        log.finish(rows=rows, curves={f"{beta:g}": found for beta, found in curves.items()}, liked=wrong)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
