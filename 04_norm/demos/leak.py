"""BatchNorm lets the examples of a batch see one another, and a model finds out.

    uv run stages run 04 demos/leak.py
    uv run stages run 04 demos/leak.py --batch-size 8 --steps 8000

1. One window, one untrained network, different neighbours: in training mode BatchNorm changes its answer.
2. A network trained on batches of neighbouring windows (a loader that forgot to shuffle): window i's target is the last
   character of the context of window i + 1, in the same batch. All that passes between windows is a mean and a variance
   per channel, yet the loss falls below what the context allows, except for the last window of a batch, whose target no
   neighbour shows. In shuffled batches, or with running statistics, the network is much worse than one that never could
   cheat.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from data import load_data, windows
from model import MLP, ModelConfig
from train import TrainConfig, make_optimizer, train

RUNS = (("batch", True), ("batch", False), ("layer", True))  # (norm, are the batches in text order)
COMPANIONS = (100, 5000)  # where the neighbours of the one window are taken
COMPANY = ("in text order", "shuffled", "running statistics")


def draw_rows(n: int, batch_size: int, in_order: bool, generator) -> torch.Tensor:
    """Which windows of `n` make a batch: `batch_size` neighbours, or any."""
    if in_order:
        return torch.randint(n - batch_size + 1, (1,), generator=generator) + torch.arange(batch_size)
    return torch.randint(n, (batch_size,), generator=generator)


def stream(x, y, batch_size: int, in_order: bool, seed: int):
    """Batches without end, like `batches`, which always shuffles."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = draw_rows(len(x), batch_size, in_order, generator)
        yield x[rows], y[rows]


@torch.no_grad()
def loss_by_place(model, x, y, batch_size: int, company: str, batches: int) -> torch.Tensor:
    """Mean loss of the first, second, ... window of a batch [batch_size], over the same kind of batches for all."""
    model = copy.deepcopy(model).train(company != "running statistics")
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(batch_size)
    for _ in range(batches):
        rows = draw_rows(len(x), batch_size, company != "shuffled", generator)
        total += F.cross_entropy(model(x[rows]), y[rows], reduction="none")
    return total / batches


@torch.no_grad()
def neighbours(x, y, vocab_size: int, seed: int) -> list[dict]:
    """One window's probability of its target in two companies, in training mode and in evaluation.

    The networks are untrained, one for each norm.
    """
    rows = []
    for norm in ("batch", "layer"):
        torch.manual_seed(seed)
        model = MLP(ModelConfig(vocab_size, x.shape[1], norm=norm))
        torch.nn.init.normal_(model.head.weight, std=0.06)  # scores of about 1
        row = {"norm": norm}
        for mode in ("", "evaluation, "):
            model.train(not mode)
            for name, start in zip(("first", "second"), COMPANIONS, strict=True):
                batch = torch.cat([x[:1], x[start:start + 3]])
                key = f"{mode}{name}" if mode else f"{name} company"
                row[key] = F.softmax(model(batch), dim=-1)[0, y[0]].item()
        rows.append(row)
    return rows


def draw(rows: list[dict]) -> Figure:
    fig = Figure(figsize=(7, 3.4), layout="constrained")
    ax = fig.subplots()
    for i, company in enumerate(COMPANY):
        places = [j + 0.27 * (i - 1) for j in range(len(rows))]
        bars = ax.bar(places, [row[company] for row in rows], 0.25, label=f"validation: {company}")
        ax.bar_label(bars, fmt="%.2f", fontsize=8)
    ax.set_xticks(range(len(rows)), [row["trained"].replace(", ", "\ntrained ") for row in rows])
    ax.set(ylabel="validation loss, nats/char", title="Loss by the batches of training and of validation")
    ax.margins(y=0.25)
    ax.legend(loc="upper right", fontsize=8, ncols=3)
    return fig


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows in a batch (default: 4)")
    parser.add_argument("--steps", type=int, default=4000, help="steps of each training (default: 4000)")
    parser.add_argument("--looks", type=int, default=2000, help="batches behind each loss (default: 2000)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default: 0.002)")
    parser.add_argument("--n-hidden", type=int, default=128, help="units of each layer (default: 128)")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    if args.batch_size < 2 or min(args.steps, args.looks) < 1 or not args.lr > 0:
        raise BadInput("--batch-size must be at least 2, --steps and --looks at least 1, --lr above 0")
    setup("cpu", args.seed)
    data = load_data(args.corpus)
    log = RunLog(__file__, "leak", {**vars(args), "corpus": data.name})
    T, V = 8, len(data.tokenizer)
    x, y = windows(data.train, T)
    val_x, val_y = windows(data.val, T)
    if len(val_x) < max(COMPANIONS) + 3:
        raise BadInput(f"{data.name} has {len(val_x)} validation windows, the demo needs {max(COMPANIONS) + 3}")

    untrained = neighbours(val_x, val_y, V, args.seed)
    table("One window's probability of its true next character, untrained", untrained)

    rows, places = [], []
    config = TrainConfig(steps=args.steps, batch_size=args.batch_size, lr=args.lr, weight_decay=0.01, seed=args.seed)
    with progress(len(RUNS) * args.steps, "training") as bar:
        for norm, in_order in RUNS:
            torch.manual_seed(args.seed)
            model = MLP(ModelConfig(V, T, n_hidden=args.n_hidden, n_layer=2, norm=norm))
            drawn = stream(x, y, args.batch_size, in_order, args.seed)
            for _, loss in train(model, drawn, config, make_optimizer(model, config)):
                bar.update(bar.step + 1, loss=loss)
            by_place = {c: loss_by_place(model, val_x, val_y, args.batch_size, c, args.looks) for c in COMPANY}
            name = f"{norm} norm, {'in order' if in_order else 'shuffled'}"
            rows.append({"trained": name} | {c: loss.mean().item() for c, loss in by_place.items()})
            in_company = by_place["in text order"].tolist()
            places.append({"trained": name} | {f"window {i}": loss for i, loss in enumerate(in_company, 1)})
    table(f"{data.name}: validation loss of the same network in three kinds of batch, nats per character", rows)
    table("In text order, by place in the batch: only the last window's target is in no neighbour", places)
    file = log.figure(draw(rows), "leak")
    log.finish(untrained=untrained, rows=rows, places=places)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
