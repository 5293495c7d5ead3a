"""Attention on three tokens, every number printed: what a pronoun gets to know about the word that it stands for.

    uv run stages run 05 demos/by_hand.py
    uv run stages run 05 demos/by_hand.py --sharpen 4

Three tokens, "The cat it", with four channels each that say what a word is: article, noun, pronoun, animal. In a
trained model nobody names the channels; here they have names so that the numbers can be followed. The matrices are made
so that a pronoun looks for a noun, a noun can be found as a noun, and whoever is found hands over what it is.

Everything is plain Python on lists, in the order in which one would work it out on paper; the last line compares the
result with the stage's own `attention`. `--sharpen` multiplies the queries: attention turns from an average into a
choice, which is what the division by sqrt(D) keeps from happening at the start.

Each `# %%` starts a cell: VS Code runs one with Shift+Enter and shows what it prints. Change a number in a matrix, run
its cell, then run the cells below again.
"""

# %%
import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say, table
from shared.program import run_program

import torch

from model import attention

# Python sets `sys.ps1`, its prompt, where somebody types: in a terminal, in a notebook, and where cells are run.
CELLS = __name__ == "__main__" and hasattr(sys, "ps1")
PARTS = []

# %%
WORDS = ("The", "cat", "it")
CHANNELS = ("article", "noun", "pronoun", "animal")
X = [  # [T, C]: one row for each token
    [1.0, 0.0, 0.0, 0.0],  # The: an article
    [0.0, 1.0, 0.0, 1.0],  # cat: a noun, an animal
    [0.0, 0.0, 1.0, 0.0],  # it: a pronoun
]
D = 4  # channels of a query, of a key and of a value: one head of all C = 4
# Each [C, D]: row i says what channel i of the token brings into the query (key, value).
W_QUERY = [
    [0.0, 1.0, 0.0, 0.0],  # an article looks for a noun
    [1.0, 0.0, 0.0, 1.0],  # a noun looks for its article, and for animals
    [0.0, 4.0, 0.0, 0.0],  # a pronoun looks hard for a noun
    [0.0, 0.0, 0.0, 0.0],  # being an animal changes nothing
]
W_KEY = [
    [1.0, 0.0, 0.0, 0.0],  # each kind of word can be found as what it is
    [0.0, 1.0, 0.0, 0.0],
    [0.0, 0.0, 1.0, 0.0],
    [0.0, 0.0, 0.0, 1.0],
]
W_VALUE = [
    [1.0, 0.0, 0.0, 0.0],  # and hands over what it is
    [0.0, 1.0, 0.0, 0.0],
    [0.0, 0.0, 1.0, 0.0],
    [0.0, 0.0, 0.0, 5.0],  # being an animal counts much
]


# %%
def matmul(a: list[list[float]], b: list[list[float]]) -> list[list[float]]:
    """[n, m] x [m, p] -> [n, p]: row i of a times column j of b."""
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]


def transpose(a: list[list[float]]) -> list[list[float]]:
    """[n, m] -> [m, n]."""
    return [list(column) for column in zip(*a, strict=True)]


def softmax(row: list[float]) -> list[float]:
    """e to each score, divided by their sum; e to minus infinity is 0."""
    powers = [math.exp(score) for score in row]
    return [power / sum(powers) for power in powers]


def by_hand(sharpen: float = 1.0) -> dict[str, list[list[float]]]:
    """Every intermediate result of attention on the three tokens, in the order of the computation."""
    steps = {"q": [[sharpen * number for number in row] for row in matmul(X, W_QUERY)]}  # [T, D]
    steps["k"] = matmul(X, W_KEY)  # [T, D]
    steps["v"] = matmul(X, W_VALUE)  # [T, D]
    steps["scores"] = matmul(steps["q"], transpose(steps["k"]))  # [T, T]: row t has query t against every key
    steps["scaled"] = [[score / math.sqrt(D) for score in row] for row in steps["scores"]]
    steps["masked"] = [
        [score if s <= t else -math.inf for s, score in enumerate(row)] for t, row in enumerate(steps["scaled"])
    ]
    steps["weights"] = [softmax(row) for row in steps["masked"]]
    steps["output"] = matmul(steps["weights"], steps["v"])  # [T, D]
    return steps


def show(title: str, meaning: str, rows: list[list[float]], columns: tuple[str, ...]) -> None:
    """Print a matrix with a word in front of each row."""
    say(f"\n{meaning}")
    table(title, [
        {"": word, **{name: f"{number:.3f}" for name, number in zip(columns, row, strict=True)}}
        for word, row in zip(WORDS, rows, strict=True)
    ])


def part(function):
    """Mark one part of the demo. A cell computes and shows its part at once, the script shows all of them in turn."""
    PARTS.append(function)
    if CELLS:
        function(by_hand())
    return function


# %%
@part
def projections(steps: dict) -> None:
    show("x", "The tokens [T, C]. What each one is:", X, CHANNELS)
    show("q = x W_query", "Queries [T, D]. What each token looks for:", steps["q"], CHANNELS)
    show("k = x W_key", "Keys [T, D]. What each token can be found by:", steps["k"], CHANNELS)
    show("v = x W_value", "Values [T, D]. What each token hands over when it is found:", steps["v"], CHANNELS)


# %%
@part
def scores(steps: dict) -> None:
    show("q k^T", "Scores [T, T]. How well the query of the row fits the key of the column:", steps["scores"], WORDS)
    show(f"q k^T / sqrt({D})", "Scaled, so that more channels do not mean larger scores:", steps["scaled"], WORDS)
    show("masked", "Masked. No token sees what comes after it:", steps["masked"], WORDS)


# %%
@part
def mixture(steps: dict) -> None:
    show("softmax", "Weights [T, T]. Softmax of each row, which then sums to 1:", steps["weights"], WORDS)
    show("weights v", "Output [T, D]. What each token knows now:", steps["output"], CHANNELS)
    weights = steps["weights"][-1]
    parts = " + ".join(f"{weight:.3f} v({word})" for weight, word in zip(weights, WORDS, strict=True))
    say(f"\noutput of 'it' = {parts}")
    before, there, after = X[-1][-1], steps["v"][1][-1], steps["output"][-1][-1]
    say(f"Its channel 'animal' was {before:.3f} and is {after:.3f} now: read from 'cat', which hands over {there:.3f}.")


# %%
@part
def comparison(steps: dict) -> None:
    q, k, v = (torch.tensor(steps[name], dtype=torch.float64) for name in "qkv")
    gap = (attention(q, k, v) - torch.tensor(steps["output"], dtype=torch.float64)).abs().max().item()
    say(f"Largest difference from the stage's own attention: {gap:.1e}.")


# %%
def factor(text: str) -> float:
    """A number from the command line that does not overflow in the exponential."""
    number = float(text)
    if not abs(number) <= 100:
        raise argparse.ArgumentTypeError(f"{text} must lie between -100 and 100")
    return number


def main(argv: list[str] | None = None) -> None:
    parser = options.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--sharpen", type=factor, default=1.0, help="factor on the queries (default: %(default)s)")
    args = parser.parse_args(argv)

    steps = by_hand(args.sharpen)
    for function in PARTS:
        function(steps)


if __name__ == "__main__" and not CELLS:
    run_program(main)
