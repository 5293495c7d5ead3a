"""Annotators who make mistakes, annotators who disagree, and how many pairs it takes.

    uv run stages run 11 demos/noise.py
    uv run stages run 11 demos/noise.py --pairs 16000 --steps 500 --noise 0 0.2 0.4

First table: reward models learn from `pairs` pairs, of which the share `noise` is the wrong way round. `right` is the
share of held-out pairs that are ranked right; these have no wrong labels. It is the mean over kinds of pairs, and
`spread` its standard deviation over seeds. `sure` is how sure the model is, the mean of sigmoid(|difference of scores|)
over the same pairs. Of labels of which a quarter is wrong, nobody can be surer than 0.75. A model that is has learned
some of them by heart.

Second table: two different answers of the policy are compared by annotators who take turns. The careful one prefers
the better answer. The brief one prefers the shorter, and the better of two that are equally long. On most pairs they
agree; `agreed` is the share of held-out pairs of that sort which the model ranks as both do. Where they disagree, the
model cannot please both: `careful` is the share in which it sides with the careful one, and `sure` how sure it is. A
reward model knows no persons. It learns what most say, and if nothing tells the two apart, how many they are.

`noise.png`: the share ranked right over the number of pairs; `right` and `sure` over the share of wrong labels; and
`agreed`, `careful` and `sure` for each group of annotators.
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import table
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
from matplotlib.figure import Figure

import reward
from demos import ablation
from demos.ablation import Scale, World
from preferences import Annotator, compared, flip

CAREFUL, BRIEF = Annotator(), Annotator(brevity=2.0)  # quality is at most 1: a letter less makes up for all of it
GROUPS = {"careful": [CAREFUL], "two careful, one brief": [CAREFUL, CAREFUL, BRIEF],
          "one careful, one brief": [CAREFUL, BRIEF]}  # fmt: skip


def certainty(opened, pairs: list[dict]) -> float:
    """How sure the model is of the order of the pairs, right or wrong: from 0.5 to 1."""
    chosen, rejected = reward.score_pairs(opened, pairs)
    return torch.sigmoid((chosen - rejected).abs()).mean().item()


def noisy(world: World, count: int, share: float, scale: Scale, tick) -> dict:
    """Train on `count` pairs, a share of them the wrong way round: "right" by kind, and "sure"."""
    pairs = flip(world.pairs()[:count], share, world.seed)
    opened, _ = ablation.learn(world.policy, pairs, ablation.recipe(scale, world.seed), tick)
    sure = mean(certainty(opened, some) for some in world.held_out.values() if some)
    return {"right": ablation.right(opened, world.held_out), "sure": sure}


def divided(world: World) -> tuple[list[dict], list[dict]]:
    """Held-out pairs of the policy's answers as the careful annotator orders them: where the brief one agrees, or not.

    With one seed both are shown the same answers.
    """
    careful, brief = (compared(world.drawn_test, world.test, [one], world.seed) for one in (CAREFUL, BRIEF))
    agree, disagree = [], []
    for mine, other in zip(careful, brief, strict=True):
        (agree if mine["chosen"] == other["chosen"] else disagree).append(mine)
    return agree, disagree


def asked(world: World, group: str, scale: Scale, tick) -> dict:
    """Train on what a group of annotators says: "agreed", "careful" and "sure", as above the second table."""
    pairs = compared(world.drawn, world.records[:len(world.drawn)], GROUPS[group], world.seed)
    opened, _ = ablation.learn(world.policy, pairs, ablation.recipe(scale, world.seed), tick)
    agree, disagree = divided(world)
    if not (agree and disagree):
        raise BadInput("the annotators agree on all held-out pairs, or on none: give more with --test")
    agreed, careful = (reward.accuracy(*reward.score_pairs(opened, part)) for part in (agree, disagree))
    return {"agreed": agreed, "careful": careful, "sure": certainty(opened, disagree), "pairs": len(pairs)}


def tables(cases: list[tuple[int, float]], results: dict, seeds: int) -> tuple[list[dict], list[dict]]:
    """The rows of the two tables, means over seeds; the first has one for each case (pairs, noise)."""
    first, second = [], []
    for count, noise in cases:
        mine = [results[count, noise, seed] for seed in range(seeds)]
        found = [run["right"]["mean"] for run in mine]
        first.append({"pairs": count, "noise": noise, "right": mean(found), "spread": ablation.spread(found),
                      "sure": mean(run["sure"] for run in mine)})
    for group in GROUPS:
        mine = [results[group, seed] for seed in range(seeds)]
        row = {name: mean(run[name] for run in mine) for name in ("agreed", "careful", "sure")}
        second.append({"annotators": group, "pairs": round(mean(run["pairs"] for run in mine)), **row})
        second[-1]["spread of careful"] = ablation.spread([run["careful"] for run in mine])
    return first, second


def draw(first: list[dict], second: list[dict]) -> Figure:
    """Right over the number of pairs; right and sure over noise; bars for each group of annotators."""
    fig = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = fig.subplots(1, 3, width_ratios=(1, 1, 1.3))
    most, least = max(row["pairs"] for row in first), min(row["noise"] for row in first)
    lines = ((left, "pairs", "right", [row for row in first if row["noise"] == least]),
             (middle, "noise", "right", [row for row in first if row["pairs"] == most]),
             (middle, "noise", "sure", [row for row in first if row["pairs"] == most]))  # fmt: skip
    for axes, x, y, rows in lines:
        reach = [row["spread"] or 0 for row in rows] if y == "right" else None
        axes.errorbar([row[x] for row in rows], [row[y] for row in rows], yerr=reach, marker="o", ms=3, capsize=2,
                      label={"right": "ranked right", "sure": "how sure"}[y])
        axes.set_ylim(0.5, 1)
    left.set(xscale="log", xlabel="pairs to learn from", ylabel="held-out pairs ranked right")
    counts = sorted({row["pairs"] for row in first})
    left.set_xticks(counts, [f"{count:,}" for count in counts], minor=False)
    left.set_xticks([], minor=True)
    middle.set(xlabel="share of wrong labels")
    middle.legend(fontsize="small")
    for i, name in enumerate(("agreed", "careful", "sure")):
        right.bar([j + 0.27 * (i - 1) for j in range(len(second))], [row[name] for row in second], 0.27, label=name)
    right.axhline(0.5, color="grey", lw=0.8, ls=":")
    right.set(xticks=range(len(second)), ylim=(0, 1))
    right.set_xticklabels([row["annotators"].replace(", ", ",\n") for row in second])
    right.legend(fontsize="small", loc="lower left")
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = ablation.parser(__doc__)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.1, 0.25],
                        help="shares of wrong labels (default: 0 0.1 0.25)")
    parser.set_defaults(steps=125, pairs=6000)
    args = parser.parse_args(argv)
    scale, noises = options.build(Scale, args), sorted({*args.noise})
    counts = [scale.pairs // 16, scale.pairs // 4, scale.pairs]
    if counts[0] < scale.batch_size:
        raise BadInput(f"a sixteenth of --pairs {scale.pairs} does not fill a batch of {scale.batch_size}: make more")
    if not all(0 <= noise <= 1 for noise in noises):
        raise BadInput("--noise takes shares, from 0 to 1")
    cases = [(count, noises[0]) for count in counts] + [(scale.pairs, noise) for noise in noises[1:]]
    policy = ablation.policy(args)
    log = RunLog(__file__, "noise", vars(args))
    jobs = {}
    for world in (World(policy, args, scale, seed) for seed in range(scale.seeds)):
        jobs |= {(*case, world.seed): (lambda tick, w=world, c=case: noisy(w, *c, scale, tick)) for case in cases}
        jobs |= {(group, world.seed): (lambda tick, w=world, g=group: asked(w, g, scale, tick)) for group in GROUPS}
    results = ablation.run_all(log, jobs, scale.steps, policy)
    first, second = tables(cases, results, scale.seeds)
    how = f"{scale.steps} steps of {scale.batch_size} pairs, seeds: {scale.seeds}"
    table(how, ablation.shown(first))
    table("annotators who take turns", ablation.shown(second))
    ablation.done(log, draw(first, second), "noise", first, annotators=second)


if __name__ == "__main__":
    run_program(main)
