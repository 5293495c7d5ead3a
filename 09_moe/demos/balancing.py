"""Balancing by loss, by bias, and not at all: which experts get the positions, and what it costs.

    uv run stages run 09 demos/balancing.py
    uv run stages run 09 demos/balancing.py --steps 1350 --n-expert 16 --bias-rate 0.003

An expert that is chosen learns, and one that has learned is chosen. Left alone, a router may end with few experts that
do all the work. Three ways are trained on the same batches, with the default recipe of train.py, z-loss included:

- "none": left alone.
- "loss": the balance loss is added, which is 1 at equal loads and grows where the router gives most of its probability
  to the experts that are chosen most (Fedus et al., "Switch Transformers", 2021).
- "bias": no balance loss. After each step the experts that got too few positions get a little more of a bias in the
  choice, the others a little less (Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024).

The columns after the differences are means over layers and seeds, on the validation text, of which `--batch-size`
windows are read at a time. `busiest` is the load of the busiest expert of a layer, as a multiple of an even share;
`idle` counts the experts with less than a tenth of one. `entropy` is that of the router's probabilities, as a share of
ln E: 1 where all experts are equally likely, 0 where the router has no doubt. `dropped` is the share of choices that
are turned away where each expert takes at most `--capacity` times its even share, `loss with drops` the loss then.

`balancing.png`: for each way, the share of each expert in the first mixture of seed 0 over time; and the busiest expert
of a layer over time, the mean over layers and seeds.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
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
from train import mixtures, nll

WAYS = ("none", "loss", "bias")


@dataclass
class Sizes:
    """The mixture. Raises BadInput for a size that cannot be."""

    n_expert: int = 8  # experts of each layer
    n_active: int = 2  # of which a position uses so many
    bias_rate: float = 1e-3  # how far the biases of the choice move at a step
    capacity: float = 1.25  # for `dropped`: an expert takes at most this many times its even share
    records: int = 100  # points in time at which the load is drawn

    def __post_init__(self):
        if self.n_expert < 2 or self.records < 1 or not self.bias_rate > 0:
            raise BadInput(f"--n-expert {self.n_expert} --records {self.records} --bias-rate {self.bias_rate:g}: "
                           "it takes two experts, one record and a rate above 0")


class Watch:
    """The load of each expert over time: `shares` [records][L][E], each row of experts adding up to 1.

    Called after each training step. A record is the mean over the steps since the one before.
    """

    def __init__(self, model, steps: int, records: int):
        self.layers, self.shares, self.sum, self.seen = mixtures(model), [], 0.0, 0
        self.every = max(1, steps // records)

    def __call__(self):
        load = torch.stack([layer.routing.load for layer in self.layers]).float()  # [L, E], of the last pass
        self.sum, self.seen = self.sum + load / load.sum(-1, keepdim=True), self.seen + 1
        if self.seen == self.every:
            self.shares.append([[round(share, 4) for share in row] for row in (self.sum / self.seen).tolist()])
            self.sum, self.seen = 0.0, 0


@torch.no_grad()
def routing(model, data: torch.Tensor, rows: int) -> dict[str, float]:
    """How the routers choose on all windows of `data` [N], `rows` windows a pass, and the loss in nats per token.

    -> "busiest", "idle", "entropy", "dropped" as in the table, means over layers; "loss".
    """
    layers, load, sums, total = mixtures(model), 0, torch.zeros(2), 0.0
    x, y = (part.long() for part in windows(data, model.config.block_size))
    training = model.training
    model.train()  # experts turn positions away in training only; there is no dropout that this would turn on
    for a, b in zip(x.split(rows), y.split(rows), strict=True):
        total += nll(model, a, b).item() * len(a)
        load = load + torch.stack([layer.count() for layer in layers])  # [L, E]
        sums += len(a) * torch.tensor([
            [float(layer.routing.entropy), float(layer.routing.dropped)] for layer in layers
        ]).mean(0)  # fmt: skip
    model.train(training)
    even = load / load.float().mean(-1, keepdim=True)  # [L, E]: 1 is an even share
    entropy, dropped = (sums / len(x)).tolist()
    return {
        "busiest": even.max(-1).values.mean().item(), "idle": (even < 0.1).sum(-1).float().mean().item(),
        "entropy": entropy / torch.tensor(float(load.shape[-1])).log().item(), "dropped": dropped,
        "loss": total / len(x),
    }  # fmt: skip


def measure(model, data: Dataset, scale: Scale, capacity: float) -> dict[str, float]:
    """The columns of the table for a trained model, which had no limit and is read once more with one."""
    free = routing(model, data.val, scale.batch_size)
    model.config.capacity = capacity
    limited = routing(model, data.val, scale.batch_size)
    model.config.capacity = None
    loss = data.nats_per_char(limited["loss"])
    return {name: free[name] for name in ("busiest", "idle", "entropy")} | {
        "dropped": limited["dropped"], "loss with drops": loss,
    }  # fmt: skip


def draw(shares: dict[str, list[list]], every: int) -> Figure:
    """A panel for each way, and one for the busiest expert: shares {way: [seeds][records][L][E]}."""
    fig = Figure(figsize=(11, 3.2), layout="constrained")
    panels = fig.subplots(1, len(shares) + 1)
    for axes, (way, seeds) in zip(panels, shares.items(), strict=False):
        first = torch.tensor(seeds[0])[:, 0]  # [records, E]
        steps = [every * (i + 1) for i in range(len(first))]
        axes.stackplot(steps, first.T.tolist(), linewidth=0.3, edgecolor="white")
        axes.set(title=way, ylim=(0, 1), xlabel="step")
        busiest = torch.tensor(seeds).max(-1).values.mean((0, 2)) * first.shape[1]  # [records]
        panels[-1].plot(steps, busiest.tolist(), label=way)
    panels[0].set_ylabel("share of positions, by expert")
    panels[-1].axhline(1, color="gray", lw=0.8)
    panels[-1].set(title="busiest / even share", xlabel="step", ylim=(0, None))
    panels[-1].legend()
    return fig


def main(argv: list[str] | None = None) -> None:
    parser = ablation.parser(__doc__)
    options.add(parser, Sizes)
    args = parser.parse_args(argv)
    setup("cpu")
    scale, sizes, data = options.build(Scale, args), options.build(Sizes, args), load_data(args.corpus)
    args.corpus = data.name  # a default may find another text the next time
    # Sizes that cannot be and a text that is too short are refused now, not after the training.
    fields = {name: getattr(scale, name) for name in ("block_size", "n_embd", "n_head", "n_layer")}
    fields |= {"n_kv_head": 1, "n_expert": sizes.n_expert, "n_active": sizes.n_active}
    ModelConfig(len(data.tokenizer), **fields, capacity=sizes.capacity)
    windows(data.val, scale.block_size)
    next(batches(data.train, scale.block_size, scale.batch_size, 0))
    log = RunLog(__file__, "balancing", vars(args))

    def job(way, seed):
        def run(tick):
            torch.manual_seed(seed)
            model = GPT(ModelConfig(len(data.tokenizer), **fields))
            watch = Watch(model, scale.steps, sizes.records)

            def after(step, loss):
                watch()
                tick(step, loss)

            found = ablation.fit(model, data, scale, seed, after, balance=way, bias_rate=sizes.bias_rate)
            return found | measure(model, data, scale, sizes.capacity) | {"shares": watch.shares}

        return run

    jobs = {(way, seed): job(way, seed) for seed in range(scale.seeds) for way in WAYS}
    results = ablation.run_all(log, jobs, scale.steps, data)
    runs = {way: [results[way, seed] for seed in range(scale.seeds)] for way in WAYS}
    rows = ablation.compare({way: [run["val loss"] for run in mine] for way, mine in runs.items()}, "none")
    for row in rows:
        mine = runs[row["variant"]]
        row |= {name: mean(run[name] for run in mine)
                for name in ("busiest", "idle", "entropy", "dropped", "loss with drops")}
    ablation.show(f"{data.name}: {scale.steps} steps, seeds: {scale.seeds}, losses in nats per character", rows)
    every = max(1, scale.steps // sizes.records)
    ablation.done(log, draw({way: [run["shares"] for run in mine] for way, mine in runs.items()}, every),
                  "balancing", rows)


if __name__ == "__main__":
    run_program(main)
