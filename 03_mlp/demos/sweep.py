"""A small hyperparameter sweep: change one setting at a time, with several seeds, and see which differences are real.

    uv run stages run 03 demos/sweep.py
    uv run stages run 03 demos/sweep.py --steps 1000 --seeds 5

Two runs that differ in nothing but the seed do not end at the same loss. That spread is the ruler: a setting that is
better by less than it has not been shown to be better.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.program import run_program
from shared.runlog import RunLog

import torch
from matplotlib.figure import Figure

from data import Dataset, batches, load_data
from model import MLP, ModelConfig
from train import TrainConfig, evaluate, make_optimizer, train

BASE = {"block_size": 8, "n_embd": 24, "n_hidden": 256, "batch_size": 256, "lr": 3e-3, "weight_decay": 0.01}
CHANGES = {
    "block_size": (2, 4, 16), "n_embd": (8,), "n_hidden": (64, 1024), "batch_size": (64, 1024), "lr": (1e-3, 1e-2),
    "weight_decay": (0.3,),
}
NOISE = 2  # standard deviations that a difference must exceed


def settings() -> list[tuple[str, dict]]:
    """The base, and each change of one value: [("base", {...}), ("block_size 2", {...}), ...]."""
    changed = [(f"{key} {value:g}", BASE | {key: value}) for key, values in CHANGES.items() for value in values]
    return [("base", BASE), *changed]


def run(setting: dict, data: Dataset, steps: int, seed: int) -> dict:
    """Train with `setting` from `seed`: the number of parameters, the validation loss, the seconds it took."""
    shape = {key: setting[key] for key in ("block_size", "n_embd", "n_hidden")}
    recipe = {key: setting[key] for key in ("batch_size", "lr", "weight_decay")}
    torch.manual_seed(seed)
    model = MLP(ModelConfig(vocab_size=len(data.tokenizer), **shape))
    config = TrainConfig(steps=steps, seed=seed, **recipe)
    stream = batches(data.train, model.config.block_size, config.batch_size, seed)
    start = time.perf_counter()
    for _ in train(model, stream, config, make_optimizer(model, config)):
        pass
    seconds = time.perf_counter() - start
    params = sum(p.numel() for p in model.parameters())
    return {"params": params, "loss": evaluate(model, data.val), "seconds": seconds}


def noise(results: dict[str, list[dict]]) -> float:
    """Standard deviation of the loss between runs that differ only in the seed, pooled over all settings."""
    return statistics.mean(statistics.variance(r["loss"] for r in runs) for runs in results.values()) ** 0.5


def summary(results: dict[str, list[dict]]) -> list[dict]:
    """One row for each setting: the mean over its seeds, and whether its distance from the base is more than noise.

    The mean of n runs varies by noise / sqrt(n), the difference of two such means by sqrt(2) times that.
    """
    base = statistics.mean(r["loss"] for r in results["base"])
    rows = []
    for name, runs in results.items():
        loss = statistics.mean(r["loss"] for r in runs)
        doubt = NOISE * noise(results) * (2 / len(runs)) ** 0.5
        verdict = "noise" if abs(loss - base) <= doubt else "better" if loss < base else "worse"
        rows.append({
            "setting": name, "params": runs[0]["params"], "seconds": statistics.median(r["seconds"] for r in runs),
            "loss": loss, "to base": f"{loss - base:+.3f} ± {doubt:.3f}" if name != "base" else "",
            "verdict": verdict if name != "base" else "",
        })
    return rows


def draw(results: dict[str, list[dict]], steps: int) -> Figure:
    """A dot for each run, a line of dots for each setting."""
    fig = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = fig.subplots()
    for i, runs in enumerate(results.values()):
        axes.plot([r["loss"] for r in runs], [i] * len(runs), "o", alpha=0.6, color="black" if i == 0 else "tab:blue")
    axes.axvline(statistics.mean(r["loss"] for r in results["base"]), color="gray", linestyle=":")
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set(xlabel="validation loss, nats/char", title=f"one setting changed at a time, {steps} steps, one dot a seed")
    return fig


def main(argv=None):
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="shakespeare, names, python-docs or a text file (default: shakespeare)")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run (default: 400)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each setting (default: 3)")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.seeds < 2:
        raise BadInput("--steps must be at least 1, and --seeds at least 2: one run alone has no spread")
    setup("cpu")
    data = load_data(args.corpus)
    log = RunLog(__file__, "sweep", {**vars(args), "corpus": data.name, "base": BASE})

    results = {name: [] for name, _ in settings()}
    done = 0
    with progress(args.seeds * len(results), "runs") as bar:
        for name, setting in settings():
            for seed in range(args.seeds):
                results[name].append(run(setting, data, args.steps, seed))
                done += 1
                log.metrics(step=done, setting=name, seed=seed, **results[name][-1])
                bar.update(done, loss=results[name][-1]["loss"], text=name)
    rows = summary(results)
    say("base: " + ", ".join(f"{key} {value:g}" for key, value in BASE.items()))
    table(f"{data.name}: {args.steps} steps, {args.seeds} seeds, nats per character on the validation text", rows)
    say(f"Runs that differ only in the seed are {noise(results):.4f} apart (standard deviation over all settings).")
    file = log.figure(draw(results, args.steps), "sweep")
    log.finish(steps=args.steps, noise=noise(results), rows=rows)
    say(f"figure: {file}")


if __name__ == "__main__":
    run_program(main)
