"""What an embedding learns: characters that are used alike come to lie close together.

    uv run stages run 03 demos/embedding.py
    uv run stages run 03 demos/embedding.py --n-embd 8
    uv run stages run 03 demos/embedding.py --run default

Nobody tells the model what a vowel is. A small model with two numbers for each character is trained, so that the
embedding can be drawn as it is, only turned. With more numbers the figure shows the two directions in which the points
spread most (principal components). With --run a trained run is looked at instead.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog, run_folder

import torch
from matplotlib.figure import Figure

from checkpoint import load
from data import batches, load_data
from model import MLP, ModelConfig
from train import TrainConfig, evaluate, make_optimizer, train

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
    """The `count` nearest other points of each, nearest first: [V, C] -> [V, count]."""
    return torch.cdist(points, points).fill_diagonal_(torch.inf).topk(count, dim=-1, largest=False).indices


def same_group(chars: str, nearest) -> dict[str, dict[str, float]]:
    """How often the nearest neighbour is of the same group, or the same letter in its other case, and by chance."""
    groups = [group(char) for char in chars]
    rows = {}
    for name in dict.fromkeys(groups):
        mine = [i for i, other in enumerate(groups) if other == name]
        hits = sum(groups[nearest[i, 0]] == name for i in mine)
        rows[name] = {"found": hits / len(mine), "by chance": (len(mine) - 1) / (len(chars) - 1)}
    paired = [i for i, char in enumerate(chars) if char != char.swapcase() and char.swapcase() in chars]
    if paired:
        hits = sum(chars[nearest[i, 0]] == chars[i].swapcase() for i in paired)
        rows["the letter's other case"] = {"found": hits / len(paired), "by chance": 1 / (len(chars) - 1)}
    return rows


def apart(points, gap: float, rounds: int = 200):
    """Push points [V, 2] away from each other until no two are closer than `gap`: places for labels that can be read.

    Two points 1 apart on a line, gap 2: they move by half of what is missing, [0, 1] -> [-0.5, 1.5].
    """
    for _ in range(rounds):
        away = points[:, None] - points  # [V, V, 2]
        distance = away.norm(dim=-1, keepdim=True).clamp(min=1e-6)  # [V, V, 1]
        points = points + (away / distance * (gap - distance).clamp(min=0) / 2).sum(dim=1)
    return points


def draw(points, shares, chars: str) -> Figure:
    """The map of the characters: points [V, 2]. A line leads from a label that had to make room to its point."""
    fig = Figure(figsize=(8, 6.5), layout="constrained")
    axes = fig.subplots()
    axes.scatter(*points.T, s=0)  # sets the limits: text alone does not
    size = points.max(dim=0).values - points.min(dim=0).values
    places = apart(points / size, gap=0.04) * size
    moves = ((places - points) / size).norm(dim=1).tolist()
    for (x, y), (to_x, to_y), moved, char in zip(points.tolist(), places.tolist(), moves, chars, strict=True):
        label = NAMES.get(char, char if char.isalnum() else f"“{char}”")  # a lone point would be a speck
        color = COLORS[group(char)]
        if moved > 0.012:  # of the width of the map
            axes.plot([x, to_x], [y, to_y], ".-", markevery=[0], color=color, linewidth=0.6, markersize=3, alpha=0.6)
        axes.text(to_x, to_y, label.replace("$", r"\$"), color=color, ha="center", va="center", fontsize=11)
    axes.set(xlabel=f"first direction, {shares[0]:.0%} of the variance", ylabel=f"second, {shares[1]:.0%}")
    axes.legend(handles=[axes.scatter([], [], color=color, label=name) for name, color in COLORS.items()])
    return fig


def small_model(corpus: str | None, n_embd: int, steps: int, seed: int):
    """Train a small model, (model, tokenizer)."""
    data = load_data(corpus)
    model = MLP(ModelConfig(len(data.tokenizer), block_size=4, n_embd=n_embd, n_hidden=128, activation="tanh"))
    config = TrainConfig(steps=steps, batch_size=256, seed=seed)
    stream = batches(data.train, model.config.block_size, config.batch_size, seed)
    with progress(steps, "training") as bar:
        for step, loss in train(model, stream, config, make_optimizer(model, config)):
            bar.update(step, loss=loss)
    say(f"{data.name}: validation loss {evaluate(model, data.val):.3f} with {n_embd} numbers for each character")
    return model, data.tokenizer


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--n-embd", type=int, default=2, help="numbers that describe one character (default: 2)")
    parser.add_argument("--steps", type=int, default=2500, help="steps of the training (default: 2500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help="look at this run, a folder under out/, instead of training")
    parser.add_argument("--chars", default="aetAT., ", help="characters whose neighbours to list")
    args = parser.parse_args(argv)
    if args.n_embd < 2:
        raise BadInput(f"--n-embd {args.n_embd}: a map needs at least 2")
    setup("cpu", args.seed)
    if args.run:
        model, tokenizer = load(run_folder(__file__, args.run) / "model.pt")
        if model.config.n_embd < 2:
            raise BadInput(f"the run {args.run} has n_embd {model.config.n_embd}: a map needs at least 2")
    else:
        model, tokenizer = small_model(args.corpus, args.n_embd, args.steps, args.seed)
    asked = tokenizer.encode(args.chars)
    log = RunLog(__file__, "embedding", vars(args))

    points = model.tok_emb.weight.detach()
    nearest = neighbours(points, min(5, len(tokenizer) - 1))
    table("nearest neighbours", [
        {"character": NAMES.get(tokenizer.chars[i], tokenizer.chars[i]),
         "neighbours": " ".join(NAMES.get(char, char) for char in tokenizer.decode(nearest[i]))} for i in asked
    ])
    rows = same_group(tokenizer.chars, nearest)
    table("nearest neighbour of the same group", [{"group": name, **row} for name, row in rows.items()])
    coordinates, shares = principal(points)
    file = log.figure(draw(coordinates, shares.tolist(), tokenizer.chars), "embedding")
    log.finish(same_group=rows)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
