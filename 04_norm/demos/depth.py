"""How far down a stack the gradient gets, with and without norm and residual, and what a short training makes of it.

    uv run stages run 04 demos/depth.py
    uv run stages run 04 demos/depth.py --depths 1 4 16 64 256 --steps 0      # the start only, but deeper

At the start the demo measures the gradient of the first layer's weights below 1, 2, 4 ... blocks. The column "per
block" is the factor by which one more block multiplies it, taken from the two deepest stacks whose gradient has not
vanished; "derived" is what theory says:

- torch's own start has gain 1 / sqrt(3): two layers and a ReLU leave sqrt(1/3 * 1/2 * 1/3) = 0.236 of a signal;
- with variance scaling a plain stack neither shrinks nor grows it: 1;
- a sum of input and branch has twice the variance: without norm, residuals multiply by sqrt(2) = 1.414;
- batch norm alone multiplies by sqrt(pi / (pi - 1)) = 1.211 at every ReLU (Yang et al., "A Mean Field Theory of Batch
  Normalization", 2019);
- layer norm alone: the signal has size 1 already, so the norm changes it little: 1, as without norm;
- a norm inside a residual branch: block l adds 1 to a variance of l, so its share fades, and the factor goes to 1.
"""

import argparse
import math
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
from matplotlib.figure import Figure

from data import batches, load_data
from model import MLP, ModelConfig
from train import TrainConfig, make_optimizer, nll, train

# name: (config, blocks start as torch starts them, derived factor per block)
STACKS = {
    "no norm, torch's start": ({"norm": "none", "residual": False}, True, math.sqrt(1 / 18)),
    "no norm, variance scaling": ({"norm": "none", "residual": False}, False, 1.0),
    "residual alone": ({"norm": "none", "residual": True}, False, math.sqrt(2)),
    "BatchNorm alone": ({"norm": "batch", "residual": False}, False, math.sqrt(math.pi / (math.pi - 1))),
    "BatchNorm + residual": ({"norm": "batch", "residual": True}, False, 1.0),
    "LayerNorm alone": ({"norm": "layer", "residual": False}, False, 1.0),
    "LayerNorm + residual": ({"norm": "layer", "residual": True}, False, 1.0),
}
SMALL = 1e-15  # a gradient below passed through numbers too small for float32
TRAINED = (4, 32)  # blocks of the stacks that are trained


def build(name: str, vocab_size: int, n_hidden: int, n_layer: int) -> MLP:
    """The stack called `name`."""
    changes, torchs_start, _ = STACKS[name]
    model = MLP(ModelConfig(vocab_size, n_hidden=n_hidden, n_layer=n_layer, **changes))
    if torchs_start:
        for block in model.blocks:
            block.ffn.fc.reset_parameters()
            block.ffn.proj.reset_parameters()
    return model


def first_gradient(model, x, y) -> float:
    """Size of the gradient of the first layer's weights."""
    (grad,) = torch.autograd.grad(nll(model, x, y), model.hidden.weight)
    return grad.norm().item()


def short_training(model, data, steps: int, bar, text: str) -> float:
    """The mean loss of the last 20 steps of a training; infinite when it diverges."""
    config, seen = TrainConfig(steps=steps, batch_size=128, lr=1e-3), []
    stream = batches(data, model.config.block_size, config.batch_size, config.seed)
    try:
        for _, loss in train(model, stream, config, make_optimizer(model, config)):
            seen.append(loss)
            bar.update(bar.step + 1, loss=loss, text=text)
    except BadInput:  # the loss is infinite or nan
        return math.inf
    last = seen[-20:]
    return sum(last) / len(last)


def draw(depths, gradients, losses) -> Figure:
    """The gradients that change with the depth, beside them those that stay, and where there are losses those below."""
    fig = Figure(figsize=(8, 6.8 if losses else 3.8), layout="constrained")
    axes = fig.subplot_mosaic("ab;cc" if losses else "ab", height_ratios=(5, 4) if losses else None)
    for i, (name, (_, _, derived)) in enumerate(STACKS.items()):
        panel = axes["b" if derived == 1 else "a"]
        panel.plot(depths, gradients[name], color=f"C{i}", marker="o", markersize=4, label=name)
        if losses:
            for loss, face in zip(losses[name], ("white", f"C{i}"), strict=True):
                axes["c"].scatter(min(loss, 5), name, s=40, facecolor=face, edgecolor=f"C{i}", zorder=2)
    for panel in (axes["a"], axes["b"]):
        panel.set(xscale="log", xlabel="blocks")
        panel.set_xticks(depths, depths)
        panel.minorticks_off()
    axes["a"].set(yscale="log", ylim=(1e-8, 1e10), ylabel="size of the first layer's gradient")
    axes["a"].set_title("shrinks or grows (logarithmic)", fontsize=11)
    axes["b"].set(ylim=(0, 0.5))
    axes["b"].set_title("hardly changes (linear, from 0 to 0.5)", fontsize=11)
    for panel in (axes["a"], axes["b"]):
        panel.legend(fontsize=9, loc="upper left")
    if losses:
        few, many = TRAINED
        axes["c"].set(xlabel=f"training loss, nats/char: hollow {few} blocks, filled {many}; 5: 5 or more")
        axes["c"].invert_yaxis()
        axes["c"].grid(axis="y", alpha=0.3)
    return fig


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="blocks, rising")
    parser.add_argument("--n-hidden", type=int, default=128, help="units of each layer (default: 128)")
    parser.add_argument("--seeds", type=int, default=3, help="starts that are averaged (default: 3)")
    parser.add_argument("--steps", type=int, default=150, help="steps of the short training, 0 for none (default: 150)")
    args = parser.parse_args(argv)
    depths = args.depths
    if len(depths) < 2 or depths[0] < 1 or sorted(set(depths)) != depths or args.seeds < 1 or args.steps < 0:
        raise BadInput("--depths needs two or more rising numbers from 1, --seeds at least 1, --steps at least 0")
    setup("cpu")
    data = load_data(args.corpus)
    V = len(data.tokenizer)
    log = RunLog(__file__, "depth", {**vars(args), "corpus": data.name})

    gradients = {name: [0.0] * len(depths) for name in STACKS}
    losses = {name: [] for name in STACKS} if args.steps else {}
    total = len(STACKS) * (len(depths) * args.seeds + len(TRAINED) * args.steps)
    with progress(total, "depth") as bar:
        for name in STACKS:
            for i, depth in enumerate(depths):
                for seed in range(args.seeds):
                    torch.manual_seed(seed)
                    model = build(name, V, args.n_hidden, depth)
                    x, y = next(batches(data.train, model.config.block_size, 128, seed))
                    gradients[name][i] += first_gradient(model, x, y) / args.seeds
                    bar.update(bar.step + 1, text=f"{name}, {depth} blocks")
            for depth in TRAINED if args.steps else ():
                torch.manual_seed(0)
                model = build(name, V, args.n_hidden, depth)
                losses[name].append(short_training(model, data.train, args.steps, bar, f"{name}, {depth} blocks"))

    rows = []
    for name, (_, _, derived) in STACKS.items():
        kept = [(d, g) for d, g in zip(depths, gradients[name], strict=True) if SMALL < g < math.inf]
        factor = None
        if len(kept) > 1:
            (few, before), (many, after) = kept[-2:]
            factor = (after / before) ** (1 / (many - few))
        row = {"stack": name} | {str(d): f"{g:.1e}" for d, g in zip(depths, gradients[name], strict=True)}
        row |= {"per block": factor, "derived": derived}
        if losses:
            row |= {f"loss, {d} blocks": loss for d, loss in zip(TRAINED, losses[name], strict=True)}
        rows.append(row)
    table("Size of the first layer's gradient at the start, by number of blocks", rows)
    file = log.figure(draw(depths, gradients, losses), "depth")
    log.finish(rows=rows)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
