"""Two figures: the bigram as a picture, counted and learned, and the loss against the length of the context.

    uv run stages run 02 demos/figures.py
    uv run stages run 02 demos/figures.py --corpus names --words --name names

Beside the second one a table: a longer context says more about the next character, if it was ever seen before.
"""

import argparse
import sys
from dataclasses import dataclass
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

from data import forget, load_data, windows
from model import KneserNey, ModelConfig, NeuralBigram, NGram, look_up
from train import TrainConfig, distance, evaluate, train

NANOGPT = 1.88  # nats per character on Tiny Shakespeare: the CPU recipe in nanoGPT's README (4 layers, 128 wide)


@dataclass
class Config:
    """What to draw. Raises BadInput for what cannot be drawn."""

    corpus: str | None = None  # shakespeare, names, python-docs or a text file; none: shakespeare
    words: bool = False  # a word list: no context reaches past a line break
    max_order: int = 8  # longest n-gram
    steps: int = 2000  # steps of gradient descent for the learned bigram
    shown: int = 30  # most frequent characters in the picture of the bigram
    name: str = "figures"  # the run's folder under out/
    seed: int = 1337

    def __post_init__(self):
        for field, least in (("max_order", 2), ("steps", 1), ("shown", 1)):
            if getattr(self, field) < least:
                raise BadInput(f"{field} is {getattr(self, field)}: it must be at least {least}")


def seen(model: NGram, x) -> float:
    """The share of the contexts x [N, T] that the model met in training."""
    contexts = model.grams(x, x.new_zeros(len(x))) // model.config.vocab_size
    return (look_up(model.contexts, model.totals, contexts) > 0).double().mean().item()


def draw_bigrams(models: dict[str, NGram | NeuralBigram], tokenizer, shown) -> Figure:
    """P(next | this) of each model side by side, for the characters `shown` [K]: one row for each context."""
    figure = Figure(figsize=(5.5 * len(models), 5.8), layout="constrained")
    names = [{"\n": "\\n", " ": "_"}.get(char, char) for char in tokenizer.decode(shown)]
    for ax, (name, model) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        image = ax.imshow(model.probs(shown[:, None])[:, shown].detach().numpy(), cmap="magma_r", vmin=0, vmax=0.6)
        ax.set(title=name, xlabel="next character", ylabel="this character")
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=figure.axes, label="probability", shrink=0.8, extend="max")
    return figure


def draw_orders(rows: list[dict], corpus: str) -> Figure:
    """The losses of `rows` against the order, with nanoGPT's as a line where the text is the same."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    orders = [row["order"] for row in rows]
    for name, color in (("add-k", "tab:orange"), ("Kneser-Ney", "tab:blue")):
        ax.plot(orders, [row[name] for row in rows], "o-", color=color, label=f"{name}, validation")
        ax.plot(orders, [row[f"{name}, train"] for row in rows], ":", color=color, label=f"{name}, training")
    if corpus == "shakespeare":
        ax.axhline(NANOGPT, color="tab:gray", linewidth=1)
        ax.text(len(rows), NANOGPT - 0.05, f"nanoGPT's CPU recipe, {NANOGPT}", color="tab:gray", ha="right", va="top")
    ax.set(xlabel="order n: one more than the characters of context", ylabel="nats per character", ylim=(0, None))
    ax.set_xticks(orders)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add(parser, Config)
    config = options.build(Config, parser.parse_args(argv))
    setup("cpu", config.seed)
    data = load_data(config.corpus, config.words, config.seed)
    shapes = [ModelConfig(vocab_size=len(data.tokenizer), block_size=n) for n in range(config.max_order)]
    x, y = windows(data.train, config.max_order - 1)
    val_x, val_y = windows(data.val, config.max_order - 1)
    if config.words:
        x, val_x = forget(x, data.tokenizer.index["\n"]), forget(val_x, data.tokenizer.index["\n"])
    log = RunLog(__file__, config.name, {**vars(config), "corpus": data.name})

    rows = []
    with progress(len(shapes), "counting") as bar:
        for n, shape in enumerate(shapes, 1):
            row = {"order": n}
            for name, model in (("add-k", NGram(shape)), ("Kneser-Ney", KneserNey(shape))):
                model.fit(x, y)
                row[name] = evaluate(model, val_x, val_y)
                row[f"{name}, train"] = evaluate(model, x[:len(val_x)], y[:len(val_x)])  # as many as validate
                if name == "add-k":
                    row |= {"contexts": len(model.contexts), "seen": seen(model, val_x)}
            rows.append(row)
            bar.update(n)
    columns = ("order", "contexts", "seen", "add-k", "Kneser-Ney")
    table(f"{data.name}: contexts counted, share of the validation text's among them, and validation loss",
          [{column: row[column] for column in columns} for row in rows])
    log.figure(draw_orders(rows, data.name), "orders")

    bigram = NeuralBigram(shapes[1])
    with progress(config.steps, "learning the bigram") as bar:
        for step, value in train(bigram, x, y, TrainConfig(steps=config.steps, seed=config.seed)):
            bar.update(step, loss=value)
    counted = NGram(shapes[1]).fit(x, y)
    gap = distance(counted, bigram, val_x)
    often = torch.bincount(data.train, minlength=len(data.tokenizer)).argsort(descending=True, stable=True)
    shown = often[:config.shown].sort().values
    figure = draw_bigrams({"counted": counted, "learned by gradient descent": bigram}, data.tokenizer, shown)
    log.figure(figure, "bigram")
    log.finish(orders=rows, distance=gap)
    say(f"counted against learned bigram: total variation {gap:.3f}; figures in {log.folder}")


if __name__ == "__main__":
    run_program(main)
