"""The whole way in one command: a base, a policy, a reward model, and four ways to learn from rewards.

    uv run python pipeline.py                  # parts that were made before are kept
    uv run python pipeline.py --again          # the four ways anew
    uv run python pipeline.py --only grpo dpo

All start from the policy "lazy", which was tuned on demonstrations with mistakes. It can do better than it does: its
likeliest answers are mostly wrong, and among several drawn ones there often is a right one.
"""

import argparse
import json

from shared import options
from shared.console import say, table
from shared.program import run_program
from shared.runlog import RunLog, run_folder

import dpo
import grpo
import ppo

# What each way is told. "ppo-free" is not held near the reference, and goes fast: what its judge likes is not what is
# right.
WAYS = {
    "dpo": (dpo.main, []),
    "grpo": (grpo.main, []),
    "ppo": (ppo.main, []),
    "ppo-free": (ppo.main, ["--beta", "0", "--lr", "1e-3"]),
}


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    parser.add_argument("--again", action="store_true", help="do not keep what was made before")
    parser.add_argument("--corpus", help="the text of the base, where the tasks' words are from (default: shakespeare)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    args = parser.parse_args(argv)
    rows = []
    for name in args.only:
        way, flags = WAYS[name]
        file = run_folder(__file__, name) / "summary.json"
        if args.again or not file.is_file():
            say(f"\n{name}")
            text = ["--corpus", args.corpus] if args.corpus else []
            if way([*flags, "--name", name, "--device", args.device, *text]):
                return 130
        told = json.loads(file.read_text("utf-8"))
        if not rows:
            rows.append({"way": "policy", "greedy": told["first_greedy"], "drawn": told["first_sampled"], "kl": 0.0})
        rows.append({"way": name, "greedy": told["greedy"], "drawn": told["sampled"], "kl": told["kl"],
                     "score": told.get("reward") if name.startswith("ppo") else None, "tax": told["tax"],
                     "seconds": told["seconds"]})
    table("right answers to new words, the likeliest or drawn ones; KL from the policy, nats an answer", rows)
    with RunLog(__file__, "pipeline", vars(args)) as log:
        draw(rows, log)
        log.finish(rows=rows)
    say(f"saved in {log.folder}")


def draw(rows: list[dict], log):
    """The figure: how many answers are right after each way, the likeliest and drawn ones."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(6, 3))
    axes = figure.subplots()
    for i, name in enumerate(("greedy", "drawn")):
        axes.bar([j + 0.4 * (i - 0.5) for j in range(len(rows))], [row[name] for row in rows], 0.38, label=name)
    axes.set(xticks=range(len(rows)), ylabel="right answers to new words", ylim=(0, 1))
    axes.set_xticklabels([row["way"] for row in rows])
    axes.legend()
    log.figure(figure, "ways")


if __name__ == "__main__":
    run_program(main)
