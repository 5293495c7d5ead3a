"""The whole way in one command: a base, a policy, a reward model, and four ways to learn from rewards.

    uv run python pipeline.py                  # parts that were made before are kept
    uv run python pipeline.py --again          # the four ways anew
    uv run python pipeline.py --only grpo dpo

All start from the policy "lazy", which was tuned on demonstrations with mistakes. It can do better than it does: its
likeliest answers are mostly wrong, and among several drawn ones there often is a right one. A way that was stopped goes
on. A run of its name that was made with other flags is made anew.

At the end all models are looked at alike: their loss on the text of the base, nats per character, their right answers
to new words, the likeliest or drawn ones, and the score that the reward model gives to the drawn ones, in units in
which the policy's have mean 0 and spread 1. The base has tags that it never saw.
"""

import argparse

from shared import corpus, options
from shared.console import progress, say, table
from shared.device import setup
from shared.program import run_program
from shared.runlog import RunLog, run_folder

import checkpoint
import dpo
import grpo
import ppo
import tasks
from chat import open_model, ours, with_tags
from evaluate import text_loss
from hf import Opened
from learn import RLConfig, finish
from preferences import open_policy
from rollout import look

# Each way with its recipe. "ppo-free" is not held near the reference, and goes fast: what its judge likes is not what
# is right.
WAYS = {
    "dpo": (dpo.main, dpo.DPOConfig()),
    "grpo": (grpo.main, grpo.GRPOConfig()),
    "ppo": (ppo.main, ppo.PPOConfig()),
    "ppo-free": (ppo.main, ppo.PPOConfig(beta=0.0, lr=1e-3)),
}


def base(records: list[dict], device) -> Opened | None:
    """The run "base", with tags and letters that are new to it. None: there is none, the policy came from elsewhere."""
    file = run_folder(__file__, "base") / "model.pt"
    if not file.is_file():
        return None
    letters = {letter for r in records for message in r["messages"] for letter in message["content"]}
    return ours(*with_tags(*checkpoint.load(file, device)[:2], "".join(sorted(letters))))


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    parser.add_argument("--again", action="store_true", help="do not keep what was made before")
    parser.add_argument("--policy", default="lazy", help="a tuned model (default: lazy, which is tuned where needed)")
    parser.add_argument("--judge", default="reward", help="a run of reward.py (default: reward, trained where needed)")
    parser.add_argument("--corpus", help="the text of the base, where the tasks' words are from (default: shakespeare)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    args = parser.parse_args(argv)
    device = setup(args.device, RLConfig.seed)
    policy, judge = open_policy(args, device), ppo.open_judge(args, device)
    shared = {"policy": args.policy, "corpus": args.corpus, "records": 4000, "test": 180}
    seconds = {}
    for name in args.only:
        way, recipe = WAYS[name]
        more = {"dpo": {"data": None}, "grpo": {}}.get(name, {"judge": args.judge})
        if (told := finish(way, name, vars(recipe) | shared | more, args)) is None:
            return 130
        seconds[name] = told["seconds"]
    rows = looks(args, policy, judge, list(seconds))
    for row in rows:
        row["seconds"] = seconds.get(row["model"])
    table("loss on the text of the base; right answers to new words; KL from the policy, nats an answer", rows)
    with RunLog(__file__, "pipeline", vars(args)) as log:
        draw(rows, log)
        log.finish(rows=rows)
    say(f"saved in {log.folder}")


def looks(args, policy: Opened, judge: Opened, names: list[str]) -> list[dict]:
    """A row for the base, one for the policy, and one for each run of `names`."""
    device, known = policy.model.tok_emb.weight.device, tasks.words(corpus.load(args.corpus).text)
    records, held_out = tasks.make(known, "train", 256), tasks.make(known, "words", 180)
    scale = ppo.scale_of(judge, policy, records, RLConfig())
    models = {"base": base(held_out, device), "policy": policy, **{name: open_model(name, device) for name in names}}
    rows = []
    with progress(len(models), "looking") as bar:
        for i, (name, opened) in enumerate(models.items()):
            if opened is not None:
                told = look(opened, policy.model, held_out, RLConfig.length, lambda *x: ppo.judged(judge, *x, scale))
                rows.append({"model": name, "loss": text_loss(opened.model, opened.tokenizer, args.corpus),
                             "greedy": told["greedy"], "drawn": told["sampled"], "score": told["reward"],
                             "KL": None if name == "base" else told["kl"]})
            bar.update(i + 1)
    return rows


def draw(rows: list[dict], log):
    """The figure: for each model the loss on the text, right answers, and the score."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = {"loss on the base's text, nats/char": ["loss"], "right answers to new words": ["greedy", "drawn"],
              "score by the reward model": ["score"]}  # fmt: skip
    for axes, (title, names) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for i, name in enumerate(names):
            places = [j + 0.4 * (i - (len(names) - 1) / 2) for j in range(len(rows))]
            axes.bar(places, [row[name] for row in rows], 0.38 if len(names) > 1 else 0.7, label=name)
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(range(len(rows)), [row["model"].replace("-", "\n") for row in rows])
        if len(names) > 1:
            axes.legend(fontsize="small")
    log.figure(figure, "pipeline")


if __name__ == "__main__":
    run_program(main)
