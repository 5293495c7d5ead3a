"""Four choices of supervised fine-tuning, each turned round alone: mask, curriculum, base, packing.

    uv run stages run 10 demos/choices.py
    uv run stages run 10 demos/choices.py --steps 600 --batch-size 64 --records 20000

All variants are tuned on the same tasks of tasks.py with the recipe of sft.py, which is the first of them:

- "as it is": the loss counts answers alone, each pass has a new order, it begins with a base, and several conversations
  share a row, each to itself.
- "questions too": the loss counts the tokens of the questions as well.
- "short first": the first pass goes from short answers to long ones (Bengio et al., "Curriculum Learning", 2009).
- "no base": it begins with random weights of the same shape.
- "padded": each conversation has a row of its own, filled up. The gradient is the same but for rounding.

`exact` is exact match on tasks with new words, the mean over families; `phrasings` the same on new combinations of
known phrases; `loss` is that of the right answers of new words, in nats per answer token. `spread` is a standard
deviation over seeds. `time` is a step's seconds as a multiple of the first variant's: the median over `--rounds` steps
in which the variants take turns.

`choices.png`: training loss by step, which for "questions too" counts other tokens; and exact match by family, where
one can see whether a choice helps with long answers more than with short ones.
"""

import sys
from pathlib import Path
from statistics import mean, median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, table
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
from matplotlib.figure import Figure

import sft
from chat import conversation
from demos import ablation
from demos.ablation import Scale, World
from hf import Opened
from model import GPT
from train import make_optimizer

FIRST = "as it is"
VARIANTS = {FIRST: {}, "questions too": {"mask": False}, "short first": {"curriculum": True}, "no base": {},
            "padded": {"pack": False}}  # fmt: skip


def start(world: World, variant: str, seed: int) -> Opened:
    """The model that a run begins with."""
    opened = ablation.copied(world.opened)
    if variant == "no base":
        torch.manual_seed(seed)
        opened.model = GPT(opened.model.config).to(opened.model.tok_emb.weight.device)
    return opened


def job(world: World, variant: str, scale: Scale, seed: int, tick) -> dict:
    """Tune one model and score it: "losses" of its steps, "words" and "phrasings" by family, "loss" on new words."""
    opened = start(world, variant, seed)
    losses = ablation.tune(opened.model, world.examples, ablation.recipe(scale, seed, **VARIANTS[variant]), tick)
    new = [conversation(opened, record["messages"]) for record in world.tests["words"]]
    return {"losses": losses, "loss": sft.held_out_loss(opened.model, new), **ablation.exact(opened, world.tests)}


def times(world: World, scale: Scale, rounds: int) -> dict[str, float]:
    """Seconds of a step of each variant, the median over `rounds` steps in turns; a first one warms up."""
    runs, seconds = {}, {variant: [] for variant in VARIANTS}
    for variant, more in VARIANTS.items():
        model = start(world, variant, 0).model
        # With the same order for all, a step of each has the same conversations.
        config = ablation.recipe(scale, 0, **more | {"curriculum": False, "steps": rounds + 1})
        runs[variant] = sft.tune(model, sft.passes(world.examples, config), config, make_optimizer(model, config))
    with progress(rounds + 1, "timing") as bar:
        for i in range(rounds + 1):
            for variant, run in runs.items():
                begin = perf_counter()
                next(run)
                seconds[variant].append(perf_counter() - begin)
            bar.update(i + 1)
    return {variant: median(found[1:]) for variant, found in seconds.items()}


def draw(runs: dict[str, list[dict]]) -> Figure:
    """Training loss, smoothed, of the first seed; exact match by family, the mean over seeds."""
    fig = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(1, 1.8))
    families = list(runs[FIRST][0]["words"])
    for i, (variant, found) in enumerate(runs.items()):
        losses = found[0]["losses"]
        width = max(1, len(losses) // 40)
        ends = range(width, len(losses) + 1, width)
        left.plot(ends, [mean(losses[end - width:end]) for end in ends], label=variant)
        x = [j + 0.16 * (i - 2) for j in range(len(families))]
        right.bar(x, [mean(run["words"][family] for run in found) for family in families], 0.16)
    left.set(xlabel="step", ylabel="training loss, nats per token", yscale="log")
    left.set_yticks(ticks := [0.2, 0.5, 1, 2, 5], map(str, ticks))
    left.minorticks_off()
    right.set(xticks=range(len(families)), ylabel="exact match, new words", ylim=(0, 1.03))
    right.set_xticklabels(families, rotation=30)
    left.legend(fontsize="small")
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = ablation.parser(__doc__)
    parser.set_defaults(steps=250)
    parser.add_argument("--rounds", type=int, default=12, help="steps of each variant that are timed (default: 12)")
    args = parser.parse_args(argv)
    scale = options.build(Scale, args)
    if args.rounds < 1:
        raise BadInput(f"--rounds {args.rounds}: time at least one step")
    base = ablation.base(args)
    log = RunLog(__file__, "choices", vars(args))
    worlds = ablation.worlds(base, args, scale)
    jobs = {(variant, seed): (lambda tick, v=variant, s=seed: job(worlds[s], v, scale, s, tick))
            for seed in range(scale.seeds) for variant in VARIANTS}
    results = ablation.run_all(log, jobs, scale.steps, base)
    runs = {variant: [results[variant, seed] for seed in range(scale.seeds)] for variant in VARIANTS}
    seconds = times(worlds[0], scale, args.rounds)
    rows = ablation.compare({variant: [run["words"]["mean"] for run in mine] for variant, mine in runs.items()}, FIRST)
    for row in rows:
        mine = runs[row["variant"]]
        row["phrasings"] = mean(run["phrasings"]["mean"] for run in mine)
        row["loss"] = mean(run["loss"] for run in mine)
        row["time"] = seconds[row["variant"]] / seconds[FIRST]
    table(f"{scale.steps} steps of {scale.batch_size} conversations, seeds: {scale.seeds}", ablation.shown(rows))
    ablation.done(log, draw(runs), "choices", rows)


if __name__ == "__main__":
    run_program(main)
