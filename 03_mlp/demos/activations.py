"""What the non-linearity is for: tanh, ReLU, GELU and none at all, trained alike.

    uv run stages run 03 demos/activations.py
    uv run stages run 03 demos/activations.py --steps 3000

Without one, two layers are one: W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2). The demo multiplies the trained
matrices and shows that the product alone gives the same scores. Such a model adds up one vote for each place in the
window; it cannot say that an "h" means something else after a "t" than after a "c".
"""

import argparse
import statistics
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

from data import batches, load_data, windows
from model import ACTIVATIONS, MLP, ModelConfig
from train import TrainConfig, evaluate, make_optimizer, train

BLOCK_SIZES = (1, 8)  # one character leaves nothing to combine: there even a linear model has all it needs
LOOKS = 10  # points of a curve


@torch.no_grad()
def collapse_error(model, idx) -> float:
    """How far one matrix W2 W1 and one bias W2 b1 + b2 are from the model's own scores: the largest difference."""
    x = model.tok_emb(idx).flatten(1).double()  # [B, T * C]
    W1, b1, W2, b2 = (p.double() for p in (*model.hidden.parameters(), *model.head.parameters()))
    return ((x @ (W2 @ W1).T + W2 @ b1 + b2) - model(idx)).abs().max().item()


def draw(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """The functions, and what training with each of them comes to."""
    fig = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = fig.subplots(1, 2)
    z = torch.linspace(-3, 3, 121)
    for name, curve in curves.items():
        left.plot(z, ACTIVATIONS[name]()(z), "--" if name == "none" else "-", label=name)
        right.plot(*zip(*curve, strict=True), "o-", markersize=3, label=name)
    left.set(xlabel="sum of the inputs", ylabel="hidden unit", title="non-linearities")
    right.set(xlabel="step", ylabel="validation loss, nats/char", title=f"{BLOCK_SIZES[-1]} characters of context")
    left.legend()
    right.legend()
    return fig


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--steps", type=int, default=800, help="steps of each training (default: 800)")
    parser.add_argument("--n-hidden", type=int, default=256, help="units of the hidden layer (default: 256)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind (default: 2)")
    args = parser.parse_args(argv)
    if args.steps < LOOKS or args.seeds < 1:
        raise BadInput(f"--steps must be at least {LOOKS}, and --seeds at least 1")
    setup("cpu")
    data = load_data(args.corpus)
    log = RunLog(__file__, "activations", {**vars(args), "corpus": data.name})

    V, rows, curves, done = len(data.tokenizer), [], {}, 0
    with progress(len(BLOCK_SIZES) * len(ACTIVATIONS) * args.seeds * args.steps, "training") as bar:
        for block_size in BLOCK_SIZES:
            idx = windows(data.val, block_size)[0][:1000]
            for name in ACTIVATIONS:
                losses, curve = [], []
                for seed in range(args.seeds):
                    torch.manual_seed(seed)
                    model = MLP(ModelConfig(V, block_size, n_hidden=args.n_hidden, activation=name))
                    config = TrainConfig(steps=args.steps, batch_size=256, seed=seed)
                    stream = batches(data.train, block_size, config.batch_size, seed)
                    for step, loss in train(model, stream, config, make_optimizer(model, config)):
                        done += 1
                        bar.update(done, loss=loss, text=f"{name}, {block_size} of context")
                        if seed == 0 and block_size == BLOCK_SIZES[-1] and step % (args.steps // LOOKS) == 0:
                            curve.append((step, evaluate(model, data.val)))
                    losses.append(evaluate(model, data.val))
                    log.metrics(step=done, activation=name, block_size=block_size, seed=seed, val_loss=losses[-1])
                curves[name] = curve  # of the last block size
                rows.append({
                    "context": block_size, "activation": name, "loss": statistics.mean(losses),
                    "seeds apart": max(losses) - min(losses),
                    "one matrix is off by": f"{collapse_error(model, idx):.1e}",
                })
    table(f"{data.name}: {args.steps} steps, nats per character on the validation text", rows)
    say("none: both layers are one matrix, up to rounding. With a context of one character it loses nothing by that.")
    file = log.figure(draw(curves), "activations")
    log.finish(steps=args.steps, rows=rows)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
