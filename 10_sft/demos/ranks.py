"""Full fine-tuning against LoRA of several ranks: what is learned, what is forgotten, how much is trained.

    uv run stages run 10 demos/ranks.py
    uv run stages run 10 demos/ranks.py --new spell --ranks 2 8 32 --lora-lr 0.003

For each seed one model is tuned on all families of tasks but one. Then it is taught the new family alone:

- "full": all weights, with the recipe of sft.py, Muon and AdamW.
- "full, AdamW": all weights with AdamW alone. LoRA has no Muon either, so what differs from here on is LoRA itself.
- "rank r": adapters of rank r beside every matrix of the blocks, with AdamW. Muon makes all singular values of a step
  equal, which suits a whole matrix and not its two thin factors.

Why not tune the base with LoRA? Ours is tiny, and has never copied a word or seen a digit or a tag. In trials with one
seed, adapters of rank 16 and 64 did not learn the tasks from there in 300 steps. What people put adapters beside is a
model that can already do most of what is asked.

Learning rates: 0.01 for adapters, 0.003 for all weights. B begins with zeros, and few numbers have a long way to go. In
trials with one seed, adapters of rank 8 learned next to nothing with 0.003, and those of rank 64 diverged with 0.03.
All ranks have the same rate, since alpha / r takes the rank out of the size of a change.

`new` is exact match on new words of the new family, and `difference` that from "full"; `old` is exact match on the old
families, their mean. `tax` is the alignment tax: how much the loss on the validation text has risen since the base, in
nats per character. The row "before" is the model that is taught. `trained` is the share of the model's numbers that is
tuned. "LoRA learns less and forgets less" (Biderman et al., 2024) would be a lower `new`, a higher `old` and a lower
`tax`.

`ranks.png`: new against old, a point for each run.
"""

import sys
from dataclasses import dataclass
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

import lora
from demos import ablation
from demos.ablation import Scale, World
from evaluate import text_loss

BEFORE, FULL, PLAIN = "before", "full", "full, AdamW"


@dataclass
class Sizes:
    """The second part. Raises BadInput for what cannot be."""

    new: str = "reverse"  # the family that is taught last
    new_steps: int = 100  # steps on it
    alpha: float = 16.0  # the adapters' change counts alpha / rank times
    lora_lr: float = 1e-2  # of AdamW, for adapters
    full_lr: float = 3e-3  # of AdamW, for all weights

    def __post_init__(self):
        if self.new_steps < 1:
            raise BadInput(f"--new-steps {self.new_steps}: it must be at least 1")
        for name in ("lora_lr", "full_lr"):
            if not 0 < getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name):g}: it must be above 0 and below 1")


def trained(model) -> float:
    """The share of a model's numbers that is tuned: those of its adapters, or all where there are none."""
    added = sum(layer.a.numel() + layer.b.numel() for layer in lora.adapters(model).values())
    return added / (sum(p.numel() for p in model.parameters()) - added) if added else 1.0


def prepared(model, kind: str | int, sizes: Sizes):
    """Make `model` ready for its kind, a rank or one of full -> its optimiser, or none for that of sft.py."""
    if kind == FULL:
        return None
    if kind == PLAIN:
        return ablation.adamw(model, sizes.full_lr)
    lora.add(model, lora.LoRAConfig(kind, sizes.alpha))
    return ablation.adamw(model, sizes.lora_lr)


def job(world: World, kinds: dict, args, sizes: Sizes, scale: Scale, seed: int, tick) -> dict[str, dict]:
    """Tune one model on the old families and teach it the new one -> for each kind "new", "old", "tax", "trained"."""
    old = ablation.part(world, args, scale, seed, ablation.one_apart(args, sizes.new))
    new = ablation.part(world, args, scale, seed, [sizes.new])
    base = text_loss(world.opened.model, world.opened.tokenizer, args.corpus)
    tests = {"new": new.tests["words"], "old": old.tests["words"]}

    def measured(opened, share=None) -> dict:
        scores = {name: found["mean"] for name, found in ablation.exact(opened, tests).items()}
        return scores | {"tax": text_loss(opened.model, opened.tokenizer, args.corpus) - base, "trained": share}

    first = ablation.copied(world.opened)
    ablation.tune(first.model, old.examples, ablation.recipe(scale, seed), tick)
    found = {BEFORE: measured(first)}
    config = ablation.recipe(scale, seed, steps=sizes.new_steps, warmup=min(10, sizes.new_steps))
    for i, (name, kind) in enumerate(kinds.items()):
        opened, done = ablation.copied(first), scale.steps + i * sizes.new_steps
        torch.manual_seed(seed)
        optimizer, share = prepared(opened.model, kind, sizes), trained(opened.model)
        losses = ablation.tune(opened.model, new.examples, config,
                               lambda step, loss, done=done: tick(done + step, loss), optimizer)
        lora.merge(opened.model)  # the same scores, and quicker
        found[name] = measured(opened, share) | {"losses": losses}
    return found


def draw(runs: dict[str, list[dict]]) -> Figure:
    """What is learned against what is kept, a point for each run."""
    fig = Figure(figsize=(5, 3.6), layout="constrained")
    axes = fig.subplots()
    for name, found in runs.items():
        axes.scatter([run["old"] for run in found], [run["new"] for run in found], label=name)
    axes.set(xlabel="exact match, old families", ylabel="exact match, new family", xlim=(-0.03, 1.03),
             ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = ablation.parser(__doc__)
    parser.set_defaults(steps=400, test=90)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4, 16, 64], help="default: 1 4 16 64")
    options.add(parser, Sizes)
    args = parser.parse_args(argv)
    scale, sizes = options.build(Scale, args), options.build(Sizes, args)
    for rank in args.ranks:
        lora.LoRAConfig(rank, sizes.alpha)  # what cannot be is refused now
    ablation.one_apart(args, sizes.new)
    base = ablation.base(args)
    log = RunLog(__file__, "ranks", vars(args))
    worlds = ablation.worlds(base, args, scale)
    kinds = {FULL: FULL, PLAIN: PLAIN} | {f"rank {rank}": rank for rank in args.ranks}
    jobs = {("all kinds", seed): (lambda tick, s=seed: job(worlds[s], kinds, args, sizes, scale, s, tick))
            for seed in range(scale.seeds)}
    results = ablation.run_all(log, jobs, scale.steps + len(kinds) * sizes.new_steps, base)
    runs = {name: [results["all kinds", seed][name] for seed in range(scale.seeds)] for name in (BEFORE, *kinds)}
    rows = ablation.compare({name: [run["new"] for run in mine] for name, mine in runs.items()}, FULL, "new")
    for row in rows:
        mine = runs[row["variant"]]
        row |= {name: mean(run[name] for run in mine) for name in ("old", "tax")}
        row["trained"] = None if row["variant"] == BEFORE else f"{mean(run['trained'] for run in mine):.1%}"
    table(f"{sizes.new_steps} steps on {sizes.new}, after {scale.steps} on all others; seeds: {scale.seeds}",
          ablation.shown(rows))
    ablation.done(log, draw(runs), "ranks", rows)


if __name__ == "__main__":
    run_program(main)
