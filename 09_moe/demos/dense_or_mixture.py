"""Dense against mixture: at equal work for each token, and at equal size.

    uv run stages run 09 demos/dense_or_mixture.py
    uv run stages run 09 demos/dense_or_mixture.py --steps 1350 --batch-size 16

Three models, trained with the default recipe of train.py on the same batches:

- "dense": a feed-forward of 8/3 C units.
- "mixture": `--n-expert` experts, of which a position uses `--n-active`. Those have as many units together as the dense
  feed-forward, so a token costs about the same products ("active" is nearly equal), and the model is larger.
- "dense, as large": one feed-forward with as many units as all experts together. The mixture has its routers besides.

So the first comparison asks what more parameters bring when a token's work stays the same, the second what is lost when
most of them rest. `ms a step` is a training step, the median over `--rounds` in which the models take turns. `MB` are
weights and what the optimisers keep for them; Muon keeps one number for each weight of a block, AdamW two for others.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
from matplotlib.figure import Figure

from data import Dataset, batches, load_data, windows
from demos import ablation
from demos.ablation import Scale
from model import GPT, ModelConfig
from moe import count
from train import TrainConfig, make_optimizer, train


@dataclass
class Sizes:
    """The mixture, and how speed is measured. Raises BadInput for a size that cannot be."""

    n_expert: int = 8  # experts of the mixture
    n_active: int = 2  # of which a position uses so many
    rounds: int = 20  # steps of each model that are timed

    def __post_init__(self):
        if self.n_expert < 1 or self.rounds < 1:
            raise BadInput(f"--n-expert {self.n_expert} --rounds {self.rounds}: both must be at least 1")


def shapes(scale: Scale, sizes: Sizes, vocab_size: int) -> dict[str, ModelConfig]:
    """The three models. Raises BadInput for a mixture that cannot be."""
    fields = {name: getattr(scale, name) for name in ("block_size", "n_embd", "n_head", "n_layer")}
    fields |= {"vocab_size": vocab_size, "n_kv_head": 1}
    mixture = ModelConfig(**fields, n_expert=sizes.n_expert, n_active=sizes.n_active)
    large = ModelConfig(**fields, n_hidden=sizes.n_expert * mixture.expert_hidden)
    return {"dense": ModelConfig(**fields), "mixture": mixture, "dense, as large": large}


def build(config: ModelConfig, seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(config)


def held(model, optimizer) -> int:
    """Bytes of the weights and of the tensors that the optimisers keep."""
    states = [state for each in optimizer.optimizers.values() for state in each.state.values()]
    kept = [value for state in states for value in state.values() if torch.is_tensor(value)]
    return sum(each.numel() * each.element_size() for each in [*model.parameters(), *kept])


def steps(models: dict[str, GPT], data: Dataset, scale: Scale, rounds: int) -> dict[str, tuple[float, int]]:
    """Seconds of a training step of each model, and the bytes it holds after. The models take turns, a step each.

    The first step of each warms up and is not counted.
    """
    config = TrainConfig(steps=rounds + 1, batch_size=scale.batch_size)
    optimizers = {name: make_optimizer(model, config) for name, model in models.items()}
    runs = {}
    for name, model in models.items():
        stream = batches(data.train, scale.block_size, scale.batch_size, seed=0)
        runs[name] = train(model, stream, config, optimizers[name])
    seconds = {name: [] for name in models}
    with progress(rounds + 1, "timing") as bar:
        for i in range(rounds + 1):
            for name, run in runs.items():
                begin = perf_counter()
                next(run)
                seconds[name].append(perf_counter() - begin)
            bar.update(i + 1)
    return {name: (median(seconds[name][1:]), held(models[name], optimizers[name])) for name in models}


def draw(curves: dict[str, list[float]], seconds: dict[str, float]) -> Figure:
    """Training loss, smoothed, by step and by time."""
    fig = Figure(figsize=(8.4, 3.6), layout="constrained")
    by_step, by_time = fig.subplots(1, 2, sharey=True)
    for name, losses in curves.items():
        width = max(1, len(losses) // 40)
        ends = range(width, len(losses) + 1, width)
        smooth = [mean(losses[end - width:end]) for end in ends]
        by_step.plot(ends, smooth, label=name)
        by_time.plot([end * seconds[name] for end in ends], smooth, label=name)
    by_step.set(xlabel="step", ylabel="training loss, nats per token")
    by_time.set(xlabel="seconds of training")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    by_step.legend()
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = ablation.parser(__doc__)
    options.add(parser, Sizes)
    args = parser.parse_args(argv)
    setup("cpu")
    scale, sizes, data = options.build(Scale, args), options.build(Sizes, args), load_data(args.corpus)
    args.corpus = data.name  # a default may find another text the next time
    # Sizes that cannot be and a text that is too short are refused now, not after the training.
    found = shapes(scale, sizes, len(data.tokenizer))
    windows(data.val, scale.block_size)
    next(batches(data.train, scale.block_size, scale.batch_size, 0))
    log = RunLog(__file__, "dense_or_mixture", vars(args))

    def job(name, seed):
        return lambda tick: ablation.fit(build(found[name], seed), data, scale, seed, tick)

    jobs = {(name, seed): job(name, seed) for seed in range(scale.seeds) for name in found}
    results = ablation.run_all(log, jobs, scale.steps, data)
    models = {name: build(config, 0) for name, config in found.items()}
    timed = steps(models, data, scale, sizes.rounds)
    runs = {name: [results[name, seed] for seed in range(scale.seeds)] for name in found}
    rows = ablation.compare({name: [run["val loss"] for run in mine] for name, mine in runs.items()}, "dense")
    for row in rows:
        name = row["variant"]
        seconds, size = timed[name]
        row |= {"params": count(models[name]), "active": count(models[name], active=True),
                "ms a step": 1000 * seconds, "MB": size / 1e6}
    ablation.show(f"{data.name}: {scale.steps} steps, seeds: {scale.seeds}, losses in nats per character", rows)
    curves = {name: [mean(at) for at in zip(*(run["losses"] for run in mine), strict=True)]
              for name, mine in runs.items()}
    ablation.done(log, draw(curves, {name: seconds for name, (seconds, _) in timed.items()}), "losses", rows)


if __name__ == "__main__":
    run_program(main)
