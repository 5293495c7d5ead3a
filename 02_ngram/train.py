"""Count n-grams of every order, then learn the bigram by gradient descent and see the two meet.

    uv run python train.py
    uv run python train.py --corpus names --words      # one word a line, makemore style
"""

import argparse
import math
import time
from dataclasses import dataclass

import torch
from data import forget, load_data, windows
from model import KneserNey, ModelConfig, NeuralBigram, NGram
from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput, cli
from shared.runlog import RunLog


@dataclass
class TrainConfig:
    """The recipe. Raises BadInput for one that cannot run."""

    steps: int = 2000  # steps of gradient descent for the neural bigram
    batch_size: int = 4096  # examples per step
    lr: float = 10.0  # learning rate: the table has one score per pair of characters, so large steps are safe
    seed: int = 1337

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1 or self.lr <= 0:
            raise BadInput("steps and batch_size must be at least 1, lr above 0")


def nll(model, x, y):
    """Negative log-likelihood: the mean of -ln P(y | x) over the examples, in nats per token."""
    return -model.prob(x, y).log().mean()


@torch.no_grad()
def evaluate(model, x, y, rows: int = 2**16) -> float:
    """`nll` over any number of examples, `rows` at a time so that memory stays small."""
    total = sum(nll(model, a, b).item() * len(b) for a, b in zip(x.split(rows), y.split(rows), strict=True))
    return total / len(y)


def train(model, x, y, config: TrainConfig):
    """Stochastic gradient descent: step against the gradient of the loss on a random handful of examples.

    Yields (step, loss) after each step.
    """
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        rows = torch.randint(len(x), (config.batch_size,), generator=generator)
        loss = nll(model, x[rows], y[rows])
        for p in model.parameters():
            p.grad = None  # gradients add up over backward calls: forget the last step's
        loss.backward()
        lr = config.lr * (1 - step / config.steps)  # smaller and smaller steps average the noise of the batches out
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
        yield step + 1, loss.item()


def count(name: str, model, x, y, val_x, val_y) -> dict:
    """Fit a counting model and score it: one row of the results."""
    start = time.perf_counter()
    model.fit(x, y)
    seconds = time.perf_counter() - start
    return row(name, model, evaluate(model, x, y), evaluate(model, val_x, val_y), len(y), seconds)


def row(name: str, model, train_loss: float, val_loss: float, tokens: int, seconds: float) -> dict:
    """Perplexity is e to the loss: the number of equally likely characters that would be as hard to guess."""
    return {
        "name": name, "params": model.n_params(), "tokens": tokens, "seconds": round(seconds, 3),
        "train_loss": train_loss, "val_loss": val_loss, "perplexity": math.exp(val_loss),
    }


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--words", action="store_true", help="a word list: no context reaches past a line break")
    parser.add_argument("--max-order", type=int, default=8, help="longest n-gram to count (default: 8)")
    parser.add_argument("--name", default="default", help="the run's folder under out/")
    options.add(parser, TrainConfig)
    args = parser.parse_args(argv)
    if args.max_order < 2:
        raise BadInput(f"--max-order {args.max_order}: a bigram is the shortest n-gram with a context, use 2 or more")
    config = options.build(TrainConfig, args)
    setup("cpu", config.seed)

    data = load_data(args.corpus, args.words, config.seed)
    # One set of examples for every model, so that all are scored on the same characters.
    x, y = windows(data.train, args.max_order - 1)
    val_x, val_y = windows(data.val, args.max_order - 1)
    if args.words:
        x, val_x = forget(x, data.vocab.index["\n"]), forget(val_x, data.vocab.index["\n"])
    log = RunLog(__file__, args.name, {**vars(args), "corpus": data.name})

    rows = []
    for order in range(1, args.max_order + 1):
        shape = ModelConfig(vocab_size=len(data.vocab), block_size=order - 1)
        rows.append(count(f"{order}-gram, add-k", NGram(shape), x, y, val_x, val_y))
        rows.append(count(f"{order}-gram, Kneser-Ney", KneserNey(shape), x, y, val_x, val_y))

    bigram = NeuralBigram(ModelConfig(vocab_size=len(data.vocab), block_size=1))
    start = time.perf_counter()
    with progress(config.steps, "neural bigram") as bar:
        for step, loss in train(bigram, x, y, config):
            bar.update(step, loss=loss, tokens=step * config.batch_size)
            if step % 50 == 0 or step == 1:
                log.metrics(step=step, train_loss=loss)
    seconds = time.perf_counter() - start
    tokens = config.steps * config.batch_size
    rows.append(row("neural bigram", bigram, evaluate(bigram, x, y), evaluate(bigram, val_x, val_y), tokens, seconds))

    for r in rows:
        r["val_bpb"] = data.bits_per_byte(r["val_loss"])
    best = min(rows, key=lambda r: r["val_loss"])
    table(f"{data.name}: nats per character", rows)
    say(f"best: {best['name']}, {best['val_loss']:.4f} nats per character on the validation text")
    log.finish(
        corpus=data.name, seed=config.seed, steps=config.steps, rungs=rows,
        **{key: best[key] for key in ("params", "tokens", "seconds", "val_loss", "val_bpb")},
    )


if __name__ == "__main__":
    cli(main)
