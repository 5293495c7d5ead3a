"""Preferences on a real model: DPO with LoRA on SmolLM2, in a few minutes on a laptop, and what the loss does not say.

    uv run stages run 12 demos/real.py                               # 1,100 pairs, which are downloaded
    uv run stages run 12 demos/real.py --data my/pairs.jsonl --name mine
    uv run stages run 12 demos/real.py --loss ipo --name ipo

The base is frozen, and each matrix of its blocks gets an adapter (lora.py). Before training the adapters do nothing, so
the model is its own reference: ln P of all answers is worked out once, then, and no second model is needed.

A tenth of the questions is held out, the same for every `--seed`, and with a question all pairs that it has. There, and
in nats:

- `right`: the share of pairs in which the implicit reward, beta ln (P / P_reference), prefers the chosen answer. Before
  training all rewards are 0, and half counts as right. The interval is that of so few pairs.
- `margin`: by how much the reward of the chosen answer is higher, the mean over pairs.
- `likelier`: the share of pairs in which the chosen answer is the likelier one.
- `chosen` and `rejected`: the mean of ln P of a whole answer. The loss asks that their difference grows. It is content
  where both fall, and the chosen one less ("displacement"). What becomes likelier then is something else, which nobody
  compared: look at the answers.

Answers of a length of their own would be easy to tell apart: the last line says how far a ruler comes.

A run of a few minutes is not resumed. After Ctrl-C, the adapter of the steps so far is kept.
"""

import argparse
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # the stage's own modules

from shared import corpus, options
from shared.console import progress, say, table
from shared.device import setup
from shared.errors import BadInput
from shared.interrupt import Interrupt
from shared.program import run_program
from shared.runlog import RunLog, read_metrics

import torch
from matplotlib.figure import Figure

import lora
from audit import length_rule
from chat import open_model, prompt
from demos.real_rlvr import HUB, quicker
from dpo import DPOConfig, dpo_step, encode, reference_log_probs
from evaluate import answers, interval
from hf import Opened
from learn import Run
from preferences import both, read_pairs, split_by_prompt
from reward import accuracy

FIXED = ("eval_every", "temperature")  # of DPO's recipe, and of no use here


@dataclass
class Recipe(DPOConfig):
    """The run. Raises BadInput for one that cannot be."""

    steps: int = 40  # optimiser steps
    batch_size: int = 8  # pairs of a step
    lr: float = 2e-4  # learning rate of the adapters
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # of the products; auto: the faster on this machine
    shown: int = 4  # held-out questions in the table
    length: int = 60  # most tokens of an answer in the table

    def __post_init__(self):
        super().__post_init__()
        if self.shown < 1:
            raise BadInput(f"--shown {self.shown}: it must be at least 1")


def fitting(opened: Opened, pairs: list[dict], what: str) -> tuple[list[dict], list]:
    """Pairs, and the same as tokens. One that is longer than the model's context is left out, and that is said."""
    room = opened.model.config.block_size
    kept = [pair for pair in pairs
            if max(len(prompt(opened, talk, add_generation_prompt=False)) for talk in both(pair)) <= room]
    if len(kept) < len(pairs):
        say(f"{what}: {len(pairs) - len(kept)} of {len(pairs)} pairs are longer than the model's context and left out")
    if not kept:
        raise BadInput(f"{what}: no pair fits into the model's context")
    return kept, encode(opened, kept)


def passes(count: int, config: Recipe) -> list[list[int]]:
    """Which pairs each step learns from: each of them once, then all again in another order. Raises BadInput."""
    if count < config.batch_size:
        raise BadInput(f"{count} pairs do not fill a batch of {config.batch_size}: use more, or a smaller batch")
    size, order = config.batch_size, []
    while len(order) < config.steps * size:
        order += random.Random(f"{config.seed} {len(order)}").sample(range(count), count)
    return [order[step * size:(step + 1) * size] for step in range(config.steps)]


def exam(now, before, beta: float) -> dict:
    """The table's row: ln P of the chosen and the rejected answer of each pair, now and before, [N, 2] x 2."""
    moved = now - before
    right = accuracy(moved[:, 0], moved[:, 1])
    low, high = interval(right * len(moved), len(moved))
    return {"right": right, "low": low, "high": high, "margin": beta * (moved[:, 0] - moved[:, 1]).mean().item(),
            "likelier": accuracy(now[:, 0], now[:, 1]), "chosen": now[:, 0].mean().item(),
            "rejected": now[:, 1].mean().item()}  # fmt: skip


def draw(rows: list[dict], moved, right: float) -> Figure:
    """By step, on the pairs that are learned next: by how much ln P has changed, and the share of pairs right."""
    fig = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, other = fig.subplots(1, 2)
    width = max(1, len(rows) // 16)
    ends = range(width, len(rows) + 1, width)
    for i, (axes, name) in enumerate(((left, "chosen"), (left, "rejected"), (other, "right_pairs"))):
        smooth = [mean(row[name] for row in rows[end - width:end]) for end in ends]
        (line,) = axes.plot(ends, smooth, label=f"{name.replace('_', ' ')}, mean of {width} steps")
        axes.plot(len(rows), right if axes is other else moved[i], "o", color=line.get_color(), label="held out")
    left.axhline(0, color="grey", lw=0.8, ls=":")
    left.set(xlabel="step", ylabel="change of ln P of an answer, nats")
    other.set(xlabel="step", ylabel="pairs ranked right by the implicit reward", ylim=(0, 1.02))
    for axes in (left, other):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return fig


def main(argv: list[str] | None = None):
    begin = time.perf_counter()
    parser = options.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of pairs (default: the published preferences.json)")
    parser.add_argument("--model", default="smollm2", help="what chat.py opens (default: smollm2)")
    parser.add_argument("--name", default="real", help="the run's folder under out/ (default: real)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    options.add(parser, Recipe, FIXED)
    options.add(parser, lora.LoRAConfig, ("dropout",))
    args = parser.parse_args(argv)
    config, adapter = options.build(Recipe, args), options.build(lora.LoRAConfig, args)
    device = setup(args.device, config.seed)
    if config.precision == "auto":
        config = replace(config, precision=quicker(device))
    training, held_out = split_by_prompt(read_pairs(args.data or corpus.records("preferences")), seed=0)
    opened = open_model(args.model, device)
    model = opened.model
    (training, rows), (held_out, tests) = fitting(opened, training, "training"), fitting(opened, held_out, "held out")
    plan = passes(len(rows), config)
    used = sorted({i for places in plan for i in places})
    asked = [pair["prompt"] for pair in held_out if len(prompt(opened, pair["prompt"])) + config.length <=
             model.config.block_size][:config.shown]

    def texts() -> list[str]:
        said, ended = answers(opened, asked, config.length) if asked else ([], [])
        return [text.strip() + ("" if over else " ...") for text, over in zip(said, ended, strict=True)]

    with RunLog(__file__, args.name, vars(args)) as log:
        early = texts()
        before = torch.zeros(len(rows), 2)
        before[used] = reference_log_probs(model, [rows[i] for i in used], config.precision, size=16)
        first = reference_log_probs(model, tests, config.precision, size=16)
        asking = time.perf_counter() - begin
        lora.add(model, adapter)  # begins as the base
        tuned = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in tuned)
        say(f"{len(used)} of {len(rows)} pairs are used, {len(tests)} held out; {count:,} parameters are trained; "
            f"{config.precision}; {asking:.0f} s so far")
        optimizer = torch.optim.AdamW(tuned, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        run = Run(args, config, opened, None, [], [], optimizer)
        done, started = 0, time.perf_counter()
        with Interrupt() as interrupt, progress(config.steps, "learning") as bar:
            for done, places in enumerate(plan, 1):
                told = dpo_step(run, rows, before, places, done - 1)
                log.metrics(done, **told)
                bar.update(done, loss=told["loss"], chosen=told["chosen"], rejected=told["rejected"])
                if interrupt.asked:
                    break
        trained = time.perf_counter() - started
        folder = lora.save_adapter(model, log.folder / "adapter", HUB.get(args.model, args.model))
        log.keep()
        how = (f"the adapter is in {folder}: lora.load_adapter(chat.open_model({args.model!r}).model, folder) puts it "
               "beside its base, and so does peft's PeftModel.from_pretrained(model, folder)")
        if done < config.steps:
            say(f"stopped at step {done}; {how}")
            return 130
        last, late = reference_log_probs(model, tests, config.precision, size=16), texts()
        found = [{"": name} | exam(now, first, config.beta) for name, now in (("before", first), ("after", last))]
        table(f"{len(tests)} held-out pairs", found)
        shown = [{"question": talk[-1]["content"], "before": a, "after": b}
                 for talk, a, b in zip(asked, early, late, strict=True)]
        table(f"held-out questions; an answer that is longer than {config.length} tokens ends in ...", shown)
        moved = (last - first).mean(0).tolist()
        log.figure(draw(read_metrics(log.folder), moved, found[1]["right"]), "displacement")
        ruler, share = length_rule(training, held_out)
        seconds = time.perf_counter() - begin
        log.finish(steps=done, seconds=seconds, training=trained, precision=config.precision, trained=count, rows=found,
                   moved=moved, ruler=share, answers=shown)
    say(f"held-out pairs ranked right {found[1]['right']:.2f}, margin {found[1]['margin']:.2f}; ln P of chosen answers "
        f"{moved[0]:+.2f} nats, of rejected ones {moved[1]:+.2f}; {seconds:.0f} s, of which {trained:.0f} s training")
    say(f"a ruler that prefers the {ruler} answer ranks {share:.2f} right")
    say(how)


if __name__ == "__main__":
    run_program(main)
