"""Distilled or trained alone: a small student, with and without a teacher, at equal steps and at equal time.

    uv run stages run 10 demos/distillation.py
    uv run stages run 10 demos/distillation.py --mix 1 --temperature 4 --n-embd 96

For each seed a teacher is tuned: the base of this stage, with the recipe of sft.py, `--teacher-steps` steps. The
students are smaller, and begin with random weights, the same for all. They see the same questions in the same order.

- "alone": learns the right answers.
- "alone, equal time": the same for as many more steps as fit into the time of "forward KL".
- "forward KL", "reverse KL": the scores of the teacher have a share of `--mix` in the loss (extras/distill.py). A step
  takes longer, since the teacher has to read the batch as well.
- "texts": learns the teacher's own answers in place of the right ones; those that do not end are left out.

`exact` is exact match on new words, the mean over families, `difference` that from "alone"; `loss` is that of the right
answers in nats per answer token: a student that is unsure where its teacher is has a lower one. `time` is the whole
training as a multiple of "alone": the median seconds of `--rounds` steps in turns, times the steps, and for "texts" the
teacher's writing besides. The teacher's training is not counted. The row of the teacher is there to compare.

`distillation.png`: exact match of each way against time, a point for each seed.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import table
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
from matplotlib.figure import Figure

import sft
from chat import conversation
from demos import ablation
from demos.ablation import Scale, World
from extras.distill import DistillConfig, distil, teacher_texts
from hf import Opened
from model import GPT, ModelConfig
from sft import fitting
from train import make_optimizer

TEACHER, ALONE, MORE, TEXTS = "teacher", "alone", "alone, equal time", "texts"
WAYS = {"forward KL": {}, "reverse KL": {"reverse": True}}


@dataclass
class Sizes:
    """The student, and how it is taught. Raises BadInput for a size that cannot be."""

    n_layer: int = 2  # blocks of the student
    n_embd: int = 64  # its channels
    temperature: float = 2.0  # of both softmaxes
    mix: float = 0.5  # the teacher's share in the loss
    teacher_steps: int = 400  # steps of the teacher's tuning
    rounds: int = 10  # steps of each kind that are timed

    def __post_init__(self):
        if min(self.teacher_steps, self.rounds) < 1:
            raise BadInput(f"--teacher-steps {self.teacher_steps} --rounds {self.rounds}: both must be at least 1")


def student(opened: Opened, sizes: Sizes, seed: int) -> Opened:
    """A small model with random weights, and the tokenizer and the form of conversation of `opened`."""
    torch.manual_seed(seed)
    config = ModelConfig(opened.model.config.vocab_size, opened.model.config.block_size, sizes.n_embd,
                         n_layer=sizes.n_layer)
    return replace(opened, model=GPT(config).to(opened.model.tok_emb.weight.device))


def recipe(scale: Scale, sizes: Sizes, seed: int, **more) -> DistillConfig:
    """The recipe of all students; `more` are fields that differ."""
    told = {"temperature": sizes.temperature, "mix": sizes.mix}
    return DistillConfig(**vars(ablation.recipe(scale, seed)) | told | more)


def run(way: str, model: GPT, teacher: GPT, examples, config: DistillConfig):
    """The steps of one way, as a generator of (step, loss)."""
    stream, optimizer = sft.passes(examples, config), make_optimizer(model, config)
    if way in WAYS:
        return distil(model, teacher, stream, config, optimizer)
    return sft.tune(model, stream, config, optimizer)


def pace(opened: Opened, teacher: GPT, examples, scale: Scale, sizes: Sizes, seed: int) -> dict[str, float]:
    """Seconds of a step of each way, the median over `rounds` steps in turns; a first one warms up."""
    runs = {}
    for way, more in {ALONE: {}, **WAYS}.items():
        config = recipe(scale, sizes, seed, steps=sizes.rounds + 1, **more)
        runs[way] = run(way, student(opened, sizes, seed).model, teacher, examples, config)
    seconds = {way: [] for way in runs}
    for _ in range(sizes.rounds + 1):
        for way, steps in runs.items():
            begin = perf_counter()
            next(steps)
            seconds[way].append(perf_counter() - begin)
    return {way: median(found[1:]) for way, found in seconds.items()}


def job(world: World, scale: Scale, sizes: Sizes, seed: int, tick) -> dict[str, dict]:
    """Tune a teacher, and one student in each way -> for each {"exact", "loss", "steps", "time"}."""
    new = [conversation(world.opened, record["messages"]) for record in world.tests["words"]]

    def measured(opened: Opened, **more) -> dict:
        scores = ablation.exact(opened, {"words": world.tests["words"]})
        return {"exact": scores["words"]["mean"], "loss": sft.held_out_loss(opened.model, new), **more}

    teacher = ablation.copied(world.opened)
    ablation.tune(teacher.model, world.examples, ablation.recipe(scale, seed, steps=sizes.teacher_steps), tick)
    seconds = pace(teacher, teacher.model, world.examples, scale, sizes, seed)
    begin = perf_counter()
    examples = fitting(teacher, teacher_texts(teacher, world.records, ablation.LENGTH), "the teacher's texts")
    writing = perf_counter() - begin
    longer = round(scale.steps * seconds["forward KL"] / seconds[ALONE])
    ways = {ALONE: scale.steps, MORE: max(scale.steps, longer)} | dict.fromkeys([*WAYS, TEXTS], scale.steps)
    found = {TEACHER: measured(teacher)}
    for i, (way, steps) in enumerate(ways.items()):
        opened, config = student(teacher, sizes, seed), recipe(scale, sizes, seed, steps=steps, **WAYS.get(way, {}))
        lessons = examples if way == TEXTS else world.examples
        for step, loss in run(way, opened.model, teacher.model, lessons, config):
            tick(sizes.teacher_steps + scale.steps * i + scale.steps * step // steps, loss)
        time = steps * seconds.get(way, seconds[ALONE]) + (writing if way == TEXTS else 0.0)
        found[way] = measured(opened, steps=steps, time=time / (scale.steps * seconds[ALONE]))
    return found


def draw(runs: dict[str, list[dict]]) -> Figure:
    """Exact match against time, a point for each seed; the teacher's as a line."""
    fig = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = fig.subplots()
    for way, seeds in runs.items():
        if way == TEACHER:
            axes.axhline(mean(run["exact"] for run in seeds), color="gray", lw=0.8, ls=":", label=way)
        else:
            axes.scatter([run["time"] for run in seeds], [run["exact"] for run in seeds], label=way)
    axes.set(xlabel="time, as a multiple of training alone", ylabel="exact match, new words", ylim=(-0.02, 1.02))
    axes.legend(fontsize="small")
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = ablation.parser(__doc__)
    parser.set_defaults(steps=400)
    options.add(parser, Sizes)
    args = parser.parse_args(argv)
    scale, sizes = options.build(Scale, args), options.build(Sizes, args)
    recipe(scale, sizes, 0)  # what cannot be is refused now
    base = ablation.base(args)
    student(base, sizes, 0)
    log = RunLog(__file__, "distillation", vars(args))
    worlds = ablation.worlds(base, args, scale)
    jobs = {("all ways", seed): (lambda tick, s=seed: job(worlds[s], scale, sizes, s, tick))
            for seed in range(scale.seeds)}
    results = ablation.run_all(log, jobs, sizes.teacher_steps + (3 + len(WAYS)) * scale.steps, base)
    runs = {way: [results["all ways", seed][way] for seed in range(scale.seeds)] for way in results["all ways", 0]}
    rows = ablation.compare({way: [run["exact"] for run in mine] for way, mine in runs.items()}, ALONE)
    for row in rows:
        mine = runs[row["variant"]]
        row["loss"] = mean(run["loss"] for run in mine)
        if row["variant"] != TEACHER:
            row |= {name: mean(run[name] for run in mine) for name in ("steps", "time")}
            row["steps"] = round(row["steps"])
    table(f"{scale.steps} steps of {scale.batch_size} conversations, seeds: {scale.seeds}", ablation.shown(rows))
    ablation.done(log, draw(runs), "distillation", rows)


if __name__ == "__main__":
    run_program(main)
