"""What flows through a deep network: activations up, gradients down, and how far each layer's weights move.

    uv run stages run 04 demos/signals.py
    uv run stages run 04 demos/signals.py --n-layer 24 --steps 400

Four networks of the same size, each with one remedy more than the one before it. Measured at the start and in the
middle of the training, layer by layer:

- activations: root mean square of what each layer hands up;
- gradient / weight: the length of the gradient of a layer's weights over the length of the weights, which is what plain
  gradient descent at a learning rate of 1 would move them by;
- update / weight: what AdamW does move them by. It divides each gradient by its own usual size, so that layers move
  alike however small their gradients are, as long as they are not noise.
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
from matplotlib.figure import Figure

from data import batches, load_data
from model import MLP, ModelConfig
from train import TrainConfig, evaluate, make_optimizer, nll, train

# name: (config, blocks start as torch starts them)
NETWORKS = {
    "torch's start": ({"norm": "none", "residual": False}, True),
    "variance scaling": ({"norm": "none", "residual": False}, False),
    "+ layer norm": ({"norm": "layer", "residual": False}, False),
    "+ residual": ({"norm": "layer", "residual": True}, False),
}
SIGNALS = ("activations", "gradient / weight", "update / weight")


def build(name: str, vocab_size: int, n_hidden: int, n_layer: int) -> MLP:
    """The network called `name`."""
    changes, torchs_start = NETWORKS[name]
    model = MLP(ModelConfig(vocab_size, n_hidden=n_hidden, n_layer=n_layer, **changes))
    if torchs_start:
        for block in model.blocks:
            block.ffn.fc.reset_parameters()
            block.ffn.proj.reset_parameters()
    return model


def layers(model) -> list:
    """Where signals are taken: the first layer, then every block. -> [(module, its weights)]"""
    return [(model.hidden, model.hidden.weight), *((block, block.ffn.fc.weight) for block in model.blocks)]


def flow(model, x, y) -> tuple[list[float], list[float]]:
    """Activations and gradient / weight of every layer, for one batch."""
    sizes = []
    hooks = [
        module.register_forward_hook(lambda _, args, out: sizes.append(out.square().mean().sqrt().item()))
        for module, _ in layers(model)
    ]
    loss = nll(model, x, y)
    for hook in hooks:
        hook.remove()
    weights = [weight for _, weight in layers(model)]
    grads = torch.autograd.grad(loss, weights)
    return sizes, [(g.norm() / w.norm()).item() for g, w in zip(grads, weights, strict=True)]


@torch.no_grad()
def moved(before, after) -> list[float]:
    """Update / weight of every layer between two states of a network."""
    pairs = zip(layers(before), layers(after), strict=True)
    return [((new - old).norm() / old.norm()).item() for (_, old), (_, new) in pairs]


def watch(model, data, probe, config: TrainConfig, bar) -> dict[str, list[list[float]]]:
    """Train and measure: for each signal its values by layer at the first step and at the middle one."""
    seen = {name: [] for name in SIGNALS}
    before = copy.deepcopy(model)
    stream = batches(data, model.config.block_size, config.batch_size, config.seed)
    for step, loss in train(model, stream, config, make_optimizer(model, config)):
        if step in (1, config.steps // 2):
            signals = (*flow(before, *probe), moved(before, model))
            for name, values in zip(SIGNALS, signals, strict=True):
                seen[name].append(values)
        if step == config.steps // 2 - 1:
            before = copy.deepcopy(model)
        bar.update(bar.step + 1, loss=loss)
    return seen


def moments(steps: int) -> tuple[str, str]:
    """When signals are taken, in words."""
    return "at the start", f"after {steps // 2} steps"


def ends(name: str, signals: dict, when: int) -> dict:
    """A row of the table: each signal in the first block and in the last."""
    row = {"network": name}
    for signal, values in signals.items():
        values = values[when]  # [0] is the first layer, then the blocks
        row[signal] = f"{values[1]:.1e} .. {values[-1]:.1e}"
    return row


def draw(seen: dict, n_layer: int, steps: int) -> Figure:
    """A row of panels for each signal; at the start on the left, in the middle of the training on the right."""
    fig = Figure(figsize=(8, 6.6), layout="constrained")
    axes = fig.subplots(len(SIGNALS), 2, sharex=True, sharey="row")
    for row, signal in zip(axes, SIGNALS, strict=True):
        row[0].set_ylabel(signal)
        for when, ax in enumerate(row):
            for name, signals in seen.items():
                ax.plot(range(n_layer + 1), signals[signal][when], linewidth=2, label=name)
            ax.set_yscale("log")
            ax.minorticks_off()
            ax.xaxis.get_major_locator().set_params(integer=True)
    for when, ax in zip(moments(steps), axes[0], strict=True):
        ax.set_title(when)
    for ax in axes[-1]:
        ax.set_xlabel("block (0: the first layer)")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(seen))
    return fig


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--n-layer", type=int, default=12, help="blocks (default: 12)")
    parser.add_argument("--n-hidden", type=int, default=128, help="units of each layer (default: 128)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each training (default: 300)")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    if args.steps < 4:
        raise BadInput(f"--steps {args.steps}: the demo looks at the first step and at the middle one, use 4 or more")
    setup("cpu", args.seed)
    data = load_data(args.corpus)
    log = RunLog(__file__, "signals", {**vars(args), "corpus": data.name})

    seen, losses = {}, {}
    config = TrainConfig(steps=args.steps, batch_size=256, lr=1e-3, seed=args.seed)
    with progress(len(NETWORKS) * args.steps, "training") as bar:
        for name in NETWORKS:
            torch.manual_seed(args.seed)
            model = build(name, len(data.tokenizer), args.n_hidden, args.n_layer)
            probe = next(batches(data.train, model.config.block_size, 512, args.seed + 1))
            seen[name] = watch(model, data.train, probe, config, bar)
            losses[name] = evaluate(model, data.val)
    for when, title in enumerate(moments(args.steps)):
        table(f"First and last block, {title}", [ends(name, signals, when) for name, signals in seen.items()])
    table(f"After {args.steps} steps", [{"network": name, "validation loss": loss} for name, loss in losses.items()])
    file = log.figure(draw(seen, args.n_layer, args.steps), "signals")
    log.finish(steps=args.steps, losses=losses, signals=seen)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
