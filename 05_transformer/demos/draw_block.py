"""Draws a transformer block: pre-norm, as `model.py` computes it, beside post-norm, as `norm_position.py` does.

    uv run stages run 05 demos/draw_block.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say
from shared.program import run_program
from shared.runlog import RunLog

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

COLOURS = {"attention": "#cfe3f7", "feed-forward": "#d8efd3", "norm": "#f7e6bf"}
STREAM, BRANCH = 0.0, 1.6  # x of the residual stream and of the branches
STEP = 1.0  # between two rows


def box(axis, x: float, y: float, kind: str, note: str = "") -> None:
    """A labelled box of `kind`, its shape beside it."""
    shape = {"boxstyle": "round,pad=0.02", "facecolor": COLOURS[kind], "edgecolor": "black"}
    axis.add_patch(FancyBboxPatch((x - 0.62, y - 0.26), 1.24, 0.52, zorder=3, **shape))
    axis.text(x, y, kind, ha="center", va="center", fontsize=10, zorder=4)
    axis.text(x + 0.75, y, note, ha="left", va="center", fontsize=8, color="dimgrey")


def arrow(axis, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "linewidth": 1.3, "color": "black", "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=style, zorder=2)


def plus(axis, y: float) -> None:
    """Where a branch is added to the stream."""
    axis.plot([STREAM], [y], "o", markersize=15, markerfacecolor="white", markeredgecolor="black", zorder=3)
    axis.text(STREAM, y - 0.02, "+", ha="center", va="center", fontsize=13, zorder=4)


def half(axis, y: float, kind: str, note: str, pre: bool) -> float:
    """One residual step, from height y up; returns the height where it ends."""
    row = y + 0.35  # where the branch leaves the stream
    axis.plot([STREAM, BRANCH], [row, row], color="black", linewidth=1.3, zorder=2)
    first = row + STEP * 0.75
    if pre:
        box(axis, BRANCH, first, "norm")
        box(axis, BRANCH, first + STEP, kind, note)
        arrow(axis, (BRANCH, row), (BRANCH, first - 0.28))
        arrow(axis, (BRANCH, first + 0.28), (BRANCH, first + STEP - 0.28))
        top, join = first + STEP, first + 1.75 * STEP
    else:
        box(axis, BRANCH, first, kind, note)
        arrow(axis, (BRANCH, row), (BRANCH, first - 0.28))
        top, join = first, first + 0.75 * STEP
    axis.plot([BRANCH, BRANCH], [top + 0.28, join], color="black", linewidth=1.3, zorder=2)
    arrow(axis, (BRANCH, join), (STREAM + 0.13, join))
    plus(axis, join)
    arrow(axis, (STREAM, y), (STREAM, join - 0.13))
    if pre:
        return join + 0.13
    arrow(axis, (STREAM, join + 0.13), (STREAM, join + STEP - 0.28))
    box(axis, STREAM, join + STEP, "norm")
    return join + STEP + 0.28


def draw():
    """Both kinds of block, from the input below to the output above."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 6.4), layout="constrained")
    for axis, pre in zip(axes, (True, False), strict=True):
        y = half(axis, 0.0, "attention", "mixes\npositions", pre)
        y = half(axis, y, "feed-forward", "each position\non its own", pre)
        arrow(axis, (STREAM, y), (STREAM, y + 0.5))
        axis.text(STREAM, -0.15, "x  [B, T, C]", ha="center", va="top", fontsize=9)
        axis.text(STREAM, y + 0.55, "x  [B, T, C], to the next block", ha="center", va="bottom", fontsize=9)
        name = "pre-norm: the stream runs straight through" if pre else "post-norm: the stream runs through every norm"
        axis.set_title(name, fontsize=11)
        axis.set(xlim=(-1.5, 3.4), ylim=(-0.5, 7.2))
        axis.axis("off")
    return fig


def main(argv: list[str] | None = None) -> None:
    options.Parser(description=__doc__.split("\n")[0]).parse_args(argv)
    log = RunLog(__file__, "block")
    say(f"drawn in {log.figure(draw(), 'block')}")


if __name__ == "__main__":
    run_program(main)
