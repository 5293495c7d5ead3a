"""Count n-grams of every order, then learn the bigram by gradient descent and see the two meet.

    uv run python train.py
    uv run python train.py --corpus names --words      # one word a line, makemore style
"""

import argparse
import math
import time
from dataclasses import dataclass

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch

from data import forget, load_data, windows
from model import KneserNey, ModelConfig, NeuralBigram, NGram


@dataclass
class TrainConfig:
    """The recipe. Raises BadInput for one that cannot run."""

    steps: int = 2000  # steps of gradient descent for the neural bigram
    batch_size: int = 2048  # examples per step
    lr: float = 200.0  # highest rate: a row gets only its character's share of the mean gradient, and most are rare
    seed: int = 1337

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 < self.lr < math.inf:  # so that nan is refused as well
            raise BadInput(f"lr is {self.lr}: it must be above 0, and finite")


def nll(model, x, y):
    """Negative log-likelihood: the mean of -ln P(y | x) over the examples, in nats per token."""
    return -model.prob(x, y).log().mean()


@torch.no_grad()
def evaluate(model, x, y, rows: int = 2**16) -> float:
    """`nll` over any number of examples, `rows` at a time so that memory stays small."""
    total = sum(nll(model, a, b).item() * len(b) for a, b in zip(x.split(rows), y.split(rows), strict=True))
    return total / len(y)


def schedule(step: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ... as a share of the highest one: from 1 in a straight line to 0 after the last.

    Smaller and smaller steps average the noise of the batches out.
    """
    return 1 - step / config.steps


def train(model, x, y, config: TrainConfig):
    """Stochastic gradient descent: step against the gradient of the loss on a random handful of examples.

    A generator of its own draws them, begun with config.seed, so that the seed decides what is drawn and nothing else.
    Yields (step, loss) after each step. Raises BadInput at the first loss that is infinite or nan, before it reaches
    the weights.
    """
    generator = torch.Generator().manual_seed(config.seed)
    for step in range(config.steps):
        rows = torch.randint(len(x), (config.batch_size,), generator=generator)
        loss = nll(model, x[rows], y[rows])
        if not loss.isfinite():
            raise BadInput(f"the loss is {loss.item()} at step {step + 1}: lower --lr, which is {config.lr:g}")
        for p in model.parameters():
            p.grad = None  # gradients add up over backward calls: forget the last step's
        loss.backward()
        lr = config.lr * schedule(step, config)
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
        yield step + 1, loss.item()


def perplexity(loss: float) -> float:
    """e to the loss in nats: the number of equally likely tokens that would be as hard to guess."""
    return math.exp(loss)


def result(name: str, model, x, y, tokens: int, seconds: float) -> dict:
    """What a model reached on the examples x, y and what it took: name, params, tokens, seconds, val_loss."""
    return {
        "name": name, "params": model.n_params(), "tokens": tokens, "seconds": round(seconds, 3),
        "val_loss": evaluate(model, x, y),
    }


def count(name: str, model, x, y, val_x, val_y) -> dict:
    """Fit a counting model to the examples x, y, its tokens, and score it on others. Timed is the fit alone."""
    start = time.perf_counter()
    model.fit(x, y)
    return result(name, model, val_x, val_y, len(y), time.perf_counter() - start)


def count_orders(shapes, x, y, val_x, val_y) -> list[dict]:
    """Both counting models of every shape: the results of add-k and Kneser-Ney in turn.

    Their names: "unigram, add-k", "unigram, Kneser-Ney", "bigram, ...", "trigram, ...", "4-gram, ..." and so on.
    """
    results = []
    for shape in shapes:
        order = shape.block_size + 1
        name = {1: "unigram", 2: "bigram", 3: "trigram"}.get(order, f"{order}-gram")
        results.append(count(f"{name}, add-k", NGram(shape), x, y, val_x, val_y))
        results.append(count(f"{name}, Kneser-Ney", KneserNey(shape), x, y, val_x, val_y))
    return results


def learn(model, x, y, val_x, val_y, config: TrainConfig, log: RunLog) -> dict:
    """Train the neural bigram under a progress line and score it.

    The log gets `train_loss` at every tenth step. Named "neural bigram"; its tokens are all that it was shown.
    """
    start = time.perf_counter()
    with progress(config.steps, "neural bigram") as bar:
        for step, loss in train(model, x, y, config):
            bar.update(step, loss=loss, tokens=step * config.batch_size)
            if step % 10 == 0:
                log.metrics(step, train_loss=loss)
    seconds = time.perf_counter() - start
    return result("neural bigram", model, val_x, val_y, config.steps * config.batch_size, seconds)


def distance(a, b, x) -> float:
    """How far two bigrams are apart: the total variation between their answers, averaged over the contexts x [N, T].

    0 when they always agree, 1 when what one expects the other rules out. A context that is frequent weighs more.
    """
    x, times = x[:, -1:].unique(dim=0, return_counts=True)
    variation = (a.probs(x) - b.probs(x)).abs().sum(1) / 2
    return ((variation * times).sum() / times.sum()).item()


def summary(counted: list[dict], learned: dict) -> list[dict]:
    """One row for each order: both smoothings, the neural bigram beside the counted, Kneser-Ney in other units.

    The columns: order, add-k, neural (None but for the bigram), Kneser-Ney, perplexity, bits/char, seconds.
    """
    rows = []
    for order, (add_k, kneser_ney) in enumerate(zip(counted[::2], counted[1::2], strict=True), 1):
        loss = kneser_ney["val_loss"]
        rows.append({
            "order": order, "add-k": add_k["val_loss"], "neural": learned["val_loss"] if order == 2 else None,
            "Kneser-Ney": loss, "perplexity": perplexity(loss), "bits/char": loss / math.log(2),
            "seconds": round(kneser_ney["seconds"], 3),
        })
    return rows


def arguments(argv):
    """The command line as flags."""
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--words", action="store_true", help="a word list: no context reaches past a line break")
    parser.add_argument("--max-order", type=int, default=8, help="longest n-gram to count (default: 8)")
    parser.add_argument("--name", default="default", help="the run's folder under out/ (default: default)")
    options.add(parser, ModelConfig, skip=("block_size",))
    options.add(parser, TrainConfig)
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    if args.max_order < 2:
        raise BadInput(f"--max-order {args.max_order}: a bigram is the shortest n-gram with a context, use 2 or more")
    config = options.build(TrainConfig, args)
    setup("cpu", config.seed)

    data = load_data(args.corpus, args.words, config.seed)
    shapes = [
        options.build(ModelConfig, args, vocab_size=len(data.tokenizer), block_size=order - 1)
        for order in range(1, args.max_order + 1)
    ]
    # One set of examples for every model, so that all are scored on the same characters.
    x, y = windows(data.train, args.max_order - 1)
    val_x, val_y = windows(data.val, args.max_order - 1)
    if args.words:
        x, val_x = forget(x, data.tokenizer.index["\n"]), forget(val_x, data.tokenizer.index["\n"])
    with RunLog(__file__, args.name, {**vars(args), "corpus": data.name}) as log:
        counted = count_orders(shapes, x, y, val_x, val_y)
        bigram = NeuralBigram(shapes[1])
        learned = learn(bigram, x, y, val_x, val_y, config, log)
        table(f"{data.name}: validation nats/char; on the right, Kneser-Ney in detail", summary(counted, learned))
        gap = distance(NGram(shapes[1]).fit(x, y), bigram, val_x)
        say(f"counted against neural bigram: total variation {gap:.3f} (0: alike, 1: disjoint)")
        results = [*counted, learned]
        best = min(results, key=lambda r: r["val_loss"])
        say(f"best: {best['name']}, {best['val_loss']:.4f} nats per character on the validation text")
        for r in results:
            r["val_bpb"] = data.bits_per_byte(r["val_loss"])
        ladder = [f"{order}, Kneser-Ney" for order in ("bigram", "trigram", "5-gram", "7-gram")]
        log.finish(
            corpus=data.name, seed=config.seed, steps=config.steps,
            **{key: best[key] for key in ("params", "tokens", "seconds", "val_loss", "val_bpb")},
            rungs=[r for r in results if r["name"] in (*ladder, "neural bigram")], distance=gap,
        )


if __name__ == "__main__":
    run_program(main)
