"""Forgetting: a model that has learned all families of tasks but one is taught that one alone.

    uv run stages run 10 demos/forgetting.py
    uv run stages run 10 demos/forgetting.py --new spell --new-steps 300

For each seed, one model is tuned on the old families with the recipe of sft.py. From there it goes five ways:

- "full": all weights are tuned on the new family alone.
- "LoRA": adapters of rank `--rank` are, with AdamW; the matrices of the model stay as they are.
- "replay 10 %" and so on: all weights, but so many of the conversations of each batch are old ones (Robins,
  "Catastrophic forgetting, rehearsal and pseudorehearsal", 1995). A batch is as large as before, so replay takes time
  away from what is new.

Nothing that was learned is wrong now, and the model has room for both. It is lost since nothing in the new loss holds
it in place: after a while the model does the new task whatever it is asked (McCloskey & Cohen, "Catastrophic
interference in connectionist networks", 1989).

`old` and `new` are exact match on new words after the last step, means over seeds and the first over families; `kept`
is `old` as a share of what it was before. `lowest` is the lowest mean of `old` that was seen along the way.

`forgetting.png`: both along the steps, means over seeds.
"""

import sys
from dataclasses import dataclass, replace
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
import sft
from data import Example
from demos import ablation
from demos.ablation import Scale, World
from hf import Opened
from sft import SFTConfig, passes
from train import make_optimizer


@dataclass
class Sizes:
    """The second part. Raises BadInput for a size that cannot be."""

    new: str = "reverse"  # the family that is taught last
    new_steps: int = 120  # steps on it
    every: int = 20  # steps between two looks at old and new
    rank: int = 8  # of the adapters
    lora_lr: float = 1e-2  # of AdamW, for the adapters: the one that ranks.py takes

    def __post_init__(self):
        if self.new_steps < 1 or not 1 <= self.every <= self.new_steps:
            raise BadInput(f"--new-steps {self.new_steps} --every {self.every}: at least one look in the second part")
        lora.LoRAConfig(self.rank)
        if not 0 < self.lora_lr < 1:
            raise BadInput(f"--lora-lr {self.lora_lr:g}: it must be above 0 and below 1")


WAYS = {"full": 0.0, "LoRA": 0.0, "replay 10 %": 0.1, "replay 20 %": 0.2, "replay 40 %": 0.4}  # share of old records


def mixed(new: list[Example], old: list[Example], share: float, config: SFTConfig):
    """Batches without end in which a share of the examples, rounded to whole ones, is old."""
    count = round(share * config.batch_size)
    if count == 0:
        return passes(new, config)
    fresh = passes(new, replace(config, batch_size=config.batch_size - count))
    again = passes(old, replace(config, batch_size=count))
    return (a + b for a, b in zip(fresh, again, strict=True))


def teach(way: str, opened: Opened, new: World, old: World, sizes: Sizes, scale: Scale, seed: int, tick) -> dict:
    """Teach a copy of `opened` the new family -> {"at": steps, "old": exact match at each, "new": the same}."""
    opened = ablation.copied(opened)
    model = opened.model
    config = ablation.recipe(scale, seed, steps=sizes.new_steps, warmup=min(10, sizes.new_steps))
    if way == "LoRA":
        torch.manual_seed(seed)
        lora.add(model, lora.LoRAConfig(sizes.rank))
        optimizer = ablation.adamw(model, sizes.lora_lr)
    else:
        optimizer = make_optimizer(model, config)
    seen = {"at": [], "old": [], "new": []}

    def look(step):
        found = ablation.exact(opened, {"old": old.tests["words"], "new": new.tests["words"]})
        for name, value in {"at": step, "old": found["old"]["mean"], "new": found["new"]["mean"]}.items():
            seen[name].append(value)

    look(0)
    for step, loss in sft.tune(model, mixed(new.examples, old.examples, WAYS[way], config), config, optimizer):
        tick(step, loss)
        if step % sizes.every == 0 or step == sizes.new_steps:
            look(step)
    return seen


def job(world: World, args, sizes: Sizes, scale: Scale, seed: int, tick) -> dict[str, dict]:
    """Tune one model on the old families, and teach it the new one in all ways."""
    old = ablation.part(world, args, scale, seed, ablation.one_apart(args, sizes.new))
    new = ablation.part(world, args, replace(scale, test=max(1, scale.test // 3)), seed, [sizes.new])
    opened = ablation.copied(world.opened)
    ablation.tune(opened.model, old.examples, ablation.recipe(scale, seed), tick)
    found = {}
    for i, way in enumerate(WAYS):
        done = scale.steps + i * sizes.new_steps

        def later(step, loss, done=done):
            tick(done + step, loss)

        found[way] = teach(way, opened, new, old, sizes, scale, seed, later)
    return found


def summary(way: str, seeds: list[dict]) -> dict:
    """The table row of one way, from what `teach` saw for each seed."""
    old = [mean(values) for values in zip(*(seen["old"] for seen in seeds), strict=True)]
    new = mean(seen["new"][-1] for seen in seeds)
    return {
        "way": way, "old before": old[0], "old": old[-1],
        "spread": ablation.spread([seen["old"][-1] for seen in seeds]), "kept": old[-1] / old[0] if old[0] else None,
        "lowest": min(old), "new": new, "its spread": ablation.spread([seen["new"][-1] for seen in seeds]),
    }  # fmt: skip


def draw(runs: dict[str, list[dict]], name: str) -> Figure:
    """Exact match along the steps, means over seeds: of the old families, and of the new one."""
    fig = Figure(figsize=(8.4, 3.4), layout="constrained")
    panels = fig.subplots(1, 2, sharey=True)
    for axes, which, title in zip(panels, ("old", "new"), ("old families", f"new family: {name}"), strict=True):
        for way, seeds in runs.items():
            values = [mean(column) for column in zip(*(seen[which] for seen in seeds), strict=True)]
            axes.plot(seeds[0]["at"], values, marker=".", label=way)
        axes.set(title=title, xlabel="step on the new family", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("exact match, new words")
    panels[1].legend(fontsize="small")
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = ablation.parser(__doc__)
    parser.set_defaults(steps=400, test=120)
    options.add(parser, Sizes)
    args = parser.parse_args(argv)
    scale, sizes = options.build(Scale, args), options.build(Sizes, args)
    fewest = round(max(WAYS.values()) * scale.batch_size)
    if not 0 < fewest < scale.batch_size:
        raise BadInput(f"--batch-size {scale.batch_size}: a batch must have room for old records and new ones")
    ablation.one_apart(args, sizes.new)  # a family that cannot be taught is refused now
    base = ablation.base(args)
    log = RunLog(__file__, "forgetting", vars(args))
    worlds = ablation.worlds(base, args, scale)
    jobs = {("all ways", seed): (lambda tick, s=seed: job(worlds[s], args, sizes, scale, s, tick))
            for seed in range(scale.seeds)}
    results = ablation.run_all(log, jobs, scale.steps + len(WAYS) * sizes.new_steps, base)
    runs = {way: [results["all ways", seed][way] for seed in range(scale.seeds)] for way in WAYS}
    rows = [summary(way, seeds) for way, seeds in runs.items()]
    table(f"{sizes.new_steps} steps on {sizes.new}, after {scale.steps} on all others; seeds: {scale.seeds}", rows)
    ablation.done(log, draw(runs, sizes.new), "forgetting", rows)


if __name__ == "__main__":
    run_program(main)
