"""What the embedding has learned: characters that are used alike lie close together.

    uv run stages run 03 && uv run stages run 03 demos/embedding.py

Nobody told the model what a vowel is. Each character is a point in n_embd dimensions, moved about by the training only.
The figure shows the two directions in which the points spread most (principal components); the table lists each
character's nearest neighbours among all n_embd dimensions.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sample import load
from shared import options
from shared.console import say, table
from shared.device import setup
from shared.errors import cli
from shared.runlog import RunLog, run_folder

GROUPS = {"vowels": "aeiou", "consonants": "bcdfghjklmnpqrstvwxyz", "capitals": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
COLORS = {"vowels": "tab:red", "consonants": "tab:blue", "capitals": "tab:green", "others": "gray"}
NAMES = {"\n": "¶", " ": "␣"}  # what cannot be seen otherwise


def group(char: str) -> str:
    """The group that a character belongs to."""
    return next((name for name, chars in GROUPS.items() if char in chars), "others")


def principal(points):
    """The two directions of largest variance: points [V, C] -> coordinates [V, 2], share of the variance in each [2].

    The rows of V^T in the singular value decomposition of the centred points are the directions, ordered by spread.
    """
    centred = points - points.mean(dim=0)
    U, S, _ = torch.linalg.svd(centred, full_matrices=False)
    return U[:, :2] * S[:2], (S**2 / (S**2).sum())[:2]


def neighbours(points, count: int):
    """The `count` nearest other points of each, by the angle between them, nearest first: [V, C] -> [V, count]."""
    unit = F.normalize(points, dim=-1)
    return (unit @ unit.T).fill_diagonal_(-2.0).topk(count, dim=-1).indices


def same_group(chars: str, nearest) -> dict[str, dict[str, float]]:
    """How often the nearest neighbour is of the same group, and how often it would be if drawn at random."""
    groups = [group(char) for char in chars]
    rows = {}
    for name in dict.fromkeys(groups):
        mine = [i for i, other in enumerate(groups) if other == name]
        hits = sum(groups[nearest[i, 0]] == name for i in mine)
        rows[name] = {"found": hits / len(mine), "by chance": (len(mine) - 1) / (len(chars) - 1)}
    return rows


def draw(points, shares, chars: str) -> Figure:
    """The map of the characters: points [V, 2]."""
    fig = Figure(figsize=(6.4, 5), layout="constrained")
    axes = fig.subplots()
    axes.scatter(*points.T, s=0)  # sets the limits: text alone does not
    for (x, y), char in zip(points.tolist(), chars, strict=True):
        axes.text(x, y, NAMES.get(char, char).replace("$", r"\$"), color=COLORS[group(char)], ha="center", va="center",
                  fontsize=12, fontweight="bold")
    axes.set(xlabel=f"first component, {shares[0]:.0%} of the variance", ylabel=f"second, {shares[1]:.0%}")
    axes.legend(handles=[axes.scatter([], [], color=color, label=name) for name, color in COLORS.items()])
    return fig


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="default", help="the trained run, a folder under out/ (default: default)")
    parser.add_argument("--chars", default="aetsAT., ", help="characters whose neighbours to list")
    args = parser.parse_args(argv)
    setup("cpu")
    model, vocab = load(run_folder(__file__, args.run) / "model.pt")
    asked = vocab.encode(args.chars)
    log = RunLog(__file__, "embedding", vars(args))

    points = model.tok_emb.weight.detach()
    nearest = neighbours(points, min(5, len(vocab) - 1))
    table("nearest neighbours", [
        {"character": NAMES.get(vocab.chars[i], vocab.chars[i]),
         "neighbours": " ".join(NAMES.get(char, char) for char in vocab.decode(nearest[i]))} for i in asked.tolist()
    ])
    rows = same_group(vocab.chars, nearest)
    table("nearest neighbour of the same group", [{"group": name, **row} for name, row in rows.items()])
    coordinates, shares = principal(points)
    file = log.figure(draw(coordinates, shares.tolist(), vocab.chars), "embedding")
    log.finish(same_group=rows)
    say(f"figure: {file}")


if __name__ == "__main__":
    cli(main)
