"""A set of pairs in which length alone is enough, how to see what a model learns from it, and what cures it.

    uv run stages run 11 demos/bias.py
    uv run stages run 11 demos/bias.py --steps 300 --pairs 10000

Three reward models learn from equally many pairs, each of a right answer and one with a single mistake:

- "deletions": a letter is missing. The longer answer is always the better one, and that is all one has to know.
- "deletions, insertions": in half of the pairs there is a letter too many. Now length tells nothing.
- "all kinds": a letter is replaced, missing, too many, or two are swapped.

Each is asked about held-out pairs of all kinds. On those of its own kind, the first looks excellent. Beside each model
stands a ruler, which prefers the longer or the shorter answer, whichever was better in most of the training pairs: a
model that gets the same numbers as a ruler has learned length. A share below a half says that the model prefers the
wrong answers.

`longer` is by how much the score of the longer answer is the higher one, the mean over held-out deletions and
insertions, as a multiple of the root mean square of all their differences: 1 where length is all that counts, 0 where
it counts for nothing. `spread` is the standard deviation over seeds of the share on insertions.

`bias.png` shows it without any pairs: right answers, and the same with one to three letters too many or too few. A
judge likes the right one best. A model that has learned length likes the longest.
"""

import random
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import table
from shared.program import run_program
from shared.runlog import RunLog

import torch
from matplotlib.figure import Figure

import reward
from audit import length_rule
from demos import ablation
from demos.ablation import Scale, World
from hf import Opened
from preferences import KINDS, corrupt, corrupted

SETS = {"deletions": ("delete",), "deletions, insertions": ("delete", "insert"), "all kinds": KINDS}
MOST = 3  # letters too many or too few in the figure


def pairs(world: World) -> dict[str, list[dict]]:
    """The pairs of each set, equally many: of some kinds fewer can be made, as one letter alone cannot be deleted."""
    made = {name: corrupted(world.records, kinds, world.seed) for name, kinds in SETS.items()}
    least = min(map(len, made.values()))
    return {name: some[:least] for name, some in made.items()}


def resized(text: str, letters: int, rng: random.Random) -> str:
    """`text` with so many letters inserted at random places, or with a number below 0, deleted."""
    for _ in range(abs(letters)):
        text = corrupt(text, "insert" if letters > 0 else "delete", rng)
    return text


def by_length(opened: Opened, records: list[dict], seed: int) -> list[float]:
    """The mean score of answers with -MOST ... MOST letters too many, less that of the right ones, in spreads.

    A spread is the standard deviation of the scores of the right answers. Answers that are too short to lose letters
    are left out.
    """
    rng, talks = random.Random(seed), []
    changes = range(-MOST, MOST + 1)
    for *asked, gold in (record["messages"] for record in records):
        if len(gold["content"]) > MOST:
            talks += [[*asked, gold | {"content": resized(gold["content"], change, rng)}] for change in changes]
    scores = reward.scores(opened, talks).view(-1, len(changes))  # [N, 2 MOST + 1]
    right = scores[:, MOST]
    return ((scores - right[:, None]).mean(0) / right.std()).tolist()


def longer(opened: Opened, asked: dict[str, list[dict]]) -> float:
    """How much higher the longer answer scores, as above: from -1 (the shorter, whatever it says) to 1."""
    gaps = {}
    for kind in ("delete", "insert"):
        chosen, rejected = reward.score_pairs(opened, asked[kind])
        gaps[kind] = chosen - rejected
    typical = torch.cat([*gaps.values()]).square().mean().sqrt()
    return ((gaps["delete"].mean() - gaps["insert"].mean()) / 2 / typical).item()


def job(world: World, name: str, scale: Scale, tick) -> dict:
    """Train on one set: the shares of model and ruler by kind, "longer" and "by length"."""
    training = pairs(world)[name]
    opened, _ = ablation.learn(world.policy, training, ablation.recipe(scale, world.seed), tick)
    asked = {kind: corrupted(world.test, (kind,), world.seed) for kind in KINDS}
    rules = {kind: length_rule(training, some) for kind, some in asked.items()}
    return {
        "right": ablation.right(opened, asked), "rule": rules["delete"][0],
        "ruler": {kind: share for kind, (_, share) in rules.items()},
        "longer": longer(opened, asked), "by length": by_length(opened, world.test, world.seed),
    }  # fmt: skip


def rows_of(runs: dict[str, list[dict]]) -> list[dict]:
    """Two rows for each set, the model's and the ruler's: means over seeds."""
    rows = []
    for name, mine in runs.items():
        found = {kind: [run["right"][kind] for run in mine] for kind in KINDS}
        rows.append({"learned from": name, "judge": "model", **{kind: mean(values) for kind, values in found.items()},
                     "spread": ablation.spread(found["insert"]), "longer": mean(run["longer"] for run in mine)})
        shares = {kind: mean(run["ruler"][kind] for run in mine) for kind in KINDS}
        rule = "/".join(sorted({run["rule"] for run in mine}))
        rows.append({"learned from": name, "judge": f"always the {rule}", **shares, "spread": None, "longer": None})
    return rows


def draw(runs: dict[str, list[dict]]) -> Figure:
    """The score by how many letters an answer has too many, a line for each set, mean and spread over seeds."""
    fig = Figure(figsize=(6, 3.8), layout="constrained")
    axes = fig.subplots()
    x = range(-MOST, MOST + 1)
    for name, mine in runs.items():
        columns = list(zip(*(run["by length"] for run in mine), strict=True))
        axes.errorbar(x, [mean(column) for column in columns], yerr=[ablation.spread(c) or 0 for c in columns],
                      marker="o", ms=3, capsize=2, label=name)
    axes.axhline(0, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="letters too many", ylabel="score, the right answer's is 0")
    axes.legend(title="learned from", fontsize="small")
    return fig


def main(argv: list[str] | None = None) -> None:
    args = ablation.parser(__doc__).parse_args(argv)
    scale = options.build(Scale, args)
    policy = ablation.policy(args)
    log = RunLog(__file__, "bias", vars(args))
    jobs = {}
    for world in (World(policy, args, scale, seed) for seed in range(scale.seeds)):
        jobs |= {(name, world.seed): (lambda tick, w=world, n=name: job(w, n, scale, tick)) for name in SETS}
    results = ablation.run_all(log, jobs, scale.steps, policy)
    runs = {name: [results[name, seed] for seed in range(scale.seeds)] for name in SETS}
    rows = rows_of(runs)
    table(f"{scale.steps} steps of {scale.batch_size} pairs, seeds: {scale.seeds}", ablation.shown(rows))
    ablation.done(log, draw(runs), "bias", rows)


if __name__ == "__main__":
    run_program(main)
