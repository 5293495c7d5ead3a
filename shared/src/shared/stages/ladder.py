"""`stages ladder`: every language model of the course on one text, as a table and a figure in the root README.

A stage lists its runs in its pyproject.toml; without a list it is the main script, and `rungs = []` keeps a stage out:

    [[tool.stages.rungs]]
    args = ["train.py", "--preset", "long"]   # default: the main script, no arguments
    run = "long"                              # the run's folder in out/, default "default"
    name = "GPT, five minutes"                # default: the stage's title

A run's summary.json is one rung, from `params`, `tokens`, `seconds`, `val_loss`, `val_bpb`; or several, when it holds
a list `rungs` of such objects, each with a `name`. A summary without `val_loss` is no language model's.
"""

import argparse
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from shared.atomic import write
from shared.console import console, say
from shared.errors import BadInput
from shared.stages import repo
from shared.stages.results import summaries
from shared.stages.run import run_child

START, END = "<!-- ladder -->", "<!-- /ladder -->"
FIGURE = "shared/ladder.png"
PATIENCE = 60  # seconds for a training to save its checkpoint after Ctrl-C


@dataclass(frozen=True)
class Recipe:
    """One run on the ladder."""

    stage: repo.Stage
    args: list[str]
    run: str
    name: str

    def __str__(self) -> str:
        return f"uv run stages run {self.stage.number:02} {' '.join(self.args)}"


@dataclass(frozen=True)
class Rung:
    """One row. Losses in nats per character over the whole validation text; None where nothing was stated."""

    stage: str
    name: str
    val_loss: float
    params: int | None = None
    tokens: int | None = None
    seconds: float | None = None  # of training; None for a model that was trained elsewhere
    val_bpb: float | None = None

    @property
    def time(self) -> str:
        """Seconds as people say them: 0.04, 3.5, 75, 1,200."""
        if self.seconds is None:
            return ""
        return f"{self.seconds:.2g}" if self.seconds < 10 else f"{self.seconds:,.0f}"


# nanoGPT's README (Karpathy, 2022), same text and split: 2,000 steps of 12 x 64 characters, 5,000 of 64 x 256. Its
# losses are averages over random batches of the validation text; every character is one byte.
REFERENCES = [
    Rung("nanoGPT", "CPU recipe, published", 1.88, 804_096, 1_536_000, None, 1.88 / math.log(2)),
    Rung("nanoGPT", "GPU recipe, published", 1.4697, 10_745_088, 81_920_000, None, 1.4697 / math.log(2)),
]


def recipes(stage: repo.Stage) -> list[Recipe]:
    """The runs that the stage puts on the ladder."""
    about = repo.settings(stage.path / "pyproject.toml")["tool"]["stages"]
    return [
        Recipe(stage, entry.get("args", [stage.main]), entry.get("run", "default"), entry.get("name", stage.title))
        for entry in about.get("rungs", [{}])
    ]


def rungs(recipe: Recipe) -> list[Rung]:
    """The rows that a finished run contributes. Raises BadInput when it has not run, or on another text."""
    summary = summaries(recipe.stage).get(recipe.run)
    if summary is None:
        raise BadInput(f"{recipe.stage.name} has no out/{recipe.run}/summary.json: {recipe}")
    rows = summary.get("rungs") or [{"name": recipe.name, **summary}]
    rows = [row for row in rows if "val_loss" in row]
    if rows and summary.get("corpus") != "shakespeare":
        raise BadInput(f"{recipe} trained on {summary.get('corpus')}: losses compare on shakespeare only")
    fields = ("name", "val_loss", "params", "tokens", "seconds", "val_bpb")
    return [Rung(recipe.stage.name, **{key: row[key] for key in fields if key in row}) for row in rows]


def train(recipe: Recipe) -> None:
    """Run one recipe. Raises BadInput when it fails or leaves no summary."""
    say(f"\n{recipe}")
    start = time.time()
    env = {key: value for key, value in os.environ.items() if key != "STAGES_OUT"}
    if code := run_child([sys.executable, *recipe.args], PATIENCE, cwd=recipe.stage.path, env=env):
        raise BadInput(f"{recipe} ended with {code}: the ladder is unchanged")
    summary = recipe.stage.path / "out" / recipe.run / "summary.json"
    if not summary.exists() or summary.stat().st_mtime < start - 1:
        raise BadInput(f"{recipe} wrote no out/{recipe.run}/summary.json: set `run` of the rung to the run's folder")


def markdown(rows: list[Rung]) -> str:
    """The table and the figure as they stand in the README."""

    def cells(rung: Rung) -> list[str]:
        stage = rung.stage if rung in REFERENCES else f"[{rung.stage}]({rung.stage}/README.md)"
        counts = ["" if count is None else f"{count:,}" for count in (rung.params, rung.tokens)]
        bits = "" if rung.val_bpb is None else f"{rung.val_bpb:.3f}"
        return [stage, rung.name, *counts, rung.time, f"{rung.val_loss:.3f}", bits]

    head = ["stage", "model", "parameters", "training tokens", "seconds", "val loss (nats/char)", "bits/byte"]
    lines = [head, ["---", "---", *["---:"] * 5], *map(cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n![Validation loss of every model of the course, rung by rung]({FIGURE})"


def figure(rows: list[Rung]) -> bytes:
    """A PNG: one line per rung, in order, its loss as a dot and its training time beside it; grey without one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(8, 0.6 + 0.34 * len(rows)))
    # Behind everything, and the labels on white, so that the line crosses out no number.
    reference = f"{REFERENCES[0].stage}'s {REFERENCES[0].name}"
    ax.axvline(REFERENCES[0].val_loss, color="tab:gray", linestyle=":", linewidth=1, zorder=0, label=reference)
    label = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
    for y, rung in enumerate(rows):
        color = "tab:gray" if rung.seconds is None else "tab:blue"
        ax.plot(rung.val_loss, y, "o", color=color)
        told = f"{rung.val_loss:.3f}" + (f"  in {rung.time} s" if rung.time else "")
        ax.annotate(told, (rung.val_loss, y), (9, 0), textcoords="offset points", va="center", bbox=label)
    ax.legend(loc="lower right", frameon=False)
    ax.set_yticks(range(len(rows)), [f"{rung.stage}  {rung.name}" for rung in rows])
    ax.invert_yaxis()
    losses = [rung.val_loss for rung in rows]
    width = max(losses) - min(losses) or 1
    ax.set_xlim(min(losses) - 0.1 * width, max(losses) + 0.4 * width)  # room for the label of the largest
    ax.set_xlabel("validation loss, nats per character")
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    png = BytesIO()
    fig.savefig(png, format="png", dpi=100, bbox_inches="tight")
    plt.close(fig)
    return png.getvalue()


def rewrite(text: str, block: str) -> str:
    """`text` with `block` between the markers. Raises BadInput when they are not there exactly once."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise BadInput(f"README.md needs the markers {START} and {END}, once and in this order")
    before, after = text.split(START)[0], text.split(END)[1]
    return f"{before}{START}\n{block}\n{END}{after}"


def place(loss: float, corpus: str, readme: Path) -> str:
    """A loss, its text, and its neighbours on the ladder in the README where the text is the ladder's.

    "loss 1.580 on shakespeare: on the ladder between GPT (1.564) and transformer (1.640)"
    """
    told = f"loss {loss:.3f} on {Path(corpus).name}"
    if corpus != "shakespeare":
        return f"{told}: not the text of the READMEs' losses"
    text = readme.read_text("utf-8") if readme.is_file() else ""
    table = text.partition(START)[2].partition(END)[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|[^|]+\|[^|]+\|[^|]+\| (\d+\.\d+) \|", table, re.M)
    whose = {stage: "" if stage.startswith("[") else f"{stage}'s " for stage, _, _ in rows}  # no link: elsewhere
    known = [(float(other), f"{whose[stage]}{name} ({other})") for stage, name, other in rows]
    better = max((rung for rung in known if rung[0] < round(loss, 3)), default=None)
    worse = min((rung for rung in known if rung[0] > round(loss, 3)), default=None)
    if better and worse:
        return f"{told}: on the ladder between {better[1]} and {worse[1]}"
    if better:
        return f"{told}: worse than all on the ladder, next to {better[1]}"
    return f"{told}: better than all on the ladder, next to {worse[1]}" if worse else told


def command(args: argparse.Namespace) -> int:
    """Train unless told otherwise, then rewrite the README's table and the figure: neither before both are ready."""
    top = repo.root()
    readme = top / "README.md"
    rewrite(readme.read_text("utf-8"), "")  # complain before the minutes of training, not after
    ladder = [recipe for stage in repo.stages(top) for recipe in recipes(stage)]
    if not args.no_train:
        for recipe in ladder:
            train(recipe)
    rows = [rung for recipe in ladder for rung in rungs(recipe)] + REFERENCES
    png, text = figure(rows), rewrite(readme.read_text("utf-8"), markdown(rows))
    write(top / FIGURE, png)
    write(readme, text)
    console.print(f"{len(rows)} rungs written to README.md and {FIGURE}")
    return 0


def add(subparsers) -> None:
    parser = subparsers.add_parser("ladder", help="for contributors: train every rung, rewrite the README's ladder")
    parser.add_argument("--no-train", action="store_true", help="rewrite from the runs that exist")
    parser.set_defaults(func=command)
