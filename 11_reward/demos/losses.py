"""Bradley-Terry against margin ranking, and looking both ways against looking back.

    uv run stages run 11 demos/losses.py
    uv run stages run 11 demos/losses.py --steps 300 --batch-size 64 --pairs 10000

Three reward models learn from the same pairs with the recipe of reward.py, which is the first of them:

- "Bradley-Terry": its scores say with which probability an answer is the better one. Every pair goes on teaching.
- "margin": a pair teaches until its answers are apart by the margin of 1, and then nothing more.
- "both ways": Bradley-Terry, and each token looks at all others, as in an encoder.

`right` is the share of held-out pairs that are ranked right, the mean over their kinds; the columns after `its spread`
are the kinds. `difference` is from the first variant, worked out seed by seed. A spread is a standard deviation over
seeds. `calibration` is the mean distance between how sure a model is, sigmoid(difference of scores), and how often it
is right: margin ranking never asked for probabilities.

`losses.png`: the share ranked right by kind, and how often each model is right where it is how sure.
"""

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
from audit import calibration, calibration_error
from demos import ablation
from demos.ablation import Scale, World

FIRST = "Bradley-Terry"
VARIANTS = {FIRST: {}, "margin": {"loss": "margin"}, "both ways": {"both_ways": True}}


def job(world: World, variant: str, scale: Scale, tick) -> dict:
    """Train one model: "right" by kind, "sure" (the rows of `calibration`) and "error", over the pairs of all kinds."""
    config = ablation.recipe(scale, world.seed, **VARIANTS[variant])
    opened, _ = ablation.learn(world.policy, world.pairs(), config, tick)
    sides = zip(*(reward.score_pairs(opened, pairs) for pairs in world.held_out.values() if pairs), strict=True)
    sure = calibration(*map(torch.cat, sides))
    return {"right": ablation.right(opened, world.held_out), "sure": sure, "error": calibration_error(sure)}


def compare(runs: dict[str, list[dict]]) -> list[dict]:
    """A row for each variant, as above the table: means over seeds, and differences from the first one."""
    rows = []
    for variant, mine in runs.items():
        found = [run["right"]["mean"] for run in mine]
        gaps = [value - other["right"]["mean"] for value, other in zip(found, runs[FIRST], strict=True)]
        row = {"variant": variant, "right": mean(found), "spread": ablation.spread(found)}
        same = variant == FIRST
        row |= {"difference": None if same else mean(gaps), "its spread": None if same else ablation.spread(gaps)}
        row |= {kind: mean(run["right"][kind] for run in mine) for kind in mine[0]["right"] if kind != "mean"}
        rows.append(row | {"calibration": mean(run["error"] for run in mine)})
    return rows


def draw(rows: list[dict], runs: dict[str, list[dict]]) -> Figure:
    """Left: the share ranked right by kind. Right: how often right where how sure, of the first seed."""
    fig = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(1.6, 1))
    kinds = [kind for kind in runs[FIRST][0]["right"] if kind != "mean"]
    right.plot([0.5, 1], [0.5, 1], color="grey", lw=0.8, ls=":")
    for i, row in enumerate(rows):
        left.bar([j + 0.27 * (i - 1) for j in range(len(kinds))], [row[kind] for kind in kinds], 0.27,
                 label=row["variant"])
        sure = runs[row["variant"]][0]["sure"]
        right.plot([bin["sure"] for bin in sure], [bin["right"] for bin in sure], "o-", ms=3)
    left.set(xticks=range(len(kinds)), xticklabels=kinds, ylabel="held-out pairs ranked right", ylim=(0.5, 1))
    right.set(xlabel="how sure the model is", ylabel="how often it is right")
    left.legend(loc="lower left", fontsize="small")
    return fig


def main(argv: list[str] | None = None) -> None:
    args = ablation.parser(__doc__).parse_args(argv)
    scale = options.build(Scale, args)
    policy = ablation.policy(args)
    log = RunLog(__file__, "losses", vars(args))
    worlds = [World(policy, args, scale, seed) for seed in range(scale.seeds)]
    jobs = {(variant, world.seed): (lambda tick, w=world, v=variant: job(w, v, scale, tick))
            for world in worlds for variant in VARIANTS}
    results = ablation.run_all(log, jobs, scale.steps, policy)
    runs = {variant: [results[variant, seed] for seed in range(scale.seeds)] for variant in VARIANTS}
    rows = compare(runs)
    table(f"{scale.steps} steps of {scale.batch_size} pairs, seeds: {scale.seeds}", ablation.shown(rows))
    ablation.done(log, draw(rows, runs), "losses", rows)


if __name__ == "__main__":
    run_program(main)
