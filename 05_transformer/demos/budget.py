"""When does attention pay? The networks of stages 03, 04 and 05, each trained for shorter and for longer.

    uv run stages run 05 demos/budget.py                       # trains what is missing, 20 minutes on two cores
    uv run stages run 05 demos/budget.py --shares 0.25 0.5 --seeds 1337

Each stage's own `train.py` runs with its default recipe, but for the number of steps, and for a warm-up of at most a
quarter of them. A run that is there already is not made again, so the demo can be stopped and goes on where it was. The
first and the last budget are trained with every seed, those between with the first.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog, run_folder
from shared.stages.repo import find

from matplotlib.figure import Figure

STAGES = {  # default steps and warm-up of each stage
    "03": (4000, None),
    "04": (3000, None),
    "05": (2400, 500),
}


def plan(shares: list[float], seeds: list[int]) -> list[tuple[str, int, int]]:
    """The runs to make: (stage, steps, seed), the shortest first."""
    runs = []
    for share in sorted(set(shares)):
        ends = share in (min(shares), max(shares))
        for seed in seeds if ends else seeds[:1]:
            runs += [(stage, max(1, round(steps * share)), seed) for stage, (steps, _) in STAGES.items()]
    return runs


def train(stage: str, steps: int, seed: int, corpus: str | None) -> dict:
    """The summary of one run, from its folder or by training it. Raises BadInput when the training fails."""
    folder = find(stage, Path(__file__).parents[2]).path
    name = f"budget-{stage}-{steps}-{seed}" + re.sub(r"[^\w.-]", "_", f"-{corpus}" if corpus else "")
    summary = run_folder(folder / "train.py", name) / "summary.json"
    if not summary.is_file():
        words = ["--steps", str(steps), "--seed", str(seed), "--name", name, "--eval-every", str(steps)]
        warmup = STAGES[stage][1]
        if warmup and warmup > steps // 4:
            words += ["--warmup", str(steps // 4)]
        words += ["--corpus", corpus] if corpus else []
        done = subprocess.run([sys.executable, "train.py", *words], cwd=folder, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise BadInput(f"stage {stage}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return json.loads(summary.read_text("utf-8"))


def draw(rows: list[dict]) -> Figure:
    """Loss against seconds, a line through the means of each stage and a dot for each run."""
    fig = Figure(figsize=(6.8, 4), layout="constrained")
    axes = fig.subplots()
    for stage in STAGES:
        mine = [row for row in rows if row["stage"] == stage]
        steps = sorted({row["steps"] for row in mine})
        groups = [[row for row in mine if row["steps"] == count] for count in steps]
        mean = [[sum(row[key] for row in group) / len(group) for group in groups] for key in ("seconds", "val loss")]
        [line] = axes.plot(*mean, "-", label=f"stage {stage}")
        axes.plot([row["seconds"] for row in mine], [row["val loss"] for row in mine], "o", color=line.get_color(),
                  markersize=4)
    axes.set(xlabel="seconds of training", ylabel="validation loss, nats/char", xscale="log")
    ticks = [5, 10, 20, 40, 80, 160, 320]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return fig


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 1, 2],
                        help="budgets, as shares of each stage's default steps (default: 0.25 0.5 1 2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2], help="default: 1337 1 2")
    args = parser.parse_args(argv)
    if not min(args.shares) > 0:
        raise BadInput(f"--shares {args.shares}: each must be above 0")
    runs, rows = plan(args.shares, args.seeds), []
    with progress(len(runs), "runs") as bar:
        for i, (stage, steps, seed) in enumerate(runs):
            bar.update(i, text=f"{stage}, {steps:,} steps, seed {seed}")
            summary = train(stage, steps, seed, args.corpus)
            rows.append({
                "stage": stage, "steps": steps, "seed": seed, "tokens": summary["tokens"],
                "seconds": summary["seconds"], "val loss": summary["val_loss"],
            })
        bar.update(len(runs), text="")
    table("loss by budget", sorted(rows, key=lambda row: (row["stage"], row["steps"], row["seed"])))
    log = RunLog(__file__, "budget", vars(args))
    file = log.figure(draw(rows), "budget")
    log.finish(rows=rows)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
