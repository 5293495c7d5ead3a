"""Which learning rate? A range test: raise the rate at every step and watch where the loss falls and where it explodes.

    uv run stages run 03 demos/lr_range.py
    uv run stages run 03 demos/lr_range.py --steps 200 --batch-size 256

One short run tries every rate from far too small to far too large (Smith, "Cyclical Learning Rates for Training Neural
Networks", 2015). What it says is then put to the test: one training for each of a few fixed rates, with as many steps.
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
from train import TrainConfig, evaluate, make_optimizer, nll, train

LOW, HIGH = 1e-5, 1.0  # rates of the first and the last step
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # what is tried out in full
MEMORY = 0.95  # of the running average: single batches are too noisy to read


def range_test(model, data, config: TrainConfig):
    """AdamW with a rate that grows by the same factor at every step. Yields (rate, loss averaged over recent steps).

    Ends early once the average is three times the lowest that was seen: what follows is only worse.
    """
    optimizer = make_optimizer(model, config)
    stream = batches(data, model.config.block_size, config.batch_size, config.seed)
    average, lowest = 0.0, math.inf
    for step in range(config.steps):
        rate = LOW * (HIGH / LOW) ** (step / max(1, config.steps - 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = nll(model, *next(stream))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average = MEMORY * average + (1 - MEMORY) * loss.item()
        smooth = average / (1 - MEMORY ** (step + 1))  # the average began at 0: take that out again
        lowest = min(lowest, smooth)
        yield rate, smooth
        if not smooth < 3 * lowest:
            return


def readings(curve: list[tuple[float, float]]) -> dict[str, float]:
    """Rates to read off a range test's curve: where the loss is lowest, and where it falls fastest on the way there.

    The fall is taken over a twentieth of the curve, or the noise of two neighbouring steps would decide.
    """
    lowest = min(range(len(curve)), key=lambda i: curve[i][1])
    width = max(1, len(curve) // 20)
    falls = [(curve[i + width][1] - curve[i][1], i) for i in range(max(1, lowest + 1 - width))]
    start = min(falls)[1]
    return {"steepest": math.sqrt(curve[start][0] * curve[start + width][0]), "lowest": curve[lowest][0]}


def draw(curve: list[tuple[float, float]], tried: list[dict], marks: dict[str, float]) -> Figure:
    """The range test, and below it what the fixed rates came to."""
    fig = Figure(figsize=(6.4, 5), layout="constrained")
    above, below = fig.subplots(2, sharex=True)
    above.plot(*zip(*curve, strict=True))
    for name, rate in marks.items():
        above.axvline(rate, color="gray", linestyle=":")
        above.annotate(f"{name}: {rate:.2g}", (rate, 0.97), xycoords=("data", "axes fraction"), rotation=90, va="top",
                       ha="right", fontsize=8)
    above.set(xscale="log", ylabel="loss, recent steps", title="range test: the rate grows at every step")
    above.set_ylim(top=curve[0][1] * 1.4)
    below.plot([row["lr"] for row in tried], [row["validation loss"] for row in tried], "o-", color="tab:orange")
    below.set(xlabel="learning rate", ylabel="validation loss, nats/char", title="one training for each rate")
    return fig


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--steps", type=int, default=400, help="steps of the range test, and of each training")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    if args.steps < 10:
        raise BadInput(f"--steps {args.steps}: a range test needs at least 10 to show a curve")
    setup("cpu", args.seed)
    data = load_data(args.corpus)
    shape = ModelConfig(vocab_size=len(data.tokenizer))
    log = RunLog(__file__, "lr_range", {**vars(args), "corpus": data.name})

    def recipe(lr: float) -> TrainConfig:
        return TrainConfig(steps=args.steps, batch_size=args.batch_size, lr=lr, seed=args.seed)

    curve, tried = [], []
    with progress((1 + len(RATES)) * args.steps, "range test") as bar:
        for rate, loss in range_test(MLP(shape), data.train, recipe(LOW)):
            curve.append((rate, loss))
            log.metrics(step=len(curve), lr=rate, loss=loss)
            bar.update(len(curve), lr=rate, loss=loss)
        for i, rate in enumerate(RATES, 1):
            torch.manual_seed(args.seed)  # the same start for every rate
            model, config = MLP(shape), recipe(rate)
            stream = batches(data.train, shape.block_size, config.batch_size, config.seed)
            for step, loss in train(model, stream, config, make_optimizer(model, config)):
                bar.update(i * args.steps + step, lr=rate, loss=loss)
            there = min(curve, key=lambda point: abs(math.log(point[0] / rate)))
            tried.append({
                "lr": rate, "range test there": there[1], "validation loss": evaluate(model, data.val),
            })
    table(f"{data.name}: {args.steps} steps with each rate", tried)
    marks, best = readings(curve), min(tried, key=lambda row: row["validation loss"])
    say(f"range test: the loss falls fastest at {marks['steepest']:.1e} and is lowest at {marks['lowest']:.1e}")
    say(f"trainings: best with {best['lr']:.0e}, {best['validation loss']:.3f} nats per character")
    file = log.figure(draw(curve, tried, marks), "lr_range")
    log.finish(steps=args.steps, best_lr=best["lr"], **marks, tried=tried)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
