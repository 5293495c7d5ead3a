"""Best of n: the policy writes n answers, a reward model picks one. For how large an n is the choice a good one?

    uv run stages run 11 demos/best_of_n.py
    uv run stages run 11 demos/best_of_n.py --few 100 --most 256

The policy writes `--most` answers to each held-out task. Three reward models choose among them:

- "good": learned from all pairs of this stage, `--pairs` of them;
- "few pairs": learned from `--few` of the same;
- "deletions": learned from right answers against the same without a letter.

For each n, `proxy` is the mean score of the chosen answers, in standard deviations of the scores of all answers from
their mean: what one sees. `gold` is the share of chosen answers that are right: what one wants. `any right` is the
share of tasks with at least one right answer among the n, the most that a judge can reach.

The more answers there are to choose from, the higher is the best score, whatever scores mean. Whether the answers get
better is another matter. Among many answers there are more that the judge likes for wrong reasons: gold rises for a
while, and falls, and the proxy does not show it. Gao et al., "Scaling Laws for Reward Model Overoptimization"
(2022), measure how far a choice leads away from the policy by KL = ln n - (n - 1) / n nats. It is less where several
answers are the same.

Numbers for n are not from one draw of n answers. They are the mean over all subsets of n of the answers that there are.

`best_of_n.png`: proxy and gold over n, mean and standard deviation over seeds. Another seed has other tasks, answers
and pairs.
"""

import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say, table
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
from matplotlib.figure import Figure

import reward
from demos import ablation
from demos.ablation import LENGTH, Scale, World
from hf import Opened
from preferences import corrupted, draw_answers

JUDGES = ("good", "few pairs", "deletions")


@dataclass
class Sizes:
    """What is chosen from. Raises BadInput for a size that cannot be."""

    most: int = 64  # answers to each task; n is 1, 2, 4 ... up to it
    few: int = 300  # pairs of the judge "few pairs"

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise BadInput(f"--{name} {value}: it must be at least 1")

    def counts(self) -> list[int]:
        """The powers of two up to `most`."""
        return [2**i for i in range(self.most.bit_length())]


def best_of(n: int, scores, values) -> float:
    """What the answer with the highest score of n is worth: the mean over tasks and over all subsets of n answers.

    scores, values [M, N]: N answers to each of M tasks, n <= N. Subsets need not be listed: the answer of rank i, the
    first being 0, is the best of a subset if the n - 1 others come from the N - 1 - i behind it. With N = 3 and n = 2,
    that is so for 2, 1 and 0 of the 3 subsets.
    """
    M, N = scores.shape
    shares = [math.comb(N - 1 - i, n - 1) / math.comb(N, n) for i in range(N)]
    order = scores.argsort(dim=1, descending=True)
    return (values.double().gather(1, order) @ torch.tensor(shares, dtype=torch.float64)).mean().item()


def divergence(n: int) -> float:
    """KL of best-of-n from the policy, nats: Stiennon et al., "Learning to summarize from human feedback" (2020).

    Exact where no two answers have the same score; otherwise a bound (Beirami et al., 2024).
    """
    return math.log(n) - (n - 1) / n


class Written(World):
    """The tasks of one seed, with many answers to each that is held out."""

    def __init__(self, policy: Opened, args, scale: Scale, seed: int, sizes: Sizes):
        super().__init__(policy, args, scale, seed)
        self.sizes = sizes

    @cached_property
    def answers(self) -> list[list[str]]:
        """`most` answers to each held-out task."""
        return draw_answers(self.policy, self.test, self.sizes.most, seed=2000 + self.seed, length=LENGTH)

    @cached_property
    def gold(self):
        """1 for answers that are right, [M, N]."""
        return torch.tensor([[float(text == record["messages"][-1]["content"]) for text in texts]
                             for record, texts in zip(self.test, self.answers, strict=True)])

    def training(self, judge: str) -> list[dict]:
        """The pairs that a judge learns from."""
        if judge == "deletions":
            return corrupted(self.records, ("delete",), self.seed)
        return self.pairs()[:self.sizes.few] if judge == "few pairs" else self.pairs()

    def scores(self, opened: Opened):
        """The score of each answer, [M, N]. Equal answers are scored once, so that they are equally good."""
        told = {(i, text): None for i, texts in enumerate(self.answers) for text in texts}
        talks = [[*self.test[i]["messages"][:-1], {"role": "assistant", "content": text}] for i, text in told]
        told = dict(zip(told, reward.scores(opened, talks).tolist(), strict=True))
        return torch.tensor([[told[i, text] for text in texts] for i, texts in enumerate(self.answers)])


def job(world: Written, judge: str, tick) -> dict:
    """Train one judge and let it choose: "proxy", "gold" and "any right", a number for each n."""
    opened, _ = ablation.learn(world.policy, world.training(judge), ablation.recipe(world.scale, world.seed), tick)
    scores, counts = world.scores(opened), world.sizes.counts()
    seen = (scores - scores.mean()) / scores.std()
    return {
        "proxy": [best_of(n, scores, seen) for n in counts], "gold": [best_of(n, scores, world.gold) for n in counts],
        "any right": [best_of(n, world.gold, world.gold) for n in counts],
        "pairs": ablation.right(opened, world.held_out)["mean"],
    }  # fmt: skip


def rows_of(runs: dict[str, list[dict]], counts: list[int]) -> list[dict]:
    """A row for each n: means over seeds."""
    rows = []
    for i, n in enumerate(counts):
        row = {"n": n, "KL": divergence(n)}
        for judge, mine in runs.items():
            row |= {f"{judge}: {name}": mean(run[name][i] for run in mine) for name in ("proxy", "gold")}
        rows.append(row | {"any right": mean(run["any right"][i] for run in runs[JUDGES[0]])})
    return rows


def draw(runs: dict[str, list[dict]], counts: list[int]) -> Figure:
    """Proxy and gold over n, a line for each judge."""
    fig = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, name, label in zip(fig.subplots(1, 2), ("proxy", "gold"), ("score, standard deviations", "right"),
                                 strict=True):
        for judge, mine in runs.items():
            columns = list(zip(*(run[name] for run in mine), strict=True))
            axes.errorbar(counts, [mean(c) for c in columns], yerr=[ablation.spread(c) or 0 for c in columns],
                          marker="o", ms=3, capsize=2, label=judge)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="n", ylabel=label, title={"proxy": "what one sees", "gold": "what one wants"}[name])
    best = [mean(c) for c in zip(*(run["any right"] for run in runs[JUDGES[0]]), strict=True)]
    axes.plot(counts, best, color="grey", lw=0.8, ls=":", label="any right")
    axes.legend(fontsize="small")
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = ablation.parser(__doc__)
    options.add(parser, Sizes)
    parser.set_defaults(test=108)
    args = parser.parse_args(argv)
    scale, sizes = options.build(Scale, args), options.build(Sizes, args)
    if not scale.batch_size <= sizes.few <= scale.pairs:
        raise BadInput(f"--few {sizes.few}: from a batch, {scale.batch_size}, to --pairs, {scale.pairs}")
    policy = ablation.policy(args)
    log = RunLog(__file__, "best_of_n", vars(args))
    jobs = {}
    for world in (Written(policy, args, scale, seed, sizes) for seed in range(scale.seeds)):
        jobs |= {(judge, world.seed): (lambda tick, w=world, j=judge: job(w, j, tick)) for judge in JUDGES}
    results = ablation.run_all(log, jobs, scale.steps, policy)
    runs = {judge: [results[judge, seed] for seed in range(scale.seeds)] for judge in JUDGES}
    rows = rows_of(runs, sizes.counts())
    table(f"{scale.test} tasks, {sizes.most} answers to each, seeds: {scale.seeds}", ablation.shown(rows))
    accuracy = {judge: mean(run["pairs"] for run in mine) for judge, mine in runs.items()}
    for judge, share in accuracy.items():
        best = max(rows, key=lambda row: row[f"{judge}: gold"])
        say(f"{judge}: ranks {share:.3f} of held-out pairs right; gold is highest at n = {best['n']}, "
            f"{best[f'{judge}: gold']:.3f}, and at n = {rows[-1]['n']} {rows[-1][f'{judge}: gold']:.3f}")
    ablation.done(log, draw(runs, sizes.counts()), "best_of_n", rows, pairs=accuracy)


if __name__ == "__main__":
    run_program(main)
