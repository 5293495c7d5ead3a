"""What each idea in Kneser-Ney smoothing is worth, by leaving it out.

    uv run stages run 02 demos/smoothing.py

1. add-k                give every n-gram k occurrences more than it had
2. absolute discounting take the same discount from every count and give it to the shorter context
3. three discounts      take less from what was seen once, more from what was seen often
4. continuation counts  in shorter contexts count different neighbours instead of occurrences
5. both                 modified Kneser-Ney
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

from matplotlib.figure import Figure

from data import load_data, windows
from model import KneserNey, Level, ModelConfig, NGram
from train import evaluate


@dataclass
class Config:
    """What to compare. Raises BadInput for what cannot be compared."""

    corpus: str | None = None  # shakespeare, names, python-docs or a text file; none: shakespeare
    max_order: int = 8  # longest n-gram
    name: str = "smoothing"  # the run's folder under out/

    def __post_init__(self):
        if self.max_order < 2:
            raise BadInput(f"max_order is {self.max_order}: it must be at least 2")


class OneDiscount(KneserNey):
    """Kneser & Ney's own estimate, n_1 / (n_1 + 2 n_2), taken from every count alike."""

    def level(self, keys, counts) -> Level:
        once, twice = (counts == 1).sum().item(), (counts == 2).sum().item()
        level = super().level(keys, counts)
        discount = once / (once + 2 * twice) if once and twice else 0.5
        _, kinds = (keys // self.config.vocab_size).unique(return_counts=True)  # different tokens after each context
        return Level(keys, counts - discount, level.contexts, level.totals, discount * kinds.double())


class RawCounts(KneserNey):
    """Every order counts occurrences, the shorter ones too."""

    def fit(self, x, y):
        grams = self.grams(x, y)
        orders = range(1, self.config.block_size + 2)
        self.levels = [self.level(*(grams % self.config.vocab_size**n).unique(return_counts=True)) for n in orders]
        return self


class AbsoluteDiscounting(OneDiscount, RawCounts):
    """Neither of the two ideas: one discount, raw counts. Ney, Essen & Kneser (1994)."""


VARIANTS = {
    "add-k": NGram,
    "absolute discounting": AbsoluteDiscounting,
    "three discounts": RawCounts,
    "continuation counts": OneDiscount,
    "both: Kneser-Ney": KneserNey,
}


def draw(rows: list[dict]) -> Figure:
    """The loss of each variant against the order."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    for name in VARIANTS:
        ax.plot([row["order"] for row in rows], [row[name] for row in rows], "o-", label=name)
    ax.set(xlabel="order n", ylabel="validation loss, nats per character")
    ax.set_xticks([row["order"] for row in rows])
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add(parser, Config)
    config = options.build(Config, parser.parse_args(argv))
    setup("cpu")
    data = load_data(config.corpus)
    V, longest = len(data.tokenizer), config.max_order - 1
    shapes = [ModelConfig(vocab_size=V, block_size=length) for length in range(1, longest + 1)]
    x, y = windows(data.train, config.max_order - 1)
    val_x, val_y = windows(data.val, config.max_order - 1)
    log = RunLog(__file__, config.name, {**vars(config), "corpus": data.name})
    rows = []
    with progress(len(shapes), "counting") as bar:
        for step, shape in enumerate(shapes, 1):
            losses = {name: evaluate(Model(shape).fit(x, y), val_x, val_y) for name, Model in VARIANTS.items()}
            rows.append({"order": shape.block_size + 1, **losses})
            bar.update(step)
    turned = [{"": name, **{str(row["order"]): row[name] for row in rows}} for name in VARIANTS]
    table(f"{data.name}: validation loss in nats per character, by order", turned)
    say(f"figure in {log.figure(draw(rows), 'smoothing')}")
    log.finish(orders=rows)


if __name__ == "__main__":
    run_program(main)
