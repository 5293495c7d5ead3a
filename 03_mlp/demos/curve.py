"""The loss curve of one run or several: how the validation loss fell, and where the training loss was by then.

    uv run stages run 03 && uv run stages run 03 demos/curve.py
    uv run stages run 03 demos/curve.py --runs default small
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import say, table
from shared.errors import BadInput
from shared.program import command, run_program
from shared.runlog import RunLog, read_metrics, run_folder

from matplotlib.figure import Figure

from checkpoint import load


def read(name: str) -> dict:
    """A finished run: its name, its metrics, its summary, and the loss ln V that it began with."""
    folder = run_folder(__file__, name)
    if not (folder / "summary.json").is_file():
        train = command(Path(__file__).parent.parent.name, "train.py", "--name", name)
        raise BadInput(f"no finished run in {folder}: train first, with {train}")
    _, tokenizer = load(folder / "model.pt")
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    return {"name": name, "rows": read_metrics(folder), "start": math.log(len(tokenizer)), **summary}


def series(run: dict, name: str) -> tuple[list[int], list[float]]:
    """The steps at which a run noted the metric `name`, and its values there."""
    rows = [row for row in run["rows"] if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def draw(runs: list[dict]) -> Figure:
    """A line for each run's validation loss, which comes from ln V above, and a pale one for its training batches."""
    fig = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = fig.subplots()
    for run in runs:
        steps, losses = series(run, "val_loss")
        [line] = axes.plot([0, *steps], [run["start"], *losses], "o-", markersize=3, label=f"{run['name']}: validation")
        axes.plot(*series(run, "train_loss"), color=line.get_color(), alpha=0.4, linewidth=0.6, zorder=1,
                  label=f"{run['name']}: single training batches")
    low = min(loss for run in runs for name in ("train_loss", "val_loss") for loss in series(run, name)[1])
    axes.set(xlabel="step", ylabel="loss, nats/char", ylim=(low - 0.1, low + 1.2))
    axes.legend()
    return fig


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["default"], help="folders under out/ (default: default)")
    args = parser.parse_args(argv)
    runs = [read(name) for name in args.runs]
    log = RunLog(__file__, "curve", vars(args))
    keys = ("name", "corpus", "params", "tokens", "seconds", "val_loss")
    table("runs", [{key: run[key] for key in keys} | {"corpus": Path(run["corpus"]).name} for run in runs])
    file = log.figure(draw(runs), "curve")
    log.finish()
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
